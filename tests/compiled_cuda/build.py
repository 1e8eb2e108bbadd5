"""Compiles the programs below for one kind of GPU, and prints the compilers' reports and a summary of each program.

python -m tests.compiled_cuda.build h100

A process is for one kind of GPU and compiles a kernel once, however often it is asked for.
"""

import ctypes
import functools
import json
import os
import sys

os.environ |= {"JAX_PLATFORMS": "cpu", "MOSAIC_GPU_DUMP_PTX": "1", "MOSAIC_GPU_DUMP_PTXAS": "1"}

import jax
import jax.numpy as jnp

from benchmarks.gpu_compiler import compile_for
from jax_sae import sparsemax
from jax_sae.ops.sparsemax import pallas_gpu_kernel
from jax_sae.ops.sparsemax.pallas_gpu import PALLAS_GPU, Plan

# Rows that stay in shared memory, that are streamed, of odd widths, and the longest that stay.
SHAPES = {
    "staying": ((1024, 49_152), jnp.float32),
    "staying bfloat16": ((1024, 49_152), jnp.bfloat16),
    "streamed": ((16, 1_048_576), jnp.float32),
    "streamed bfloat16": ((16, 1_048_576), jnp.bfloat16),
    "odd": ((8, 50_257), jnp.float32),
    "odd bfloat16": ((8, 50_257), jnp.bfloat16),
    "odd float16": ((3, 100_003), jnp.float16),
    "odd streamed": ((3, 100_003), jnp.float32),
    "longest": ((4, 57_344), jnp.float32),
    "longest bfloat16": ((4, 114_688), jnp.bfloat16),
    "too long": ((2, 65_536), jnp.float32),
    "just too long": ((2, 58_112), jnp.float32),  # all of the 227 KiB that a block of threads may have
    "short": ((5, 768), jnp.float32),
}

kernel = functools.partial(sparsemax, implementation="pallas_gpu")
threshold = functools.partial(PALLAS_GPU.threshold, axis_name=None)


def pullback(z, g):
    return jax.vjp(kernel, z)[1](g)[0]


def beyond_memory(z):
    return pallas_gpu_kernel.solve(z, Plan(65_536, lines=32, slots=8), project=True)


def programs():
    """(name, function, shape, dtype) of every program."""
    for name, (shape, dtype) in SHAPES.items():
        yield f"p {name}", kernel, shape, dtype
        yield f"threshold {name}", threshold, shape, dtype
    yield "batch", jax.vmap(kernel), (3, 1, 5001), jnp.float32
    for dtype in "float32", "bfloat16":
        yield f"gradient {dtype}", pullback, (1000, 49_152), dtype
    yield "beyond memory", beyond_memory, (2, 65_536), jnp.float32


def summary(chip, function, shape, dtype):
    z = jax.ShapeDtypeStruct(shape, dtype)
    try:
        program = compile_for(chip, function, *[z] * (2 if function is pullback else 1))
    except Exception as error:
        return {"error": str(error)}
    return {
        "kernels": program.kernels,
        "over memory": program.passes(z.size),
        "temporaries": program.memory.temp_size_in_bytes,
    }


def main(chip):
    for name, *program in programs():
        found = summary(chip, *program)
        ctypes.CDLL(None).fflush(None)  # what the compilers wrote comes before the summary
        print("\nSUMMARY", json.dumps({"program": name} | found), flush=True)


if __name__ == "__main__":
    main(sys.argv[1])
