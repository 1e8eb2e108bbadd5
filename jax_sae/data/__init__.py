"""Stored activations: the format, its writer and readers, statistics, the order of training and batches."""

from jax_sae.data.batches import BatchSource as BatchSource
from jax_sae.data.batches import load_batches as load_batches
from jax_sae.data.batches import prefetch_to_device as prefetch_to_device
from jax_sae.data.format import Metadata as Metadata
from jax_sae.data.format import Provenance as Provenance
from jax_sae.data.format import ShardEntry as ShardEntry
from jax_sae.data.order import BatchOrder as BatchOrder
from jax_sae.data.reader import ActivationSet as ActivationSet
from jax_sae.data.reader import open_activations as open_activations
from jax_sae.data.statistics import Statistics as Statistics
from jax_sae.data.statistics import scan as scan
from jax_sae.data.writer import ActivationWriter as ActivationWriter
