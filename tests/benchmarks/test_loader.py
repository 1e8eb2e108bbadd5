"""What the loader benchmark runs before and besides timing."""

import functools
import json
import os
import re
import sys
from pathlib import Path

import numpy as np
import pytest

from benchmarks import loader

linux = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="the page cache is looked at as on Linux")


@pytest.fixture
def activations(tmp_path):
    return loader.write_set(tmp_path / "set", 100, 3, "float32")


def test_every_stream_has_the_number_of_batches_asked_for(activations):
    for name, stream in loader.streams(activations, 8).items():
        batches = [np.array(batch) for batch in stream(15)]  # the sequential read comes in one buffer
        assert [batch.shape for batch in batches] == [(8, 3)] * 15, name
        stored = {row.tobytes() for row in activations.read(0, 100)}
        assert all(row.tobytes() in stored for batch in batches for row in batch), name


def test_streams_go_through_every_row(activations):
    everything = activations.read(0, 100)
    for name, stream in loader.streams(activations, 10).items():
        rows = np.concatenate([np.array(batch) for batch in stream(10)])
        np.testing.assert_array_equal(np.sort(rows[:, 0]), np.sort(everything[:, 0]), err_msg=name)
        assert np.array_equal(rows, everything) == (name == loader.READ), name


def test_a_loader_that_is_wrong_is_found(activations, monkeypatch):
    loader.verify(activations, 8)
    monkeypatch.setattr(loader, "load_batches", lambda *_, **__: iter([activations.read(0, 8)]))
    with pytest.raises(AssertionError):
        loader.verify(activations, 8)


def test_seconds_are_of_all_batches(monkeypatch):
    clock = iter(np.arange(1000.0))  # a second passes between any two looks at it
    monkeypatch.setattr(loader.time, "perf_counter", lambda: next(clock))
    monkeypatch.setattr(loader.time, "process_time", lambda: 0.0)
    events: list[object] = []

    def stream(name):
        return lambda number: events.append((name, number)) or iter(range(number))

    names, part = ("load_batches", loader.ROW_BY_ROW), loader.PART
    wall, processor = loader.sample(
        {name: stream(name) for name in names}, 2 * part, 2, lambda: events.append("before")
    )
    turns = [("load_batches", 2 * part), (loader.ROW_BY_ROW, 2)]
    assert events == ["before", turns[0], "before", turns[1], "before", turns[1], "before", turns[0]]
    assert wall == {"load_batches": (1, 1), loader.ROW_BY_ROW: (part, part)}
    assert processor == {"load_batches": (0, 0), loader.ROW_BY_ROW: (0, 0)}


# The page cache


@linux
def test_files_are_cold_once_evicted_and_cached_once_read(tmp_path):
    shards = loader.shards_of(loader.write_set(tmp_path / "set", 4096, 256, "float32"))
    assert len(shards) == loader.SHARDS and loader.cached_fraction(shards) == 1
    evict_or_skip(shards)
    assert loader.cached_fraction(shards) < 0.01
    shards[0].read_bytes()
    assert loader.cached_fraction(shards[:1]) == 1


@linux
def test_files_that_stay_in_memory_are_an_error(activations, monkeypatch):
    monkeypatch.setattr(os, "posix_fadvise", lambda *_: None)
    with pytest.raises(RuntimeError, match=r"^100% of \S+set stay in the page cache; give a --folder on a disk$"):
        loader.evict(loader.shards_of(activations))


@linux
def test_every_turn_of_the_cold_table_finds_a_cold_set(tmp_path, monkeypatch):
    activations = loader.write_set(tmp_path / "set", 4096, 256, "float32")
    shards, found = loader.shards_of(activations), []
    evict_or_skip(shards)

    def watched(stream, *arguments, **named):
        found.append(loader.cached_fraction(shards))
        return stream(*arguments, **named)

    for name in ("rows_in_sequence", "load_batches"):
        monkeypatch.setattr(loader, name, functools.partial(watched, getattr(loader, name)))
    (table,) = loader.cold_tables(activations, 512, rounds=2)
    assert len(found) == 4 and max(found) < 0.01
    assert [row.name for row in table.rows] == [loader.READ, "load_batches"]
    loads, reads = table["load_batches"], table[loader.READ]
    assert loads.limit_fraction == pytest.approx(reads.median / loads.median)
    assert loads.items_per_second * loads.median == pytest.approx(4096 * 256 * 4 / 1e6)


def evict_or_skip(shards):
    try:
        loader.evict(shards)
    except RuntimeError as error:
        pytest.skip(str(error))


# Sets that are not there


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_sparse_set_has_rows_and_takes_no_room(tmp_path, dtype):
    activations = loader.sparse_set(tmp_path / "set", 3 << 16, 64, dtype, shards=3)
    assert (activations.rows, activations.d, activations.dtype.name) == (3 << 16, 64, dtype)
    assert not activations.read(70_000, 140_000).any()
    assert sum(file.stat().st_blocks * 512 for file in activations.path.iterdir()) < 100_000


@linux
def test_memory_is_told_for_every_size(tmp_path, monkeypatch):
    monkeypatch.setattr(loader, "evict", lambda paths: None)
    figures = loader.memory_figures(tmp_path, 64, "float32", 512, [1 << 20, 1 << 23])
    assert [row["set GB"] for row in figures.rows] == [2**20 / 1e9, 2**23 / 1e9]
    for row in figures.rows:
        assert 20 < row["resident before MB"] <= row["resident at most MB"] + 1
        assert row["sequential read rows/s"] > 0 and row["load_batches rows/s"] > 0


@linux
def test_resident_memory_is_what_the_system_says_in_its_other_unit():
    (kilobytes,) = re.findall(r"^VmRSS:\s+(\d+) kB$", Path("/proc/self/status").read_text(), re.M)
    assert loader.resident() == pytest.approx(1024 * int(kilobytes), rel=0.1)


# The command


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_command_prints_and_writes_rows_and_bytes(dtype, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(loader, "copy_bandwidth", lambda: 1e9)
    place = tmp_path / "sets"
    place.mkdir()
    loader.main(
        rows=100, d=3, dtype=dtype, batch_size=8, rounds=1, cold=False, memory_multiple=0, folder=place, json=tmp_path
    )
    (path,) = tmp_path.rglob("loader.json")
    rows, megabytes, processor = json.loads(path.read_text())["tables"]
    names = [loader.READ, "load_batches", "the same, not ahead", loader.ROW_BY_ROW]
    assert [row["name"] for row in rows["rows"]] == names
    size = 3 * np.dtype(dtype if dtype == "float32" else np.float16).itemsize
    for row, bytes_row in zip(rows["rows"], megabytes["rows"], strict=True):
        assert row["items_per_second"] * row["median"] == pytest.approx(96)
        assert bytes_row["items_per_second"] * 1e6 == pytest.approx(row["items_per_second"] * size)
    assert (rows["unit"], megabytes["unit"], processor["unit"]) == ("rows", "MB", "rows")
    assert "load_batches" in capsys.readouterr().out
    assert not list(place.iterdir())


@linux
def test_the_command_writes_all_parts(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(loader, "copy_bandwidth", lambda: 1e9)
    monkeypatch.setattr(loader, "evict", lambda paths: None)
    small = 2e5 / (os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"))
    loader.main(rows=100, d=3, batch_size=8, rounds=1, memory_multiple=small, folder=tmp_path, json=tmp_path)
    content = json.loads(next(tmp_path.rglob("loader.json")).read_text())
    assert content["tables"][-1]["title"] == "100 x 3 bfloat16, batches of 8, cold"
    sizes = [row["set GB"] for row in content["figures"][0]["rows"]]
    np.testing.assert_allclose(sizes, [2e-4 / 16, 2e-4 / 4, 2e-4], rtol=0.01)
    assert "resident at most MB" in capsys.readouterr().out
