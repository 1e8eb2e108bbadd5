"""What every command of the application shares: parsing, and one clear line for bad input."""

import sys
from collections.abc import Callable
from typing import Any

import tyro

from jax_sae.errors import InputError


def run(command: Callable[..., Any], argv: list[str] | None = None, *, prog: str) -> Any:
    """Parses ``argv`` into the parameters of ``command`` and calls it.

    Bad input (:class:`InputError`, or the operating system refusing a file) prints one line to standard
    error and exits with code 2, as does a command line that cannot be parsed.
    """
    try:
        return tyro.cli(command, args=argv, prog=prog, config=(tyro.conf.OmitArgPrefixes,))
    except (InputError, OSError) as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        raise SystemExit(2) from None
