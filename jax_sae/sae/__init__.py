"""Sparse autoencoders: configuration and presets, the module, its statistics and losses."""

from jax_sae.sae.config import Preset as Preset
from jax_sae.sae.config import SAEConfig as SAEConfig
from jax_sae.sae.losses import sae_loss as sae_loss
from jax_sae.sae.modules import SAEOutput as SAEOutput
from jax_sae.sae.modules import SparseAutoencoder as SparseAutoencoder
from jax_sae.sae.stats import Capacity as Capacity
from jax_sae.sae.stats import SAEStats as SAEStats
from jax_sae.sae.stats import dead_concepts as dead_concepts
from jax_sae.sae.stats import forget_needs as forget_needs
from jax_sae.sae.stats import init_stats as init_stats
from jax_sae.sae.stats import update_stats as update_stats
