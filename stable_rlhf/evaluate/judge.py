"""Judges of responses, and the comparison of a policy with the SFT policy on a set of prompts.

A judge scores one response at a time (`Judge`: the truth, or a scorer), or sees both and says which is better
(`PairJudge`: a person's or a model's way; evaluate/chat.py). Scores know no order of presentation; a pair judge must
see each pair in both orders.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

import numpy as np

from stable_rlhf.metrics import Floats, bootstrap, outcome_shares, score_verdicts

if TYPE_CHECKING:
    from stable_rlhf.data.records import Prompt, PromptRow


@runtime_checkable
class Judge(Protocol):
    """Anything that gives a response a number, higher being better. Scores need only be comparable within a prompt."""

    name: str

    def scores(self, prompts: Sequence[Prompt], responses: Sequence[str], tasks: Sequence[str | None]) -> list[float]:
        """One finite score per (prompt, response); the three sequences have one length."""
        ...


@dataclass(frozen=True)
class Verdicts:
    """A pair judge's verdicts and how far it agrees with itself.

    Attributes:
        values: 1 where the response is better, −1 where the reference's is, 0 for a tie; one a prompt.
        about: figures to report: how many pairs were asked, agreement of the two orders and the like.
    """

    values: list[int]
    about: dict[str, Any]


@runtime_checkable
class PairJudge(Protocol):
    """Anything that compares two responses to a prompt; it must not depend on which of them is shown first."""

    name: str

    def verdicts(self, prompts: Sequence[Prompt], responses: Sequence[str], reference: Sequence[str]) -> Verdicts:
        """One verdict per prompt; the three sequences have one length."""
        ...


class GoldJudge:
    """An exact judge: ``score(prompt, response, task) -> float`` knows the truth, so its mean is itself a result."""

    name = "gold"

    def __init__(self, score: Callable[[Prompt, str, str | None], float]) -> None:
        self._score = score

    def scores(self, prompts: Sequence[Prompt], responses: Sequence[str], tasks: Sequence[str | None]) -> list[float]:
        """Gold score of each response."""
        rows = zip(prompts, responses, tasks, strict=True)
        return [float(self._score(prompt, response, task)) for prompt, response, task in rows]


class ScorerJudge:
    """A trained scorer as judge: ``score(prompts, responses) -> floats``.

    Its verdict is only worth something where the scorer was not what the policy was tuned against: name it so."""

    def __init__(self, score: Callable[[Sequence[Prompt], Sequence[str]], Sequence[float]], name: str) -> None:
        self.name, self._score = name, score

    def scores(self, prompts: Sequence[Prompt], responses: Sequence[str], tasks: Sequence[str | None]) -> list[float]:
        """Scores of all responses in one call; tasks are not looked at."""
        values = [float(value) for value in self._score(prompts, responses)]
        if len(values) != len(responses):
            raise ValueError(f"judge {self.name!r} gave {len(values)} scores for {len(responses)} responses")
        return values


def compare(
    judge: Judge | PairJudge,
    rows: Sequence[PromptRow],
    responses: Sequence[str],
    reference: Sequence[str],
    tie_margin: float = 0.0,
    *,
    kl: float | None = None,
    lengths: Sequence[int] | None = None,
) -> dict[str, Any]:
    """Win/lose/tie of ``responses`` against those of the ``reference``, one of each per prompt of ``rows``.

    tie_margin: responses whose scores differ by no more than this are a tie. kl: mean KL of the policy from the SFT
    policy in nats per response, passed through. lengths: tokens per response; without them ``length`` is in characters,
    as ``length_unit`` says.
    ``gold`` and ``sft_gold`` are the mean scores of the two under a :class:`GoldJudge`, else None.
    ``verdicts`` holds 1, −1 or 0 a prompt. A pair judge adds how far it agrees with itself.
    Raises ValueError when the sequences differ in length or are empty, or a score is not finite.
    """
    for name, values in (("responses", responses), ("reference", reference), ("lengths", lengths)):
        if values is not None and len(values) != len(rows):
            raise ValueError(f"{name} has {len(values)} entries but rows has {len(rows)}")
    if not rows:
        raise ValueError("rows is empty: nothing to compare")
    prompts, tasks = [row.prompt for row in rows], [row.task for row in rows]
    about: dict[str, Any] = {"judge": judge.name, "tie_margin": 0.0, "gold": None, "sft_gold": None}
    if isinstance(judge, PairJudge):
        comparison = judge.verdicts(prompts, responses, reference)
        if len(comparison.values) != len(rows):
            raise ValueError(f"judge {judge.name!r} gave {len(comparison.values)} verdicts for {len(rows)} prompts")
        verdicts, about = comparison.values, about | comparison.about
    else:
        scores, reference_scores = judge.scores(prompts, responses, tasks), judge.scores(prompts, reference, tasks)
        verdicts = score_verdicts(scores, reference_scores, tie_margin).tolist()
        about["tie_margin"] = tie_margin
        if isinstance(judge, GoldJudge):
            about |= {"gold": float(np.mean(scores)), "sft_gold": float(np.mean(reference_scores))}
    return {
        **outcome_shares(verdicts),
        **about,
        "kl": kl,
        "length": float(np.mean([len(text) for text in responses] if lengths is None else lengths)),
        "length_unit": "characters" if lengths is None else "tokens",
        "verdicts": verdicts,
    }


def compare_rewards(
    rewards: Mapping[str, Sequence[float | None]], reference: Mapping[str, Sequence[float | None]], seed: int = 0
) -> dict[str, dict[str, Any]]:
    """Mean of each reward over the prompts where it applies to both answers (None: it does not), and over the
    ``reference``'s; their difference with a 95 % interval, paired over prompts, which has no ends where no two answers
    differ. A reward that applies nowhere is left out.
    """
    found: dict[str, dict[str, Any]] = {}
    for name, values in rewards.items():
        pairs = [(a, b) for a, b in zip(values, reference[name], strict=True) if a is not None and b is not None]
        if pairs:
            ours, theirs = np.asarray(pairs, dtype=float).T
            found[name] = {
                "value": float(ours.mean()), "sft": float(theirs.mean()), "n": len(pairs),
                "difference": _paired_difference(ours - theirs, seed),
            }  # fmt: skip
    return found


def _paired_difference(gains: Floats, seed: int) -> dict[str, float | None]:
    if not gains.any():
        return {"value": 0.0, "low": None, "high": None}
    return {**bootstrap(lambda weights: weights @ gains / weights.sum(axis=1), len(gains), seed=seed)}
