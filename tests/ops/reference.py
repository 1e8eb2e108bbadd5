"""sparsemax and entmax with their Jacobians in float64 NumPy, and the scores that they are tried on."""

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


def entmax_rows(z, alpha):
    """alpha-entmax [B, M] of finite or -inf scores, in float64 by bisection on the threshold."""
    z = np.asarray(z, np.float64)
    x = (alpha - 1) * (z - z.max(-1, keepdims=True))
    low, high = np.full((len(x), 1), -1.0), np.zeros((len(x), 1))
    for _ in range(200):
        middle = (low + high) / 2
        over = (np.maximum(x - middle, 0) ** (1 / (alpha - 1))).sum(-1, keepdims=True) >= 1
        low, high = np.where(over, middle, low), np.where(over, high, middle)
    return np.maximum(x - low, 0) ** (1 / (alpha - 1))


def entmax15_rows(z):
    """1.5-entmax [B, M] in float64 by sorting, without a search: Peters, Niculae and Martins 2019, algorithm 2."""
    z = np.asarray(z, np.float64)
    x = (z - z.max(-1, keepdims=True)) / 2
    descending = -np.sort(-x, axis=-1)
    count = np.arange(1, x.shape[-1] + 1)
    mean = np.cumsum(descending, -1) / count
    scatter = np.cumsum(descending**2, -1) - count * mean**2
    tau = mean - np.sqrt(np.maximum((1 - scatter) / count, 0))
    support = (tau <= descending).sum(-1, keepdims=True)
    return np.maximum(x - np.take_along_axis(tau, support - 1, -1), 0) ** 2


def entmax_jacobian(p, alpha):
    """diag(s) - s s^T / sum(s) for one row, with s = p^(2 - alpha) on the support."""
    p = np.asarray(p, np.float64)
    s = np.where(p > 0, np.where(p > 0, p, 1) ** (2 - alpha), 0)
    return np.diag(s) - np.outer(s, s) / s.sum()
