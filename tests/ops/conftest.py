"""What TPUs and GPUs run of plain JAX, as implementations of their own that run here."""

from functools import partial

import pytest

from jax_sae.ops.sparsemax import api, xla
from jax_sae.ops.sparsemax.solver import Solver


@pytest.fixture(autouse=True, scope="session")
def platforms():
    with pytest.MonkeyPatch.context() as patch:
        for name, platform in {"xla on a TPU": "tpu", "xla on a GPU": "default"}.items():
            threshold = xla.BY_PLATFORM[platform]
            patch.setitem(api._IMPLEMENTATIONS, name, Solver(threshold, partial(xla._project_by, threshold)))
        yield
