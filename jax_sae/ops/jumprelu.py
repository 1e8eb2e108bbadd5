"""JumpReLU and the step function, with the pseudo-derivatives that train their thresholds."""

from functools import partial

import jax
import jax.numpy as jnp


@partial(jax.custom_jvp, nondiff_argnums=(2,))
def jump_relu(z: jax.Array, threshold: jax.Array, bandwidth: float) -> jax.Array:
    r"""``z`` where it is above the threshold, else 0.

    Args:
      z: [..., M] scores.
      threshold: [M], or any shape that broadcasts with ``z``.
      bandwidth: width of the window around the threshold in which scores move it, in units of ``z``.

    Returns:
      The shape of ``z``; exact zeros at and below the threshold.

    Derivatives: with respect to z, 1 above the threshold and 0 elsewhere. The true derivative with respect to the
    threshold is 0 almost everywhere; in its place stands the estimate
    :math:`-\frac{\theta}{\epsilon} 1[|z - \theta| < \epsilon / 2]`.

    Example:
      >>> import jax.numpy as jnp
      >>> jump_relu(jnp.array([0.3, 0.5, 2.0]), jnp.array([0.5, 0.5, 0.5]), 0.1)
      Array([0., 0., 2.], dtype=float32)

    References:
      Rajamanoharan et al. 2024, "Jumping Ahead" (arXiv 2407.14435), equations 5 and 11.
    """
    return jnp.where(z > threshold, z, 0.0)


@jump_relu.defjvp
def _jump_relu_jvp(bandwidth: float, primals: tuple, tangents: tuple) -> tuple[jax.Array, jax.Array]:
    z, threshold = primals
    passed = jnp.where(z > threshold, tangents[0], 0.0)
    near = _window(z, threshold, bandwidth) * threshold
    return jump_relu(z, threshold, bandwidth), passed - near * tangents[1]


@partial(jax.custom_jvp, nondiff_argnums=(2,))
def step_above(z: jax.Array, threshold: jax.Array, bandwidth: float) -> jax.Array:
    r"""1.0 where ``z`` is above the threshold, else 0.0: summed, the number of active concepts.

    Args:
      z: as for :func:`jump_relu`.
      threshold: as for :func:`jump_relu`.
      bandwidth: as for :func:`jump_relu`.

    Derivatives: 0 with respect to z; with respect to the threshold the estimate
    :math:`-\frac{1}{\epsilon} 1[|z - \theta| < \epsilon / 2]`.

    References:
      Rajamanoharan et al. 2024, "Jumping Ahead" (arXiv 2407.14435), equation 12.
    """
    return (z > threshold).astype(z.dtype)


@step_above.defjvp
def _step_above_jvp(bandwidth: float, primals: tuple, tangents: tuple) -> tuple[jax.Array, jax.Array]:
    z, threshold = primals
    return step_above(z, threshold, bandwidth), -_window(z, threshold, bandwidth) * tangents[1]


def _window(z: jax.Array, threshold: jax.Array, bandwidth: float) -> jax.Array:
    """1 / bandwidth where ``z`` is nearer to the threshold than half of it."""
    return (jnp.abs(z - threshold) < bandwidth / 2).astype(z.dtype) / bandwidth
