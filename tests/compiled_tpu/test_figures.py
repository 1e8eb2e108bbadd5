"""The table of benchmarks.compiled_tpu, for one kind of TPU."""

import json

import pytest

from benchmarks import compiled_tpu, results


def test_the_table_is_written_with_a_line_for_every_program(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(results, "ROOT", tmp_path)
    compiled_tpu.main(("v5e",))
    (written,) = tmp_path.rglob("compiled_tpu.json")
    (group,) = json.loads(written.read_text())["figures"]
    assert "nothing of this has run" in group["title"]
    lines = {row["program"]: row for row in group["rows"]}
    assert list(lines) == [case.name for case in compiled_tpu.CASES]
    assert lines["p"]["in and out MB"] == pytest.approx(2 * 4 * 1024 * 49_152 / 1e6, rel=1e-3)
    assert [lines[name]["kernels"] for name in ("p", "p without the kernel")] == [1, 0]
    assert lines["p without the kernel"]["compiler's count MB"] > 2 * lines["p"]["compiler's count MB"]
