"""Reductions of large arrays beside elementwise work on them."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax


def reduce_apart(function: Callable[..., Any], always: jax.Array, *arrays: jax.Array) -> Any:
    """``function(*arrays)``, small sums over large arrays, as a computation of its own on CPUs.

    XLA:CPU makes one fusion of a reduction and the elementwise operations before and after it, in which each scalar
    becomes an array of full size, written and read: an update of Adam with the norms of its rows costs three times as
    much as the one and then the other. The branch of a conditional takes no part in fusions outside of it.

    Args:
      function: from the arrays to a pytree of arrays.
      always: [] bool, True, which the compiler must not be able to tell: ``step >= 0`` of a counter.
      *arrays: what to reduce.
    """

    def never(*arrays: jax.Array) -> Any:
        return jax.tree.map(lambda out: jnp.zeros(out.shape, out.dtype), jax.eval_shape(function, *arrays))

    def on_cpu(always: jax.Array, *arrays: jax.Array) -> Any:
        return lax.cond(always, function, never, *arrays)

    return lax.platform_dependent(always, *arrays, cpu=on_cpu, default=lambda _, *arrays: function(*arrays))
