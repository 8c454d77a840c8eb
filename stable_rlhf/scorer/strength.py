"""Preference strength (arXiv 2401.06080): how sure several scorers together are of a pair's label.

M scorers are trained on the same pairs in different orders; of pair i scorer m says d_mi = r_m(x, y_c) − r_m(x, y_r).
The mean μ_i over m is the pair's strength, the population standard deviation σ_i says how far the scorers disagree.
μ near 0 is an ambiguous pair, μ < 0 one whose label they would turn round.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

Floats = NDArray[np.float64]


def preference_strength(differences: ArrayLike) -> tuple[Floats, Floats]:
    """Mean and population standard deviation over the scorers.

    Args:
        differences: [M, pairs] score differences r(x, better) − r(x, worse); NaN where a scorer did not score a pair.

    Returns:
        (mean, deviation), [pairs] each; NaN for a pair that nobody scored.

    Raises:
        ValueError: not two-dimensional, no scorer, or an infinite difference.
    """
    d = np.asarray(differences, dtype=np.float64)
    if d.ndim != 2 or d.shape[0] == 0:
        raise ValueError(f"differences: shape {d.shape} instead of [M, pairs] with M >= 1")
    if np.isinf(d).any():
        scorer, pair = (int(i) for i in np.argwhere(np.isinf(d))[0])
        raise ValueError(f"differences: scorer {scorer} gave {d[scorer, pair]} to pair {pair}")
    known = ~np.isnan(d)
    count = known.sum(axis=0)
    voters = np.where(count > 0, count, np.nan)
    mean = np.where(known, d, 0.0).sum(axis=0) / voters
    square = np.where(known, d - mean, 0.0) ** 2
    return mean, np.sqrt(square.sum(axis=0) / voters)


def deviation_curve(mean: ArrayLike, std: ArrayLike, bins: int = 20) -> list[dict[str, float]]:
    """Mean deviation against mean strength, over ``bins`` groups of (nearly) equally many pairs, weakest first."""
    mu, sigma = np.asarray(mean, dtype=np.float64), np.asarray(std, dtype=np.float64)
    if bins < 1:
        raise ValueError(f"bins must be at least 1, got {bins}")
    groups = np.array_split(np.argsort(mu, kind="stable"), min(bins, len(mu)) or 1)
    return [
        {"mean": float(mu[g].mean()), "std": float(sigma[g].mean()), "pairs": len(g)} for g in groups if len(g)
    ]  # fmt: skip


def notable_pairs(mean: ArrayLike, count: int) -> dict[str, list[int]]:
    """Indices of the pairs to read first: the weakest (probably wrong labels), the most ambiguous (μ nearest 0) and the
    strongest, ``count`` of each."""
    mu = np.asarray(mean, dtype=np.float64)
    orders = {"weakest": mu, "most ambiguous": np.abs(mu), "strongest": -mu}
    return {name: np.argsort(key, kind="stable")[:count].tolist() for name, key in orders.items()}


def strength_summary(mean: ArrayLike, std: ArrayLike) -> dict[str, Any]:
    """Figures about a measured data set, ready for JSON."""
    mu, sigma = np.asarray(mean, dtype=np.float64), np.asarray(std, dtype=np.float64)
    if not len(mu):
        raise ValueError("mean is empty: no pair was scored")
    return {
        "pairs": len(mu),
        "mean": float(mu.mean()),
        "deviation": float(sigma.mean()),
        "below_zero": float((mu < 0).mean()),
        "quantiles": {f"{q:g}": float(np.quantile(mu, q)) for q in (0.05, 0.25, 0.5, 0.75, 0.95)},
        "curve": deviation_curve(mu, sigma),
    }
