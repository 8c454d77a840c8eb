"""Preference strength: mean and deviation of the votes, the curve, the pairs to read, the picture."""

from __future__ import annotations

import statistics

import numpy as np
import pytest
from hypothesis import Phase, given, settings
from hypothesis import strategies as st

from stable_rlhf.scorer.report import in_words, notable_tables, strength_picture, write_report
from stable_rlhf.scorer.strength import deviation_curve, notable_pairs, preference_strength, strength_summary

VOTES = st.lists(st.one_of(st.none(), st.floats(-50, 50)), min_size=3, max_size=3)


@settings(max_examples=60, deadline=None, phases=[Phase.generate])
@given(st.lists(VOTES, min_size=1, max_size=6))
def test_mean_and_deviation_are_those_of_the_votes_that_were_cast(votes):
    mean, std = preference_strength(np.array(votes, dtype=float).T)  # one row a pair here
    for pair, (mu, sigma) in zip(votes, zip(mean, std, strict=True), strict=True):
        cast = [v for v in pair if v is not None]
        if cast:
            assert mu == pytest.approx(statistics.fmean(cast), abs=1e-9)
            assert sigma == pytest.approx(statistics.pstdev(cast), abs=1e-6)
        else:
            assert np.isnan(mu) and np.isnan(sigma)


def test_the_deviation_survives_a_large_common_offset():
    """The one-pass formula E[d^2] - E[d]^2 would lose every digit here."""
    d = np.array([[1e8 + 1], [1e8 - 1], [1e8]])
    assert preference_strength(d)[1][0] == pytest.approx(np.sqrt(2 / 3), rel=1e-6)


@pytest.mark.parametrize(
    ("differences", "message"),
    [
        ([1.0, 2.0], "shape"),
        (np.zeros((0, 3)), "shape"),
        ([[1.0, 2.0], [1.0, np.inf]], "scorer 1 gave inf to pair 1"),
    ],
)
def test_bad_votes_are_refused(differences, message):
    with pytest.raises(ValueError, match=message):
        preference_strength(differences)


def test_the_curve_groups_equally_many_pairs_weakest_first():
    rng = np.random.default_rng(0)
    mu = rng.normal(size=101)
    curve = deviation_curve(mu, mu**2, bins=4)
    assert [c["pairs"] for c in curve] == [26, 25, 25, 25]
    weakest = np.sort(mu)[:26]
    assert curve[0]["mean"] == pytest.approx(weakest.mean()) and curve[0]["std"] == pytest.approx((weakest**2).mean())
    assert [c["mean"] for c in curve] == sorted(c["mean"] for c in curve)
    assert len(deviation_curve(mu[:2], mu[:2], bins=20)) == 2
    with pytest.raises(ValueError, match="bins"):
        deviation_curve(mu, mu, bins=0)


def test_pairs_to_read():
    mu = [3.0, -2.0, 0.1, -0.2, 5.0, -2.0]
    assert notable_pairs(mu, 2) == {"weakest": [1, 5], "most ambiguous": [2, 3], "strongest": [4, 0]}
    assert notable_pairs(mu, 0)["weakest"] == []


def test_summary():
    found = strength_summary([-1.0, 0.0, 1.0, 2.0], [0.0, 1.0, 1.0, 2.0])
    assert (found["pairs"], found["mean"], found["deviation"], found["below_zero"]) == (4, 0.5, 1.0, 0.25)
    with pytest.raises(ValueError, match="empty"):
        strength_summary([], [])


@pytest.mark.parametrize("mu", [[0.0], [0.5, 0.5], [-1.0, 2.0, 0.3], list(np.linspace(-3, 8, 300))])
@pytest.mark.parametrize("checked", [False, True])
def test_a_picture_of_any_data(mu, checked):
    check = [float(i) if i % 2 else None for i in range(len(mu))] if checked and len(mu) > 1 else None
    assert strength_picture(mu, np.abs(mu), check, "agree$ment").startswith(b"\x89PNG")


def summary_of(text: str) -> dict:
    row = {
        "mean": -1.5,
        "std": 0.25,
        "task": None,
        "source": "p.jsonl:3",
        "prompt": text,
        "chosen": "a",
        "rejected": "b",
    }
    check = {"column": "agreement", "pairs": 4, "prompts": 3, "spearman": {"value": 0.5, "low": 0.1, "high": 0.8},
             "auc": {"value": 0.75, "low": 0.5, "high": 1.0},
             "by_value": [{"value": 1.0, "pairs": 4, "mean": 0.5, "below_zero": 0.25}]}  # fmt: skip
    figures = strength_summary([-1.0, 0.0, 1.0, 2.0], [0.0, 1.0, 1.0, 2.0])
    notable = {"weakest": [row], "most ambiguous": [], "strongest": []}
    return {"scorers": 5, "folds": 2, "heads_only": False, **figures, "check": check, "notable": notable}


def test_the_page_escapes_what_the_data_say(tmp_path):
    summary = summary_of("<script>alert(1)</script> & [bold]")
    write_report("A <title>", summary, [-1.0, 0.0, 1.0, 2.0], [0.0, 1.0, 1.0, 2.0], [1.0, 1.0, 1.0, 0.5], tmp_path)
    page = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert "<script>" not in page and "&lt;script&gt;alert(1)" in page and "A &lt;title&gt;" in page
    assert "0.500 [0.100, 0.800]" in page and "0.750 [0.500, 1.000]" in page and "4 pairs of 3 prompts" in page
    assert "-1.50" in page and "p.jsonl:3" in page
    assert (tmp_path / "strength.png").read_bytes().startswith(b"\x89PNG")


def test_the_tables_for_a_terminal(capsys):
    from rich.console import Console

    summary = summary_of("[red]costs $5[/red]\nnow")
    for table in notable_tables(summary):
        Console(width=200).print(table)
    out = capsys.readouterr().out
    assert "[red]costs $5[/red] now" in out and "-1.50" in out and "most ambiguous" in out
    assert "had not seen it (of 2 folds)" in in_words(summary)[0]
