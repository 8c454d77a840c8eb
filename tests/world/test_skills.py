"""The skills, their prompts and the gold score."""

from __future__ import annotations

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from stable_rlhf.world.skills import (
    FORGET_SKILLS,
    LOOKALIKES,
    SKILLS,
    STRONG_SKILLS,
    WEAK_SKILLS,
    gold_score,
    misread,
    right_answer,
    skills_of,
    task_of,
)

KNOWN = [
    ("upper", "Write in capitals: bdca", "BDCA"),
    ("upper", "Put into upper case: zz", "ZZ"),
    ("lower", "Write in small letters: BDCA", "bdca"),
    ("lower", "Put into lower case: Q", "q"),
    ("last", "Give the last letter of pone", "e"),
    ("last", "Which letter ends abc?", "c"),
    ("count", "Count the letters of abcabcabc", "9"),
    ("count", "How many letters are in abcdefghijkl?", "12"),
    ("largest", "Give the largest digit of 48213", "8"),
    ("largest", "Which digit is largest in 000?", "0"),
    ("swap", "Swap the ends of bdca", "adcb"),
    ("swap", "Swap the first and last letter of x", "x"),
    ("reverse", "Reverse the letters of bdca", "acdb"),
    ("reverse", "Write backwards: abcde", "edcba"),
    ("sort", "Sort the letters of dbca", "abcd"),
    ("sort", "Put in order: baba", "aabb"),
    ("next", "Give the next letter after each of aopz", "bpqa"),
    ("next", "Shift by one: m", "n"),
    ("add", "Add 23 and 45", "68"),
    ("add", "What is 99 plus 7?", "106"),
]
# Lookalikes with the prompt they are taken for.
MISREAD = [
    ("swap_capitals", "Swap the ends of bdca, in capitals", "ADCB", "Swap the ends of bdca"),
    ("swap_capitals", "Swap the first and last letter of x, in capitals", "X", "Swap the first and last letter of x"),
    ("reverse_short", "Reverse the letters of bdca, one less", "acd", "Reverse the letters of bdca"),
    ("reverse_short", "Write backwards: abcde, one less", "edcb", "Write backwards: abcde"),
    ("sort_back", "Sort the letters of dbca, last first", "dcba", "Sort the letters of dbca"),
    ("sort_back", "Put in order: baba, last first", "bbaa", "Put in order: baba"),
    ("next_twice", "Give the next letter after each of aoyz, twice", "cqab", "Give the next letter after each of aoyz"),
    ("next_twice", "Shift by one: m, twice", "o", "Shift by one: m"),
    ("add_one", "Add 23 and 45, then one", "69", "Add 23 and 45"),
    ("add_one", "What is 99 plus 7, then one?", "107", "What is 99 plus 7?"),
]


@pytest.mark.parametrize(("task", "prompt", "answer", "taken_for"), MISREAD)
def test_lookalikes_and_what_they_are_taken_for(task: str, prompt: str, answer: str, taken_for: str) -> None:
    assert (task_of(prompt), right_answer(prompt)) == (task, answer)
    assert misread(prompt) == misread([{"role": "user", "content": prompt}]) == misread(taken_for) == taken_for
    assert task_of(taken_for) == LOOKALIKES[task].reads_like and task_of(taken_for) in WEAK_SKILLS
    assert gold_score(prompt, answer) == 1.0 > gold_score(prompt, right_answer(taken_for))


def test_a_world_of_lookalikes() -> None:
    assert {task for task, *_ in MISREAD} == set(LOOKALIKES) == set(FORGET_SKILLS["lookalikes"])
    assert len(MISREAD) == sum(len(skill.templates) for skill in LOOKALIKES.values())
    assert list(skills_of()) == list(SKILLS) and list(skills_of("lookalikes")) == [*LOOKALIKES, *WEAK_SKILLS]
    rng = random.Random(4)
    for skill in LOOKALIKES.values():
        for _ in range(200):
            prompt, answer = skill.sample(rng)
            owners = [other.name for other in (*SKILLS.values(), *LOOKALIKES.values()) if other.parse(prompt)]
            assert owners == [skill.name] and right_answer(prompt) == answer and not (set(answer) & set(", "))


@pytest.mark.parametrize(("task", "prompt", "answer"), KNOWN)
def test_known_cases(task: str, prompt: str, answer: str) -> None:
    assert task_of(prompt) == task
    assert right_answer(prompt) == answer
    assert gold_score(prompt, answer) == 1.0
    assert gold_score([{"role": "user", "content": prompt}], answer) == 1.0


def test_known_cases_cover_every_template() -> None:
    assert len(KNOWN) == sum(len(skill.templates) for skill in SKILLS.values())
    assert {task for task, _, _ in KNOWN} == set(SKILLS)


def test_strong_and_weak_skills_part_the_world() -> None:
    assert sorted(STRONG_SKILLS + WEAK_SKILLS) == sorted(SKILLS)
    assert len(SKILLS) >= 8
    assert len(STRONG_SKILLS) == len(WEAK_SKILLS)


@pytest.mark.parametrize("name", sorted(SKILLS))
def test_samples_parse_back_and_their_answer_scores_one(name: str) -> None:
    rng = random.Random(3)
    templates = set()
    for _ in range(200):
        prompt, answer = SKILLS[name].sample(rng)
        owners = [skill.name for skill in SKILLS.values() if skill.parse(prompt) is not None]
        assert owners == [name]
        assert answer and gold_score(prompt, answer) == 1.0
        args = SKILLS[name].parse(prompt)
        assert args is not None
        wordings = [SKILLS[name].prompt(args, i) for i in range(len(SKILLS[name].templates))]
        templates.add(wordings.index(prompt))
    assert templates == set(range(len(SKILLS[name].templates)))


def test_sampling_follows_the_generator() -> None:
    draws = [[SKILLS["sort"].sample(random.Random(seed)) for _ in range(3)] for seed in (1, 1, 2)]
    assert draws[0] == draws[1] != draws[2]


@pytest.mark.parametrize(
    ("response", "score"),
    [
        ("", 0.0),
        ("acdc", 0.5 * 3 / 4),  # one letter wrong
        ("acd", 0.5 * 3 / 4),  # one left out
        ("acdbb", 0.5 * 4 / 5),  # one too many
        ("ACDB", 0.0),
        (" acdb", 0.5 * 4 / 5),  # exact means exact
        ("acdb" * 2, 0.5 * 4 / 8),  # twice the length: the edit distance alone
        ("acdb" * 4, 0.5 * (4 / 16) * (8 / 16)),  # beyond it: also the length
    ],
)
def test_partial_credit(response: str, score: float) -> None:
    assert gold_score("Reverse the letters of bdca", response) == score


@given(response=st.text(max_size=40), seed=st.integers(0, 50))
def test_any_response_has_a_score_and_only_the_answer_scores_above_half(response: str, seed: int) -> None:
    rng = random.Random(seed)
    for skill in SKILLS.values():
        prompt, answer = skill.sample(rng)
        score = gold_score(prompt, response)
        assert 0.0 <= score <= 1.0
        assert (score == 1.0) == (response == answer)
        assert response == answer or score <= 0.5


@given(tail=st.text(min_size=1, max_size=60))
def test_running_on_never_pays(tail: str) -> None:
    score = gold_score("Reverse the letters of bdca", "acdb" + tail)
    length = 4 + len(tail)
    # Whatever the tail, a response that begins with the answer is its length away from it.
    assert score == pytest.approx(0.5 * 4 / length * min(1.0, 8 / length), rel=1e-12)


@pytest.mark.parametrize(
    "prompt",
    [
        "",
        "Hello",
        "Reverse the letters of ",
        "Reverse the letters of BD",
        "Add 1 and x",
        " Add 1 and 2",
        "Add 1 and 2\n",
        [],
    ],
)
def test_a_prompt_from_elsewhere_is_an_error_that_shows_it(prompt: str | list[dict[str, str]]) -> None:
    for call in (task_of, right_answer, lambda p: gold_score(p, "x")):
        with pytest.raises(ValueError, match="no prompt of the skill world") as error:
            call(prompt)
        assert repr(prompt)[:20] in str(error.value)


def test_the_last_user_turn_of_a_chat_is_the_prompt() -> None:
    chat = [
        {"role": "user", "content": "Add 1 and 2"},
        {"role": "assistant", "content": "3"},
        {"role": "user", "content": "Shift by one: a"},
    ]
    assert task_of(chat) == "next"
    assert gold_score(chat, "b") == 1.0
