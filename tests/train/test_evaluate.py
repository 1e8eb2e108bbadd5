"""The evaluate command: its numbers, its table, its files, and what it refuses."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jax_sae import InputError, sae_loss
from tests.train.application import make_rows
from train import evaluate
from train.cli import run as run_command
from train.config import TrainConfig
from train.evaluate import EvaluateConfig
from train.loop import train
from train.run import load_run

PRESETS = ["relu", "topk", "batch_topk", "sparsemax", "mlp_sparsemax", "attention_relu"]
FLAT = ["loss", "l0", "active", "fvu", "fvu_pooled", "cs", "dead_fraction", "rows"]


@pytest.fixture(scope="module")
def workdirs(rows_file, tmp_path_factory):
    """A short run of each of the six systems."""
    base = TrainConfig(data=rows_file, steps=30, batch_size=32, n_concepts=64, checkpoint_every=15, log_every=10)
    folder = tmp_path_factory.mktemp("runs")
    return [
        train(dataclasses.replace(base, preset=name, workdir=folder / name, parallel="jit", warmup_steps=3))
        for name in PRESETS
    ]


@pytest.fixture(scope="module")
def evaluated(workdirs):
    return evaluate.evaluate(EvaluateConfig(tuple(workdirs), batch_size=17))


def test_one_table_with_a_row_per_run(workdirs, evaluated, capsys):
    run_command(evaluate.evaluate, [*map(str, workdirs), "--batch-size", "17"], prog="evaluate")
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split()[:4] == ["run", "preset", "step", "active"]
    assert [line.split()[1] for line in lines[1:]] == PRESETS
    for line, result in zip(lines[1:], evaluated, strict=True):
        assert f"{result['fvu']:.4g}" in line.split()


@pytest.mark.parametrize("which", range(len(PRESETS)), ids=PRESETS)
def test_numbers_equal_float64_numpy_on_the_held_out_rows(workdirs, evaluated, rows_file, which):
    result, run = evaluated[which], load_run(workdirs[which])
    assert json.loads((workdirs[which] / "evaluation.json").read_text()) == result
    held_out = np.load(rows_file)[1140:]
    out = run.state.model(jnp.asarray(held_out), run.state.stats)
    x, x_hat, a = held_out.astype(np.float64), np.asarray(out.x_hat, np.float64), np.asarray(out.activations)
    expected = {
        "l0": (a == 0).mean(),
        "active": (a != 0).sum(-1).mean(),
        "fvu": ((x - x_hat).var(-1, ddof=1) / x.var(-1, ddof=1)).mean(),
        "fvu_pooled": ((x - x_hat) ** 2).sum() / ((x - x.mean(0)) ** 2).sum(),
        "cs": ((x * x_hat).sum(-1) / np.linalg.norm(x, axis=-1) / np.linalg.norm(x_hat, axis=-1)).mean(),
        "dead_fraction": (a == 0).all(0).mean(),
        "loss": float(sae_loss(run.state.model, run.state.stats, held_out, 10**6, training=False)[0]),
        "rows": 60,
    }
    assert {name: result[name] for name in FLAT} == pytest.approx(expected, rel=2e-5)


def test_it_writes_a_report_and_changes_no_checkpoint(workdirs, evaluated):
    before = jax.device_get(load_run(workdirs[3]).state)
    evaluate.evaluate(EvaluateConfig((workdirs[3],)))
    after = jax.device_get(load_run(workdirs[3]).state)
    assert jax.tree.all(jax.tree.map(lambda a, b: bool((a == b).all()), before, after))
    assert "<html" in (workdirs[3] / "report.html").read_text()[:200]
    concepts = json.loads((workdirs[3] / "concepts.json").read_text())
    assert concepts["rows"] == 60 == sum(concepts["active_histogram"]["counts"])


def test_the_best_checkpoint_on_request(workdirs):
    lines = [json.loads(line) for line in (workdirs[0] / "metrics.jsonl").read_text().splitlines()]
    validated = {line["step"]: line["val_fvu"] for line in lines if "val_fvu" in line}
    (result,) = evaluate.evaluate(EvaluateConfig((workdirs[0],), checkpoint="best"))
    assert result["step"] == min(validated, key=validated.get)


def test_another_set_is_evaluated_whole(workdirs, tmp_path):
    np.save(tmp_path / "other.npy", make_rows(rows=200, seed=5))
    (result,) = evaluate.evaluate(EvaluateConfig((workdirs[0],), data=tmp_path / "other.npy"))
    assert result["rows"] == 200


def test_what_is_not_a_run_is_named(tmp_path, workdirs, rows_file):
    refused = lambda message, **changes: pytest.raises(InputError, match=message)
    with refused("no workdir is given"):
        evaluate.evaluate(EvaluateConfig(()))
    with refused(r"holds no run \(no config.json\)"):
        evaluate.evaluate(EvaluateConfig((tmp_path,)))
    (tmp_path / "config.json").write_bytes((workdirs[0] / "config.json").read_bytes())
    with refused("has no checkpoint yet"):
        evaluate.evaluate(EvaluateConfig((tmp_path,)))
    (tmp_path / "config.json").write_text("{}")
    with refused("is not the configuration of a run"):
        evaluate.evaluate(EvaluateConfig((tmp_path,)))
    np.save(tmp_path / "wide.npy", make_rows(d=20))
    with refused("has rows of width 20; .* was trained on 16"):
        evaluate.evaluate(EvaluateConfig((workdirs[0],), data=tmp_path / "wide.npy"))
    with refused("--batch-size is 0"):
        evaluate.evaluate(EvaluateConfig((workdirs[0],), batch_size=0))


def test_a_set_that_changed_since_training_and_one_that_holds_nothing_out_are_named(tmp_path):
    np.save(tmp_path / "rows.npy", make_rows())
    base = TrainConfig(
        data=tmp_path / "rows.npy",
        steps=2,
        batch_size=32,
        n_concepts=16,
        checkpoint_every=2,
        log_every=1,
        parallel="jit",
    )
    workdir = train(dataclasses.replace(base, workdir=tmp_path / "run", holdout=0.0))
    with pytest.raises(InputError, match="holds out no rows; train with --holdout above 0, or give --data"):
        evaluate.evaluate(EvaluateConfig((workdir,)))
    np.save(tmp_path / "rows.npy", make_rows(seed=3))
    with pytest.raises(InputError, match="no longer the set that .* was trained on"):
        evaluate.evaluate(EvaluateConfig((workdir,)))
