"""The study on human preferences: which pairs are used, what is measured and kept, and what the docs say."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import numpy as np
import pytest

from bench.case import read_lines
from bench.common import ROOT
from bench.pages import marked, rendered
from bench.studies import real
from bench.studies.real import BASE, DATASETS, EPOCHS, Job, Plan
from stable_rlhf.data import write_jsonl
from stable_rlhf.metrics import per_task, scorer_evaluation, task_mean_spread


def test_settings_of_a_plan_are_settings_of_its_recipe(tmp_path):
    plan = Plan(tmp_path, tmp_path, ("scorer.num_trainable_layers=null", "scorer.learning_rate=3e-5"))
    assert plan.settings["scorer.num_trainable_layers"] is None and plan.settings["scorer.learning_rate"] == 3e-5
    kept = {name: value for name, value in plan.settings.items() if BASE[name] == value}
    assert len(kept) == len(BASE) - 2
    assert plan.recipe.checkpoint.save_steps == 0 and max(EPOCHS) <= BASE["scorer.num_train_epochs"]


@pytest.fixture
def data(tmp_path, tiny_model, tokenizer):
    """Preference files of both kinds, every fourth response too long, and the settings of a tiny study on them."""
    for seed, (name, dataset) in enumerate(DATASETS.items()):
        rows = []
        for i in range(40):
            prompt, answers = f"Say {chr(97 + i % 26)} {seed}{i}", ("ab" * (30 if i % 4 == 0 else 1 + i % 3), "c")
            if name == "pairs":
                rows.append({"prompt": prompt, "chosen": answers[0], "rejected": answers[1], "task": "pq"[i % 2]})
            else:
                turns = [f"\n\nHuman: {prompt}\n\nAssistant: {answer}" for answer in answers]
                rows.append(dict(zip(("chosen", "rejected"), turns, strict=True)))
        write_jsonl(tmp_path / "data" / dataset.file, rows)
    tiny_model(layers=2).save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    return (
        f"model_name_or_path={tmp_path / 'model'}", "data.max_length=40", "data.max_pairs=24",
        "scorer.num_trainable_layers=1", "scorer.num_train_epochs=3", "scorer.per_device_train_batch_size=4",
    )  # fmt: skip


def test_pairs_that_fit_are_used_and_the_same_ones_for_every_seed(data, tmp_path):
    for name in DATASETS:
        plan = Plan(tmp_path / "data", tmp_path / "work", data)
        found = real.read(name, plan)
        assert found.counts == {"read": 40, "fit": 30} and len(found.rows) == 24
        assert max(len(e) for item in found.rows for e in item.examples) <= 40
        everything = real.read(name, Plan(tmp_path / "data", tmp_path / "work", (*data, "data.max_pairs=0")))
        assert len(everything.rows) == 30
        assert [item.row for item in found.of([found.rows[3].row, found.rows[1].row])] == [
            found.rows[3].row, found.rows[1].row
        ]  # fmt: skip


def test_measures_are_those_of_the_evaluation():
    rng = np.random.default_rng(0)
    chosen, rejected = rng.normal(0.3, 1, 40).tolist(), rng.normal(0, 1, 40).tolist()
    tasks = ["a"] * 18 + ["b"] * 18 + ["rare"] * 4
    found = real.measure({"chosen": chosen, "rejected": rejected, "tasks": tasks}, 10)
    wanted = scorer_evaluation(chosen, rejected, tasks)
    for name in ("accuracy", "ece", "ece_after_temperature"):
        assert found[name] == pytest.approx(wanted[name]["value"])
    for name in ("brier", "temperature", "ece_if_calibrated"):
        assert found[name] == pytest.approx(wanted[name])
    gaps = np.array(chosen) - np.array(rejected)
    assert found["loss"] == pytest.approx(float(np.log1p(np.exp(-gaps)).mean()))
    often = per_task(chosen[:36] + rejected[:36], tasks[:36] * 2)  # a task of four pairs says nothing
    assert found["tasks"] == 2 and found["spread"] == pytest.approx(task_mean_spread(often))
    assert found["relative"] == pytest.approx(found["spread"] / np.mean([row["std"] for row in often.values()]))
    alone = real.measure({"chosen": chosen, "rejected": rejected, "tasks": ["all"] * 40}, 10)
    assert alone["spread"] is None and alone["relative"] is None


def line(objective: str, seed: int, value: float, dataset: str = "pairs") -> dict:
    measured = dict.fromkeys(real.FIGURES, value)
    if dataset == "hh-rlhf":
        measured |= {"spread": None, "relative": None}
    return {
        "seed": seed, "dataset": dataset, "objective": objective, "settings": dict(BASE),
        "epochs": {str(e): measured for e in EPOCHS},
        "pairs": {"read": 100, "fit": 50, "train": 20, "test": 20},
        "environment": {"versions": {"torch": "2"}, "device": "cpu", "time": "2030-01-01T00:00:00"},
    }  # fmt: skip


def test_finished_scorers_are_not_redone_and_other_settings_are_refused():
    jobs = [Job(1, "pairs", "rm"), Job(1, "pairs", "am")]
    assert real.unfinished(jobs, [line("rm", 1, 0.5)], BASE) == jobs[1:]
    with pytest.raises(SystemExit, match=r"seed=1.*data\.max_length 96; delete its lines"):
        real.unfinished(jobs, [line("rm", 1, 0.5)], BASE | {"data.max_length": 99})


def test_scorers_are_compared_seed_by_seed():
    lines = [line("rm", s, 0.2 * s) for s in (3, 1, 2)] + [line("am", s, 0.2 * s - 0.05) for s in (1, 2, 3)]
    lines += [line("rm", 4, 9.0), line("rm", 1, 0.1, "hh-rlhf"), line("am", 1, 0.2, "hh-rlhf")]
    assert real.values(lines, "pairs", "rm", 8, "ece") == pytest.approx([0.2, 0.4, 0.6])  # seed 4 has no other half
    assert real.compared(lines, "pairs", 3, "ece", "difference") == "**−5.0 [−5.0, −5.0]**"
    assert real.compared(lines, "pairs", 3, "spread", "ratio").startswith("0.87 [")
    assert real.compared(lines, "hh-rlhf", 3, "ece", "difference") == "+10.0"  # one seed: no interval
    assert real.compared(lines, "hh-rlhf", 3, "spread", "ratio") == "–"
    text = real.tables(lines)
    assert "| Pairs: Reward model, 8 | 40.0 [" in text and text.count("\n| HH-RLHF") == 9
    assert real.draw(lines).startswith(b"\x89PNG")


def test_docs_show_what_the_results_hold():
    page, lines = real.PAGE.read_text(encoding="utf-8"), read_lines(real.OUTPUT)
    assert marked("real").search(page) and real.PICTURE.name in page
    assert rendered(page, "real", lambda _: real.block(lines)) == page, "run: python -m bench.studies.real report"
    jobs = [Job(line["seed"], line["dataset"], line["objective"]) for line in lines]
    assert len(set(jobs)) == len(jobs)
    seeds = {job.seed for job in jobs}
    assert len(seeds) >= 3
    assert not real.unfinished([Job(s, d, o) for s in seeds for d in DATASETS for o in ("rm", "am")], lines, BASE)


@pytest.mark.slow
def test_a_study_in_two_processes(data, tmp_path):
    path = tmp_path / "results.jsonl"

    def study(*seeds: str, changes: tuple[str, ...] = data) -> tuple[int, str]:
        words = ["--data-dir", "data", "--output-dir", "work", "--output", str(path), "--workers", "2"]
        words += [word for change in changes for word in ("--setting", change)]
        done = subprocess.run(
            [sys.executable, "-m", "bench.studies.real", "run", *words, "--seeds", *seeds], cwd=tmp_path,
            env=os.environ | {"PYTHONPATH": str(ROOT)}, capture_output=True, encoding="utf-8", timeout=600,
        )  # fmt: skip
        return done.returncode, done.stderr

    code, said = study("1")
    assert code == 0, said[-2000:]
    first = read_lines(path)
    times = {name: (tmp_path / "work" / "hidden-states" / name).stat().st_mtime for name in DATASETS}
    path.write_text(path.read_text(encoding="utf-8") + '{"seed": 1, "data', encoding="utf-8")  # a kill
    assert study("1", "2")[0] == 0
    lines = read_lines(path)
    assert lines[:4] == first and len(lines) == 8
    assert times == {name: (tmp_path / "work" / "hidden-states" / name).stat().st_mtime for name in DATASETS}
    for found in lines:
        assert list(found["epochs"]) == ["1", "3"]
        assert found["pairs"] == {"read": 40, "fit": 30, "train": 8, "test": 14}
        scores = tmp_path / "work" / "scores" / f"{found['dataset']}-{found['objective']}-seed-{found['seed']}.json"
        assert real.measure(json.loads(scores.read_text(encoding="utf-8"))["3"], 10) == found["epochs"]["3"]
    assert len({of["loss"] for found in lines for of in found["epochs"].values()}) == 16
    path.unlink()
    whole = ("scorer.num_trainable_layers=null", "data.max_pairs=0", "engine.bf16=true")
    code, said = study("1", changes=(*data, *whole))
    assert code == 0, said[-2000:]
    assert [found["pairs"]["train"] for found in read_lines(path)] == [12] * 4
    code, said = study("1", changes=(*data, *whole, "scorer.margin=1.0", "data.max_length=39"))
    assert code == 1 and "measured with other settings, data.max_length 40, scorer.margin unset" in said
