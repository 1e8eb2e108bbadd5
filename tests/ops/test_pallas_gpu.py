"""The Mosaic GPU kernel of sparsemax: in an interpreter against float64 sorting, and lowered for CUDA."""

import functools
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import mosaic_gpu as plgpu
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

from jax_sae import sparsemax, sparsemax_jvp, sparsemax_threshold
from jax_sae.ops.sparsemax import api, pallas_gpu_kernel
from jax_sae.ops.sparsemax.pallas_gpu import LINE, gpu_solver, plan_row
from tests.ops.reference import jacobian, scores, sparsemax_rows

STAYING, STREAMED = 224 * 1024, 8192  # bytes of shared memory

interpreted = pytest.mark.skipif(
    not hasattr(plgpu, "InterpretGPUParams"), reason=f"jax {jax.__version__} has no public interpreter of Mosaic GPU"
)


@pytest.fixture
def kernel(monkeypatch):
    """The name of an implementation that runs the kernel in an interpreter, which raises on races of copies."""

    def register(memory=STAYING):
        name = f"pallas_gpu in {memory} bytes"
        parameters = plgpu.InterpretGPUParams(detect_races=True)
        monkeypatch.setitem(api._IMPLEMENTATIONS, name, gpu_solver(memory, parameters))
        return name

    return register


def with_undefined_rows(width):
    z = scores(6, width)
    z[1, width // 2], z[2, 0], z[3], z[4, :2], z[5, -1] = np.nan, np.inf, -np.inf, (np.nan, np.inf), np.nan
    return z, [1, 2, 3, 4, 5]


def gradients(z, cotangents):
    return np.stack([jacobian(p) @ v for p, v in zip(sparsemax_rows(z)[0], cotangents.astype(float), strict=True)])


def lowered(f, *arrays):
    return jax.jit(f).trace(*arrays).lower(lowering_platforms=("cuda",)).as_text()


@interpreted
@pytest.mark.parametrize(
    "width, memory",
    [(w, STAYING) for w in (1, 2, 129, 256, 257, 1000, 1024, 1280, 5000)] + [(w, STREAMED) for w in (2049, 4096, 4352)],
)
def test_equals_float64_sorting_at_every_scale(kernel, width, memory):
    z = np.concatenate([scores(1, width, scale) for scale in (1e-3, 0.01, 0.1, 1.0, 100.0)])
    ties, offset = np.round(4 * scores(1, width)) / 8, scores(1, width, 0.1) + np.float32(1000)
    z = np.concatenate([z, ties, offset])
    expected, _, _ = sparsemax_rows(z)
    got = np.asarray(sparsemax(z, implementation=kernel(memory)))
    np.testing.assert_allclose(got, expected, atol=3e-7)
    np.testing.assert_array_equal(got > 0, expected > 0)
    np.testing.assert_allclose(got.sum(-1, dtype=np.float64), 1, atol=1e-6)


@interpreted
@pytest.mark.parametrize("width, memory", [(700, STAYING), (1024, STAYING), (2300, STREAMED)])
def test_threshold_and_count_are_those_of_float64_sorting(kernel, width, memory):
    z = np.concatenate([scores(2, width, 0.01), scores(2, width, 0.3) - np.float32(40)])
    _, expected_tau, expected_count = sparsemax_rows(z)
    tau, count = sparsemax_threshold(z, implementation=kernel(memory))
    assert tau.dtype == jnp.float32 and count.dtype == jnp.int32
    np.testing.assert_allclose(tau, expected_tau, rtol=3e-7, atol=3e-7)
    np.testing.assert_array_equal(count, expected_count)


@interpreted
def test_rows_with_a_known_answer(kernel):
    inf = np.inf
    rows = [
        ([-0.0, 0.0, 0.0, -0.0], [0.25, 0.25, 0.25, 0.25]),
        ([1.0, 0.0, -5.0, 0.0], [1.0, 0.0, 0.0, 0.0]),
        ([1e30, -1e30, 0.0, 0.0], [1.0, 0.0, 0.0, 0.0]),
        ([3e38, -3e38, -3e38, 3e38], [0.5, 0.0, 0.0, 0.5]),
        ([0.5, -inf, 0.5, -inf], [0.5, 0.0, 0.5, 0.0]),
        ([-inf, -inf, -inf, -1e30], [0.0, 0.0, 0.0, 1.0]),
    ]
    z, expected = (np.array(column, np.float32) for column in zip(*rows, strict=True))
    np.testing.assert_allclose(sparsemax(z, implementation=kernel()), expected, atol=1e-7)
    z, expected = np.tile(z, 256), np.tile(expected, 256) / np.where(expected.max(-1, keepdims=True) == 0, 1, 256)
    np.testing.assert_allclose(sparsemax(z, implementation=kernel()), expected, atol=1e-7)


@interpreted
@pytest.mark.parametrize("width, memory", [(4, STAYING), (300, STAYING), (512, STAYING), (2300, STREAMED)])
def test_rows_without_a_projection_are_nan_and_leave_others_alone(kernel, width, memory):
    z, undefined = with_undefined_rows(width)
    got = np.asarray(sparsemax(z, implementation=kernel(memory)))
    tau, count = (np.asarray(x) for x in sparsemax_threshold(z, implementation=kernel(memory)))
    assert np.isnan(got[undefined]).all() and np.isnan(tau[undefined]).all() and not count[undefined].any()
    defined = np.delete(z, undefined, 0)
    np.testing.assert_allclose(np.delete(got, undefined, 0), sparsemax_rows(defined)[0], atol=3e-7)
    np.testing.assert_array_equal(np.delete(count, undefined), sparsemax_rows(defined)[2])


@interpreted
@pytest.mark.parametrize("width, memory", [(300, STAYING), (512, STAYING), (4999, STREAMED)])
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_half_precision_is_projected_in_float32(kernel, dtype, width, memory):
    z = jnp.asarray(scores(3, width, 0.1), dtype)
    got = sparsemax(z, implementation=kernel(memory))
    assert got.dtype == dtype
    expected = sparsemax_rows(np.asarray(z, np.float64))[0]
    np.testing.assert_allclose(np.asarray(got, np.float64), expected, rtol=float(jnp.finfo(dtype).eps), atol=3e-7)


@interpreted
def test_newtons_method_ends_where_rounding_would_keep_it_going(kernel, monkeypatch):
    """Rows 4 and 19 would go up and down for ever."""
    rng, z = np.random.default_rng(0), np.empty((24, 300), np.float32)
    for row in z:  # many entries within three floats of tau
        n = rng.integers(1, 150)
        row[:n] = rng.uniform(0, 2 / n, n)
        tau = np.float32((row[:n].sum(dtype=np.float64) - 1) / n)
        row[n:] = tau + np.spacing(tau) * rng.integers(-3, 4, 300 - n)
    results = []
    for sweeps in (30, 31):
        monkeypatch.setattr(pallas_gpu_kernel, "_MAX_SWEEPS", sweeps)
        results.append(sparsemax_threshold(z, implementation=kernel()))
    for after_30, after_31 in zip(*results, strict=True):
        np.testing.assert_array_equal(after_30, after_31)
    np.testing.assert_allclose(results[0][0], sparsemax_rows(z)[1], atol=5e-7)


@interpreted
@pytest.mark.parametrize("width, memory", [(300, STAYING), (512, STAYING), (2300, STREAMED)])
def test_the_gradient_is_that_of_the_closed_form(kernel, width, memory):
    z, g = scores(3, width, 0.3), scores(3, width, seed=1)
    f = functools.partial(sparsemax, implementation=kernel(memory))
    np.testing.assert_allclose(jax.jit(lambda z, g: jax.vjp(f, z)[1](g)[0])(z, g), gradients(z, g), atol=2e-6)
    np.testing.assert_allclose(sparsemax_jvp(z, g, implementation=kernel(memory))[1], gradients(z, g), atol=2e-6)
    alone = jax.vmap(jax.grad(lambda z, g: jnp.sum(f(z) * g)))
    np.testing.assert_allclose(jax.jit(alone)(z, g), gradients(z, g), atol=2e-6)


@interpreted
def test_a_batch_of_batches_is_one_of_rows(kernel):
    z = scores(6, 301, 0.2).reshape(3, 2, 301)
    f = functools.partial(sparsemax, implementation=kernel())
    tau = functools.partial(sparsemax_threshold, implementation=kernel())
    expected, expected_tau, expected_count = sparsemax_rows(z.reshape(6, 301))
    np.testing.assert_allclose(jax.vmap(f)(z).reshape(6, 301), expected, atol=3e-7)
    np.testing.assert_allclose(jax.vmap(jax.vmap(f), in_axes=1)(z), np.swapaxes(f(z), 0, 1), atol=3e-7)
    got_tau, got_count = jax.jit(jax.vmap(tau))(z)
    np.testing.assert_allclose(got_tau.reshape(6), expected_tau, atol=3e-7)
    np.testing.assert_array_equal(got_count.reshape(6), expected_count)


@interpreted
def test_integers_of_64_bits_change_nothing(kernel):
    z = scores(2, 1100, 0.1)
    with jax.enable_x64(True):
        p = sparsemax(jnp.asarray(z), implementation=kernel())
        tau, count = sparsemax_threshold(jnp.asarray(z), implementation=kernel())
    assert (p.dtype, tau.dtype, count.dtype) == (jnp.float32, jnp.float32, jnp.int32)
    np.testing.assert_allclose(p, sparsemax_rows(z)[0], atol=3e-7)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("shape", [(1024, 49_152), (16, 1_048_576), (3, 50_257), (2, 1), (5, 3, 4097)])
def test_lowers_for_cuda_to_one_kernel(shape, dtype):
    z = jax.ShapeDtypeStruct(shape, dtype)
    for f in sparsemax, sparsemax_threshold:
        assert lowered(functools.partial(f, implementation="pallas_gpu"), z).count("@mosaic_gpu") == 1


def test_lowers_for_cuda_under_every_transformation():
    f = functools.partial(sparsemax, implementation="pallas_gpu")
    z = jax.ShapeDtypeStruct((8, 3, 301), jnp.float32)
    mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))
    sharded = jax.shard_map(f, mesh=mesh, in_specs=P("data"), out_specs=P("data"))
    gradient = jax.grad(lambda z: jnp.sum(f(z) ** 2))
    sharded_gradient = jax.grad(lambda z: jnp.sum(sharded(z) ** 2))
    twice = jax.grad(lambda z: jnp.sum(gradient(z) ** 2))
    gradient_of_tau = jax.grad(lambda z: jnp.sum(sparsemax_threshold(z, implementation="pallas_gpu")[0]))
    in_scan = jax.grad(lambda z: jax.lax.scan(lambda total, z: (total + jnp.sum(f(z) ** 2), None), 0.0, z)[0])
    remade = jax.grad(jax.checkpoint(lambda z: jnp.sum(f(z) ** 2)))
    alone = [jax.vmap(f), gradient, jax.vmap(gradient), twice, gradient_of_tau, in_scan, remade]
    for g in [*alone, sharded, sharded_gradient]:
        assert lowered(g, z).count("@mosaic_gpu") == 1
    with jax.enable_x64(True):
        assert lowered(f, z).count("@mosaic_gpu") == 1


def test_empty_batches_pass():
    p = sparsemax(jnp.zeros((0, 5), jnp.bfloat16), implementation="pallas_gpu")
    tau, count = sparsemax_threshold(jnp.zeros((3, 0, 5)), implementation="pallas_gpu")
    assert p.shape == (0, 5) and p.dtype == jnp.bfloat16
    assert tau.shape == count.shape == (3, 0) and count.dtype == jnp.int32


@pytest.mark.parametrize("function", [sparsemax, sparsemax_threshold])
def test_what_the_kernel_does_not_do_is_refused(function):
    chosen = functools.partial(function, implementation="pallas_gpu")
    with pytest.raises(ValueError, match="'pallas_gpu' takes whole rows, but axis_name is 'model'; expected None"):
        chosen(jnp.zeros((2, 4)), axis_name="model")
    with jax.enable_x64(True), pytest.raises(ValueError, match="'pallas_gpu' got float64; expected float32, bfloat16"):
        chosen(jnp.zeros((2, 4), jnp.float64))
    with pytest.raises(ValueError, match="Only interpret mode is supported on CPU"):
        chosen(jnp.zeros((2, 4)))


@pytest.mark.parametrize("itemsize", [2, 4])
@pytest.mark.parametrize("memory", [STREAMED, STAYING])
def test_plans_cover_the_row_within_the_memory(itemsize, memory):
    for width in [*range(LINE, 6000, 7), 24_576, 49_152, 50_257, 57_344, 57_345, 114_688, 114_689, 131_072, 1_048_576]:
        plan = plan_row(width, itemsize, memory)
        assert plan.slots * plan.columns * itemsize <= memory
        assert (plan.chunks - 1) * plan.columns < width == plan.chunks * plan.columns - plan.overlap
        assert plan.columns <= width and plan.lines % plan.block == 0
        assert plan.slots <= min(plan.chunks, 32)  # as many barriers as one mask of phases has bits


def test_rows_stay_in_shared_memory_where_they_fit():
    assert plan_row(49_152, 4).stays and plan_row(57_344, 4).stays and not plan_row(58_112, 4).stays
    assert plan_row(65_536, 2).stays and plan_row(114_688, 2).stays and not plan_row(131_072, 2).stays
    with pytest.raises(ValueError, match="shared memory has 4095 bytes; expected at least 4096"):
        plan_row(2048, 4, 4095)


def test_pallas_is_imported_only_by_who_asks_for_the_kernel():
    program = "import sys, jax_sae; assert 'jax.experimental.pallas' not in sys.modules"
    assert subprocess.run([sys.executable, "-c", program]).returncode == 0
