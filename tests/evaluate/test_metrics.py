"""Metrics against closed forms and brute force."""

from __future__ import annotations

import json
import math
import types
from collections import Counter
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from stable_rlhf import metrics as m
from stable_rlhf.evaluate.judge import GoldJudge, Judge, ScorerJudge, Verdicts, compare


def planted(n: int, slope: float, seed: int = 0, spread: float = 2.0) -> tuple[np.ndarray, np.ndarray]:
    """Pairs whose larger score belongs to the chosen response with probability σ(slope · |Δ|)."""
    rng = np.random.default_rng(seed)
    size = np.abs(rng.normal(0, spread, n))
    right = rng.random(n) < 1 / (1 + np.exp(-slope * size))
    base = rng.normal(0, 1, n)
    return base + np.where(right, size, 0), base + np.where(right, 0, size)


def slow_ece(chosen: list[float], rejected: list[float], bins: int) -> float:
    """ECE pair by pair, bins looked for one after the other."""
    groups: dict[int, list[tuple[float, float]]] = {}
    for c, r in zip(chosen, rejected, strict=True):
        confidence = 1 / (1 + math.exp(-abs(c - r)))
        credit = 1.0 if c > r else 0.5 if c == r else 0.0
        place = next(b for b in range(bins) if confidence < 0.5 + 0.5 * (b + 1) / bins or b == bins - 1)
        groups.setdefault(place, []).append((confidence, credit))
    total = 0.0
    for rows in groups.values():
        total += abs(sum(credit for _, credit in rows) - sum(conf for conf, _ in rows)) / len(chosen)
    return total


def test_accuracy_counts_ties_half() -> None:
    assert m.pair_accuracy([2, 1, 0, 5], [1, 1, 3, 5]) == pytest.approx((1 + 0.5 + 0 + 0.5) / 4)
    assert m.pair_accuracy([1.0], [0.0]) == 1.0


def test_wilson_against_its_defining_quadratic() -> None:
    z = 1.959963984540054
    for successes, total in ((0, 5), (3, 7), (7, 7), (2.5, 9)):
        got = m.wilson(successes, total)
        p = successes / total
        assert got["value"] == pytest.approx(p)
        for bound in (got["low"], got["high"]):  # both bounds solve (p − b)² = z² b (1 − b) / n
            assert (p - bound) ** 2 == pytest.approx(z * z * bound * (1 - bound) / total, abs=1e-12)
        assert got["low"] <= p <= got["high"]
        assert got["high"] > got["low"]


def test_wilson_refuses_impossible_counts() -> None:
    with pytest.raises(ValueError, match="successes"):
        m.wilson(4, 3)
    with pytest.raises(ValueError, match="total"):
        m.wilson(0, 0)


def test_difference_interval_of_equal_and_of_certain_figures() -> None:
    a = {"value": 0.5, "low": 0.4, "high": 0.7}
    got = m.difference_interval(a, a)
    assert got["value"] == 0.0
    assert got["low"] == pytest.approx(-math.hypot(0.1, 0.2))
    assert got["high"] == pytest.approx(math.hypot(0.1, 0.2))
    fixed = {"value": 0.2, "low": 0.2, "high": 0.2}
    assert m.difference_interval(a, fixed) == pytest.approx({"value": 0.3, "low": 0.2, "high": 0.5})


def test_win_minus_lose_covers_the_truth_and_never_has_no_width() -> None:
    assert m.win_minus_lose(0.0, 0.0, 50)["high"] > 0 > m.win_minus_lose(0.0, 0.0, 50)["low"]
    rng = np.random.default_rng(0)
    inside = 0
    for _ in range(1000):
        win, lose, _tie = rng.multinomial(120, [0.25, 0.15, 0.6]) / 120
        interval = m.win_minus_lose(win, lose, 120)
        inside += interval["low"] <= 0.1 <= interval["high"]
    assert 0.93 <= inside / 1000 <= 0.98


def test_bootstrap_of_a_mean_agrees_with_the_normal_interval() -> None:
    values = np.random.default_rng(3).normal(5, 2, 400)
    got = m.bootstrap(lambda w: w @ values / w.sum(axis=1), values.size, seed=1, resamples=4000)
    half = 1.96 * values.std(ddof=1) / 20
    assert got["value"] == pytest.approx(values.mean())
    assert got["high"] - got["value"] == pytest.approx(half, rel=0.06)
    assert got["value"] - got["low"] == pytest.approx(half, rel=0.06)
    again = m.bootstrap(lambda w: w @ values / w.sum(axis=1), values.size, seed=1, resamples=4000)
    assert got == again


def test_bootstrap_keeps_the_size_of_every_stratum() -> None:
    strata = list("abbabbb")
    member = np.array([[s == t for t in "ab"] for s in strata], dtype=float)
    seen = []
    m.bootstrap(lambda w: seen.append(w @ member) or w.sum(axis=1), 7, strata=strata, resamples=50)  # type: ignore[func-returns-value]
    assert np.array_equal(np.concatenate(seen), np.tile([2.0, 5.0], (51, 1)))
    free = []
    m.bootstrap(lambda w: free.append(w @ member) or w.sum(axis=1), 7, resamples=50)  # type: ignore[func-returns-value]
    assert len({tuple(row) for row in np.concatenate(free)}) > 1


def test_what_is_not_independent_is_drawn_together() -> None:
    groups, strata = list("xxyzzz"), list("aaabbb")
    seen: list[np.ndarray] = []
    m.bootstrap(lambda w: seen.append(w) or w.sum(axis=1), 6, groups=groups, strata=strata, resamples=50)  # type: ignore[func-returns-value]
    weights = np.concatenate(seen)
    assert (weights[:, 0] == weights[:, 1]).all() and (weights[:, 3:] == 1).all()  # a stratum of one group
    assert (weights[:, 0] + weights[:, 2] == 2).all() and len(set(weights[:, 0])) == 3
    values = np.random.default_rng(0).normal(size=300)
    mean = lambda of: lambda w: w @ of / w.sum(axis=1)  # noqa: E731
    once = m.bootstrap(mean(values), 300, seed=4)
    alone = m.bootstrap(mean(values), 300, seed=4, groups=list(range(300)))
    again = m.bootstrap(mean(np.repeat(values, 4)), 1200, seed=4, groups=list(np.repeat(np.arange(300), 4)))
    for end in ("value", "low", "high"):  # four copies of each tell no more than one
        assert again[end] == pytest.approx(once[end]) and alone[end] == pytest.approx(once[end])


def test_ece_interval_of_a_calibrated_scorer_reaches_near_zero_and_holds_its_value() -> None:
    reached = 0
    for seed in range(40):
        c, r = planted(300, 1.0, seed=seed)
        interval = m.ece_interval(c, r, seed=seed, resamples=300)
        assert interval["low"] <= interval["value"] <= interval["high"]
        reached += interval["low"] == 0.0
    assert 36 <= reached <= 40  # nominal 39
    c, r = planted(2000, 0.5)
    assert m.ece_interval(c, r)["low"] > 0.05  # overconfidence is still seen


def test_chance_ece_of_one_bin_is_that_of_a_binomial() -> None:
    c, r = [0.0] * 50 + [1e-9] * 50, [1e-9] * 50 + [0.0] * 50  # confidence one half, so the gap is |B(100, ½)/100 − ½|
    drawn = m.ece_if_calibrated(c, r, resamples=4000)
    expected = sum(math.comb(100, k) / 2**100 * abs(k / 100 - 0.5) for k in range(101))
    assert drawn.mean() == pytest.approx(expected, rel=0.04)
    assert m.scorer_evaluation(c, r)["ece_if_calibrated"] == pytest.approx(expected, rel=0.08)


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.tuples(st.integers(-6, 6), st.integers(-6, 6)), min_size=1, max_size=40),
    st.integers(1, 12),
)
def test_ece_equals_brute_force(pairs: list[tuple[int, int]], bins: int) -> None:
    c, r = [a / 2 for a, _ in pairs], [b / 2 for _, b in pairs]
    value, rows = m.calibration(c, r, bins)
    assert value == pytest.approx(slow_ece(c, r, bins), abs=1e-12)
    assert sum(row["count"] for row in rows) == len(pairs)
    statistic = m.calibration_statistic(c, r, bins)
    assert float(statistic(np.ones((1, len(pairs))))[0]) == pytest.approx(value, abs=1e-12)


def test_statistic_under_weights_is_the_figure_of_the_repeated_sample() -> None:
    c, r = planted(60, 0.6, seed=2)
    tasks = ["a", "b", "c"] * 20
    weights = np.random.default_rng(0).integers(1, 4, 60)
    c2, r2, t2 = np.repeat(c, weights), np.repeat(r, weights), list(np.repeat(tasks, weights))
    rows = weights[None].astype(float)
    assert m.calibration_statistic(c, r)(rows)[0] == pytest.approx(m.calibration(c2, r2)[0])
    table = m.per_task(np.concatenate([c2, r2]), t2 + t2)
    spread, scale = m.task_mean_spread(table), m.task_std_mean(table)
    stds = [row["std"] for row in table.values()]
    assert m.task_statistic(c, r, tasks, "spread")(rows)[0] == pytest.approx(spread)
    assert m.task_statistic(c, r, tasks, "relative")(rows)[0] == pytest.approx(spread / scale)
    assert m.task_statistic(c, r, tasks, "variation")(rows)[0] == pytest.approx(np.std(stds) / np.mean(stds))


def test_calibrated_scores_have_small_ece_and_overconfident_ones_the_known_one() -> None:
    c, r = planted(40_000, 1.0)
    assert m.calibration(c, r)[0] < 0.01
    c, r = planted(40_000, 0.5)
    size = np.abs(c - r)
    expected = float((m.sigmoid(size) - m.sigmoid(0.5 * size)).mean())
    assert expected > 0.08
    assert m.calibration(c, r)[0] == pytest.approx(expected, abs=0.008)
    assert m.calibration(c, r, mass="equal")[0] == pytest.approx(expected, abs=0.008)


def test_one_confidence_gives_the_gap_exactly() -> None:
    delta = math.log(0.8 / 0.2)  # confidence 0.8, right 6 times of 10
    c = [delta] * 6 + [0.0] * 4
    r = [0.0] * 6 + [delta] * 4
    value, rows = m.calibration(c, r)
    assert value == pytest.approx(0.2)
    assert len(rows) == 1
    assert rows[0]["confidence"] == pytest.approx(0.8)
    assert rows[0]["accuracy"] == pytest.approx(0.6)
    assert m.calibration(c, r, mass="equal")[0] == pytest.approx(0.2)


def test_reliability_rows_lie_in_their_bins_and_equal_mass_bins_are_even() -> None:
    c, r = planted(1000, 0.8)
    for row in m.calibration(c, r)[1]:
        assert 0.5 <= row["low"] <= row["confidence"] <= row["high"] <= 1.0
    assert {row["count"] for row in m.calibration(c, r, mass="equal")[1]} == {100}


def test_equal_mass_does_not_depend_on_the_order_of_tied_rows() -> None:
    c = np.array([1.0] * 30 + [0.0] * 25 + [3.0] * 5)
    r = np.array([0.0] * 30 + [1.0] * 25 + [0.0] * 5)
    order = np.random.default_rng(0).permutation(60)
    assert m.calibration(c, r, 4, "equal")[0] == pytest.approx(
        m.calibration(c[order], r[order], 4, "equal")[0], abs=1e-12
    )


def test_brier_by_hand() -> None:
    assert m.brier([0.0], [0.0]) == pytest.approx(0.25)
    assert m.brier([math.log(3), 0.0], [0.0, math.log(3)]) == pytest.approx((0.25**2 + 0.75**2) / 2)
    assert m.brier([1e4], [0.0]) == 0.0


def test_temperature_recovers_a_planted_scale_and_is_the_minimum() -> None:
    c, r = planted(40_000, 1.0)
    assert m.fit_temperature(2.5 * c, 2.5 * r) == pytest.approx(2.5, rel=0.04)
    c, r = planted(300, 0.7, seed=4)
    best = m.fit_temperature(c, r)

    def nll(t: float) -> float:
        return float(np.logaddexp(0, -(c - r) / t).mean())

    assert nll(best) <= min(nll(best * 1.001), nll(best / 1.001))
    assert m.fit_temperature(3 * c, 3 * r) == pytest.approx(3 * best, rel=1e-9)


def test_temperature_without_a_minimum_stays_finite() -> None:
    assert m.fit_temperature([2.0, 1.0], [0.0, 0.0]) == pytest.approx(1.5e-3)  # always right: surer is better
    assert m.fit_temperature([0.0, 0.0], [2.0, 1.0]) == pytest.approx(1.5e3)  # always wrong: never commit
    assert m.fit_temperature([1.0, 1.0], [1.0, 1.0]) == 1.0


def test_temperature_scaling_mends_overconfidence_out_of_sample() -> None:
    c, r = planted(20_000, 1.0)
    scaled, _ = m.temperature_scaled(4 * c, 4 * r)
    assert m.calibration(scaled, np.zeros_like(scaled))[0] < 0.015
    assert m.calibration(4 * c, 4 * r)[0] > 0.1


def test_cross_fitting_uses_the_other_half() -> None:
    c, r = planted(40, 1.0)
    scaled, how = m.temperature_scaled(c, r, seed=3)
    assert "cross-fitted" in how
    ratio = np.round((c - r) / scaled, 9)
    temperatures = Counter(ratio.tolist())
    assert sorted(temperatures.values()) == [20, 20]
    first, second = temperatures
    half = ratio == first
    assert m.fit_temperature(c[half], r[half]) == pytest.approx(second, rel=1e-6)
    one = np.array([3.0])
    assert m.temperature_scaled(one, 0 * one)[0] == one  # never fitted on the pair that it scales
    a, b = np.array([1.0, 5.0]), np.array([0.0, 2.0])
    scaled = m.temperature_scaled(a, b)[0]
    assert scaled == pytest.approx([1 / m.fit_temperature([5.0], [2.0]), 3 / m.fit_temperature([1.0], [0.0])])


# -- against other computations of others ------------------------------------------------------------------------------


@pytest.mark.parametrize(("slope", "bins"), [(1.0, 10), (0.4, 15), (2.0, 1)])
def test_calibration_against_scikit_learn(slope: float, bins: int) -> None:
    from sklearn.calibration import calibration_curve
    from sklearn.metrics import accuracy_score, brier_score_loss

    c, r = planted(3000, slope, seed=5)
    confidence, right = 1 / (1 + np.exp(-np.abs(c - r))), c > r
    # scikit-learn's bins lie in [0, 1], ours in [0.5, 1]: the upper half of twice as many are the same ones.
    for mass, strategy, count in (("width", "uniform", 2 * bins), ("equal", "quantile", bins)):
        value, rows = m.calibration(c, r, bins, mass)  # type: ignore[arg-type]
        share, mean = calibration_curve(right, confidence, n_bins=count, strategy=strategy)
        assert [row["accuracy"] for row in rows] == pytest.approx(share)
        assert [row["confidence"] for row in rows] == pytest.approx(mean)
        sizes = np.array([row["count"] for row in rows])
        assert value == pytest.approx(float((sizes * np.abs(share - mean)).sum() / c.size))
        assert sizes.sum() == c.size
    assert m.pair_accuracy(c, r) == pytest.approx(accuracy_score(np.ones(c.size, bool), right))
    # A pair is one trial of "chosen is better" at probability σ(Δ); turned round it is the other label.
    both = np.concatenate([c - r, r - c])
    label = np.repeat([1, 0], c.size)
    assert m.brier(c, r) == pytest.approx(brier_score_loss(label, 1 / (1 + np.exp(-both))))


def test_temperature_against_logistic_regression_and_intervals_against_scipy() -> None:
    from scipy.stats import binomtest
    from sklearn.linear_model import LogisticRegression

    c, r = planted(500, 0.6, seed=6)
    both = np.concatenate([c - r, r - c])[:, None]
    fit = LogisticRegression(C=1e10, fit_intercept=False, tol=1e-10).fit(both, np.repeat([1, 0], c.size))
    assert m.fit_temperature(c, r) == pytest.approx(1 / fit.coef_[0, 0], rel=1e-4)
    for successes, total in ((0, 5), (3, 7), (7, 7), (41, 250)):
        wanted = binomtest(successes, total).proportion_ci(method="wilson")
        got = m.wilson(successes, total)
        assert (got["low"], got["high"]) == pytest.approx((wanted.low, wanted.high))


def test_cohen_kappa_against_scikit_learn() -> None:
    from sklearn.metrics import cohen_kappa_score

    rng = np.random.default_rng(0)
    for _ in range(20):
        a = rng.integers(-1, 2, 30)
        b = np.where(rng.random(30) < 0.6, a, rng.integers(-1, 2, 30))
        assert m.cohen_kappa(a, b) == pytest.approx(cohen_kappa_score(a, b))
    assert m.cohen_kappa([1, 1], [1, 1]) is None  # never said anything else: chance explains it all


def test_perfect_calibration_measures_its_own_sampling_error_and_overconfidence_its_analytic_value() -> None:
    from scipy.integrate import quad
    from scipy.stats import halfnorm

    inside = 0
    for seed in range(300):
        c, r = planted(400, 1.0, seed=seed)
        chance = m.ece_if_calibrated(c, r, seed=seed, resamples=200)
        inside += m.calibration(c, r)[0] <= np.quantile(chance, 0.95)
    assert 275 <= inside <= 297  # nominal 285

    def sigma(x: float) -> float:
        return 1 / (1 + math.exp(-x))

    for slope in (0.5, 0.25):  # |Δ| is half-normal of scale 2, the share ranked right σ(slope · |Δ|)
        wanted, _ = quad(lambda x, s=slope: (sigma(x) - sigma(s * x)) * halfnorm.pdf(x, scale=2), 0, 40)
        c, r = planted(100_000, slope, seed=3)
        for mass in ("width", "equal"):
            assert m.calibration(c, r, 15, mass)[0] == pytest.approx(wanted, abs=0.005)  # type: ignore[arg-type]
        brier, _ = quad(
            lambda x, s=slope: ((1 - sigma(x)) ** 2 * sigma(s * x) + sigma(x) ** 2 * (1 - sigma(s * x)))
            * halfnorm.pdf(x, scale=2), 0, 40,
        )  # fmt: skip
        assert m.brier(c, r) == pytest.approx(brier, abs=0.005)


def test_difference_curve_follows_the_sigmoid_when_calibrated() -> None:
    c, r = planted(40_000, 1.0)
    rows = m.difference_curve(c, r, 8)
    assert [row["count"] for row in rows] == [5000] * 8
    assert [row["difference"] for row in rows] == sorted(row["difference"] for row in rows)
    for row in rows[1:-1]:
        assert row["accuracy"] == pytest.approx(1 / (1 + math.exp(-row["difference"])), abs=0.025)


def test_per_task_by_hand() -> None:
    table = m.per_task([1, 3, 10, 5], ["a", "a", "b", None])
    assert table == {
        m.NO_TASK: {"count": 1, "mean": 5.0, "std": 0.0},
        "a": {"count": 2, "mean": 2.0, "std": 1.0},
        "b": {"count": 1, "mean": 10.0, "std": 0.0},
    }
    assert m.task_mean_spread(table) == pytest.approx(np.std([5, 2, 10]))
    assert m.task_std_mean(table) == pytest.approx(1 / 3)


def test_verdicts_their_margin_and_shares() -> None:
    scores, reference = [1.0, 2.0, 3.0, 0.0], [1.0, 1.5, 0.0, 4.0]
    assert m.score_verdicts(scores, reference).tolist() == [0, 1, 1, -1]
    got = m.outcome_shares([0, 1, 1, -1])
    assert (got["win"], got["lose"], got["tie"], got["n"]) == (0.5, 0.25, 0.25, 4)
    assert got["win_ci"] == [m.wilson(2, 4)["low"], m.wilson(2, 4)["high"]]
    assert got["lose_ci"] == [m.wilson(1, 4)["low"], m.wilson(1, 4)["high"]]
    assert m.score_verdicts(scores, reference, tie_margin=0.5).tolist() == [0, 0, 1, -1]  # 0.5 itself is a tie
    with pytest.raises(ValueError, match="tie_margin"):
        m.score_verdicts([1], [1], tie_margin=-1)


def test_scorer_evaluation_is_consistent_and_json_ready() -> None:
    c, r = planted(200, 0.3, seed=1)
    tasks = ["add" if k % 3 else "sort" for k in range(200)]
    got = m.scorer_evaluation(c, r, tasks, bins=7, seed=2)
    assert json.loads(json.dumps(got, allow_nan=False)) == got
    assert got == m.scorer_evaluation(c, r, tasks, bins=7, seed=2)
    assert (got["pairs"], got["bins"]) == (200, 7)
    assert got["accuracy"]["value"] == pytest.approx(m.pair_accuracy(c, r))
    assert got["ece"]["value"] == pytest.approx(m.calibration(c, r, 7)[0])
    assert got["ece_equal_mass"]["value"] == pytest.approx(m.calibration(c, r, 7, "equal")[0])
    assert {name: row["count"] for name, row in got["tasks"].items()} == {"add": 133, "sort": 67}
    for name, row in got["tasks"].items():
        here = np.array([task == name for task in tasks])
        both = np.concatenate([c[here], r[here]])
        assert row["accuracy"] == pytest.approx(m.pair_accuracy(c[here], r[here]))
        assert (row["mean"], row["std"]) == (pytest.approx(both.mean()), pytest.approx(both.std()))
    assert got["ece_after_temperature"]["value"] < got["ece"]["value"]
    assert got["brier_after_temperature"] < got["brier"]
    scaled = m.temperature_scaled(c, r, seed=2)[0]
    value, rows = m.calibration(scaled, np.zeros(200), 7)
    assert got["ece_after_temperature"]["value"] == pytest.approx(value)
    assert got["reliability_after_temperature"] == rows
    equal = m.calibration(scaled, np.zeros(200), 7, "equal")[0]
    assert got["ece_equal_mass_after_temperature"]["value"] == pytest.approx(equal)


def test_pairs_of_a_prompt_are_not_independent() -> None:
    c, r = planted(150, 0.3, seed=1)
    once = m.scorer_evaluation(c, r, seed=2)
    assert once == m.scorer_evaluation(c, r, seed=2, prompts=list(range(150)))
    four = m.scorer_evaluation(np.repeat(c, 4), np.repeat(r, 4), seed=2, prompts=[i // 4 for i in range(600)])
    apart = m.scorer_evaluation(np.repeat(c, 4), np.repeat(r, 4), seed=2)
    for name in ("accuracy", "ece", "ece_equal_mass"):
        for end in ("value", "low", "high"):
            assert four[name][end] == pytest.approx(once[name][end], abs=1e-9)
        assert apart[name]["high"] - apart[name]["low"] < 0.7 * (four[name]["high"] - four[name]["low"])
    mixed = m.scorer_evaluation(c, r, seed=2, prompts=[i // 2 for i in range(150)])  # alike by chance alone
    assert mixed["accuracy"]["high"] - mixed["accuracy"]["low"] == pytest.approx(
        once["accuracy"]["high"] - once["accuracy"]["low"], rel=0.25
    )
    sure = m.scorer_evaluation([1.0] * 6, [0.0] * 6, prompts=[0, 0, 0, 1, 1, 1])["accuracy"]
    assert sure == m.wilson(2, 2)
    one = m.scorer_evaluation([1.0, 0.0, 1.0, 2.0], [0.0, 1.0, 0.0, 0.0], prompts=[7] * 4)["accuracy"]
    assert one == m.wilson(0.75, 1)
    with pytest.raises(ValueError, match="prompts has 1 entries but there are 2 pairs"):
        m.scorer_evaluation([1.0, 2.0], [0.0, 0.0], prompts=[0])


def test_one_pair_and_all_ties_work() -> None:
    one = m.scorer_evaluation([1.0], [0.0], ["a"])
    assert one["accuracy"]["value"] == 1.0
    assert one["ece"]["value"] == pytest.approx(1 - 1 / (1 + math.exp(-1)))
    ties = m.scorer_evaluation([1.0, 1.0], [1.0, 1.0])
    assert ties["accuracy"]["value"] == 0.5
    assert ties["ece"]["value"] == 0.0
    assert ties["temperature"] == 1.0
    assert list(ties["tasks"]) == [m.NO_TASK]


@pytest.mark.parametrize(
    "call, words",
    [
        (lambda: m.pair_accuracy([], []), "chosen is empty"),
        (lambda: m.pair_accuracy([1.0], [1.0, 2.0]), "chosen has 1 entries but rejected has 2"),
        (lambda: m.brier([1.0, 2.0], [1.0, float("nan")]), "rejected holds nan at index 1"),
        (lambda: m.calibration([float("inf")], [1.0]), "chosen holds inf at index 0"),
        (lambda: m.calibration([1.0], [0.0], bins=0), "bins must be at least 1"),
        (lambda: m.calibration([1.0], [0.0], mass="mass"), "mass must be 'width' or 'equal'"),  # type: ignore[arg-type]
        (lambda: m.fit_temperature([[1.0]], [[1.0]]), "chosen must be one-dimensional"),
        (lambda: m.per_task([1.0], ["a", "b"]), "tasks has 2 entries"),
        (lambda: m.score_verdicts([1.0], []), "reference is empty"),
        (lambda: m.scorer_evaluation([1.0], [0.0], []), "tasks has 0 entries"),
        (lambda: m.bootstrap(lambda w: w[:, 0], 0), "n must be at least 1"),
    ],
)
def test_bad_input_is_named(call: Any, words: str) -> None:
    with pytest.raises(ValueError) as error:
        call()
    assert words in str(error.value)


class Row:
    def __init__(self, prompt: str, task: str | None) -> None:
        self.prompt, self.task = prompt, task


def test_gold_judge_sees_prompt_and_task_and_reports_the_truth() -> None:
    judge = GoldJudge(lambda prompt, response, task: float(response == prompt[::-1] and task == "reverse"))
    assert isinstance(judge, Judge)
    rows = [Row("ab", "reverse"), Row("cd", "reverse"), Row("ef", "sort")]
    got = compare(judge, rows, ["ba", "dc", "fe"], ["ba", "xx", "fe"], kl=1.5, lengths=[2, 4, 6])  # type: ignore[arg-type]
    assert (got["win"], got["lose"], got["tie"]) == pytest.approx((1 / 3, 0, 2 / 3))
    assert (got["gold"], got["sft_gold"]) == pytest.approx((2 / 3, 1 / 3))
    assert (got["judge"], got["kl"], got["length"], got["length_unit"]) == ("gold", 1.5, 4.0, "tokens")
    assert got["verdicts"] == [0, 1, 0]


def test_a_scorer_judge_has_a_margin_and_no_gold() -> None:
    judge = ScorerJudge(lambda prompts, responses: [len(r) for r in responses], "length")
    rows = [Row("p", None), Row("q", None)]
    got = compare(judge, rows, ["aaa", "aa"], ["a", "a"], tie_margin=1)  # type: ignore[arg-type]
    assert (got["win"], got["tie"], got["gold"], got["sft_gold"]) == (0.5, 0.5, None, None)
    assert (got["length"], got["length_unit"]) == (2.5, "characters")
    assert compare(judge, rows, ["aaa", "aa"], ["a", "a"], tie_margin=0)["win"] == 1.0  # type: ignore[arg-type]


def test_compare_refuses_what_does_not_fit() -> None:
    judge = ScorerJudge(lambda prompts, responses: [0.0], "one score")
    rows = [Row("p", None), Row("q", None)]
    few = types.SimpleNamespace(name="few", verdicts=lambda prompts, responses, reference: Verdicts([1], {}))
    with pytest.raises(ValueError, match="'few' gave 1 verdicts for 2 prompts"):
        compare(few, rows, ["a", "b"], ["b", "c"])  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="responses has 1 entries but rows has 2"):
        compare(judge, rows, ["a"], ["b", "c"])  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="'one score' gave 1 scores for 2"):
        compare(judge, rows, ["a", "b"], ["b", "c"])  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="rows is empty"):
        compare(judge, [], [], [])
