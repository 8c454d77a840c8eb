"""Variants x seeds: rows of figures, intervals paired over seeds, and which claims of the paper they bear out.

Everything within one seed shares its data, SFT, pairs and scorers, so two variants are compared seed by seed: the
interval of a difference is Student's, over the differences of the seeds. It holds what the items of the test sets and
the training seeds add together, because every seed has its own. Ratios get Fieller's interval, which inverts the same
paired test: it is as honest about a denominator that may be zero, and has no ends then.

With n seeds a two-sided 95 % interval is t(n − 1) wide: at five seeds 2.78 standard errors, not 1.96.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from stable_rlhf.data.jsonl import without_nan
from stable_rlhf.evaluate.findings import ACCURACY_MARGIN, VARIANT_NAMES, above, opposite
from stable_rlhf.metrics import LEVEL, Interval

SFT = "sft"
NAMES = {SFT: "SFT", **VARIANT_NAMES}
CURVES = ("score", "gold", "kl", "length")
POINTS = 40  # of a curve that is kept: means over equal stretches of steps
Row = dict[str, Any]
Values = Sequence[float]  # one a seed


def seed_mean(values: ArrayLike) -> Interval:
    """Mean over seeds with Student's interval; with one seed there is no interval, its ends are not a number."""
    v = np.asarray(values, dtype=np.float64)
    if v.ndim != 1 or v.size == 0 or not np.isfinite(v).all():
        raise ValueError(f"values: needs one finite figure a seed, got {v.tolist()}")
    mean = float(v.mean())
    half = _t(v.size) * float(v.std(ddof=1)) / math.sqrt(v.size) if v.size > 1 else math.nan
    return {"value": mean, "low": mean - half, "high": mean + half}


def names(results: Mapping[str, Any]) -> dict[str, str]:
    """How the policies of a study are called: by their variant, unless its settings make another method of it."""
    return NAMES | results.get("labels", {})


def paired_difference(first: ArrayLike, second: ArrayLike) -> Interval:
    """first − second, seed by seed."""
    a, b = _seeds(first, second)
    return seed_mean(a - b)


def paired_ratio(first: ArrayLike, second: ArrayLike) -> Interval:
    """mean(first) / mean(second) with Fieller's interval: every ρ that a paired test of first − ρ · second lets stand.

    The ends are infinite where the test lets arbitrarily large ρ stand, because the second mean may be zero, and not a
    number with one seed. ``value`` is not a number when the second mean is 0.
    """
    a, b = _seeds(first, second)
    if a.size == 1:
        return {"value": _divide(a[0], b[0]), "low": math.nan, "high": math.nan}
    g = _t(a.size) ** 2 / a.size
    (saa, sab), (_, sbb) = np.cov(a, b, ddof=1)
    ma, mb = float(a.mean()), float(b.mean())
    # (ma − ρ mb)² <= g (saa − 2 ρ sab + ρ² sbb), as p ρ² − 2 q ρ + r <= 0
    p, q, r = mb * mb - g * sbb, ma * mb - g * sab, ma * ma - g * saa
    value = _divide(ma, mb)
    if p <= 0:
        return {"value": value, "low": -math.inf, "high": math.inf}
    root = math.sqrt(max(0.0, q * q - p * r))  # the value itself lies inside, so only rounding makes this negative
    return {"value": value, "low": min(float((q - root) / p), value), "high": max(float((q + root) / p), value)}


def _divide(a: float, b: float) -> float:
    return float(a / b) if b else math.nan


def _seeds(first: ArrayLike, second: ArrayLike) -> tuple[Any, Any]:
    a, b = np.asarray(first, dtype=np.float64), np.asarray(second, dtype=np.float64)
    if a.shape != b.shape or a.ndim != 1 or a.size == 0:
        raise ValueError(f"paired figures need the same seeds, got shapes {a.shape} and {b.shape}")
    return a, b


def _t(n: int) -> float:
    """Quantile of Student's t with n − 1 degrees of freedom."""
    from scipy.special import stdtrit

    return float(stdtrit(n - 1, 0.5 + LEVEL / 2))


# -- rows --------------------------------------------------------------------------------------------------------------


_WITH_INTERVAL = (
    "accuracy", "ece", "ece_equal_mass", "ece_after_temperature", "ece_equal_mass_after_temperature",
)  # fmt: skip


def scorer_rows(summary: Mapping[str, Any]) -> list[Row]:
    """One row a scorer of one seed's summary: {"scorer", "seed", every figure}."""
    rows = []
    for name, part in summary["scorers"].items():
        values = {key: part[key]["value"] for key in _WITH_INTERVAL}
        for key in ("brier", "brier_after_temperature", "temperature", "task_mean_spread", "task_std_mean", "pairs"):
            values[key] = part[key]
        within = part["task_std_mean"]
        values["task_relative_spread"] = part["task_mean_spread"] / within if within else None
        rows.append({"scorer": name, "seed": summary["seed"], **values})
    return rows


def policy_rows(summary: Mapping[str, Any]) -> list[Row]:
    """One row a variant of one seed's summary, SFT first: {"variant", "seed", every figure}; None: not measured."""
    seconds = {stage["name"]: stage["seconds"] for stage in summary["stages"]}
    rows = []
    for variant, entry in summary["policies"].items():
        row: Row = {"variant": variant, "seed": summary["seed"]}
        for on in ("main", "forget"):
            part = entry[on]
            gain = None if part["gold"] is None else part["gold"] - part["sft_gold"]
            row |= {f"{on}_{key}": part[key] for key in ("win", "lose", "tie", "gold", "kl", "length")}
            row |= {f"{on}_net": part["win"] - part["lose"], f"{on}_gold_gain": gain}
        row |= _of_curve(entry["curve"])
        row |= {"tokens_seen": entry["tokens_seen"], "seconds": seconds[f"ppo-{variant}"]}
        rows.append(row)
    return [_sft_row(summary, rows), *rows]


def _sft_row(summary: Mapping[str, Any], rows: Sequence[Row]) -> Row:
    """SFT against itself: all ties, at no KL."""
    row: Row = dict.fromkeys(rows[0]) | {"variant": SFT, "seed": summary["seed"]}
    part = next(iter(summary["policies"].values()))
    for on in ("main", "forget"):
        row |= {f"{on}_win": 0.0, f"{on}_lose": 0.0, f"{on}_tie": 1.0, f"{on}_net": 0.0, f"{on}_kl": 0.0}
        if part[on]["sft_gold"] is not None:
            row |= {f"{on}_gold": part[on]["sft_gold"], f"{on}_gold_gain": 0.0}
    seconds = {stage["name"]: stage["seconds"] for stage in summary["stages"]}
    return row | {"seconds": seconds.get("sft")}


def _of_curve(curve: Sequence[Mapping[str, float]]) -> Row:
    """Score and gold score in the first tenth of the steps (next to SFT), the lowest tenth and the last quarter; and
    rehearsal's mean share of the gradient and its coefficient in the last quarter.

    ``late``: last quarter minus second quarter, fixed beforehand: a best moment picked from a noisy curve would make
    any run look as if it had fallen afterwards.
    """
    quarter = max(1, len(curve) // 4)
    shares, doses = (
        [point[key] for point in curve if point.get(key) is not None] for key in ("rehearsal_share", "rehearsal_coef")
    )
    row: Row = {
        "rehearsal_share": float(np.mean(shares)) if shares else None,
        "rehearsal_coef_last": float(np.mean(doses[-quarter:])) if doses else None,
    }
    for key in ("score", "gold"):
        values = [point.get(key) for point in curve]
        known = [float(value) for value in values if value is not None]
        whole = len(known) == len(curve)
        second, last = known[quarter : 2 * quarter] or known[-1:], known[-quarter:]
        blocks = [float(np.mean(part)) for part in np.array_split(known, min(10, len(known)))] if whole else []
        row |= {
            f"train_{key}_first": blocks[0] if whole else None,
            f"train_{key}_last": float(np.mean(last)) if whole else None,
            f"train_{key}_late": float(np.mean(last) - np.mean(second)) if whole else None,
            f"train_{key}_lowest": min(blocks) if whole else None,
        }
    return row


def curves(summary: Mapping[str, Any]) -> list[Row]:
    """Every variant's curves of one seed as means over at most 40 stretches of steps."""
    table = []
    for variant, entry in summary["policies"].items():
        curve = entry["curve"]
        width = -(-len(curve) // POINTS)
        parts = [range(at, min(at + width, len(curve))) for at in range(0, len(curve), width)]
        row: Row = {"variant": variant, "seed": summary["seed"]}
        row["step"] = [round(float(np.mean([curve[i]["step"] for i in part])), 1) for part in parts]
        for key in CURVES:
            if all(point.get(key) is not None for point in curve):
                row[key] = [round(float(np.mean([curve[i][key] for i in part])), 5) for part in parts]
        table.append(row)
    return table


# -- what they say -----------------------------------------------------------------------------------------------------


def columns(rows: Sequence[Row], who: str) -> dict[str, dict[str, list[float]]]:
    """{variant or scorer: {figure: values, seed by seed}} of the figures that are known in every seed."""
    seeds = sorted({row["seed"] for row in rows})
    table: dict[str, dict[str, list[float]]] = {}
    for name in dict.fromkeys(row[who] for row in rows):
        own = {row["seed"]: row for row in rows if row[who] == name}
        if sorted(own) != seeds:
            raise ValueError(f"{who} {name!r} has seeds {sorted(own)}, but the study has {seeds}")
        table[name] = {
            key: [float(own[seed][key]) for seed in seeds]
            for key in own[seeds[0]]
            if key not in (who, "seed") and all(own[seed].get(key) is not None for seed in seeds)
        }
    return table


def means(table: Mapping[str, Mapping[str, Sequence[float]]]) -> dict[str, dict[str, Interval]]:
    """The mean of every figure over seeds, with its interval, which is cut to what a share can be."""
    intervals: dict[str, dict[str, Interval]] = {}
    for name, part in table.items():
        intervals[name] = {key: seed_mean(values) for key, values in part.items()}
        for key, interval in intervals[name].items():
            if key.endswith(_SHARES):
                interval |= {"low": max(interval["low"], 0.0), "high": min(interval["high"], 1.0)}
    return intervals


_SHARES = ("_win", "_lose", "_tie", "accuracy", "ece", "ece_equal_mass", "after_temperature", "brier")
COMPARED = ("main_win", "main_lose", "main_gold_gain", "forget_win", "forget_lose", "forget_gold_gain", "main_kl")


def comparisons(
    policies: Mapping[str, Mapping[str, Sequence[float]]], pairs: Sequence[Sequence[str]] = ()
) -> list[dict[str, Any]]:
    """First minus second of every pair, seed by seed, in the figures of the policy table; without pairs, every variant
    minus RM-PPO."""
    if not pairs and "rm" in policies:
        pairs = [(name, "rm") for name in policies if name not in ("rm", SFT)]
    return [
        {"variant": name, "minus": minus, "figure": key, **paired_difference(policies[name][key], policies[minus][key])}
        for name, minus in pairs
        for key in COMPARED
        if key in policies[name] and key in policies[minus]
    ]


def claims(
    scorers: Mapping[str, Mapping[str, Sequence[float]]], policies: Mapping[str, Mapping[str, Sequence[float]]]
) -> list[dict[str, Any]]:
    """Each claim with its target: {"claim", "held": True | False | None, "detail"}; None is "cannot tell".

    A claim holds, or fails, only where the interval over seeds lies wholly on one side of its target. Claims whose
    figures are missing are left out.
    """
    verdicts: list[dict[str, Any]] = []

    def add(claim: str, held: bool | None, detail: str) -> None:
        verdicts.append({"claim": claim, "held": held, "detail": detail})

    def of(group: Mapping[str, Mapping[str, Sequence[float]]], *names: str) -> list[Values | None]:
        """The figure that is named last, of each of the others."""
        *who, key = names
        return [group.get(name, {}).get(key) for name in who]

    def at_most(target: float, values: Sequence[Values | None], claim: str) -> None:
        """The claim that first / second <= target. Both are shares or spreads, so first − target · second <= 0 says the
        same without a division."""
        first, second = values
        if first is None or second is None:
            return
        gap = seed_mean(np.asarray(first) - target * np.asarray(second))
        ratio = _interval(paired_ratio(first, second))
        detail = f"{_show(first)} against {_show(second)}; ratio {ratio}, target at most {target:g}."
        add(claim, opposite(above(gap)), detail)

    def higher(values: Sequence[Values | None], claim: str, *, by: float = 0.0) -> None:
        """The claim that first − second > by."""
        first, second = values
        if first is None or second is None:
            return
        gap = paired_difference(first, second)
        detail = f"{_show(first)} against {_show(second)}; difference {_interval(gap)}, target above {by:g}."
        add(claim, above(gap, by), detail)

    at_most(
        0.74,
        of(scorers, "am", "rm", "ece"),
        "The Advantage Model's calibration error is at most 0.74 of the reward model's (the paper's ratio).",
    )
    higher([*of(scorers, "rm", "ece_after_temperature"), *of(scorers, "am", "ece")],
           "A reward model divided by one fitted temperature still has the higher calibration error.")  # fmt: skip
    higher(of(scorers, "rm", "am", "ece_after_temperature"),
           "So it has when both are divided by a temperature of their own.")  # fmt: skip
    as_accurate = f"The Advantage Model ranks as accurately (under {100 * ACCURACY_MARGIN:.0f} points below)."
    higher(of(scorers, "am", "rm", "accuracy"), as_accurate, by=-ACCURACY_MARGIN)
    at_most(0.5, of(scorers, "am", "rm", "task_mean_spread"),
            "Its mean scores differ at most half as much from task to task.")  # fmt: skip
    at_most(0.5, of(scorers, "am", "rm", "task_relative_spread"),
            "So they do in units of each scorer's own spread within a task: not merely by scale.")  # fmt: skip
    higher(of(policies, "am-sr", "rm", "main_win"), "On the main set AM-PPO-SR wins more often than RM-PPO.")
    at_most(0.27, of(policies, "am-sr", "rm", "forget_lose"),
            "On the forget set AM-PPO-SR loses at most 0.27 times as often as RM-PPO, as in the paper.")  # fmt: skip
    higher(of(policies, "rm", "am-sr", "forget_lose"), "On the forget set RM-PPO loses more often than AM-PPO-SR.")
    higher(of(policies, "am", "am-sr", "forget_lose"), "Rehearsal lowers AM-PPO's losses on the forget set.")
    gold, score = of(policies, "rm", "train_gold_late"), of(policies, "rm", "train_score_late")
    if gold[0] is not None and score[0] is not None:
        change, gain = seed_mean(gold[0]), seed_mean(score[0])
        better, rises = above(change), above(gain)
        held = True if rises and better is False else False if better or rises is False else None
        add("RM-PPO over-optimises: from the second to the last quarter its score rises while the gold score falls.",
            held, f"Score {_interval(gain)}, gold score {_interval(change)}.")  # fmt: skip
    higher(of(policies, "am-sr", "rm", "train_gold_late"),
           "In that time AM-PPO-SR's gold score fares better than RM-PPO's.")  # fmt: skip
    main, first, lowest = (
        of(policies, "am-sr", k)[0] for k in ("main_gold_gain", "train_gold_first", "train_gold_lowest")
    )
    if main is not None and first is not None and lowest is not None:
        worst, dip = min(main), float(np.min(np.subtract(lowest, first)))
        add("In no seed does AM-PPO-SR's gold score fall below SFT's, on the main set or while it trains.",
            worst >= 0 and dip >= 0,
            f"Worst seed: main set {worst:+.3f}; lowest tenth of training {dip:+.3f} from the first.")  # fmt: skip
    return verdicts


def _show(values: ArrayLike) -> str:
    return f"{float(np.mean(np.asarray(values))):.3f}"


def _interval(interval: Interval) -> str:
    ends = interval["low"], interval["high"]
    if any(math.isnan(end) for end in ends):
        return f"{interval['value']:.3f} (no interval from one seed)"
    return f"{interval['value']:.3f} [{ends[0]:.3f}, {ends[1]:.3f}]".replace("inf", "∞")


def results(summaries: Sequence[Mapping[str, Any]], about: Mapping[str, Any]) -> dict[str, Any]:
    """All that a study found, JSON-ready, from one summary a seed; ``about`` (settings, seeds …) is passed through.

    ``compare`` of it: the pairs of policies whose differences are taken (see `comparisons`)."""
    policies = summaries[0]["policies"].items()
    labels = {name: part.get("label", NAMES[name]) for name, part in policies if name in NAMES}
    labels = {name: label for name, label in labels.items() if label != NAMES[name]}
    return _compared(
        {**about, "labels": labels},
        [row for summary in summaries for row in policy_rows(summary)],
        [row for summary in summaries for row in scorer_rows(summary)],
        [row for summary in summaries for row in curves(summary)],
    )


def pooled(studies: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Several results of `results`, of different seeds but the same settings, as those of one study.

    Raises:
        ValueError: a seed in two of them, or a setting, judge or kind (reported, validation) that differs.
    """
    first = studies[0]
    seeds = [seed for each in studies for seed in each["seeds"]]
    if len(set(seeds)) < len(seeds):
        raise ValueError(f"seeds {sorted(seeds)}: one is in two of the results")
    for each in studies[1:]:
        for name in ("kind", "judges"):
            if each[name] != first[name]:
                raise ValueError(f"{name}: {first[name]} and {each[name]}")
        _same_settings("settings", first["settings"], each["settings"])
    policies, scorers, lines = (
        [row for each in studies for row in each[key]] for key in ("policies", "scorers", "curves")
    )
    about = {**first, "seeds": seeds, "hours": round(sum(each["hours"] for each in studies), 3)}
    return _compared(about, policies, scorers, lines)


def _same_settings(name: str, one: Any, other: Any) -> None:
    """A setting that only one of them knows is of another version and had its default."""
    if isinstance(one, Mapping) and isinstance(other, Mapping):
        for key in one.keys() & other.keys():
            _same_settings(f"{name}.{key}", one[key], other[key])
    elif one != other:
        raise ValueError(f"{name}: {one} and {other}")


def _compared(
    about: Mapping[str, Any], policy_table: Sequence[Row], scorer_table: Sequence[Row], lines: Sequence[Row]
) -> dict[str, Any]:
    scorers, policies = columns(scorer_table, "scorer"), columns(policy_table, "variant")
    # The paper's claims are about PPO: what another estimator trained under a variant's name says nothing there.
    paper_like = {name: part for name, part in policies.items() if name not in about.get("labels", {})}
    study = {
        **about,
        "policies": policy_table,
        "scorers": scorer_table,
        "means": {"policies": means(policies), "scorers": means(scorers)},
        "comparisons": comparisons(policies, about.get("compare", ())),
        "claims": claims(scorers, paper_like),
        "curves": lines,
    }
    return {key: without_nan(value) for key, value in study.items()}
