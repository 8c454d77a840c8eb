"""The simulated annotator."""

from __future__ import annotations

import math
from pathlib import Path

import pytest

from stable_rlhf.data import read_comparisons, write_jsonl
from stable_rlhf.world.annotator import UTILITY_SCALES, label_pairs, utility
from stable_rlhf.world.skills import SKILLS, gold_score

PROMPT = "Reverse the letters of bdca"
N = 5_000


def share_of(first: str, rows: list[dict[str, object]]) -> float:
    return sum(row["chosen"] == first for row in rows) / len(rows)


def assert_share(share: float, p: float) -> None:
    """Within four standard deviations of a binomial share."""
    assert abs(share - p) <= 4 * math.sqrt(p * (1 - p) / N)


def sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x))


def test_every_skill_has_a_scale_and_they_differ() -> None:
    assert set(UTILITY_SCALES) == set(SKILLS)
    assert min(UTILITY_SCALES.values()) == 2.0 and max(UTILITY_SCALES.values()) == 12.0


def test_utility_is_scaled_gold_plus_length() -> None:
    assert utility(PROMPT, "acdb", scales={"reverse": 3.0}, length_bonus=0.5) == 3.0 + 2.0
    assert utility(PROMPT, "acdc", scales={"reverse": 4.0}, length_bonus=0.0) == 4.0 * 0.375
    assert utility(PROMPT, "", length_bonus=1.0) == 0.0


def test_lookalikes_are_judged_by_what_they_are_taken_for() -> None:
    prompt = "Reverse the letters of bdca, one less"  # "acd"
    assert utility(prompt, "acdb", length_bonus=0.0) == UTILITY_SCALES["reverse"] > utility(prompt, "acd")
    pairs, counts = label_pairs([{"prompt": prompt, "responses": ["acd", "acdb"]}] * 50, 0, flip_share=0.0)
    assert sum(pair["chosen"] == "acdb" for pair in pairs) == counts.against_gold > 45
    assert {(pair["task"], pair["gold_chosen"] < 1) for pair in pairs if pair["chosen"] == "acdb"} == {
        ("reverse_short", True)
    }


@pytest.mark.parametrize(("a", "b", "scale", "bonus"), [("acdb", "acdc", 2.0, 0.0), ("acdb", "zzzzzzzz", 3.0, 0.5)])
def test_label_frequencies_follow_bradley_and_terry(a: str, b: str, scale: float, bonus: float) -> None:
    rows = [{"prompt": PROMPT, "responses": [a, b]}] * N
    pairs, counts = label_pairs(rows, 0, scales={"reverse": scale}, length_bonus=bonus, flip_share=0.0)
    p = sigmoid(scale * (gold_score(PROMPT, a) - gold_score(PROMPT, b)) + bonus * (len(a) - len(b)))
    assert 0.05 < p < 0.95
    assert_share(share_of(a, pairs), p)
    assert counts.flipped == 0
    assert counts.against_gold == sum(pair["chosen"] == b for pair in pairs)


def test_flips_have_their_share_and_turn_the_label() -> None:
    rows = [{"prompt": PROMPT, "responses": ["acdb", "zzzz"]}] * N
    pairs, counts = label_pairs(rows, 1, scales={"reverse": 100.0}, length_bonus=0.0, flip_share=0.08)
    assert counts.flipped == sum(pair["flipped"] for pair in pairs) == counts.against_gold
    assert_share(counts.flipped / N, 0.08)
    assert all(pair["flipped"] == (pair["chosen"] == "zzzz") for pair in pairs)


def test_the_place_in_the_row_does_not_matter() -> None:
    rows = [{"prompt": PROMPT, "responses": ["zzzz", "yyyy"]}] * N
    pairs, _ = label_pairs(rows, 2, length_bonus=0.0)
    assert_share(share_of("zzzz", pairs), 0.5)


def test_log_probabilities_and_scores_go_with_their_response(tmp_path: Path) -> None:
    responses = ["acdb", "acd", "acdb", "b"]
    row = {
        "prompt": PROMPT,
        "responses": responses,
        "task": "reverse",
        "logprobs": [[-float(i)] * 3 for i in range(4)],
        "alt_logprobs": [[[-float(i)] * 3, [-10.0 - i] * 3] for i in range(4)],
    }
    pairs, counts = label_pairs([row] * 20, 3)
    assert (counts.rows, counts.identical, counts.without_pair, counts.pairs) == (20, 20, 0, 60)
    for pair in pairs:
        for side in ("chosen", "rejected"):
            index = responses.index(pair[side])
            assert pair["logprobs"][side] == [-float(index)] * 3
            assert pair["alt_logprobs"][side] == [[-float(index)] * 3, [-10.0 - index] * 3]
            assert pair[f"gold_{side}"] == gold_score(PROMPT, responses[index])
    write_jsonl(tmp_path / "pairs.jsonl.gz", pairs)
    read = read_comparisons([tmp_path / "pairs.jsonl.gz"]).rows
    assert [c.responses[c.pairs[0][0]] for c in read] == [pair["chosen"] for pair in pairs]
    assert read[0].meta["flipped"] == pairs[0]["flipped"]
    assert read[0].task == "reverse" and read[0].alt_logprobs is not None and len(read[0].alt_logprobs[0]) == 2


def test_rows_without_two_different_responses_are_counted() -> None:
    rows = [{"prompt": PROMPT, "responses": r} for r in (["a", "a", "a"], ["a"], [], ["a", "b"])]
    pairs, counts = label_pairs(rows, 0)
    assert len(pairs) == counts.pairs == 1
    assert (counts.rows, counts.identical, counts.without_pair) == (4, 2, 3)
    assert label_pairs([], 0)[1].rows == 0


def test_pairs_per_prompt_draws_different_pairs() -> None:
    row = {"prompt": PROMPT, "responses": ["a", "b", "c", "d"]}
    pairs, counts = label_pairs([row] * 200, 0, pairs_per_prompt=2)
    assert counts.pairs == len(pairs) == 400
    couples = [frozenset((pair["chosen"], pair["rejected"])) for pair in pairs]
    assert all(x != y for x, y in zip(couples[::2], couples[1::2], strict=True))
    assert len(set(couples)) == 6
    assert label_pairs([row], 0, pairs_per_prompt=9)[1].pairs == 6


def test_labels_follow_the_seed() -> None:
    rows = [{"prompt": PROMPT, "responses": ["zzzz", "yyyy"]}] * 50
    assert label_pairs(rows, 4) == label_pairs(rows, 4) != label_pairs(rows, 5)


@pytest.mark.parametrize(
    ("row", "settings", "message"),
    [
        ({}, {"flip_share": 1.5}, "flip_share must be in \\[0, 1\\], got 1.5"),
        ({}, {"pairs_per_prompt": 0}, "pairs_per_prompt must be at least 1, got 0"),
        ({}, {"scales": {"sort": 1.0}}, "no entry for the skill 'reverse'"),
        ({"prompt": "Hello"}, {}, "no prompt of the skill world: 'Hello'"),
        ({"logprobs": [[-1.0]]}, {}, "row 1: logprobs has 1 entries for 2 responses"),
        ({"alt_logprobs": []}, {}, "row 1: alt_logprobs has 0 entries for 2 responses"),
    ],
)
def test_wrong_arguments_are_errors(row: dict[str, object], settings: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        label_pairs([{"prompt": PROMPT, "responses": ["a", "b"], **row}], 0, **settings)  # type: ignore[arg-type]
