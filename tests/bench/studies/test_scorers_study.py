"""The study of scorers: what each seed trains and tests on, what is measured, what is kept, and what the docs say."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys

import numpy as np
import pytest
import torch

from bench.common import ROOT
from bench.pages import finished, marked, rendered
from bench.studies import scorers
from bench.studies.scorers import METHODS, SKILLS, STUDIES, Job
from stable_rlhf.data import Comparison, write_jsonl
from stable_rlhf.data.encoding import Encoded, encode
from stable_rlhf.data.jsonl import read_jsonl
from stable_rlhf.data.splits import prompt_key
from stable_rlhf.models.features import FeatureCache
from stable_rlhf.scorer.comparisons import EncodedComparison
from stable_rlhf.scorer.denoise import parse_bands
from stable_rlhf.world import SKILLS as SKILL_OF
from stable_rlhf.world import gold_score, near_miss

TASKS = [*SKILLS, "upper"]


@pytest.fixture
def quickstart(tmp_path):
    """A quickstart's pairs, and samples of its SFT model."""
    rows = [
        {"prompt": f"{TASKS[i % 6]} {i // 2}", "chosen": "a", "rejected": "b", "task": TASKS[i % 6],
         "gold_chosen": float(i % 3 == 0), "gold_rejected": 0.5, "flipped": False}
        for i in range(600)
    ]  # fmt: skip
    write_jsonl(tmp_path / "quickstart" / "pairs" / "pairs.jsonl.gz", rows)
    samples = [{"prompt": row["prompt"], "task": row["task"], "responses": ["a", "b", "a", "c"]} for row in rows]
    samples[0]["responses"] = ["a"] * 4
    write_jsonl(tmp_path / "work" / "samples" / "responses" / "responses.jsonl.gz", samples)
    return tmp_path / "quickstart"


@pytest.mark.slow
def test_settings_of_every_method_are_settings_of_a_recipe():
    for method, settings in METHODS.items():
        recipe = scorers.recipe_of(method)
        parse_bands(method, recipe.scorer.denoise)
        for name, value in (scorers.BASE | settings).items():
            if name.startswith("scorer."):
                assert getattr(recipe.scorer, name.removeprefix("scorer.")) == value
    assert {name for own in STUDIES.values() for name in own.methods} == set(METHODS)


def test_shift_tests_on_skills_that_it_has_no_labels_of(quickstart, tmp_path):
    times = dict.fromkeys(SKILLS, 0)
    for seed in range(5):
        scorers.prepare("shift", seed, quickstart, tmp_path / "work")
        here = scorers.place("shift", seed, tmp_path / "work")
        other = set(scorers.held_out(seed))
        for task in other:
            times[task] += 1
        labelled = read_jsonl(here / "pairs.jsonl.gz")
        assert {row["task"] for row in labelled} == set(TASKS) - other and not any(row["planted"] for row in labelled)
        samples = read_jsonl(here / scorers.UNLABELLED)
        assert {row["task"] for row in samples} == other
        assert all(len(row["responses"]) == len(set(row["responses"])) > 1 for row in samples)
        shown, tests = scorers.other_skills(here, seed)
        assert {row.task for row in tests} == other
        seen = {prompt_key(row["prompt"]) for row in samples}
        assert seen and not seen & {prompt_key(row.prompt) for row in tests} and len(shown) == len(tests) == 100
    assert set(times.values()) == {2}


def test_measures():
    """A scorer that is right about three of four pairs with confidence σ(log 3) = 3/4 is calibrated."""
    gap = np.log(3.0)
    found = scorers.measure(np.array([gap, gap, gap, -gap] * 250))
    assert found["accuracy"] == 0.75 and found["ece"] == pytest.approx(0) and found["pairs"] == 1000
    bold = scorers.measure(np.array([gap, gap, gap, -gap] * 250) * 4)
    assert bold["ece"] > 0.2 and bold["ece_after_temperature"] < 0.03
    assert scorers.measure(np.zeros(4))["accuracy"] == 0.5


def encoded(responses: tuple[str, str], gold: tuple[float, float], planted: bool = False) -> EncodedComparison:
    meta = {"gold_chosen": gold[0], "gold_rejected": gold[1], "planted": planted}
    examples = [Encoded((1,) * len(text), 1) for text in responses]
    return EncodedComparison(Comparison("p", responses, ((0, 1),), meta=meta), examples)


def test_gaps_follow_gold_and_not_the_label():
    class Longer:
        def score_encoded(self, examples, cache):
            return torch.tensor([float(len(e)) for e in examples])

    rows = [encoded(("aaa", "b"), (1, 0)), encoded(("b", "aaa"), (0, 1)), encoded(("b", "aaa"), (1, 0))]
    assert scorers.gold_gaps(Longer(), rows, FeatureCache()).tolist() == [2, 2, -2]


def test_right_labels_are_those_before_planting():
    kept, turned = encoded(("a", "b"), (1, 0)), encoded(("b", "a"), (0, 1), planted=True)
    assert scorers.right(kept) is kept
    assert scorers.right(turned).row.pairs == ((1, 0),) and scorers.right(turned).examples == turned.examples


def line(method: str, objective: str, seed: int, value: float) -> dict:
    measured = {"pairs": 10, "accuracy": value, "ece": value / 10, "ece_after_temperature": 0.0}
    return {
        "study": "noise", "method": method, "objective": objective, "seed": seed,
        "measured": {"held out": measured, "wrong labels": measured},
        "environment": {"versions": {"torch": "2"}, "commit": "0123456789", "time": "2030-01-01T00:00:00"},
    }  # fmt: skip


def test_finished_scorers_are_not_redone_and_a_line_cut_short_is(tmp_path):
    path = tmp_path / "results.jsonl"
    jobs = [Job("plain", "rm", 0), Job("flip", "rm", 0), Job("flip", "am", 0)]
    assert scorers.unfinished("noise", jobs, finished(path)) == jobs
    scorers.write_down([line("plain", "rm", 0, 0.7), line("flip", "rm", 0, 0.8)], path, {"environment": {}})
    assert scorers.unfinished("noise", jobs, finished(path)) == jobs[2:]
    path.write_text(path.read_text(encoding="utf-8")[:-9], encoding="utf-8")
    assert scorers.unfinished("noise", jobs, finished(path)) == jobs[1:]
    scorers.write_down([line("flip", "rm", 0, 0.8)], path, {})
    assert scorers.unfinished("noise", jobs, finished(path)) == jobs[2:]


def test_lines_with_other_settings_are_not_taken_for_finished(tmp_path, monkeypatch):
    path = tmp_path / "results.jsonl"
    scorers.write_down([line("flip", "rm", 0, 0.8)], path, {})
    monkeypatch.setitem(METHODS, "flip", {"scorer.denoise": [{"lowest": 0.3, "flip": True}]})
    with pytest.raises(SystemExit, match=r"flip.*other settings.*lowest.*0\.1"):
        scorers.unfinished("noise", [Job("plain", "rm", 0)], finished(path))


def test_differences_are_paired_by_seed():
    lines = [line("plain", "rm", s, 0.5 + s / 10) for s in range(3)]
    lines += [line("flip", "rm", s, 0.52 + s / 10) for s in (2, 0, 1)]
    lines += [line("drop", "rm", s, 0.5 + (0.1 if s % 2 else -0.1)) for s in range(3)]
    text = scorers.table("noise", lines)
    assert "| plain | 60.0 |  |" in text
    assert "| flip | 62.0 | **+2.0 [2.0, 2.0]** |" in text  # the seeds differ, the differences do not
    assert "| drop | 46.7 | −13.3 [" in text
    assert scorers.draw("noise", lines).startswith(b"\x89PNG")


def test_docs_show_what_the_results_hold():
    page = scorers.PAGE.read_text(encoding="utf-8")
    assert [match["name"] for match in marked("scorers").finditer(page)] == list(STUDIES)
    assert rendered(page, "scorers", scorers.block) == page, "run: python -m bench.studies.scorers report"
    for study, own in STUDIES.items():
        lines = [json.loads(text) for text in scorers.path_of(study).read_text(encoding="utf-8").splitlines()]
        found = [Job(x["method"], x["objective"], x["seed"]) for x in lines]
        assert len(set(found)) == len(found)
        assert not scorers.unfinished(
            study, [Job(m, o, s) for m in own.methods for o in ("rm", "am") for s in range(5)], lines
        )


@pytest.mark.slow
def test_a_study_in_two_processes(tmp_path, tokenizer, tiny_model):
    rng = random.Random(0)
    rows = []
    for i in range(160):
        prompt, answer = SKILL_OF[SKILLS[i % 5]].sample(rng)
        row = {"prompt": prompt, "chosen": answer, "rejected": near_miss(answer, rng), "task": SKILLS[i % 5]}
        tokens = {side: len(encode(tokenizer, prompt, row[side]).response) for side in ("chosen", "rejected")}
        row |= {f"gold_{side}": gold_score(prompt, row[side]) for side in tokens} | {"flipped": False}
        row["logprobs"] = {side: [-1.0] * n for side, n in tokens.items()}
        row["alt_logprobs"] = {side: [[-1.0] * n] * 2 for side, n in tokens.items()}
        rows.append(row)
    write_jsonl(tmp_path / "quickstart" / "pairs" / "pairs.jsonl.gz", rows)
    tiny_model(layers=2).save_pretrained(tmp_path / "quickstart" / "sft")
    tokenizer.save_pretrained(tmp_path / "quickstart" / "sft")
    path = tmp_path / "results.jsonl"
    methods = ["plain", "true labels", "denoising, simcse, metarm"]

    def study(*methods: str) -> list[dict]:
        words = ["noise", "--run", "quickstart", "--output-dir", "work", "--output", str(path), "--seeds", "0", "1"]
        done = subprocess.run(
            [sys.executable, "-m", "bench.studies.scorers", *words, "--workers", "2", "--methods", *methods],
            cwd=tmp_path, env=os.environ | {"PYTHONPATH": str(ROOT)}, capture_output=True, encoding="utf-8",
            timeout=600,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr[-2000:]
        return finished(path)

    first = study(*methods[:2])
    lines = study(*methods)
    assert lines[: len(first)] == first and len(first) == 8 and len(lines) == 12
    assert {Job(x["method"], x["objective"], x["seed"]) for x in lines} == {
        Job(m, o, s) for m in methods for o in ("rm", "am") for s in (0, 1)
    }
    assert all(0 <= x["measured"][on]["accuracy"] <= 1 for x in lines for on in ("held out", "wrong labels"))
    assert len({x["measured"]["held out"]["ece"] for x in lines}) == 12  # no two methods did the same
