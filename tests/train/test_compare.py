"""The compare command: its members and their names, matched k, what it writes, and what it refuses."""

import dataclasses
import json

import numpy as np
import pytest

from jax_sae import InputError, SAEConfig
from tests.train.application import call, make_rows
from train import compare as module
from train.compare import CompareConfig, compare, matched_k
from train.members import members, parse_vary
from train.run import load_run, open_data

SMALL = CompareConfig(
    presets=("sparsemax", "topk"),
    k=(4,),
    steps=20,
    batch_size=32,
    n_concepts=64,
    checkpoint_every=10,
    log_every=10,
    warmup_steps=5,
)


def config(rows_file, workdir, **changes):
    return dataclasses.replace(SMALL, data=rows_file, workdir=workdir, **changes)


def names(rows_file, **changes):
    chosen = config(rows_file, rows_file.parent / "never", **changes)
    return [member.name for member in members(chosen.base, chosen.grid, open_data(rows_file, holdout=0.05))]


@pytest.fixture(scope="module")
def compared(rows_file, tmp_path_factory):
    """The flags of a finished comparison of sparsemax with TopK at the k that sparsemax came to."""
    workdir = tmp_path_factory.mktemp("runs") / "compare"
    chosen = config(rows_file, workdir, k=())
    assert compare(chosen) == workdir / "report.html"
    return chosen


def test_every_member_is_a_run_with_its_own_configuration_and_evaluation(compared):
    active = json.loads((compared.workdir / "sparsemax" / "evaluation.json").read_text())["active"]
    matched = f"topk-k{max(1, round(active))}"
    folders = {path.name for path in compared.workdir.iterdir() if path.is_dir()}
    assert folders == {"sparsemax", matched}
    for name in folders:
        assert load_run(compared.workdir / name).step == 20
        assert (compared.workdir / name / "report.html").exists()
    run = load_run(compared.workdir / matched)
    assert matched == f"topk-k{run.sae.k}" == f"topk-k{run.state.stats.k}"


def test_the_comparison_has_a_row_for_every_member(compared):
    written = json.loads((compared.workdir / "comparison.json").read_text())
    assert len(written["runs"]) == 2
    assert written["described"]["steps"] == 20 and written["described"]["n_concepts"] == 64
    assert list(written["described"]["matched_k"]) == ["sparsemax"]
    assert (compared.workdir / "comparison.md").read_text().count("topk") >= 1


def test_the_same_command_again_trains_and_evaluates_nothing(compared, monkeypatch, capsys):
    monkeypatch.setattr(module, "evaluate", None)
    before = {path: path.stat().st_mtime_ns for path in compared.workdir.glob("*/checkpoints/*")}
    compare(compared)
    assert before == {path: path.stat().st_mtime_ns for path in compared.workdir.glob("*/checkpoints/*")}
    assert (compared.workdir / "comparison.md").read_text() in capsys.readouterr().out


@pytest.mark.parametrize("changed", [dict(sequences=1), dict(concept_rows=10)])
def test_other_settings_of_the_evaluation_evaluate_again_and_train_nothing(compared, monkeypatch, changed):
    asked = []
    monkeypatch.setattr(module, "evaluate", lambda settings: asked.append(settings))
    before = {path: path.stat().st_mtime_ns for path in compared.workdir.glob("*/checkpoints/*")}
    compare(dataclasses.replace(compared, **changed))
    assert before == {path: path.stat().st_mtime_ns for path in compared.workdir.glob("*/checkpoints/*")}
    assert [len(settings.workdirs) for settings in asked] == [1, 1]
    assert all(vars(settings).items() >= changed.items() for settings in asked)


def test_a_workdir_of_another_comparison_is_refused_naming_the_fields(compared, rows_file, tmp_path):
    files = sorted(compared.workdir.rglob("*"))
    with pytest.raises(InputError, match=r"sparsemax holds a run with another configuration \(.*warmup_steps: 5 -> 6"):
        compare(dataclasses.replace(compared, warmup_steps=6, presets=("relu", "sparsemax")))
    assert sorted(compared.workdir.rglob("*")) == files, "nothing is written for relu either"


def test_members_are_named_by_their_preset_and_what_is_swept(rows_file):
    assert names(rows_file, presets=("relu", "batch_topk"), k=(4, 8)) == ["relu", "batch_topk-k4", "batch_topk-k8"]
    assert names(rows_file, presets=("relu",), seeds=(3, 4)) == ["relu-seed3", "relu-seed4"]
    assert names(rows_file, presets=("relu",), learning_rates=(1e-3,)) == ["relu"]
    swept = names(rows_file, presets=("sparsemax",), learning_rates=(2e-3, 1e-5), vary=("frequency_cap=0.1,none",))
    assert swept == [
        "sparsemax-lr0.002-frequency_cap0.1",
        "sparsemax-lr1e-05-frequency_cap0.1",
        "sparsemax-lr0.002-frequency_capnone",
        "sparsemax-lr1e-05-frequency_capnone",
    ]
    groups = names(rows_file, presets=("relu",), vary=("group_fractions=0.5:0.5,1",))
    assert groups == ["relu-group_fractions0.5_0.5", "relu-group_fractions1"]
    assert names(rows_file, presets=("relu",), k=(4, 8), vary=("activation=relu,topk",)) == [
        "relu-activationrelu",
        "relu-k4-activationtopk",
        "relu-k8-activationtopk",
    ]


def test_members_have_the_settings_they_are_named_by(rows_file, tmp_path):
    chosen = config(
        rows_file, tmp_path, seeds=(5, 6), learning_rates=(2e-3,), vary=("frequency_cap=none", "n_concepts=32")
    )
    found = members(chosen.base, chosen.grid, open_data(rows_file, holdout=0.05))
    for member, seed in zip(found, (5, 6, 5, 6), strict=True):
        run = member.resolved.train
        assert (run.seed, run.data_seed, run.learning_rate, run.n_concepts) == (seed, 5, 2e-3, 32)
        assert run.workdir == tmp_path / member.name
        assert member.sae.frequency_cap is None and member.sae.n_concepts == 32
    assert found[2].sae.k == 4 and found[0].system == found[1].system == "sparsemax"


def test_each_preset_has_its_own_learning_rate_by_default(rows_file, tmp_path):
    from train.config import LEARNING_RATES

    chosen = config(rows_file, tmp_path)
    found = members(chosen.base, chosen.grid, open_data(rows_file, holdout=0.05))
    rates = [member.resolved.train.learning_rate for member in found]
    assert rates == [LEARNING_RATES["sparsemax"], LEARNING_RATES["topk"]]


def test_values_to_vary_have_the_type_of_their_field():
    parsed = parse_vary(["alpha=1.25,2", "aux_k=3", "unit_norm_decoder=true,False", "target_l0=none,8", "loss=mse"])
    values = {name: [setting.value for setting in settings] for name, settings in parsed.items()}
    assert values == {
        "alpha": [1.25, 2.0],
        "aux_k": [3],
        "unit_norm_decoder": [True, False],
        "target_l0": [None, 8.0],
        "loss": ["mse"],
    }
    assert parse_vary(["group_fractions=0.25:0.75"])["group_fractions"][0].value == (0.25, 0.75)


def test_every_field_that_may_be_varied_can_be_parsed():
    defaults = SAEConfig(d_in=16, n_concepts=64)
    for field in dataclasses.fields(SAEConfig):
        value = getattr(defaults, field.name)
        text = ":".join(map(str, value)) if isinstance(value, tuple) else str(value)
        if field.name not in ("d_in", "k") and text:
            assert parse_vary([f"{field.name}={text}"])[field.name][0].value == value


@pytest.mark.parametrize(
    ("token", "message"),
    [
        ("alpha", "--vary has 'alpha'; expected FIELD=VALUE,VALUE"),
        ("alpha=", "--vary has 'alpha='; expected FIELD=VALUE,VALUE"),
        ("temperature=1", "--vary temperature: SAEConfig has no such field; expected one of d_in, n_concepts"),
        ("d_in=8", "--vary d_in cannot be: it is the width of the data"),
        ("k=8", "--vary k cannot be: give --k"),
        ("alpha=big", "--vary alpha has 'big'; expected a number"),
        ("aux_k=1.5", "--vary aux_k has '1.5'; expected an integer"),
        ("aux_k=none", "--vary aux_k has 'none'; expected an integer"),
        ("frequency_cap=x", "--vary frequency_cap has 'x'; expected a number or none"),
        ("unit_norm_decoder=1", "--vary unit_norm_decoder has '1'; expected true or false"),
        ("loss=huber", "--vary loss has 'huber'; expected squared_error, mse, mse_over_norm"),
        ("group_fractions=a:b", "--vary group_fractions has 'a:b'; expected numbers joined by ':'"),
    ],
)
def test_what_cannot_be_varied_is_named(token, message):
    with pytest.raises(InputError, match=message):
        parse_vary([token])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(presets=()), "--presets is empty; expected at least one"),
        (dict(seeds=()), "--seeds is empty; expected at least one"),
        (dict(presets=("topk",), k=()), "--k is empty and --presets has none but those that need it"),
        (dict(presets=("relu", "relu")), "--presets has relu more than once"),
        (dict(seeds=(0, 1, 0)), "--seeds has 0 more than once"),
        (dict(k=(4, 4)), "--k has 4 more than once"),
        (dict(learning_rates=(1e-3, 0.001)), "--learning-rates has 0.001 more than once"),
        (dict(vary=("alpha=2,2.0",)), "--vary alpha has 2.0 more than once"),
        (dict(vary=("alpha=2", "alpha=1.5")), "--vary alpha is given twice"),
        (dict(seeds=(-1,)), "--seeds has -1; expected at least 0"),
        (dict(learning_rates=(0.0,)), "--learning-rates has 0.0; expected positive numbers"),
        (dict(k=(65,)), "topk-k65: k is 65 with 64 concepts; expected 1 <= k <= n_concepts"),
        (dict(k=(0,)), "topk-k0: k is 0 with 64 concepts"),
        (dict(vary=("n_concepts=64,0",)), "n_concepts is 0; expected at least 1 concept"),
        (dict(vary=("unit_norm_decoder=true",)), "sparsemax: unit_norm_decoder is set for an attention encoder"),
        (dict(batch_size=4096), r"--batch-size is 4096 but .* has 1140 training rows"),
        (dict(steps=0), "--steps is 0; expected at least 1"),
        (dict(sequences=-1), "--sequences is -1; expected at least 0"),
        (dict(concept_rows=0), "--concept-rows is 0; expected at least 1"),
        (dict(holdout=0.0), "holds out no rows to compare on; give --holdout above 0"),
    ],
)
def test_flags_that_do_not_fit_are_named_and_nothing_is_written(rows_file, tmp_path, changes, message):
    with pytest.raises(InputError, match=message):
        compare(config(rows_file, tmp_path / "compare", **changes))
    assert not (tmp_path / "compare").exists()


def test_a_workdir_that_is_a_file_is_named(rows_file, tmp_path):
    (tmp_path / "compare").write_text("not a folder")
    with pytest.raises(InputError, match="cannot write to the folder .*compare"):
        compare(config(rows_file, tmp_path / "compare"))


def test_rows_with_nan_are_refused_before_any_member_has_a_folder(tmp_path):
    rows = make_rows()
    rows[3] = np.nan
    np.save(tmp_path / "rows.npy", rows)
    with pytest.raises(InputError, match=r"1 rows with NaN or inf .*--drop-non-finite"):
        compare(config(tmp_path / "rows.npy", tmp_path / "compare"))
    assert {path.name for path in (tmp_path / "compare").iterdir()} == {"survey.json"}


def test_k_is_matched_to_the_mean_over_seeds_of_each_system(rows_file, tmp_path):
    chosen = config(rows_file, tmp_path, presets=("sparsemax", "entmax", "relu"), seeds=(0, 1))
    found = members(chosen.base, chosen.grid, open_data(rows_file, holdout=0.05))
    active = {
        "sparsemax-seed0": 20.9,
        "sparsemax-seed1": 22.3,
        "entmax-seed0": 0.1,
        "relu-seed0": 9.0,
        "relu-seed1": 9.0,
    }
    for member in found:
        (tmp_path / member.name).mkdir()
        if member.name in active:
            (tmp_path / member.name / "evaluation.json").write_text(json.dumps({"active": active[member.name]}))
        else:
            (tmp_path / member.name / "failed.json").write_text(json.dumps({"step": 3, "reason": "diverged"}))
    assert matched_k(found) == {"sparsemax": 22, "entmax": 1}


def test_a_matched_k_that_was_given_too_is_not_trained_again(rows_file, tmp_path):
    activations = open_data(rows_file, holdout=0.05)
    matched = {"sparsemax": 9, "entmax": 6, "mlp_sparsemax": 4}
    chosen = config(rows_file, tmp_path, presets=("sparsemax", "topk", "batch_topk"), k=(4, 8))
    again = module._matching(chosen, matched, activations)
    assert [member.name for member in again] == ["topk-k6", "topk-k9", "batch_topk-k6", "batch_topk-k9"]
    assert module._matching(chosen, {"sparsemax": 8}, activations) == []
    assert module._matching(chosen, {}, activations) == []


def test_a_signal_ends_the_comparison_before_it_evaluates(rows_file, tmp_path, monkeypatch):
    monkeypatch.setattr(module, "train_together", lambda *arguments: False)
    monkeypatch.setattr(module, "evaluate", None)
    assert compare(config(rows_file, tmp_path / "compare")) is None


@pytest.mark.slow
@pytest.mark.parametrize(
    ("flags", "found"), [(["--presets"], "--presets is empty"), (["--vary", "alfa=1"], "--vary alfa")]
)
def test_the_command_line_prints_one_line_and_exits_with_2(rows_file, tmp_path, flags, found):
    refused = call("train.compare", "--data", rows_file, "--workdir", tmp_path / "compare", *flags)
    assert refused.returncode == 2
    assert refused.stderr.startswith("error: ") and refused.stderr.count("\n") == 1
    assert found in refused.stderr and not (tmp_path / "compare").exists()
