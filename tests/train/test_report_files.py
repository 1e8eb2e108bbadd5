"""Reading the files of a workdir: what is accepted, what is refused, and what the refusal says."""

import json

import pytest

from jax_sae import InputError
from tests.train.report_workdir import (
    CONFIG,
    EVALUATION,
    concept,
    concepts,
    context,
    jsonl,
    records,
    write_workdir,
)
from train.report_files import read_concepts, read_config, read_evaluation, read_metrics


def test_metrics_are_split_into_training_and_validation_by_step(tmp_path):
    metrics = read_metrics(write_workdir(tmp_path, metrics=jsonl(reversed(records()))))
    assert [record["step"] for record in metrics.training] == [20, 40, 60, 80, 100]
    assert [record["val_fvu"] for record in metrics.validation] == [0.125]
    assert not metrics.torn


@pytest.mark.parametrize("torn", ['{"step": 120, "loss": 0.', '{"step": 120', "{", '{"step": 120, "source": "\xc3'])
def test_only_an_unfinished_last_line_is_ignored(tmp_path, torn):
    workdir = write_workdir(tmp_path)
    path = workdir / "metrics.jsonl"
    path.write_bytes(path.read_bytes() + torn.encode("latin-1"))
    metrics = read_metrics(workdir)
    assert metrics.torn
    assert len(metrics.training) == 5
    path.write_bytes(path.read_bytes() + b"\n")
    with pytest.raises(InputError, match=r"metrics\.jsonl line 7 is not a record"):
        read_metrics(workdir)


def test_a_whole_last_line_without_its_line_feed_counts(tmp_path):
    metrics = read_metrics(write_workdir(tmp_path, metrics=jsonl(records()).rstrip("\n")))
    assert not metrics.torn
    assert len(metrics.validation) == 1


@pytest.mark.parametrize("line", ["", "[]", "{}", '{"step": -1}', '{"step": true}', '{"step": 1, "loss": "a"}', "x"])
def test_a_damaged_line_in_the_middle_is_an_error(tmp_path, line):
    text = f"{line}\n{jsonl(records())}"
    with pytest.raises(InputError, match=r"metrics\.jsonl line 1 "):
        read_metrics(write_workdir(tmp_path, metrics=text))


def test_no_metrics_and_no_evaluation_are_not_errors(tmp_path):
    workdir = write_workdir(tmp_path, metrics=None, evaluation=None, concepts=None)
    assert read_metrics(workdir).training == ()
    assert read_evaluation(workdir) is None
    assert read_concepts(workdir) is None


@pytest.mark.parametrize("missing", ["preset", "sae", "source"])
def test_a_configuration_of_something_else_is_refused(tmp_path, missing):
    config = {name: value for name, value in CONFIG.items() if name != missing}
    with pytest.raises(InputError, match=r"config\.json is not the configuration of a run"):
        read_config(write_workdir(tmp_path, config=config))


@pytest.mark.parametrize(
    "changes",
    [{"fvu": None}, {"cs": "high"}, {"rows": True}, {"loss": float("nan")}, {"ce_sae": float("inf")}],
)
def test_an_evaluation_lacking_a_number_is_refused(tmp_path, changes):
    (name,) = changes
    workdir = write_workdir(tmp_path, evaluation=json.dumps(EVALUATION | changes))
    with pytest.raises(InputError, match=rf"evaluation\.json is damaged \({name} is .*run python -m train.evaluate"):
        read_evaluation(workdir)


def test_spliced_losses_come_together(tmp_path):
    evaluation = {name: value for name, value in EVALUATION.items() if name != "loss_recovered"}
    with pytest.raises(InputError, match="loss_recovered is 'missing'"):
        read_evaluation(write_workdir(tmp_path, evaluation=evaluation))


def histogram(edges, counts):
    return {"active_histogram": {"edges": edges, "counts": counts}}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (histogram([0, 1], [1, 2]), "2 edges and 2 counts"),
        (histogram([0, 1, 1], [1, 2]), "do not increase"),
        (histogram([0, 1], [-1]), "counts is -1"),
        (histogram([0, float("nan")], [1]), "edges is nan"),
        ({"frequency_histogram": {"log10_edges": [0, 400], "counts": [1], "never": 0}}, "not logarithms"),
        ({"concepts": [concept(5), concept(5)]}, "one id twice"),
        ({"concepts": [concept(-5)]}, r"concepts\[0\].id is -5"),
        ({"concepts": [concept(5, frequency="often")]}, r"concepts\[0\].frequency"),
        ({"concepts": 3}, "TypeError"),
        ({"few": [context(["a"], [1.0, 2.0], 0)]}, "1 tokens and 2 values"),
        ({"few": [context(["a"], [1.0], 1)]}, r"few\[0\].peak is 1 of 1"),
        ({"many": [context(["a"], ["x"], 0)]}, r"many\[0\].values is 'x'"),
        ({"many": [context([1], [1.0], 0)]}, "not all text"),
        ({"many": [context(["a"], [1.0], 0, source=3)]}, "source is not text"),
        ({"many": [{"row": 1}]}, "KeyError: 'source'"),
    ],
)
def test_damaged_concepts_are_refused_with_the_place(tmp_path, changes, message):
    workdir = write_workdir(tmp_path, concepts=json.dumps(concepts(**changes)))
    with pytest.raises(InputError, match=rf"concepts\.json is damaged \(.*{message}.*run python -m train.evaluate"):
        read_concepts(workdir)


def test_positions_outside_the_set_have_no_value(tmp_path):
    read = read_concepts(write_workdir(tmp_path))
    assert read.few[0].values == (None, 1.0)
    assert read.few[0].peak_value == 1.0
    assert read.in_text
