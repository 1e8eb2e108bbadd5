"""Everything that is not a set is refused, in one line that says what to do."""

import json
from pathlib import Path

import numpy as np
import pytest

from jax_sae.data import ActivationSet, ActivationWriter, open_activations
from jax_sae.errors import InputError

ROWS = np.random.default_rng(0).normal(size=(30, 4)).astype(np.float32)


def write(folder: Path, rows: np.ndarray = ROWS) -> ActivationSet:
    with ActivationWriter(folder, d=rows.shape[1], shard_rows=8) as writer:
        writer.append(rows)
        return open_activations(writer.close(holdout_rows=6))


def refused(path: Path, message: str) -> None:
    """Opening fails with one line that contains ``message`` and names the path."""
    with pytest.raises(InputError) as caught:
        open_activations(path)
    found = str(caught.value)
    assert message in found and str(path) in found and "\n" not in found


# Files


def test_verify_names_the_shard_that_changed(tmp_path):
    activations = write(tmp_path)
    read = []
    activations.verify(progress=read.append)
    assert sum(read) == sum(file.stat().st_size for file in tmp_path.glob("shard-*"))
    shard = tmp_path / "shard-00002.npy"
    content = bytearray(shard.read_bytes())
    content[-3] ^= 1
    shard.write_bytes(content)
    with pytest.raises(InputError, match=r"shard-00002.npy has checksum \w{8}, expected \w{8}; damaged, write the"):
        open_activations(tmp_path).verify()


def test_a_missing_path_is_refused(tmp_path):
    refused(tmp_path / "nothing", "does not exist; expected an activation set")


def test_an_empty_folder_is_refused(tmp_path):
    refused(tmp_path, "holds no activations.json, no .npy file and no TFDS dataset")


def test_an_unfinished_set_is_refused(tmp_path):
    ActivationWriter(tmp_path, d=4, shard_rows=8).append(ROWS)
    refused(tmp_path, "is an unfinished activation set; run what writes it again to complete it")


@pytest.mark.parametrize(
    ("array", "message"),
    [
        (ROWS[:0], "has no rows; expected at least one"),
        (ROWS.reshape(3, 10, 4)[:, :0], "has no rows"),
        (ROWS[:, :0], "has shape (30, 0), expected [rows, d] or [items, tokens, d]; reshape it"),
        (ROWS[0], "has shape (4,)"),
        (ROWS.reshape(2, 3, 5, 4), "has shape (2, 3, 5, 4)"),
        (ROWS.astype(np.float64), "has dtype float64, expected float32, float16, bfloat16; convert it"),
        (ROWS.astype(np.int32), "has dtype int32"),
        (ROWS.astype(np.uint16), "has dtype uint16"),
        (ROWS.astype(object), "is truncated or not a plain .npy array (Array can't be memory-mapped: Python objects"),
        (np.asfortranarray(ROWS), "is in Fortran order"),
    ],
)
def test_other_arrays_are_refused(tmp_path, array, message):
    np.save(tmp_path / "a.npy", array)
    refused(tmp_path / "a.npy", message)


def test_a_pickle_is_never_run(tmp_path):
    class Trap:
        def __reduce__(self):
            return Path.touch, (tmp_path / "sprung",)

    np.save(tmp_path / "a.npy", np.array([[Trap()]], object))
    np.save(tmp_path / "b.npy", np.zeros((0, 2), object))
    (tmp_path / "c.npy").write_bytes(__import__("pickle").dumps(Trap()))
    for name in "abc":
        with pytest.raises(InputError):
            open_activations(tmp_path / f"{name}.npy")
    assert not (tmp_path / "sprung").exists()


def test_a_damaged_npy_file_is_refused_wherever_it_is_cut_or_changed(tmp_path):
    file = tmp_path / "a.npy"
    np.save(file, ROWS)
    content = file.read_bytes()
    for size in (0, 5, 9, 100, 127, 128, len(content) - 1):
        file.write_bytes(content[:size])
        refused(file, "is truncated or not a plain .npy array")
    generator = np.random.default_rng(0)
    for _ in range(200):
        changed = bytearray(content)
        changed[generator.integers(60)] = generator.integers(256)  # the header as far as the shape
        file.write_bytes(changed)
        try:
            open_activations(file)
        except InputError as error:
            assert "\n" not in str(error)


@pytest.mark.parametrize(
    ("other", "message"),
    [
        (ROWS[:, :3], "b.npy has d = 3, expected 4 as in a.npy; put sets apart into folders of their own"),
        (ROWS.astype(np.float16), "b.npy has dtype = float16, expected float32 as in a.npy"),
        (ROWS.reshape(6, 5, 4), "b.npy has tokens_per_item = 5, expected None as in a.npy"),
    ],
)
def test_shards_that_differ_are_refused(tmp_path, other, message):
    np.save(tmp_path / "a.npy", ROWS)
    np.save(tmp_path / "b.npy", other)
    refused(tmp_path, message)


@pytest.mark.parametrize(
    ("array", "message"),
    [
        (None, "shard-00001.npy is missing; expected a shard of 8 rows, write the set again"),
        (ROWS[:7], "shard-00001.npy is 7 x 4, expected 8 x 4; write the set again"),
        (ROWS[:8, :3], "shard-00001.npy is 8 x 3, expected 8 x 4"),
        (ROWS[:8].astype(np.float16), "shard-00001.npy has dtype float16, expected float32; convert it"),
    ],
)
def test_shards_that_are_not_what_the_json_says_are_refused(tmp_path, array, message):
    write(tmp_path)
    (tmp_path / "shard-00001.npy").unlink()
    if array is not None:
        np.save(tmp_path / "shard-00001.npy", array)
    refused(tmp_path, message)


def test_a_truncated_shard_is_refused(tmp_path):
    write(tmp_path)
    shard = tmp_path / "shard-00003.npy"
    shard.write_bytes(shard.read_bytes()[:-1])
    refused(tmp_path, "shard-00003.npy is truncated or not a plain .npy array")


# The json


@pytest.mark.parametrize("text", ["", "{", "[]", "null", "{}", '"set"', '{"version": 1}', "\udcff"])
def test_a_malformed_json_is_refused(tmp_path, text):
    write(tmp_path)
    (tmp_path / "activations.json").write_bytes(text.encode(errors="surrogateescape"))
    refused(tmp_path, "activations.json does not describe an activation set (")


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("version", 2, "ValueError: format version 2, expected 1"),
        ("dtype", "float64", "dtype 'float64', expected one of float32, float16, bfloat16"),
        ("dtype", ["float32"], "TypeError"),
        ("d", 0, "d = 0, expected an integer of at least 1"),
        ("d", "4", "d = '4'"),
        ("rows", 31, "31 rows, but the shards have 30"),
        ("holdout_rows", 31, "31 held-out rows of 30"),
        ("holdout_rows", 1.5, "holdout_rows = 1.5, expected an integer of at least 0"),
        ("tokens_per_item", 0, "tokens_per_item = 0, expected an integer of at least 1"),
        ("shards", [{"name": "shard-00000.npy"}], "TypeError"),
        ("shards", [{"name": 5, "rows": 30, "crc32": 0}], "5 = 30, expected"),
        ("shards", [{"name": "a", "rows": 31, "crc32": 0}, {"name": "b", "rows": -1, "crc32": 0}], "b = -1, expected"),
        ("statistics", {"rows": 3}, "KeyError: 'mean'"),
    ],
)
def test_a_json_with_a_wrong_field_is_refused(tmp_path, field, value, message):
    write(tmp_path)
    change_json(tmp_path, **{field: value})
    refused(tmp_path, message)


def test_statistics_of_another_width_are_refused(tmp_path):
    statistics = write(tmp_path / "narrow", ROWS[:, :3]).statistics
    write(tmp_path / "set")
    change_json(tmp_path / "set", statistics=statistics.to_json())
    refused(tmp_path / "set", "statistics of width (3,), expected 4")


@pytest.mark.parametrize("name", ["../elsewhere.npy", "sub/shard.npy", ""])
def test_shards_outside_the_folder_are_refused(tmp_path, name):
    write(tmp_path / "set")
    (tmp_path / "set" / "sub").mkdir()
    for file in ("elsewhere.npy", "set/sub/shard.npy"):
        np.save(tmp_path / file, ROWS)
    change_json(tmp_path / "set", shards=[{"name": name, "rows": 30, "crc32": 0}])
    refused(tmp_path / "set", "is missing; expected a shard of 30 rows")


def test_an_absolute_shard_name_is_refused(tmp_path):
    write(tmp_path / "set")
    np.save(tmp_path / "elsewhere.npy", ROWS)
    change_json(tmp_path / "set", shards=[{"name": str(tmp_path / "elsewhere.npy"), "rows": 30, "crc32": 0}])
    with pytest.raises(InputError, match="elsewhere.npy is missing"):
        open_activations(tmp_path / "set")


def change_json(folder: Path, **fields) -> None:
    path = folder / "activations.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))
