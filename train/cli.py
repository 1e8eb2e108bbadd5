"""What every command of the application shares: parsing, and one clear line when it cannot go on."""

import sys
from collections.abc import Callable
from typing import Any, NoReturn

import tyro

from jax_sae import InputError, keep_freed_memory


class RunFailed(RuntimeError):
    """The run cannot go on, through no fault of the input. The message is one line."""


def run(command: Callable[..., Any], argv: list[str] | None = None, *, prog: str) -> None:
    """Parses ``argv`` into the parameters of ``command`` and calls it.

    Prints one line to standard error and exits with code 2 on bad input (:class:`InputError`, a file that the
    operating system refuses, a package that is not installed) and on a command line that cannot be parsed, with
    code 1 on :class:`RunFailed`, and with 130 on Ctrl-C where the command does not save by itself.
    """
    keep_freed_memory()
    try:
        tyro.cli(command, args=argv, prog=prog, config=(tyro.conf.OmitArgPrefixes,))
    except (InputError, OSError) as error:
        _exit(error, 2)
    except ModuleNotFoundError as error:
        _exit(f"the package {error.name} is not installed; run: pip install 'jax_sae[demo]'", 2)
    except RunFailed as error:
        _exit(error, 1)
    except KeyboardInterrupt:
        _exit("interrupted; what is finished is kept, run the same command again to go on", 130)


def _exit(message: object, code: int) -> NoReturn:
    print(f"error: {' '.join(str(message).split())}", file=sys.stderr)
    raise SystemExit(code)
