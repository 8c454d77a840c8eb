"""Where metrics are written, and that only rank 0 writes."""

from __future__ import annotations

import json

import torch

from stable_rlhf.train.tracking import Tracker


def fill(folder, *, report_to=("tensorboard",)) -> Tracker:
    tracker = Tracker(folder, report_to)
    tracker.log(1, {"loss": 0.5, "score": torch.tensor(2.0)})
    tracker.log(2, {"loss": 0.25, "score": 3})
    return tracker


ROWS = [{"step": 1, "loss": 0.5, "score": 2.0}, {"step": 2, "loss": 0.25, "score": 3.0}]


def lines(folder) -> list[dict]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_every_step_is_one_json_line_at_once(tmp_path):
    folder = tmp_path / "new" / "run"
    tracker = fill(folder, report_to=())
    assert lines(folder) == ROWS == tracker.history  # before it is closed: a killed run keeps its curve
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
    assert lines(tmp_path) == ROWS


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
    assert lines(tmp_path) == [{"step": 1, "loss": 7.0}]
