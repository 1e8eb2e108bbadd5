"""Operators on arrays, with their derivatives."""

from jax_sae.ops.bottleneck import Places as Places
from jax_sae.ops.bottleneck import bottleneck as bottleneck
from jax_sae.ops.bottleneck import find_places as find_places
from jax_sae.ops.codes import SparseCodes as SparseCodes
from jax_sae.ops.codes import sparse_decode as sparse_decode
from jax_sae.ops.codes import to_codes as to_codes
from jax_sae.ops.entmax import entmax as entmax
from jax_sae.ops.jumprelu import jump_relu as jump_relu
from jax_sae.ops.jumprelu import step_above as step_above
from jax_sae.ops.maxima import group_maxima as group_maxima
from jax_sae.ops.sparsemax import sparsemax as sparsemax
from jax_sae.ops.sparsemax import sparsemax_jvp as sparsemax_jvp
from jax_sae.ops.sparsemax import sparsemax_threshold as sparsemax_threshold
from jax_sae.ops.topk import batch_top_k_threshold as batch_top_k_threshold
from jax_sae.ops.topk import top_k_mask as top_k_mask
