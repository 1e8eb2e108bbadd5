"""The largest entries of rows in order."""

import jax
from jax import lax
from jax.experimental.layout import Layout, with_layout_constraint

_NATIVE_ON_TPU = (128, 512)
MOST_WITHOUT_SORT = _NATIVE_ON_TPU[-1]


def top_k(z: jax.Array, k: int) -> tuple[jax.Array, jax.Array]:
    """``lax.top_k`` of rows [B, M]: (values, indices) [B, k].

    A TPU has it natively, in one read of the rows, for the 128 and the 512 largest alone; other numbers become a sort
    or a copy of the rows first. So as many are taken there, and the first k of them kept. The barrier keeps the
    compiler from making them the k largest again, the layout from turning the rows to suit what is kept.
    """
    size = next((size for size in _NATIVE_ON_TPU if k <= size <= z.shape[-1]), k)

    def taken(z: jax.Array) -> tuple[jax.Array, ...]:
        found = tuple(with_layout_constraint(found, Layout((0, 1))) for found in lax.top_k(z, size))
        return tuple(found[:, :k] for found in lax.optimization_barrier(found))

    values, indices = lax.platform_dependent(z, tpu=taken, default=lambda z: tuple(lax.top_k(z, k)))
    return values, indices
