"""The kernel of sparsemax through the compilers of XLA, Mosaic GPU and NVIDIA's ptxas. The GPUs are not there."""

import json
import re
import subprocess
import sys

import pytest

from tests.compiled_cuda.build import SHAPES

ODD = [name for name in SHAPES if name.startswith("odd")]
STREAMED = ["streamed", "streamed bfloat16", "odd streamed", "too long", "just too long"]


@pytest.fixture(scope="module", params=["h100", "b200"])
def built(request):
    """{program: (summary, report of the compilers)} for one kind of GPU."""
    command = [sys.executable, "-m", "tests.compiled_cuda.build", request.param]
    run = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace")
    assert run.returncode == 0, run.stdout[-3000:]
    report, *rest = re.split(r"^SUMMARY (.*)$", run.stdout, flags=re.MULTILINE)
    programs = {}
    for line, following in zip(rest[::2], rest[1::2], strict=True):
        summary = json.loads(line)
        programs[summary.pop("program")] = summary, report
        report = following
    return programs


@pytest.mark.parametrize("what", ["p", "threshold"])
@pytest.mark.parametrize("name", SHAPES)
def test_is_one_kernel_without_spills_or_temporaries(built, name, what):
    summary, report = built[f"{what} {name}"]
    assert summary["kernels"] == 1
    assert summary["over memory"] == [["custom-call", 1, 1 if what == "p" else 0]]
    assert summary["temporaries"] <= 64  # the addresses of three results
    assert re.search(r"\.target sm_(90|100)a", report)
    assert "0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads" in report
    (registers,) = map(int, re.findall(r"Used (\d+) registers", report))
    assert registers <= 128


@pytest.mark.parametrize("what", ["p", "threshold"])
@pytest.mark.parametrize("name", ODD)
def test_rows_of_odd_widths_move_by_no_copy_that_needs_aligned_addresses(built, name, what):
    _, report = built[f"{what} {name}"]
    copies = set(re.findall(r"cp\.async\.bulk[.\w]*\.(?:global|shared)[.:\w]*", report))
    assert copies and all(copy.startswith("cp.async.bulk.tensor.1d.") for copy in copies), copies


@pytest.mark.parametrize("what", ["p", "threshold"])
@pytest.mark.parametrize("name", STREAMED)
def test_a_streamed_row_is_fenced_before_a_copy_takes_its_place(built, name, what):
    _, report = built[f"{what} {name}"]
    loads = [m.start() for m in re.finditer(r"cp\.async\.bulk\.tensor", report)]
    waits = [m.start() for m in re.finditer(r"mbarrier\.try_wait", report)]
    fences = [m.start() for m in re.finditer(r"fence\.proxy\.async", report)]
    # Maximum, Newton's method, and p: each begins with copies, waits for them, and fences before it copies again.
    assert len(waits) >= (3 if what == "p" else 2) and len(fences) >= len(waits)
    assert all(any(wait < fence < later for fence in fences for later in loads) for wait in waits)


def test_a_batch_of_odd_rows_is_one_kernel(built):
    summary, _ = built["batch"]
    assert summary["over memory"] == [["custom-call", 1, 1]]


def test_more_shared_memory_than_there_is_does_not_compile(built):
    summary, _ = built["beyond memory"]
    assert re.search("(?i)shared memory|smem", summary["error"])


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_gradient_goes_over_memory_twice(built, dtype):
    summary, _ = built[f"gradient {dtype}"]
    forward, sums, gradient = summary["over memory"]
    assert forward == ["custom-call", 1, 1]
    # p and its cotangent to two sums (in float32 the mask of the support is kept); then the gradient.
    assert sums == ["fusion", 2, 1 if dtype == "float32" else 0]
    assert gradient == ["fusion", 2, 1]
