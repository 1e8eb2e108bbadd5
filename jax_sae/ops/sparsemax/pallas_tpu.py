"""Sparsemax on TPUs: which scores the kernel takes, and the choice between it and plain JAX.

The compilers for v4, v5e, v5p, v6e and TPU7x accept the kernel, and in an interpreter it agrees with the definition; it
has not been run or timed on a TPU.
"""

import jax
import jax.numpy as jnp
from jax.sharding import AxisType

from jax_sae.ops.kernels import rows_operation
from jax_sae.ops.sparsemax.solver import Solver, Threshold
from jax_sae.ops.sparsemax.xla import NEWTON

_MIB = 1 << 20
_SMALL_MEMORY = ("TPU v2", "TPU v3", "TPU v4")


def refusal(z: jax.Array, axis_name: str | None) -> str | None:
    """Why the kernel does not take ``z [B, M]``, in words; None where it does."""
    if axis_name is not None:
        return f"axis_name is {axis_name!r}; the TPU kernel needs whole rows, use implementation='xla'"
    if z.dtype not in (jnp.float32, jnp.bfloat16):
        return f"scores are {z.dtype.name}; the TPU kernel takes float32 and bfloat16, use implementation='xla'"
    if _row_block_bytes(z) > _usable_memory():
        return (
            f"rows have {z.shape[-1]} scores; the TPU kernel holds {32 // z.dtype.itemsize} rows in "
            f"{_usable_memory() // _MIB} MiB of on-chip memory, use implementation='xla'"
        )
    return None


def _row_block_bytes(z: jax.Array) -> int:
    """Bytes of the smallest block of rows: 8 rows of float32, 16 of bfloat16."""
    return 32 * z.shape[-1]


def _usable_memory() -> int:
    """Three quarters of the on-chip memory of this machine's TPU; without one, of the smallest since v5e.

    64 MiB on v5p and TPU7x, 128 MiB on v5e and v6e, 16 MiB before.
    """
    small = jax.default_backend() == "tpu" and jax.devices()[0].device_kind.startswith(_SMALL_MEMORY)
    return (12 if small else 48) * _MIB


def _threshold_kernel(z: jax.Array) -> Threshold:
    from jax_sae.ops.sparsemax import pallas_tpu_kernel  # brings Pallas, which takes longer to import than this library

    buffers = 2 if 2 * _row_block_bytes(z) <= _usable_memory() else 1
    return pallas_tpu_kernel.threshold_call(z, buffers=buffers)


def _project_kernel(z: jax.Array) -> tuple[jax.Array]:
    """In one read and one write where two blocks of scores and two of p fit; else a second read, by plain JAX."""
    from jax_sae.ops.sparsemax import pallas_tpu_kernel

    if 4 * _row_block_bytes(z) <= _usable_memory():
        return (pallas_tpu_kernel.project_call(z),)
    top, tau, _ = _threshold_kernel(z)
    return (jnp.maximum((z.astype(top.dtype) - top) - tau, 0).astype(z.dtype),)


def _threshold_shapes(z: jax.ShapeDtypeStruct) -> tuple[jax.ShapeDtypeStruct, ...]:
    return tuple(jax.ShapeDtypeStruct((len(z), 1), dtype) for dtype in (jnp.float32, jnp.float32, jnp.int32))


def _same_shape(z: jax.ShapeDtypeStruct) -> tuple[jax.ShapeDtypeStruct]:
    return (jax.ShapeDtypeStruct(z.shape, z.dtype),)


_THRESHOLD = {"tpu": _threshold_kernel}
_PROJECT = {"tpu": _project_kernel}
_threshold_by_kernel = rows_operation("sparsemax_threshold_tpu", _threshold_shapes, _THRESHOLD, None)
_project_by_kernel = rows_operation("sparsemax_tpu", _same_shape, _PROJECT, None)
_threshold_anywhere = rows_operation(
    "sparsemax_threshold", _threshold_shapes, _THRESHOLD, lambda z: NEWTON.threshold(z, None)
)
_project_anywhere = rows_operation("sparsemax", _same_shape, _PROJECT, lambda z: (NEWTON.project(z, None),))


def kernel_threshold(z: jax.Array, axis_name: str | None = None) -> Threshold:
    """By the kernel, wherever it is called.

    Raises:
      ValueError: the kernel does not take ``z``, or the program is not for a TPU.
    """
    _check(z, axis_name)
    if not z.size:
        return NEWTON.threshold(z, None)
    top, tau, count = _threshold_by_kernel(z)
    return top, tau, count


def kernel_project(z: jax.Array, axis_name: str | None = None) -> jax.Array:
    """By the kernel, wherever it is called.

    Raises:
      ValueError: the kernel does not take ``z``, or the program is not for a TPU.
    """
    _check(z, axis_name)
    return _project_by_kernel(z)[0] if z.size else z


def _check(z: jax.Array, axis_name: str | None) -> None:
    reason = refusal(z, axis_name)
    if reason is not None:
        raise ValueError(reason)


def threshold(z: jax.Array, axis_name: str | None = None) -> Threshold:
    """By the kernel where the program is for a TPU, which takes ``z`` and need not be split; by plain JAX elsewhere."""
    if not _may_be_kernel(z, axis_name):
        return NEWTON.threshold(z, axis_name)
    top, tau, count = _threshold_anywhere(z)
    return top, tau, count


def project(z: jax.Array, axis_name: str | None = None) -> jax.Array:
    """As :func:`threshold`."""
    return _project_anywhere(z)[0] if _may_be_kernel(z, axis_name) else NEWTON.project(z, axis_name)


def _may_be_kernel(z: jax.Array, axis_name: str | None) -> bool:
    explicit = AxisType.Explicit in jax.typeof(z).sharding.mesh.axis_types
    return bool(z.size) and refusal(z, axis_name) is None and not explicit


PALLAS_TPU = Solver(kernel_threshold, kernel_project)
CHOSEN = Solver(threshold, project)
