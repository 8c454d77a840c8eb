"""Where metrics are written, and that only rank 0 writes."""

from __future__ import annotations

import json
import math
import sys

import pytest
import torch

from helpers.files import metric_lines
from stable_rlhf.data.jsonl import read_jsonl
from stable_rlhf.engine.tracking import Tracker


def fill(folder, *, report_to=("tensorboard",)) -> Tracker:
    tracker = Tracker(folder, report_to)
    tracker.log(1, {"loss": 0.5, "score": torch.tensor(2.0)})
    tracker.log(2, {"loss": 0.25, "score": 3})
    return tracker


ROWS = [{"step": 1, "loss": 0.5, "score": 2.0}, {"step": 2, "loss": 0.25, "score": 3.0}]


def test_every_step_is_one_json_line_at_once(tmp_path):
    folder = tmp_path / "new" / "run"
    tracker = fill(folder, report_to=())
    assert metric_lines(folder) == ROWS == tracker.history  # before it is closed: a killed run keeps its curve
    tracker.close()
    assert not (folder / "tensorboard").exists()


def test_every_metric_is_a_curve_in_tensorboard(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    fill(tmp_path).close()
    (events,) = (tmp_path / "tensorboard").glob("events.out.tfevents.*")
    board = EventAccumulator(str(events))
    board.Reload()
    assert sorted(board.Tags()["scalars"]) == ["loss", "score"]
    assert [(e.step, e.value) for e in board.Scalars("loss")] == [(1, 0.5), (2, 0.25)]
    assert [(e.step, e.value) for e in board.Scalars("score")] == [(1, 2.0), (2, 3.0)]
    assert metric_lines(tmp_path) == ROWS


def test_another_rank_writes_nothing_and_keeps_the_history(tmp_path, monkeypatch):
    monkeypatch.setenv("RANK", "1")
    tracker = fill(tmp_path / "run")
    tracker.close()
    assert list(tmp_path.iterdir()) == []
    assert tracker.history == ROWS


def test_a_second_attempt_starts_the_curve_again(tmp_path):
    fill(tmp_path, report_to=()).close()
    tracker = Tracker(tmp_path, ())
    tracker.log(1, {"loss": 7})
    tracker.close()
    assert metric_lines(tmp_path) == [{"step": 1, "loss": 7.0}]


def test_a_resumed_stage_keeps_what_was_logged_before_it(tmp_path):
    tracker = fill(tmp_path, report_to=())
    for step in (0, 1, 2):
        tracker.sample(step, [{"prompt": "a", "response": f"answer {step}\u2028\u2029\x85\v\f\x1c"}])
    tracker.close()
    again = Tracker(tmp_path, (), after=1)
    # Samples of a step are taken before its update: those of step 1 come again.
    assert again.history == ROWS[:1]
    assert again.samples == [{"step": 0, "prompt": "a", "response": "answer 0\u2028\u2029\x85\v\f\x1c"}]
    again.sample(1, [{"prompt": "a", "response": "ä"}])
    again.close()
    kept = read_jsonl(tmp_path / "samples.jsonl")
    assert [row["step"] for row in kept] == [0, 1] and kept[1]["response"] == "ä"
    Tracker(tmp_path, ()).close()
    assert not (tmp_path / "samples.jsonl").exists() and metric_lines(tmp_path) == []


def test_numbers_that_are_not_finite_are_null_in_the_file_and_nan_again(tmp_path):
    tracker = Tracker(tmp_path, ())
    for step in (1, 2):
        tracker.log(step, {"loss": float("nan"), "kl": float("inf"), "score": 1.0})
    tracker.close()
    assert metric_lines(tmp_path) == [{"step": step, "loss": None, "kl": None, "score": 1.0} for step in (1, 2)]
    (row,) = Tracker(tmp_path, (), after=1).history
    assert math.isnan(row["loss"]) and math.isnan(row["kl"]) and row["score"] == 1.0


STAND_IN = """
import json, pathlib
calls = pathlib.Path(__file__).with_name("calls-NAME.jsonl")
def _note(*call):
    with calls.open("a") as file:
        file.write(json.dumps(call) + "\\n")
class Run:
    @property
    def step(self):
        lines = calls.read_text().splitlines() if calls.exists() else []
        return 1 + max([call[1] for call in map(json.loads, lines) if call[0] == "log"], default=-1)
    _next_step = step
    def log(self, metrics, step):
        _note("log", step, metrics)
    def finish(self):
        _note("finish")
def init(**about):
    _note("init", about)
    return Run()
"""


@pytest.fixture
def services(tmp_path, monkeypatch):
    """wandb and trackio as small modules that note how they are called; returns what was noted."""
    folder = tmp_path / "modules"
    folder.mkdir()
    for name in ("wandb", "trackio"):
        (folder / f"{name}.py").write_text(STAND_IN.replace("NAME", name), encoding="utf-8")
        monkeypatch.delitem(sys.modules, name, raising=False)
        monkeypatch.delenv(f"{name.upper()}_PROJECT", raising=False)
    monkeypatch.syspath_prepend(str(folder))
    yield lambda name: [
        json.loads(line) for line in (folder / f"calls-{name}.jsonl").read_text(encoding="utf-8").splitlines()
    ]
    for name in ("wandb", "trackio"):
        sys.modules.pop(name, None)


@pytest.mark.parametrize("name", ["wandb", "trackio"])
def test_services_get_settings_metrics_and_the_same_run_after_a_resume(services, name, tmp_path, monkeypatch):
    folder = tmp_path / "runs" / "mine" / "ppo-am.tmp"
    tracker = Tracker(folder, (name,), settings={"ppo": {"kl_coef": 0.1}})
    tracker.log(1, {"loss": 0.5, "score": torch.tensor(2.0)})
    tracker.close()
    (_, about), *rest = services(name)
    assert rest == [["log", 1, {"loss": 0.5, "score": 2.0}], ["finish"]]
    assert about["project"] == "stable_rlhf" and about["config"] == {"ppo": {"kl_coef": 0.1}}
    assert about["name"].startswith("mine-ppo-am-") and about["resume"] == "allow"
    monkeypatch.setenv(f"{name.upper()}_PROJECT", "other")
    Tracker(folder, (name,), after=1).close()
    Tracker(folder, (name,)).close()
    resumed, anew = (call[1] for call in services(name)[3:] if call[0] == "init")
    assert resumed["name"] == about["name"] != anew["name"] and resumed["project"] == "other"
    if name == "wandb":
        assert resumed["id"] == about["id"] != anew["id"] and about["dir"] == str(folder)


def test_both_services_keep_one_run_and_get_no_step_twice(services, tmp_path):
    """A kill after step 2 was logged, and before its snapshot: the resumed attempt does that step again."""
    folder = tmp_path / "runs" / "mine" / "ppo-am.tmp"
    tracker = Tracker(folder, ("wandb", "trackio"))
    for step in (1, 2):
        tracker.log(step, {"loss": float(step)})
    again = Tracker(folder, ("wandb", "trackio"), after=1)
    for step in (2, 3):
        again.log(step, {"loss": float(step)})
    again.close()
    assert [row["step"] for row in again.history] == [1, 2, 3]
    for name in ("wandb", "trackio"):
        calls = services(name)
        first, resumed = (call[1] for call in calls if call[0] == "init")
        assert first == resumed and [call[1] for call in calls if call[0] == "log"] == [1, 2, 3]
    assert services("wandb")[0][1]["id"] in services("trackio")[0][1]["name"]


def test_a_trackio_that_does_not_tell_its_steps_gets_none_of_the_snapshots_again(services, tmp_path):
    module = tmp_path / "modules" / "trackio.py"
    module.write_text(module.read_text(encoding="utf-8").replace("    _next_step = step\n", ""), encoding="utf-8")
    fill(tmp_path / "run", report_to=("trackio",)).close()
    again = Tracker(tmp_path / "run", ("trackio",), after=2)
    again.log(3, {"loss": 1.0})
    again.close()
    assert [call[1] for call in services("trackio") if call[0] == "log"] == [1, 2, 3]


def test_a_damaged_identity_does_not_end_the_training(services, tmp_path, capsys):
    folder = tmp_path / "ppo-am.tmp"
    fill(folder, report_to=("wandb",)).close()
    (folder / "tracking.json").write_text("{", encoding="utf-8")
    Tracker(folder, ("wandb",), after=1).close()
    assert "report_to: wandb fails" in capsys.readouterr().err and len(metric_lines(folder)) == 1


@pytest.mark.parametrize("where", ["init", "log", "finish"])
def test_a_service_that_fails_does_not_end_the_training(services, where, tmp_path, capsys):
    folder = tmp_path / "sft.tmp"
    fail = "def fail(*_, **__):\n    raise ConnectionError('http://me:geheim@h/\\n gone')\n"
    name = where if where == "init" else f"Run.{where}"
    module = f"{STAND_IN.replace('NAME', 'wandb')}\n{fail}\n{name} = fail\n"
    (tmp_path / "modules" / "wandb.py").write_text(module, encoding="utf-8")
    tracker = fill(folder, report_to=("wandb", "trackio"))
    tracker.close()
    assert metric_lines(folder) == tracker.history == ROWS
    assert [call[0] for call in services("trackio")] == ["init", "log", "log", "finish"]
    (said,) = capsys.readouterr().err.splitlines()
    assert said.startswith("  WARNING: report_to: wandb fails (http://***@h/ gone); ") and "metrics.jsonl" in said


def test_a_missing_package_is_told_before_anything_is_written(tmp_path, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    for name in ("tensorboard", "wandb", "trackio"):
        with pytest.raises(
            ValueError, match=rf"report_to: {name} is not installed; `pip install 'stable-rlhf\[tracking\]'"
        ):
            Tracker(tmp_path / "run", (name,))
    assert list(tmp_path.iterdir()) == []
