"""What a training run is made of: the flags of ``python -m train``, and how they become one resolved run.

Every default below is what ``python -m train`` does with no flags at all: a Sparsemax SAE on the residual
stream of SmolLM2-135M over the State of the Union addresses.
"""

import dataclasses
import json
from pathlib import Path
from typing import Any, Literal, get_args, get_type_hints

from jax_sae import InputError, Preset, SAEConfig
from jax_sae.capacity import least_places
from jax_sae.data import ActivationSet

# Chosen from 2e-3, 4e-3 and 8e-3 on short runs on two layers: benchmarks/results/learning_rates.md.
LEARNING_RATES: dict[Preset, float] = dict.fromkeys(get_args(Preset), 2e-3) | dict.fromkeys(
    ("sparsemax", "mlp_sparsemax", "entmax", "topk"), 4e-3
)

Overrides = dataclasses.make_dataclass(
    "Overrides",
    [
        (name, hint | None, None)
        for name, hint in get_type_hints(SAEConfig).items()
        if name not in ("d_in", "n_concepts")
    ],
    frozen=True,
    namespace={"__doc__": SAEConfig.__doc__},
)
Overrides.__doc__ = (SAEConfig.__doc__ or "").replace(
    "What a sparse autoencoder computes", "Settings of the preset to change"
)


@dataclasses.dataclass(frozen=True)
class TrainConfig:
    """Train a sparse autoencoder on stored activations. Running the same command again resumes.

    Attributes:
      preset: which sparse autoencoder.
      data: activation set: a folder with activations.json, a .npy file, a folder of .npy files or a TFDS
        array_record folder. Without it the default set is extracted from a real model first.
      workdir: where checkpoints, logs and reports of this run go; runs/PRESET without it.
      steps: optimizer steps.
      batch_size: rows per step, over all devices and hosts.
      n_concepts: size of the dictionary; 8 times the width of the data without it.
      seed: of the initial parameters and of the order of the data.
      data_seed: of the order of the data, where it is to differ from the seed.
      learning_rate: peak learning rate; the preset's own without it.
      warmup_steps: steps of linear warm-up.
      decay_fraction: the last part of the run over which the learning rate falls linearly to 0.
      clip_norm: clip the global norm of the gradient; no clipping without it.
      holdout: fraction of rows, the last ones, kept from training; only for a set that names none itself.
      drop_non_finite: leave out rows with NaN or inf (counted and reported) instead of refusing the set.
      verify: check the checksums of the set before the first step of a new run.
      checkpoint_every: steps between checkpoints, each with a validation on held-out rows.
      validation_rows: held-out rows used for it.
      log_every: steps between lines of metrics.jsonl.
      steps_per_call: optimizer steps per dispatch (a scan on the device).
      capacity: places per row for active concepts in the sparse step; auto follows what the run needs, dense computes
        all concepts. The numbers are the same up to rounding.
      parallel: auto is jit on one device and pmap on several.
      mesh: for --parallel mesh, the number of devices along the data axis and along the concept axis.
      sae: settings of the preset to change.
    """

    preset: Preset = "sparsemax"
    data: Path | None = None
    workdir: Path | None = None
    steps: int = 1000
    batch_size: int = 1024
    n_concepts: int | None = None
    seed: int = 0
    data_seed: int | None = None
    learning_rate: float | None = None
    warmup_steps: int = 200
    decay_fraction: float = 0.2
    clip_norm: float | None = None
    holdout: float = 0.05
    drop_non_finite: bool = False
    verify: bool = True
    checkpoint_every: int = 250
    validation_rows: int = 4096
    log_every: int = 20
    steps_per_call: int = 1
    capacity: Literal["auto", "dense"] | int = "auto"
    parallel: Literal["auto", "jit", "pmap", "mesh"] = "auto"
    mesh: tuple[int, int] | None = None
    sae: Overrides = dataclasses.field(default_factory=Overrides)  # type: ignore[valid-type]

    def validate(self) -> None:
        """Refuses values that fit no data.

        Raises:
          InputError: the flag is named.
        """
        for name in ("steps", "batch_size", "checkpoint_every", "log_every", "steps_per_call"):
            if getattr(self, name) < 1:
                raise InputError(f"--{name.replace('_', '-')} is {getattr(self, name)}; expected at least 1")
        for name in ("warmup_steps", "validation_rows", "seed"):
            if getattr(self, name) < 0:
                raise InputError(f"--{name.replace('_', '-')} is {getattr(self, name)}; expected at least 0")
        if self.data_seed is not None and self.data_seed < 0:
            raise InputError(f"--data-seed is {self.data_seed}; expected at least 0")
        for name in ("decay_fraction", "holdout"):
            if not 0 <= getattr(self, name) < 1:
                raise InputError(f"--{name.replace('_', '-')} is {getattr(self, name)}; expected a fraction in [0, 1)")
        for name in ("learning_rate", "clip_norm"):
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise InputError(f"--{name.replace('_', '-')} is {value}; expected a positive number")
        for name in ("steps", "checkpoint_every", "log_every"):
            if getattr(self, name) % self.steps_per_call:
                raise InputError(
                    f"--{name.replace('_', '-')} is {getattr(self, name)}; expected a multiple of "
                    f"--steps-per-call {self.steps_per_call}"
                )
        if isinstance(self.capacity, int) and self.capacity < 1:
            raise InputError(f"--capacity is {self.capacity}; expected auto, dense or at least 1 place per row")
        if self.parallel == "mesh" and isinstance(self.capacity, int):
            raise InputError(f"--capacity is {self.capacity} with --parallel mesh, whose step is dense; leave it out")
        if (self.parallel == "mesh") != (self.mesh is not None):
            raise InputError("--parallel mesh and --mesh DATA MODEL go together; give both or neither")


@dataclasses.dataclass(frozen=True)
class ResolvedConfig:
    """A run with nothing left open: what ``config.json`` holds and what a resumed run must equal.

    Attributes:
      train: the flags, every default filled in.
      sae: the autoencoder.
      source: where the activations come from (model, layer, ...).
      fingerprint: of the activation set.
    """

    train: TrainConfig
    sae: SAEConfig
    source: dict[str, Any]
    fingerprint: str

    def to_json(self) -> dict[str, Any]:
        """Nested plain values."""
        fields = dataclasses.asdict(self.train) | {
            "data": str(self.train.data),
            "workdir": str(self.train.workdir),
            "mesh": list(self.train.mesh) if self.train.mesh else None,
            "sae": dataclasses.asdict(self.sae) | {"group_fractions": list(self.sae.group_fractions)},
            "source": self.source,
            "fingerprint": self.fingerprint,
        }
        return fields

    @classmethod
    def from_json(cls, fields: dict[str, Any]) -> "ResolvedConfig":
        """The inverse of :meth:`to_json`."""
        fields = dict(fields)
        sae, source, fingerprint = (fields.pop(name) for name in ("sae", "source", "fingerprint"))
        fields |= {name: Path(fields[name]) for name in ("data", "workdir")}
        fields["mesh"] = tuple(fields["mesh"]) if fields["mesh"] else None
        train = TrainConfig(**fields)
        sae |= {"group_fractions": tuple(sae["group_fractions"])}
        return cls(train, SAEConfig(**sae), source, fingerprint)


def resolve(config: TrainConfig, activations: ActivationSet) -> ResolvedConfig:
    """Fills in what depends on the preset and on the data.

    Raises:
      InputError: settings that do not fit the data, such as a batch larger than the set.
    """
    rows = activations.train_rows
    if config.batch_size > rows:
        raise InputError(
            f"--batch-size is {config.batch_size} but {activations.path} has {rows} training rows; "
            "use a smaller batch or a larger set"
        )
    overrides = {k: v for k, v in dataclasses.asdict(config.sae).items() if v is not None}
    n_concepts = config.n_concepts if config.n_concepts is not None else 8 * activations.d
    total_rows = config.steps * config.batch_size
    overrides.setdefault("dead_after_rows", max(1, min(10_000_000, total_rows // 8)))
    sae = SAEConfig.preset(config.preset, activations.d, n_concepts, **overrides)
    if isinstance(config.capacity, int) and config.capacity < least_places(sae):
        raise InputError(
            f"--capacity is {config.capacity} but {config.preset} keeps k = {sae.k} concepts of a row; "
            "use at least as many places, or auto"
        )
    train = dataclasses.replace(
        config,
        n_concepts=n_concepts,
        learning_rate=config.learning_rate or LEARNING_RATES[config.preset],
        data=activations.path,
        workdir=workdir_of(config),
        sae=Overrides(),
    )
    return ResolvedConfig(train, sae, activations.source, activations.fingerprint)


def workdir_of(config: TrainConfig) -> Path:
    """``--workdir``, or runs/PRESET."""
    return config.workdir if config.workdir is not None else Path("runs") / config.preset


# A resumed run may differ in these: they change where and how often, not what is computed.
_MAY_DIFFER = {"data", "workdir", "verify", "checkpoint_every", "log_every", "parallel", "mesh"}


def differing_fields(old: dict[str, Any], new: dict[str, Any], prefix: str = "") -> list[str]:
    """``name: old -> new`` for every field that a resumed run must share and does not."""
    differences = []
    for name in sorted(set(old) | set(new)):
        if not prefix and name in _MAY_DIFFER:
            continue
        a, b = old.get(name), new.get(name)
        if isinstance(a, dict) and isinstance(b, dict):
            differences += differing_fields(a, b, prefix=f"{name}.")
        elif a != b:
            differences.append(f"{prefix}{name}: {json.dumps(a)} -> {json.dumps(b)}")
    return differences
