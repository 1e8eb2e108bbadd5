"""Metrics: sums of a batch on the device, merged on the host, computed at the end."""

from jax_sae.metrics.accumulate import on_host as on_host
from jax_sae.metrics.alignment import AlignmentSums as AlignmentSums
from jax_sae.metrics.alignment import cknna as cknna
from jax_sae.metrics.concepts import MonosemanticitySums as MonosemanticitySums
from jax_sae.metrics.concepts import OrthogonalitySums as OrthogonalitySums
from jax_sae.metrics.reconstruction import ReconstructionSums as ReconstructionSums
from jax_sae.metrics.sparsity import SparsitySums as SparsitySums
