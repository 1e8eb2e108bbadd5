"""alpha-entmax: the family between softmax (alpha = 1) and beyond sparsemax (alpha = 2)."""

from numbers import Real

import jax
import jax.numpy as jnp
from jax import lax

_MAX_SWEEPS = 128


def entmax(z: jax.Array, alpha: jax.Array | float = 1.5, axis: int = -1) -> jax.Array:
    r"""Tsallis-entropy projection of scores onto the probability simplex.

    .. math:: p_i = \max((\alpha - 1) z_i - \tau, 0)^{1 / (\alpha - 1)}, \qquad \sum_i p_i = 1

    A larger alpha gives a smaller support; alpha = 2 is :func:`jax_sae.sparsemax`, which is faster.

    Args:
      z: scores, any shape, float or integer. float64 is computed in float64, everything else in float32.
      alpha: [] above 1; an array may be traced, and learned. One that is not above 1 gives NaN.
      axis: the axis to project along; at least one entry.

    Returns:
      p, shape and dtype of ``z`` (float32 for integers). A row with NaN, with +inf, or with nothing above -inf is
      NaN; entries of -inf get 0. Above alpha = 2 the power has no bounded slope at the edge of the support: there a
      rounding error of eps in the scores is one of ``eps^(1 / (alpha - 1))`` in p.

    Raises:
      ValueError: the axis is empty or absent, or alpha is a number at or below 1, or not one number.

    Derivatives: with respect to z and to alpha, in forward and in reverse mode, to any order. An entry at the edge
    of the support is outside: its derivative is 0.

    Example:
      >>> import jax.numpy as jnp
      >>> from jax_sae import entmax
      >>> entmax(jnp.array([0.0, 0.0, 2.0, -5.0])).round(4)
      Array([0., 0., 1., 0.], dtype=float32)

    References:
      Peters, Niculae and Martins 2019 (arXiv 1905.05702), equations 9 and 10; Correia, Niculae and Martins 2019
      (arXiv 1909.00015), proposition 1, for the derivative with respect to alpha.
    """
    z = jnp.asarray(z)
    if not -z.ndim <= axis < z.ndim:
        raise ValueError(f"axis is {axis} for scores of shape {z.shape}; expected an axis of the scores")
    if z.shape[axis] == 0:
        raise ValueError(f"scores have shape {z.shape}, empty along axis {axis}; expected at least one entry")
    if jnp.ndim(alpha):
        raise ValueError(f"alpha has shape {jnp.shape(alpha)}; expected one number, or jax.vmap over both arguments")
    if isinstance(alpha, Real) and not alpha > 1:
        raise ValueError(f"alpha is {alpha}; expected a number above 1 (1 is softmax)")
    if not jnp.issubdtype(z.dtype, jnp.floating):
        z = z.astype(jnp.float32)
    dtype = jnp.float64 if z.dtype == jnp.float64 else jnp.float32
    p = _entmax(jnp.moveaxis(z, axis, -1).astype(dtype), jnp.asarray(alpha, dtype))
    return jnp.moveaxis(p, -1, axis).astype(z.dtype)


@jax.custom_jvp
def _entmax(z: jax.Array, alpha: jax.Array) -> jax.Array:
    top = jnp.max(z, axis=-1, keepdims=True)
    nan = ~jnp.isfinite(top) | ~(alpha > 1)  # a maximum is NaN if any entry is
    scaled = (alpha - 1) * (z - jnp.where(nan, 0.0, top))
    p = _powers(scaled, _threshold(jnp.where(nan, 0.0, scaled), alpha), 1 / (alpha - 1))
    return jnp.where(nan, jnp.nan, p / jnp.sum(p, axis=-1, keepdims=True))


@_entmax.defjvp
def _entmax_jvp(primals: tuple, tangents: tuple) -> tuple[jax.Array, jax.Array]:
    z, alpha = primals
    p = _entmax(z, alpha)
    inside = p != 0
    safe = jnp.where(inside, p, 1.0)
    weight = jnp.where(inside, safe ** (2 - alpha), 0.0)
    weight = jnp.where(jnp.isnan(p), p, weight)  # NaN rows stay NaN at alpha = 2, where NaN ** 0 is 1
    share = weight / jnp.sum(weight, axis=-1, keepdims=True)
    along_z = jnp.where(inside, tangents[0], 0.0)
    along_z = weight * (along_z - jnp.sum(share * along_z, axis=-1, keepdims=True))
    log = jnp.where(inside, safe * jnp.log(safe), 0.0)
    by_alpha = (p - share) / (alpha - 1) ** 2 + (share * jnp.sum(log, axis=-1, keepdims=True) - log) / (alpha - 1)
    return p, along_z + by_alpha * tangents[1]


def _threshold(scaled: jax.Array, alpha: jax.Array) -> jax.Array:
    """Tau [..., 1] with sum max(scaled - tau, 0)^(1 / (alpha - 1)) = 1, for rows whose maximum is 0.

    It lies between the thresholds of a row with one finite entry, -1, and of a row with equal entries. Up to alpha = 2
    the sum is a q-norm to the power q = 1 / (alpha - 1) >= 1. The norm is convex in tau and nearly linear: Newton's
    method on it climbs from the left and needs a few sweeps. Beyond, it is not convex: bisection.
    """
    power = 1 / (alpha - 1)
    low = jnp.full_like(scaled[..., :1], -1.0)
    high = jnp.full_like(low, 1.0) * -(scaled.shape[-1] ** (1 - alpha))
    tolerance = 2 * jnp.finfo(scaled.dtype).eps

    def newton(carry: tuple) -> tuple:
        sweeps, tau, high, _ = carry
        powers = _powers(scaled, tau, power)
        total = powers.sum(-1, keepdims=True)
        slope = jnp.where(powers > 0, powers / (scaled - tau), 0.0).sum(-1, keepdims=True)
        step = (total - total ** (2 - alpha)) / slope
        return sweeps + 1, tau + jnp.maximum(step, 0.0), high, step <= -tolerance * tau

    def bisection(carry: tuple) -> tuple:
        sweeps, low, high, _ = carry
        middle = (low + high) / 2
        over = _powers(scaled, middle, power).sum(-1, keepdims=True) >= 1
        low, high = jnp.where(over, middle, low), jnp.where(over, high, middle)
        return sweeps + 1, low, high, high - low <= -tolerance * low

    begin = (0, low, high, jnp.zeros_like(low, dtype=bool))
    running = lambda carry: (carry[0] < _MAX_SWEEPS) & ~jnp.all(carry[-1])  # noqa: E731
    search = lambda sweep: lambda: lax.while_loop(running, sweep, begin)[1]  # noqa: E731
    return lax.cond(alpha <= 2, search(newton), search(bisection))


def _powers(scaled: jax.Array, tau: jax.Array, power: jax.Array) -> jax.Array:
    """max(scaled - tau, 0) ** power, 0 outside the support for any power."""
    above = scaled - tau
    return jnp.where(above > 0, jnp.where(above > 0, above, 1.0) ** power, 0.0)
