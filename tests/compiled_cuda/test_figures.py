"""The table of what XLA makes of a step, for one kind of GPU."""

import json

import pytest

from benchmarks import compiled_gpu, results


def test_dense_and_sparse_steps_stand_side_by_side_with_where_they_cost_the_same(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(results, "ROOT", tmp_path)
    rows, d, concepts = 512, 64, 16_384
    compiled_gpu.main(("h100",), ("sparsemax",), rows, (d,), concepts)
    (written,) = tmp_path.rglob("compiled_gpu.json")
    programs, even = json.loads(written.read_text())["figures"]
    assert "nothing of this has run" in programs["title"]
    lines = {row["program"]: row for row in programs["rows"]}
    product = 2 * rows * d * concepts / 1e9
    dense, sparse = lines["step of sparsemax, dense"], lines["step of sparsemax, at places"]
    assert dense["products GFLOP"] == pytest.approx(6 * product)
    assert sparse["products GFLOP"] == pytest.approx(product)
    assert sparse["rows of the dictionary MB"] == pytest.approx(5 * rows * 64 * d * 4 / 1e6)
    assert dense["all else MB"] > sparse["all else MB"] > 2 * 4 * rows * concepts / 1e6
    [row] = even["rows"]
    assert row["one concept in"] == pytest.approx(concepts / row["places per row"])
    chip, shape = compiled_gpu.CHIPS["h100"], compiled_gpu.Shape(rows, d, concepts)
    at_places = compiled_gpu.limit(
        chip, shape, compiled_gpu.SPARSE_STEP["sparsemax"], 1e6 * sparse["all else MB"], row["places per row"]
    )
    assert 1e6 * at_places == pytest.approx(dense["limit us"])
