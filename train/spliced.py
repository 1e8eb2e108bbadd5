"""The loss of language models that run on through reconstructions, over the held-out sequences of many runs."""

from typing import TYPE_CHECKING

import jax
import numpy as np
from tqdm import tqdm

from jax_sae import SAEStats, SparseAutoencoder
from jax_sae.data import ActivationSet

from .run import Run

if TYPE_CHECKING:
    from jax_sae.backbones.llama import Llama
    from jax_sae.evaluation.spliced import BaselineSums


class SplicedLosses:
    """Spliced losses of one run after another.

    The source model, and what no autoencoder changes (its clean and its ablated losses), are kept for the next run:
    consecutive runs on the same data share them.

    Args:
      sequences: held-out sequences to score at most.
    """

    def __init__(self, sequences: int):
        self._sequences = sequences
        self._model: tuple[str, Llama] | None = None
        self._baselines: tuple[tuple, BaselineSums] | None = None

    def of(self, run: Run, activations: ActivationSet, mean: np.ndarray) -> dict[str, float]:
        """``ce_*`` and ``loss_recovered*`` of ``evaluation.json``.

        Args:
          run: the autoencoder.
          activations: a set with provenance.
          mean: [d] of the data, for the mean ablation.

        Raises:
          InputError: the source model cannot be had.
        """
        from jax_sae.evaluation.spliced import evaluate_spliced

        where, layer = activations.provenance, activations.source["layer"]
        assert where is not None
        first = activations.train_rows // where.tokens_per_item
        tokens = np.asarray(where.tokens[first : first + self._sequences])
        backbone = self._backbone(activations.source["model"])
        baselines = self._shared(backbone, activations, tokens, mean)
        reconstruct = jax.tree_util.Partial(_reconstruct, run.state.model, run.state.stats)
        with _bar(len(tokens), "spliced loss") as bar:
            return evaluate_spliced(
                backbone,
                layer,
                tokens,
                reconstruct,
                mean,
                where.first_position,
                baselines=baselines,
                progress=bar.update,
            )

    def _backbone(self, name: str) -> "Llama":
        from jax_sae.backbones.llama import load_llama

        from .assets import ensure_model

        if self._model is None or self._model[0] != name:
            self._model = None  # two models need not fit into memory
            self._model = name, load_llama(ensure_model(name))
        return self._model[1]

    def _shared(
        self, backbone: "Llama", activations: ActivationSet, tokens: np.ndarray, mean: np.ndarray
    ) -> "BaselineSums":
        from jax_sae.evaluation.spliced import evaluate_baselines

        source, where = activations.source, activations.provenance
        assert where is not None
        key = (source["model"], source["layer"], activations.fingerprint, tokens.tobytes(), mean.tobytes())
        if self._baselines is None or self._baselines[0] != key:
            with _bar(len(tokens), "clean and ablated loss") as bar:
                sums = evaluate_baselines(
                    backbone, source["layer"], tokens, mean, where.first_position, progress=bar.update
                )
            self._baselines = key, sums
        return self._baselines[1]


def _reconstruct(model: SparseAutoencoder, stats: SAEStats, x: jax.Array) -> jax.Array:
    return model(x, stats).x_hat


def _bar(sequences: int, what: str) -> tqdm:
    return tqdm(total=sequences, desc=what, unit=" sequences", unit_scale=True, disable=None)
