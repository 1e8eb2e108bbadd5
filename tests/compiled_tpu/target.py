"""Programs through the compiler of TPUs that are not there."""

import functools
import os
import tempfile

os.environ |= {
    "TPU_SKIP_MDS_QUERY": "1",  # no question to the cloud about what machine this is
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
    "TPU_LOG_DIR": tempfile.mkdtemp(),
}

import jax
from jax.experimental import topologies
from jax.sharding import Mesh, NamedSharding, PartitionSpec, SingleDeviceSharding

TOPOLOGIES = {"v5e": "v5e:2x2", "v5p": "v5p:2x2x1", "v6e": "v6e:2x2", "tpu7x": "tpu7x:2x2x1"}


@functools.cache
def devices(tpu):
    return topologies.get_topology_desc(TOPOLOGIES[tpu], "tpu").devices


def compile_for(tpu, function, *arguments, donate=()):
    """``function`` compiled for one device; ``arguments`` are pytrees of shapes."""
    place = SingleDeviceSharding(devices(tpu)[0])
    placed = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place), arguments)
    return jax.jit(function, donate_argnums=donate).lower(*placed).compile()


def compile_over_four(tpu, function, shape, dtype, spec):
    """``function`` of one array of scores that is split over four devices as ``spec(mesh)`` says."""
    mesh = Mesh(devices(tpu)[:4], ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    placed = jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(mesh, PartitionSpec(*spec)))
    return jax.jit(functools.partial(function, mesh)).lower(placed).compile()


def kernels(compiled, name=""):
    """How many kernels of Mosaic whose name begins with ``name`` are in a compiled program."""
    lines = (line for line in compiled.as_text().splitlines() if 'custom_call_target="tpu_custom_call"' in line)
    return sum(name in line for line in lines)
