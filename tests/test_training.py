"""The training step: the same numbers however it is spread, and the update the definition gives."""

import contextlib
import functools
from typing import get_args

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

import jax_sae
from jax_sae import Preset, SAEConfig

D, M, B, STEPS = 16, 64, 32, 20
# What a name stands for: a preset, or one with settings of its own.
EXTRA = {
    "learned alpha": ("sparsemax_paper", dict(activation="entmax", learn_alpha=True)),
    "jumprelu with a target": (
        "jumprelu",
        dict(target_l0=8.0, bandwidth=1.0, threshold_init=0.5, pre_activation_coefficient=0.1, dead_after_rows=64),
    ),
}
NAMES = [*get_args(Preset), *EXTRA]


@functools.cache
def setup(name):
    preset, overrides = EXTRA.get(name, (name, dict(dead_after_rows=64, k=4) if "topk" in name else {}))
    config = SAEConfig.preset(preset, D, M, **overrides)
    optimizer = jax_sae.make_optimizer(3e-3, total_steps=STEPS, warmup_steps=5, clip_norm=1.0)
    mixing = np.random.default_rng(0).normal(size=(24, D))
    codes = np.maximum(np.random.default_rng(1).normal(size=(STEPS, B, 24)) - 1, 0)
    noise = 0.1 * np.random.default_rng(2).normal(size=(STEPS, B, D))
    return config, optimizer, (codes @ mixing + noise + 0.3).astype(np.float32)


def fresh(config, optimizer):
    return jax_sae.init_train_state(config, optimizer, jax.random.key(0))


def run(step, state, batches):
    history = []
    for batch in batches:
        state, metrics = step(state, batch)
        history.append(jax.device_get(metrics))
    return state, history


@functools.cache
def on_one_device(name):
    config, optimizer, batches = setup(name)
    return run(jax_sae.jit_train_step(config, optimizer), fresh(config, optimizer), batches)


def assert_same_run(actual, expected):
    (state, history), (expected_state, expected_history) = actual, expected
    for got, want in zip(history, expected_history, strict=True):
        assert got.keys() == want.keys()
        for name in want:
            np.testing.assert_allclose(got[name], want[name], rtol=2e-4, atol=2e-6, err_msg=name)
    for got, want in zip(jax.tree.leaves(state), jax.tree.leaves(expected_state), strict=True):
        np.testing.assert_allclose(got, want, rtol=2e-3, atol=2e-4)


@pytest.mark.parametrize("name", NAMES)
def test_pmap_on_eight_devices_equals_jit_on_one(name):
    config, optimizer, batches = setup(name)
    step = jax_sae.pmap_train_step(config, optimizer)
    assert_same_run(run(step, fresh(config, optimizer), batches), on_one_device(name))


@pytest.mark.parametrize("name", NAMES)
def test_a_mesh_over_rows_and_concepts_equals_jit_on_one(name):
    config, optimizer, batches = setup(name)
    mesh = jax.make_mesh((2, 4), ("data", "model"), axis_types=(AxisType.Auto,) * 2)
    state = fresh(config, optimizer)
    state = jax.device_put(state, jax_sae.state_shardings(state, mesh))
    actual = run(jax_sae.mesh_train_step(config, optimizer, mesh), state, batches)
    assert_same_run(actual, on_one_device(name))
    over_concepts = ("concepts", "W_dec", "b_enc", "b_gate", "r_mag", "b_mag", "threshold")
    for parameter, value in vars(actual[0].model).items():
        if parameter in over_concepts:
            assert value[...].sharding.spec[0] == "model", f"{parameter} stays sharded"


@pytest.mark.parametrize(("name", "set_mesh"), [("sparsemax", True), ("topk", False), ("batch_topk", True)])
def test_explicit_axes_of_a_mesh_are_left_to_xla_too(name, set_mesh):
    """As ``jax.make_mesh`` makes them; rows long enough to be selected from by way of maxima."""
    _, optimizer, batches = setup("topk")
    config = SAEConfig.preset(name, D, 2048)
    mesh = jax.make_mesh((2, 4), ("data", "model"), axis_types=(AxisType.Explicit,) * 2)
    expected = run(jax_sae.jit_train_step(config, optimizer), fresh(config, optimizer), batches[:3])
    state = fresh(config, optimizer)
    state = jax.device_put(state, jax_sae.state_shardings(state, mesh))
    placed = [jax.device_put(batch, NamedSharding(mesh, PartitionSpec("data"))) for batch in batches[:3]]
    with jax.set_mesh(mesh) if set_mesh else contextlib.nullcontext():
        actual = run(jax_sae.mesh_train_step(config, optimizer, mesh), state, placed)
    assert_same_run(actual, expected)


@pytest.mark.parametrize("name", ["sparsemax", "batch_topk", "matryoshka_batch_topk", "gated", "jumprelu", *EXTRA])
def test_pmap_gradients_are_those_of_one_device(name):
    """With plain gradient descent the update is the gradient, so no optimizer hides a wrong scale."""
    config, _, batches = setup(name)
    optimizer = optax.sgd(1.0)
    one, _ = jax_sae.jit_train_step(config, optimizer)(fresh(config, optimizer), batches[0])
    eight, _ = jax_sae.pmap_train_step(config, optimizer)(fresh(config, optimizer), batches[0])
    start = jax.tree.leaves(fresh(config, optimizer).model)
    for a, b, before in zip(jax.tree.leaves(one.model), jax.tree.leaves(eight.model), start, strict=True):
        moved = np.asarray(a) - np.asarray(before)
        assert np.abs(moved).max() > 0
        np.testing.assert_allclose(np.asarray(b) - np.asarray(before), moved, atol=1e-5 * np.abs(moved).max() + 1e-6)


@pytest.mark.parametrize("capacity", [None, jax_sae.Capacity(64, 64)])
@pytest.mark.parametrize("name", NAMES)
def test_a_step_is_compiled_once_since_it_gives_a_state_like_the_one_it_takes(name, capacity):
    config, optimizer, batches = setup(name)
    state = jax.eval_shape(functools.partial(fresh, config, optimizer))
    step = functools.partial(jax_sae.train_step, config, optimizer, capacity=capacity)
    after, _ = jax.eval_shape(step, state, batches[0])
    kinds = lambda state: [(leaf.shape, leaf.dtype, leaf.weak_type) for leaf in jax.tree.leaves(state)]
    assert kinds(after) == kinds(state)


@pytest.mark.parametrize("wrap", ["jit", "pmap"])
def test_several_steps_per_call_are_those_steps(wrap):
    config, optimizer, batches = setup("sparsemax")
    make = {"jit": jax_sae.jit_train_step, "pmap": jax_sae.pmap_train_step}[wrap]
    step = make(config, optimizer, steps_per_call=5)
    state, history = run(step, fresh(config, optimizer), batches.reshape(4, 5, B, D))
    flat = [{k: v[i] for k, v in metrics.items()} for metrics in history for i in range(5)]
    assert_same_run((state, flat), on_one_device("sparsemax"))


def test_pmap_names_a_batch_that_cannot_be_split():
    config, optimizer, batches = setup("sparsemax")
    with pytest.raises(ValueError, match="batch has 30 rows; expected a multiple of the 8 local devices"):
        jax_sae.pmap_train_step(config, optimizer)(fresh(config, optimizer), batches[0, :30])


@pytest.mark.parametrize("name", NAMES)
def test_training_lowers_the_loss_and_counts_steps(name):
    config, optimizer, batches = setup(name)
    state, _ = on_one_device(name)
    assert state.step == STEPS and state.stats.steps == STEPS
    start = fresh(config, optimizer)
    loss = jax.jit(lambda s, x: jax_sae.eval_step(config, s.model, s.stats, x)["loss"])
    before, after = (float(sum(loss(s, x) for x in batches)) for s in (start, state))
    assert after < 0.97 * before


def test_unit_norm_decoder_stays_on_the_sphere_and_drops_the_parallel_gradient():
    config, _, batches = setup("topk")
    optimizer = optax.sgd(0.1)
    before = fresh(config, optimizer)
    rows = np.asarray(before.model.W_dec[...], np.float64)
    loss = lambda model: jax_sae.sae_loss(model, before.stats, batches[0], 0)[0]
    gradients = jax.grad(loss)(before.model)
    grad = np.asarray(gradients.W_dec[...], np.float64)
    tangent = grad - rows * (rows * grad).sum(-1, keepdims=True)
    expected = rows - 0.1 * tangent
    expected /= np.linalg.norm(expected, axis=-1, keepdims=True)
    whole = np.sqrt(sum(np.sum(np.asarray(leaf, np.float64) ** 2) for leaf in jax.tree.leaves(gradients)))
    assert np.sum((grad - tangent) ** 2) > 1e-4 * whole**2  # there is a parallel part, and grad_norm counts it
    after, metrics = jax_sae.jit_train_step(config, optimizer)(before, batches[0])
    np.testing.assert_allclose(after.model.W_dec[...], expected, atol=2e-6)
    assert float(metrics["grad_norm"]) == pytest.approx(whole, rel=1e-6)


def test_row_weights_reach_the_loss():
    config, optimizer, batches = setup("sparsemax")
    step = jax.jit(
        lambda state, batch, weights: jax_sae.train_step(config, optimizer, state, batch, row_weights=weights)
    )
    state, batch = fresh(config, optimizer), batches[0]
    first_half = (np.arange(B) < B // 2).astype(np.float32)
    losses = [float(step(state, batch, weights)[1]["loss"]) for weights in (first_half, 1 - first_half, np.ones(B))]
    assert losses[0] + losses[1] == pytest.approx(losses[2], rel=1e-6) and abs(losses[0] - losses[1]) > 1e-3
    (_, whole), (_, of_half) = step(state, batch[: B // 2].repeat(2, 0), np.ones(B)), step(state, batch, first_half)
    assert float(of_half["grad_norm"]) == pytest.approx(float(whole["grad_norm"]) / 2, rel=1e-4)


def test_the_state_is_donated():
    config, optimizer, batches = setup("sparsemax")
    state = fresh(config, optimizer)
    jax_sae.jit_train_step(config, optimizer)(state, batches[0])
    assert state.model.concepts[...].is_deleted()


def test_evaluation_changes_nothing_and_does_not_depend_on_call_order():
    state, _ = on_one_device("sparsemax")
    config, _, batches = setup("sparsemax")
    before = jax.device_get(state.stats)
    first = [jax_sae.eval_step(config, state.model, state.stats, b) for b in batches[:3]]
    second = [jax_sae.eval_step(config, state.model, state.stats, b) for b in batches[:3][::-1]][::-1]
    assert jax.tree.all(jax.tree.map(lambda a, b: bool((a == b).all()), first, second))
    assert jax.tree.all(jax.tree.map(lambda a, b: bool((a == b).all()), before, jax.device_get(state.stats)))


def test_metrics_are_what_they_say():
    config, optimizer, batches = setup("relu")
    state = fresh(config, optimizer)
    x = batches[0].astype(np.float64)
    out = state.model(batches[0], state.stats)
    error = x - np.asarray(out.x_hat, np.float64)
    active = (np.asarray(out.activations) != 0).sum(-1).mean()
    _, metrics = jax_sae.train_step(config, optimizer, state, jnp.asarray(batches[0]))
    assert float(metrics["fvu"]) == pytest.approx((error.var(-1, ddof=1) / x.var(-1, ddof=1)).mean(), rel=1e-5)
    assert float(metrics["active"]) == pytest.approx(active, rel=1e-6)
    assert float(metrics["l0"]) == pytest.approx(1 - active / M, rel=1e-6)
    terms = float(metrics["loss_reconstruction"] + metrics["loss_sparsity"])
    assert float(metrics["loss"]) == pytest.approx(terms, rel=1e-6)


def test_the_schedule_rises_stays_and_falls_to_zero():
    schedule = jax_sae.learning_rate_schedule(2.0, total_steps=100, warmup_steps=10, decay_fraction=0.25)
    values = [float(schedule(jnp.int32(s))) for s in (0, 4, 9, 50, 75, 99, 100)]
    np.testing.assert_allclose(values, [0.2, 1.0, 2.0, 2.0, 2.0, 0.08, 0.0], rtol=1e-6)
    flat = jax_sae.learning_rate_schedule(2.0, total_steps=100, warmup_steps=0, decay_fraction=0.0)
    assert [float(flat(jnp.int32(s))) for s in (0, 99)] == [2.0, 2.0]
