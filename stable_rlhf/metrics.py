"""Accuracy, calibration and per-task statistics of scorers, and win/lose/tie shares of policies. numpy only.

Notation: a pair has a chosen score a_c and a rejected score a_r, difference Δ = a_c − a_r. The scorer's *confidence* in
its own ranking is σ(|Δ|), in [0.5, 1]; its *credit* is 1 when Δ > 0, 0 when Δ < 0 and ½ for a tie. (Scoring σ(Δ)
against "chosen is better" would be meaningless: with chosen always first that label is constant.)

Every interval is a dict ``{"value", "low", "high"}`` at the 95 % level. It speaks of the sampled test items only: how
much another training seed would move the figure is not in it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from statistics import NormalDist
from typing import Any, Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray

Floats = NDArray[np.float64]
Interval = dict[str, float]

LEVEL = 0.95
RESAMPLES = 1000
NO_TASK = "(none)"
_CHUNK = 2_000_000  # elements of resampling weights held at once


def _vector(values: ArrayLike, name: str) -> Floats:
    array = np.asarray(values, dtype=np.float64)
    if array.ndim != 1:
        raise ValueError(f"{name} must be one-dimensional, got shape {array.shape}")
    if array.size == 0:
        raise ValueError(f"{name} is empty: nothing to evaluate")
    if not np.isfinite(array).all():
        index = int(np.flatnonzero(~np.isfinite(array))[0])
        raise ValueError(f"{name} holds {array[index]} at index {index}; scores must be finite")
    return array


def _two(first: ArrayLike, second: ArrayLike, names: tuple[str, str]) -> tuple[Floats, Floats]:
    a, b = _vector(first, names[0]), _vector(second, names[1])
    if a.size != b.size:
        raise ValueError(f"{names[0]} has {a.size} entries but {names[1]} has {b.size}")
    return a, b


def _pairs(chosen: ArrayLike, rejected: ArrayLike) -> tuple[Floats, Floats]:
    return _two(chosen, rejected, ("chosen", "rejected"))


def _tasks(tasks: Sequence[str | None], size: int) -> list[str]:
    if len(tasks) != size:
        raise ValueError(f"tasks has {len(tasks)} entries but there are {size} scores")
    return [NO_TASK if task is None else str(task) for task in tasks]


def _bins(bins: int) -> int:
    if bins < 1:
        raise ValueError(f"bins must be at least 1, got {bins}")
    return int(bins)


def wilson(successes: float, total: float) -> Interval:
    """Wilson score interval of a proportion; ``successes`` may be fractional (ties counted half only make it wider)."""
    if total < 1:
        raise ValueError(f"total must be at least 1, got {total}")
    if not 0 <= successes <= total:
        raise ValueError(f"successes must lie in 0..{total}, got {successes}")
    z = NormalDist().inv_cdf(0.5 + LEVEL / 2)
    p = successes / total
    centre = (p + z * z / (2 * total)) / (1 + z * z / total)
    half = z * np.sqrt(p * (1 - p) / total + z * z / (4 * total * total)) / (1 + z * z / total)
    # At p = 0 and p = 1 the bound is exactly p; rounding must not leave the value outside its own interval.
    return {
        "value": float(p),
        "low": float(max(0.0, min(centre - half, p))),
        "high": float(min(1.0, max(centre + half, p))),
    }


def win_minus_lose(win: float, lose: float, total: int) -> Interval:
    """Interval of win − lose, two shares of the *same* ``total`` comparisons: variance (w + l − (w − l)²)/n."""
    if total < 1:
        raise ValueError(f"total must be at least 1, got {total}")
    difference = win - lose
    # One added win and one added lose keep the width positive when every comparison is a tie (as the Wald+2 interval).
    w, l_, n = (win * total + 0.5) / (total + 1), (lose * total + 0.5) / (total + 1), total + 1
    half = NormalDist().inv_cdf(0.5 + LEVEL / 2) * float(np.sqrt(max(w + l_ - (w - l_) ** 2, 0.0) / n))
    return {"value": difference, "low": max(-1.0, difference - half), "high": min(1.0, difference + half)}


def difference_interval(first: Interval, second: Interval) -> Interval:
    """Interval of first − second from two single intervals, taken as independent (Newcombe's hybrid; MOVER).

    Where both figures come from the same items the truth is usually narrower; a paired bootstrap is better then.
    """
    d = first["value"] - second["value"]
    down = np.hypot(first["value"] - first["low"], second["high"] - second["value"])
    up = np.hypot(first["high"] - first["value"], second["value"] - second["low"])
    return {"value": d, "low": float(d - down), "high": float(d + up)}


def _independent(values: Floats, groups: Sequence[object]) -> float:
    """How many independent items tell as much of the mean as these, of which a group's are not: at most all of them,
    and where all values are the same, or there is one group alone, as many as there are groups."""
    gaps = values - values.mean()
    by_group = np.bincount(_codes(groups), gaps)
    if not gaps.any() or len(by_group) == 1:
        return float(len(by_group))
    return float(min(values.size, values.size * (gaps**2).sum() / max((by_group**2).sum(), np.finfo(float).tiny)))


def _codes(labels: Sequence[object]) -> NDArray[np.int64]:
    numbers: dict[object, int] = {}
    return np.array([numbers.setdefault(label, len(numbers)) for label in labels], dtype=np.int64)


def _weights(
    n: int, resamples: int, seed: int, strata: Sequence[str] | None, groups: Sequence[object] | None
) -> Iterator[Floats]:
    """Blocks of bootstrap weights [rows, n]: how often each item was drawn; sizes of strata are kept. What is drawn is
    a group's whole part in a stratum."""
    if groups is not None:
        given = [""] * n if strata is None else strata
        units = list(zip(given, groups, strict=True))
        unit = _codes(units)
        strata_of_units = None if strata is None else [stratum for stratum, _ in dict.fromkeys(units)]
        for block in _weights(int(unit.max()) + 1, resamples, seed, strata_of_units, None):
            yield block[:, unit]
        return
    rng = np.random.default_rng(seed)
    if strata is None:
        order, start, size = np.arange(n), np.zeros(n), np.full(n, float(n))
    else:
        _, code = np.unique(np.asarray(strata, dtype=object).astype(str), return_inverse=True)
        order = np.argsort(code, kind="stable")
        sizes = np.bincount(code)
        first = np.concatenate([[0], np.cumsum(sizes)[:-1]])
        start, size = first[code[order]].astype(float), sizes[code[order]].astype(float)
    rows = max(1, _CHUNK // n)
    for begin in range(0, resamples, rows):
        count = min(rows, resamples - begin)
        draws = order[(start + np.floor(rng.random((count, n)) * size)).astype(np.int64)]
        flat = (draws + np.arange(count)[:, None] * n).ravel()
        yield np.bincount(flat, minlength=count * n).reshape(count, n).astype(np.float64)


def bootstrap(
    statistic: Callable[[Floats], Floats],
    n: int,
    *,
    seed: int = 0,
    resamples: int = RESAMPLES,
    strata: Sequence[str] | None = None,
    groups: Sequence[object] | None = None,
    low: float = -np.inf,
    high: float = np.inf,
) -> Interval:
    """Basic (reflected) bootstrap interval of ``statistic`` over ``n`` items.

    statistic: weights [rows, n] (draws of each item) -> values [rows]; ``value`` is that of weights one.
    Reflection (2·value − quantile) is used because figures such as ECE are biased upwards on a sample and a resample is
    biased once more: the percentile interval of a calibrated scorer would lie wholly above its own value.
    The result is clipped to [low, high] and always contains its value. strata: labels whose counts resamples keep.
    groups: labels of items that are not independent and are drawn together, such as the pairs of a prompt; the weights
    then need not sum to n, and it is counts of groups that strata keep.
    """
    if n < 1:
        raise ValueError(f"n must be at least 1, got {n}")
    if resamples < 1:
        raise ValueError(f"resamples must be at least 1, got {resamples}")
    value = float(statistic(np.ones((1, n)))[0])
    values = np.concatenate([statistic(block) for block in _weights(n, resamples, seed, strata, groups)])
    tail = (1 - LEVEL) / 2
    q_low, q_high = (float(q) for q in np.quantile(values, [tail, 1 - tail]))
    return {
        "value": value,
        "low": min(value, max(low, 2 * value - q_high)),
        "high": max(value, min(high, 2 * value - q_low)),
    }


def sigmoid(x: Floats) -> Floats:
    """Logistic function without overflow."""
    e = np.exp(-np.abs(x))
    return np.where(x >= 0, 1 / (1 + e), e / (1 + e))


def credits(chosen: ArrayLike, rejected: ArrayLike) -> Floats:
    """1 where chosen scores higher, 0 where lower, ½ for a tie; [pairs]."""
    c, r = _pairs(chosen, rejected)
    return 0.5 * (np.sign(c - r) + 1)


def pair_accuracy(chosen: ArrayLike, rejected: ArrayLike) -> float:
    """Share of pairs ranked as the label says, ties counted half."""
    return float(credits(chosen, rejected).mean())


def _bin_index(confidence: Floats, bins: int, mass: str) -> tuple[NDArray[np.int64], Floats]:
    """Bin of each confidence and the bins + 1 edges."""
    if mass == "width":
        edges = np.linspace(0.5, 1.0, bins + 1)
    elif mass == "equal":
        # Quantile edges, not a split of the sorted list: equal confidences share a bin whatever the order of the rows.
        edges = np.quantile(confidence, np.linspace(0, 1, bins + 1))
    else:
        raise ValueError(f"mass must be 'width' or 'equal', got {mass!r}")
    return np.clip(np.searchsorted(edges[1:-1], confidence, side="right"), 0, bins - 1), edges


def calibration_statistic(
    chosen: ArrayLike, rejected: ArrayLike, bins: int = 10, mass: Literal["width", "equal"] = "width"
) -> Callable[[Floats], Floats]:
    """ECE as a function of item weights [rows, pairs] -> [rows], for :func:`bootstrap`; bins are the sample's."""
    c, r = _pairs(chosen, rejected)
    confidence = sigmoid(np.abs(c - r))
    index, _ = _bin_index(confidence, _bins(bins), mass)
    gap = np.zeros((c.size, bins))
    gap[np.arange(c.size), index] = credits(c, r) - confidence
    return lambda weights: np.abs(weights @ gap).sum(axis=1) / weights.sum(axis=1)


def calibration(
    chosen: ArrayLike, rejected: ArrayLike, bins: int = 10, mass: Literal["width", "equal"] = "width"
) -> tuple[float, list[dict[str, float]]]:
    """Expected calibration error and the rows of the reliability diagram.

    ECE = Σ_b n_b/n · |accuracy_b − confidence_b| with confidence σ(|Δ|) and accuracy the mean credit (ties half).
    mass="width": ``bins`` bins of equal width over **[0.5, 1]**, the only range σ(|Δ|) takes (ten bins of 0.05);
    mass="equal": bins between quantiles of the confidences. Rows {"low", "high", "confidence", "accuracy", "count"},
    bins without pairs left out.
    """
    c, r = _pairs(chosen, rejected)
    confidence, credit = sigmoid(np.abs(c - r)), credits(c, r)
    index, edges = _bin_index(confidence, _bins(bins), mass)
    rows = []
    for b in np.unique(index):
        here = index == b
        rows.append({
            "low": float(edges[b]), "high": float(edges[b + 1]), "confidence": float(confidence[here].mean()),
            "accuracy": float(credit[here].mean()), "count": int(here.sum()),
        })  # fmt: skip
    return sum(row["count"] / c.size * abs(row["accuracy"] - row["confidence"]) for row in rows), rows


def ece_if_calibrated(
    chosen: ArrayLike,
    rejected: ArrayLike,
    bins: int = 10,
    mass: Literal["width", "equal"] = "width",
    *,
    seed: int = 0,
    resamples: int = RESAMPLES,
) -> Floats:
    """ECE [resamples] that a perfectly calibrated scorer with these very confidences shows by chance alone.

    Credits are drawn as Bernoulli(confidence). ECE sums absolute values, so on n pairs even perfection does not measure
    0; this says how far above.
    """
    c, r = _pairs(chosen, rejected)
    confidence = sigmoid(np.abs(c - r))
    index, _ = _bin_index(confidence, _bins(bins), mass)
    member = np.zeros((c.size, bins))
    member[np.arange(c.size), index] = 1.0
    rng = np.random.default_rng(seed)
    rows = max(1, _CHUNK // c.size)
    by_block = []
    for begin in range(0, resamples, rows):
        right = rng.random((min(rows, resamples - begin), c.size)) < confidence
        by_block.append(np.abs((right - confidence) @ member).sum(axis=1) / c.size)
    return np.concatenate(by_block)


def ece_interval(
    chosen: ArrayLike,
    rejected: ArrayLike,
    bins: int = 10,
    mass: Literal["width", "equal"] = "width",
    *,
    seed: int = 0,
    resamples: int = RESAMPLES,
    groups: Sequence[object] | None = None,
) -> Interval:
    """ECE with its bootstrap interval, whose lower end is 0 where perfect calibration is not ruled out.

    A bootstrap alone misses a true ECE of 0 every second time, since resamples keep the chance gaps of the sample. So
    ``low`` is 0 unless the ECE exceeds 97.5 % of the draws of :func:`ece_if_calibrated`.
    """
    c, r = _pairs(chosen, rejected)
    statistic = calibration_statistic(c, r, bins, mass)
    interval = bootstrap(statistic, c.size, seed=seed, resamples=resamples, groups=groups, low=0, high=1)
    chance = ece_if_calibrated(c, r, bins, mass, seed=seed, resamples=resamples)
    if interval["value"] <= np.quantile(chance, (1 + LEVEL) / 2):
        interval["low"] = 0.0
    return interval


def brier(chosen: ArrayLike, rejected: ArrayLike) -> float:
    """Mean of (1 − σ(Δ))², the squared error of P(chosen is better) = σ(Δ); 0.25 for a scorer that never commits."""
    c, r = _pairs(chosen, rejected)
    return float(np.square(sigmoid(r - c)).mean())


def fit_temperature(chosen: ArrayLike, rejected: ArrayLike) -> float:
    """T > 0 that minimises the mean of −log σ(Δ/T) over the pairs.

    The loss is convex in s = 1/T, so its derivative is bisected over log s. Where no finite minimiser exists the end of
    the range T ∈ mean|Δ| · [1e-3, 1e3] is returned: the low end when every pair is ranked right (surer is always
    better), the high end when the scorer is no better than chance. If all differences are 0, T = 1.
    """
    c, r = _pairs(chosen, rejected)
    delta = c - r
    scale = float(np.abs(delta).mean())
    if scale == 0:
        return 1.0
    delta = delta / scale

    def slope(s: float) -> float:
        return float(-(delta * sigmoid(-delta * s)).mean())

    low, high = np.log(1e-3), np.log(1e3)
    if slope(float(np.exp(low))) >= 0:
        return scale * 1e3
    if slope(float(np.exp(high))) <= 0:
        return scale * 1e-3
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if slope(float(np.exp(middle))) < 0 else (low, middle)
    return scale / float(np.exp((low + high) / 2))


def temperature_scaled(chosen: ArrayLike, rejected: ArrayLike, *, seed: int = 0) -> tuple[Floats, str]:
    """Differences Δ/T [pairs], and in words which pairs T was fitted on: never those that it scales.

    The pairs are split into two random halves, and each is scaled by the temperature of the other. A single pair has no
    other half and stays as it is.
    """
    c, r = _pairs(chosen, rejected)
    if c.size < 2:
        return c - r, "not fitted, as there is one pair only"
    order = np.random.default_rng(seed).permutation(c.size)
    halves = order[: c.size // 2], order[c.size // 2 :]
    scaled = np.empty(c.size)
    for here, there in (halves, halves[::-1]):
        scaled[here] = (c[here] - r[here]) / fit_temperature(c[there], r[there])
    return scaled, "cross-fitted in two halves"


def difference_curve(chosen: ArrayLike, rejected: ArrayLike, bins: int = 10) -> list[dict[str, float]]:
    """Accuracy against score difference (Fig. 2): rows {"difference", "accuracy", "count"} over quantile bins of |Δ|.

    ``difference`` is the mean |Δ| of the bin; a calibrated scorer lies on 1/(1 + e^−Δ).
    """
    c, r = _pairs(chosen, rejected)
    size, credit = np.abs(c - r), credits(c, r)
    edges = np.quantile(size, np.linspace(0, 1, _bins(bins) + 1))
    index = np.clip(np.searchsorted(edges[1:-1], size, side="right"), 0, bins - 1)
    return [
        {
            "difference": float(size[index == b].mean()),
            "accuracy": float(credit[index == b].mean()),
            "count": int((index == b).sum()),
        }
        for b in np.unique(index)
    ]


def per_task(scores: ArrayLike, tasks: Sequence[str | None]) -> dict[str, dict[str, float]]:
    """{task: {"count", "mean", "std"}} over all responses, tasks sorted by name; std is the population one (Fig. 4)."""
    values = _vector(scores, "scores")
    names = np.asarray(_tasks(tasks, values.size), dtype=object)
    result = {}
    for task in sorted(set(names)):
        here = values[names == task]
        result[str(task)] = {"count": int(here.size), "mean": float(here.mean()), "std": float(here.std())}
    return result


def task_mean_spread(table: dict[str, dict[str, float]]) -> float:
    """Population standard deviation, over tasks, of the per-task mean score: 0 when every task sits at one level."""
    return float(np.std([row["mean"] for row in table.values()]))


def task_std_mean(table: dict[str, dict[str, float]]) -> float:
    """Mean over tasks of the per-task standard deviation: the scale on which the scorer tells responses apart."""
    return float(np.mean([row["std"] for row in table.values()]))


def task_statistic(
    chosen: ArrayLike,
    rejected: ArrayLike,
    tasks: Sequence[str | None],
    what: Literal["spread", "relative", "variation"],
) -> Callable[[Floats], Floats]:
    """A spread over tasks as a function of item weights [rows, pairs] -> [rows], for :func:`bootstrap`.

    "spread": :func:`task_mean_spread`; "relative": that divided by :func:`task_std_mean`, so free of scale;
    "variation": standard deviation over tasks of the per-task standard deviation, divided by its mean.
    """
    c, r = _pairs(chosen, rejected)
    names, code = np.unique(np.asarray(_tasks(tasks, c.size)), return_inverse=True)
    member = np.zeros((c.size, names.size))
    member[np.arange(c.size), code] = 1.0
    centre = (c.mean() + r.mean()) / 2  # shifts every mean alike; keeps E[x²] − E[x]² well conditioned
    c, r = c - centre, r - centre
    first, second = member * (c + r)[:, None], member * (c * c + r * r)[:, None]

    def statistic(weights: Floats) -> Floats:
        count = 2 * (weights @ member)
        means = weights @ first / count
        stds = np.sqrt(np.maximum(weights @ second / count - means**2, 0))
        if what == "spread":
            return means.std(axis=1)
        scale = np.maximum(stds.mean(axis=1), np.finfo(np.float64).tiny)
        return (means if what == "relative" else stds).std(axis=1) / scale

    return statistic


def score_verdicts(scores: ArrayLike, reference: ArrayLike, tie_margin: float = 0.0) -> NDArray[np.int64]:
    """1 where ``scores`` are above ``reference``, −1 where below, 0 within ``tie_margin`` (inclusive); [prompts]."""
    a, b = _two(scores, reference, ("scores", "reference"))
    if not (np.isfinite(tie_margin) and tie_margin >= 0):
        raise ValueError(f"tie_margin must be a finite number of at least 0, got {tie_margin}")
    return (a - b > tie_margin).astype(np.int64) - (b - a > tie_margin)


def outcome_shares(verdicts: ArrayLike) -> dict[str, Any]:
    """Shares of prompts won (1), lost (−1) and tied (0).

    Returns {"n", "win", "lose", "tie", "win_ci": [low, high], "lose_ci": [low, high]}, shares in 0..1, Wilson at 95 %.
    """
    values = _vector(verdicts, "verdicts")
    wins, loses = int((values > 0).sum()), int((values < 0).sum())
    win, lose = wilson(wins, values.size), wilson(loses, values.size)
    return {
        "n": int(values.size),
        "win": win["value"],
        "lose": lose["value"],
        "tie": (values.size - wins - loses) / values.size,
        "win_ci": [win["low"], win["high"]],
        "lose_ci": [lose["low"], lose["high"]],
    }


def cohen_kappa(first: ArrayLike, second: ArrayLike) -> float | None:
    """Agreement of two raters beyond what their own habits would give by chance, (p − p_chance) / (1 − p_chance).

    1 is perfect, 0 chance; None where both always give the same one verdict, so that nothing can be said.
    """
    a, b = _two(first, second, ("first", "second"))
    kinds = np.union1d(a, b)
    chance = float(sum((a == kind).mean() * (b == kind).mean() for kind in kinds))
    return None if chance == 1 else (float((a == b).mean()) - chance) / (1 - chance)


def scorer_evaluation(
    chosen: ArrayLike,
    rejected: ArrayLike,
    tasks: Sequence[str | None] | None = None,
    bins: int = 10,
    seed: int = 0,
    *,
    prompts: Sequence[int] | None = None,
) -> dict[str, Any]:
    """Everything the report says of one scorer, as a JSON-ready dict.

    chosen, rejected: scores [pairs]; tasks: one label per pair or None. ``tasks[...]["count"]`` counts pairs, its mean
    and std are over the 2 · count responses. ``temperature`` is fitted on all pairs and only told; what is measured
    after scaling (``ece_after_temperature`` and its like) divides each pair by a temperature fitted on other pairs,
    ``temperature_fit`` says which, and its interval takes that temperature as given. ``ece_if_calibrated`` is the mean
    ECE that chance would give a perfect scorer on as many pairs. Two scorers are compared pair by pair, so give them
    the same pairs in the same order. prompts: a number of each pair's prompt; where some have several pairs, which are
    not independent (those of a ranking share responses), intervals are those of a sample of prompts. None: all differ.
    """
    c, r = _pairs(chosen, rejected)
    names = _tasks([None] * c.size if tasks is None else tasks, c.size)
    credit = credits(c, r)
    scaled, how = temperature_scaled(c, r, seed=seed)
    zero = np.zeros_like(scaled)
    table = per_task(np.concatenate([c, r]), names + names)
    label = np.asarray(names, dtype=object)
    if prompts is not None and len(prompts) != c.size:
        raise ValueError(f"prompts has {len(prompts)} entries but there are {c.size} pairs")
    groups = None if prompts is None or len(set(prompts)) == c.size else list(prompts)
    independent = c.size if groups is None else _independent(credit, groups)

    return {
        "pairs": int(c.size),
        "accuracy": wilson(float(credit.sum()) * independent / c.size, independent),
        "ece": ece_interval(c, r, bins, seed=seed, groups=groups),
        "ece_equal_mass": ece_interval(c, r, bins, "equal", seed=seed, groups=groups),
        "ece_if_calibrated": float(ece_if_calibrated(c, r, bins, seed=seed).mean()),
        "bins": int(bins),
        "brier": brier(c, r),
        "temperature": fit_temperature(c, r),
        "temperature_fit": how,
        "ece_after_temperature": ece_interval(scaled, zero, bins, seed=seed, groups=groups),
        "ece_equal_mass_after_temperature": ece_interval(scaled, zero, bins, "equal", seed=seed, groups=groups),
        "brier_after_temperature": brier(scaled, zero),
        "reliability": calibration(c, r, bins)[1],
        "reliability_after_temperature": calibration(scaled, zero, bins)[1],
        "difference_curve": difference_curve(c, r, bins),
        "tasks": {
            task: {**row, "count": row["count"] // 2, "accuracy": float(credit[label == task].mean())}
            for task, row in table.items()
        },
        "task_mean_spread": task_mean_spread(table),
        "task_std_mean": task_std_mean(table),
        "chosen": c.tolist(),
        "rejected": r.tolist(),
        "pair_tasks": names,
        "pair_prompts": list(range(c.size)) if prompts is None else list(prompts),
    }
