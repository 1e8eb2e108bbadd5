"""sparsemax and its Jacobian in float64 NumPy, and the scores that they are tried on."""

import numpy as np


def scores(rows, width, scale=1.0, seed=0):
    """[rows, width] float32, normal."""
    return (scale * np.random.default_rng(seed).standard_normal((rows, width))).astype(np.float32)


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


def jacobian(p):
    """diag(s) - s s^T / |S| for one row: s is 1 on the support S and 0 elsewhere."""
    s = (np.asarray(p) > 0).astype(np.float64)
    return np.diag(s) - np.outer(s, s) / s.sum()
