"""sparsemax by sorting, in float64 NumPy."""

import numpy as np


def sparsemax_rows(z):
    """(p [B, M], tau [B], count [B]) of finite or -inf scores, straight from Algorithm 1."""
    z = np.asarray(z, np.float64)
    top = z.max(-1, keepdims=True)
    shifted = z - top
    descending = -np.sort(-shifted, axis=-1)
    with np.errstate(invalid="ignore"):
        means = (np.cumsum(np.where(np.isneginf(descending), 0, descending), -1) - 1) / np.arange(1, z.shape[-1] + 1)
    count = (descending > means).sum(-1)
    tau = np.take_along_axis(means, count[:, None] - 1, -1)
    return np.maximum(shifted - tau, 0), (tau + top)[:, 0], count
