"""The public sparsemax: any axis, any batch shape, masked, sharded, differentiable twice."""

from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
from jax import lax

from jax_sae.ops.dispatch import resolve
from jax_sae.ops.sparsemax.xla import Threshold, newton_threshold, sort_threshold

_IMPLEMENTATIONS: dict[str, Callable[[jax.Array, str | None], Threshold]] = {
    "xla": newton_threshold,
    "sort": sort_threshold,
}


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
      z: scores, any shape, float or integer (computed as float32). float16 and bfloat16 are computed in float32.
      axis: the axis to project along; at least one entry.
      where: boolean, broadcastable to ``z``; entries that are False take no part and get p = 0.
      axis_name: inside ``shard_map`` or ``pmap``, the mapped axis that ``axis`` is sharded over.
      implementation: ``"xla"`` (Newton's method, no sort) or ``"sort"`` (the definition); None chooses. A name
        is used or refused, it never falls back.

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
    rows, restore = _as_rows(z, axis, where, implementation)
    return restore(_sparsemax(rows, axis_name, implementation)).astype(_result_dtype(z))


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
    rows, restore = _as_rows(z, axis, where, implementation)
    tangents, _ = _as_rows(tangent, axis, None, implementation)
    p, out = jax.jvp(lambda z: _sparsemax_with_jvp(z, axis_name, implementation), (rows,), (tangents,))
    dtype = _result_dtype(z)
    return restore(p).astype(dtype), restore(out).astype(dtype)


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

    Derivatives: that of tau is the mean of the scores' over the support; count has none.

    Example:
      >>> import jax.numpy as jnp
      >>> from jax_sae import sparsemax_threshold
      >>> tau, count = sparsemax_threshold(jnp.array([0.5, 1.5, 1.25, -3.0]))
      >>> float(tau), int(count)
      (0.875, 2)
    """
    rows, _ = _as_rows(z, axis, where, implementation)
    tau, count = _threshold(rows, axis_name, implementation)
    shape = z.shape[: axis % z.ndim] + z.shape[axis % z.ndim + 1 :]
    return tau.reshape(shape), count.reshape(shape)


@partial(jax.custom_vjp, nondiff_argnums=(1, 2))
def _sparsemax(z: jax.Array, axis_name: str | None, implementation: str | None) -> jax.Array:
    return _sparsemax_with_jvp(z, axis_name, implementation)


def _forward(z: jax.Array, axis_name: str | None, implementation: str | None) -> tuple[jax.Array, jax.Array]:
    p = _sparsemax_with_jvp(z, axis_name, implementation)
    return p, p


def _backward(
    axis_name: str | None, implementation: str | None, p: jax.Array, cotangent: jax.Array
) -> tuple[jax.Array]:
    return (_project(p, cotangent, axis_name),)


_sparsemax.defvjp(_forward, _backward)


@partial(jax.custom_jvp, nondiff_argnums=(1, 2))
def _sparsemax_with_jvp(z: jax.Array, axis_name: str | None, implementation: str | None) -> jax.Array:
    top, tau, _ = resolve(implementation, _IMPLEMENTATIONS, default="xla")(z, axis_name)
    return jnp.maximum((z - top) - tau, 0)


@_sparsemax_with_jvp.defjvp
def _sparsemax_jvp(
    axis_name: str | None, implementation: str | None, primals: tuple[jax.Array], tangents: tuple[jax.Array]
) -> tuple[jax.Array, jax.Array]:
    p = _sparsemax_with_jvp(primals[0], axis_name, implementation)
    # Rematerialised, so that reverse mode through this rule keeps p alone.
    tangent = jax.checkpoint(partial(_project, axis_name=axis_name), prevent_cse=False)(p, tangents[0])
    return p, tangent


def _project(p: jax.Array, vector: jax.Array, axis_name: str | None) -> jax.Array:
    """S * (v - mean of v over the support): the symmetric Jacobian at p applied to v; NaN rows stay NaN."""
    support = p > 0
    count = jnp.sum(support, axis=-1, keepdims=True, dtype=p.dtype)
    total = jnp.sum(jnp.where(support, vector, 0), axis=-1, keepdims=True)
    if axis_name is not None:  # apart: a joint psum of the two cannot be transposed
        count, total = lax.psum(count, axis_name), lax.psum(total, axis_name)
    projected = jnp.where(support, vector - total / jnp.maximum(count, 1), 0)
    return jnp.where(jnp.isnan(p), p, projected)


@partial(jax.custom_jvp, nondiff_argnums=(1, 2))
def _threshold(z: jax.Array, axis_name: str | None, implementation: str | None) -> tuple[jax.Array, jax.Array]:
    top, tau, count = resolve(implementation, _IMPLEMENTATIONS, default="xla")(z, axis_name)
    return top + tau, jnp.where(jnp.isnan(tau), 0, count)


@_threshold.defjvp
def _threshold_jvp(
    axis_name: str | None, implementation: str | None, primals: tuple[jax.Array], tangents: tuple[jax.Array]
) -> tuple:
    z = primals[0]
    tau, count = _threshold(z, axis_name, implementation)
    total = jnp.sum(jnp.where(z > tau, tangents[0], 0), axis=-1, keepdims=True)
    if axis_name is not None:
        total = lax.psum(total, axis_name)
    return (tau, count), (total / count, jnp.zeros(count.shape, jax.dtypes.float0))


def _as_rows(
    z: jax.Array, axis: int, where: jax.Array | None, implementation: str | None
) -> tuple[jax.Array, Callable[[jax.Array], jax.Array]]:
    """``z`` as rows [B, M] in the dtype of the computation, and how to put rows back."""
    resolve(implementation, _IMPLEMENTATIONS, default="xla")  # an unknown name is refused before anything runs
    z = jnp.asarray(z)
    if not -z.ndim <= axis < z.ndim:
        raise ValueError(f"axis is {axis} for scores of shape {z.shape}; expected an axis of the scores")
    if z.shape[axis] == 0:
        raise ValueError(f"scores have shape {z.shape}, empty along axis {axis}; sparsemax needs an entry")
    compute = jnp.promote_types(_result_dtype(z), jnp.float32)
    moved = jnp.moveaxis(z.astype(compute), axis, -1)
    if where is not None:
        mask = jnp.moveaxis(jnp.broadcast_to(where, z.shape), axis, -1)
        moved = jnp.where(mask, moved, -jnp.inf)

    def restore(rows: jax.Array) -> jax.Array:
        return jnp.moveaxis(rows.reshape(moved.shape), -1, axis)

    return moved.reshape(-1, moved.shape[-1]), restore


def _result_dtype(z: jax.Array) -> jnp.dtype:
    dtype = jnp.asarray(z).dtype
    return dtype if jnp.issubdtype(dtype, jnp.floating) else jnp.dtype(jnp.float32)
