"""Small data, and the application run as a user runs it."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np

ROOT = Path(__file__).parent.parent.parent
FLAGS = [
    "--steps",
    "40",
    "--batch-size",
    "32",
    "--n-concepts",
    "64",
    "--checkpoint-every",
    "10",
    "--log-every",
    "5",
]


def make_rows(rows=1200, d=16, seed=0):
    """Sparse mixtures of random directions with noise and an offset."""
    rng = np.random.default_rng(seed)
    codes = np.maximum(rng.normal(size=(rows, 24)) - 1, 0)
    mixed = codes @ np.random.default_rng(7).normal(size=(24, d)) + 0.1 * rng.normal(size=(rows, d)) + 0.5
    return mixed.astype(np.float32)


def command(module, *arguments):
    return [sys.executable, "-m", module, *map(str, arguments)]


def environment():
    """One CPU device, quiet, and the checkout on the path."""
    return os.environ | {
        "PYTHONPATH": str(ROOT),
        "JAX_PLATFORMS": "cpu",
        "PYTHONWARNINGS": "default",
        "JAX_COMPILATION_CACHE_DIR": str(ROOT / ".cache" / "jax"),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    }


def call(module, *arguments, cwd=ROOT):
    """Runs a command of the application to its end in a process of its own."""
    return subprocess.run(
        command(module, *arguments), capture_output=True, text=True, cwd=cwd, env=environment(), timeout=300
    )


def records(workdir):
    """The lines of metrics.jsonl."""
    return [json.loads(line) for line in (Path(workdir) / "metrics.jsonl").read_text().splitlines()]
