"""The README's promises: its Python runs, and its commands know the flags that it shows."""

import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from jax_sae.data import ActivationWriter

README = Path(__file__).parents[1] / "README.md"
TEXT = README.read_text()


def code_blocks(language):
    return re.findall(rf"^```{language}\n(.*?)^```", TEXT, re.MULTILINE | re.DOTALL)


@pytest.mark.parametrize("block", code_blocks("python"))
def test_python_examples_run(block, tmp_path, monkeypatch, capsys):
    rows = np.random.default_rng(0).normal(size=(256, 8)).astype(np.float32)
    folder = tmp_path / "runs" / "demo" / "activations"
    with ActivationWriter(folder, d=8, dtype=np.float32, shard_rows=128) as writer:
        writer.append(rows)
        writer.close(holdout_rows=32)
    monkeypatch.chdir(tmp_path)
    # A thousand steps of the default model are for a reader's machine, three for this one.
    exec(block.replace("1000", "3").replace("1024", "64"), {})


def commands():
    lines = "\n".join(code_blocks("bash")).replace("\\\n", " ").splitlines()
    for line in lines:
        line = line.partition("#")[0]
        if match := re.match(r"python -m ((?:train|benchmarks)[\w.]*)", line):
            yield match[1], frozenset(re.findall(r"--[\w-]+", line))


@pytest.mark.slow
@pytest.mark.parametrize(("module", "flags"), sorted(set(commands()), key=str))
def test_commands_know_the_flags_shown(module, flags):
    command = [sys.executable, "-m", module, "--help"]
    shown = subprocess.run(command, cwd=README.parent, capture_output=True, text=True)
    assert shown.returncode == 0, shown.stderr
    assert flags <= set(re.findall(r"--[\w-]+", shown.stdout))


def test_relative_links_point_to_files():
    targets = re.findall(r"\]\((?!https?://|#)([^)]+)\)", TEXT)
    assert targets
    assert [target for target in targets if not (README.parent / target).exists()] == []
