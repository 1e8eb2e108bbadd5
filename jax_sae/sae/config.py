"""One configuration for every sparse autoencoder here, and the named presets of the field."""

import dataclasses
import math
from typing import Any, Literal, get_args, get_origin, get_type_hints

from jax_sae.errors import InputError

Preset = Literal[
    "sparsemax",
    "sparsemax_paper",
    "mlp_sparsemax",
    "attention_relu",
    "relu",
    "topk",
    "batch_topk",
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
      values: for sparsemax, what an active concept carries: its raw score (the support is a constant in
        the gradient) or its probability (with the Jacobian of sparsemax).
      k: active concepts per input, for ``topk`` exactly and for ``batch_topk`` on average.
      query_projection: whether the attention has a ``W_Q``.
      score_scale: factor on the scores.
      center_input: subtract the data's mean from the input and add it back to the reconstruction.
      normalize_input: ``"unit_norm"`` divides every row by its own norm and multiplies the reconstruction
        by it; ``"mean_norm"`` applies one factor to all rows, so that their mean norm is ``sqrt(d_in)``.
      frequency_cap: concepts that fire on more than this fraction of rows get score 0; None for no cap.
      loss: ``"squared_error"`` sums over features, ``"mse"`` averages over them, ``"mse_over_norm"`` averages
        and divides by the norm of the input row. Each is averaged over rows, in normalised units but for
        ``"mse_over_norm"``, which is in the data's units.
      loss_scale: factor on the reconstruction loss.
      l1_coefficient: weight of the mean L1 norm of the activations.
      l1_of: ``"activations"`` penalises them as they are, which fits decoder rows of norm 1; ``"contributions"``
        weighs each with the norm of its decoder row, so that a longer row cannot stand in for a smaller activation.
      l1_warmup_steps: steps over which that weight rises linearly from 0.
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
    activation: Literal["relu", "topk", "batch_topk", "sparsemax"] = "relu"
    values: Literal["scores", "probabilities"] = "scores"
    k: int = 32
    query_projection: bool = False
    score_scale: float = 1.0
    center_input: bool = False
    normalize_input: Literal["none", "unit_norm", "mean_norm"] = "none"
    frequency_cap: float | None = None
    loss: Literal["squared_error", "mse", "mse_over_norm"] = "squared_error"
    loss_scale: float = 1.0
    l1_coefficient: float = 0.0
    l1_of: Literal["activations", "contributions"] = "activations"
    l1_warmup_steps: int = 0
    aux_k: int = 0
    aux_coefficient: float = 1 / 32
    dead_after_rows: int = 10_000_000
    unit_norm_decoder: bool = False
    b_dec_init: Literal["zeros", "mean", "geometric_median"] = "zeros"
    threshold_decay: float = 0.95

    def __post_init__(self) -> None:
        _check_literals(self)
        if self.d_in < 1:
            raise InputError(f"d_in is {self.d_in}; expected a width of at least 1")
        if self.n_concepts < 1:
            raise InputError(f"n_concepts is {self.n_concepts}; expected at least 1 concept")
        if self.activation in ("topk", "batch_topk") and not 1 <= self.k <= self.n_concepts:
            raise InputError(
                f"k is {self.k} with {self.n_concepts} concepts; expected 1 <= k <= n_concepts: "
                "lower k or use more concepts"
            )
        if self.frequency_cap is not None and not 0 < self.frequency_cap <= 1:
            raise InputError(f"frequency_cap is {self.frequency_cap}; expected a fraction in (0, 1] or None")
        if not 0 <= self.aux_k <= self.n_concepts:
            raise InputError(f"aux_k is {self.aux_k}; expected 0 to n_concepts = {self.n_concepts}")
        if self.unit_norm_decoder and self.encoder == "attention":
            raise InputError("unit_norm_decoder is set for an attention encoder, which has no W_dec to normalise")

    @classmethod
    def preset(cls, name: Preset, d_in: int, n_concepts: int, **overrides: Any) -> "SAEConfig":
        """The configuration that the field knows under ``name``, with ``overrides`` on top.

        Args:
          name: ``"sparsemax"`` (attention, raw scores on the support: the variant behind the published
            tables), ``"sparsemax_paper"`` (probabilities, W_Q, 1/sqrt(d)), ``"mlp_sparsemax"``,
            ``"attention_relu"``, ``"relu"`` (ReLU + L1), ``"topk"`` or ``"batch_topk"``.
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
    loss="mse_over_norm",
    loss_scale=10.0,
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
    | dict(activation="relu", l1_coefficient=0.05, l1_of="contributions", l1_warmup_steps=200),
    "relu": _MLP | dict(activation="relu", l1_coefficient=1.0, l1_warmup_steps=200),
    "topk": _MLP | dict(activation="topk"),
    "batch_topk": _MLP | dict(activation="batch_topk"),
}


def _derived(name: str, d_in: int, n_concepts: int) -> dict[str, Any]:
    """Settings of a preset that depend on the shapes."""
    if name == "sparsemax_paper":
        return {"score_scale": 1 / math.sqrt(max(d_in, 1))}
    if name in ("topk", "batch_topk"):
        return {"aux_k": max(1, min(d_in // 2, n_concepts // 2)), "k": min(32, max(n_concepts, 1))}
    return {}
