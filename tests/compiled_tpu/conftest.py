"""Programs as users have them compiled: products at the platform's own precision."""

import jax

jax.config.update("jax_default_matmul_precision", None)
