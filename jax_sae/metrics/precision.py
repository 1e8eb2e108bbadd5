"""Matmuls of metrics are never rounded below float32, whatever the default of the program around them."""

import functools
from collections.abc import Callable
from typing import ParamSpec, TypeVar

import jax
import jax.numpy as jnp

_P = ParamSpec("_P")
_R = TypeVar("_R")


def full_precision(function: Callable[_P, _R]) -> Callable[_P, _R]:
    """``function`` with float32 matmuls in full, where TPUs and GPUs would take bfloat16 or TF32."""

    @functools.wraps(function)
    def wrapped(*args: _P.args, **kwargs: _P.kwargs) -> _R:
        with jax.default_matmul_precision("highest"):
            return function(*args, **kwargs)

    return wrapped


def at_least_float32(rows: jax.Array) -> jax.Array:
    """``rows`` in the dtype to compute in: float64 stays what it is, everything else becomes float32."""
    return rows.astype(jnp.promote_types(rows.dtype, jnp.float32))
