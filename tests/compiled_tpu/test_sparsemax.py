"""The TPU kernel of sparsemax, alone and inside of programs, through the real compiler."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from jax_sae import sparsemax, sparsemax_threshold
from jax_sae.ops.sparsemax import pallas_tpu_kernel
from tests.compiled_tpu.target import TOPOLOGIES, compile_for, compile_over_four, kernels

every_tpu = pytest.mark.parametrize("tpu", TOPOLOGIES)
FEW = 1 << 17  # bytes, whatever the shape, that the compiler keeps for itself on v5p
SHAPES = [(1024, 49_152), (1001, 50_257), (7, 129), (3, 1)]


def scores(shape, dtype=jnp.float32):
    return jax.ShapeDtypeStruct(shape, dtype)


def temporaries(compiled):
    return compiled.memory_analysis().temp_size_in_bytes


@every_tpu
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_p_is_one_kernel_without_temporaries(tpu, shape, dtype):
    compiled = compile_for(tpu, sparsemax, scores(shape, dtype))
    assert kernels(compiled, "sparsemax_tpu") == kernels(compiled) == 1
    assert temporaries(compiled) <= FEW and compiled.as_text().count(" fusion(") == 0


@every_tpu
@pytest.mark.parametrize("shape", [(1024, 49_152), (64, 1_048_576)], ids=str)
def test_the_threshold_is_one_kernel_up_to_a_million_scores(tpu, shape):
    compiled = compile_for(tpu, sparsemax_threshold, scores(shape))
    assert kernels(compiled, "sparsemax_threshold_tpu") == kernels(compiled) == 1
    in_lanes = 3 * 4 * 128 * max(shape[0], 64)  # a column of results before it is packed
    assert temporaries(compiled) <= in_lanes + FEW


def pullback(z, g):
    return jax.vjp(sparsemax, z)[1](g)[0]


@pytest.mark.parametrize("tpu", ["v5e", "v6e"])
def test_the_gradient_keeps_p_alone(tpu):
    z = scores((1024, 49_152))
    compiled = compile_for(tpu, pullback, z, z)
    assert kernels(compiled) == 1
    p = 4 * 1024 * 49_152
    assert temporaries(compiled) <= p + (1 << 20)  # p, between forward and backward


def test_rows_in_batches_and_masked_entries_are_one_kernel():
    compiled = compile_for("v5e", jax.vmap(lambda z: sparsemax(z, where=z > 0)), scores((4, 64, 5000)))
    assert kernels(compiled) == 1


@pytest.mark.parametrize("spec", [("data", None), (None, "data"), (None, None)], ids=["rows", "columns", "neither"])
def test_what_the_compiler_splits_over_devices_is_plain_jax(spec):
    compiled = compile_over_four("v5e", lambda mesh, z: sparsemax(z), (512, 8192), jnp.float32, spec)
    assert kernels(compiled) == 0


def test_rows_split_by_hand_are_a_kernel_on_each_device():
    def by_hand(mesh, z):
        return jax.shard_map(sparsemax, mesh=mesh, in_specs=P("data", None), out_specs=P("data", None))(z)

    compiled = compile_over_four("v5e", by_hand, (512, 8192), jnp.float32, ("data", None))
    assert kernels(compiled, "sparsemax_tpu") == 1


def test_a_block_of_too_many_rows_does_not_compile(monkeypatch):
    """The compiler's limit on memory is a real one: sixteen times the rows that the kernel takes are too many."""
    blocks = pallas_tpu_kernel.choose_blocks((1024, 49_152), np.dtype("float32"))
    monkeypatch.setattr(pallas_tpu_kernel, "choose_blocks", lambda *_: blocks._replace(rows=16 * blocks.rows))
    with pytest.raises(Exception, match="(?i)vmem|memory"):
        compile_for("v5p", lambda z: sparsemax(2 * z), scores((1024, 49_152)))
