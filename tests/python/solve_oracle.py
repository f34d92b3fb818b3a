"""The weight solvers in plain NumPy and float64, written from the papers: oracles of tests, no code of the package."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

Array = np.ndarray[Any, Any]


class Grids(NamedTuple):
    """Scale and zero point of every row and group, float64; zero is 0 where symmetric."""

    scale: Array
    zero: Array
    num_bits: int

    def codes(self, w: Array, group: int) -> Array:
        """The nearest codes of a column [rows] of ``group``."""
        half = 2 ** (self.num_bits - 1)
        return np.clip(np.rint(w / self.scale[:, group]) + self.zero[:, group], -half, half - 1)

    def distance_to_tie(self, steps: Array, group: int) -> Array:
        """Of weights in steps of the grid; 1 where both codes beside it are one after clamping."""
        half, below = 2 ** (self.num_bits - 1), np.floor(steps) + self.zero[:, group]
        return np.where((below >= half - 1) | (below < -half), 1.0, np.abs(steps - np.floor(steps) - 0.5))

    def values(self, codes: Array, group: int) -> Array:
        """What codes of a column stand for."""
        return (codes - self.zero[:, group]) * self.scale[:, group]


def grid_of(w: Array, num_bits: int, symmetric: bool, shrink: float = 1.0) -> tuple[Array, Array]:
    """Scale (rounded to float32) and zero point of the rows of one group [rows, size]."""
    low = np.minimum(w.min(axis=1), 0) * shrink
    high = np.maximum(w.max(axis=1), 0) * shrink
    levels, half = 2**num_bits - 1, 2 ** (num_bits - 1)
    scale = np.maximum(-low, high) / (levels / 2) if symmetric else (high - low) / levels
    scale = np.where(scale < np.finfo(np.float32).tiny, np.finfo(np.float32).eps, scale)
    scale = scale.astype(np.float32).astype(np.float64)
    zero = np.zeros_like(scale) if symmetric else np.clip(np.rint(-half - low / scale), -half, half - 1)
    return scale, zero


def grids_of(w: Array, num_bits: int, group_size: int, symmetric: bool, shrink: float = 1.0) -> Grids:
    """Grids of a whole weight from its ranges, or shrunken ones."""
    parts = [grid_of(w[:, k : k + group_size], num_bits, symmetric, shrink) for k in range(0, w.shape[1], group_size)]
    scale, zero = (np.stack(part, axis=1) for part in zip(*parts, strict=True))
    return Grids(scale, zero, num_bits)


def inverse_factor(hessian: Array, damp: float, order: Array) -> Array:
    """Upper triangular U with ``(H + damping)^-1 = U^T U`` in the order of visits; dead columns get a diagonal of 1."""
    h = hessian[np.ix_(order, order)].astype(np.float64)
    dead = np.diag(h) == 0
    h[dead, dead] = 1.0
    h[np.diag_indices_from(h)] += damp * np.mean(np.diag(h))
    return np.linalg.cholesky(np.linalg.inv(h)).T.copy()


def gptq(
    weight: Array, factor: Array, order: Array, group_size: int, grids: Grids, dynamic: bool, symmetric: bool
) -> tuple[Array, Grids, Array]:
    """Frantar et al. 2023, one column at a time. Also how near, in steps, each row came to a tie between two codes."""
    w = weight[:, order].astype(np.float64)
    scale, zero = grids.scale.copy(), grids.zero.copy()
    codes = np.zeros(w.shape)
    closest = np.ones(len(w))
    for j in range(w.shape[1]):
        group = int(order[j]) // group_size
        if dynamic and j % group_size == 0:
            scale[:, group], zero[:, group] = grid_of(w[:, j : j + group_size], grids.num_bits, symmetric)
        now = Grids(scale, zero, grids.num_bits)
        steps = w[:, j] / scale[:, group]
        closest = np.minimum(closest, now.distance_to_tie(steps, group))
        code = now.codes(w[:, j], group)
        error = (w[:, j] - now.values(code, group)) / factor[j, j]
        w[:, j + 1 :] -= np.outer(error, factor[j, j + 1 :])
        codes[:, order[j]] = code
    return codes.astype(np.int8), Grids(scale, zero, grids.num_bits), closest


def dequantized(codes: Array, grids: Grids) -> Array:
    """The weight [out, in] that codes stand for, float64."""
    size = codes.shape[1] // grids.scale.shape[1]
    zero, scale = np.repeat(grids.zero, size, axis=1), np.repeat(grids.scale, size, axis=1)
    return (codes.astype(np.float64) - zero) * scale


def objective(weight: Array, quantized: Array, hessian: Array) -> Array:
    """``(w - q) H (w - q)^T`` of every row, float64."""
    d = weight.astype(np.float64) - quantized
    return np.einsum("ri,ij,rj->r", d, hessian.astype(np.float64), d)


class Problem:
    """A small layer: correlated inputs, some of them dead, fewer of them than columns if asked."""

    def __init__(self, rows: int, columns: int, *, samples: int = 400, dead: int = 0, seed: int = 0) -> None:
        random = np.random.default_rng(seed)
        mix = random.normal(size=(columns, columns)) / columns**0.5 + np.eye(columns)
        x = random.normal(size=(samples, columns)) @ mix * random.lognormal(size=columns)
        self.weight = random.normal(size=(rows, columns)).astype(np.float32)
        x[:, random.permutation(columns)[:dead]] = 0
        self.hessian = (x.T @ x / samples).astype(np.float32)
        alive = np.diag(self.hessian) > 0
        self.weight[:, ~alive] = 0
        self.diagonal = np.ascontiguousarray(np.diag(self.hessian))
        self.by_size = np.argsort(-self.diagonal, kind="stable").astype(np.int32)
        self.natural = np.arange(columns, dtype=np.int32)

    def factor(self, order: Array, damp: float = 0.01) -> Array:
        """U of the damped Hessian, as solvers take it."""
        return inverse_factor(self.hessian, damp, order).astype(np.float32)


def grids_from(scale: Array, zero_point: Array | None, bits: int) -> Grids:
    """The oracle's grids from the solver's."""
    zero = np.zeros(scale.shape) if zero_point is None else zero_point.astype(np.float64)
    return Grids(scale.astype(np.float64), zero, bits)
