"""What is read from a program that XLA made for a GPU; compiling one is in tests/compiled_cuda."""

from benchmarks.compiled_gpu import CHIPS, SPARSE_STEP, Shape, Work, break_even, limit
from benchmarks.gpu_compiler import Program

# As XLA writes it, shortened.
TEXT = """HloModule jit_f, is_scheduled=true

%fused_gather (param_0: f32[100,8], param_1: s32[4]) -> f32[4,8] {
  %param_0 = f32[100,8]{1,0} parameter(0)
  %param_1 = s32[4]{0} parameter(1)
  ROOT %gather.1 = f32[4,8]{1,0} gather(%param_0, %param_1), offset_dims={1}
}

%fused_scatter (param_0.1: f32[100,8], param_1.1: s32[4], param_2.1: f32[4,8]) -> f32[100,8] {
  %param_0.1 = f32[100,8]{1,0} parameter(0)
  %param_1.1 = s32[4]{0} parameter(1)
  %param_2.1 = f32[4,8]{1,0} parameter(2)
  ROOT %scatter.1 = f32[100,8]{1,0} scatter(%param_0.1, %param_1.1, %param_2.1), update_window_dims={1}
}

%gemm (parameter_0: f32[4,8], parameter_1: f32[8,100]) -> f32[4,100] {
  %parameter_0 = f32[4,8]{1,0} parameter(0)
  %parameter_1 = f32[8,100]{1,0} parameter(1)
  ROOT %dot.1 = f32[4,100]{1,0} dot(%parameter_0, %parameter_1), lhs_contracting_dims={1}
}

%body (arg.1: (s32[], /*index=1*/f32[4,100])) -> (s32[], f32[4,100]) {
  %arg.1 = (s32[], /*index=1*/f32[4,100]{1,0}) parameter(0)
  %scores.1 = f32[4,100]{1,0} get-tuple-element(%arg.1), index=1
  ROOT %sweep.1 = pred[4]{0} fusion(%scores.1), kind=kInput, calls=%fused_sweep
}

%fused_sweep (param_0.2: f32[4,100]) -> pred[4] {
  %param_0.2 = f32[4,100]{1,0} parameter(0)
  ROOT %reduce.1 = pred[4]{0} reduce(%param_0.2), dimensions={1}
}

%cheap (arg.2: f32[4,8]) -> f32[4,8] {
  %arg.2 = f32[4,8]{1,0} parameter(0)
  ROOT %copy.1 = f32[4,8]{1,0} copy(%arg.2)
}

%dear (arg.3: f32[4,8]) -> f32[4,8] {
  %arg.3 = f32[4,8]{1,0} parameter(0)
  %copy.2 = f32[4,8]{1,0} copy(%arg.3)
  ROOT %copy.3 = f32[4,8]{1,0} copy(%copy.2)
}

ENTRY %main.9 (table.1: f32[100,8], at.1: s32[4], keys.1: f32[8,100]) -> f32[100,8] {
  %table.1 = f32[100,8]{1,0} parameter(0), metadata={op_name="table"}
  %at.1 = s32[4]{0} parameter(1)
  %keys.1 = f32[8,100]{1,0} parameter(2)
  %zero = pred[] constant(false)
  %rows = f32[4,8]{1,0} fusion(%table.1, %at.1), kind=kLoop, calls=%fused_gather
  %scores = f32[4,100]{1,0} fusion(%rows, %keys.1), kind=kCustom, calls=%gemm
  %carry = (s32[], f32[4,100]{1,0}) tuple(%zero, %scores)
  %loop = (s32[], f32[4,100]{1,0}) while(%carry), condition=%unused, body=%body
  %chosen = f32[4,8]{1,0} conditional(%zero, %rows, %rows), true_computation=%dear, false_computation=%cheap
  ROOT %added = f32[100,8]{1,0} fusion(%table.1, %at.1, %chosen), kind=kInput, calls=%fused_scatter
}
"""
PROGRAM = Program(TEXT, memory=None)


def test_all_but_products_and_tables_of_rows_counts():
    rows, at, sweep = 4 * 8 * 4, 4 * 4, 4 * 100 * 4 + 4
    gather, cheaper_branch, scatter = rows + at, 2 * rows, rows + at
    assert PROGRAM.moved == gather + sweep + cheaper_branch + scatter


def test_passes_are_operations_on_whole_arrays():
    assert PROGRAM.passes(400) == [("fusion", 0, 1), ("while", 1, 1)]
    assert PROGRAM.passes(800) == [("fusion", 1, 0), ("fusion", 0, 1)]  # the keys; what is added to
    assert PROGRAM.count("copy") == 3 and PROGRAM.count("sort") == PROGRAM.kernels == 0


def test_the_limit_is_the_time_of_products_and_of_memory():
    chip, shape = CHIPS["h100"], Shape(rows=1000, d=100, concepts=10_000)
    product = 2 * 1000 * 100 * 10_000 / 989e12
    assert limit(chip, shape, Work(rounded=1, products=2), 0, 0) == 5 * product
    assert limit(chip, shape, Work(touched=3), 3.352e12, 7) == 1 + 3 * 1000 * 7 * 100 * 4 / 3.352e12


def test_at_the_break_even_both_limits_are_the_same():
    chip, shape = CHIPS["b200"], Shape(rows=1000, d=100, concepts=10_000)
    found = break_even("b200", shape, "topk", (10**9, 10**8))
    dense = limit(chip, shape, Work(rounded=1, products=5), 10**9, 0)
    sparse = limit(chip, shape, SPARSE_STEP["topk"], 10**8, found["places per row"])
    assert abs(dense / sparse - 1) < 1e-9 and found["one concept in"] == 10_000 / found["places per row"]
