"""bench/gpu.sh without a GPU: both runs walked, what they leave, and a step that goes wrong takes no other along."""

from __future__ import annotations

import itertools
import json
import os
import re
import shutil
import subprocess
import sys
import time

import pytest

from bench.case import RESULTS, read_lines
from bench.common import ROOT
from bench.gpu import __main__ as driver
from bench.gpu import run1, run2, study, tables
from bench.gpu.plan import DRY, FAIL, Plan
from bench.presets import GPU_SHAPES
from bench.studies.real import DATASETS


def plan(tmp_path, seconds=60.0, run="run1"):
    return Plan(run, True, tmp_path, None, time.time() + seconds)


def test_the_watcher_knows_every_step():
    """It loads no torch, so it cannot ask the modules."""
    for run, module in (("run1", run1), ("run2", run2)):
        assert driver.STEPS[run] == tuple(step.name for step in module.STEPS)
        assert set(driver.STEPS[run]) <= {"facts", *tables.TABLES}


def test_a_worker_that_does_not_end_is_ended(tmp_path, monkeypatch):
    monkeypatch.setattr(driver, "GRACE", 0.1)
    here = plan(tmp_path)
    driver.write(here, {"event": "begin", "step": "rows", "at": time.time(), "limit": 0.2})
    with subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"]) as worker:
        assert driver.watch(worker, here, 0) == "no end after 0 s" and worker.returncode < 0
    late = plan(tmp_path, seconds=0.1)
    with subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"]) as worker:
        assert driver.watch(worker, late, 0) == "the run's time was over"


def test_results_of_a_dry_run_are_kept_out_of_the_results():
    done = subprocess.run(
        [sys.executable, "-m", "bench.gpu", "run1", "--dry-run", "--output-dir", "bench/results/gpu"],
        cwd=ROOT, capture_output=True, encoding="utf-8",
    )  # fmt: skip
    assert done.returncode == 2 and "do not belong in bench/results" in done.stderr
    assert not (ROOT / "bench" / "results" / "gpu" / "run1.jsonl").exists()


def loss(shape, workspace, share, active=1.0):
    return {"rows": 8192, "width": 64, "vocabulary": shape, "active": active, "workspace": workspace, "share": share}


def test_chunks_that_are_as_fast_as_one_are_chosen():
    shares = {"256 MiB": 0.5, "2048 rows": 0.80, "4096 rows": 0.955, "one chunk": 0.96, "default": 0.9}
    found = [loss(v, name, share) for v in (1000, 2000) for name, share in shares.items()]
    assert run1.best_chunk_rows(found) == 4096
    slow = [row | {"share": 0.7} if row["workspace"] == "4096 rows" else row for row in found]
    assert run1.best_chunk_rows(slow) is None, "one chunk is better by far"
    # A case that lacks a candidate, as half of the rows may, has no say.
    assert run1.best_chunk_rows([*found, loss(3000, "one chunk", 0.9, 0.45)]) == 4096
    assert run1.best_chunk_rows(found[:2]) is None


def test_a_prediction_stands_beside_the_measurement(monkeypatch, tmp_path):
    monkeypatch.setattr(run1, "COUNTED", RESULTS / "count-before.json")
    op = "linear_policy_loss"
    whole, part = (run1.by_count(GPU_SHAPES[0], op, ending) for ending in (", all active", " % active"))
    assert whole > part > 10.0, "milliseconds, fewer for fewer rows"
    assert run1.by_count({"rows": 1, "width": 1, "vocabulary": 1}, op, ", all active") is None
    monkeypatch.setattr(run1, "COUNTED", tmp_path / "none.json")
    assert run1.by_count(GPU_SHAPES[0], op, ", all active") is None


def test_the_width_up_to_which_the_product_pays():
    def found(*faster):
        for (width, vocabulary), ratio in zip([(512, 1), (512, 2), (1024, 1), (4096, 1)], faster, strict=True):
            base = {"width": width, "vocabulary": vocabulary}
            yield from (base | {"way": "in the product", "ms": ratio}, base | {"way": "rows of logits", "ms": 1.0})

    assert run1.best_width(list(found(0.9, 0.9, 0.8, 0.7))) is None
    assert run1.best_width(list(found(0.9, 0.9, 0.8, 1.1))) == 1024
    assert run1.best_width(list(found(0.9, 1.1, 0.8, 0.7))) == 0, "a wider one that pays says nothing of narrower ones"
    assert run1.best_width([row | {"ms": None} for row in found(0.9, 0.9, 0.8, 1.1)]) is None


def test_the_fastest_launch_in_place_is_chosen():
    base = {"vocabulary": 1000, "dtype": "bfloat16", "warps": 8, "residency": 2, "call": "in place"}
    found = [base | {"block": 4096, "ms": 2.0}, base | {"block": 8192, "ms": 1.0}, base | {"block": 512, "ms": None},
             base | {"block": 2048, "ms": 0.5, "call": "from logits"}]  # fmt: skip
    (chosen,) = run1.best_launches(found)
    assert chosen == {"dtype": "bfloat16", "vocabulary": 1000, "block": 8192, "warps": 8, "residency": 2}


def test_a_proposal_is_a_table_that_the_package_reads(tmp_path):
    from stable_rlhf.kernels import tuning

    here = plan(tmp_path)
    about = {"time": "2030", "commit": "c", "versions": {}, "cpu": "X"}
    driver.write(here, {"event": "row", "step": "facts", "environment": about})
    row = {"event": "row", "step": "rows", "call": "in place", "vocabulary": 128_256, "dtype": "bfloat16"}
    driver.write(here, row | {"block": 8192, "warps": 16, "residency": 1, "ms": 1.0})
    list(run1.propose(here))
    ((device, entry),) = tuning._read(str(tmp_path / "tuned.json")).items()
    assert device == "dry run, not a GPU" and entry["row_launches"][0]["block"] == 8192


def walk(tmp_path, *words, **variables):
    done = subprocess.run(
        ["bash", str(ROOT / "bench" / "gpu.sh"), *words, "--dry-run", "--output-dir", str(tmp_path)],
        capture_output=True, encoding="utf-8", timeout=1800, env={**os.environ, "PYTHON": sys.executable, **variables},
    )  # fmt: skip
    return done, done.stdout[-6000:] + done.stderr[-3000:]


def ends(tmp_path, run):
    records = [json.loads(line) for line in (tmp_path / f"{run}.jsonl").read_text(encoding="utf-8").splitlines()]
    assert records[0]["dry_run"] and records[0]["note"] == DRY
    return records, {r["step"]: r for r in records if r["event"] == "end"}


@pytest.mark.slow
@pytest.mark.parametrize("how", ["raise", "die"])
def test_a_step_that_fails_is_reported_and_the_next_one_runs(how, tmp_path):
    done, told = walk(tmp_path, "run1", "--steps", "facts addmm profile", **{FAIL: f"addmm={how}"})
    assert done.returncode == 1, told
    _records, found = ends(tmp_path, "run1")
    assert {step for step, end in found.items() if end["status"] == "failed"} == {"addmm"}, told
    assert ("as the test asked" if how == "raise" else "ended with status 1") in found["addmm"]["failure"]
    assert found["profile"]["status"] == "ok" and re.search(r"^addmm +failed", done.stdout, re.MULTILINE), told


@pytest.mark.slow
def test_both_runs_walk_through(tmp_path):
    for words in (["run1", "--sources"], ["run2", "--sources", "--tuned", str(tmp_path / "tuned.json")]):
        done, told = walk(tmp_path, *words)
        assert done.returncode == 0, told
        records, found = ends(tmp_path, words[0])
        assert tuple(found) == driver.STEPS[words[0]] and {end["status"] for end in found.values()} == {"ok"}, told
        for step in found:
            assert any(r["event"] == "row" and r["step"] == step for r in records), f"{step} found nothing"
        assert done.stdout.count(DRY) == 2, "a dry run says so, before its tables and behind them"
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert len(files) <= 8 and all(path.parent == tmp_path for path in files), files
    assert set(json.loads((tmp_path / "tuned.json").read_text(encoding="utf-8"))) == {"dry run, not a GPU"}
    rows = [r for r in ends(tmp_path, "run1")[0] if r["event"] == "row"]
    keys = {
        "ceilings": {"product", "ms"}, "ours": {"rows", "width", "vocabulary", "active", "workspace", "ms", "share"},
        "rows": {"vocabulary", "call", "block", "warps", "residency", "ms"}, "propose": {"chunk_rows", "row_launches"},
        "correctness": {"case", "error", "allowed", "right"}, "profile": {"kernel", "ms", "calls"},
    }  # fmt: skip
    for step, wanted in keys.items():
        assert all(wanted <= set(r) for r in rows if r["step"] == step), step
    peers = [r for r in ends(tmp_path, "run2")[0] if r["event"] == "row" and r["step"] == "peers"]
    assert all(r["device"] == "cpu" and r["status"] == "ok" for r in peers)


@pytest.mark.slow
def test_the_study_walks_through(tmp_path):
    done = subprocess.run(
        ["bash", str(ROOT / "bench" / "gpu_study.sh"), "--dry-run", "--sources", "--output-dir", str(tmp_path)],
        capture_output=True, encoding="utf-8", timeout=900, env={**os.environ, "PYTHON": sys.executable},
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    lines = read_lines(tmp_path / "study.jsonl")
    assert {study.key(line) for line in lines} == set(itertools.product(DATASETS, (1, 2), ("rm", "am")))
    for line in lines:
        assert line["dry_run"] and line["environment"]["device"] == "cpu" and set(line["epochs"]) == {"1", "3"}
        assert {"accuracy", "ece", "ece_if_calibrated", "temperature", "loss"} <= set(line["epochs"]["3"])
        assert line["settings"]["scorer.num_trainable_layers"] is None, "a whole model trains"
    text = (tmp_path / "study.md").read_text(encoding="utf-8")
    assert text.startswith(DRY) and text.count("Advantage Model, 3") == 2
    assert {path.name for path in tmp_path.iterdir()} == {"study.jsonl", "study.md", "study.log"}


def test_what_was_not_finished_in_time_is_left_out(monkeypatch):
    def run(jobs, workers, plan):
        yield {"seed": 1}
        time.sleep(30)

    monkeypatch.setattr(study.real, "run", run)
    assert list(study.until(time.time() + 1.0, [], 1, None)) == [{"seed": 1}]


def test_half_a_model_is_told(tmp_path):
    """Each half travels by itself."""
    shutil.copytree(ROOT / "bench" / "gpu", tmp_path / "bench" / "gpu", ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "bench" / "gpu_study.sh", tmp_path / "bench")
    (tmp_path / "bench" / "carry" / "model-2").mkdir(parents=True)
    (tmp_path / "bench" / "carry" / "model-2" / "part").write_text("x", encoding="utf-8")
    done = subprocess.run(["bash", "bench/gpu_study.sh"], cwd=tmp_path, capture_output=True, encoding="utf-8")
    assert done.returncode == 1 and "only one half of the model is here" in done.stderr
    assert not (tmp_path / "bench" / "carry" / "smollm2.gguf").exists()
