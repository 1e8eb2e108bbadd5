"""What ``import jax_sae`` adds to ``import jax, flax, optax``, each time in a fresh interpreter.

python -m benchmarks.import_time
"""

import functools
import subprocess
import sys
from pathlib import Path

import tyro

from benchmarks.harness import Table, interleave, tabulate
from benchmarks.results import publish

CHECKOUT = Path(__file__).parents[1]
STACK = "import jax, flax, optax"


def import_seconds(imports: str, after: str = "pass") -> float:
    """Seconds that the statement ``imports`` takes in a new interpreter that has run ``after`` first."""
    program = f"import time\n{after}\nstart = time.perf_counter()\n{imports}\nprint(time.perf_counter() - start)"
    command = [sys.executable, "-c", program]
    output = subprocess.run(command, cwd=CHECKOUT, stdout=subprocess.PIPE, text=True, check=True).stdout
    return float(output.splitlines()[-1])


def import_table(rounds: int) -> Table:
    """The stack alone, the stack with jax_sae, and jax_sae once the stack is there; interleaved."""
    samplers = {
        STACK: functools.partial(import_seconds, STACK),
        f"{STACK}, jax_sae": functools.partial(import_seconds, f"{STACK}, jax_sae"),
        "import jax_sae after them": functools.partial(import_seconds, "import jax_sae", after=STACK),
    }
    for sampler in samplers.values():  # writes the bytecode caches
        sampler()
    return tabulate("fresh interpreter", interleave(samplers, rounds=rounds), baseline=STACK)


def main(rounds: int = 10) -> None:
    """Measure import time.

    Args:
      rounds: fresh interpreters of each kind.
    """
    publish("import_time", [import_table(rounds)])


if __name__ == "__main__":
    tyro.cli(main, prog="python -m benchmarks.import_time")
