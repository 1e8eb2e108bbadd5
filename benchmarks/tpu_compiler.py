"""Programs compiled for TPUs by their real compiler, libtpu, which needs no TPU; nothing of this runs on one.

libtpu is in the extra ``compiled-tpu``. JAX looks for a TPU wherever it is installed: set JAX_PLATFORMS=cpu.
"""

import functools
import os
import re
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
from jax.experimental import topologies
from jax.sharding import Sharding, SingleDeviceSharding


@dataclass(frozen=True)
class Chip:
    """A kind of TPU: the smallest topology of it, and what is published of one of its devices.

    A TPU7x has two chiplets, each a device of its own with half of the bandwidth and of the rate.

    Attributes:
      topology: as ``jax.experimental.topologies`` takes it.
      bandwidth: of its memory, bytes/s.
      matmul_rate: of products of bfloat16, operations/s.
      on_chip: bytes of vector memory.
    """

    topology: str
    bandwidth: float
    matmul_rate: float
    on_chip: int


CHIPS = {
    "v4": Chip("v4:2x2x1", 1.228e12, 275e12, 16 << 20),
    "v5e": Chip("v5e:2x2", 0.819e12, 197e12, 128 << 20),
    "v5p": Chip("v5p:2x2x1", 2.765e12, 459e12, 64 << 20),
    "v6e": Chip("v6e:2x2", 1.64e12, 918e12, 128 << 20),
    "tpu7x": Chip("tpu7x:2x2x1", 3.69e12, 1153e12, 64 << 20),
}

_SETTINGS = {
    "TPU_SKIP_MDS_QUERY": "1",  # there is no machine to ask about its TPU; the next two answer for it
    "TPU_ACCELERATOR_TYPE": "v5litepod-1",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
}
_KERNEL = 'custom_call_target="tpu_custom_call"'
_INSTRUCTION = r"^ *(?:ROOT )?%([\w.-]+) = (?:\(.*?\)|\S+) ([\w-]+)\("


@functools.cache
def devices(chip: str) -> list[jax.Device]:
    """The devices of the topology of ``chip``, a name of CHIPS, to compile for.

    Raises:
      RuntimeError: libtpu is not installed.
    """
    os.environ.update(_SETTINGS)
    os.environ.setdefault("TPU_LOG_DIR", tempfile.mkdtemp(prefix="libtpu-"))
    return topologies.get_topology_desc(CHIPS[chip].topology, "tpu").devices


@dataclass(frozen=True)
class Program:
    """What the compiler made of a function.

    Attributes:
      text: the optimized HLO.
      memory: bytes of arguments, outputs, temporaries and code, as ``memory_analysis`` has them.
      cost: figures of ``cost_analysis``; of a kernel, its own estimate.
    """

    text: str
    memory: Any
    cost: dict[str, float]

    @property
    def kernels(self) -> list[str]:
        """Names of the Mosaic kernels that are called, as ``pallas_call`` got them."""
        calls = [re.match(_INSTRUCTION, line) for line in self.text.splitlines() if _KERNEL in line]
        return [re.sub(r"\.\d+$", "", call[1]) for call in calls if call]

    @property
    def kernel_memory(self) -> list[int]:
        """Bytes of on-chip memory that each kernel uses."""
        calls = [line for line in self.text.splitlines() if _KERNEL in line]
        return [int(re.findall(r'"used_scoped_memory_configs":\[\{[^]]*"size":"(\d+)"', call)[-1]) for call in calls]

    @property
    def cycles(self) -> int:
        """What the compiler expects of all operations that it has a model of, each loop as if it went around once."""
        return sum(int(cycles) for cycles in re.findall(r'"estimated_cycles":"(\d+)"', self.text))

    def operations(self) -> list[str]:
        """Opcodes of the entry computation, in order."""
        return [match[2] for match in re.finditer(_INSTRUCTION, self._entry, re.M)]

    def readers(self, argument: int) -> list[str]:
        """Opcodes of the entry computation's operations on an argument, which is counted from 0."""
        [(name, _)] = re.findall(rf"%([\w.-]+) = (\S+) parameter\({argument}\)", self._entry)
        lines = [line for line in self._entry.splitlines() if re.search(rf"\(.*%{re.escape(name)}[,)]", line)]
        return [match[2] for line in lines if (match := re.match(_INSTRUCTION, line))]

    def count(self, opcode: str) -> int:
        """How often an operation stands in the whole program, started asynchronously or not."""
        return len(re.findall(rf" {opcode}(?:-start)?\(", self.text))

    @property
    def _entry(self) -> str:
        return self.text[self.text.index("\nENTRY") :]


def compile_for(
    chip: str,
    function: Callable[..., Any],
    *arguments: Any,
    sharding: Sharding | None = None,
    donate: tuple[int, ...] = (),
) -> Program:
    """Compiles ``function`` for arguments of the shapes and dtypes of ``arguments``, pytrees of arrays or structs.

    Args:
      chip: a name of CHIPS.
      function: is jitted.
      arguments: only shapes and dtypes count.
      sharding: of every argument; on the first device of the topology without one.
      donate: positions of arguments whose memory the outputs may take.
    """
    place = SingleDeviceSharding(devices(chip)[0]) if sharding is None else sharding
    placed = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place), arguments)
    compiled = jax.jit(function, donate_argnums=donate).lower(*placed).compile()
    return Program(compiled.as_text() or "", compiled.memory_analysis(), dict(compiled.cost_analysis() or {}))
