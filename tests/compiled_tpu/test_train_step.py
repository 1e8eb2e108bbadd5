"""The whole training step, the dense one, through the compiler of TPUs, which takes about a minute over it."""

import functools

import jax
import jax.numpy as jnp

from jax_sae import SAEConfig, init_train_state, make_optimizer, train_step
from tests.compiled_tpu.target import compile_for, kernels

B, D, M = 1024, 768, 49_152


def test_the_sparsemax_step_fits_and_finds_its_threshold_with_the_kernel():
    config = SAEConfig.preset("sparsemax", D, M)
    optimizer = make_optimizer(1e-3, total_steps=1000)
    state = jax.eval_shape(lambda: init_train_state(config, optimizer, jax.random.key(0)))
    step = functools.partial(train_step, config, optimizer)
    compiled = compile_for("v5e", step, state, jax.ShapeDtypeStruct((B, D), jnp.bfloat16), donate=0)
    assert kernels(compiled, "sparsemax_threshold_tpu") == kernels(compiled) == 1
    memory = compiled.memory_analysis()
    assert memory.argument_size_in_bytes + memory.temp_size_in_bytes < 16e9  # of a v5e
    assert memory.alias_size_in_bytes > 3 * 4 * M * D  # parameters and both moments of Adam are updated in place
