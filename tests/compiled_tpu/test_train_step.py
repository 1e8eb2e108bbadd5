"""The training step and its sparse gradients through the real TPU compiler."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

import jax_sae
from benchmarks.tpu_compiler import compile_for, devices
from jax_sae.ops import bottleneck, find_places, sparsemax_threshold
from jax_sae.ops.rows import plan_blocks

D, M, B = 768, 49152, 1024  # the paper's
THRESHOLD = "sparsemax_threshold_tpu"
OPTIMIZER = jax_sae.make_optimizer(1e-3, total_steps=1000)


def compiled_step(chip, d, m, b, **keywords):
    config = jax_sae.SAEConfig.preset("sparsemax", d, m)
    state = jax.eval_shape(lambda: jax_sae.init_train_state(config, OPTIMIZER, jax.random.key(0)))
    step = functools.partial(jax_sae.train_step, config, OPTIMIZER, **keywords)
    return compile_for(chip, step, state, jax.ShapeDtypeStruct((b, d), jnp.bfloat16), donate=(0,))


@pytest.mark.slow
@pytest.mark.parametrize("chip", ["v5e", "v6e"])
def test_the_dense_step_runs_the_kernel_and_fits(chip):
    """Parameters and both moments of Adam are updated in place."""
    program = compiled_step(chip, D, M, B)
    assert program.kernels == [THRESHOLD]
    assert program.memory.argument_size_in_bytes + program.memory.temp_size_in_bytes < 16e9  # of a v5e, the least
    assert program.memory.alias_size_in_bytes > 3 * 4 * M * D


@pytest.mark.slow
@pytest.mark.parametrize("chip", ["v5e", "v6e"])
def test_the_sparse_step_runs_it_on_all_scores_only_where_places_do_not_suffice(chip):
    """Once on the maxima of groups, once on the scores at the places, once in the dense step that it falls back to."""
    program = compiled_step(chip, D, M, B, capacity=jax_sae.Capacity(row=128, mean=64))
    assert program.kernels == [THRESHOLD] * 3


@pytest.mark.slow
def test_sparse_gradients_of_the_bottleneck_compile():
    def loss(query, keys):
        places = find_places(query, keys, lambda z: z > sparsemax_threshold(z)[0][:, None], 64)
        blocks, _ = plan_blocks(places.indices, places.used, B)
        activate = lambda extras, products: (products, jax.nn.relu(products))
        y, _, _ = bottleneck(activate, (M,), (), query, keys, None, places, blocks)
        return jnp.sum(y**2)

    arguments = jax.ShapeDtypeStruct((B, D), jnp.float32), jax.ShapeDtypeStruct((M, D), jnp.float32)
    assert compile_for("v5e", jax.grad(loss, (0, 1)), *arguments).kernels == [THRESHOLD]


@pytest.mark.slow
def test_the_step_over_a_mesh_compiles_without_the_kernel():
    """Rows over one axis and concepts over the other, as the compiler splits them."""
    mesh = Mesh(np.array(devices("v5e")[:4]).reshape(2, 2), ("data", "model"), axis_types=(AxisType.Auto,) * 2)
    config = jax_sae.SAEConfig.preset("sparsemax", 64, 1024)
    step = jax_sae.mesh_train_step(config, OPTIMIZER, mesh)
    state = jax.eval_shape(lambda: jax_sae.init_train_state(config, OPTIMIZER, jax.random.key(0)))
    batch = jax.ShapeDtypeStruct((B, 64), jnp.float32)
    program = compile_for("v5e", step, state, batch, sharding=NamedSharding(mesh, P()))
    assert program.kernels == []
    assert program.count("all-reduce") > 0
