"""Rotary position embedding against complex arithmetic in float64."""

import jax.numpy as jnp
import numpy as np
import pytest

from jax_sae.backbones.llama.rope import apply_rope, rope_factors, rope_tables
from jax_sae.errors import InputError


@pytest.mark.parametrize("factors", [None, (1.0, 2.0, 4.0)])
def test_turns_pairs_by_position_times_frequency(factors):
    x = np.random.default_rng(0).normal(size=(2, 5, 3, 6)).astype(np.float32)
    turned = apply_rope(jnp.asarray(x), *rope_tables(5, 6, 100.0, factors))
    frequencies = 100.0 ** (-np.array([0, 2, 4]) / 6) / np.array(factors or (1, 1, 1))
    phase = np.exp(1j * np.arange(5)[:, None] * frequencies)[None, :, None, :]
    expected = (x[..., :3] + 1j * x[..., 3:].astype(np.float64)) * phase
    np.testing.assert_allclose(turned, np.concatenate([expected.real, expected.imag], -1), atol=1e-6)


def test_linear_scaling_stretches_positions():
    factors = rope_factors({"rope_type": "linear", "factor": 4.0}, 100.0, 6)
    stretched, plain = rope_tables(9, 6, 100.0, factors), rope_tables(3, 6, 100.0)
    for a, b in zip(stretched, plain, strict=True):
        np.testing.assert_allclose(a[::4], b, atol=1e-7)


@pytest.mark.parametrize("scaling", [None, {}, {"rope_type": "default"}, {"type": "default"}])
def test_no_scaling(scaling):
    assert rope_factors(scaling, 1e4, 8) is None


def test_unknown_scaling():
    with pytest.raises(InputError, match="rope scaling 'dynamic' is not supported; expected default, linear"):
        rope_factors({"type": "dynamic", "factor": 2.0}, 1e4, 8)
