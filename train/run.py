"""A run on disk: its configuration, its data, its state. Shared by training, evaluation and the report."""

import dataclasses
from pathlib import Path

import jax
import numpy as np
import optax
from tqdm import tqdm

from jax_sae import InputError, SAEConfig, TrainState, init_train_state, learning_rate_schedule, make_optimizer
from jax_sae.data import ActivationSet, Statistics, open_activations, scan

from .checkpoint import Checkpoints, Which, abstract
from .config import ResolvedConfig, TrainConfig, differing_fields
from .files import read_json, write_json


@dataclasses.dataclass(frozen=True)
class Run:
    """A trained (or half trained) run.

    Attributes:
      workdir: its folder.
      config: the flags it was started with, defaults filled in.
      sae: the autoencoder.
      resolved: both, with the source of the data.
      state: parameters and statistics of the chosen checkpoint, on the default device.
      step: of that checkpoint.
    """

    workdir: Path
    resolved: ResolvedConfig
    state: TrainState
    step: int

    @property
    def config(self) -> TrainConfig:
        return self.resolved.train

    @property
    def sae(self) -> SAEConfig:
        return self.resolved.sae

    @property
    def data_path(self) -> Path:
        """Where the activation set was when the run was started."""
        assert self.config.data is not None  # resolved
        return self.config.data


def optimizer_of(config: TrainConfig, learning_rate: jax.Array | None = None) -> optax.GradientTransformation:
    """The optimizer of a resolved run, or the same with another, perhaps traced, learning rate."""
    assert config.learning_rate is not None  # resolved
    return make_optimizer(
        config.learning_rate if learning_rate is None else learning_rate,
        total_steps=config.steps,
        warmup_steps=config.warmup_steps,
        decay_fraction=config.decay_fraction,
        clip_norm=config.clip_norm,
    )


def learning_rate_at(config: TrainConfig, step: int) -> float:
    """The rate that a resolved run takes step ``step`` with, the first being 1."""
    assert config.learning_rate is not None  # resolved
    schedule = learning_rate_schedule(
        config.learning_rate,
        total_steps=config.steps,
        warmup_steps=config.warmup_steps,
        decay_fraction=config.decay_fraction,
    )
    return float(schedule(np.int32(step - 1)))


def abstract_state_of(resolved: ResolvedConfig) -> TrainState:
    """Shapes and dtypes of the run's state; nothing is computed."""
    optimizer = optimizer_of(resolved.train)
    return jax.eval_shape(lambda: init_train_state(resolved.sae, optimizer, jax.random.key(0)))


def load_run(workdir: Path, which: Which = "latest") -> Run:
    """Reads a run.

    Args:
      workdir: of ``python -m train``.
      which: the latest checkpoint, or the best one by validation FVU.

    Raises:
      InputError: the folder is not a run, or has no checkpoint yet.
    """
    path = workdir / "config.json"
    if not path.is_file():
        raise InputError(f"{workdir} holds no run (no config.json); give the --workdir of a training run")
    resolved = read_config(path)
    checkpoints = Checkpoints(workdir / "checkpoints")
    step = checkpoints.step(which)
    if step is None:
        raise InputError(f"{workdir} has no checkpoint yet; train until the first one (--checkpoint-every)")
    state = checkpoints.restore(abstract(abstract_state_of(resolved)), step)
    checkpoints.close()
    return Run(workdir, resolved, state, step)


def read_config(path: Path) -> ResolvedConfig:
    """The ``config.json`` of a run.

    Raises:
      InputError: it is damaged or of another version.
    """
    fields = read_json(path)
    try:
        return ResolvedConfig.from_json(fields)
    except (KeyError, TypeError, AttributeError) as error:
        raise InputError(
            f"{path} is not the configuration of a run ({error}); restore it or use a new workdir"
        ) from error


def refuse_other_run(workdir: Path, resolved: ResolvedConfig) -> None:
    """Makes sure that a run that is already in ``workdir`` is this one.

    Raises:
      InputError: it has another configuration; the differing fields are named.
    """
    path = workdir / "config.json"
    if not path.exists():
        return
    differences = differing_fields(read_json(path), resolved.to_json())
    if differences:
        raise InputError(
            f"{workdir} holds a run with another configuration ({'; '.join(differences)}); "
            "use another --workdir, or the flags of that run to resume it"
        )


def open_data(path: Path, *, holdout: float) -> ActivationSet:
    """Opens an activation set; a set that holds out no rows itself holds out its last ``holdout`` fraction."""
    activations = open_activations(path)
    if activations.holdout_rows:
        return activations
    return activations.with_holdout(round(activations.rows * holdout))


def verify(activations: ActivationSet) -> None:
    """Compares the set with its checksums, with a progress bar.

    Raises:
      InputError: a shard is damaged; it is named.
    """
    with tqdm(unit="B", unit_scale=True, desc="verify", disable=None) as bar:
        activations.verify(bar.update)


def survey(activations: ActivationSet, workdir: Path, *, drop_non_finite: bool) -> tuple[ActivationSet, Statistics]:
    """The statistics of the training rows, and the set without its non-finite rows.

    A set of our own format carries its statistics. Any other is read once; what was found is kept in
    ``survey.json`` of the workdir.

    Raises:
      InputError: there are rows with NaN or inf and ``drop_non_finite`` is off.
    """
    if activations.statistics is not None:
        return activations, activations.statistics
    path = workdir / "survey.json"
    found = read_json(path) if path.exists() else {}
    if found.get("fingerprint") != activations.fingerprint or found.get("holdout") != activations.holdout_rows:
        with tqdm(total=activations.rows, unit=" rows", unit_scale=True, desc="survey", disable=None) as bar:
            statistics, bad = scan(activations, 0, activations.train_rows, progress=bar.update)
            if activations.holdout_rows:
                _, held_out = scan(activations, activations.train_rows, activations.rows, progress=bar.update)
                bad = np.concatenate([bad, held_out])
        found = {
            "fingerprint": activations.fingerprint,
            "holdout": activations.holdout_rows,
            "statistics": statistics.to_json(),
            "non_finite_rows": bad.tolist(),
        }
        write_json(path, found)
    bad_rows = np.asarray(found["non_finite_rows"], np.int64)
    if bad_rows.size and not drop_non_finite:
        raise InputError(
            f"{activations.path} has {bad_rows.size} rows with NaN or inf (the first is row {bad_rows[0]}); "
            "mend the set, or pass --drop-non-finite to train without them"
        )
    if bad_rows.size:
        activations = activations.without_rows(bad_rows)
    return activations, Statistics.from_json(found["statistics"])
