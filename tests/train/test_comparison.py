"""Comparing runs: what is grouped, what may be compared, what the tables, the page and the sentences say."""

import json

import numpy as np
import pytest

from jax_sae import InputError
from tests.train.report_workdir import EVALUATION
from tests.train.test_report import HOSTILE, Page
from train import cli
from train.comparison import main, write

DESCRIBED = {
    "data": "speeches",
    "source": {"model": "SmolLM2", "layer": 9},
    "steps": 600,
    "batch_size": 1024,
    "n_concepts": 4608,
    "device": "a machine",
    "seeds": [0, 1],
}
NO_LANGUAGE_MODEL = {
    name: value for name, value in EVALUATION.items() if not name.startswith(("ce_", "loss_recovered"))
}


def write_run(path, preset, active, fvu, *, seed=0, activation=None, k=32, numbers=EVALUATION, failed=None, **changes):
    """A run folder of known numbers."""
    path.mkdir(parents=True)
    config = {
        "preset": preset,
        "data": "speeches",
        "workdir": str(path),
        "fingerprint": "f",
        "seed": seed,
        "steps": 600,
        "batch_size": 1024,
        "n_concepts": 4608,
        "sae": {"d_in": 16, "n_concepts": 4608, "activation": activation or preset, "k": k},
        "source": DESCRIBED["source"],
    }
    (path / "config.json").write_text(json.dumps(config | changes))
    if failed is not None:
        (path / "failed.json").write_text(json.dumps(failed))
    else:
        measured = {"active": active, "fvu": fvu, "fvu_pooled": 2 * fvu, "nmse": fvu, "cs": 1 - fvu}
        (path / "evaluation.json").write_text(json.dumps(numbers | measured))
    return path


@pytest.fixture
def runs(tmp_path):
    """Sparsemax over two seeds, topk at its k and at another, one run that diverged."""
    return [
        write_run(tmp_path / "s0", "sparsemax", 26.0, 0.0770),
        write_run(tmp_path / "s1", "sparsemax", 26.4, 0.0778, seed=1),
        write_run(tmp_path / "k26", "topk", 26.0, 0.0740, k=26),
        write_run(tmp_path / "k64", "topk", 64.0, 0.0500, k=64),
        write_run(tmp_path / "bad", "relu", 0, 0, failed={"step": 140, "reason": "the loss is not finite"}),
    ]


def result(folder):
    return json.loads((folder / "comparison.json").read_text())


def rows(folder, table=0):
    """Cells of a table of comparison.md by label."""
    tables = [block for block in (folder / "comparison.md").read_text().split("\n\n") if block.startswith("|")]
    lines = [[cell.strip() for cell in line.strip("|").split(" | ")] for line in tables[table].splitlines()]
    return {line[0].strip(): dict(zip(lines[0][1:], line[1:], strict=True)) for line in lines[2:]}


def test_seeds_are_averaged(runs, tmp_path):
    write(tmp_path / "out", runs, DESCRIBED)
    groups = {group["label"]: group for group in result(tmp_path / "out")["groups"]}
    assert list(groups) == ["topk, k = 26", "sparsemax", "topk, k = 64", "relu"]
    sparsemax = groups["sparsemax"]
    assert sparsemax["seeds"] == [0, 1]
    for name, values in {"fvu": (0.0770, 0.0778), "active": (26.0, 26.4), "cs": (0.923, 0.9222)}.items():
        assert sparsemax["mean"][name] == pytest.approx(np.mean(values), rel=1e-12)
        assert sparsemax["std"][name] == pytest.approx(np.std(values, ddof=1), rel=1e-9)
    assert groups["topk, k = 26"]["std"] == {}
    assert len(result(tmp_path / "out")["runs"]) == 5
    assert result(tmp_path / "out")["described"] == DESCRIBED


def test_the_tables_show_the_numbers_and_the_best_of_comparable_rows(runs, tmp_path):
    write(tmp_path / "out", runs, DESCRIBED)
    table = rows(tmp_path / "out")
    assert table["topk, k = 26"]["FVU ↓"] == "**0.0740**"
    assert table["sparsemax (2 seeds)"]["FVU ↓"] == "0.0774 ± 0.0006"
    assert table["topk, k = 64"]["FVU ↓"] == "0.0500"  # more concepts are active: nothing to compare it with
    assert table["sparsemax (2 seeds)"]["k or active"] == "26.2"
    assert table["topk, k = 64"]["k or active"] == "k = 64"
    assert table["relu"]["k or active"] == "diverged at step 140 (the loss is not finite)"
    assert "CKNNA ↑" not in table["relu"]  # none of these runs measured it
    assert rows(tmp_path / "out", 1)["topk, k = 26"]["NMSE ↓"] == "**0.0740**"
    text = (tmp_path / "out" / "comparison.md").read_text()
    assert "SmolLM2, layer 9 · speeches. Budget: 600 steps x 1,024 rows = 614,400 rows." in text
    assert "Dictionary: 4,608 concepts. Seeds: 0, 1. Machine: a machine." in text


def test_k_is_judged_by_the_numbers(runs, tmp_path):
    write(tmp_path / "out", runs, {})
    (guide,) = result(tmp_path / "out")["k"]
    assert guide["sentence"] == (
        "At its own 26 active concepts, sparsemax has FVU 0.0774; topk with k = 26 has 0.0740 (4.4\xa0% lower)."
    )
    assert guide["matches"][0]["change"] == pytest.approx(0.0740 / 0.0774 - 1)
    write(tmp_path / "alone", runs[:2], {})
    sentence = "sparsemax has FVU 0.0774; neither topk nor batch_topk was trained with k = 26."
    assert sentence in (tmp_path / "alone" / "comparison.md").read_text()


@pytest.mark.parametrize(("fvu", "words"), [(0.0820, "(6.5\xa0% higher)"), (0.0770, "(the same)")])
def test_the_sentence_is_worded_either_way(tmp_path, fvu, words):
    own = write_run(tmp_path / "e", "entmax", 26.0, 0.0770)
    other = write_run(tmp_path / "b", "batch_topk", 25.0, fvu, k=26)
    longer = write_run(tmp_path / "longer", "topk", 26.0, 0.01, k=26, steps=601)  # another budget
    write(tmp_path / "out", [own, other, longer], {})
    (guide,) = result(tmp_path / "out")["k"]
    assert guide["sentence"].endswith(f"batch_topk with k = 26 has {fvu:.4f} {words}.")


def test_the_front_holds_what_no_other_form_beats_in_both(runs, tmp_path):
    beaten = write_run(tmp_path / "gated", "gated", 65.0, 0.0600)
    write(tmp_path / "out", [*runs, beaten], DESCRIBED)
    front = ["topk, k = 26", "topk, k = 64"]
    assert result(tmp_path / "out")["pareto"] == {"fvu": front, "fvu_pooled": front}


def test_the_page_has_both_tables_and_the_plot_and_needs_nothing_from_elsewhere(runs, tmp_path):
    page = Page(write(tmp_path / "out", runs, DESCRIBED))
    assert [found["id"] for found in page.all("section")] == ["table-1", "table-2", "sparsity", "k"]
    assert "sparsemax 2 seeds" in page.text("tr")
    assert "diverged at step 140 (the loss is not finite)" in page.text("td")
    labels = [found["aria-label"] for found in page.all("div", role="img")]
    assert "sparsemax: 26.2 active, FVU 0.0774" in labels[0]
    assert labels[0].endswith("Not beaten in both: topk, k = 26, topk, k = 64.")
    drawn = [text for path, text in page.texts if path and path[-1][1].get("class", "").startswith("point")]
    assert sorted(drawn[:3]) == ["sparsemax", "topk, k = 26", "topk, k = 64"]
    for _, found in page.elements:
        assert not {"src", "srcset", "action", "data"} & found.keys()
    assert not page.all("script") and "http:" not in page.source and "https:" not in page.source
    (policy,) = [found["content"] for found in page.all("meta") if "http-equiv" in found]
    assert policy == "default-src 'none'; style-src 'unsafe-inline'"


def test_sets_without_a_language_model_have_one_table(tmp_path):
    run = write_run(tmp_path / "run", "topk", 26.0, 0.07, numbers=NO_LANGUAGE_MODEL)
    page = Page(write(tmp_path / "out", [run], {}))
    assert [found["id"] for found in page.all("section")] == ["table-1", "sparsity"]
    assert "Language model" not in (tmp_path / "out" / "comparison.md").read_text()


def test_what_was_left_out_is_said(tmp_path):
    numbers = EVALUATION | {"ms_left_out": "the set has no items"}
    write(tmp_path / "out", [write_run(tmp_path / "run", "topk", 26.0, 0.07, numbers=numbers)], {})
    for name in ("comparison.md", "report.html"):
        assert "MS is left out: the set has no items." in (tmp_path / "out" / name).read_text()


def test_a_seed_that_failed_is_a_note_on_the_others(runs, tmp_path):
    failed = write_run(tmp_path / "s2", "sparsemax", 0, 0, seed=2, failed={"step": 3, "reason": ""})
    write(tmp_path / "out", [*runs, failed], {})
    assert "sparsemax (2 seeds; seed 2 diverged at step 3)" in rows(tmp_path / "out")


def test_a_form_with_no_active_concept_is_in_the_table_and_not_in_the_plot(tmp_path):
    dead = write_run(tmp_path / "dead", "relu", 0.0, 1.0)
    page = Page(write(tmp_path / "out", [dead], {}))
    assert "Not drawn, since no concept is active: relu." in page.text("main")
    assert not page.all("div", role="img")


def test_text_from_outside_is_inert(tmp_path):
    run = write_run(tmp_path / "a<b>", HOSTILE, 26.0, 0.07)
    bad = write_run(tmp_path / "bad", "relu", 0, 0, failed={"step": 1, "reason": HOSTILE + "\n| x |"})
    page = Page(write(tmp_path / "<out>", [run, bad], DESCRIBED | {"data": HOSTILE, "device": HOSTILE}))
    assert not page.all("script") and not page.all("img")
    assert page.text("h1") == "<out>"
    text = (tmp_path / "<out>" / "comparison.md").read_text()
    assert "<script" not in text and "<img" not in text
    assert {line.count(" | ") for line in text.splitlines() if line.startswith("| ")} == {6}  # whole rows


def test_the_same_files_give_the_same_bytes(runs, tmp_path):
    names = ("comparison.json", "comparison.md", "report.html")
    write(tmp_path / "out", runs, DESCRIBED)
    first = [(tmp_path / "out" / name).read_bytes() for name in names]
    write(tmp_path / "out", runs, DESCRIBED)
    assert [(tmp_path / "out" / name).read_bytes() for name in names] == first
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == sorted(names)


@pytest.mark.parametrize("name", ["config", "evaluation"])
@pytest.mark.parametrize("text", [None, "{", "[]", '{"fvu": 1}'])
def test_a_missing_or_damaged_file_is_named_and_nothing_is_written(runs, tmp_path, name, text):
    path = runs[0] / f"{name}.json"
    path.unlink() if text is None else path.write_text(text)
    with pytest.raises(InputError, match=f"{name}.json"):
        write(tmp_path / "out", runs, {})
    assert not (tmp_path / "out").exists()


def test_other_input_that_is_refused(runs, tmp_path):
    with pytest.raises(InputError, match="no runs are given"):
        write(tmp_path / "out", [], {})
    with pytest.raises(InputError, match="absent is not a folder"):
        write(tmp_path / "out", [tmp_path / "absent"], {})
    with pytest.raises(InputError, match="s0 is given twice"):
        write(tmp_path / "out", [*runs, runs[0]], {})
    other = write_run(tmp_path / "other", "topk", 26.0, 0.07, fingerprint="g")
    with pytest.raises(InputError, match="other was trained on other activations than .*s0"):
        write(tmp_path / "out", [runs[0], other], {})
    (runs[4] / "failed.json").write_text('{"reason": "x"}')
    with pytest.raises(InputError, match=r"failed\.json does not say why"):
        write(tmp_path / "out", runs, {})


def test_the_command_compares_finished_runs(runs, tmp_path, capsys):
    cli.run(main, [*map(str, runs), "--out", str(tmp_path / "out")], prog="comparison")
    assert str(tmp_path / "out" / "comparison.md") in capsys.readouterr().out
    assert result(tmp_path / "out")["described"] == {
        "seeds": [0, 1],
        "data": "speeches",
        "source": DESCRIBED["source"],
        "steps": 600,
        "batch_size": 1024,
        "n_concepts": 4608,
    }


def test_the_command_names_the_command_for_runs_without_an_evaluation(runs, tmp_path, capsys):
    for run in runs[:2]:
        (run / "evaluation.json").unlink()
    with pytest.raises(SystemExit) as caught:
        cli.run(main, [*map(str, runs), "--out", str(tmp_path / "out")], prog="comparison")
    assert caught.value.code == 2
    error = capsys.readouterr().err
    assert f"run python -m train.evaluate {runs[0]} {runs[1]}\n" in error
    assert not (tmp_path / "out").exists()
