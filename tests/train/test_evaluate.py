"""The evaluate command: its numbers, its table, its files, and what it refuses."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jax_sae import InputError, sae_loss
from jax_sae.backbones import llama
from jax_sae.evaluation import spliced
from tests.train.application import make_rows
from tests.train.test_extract import write_model
from train import evaluate
from train.cli import run as run_command
from train.config import TrainConfig
from train.evaluate import EvaluateConfig
from train.extract import ExtractConfig, extract
from train.held_out import batch_bounds, measure
from train.loop import train
from train.run import load_run

PRESETS = ["relu", "topk", "batch_topk", "sparsemax", "mlp_sparsemax", "attention_relu"]


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
    assert [line.split()[1] for line in lines[1:7]] == PRESETS
    for line, result in zip(lines[1:7], evaluated, strict=True):
        assert {f"{result[name]:.4g}" for name in ("fvu", "nmse", "cknna", "do")} <= set(line.split())
    assert lines[7:] == ["", "MS is left out: the set has no items of several tokens (tokens_per_item)"]


def test_tables_of_language_models_and_of_what_some_runs_lack():
    results = [
        {"preset": "relu", "fvu": 0.12345, "ce_sae": 3.5, "ms_left_out": "one"},
        {"preset": "topk", "fvu": 0.2, "cknna": 0.5, "ms_left_out": "two"},
    ]
    lines = [line.split() for line in evaluate.table(["a", "b"], results).splitlines()]
    assert lines[:3] == [["run", "preset", "FVU", "CKNNA"], ["a", "relu", "0.1235", "-"], ["b", "topk", "0.2", "0.5"]]
    assert lines[4:7] == [["run", "CE", "SAE"], ["a", "3.5"], ["b", "-"]]
    assert [" ".join(line) for line in lines[8:]] == ["MS is left out for a: one", "MS is left out for b: two"]


def test_the_table_of_long_numbers_is_not_wider_than_160_characters():
    numbers = dict.fromkeys(("l0", "fvu", "fvu_pooled", "nmse", "cs", "cknna", "ms_mean", "ms_max"), 0.012345)
    result = numbers | {"preset": "matryoshka_batch_topk", "step": 100_000, "active": 123.456, "do": 1.2345e-5}
    lines = evaluate.table(["runs/some-name"], [result | {"dead_fraction": 0.012345, "loss": 123.456}]).splitlines()
    assert max(map(len, lines)) <= 160


def cknna(a, b, neighbors=10):
    """The definition, of dense float64 kernels."""
    kernels, masks = [a @ a.T, b @ b.T], []
    for kernel in kernels:
        kernel = np.where(np.eye(len(kernel), dtype=bool), -np.inf, kernel)
        nearest = np.argsort(-kernel, axis=1, kind="stable")[:, :neighbors]
        masks.append(np.zeros_like(kernel))
        np.put_along_axis(masks[-1], nearest, 1.0, axis=1)
    both = masks[0] * masks[1]
    own = [hsic(kernel * mask, kernel * mask) for kernel, mask in zip(kernels, masks, strict=True)]
    return hsic(both * kernels[0], both * kernels[1]) / (np.sqrt(own[0] * own[1]) + 1e-6)


def hsic(k, other):
    n = len(k)
    k, other = (matrix * (1 - np.eye(n)) for matrix in (k, other))
    cross = (k @ other).sum()
    return ((k * other.T).sum() + k.sum() * other.sum() / ((n - 1) * (n - 2)) - 2 * cross / (n - 2)) / (n * (n - 3))


def overlap(decoder):
    gram = decoder @ decoder.T
    return ((gram**2).sum() - (np.diag(gram) ** 2).sum()) / len(decoder) ** 2


def monosemanticity(activations, embeddings):
    """MS of every concept that has one, by pairs."""
    unit = embeddings / np.linalg.norm(embeddings, axis=1, keepdims=True)
    scores, pairs = [], np.triu_indices(len(unit), 1)
    for a in activations.T:
        a = a - a.min()
        weights = np.outer(a, a)[pairs]
        if (a > 0).sum() >= 2:
            scores.append((weights * (unit @ unit.T)[pairs]).sum() / weights.sum())
    return np.array(scores)


@pytest.mark.parametrize("which", range(len(PRESETS)), ids=PRESETS)
def test_numbers_equal_float64_numpy_on_the_held_out_rows(workdirs, evaluated, rows_file, which):
    result, run = evaluated[which], load_run(workdirs[which])
    assert json.loads((workdirs[which] / "evaluation.json").read_text()) == result
    held_out = np.load(rows_file)[1140:]
    out = run.state.model(jnp.asarray(held_out), run.state.stats)
    x, x_hat, a = (np.asarray(rows, np.float64) for rows in (held_out, out.x_hat, out.activations))
    decoder = np.asarray(run.state.model.decoder(), np.float64)
    std = x.std(-1, ddof=1, keepdims=True) + 1e-5
    expected = {
        "l0": (a == 0).mean(),
        "active": (a != 0).sum(-1).mean(),
        "fvu": ((x - x_hat).var(-1, ddof=1) / x.var(-1, ddof=1)).mean(),
        "fvu_pooled": ((x - x_hat) ** 2).sum() / ((x - x.mean(0)) ** 2).sum(),
        "cs": ((x * x_hat).sum(-1) / np.linalg.norm(x, axis=-1) / np.linalg.norm(x_hat, axis=-1)).mean(),
        "dead_fraction": (a == 0).all(0).mean(),
        "loss": float(sae_loss(run.state.model, run.state.stats, held_out, 10**6, training=False)[0]),
        "rows": 60,
        "nmse": (((x - x_hat) / std) ** 2).mean(),
        "ndn": (a == 0).all(0).sum(),
        "do": overlap(decoder / np.linalg.norm(decoder, axis=1, keepdims=True)),
        "do_raw": overlap(decoder),
        "cknna": cknna(x, a),
        "cknna_rows": 60,
    }
    assert {name: result[name] for name in expected} == pytest.approx(expected, rel=2e-5)
    assert isinstance(result["ndn"], int) and "ms_mean" not in result
    assert result["ms_left_out"] == "the set has no items of several tokens (tokens_per_item)"


def test_cknna_is_the_mean_of_full_batches(workdirs, rows_file):
    (result,) = evaluate.evaluate(EvaluateConfig((workdirs[1],), batch_size=17, cknna_rows=25))
    run = load_run(workdirs[1])
    x = np.load(rows_file)[1140:].astype(np.float64)
    a = np.asarray(run.state.model(jnp.asarray(x, jnp.float32), run.state.stats).activations, np.float64)
    expected = (cknna(x[:25], a[:25]) + cknna(x[25:50], a[25:50])) / 2
    assert (result["cknna"], result["cknna_rows"]) == (pytest.approx(expected, rel=2e-5), 25)


def test_cknna_that_is_left_out_says_why(workdirs, tmp_path):
    (result,) = evaluate.evaluate(EvaluateConfig((workdirs[0],), cknna_rows=0))
    assert "cknna" not in result and result["cknna_left_out"] == "switched off by --cknna-rows 0"
    assert "left out: switched off by --cknna-rows 0<" in (workdirs[0] / "report.html").read_text()
    np.save(tmp_path / "few.npy", make_rows(rows=10, seed=5))
    (result,) = evaluate.evaluate(EvaluateConfig((workdirs[0],), data=tmp_path / "few.npy"))
    assert result["cknna_left_out"] == "there are 10 held-out rows, at least 11 are needed"


@pytest.fixture(scope="module")
def run_on_items(tmp_path_factory):
    """A run on 171 items of 7 tokens, whose 60 held-out rows begin inside an item."""
    folder = tmp_path_factory.mktemp("items")
    np.save(folder / "rows.npy", make_rows(rows=1197).reshape(171, 7, 16))
    return train(
        TrainConfig(
            data=folder / "rows.npy",
            workdir=folder / "run",
            preset="sparsemax",
            steps=20,
            batch_size=32,
            n_concepts=64,
            checkpoint_every=20,
            log_every=10,
            parallel="jit",
            warmup_steps=3,
        )
    )


def test_monosemanticity_of_whole_items_equals_float64_pairs(run_on_items, monkeypatch):
    monkeypatch.setattr("train.held_out.ITEMS_PER_BLOCK", 3)
    (result,) = evaluate.evaluate(EvaluateConfig((run_on_items,), batch_size=16))
    run, x = load_run(run_on_items), make_rows(rows=1197)
    a = np.asarray(run.state.model(jnp.asarray(x[1141:]), run.state.stats).activations, np.float64)
    mean = x[:1137].astype(np.float64).mean(0)
    scores = monosemanticity(a.reshape(8, 7, 64).mean(1), (x[1141:].reshape(8, 7, 16) - mean).mean(1))
    assert result["rows"] == 60 and result["ms_items"] == 8 and result["ms_concepts"] == len(scores)
    assert result["ms_mean"] == pytest.approx(scores.mean(), abs=1e-5)
    assert result["ms_max"] == pytest.approx(scores.max(), abs=1e-5)


def test_a_dictionary_that_never_fires_has_no_monosemanticity(run_on_items):
    run = load_run(run_on_items)
    silent = jax.tree.map(jnp.zeros_like, run.state.model)
    activations, mean = evaluate.held_out_set(run, None)
    silent_run = dataclasses.replace(run, state=dataclasses.replace(run.state, model=silent))
    numbers = measure(silent_run, activations, mean, batch_size=16, cknna_rows=0, progress=int).numbers
    assert numbers["ndn"] == 64 and numbers["ms_concepts"] == 0 and "ms_mean" not in numbers
    assert numbers["ms_left_out"] == "no concept fires on two of the 8 held-out items or more"


@pytest.mark.parametrize(("first", "last", "item", "size"), [(3, 21, 4, 9), (0, 12, 4, 3), (5, 7, 8, 4), (2, 9, 1, 3)])
def test_batches_cover_every_row_once_and_split_no_item(first, last, item, size):
    bounds = list(batch_bounds(first, last, item, size))
    assert [row for begin, end in bounds for row in range(begin, end)] == list(range(first, last))
    assert all(end - begin <= max(size, item) for begin, end in bounds)
    for begin, end in bounds:
        whole = begin % item == 0 and end % item == 0
        assert whole or (end - begin < item and begin // item == (end - 1) // item)


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
    with refused("--cknna-rows is 10; expected at least 11, or 0 for none"):
        evaluate.evaluate(EvaluateConfig((workdirs[0],), cknna_rows=10))


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


@pytest.mark.slow
def test_runs_on_one_language_model_share_what_no_autoencoder_changes(tmp_path, monkeypatch):
    model, rng = write_model(tmp_path / "model"), np.random.default_rng(0)
    texts = [" ".join(f"w{i}" for i in rng.integers(0, 61, 40)) for _ in range(20)]
    (tmp_path / "texts.jsonl").write_text("\n".join(json.dumps({"text": text}) for text in texts))
    settings = dict(tokens=27 * 12, sequence_length=12, batch_size=4, dtype="float32", holdout=0.2)
    inputs = (str(tmp_path / "texts.jsonl"),)
    data = extract(ExtractConfig(model=str(model), layer=2, inputs=inputs, out=tmp_path / "set", **settings))
    base = TrainConfig(data=data, steps=10, batch_size=32, n_concepts=48, checkpoint_every=10, log_every=5)
    runs = [
        train(dataclasses.replace(base, preset=name, workdir=tmp_path / name, parallel="jit", warmup_steps=3))
        for name in ("topk", "relu")
    ]
    alone = [evaluate.evaluate(EvaluateConfig((run,)))[0] for run in runs]
    loaded, computed = [], []
    load, baselines = llama.load_llama, spliced.evaluate_baselines
    monkeypatch.setattr(llama, "load_llama", lambda *args: loaded.append(args) or load(*args))
    monkeypatch.setattr(
        spliced, "evaluate_baselines", lambda *args, **more: computed.append(args) or baselines(*args, **more)
    )
    together = evaluate.evaluate(EvaluateConfig(tuple(runs)))
    assert (len(loaded), len(computed)) == (1, 1)
    assert together == alone
    assert together[0]["ce_sae"] != together[1]["ce_sae"] and together[0]["ms_items"] == 5
