"""The public sparsemax: any axis, any batch shape, masked, sharded, differentiable twice."""

import math
from functools import partial

import jax
import jax.numpy as jnp
from jax import lax

from jax_sae.ops.dispatch import resolve
from jax_sae.ops.sparsemax.pallas_gpu import PALLAS_GPU
from jax_sae.ops.sparsemax.pallas_tpu import CHOSEN, PALLAS_TPU
from jax_sae.ops.sparsemax.solver import Solver, Threshold, compute_dtype
from jax_sae.ops.sparsemax.xla import NEWTON, SORT

_IMPLEMENTATIONS = {"xla": NEWTON, "sort": SORT, "pallas_tpu": PALLAS_TPU, "pallas_gpu": PALLAS_GPU}


def sparsemax(
    z: jax.Array,
    axis: int = -1,
    *,
    where: jax.Array | None = None,
    axis_name: str | None = None,
    implementation: str | None = None,
) -> jax.Array:
    r"""Euclidean projection of scores onto the probability simplex.

    .. math:: p_i = \max(z_i - \tau, 0), \qquad \sum_i p_i = 1

    Sparse where softmax is dense: every score below the threshold tau gets exactly 0.

    Args:
      z: scores, any shape, float or integer. float64 is computed in float64, everything else in float32.
      axis: the axis to project along; at least one entry.
      where: boolean, broadcastable to ``z``; entries that are False take no part and get p = 0.
      axis_name: inside ``shard_map`` or ``pmap``, the mapped axis that ``axis`` is sharded over: a row is then the
        concatenation of its shards.
      implementation: ``"xla"`` (Newton's method, no sort), ``"sort"`` (the definition), ``"pallas_tpu"`` or
        ``"pallas_gpu"`` (kernels that read the scores once and write p once). A name is used or refused, it never
        falls back. None is chosen when a program is compiled: on TPUs ``"pallas_tpu"`` in a program for one device or
        inside ``shard_map`` over all axes of its mesh, for float32 and bfloat16 rows that fit on the chip; ``"xla"``
        for everything else on TPUs, and on CPUs and GPUs. The GPU kernel has to be asked for.

    Returns:
      p, shape and dtype of ``z`` (float32 for integers). A row with NaN, with +inf, or with nothing above -inf
      (``where`` False throughout) is NaN; entries of -inf get 0.

    Raises:
      ValueError: the axis is empty or absent, or ``implementation`` is unknown.

    Derivatives: with the support S = {i: p_i > 0}, J = diag(s) - s s^T / |S|. An entry tied with tau is outside S: its
    derivative is 0, one of the subgradients there. Reverse mode keeps p and nothing else; reverse over reverse and
    forward over reverse (``jax.hessian``) work. Forward mode alone is :func:`sparsemax_jvp`.

    Example:
      >>> import jax.numpy as jnp
      >>> from jax_sae import sparsemax
      >>> sparsemax(jnp.array([0.5, 1.5, 1.25, -3.0]))
      Array([0.   , 0.625, 0.375, 0.   ], dtype=float32)

    References:
      Martins and Astudillo 2016, "From Softmax to Sparsemax" (arXiv 1602.02068), equations 1, 11 and 14.
    """
    rows, mask, shape = _as_rows(z, axis, where, implementation)
    p = _sparsemax(rows, mask, axis_name, implementation)
    return jnp.moveaxis(p.reshape(shape), -1, axis)


def sparsemax_jvp(
    z: jax.Array,
    tangent: jax.Array,
    axis: int = -1,
    *,
    where: jax.Array | None = None,
    axis_name: str | None = None,
    implementation: str | None = None,
) -> tuple[jax.Array, jax.Array]:
    """:func:`sparsemax` and its derivative along ``tangent``: forward mode, which a ``custom_vjp`` does not take.

    Args:
      z: as for :func:`sparsemax`.
      tangent: direction, the shape of ``z``.
      axis: as for :func:`sparsemax`.
      where: as for :func:`sparsemax`.
      axis_name: as for :func:`sparsemax`.
      implementation: as for :func:`sparsemax`.

    Returns:
      (p, J tangent), both of the shape and dtype of p. The function may itself be differentiated, in either mode.

    Raises:
      ValueError: as for :func:`sparsemax`.

    Example:
      >>> import jax.numpy as jnp
      >>> from jax_sae import sparsemax_jvp
      >>> sparsemax_jvp(jnp.array([0.5, 1.5, 1.25, -3.0]), jnp.array([1.0, 2.0, 4.0, 0.0]))[1]
      Array([ 0., -1.,  1.,  0.], dtype=float32)
    """
    rows, mask, shape = _as_rows(z, axis, where, implementation)
    tangents, _, _ = _as_rows(tangent, axis, None, implementation)
    forward = lambda rows: _sparsemax_with_jvp(rows, mask, axis_name, implementation)  # noqa: E731
    both = jax.jvp(forward, (rows,), (tangents.astype(rows.dtype),))
    p, derivative = (jnp.moveaxis(out.reshape(shape), -1, axis) for out in both)
    return p, derivative


def sparsemax_threshold(
    z: jax.Array,
    axis: int = -1,
    *,
    where: jax.Array | None = None,
    axis_name: str | None = None,
    implementation: str | None = None,
) -> tuple[jax.Array, jax.Array]:
    """The threshold of :func:`sparsemax` and the size of its support, without forming p.

    Args:
      z: as for :func:`sparsemax`.
      axis: as for :func:`sparsemax`.
      where: as for :func:`sparsemax`.
      axis_name: as for :func:`sparsemax`.
      implementation: as for :func:`sparsemax`.

    Returns:
      tau: float32 (float64 for float64 scores), the shape of ``z`` without ``axis``; NaN where p is NaN.
      count: int32, same shape, the size of the support; 0 where p is NaN.

    Raises:
      ValueError: as for :func:`sparsemax`.

    tau is rounded to its dtype: far from 0, a score within one rounding of tau may compare otherwise with it than
    :func:`sparsemax`, which takes the row maximum off first, and ``count`` do.

    Derivatives: d tau is the mean of dz over the support (0 for entries tied with tau), in forward and reverse mode;
    count has none.

    Example:
      >>> import jax.numpy as jnp
      >>> from jax_sae import sparsemax_threshold
      >>> tau, count = sparsemax_threshold(jnp.array([0.5, 1.5, 1.25, -3.0]))
      >>> float(tau), int(count)
      (0.875, 2)
    """
    rows, mask, shape = _as_rows(z, axis, where, implementation)
    top, tau, count = _threshold(rows, mask, axis_name, implementation)
    return (top + tau).reshape(shape[:-1]), count.reshape(shape[:-1])


@partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def _sparsemax(z: jax.Array, where: jax.Array | None, axis_name: str | None, implementation: str | None) -> jax.Array:
    return _sparsemax_with_jvp(z, where, axis_name, implementation)


def _forward(
    z: jax.Array, where: jax.Array | None, axis_name: str | None, implementation: str | None
) -> tuple[jax.Array, jax.Array]:
    p = _sparsemax_with_jvp(z, where, axis_name, implementation)
    return p, p


def _backward(
    axis_name: str | None, implementation: str | None, p: jax.Array, cotangent: jax.Array
) -> tuple[jax.Array, None]:
    return _project(p, cotangent, axis_name), None


_sparsemax.defvjp(_forward, _backward)


@partial(jax.custom_jvp, nondiff_argnums=(2, 3))
def _sparsemax_with_jvp(
    z: jax.Array, where: jax.Array | None, axis_name: str | None, implementation: str | None
) -> jax.Array:
    return _solver(implementation).project(_masked(z, where), axis_name)


@_sparsemax_with_jvp.defjvp
def _sparsemax_jvp(
    axis_name: str | None, implementation: str | None, primals: tuple, tangents: tuple
) -> tuple[jax.Array, jax.Array]:
    p = _sparsemax_with_jvp(*primals, axis_name, implementation)
    # Rematerialised, so that reverse mode keeps p alone: the p that the caller's next operation keeps anyway.
    project = jax.checkpoint(partial(_project, axis_name=axis_name), prevent_cse=False)
    return p, project(p, tangents[0])


def _project(p: jax.Array, vector: jax.Array, axis_name: str | None) -> jax.Array:
    """The symmetric Jacobian at p times a vector: on the support, the vector minus its mean there."""
    support = p != 0  # with NaN, so that NaN rows stay NaN
    ones = jnp.sign(p.astype(compute_dtype(p)))  # 0, 1 or NaN
    vector = vector.astype(ones.dtype)
    count = jnp.sum(ones, axis=-1, keepdims=True)
    total = jnp.sum(jnp.where(support, vector, 0), axis=-1, keepdims=True)
    if axis_name is not None:  # apart: a joint psum of the two cannot be transposed
        count, total = lax.psum(count, axis_name), lax.psum(total, axis_name)
    return jnp.where(support, vector - total / count, 0).astype(p.dtype)


@partial(jax.custom_jvp, nondiff_argnums=(2, 3))
def _threshold(z: jax.Array, where: jax.Array | None, axis_name: str | None, implementation: str | None) -> Threshold:
    return _solver(implementation).threshold(_masked(z, where), axis_name)


@_threshold.defjvp
def _threshold_jvp(
    axis_name: str | None, implementation: str | None, primals: tuple, tangents: tuple
) -> tuple[Threshold, tuple]:
    """The derivative of top + tau stands with tau; that of top is 0, since only their sum is used."""
    z = _masked(*primals)
    top, tau, count = _threshold(*primals, axis_name, implementation)
    support = ~((z.astype(top.dtype) - top) - tau <= 0)  # all of a row whose tau is NaN
    total = jnp.sum(jnp.where(support, tangents[0].astype(top.dtype), 0), axis=-1, keepdims=True)
    if axis_name is not None:
        total = lax.psum(total, axis_name)
    mean = total / jnp.where(jnp.isnan(tau), jnp.nan, count)
    return (top, tau, count), (jnp.zeros_like(top), mean, jnp.zeros(count.shape, jax.dtypes.float0))


def _solver(implementation: str | None) -> Solver:
    return CHOSEN if implementation is None else resolve(implementation, _IMPLEMENTATIONS, default="xla")


def _masked(z: jax.Array, where: jax.Array | None) -> jax.Array:
    return z if where is None else jnp.where(where, z, -jnp.inf)


def _as_rows(
    z: jax.Array, axis: int, where: jax.Array | None, implementation: str | None
) -> tuple[jax.Array, jax.Array | None, tuple[int, ...]]:
    """(z [B, M], where [B, M] or None, the shape of z with ``axis`` last)."""
    _solver(implementation)  # an unknown name is refused before anything runs
    z = jnp.asarray(z)
    if not -z.ndim <= axis < z.ndim:
        raise ValueError(f"axis is {axis} for scores of shape {z.shape}; expected an axis of the scores")
    if z.shape[axis] == 0:
        raise ValueError(f"scores have shape {z.shape}, empty along axis {axis}; expected at least one entry")
    if not jnp.issubdtype(z.dtype, jnp.floating):
        z = z.astype(jnp.float32)
    moved = jnp.moveaxis(z, axis, -1)
    rows = (math.prod(moved.shape[:-1]), moved.shape[-1])
    if where is not None:
        where = jnp.moveaxis(jnp.broadcast_to(where, z.shape), axis, -1).reshape(rows)
    return moved.reshape(rows), where, moved.shape
