"""Golden files: what reference implementations printed on small fixed inputs, found by the name of their case."""

import ast
import json
import re
from pathlib import Path

import jax.numpy as jnp
import numpy as np
from flax import nnx

from jax_sae import SparseAutoencoder

CASES = (
    "sparsemax_op",
    "sparsemax_sae_forward",
    "sparsemax_sae_forward_tokens",
    "sparsemax_sae_forward_regimes",
    "sparsemax_sae_clamp",
    "sparsemax_sae_trainer",
    "dl_relu_l1",
    "dl_relu_l1_april",
    "dl_topk",
    "dl_batchtopk",
    "dl_matryoshka_batchtopk",
    "dl_jumprelu",
    "dl_gated",
    "patchsae_relu_forward",
    "msae_metrics",
    "ms_score",
)
# Known, and read by no test: the top-n classification and the pictures that they record are not in this library.
NOT_COMPARED = ("topn_protocol", "visualisation")

# What the references were constructed with, for a file without a .json that says so.
ARGUMENTS = {
    "dl_relu_l1": dict(l1_penalty=0.1, sparsity_warmup_steps=2000),
    "dl_relu_l1_april": dict(l1_penalty=0.1, sparsity_warmup_steps=2000),
    "dl_topk": dict(k=6),
    "dl_batchtopk": dict(k=6),
    "dl_matryoshka_batchtopk": dict(k=6, group_fractions=[0.125, 0.25, 0.625]),
    "dl_jumprelu": dict(bandwidth=0.3, sparsity_penalty=1.0, target_l0=8.0, sparsity_warmup_steps=2000),
    "dl_gated": dict(l1_penalty=0.1, sparsity_warmup_steps=2000),
    "patchsae_relu_forward": dict(l1_coefficient=0.01, mse_cls_coefficient=2.5),
}


class Golden(dict):
    """The arrays of one file by name.

    Attributes:
      name: of the file, without its suffix.
      meta: the .json beside it; empty without one.
      arguments: what the reference was constructed with, from there or from ``ARGUMENTS``.
    """

    def __init__(self, path):
        self.name = path.stem
        with np.load(path, allow_pickle=False) as arrays:
            super().__init__(arrays)
        about = path.with_suffix(".json")
        self.meta = json.loads(about.read_text()) if about.exists() else {}
        self.arguments = ARGUMENTS.get(case_of(path), {}) | arguments_in(self.meta.get("note", ""))
        assert self and all(array.size for array in self.values()), f"{path} holds no arrays, or empty ones"

    def part(self, prefix):
        """The arrays whose name begins with ``prefix``, without it."""
        return {name.removeprefix(prefix): value for name, value in self.items() if name.startswith(prefix)}


def arguments_in(note):
    """The arguments that the note of a .json names."""
    found = re.search(r"constructor args (\{.*?\})", note)
    named = re.findall(r"\b(l1_coefficient|mse_cls_coefficient)[ =]+(\d+(?:\.\d+)?(?:e-?\d+)?)", note)
    return {name: float(value) for name, value in named} | (ast.literal_eval(found[1]) if found else {})


def case_of(path):
    """The case that a golden file belongs to: the longest name it begins with; None for a file of other tests."""
    return max((case for case in CASES if path.name.startswith(f"{case}_")), key=len, default=None)


def files_of(case, folder):
    """The golden files of ``case``, sorted."""
    return sorted(path for path in Path(folder).glob(f"{case}_*.npz") if case_of(path) == case)


def close(actual, expected, tolerance=2e-6, name=""):
    """Equal to float32 rounding, relative to the largest number expected."""
    actual, expected = np.asarray(actual, np.float64), np.asarray(expected, np.float64)
    assert actual.shape == expected.shape, f"{name}: shape {actual.shape}, expected {expected.shape}"
    error = np.abs(actual - expected).max(initial=0.0)
    scale = np.abs(expected).max(initial=0.0)
    assert error <= tolerance * scale, f"{name}: off by {error:.3g} where the largest number is {scale:.3g}"


def same_support(actual, expected):
    """Zero in the same places."""
    np.testing.assert_array_equal(np.asarray(actual) != 0, np.asarray(expected) != 0)


def with_parameters(config, **parameters):
    """A model with the given arrays as its parameters, all of them."""
    model = SparseAutoencoder(config, rngs=nnx.Rngs(0))
    names = {name for name, value in vars(model).items() if isinstance(value, nnx.Param)}
    assert names == set(parameters), f"the model has {sorted(names)}, given are {sorted(parameters)}"
    for name, value in parameters.items():
        assert getattr(model, name).shape == value.shape, name
        getattr(model, name)[...] = jnp.asarray(value)
    return model
