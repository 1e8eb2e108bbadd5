"""Training from the command line: what it writes, that it resumes bit for bit, and that it stops well."""

import dataclasses
import random
import signal
import subprocess
import time
from pathlib import Path

import jax
import numpy as np
import pytest

from jax_sae import InputError
from tests.train.application import FLAGS, call, command, environment, make_rows, records
from train.checkpoint import Checkpoints
from train.cli import RunFailed
from train.config import TrainConfig
from train.loop import train
from train.run import load_run

SMALL = TrainConfig(
    steps=40, batch_size=32, n_concepts=64, checkpoint_every=10, log_every=5, warmup_steps=5, parallel="jit"
)


def config(rows_file, workdir, **changes):
    return dataclasses.replace(SMALL, data=rows_file, workdir=workdir, **changes)


def leaves(workdir):
    return [np.asarray(leaf) for leaf in jax.tree.leaves(load_run(workdir).state)]


def assert_identical(a, b):
    for x, y in zip(leaves(a), leaves(b), strict=True):
        np.testing.assert_array_equal(x, y)


@pytest.fixture(scope="module")
def whole_run(rows_file, tmp_path_factory):
    """An uninterrupted run."""
    return train(config(rows_file, tmp_path_factory.mktemp("runs") / "whole"))


def test_a_run_writes_its_configuration_logs_and_checkpoints(whole_run):
    names = {path.name for path in whole_run.iterdir()}
    assert {"config.json", "metrics.jsonl", "tensorboard", "checkpoints", "survey.json"} <= names
    lines = records(whole_run)
    logged = [line for line in lines if "loss" in line]
    assert [line["step"] for line in logged] == list(range(5, 41, 5))
    for line in logged:
        assert line["rows"] == line["step"] * 32
        assert {"l0", "active", "fvu", "dead_fraction", "learning_rate", "rows_per_second"} <= line.keys()
        assert 0 <= line["input_wait_fraction"] <= 1
    validated = [line for line in lines if "val_fvu" in line]
    assert [line["step"] for line in validated] == [10, 20, 30, 40]
    assert list((whole_run / "tensorboard").glob("events.*"))


def test_the_latest_two_and_the_best_checkpoint_are_kept(whole_run):
    checkpoints = Checkpoints(whole_run / "checkpoints")
    validated = {line["step"]: line["val_fvu"] for line in records(whole_run) if "val_fvu" in line}
    assert checkpoints.step("latest") == 40
    assert checkpoints.step("best") == min(validated, key=validated.get)
    checkpoints.close()


def test_the_mean_of_the_data_is_in_the_checkpoint(whole_run, rows_file):
    rows = np.load(rows_file)
    trained_on = rows[: len(rows) - round(0.05 * len(rows))].astype(np.float64)
    np.testing.assert_allclose(load_run(whole_run).state.stats.mean, trained_on.mean(0), atol=1e-6)


def test_running_a_finished_run_again_does_nothing(whole_run, rows_file):
    before = (whole_run / "metrics.jsonl").read_bytes()
    train(config(rows_file, whole_run))
    assert (whole_run / "metrics.jsonl").read_bytes() == before


class Killed(BaseException):
    """Stands for a death of the process at any point of the loop."""


@pytest.mark.parametrize("dies_at", [3, 10, 27])
def test_a_run_that_died_and_resumed_ends_bit_for_bit_the_same(whole_run, rows_file, tmp_path, monkeypatch, dies_at):
    from train import loop

    advance = loop.RunLog.advance

    def die(log, steps):
        advance(log, steps)
        log.died_at = getattr(log, "died_at", 0) + steps
        if log.died_at == dies_at:
            raise Killed

    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(loop.RunLog, "advance", die)
        train(config(rows_file, tmp_path))
    train(config(rows_file, tmp_path))
    assert_identical(tmp_path, whole_run)
    steps = [line["step"] for line in records(tmp_path) if "loss" in line]
    assert steps == list(range(5, 41, 5)), "no record twice, none missing"
    losses = lambda workdir: [line["loss"] for line in records(workdir) if "loss" in line]
    assert losses(tmp_path) == losses(whole_run)


@pytest.mark.slow
def test_sigkill_at_random_moments_changes_nothing(rows_file, tmp_path):
    flags = [*FLAGS, "--data", rows_file, "--steps", "400", "--checkpoint-every", "20"]
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    begun = time.monotonic()
    finished = call("train", *flags, "--workdir", whole)
    assert finished.returncode == 0, finished.stderr
    longest = time.monotonic() - begun
    moments = random.Random(0)
    for _ in range(3):
        process = subprocess.Popen(
            command("train", *flags, "--workdir", killed), env=environment(), stdout=subprocess.DEVNULL
        )
        time.sleep(moments.uniform(0.3, 0.9) * longest)
        process.send_signal(signal.SIGKILL)
        process.wait()
    finished = call("train", *flags, "--workdir", killed)
    assert finished.returncode == 0, finished.stderr
    assert_identical(whole, killed)


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_saves_says_so_and_exits_cleanly(rows_file, tmp_path, number):
    flags = [
        *FLAGS,
        "--data",
        rows_file,
        "--steps",
        "100000",
        "--checkpoint-every",
        "50000",
        "--workdir",
        tmp_path,
    ]
    process = subprocess.Popen(
        command("train", *flags), env=environment(), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    while not ((tmp_path / "metrics.jsonl").exists() and (tmp_path / "metrics.jsonl").read_text().count("\n") > 3):
        assert process.poll() is None, process.stderr.read()
        time.sleep(0.05)
    process.send_signal(number)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 0 and "Traceback" not in err
    assert f"stopped by {number.name} at step" in out and "run the same command again" in out
    step = int(out.split("at step ")[1].split()[0])
    assert load_run(tmp_path).step == step


def test_a_workdir_of_another_run_is_refused_naming_the_fields(whole_run, rows_file):
    with pytest.raises(InputError, match=r"another configuration \(n_concepts: 64 -> 128; sae.n_concepts: 64 -> 128\)"):
        train(config(rows_file, whole_run, n_concepts=128))


def test_other_data_under_the_same_flags_is_refused(whole_run, tmp_path):
    np.save(tmp_path / "rows.npy", make_rows(seed=1))
    with pytest.raises(InputError, match="fingerprint"):
        train(config(tmp_path / "rows.npy", whole_run))


def test_a_loss_that_is_not_finite_stops_the_run_and_keeps_the_last_checkpoint(rows_file, tmp_path):
    wild = config(rows_file, tmp_path, preset="relu", learning_rate=1e30, warmup_steps=1)
    with pytest.raises(RunFailed, match=r"the loss is not finite at steps? \d+.*(kept|no checkpoint)"):
        train(wild)
    checkpoints = Checkpoints(tmp_path / "checkpoints")
    if checkpoints.step() is not None:
        assert all(np.isfinite(leaf).all() for leaf in leaves(tmp_path))
    checkpoints.close()


@pytest.mark.parametrize("parallel", ["pmap", "mesh"])
def test_spread_over_eight_devices_it_trains_the_same(whole_run, rows_file, tmp_path, parallel):
    mesh = (2, 4) if parallel == "mesh" else None
    train(config(rows_file, tmp_path, parallel=parallel, mesh=mesh))
    losses = [[line["loss"] for line in records(w) if "loss" in line] for w in (tmp_path, whole_run)]
    np.testing.assert_allclose(*losses, rtol=1e-3)


def test_a_run_may_resume_on_another_number_of_devices(whole_run, rows_file, tmp_path, monkeypatch):
    from train import loop

    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(loop._Loop, "_validate", die_after(loop._Loop._validate, calls=2))
        train(config(rows_file, tmp_path, parallel="pmap"))
    train(config(rows_file, tmp_path, parallel="mesh", mesh=(4, 2)))
    assert load_run(tmp_path).step == 40
    for a, b in zip(leaves(tmp_path), leaves(whole_run), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-2, atol=1e-3)


def die_after(method, calls):
    count = iter(range(calls))

    def wrapped(self, *arguments):
        if next(count, None) is None:
            raise Killed
        return method(self, *arguments)

    return wrapped


def test_several_steps_per_dispatch_train_the_same(whole_run, rows_file, tmp_path):
    train(config(rows_file, tmp_path, steps_per_call=5))
    losses = [[line["loss"] for line in records(w) if "loss" in line] for w in (tmp_path, whole_run)]
    np.testing.assert_allclose(*losses, rtol=1e-3)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(batch_size=4096), r"--batch-size is 4096 but .* has 1140 training rows"),
        (dict(steps=0), "--steps is 0; expected at least 1"),
        (dict(learning_rate=-1.0), "--learning-rate is -1.0"),
        (dict(data_seed=-1), "--data-seed is -1; expected at least 0"),
        (dict(steps_per_call=3), "--steps is 40; expected a multiple of --steps-per-call 3"),
        (dict(mesh=(2, 4)), "--parallel mesh and --mesh"),
        (dict(parallel="mesh", mesh=(3, 2)), "expected two numbers with product 8"),
        (dict(parallel="mesh", mesh=(1, 8), n_concepts=60), "--n-concepts is 60; expected a multiple of 8"),
        (dict(parallel="pmap", batch_size=30), "--batch-size is 30; expected a multiple of 8"),
        (dict(n_concepts=0), "n_concepts is 0"),
        (dict(preset="topk", n_concepts=16, sae=None), "k is 32 with 16 concepts"),
    ],
)
def test_flags_that_do_not_fit_are_named(rows_file, tmp_path, changes, message):
    from train.config import Overrides

    if "sae" in changes:
        changes = changes | dict(sae=Overrides(k=32))
    with pytest.raises(InputError, match=message):
        train(config(rows_file, tmp_path / "run", **changes))
    assert not (tmp_path / "run").exists()


def test_rows_with_nan_are_refused_or_dropped_when_asked(tmp_path):
    rows = make_rows()
    rows[[3, 1190]] = np.nan
    np.save(tmp_path / "rows.npy", rows)
    with pytest.raises(InputError, match=r"2 rows with NaN or inf \(the first is row 3\).*--drop-non-finite"):
        train(config(tmp_path / "rows.npy", tmp_path / "run"))
    workdir = train(config(tmp_path / "rows.npy", tmp_path / "run", drop_non_finite=True))
    assert load_run(workdir).step == 40


def test_a_workdir_that_is_not_writable_is_named(rows_file, tmp_path, monkeypatch):
    def refuse(path, *arguments, **keywords):
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(Path, "touch", refuse)
    with pytest.raises(InputError, match=r"cannot write to the folder .*run \(Permission denied\)"):
        train(config(rows_file, tmp_path / "run"))


def test_a_workdir_that_is_a_file_is_named(rows_file, tmp_path):
    (tmp_path / "run").write_text("not a folder")
    with pytest.raises(InputError, match="cannot write to the folder .*run"):
        train(config(rows_file, tmp_path / "run"))


def test_a_full_disk_leaves_the_last_checkpoint_whole(rows_file, tmp_path, monkeypatch):
    from orbax.checkpoint import v1

    save = v1.training.Checkpointer.save_async

    def full(self, step, *arguments, **keywords):
        if step == 20:
            raise OSError(28, "No space left on device")
        return save(self, step, *arguments, **keywords)

    monkeypatch.setattr(v1.training.Checkpointer, "save_async", full)
    with pytest.raises(OSError, match=r"cannot write a checkpoint to .*No space left.*are whole"):
        train(config(rows_file, tmp_path))
    assert load_run(tmp_path).step == 10


def test_the_command_line_prints_one_line_and_exits_with_2(tmp_path):
    missing = call("train", "--data", tmp_path / "nothing", "--workdir", tmp_path / "run")
    assert missing.returncode == 2
    assert missing.stderr.startswith("error: ") and missing.stderr.count("\n") == 1
    assert "nothing" in missing.stderr and not Path(tmp_path / "run").exists()
