"""Compiling for a GPU that is not there."""

import re

import jax
from jax.experimental import topologies
from jax.sharding import AbstractDevice, AbstractMesh, SingleDeviceSharding

NAMES = {"h100": "NVIDIA H100 80GB HBM3", "b200": "NVIDIA B200"}

# As the devices report themselves: cores, bytes per second, bytes of cache, GHz, bytes of memory, compute capability.
_NUMBERS = {
    "h100": (132, 3_352_320_000_000, 52_428_800, 1.98, 84_942_979_072, 9),
    "b200": (148, 7_672_320_000_000, 132_644_864, 1.965, 191_514_411_008, 10),
}


def description(target):
    """What XLA wants to know of a device, as a text protocol buffer."""
    cores, bandwidth, cache, clock, memory, capability = _NUMBERS[target]
    return f"""
        gpu_device_info {{
          core_count: {cores} fpus_per_core: 128 clock_rate_ghz: {clock}
          threads_per_warp: 32 threads_per_block_limit: 1024 threads_per_core_limit: 2048
          block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
          registers_per_core_limit: 65536 registers_per_block_limit: 65536
          shared_memory_per_core: 233472 shared_memory_per_block: 49152 shared_memory_per_block_optin: 232448
          l2_cache_size: {cache} memory_bandwidth: {bandwidth} device_memory_size: {memory}
          cuda_compute_capability {{ major: {capability} feature_extension: ACCELERATED_FEATURES }}
        }}
        platform_name: "CUDA"
        dnn_version_info {{ major: 9 minor: 10 }}
        device_description_str: "{NAMES[target]}"
    """


def compile_for(target, f, *arrays):
    """``f`` compiled for one device of the kind, for arguments of the shapes and dtypes of ``arrays``."""
    topology = topologies.get_topology_desc(platform="cuda", topology="1x1x1", target_config=description(target))
    device = topology.devices[0]
    kind = AbstractDevice(device_kind=device.device_kind, num_cores=None, platform="cuda")
    placed = [jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=SingleDeviceSharding(device)) for x in arrays]
    with jax.sharding.use_abstract_mesh(AbstractMesh((), (), abstract_device=kind)):
        return jax.jit(f).trace(*placed).lower(lowering_platforms=("cuda",)).compile()


def over_memory(compiled, elements):
    """(operation, arrays read, arrays written) for every operation on arrays of so many elements, in order."""
    text = compiled.as_text()
    entry = text[text.index("\nENTRY") :].splitlines()
    sizes, moved = {}, []
    for line in entry[1:]:
        match = re.match(r"\s*(?:ROOT )?%(\S+) = (\(.*?\)|\S+) ([\w-]+)\((.*?)\)", line)
        if not match:
            continue
        name, result, operation, operands = match.groups()
        large = [dtype for dtype, shape in re.findall(r"(\w+)\[([\d,]+)\]", result) if _count(shape) == elements]
        sizes[name] = large
        if operation not in ("parameter", "bitcast", "get-tuple-element", "tuple"):
            read = [dtype for operand in re.findall(r"%([\w.-]+)", operands) for dtype in sizes.get(operand, [])]
            if read or large:
                moved.append((operation, len(read), len(large)))
    return moved


def _count(shape):
    product = 1
    for size in shape.split(","):
        product *= int(size)
    return product
