"""Kernels over rows, and where they may run: what the compiler cannot split must not meet an array that it splits.

Under ``jit`` over several devices XLA splits a program by itself, and it refuses the kernels of Pallas, whose inside it
does not know. (``custom_partitioning``, which would tell it how, does not exist on TPUs: jax-ml/jax#38196.) On how many
devices a program runs is not known while it is traced, only when it is lowered; so an operation with a kernel is a
primitive of its own, and its lowering decides.
"""

import math
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.extend.core import Primitive
from jax.interpreters import batching, mlir

Outputs = tuple[jax.Array, ...]
Rows = Callable[[jax.Array], Outputs]
Shapes = Callable[[jax.ShapeDtypeStruct], tuple[jax.ShapeDtypeStruct, ...]]


def rows_operation(name: str, shapes: Shapes, kernels: Mapping[str, Rows], otherwise: Rows | None) -> Rows:
    """An operation on rows ``[B, M]`` that is a kernel where there is one for the platform and it may run.

    It may run where the program is for one device, and inside ``shard_map`` over all axes of the mesh, on the rows of
    each device. Under ``jit`` over several devices ``otherwise`` runs, and the compiler splits that.

    Args:
      name: of the primitive.
      shapes: from the [B, M] input to the outputs, each [B, something].
      kernels: by platform.
      otherwise: plain JAX with the same results; None for an operation that is its kernel everywhere, or an error.

    Returns:
      The operation. It takes ``vmap``, whose axes become rows of the kernel; a derivative it does not have.
    """
    primitive = Primitive(name)
    primitive.multiple_results = True
    primitive.def_impl(jax.jit(primitive.bind))
    primitive.def_abstract_eval(partial(_abstract, shapes))
    batching.primitive_batchers[primitive] = partial(_batch, primitive)
    if otherwise is not None:
        mlir.register_lowering(primitive, _lowering(partial(_vmapped, otherwise)))
    for platform, kernel in kernels.items():
        lowering = _lowering(partial(_flattened, kernel), None if otherwise is None else partial(_vmapped, otherwise))
        mlir.register_lowering(primitive, lowering, platform=None if otherwise is None else platform)
    return lambda z: tuple(primitive.bind(z))


def _abstract(shapes: Shapes, z: Any) -> list:
    rows = jax.ShapeDtypeStruct((math.prod(z.shape[:-1]), z.shape[-1]), z.dtype)
    return [z.update(shape=(*z.shape[:-1], out.shape[-1]), dtype=out.dtype, weak_type=False) for out in shapes(rows)]


def _batch(primitive: Primitive, arrays: tuple, axes: tuple) -> tuple:
    (z,), (axis,) = arrays, axes
    outputs = primitive.bind(jnp.moveaxis(z, axis, 0))
    return outputs, (0,) * len(outputs)


def _lowering(rows: Rows, split: Rows | None = None) -> Callable:
    def lower(context: mlir.LoweringRuleContext, z: Any) -> Any:
        chosen = rows if split is None or not _is_split(context.module_context.axis_context) else split
        return mlir.lower_fun(chosen, multiple_results=True)(context, z)

    return lower


def _is_split(context: Any) -> bool:
    """Whether XLA splits arrays by itself here: on several devices, but for axes that ``shard_map`` has split."""
    if hasattr(context, "manual_axes"):
        return set(context.manual_axes) != set(context.mesh.axis_names)
    return getattr(context, "num_devices", 2) != 1


def _flattened(rows: Rows, z: jax.Array) -> Outputs:
    outputs = rows(z.reshape(-1, z.shape[-1]))
    return tuple(out.reshape(*z.shape[:-1], out.shape[-1]) for out in outputs)


def _vmapped(rows: Rows, z: jax.Array) -> Outputs:
    """Over all axes but the last two, which unlike a reshape leaves them split as they are."""
    for _ in range(z.ndim - 2):
        rows = jax.vmap(rows)
    return rows(z)
