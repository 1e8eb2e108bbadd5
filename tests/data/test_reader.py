"""Reading a set: what goes in comes out, with rows held out or removed, and every row's token is known."""

import io
import json
import os
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest

from jax_sae.data import ActivationSet, ActivationWriter, open_activations
from jax_sae.errors import InputError

DTYPES = [np.float32, np.float16, ml_dtypes.bfloat16]
ROWS = np.random.default_rng(0).normal(size=(30, 4)).astype(np.float32)


def write(folder: Path, rows: np.ndarray = ROWS, holdout_rows: int = 6, **settings) -> ActivationSet:
    with ActivationWriter(folder, **dict(d=rows.shape[1], dtype=rows.dtype, shard_rows=8) | settings) as writer:
        writer.append(rows)
        return open_activations(writer.close(holdout_rows=holdout_rows))


def same(activations: ActivationSet, rows: np.ndarray) -> None:
    """All ways of reading agree with the array ``rows``."""
    assert (activations.rows, activations.d, activations.dtype) == (*rows.shape, rows.dtype)
    everything = activations.read(0, len(rows))
    assert everything.dtype == rows.dtype and everything.dtype.isnative
    np.testing.assert_array_equal(everything, rows)
    for start, stop in [(0, 0), (5, 5), (7, 9), (3, len(rows) - 1), (len(rows), len(rows))]:
        np.testing.assert_array_equal(activations.read(start, stop), rows[start:stop])
    generator = np.random.default_rng(0)
    for indices in (np.arange(len(rows)), generator.integers(len(rows), size=50), np.zeros(0, np.int64)):
        out = np.empty((len(indices), rows.shape[1]), rows.dtype)
        np.testing.assert_array_equal(activations.take(indices), rows[indices])
        assert activations.take(indices, out) is out
        np.testing.assert_array_equal(out, rows[indices])


# Round trips


@pytest.mark.parametrize("dtype", DTYPES)
def test_our_own_format_returns_what_was_written(tmp_path, dtype):
    rows = ROWS.astype(dtype)
    activations = write(tmp_path, rows, tokens_per_item=3, source={"model": "tiny"})
    same(activations, rows)
    assert (activations.holdout_rows, activations.train_rows, activations.tokens_per_item) == (6, 24, 3)
    assert activations.source == {"model": "tiny"} and activations.provenance is None
    activations.verify()


def test_bfloat16_is_stored_as_uint16_bits(tmp_path):
    write(tmp_path, ROWS.astype(ml_dtypes.bfloat16))
    stored = np.load(tmp_path / "shard-00000.npy")
    assert stored.dtype == np.uint16
    # The upper half of a float32, rounded to nearest even.
    bits = ROWS[:8].view(np.uint32)
    np.testing.assert_array_equal(stored, (bits + 0x7FFF + (bits >> 16 & 1)) >> 16)


@pytest.mark.parametrize("dtype", [np.float32, np.float16, ">f4"])
def test_a_npy_file(tmp_path, dtype):
    np.save(tmp_path / "a.npy", ROWS.astype(dtype))
    activations = open_activations(tmp_path / "a.npy")
    same(activations, ROWS.astype(np.dtype(dtype).newbyteorder("=")))
    assert (activations.holdout_rows, activations.tokens_per_item, activations.statistics) == (0, None, None)
    activations.verify()


def test_a_npy_file_of_items_is_read_token_by_token(tmp_path):
    np.save(tmp_path / "a.npy", ROWS.reshape(6, 5, 4))
    activations = open_activations(str(tmp_path / "a.npy"))
    same(activations, ROWS)
    assert activations.tokens_per_item == 5


def test_a_folder_of_npy_files_in_the_order_of_their_names(tmp_path):
    for name, part in {"b": ROWS[10:29], "a": ROWS[:10], "d": ROWS[29:], "c": ROWS[:0]}.items():
        np.save(tmp_path / f"{name}.npy", part)
    same(open_activations(tmp_path), ROWS)


# Rows of 16 kB and more, which are read from the files; shorter ones are copied from the mapping

WIDE = np.random.default_rng(1).normal(size=(30, 1 << 13)).astype(np.float32)


@pytest.mark.parametrize("dtype", DTYPES)
def test_wide_rows_return_as_written(tmp_path, dtype):
    same(write(tmp_path, WIDE.astype(dtype)), WIDE.astype(dtype))


@pytest.mark.parametrize("dtype", [np.float32, ">f4"])
@pytest.mark.parametrize("shape", [(30, -1), (6, 5, 1 << 13)])
def test_wide_rows_of_npy_files(tmp_path, dtype, shape):
    np.save(tmp_path / "a.npy", WIDE.reshape(shape).astype(dtype))
    same(open_activations(tmp_path / "a.npy"), WIDE)


def test_rows_go_where_out_is_even_if_it_has_gaps(tmp_path):
    out = np.zeros((5, 2, 1 << 13), np.float32)
    write(tmp_path, WIDE).take(np.arange(6, 11), out[:, 0])
    np.testing.assert_array_equal(out[:, 0], WIDE[6:11])
    assert not out[:, 1].any()


@pytest.mark.skipif(not hasattr(os, "posix_fadvise"), reason="the system cannot be told")
@pytest.mark.parametrize("removed", [[], [0, 11, 12]])
def test_announced_are_the_bytes_of_the_rows(tmp_path, monkeypatch, removed):
    activations = write(tmp_path, WIDE).without_rows(np.array(removed, np.int64))
    announced = []
    monkeypatch.setattr(
        os, "posix_fadvise", lambda file, offset, size, _: announced.append(os.pread(file, size, offset))
    )
    indices = np.array([3, 4, 5, 9, 10, 11, 12, 13, 20, 26])
    activations.announce(indices)
    assert b"".join(announced) == np.delete(WIDE, removed, axis=0)[indices].tobytes()
    assert len(announced) <= 8


def test_short_scattered_rows_are_not_announced(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "posix_fadvise", lambda *_: pytest.fail("announced"), raising=False)
    write(tmp_path).announce(np.arange(0, 30, 2))


def test_reads_that_come_in_parts_are_put_together(tmp_path, monkeypatch):
    activations = write(tmp_path, WIDE)

    class InParts(io.FileIO):
        def readinto(self, buffer):
            return super().readinto(buffer[:1000])

    monkeypatch.setattr(Path, "open", lambda path, mode, buffering: InParts(path, mode))
    np.testing.assert_array_equal(activations.take(np.arange(5, 25)), WIDE[5:25])


def test_a_file_that_was_cut_after_it_was_opened_is_an_error(tmp_path):
    activations = write(tmp_path, WIDE)
    os.truncate(tmp_path / "shard-00001.npy", 100_000)
    with pytest.raises(InputError, match=r"shard-00001.npy has become shorter since it was opened; write it again$"):
        activations.take(np.arange(6, 16))
    np.testing.assert_array_equal(activations.take(np.arange(8)), WIDE[:8])


def test_rows_outside_the_set_are_refused(tmp_path):
    activations = write(tmp_path)
    for start, stop in [(-1, 2), (3, 2), (0, 31)]:
        with pytest.raises(IndexError, match=f"rows {start} to {stop} of a set with 30"):
            activations.read(start, stop)
    for indices in [[-1, 0], [0, 30]]:
        with pytest.raises(IndexError, match="of a set with 30"):
            activations.take(np.array(indices))


def test_the_fingerprint_follows_the_content(tmp_path):
    changed = ROWS.copy()
    changed[29, 3] += 1
    sets = [write(tmp_path / "a"), write(tmp_path / "b", changed), write(tmp_path / "c", ROWS[:29])]
    for name, rows in {"d": ROWS, "e": changed, "f": ROWS[:29]}.items():
        np.save(tmp_path / f"{name}.npy", rows)
        sets.append(open_activations(tmp_path / f"{name}.npy"))
    assert len({activations.fingerprint for activations in sets}) == 6
    assert open_activations(tmp_path / "a").fingerprint == sets[0].fingerprint


# Held-out and removed rows


@pytest.mark.parametrize("removed", [[], [0], [29], [7, 8, 23, 24], list(range(0, 30, 2)), list(range(29))])
def test_removed_rows_are_as_if_never_written(tmp_path, removed):
    whole = write(tmp_path, tokens_per_item=3)
    activations = whole.without_rows(np.array(removed, np.int64))
    rows = np.delete(ROWS, removed, axis=0)
    assert activations.rows == len(rows)
    assert activations.holdout_rows == 6 - sum(row >= 24 for row in removed)
    np.testing.assert_array_equal(activations.read(0, len(rows)), rows)
    for start in range(0, len(rows), 5):
        np.testing.assert_array_equal(activations.read(start, len(rows)), rows[start:])
    indices = np.random.default_rng(0).integers(len(rows), size=50)
    np.testing.assert_array_equal(activations.take(indices), rows[indices])
    assert activations.tokens_per_item == (None if removed else 3)
    same(whole, ROWS)


@pytest.mark.parametrize("removed", [[3, 2], [2, 2], [-1], [30]])
def test_rows_to_remove_are_checked(tmp_path, removed):
    with pytest.raises(ValueError, match="not ascending or not within the 30 of the set"):
        write(tmp_path).without_rows(np.array(removed))


def test_rows_are_removed_once(tmp_path):
    with pytest.raises(ValueError, match="removed from this set already"):
        write(tmp_path).without_rows(np.array([1])).without_rows(np.array([1]))


def test_another_hold_out_forgets_the_statistics_of_other_rows(tmp_path):
    activations = write(tmp_path)
    changed = activations.with_holdout(30)
    assert (changed.holdout_rows, changed.train_rows, changed.statistics) == (30, 0, None)
    assert activations.with_holdout(6).statistics is activations.statistics is not None
    for rows in (-1, 31):
        with pytest.raises(InputError, match=f"^{rows} rows are to be held out of 30; give a number from 0 to 30$"):
            activations.with_holdout(rows)


# Provenance


def with_provenance(folder: Path, **fields) -> Path:
    """Five items of six rows (positions 1 to 6 of 7 tokens) of two documents."""
    folder.mkdir()
    np.save(folder / "tokens.npy", np.arange(35, dtype=np.int32).reshape(5, 7))
    np.save(folder / "items.npy", np.array([[0, 0], [0, 7], [1, 0], [1, 7], [1, 14]], np.int32))
    (folder / "tokenizer.json").write_text("{}")
    provenance = {
        "tokens": "tokens.npy",
        "items": "items.npy",
        "documents": ["first", "second"],
        "first_position": 1,
        "tokenizer": "tokenizer.json",
    }
    with ActivationWriter(folder, d=4, tokens_per_item=6) as writer:
        writer.append(ROWS)
        return writer.close(provenance=provenance)


def test_every_row_knows_its_token(tmp_path):
    provenance = open_activations(with_provenance(tmp_path / "set")).provenance
    assert provenance is not None and provenance.tokens.dtype == np.int32
    assert provenance.tokenizer_path == tmp_path / "set" / "tokenizer.json"
    found = [provenance.locate(row) for row in (0, 5, 6, 12, 29)]
    assert found == [(0, 1, "first", 1), (0, 6, "first", 6), (1, 1, "first", 8), (2, 1, "second", 1),
                     (4, 6, "second", 20)]  # fmt: skip


def test_rows_counted_anew_have_lost_their_tokens(tmp_path):
    activations = open_activations(with_provenance(tmp_path / "set"))
    assert activations.without_rows(np.array([3])).provenance is None
    assert activations.without_rows(np.array([], np.int64)).provenance is activations.provenance


@pytest.mark.parametrize("missing", ["tokens.npy", "documents", "items"])
def test_provenance_that_is_not_whole_is_refused(tmp_path, missing):
    folder = with_provenance(tmp_path / "set")
    (folder / missing).unlink(missing_ok=True)
    path = folder / "activations.json"
    content = json.loads(path.read_text())
    content["provenance"].pop(missing, None)
    path.write_text(json.dumps(content))
    with pytest.raises(InputError, match=rf"set does not know its tokens \(.*{missing}.*\); write the set again$"):
        open_activations(folder)
