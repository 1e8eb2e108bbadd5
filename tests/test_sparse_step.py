"""The sparse training step gives the numbers of the dense one: losses, gradients, statistics, on every preset."""

import dataclasses
from typing import get_args

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jax_sae
from jax_sae import Capacity, Preset, SAEConfig
from jax_sae.sae.gradients import dense_gradients, sparse_gradients

D, M, B = 16, 96, 24
PRESETS = [
    *get_args(Preset),
    "entmax-learned",
    "jumprelu-target",
    "jumprelu-dead",
    "sparsemax-negative",
    "gated-contributions",
]
OVERRIDES = {
    "entmax-learned": dict(values="probabilities", learn_alpha=True, score_scale=2.0),
    "jumprelu-target": dict(target_l0=6.0),
    "jumprelu-dead": dict(pre_activation_coefficient=0.3),
    "sparsemax-negative": dict(score_scale=0.02),
    "gated-contributions": dict(sparsity_of="contributions", sparsity_loss="tanh"),
}


def make(name, n_concepts=M, seed=0, **overrides):
    """A state with parameters that are nothing special, frequencies around the cap and some dead concepts."""
    preset = name.split("-")[0]
    k = {"k": 5} if "topk" in preset or "top_k" in preset else {}
    overrides = k | OVERRIDES.get(name, {}) | overrides
    config = SAEConfig.preset(preset, D, n_concepts, dead_after_rows=100, **overrides)
    optimizer = optax.adam(1e-3)
    state = jax_sae.init_train_state(config, optimizer, jax.random.key(seed))
    keys = iter(jax.random.split(jax.random.key(seed + 1), 100))
    model = jax.tree.map(lambda leaf: leaf + 0.1 * jax.random.normal(next(keys), leaf.shape), state.model)
    stats = dataclasses.replace(
        state.stats,
        frequency=jax.random.uniform(next(keys), (n_concepts,), maxval=0.11),
        rows_since_fired=jnp.where(jax.random.uniform(next(keys), (n_concepts,)) < 0.06, 1000, 3),
        mean=jax.random.normal(next(keys), (D,)),
        steps=jnp.int32(7),
    )
    x = jax.random.normal(next(keys), (B, D)) + 0.3
    return config, dataclasses.replace(state, model=model, stats=stats), optimizer, x


densely, sparsely = jax.jit(dense_gradients), jax.jit(sparse_gradients, static_argnames="capacity")


def both(state, x, capacity, **arguments):
    call = state.model, state.stats, x, jnp.int32(3)
    return densely(*call, **arguments), sparsely(*call, capacity=Capacity(*capacity), **arguments)


def assert_equal(dense, sparse, rtol=2e-5, floor=1e-3):
    """Up to float32 rounding, each array relative to its largest entry, or to ``floor`` where that is larger."""
    sparse = dataclasses.replace(
        sparse,
        dense=dense.dense,
        stats=dataclasses.replace(sparse.stats, capacity=dense.stats.capacity, needs=dense.stats.needs),
    )
    named, _ = jax.tree_util.tree_flatten_with_path(dense)
    for (path, expected), found in zip(named, jax.tree.leaves(sparse), strict=True):
        scale = np.abs(np.asarray(expected, np.float64)).max(initial=floor)
        name = jax.tree_util.keystr(path)
        np.testing.assert_allclose(found, expected, rtol=rtol, atol=rtol * scale, err_msg=name)


@pytest.mark.parametrize("name", PRESETS)
def test_sparse_and_dense_agree(name):
    _, state, _, x = make(name)
    dense, sparse = both(state, x, (M, M))
    assert dense.dense and not sparse.dense
    assert_equal(dense, sparse)
    assert sparse.stats.capacity.tolist() == [M, M] and sparse.stats.needs.sum() == 2


@pytest.mark.parametrize("name", ["sparsemax", "topk"])
def test_sparse_and_dense_agree_on_rounded_scores(name):
    _, state, _, x = make(name, score_dtype="bfloat16")
    dense, sparse = both(state, x, (M, M))
    assert not sparse.dense
    assert_equal(dense, sparse)
    exact, _ = both(make(name, score_dtype="float32")[1], x, (M, M))
    assert abs(float(dense.loss) / float(exact.loss) - 1) > 1e-5  # the setting does something


@pytest.mark.parametrize("name", ["sparsemax", "entmax", "topk", "batch_topk", "matryoshka_batch_topk"])
def test_sparse_and_dense_agree_where_group_maxima_bound_the_rows(name):
    """A dictionary larger than twice the number of groups, and not a multiple of it."""
    _, state, _, x = make(name, n_concepts=1100)
    dense, sparse = both(state, x, (256, 128))
    assert not sparse.dense
    assert_equal(dense, sparse)


@pytest.mark.parametrize("name", ["sparsemax", "batch_topk", "jumprelu"])
@pytest.mark.parametrize("capacity", [(2, 2), (96, 1)], ids=["row", "mean"])
def test_a_batch_that_does_not_fit_is_computed_densely(name, capacity):
    _, state, _, x = make(name)
    dense, sparse = both(state, 5 * x, capacity)
    assert sparse.dense
    assert_equal(dense, sparse)


def test_fewer_places_than_k_are_refused():
    _, state, _, x = make("topk")
    with pytest.raises(ValueError, match="2 places per row for topk with k = 5"):
        both(state, x, (2, 2))


@pytest.mark.parametrize("name", ["sparsemax", "topk", "batch_topk", "sparsemax_paper"])
@pytest.mark.parametrize("case", ["equal scores", "zero rows", "one row", "many dead"])
def test_sparse_and_dense_agree_on_adversarial_input(name, case):
    _, state, _, x = make(name)
    if case == "equal scores":  # every concept the same: ties everywhere
        model = jax.tree.map(lambda leaf: jnp.broadcast_to(leaf[:1], leaf.shape), state.model)
        state = dataclasses.replace(state, model=model)
    elif case == "zero rows":
        x = x.at[::2].set(state.stats.mean)
    elif case == "one row":
        x = x[:1]
    else:
        state = dataclasses.replace(
            state, stats=dataclasses.replace(state.stats, rows_since_fired=jnp.full(M, 1000, jnp.int32))
        )
    dense, sparse = both(state, x, (M, M))
    assert not sparse.dense
    assert_equal(dense, sparse, floor=5.0 if case == "equal scores" else 1e-3)  # gradients that cancel there


@pytest.mark.parametrize("name", ["sparsemax", "topk", "gated", "jumprelu"])
def test_one_concept(name):
    config = SAEConfig.preset(name, D, 1)
    state = jax_sae.init_train_state(config, optax.sgd(1.0), jax.random.key(0))
    dense, sparse = both(state, jax.random.normal(jax.random.key(1), (B, D)), (16, 32))
    assert_equal(dense, sparse, floor=1.0)  # gradients along the one row cancel


@pytest.mark.parametrize("name", ["sparsemax", "topk", "jumprelu"])
def test_nan_rows_and_nan_parameters_are_not_hidden(name):
    _, state, _, x = make(name)
    poisoned = dataclasses.replace(
        state, model=jax.tree.map(lambda leaf: leaf.at[(3,) * leaf.ndim].set(jnp.nan), state.model)
    )
    for case, rows in ((state, x.at[2, 3].set(jnp.nan)), (poisoned, x)):
        dense, sparse = both(case, rows, (M, M))
        assert np.isfinite(dense.loss) == np.isfinite(sparse.loss)


@pytest.mark.parametrize("name", ["sparsemax", "batch_topk", "jumprelu-target", "gated"])
def test_pmap_of_the_sparse_step_gives_the_step_of_one_device(name):
    config, state, optimizer, _ = make(name)
    x = jax.random.normal(jax.random.key(5), (64, D))
    capacity = Capacity(M, M)
    one = jax_sae.jit_train_step(config, optimizer, capacity=capacity)
    eight = jax_sae.pmap_train_step(config, optimizer, capacity=capacity)
    copy = jax.tree.map(jnp.array, state)
    (state, by_one), (mapped, by_eight) = one(state, x), eight(copy, x)
    assert by_one["dense"] == by_eight["dense"] == 0
    for key in ("loss", "fvu", "active", "grad_norm"):
        np.testing.assert_allclose(by_eight[key], by_one[key], rtol=2e-5, err_msg=key)
    for a, b in zip(jax.tree.leaves(mapped.model), jax.tree.leaves(state.model), strict=True):
        np.testing.assert_allclose(a, b, atol=5e-5)


def test_a_row_that_does_not_fit_on_one_device_makes_all_of_them_compute_densely():
    """Branches hold collectives, and the counts of what was needed are the same everywhere."""
    config, state, optimizer, _ = make("sparsemax")
    x = jax.random.normal(jax.random.key(5), (64, D))
    x = x[jnp.argsort(state.model.find_places(x, state.stats, M).count)]
    fullest = int(state.model.find_places(x[-1:], state.stats, M).count[0])
    assert int(state.model.find_places(x[-9:-8], state.stats, M).count[0]) < fullest  # on the last device alone
    capacity = Capacity(fullest - 1, M)
    one = jax_sae.jit_train_step(config, optimizer, capacity=capacity)
    eight = jax_sae.pmap_train_step(config, optimizer, capacity=capacity)
    copy = jax.tree.map(jnp.array, state)
    (state, by_one), (mapped, by_eight) = one(state, x), eight(copy, x)
    assert by_one["dense"] == by_eight["dense"] == 1
    np.testing.assert_array_equal(mapped.stats.needs[0], state.stats.needs[0])
    for a, b in zip(jax.tree.leaves(mapped.model), jax.tree.leaves(state.model), strict=True):
        np.testing.assert_allclose(a, b, atol=5e-5)
