"""``python -m train.evaluate WORKDIR ...``: metrics on held-out rows, concepts in context, the report."""

import dataclasses
import functools
from pathlib import Path
from typing import Annotated, Any

import jax
import jax.numpy as jnp
import numpy as np
import tyro
from tqdm import tqdm

from jax_sae import InputError, SAEConfig, SAEStats, SparseAutoencoder, sae_loss
from jax_sae.data import ActivationSet
from jax_sae.evaluation import concepts
from jax_sae.metrics import ReconstructionSums, SparsitySums, on_host

from . import cli, report
from .checkpoint import Which
from .files import write_json
from .run import Run, load_run, open_data, survey


@dataclasses.dataclass(frozen=True)
class EvaluateConfig:
    """Evaluate training runs on rows held out from training, and write their reports.

    Attributes:
      workdirs: of the runs.
      data: another activation set to evaluate on; the held-out rows of the one trained on without it.
      checkpoint: the latest, or the best by validation FVU.
      batch_size: rows at one time.
      sequences: held-out sequences for the spliced loss of a language model; 0 leaves it out.
      concept_rows: rows, the last ones of the set, that the contexts of concepts are looked for in.
    """

    workdirs: Annotated[tuple[Path, ...], tyro.conf.Positional]
    data: Path | None = None
    checkpoint: Which = "latest"
    batch_size: int = 1024
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


def evaluate(config: EvaluateConfig) -> list[dict[str, Any]]:
    """Evaluates runs: writes ``evaluation.json``, ``concepts.json``, ``report.html`` into each, prints a table.

    Returns:
      What is in ``evaluation.json`` of every run.

    Raises:
      InputError: a folder that is no run, or data that do not fit it.
    """
    config.validate()
    results = []
    for workdir in config.workdirs:
        run = load_run(workdir, config.checkpoint)
        activations = held_out_set(run, config.data)
        evaluation, described = evaluate_rows(run, activations, config)
        if config.sequences and activations.provenance is not None:
            evaluation |= _spliced(run, activations, config)
        write_json(workdir / "evaluation.json", evaluation)
        write_json(workdir / "concepts.json", described)
        report.render(workdir)
        results.append(evaluation)
    print(table([str(workdir) for workdir in config.workdirs], results))
    return results


def held_out_set(run: Run, data: Path | None) -> ActivationSet:
    """The set to evaluate on, without its non-finite rows if the run left them out.

    Raises:
      InputError: it has another width, or no rows that training did not see.
    """
    path = run.data_path if data is None else data
    activations = open_data(path, holdout=run.config.holdout)
    if activations.d != run.sae.d_in:
        raise InputError(f"{path} has rows of width {activations.d}; {run.workdir} was trained on {run.sae.d_in}")
    if data is None and activations.fingerprint != run.resolved.fingerprint:
        raise InputError(f"{path} is no longer the set that {run.workdir} was trained on; give --data")
    activations, _ = survey(activations, run.workdir, drop_non_finite=run.config.drop_non_finite)
    if data is not None and activations.fingerprint != run.resolved.fingerprint:
        activations = activations.with_holdout(activations.rows)  # none of another set was trained on
    if not activations.holdout_rows:
        raise InputError(f"{path} holds out no rows; train with --holdout above 0, or give --data")
    return activations


def evaluate_rows(
    run: Run, activations: ActivationSet, config: EvaluateConfig
) -> tuple[dict[str, Any], dict[str, Any]]:
    """The contents of ``evaluation.json`` (but for the spliced loss) and of ``concepts.json``."""
    model, stats = run.state.model, run.state.stats
    first, last = activations.train_rows, activations.rows
    reconstruction, sparsity, losses, active = None, None, 0.0, []
    with _bar(last - first, "evaluate", " rows") as bar:
        for begin in range(first, last, config.batch_size):
            x = activations.read(begin, min(begin + config.batch_size, last))
            loss, *sums, counts = _batch_sums(run.sae, model, stats, x)
            of_rows, of_concepts = on_host(sums[0]), on_host(sums[1])
            reconstruction = of_rows if reconstruction is None else reconstruction.merge(of_rows)
            sparsity = of_concepts if sparsity is None else sparsity.merge(of_concepts)
            losses += float(loss) * len(x)
            active.append(np.asarray(counts))
            bar.update(len(x))
    assert reconstruction is not None and sparsity is not None  # there are held-out rows
    evaluation: dict[str, Any] = {
        "preset": run.config.preset,
        "step": run.step,
        "steps": run.config.steps,
        "rows": last - first,
        "loss": losses / (last - first),
        **sparsity.compute(),
        **reconstruction.compute(),
    }
    undefined = [n for n, value in evaluation.items() if isinstance(value, float) and not np.isfinite(value)]
    if undefined:
        raise InputError(
            f"{', '.join(undefined)} cannot be computed on the {last - first} held-out rows of "
            f"{activations.path}: they are constant or not finite; give other --data"
        )
    return evaluation, _describe(run, activations, config, np.concatenate(active), sparsity)


@functools.partial(jax.jit, static_argnums=0)
def _batch_sums(
    config: SAEConfig, model: SparseAutoencoder, stats: SAEStats, x: jax.Array
) -> tuple[jax.Array, ReconstructionSums, SparsitySums, jax.Array]:
    loss, (output, _) = sae_loss(model, stats, x, config.l1_warmup_steps, training=False)
    active = jnp.sum(output.activations != 0, axis=-1)
    return (
        loss,
        ReconstructionSums.of_batch(x, output.x_hat),
        SparsitySums.of_batch(output.activations),
        active,
    )


def _describe(
    run: Run, activations: ActivationSet, config: EvaluateConfig, active: np.ndarray, sparsity: SparsitySums
) -> dict[str, Any]:
    """``concepts.json``: histograms of held-out rows, and contexts from the last rows of the set."""
    model, stats = run.state.model, run.state.stats
    first, last = activations.train_rows, activations.rows
    item = activations.tokens_per_item or 1
    start = max(0, last - config.concept_rows)
    start += -start % item
    with _bar(last - start, "concepts", " rows") as bar:
        firing = concepts.find_peaks(
            model, stats, activations, start, last, batch_size=config.batch_size, progress=bar.update
        )
    few, many = concepts.extreme_inputs(active, concepts.item_size(activations, first, last), count=4)
    return {
        "rows": last - first,
        "context_rows": last - start,
        "n_concepts": run.sae.n_concepts,
        "active_histogram": concepts.active_histogram(active),
        "frequency_histogram": concepts.frequency_histogram(sparsity.firing, last - first),
        "few": concepts.describe_inputs(model, stats, activations, first + few),
        "many": concepts.describe_inputs(model, stats, activations, first + many),
        "concepts": concepts.describe_concepts(model, stats, activations, firing, last - start),
    }


def _spliced(run: Run, activations: ActivationSet, config: EvaluateConfig) -> dict[str, float]:
    """Cross-entropy of the source model with the reconstruction spliced in, on held-out sequences."""
    from jax_sae.backbones.llama import load_llama
    from jax_sae.evaluation.spliced import evaluate_spliced

    from .assets import ensure_model

    where, source = activations.provenance, activations.source
    assert where is not None
    tokens = where.tokens[activations.train_rows // where.tokens_per_item :][: config.sequences]
    backbone = load_llama(ensure_model(source["model"]))
    reconstruct = jax.tree_util.Partial(_reconstruct, run.state.model, run.state.stats)
    with _bar(len(tokens), "spliced loss", " sequences") as bar:
        metrics = evaluate_spliced(
            backbone,
            source["layer"],
            np.asarray(tokens),
            reconstruct,
            _mean(activations, run),
            where.first_position,
            progress=bar.update,
        )
    return metrics


def _reconstruct(model: SparseAutoencoder, stats: SAEStats, x: jax.Array) -> jax.Array:
    return model(x, stats).x_hat


def _mean(activations: ActivationSet, run: Run) -> np.ndarray:
    """[d] mean of the training rows, for the mean ablation."""
    if activations.statistics is not None:
        return activations.statistics.mean
    return survey(activations, run.workdir, drop_non_finite=run.config.drop_non_finite)[1].mean


_COLUMNS = {
    "preset": "preset",
    "step": "step",
    "active": "active",
    "l0": "L0",
    "fvu": "FVU",
    "fvu_pooled": "FVU pooled",
    "cs": "CS",
    "dead_fraction": "dead",
    "loss": "loss",
    "ce_clean": "CE clean",
    "ce_sae": "CE SAE",
    "ce_mean_ablated": "CE mean-abl.",
    "ce_zero_ablated": "CE zero-abl.",
    "ce_degradation": "CE degr.",
    "loss_recovered": "recovered",
}


def table(names: list[str], results: list[dict[str, Any]]) -> str:
    """The runs as rows of aligned columns; numbers that no run has make no column."""
    columns = {key: title for key, title in _COLUMNS.items() if any(key in result for result in results)}
    lines = [["run", *columns.values()]]
    lines += [[name, *(_cell(r.get(key)) for key in columns)] for name, r in zip(names, results, strict=True)]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join("  ".join(cell.ljust(w) for cell, w in zip(line, widths, strict=True)).rstrip() for line in lines)


def _cell(value: Any) -> str:
    if value is None:
        return "-"
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _bar(total: int, what: str, unit: str) -> tqdm:
    return tqdm(total=total, desc=what, unit=unit, unit_scale=True, disable=None)


if __name__ == "__main__":
    cli.run(evaluate, prog=f"python -m {__package__}.evaluate")
