"""What is read from a program that a compiler made; compiling one is in tests/compiled_tpu."""

from types import SimpleNamespace

from benchmarks.compiled_tpu import CASES, figures_of
from benchmarks.tpu_compiler import Program

# As libtpu writes it, shortened.
TEXT = """HloModule jit_f, is_scheduled=true

%body (a.2: f32[8]) -> f32[8] {
  %a.2 = f32[8]{0:T(128)} parameter(0)
  ROOT %neg = f32[8]{0:T(128)} negate(%a.2)
}

ENTRY %main.5 (z.1: f32[1024,49152], g.1: f32[8]) -> (f32[1024,1], f32[8]) {
  %z.1 = f32[1024,49152]{1,0:T(8,128)} parameter(0), metadata={op_name="z"}
  %g.1 = f32[8]{0:T(128)} parameter(1)
  %kernel_tpu.3 = (f32[1024,1]{0,1:T(1,128)}, f32[1024,1]{0,1:T(1,128)}) custom-call(%z.1), custom_call_target="tpu_custom_call", backend_config={"used_scoped_memory_configs":[{"memory_space":"1","offset":"0","size":"3145728"}]}
  %part = f32[1024,1]{0,1:T(1,128)} get-tuple-element(%kernel_tpu.3), index=0
  %start = (f32[8]{0:T(128)}, f32[8]{0:T(128)}) all-reduce-start(%g.1), to_apply=%body
  %done = f32[8]{0:T(128)} all-reduce-done(%start)
  ROOT %tuple.9 = (f32[1024,1]{0,1:T(1,128)}, f32[8]{0:T(128)}) tuple(%part, %done)
}
"""  # noqa: E501
MEMORY = SimpleNamespace(
    argument_size_in_bytes=8e6, output_size_in_bytes=2e6, temp_size_in_bytes=5e5, generated_code_size_in_bytes=7e3
)
PROGRAM = Program(TEXT, MEMORY, {"bytes accessed": 1.2e7})


def test_kernels_are_named_with_the_memory_that_they_use():
    assert PROGRAM.kernels == ["kernel_tpu"]
    assert PROGRAM.kernel_memory == [3 << 20]


def test_operations_are_those_of_the_entry_computation():
    starts = ["parameter", "parameter", "custom-call", "get-tuple-element", "all-reduce-start", "all-reduce-done"]
    assert PROGRAM.operations() == [*starts, "tuple"]
    assert PROGRAM.readers(0) == ["custom-call"]
    assert PROGRAM.readers(1) == ["all-reduce-start"]


def test_operations_are_counted_once_whether_or_not_they_are_started_first():
    assert PROGRAM.count("all-reduce") == PROGRAM.count("negate") == 1
    assert PROGRAM.count("while") == 0


def test_cycles_are_those_that_the_compiler_expects_of_every_operation():
    assert PROGRAM.cycles == 0
    modelled = '%a = f32[8] add(%b, %c), backend_config={"estimated_cycles":"120","x":"1"}\n'
    assert Program(2 * modelled, MEMORY, {}).cycles == 240


def test_figures_are_of_what_goes_in_and_out_once():
    figures = figures_of("v5e", CASES[0], PROGRAM)
    assert figures == {
        "TPU": "v5e",
        "program": "p",
        "scores": "1024 x 49152 float32",
        "kernels": 1,
        "in and out MB": 10.0,
        "compiler's count MB": 12.0,
        "temporaries MB": 0.5,
        "on-chip memory of the kernel MiB": 3.0,
        "code KB": 7.0,
        "limit of bandwidth us": 1e7 / 0.819e12 / 1e-6,
    }
