"""The one exception for input that the user can mend."""


class InputError(ValueError):
    """Bad input from outside the program: a file, a folder, a flag, an array.

    The message is one line that names what was found, what was expected and what to do. The command
    line prints it and exits with code 2; a program that uses the library catches it as ``ValueError``.
    """
