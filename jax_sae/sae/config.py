"""One configuration for every sparse autoencoder here, and the named presets of the field."""

import dataclasses
import math
from collections.abc import Iterator
from typing import Any, Literal, get_args, get_origin, get_type_hints

from jax_sae.errors import InputError
from jax_sae.ops import ScoreDtype

Preset = Literal[
    "sparsemax",
    "sparsemax_paper",
    "mlp_sparsemax",
    "attention_relu",
    "relu",
    "topk",
    "batch_topk",
    "matryoshka_batch_topk",
    "jumprelu",
    "gated",
    "entmax",
]


@dataclasses.dataclass(frozen=True)
class SAEConfig:
    """What a sparse autoencoder computes; hashable, so it can be a static argument of a jitted function.

    An input row ``x [d_in]`` is centred and normalised to ``u``, scored against ``n_concepts`` keys,
    made sparse by ``activation``, and decoded from the values of the concepts that stay active.

    Attributes:
      d_in: width of an activation row.
      n_concepts: size M of the dictionary.
      encoder: ``"mlp"`` has parameters ``W_enc, b_enc, W_dec, b_dec``; ``"attention"`` reads keys and values
        off shared ``concepts`` through ``W_K`` and ``W_V``.
      activation: which concepts stay active.
      values: for sparsemax and entmax, what an active concept carries: its raw score (the support is a constant in
        the gradient) or its probability (with the Jacobian of the projection).
      alpha: of entmax, above 1; 2 is sparsemax, less keeps more concepts active.
      learn_alpha: make alpha a parameter, ``1 + exp(log_alpha)``, that starts at ``alpha``; needs ``"probabilities"``,
        since the raw scores do not depend on it.
      k: active concepts per input, for ``topk`` exactly and for ``batch_topk`` on average.
      bandwidth: for jumprelu, the window around a threshold in which scores move it.
      threshold_init: where the thresholds of jumprelu start.
      apply_b_dec_to_input: whether an MLP encoder subtracts ``b_dec`` from its input.
      query_projection: whether the attention has a ``W_Q``.
      attention_init: ``"identity"`` starts from random concepts of norm 1 and identity projections, so that a concept
        is its own key and value, up to the length of the value; ``"kaiming_uniform"`` draws all of
        them at random, keys unrelated to values.
      projection_rate: factor on the updates of ``W_Q``, ``W_K`` and ``W_V``. Adam moves every entry by about the
        learning rate: that moves a concept by about ``sqrt(d_in)`` times as much, but a projection, whose entries can
        move together, by up to ``d_in`` times as much.
      score_dtype: what queries and keys are rounded to in their product, which is summed up in float32, as everything
        else is computed; ``"auto"`` is bfloat16 on TPUs and GPUs and float32 on CPUs. The gradient is that of the exact
        product.
      score_scale: factor on the scores; a smaller one starts sparsemax and entmax with more active concepts.
      center_input: subtract the data's mean from the input and add it back to the reconstruction.
      normalize_input: ``"unit_norm"`` divides every row by its own norm and multiplies the reconstruction
        by it; ``"mean_norm"`` applies one factor to all rows, so that their mean norm is ``sqrt(d_in)``.
      frequency_cap: concepts that fire on more than this fraction of rows get score 0; None for no cap.
      loss: ``"squared_error"`` sums over features, ``"mse"`` averages over them, ``"mse_over_norm"`` averages
        and divides by the norm of the centred input row. Each is averaged over rows, in normalised units (under
        ``"unit_norm"`` relative to the squared norm, so that all rows count alike) but for ``"mse_over_norm"``, which
        is in the data's units: long rows count more.
      loss_scale: factor on the reconstruction loss.
      group_fractions: consecutive parts of the dictionary, as fractions that add up to 1; the loss is then the mean
        over the reconstructions from the first part, the first two, and so on (Matryoshka, Bussmann et al. 2025).
        Empty for one part.
      sparsity_loss: what is penalised, summed over concepts and averaged over rows: ``"l1"``, the activations
        (the open gates, for gated); ``"tanh"``, ``tanh(tanh_scale * activation)``; ``"l0"``, the number of active
        concepts of jumprelu.
      sparsity_coefficient: weight of that penalty; 0 for none.
      sparsity_of: ``"activations"`` penalises them as they are, which fits decoder rows of norm 1; ``"contributions"``
        weighs each with the norm of its decoder row, so that a longer row cannot stand in for a smaller activation.
      sparsity_warmup_steps: steps over which the coefficient rises linearly from 0.
      target_l0: for ``"l0"``, penalise ``(count / target_l0 - 1)^2`` instead of the count; None for the count.
      tanh_scale: see ``sparsity_loss``.
      pre_activation_coefficient: for jumprelu, weight of a loss that pulls the scores of dead concepts up to their
        thresholds; 0 for none.
      aux_k: dead concepts that reconstruct the residual (AuxK, Gao et al. 2024); 0 switches it off.
      aux_coefficient: weight of that loss.
      dead_after_rows: a concept that has not fired for this many rows counts as dead.
      unit_norm_decoder: keep the rows of ``W_dec`` at norm 1 and drop the parallel part of their gradient.
      b_dec_init: where ``b_dec`` starts, from the statistics of the data.
      threshold_decay: decay of BatchTopK's running inference threshold, per step.
    """

    d_in: int
    n_concepts: int
    encoder: Literal["mlp", "attention"] = "mlp"
    activation: Literal["relu", "topk", "batch_topk", "sparsemax", "entmax", "jumprelu", "gated"] = "relu"
    values: Literal["scores", "probabilities"] = "scores"
    alpha: float = 1.5
    learn_alpha: bool = False
    k: int = 32
    bandwidth: float = 0.05
    threshold_init: float = 0.01
    apply_b_dec_to_input: bool = True
    query_projection: bool = False
    attention_init: Literal["identity", "kaiming_uniform"] = "identity"
    projection_rate: float = 0.3
    score_dtype: ScoreDtype = "auto"
    score_scale: float = 1.0
    center_input: bool = False
    normalize_input: Literal["none", "unit_norm", "mean_norm"] = "none"
    frequency_cap: float | None = None
    loss: Literal["squared_error", "mse", "mse_over_norm"] = "squared_error"
    loss_scale: float = 1.0
    group_fractions: tuple[float, ...] = ()
    sparsity_loss: Literal["l1", "l0", "tanh"] = "l1"
    sparsity_coefficient: float = 0.0
    sparsity_of: Literal["activations", "contributions"] = "activations"
    sparsity_warmup_steps: int = 0
    target_l0: float | None = None
    tanh_scale: float = 4.0
    pre_activation_coefficient: float = 0.0
    aux_k: int = 0
    aux_coefficient: float = 1 / 32
    dead_after_rows: int = 10_000_000
    unit_norm_decoder: bool = False
    b_dec_init: Literal["zeros", "mean", "geometric_median"] = "zeros"
    threshold_decay: float = 0.95

    def __post_init__(self) -> None:
        _check_literals(self)
        for wrong, problem in self._problems():
            if wrong:
                raise InputError(problem)

    def _problems(self) -> Iterator[tuple[bool, str]]:
        """(whether it is so, what is then wrong) for everything that can be."""
        yield self.d_in < 1, f"d_in is {self.d_in}; expected a width of at least 1"
        yield self.n_concepts < 1, f"n_concepts is {self.n_concepts}; expected at least 1 concept"
        yield (
            self.activation in ("topk", "batch_topk") and not 1 <= self.k <= self.n_concepts,
            f"k is {self.k} with {self.n_concepts} concepts; expected 1 <= k <= n_concepts: "
            "lower k or use more concepts",
        )
        yield (
            self.frequency_cap is not None and not 0 < self.frequency_cap <= 1,
            f"frequency_cap is {self.frequency_cap}; expected a fraction in (0, 1] or None",
        )
        yield (
            not 0 <= self.aux_k <= self.n_concepts,
            f"aux_k is {self.aux_k}; expected 0 to n_concepts = {self.n_concepts}",
        )
        yield (
            not self.projection_rate >= 0,
            f"projection_rate is {self.projection_rate}; expected 0 or more (0 keeps the projections as they are)",
        )
        yield not self.score_scale > 0, f"score_scale is {self.score_scale}; expected a positive number"
        yield not self.bandwidth > 0, f"bandwidth is {self.bandwidth}; expected a positive number"
        yield self.activation == "entmax" and not self.alpha > 1, f"alpha is {self.alpha}; expected a number above 1"
        yield self.target_l0 is not None and not self.target_l0 > 0, f"target_l0 is {self.target_l0}; expected above 0"
        yield (
            bool(self.group_fractions) and (min(self.group_sizes) < 1 or abs(sum(self.group_fractions) - 1) > 1e-6),
            f"group_fractions are {self.group_fractions}; expected parts of at least one of {self.n_concepts} "
            "concepts that add up to 1",
        )
        yield from self._conflicts()

    def _conflicts(self) -> Iterator[tuple[bool, str]]:
        """Settings that do not fit together."""
        attention, jump = self.encoder == "attention", self.activation == "jumprelu"
        yield (
            attention and self.unit_norm_decoder,
            "unit_norm_decoder is set for an attention encoder, which has no W_dec to normalise",
        )
        yield attention and self.activation == "gated", "activation 'gated' needs the biases of encoder 'mlp'"
        yield (
            self.learn_alpha and (self.activation != "entmax" or self.values != "probabilities"),
            "learn_alpha is set; it needs activation 'entmax' and values 'probabilities'",
        )
        yield (
            self.sparsity_loss == "l0" and self.sparsity_coefficient != 0 and not jump,
            f"sparsity_loss is 'l0' for activation {self.activation!r}; a count has a gradient for 'jumprelu' only",
        )
        yield (
            self.pre_activation_coefficient != 0 and not jump,
            f"pre_activation_coefficient is set for activation {self.activation!r}; only 'jumprelu' has thresholds",
        )

    @property
    def group_sizes(self) -> tuple[int, ...]:
        """Concepts in each group of ``group_fractions``; the last takes what rounding leaves."""
        if not self.group_fractions:
            return (self.n_concepts,)
        sizes = [int(fraction * self.n_concepts) for fraction in self.group_fractions[:-1]]
        return (*sizes, self.n_concepts - sum(sizes))

    @classmethod
    def preset(cls, name: Preset, d_in: int, n_concepts: int, **overrides: Any) -> "SAEConfig":
        """The configuration that the field knows under ``name``, with ``overrides`` on top.

        Args:
          name: ``"sparsemax"`` (attention, raw scores on the support: the variant behind the published
            tables), ``"sparsemax_paper"`` (probabilities, W_Q, 1/sqrt(d)), ``"mlp_sparsemax"``,
            ``"attention_relu"``, ``"relu"`` (ReLU + L1), ``"topk"``, ``"batch_topk"``, ``"matryoshka_batch_topk"``,
            ``"jumprelu"``, ``"gated"`` or ``"entmax"`` (attention, raw scores on the support of alpha-entmax).
          d_in: width of an activation row.
          n_concepts: size of the dictionary.
          **overrides: any field of :class:`SAEConfig`.

        Raises:
          InputError: an unknown name or field, or values that do not fit together.

        Example:
          >>> SAEConfig.preset("topk", d_in=768, n_concepts=24_576, k=64).activation
          'topk'
        """
        if name not in get_args(Preset):
            raise InputError(f"preset {name!r} is unknown; expected one of {', '.join(get_args(Preset))}")
        unknown = sorted(set(overrides) - {field.name for field in dataclasses.fields(cls)})
        if unknown:
            raise InputError(f"SAEConfig has no field {', '.join(unknown)}")
        settings = {**_PRESETS[name], **_derived(name, d_in, n_concepts), **overrides}
        return cls(d_in=d_in, n_concepts=n_concepts, **settings)


def _check_literals(config: SAEConfig) -> None:
    for name, hint in get_type_hints(SAEConfig).items():
        value = getattr(config, name)
        if get_origin(hint) is Literal and value not in get_args(hint):
            raise InputError(f"{name} is {value!r}; expected one of {', '.join(map(repr, get_args(hint)))}")


_ATTENTION: dict[str, Any] = dict(
    encoder="attention",
    center_input=True,
    normalize_input="unit_norm",
)
_MLP: dict[str, Any] = dict(
    encoder="mlp", normalize_input="mean_norm", unit_norm_decoder=True, b_dec_init="geometric_median"
)
_PRESETS: dict[str, dict[str, Any]] = {
    "sparsemax": _ATTENTION | dict(activation="sparsemax", frequency_cap=0.1),
    "sparsemax_paper": dict(
        encoder="attention",
        activation="sparsemax",
        values="probabilities",
        query_projection=True,
        center_input=True,
        normalize_input="mean_norm",
        loss="mse",
    ),
    "mlp_sparsemax": _ATTENTION
    | dict(encoder="mlp", activation="sparsemax", frequency_cap=0.1, unit_norm_decoder=True),
    "attention_relu": _ATTENTION
    | dict(
        activation="relu",
        loss="mse_over_norm",
        loss_scale=10.0,
        sparsity_coefficient=0.05,
        sparsity_of="contributions",
        sparsity_warmup_steps=200,
    ),
    "entmax": _ATTENTION | dict(activation="entmax", score_scale=8.0, frequency_cap=0.1),
    "relu": _MLP | dict(activation="relu", sparsity_coefficient=2.0, sparsity_warmup_steps=200),
    "jumprelu": _MLP
    | dict(
        activation="jumprelu",
        threshold_init=1.0,
        bandwidth=0.5,
        sparsity_loss="l0",
        sparsity_coefficient=1.0,
        sparsity_warmup_steps=200,
    ),
    "gated": _MLP | dict(activation="gated", sparsity_coefficient=4.0, sparsity_warmup_steps=200),
    "topk": _MLP | dict(activation="topk"),
    "batch_topk": _MLP | dict(activation="batch_topk"),
    "matryoshka_batch_topk": _MLP
    | dict(activation="batch_topk", group_fractions=(1 / 32, 1 / 16, 1 / 8, 1 / 4, 1 / 2 + 1 / 32)),
}


def _derived(name: str, d_in: int, n_concepts: int) -> dict[str, Any]:
    """Settings of a preset that depend on the shapes."""
    if name == "sparsemax_paper":
        return {"score_scale": 1 / math.sqrt(max(d_in, 1))}
    if _PRESETS[name]["activation"] in ("topk", "batch_topk"):
        return {"aux_k": max(1, min(d_in // 2, n_concepts // 2)), "k": min(32, max(n_concepts, 1))}
    return {}
