"""Where a program that is lowered for TPUs has the kernel and where plain JAX; lowering needs no TPU."""

import functools
import subprocess
import sys

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from jax_sae import sparsemax, sparsemax_jvp, sparsemax_threshold
from tests.ops.reference import scores

Z = scores(16, 300)


def gradient(z):
    return jax.grad(lambda z: jnp.sum(sparsemax(z) ** 2))(z)


def tangent(z):
    return sparsemax_jvp(z, z)[1]


def lowered(f, *arrays, platform="tpu"):
    return jax.jit(f).trace(*arrays).lower(lowering_platforms=(platform,)).as_text()


def kernels(text):
    return text.count("tpu_custom_call")


def mesh(kind=AxisType.Auto):
    return jax.make_mesh((4, 2), ("data", "model"), axis_types=(kind, kind))


@pytest.mark.parametrize("f", [sparsemax, sparsemax_threshold, gradient, tangent, jax.vmap(jax.vmap(sparsemax))])
def test_a_program_for_one_tpu_has_one_kernel_and_one_for_a_cpu_none(f):
    z = Z[None] if f not in (sparsemax, sparsemax_threshold, gradient, tangent) else Z
    text = lowered(f, z)
    assert kernels(text) == 1 and "stablehlo.while" not in text
    assert kernels(lowered(f, z, platform="cpu")) == 0


@pytest.mark.parametrize("f", [sparsemax, gradient])
def test_an_exported_program_has_the_kernel(f):
    disabled = [jax.export.DisabledSafetyCheck.custom_call("tpu_custom_call")]
    exported = jax.export.export(jax.jit(f), platforms=["tpu"], disabled_checks=disabled)(Z)
    assert kernels(exported.mlir_module()) == 1


@pytest.mark.parametrize("f", [sparsemax, sparsemax_threshold, gradient, jax.vmap(sparsemax)])
@pytest.mark.parametrize("spec", [P(), P("data"), P(("data", "model")), P(None, "model"), P("data", "model")])
def test_arrays_over_several_devices_are_left_to_plain_jax(f, spec):
    z = jax.device_put(scores(16, 256), NamedSharding(mesh(), spec))
    text = lowered(f, z)
    assert kernels(text) == 0 and "stablehlo.while" in text


def test_axes_of_explicit_type_are_left_to_plain_jax():
    z = jax.device_put(Z, NamedSharding(mesh(AxisType.Explicit), P("data")))
    assert kernels(lowered(sparsemax, z)) == 0


@pytest.mark.parametrize("f", [sparsemax, sparsemax_threshold, gradient])
def test_shard_map_has_the_kernel_only_where_it_is_over_all_axes(f):
    over = functools.partial(jax.shard_map, f, mesh=mesh(), in_specs=P("data"), out_specs=P("data"))
    assert kernels(lowered(over(), Z)) == 1
    assert kernels(lowered(over(axis_names={"data"}), Z)) == 0


def test_sharded_rows_inside_shard_map_are_left_to_plain_jax():
    f = functools.partial(sparsemax, axis_name="model")
    over = jax.shard_map(f, mesh=mesh(), in_specs=P(None, "model"), out_specs=P(None, "model"))
    assert kernels(lowered(over, Z)) == 0


@pytest.mark.parametrize("z", [jnp.zeros((2, 4), jnp.float16), jax.ShapeDtypeStruct((8, 1 << 22), jnp.float32)])
def test_scores_that_the_kernel_does_not_take_are_left_to_plain_jax(z):
    assert kernels(lowered(sparsemax, z)) == kernels(lowered(sparsemax_threshold, z)) == 0


def test_rows_too_long_to_hold_are_refused_by_name():
    with pytest.raises(ValueError, match="rows have 4194304 scores; the TPU kernel holds 8 rows in 48 MiB"):
        jax.eval_shape(functools.partial(sparsemax, implementation="pallas_tpu"), jnp.zeros((1, 1 << 22)))


def test_the_library_and_its_use_on_a_cpu_import_no_pallas():
    program = "import sys, jax, jax_sae; jax_sae.sparsemax(jax.numpy.ones(3)); print(*sys.modules)"
    run = subprocess.run([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True, check=True)
    modules = run.stdout.split()
    assert "jax_sae" in modules and "jax.experimental.pallas" not in modules
