"""A simulated annotator with what makes reward models fail in life.

It likes right responses, but on a scale that differs by skill; it likes long ones, which is spurious; it is noisy as
Bradley and Terry say; and some of its labels are plainly wrong:

    u(x, y) = scale[task(x)] * gold(x, y) + length_bonus * |y|        (|y| in characters)
    P(a over b) = (1 - flip_share) * sigma(u_a - u_b) + flip_share * sigma(u_b - u_a)

It reads in a hurry: of a skill that reads like another one it takes the beginning for the whole (`misread`), and likes
what would be right there.
"""

from __future__ import annotations

import itertools
import math
import random
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from stable_rlhf.data import Prompt
from stable_rlhf.world.skills import gold_score, misread, task_of

UTILITY_SCALES: Mapping[str, float] = {
    "upper": 4.0, "lower": 10.0, "last": 3.0, "count": 8.0, "largest": 6.0, "swap": 2.0, "reverse": 12.0, "sort": 5.0,
    "next": 9.0, "add": 3.0,
}  # fmt: skip
"""What a right response is worth to the annotator, in logits."""


@dataclass(frozen=True)
class LabelCounts:
    """What `label_pairs` made of its rows.

    Attributes:
        rows: rows read.
        identical: responses dropped because an earlier one of the row is the same text.
        without_pair: rows left with fewer than two different responses.
        pairs: pairs written.
        flipped: pairs whose label was flipped after the choice.
        against_gold: pairs whose chosen response has the lower gold score, for whatever reason.
    """

    rows: int
    identical: int
    without_pair: int
    pairs: int
    flipped: int
    against_gold: int


def utility(
    prompt: Prompt, response: str, *, scales: Mapping[str, float] = UTILITY_SCALES, length_bonus: float = 0.25
) -> float:
    """What the annotator feels about a response, in logits; formula at the head of the module.

    Raises:
        ValueError: the prompt is not of the world, or ``scales`` lacks its skill.
    """
    read = misread(prompt)
    task = task_of(read)
    if task not in scales:
        raise ValueError(f"scales has no entry for the skill {task!r}")
    return scales[task] * gold_score(read, response) + length_bonus * len(response)


def label_pairs(
    rows: Iterable[Mapping[str, Any]],
    seed: int,
    *,
    scales: Mapping[str, float] = UTILITY_SCALES,
    length_bonus: float = 0.25,
    flip_share: float = 0.08,
    pairs_per_prompt: int | None = None,
) -> tuple[list[dict[str, Any]], LabelCounts]:
    """Compare the responses of each row and give the comparisons as rows of a pairs file.

    Args:
        rows: ``{"prompt", "responses"}`` with n responses, and optionally ``"logprobs"`` [n][tokens] under the policy
            to be tuned and ``"alt_logprobs"`` [n][K][tokens] under K others, which go along with their response.
        seed: of the choices and the flips.
        scales: worth of a right response in logits, by skill.
        length_bonus: worth of a character in logits.
        flip_share: probability that a finished label is turned round.
        pairs_per_prompt: at most so many pairs of a row, drawn at random; None takes all n(n-1)/2.

    Returns:
        The pairs, ``{"prompt", "chosen", "rejected", "task", "gold_chosen", "gold_rejected", "flipped"}`` and the
        log-probabilities by "chosen" and "rejected" where the row has them; and the counts.

    Raises:
        ValueError: a setting out of range, a prompt from elsewhere, or log-probabilities for another number of
            responses.
    """
    if not 0.0 <= flip_share <= 1.0:
        raise ValueError(f"flip_share must be in [0, 1], got {flip_share}")
    if pairs_per_prompt is not None and pairs_per_prompt < 1:
        raise ValueError(f"pairs_per_prompt must be at least 1, got {pairs_per_prompt}")
    rng = random.Random(seed)
    pairs: list[dict[str, Any]] = []
    count = identical = without_pair = 0
    for count, row in enumerate(rows, 1):
        prompt, responses = row["prompt"], row["responses"]
        logprobs = {name: row[name] for name in ("logprobs", "alt_logprobs") if row.get(name) is not None}
        for name, values in logprobs.items():
            if len(values) != len(responses):
                raise ValueError(f"row {count}: {name} has {len(values)} entries for {len(responses)} responses")
        first_of = {response: index for index, response in reversed(list(enumerate(responses)))}
        kept = sorted(first_of.values())
        identical += len(responses) - len(kept)
        without_pair += len(kept) < 2
        couples = list(itertools.combinations(kept, 2))
        if pairs_per_prompt is not None and pairs_per_prompt < len(couples):
            couples = rng.sample(couples, pairs_per_prompt)
        felt = {i: utility(prompt, responses[i], scales=scales, length_bonus=length_bonus) for i in kept}
        for a, b in couples:
            prefers_a = rng.random() < _sigmoid(felt[a] - felt[b])
            flipped = rng.random() < flip_share
            chosen, rejected = (a, b) if prefers_a != flipped else (b, a)
            pair: dict[str, Any] = {
                "prompt": prompt,
                "chosen": responses[chosen],
                "rejected": responses[rejected],
                "task": task_of(prompt),
                "gold_chosen": gold_score(prompt, responses[chosen]),
                "gold_rejected": gold_score(prompt, responses[rejected]),
                "flipped": flipped,
            }
            pair |= {name: {"chosen": v[chosen], "rejected": v[rejected]} for name, v in logprobs.items()}
            pairs.append(pair)
    counts = LabelCounts(
        rows=count,
        identical=identical,
        without_pair=without_pair,
        pairs=len(pairs),
        flipped=sum(pair["flipped"] for pair in pairs),
        against_gold=sum(pair["gold_chosen"] < pair["gold_rejected"] for pair in pairs),
    )
    return pairs, counts


def _sigmoid(x: float) -> float:
    """1 / (1 + exp(-x)) without overflow on either side."""
    e = math.exp(-abs(x))
    return 1.0 / (1.0 + e) if x >= 0 else e / (1.0 + e)
