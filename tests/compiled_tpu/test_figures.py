"""The tables of the compiler's figures, for one kind of TPU."""

import json

import pytest

from benchmarks import compiled_parts, compiled_tpu, fused_selection, results


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


def rows_of(folder, name):
    (written,) = folder.rglob(f"{name}.json")
    (group,) = json.loads(written.read_text())["figures"]
    return group["rows"]


def test_parts_on_all_concepts_stand_beside_those_at_places(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(results, "ROOT", tmp_path)
    compiled_parts.main(("v5e",))
    parts = {row["part"]: row for row in rows_of(tmp_path, "compiled_parts")}
    for name in ("decoding", "gradient of the activations", "gradient of the dictionary"):
        assert parts[name]["GFLOP"] == pytest.approx(2 * 1024 * 768 * 49_152 / 1e9, rel=0.01)
        assert parts[name]["GFLOP"] > 100 * parts[f"{name}, at places"]["GFLOP"]
        assert parts[name]["modelled cycles, thousands"] > 0
    assert parts["gradient of the dictionary, at places"]["scatters"] == 1


def test_the_fused_kernel_leaves_no_scores_in_memory(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(results, "ROOT", tmp_path)
    fused_selection.main(("v5e",), batch=512)
    apart, fused = rows_of(tmp_path, "fused_selection")
    assert apart["temporaries MB"] == pytest.approx(4 * 512 * 49_152 / 1e6, rel=0.01) and fused["temporaries MB"] < 1
