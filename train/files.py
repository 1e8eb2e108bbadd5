"""Files that are whole or absent."""

import json
import os
from pathlib import Path
from typing import Any

from jax_sae import InputError


def write_text(path: Path, text: str) -> Path:
    """Writes ``text`` beside ``path`` and moves it into place, so that a reader never sees half of it."""
    temporary = path.with_name(f".{path.name}.tmp")
    temporary.write_text(text, encoding="utf-8")
    os.replace(temporary, path)
    return path


def write_json(path: Path, value: Any) -> Path:
    """:func:`write_text` of ``value`` as JSON; NaN and infinities are refused, not written."""
    return write_text(path, json.dumps(value, indent=1, allow_nan=False) + "\n")


def read_json(path: Path) -> Any:
    """The JSON in ``path``.

    Raises:
      InputError: it is not JSON.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise InputError(f"{path} is not valid JSON ({error}); restore it or remove it") from error


def make_writable_folder(path: Path) -> Path:
    """Makes the folder ``path`` and makes sure that files can be written to it.

    Raises:
      InputError: it is a file, or nothing can be written there.
    """
    try:
        path.mkdir(parents=True, exist_ok=True)
        probe = path / ".writable"
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise InputError(
            f"cannot write to the folder {path} ({error.strerror}); choose another or mend its permissions"
        ) from error
    return path
