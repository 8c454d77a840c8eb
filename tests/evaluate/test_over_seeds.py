"""Intervals over seeds against scipy and simulation, and what a study makes of its summaries."""

from __future__ import annotations

import copy
import json
import math
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy import stats

from stable_rlhf.evaluate import over_seeds as study
from stable_rlhf.evaluate import over_seeds_report as study_report
from stable_rlhf.evaluate.findings import CANNOT_TELL

SEEDS = (3, 4, 5, 6, 7)


@pytest.fixture(scope="module")
def summaries(make_summary: Any) -> list[dict[str, Any]]:
    """Seeds in which the paper's claims were planted (tests/evaluate/conftest.py)."""
    found = []
    for seed in SEEDS:
        summary = make_summary(pairs=800, prompts=200, seed=seed)
        rng = np.random.default_rng(seed)
        for entry in summary["policies"].values():  # the planted shares are the same in every seed: let them differ
            for on in ("main", "forget"):
                win, lose = (max(0.0, entry[on][key] + rng.normal(0, 0.01)) for key in ("win", "lose"))
                entry[on] |= {"win": win, "lose": lose, "tie": 1 - win - lose}
        summary["stages"] = [{"name": "sft", "seconds": 5.0, "skipped": False}]
        summary["stages"] += [{"name": f"ppo-{v}", "seconds": 9.0, "skipped": False} for v in summary["policies"]]
        found.append(summary)
    return found


ABOUT = {
    "title": "A study", "kind": "reported", "seeds": list(SEEDS), "validation": None, "fingerprint": "abc",
    "judges": ["gold"], "hours": 1.0, "command": "stable-rlhf study my.yaml", "device": "cpu", "versions": {},
    "settings": {"ppo": {"kl_coef": 0.05}},
}  # fmt: skip


@pytest.fixture(scope="module")
def results(summaries: list[dict[str, Any]]) -> dict[str, Any]:
    return study.results(summaries, ABOUT)


# -- intervals ---------------------------------------------------------------------------------------------------------


def test_paired_intervals_are_students() -> None:
    rng = np.random.default_rng(0)
    for n in (2, 5, 12):
        a, b = rng.normal(1, 2, n), rng.normal(0, 1, n)
        got = study.paired_difference(a, b)
        wanted = stats.ttest_rel(a, b).confidence_interval(0.95)
        assert (got["low"], got["high"]) == pytest.approx((wanted.low, wanted.high))
        assert got["value"] == pytest.approx((a - b).mean())


def test_one_seed_has_a_mean_and_no_interval() -> None:
    for got in (study.seed_mean([2.0]), study.paired_difference([3.0], [1.0]), study.paired_ratio([3.0], [1.5])):
        assert got["value"] == 2.0
        assert math.isnan(got["low"]) and math.isnan(got["high"])


def test_a_ratio_is_what_the_paired_test_lets_stand() -> None:
    rng = np.random.default_rng(1)
    for _ in range(20):
        b = rng.normal(3, 0.5, 5)
        a = 0.6 * b + rng.normal(0, 0.3, 5)
        got = study.paired_ratio(a, b)
        assert got["low"] <= got["value"] <= got["high"]
        for end in (got["low"], got["high"]):
            assert stats.ttest_1samp(a - end * b, 0).pvalue == pytest.approx(0.05, abs=1e-6)
        inside = (got["low"] + got["high"]) / 2
        assert stats.ttest_1samp(a - inside * b, 0).pvalue > 0.05


def test_a_ratio_covers_the_truth_as_often_as_it_says() -> None:
    rng = np.random.default_rng(2)
    hits = 0
    for _ in range(1000):
        b = rng.normal(1, 0.3, 5)
        got = study.paired_ratio(0.4 * b + rng.normal(0, 0.1, 5), b)
        hits += got["low"] <= 0.4 <= got["high"]
    assert 0.93 <= hits / 1000 <= 0.97


def test_a_ratio_whose_denominator_may_be_zero_has_no_ends() -> None:
    got = study.paired_ratio([1.0, 2.0, 1.5], [0.1, -0.1, 0.02])
    assert (got["low"], got["high"]) == (-math.inf, math.inf)
    got = study.paired_ratio([0.1, 0.2], [0.0, 0.0])
    assert math.isnan(got["value"])
    same = study.paired_ratio([1.0, 1.0, 1.0], [3.0, 3.0, 3.0])  # no spread: the interval is a point
    assert same["low"] <= same["value"] <= same["high"] and same["value"] == pytest.approx(1 / 3)
    assert same["high"] - same["low"] < 1e-6


def test_figures_that_do_not_pair_are_refused() -> None:
    with pytest.raises(ValueError, match="same seeds"):
        study.paired_difference([1.0, 2.0], [1.0])
    with pytest.raises(ValueError, match="one finite figure a seed"):
        study.seed_mean([1.0, math.nan])
    with pytest.raises(ValueError, match=r"variant 'am' has seeds \[1\], but the study has \[1, 2\]"):
        rows = [{"variant": "rm", "seed": 1}, {"variant": "rm", "seed": 2}, {"variant": "am", "seed": 1}]
        study.columns(rows, "variant")


# -- results -----------------------------------------------------------------------------------------------------------


def test_every_variant_and_seed_has_a_row_with_the_summarys_figures(results: Any, summaries: Any) -> None:
    rows = {(row["variant"], row["seed"]): row for row in results["policies"]}
    assert {name for name, _ in rows} == {"sft", *summaries[0]["policies"]}
    assert len(rows) == 7 * len(SEEDS) == len(results["policies"])
    for summary in summaries:
        for variant, entry in summary["policies"].items():
            row = rows[variant, summary["seed"]]
            assert row["forget_lose"] == entry["forget"]["lose"] and row["main_net"] == pytest.approx(
                entry["main"]["win"] - entry["main"]["lose"]
            )
            assert row["main_gold_gain"] == pytest.approx(entry["main"]["gold"] - entry["main"]["sft_gold"])
            gold = [point["gold"] for point in entry["curve"]]
            assert row["train_gold_first"] == pytest.approx(np.mean(gold[:6]))
            kept = next(r for r in results["curves"] if (r["variant"], r["seed"]) == (variant, summary["seed"]))
            assert kept["gold"] == pytest.approx([np.mean(gold[i : i + 2]) for i in range(0, 60, 2)], abs=1e-5)
            assert row["train_gold_late"] == pytest.approx(np.mean(gold[45:]) - np.mean(gold[15:30]))
            assert row["train_gold_lowest"] == pytest.approx(min(np.mean(gold[i : i + 6]) for i in range(0, 60, 6)))
        sft = rows["sft", summary["seed"]]
        assert (sft["main_win"], sft["forget_lose"], sft["main_tie"], sft["main_kl"]) == (0, 0, 1, 0)
        assert sft["main_gold"] == summary["policies"]["rm"]["main"]["sft_gold"]
    for row in results["scorers"]:
        part = next(s for s in summaries if s["seed"] == row["seed"])["scorers"][row["scorer"]]
        assert row["ece"] == part["ece"]["value"]
        assert row["ece_after_temperature"] == part["ece_after_temperature"]["value"]
    assert json.loads(json.dumps(results, allow_nan=False)) == results


def test_means_and_differences_follow_from_the_rows(results: Any) -> None:
    def of(variant: str, key: str) -> list[float]:
        return [row[key] for row in results["policies"] if row["variant"] == variant]

    mean = results["means"]["policies"]["am-sr"]["forget_lose"]
    assert mean["value"] == pytest.approx(np.mean(of("am-sr", "forget_lose")))
    assert 0 <= mean["low"] <= mean["value"] <= mean["high"]
    gap = next(r for r in results["comparisons"] if (r["variant"], r["figure"]) == ("am-sr", "forget_lose"))
    wanted = stats.ttest_rel(of("am-sr", "forget_lose"), of("rm", "forget_lose")).confidence_interval()
    assert (gap["low"], gap["high"]) == pytest.approx((wanted.low, wanted.high)) and gap["minus"] == "rm"
    assert not [r for r in results["comparisons"] if r["variant"] in ("rm", "sft")]


def test_pairs_of_ones_own_are_compared_and_named(summaries: Any) -> None:
    found = study.results(summaries, {**ABOUT, "compare": [["am-sr", "am"], ["rm", "sft"]]})
    pairs = {(row["variant"], row["minus"]) for row in found["comparisons"]}
    assert pairs == {("am-sr", "am"), ("rm", "sft")}

    def of(variant: str) -> list[float]:
        return [row["main_win"] for row in found["policies"] if row["variant"] == variant]

    gap = next(r for r in found["comparisons"] if (r["variant"], r["figure"]) == ("am-sr", "main_win"))
    wanted = stats.ttest_rel(of("am-sr"), of("am")).confidence_interval()
    assert (gap["low"], gap["high"]) == pytest.approx((wanted.low, wanted.high))
    text = study_report.markdown(found)
    assert "| Difference, seed by seed |" in text and "| AM-PPO-SR minus AM-PPO |" in text
    assert "| RM-PPO minus SFT |" in text


def test_rehearsals_share_is_a_mean_over_steps_where_there_is_rehearsal(summaries: Any) -> None:
    watched = [copy.deepcopy(summary) for summary in summaries]
    for number, summary in enumerate(watched):
        for point in summary["policies"]["am-sr"]["curve"]:
            point["rehearsal_share"] = 0.2 + 0.1 * number if point["step"] % 2 else 0.4 + 0.1 * number
            point["rehearsal_coef"] = point["step"] + number
    found = study.results(watched, ABOUT)
    steps = [point["step"] for point in watched[0]["policies"]["am-sr"]["curve"]]
    odd = sum(step % 2 for step in steps) / len(steps)
    rows = {row["seed"]: row["rehearsal_share"] for row in found["policies"] if row["variant"] == "am-sr"}
    for number, seed in enumerate(SEEDS):
        assert rows[seed] == pytest.approx(0.2 * odd + 0.4 * (1 - odd) + 0.1 * number)
    assert found["means"]["policies"]["am-sr"]["rehearsal_share"]["value"] == pytest.approx(
        np.mean(list(rows.values()))
    )
    last = steps[-(len(steps) // 4) :]
    for row in found["policies"]:
        if row["variant"] == "am-sr":
            assert row["rehearsal_coef_last"] == pytest.approx(np.mean(last) + SEEDS.index(row["seed"]))
    assert "rehearsal_share" not in found["means"]["policies"]["am"]
    assert "rehearsal's share" in study_report.markdown(found)
    assert "rehearsal's share" not in study_report.markdown(study.results(summaries, ABOUT))


def test_another_estimators_policies_are_named_by_it_and_say_nothing_of_ppo(summaries: Any) -> None:
    renamed = [copy.deepcopy(summary) for summary in summaries]
    for summary in renamed:
        for name in ("rm", "am-sr"):
            summary["policies"][name]["label"] = {"rm": "RM-GRPO", "am-sr": "AM-GRPO-SR"}[name]
    found = study.results(renamed, ABOUT)
    text = study_report.markdown(found)
    assert "| RM-GRPO |" in text and "Minus RM-GRPO, seed by seed" in text and "| AM-PPO |" in text
    assert "| RM-PPO |" not in text
    beside = text.partition("Beside the paper's Table 2")[2].partition("\n\n")[0]
    assert "AM-PPO |" in beside and "GRPO" not in beside
    assert not [item for item in found["claims"] if "PPO-SR" in item["claim"] or "RM-PPO" in item["claim"]]
    assert [item for item in found["claims"] if "Advantage Model" in item["claim"]]
    assert study_report.make_page(found)[1]


def test_claims_hold_where_they_were_planted_and_turn_with_the_numbers(results: Any, make_summary: Any) -> None:
    held = {item["claim"]: item["held"] for item in results["claims"]}
    assert len(held) == 13

    def about(words: str, of: dict[str, Any] = held) -> Any:
        return next(value for claim, value in of.items() if words in claim)

    for words in ("calibration error is at most 0.74", "ranks as accurately", "half as much", "wins more often",
                  "at most 0.27", "RM-PPO loses more often", "over-optimises", "fares better"):  # fmt: skip
        assert about(words) is True, words
    assert about("divided by one fitted temperature still") is not True  # the planted error is one of scale
    turned = []
    for seed in SEEDS:
        summary = make_summary(pairs=800, prompts=200, seed=seed, swap=True)
        summary["stages"] = [{"name": f"ppo-{v}", "seconds": 9.0} for v in summary["policies"]]
        turned.append(summary)
    other = {item["claim"]: item["held"] for item in study.results(turned, ABOUT)["claims"]}
    for words in (
        "calibration error is at most 0.74",
        "half as much",
        "wins more often",
        "at most 0.27",
        "fares better",
    ):
        assert about(words, other) is False, words


def test_one_seed_can_tell_nothing_but_says_its_figures(summaries: Any) -> None:
    alone = study.results(summaries[:1], {**ABOUT, "seeds": [3]})
    assert {item["held"] for item in alone["claims"][:-1]} == {None}
    page, _ = study_report.make_page(alone)
    assert CANNOT_TELL in page.lower() and "no interval from one seed" in page
    assert alone["means"]["policies"]["rm"]["main_win"]["low"] is None


def test_without_gold_scores_what_needs_them_is_left_out(summaries: Any) -> None:
    bare = json.loads(json.dumps(summaries))
    for summary in bare:
        for entry in summary["policies"].values():
            for on in ("main", "forget"):
                entry[on] |= {"gold": None, "sft_gold": None}
            for point in entry["curve"]:
                del point["gold"]
    found = study.results(bare, ABOUT)
    assert not [item for item in found["claims"] if "gold" in item["claim"]]
    page, pictures = study_report.make_page(found)
    assert "gold − SFT" not in re.sub(r"<p.*?</p>", "", page, flags=re.S)
    assert len(pictures) == 4


# -- the page ----------------------------------------------------------------------------------------------------------


def test_the_page_is_one_file_with_figures_and_pictures(results: Any) -> None:
    page, pictures = study_report.make_page(results)
    assert [p.name for p in pictures] == ["curves", "frontier", "outcomes", "scorers"]
    assert all(p.png.startswith(b"\x89PNG") for p in pictures)
    links = re.findall(r'(?:src|href)="([^"]{0,30})', page)
    assert len(links) == 4 and all(link.startswith("data:image/png;base64,") for link in links)
    assert "<script" not in page and "http" not in page
    mean = results["means"]["policies"]["am-sr"]["forget_lose"]
    for text in (f"{100 * mean['value']:.1f}", f"[{100 * mean['low']:.1f}, {100 * mean['high']:.1f}]",
                 "AM, critic-free", "stable-rlhf study my.yaml", "over-optimises",
                 "No run of validation seeds is known"):  # fmt: skip
        assert text in page, text


def test_markdown_has_whole_tables(results: Any) -> None:
    text = study_report.markdown(results)
    rows = [line for line in text.splitlines() if line.startswith("|")]
    assert len(rows) == 5 * 2 + 7 + 5 + 2 + 3 + 2  # the paper has three of the policies, and both scorers
    for table in re.findall(r"(?:^\|.*\n)+", text, re.M):
        assert len({line.count("|") for line in table.splitlines()}) == 1
    assert "- **reproduced**: " in text
    of_the_paper = next(row for row in reversed(rows) if row.startswith("| AM-PPO-SR"))
    own = results["means"]["policies"]["am-sr"]["main_win"]["value"]
    assert of_the_paper.startswith(f"| AM-PPO-SR | {100 * own:.1f} [") and "] | 15.78 | " in of_the_paper


def test_the_page_says_what_the_settings_were_chosen_on(results: Any) -> None:
    def lead(**changed: Any) -> str:
        return study_report.markdown({**results, **changed})

    assert "validation seeds, run to choose" in lead(kind="validation")
    known = {"seeds": [101], "variants": ["rm", "am-sr"], "same_settings": True}
    told = lead(validation=known)
    assert "Validation seeds 101 (RM-PPO, AM-PPO-SR) ran before, with the very settings reported here" in told
    assert "OTHER SETTINGS" in lead(validation={**known, "same_settings": False})


# -- several results as one --------------------------------------------------------------------------------------------


def in_two(summaries: Any) -> list[dict[str, Any]]:
    halves = (summaries[:2], summaries[2:])
    return [study.results(half, {**ABOUT, "seeds": [summary["seed"] for summary in half]}) for half in halves]


def test_pooled_results_are_those_of_all_seeds_together(summaries: Any, results: Any) -> None:
    parts = in_two(summaries)
    pool = study.pooled(parts)
    assert pool == {**results, "hours": 2.0}
    older = {**parts[1], "settings": {"ppo": {"kl_coef": 0.05, "new": True}}}  # a setting that came later
    assert study.pooled([parts[0], older])["means"] == results["means"]


@pytest.mark.parametrize("newer", [0, 1])
def test_a_figure_that_one_version_alone_knows_is_left_out_of_the_pool(summaries: Any, newer: int) -> None:
    parts = in_two(summaries)
    parts[newer]["policies"] = [{**row, "new": 1.0} for row in parts[newer]["policies"]]
    pool = study.pooled(parts)
    assert pool["means"] == study.pooled(in_two(summaries))["means"]


def test_results_that_do_not_belong_together_are_refused(summaries: Any) -> None:
    parts = in_two(summaries)
    with pytest.raises(ValueError, match=r"seeds \[3, 3, 4, 4\]: one is in two of the results"):
        study.pooled([parts[0], parts[0]])
    with pytest.raises(ValueError, match=r"settings\.ppo\.kl_coef: 0\.05 and 0\.1"):
        study.pooled([parts[0], {**parts[1], "settings": {"ppo": {"kl_coef": 0.1}}}])
    with pytest.raises(ValueError, match="kind: reported and validation"):
        study.pooled([parts[0], {**parts[1], "kind": "validation"}])


RESULTS = Path(__file__).parents[2] / "docs" / "results"


@pytest.mark.parametrize(
    ("page", "files", "title"),
    [
        ("skill_world", ("skill_world", "skill_world-further"), "Skill world: seven variants, ten seeds"),
        ("rehearsal", ("rehearsal",), "Skill world: what is rehearsed, ten seeds"),
        ("rehearsal_dose", ("rehearsal-dose",), "Skill world: the dose of rehearsal"),
        ("rehearsal_dose", ("rehearsal-dose-more",), "Skill world: the dose of rehearsal, two more"),
        ("rehearsal", ("rehearsal-default",), "Skill world: selected against chance at the default dose"),
        ("rehearsal", ("rehearsal-further",), "Skill world: rules of selection, and the Advantage Model"),
        ("rehearsal", ("rehearsal-groups",), "Skill world: rehearsal beside GRPO, reward model and Advantage Model"),
        ("rehearsal", ("rehearsal-amounts",), "Skill world: how many clusters, how many of each, and a threshold"),
        ("rehearsal_dose", ("rehearsal-factorial",), "Skill world: scorer, rehearsal, dose and reduction"),
        ("lookalikes", ("lookalikes",), "Skill world: lookalikes"),
        ("rehearsal_text", ("rehearsal-text",), "Real text: rehearsal beside PPO, reward model and Advantage Model"),
        (
            "rehearsal_text",
            ("rehearsal-text-dose",),
            "Real text: doses of rehearsal, and a KL penalty in its place",
        ),
        ("estimators", ("estimators",), "Skill world: six estimators with and without rehearsal, five seeds"),
    ],
)
def test_docs_show_what_the_results_hold(page: str, files: tuple[str, ...], title: str) -> None:
    found = [json.loads((RESULTS / f"{name}.json").read_text(encoding="utf-8")) for name in files]
    assert "/tmp" not in json.dumps(found)
    assert study_report.markdown(study.pooled(found) | {"title": title}) in (RESULTS / f"{page}.md").read_text(
        encoding="utf-8"
    )
