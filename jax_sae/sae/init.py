"""The parameters that a sparse autoencoder starts from."""

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from jax_sae.sae.config import SAEConfig
from jax_sae.sae.param import StoredTransposed
from jax_sae.sae.stats import init_stats


def initial_parameters(config: SAEConfig, rngs: nnx.Rngs, statistics: Any = None) -> dict[str, nnx.Param]:
    """The parameters of ``config`` by name.

    Args:
      config: the autoencoder.
      rngs: source of random numbers (stream ``params``).
      statistics: of the training data, for ``b_dec_init``.
    """
    attention = config.encoder == "attention"
    parameters = _of_attention(config, rngs) if attention else _of_mlp(config, rngs, statistics)
    if config.activation == "jumprelu":
        parameters["threshold"] = nnx.Param(jnp.full(config.n_concepts, config.threshold_init, jnp.float32))
    if config.learn_alpha:
        parameters["log_alpha"] = nnx.Param(jnp.log(jnp.float32(config.alpha - 1)))
    return parameters


def _of_attention(config: SAEConfig, rngs: nnx.Rngs) -> dict[str, nnx.Param]:
    """What ``config.attention_init`` names; Kaiming's fan_in is M for the concepts and d for the projections."""
    d, m = config.d_in, config.n_concepts
    identity = config.attention_init == "identity"

    def projection(scale: float = 1.0) -> nnx.Param:
        return nnx.Param(scale * jnp.eye(d) if identity else _kaiming_uniform(rngs.params(), (d, d), fan_in=d))

    key = rngs.params()
    concepts = _random_directions(key, (m, d)) if identity else _kaiming_uniform(key, (m, d), fan_in=m)
    parameters = {"concepts": nnx.Param(concepts), "W_K": projection(), "W_V": projection(_value_norm(config))}
    return parameters | ({"W_Q": projection()} if config.query_projection else {})


def _value_norm(config: SAEConfig) -> float:
    """The length that values begin at, so that the first reconstruction has that of the input.

    Raw scores carry ``score_scale``; probabilities add up to 1.
    """
    if config.values == "scores":
        return 1 / config.score_scale
    return config.d_in**0.5 if config.normalize_input == "mean_norm" else 1.0


def _of_mlp(config: SAEConfig, rngs: nnx.Rngs, statistics: Any) -> dict[str, nnx.Param]:
    """Random unit decoder rows, the encoder their transpose, b_dec at the centre of the data."""
    m = config.n_concepts
    rows = _random_directions(rngs.params(), (m, config.d_in))
    biases = ("b_gate", "r_mag", "b_mag") if config.activation == "gated" else ("b_enc",)
    return {
        "W_enc": StoredTransposed.of_rows(jnp.array(rows)),
        **{name: nnx.Param(jnp.zeros(m)) for name in biases},
        "W_dec": nnx.Param(rows),
        "b_dec": nnx.Param(_initial_b_dec(config, statistics)),
    }


def _random_directions(key: jax.Array, shape: tuple[int, int]) -> jax.Array:
    rows = jax.random.normal(key, shape)
    return rows / jnp.linalg.norm(rows, axis=-1, keepdims=True)


def _kaiming_uniform(key: jax.Array, shape: tuple[int, int], fan_in: int) -> jax.Array:
    bound = (6 / fan_in) ** 0.5
    return jax.random.uniform(key, shape, minval=-bound, maxval=bound)


def _initial_b_dec(config: SAEConfig, statistics: Any) -> jax.Array:
    """The chosen centre of the data, in normalised units."""
    if statistics is None or config.b_dec_init == "zeros" or config.normalize_input == "unit_norm":
        return jnp.zeros(config.d_in)
    stats = init_stats(config, statistics)
    return (jnp.asarray(getattr(statistics, config.b_dec_init), jnp.float32) - stats.mean) * stats.scale
