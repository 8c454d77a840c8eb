"""Denoising: bands, what they do to the records, and what that does to the loss, by an independent computation."""

from __future__ import annotations

import math
from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from hypothesis import Phase, given, settings
from hypothesis import strategies as st

from stable_rlhf.data.encoding import encode
from stable_rlhf.data.records import Comparison, DataError, PairStrength
from stable_rlhf.scorer import AdvantageModel, ScorerSettings
from stable_rlhf.scorer.comparisons import EncodedComparison
from stable_rlhf.scorer.denoise import denoise, parse_bands
from stable_rlhf.scorer.train import scorer_loss
from stable_rlhf.settings.stages import ScorerArguments


def rows_of(*means: float) -> list[Comparison]:
    return [
        Comparison(f"p{i}", ("good", "bad"), ((0, 1),), strength=(PairStrength(m, 0.5),), source=f"f:{i}")
        for i, m in enumerate(means)
    ]


def applied(means, *bands):
    return denoise(rows_of(*means), parse_bands("bands", bands))


def test_each_action_alone():
    means = (-2.0, -0.5, 0.1, 3.0)
    bands = [
        {"below": -1.0, "flip": True}, {"between": [-1.0, 0.0], "drop": True},
        {"between": [0.0, 1.0], "label_smoothing": 0.3}, {"above": 1.0, "adaptive_margin": True},
    ]  # fmt: skip
    found = applied(means, *bands)
    flipped, dropped, smoothed, margined = found.rows
    assert flipped.pairs == ((1, 0),) and flipped.responses == ("good", "bad")
    assert flipped.strength == (PairStrength(2.0, 0.5),)
    assert dropped is None
    assert smoothed.label_smoothing == (0.3,) and smoothed.rank_margin == (0.0,) and smoothed.pairs == ((0, 1),)
    assert margined.rank_margin == (3.0,) and margined.label_smoothing == (None,)
    assert found.counts == {"pairs": 4, "flip": 1, "drop": 1, "label_smoothing": 1, "rank_margin": 1}


def test_what_was_done_and_why_stays_with_the_row():
    found = applied((-2.0, 5.0), {"below": 0, "flip": True, "adaptive_margin": True, "soft_labels": True})
    done = found.rows[0].meta["denoise"]
    assert done == found.decisions[0]
    (decision,) = done
    assert (decision["mean"], decision["std"], decision["flip"], decision["rank_margin"]) == (-2.0, 0.5, True, 2.0)
    assert decision["label_smoothing"] == pytest.approx(1 / (1 + math.exp(2.0)))
    assert found.rows[1].meta["denoise"] == [{"mean": 5.0, "std": 0.5}]  # in no band: as it was
    assert found.rows[1].pairs == ((0, 1),) and found.rows[1].label_smoothing == (None,)


def test_records_that_were_given_are_not_touched():
    rows = rows_of(-2.0)
    before = replace(rows[0], meta=dict(rows[0].meta))
    denoise(rows, parse_bands("bands", [{"below": 0, "flip": True}]))
    assert rows[0] == before


@settings(max_examples=100, deadline=None, phases=[Phase.generate])
@given(st.lists(st.floats(-900, 900), min_size=1, max_size=9), st.booleans(), st.booleans(), st.booleans())
def test_combinations_follow_the_formulas(means, flip, soft, margin):
    if not (flip or soft or margin):
        return
    band = {"between": [-1000, 1000], "flip": flip, "soft_labels": soft, "adaptive_margin": margin}
    for mean, row in zip(means, applied(means, band).rows, strict=True):
        s = abs(mean) if flip else mean
        assert row.pairs == (((1, 0),) if flip else ((0, 1),))
        wrong = math.exp(-s) / (1 + math.exp(-s)) if -s < 700 else 1.0
        assert row.label_smoothing == ((pytest.approx(wrong, abs=1e-12) if soft else None),)
        assert row.rank_margin == (s if margin else 0.0,)


def test_limits_are_half_open_and_the_first_band_wins():
    first = {"below": 0.0, "label_smoothing": 0.1}
    second = {"between": [-1.0, 1.0], "label_smoothing": 0.2}
    found = applied((-1.0, -0.5, 0.0, 1.0, 2.0), first, second, {"above": 1.0, "label_smoothing": 0.3})
    assert [row.label_smoothing[0] for row in found.rows] == [0.1, 0.1, 0.2, 0.3, 0.3]


@pytest.mark.parametrize("n", [1, 3, 10, 37])
@pytest.mark.parametrize("share", [0.0, 0.1, 0.2, 0.5, 1.0])
def test_shares_count_pairs_by_rank(n, share):
    means = [math.sin(7.0 * i) for i in range(n)]
    order = sorted(range(n), key=lambda i: means[i])
    found = applied(means, {"lowest": share, "flip": True})
    low = [i for i, row in enumerate(found.rows) if row.pairs == ((1, 0),)]
    assert abs(len(low) - share * n) <= 0.5 and set(low) == set(order[: len(low)])
    found = applied(means, {"highest": share, "label_smoothing": 0.2})
    top = [i for i, row in enumerate(found.rows) if row.label_smoothing == (0.2,)]
    assert abs(len(top) - share * n) <= 0.5 and set(top) == set(order[n - len(top) :])


def test_shares_that_touch_cover_every_pair_once():
    means = [0.0] * 5 + [1.0] * 5  # ties break by order
    cuts = [0.0, 0.3, 0.31, 0.77, 1.0]
    bands = [{"quantiles": [a, b], "label_smoothing": a} for a, b in pairwise(cuts)]
    found = applied(means, *bands)
    assert [row.label_smoothing[0] for row in found.rows] == [0.0] * 3 + [0.31] * 5 + [0.77] * 2


def test_a_ranking_is_mended_pair_by_pair():
    row = Comparison("p", ("a", "b", "c"), ((0, 1), (0, 2), (1, 2)),
                     strength=(PairStrength(-3.0, 0.1), PairStrength(0.2, 0.2), PairStrength(2.0, 0.3)))  # fmt: skip
    bands = [{"below": 0, "flip": True, "label_smoothing": 0.1}, {"between": [0, 1], "drop": True}]
    found = denoise([row], parse_bands("bands", bands))
    assert found.rows[0].pairs == ((1, 0), (1, 2))
    assert found.rows[0].strength == (PairStrength(3.0, 0.1), PairStrength(2.0, 0.3))
    assert found.rows[0].label_smoothing == (0.1, None) and found.rows[0].rank_margin == (0.0, 0.0)
    assert [d.get("drop", False) for d in found.decisions[0]] == [False, True, False]


def test_rows_that_cannot_be_denoised():
    rows = [*rows_of(1.0), Comparison("p", ("a", "b"), ((0, 1),), source="pairs.jsonl:7")]
    with pytest.raises(DataError, match=r"pairs\.jsonl:7: no 'strength'.*stable-rlhf strength"):
        denoise(rows, parse_bands("bands", [{"below": 0, "flip": True}]))
    with pytest.raises(DataError, match="drops every pair"):
        applied((1.0, 2.0), {"above": 0, "drop": True})


@pytest.mark.parametrize(
    ("band", "message"),
    [
        ({}, "give one of"),
        ({"flip": True}, "give one of"),
        ({"below": 0, "above": 1, "flip": True}, "give one of"),
        ({"below": 0}, "says nothing to do"),
        ({"below": 0, "flip": False}, "says nothing to do"),
        ({"below": 0, "flipp": True}, "unknown key 'flipp'"),
        ({"below": "low", "flip": True}, "below takes a number"),
        ({"below": math.nan, "flip": True}, "below takes a number"),
        ({"below": True, "flip": True}, "below takes a number"),
        ({"between": 1.0, "flip": True}, "between takes two numbers"),
        ({"between": [1.0], "flip": True}, "between takes two numbers"),
        ({"between": [1.0, 1.0], "flip": True}, "low < high"),
        ({"quantiles": [0.5, 1.2], "flip": True}, "shares between 0 and 1"),
        ({"lowest": 20, "flip": True}, "shares between 0 and 1"),
        ({"highest": -0.1, "flip": True}, "shares between 0 and 1"),
        ({"below": 0, "flip": 1}, "flip is true or false"),
        ({"below": 0, "label_smoothing": 1.5}, "label_smoothing must be between 0 and 1"),
        ({"below": 0, "label_smoothing": True}, "label_smoothing must be between 0 and 1"),
        ({"below": 0, "drop": True, "flip": True}, "drop leaves nothing for flip"),
        ({"below": 0, "soft_labels": True, "label_smoothing": 0.1}, "give one"),
    ],
)
def test_bands_that_make_no_sense_are_refused(band, message):
    with pytest.raises(ValueError, match=r"^scorer\.denoise\[1\]: .*" + message):
        parse_bands("scorer.denoise", [{"below": 0, "drop": True}, band])


# -- the loss ----------------------------------------------------------------------------------------------------------


def log_sigmoid(x: float) -> float:
    return -math.log1p(math.exp(-x))


@pytest.mark.parametrize("objective", ["rm", "am"])
def test_the_loss_is_that_of_the_mended_labels(objective, tiny_model, tokenizer):
    """Every pair of the batch by hand, from the strength alone, for the plain loss and for the Advantage Model's."""
    model = AdvantageModel(tiny_model().base_model, tokenizer, ScorerSettings(objective=objective)).eval()
    prompts = ["Reverse the letters of abcd", "Write backwards: xyz", "Count the letters of qq", "Sort: ba", "Put: z"]
    means, margin, default = [-2.0, -0.3, 0.4, 1.5, 9.0], 1.5, 0.05
    rows = [
        Comparison(p, ("dcba", "abc"), ((0, 1),), strength=(PairStrength(m, 1.0),))
        for p, m in zip(prompts, means, strict=True)
    ]
    bands = [
        {"below": -1, "flip": True, "soft_labels": True, "adaptive_margin": True}, {"between": [-1, 0], "drop": True},
        {"between": [0, 1], "label_smoothing": 0.3}, {"between": [1, 2], "soft_labels": True, "adaptive_margin": True},
    ]  # fmt: skip
    mended = [row for row in denoise(rows, parse_bands("bands", bands)).rows if row is not None]
    batch = [EncodedComparison(row, [encode(tokenizer, row.prompt, r) for r in row.responses]) for row in mended]
    arguments = ScorerArguments(margin=margin, label_smoothing=default)
    loss, output, _ = scorer_loss(model, model, batch, arguments, None, len(batch))
    by_hand = {  # place: (flipped, alpha, m)
        0: (True, 1 / (1 + math.exp(2.0)), 2.0), 2: (False, 0.3, 0.0), 3: (False, 1 / (1 + math.exp(1.5)), 1.5),
        4: (False, default, 0.0),
    }  # fmt: skip
    wanted = correct = 0.0
    for place, (flipped, alpha, m) in by_hand.items():
        scores = model.score([prompts[place]] * 2, ["dcba", "abc"]).tolist()
        better, worse = reversed(scores) if flipped else scores
        gap = better - worse
        wanted -= (1 - alpha) * log_sigmoid(gap - m) + alpha * log_sigmoid(-(gap - m))
        if objective == "am":
            wanted -= log_sigmoid(margin - better) + log_sigmoid(margin + worse)
        correct += gap > 0
    assert len(batch) == 4
    assert float(loss.detach()) == pytest.approx(wanted / 4, abs=1e-5)
    assert float(output.accuracy) == pytest.approx(correct / 4)
    assert torch.isfinite(loss)
