"""Programs compiled for NVIDIA GPUs by XLA, which needs no GPU; nothing of this runs on one.

The plugin and NVIDIA's compilers are in the extra ``compiled-cuda``. XLA is not told which matrix product is the
fastest there, which it would find out by timing.
"""

import functools
import math
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import jax
from jax.experimental import topologies
from jax.sharding import AbstractDevice, AbstractMesh, SingleDeviceSharding


@dataclass(frozen=True)
class Chip:
    """A kind of GPU: what it reports of itself, and what is published of it.

    Attributes:
      name: of the device.
      cores: streaming multiprocessors.
      clock: GHz.
      bandwidth: of its memory, bytes/s.
      memory: bytes.
      cache: bytes of its second level.
      capability: major number of its compute capability.
      matmul_rate: of products of bfloat16, operations/s; float32 ones, rounded to 19 bits, take twice as long.
    """

    name: str
    cores: int
    clock: float
    bandwidth: float
    memory: int
    cache: int
    capability: int
    matmul_rate: float


CHIPS = {
    "h100": Chip("NVIDIA H100 80GB HBM3", 132, 1.98, 3.352e12, 84_942_979_072, 52_428_800, 9, 989e12),
    "b200": Chip("NVIDIA B200", 148, 1.965, 7.672e12, 191_514_411_008, 132_644_864, 10, 2250e12),
}

_DESCRIPTION = """
gpu_device_info {{
  core_count: {chip.cores} fpus_per_core: 128 clock_rate_ghz: {chip.clock}
  threads_per_warp: 32 threads_per_block_limit: 1024 threads_per_core_limit: 2048
  block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
  registers_per_core_limit: 65536 registers_per_block_limit: 65536
  shared_memory_per_core: 233472 shared_memory_per_block: 49152 shared_memory_per_block_optin: 232448
  l2_cache_size: {chip.cache} memory_bandwidth: {bandwidth} device_memory_size: {chip.memory}
  cuda_compute_capability {{ major: {chip.capability} feature_extension: ACCELERATED_FEATURES }}
}}
platform_name: "CUDA"
dnn_version_info {{ major: 9 minor: 10 }}
device_description_str: "{chip.name}"
"""

_FREE = {"parameter", "constant", "bitcast", "get-tuple-element", "tuple"}
_HEAD = r"(?:ENTRY )?%(\S+) \(.*\{$"
_INSTRUCTION = r" *(?:ROOT )?%(\S+) = (\(.*?\)|\S+) ([\w-]+)\((.*?)\)(.*)"


@dataclass(frozen=True)
class Operation:
    """A line of a program: ``result`` is its type, ``rest`` what stands behind its operands."""

    name: str
    result: str
    opcode: str
    operands: tuple[str, ...]
    rest: str

    def called(self, role: str) -> list[str]:
        """Names of the computations that it calls in a role: ``calls``, ``body``, ``branch_computations``..."""
        found = re.findall(rf"\b{role}=(\{{[^}}]*\}}|\S+)", self.rest)
        return re.findall(r"%([\w.-]+)", " ".join(found))


@dataclass(frozen=True)
class Program:
    """What the compiler made of a function.

    Attributes:
      text: the optimized HLO.
      memory: bytes of arguments, outputs, temporaries and code, as ``memory_analysis`` has them.
    """

    text: str
    memory: Any

    @property
    def kernels(self) -> int:
        """Calls of Mosaic kernels."""
        return self.text.count('custom_call_target="mosaic_gpu')

    def count(self, opcode: str) -> int:
        """How often an operation stands in the whole program."""
        return len(re.findall(rf" {opcode}\(", self.text))

    def passes(self, elements: int) -> list[tuple[str, int, int]]:
        """(opcode, arrays read, arrays written) for the entry's operations on arrays of so many elements, in order.

        Arrays of which rows or entries are only looked up do not count.
        """
        large: dict[str, int] = {}
        found = []
        for operation in self._entry:
            tables = self._tables(operation)
            read = sum(large.get(name, 0) for place, name in enumerate(operation.operands) if place not in tables)
            written = sum(math.prod(shape) == elements for _, shape in _arrays(operation.result))
            large[operation.name] = written
            if operation.opcode not in _FREE and (read or written):
                found.append((operation.opcode, read, written))
        return found

    @functools.cached_property
    def moved(self) -> int:
        """Bytes that all operations but matrix products read and write.

        Every array counts whole wherever an operation takes or gives it, but for a table that rows are only taken from
        or only added to: that one does not count. A loop counts as if it went around once, of a conditional the
        branch that moves least.
        """
        return self._moved(self._entry)

    def _moved(self, operations: list[Operation]) -> int:
        sizes = {operation.name: _size(operation.result) for operation in operations}
        return sum(self._moved_by(operation, sizes) for operation in operations if operation.opcode not in _FREE)

    def _moved_by(self, operation: Operation, sizes: dict[str, int]) -> int:
        match operation.opcode:
            case "while":
                return sum(self._moved(self._computations[name]) for name in operation.called("body"))
            case "conditional":
                branches = operation.called("(?:branch_computations|true_computation|false_computation)")
                return min(self._moved(self._computations[name]) for name in branches)
        if operation.opcode == "dot" or any(line.opcode == "dot" for line in self._inside(operation)):
            return 0
        tables = self._tables(operation)
        read = sum(sizes.get(name, 0) for place, name in enumerate(operation.operands) if place not in tables)
        return read if "scatter" in tables.values() else read + sizes[operation.name]

    def _inside(self, operation: Operation) -> list[Operation]:
        return [line for name in operation.called("calls") for line in self._computations[name]]

    def _tables(self, operation: Operation) -> dict[int, str]:
        """The operands of a fusion that rows are only taken from or added to, with ``gather`` or ``scatter``."""
        inside, found = self._inside(operation), {}
        for line in inside:
            users = [user for user in inside if line.name in user.operands]
            ways = {user.opcode if user.operands[0] == line.name else "" for user in users}
            if line.opcode == "parameter" and ways in ({"gather"}, {"scatter"}):
                found[int(line.operands[0])] = ways.pop()
        return found

    @functools.cached_property
    def _computations(self) -> dict[str, list[Operation]]:
        found: dict[str, list[Operation]] = {}
        for line in self.text.splitlines():
            if head := re.match(_HEAD, line):
                operations = found.setdefault(head[1], [])
            elif found and (instruction := re.match(_INSTRUCTION, line)):
                operations.append(_operation(*instruction.groups()))
        return found

    @property
    def _entry(self) -> list[Operation]:
        [name] = re.findall(r"^ENTRY %(\S+)", self.text, re.MULTILINE)
        return self._computations[name]


def _operation(name: str, result: str, opcode: str, operands: str, rest: str) -> Operation:
    names = (operands,) if opcode == "parameter" else tuple(re.findall(r"%([\w.-]+)", operands))
    return Operation(name, result, opcode, names, rest)


def _arrays(result: str) -> Iterator[tuple[str, list[int]]]:
    """(dtype, shape) of every array of a type."""
    for dtype, shape in re.findall(r"\b([a-z]+\d*)\[([\d,]*)\]", result):
        yield dtype, [int(length) for length in shape.split(",") if length]


def _size(result: str) -> int:
    width = lambda dtype: int(re.sub(r"\D", "", dtype) or 8) // 8  # noqa: E731
    return sum(width(dtype) * math.prod(shape) for dtype, shape in _arrays(result))


def compile_for(chip: str, function: Callable[..., Any], *arguments: Any, donate: tuple[int, ...] = ()) -> Program:
    """Compiles ``function`` for one device, for arguments of the shapes and dtypes of ``arguments``.

    Args:
      chip: a name of CHIPS.
      function: is jitted.
      arguments: pytrees of arrays or structs; only shapes and dtypes count.
      donate: positions of arguments whose memory the outputs may take.

    Raises:
      RuntimeError: the plugin for CUDA is not installed.
    """
    description = _DESCRIPTION.format(chip=CHIPS[chip], bandwidth=int(CHIPS[chip].bandwidth))
    device: jax.Device
    [device] = topologies.get_topology_desc(platform="cuda", topology="1x1x1", target_config=description).devices
    kind = AbstractDevice(device_kind=device.device_kind, num_cores=None, platform="cuda")
    place = SingleDeviceSharding(device)
    placed = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place), arguments)
    with jax.sharding.use_abstract_mesh(AbstractMesh((), (), abstract_device=kind)):
        traced = jax.jit(function, donate_argnums=donate).trace(*placed)
        compiled = traced.lower(lowering_platforms=("cuda",)).compile()
    return Program(compiled.as_text() or "", compiled.memory_analysis())
