"""What the loader benchmark runs before and besides timing."""

import json

import numpy as np
import pytest

from benchmarks import loader


@pytest.fixture
def activations(tmp_path):
    return loader.write_set(tmp_path / "set", 100, 3, "float32")


def test_every_stream_has_the_number_of_batches_asked_for(activations):
    for name, stream in loader.streams(activations, 8).items():
        batches = [np.array(batch) for batch in stream(15)]  # the copy comes in one buffer
        assert [batch.shape for batch in batches] == [(8, 3)] * 15, name
        stored = {row.tobytes() for row in activations.read(0, 100)}
        assert all(row.tobytes() in stored for batch in batches for row in batch), name


def test_shuffled_streams_go_through_every_row(activations):
    for name in ("load_batches", "the same, not ahead", loader.ROW_BY_ROW):
        rows = np.concatenate(list(loader.streams(activations, 10)[name](10)))
        everything = activations.read(0, 100)
        np.testing.assert_array_equal(np.sort(rows[:, 0]), np.sort(everything[:, 0]), err_msg=name)
        assert not np.array_equal(rows, everything), name


def test_a_loader_that_is_wrong_is_found(activations, monkeypatch):
    loader.verify(activations, 8)
    monkeypatch.setattr(loader, "load_batches", lambda *_, **__: iter([activations.read(0, 8)]))
    with pytest.raises(AssertionError):
        loader.verify(activations, 8)


def test_seconds_are_of_all_batches(monkeypatch):
    clock = iter(np.arange(1000.0))  # a second passes between any two looks at it
    monkeypatch.setattr(loader.time, "perf_counter", lambda: next(clock))
    monkeypatch.setattr(loader.time, "process_time", lambda: 0.0)
    opened: dict[str, list[int]] = {"load_batches": [], loader.ROW_BY_ROW: []}

    def stream(name):
        return lambda number: opened[name].append(number) or iter(range(number))

    wall, processor = loader.sample({name: stream(name) for name in opened}, batches=16, rounds=2)
    ahead = loader.PREFETCH + 1
    assert opened == {"load_batches": [ahead + 16] * 2, loader.ROW_BY_ROW: [ahead + 2] * 2}
    assert wall == {"load_batches": (1, 1), loader.ROW_BY_ROW: (8, 8)}
    assert processor == {"load_batches": (0, 0), loader.ROW_BY_ROW: (0, 0)}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_command_prints_and_writes_rows_and_bytes(dtype, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(loader, "copy_bandwidth", lambda: 1e9)
    loader.main(rows=100, d=3, dtype=dtype, batch_size=8, rounds=1, json=tmp_path)
    (path,) = tmp_path.rglob("loader.json")
    rows, megabytes, processor = json.loads(path.read_text())["tables"]
    assert [row["name"] for row in rows["rows"]] == ["copy", "load_batches", "the same, not ahead", loader.ROW_BY_ROW]
    size = 3 * np.dtype(dtype if dtype == "float32" else np.float16).itemsize
    for row, bytes_row in zip(rows["rows"], megabytes["rows"], strict=True):
        assert row["items_per_second"] * row["median"] == pytest.approx(96)
        assert bytes_row["items_per_second"] * 1e6 == pytest.approx(row["items_per_second"] * size)
    assert (rows["unit"], megabytes["unit"], processor["unit"]) == ("rows", "MB", "rows")
    assert "load_batches" in capsys.readouterr().out
