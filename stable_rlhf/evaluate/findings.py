"""Which of the paper's claims a run bears out, decided from its figures alone.

Each claim is a signed difference with a 95 % interval. It held when the interval lies wholly on the paper's side of
zero, did not hold when it lies wholly on the other, and cannot be told at this size when it covers zero. Scorers are
compared on the same pairs by a paired bootstrap; shares of wins, which a summary holds without the single verdicts, as
independent proportions (cautious: the prompts are the same). ECE is biased upwards where it is small, so a difference
of ECE between a good and a bad scorer is understated, on the cautious side.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Literal

import numpy as np

from stable_rlhf.metrics import (
    Floats,
    Interval,
    bootstrap,
    calibration_statistic,
    credits,
    difference_interval,
    task_statistic,
    temperature_scaled,
    win_minus_lose,
)
from stable_rlhf.settings.variants import VARIANTS

VARIANT_NAMES = {name: row.label for name, row in VARIANTS.items()}
SCORER_NAMES = {"rm": "Reward model", "am": "Advantage Model"}
CANNOT_TELL = "cannot tell at this size"
ACCURACY_MARGIN = 0.02  # "as accurate" means: less than two points below

Finding = dict[str, Any]
Statistic = Callable[[Floats], Floats]


def scorer_names(scorers: Mapping[str, Any]) -> dict[str, str]:
    """Names of the ``scorers``: those of the paper first and by their full name, each followed by its later
    rounds (`am-round-2`, by the name of `am`); others as they are called."""
    return _names(scorers, SCORER_NAMES)


def variant_names(policies: Mapping[str, Any]) -> dict[str, str]:
    """The same of policies; ``label`` of an entry is what its run's settings make of the variant's name."""
    labels = {round_of(key)[0]: part["label"] for key, part in policies.items() if part and part.get("label")}
    return _names(policies, VARIANT_NAMES | {key: label for key, label in labels.items() if key in VARIANT_NAMES})


def _names(group: Mapping[str, Any], known: Mapping[str, str]) -> dict[str, str]:
    place = {key: i for i, key in enumerate(known)}

    def order(key: str) -> tuple[int, int]:
        first, number = round_of(key)
        return (place[first], number) if first in place else (len(place), 0)

    return {key: _name(key, known) for key in sorted((key for key, part in group.items() if part), key=order)}


def _name(key: str, known: Mapping[str, str]) -> str:
    first, number = round_of(key)
    return known.get(first, first) + (f", round {number}" if number > 1 else "")


def round_of(key: str) -> tuple[str, int]:
    """A scorer or policy of iterated RLHF as that of the first round and its round: `am-round-2` is (`am`, 2)."""
    first, _, number = key.partition("-round-")
    return (first, int(number)) if number.isdecimal() and int(number) > 1 else (key, 1)


def verdict(held: bool | None) -> str:
    """The words for a finding's ``held``: reproduced, not reproduced, or cannot tell at this size."""
    return CANNOT_TELL if held is None else ("reproduced" if held else "not reproduced")


def above(interval: Interval, target: float = 0.0) -> bool | None:
    """True where the interval lies above the target for sure, False where below, None where it covers it or has no
    ends."""
    if not all(np.isfinite(list(interval.values()))):
        return None
    return True if interval["low"] > target else False if interval["high"] < target else None


def opposite(held: bool | None) -> bool | None:
    """What is held of a claim's opposite; not to know stays not to know."""
    return None if held is None else not held


def _percent(interval: Interval) -> str:
    return f"{100 * interval['value']:.2f} % [{100 * interval['low']:.2f}, {100 * interval['high']:.2f}]"


def _points(interval: Interval) -> str:
    return f"{100 * interval['value']:+.2f} points [{100 * interval['low']:+.2f}, {100 * interval['high']:+.2f}]"


def _number(interval: Interval) -> str:
    return f"{interval['value']:+.3f} [{interval['low']:+.3f}, {interval['high']:+.3f}]"


def _paired(rm: dict[str, Any], am: dict[str, Any]) -> bool:
    """Whether the two evaluations hold scores of the same pairs in the same order (``rows``: a digest of them)."""
    if rm.get("rows") != am.get("rows"):
        return False
    if not all(isinstance(part.get(key), list) for part in (rm, am) for key in ("chosen", "rejected", "pair_tasks")):
        return False
    sizes = {len(part[key]) for part in (rm, am) for key in ("chosen", "rejected", "pair_tasks")}
    return len(sizes) == 1 and sizes != {0} and rm["pair_tasks"] == am["pair_tasks"]


def _prompts(part: dict[str, Any]) -> list[int] | None:
    """A number of each pair's prompt; None where every pair has a prompt of its own."""
    numbers = part.get("pair_prompts")
    if not isinstance(numbers, list) or len(numbers) != len(part["chosen"]) or len(set(numbers)) == len(numbers):
        return None
    return numbers


def _minus(first: Statistic, second: Statistic) -> Statistic:
    return lambda weights: first(weights) - second(weights)


def _accuracy(part: dict[str, Any]) -> Statistic:
    credit = credits(part["chosen"], part["rejected"])
    return lambda weights: weights @ credit / weights.sum(axis=1)


_OVER_TASKS: tuple[tuple[Literal["spread", "relative", "variation"], str, str], ...] = (
    ("spread", "Mean scores differ less from task to task under the Advantage Model.",
     "Standard deviation over tasks of the mean score"),
    ("relative", "They also differ less in units of each scorer's own spread within a task, so not merely by a smaller "
     "scale.", "The same, divided by the mean within-task standard deviation,"),
    ("variation", "The spread of scores within a task is more even across tasks under the Advantage Model.",
     "Variation over tasks of the within-task standard deviation, relative to its mean,"),
)  # fmt: skip


def _scorer_findings(rm: dict[str, Any], am: dict[str, Any], seed: int) -> list[Finding]:
    paired, n, bins = _paired(rm, am), int(rm["pairs"]), int(rm.get("bins", 10))
    groups = _prompts(rm) if paired else None
    results: list[Finding] = []

    def add(claim: str, held: bool | None, detail: str) -> None:
        results.append({"claim": claim, "held": held, "detail": detail})

    def compared(make: Callable[[dict[str, Any]], Statistic], key: str) -> Interval:
        """AM minus RM."""
        if paired:
            return bootstrap(_minus(make(am), make(rm)), n, seed=seed, groups=groups)
        return difference_interval(am[key], rm[key])

    ece = compared(lambda part: calibration_statistic(part["chosen"], part["rejected"], bins), "ece")
    add("The Advantage Model is better calibrated than the reward model (lower ECE).", opposite(above(ece)),
        f"ECE {_percent(am['ece'])} for AM and {_percent(rm['ece'])} for RM; AM − RM {_points(ece)}.")  # fmt: skip
    held, words = None, "without the scores of the pairs no interval can be given."
    if paired:
        scaled, how = temperature_scaled(rm["chosen"], rm["rejected"], seed=seed)
        after = calibration_statistic(scaled, np.zeros_like(scaled), bins)
        gap = bootstrap(
            _minus(calibration_statistic(am["chosen"], am["rejected"], bins), after), n, seed=seed, groups=groups
        )
        held, words = opposite(above(gap)), f"AM − scaled RM {_points(gap)}; temperature {how}."
    add("Its calibration is more than a matter of scale: it also beats a reward model with one fitted temperature.",
        held, f"ECE {_percent(am['ece'])} for AM as trained, {_percent(rm['ece_after_temperature'])} for RM "
        f"divided by T = {rm['temperature']:.2f}; {words}")  # fmt: skip
    accuracy = compared(_accuracy, "accuracy")
    level = True if accuracy["low"] > -ACCURACY_MARGIN else False if accuracy["high"] < 0 else None
    margin = f"(less than {100 * ACCURACY_MARGIN:.0f} points below)"
    add(f"The Advantage Model ranks as accurately as the reward model {margin}.", level,
        f"Accuracy {_percent(am['accuracy'])} for AM and {_percent(rm['accuracy'])} for RM; "
        f"AM − RM {_points(accuracy)}.")  # fmt: skip
    if paired and len(set(rm["pair_tasks"])) > 1:
        tasks = rm["pair_tasks"]
        whole = np.ones((1, n))
        for what, claim, words in _OVER_TASKS:
            of_am, of_rm = (task_statistic(part["chosen"], part["rejected"], tasks, what) for part in (am, rm))
            gap = bootstrap(_minus(of_am, of_rm), n, seed=seed, strata=tasks, groups=groups)
            values = f"{of_am(whole)[0]:.3f} for AM and {of_rm(whole)[0]:.3f} for RM"
            add(claim, opposite(above(gap)), f"{words} {values}; AM − RM {_number(gap)}.")
    return results


def _share(part: dict[str, Any], which: str) -> Interval:
    low, high = part[f"{which}_ci"]
    return {"value": part[which], "low": low, "high": high}


def _versus(policies: dict[str, Any], first: str, second: str, on: str, which: str, claim: str) -> list[Finding]:
    """The claim that ``first`` has a higher share of ``which`` than ``second`` on the set ``on``."""
    parts = [policies.get(variant, {}).get(on) for variant in (first, second)]
    if not all(parts):
        return []
    a, b = (_share(part, which) for part in parts)
    gap = difference_interval(a, b)
    verb = {"win": "Wins", "lose": "Losses"}[which]
    names = VARIANT_NAMES[first], VARIANT_NAMES[second]
    detail = (
        f"{verb} {_percent(a)} for {names[0]} and {_percent(b)} for {names[1]} on {parts[0]['n']} prompts; "
        f"{names[0]} − {names[1]} {_points(gap)}."
    )
    return [{"claim": claim, "held": above(gap), "detail": detail}]


def _net(policies: dict[str, Any], variant: str, on: str, sign: int, claim: str) -> list[Finding]:
    """The claim that ``variant`` wins more than it loses on set ``on`` (sign 1), or loses more than it wins (−1)."""
    part = policies.get(variant, {}).get(on)
    if not part:
        return []
    net = win_minus_lose(part["win"], part["lose"], part["n"])
    side = above(net)
    detail = (
        f"Win {100 * part['win']:.2f} %, lose {100 * part['lose']:.2f} %, tie {100 * part['tie']:.2f} % of {part['n']} "
        f"prompts (judge: {part['judge']}); win − lose {_points(net)}."
    )
    return [{"claim": claim, "held": side if sign > 0 else opposite(side), "detail": detail}]


def _change(values: list[float]) -> Interval | None:
    """Mean of the last quarter of a curve minus that of the first, normal interval from the scatter of the steps."""
    quarter = len(values) // 4
    if quarter < 2:
        return None
    first, last = np.asarray(values[:quarter], dtype=float), np.asarray(values[-quarter:], dtype=float)
    value = float(last.mean() - first.mean())
    half = 1.96 * float(np.sqrt((first.var(ddof=1) + last.var(ddof=1)) / quarter))
    return {"value": value, "low": value - half, "high": value + half}


def _hacking(policies: dict[str, Any]) -> list[Finding]:
    curve = policies.get("rm", {}).get("curve") or []
    if not curve or any(row.get("gold") is None or row.get("score") is None for row in curve):
        return []
    score, gold = _change([row["score"] for row in curve]), _change([row["gold"] for row in curve])
    if score is None or gold is None:
        return []
    up, better = above(score), above(gold)
    held = True if up and better is False else False if better or up is False else None
    detail = f"From the first to the last quarter of PPO, score {_number(score)}, gold score {_number(gold)}."
    return [{"claim": "RM-PPO hacks its reward: its score rises while quality falls.", "held": held, "detail": detail}]


def findings(summary: dict[str, Any]) -> list[Finding]:
    """Every claim of the paper that the figures of ``summary`` can speak to.

    Returns {"claim": str, "held": True | False | None, "detail": str} each; None means "cannot tell at this size".
    Claims whose figures are missing from the summary are left out, and so are those about PPO where a policy was
    trained in another way.
    """
    scorers, trained = summary.get("scorers") or {}, summary.get("policies") or {}
    policies = {
        name: part for name, part in trained.items()
        if part and part.get("label", VARIANT_NAMES.get(name)) == VARIANT_NAMES.get(name)
    }  # fmt: skip
    results: list[Finding] = []
    if scorers.get("rm") and scorers.get("am"):
        results += _scorer_findings(scorers["rm"], scorers["am"], int(summary.get("seed") or 0))
    results += _hacking(policies)
    for claim, check, *about in _OF_POLICIES:
        results += check(policies, *about, claim)
    return results


# Claims, and what they say: who has the higher share on which set, or who wins (1) or loses (-1) more there.
_OF_POLICIES: tuple[tuple[Any, ...], ...] = (
    ("On the main set, AM-PPO-SR wins against SFT more often than RM-PPO does.", _versus, "am-sr", "rm", "main", "win"),
    ("AM-PPO-SR improves on SFT on the main set (wins more than it loses).", _net, "am-sr", "main", 1),
    ("RM-PPO forgets: on the forget set it loses to SFT more than it wins.", _net, "rm", "forget", -1),
    ("On the forget set, RM-PPO loses to SFT more often than AM-PPO-SR does.",
     _versus, "rm", "am-sr", "forget", "lose"),
    ("On the forget set, RM-PPO loses to SFT more often than AM-PPO does.", _versus, "rm", "am", "forget", "lose"),
    ("Selective rehearsal lowers AM-PPO's losses on the forget set further.",
     _versus, "am", "am-sr", "forget", "lose"),
)  # fmt: skip
