"""Writing a set: refusals, rows that are not finite, interruption and resumption, a full disk."""

import errno
import json
import os
import re
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest

from jax_sae.data import ActivationWriter, open_activations
from jax_sae.errors import InputError

ROWS = np.random.default_rng(0).normal(size=(50, 3)).astype(np.float32)
SETTINGS = dict(d=3, shard_rows=8, tokens_per_item=5, source={"model": "tiny", "layer": 2})


def contents(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in folder.iterdir()}


def write(folder: Path, rows: np.ndarray = ROWS, chunk: int = 7, **settings) -> Path:
    """Writes ``rows`` in chunks, from where the writer says it is."""
    with ActivationWriter(folder, **SETTINGS | settings) as writer:
        for start in range(writer.received, len(rows), chunk):
            writer.append(rows[start : start + chunk])
        return writer.close(holdout_rows=10)


def test_the_folder_of_a_set_holds_its_shards_and_the_json(tmp_path):
    folder = write(tmp_path / "new" / "set")
    names = {f"shard-{i:05d}.npy" for i in range(7)} | {"activations.json"}
    assert set(contents(folder)) == names
    written = json.loads((folder / "activations.json").read_text())
    assert [shard["rows"] for shard in written["shards"]] == [8, 8, 8, 8, 8, 8, 2]
    assert (written["version"], written["rows"], written["holdout_rows"], written["dropped_rows"]) == (1, 50, 10, 0)
    assert written["source"] == {"model": "tiny", "layer": 2}
    np.testing.assert_array_equal(np.load(folder / "shard-00001.npy"), ROWS[8:16])


@pytest.mark.parametrize("chunk", [1, 8, 20, 50])
def test_the_chunks_of_appending_leave_no_trace(tmp_path, chunk):
    assert contents(write(tmp_path / "a")) == contents(write(tmp_path / "b", chunk=chunk))


def test_the_caller_may_reuse_its_array(tmp_path):
    held = np.empty((5, 3), np.float32)
    with ActivationWriter(tmp_path / "b", **SETTINGS) as writer:
        for start in range(0, 50, 5):
            held[:] = ROWS[start : start + 5]
            writer.append(held)
        writer.close(holdout_rows=10)
    assert contents(write(tmp_path / "a")) == contents(tmp_path / "b")


# Interruption


@pytest.mark.parametrize("appended", [0, 5, 8, 21, 50])
def test_a_resumed_writer_leaves_the_same_bytes(tmp_path, appended):
    whole = contents(write(tmp_path / "whole"))
    with ActivationWriter(tmp_path / "resumed", **SETTINGS) as writer:
        for start in range(0, appended, 3):
            writer.append(ROWS[start : min(start + 3, appended)])
    with pytest.raises(InputError, match="is an unfinished activation set|holds no activations.json"):
        open_activations(tmp_path / "resumed")
    again = ActivationWriter(tmp_path / "resumed", **SETTINGS)
    assert again.rows == again.received == appended // 8 * 8
    assert contents(write(tmp_path / "resumed")) == whole


@pytest.mark.parametrize("bad", [[1], [9], [7, 8, 9], [20, 49], list(range(6, 19)), list(range(40, 50))])
@pytest.mark.parametrize("appended", [10, 21, 50])
def test_dropped_rows_do_not_shift_where_a_writer_goes_on(tmp_path, bad, appended):
    rows = ROWS.copy()
    rows[bad, 1] = np.nan
    whole = contents(write(tmp_path / "whole", rows, drop_non_finite=True))
    with ActivationWriter(tmp_path / "resumed", **SETTINGS, drop_non_finite=True) as writer:
        writer.append(rows[:appended])
    assert contents(write(tmp_path / "resumed", rows, drop_non_finite=True)) == whole
    np.testing.assert_array_equal(
        open_activations(tmp_path / "resumed").read(0, 50 - len(bad)), np.delete(ROWS, bad, axis=0)
    )
    assert json.loads(whole["activations.json"])["dropped_rows"] == len(bad)


def test_an_interruption_while_a_shard_is_written_loses_that_shard_only(tmp_path, monkeypatch):
    replace, calls = os.replace, []

    def interrupt(source, target):
        calls.append(target)
        if len(calls) == 5:  # shard, journal, shard, journal, shard
            raise KeyboardInterrupt
        replace(source, target)

    whole = contents(write(tmp_path / "whole"))
    monkeypatch.setattr(os, "replace", interrupt)
    with pytest.raises(KeyboardInterrupt):
        write(tmp_path / "resumed")
    monkeypatch.undo()
    assert ActivationWriter(tmp_path / "resumed", **SETTINGS).rows == 16
    assert contents(write(tmp_path / "resumed")) == whole


# The disk


@pytest.mark.parametrize(
    ("syncs", "failing"),
    [(0, "shard-00000.npy"), (7, "partial.json"), (12, "shard-00006.npy"), (14, "activations.json")],
)
def test_a_full_disk_publishes_nothing_and_the_set_can_be_completed(tmp_path, monkeypatch, syncs, failing):
    whole = contents(write(tmp_path / "whole"))
    fill_the_disk_after(syncs, monkeypatch)
    message = rf"cannot write \S+{failing} \(the disk is full\); what was written before is whole, run again"
    with pytest.raises(OSError, match=message) as caught:
        write(tmp_path / "set")
    assert caught.value.errno == errno.ENOSPC and "\n" not in str(caught.value)
    assert not (tmp_path / "set" / "activations.json").exists() and not list((tmp_path / "set").glob(".*"))
    with pytest.raises(InputError):
        open_activations(tmp_path / "set")
    monkeypatch.undo()
    assert contents(write(tmp_path / "set")) == whole


@pytest.mark.parametrize("syncs", [0, 1, 2, 3])
def test_the_same_writer_can_go_on_once_there_is_room(tmp_path, monkeypatch, syncs):
    whole = contents(write(tmp_path / "whole"))
    with ActivationWriter(tmp_path / "set", **SETTINGS) as writer:
        writer.append(ROWS[:5])
        fill_the_disk_after(syncs, monkeypatch)
        with pytest.raises(OSError, match="the disk is full"):
            writer.append(ROWS[5:30])
        monkeypatch.undo()
        writer.append(ROWS[30:])
        writer.close(holdout_rows=10)
    assert contents(tmp_path / "set") == whole


def fill_the_disk_after(syncs: int, monkeypatch) -> None:
    """Lets a number of files (shards and the journal in turn, then the json) be synced, and none after them."""
    sync, left = os.fsync, iter(range(syncs))

    def full(descriptor):
        if next(left, None) is None:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        sync(descriptor)

    monkeypatch.setattr(os, "fsync", full)


# Refusals


def test_rows_that_are_not_finite_are_refused_with_count_and_first(tmp_path):
    rows = ROWS.copy()
    rows[9, 0], rows[12, 2], rows[13] = np.nan, -np.inf, np.inf
    with ActivationWriter(tmp_path, **SETTINGS) as writer:
        writer.append(rows[:9])
        message = r"^3 rows have NaN or inf as float32 \(the first is row 9\); mend them, use a wider dtype, or pass"
        with pytest.raises(InputError, match=message):
            writer.append(rows[9:])
        assert writer.rows == 9
        writer.append(ROWS[9:])
        writer.close()
    np.testing.assert_array_equal(open_activations(tmp_path).read(0, 50), ROWS)


def test_float16_overflow_is_found_after_the_cast(tmp_path):
    rows = ROWS.copy()
    rows[4, 1] = 7e4
    with pytest.raises(InputError, match=r"^1 rows have NaN or inf as float16 \(the first is row 4\)"):
        write(tmp_path / "half", rows, dtype=np.float16)
    bfloat = open_activations(write(tmp_path / "bfloat", rows, dtype=ml_dtypes.bfloat16))
    assert bfloat.read(4, 5)[0, 1] == ml_dtypes.bfloat16(7e4)


@pytest.mark.parametrize("shape", [(3,), (4, 2), (2, 2, 3)])
def test_rows_of_another_shape_are_refused(tmp_path, shape):
    with pytest.raises(InputError, match=re.escape(f"rows have shape {shape}, expected [n, 3]")):
        ActivationWriter(tmp_path, d=3).append(np.zeros(shape))


@pytest.mark.parametrize("dtype", [np.float64, np.int32, np.uint16])
def test_other_dtypes_are_refused(tmp_path, dtype):
    message = f"^dtype is {np.dtype(dtype)}, expected one of float32, float16, bfloat16$"
    with pytest.raises(InputError, match=message):
        ActivationWriter(tmp_path / "set", d=3, dtype=dtype)
    assert not (tmp_path / "set").exists()


@pytest.mark.parametrize("settings", [dict(d=0), dict(d=3, shard_rows=0)])
def test_sizes_below_one_are_refused(tmp_path, settings):
    with pytest.raises(InputError, match=r"expected at least 1 of each$"):
        ActivationWriter(tmp_path, **settings)


def test_a_finished_folder_is_refused(tmp_path):
    before = contents(write(tmp_path))
    with pytest.raises(InputError, match="holds a finished activation set; choose another folder or remove it$"):
        ActivationWriter(tmp_path, **SETTINGS)
    assert contents(tmp_path) == before


@pytest.mark.parametrize(
    "changed",
    [dict(dtype=np.float16), dict(d=4), dict(shard_rows=9), dict(tokens_per_item=None), dict(source={"layer": 3})],
    ids=lambda changed: next(iter(changed)),
)
def test_the_journal_of_other_settings_is_refused(tmp_path, changed):
    ActivationWriter(tmp_path, **SETTINGS).append(ROWS[:20])
    before = contents(tmp_path)
    with pytest.raises(InputError, match=f"unfinished set with another {next(iter(changed))}; choose another folder"):
        ActivationWriter(tmp_path, **SETTINGS | changed)
    assert contents(tmp_path) == before


@pytest.mark.parametrize("text", ["", "[]", "{", '{"settings": {}}', '{"settings": null}'])
def test_a_damaged_journal_is_refused(tmp_path, text):
    (tmp_path / "activations.partial.json").write_text(text)
    with pytest.raises(InputError, match=r"activations.partial.json is damaged \(.*\); remove the folder and start"):
        ActivationWriter(tmp_path, **SETTINGS)


def test_a_journal_whose_shard_is_gone_is_refused(tmp_path):
    ActivationWriter(tmp_path, **SETTINGS).append(ROWS[:20])
    (tmp_path / "shard-00001.npy").unlink()
    with pytest.raises(InputError, match="shard-00001.npy is missing or not whole; remove the folder and start again$"):
        ActivationWriter(tmp_path, **SETTINGS)


@pytest.mark.parametrize(("rows", "holdout"), [(0, 0), (5, 5), (5, 6), (5, -1)])
def test_a_set_without_rows_to_train_on_is_refused(tmp_path, rows, holdout):
    with ActivationWriter(tmp_path, **SETTINGS) as writer:
        writer.append(ROWS[:rows])
        with pytest.raises(
            InputError, match=f"^{holdout} of {rows} rows are held out; expected some rows to train on$"
        ):
            writer.close(holdout_rows=holdout)
    assert contents(tmp_path) == {}


def test_provenance_needs_every_row_and_the_rows_per_item(tmp_path):
    rows = ROWS.copy()
    rows[3] = np.nan
    with ActivationWriter(tmp_path / "a", **SETTINGS, drop_non_finite=True) as writer:
        writer.append(rows)
        with pytest.raises(InputError, match="^1 rows were dropped, so rows no longer match their tokens$"):
            writer.close(provenance={})
    with ActivationWriter(tmp_path / "b", **SETTINGS | dict(tokens_per_item=None)) as writer:
        writer.append(ROWS)
        with pytest.raises(
            InputError, match="^provenance is given but tokens_per_item is not; give the rows per item$"
        ):
            writer.close(provenance={})
