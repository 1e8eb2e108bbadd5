"""Sparsemax: the public functions are in ``api``, the definition and the sort-free method in ``xla``."""

from jax_sae.ops.sparsemax.api import sparsemax as sparsemax
from jax_sae.ops.sparsemax.api import sparsemax_jvp as sparsemax_jvp
from jax_sae.ops.sparsemax.api import sparsemax_threshold as sparsemax_threshold
