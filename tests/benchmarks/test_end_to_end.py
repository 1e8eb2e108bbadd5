"""What the benchmark of whole runs counts as time, and that its runs run."""

import importlib
import json

import pytest

from benchmarks import end_to_end
from benchmarks.end_to_end import Plan, Requests, Timing
from benchmarks.loader import write_set
from benchmarks.shapes import SHAPES
from benchmarks.train_step import matmul_name
from jax_sae import SAEConfig

TINY = SHAPES["tiny"]


@pytest.fixture
def plan(tmp_path):
    sae = SAEConfig.preset("topk", TINY.d, TINY.concepts, k=8)
    activations = write_set(tmp_path / "set", 64, TINY.d, "float32")
    return Plan(sae, activations, batch_size=8, steps=6, checkpoint_every=2)


def test_time_goes_from_the_request_after_the_first_checkpoint_to_the_last_steps_end(plan):
    asked = [10.0, 20, 31, 43, 56, 70]
    assert end_to_end.timing_of(plan, asked, began=1, returned=90) == Timing(90 - 31, 89)
    assert end_to_end.timing_of(plan, [*asked, 85.0], began=1, returned=90) == Timing(85 - 31, 89)


def test_requests_are_noted_up_to_the_one_that_finds_nothing(monkeypatch):
    clock = iter(range(100))
    monkeypatch.setattr(end_to_end.time, "perf_counter", lambda: next(clock))
    requests = Requests("ab")
    assert list(requests) == ["a", "b"]
    assert requests.seconds == [0, 1, 2]


def test_seconds_are_per_step_that_counts(plan):
    candidates = {"run": lambda plan, folder: Timing(8.0, 20.0)}
    per_step, whole = end_to_end.sample(plan, candidates, rounds=2)
    assert per_step == {"run": (2.0, 2.0)}
    assert whole == {"run": (20.0, 20.0)}


def test_every_candidate_gets_the_same_batches(plan):
    first, again = list(plan.batches()), list(plan.batches())
    assert [batch.shape for batch in first] == [(8, TINY.d)] * 6
    assert all((a == b).all() for a, b in zip(first, again, strict=True))


@pytest.mark.slow
def test_the_command_prints_and_writes_rates_and_the_loops_share(tmp_path, monkeypatch, capsys):
    rates = {"copy B/s": 1e9, matmul_name(TINY): 1e9}
    monkeypatch.setattr(end_to_end, "rates_at", lambda shapes: rates)
    end_to_end.main(shape="tiny", k=8, steps=4, checkpoint_every=2, peers=False, json=tmp_path)
    (path,) = tmp_path.rglob("end_to_end.json")
    content = json.loads(path.read_text())
    bare, ours = content["tables"][0]["rows"]
    (share,) = content["figures"][0]["rows"]
    assert (bare["name"], ours["name"], share["run"]) == (end_to_end.BARE, end_to_end.OURS, end_to_end.OURS)
    assert bare["items_per_second"] * bare["median"] == pytest.approx(8)
    assert share["of the rate of our step alone %"] == pytest.approx(100 * bare["median"] / ours["median"])
    assert share["whole call rows/s"] * share["whole call s"] == pytest.approx(4 * 8)
    assert share["whole call s"] > 2 * ours["median"]
    assert "python -m train" in capsys.readouterr().out


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # of the peers' own
@pytest.mark.parametrize(
    ("package", "run", "checkpoints"),
    [
        ("sae_lens", end_to_end.saelens_run, "*/trainer_state.pt"),
        ("dictionary_learning", end_to_end.dictionary_learning_run, "trainer_0/checkpoints/ae_*.pt"),
    ],
)
def test_peers_train_and_save_within_the_time_that_counts(package, run, checkpoints, plan, tmp_path):
    pytest.importorskip("torch")
    if importlib.util.find_spec(package) is None:
        pytest.skip(f"{package} is not installed")
    timing = run(plan, tmp_path / "run")
    assert 0 < timing.timed < timing.whole
    assert len(list((tmp_path / "run").glob(checkpoints))) == 2
