"""The files of a skill world: demonstrations for SFT, and prompts for preference pairs, PPO and the two test sets."""

from __future__ import annotations

import os
import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from stable_rlhf.data import write_jsonl
from stable_rlhf.world.skills import FORGET_SKILLS, LETTERS, WEAK_SKILLS, skills_of

WRONG_SHARES: Mapping[str, float] = {"swap": 0.35, "reverse": 0.35, "sort": 0.3, "next": 0.35, "add": 0.2}
"""Share of the weak skills' demonstrations that are wrong; the two that are learnt the slowest have fewer."""

_KNOWN = {name: skill for forget_set in FORGET_SKILLS for name, skill in skills_of(forget_set).items()}


@dataclass(frozen=True)
class WorldSizes:
    """How many rows each file of a world gets.

    Attributes:
        sft_strong: demonstrations of each skill of the forget set, all right.
        sft_weak: demonstrations of each weak skill, of which ``wrong_shares`` are near misses.
        pair_prompts: prompts to sample the responses of preference pairs for.
        prompts: prompts for PPO.
        eval_main: test prompts of the weak skills.
        eval_forget: test prompts of the skills of the forget set.
        weak_share: share of the weak skills in ``pair_prompts`` and ``prompts``.
        wrong_shares: probability of a near miss as demonstration, by weak skill; a skill not named has none.
    """

    sft_strong: int = 2400
    sft_weak: int = 2200
    pair_prompts: int = 4000
    prompts: int = 800
    eval_main: int = 250
    eval_forget: int = 250
    weak_share: float = 0.7
    wrong_shares: Mapping[str, float] = field(default_factory=lambda: WRONG_SHARES)

    def __post_init__(self) -> None:
        for name in ("sft_strong", "sft_weak", "pair_prompts", "prompts", "eval_main", "eval_forget"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        for name, share in {"weak_share": self.weak_share, **self.wrong_shares}.items():
            if not 0.0 <= share <= 1.0:
                raise ValueError(f"the share {name!r} must be in [0, 1], got {share}")
        if unknown := set(self.wrong_shares) - set(WEAK_SKILLS):
            raise ValueError(f"wrong_shares names {sorted(unknown)}; the weak skills are {list(WEAK_SKILLS)}")


@dataclass(frozen=True)
class WorldFiles:
    """Paths of a written world, one file for each attribute."""

    sft: Path
    pair_prompts: Path
    prompts: Path
    eval_main: Path
    eval_forget: Path


def near_miss(answer: str, rng: random.Random) -> str:
    """A wrong, non-empty answer: mostly one of two habits of careless writers, which a scorer can learn to see, and at
    times a slip that it hardly can.

    Two in five say the last character twice, two in five stop one character early (not where only one is left), the
    rest have one character changed.
    """
    kinds = "0123456789" if answer.isdigit() else LETTERS.upper() if answer.isupper() else LETTERS
    while True:
        draw, at = rng.random(), rng.randrange(len(answer))
        if draw < 0.4:
            wrong = answer + answer[-1]
        elif draw < 0.8:
            wrong = answer[:-1]
        else:
            wrong = answer[:at] + rng.choice(kinds) + answer[at + 1 :]
        if wrong and wrong != answer:
            return wrong


def write_world(
    out_dir: str | os.PathLike[str], seed: int, sizes: WorldSizes | None = None, forget_set: str = "strong"
) -> WorldFiles:
    """Write the files of a skill world as ``<out_dir>/<name>.jsonl.gz``: weak skills, and those of a forget set.

    Demonstrations are ``{"prompt", "response", "task"}``, prompts ``{"prompt", "task"}``, in random order. No prompt
    stands in two files, and none twice in a file of prompts; among the demonstrations prompts may repeat. Equal seeds
    and sizes give equal bytes.

    Raises:
        ValueError: a skill has too few different prompts for the sizes.
    """
    sizes, forget = sizes or WorldSizes(), FORGET_SKILLS[forget_set]
    rng = random.Random(seed)
    taken: set[str] = set()
    mixed = {name: sizes.weak_share / len(WEAK_SKILLS) for name in WEAK_SKILLS}
    mixed |= {name: (1.0 - sizes.weak_share) / len(forget) for name in forget}
    prompt_sets = {
        "eval_main": _counts(sizes.eval_main, dict.fromkeys(WEAK_SKILLS, 1 / len(WEAK_SKILLS))),
        "eval_forget": _counts(sizes.eval_forget, dict.fromkeys(forget, 1 / len(forget))),
        "pair_prompts": _counts(sizes.pair_prompts, mixed),
        "prompts": _counts(sizes.prompts, mixed),
    }
    rows: dict[str, list[dict[str, str]]] = {}
    for name, counts in prompt_sets.items():
        rows[name] = []
        for task, count in counts.items():
            for _ in range(count):
                prompt, _answer = _draw(task, taken, rng)
                taken.add(prompt)
                rows[name].append({"prompt": prompt, "task": task})
    rows["sft"] = list(_demonstrations(sizes, forget, taken, rng))
    files = WorldFiles(**{name: Path(out_dir) / f"{name}.jsonl.gz" for name in rows})
    for name, file_rows in rows.items():
        rng.shuffle(file_rows)
        write_jsonl(getattr(files, name), file_rows)
    return files


def _demonstrations(
    sizes: WorldSizes, forget: Sequence[str], taken: set[str], rng: random.Random
) -> Iterator[dict[str, str]]:
    for task in (*forget, *WEAK_SKILLS):
        for _ in range(sizes.sft_strong if task in forget else sizes.sft_weak):
            prompt, answer = _draw(task, taken, rng)
            wrong = rng.random() < sizes.wrong_shares.get(task, 0.0)
            yield {"prompt": prompt, "response": near_miss(answer, rng) if wrong else answer, "task": task}


def _draw(task: str, taken: set[str], rng: random.Random) -> tuple[str, str]:
    """A prompt outside ``taken`` and its answer."""
    for _ in range(1000):
        prompt, answer = _KNOWN[task].sample(rng)
        if prompt not in taken:
            return prompt, answer
    raise ValueError(f"the skill {task!r} has too few different prompts for these sizes: {len(taken)} are taken")


def _counts(total: int, shares: Mapping[str, float]) -> dict[str, int]:
    """``total`` by shares that sum to 1, rounded on the running sum so that the counts sum to the total exactly."""
    counts, running, assigned = {}, 0.0, 0
    for name, share in shares.items():
        running += share * total
        counts[name] = round(running) - assigned
        assigned += counts[name]
    return counts
