"""No case without a test, no golden file without a case."""

import importlib
import inspect
from pathlib import Path

import pytest

from tests.conformance.golden import ARGUMENTS, CASES, NOT_COMPARED, case_of

MODULES = sorted(path.stem for path in Path(__file__).parent.glob("test_*.py"))


def cases_tested(module):
    """The cases that the tests of a module run on: those of ``golden`` marks on tests that take the golden file."""
    for name, test in inspect.getmembers(importlib.import_module(f"tests.conformance.{module}"), inspect.isfunction):
        if name.startswith("test_") and "golden" in inspect.signature(test).parameters:
            yield from (mark.args[0] for mark in getattr(test, "pytestmark", ()) if mark.name == "golden")


def test_every_case_has_a_test():
    tested = {case for module in MODULES for case in cases_tested(module)}
    assert tested == set(CASES)
    assert set(CASES) >= set(ARGUMENTS)


def test_every_file_has_a_case(goldens, request):
    """All files of a folder that was given; of our own those from elsewhere, which are public."""
    pattern = "*.npz" if request.config.getoption("--goldens") else "*_public.npz"
    files = sorted(goldens.glob(pattern))
    assert files, f"no golden files in {goldens}"
    strays = [path.name for path in files if case_of(path) is None and not path.name.startswith(NOT_COMPARED)]
    assert not strays


@pytest.mark.parametrize(
    ("name", "case"),
    [
        ("dl_relu_l1_public.npz", "dl_relu_l1"),
        ("dl_relu_l1_april_hidden.npz", "dl_relu_l1_april"),
        ("sparsemax_sae_forward_tokens_1.npz", "sparsemax_sae_forward_tokens"),
        ("llama_tied.npz", None),
    ],
)
def test_a_file_belongs_to_the_longest_case_it_begins_with(name, case):
    assert case_of(Path(name)) == case
