"""``python -m train.evaluate WORKDIR ...``: metrics on held-out rows, concepts in context, the report."""

import dataclasses
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import tyro
from tqdm import tqdm

from jax_sae import InputError
from jax_sae.data import ActivationSet
from jax_sae.evaluation import concepts

from . import cli, report
from .checkpoint import Which
from .files import write_json
from .held_out import LEAST_CKNNA_ROWS, HeldOut, measure
from .report_files import LEFT_OUT
from .run import Run, load_run, open_data, survey
from .spliced import SplicedLosses


@dataclasses.dataclass(frozen=True)
class EvaluateConfig:
    """Evaluate training runs on rows held out from training, and write their reports.

    Attributes:
      workdirs: of the runs.
      data: another activation set to evaluate on; the held-out rows of the one trained on without it.
      checkpoint: the latest, or the best by validation FVU.
      batch_size: rows at one time.
      cknna_rows: held-out rows per batch of CKNNA, whose activations are in memory at one time. Rows that fill no
        batch take no part, unless there are fewer altogether; 0 leaves CKNNA out.
      sequences: held-out sequences for the spliced loss of a language model; 0 leaves it out.
      concept_rows: rows, the last ones of the set, that the contexts of concepts are looked for in.
    """

    workdirs: Annotated[tuple[Path, ...], tyro.conf.Positional]
    data: Path | None = None
    checkpoint: Which = "latest"
    batch_size: int = 1024
    cknna_rows: int = 10_000
    sequences: int = 48
    concept_rows: int = 200_000

    def validate(self) -> None:
        """Refuses values that fit no run.

        Raises:
          InputError: the flag is named.
        """
        if not self.workdirs:
            raise InputError("no workdir is given; expected the --workdir of at least one training run")
        for name, least in {"batch_size": 1, "sequences": 0, "concept_rows": 1}.items():
            if getattr(self, name) < least:
                raise InputError(f"--{name.replace('_', '-')} is {getattr(self, name)}; expected at least {least}")
        if self.cknna_rows and self.cknna_rows < LEAST_CKNNA_ROWS:
            raise InputError(f"--cknna-rows is {self.cknna_rows}; expected at least {LEAST_CKNNA_ROWS}, or 0 for none")


def evaluate(config: EvaluateConfig) -> list[dict[str, Any]]:
    """Evaluates runs: writes ``evaluation.json``, ``concepts.json``, ``report.html`` into each, prints a table.

    Returns:
      What is in ``evaluation.json`` of every run.

    Raises:
      InputError: a folder that is no run, or data that do not fit it.
    """
    config.validate()
    results, spliced = [], SplicedLosses(config.sequences)
    for workdir in config.workdirs:
        run = load_run(workdir, config.checkpoint)
        activations, mean = held_out_set(run, config.data)
        evaluation, described = evaluate_rows(run, activations, mean, config)
        if config.sequences and activations.provenance is not None:
            evaluation |= spliced.of(run, activations, mean)
        write_json(workdir / "evaluation.json", evaluation)
        write_json(workdir / "concepts.json", described)
        report.render(workdir)
        results.append(evaluation)
    print(table([str(workdir) for workdir in config.workdirs], results))
    return results


def held_out_set(run: Run, data: Path | None) -> tuple[ActivationSet, np.ndarray]:
    """The set to evaluate on, without its non-finite rows if the run left them out, and the mean [d] of its data.

    The mean is that of the training rows; of another set, that of the rows it does not hold out itself.

    Raises:
      InputError: it has another width, or no rows that training did not see.
    """
    path = run.data_path if data is None else data
    activations = open_data(path, holdout=run.config.holdout)
    if activations.d != run.sae.d_in:
        raise InputError(f"{path} has rows of width {activations.d}; {run.workdir} was trained on {run.sae.d_in}")
    if data is None and activations.fingerprint != run.resolved.fingerprint:
        raise InputError(f"{path} is no longer the set that {run.workdir} was trained on; give --data")
    activations, statistics = survey(activations, run.workdir, drop_non_finite=run.config.drop_non_finite)
    if data is not None and activations.fingerprint != run.resolved.fingerprint:
        activations = activations.with_holdout(activations.rows)  # none of another set was trained on
    if not activations.holdout_rows:
        raise InputError(f"{path} holds out no rows; train with --holdout above 0, or give --data")
    return activations, statistics.mean


def evaluate_rows(
    run: Run, activations: ActivationSet, mean: np.ndarray, config: EvaluateConfig
) -> tuple[dict[str, Any], dict[str, Any]]:
    """The contents of ``evaluation.json`` (but for the spliced loss) and of ``concepts.json``."""
    rows = activations.holdout_rows
    with _bar(rows, "evaluate") as bar:
        measured = measure(
            run,
            activations,
            mean,
            batch_size=config.batch_size,
            cknna_rows=config.cknna_rows,
            progress=bar.update,
        )
    evaluation: dict[str, Any] = {
        "preset": run.config.preset,
        "step": run.step,
        "steps": run.config.steps,
        "rows": rows,
        "sequences": config.sequences,
        "concept_rows": config.concept_rows,
        **measured.numbers,
    }
    undefined = [n for n, value in evaluation.items() if isinstance(value, float) and not np.isfinite(value)]
    if undefined:
        raise InputError(
            f"{', '.join(undefined)} cannot be computed on the {rows} held-out rows of "
            f"{activations.path}: they are constant or not finite; give other --data"
        )
    return evaluation, _describe(run, activations, config, measured)


def _describe(run: Run, activations: ActivationSet, config: EvaluateConfig, measured: HeldOut) -> dict[str, Any]:
    """``concepts.json``: histograms of held-out rows, and contexts from the last rows of the set."""
    model, stats = run.state.model, run.state.stats
    first, last = activations.train_rows, activations.rows
    item = activations.tokens_per_item or 1
    start = max(0, last - config.concept_rows)
    start += -start % item
    with _bar(last - start, "concepts") as bar:
        firing = concepts.find_peaks(
            model, stats, activations, start, last, batch_size=config.batch_size, progress=bar.update
        )
    few, many = concepts.extreme_inputs(measured.active, concepts.item_size(activations, first, last), count=4)
    return {
        "rows": last - first,
        "context_rows": last - start,
        "n_concepts": run.sae.n_concepts,
        "active_histogram": concepts.active_histogram(measured.active),
        "frequency_histogram": concepts.frequency_histogram(measured.firing, last - first),
        "few": concepts.describe_inputs(model, stats, activations, first + few),
        "many": concepts.describe_inputs(model, stats, activations, first + many),
        "concepts": concepts.describe_concepts(model, stats, activations, firing, last - start),
    }


_COLUMNS = (
    {
        "preset": "preset",
        "step": "step",
        "active": "active",
        "l0": "L0",
        "fvu": "FVU",
        "fvu_pooled": "pooled",
        "nmse": "NMSE",
        "cs": "CS",
        "cknna": "CKNNA",
        "do": "DO",
        "ms_mean": "MS mean",
        "ms_max": "MS max",
        "dead_fraction": "dead",
        "loss": "loss",
    },
    {
        "ce_clean": "CE clean",
        "ce_sae": "CE SAE",
        "ce_mean_ablated": "CE mean-abl.",
        "ce_zero_ablated": "CE zero-abl.",
        "ce_degradation": "CE degr.",
        "loss_recovered": "recovered",
    },
)


def table(names: list[str], results: list[dict[str, Any]]) -> str:
    """The runs as rows of aligned columns: a table of the rows, one of the language model, and what was left out.

    Numbers that no run has make no column, and a table of none is left out.
    """
    tables = [_aligned(names, results, columns) for columns in _COLUMNS]
    return "\n\n".join(part for part in (*tables, _left_out(names, results)) if part)


def _aligned(names: list[str], results: list[dict[str, Any]], titles: dict[str, str]) -> str:
    columns = {key: title for key, title in titles.items() if any(key in result for result in results)}
    if not columns:
        return ""
    lines = [["run", *columns.values()]]
    lines += [[name, *(_cell(r.get(key)) for key in columns)] for name, r in zip(names, results, strict=True)]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join("  ".join(cell.ljust(w) for cell, w in zip(line, widths, strict=True)).rstrip() for line in lines)


def _left_out(names: list[str], results: list[dict[str, Any]]) -> str:
    """A line for every metric and reason, with the runs it holds for where those are not all."""
    runs: dict[tuple[str, str], list[str]] = {}
    for name, result in zip(names, results, strict=True):
        for key in (key for key in result if key.endswith(LEFT_OUT)):
            runs.setdefault((key.removesuffix(LEFT_OUT).upper(), result[key]), []).append(name)
    return "\n".join(
        f"{metric} is left out{'' if len(of) == len(names) else ' for ' + ', '.join(of)}: {reason}"
        for (metric, reason), of in runs.items()
    )


def _cell(value: Any) -> str:
    if value is None:
        return "-"
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _bar(rows: int, what: str) -> tqdm:
    return tqdm(total=rows, desc=what, unit=" rows", unit_scale=True, disable=None)


if __name__ == "__main__":
    cli.run(evaluate, prog=f"python -m {__package__}.evaluate")
