"""Spliced cross-entropy: the loss of a language model that runs on through a reconstruction."""

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from typing import Protocol

import jax
import jax.numpy as jnp
import numpy as np

from jax_sae.errors import InputError

Reconstruct = Callable[[jax.Array], jax.Array]


class LanguageModel(Protocol):
    """What a backbone offers, as :class:`jax_sae.backbones.llama.Llama` does; a pytree, to be jitted."""

    def residual(self, tokens: jax.Array, layer: int) -> jax.Array:
        """[batch, length] tokens to the residual stream [batch, length, d] after ``layer`` blocks."""
        ...

    def next_token_loss(self, residual: jax.Array, tokens: jax.Array, layer: int) -> jax.Array:
        """[batch, length - 1] cross-entropy in nats of token t + 1, the model run on from ``layer``."""
        ...


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class BaselineSums:
    """What no autoencoder changes. Sums over predictions, in nats: one number each.

    Float32 on the device, float64 once added up.

    Attributes:
      clean: the model as it is.
      mean_ablated: with the mean of the data.
      zero_ablated: with zeros.
      predictions: how many were summed.
    """

    clean: jax.Array | float
    mean_ablated: jax.Array | float
    zero_ablated: jax.Array | float
    predictions: jax.Array | float


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class SplicedSums(BaselineSums):
    """:class:`BaselineSums` and what one autoencoder makes of them.

    Attributes:
      sae: with the reconstruction.
    """

    sae: jax.Array | float


def splice(residual: jax.Array, replacement: jax.Array, first_position: int) -> jax.Array:
    """``residual`` with ``replacement`` from ``first_position`` on; both [batch, length, d]."""
    replacement = replacement.astype(residual.dtype)
    return jnp.concatenate([residual[:, :first_position], replacement[:, first_position:]], axis=1)


def spliced_loss(
    backbone: LanguageModel,
    layer: int,
    tokens: jax.Array,
    reconstruct: Reconstruct,
    mean: jax.Array,
    first_position: int,
    weights: jax.Array | None = None,
) -> SplicedSums:
    """Next-token losses with four residual streams at ``layer``: clean, SAE, mean-ablated, zero-ablated.

    The positions before ``first_position``, which the autoencoder was not trained on (position 0 is an
    attention sink with a norm several times that of any other), are left as they are in all four, and
    predictions made there, which are the same in all four, are not counted. The lower blocks run once, the
    upper ones four times, one variant after the other.

    Args:
      backbone: of the tokens.
      layer: residual stream after that many blocks.
      tokens: int [batch, length].
      reconstruct: [..., d] rows to [..., d], in the units of the residual stream.
      mean: [d] of the data, for the mean ablation.
      first_position: of the activation set, at least 0.
      weights: [batch] what each sequence counts for; ones without it (0 for padding).

    Returns:
      SplicedSums over the predictions at positions ``first_position`` to ``length - 2``.

    Raises:
      InputError: there is no such position.
    """
    variants = [_unchanged, reconstruct, _ablated_to(mean), jnp.zeros_like]
    (clean, sae, mean_ablated, zero_ablated), n = _variant_sums(
        backbone, layer, tokens, variants, first_position, weights
    )
    return SplicedSums(clean, mean_ablated, zero_ablated, n, sae)


def baseline_loss(
    backbone: LanguageModel,
    layer: int,
    tokens: jax.Array,
    mean: jax.Array,
    first_position: int,
    weights: jax.Array | None = None,
) -> BaselineSums:
    """:func:`spliced_loss` without an autoencoder: the upper blocks run three times. Arguments as there."""
    variants = [_unchanged, _ablated_to(mean), jnp.zeros_like]
    (clean, mean_ablated, zero_ablated), n = _variant_sums(backbone, layer, tokens, variants, first_position, weights)
    return BaselineSums(clean, mean_ablated, zero_ablated, n)


def _variant_sums(
    backbone: LanguageModel,
    layer: int,
    tokens: jax.Array,
    variants: Sequence[Reconstruct],
    first_position: int,
    weights: jax.Array | None,
) -> tuple[jax.Array, jax.Array]:
    """[variants] sums of the losses with each replacement of the residual stream, and the number of predictions."""
    if tokens.shape[1] < first_position + 2:
        raise InputError(
            f"sequences have {tokens.shape[1]} tokens, expected at least {first_position + 2}: a prediction "
            f"at position {first_position} needs the token after it"
        )
    residual = backbone.residual(tokens, layer)
    streams = jnp.stack([splice(residual, replace(residual), first_position) for replace in variants])
    losses = jax.lax.map(lambda x: backbone.next_token_loss(x, tokens, layer), streams)
    counted = losses[:, :, first_position:]  # [variants, batch, length - 1 - first_position]
    if weights is None:
        weights = jnp.ones(tokens.shape[0])
    return jnp.einsum("vbs,b->v", counted, weights), weights.sum() * counted.shape[-1]


def _unchanged(residual: jax.Array) -> jax.Array:
    return residual


def _ablated_to(mean: jax.Array) -> Reconstruct:
    return lambda residual: jnp.broadcast_to(mean, residual.shape)


def spliced_metrics(sums: SplicedSums) -> dict[str, float]:
    """The numbers that are reported, in nats per predicted token.

    ``ce_degradation`` is ``ce_sae - ce_clean``, the rise of the loss (the paper has the opposite sign).
    ``loss_recovered`` is the field's: 1 - (ce_sae - ce_clean) / (ce_zero_ablated - ce_clean); the harder
    ``loss_recovered_mean`` has the mean ablation in the place of the zero ablation.
    """
    n = float(sums.predictions)
    clean, sae, mean, zero = (float(s) / n for s in (sums.clean, sums.sae, sums.mean_ablated, sums.zero_ablated))
    return {
        "ce_clean": clean,
        "ce_sae": sae,
        "ce_mean_ablated": mean,
        "ce_zero_ablated": zero,
        "ce_degradation": sae - clean,
        "loss_recovered": 1 - (sae - clean) / (zero - clean),
        "loss_recovered_mean": 1 - (sae - clean) / (mean - clean),
    }


def evaluate_baselines(
    backbone: LanguageModel,
    layer: int,
    tokens: np.ndarray,
    mean: np.ndarray,
    first_position: int,
    *,
    batch_size: int = 8,
    progress: Callable[[int], object] | None = None,
) -> BaselineSums:
    """:func:`baseline_loss` over any number of sequences, for :func:`evaluate_spliced` of several autoencoders.

    Args, and what is raised, are those of :func:`evaluate_spliced`.
    """
    mean_row = jnp.asarray(mean, jnp.float32)
    total = BaselineSums(0.0, 0.0, 0.0, 0.0)
    for batch, weights, count in _batches(tokens, batch_size):
        sums = _baseline_loss(backbone, layer, batch, mean_row, first_position, weights)
        total = jax.tree.map(lambda whole, part: whole + float(part), total, sums)
        if progress is not None:
            progress(count)
    return total


def evaluate_spliced(
    backbone: LanguageModel,
    layer: int,
    tokens: np.ndarray,
    reconstruct: Reconstruct,
    mean: np.ndarray,
    first_position: int,
    *,
    baselines: BaselineSums | None = None,
    batch_size: int = 8,
    progress: Callable[[int], object] | None = None,
) -> dict[str, float]:
    """:func:`spliced_loss` over any number of sequences, added up in float64 on the host.

    Compiled once for one ``backbone``, ``layer`` and shape, also over several calls when ``reconstruct`` is a
    ``jax.tree_util.Partial`` of one function over the arrays of each autoencoder; any other function is
    compiled anew, its arrays as constants.

    Args:
      backbone: of the tokens.
      layer: residual stream after that many blocks.
      tokens: int [sequences, length].
      reconstruct: [..., d] to [..., d], in the units of the residual stream.
      mean: [d] of the training data.
      first_position: of the activation set.
      baselines: of :func:`evaluate_baselines` on the same sequences, where several autoencoders share them; the
        upper blocks then run once here, not four times. Computed here without it.
      batch_size: sequences at one time; the last batch is filled up with sequences that count for nothing.
      progress: called with the number of sequences done since the last call.

    Returns:
      The dict of :func:`spliced_metrics`.

    Raises:
      InputError: there are no sequences, or they are too short for one prediction.
      ValueError: ``baselines`` are of another number of predictions.

    Example:
      >>> import jax, numpy as np
      >>> from flax import nnx
      >>> from jax_sae.backbones.llama import Llama, LlamaConfig
      >>> model = Llama(LlamaConfig(32, 16, 3, 4, 2, 4, 24, 1e-5, 1e4, None, 64, True), rngs=nnx.Rngs(0))
      >>> tokens = np.arange(30).reshape(3, 10)
      >>> perfect = evaluate_spliced(model, 2, tokens, lambda x: x, np.zeros(16), 1)
      >>> perfect["ce_degradation"], perfect["loss_recovered"]
      (0.0, 1.0)
    """
    if not isinstance(reconstruct, jax.tree_util.Partial):
        reconstruct = jax.tree_util.Partial(reconstruct)
    mean_row = jnp.asarray(mean, jnp.float32)
    total = SplicedSums(0.0, 0.0, 0.0, 0.0, 0.0)
    for batch, weights, count in _batches(tokens, batch_size):
        if baselines is None:
            sums = _spliced_loss(backbone, layer, batch, reconstruct, mean_row, first_position, weights)
        else:
            sae, n = _reconstruction_loss(backbone, layer, batch, reconstruct, first_position, weights)
            sums = SplicedSums(0.0, 0.0, 0.0, n, sae)
        total = jax.tree.map(lambda whole, part: whole + float(part), total, sums)
        if progress is not None:
            progress(count)
    return spliced_metrics(total if baselines is None else _joined(baselines, total))


def _joined(baselines: BaselineSums, sae: SplicedSums) -> SplicedSums:
    """``sae`` with the sums that were computed before."""
    if baselines.predictions != sae.predictions:
        raise ValueError(
            f"baselines are of {baselines.predictions:.0f} predictions, the sequences have {sae.predictions:.0f}; "
            "expected evaluate_baselines of the same sequences and first_position"
        )
    return SplicedSums(**vars(baselines), sae=sae.sae)


def _batches(tokens: np.ndarray, batch_size: int) -> Iterator[tuple[np.ndarray, np.ndarray, int]]:
    """(tokens [batch_size, length], weights [batch_size], sequences that count); the rest of the last one is filler."""
    if not len(tokens):
        raise InputError("there are no held-out sequences to score; extract a set with --holdout above 0")
    for start in range(0, len(tokens), batch_size):
        batch = tokens[start : start + batch_size]
        filled = np.resize(batch, (batch_size, tokens.shape[1]))
        yield filled, (np.arange(batch_size) < len(batch)).astype(np.float32), len(batch)


def _only_sae(
    backbone: LanguageModel,
    layer: int,
    tokens: jax.Array,
    reconstruct: Reconstruct,
    first_position: int,
    weights: jax.Array,
) -> tuple[jax.Array, jax.Array]:
    """The sum with the reconstruction, and the number of predictions."""
    (sae,), n = _variant_sums(backbone, layer, tokens, [reconstruct], first_position, weights)
    return sae, n


_STATIC = ("layer", "first_position")
_spliced_loss = jax.jit(spliced_loss, static_argnames=_STATIC)
_baseline_loss = jax.jit(baseline_loss, static_argnames=_STATIC)
_reconstruction_loss = jax.jit(_only_sae, static_argnames=_STATIC)
