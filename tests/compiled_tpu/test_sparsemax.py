"""The sparsemax kernel through the real TPU compiler: that it compiles, fits, and is all that touches the scores.

What it computes is tested in the interpreters (tests/ops/test_pallas_tpu.py), which know nothing of a TPU's limits.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from benchmarks.tpu_compiler import CHIPS, compile_for, devices
from jax_sae import sparsemax, sparsemax_threshold
from jax_sae.ops.sparsemax import pallas_tpu_kernel

SINCE_V5 = [name for name in CHIPS if name != "v4"]
THRESHOLD, PROJECT = "sparsemax_threshold_tpu", "sparsemax_tpu"


def scores(*shape, dtype=jnp.float32):
    return jax.ShapeDtypeStruct(shape, dtype)


def gradient(z):
    return jax.grad(lambda z: jnp.sum(sparsemax(z) ** 2))(z)


@pytest.mark.parametrize("chip", CHIPS)
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_scores_are_read_once_and_written_once(chip, dtype):
    """The program is one call and its operand: no copy, no second operation on z, nothing kept but p.

    All that it holds on the chip is two blocks of z and two of p.
    """
    z = scores(1024, 49152, dtype=dtype)
    program = compile_for(chip, sparsemax, z)
    assert program.operations() == ["parameter", "custom-call"]
    assert program.kernels == [PROJECT]
    assert program.memory.temp_size_in_bytes == 0
    assert program.memory.output_size_in_bytes == z.size * z.dtype.itemsize
    assert 4 * 32 * 49152 <= program.kernel_memory[0] < 7 << 20


def test_blocks_of_64_long_rows_are_more_than_a_chip_holds(monkeypatch):
    """That is the compiler's word, not this library's. v4 has the least memory; two blocks of 8 rows fit it."""
    blocks = pallas_tpu_kernel.choose_blocks(scores(1024, 49152))
    assert blocks.rows == 8
    monkeypatch.setattr(pallas_tpu_kernel, "choose_blocks", lambda z: blocks._replace(rows=64))
    with pytest.raises(jax.errors.JaxRuntimeError, match="RESOURCE_EXHAUSTED"):
        compile_for("v4", lambda z: sparsemax(z), scores(1024, 49152))


@pytest.mark.parametrize("chip", CHIPS)
def test_the_threshold_writes_nothing_of_the_size_of_the_scores(chip):
    z = scores(1024, 49152)
    program = compile_for(chip, sparsemax_threshold, z)
    assert program.kernels == [THRESHOLD]
    assert program.readers(0) == ["custom-call"]
    assert not {"while", "copy"} & set(program.operations())
    assert program.memory.temp_size_in_bytes + program.memory.output_size_in_bytes < z.size * 4 / 100
    assert program.kernel_memory[0] < 4 << 20


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize(
    "shape", [(1, 1), (1024, 1), (3, 2), (1000, 129), (1001, 1500), (7, 4608), (1024, 512), (999, 3072), (1001, 50257)]
)
def test_every_shape_compiles(shape, dtype):
    z = scores(*shape, dtype=dtype)
    assert compile_for("v5e", sparsemax, z).kernels == [PROJECT]
    assert compile_for("v5e", sparsemax_threshold, z).kernels == [THRESHOLD]


@pytest.mark.parametrize("chip", SINCE_V5)
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_rows_of_a_million_scores_fit(chip, dtype):
    """On v5p and TPU7x one block of 8 such rows is half of the memory there is: a second one would not fit."""
    z = scores(64, 1 << 20, dtype=dtype)
    assert compile_for(chip, sparsemax_threshold, z).kernels == [THRESHOLD]
    assert compile_for(chip, sparsemax, z).kernels == [THRESHOLD]
    assert compile_for(chip, sparsemax, scores(64, 1 << 18, dtype=dtype)).kernels == [PROJECT]


def pullback(z, cotangent):
    return jax.vjp(sparsemax, z)[1](cotangent)[0]


@pytest.mark.parametrize("chip", CHIPS)
def test_the_gradient_reads_the_scores_once_and_keeps_p_alone(chip):
    """Beside p, only its support, one byte a score, between the two passes of the backward step."""
    z = scores(1024, 49152)
    program = compile_for(chip, pullback, z, z)
    assert program.kernels == [PROJECT]
    assert program.readers(0) == ["custom-call"]
    assert program.count("while") == 0
    assert program.memory.temp_size_in_bytes <= 5 * z.size + (1 << 20)


@pytest.mark.parametrize("function", [sparsemax, sparsemax_threshold])
def test_what_the_kernel_does_not_take_is_left_to_xla(function):
    for z in (scores(64, 2000, dtype=jnp.float16), scores(8, 1 << 22)):
        program = compile_for("v5e", function, z)
        assert program.kernels == []
        assert program.count("while") == 2


def test_vmapped_rows_share_a_kernel():
    assert compile_for("v5e", jax.vmap(sparsemax), scores(1024, 4608)).kernels == [PROJECT]
    program = compile_for("v5e", jax.vmap(jax.vmap(sparsemax), in_axes=1), scores(8, 4, 4608))
    assert program.kernels == [PROJECT]


def test_masked_scores_are_one_kernel():
    program = compile_for("v5e", lambda z: sparsemax(z, where=z > 0), scores(64, 5000))
    assert program.kernels == [PROJECT]


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_compiles_where_numbers_have_64_bits_by_default(dtype):
    with jax.enable_x64(True):
        assert compile_for("v5e", sparsemax, scores(64, 5000, dtype=dtype)).kernels == [PROJECT]
        assert compile_for("v5e", sparsemax_threshold, scores(64, 5000, dtype=dtype)).kernels == [THRESHOLD]


def mesh_of(chip, kind=AxisType.Auto):
    return Mesh(np.array(devices(chip)[:4]).reshape(2, 2), ("data", "model"), axis_types=(kind,) * 2)


@pytest.mark.parametrize("function", [sparsemax, sparsemax_threshold, gradient])
@pytest.mark.parametrize("spec", [P("data", None), P(("data", "model"), None), P("data", "model"), P(None, "model")])
def test_arrays_that_the_compiler_splits_are_left_to_xla(function, spec):
    """A kernel in such a program is an error, even with whole rows on every device: it cannot be split."""
    sharding = NamedSharding(mesh_of("v5e"), spec)
    program = compile_for("v5e", lambda z: function(2 * z), scores(1024, 49152), sharding=sharding)
    assert program.kernels == []
    assert program.count("while") == 2
    assert program.count("all-gather") == program.count("all-to-all") == 0


@pytest.mark.parametrize("function", [sparsemax, sparsemax_threshold, gradient])
def test_devices_run_the_kernel_on_their_rows_inside_shard_map(function):
    mesh, rows = mesh_of("v5e"), P(("data", "model"))
    mapped = jax.shard_map(function, mesh=mesh, in_specs=rows, out_specs=rows)
    program = compile_for("v5e", mapped, scores(1024, 49152), sharding=NamedSharding(mesh, rows))
    assert program.kernels == [THRESHOLD if function is sparsemax_threshold else PROJECT]
    assert program.count("all-reduce") == program.count("all-gather") == 0


def test_sharded_columns_inside_shard_map_are_left_to_xla():
    mesh, columns = mesh_of("v5e"), P(None, ("data", "model"))
    mapped = jax.shard_map(
        functools.partial(sparsemax, axis_name=("data", "model")), mesh=mesh, in_specs=columns, out_specs=columns
    )
    program = compile_for("v5e", mapped, scores(1024, 49152), sharding=NamedSharding(mesh, columns))
    assert program.kernels == []
    assert program.count("all-reduce") > 0


def test_a_named_kernel_is_an_error_where_it_would_be_split():
    sharding = NamedSharding(mesh_of("v5e"), P("data", None))
    named = functools.partial(sparsemax, implementation="pallas_tpu")
    with pytest.raises(NotImplementedError, match="cannot be automatically partitioned"):
        compile_for("v5e", named, scores(1024, 49152), sharding=sharding)
    assert compile_for("v5e", named, scores(1024, 49152)).kernels == [PROJECT]
