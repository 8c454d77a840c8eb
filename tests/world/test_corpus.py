"""The files of a world."""

from __future__ import annotations

import random
from collections import Counter
from dataclasses import asdict
from pathlib import Path

import pytest

from stable_rlhf.data import read_demonstrations, read_prompts
from stable_rlhf.world.corpus import WorldFiles, WorldSizes, near_miss, write_world
from stable_rlhf.world.skills import FORGET_SKILLS, SKILLS, STRONG_SKILLS, WEAK_SKILLS, gold_score, task_of

SIZES = WorldSizes(
    sft_strong=40, sft_weak=400, pair_prompts=100, prompts=83, eval_main=52, eval_forget=30, weak_share=0.7
)


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> WorldFiles:
    return write_world(tmp_path_factory.mktemp("world"), 5, SIZES)


def test_no_prompt_stands_in_two_files(world: WorldFiles) -> None:
    files = {name: [row.prompt for row in read_prompts([path]).rows] for name, path in asdict(world).items()}
    for name, prompts in files.items():
        others = {prompt for other, rows in files.items() if other != name for prompt in rows}
        assert not others.intersection(prompts)
        if name != "sft":
            assert len(set(prompts)) == len(prompts) == getattr(SIZES, name)


def test_default_sizes_fit_every_skill(tmp_path: Path) -> None:
    world = write_world(tmp_path, 0)
    rows = read_demonstrations([world.sft]).rows
    assert len(rows) == 5 * WorldSizes().sft_strong + 5 * WorldSizes().sft_weak


def test_tasks_are_as_named_and_mixed_as_asked(world: WorldFiles) -> None:
    tasks = {name: [str(row.task) for row in read_prompts([path]).rows] for name, path in asdict(world).items()}
    for name, path in asdict(world).items():
        assert tasks[name] == [task_of(row.prompt) for row in read_prompts([path]).rows]
    assert set(tasks["eval_main"]) == set(WEAK_SKILLS)
    assert set(tasks["eval_forget"]) == set(STRONG_SKILLS)
    for name in ("pair_prompts", "prompts"):
        weak = sum(task in WEAK_SKILLS for task in tasks[name])
        assert abs(weak - 0.7 * len(tasks[name])) <= 0.5
        assert set(tasks[name]) == set(SKILLS)
    for counts in (Counter(tasks["eval_main"]), Counter(tasks["eval_forget"])):
        assert max(counts.values()) - min(counts.values()) <= 1
    assert tasks["sft"] != sorted(tasks["sft"])


def test_a_world_of_lookalikes_has_them_where_another_has_the_strong_skills(tmp_path: Path, world: WorldFiles) -> None:
    other = write_world(tmp_path, 5, SIZES, "lookalikes")
    lookalikes = set(FORGET_SKILLS["lookalikes"])
    for name, path in asdict(other).items():
        counts = Counter(str(row.task) for row in read_prompts([path]).rows)
        assert {task: n for task, n in counts.items() if task in WEAK_SKILLS} == {
            task: n for task, n in Counter(str(row.task) for row in read_prompts([getattr(world, name)]).rows).items()
            if task in WEAK_SKILLS
        }  # fmt: skip
        assert set(counts) - set(WEAK_SKILLS) == (set() if name == "eval_main" else lookalikes)
    rows = read_demonstrations([other.sft]).rows
    assert all(gold_score(row.prompt, row.response) == 1 for row in rows if row.task in lookalikes)


def test_strong_demonstrations_are_right_and_weak_ones_wrong_by_their_share(world: WorldFiles) -> None:
    rows = read_demonstrations([world.sft]).rows
    for task in SKILLS:
        scores = [gold_score(row.prompt, row.response) for row in rows if row.task == task]
        assert len(scores) == (SIZES.sft_strong if task in STRONG_SKILLS else SIZES.sft_weak)
        share = sum(score < 1 for score in scores) / len(scores)
        expected = SIZES.wrong_shares.get(task, 0.0)
        # Four standard deviations of a binomial share; exactly none for the strong skills.
        assert abs(share - expected) <= 4 * (expected * (1 - expected) / len(scores)) ** 0.5


def test_equal_seeds_give_equal_bytes(world: WorldFiles, tmp_path: Path) -> None:
    again = write_world(tmp_path / "again", 5, SIZES)
    other = write_world(tmp_path / "other", 6, SIZES)
    for name, path in asdict(world).items():
        assert path.read_bytes() == getattr(again, name).read_bytes()
        assert path.read_bytes() != getattr(other, name).read_bytes()


@pytest.mark.parametrize("name", sorted(SKILLS))
def test_near_misses_are_wrong_and_near(name: str) -> None:
    rng = random.Random(1)
    lengths = set()
    for _ in range(200):
        prompt, answer = SKILLS[name].sample(rng)
        wrong = near_miss(answer, rng)
        assert wrong and wrong != answer
        assert abs(len(wrong) - len(answer)) <= 1
        # One slip costs at most two of the edits that the score counts (an exchange of neighbours).
        assert gold_score(prompt, wrong) >= 0.5 * (1 - min(2, len(answer)) / max(len(answer), len(wrong)))
        lengths.add(len(wrong) - len(answer))
    assert lengths >= {0, 1}


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"prompts": 0}, "prompts must be at least 1, got 0"),
        ({"weak_share": 1.2}, "'weak_share' must be in \\[0, 1\\], got 1.2"),
        ({"wrong_shares": {"sort": -0.1}}, "'sort' must be in \\[0, 1\\], got -0.1"),
        ({"wrong_shares": {"upper": 0.5}}, "wrong_shares names \\['upper'\\]"),
    ],
)
def test_wrong_sizes_are_errors(settings: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        WorldSizes(**settings)  # type: ignore[arg-type]


def test_a_skill_that_runs_out_of_prompts_is_an_error_and_writes_nothing(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="'add' has too few different prompts"):
        write_world(tmp_path / "w", 0, WorldSizes(eval_main=20_000))
    assert not (tmp_path / "w").exists()
