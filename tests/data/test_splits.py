"""Splits: no prompt on both sides, the same split whatever the order, the sizes asked for."""

from __future__ import annotations

import random
from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from stable_rlhf.data import Prompt, PromptRow, prompt_key, split_rows


def rows_of(prompts: list[Prompt]) -> list[PromptRow]:
    return [PromptRow(prompt, source=f"rows:{number}") for number, prompt in enumerate(prompts, start=1)]


UNIQUE = rows_of([f"prompt {number}" for number in range(200)])


@settings(max_examples=150, deadline=None)
@given(
    prompts=st.lists(st.integers(0, 12), min_size=8, max_size=60).filter(lambda drawn: len(set(drawn)) >= 6),
    sizes=st.sampled_from([(0.5, 0.5), (0.5, 0.25), (0.6, 0.3, 0.1), (3, 2), (1.0,)]),
    seed=st.integers(-3, 2**40),
)
def test_groups_stay_whole_and_order_does_not_matter(prompts: list[int], sizes: tuple, seed: int) -> None:
    rows = rows_of([str(number) for number in prompts])
    try:
        splits = split_rows(rows, sizes, seed)
    except ValueError as error:
        assert "would be empty" in str(error)
        return
    assert len(splits) == len(sizes)
    seen = [{row.prompt for row in split} for split in splits]
    assert sum(map(len, seen)) == len(set().union(*seen))
    if sum(sizes) == 1:
        assert sum(map(len, splits)) == len(rows)
    for split in splits:
        assert [rows.index(row) for row in split] == sorted(rows.index(row) for row in split)
    largest = max(Counter(prompts).values())
    for split, size in zip(splits, sizes, strict=True):
        rounding = 0 if isinstance(size, int) else 1
        target = size if isinstance(size, int) else size * len(rows)
        assert abs(len(split) - target) <= largest - 1 + rounding
    shuffled = rows[:]
    random.Random(seed).shuffle(shuffled)
    assert [{row.prompt for row in split} for split in split_rows(shuffled, sizes, seed)] == seen


def test_sizes_are_exact_for_different_prompts() -> None:
    assert [len(split) for split in split_rows(UNIQUE, (120, 50), 0)] == [120, 50]
    assert [len(split) for split in split_rows(UNIQUE, (0.9, 0.1), 0)] == [180, 20]
    assert [len(split) for split in split_rows(UNIQUE, (1 / 3, 1 / 3, 1 / 3), 0)] == [67, 66, 67]


@pytest.mark.parametrize("seed", range(8))
def test_a_prompt_goes_where_all_its_rows_fit(seed: int) -> None:
    assert [len(split) for split in split_rows(rows_of(["x", "x", "y"]), (1, 2), seed)] == [1, 2]


def test_the_seed_draws_another_split_and_repeats_its_own() -> None:
    first, again, other = (split_rows(UNIQUE, (0.5, 0.5), seed)[0] for seed in (1, 1, 2))
    assert first == again
    in_both = len({row.prompt for row in first} & {row.prompt for row in other})
    assert 30 < in_both < 70  # 50 expected, deviation 3.5


def test_every_split_draws_from_the_whole_set() -> None:
    numbers = [int(str(row.prompt).split()[1]) for row in split_rows(UNIQUE, (20,), 0)[0]]
    assert min(numbers) < 60 and max(numbers) > 140


def test_a_text_and_its_chat_are_one_prompt() -> None:
    chat: Prompt = [{"role": "user", "content": "x"}]
    assert prompt_key("x") == prompt_key(chat) != prompt_key("y")
    assert prompt_key([{"role": "system", "content": "x"}, *chat]) != prompt_key(chat)
    for seed in range(8):
        left, right = split_rows(rows_of(["x", chat, "y", "z"]), (2, 2), seed)
        assert len({prompt_key(row.prompt) for row in left} & {prompt_key(row.prompt) for row in right}) == 0


@pytest.mark.parametrize(
    ("sizes", "reason"),
    [
        ((), "sizes is empty"),
        ((0,), "larger than 0"),
        ((0.5, -0.1), "larger than 0"),
        ((float("nan"),), "larger than 0"),
        ((150, 51), "ask for 201 rows, there are 200"),
        ((0.9, 0.2), "sum to 1.1, more than 1"),
        ((0.999, 0.001), "split 1 of sizes [0.999, 0.001] would be empty (200 rows, 200 different prompts)"),
    ],
)
def test_impossible_sizes(sizes: tuple, reason: str) -> None:
    with pytest.raises(ValueError) as caught:
        split_rows(UNIQUE, sizes, 0)
    assert reason in str(caught.value)
