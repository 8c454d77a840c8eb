"""Judges of responses, and the comparison of a policy with the SFT policy on a set of prompts.

A judge scores one response at a time (`Judge`: the truth, or a scorer), or sees both and says which is better
(`PairJudge`: a person's or a model's way; evaluate/chat.py). Scores know no order of presentation; a pair judge must
see each pair in both orders.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

import numpy as np

from stable_rlhf.metrics import outcome_shares, score_verdicts

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
        values: 1 where ours is better, −1 where the baseline is, 0 for a tie; one a prompt.
        about: figures to report: how many pairs were asked, agreement of the two orders and the like.
    """

    values: list[int]
    about: dict[str, Any]


@runtime_checkable
class PairJudge(Protocol):
    """Anything that compares two responses to a prompt; it must not depend on which of them is shown first."""

    name: str

    def verdicts(self, prompts: Sequence[Prompt], ours: Sequence[str], baseline: Sequence[str]) -> Verdicts:
        """One verdict per prompt; the three sequences have one length."""
        ...


class GoldJudge:
    """An exact judge: ``score(prompt, response, task) -> float`` knows the truth, so its mean is itself a result."""

    def __init__(self, score: Callable[[Prompt, str, str | None], float], name: str = "gold") -> None:
        self.name = name
        self._score = score

    def scores(self, prompts: Sequence[Prompt], responses: Sequence[str], tasks: Sequence[str | None]) -> list[float]:
        """Gold score of each response."""
        rows = zip(prompts, responses, tasks, strict=True)
        return [float(self._score(prompt, response, task)) for prompt, response, task in rows]


class ScorerJudge:
    """A trained scorer as judge: ``score(prompts, responses) -> floats``.

    Its verdict is only worth something where the scorer was not what the policy was tuned against: name it so.
    tie_margin: responses whose scores differ by no more than this are a tie.
    """

    def __init__(
        self,
        score: Callable[[Sequence[Prompt], Sequence[str]], Sequence[float]],
        name: str,
        tie_margin: float = 0.0,
    ) -> None:
        self.name = name
        self.tie_margin = tie_margin
        self._score = score

    def scores(self, prompts: Sequence[Prompt], responses: Sequence[str], tasks: Sequence[str | None]) -> list[float]:
        """Scores of all responses in one call; tasks are not looked at."""
        values = [float(value) for value in self._score(prompts, responses)]
        if len(values) != len(responses):
            raise ValueError(f"judge {self.name!r} gave {len(values)} scores for {len(responses)} responses")
        return values


def compare(
    judge: Judge | PairJudge,
    rows: Sequence[PromptRow],
    ours: Sequence[str],
    baseline: Sequence[str],
    tie_margin: float | None = None,
    *,
    kl: float | None = None,
    lengths: Sequence[int] | None = None,
) -> dict[str, Any]:
    """Win/lose/tie of ``ours`` against ``baseline``, one response of each per prompt of ``rows``.

    tie_margin: of a judge that scores; defaults to its own, else 0. kl: mean KL of the policy from the SFT policy in
    nats per response, passed through. lengths: tokens per response of ours; without them ``length`` is in characters,
    as ``length_unit`` says.
    ``gold`` and ``sft_gold`` are the mean scores of ours and the baseline under a :class:`GoldJudge`, else None.
    ``verdicts`` holds 1, −1 or 0 a prompt. A pair judge adds how far it agrees with itself.
    Raises ValueError when the sequences differ in length or are empty, or a score is not finite.
    """
    for name, values in (("ours", ours), ("baseline", baseline), ("lengths", lengths)):
        if values is not None and len(values) != len(rows):
            raise ValueError(f"{name} has {len(values)} entries but rows has {len(rows)}")
    if not rows:
        raise ValueError("rows is empty: nothing to compare")
    prompts, tasks = [row.prompt for row in rows], [row.task for row in rows]
    about: dict[str, Any] = {"judge": judge.name, "tie_margin": 0.0, "gold": None, "sft_gold": None}
    if isinstance(judge, PairJudge):
        found = judge.verdicts(prompts, ours, baseline)
        if len(found.values) != len(rows):
            raise ValueError(f"judge {judge.name!r} gave {len(found.values)} verdicts for {len(rows)} prompts")
        verdicts, about = found.values, about | found.about
    else:
        margin = float(getattr(judge, "tie_margin", 0.0) if tie_margin is None else tie_margin)
        mine, theirs = judge.scores(prompts, ours, tasks), judge.scores(prompts, baseline, tasks)
        verdicts = score_verdicts(mine, theirs, margin).tolist()
        about["tie_margin"] = margin
        if isinstance(judge, GoldJudge):
            about |= {"gold": float(np.mean(mine)), "sft_gold": float(np.mean(theirs))}
    return {
        **outcome_shares(verdicts),
        **about,
        "kl": kl,
        "length": float(np.mean([len(text) for text in ours] if lengths is None else lengths)),
        "length_unit": "characters" if lengths is None else "tokens",
        "verdicts": verdicts,
    }
