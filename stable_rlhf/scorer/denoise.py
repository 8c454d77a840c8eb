"""Denoising by preference strength (arXiv 2401.06080): what is done to which pairs, as one declarative policy.

A policy is a list of bands. The first band that holds a pair's strength μ says what is done; a pair in none stays as it
is. Limits are strengths, or shares of the pairs in the order of their strength:

    {below: -1.0, flip: true}                        μ < -1
    {between: [-1.0, 0.2], label_smoothing: 0.3}     -1 ≤ μ < 0.2
    {above: 0.2, adaptive_margin: true}              0.2 ≤ μ
    {lowest: 0.1, drop: true}, {quantiles: [0.1, 0.4], soft_labels: true}, {highest: 0.1, label_smoothing: 0.1}

With Δ = score(better) − score(worse) after a flip, and s = |μ| after a flip and μ without, the ranking term becomes

    −(1 − α) log σ(Δ − m) − α log σ(−(Δ − m))

    flip: the two responses change places      drop: the pair is left out     adaptive_margin: m = s (0 otherwise)
    label_smoothing: α as given                soft_labels: α = σ(−s), a wrong label's probability by Bradley and Terry

In the paper the margin stands outside the logarithm, where it would have no gradient. The Advantage Model's two bounds
follow a flip too, smoothing and margin do not touch them.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from stable_rlhf.data.jsonl import is_finite
from stable_rlhf.data.records import Comparison, DataError, PairStrength

_FLAGS = ("flip", "drop", "soft_labels", "adaptive_margin")


@dataclass(frozen=True)
class Band:
    """Pairs with low ≤ x < high, and what is done to them; x is the strength, or its rank as a share of the pairs."""

    low: float
    high: float
    by_rank: bool
    flip: bool = False
    drop: bool = False
    soft_labels: bool = False
    adaptive_margin: bool = False
    label_smoothing: float | None = None


@dataclass(frozen=True)
class Denoised:
    """What `denoise` made of its rows.

    Attributes:
        rows: for every row given, what is left of it, with what was done in ``meta["denoise"]``; None without a pair.
        decisions: for every row given, for every pair of it: ``{"mean", "std"}`` it was decided by, and what was done:
            ``"flip"``, ``"drop"``, ``"label_smoothing"`` (α), ``"rank_margin"`` (m), where it was.
        counts: pairs in all, and pairs with each of these.
    """

    rows: list[Comparison | None]
    decisions: list[list[dict[str, Any]]]
    counts: dict[str, int]


def parse_bands(name: str, entries: Sequence[Mapping[str, Any]]) -> list[Band]:
    """Bands from a recipe.

    Raises:
        ValueError: names the setting and the entry whose limits or actions cannot be used.
    """
    return [_band(f"{name}[{i}]", entry) for i, entry in enumerate(entries)]


def _band(name: str, entry: Mapping[str, Any]) -> Band:
    limits = {k: v for k, v in entry.items() if k in ("below", "above", "between", "lowest", "highest", "quantiles")}
    actions = {k: v for k, v in entry.items() if k not in limits}
    for key in actions:
        if key not in (*_FLAGS, "label_smoothing"):
            known = "below, above, between, lowest, highest, quantiles, label_smoothing, " + ", ".join(_FLAGS)
            raise ValueError(f"{name}: unknown key {key!r}; known are {known}")
    if len(limits) != 1:
        raise ValueError(f"{name}: give one of below, above, between, lowest, highest and quantiles, got {dict(entry)}")
    ((kind, value),) = limits.items()
    by_rank = kind in ("lowest", "highest", "quantiles")
    count, expected = (2, "two numbers, [low, high]") if kind in ("between", "quantiles") else (1, "a number")
    numbers = value if count == 2 else [value]
    if not isinstance(numbers, list | tuple) or len(numbers) != count or not all(map(is_finite, numbers)):
        raise ValueError(f"{name}: {kind} takes {expected}, got {value!r}")
    low, high = {
        "below": (-math.inf, numbers[0]), "lowest": (-math.inf, numbers[0]), "above": (numbers[0], math.inf),
        "highest": (1 - numbers[0], math.inf),
    }.get(kind, tuple(numbers))  # fmt: skip
    if not low < high:
        raise ValueError(f"{name}: {kind} needs low < high, got {value!r}")
    if by_rank and not all(0 <= n <= 1 for n in numbers):
        raise ValueError(f"{name}: {kind} takes shares between 0 and 1, got {value!r}")
    for key in _FLAGS:
        if not isinstance(actions.get(key, False), bool):
            raise ValueError(f"{name}: {key} is true or false, got {actions[key]!r}")
    alpha = actions.get("label_smoothing")
    if alpha is not None and not (is_finite(alpha) and 0 <= alpha <= 1):
        raise ValueError(f"{name}: label_smoothing must be between 0 and 1, got {alpha!r}")
    band = Band(low, high, by_rank, **actions)
    done = [key for key in actions if actions[key] is not None and actions[key] is not False]
    if not done:
        raise ValueError(f"{name}: says nothing to do: flip, drop, label_smoothing, soft_labels or adaptive_margin")
    if band.drop and len(done) > 1:
        raise ValueError(f"{name}: drop leaves nothing for {', '.join(k for k in done if k != 'drop')}")
    if band.soft_labels and alpha is not None:
        raise ValueError(f"{name}: soft_labels takes alpha from the strength, label_smoothing gives it; give one")
    return band


def denoise(rows: Sequence[Comparison], bands: Sequence[Band]) -> Denoised:
    """Apply bands to rows that carry their strength; the formulas are at the head of the module.

    A ranking loses the pairs that are dropped. Ranks are over all pairs of ``rows``, ties in their order.

    Raises:
        DataError: a row has no strength, or every pair is dropped.
    """
    strengths: list[PairStrength] = []
    for row in rows:
        if row.strength is None:
            raise DataError(
                f"{row.source}: no 'strength', which denoise goes by; measure it with `stable-rlhf strength` first"
            )
        strengths += row.strength
    share = np.empty(len(strengths))
    share[np.argsort([s.mean for s in strengths], kind="stable")] = (np.arange(len(share)) + 0.5) / max(len(share), 1)
    shares = iter(share.tolist())
    left: list[Comparison | None] = []
    decisions: list[list[dict[str, Any]]] = []
    counts = Counter({"pairs": len(strengths)})
    for row in rows:
        done = [_decide(strength, next(shares), bands) for strength in row.strength or ()]
        decisions.append(done)
        counts.update(key for decision in done for key in decision if key not in ("mean", "std"))
        left.append(_apply(row, done))
    if rows and not any(left):
        raise DataError("denoise drops every pair")
    return Denoised(left, decisions, dict(counts))


def _decide(strength: PairStrength, share: float, bands: Sequence[Band]) -> dict[str, Any]:
    decision: dict[str, Any] = {"mean": strength.mean, "std": strength.std}
    band = next((b for b in bands if b.low <= (share if b.by_rank else strength.mean) < b.high), None)
    if band is None:
        return decision
    if band.drop:
        return decision | {"drop": True}
    trusted = abs(strength.mean) if band.flip else strength.mean
    if band.flip:
        decision["flip"] = True
    if band.soft_labels:
        decision["label_smoothing"] = 0.5 - 0.5 * math.tanh(0.5 * trusted)  # σ(−s), without overflow
    elif band.label_smoothing is not None:
        decision["label_smoothing"] = float(band.label_smoothing)
    if band.adaptive_margin:
        decision["rank_margin"] = trusted
    return decision


def _apply(row: Comparison, decisions: Sequence[dict[str, Any]]) -> Comparison | None:
    assert row.strength is not None
    left = [
        ((worse, better), PairStrength(-s.mean, s.std), d) if d.get("flip") else ((better, worse), s, d)
        for (better, worse), s, d in zip(row.pairs, row.strength, decisions, strict=True)
        if not d.get("drop")
    ]
    if not left:
        return None
    return replace(
        row,
        pairs=tuple(pair for pair, _, _ in left),
        strength=tuple(strength for _, strength, _ in left),
        label_smoothing=tuple(d.get("label_smoothing") for _, _, d in left),
        rank_margin=tuple(d.get("rank_margin", 0.0) for _, _, d in left),
        meta={**row.meta, "denoise": [d for _, _, d in left]},
    )
