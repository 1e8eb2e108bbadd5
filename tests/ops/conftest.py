"""What other platforms run of plain JAX, run here."""

from functools import partial

import jax
import pytest

from jax_sae.ops.sparsemax import api, xla
from jax_sae.ops.sparsemax.solver import Solver


@pytest.fixture
def run_as(monkeypatch):
    """``run_as("tpu")`` makes every choice by platform, of what is traced from then on, that of a TPU."""

    def run_as(platform):
        def chosen(*arrays, default=None, **platforms):
            return jax.jit(platforms.get(platform, default))(*arrays)

        monkeypatch.setattr(jax.lax, "platform_dependent", chosen)

    return run_as


@pytest.fixture(autouse=True, scope="session")
def platforms():
    """Implementations of sparsemax of their own for what it is on TPUs and GPUs."""
    with pytest.MonkeyPatch.context() as patch:
        for name, platform in {"xla on a TPU": "tpu", "xla on a GPU": "default"}.items():
            threshold = xla.BY_PLATFORM[platform]
            patch.setitem(api._IMPLEMENTATIONS, name, Solver(threshold, partial(xla._project_by, threshold)))
        yield
