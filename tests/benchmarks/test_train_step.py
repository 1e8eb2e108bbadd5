"""The step benchmark's arithmetic, and what it holds its candidates to."""

import json
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from benchmarks import torch_steps, train_step
from benchmarks.shapes import SHAPES, Shape
from jax_sae import SAEConfig, init_train_state, jit_train_step, sparsemax_threshold

TINY = SHAPES["tiny"]
PUBLISHED = dict(loss="mse_over_norm", loss_scale=10.0, attention_init="kaiming_uniform", projection_rate=1.0)


def test_the_limit_is_one_product_and_one_pass_of_adam():
    seconds = train_step.limit_seconds(Shape(2, 3, 5), 10, matmul=4.0, copy=7.0)
    assert seconds == 2 * 2 * 3 * 5 / 4.0 + 28 * 10 / 7.0


@pytest.mark.parametrize(
    ("case", "expected"), [("sparsemax", 192 * 16 + 2 * 16 * 16), ("topk", 2 * 192 * 16 + 192 + 16)]
)
def test_parameters_are_counted_without_making_them(case, expected):
    assert train_step.parameter_count(train_step.config_of(case, TINY)) == expected


def test_memory_counts_a_donated_state_once():
    sizes = dict(argument=5e6, output=4e6, temp=2e6, alias=3e6)
    found = train_step.memory_of(SimpleNamespace(**{f"{name}_size_in_bytes": size for name, size in sizes.items()}))
    assert found == {"arguments MB": 5, "temporaries MB": 2, "at once MB": 8}


def test_a_candidate_with_another_loss_is_named():
    with pytest.raises(AssertionError, match="halved"):
        train_step.verify({train_step.DENSE: lambda: jnp.float32(2.0), "halved": lambda: 1.0})


def test_the_small_support_is_the_smaller_one():
    rows = jax.random.normal(jax.random.key(1), (TINY.rows, TINY.d))
    of_case = {case: train_step.support_of(train_step.config_of(case, TINY), rows) for case in train_step.CASES}
    assert of_case["sparsemax"] > 1.5 * of_case["sparsemax_small"]
    assert of_case["topk"] == 32


def test_steps_go_on_from_the_state_of_the_last_through_the_batches_in_turn():
    seen: list = []
    go = train_step.stepping(lambda state, batch: (state + batch, {"loss": state}), jnp.int32(1), [10, 100], seen)
    assert [int(go()) for _ in range(4)] == [1, 11, 111, 121]
    assert [int(metrics["loss"]) for metrics in seen] == [1, 11, 111, 121]


@pytest.mark.parametrize("case", ["sparsemax_small", "topk"])
def test_the_command_prints_and_writes_times_limits_compilation_and_memory(case, tmp_path, monkeypatch, capsys):
    rates = {"copy B/s": 1e9, train_step.matmul_name(TINY): 1e9}
    monkeypatch.setattr(train_step, "rates_at", lambda shapes: rates)
    train_step.main(cases=(case,), shapes=("tiny",), rounds=1, peers=False, json=tmp_path)
    (path,) = tmp_path.rglob("train_step.json")
    content = json.loads(path.read_text())
    ours, dense = content["tables"][0]["rows"]
    assert (ours["name"], dense["name"]) == (train_step.OURS, train_step.DENSE)
    assert dense["ratio"] == pytest.approx(dense["median"] / ours["median"])
    parameters = train_step.parameter_count(train_step.config_of(case, TINY))
    limit = train_step.limit_seconds(TINY, parameters, matmul=1e9, copy=1e9)
    assert ours["limit_fraction"] == pytest.approx(limit / ours["median"])
    assert ours["items_per_second"] == pytest.approx(8 / ours["median"])
    assert content["rates"] == rates
    for compilation in content["figures"][0]["rows"]:
        assert compilation["at once MB"] >= compilation["arguments MB"] >= 3 * 4e-6 * parameters
        assert compilation["compile s"] > 0
    printed = capsys.readouterr().out
    assert "matmul [8, 16] @ [16, 192]: 1.0 GFLOP/s" in printed
    assert "at once MB" in printed


def test_sparse_steps_that_did_not_fit_are_told(monkeypatch, capsys):
    rates = {"copy B/s": 1e9, train_step.matmul_name(TINY): 1e9}
    monkeypatch.setattr(train_step, "settled_capacity", lambda config, batches: 1)
    train_step.step_table("sparsemax", "tiny", TINY, rounds=1, peers=False, rates=rates)
    steps = 1 + train_step.WARMUP + 1
    assert f"{steps} of {steps} sparse steps did not fit and were computed densely" in capsys.readouterr().out


@pytest.mark.parametrize("materialise", [True, False])
@pytest.mark.parametrize("rows", [8, 64])  # with 8, a concept that fires once is above the cap of 0.1 in the next step
def test_the_papers_equations_in_torch_train_as_ours_do(materialise, rows):
    torch = pytest.importorskip("torch")
    config = SAEConfig.preset("sparsemax", TINY.d, TINY.concepts, **PUBLISHED)
    optimizer = optax.adam(1e-2)
    state = init_train_state(config, optimizer, jax.random.key(0))
    theirs = torch_steps.paper_step(parameters(state), 1e-2, materialise=materialise)
    ours, losses = jit_train_step(config, optimizer), []
    for batch in jax.random.normal(jax.random.key(1), (5, rows, TINY.d)):
        state, metrics = ours(state, batch)
        losses.append((float(metrics["loss"]), theirs(torch.tensor(np.asarray(batch)))))
    expected, found = np.array(losses).T
    np.testing.assert_allclose(found, expected, rtol=2e-5)
    assert np.ptp(expected) > 1e-2 * expected[0]  # the parameters moved


def parameters(state):
    return {name: np.array(getattr(state.model, name)[...]) for name in ("concepts", "W_K", "W_V")}


def test_the_threshold_in_torch_is_ours():
    torch = pytest.importorskip("torch")
    z = np.array(jax.random.normal(jax.random.key(0), (5, 50)))
    expected, _ = sparsemax_threshold(jnp.array(z))
    np.testing.assert_allclose(torch_steps.sparsemax_threshold(torch.tensor(z))[:, 0], expected, rtol=1e-6)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # of the peers' own
@pytest.mark.parametrize("case", list(train_step.CASES))
def test_every_peer_that_is_installed_has_our_first_loss(case):
    pytest.importorskip("torch")
    config, batches = train_step.config_of(case, TINY), train_step.batches_of(TINY)
    ours, _ = train_step.our_candidates(config, batches, [])
    peers = train_step.peer_candidates(config, batches)
    assert case == "topk" or len(peers) == 2
    train_step.verify(ours | peers)
