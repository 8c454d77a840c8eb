"""A realistic summary made of drawn numbers, for the tests of findings, figures and report."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from stable_rlhf.evaluate.findings import findings
from stable_rlhf.evaluate.paper import constants
from stable_rlhf.metrics import outcome_shares, scorer_evaluation

TASKS = ["reverse", "sort", "add", "upper-case", "count vowels", "spell <b>out</b>", "last word", "repeat $n times"]
SHARES = {  # variant: (main win, main lose), (forget win, forget lose)
    "rejection": ((0.16, 0.10), (0.06, 0.06)),
    "rm": ((0.20, 0.19), (0.12, 0.34)),
    "rm-ma": ((0.21, 0.18), (0.11, 0.29)),
    "am": ((0.24, 0.12), (0.07, 0.11)),
    "am-sr": ((0.30, 0.10), (0.08, 0.06)),
    "am-critic-free": ((0.22, 0.12), (0.08, 0.10)),
}


def scores(
    rng: np.random.Generator, pairs: int, slope: float, shift: float, scale: float
) -> tuple[np.ndarray, np.ndarray, list[str]]:
    """Pairs of a scorer whose chosen score exceeds the rejected one with probability σ(slope · |Δ|).

    slope 1 is calibrated, below 1 overconfident; shift: how far apart the levels of the tasks are.
    """
    task = rng.integers(0, len(TASKS), pairs)
    size = np.abs(rng.normal(0, scale, pairs))
    sign = np.where(rng.random(pairs) < 1 / (1 + np.exp(-slope * size)), 1.0, -1.0)
    level = shift * (task - 3.5) / 2.3 + rng.normal(0, 0.4 * scale, pairs) * (1 + shift * task / 7)
    return level + sign * size / 2, level - sign * size / 2, [TASKS[t] for t in task]


def outcome(rng: np.random.Generator, n: int, win: float, lose: float, judge: str) -> dict[str, Any]:
    wins, loses = round(win * n), round(lose * n)
    verdicts = rng.permutation(np.repeat([1.0, -1.0, 0.0], [wins, loses, n - wins - loses]))
    part = outcome_shares(verdicts)
    gold = {"gold": 0.5 + (win - lose) / 2, "sft_gold": 0.5} if judge == "gold" else {"gold": None, "sft_gold": None}
    return {**part, **gold, "judge": judge, "kl": 3.2, "length": 14.5}


def build_summary(
    pairs: int = 1500,
    prompts: int = 400,
    swap: bool = False,
    variants: tuple[str, ...] = tuple(SHARES),
    seed: int = 0,
    kind: str = "world",
) -> dict[str, Any]:
    """A whole summary; ``swap`` exchanges the parts of RM and AM, so that every claim of the paper turns around."""
    rng = np.random.default_rng(seed)
    rm, am = scores(rng, pairs, 0.5, 2.0, 2.0), scores(np.random.default_rng(seed), pairs, 1.0, 0.2, 1.6)
    swapped = {"rm": "am-sr", "am-sr": "rm"} if swap else {}
    if swap:
        rm, am = am, rm
    policies: dict[str, Any] = {}
    for variant in variants:
        (mw, ml), (fw, fl) = SHARES[swapped.get(variant, variant)]
        hacks = swapped.get(variant, variant).startswith("rm")
        steps = np.arange(60)
        policies[variant] = {
            "main": outcome(rng, prompts, mw, ml, "gold"),
            "forget": outcome(rng, prompts, fw, fl, "gold"),
            "curve": [
                {
                    "step": int(s),
                    "score": float(0.03 * s + rng.normal(0, 0.2)),
                    "gold": float(0.5 + (-0.003 if hacks else 0.003) * s + rng.normal(0, 0.03)),
                    "kl": float(0.08 * s + rng.normal(0, 0.1)),
                    "length": float(14 + (0.1 * s if hacks else 0) + rng.normal(0, 0.5)),
                    "entropy": 1.0,
                }
                for s in steps
            ],
            "tokens_seen": 1_234_567,
        }
    centres = rng.normal(0, 3, (12, 2))
    points, clusters = [], []
    for c, centre in enumerate(centres):
        size = int(rng.integers(8, 60))
        cloud = centre + rng.normal(0, 0.6, (size, 2))
        points += [[float(x), float(y), c, int(k < 5)] for k, (x, y) in enumerate(cloud)]
        example = "<script>alert('x')</script> sort: b a" if c == 0 else f"{TASKS[c % 8]}: one two three"
        clusters.append(
            {"size": size, "kept": 5, "example": example, "mean_score": 0.1 * c, "tasks": {TASKS[c % 8]: size}}
        )
    summary: dict[str, Any] = {
        "title": "Skill world: the whole method on a synthetic task",
        "kind": kind,
        "seed": seed,
        "command": "stable-rlhf quickstart --output-dir out --seed 0",
        "settings": {"scorer": {"learning_rate": 5e-6, "margin": 2.5}, "ppo": {"steps": 60, "<i>": "& more"}},
        "versions": {"torch": "2.13.0", "transformers": "5.23.0"},
        "device": "cpu (2 cores)",
        "stages": [
            {"name": name, "seconds": seconds, "skipped": skipped}
            for name, seconds, skipped in (
                ("world", 3.1, True),
                ("sft", 41.0, False),
                ("pairs", 12.2, False),
                ("scorers", 60.4, False),
                ("selection", 5.5, False),
                ("ppo", 130.9, False),
                ("evaluate", 14.2, False),
            )
        ],
        "scorers": {
            "rm": {**scorer_evaluation(*rm), "training": {"steps": 10, "tokens_seen": 55_555.0}},
            "am": scorer_evaluation(*am),
        },
        "selection": {
            "candidates": len(points),
            "kept": 60,
            "num_clusters": 13,
            "empty_clusters": 1,
            "clusters": clusters,
            "map": points,
            "tasks": {task: {"candidates": 40, "kept": 7} for task in TASKS},
        },
        "policies": policies,
        "paper": constants(),
    }
    summary["findings"] = findings(summary)
    return summary


@pytest.fixture(scope="session")
def summary() -> dict[str, Any]:
    """A summary in which the paper's claims hold; treat as read-only."""
    return build_summary()


@pytest.fixture(scope="session")
def make_summary() -> Any:
    return build_summary
