"""What all metrics here share: sums of a batch on the device, merged on the host in float64."""

from typing import TypeVar

import jax
import numpy as np

Sums = TypeVar("Sums")


def on_host(sums: Sums) -> Sums:
    """The sums of a batch as NumPy float64 and int64, ready to be merged over any number of batches."""

    def widen(value: jax.Array) -> np.ndarray:
        array = np.asarray(value)
        return array.astype(np.int64 if np.issubdtype(array.dtype, np.integer) else np.float64)

    return jax.tree.map(widen, sums)
