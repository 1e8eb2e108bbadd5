"""``python -m train.compare``: trains many autoencoders in lock-step on the same batches, and compares them."""

import collections
import dataclasses
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax

from jax_sae import InputError, Preset
from jax_sae.data import ActivationSet, Statistics

from . import cli, comparison
from .config import TrainConfig
from .evaluate import EvaluateConfig, evaluate
from .files import make_writable_folder, read_json, write_json
from .members import TOP_K, Grid, Member, members, parse_vary
from .run import open_data, refuse_other_run, survey, verify
from .sweep import failure, train_together


@dataclasses.dataclass(frozen=True)
class CompareConfig:
    """Train many sparse autoencoders on the same batches and compare them on held-out rows.

    Every combination of preset, seed, learning rate, k and --vary is a run in its own folder of the workdir, for
    train.evaluate and train.report too. Running the same command again resumes.

    Attributes:
      data: activation set; without it the default set is extracted from a real model first.
      workdir: where the runs and the comparison go.
      presets: which sparse autoencoders.
      steps: optimizer steps of every run.
      batch_size: rows per step.
      n_concepts: size of the dictionaries; 8 times the width of the data without it.
      seeds: of the initial parameters; the first is that of the order of the data too, for all runs.
      learning_rates: peak learning rates to try with each; each preset's own without it.
      k: active concepts to try with each of topk, batch_topk and the like.
      match_k: train these also at the numbers of active concepts that the sparsemax and entmax runs come to.
      vary: FIELD=VALUE,VALUE of SAEConfig to try with each, such as alpha=1.25,1.5 frequency_cap=0.1,none.
      warmup_steps: steps of linear warm-up.
      decay_fraction: the last part of the run over which the learning rate falls linearly to 0.
      clip_norm: clip the global norm of the gradient; no clipping without it.
      holdout: fraction of rows, the last ones, kept from training; only for a set that names none itself.
      drop_non_finite: leave out rows with NaN or inf (counted and reported) instead of refusing the set.
      verify: check the checksums of the set before the first step.
      checkpoint_every: steps between checkpoints, each with a validation on held-out rows.
      log_every: steps between lines of metrics.jsonl.
      sequences: held-out sequences for the spliced loss of a language model; 0 leaves it out.
      concept_rows: rows, the last ones of the set, that the contexts in the report of every run are looked for in.
    """

    data: Path | None = None
    workdir: Path = Path("runs/compare")
    presets: tuple[Preset, ...] = ("sparsemax", "mlp_sparsemax", "attention_relu", "relu", "topk", "batch_topk")
    steps: int = 300
    batch_size: int = 1024
    n_concepts: int | None = None
    seeds: tuple[int, ...] = (0,)
    learning_rates: tuple[float, ...] = ()
    k: tuple[int, ...] = (32,)
    match_k: bool = True
    vary: tuple[str, ...] = ()
    warmup_steps: int = 100
    decay_fraction: float = 0.2
    clip_norm: float | None = None
    holdout: float = 0.05
    drop_non_finite: bool = False
    verify: bool = True
    checkpoint_every: int = 100
    log_every: int = 20
    sequences: int = 48
    concept_rows: int = 20_000

    def validate(self) -> None:
        """Refuses values that fit no data.

        Raises:
          InputError: the flag is named.
        """
        self.base.validate()
        self.grid.validate()
        for name, least in {"sequences": 0, "concept_rows": 1}.items():
            if getattr(self, name) < least:
                raise InputError(f"--{name.replace('_', '-')} is {getattr(self, name)}; expected at least {least}")

    @property
    def base(self) -> TrainConfig:
        """The flags that all runs share."""
        shared = {field.name for field in dataclasses.fields(TrainConfig)} & set(vars(self))
        return TrainConfig(parallel="jit", **{name: getattr(self, name) for name in shared})

    @property
    def grid(self) -> Grid:
        """What the runs differ in, but for matched k."""
        return Grid(self.presets, self.seeds, self.learning_rates, self.k, parse_vary(self.vary))


def compare(config: CompareConfig) -> Path | None:
    """Trains, or goes on training, every member of the comparison, evaluates them, and writes the comparison.

    Returns:
      The report of the comparison; None when a signal ended the training early.

    Raises:
      InputError: bad flags, bad data, or a workdir of another comparison.
    """
    # 1. Everything that may be refused, before anything is written.
    config.validate()
    assert config.data is not None, "the command line fills in the default set"
    activations = open_data(config.data, holdout=config.holdout)
    if not activations.holdout_rows:
        raise InputError(f"{config.data} holds out no rows to compare on; give --holdout above 0")
    first = members(config.base, config.grid, activations)
    if not first:
        raise InputError("--k is empty and --presets has none but those that need it; give at least one k")
    workdir = make_writable_folder(config.workdir)
    _refuse_other_runs(first)
    # 2. The bytes of the data, and what has to be known of them: statistics, rows to leave out.
    if config.verify and not any(_folder(member).exists() for member in first):
        verify(activations)
    activations, statistics = survey(activations, workdir, drop_non_finite=config.drop_non_finite)
    # 3. Those whose k is known, then those whose k is what others came to, on the same batches.
    if not _train_and_evaluate(first, config, activations, statistics):
        return None
    matched = matched_k(first) if config.match_k else {}
    second = _matching(config, matched, activations)
    if not _train_and_evaluate(second, config, activations, statistics):
        return None
    # 4. The comparison.
    everyone = first + second
    page = comparison.write(workdir, list(map(_folder, everyone)), _described(config, everyone, matched, activations))
    print((workdir / "comparison.md").read_text(encoding="utf-8"))
    print(f"comparison: {workdir / 'comparison.md'}, {page}")
    return page


def matched_k(of: Sequence[Member]) -> dict[str, int]:
    """How many concepts each sparsemax or entmax system keeps active on held-out rows, rounded, its seeds averaged."""
    active = collections.defaultdict(list)
    for member in of:
        if member.sae.activation in ("sparsemax", "entmax") and failure(member.resolved) is None:
            active[member.system].append(read_json(_folder(member) / "evaluation.json")["active"])
    return {system: max(1, round(sum(counts) / len(counts))) for system, counts in active.items()}


def _matching(config: CompareConfig, matched: dict[str, int], activations: ActivationSet) -> list[Member]:
    """The topk and batch_topk members at each matched k that was not trained already."""
    k = tuple(sorted(set(matched.values()) - set(config.k)))
    found = members(config.base, dataclasses.replace(config.grid, k=k), activations)
    return [member for member in found if member.sae.activation in TOP_K]


def _train_and_evaluate(
    of: Sequence[Member], config: CompareConfig, activations: ActivationSet, statistics: Statistics
) -> bool:
    """Whether it came to its end; False after a signal. What is trained or evaluated already is not done again."""
    _refuse_other_runs(of)
    for member in of:
        folder = make_writable_folder(_folder(member))
        write_json(folder / "config.json", member.resolved.to_json())
        if activations.statistics is None:  # what the survey found, for an evaluation of this run alone
            write_json(folder / "survey.json", read_json(config.workdir / "survey.json"))
    if not train_together([member.resolved for member in of], activations, statistics, config.workdir):
        return False
    healthy = [_folder(member) for member in of if failure(member.resolved) is None]
    to_do = tuple(folder for folder in healthy if not _is_evaluated(folder, config))
    if to_do:
        evaluate(EvaluateConfig(to_do, sequences=config.sequences, concept_rows=config.concept_rows))
    return True


def _refuse_other_runs(of: Sequence[Member]) -> None:
    for member in of:
        refuse_other_run(_folder(member), member.resolved)


def _is_evaluated(folder: Path, config: CompareConfig) -> bool:
    """Whether there is an evaluation of the last step with the same settings."""
    path = folder / "evaluation.json"
    wanted = {"step": config.steps, "sequences": config.sequences, "concept_rows": config.concept_rows}
    return path.exists() and wanted.items() <= read_json(path).items()


def _folder(member: Member) -> Path:
    assert member.resolved.train.workdir is not None  # resolved
    return member.resolved.train.workdir


def _described(
    config: CompareConfig, of: Sequence[Member], matched: dict[str, int], activations: ActivationSet
) -> dict[str, Any]:
    """What the runs have in common, and the k that were matched."""
    sizes = {member.sae.n_concepts for member in of}
    return {
        "data": str(config.data),
        "source": activations.source,
        "steps": config.steps,
        "batch_size": config.batch_size,
        "n_concepts": sizes.pop() if len(sizes) == 1 else None,
        "seeds": list(config.seeds),
        "data_seed": config.seeds[0],
        "device": _device(),
        "matched_k": matched,
    }


def _device() -> str:
    kind = jax.local_devices()[0].device_kind
    return f"{kind}, {os.cpu_count()} cores" if kind == "cpu" else kind


def main(config: CompareConfig) -> None:
    config.validate()
    if config.data is None:
        from .extract import ExtractConfig, extract

        config = dataclasses.replace(config, data=extract(ExtractConfig()))
    compare(config)


if __name__ == "__main__":
    cli.run(main, prog=f"python -m {__package__}.compare")
