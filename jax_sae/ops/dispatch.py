"""The one place that decides which implementation of an operator runs."""

from collections.abc import Mapping
from typing import TypeVar

Implementation = TypeVar("Implementation")


def resolve(name: str | None, implementations: Mapping[str, Implementation], default: str) -> Implementation:
    """The implementation called ``name``; ``default`` when it is None. A name never falls back.

    Raises:
      ValueError: there is no implementation of that name.
    """
    chosen = default if name is None else name
    if chosen not in implementations:
        raise ValueError(f"implementation is {name!r}; expected None or one of {', '.join(implementations)}")
    return implementations[chosen]
