"""The same sums in one go, batch by batch, and with the rows spread over eight devices."""

import functools

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from jax_sae.metrics import on_host


@functools.cache
def jitted(of_batch):
    return jax.jit(of_batch)


def streamed(of_batch, *arrays, size):
    """Sums of all rows of ``arrays``, ``size`` at a time, merged on the host."""
    parts = [
        on_host(jitted(of_batch)(*(array[i : i + size] for array in arrays))) for i in range(0, len(arrays[0]), size)
    ]
    return functools.reduce(lambda a, b: a.merge(b), parts)


def sharded(of_batch, *arrays):
    """Sums of all rows of ``arrays`` as one batch that eight devices hold an eighth of each."""
    mesh = Mesh(np.array(jax.devices()), ("rows",))
    assert mesh.size == 8
    return on_host(jitted(of_batch)(*jax.device_put(arrays, NamedSharding(mesh, P("rows")))))
