"""The Llama architecture (Touvron et al. 2023, arXiv 2302.13971) with blocks that can be run apart."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from jax_sae.backbones.llama.rope import apply_rope, rope_factors, rope_tables
from jax_sae.errors import InputError

_HEAD_ROWS = 256  # positions whose logits exist at one time: 50 MB of float32 with 49,152 tokens


@dataclasses.dataclass(frozen=True)
class LlamaConfig:
    """Shape of a Llama.

    Attributes:
      vocab_size: tokens.
      d_model: width of the residual stream.
      n_layers: blocks.
      n_heads: query heads.
      n_kv_heads: key and value heads; each serves n_heads / n_kv_heads query heads.
      head_dim: width of a head.
      d_mlp: width of the gated MLP.
      norm_epsilon: added to the mean square in RMSNorm.
      rope_theta: base of the rotary wavelengths.
      rope_factors: [head_dim / 2] what the rotary frequencies are divided by; None is all ones.
      max_length: longest sequence the model was trained for.
      tied_head: the logits are read off the embedding.
    """

    vocab_size: int
    d_model: int
    n_layers: int
    n_heads: int
    n_kv_heads: int
    head_dim: int
    d_mlp: int
    norm_epsilon: float
    rope_theta: float
    rope_factors: tuple[float, ...] | None
    max_length: int
    tied_head: bool

    @classmethod
    def from_huggingface(cls, config: Mapping[str, Any]) -> "LlamaConfig":
        """From the content of a Hugging Face ``config.json``.

        Raises:
          InputError: it is no Llama, or a Llama with biases, another non-linearity or another rope scaling.
        """
        for key, expected in _HUGGINGFACE_FIXED.items():
            if config.get(key, expected) != expected:
                raise InputError(f"config.json has {key} = {config[key]!r}, expected {expected!r}; give a Llama")
        if "model_type" not in config:
            raise InputError("config.json has no model_type, expected 'llama'; give the folder of a Llama")
        rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
        theta = float(rope.get("rope_theta", config.get("rope_theta", 10_000.0)))
        n_heads, d_model = config["num_attention_heads"], config["hidden_size"]
        head_dim = config.get("head_dim") or d_model // n_heads
        return cls(
            vocab_size=config["vocab_size"],
            d_model=d_model,
            n_layers=config["num_hidden_layers"],
            n_heads=n_heads,
            n_kv_heads=config.get("num_key_value_heads") or n_heads,
            head_dim=head_dim,
            d_mlp=config["intermediate_size"],
            norm_epsilon=float(config.get("rms_norm_eps", 1e-6)),
            rope_theta=theta,
            rope_factors=rope_factors(rope, theta, head_dim),
            max_length=config.get("max_position_embeddings", 2048),
            tied_head=config.get("tie_word_embeddings", False),
        )

    @classmethod
    def from_gguf(
        cls, metadata: Mapping[str, Any], *, tied_head: bool, factors: tuple[float, ...] | None = None
    ) -> "LlamaConfig":
        """From the key-value pairs of a GGUF file.

        Args:
          metadata: of the file.
          tied_head: the file has no ``output.weight``.
          factors: the tensor ``rope_freqs.weight`` where there is one (Llama 3.1).

        Raises:
          InputError: another architecture or rope scaling.
        """
        architecture = metadata.get("general.architecture")
        if architecture != "llama":
            raise InputError(f"the GGUF file has architecture {architecture!r}, expected 'llama'")
        scaling = metadata.get("llama.rope.scaling.type", "none")
        if scaling not in ("none", "linear"):
            raise InputError(f"rope scaling {scaling!r} is not supported; expected none or linear")
        n_heads = int(metadata["llama.attention.head_count"])
        d_model = int(metadata["llama.embedding_length"])
        head_dim = int(metadata.get("llama.attention.key_length", d_model // n_heads))
        if scaling == "linear":
            factors = (float(metadata["llama.rope.scaling.factor"]),) * (head_dim // 2)
        return cls(
            vocab_size=len(metadata["tokenizer.ggml.tokens"]),
            d_model=d_model,
            n_layers=int(metadata["llama.block_count"]),
            n_heads=n_heads,
            n_kv_heads=int(metadata.get("llama.attention.head_count_kv", n_heads)),
            head_dim=head_dim,
            d_mlp=int(metadata["llama.feed_forward_length"]),
            norm_epsilon=float(metadata["llama.attention.layer_norm_rms_epsilon"]),
            rope_theta=float(metadata.get("llama.rope.freq_base", 10_000.0)),
            rope_factors=factors,
            max_length=int(metadata["llama.context_length"]),
            tied_head=tied_head,
        )


_HUGGINGFACE_FIXED = {"model_type": "llama", "hidden_act": "silu", "attention_bias": False, "mlp_bias": False}


class LlamaBlocks(nnx.Module):
    """All blocks in one, every parameter with a leading axis of layers; indexing that axis gives one block.

    ``h = x + W_O attention(norm(x))``, then ``y = h + W_down (silu(W_gate norm(h)) * W_up norm(h))``.
    """

    def __init__(self, config: LlamaConfig, *, rngs: nnx.Rngs, dtype: jnp.dtype = jnp.float32):
        self.config = config
        n, d = config.n_layers, config.d_model
        queries, keys = config.n_heads * config.head_dim, config.n_kv_heads * config.head_dim

        def weight(rows: int, columns: int) -> nnx.Param:
            return nnx.Param(jax.random.normal(rngs.params(), (n, rows, columns), dtype) * rows**-0.5)

        self.attention_norm = nnx.Param(jnp.ones((n, d)))
        self.W_Q = weight(d, queries)
        self.W_K = weight(d, keys)
        self.W_V = weight(d, keys)
        self.W_O = weight(queries, d)
        self.mlp_norm = nnx.Param(jnp.ones((n, d)))
        self.W_gate = weight(d, config.d_mlp)
        self.W_up = weight(d, config.d_mlp)
        self.W_down = weight(config.d_mlp, d)

    def at(self, layer: jax.Array) -> "LlamaBlocks":
        """One block: the same module without the axis of layers."""
        return jax.tree.map(lambda w: jax.lax.dynamic_index_in_dim(w, layer, keepdims=False), self)

    def __call__(self, x: jax.Array, cos: jax.Array, sin: jax.Array) -> jax.Array:
        """[batch, length, d_model] through one block (see :meth:`at`); ``cos`` and ``sin`` of rope_tables."""
        x = x + self.attention(rms_norm(x, self.attention_norm[...], self.config.norm_epsilon), cos, sin)
        return x + self.mlp(rms_norm(x, self.mlp_norm[...], self.config.norm_epsilon))

    def attention(self, x: jax.Array, cos: jax.Array, sin: jax.Array) -> jax.Array:
        """Causal attention with grouped keys and values."""
        split = (*x.shape[:2], -1, self.config.head_dim)
        dtype = self.W_Q.dtype
        q = apply_rope(_matmul(x, self.W_Q[...]).reshape(split), cos, sin)  # [b, s, n_heads, head_dim]
        k = apply_rope(_matmul(x, self.W_K[...]).reshape(split), cos, sin)  # [b, s, n_kv_heads, head_dim]
        v = _matmul(x, self.W_V[...]).reshape(split)
        y = jax.nn.dot_product_attention(q.astype(dtype), k.astype(dtype), v.astype(dtype), is_causal=True)
        return _matmul(y.reshape(*x.shape[:2], -1), self.W_O[...])

    def mlp(self, x: jax.Array) -> jax.Array:
        """SwiGLU (Shazeer 2020, arXiv 2002.05202)."""
        gate = jax.nn.silu(_matmul(x, self.W_gate[...]))
        return _matmul(gate * _matmul(x, self.W_up[...]), self.W_down[...])


class Llama(nnx.Module):
    """A Llama whose residual stream can be read after any block, changed, and run on from there.

    The residual stream is float32. Matrix products take their inputs in the dtype of the weights and
    accumulate in float32, so bfloat16 weights give a bfloat16 model with a float32 residual stream.

    Args:
      config: its shape.
      rngs: the source of random initial weights (stream ``params``).
      dtype: of the weight matrices; the gains of the norms are float32.

    Example:
      >>> import jax.numpy as jnp
      >>> from flax import nnx
      >>> config = LlamaConfig(32, 16, 3, 4, 2, 4, 24, 1e-5, 1e4, None, 64, True)
      >>> model, tokens = Llama(config, rngs=nnx.Rngs(0)), jnp.arange(10).reshape(2, 5)
      >>> residual = model.residual(tokens, layer=2)
      >>> residual.shape, model.next_token_loss(residual, tokens, layer=2).shape
      ((2, 5, 16), (2, 4))
    """

    def __init__(self, config: LlamaConfig, *, rngs: nnx.Rngs, dtype: jnp.dtype = jnp.float32):
        self.config = config
        shape = (config.vocab_size, config.d_model)
        self.embedding = nnx.Param(jax.random.normal(rngs.params(), shape, dtype))
        self.blocks = LlamaBlocks(config, rngs=rngs, dtype=dtype)
        self.final_norm = nnx.Param(jnp.ones(config.d_model))
        if not config.tied_head:
            self.head = nnx.Param(jax.random.normal(rngs.params(), shape, dtype) * config.d_model**-0.5)

    def residual(self, tokens: jax.Array, layer: int) -> jax.Array:
        """The residual stream after the first ``layer`` blocks; ``layer = 0`` is the embedding.

        Args:
          tokens: int [batch, length], from position 0, no padding; every id below ``vocab_size``.
          layer: 0 to n_layers.

        Returns:
          float32 [batch, length, d_model]. The norm before the head is not applied, at the last layer either.

        Raises:
          InputError: the layer is out of range, or the sequences are longer than ``max_length``.
        """
        return self.run(self.embedding[...][tokens].astype(jnp.float32), 0, layer)

    def run(self, residual: jax.Array, start: int, stop: int) -> jax.Array:
        """Takes the residual stream [batch, length, d_model] after ``start`` blocks on to after ``stop``."""
        config = self.config
        if not 0 <= start <= stop <= config.n_layers:
            raise InputError(f"layers {start}..{stop} are out of range of the {config.n_layers} blocks")
        length = residual.shape[1]
        if length > config.max_length:
            raise InputError(f"sequences have {length} tokens, expected at most {config.max_length}")
        cos, sin = rope_tables(length, config.head_dim, config.rope_theta, config.rope_factors)

        def block(x: jax.Array, layer: jax.Array) -> tuple[jax.Array, None]:
            return self.blocks.at(layer)(x, cos, sin), None

        return jax.lax.scan(block, residual.astype(jnp.float32), jnp.arange(start, stop))[0]

    def unembed(self, residual: jax.Array) -> jax.Array:
        """[..., d_model] residual stream after the last block to float32 logits [..., vocab_size]."""
        head = self.embedding if self.config.tied_head else self.head
        return _matmul(rms_norm(residual, self.final_norm[...], self.config.norm_epsilon), head[...].T)

    def logits(self, tokens: jax.Array) -> jax.Array:
        """Logits float32 [batch, length, vocab_size] of the token after each position."""
        return self.unembed(self.residual(tokens, self.config.n_layers))

    def next_token_loss(self, residual: jax.Array, tokens: jax.Array, layer: int) -> jax.Array:
        """Finishes the model from the residual stream at ``layer`` and scores the tokens that follow.

        Logits are formed for 256 positions at a time, never for all.

        Args:
          residual: [batch, length, d_model] after ``layer`` blocks.
          tokens: int [batch, length].
          layer: 0 to n_layers.

        Returns:
          float32 [batch, length - 1]: cross-entropy in nats of token t + 1 given positions 0 to t.
        """
        x = self.run(residual, layer, self.config.n_layers)[:, :-1]
        targets = tokens[:, 1:]

        def loss(position: tuple[jax.Array, jax.Array]) -> jax.Array:
            row, target = position
            logits = self.unembed(row)
            return jax.nn.logsumexp(logits) - logits[target]

        rows = (x.reshape(-1, x.shape[-1]), targets.reshape(-1))
        return jax.lax.map(loss, rows, batch_size=_HEAD_ROWS).reshape(targets.shape)


def rms_norm(x: jax.Array, gain: jax.Array, epsilon: float) -> jax.Array:
    """``gain * x / sqrt(mean(x^2) + epsilon)`` over the last axis of ``x [..., d]``, in float32."""
    x = x.astype(jnp.float32)
    scale = jax.lax.rsqrt(jnp.mean(x * x, axis=-1, keepdims=True) + epsilon)
    return x * scale * gain.astype(jnp.float32).reshape((1,) * (x.ndim - 1) + gain.shape)


def _matmul(x: jax.Array, weight: jax.Array) -> jax.Array:
    return jnp.matmul(x.astype(weight.dtype), weight, preferred_element_type=jnp.float32)
