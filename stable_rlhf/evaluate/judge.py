"""Judges of responses, and the comparison of a policy with the SFT policy on a set of prompts."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

import numpy as np

from stable_rlhf.evaluate.metrics import win_lose_tie

if TYPE_CHECKING:
    from stable_rlhf.data.records import Prompt, PromptRow


@runtime_checkable
class Judge(Protocol):
    """Anything that gives a response a number, higher being better. Scores need only be comparable within a prompt."""

    name: str

    def scores(self, prompts: Sequence[Prompt], responses: Sequence[str], tasks: Sequence[str | None]) -> list[float]:
        """One finite score per (prompt, response); the three sequences have one length."""
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
    judge: Judge,
    rows: Sequence[PromptRow],
    ours: Sequence[str],
    baseline: Sequence[str],
    tie_margin: float | None = None,
    *,
    kl: float | None = None,
    lengths: Sequence[int] | None = None,
) -> dict[str, Any]:
    """Win/lose/tie of ``ours`` against ``baseline``, one response of each per prompt of ``rows``.

    tie_margin: defaults to the judge's own, else 0. kl: mean KL of the policy from the SFT policy in nats per response,
    passed through. lengths: tokens per response of ours; without them ``length`` is in characters, as ``length_unit``
    says.
    ``gold`` and ``sft_gold`` are the mean scores of ours and the baseline under a :class:`GoldJudge`, else None.
    Raises ValueError when the sequences differ in length or are empty, or a score is not finite.
    """
    for name, values in (("ours", ours), ("baseline", baseline), ("lengths", lengths)):
        if values is not None and len(values) != len(rows):
            raise ValueError(f"{name} has {len(values)} entries but rows has {len(rows)}")
    if not rows:
        raise ValueError("rows is empty: nothing to compare")
    prompts, tasks = [row.prompt for row in rows], [row.task for row in rows]
    margin = getattr(judge, "tie_margin", 0.0) if tie_margin is None else tie_margin
    mine, theirs = judge.scores(prompts, ours, tasks), judge.scores(prompts, baseline, tasks)
    exact = isinstance(judge, GoldJudge)
    return {
        **win_lose_tie(mine, theirs, margin),
        "judge": judge.name,
        "tie_margin": float(margin),
        "gold": float(np.mean(mine)) if exact else None,
        "sft_gold": float(np.mean(theirs)) if exact else None,
        "kl": kl,
        "length": float(np.mean([len(text) for text in ours] if lengths is None else lengths)),
        "length_unit": "characters" if lengths is None else "tokens",
    }
