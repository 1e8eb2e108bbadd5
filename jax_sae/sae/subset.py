"""Some concepts of an autoencoder as an autoencoder of their own, and the way back for its gradients."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from jax_sae.sae.config import SAEConfig
from jax_sae.sae.modules import SparseAutoencoder
from jax_sae.sae.stats import SAEStats

CONCEPT_PARAMETERS = frozenset(("W_enc", "b_enc", "b_gate", "r_mag", "b_mag", "threshold", "W_dec", "concepts"))
"""The parameters with one entry for each concept, along the first axis of the stored array."""


def take_concepts(model: SparseAutoencoder, indices: jax.Array) -> SparseAutoencoder:
    """The autoencoder of the concepts at ``indices [n]``, which shares everything that is not a concept's own.

    An index of M gives a concept of zeros.
    """
    config = subset_config(model.config, indices.shape[0])
    taken = jax.eval_shape(lambda: SparseAutoencoder(config, rngs=nnx.Rngs(0)))
    for name, parameter in _parameters(model).items():
        raw = parameter.get_raw_value()
        if name in CONCEPT_PARAMETERS:
            raw = jnp.take(raw, indices, axis=0, mode="fill", fill_value=0)
        getattr(taken, name).set_raw_value(raw)
    return taken


def subset_config(config: SAEConfig, n_concepts: int) -> SAEConfig:
    """The configuration of :func:`take_concepts`, in one group."""
    k, aux_k = min(config.k, n_concepts), min(config.aux_k, n_concepts)
    return dataclasses.replace(config, n_concepts=n_concepts, group_fractions=(), k=k, aux_k=aux_k)


def take_stats(stats: SAEStats, indices: jax.Array) -> SAEStats:
    """The statistics of the concepts at ``indices [n]``."""
    return dataclasses.replace(
        stats,
        frequency=jnp.take(stats.frequency, indices, mode="fill", fill_value=0),
        rows_since_fired=jnp.take(stats.rows_since_fired, indices, mode="fill", fill_value=0),
    )


def add_gradients(whole: SparseAutoencoder, part: SparseAutoencoder, indices: jax.Array) -> SparseAutoencoder:
    """Gradients of all concepts, plus those of :func:`take_concepts` at their places, in place where XLA can."""
    total = jax.tree.map(lambda leaf: leaf, whole)
    for name, parameter in _parameters(part).items():
        target, raw = getattr(total, name), parameter.get_raw_value()
        if name in CONCEPT_PARAMETERS:
            target.set_raw_value(target.get_raw_value().at[indices].add(raw, mode="drop"))
        else:
            target.set_raw_value(target.get_raw_value() + raw)
    return total


def _parameters(model: SparseAutoencoder) -> dict[str, Any]:
    return {name: value for name, value in vars(model).items() if isinstance(value, nnx.Param)}
