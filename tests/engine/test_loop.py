"""A stage's loop: which steps it gives, and in which order a step ends."""

from __future__ import annotations

import copy
import json
import os
import shutil
import signal
from types import SimpleNamespace

import pytest
from torch import nn

from helpers.recipes import quiet
from stable_rlhf.engine import signals
from stable_rlhf.engine.engine import Engine, Schedule
from stable_rlhf.engine.loop import Loop
from stable_rlhf.engine.run_folder import SNAPSHOTS, RunDirectory
from stable_rlhf.engine.snapshots import Snapshots
from stable_rlhf.engine.tracking import METRICS, Tracker
from stable_rlhf.settings.recipe import CheckpointArguments, EngineArguments

pytestmark = pytest.mark.usefixtures("one_process")
BATCHES = [[0, 1], [2, 3], [4, 5], [6, 7]]
EVERY_STEP = CheckpointArguments(save_steps=1)


@pytest.fixture
def train():
    """``train(folder, checkpoint)`` runs the loop, with a number that is carried; returns the steps that it gave."""
    engine = Engine(nn.Linear(2, 1), EngineArguments(), Schedule(0.1, 4))

    def run(folder, checkpoint=EVERY_STEP, kill=None, end=Loop.end):
        given = []
        with Loop("a stage", BATCHES, engine, quiet(checkpoint=checkpoint), folder, steps=len(BATCHES)) as loop:
            total = loop.carried.get("total", 0)
            for step, rows in loop:
                given.append((step, rows))
                total += sum(rows)
                loop.tokens += len(rows)
                if step == kill:
                    raise KeyboardInterrupt
                end(loop, step, {"total": total}, {"total": total})
        return SimpleNamespace(given=given, total=total, loop=loop)

    yield run
    engine.close()


def logged(folder):
    return [json.loads(line) for line in (folder / METRICS).read_text(encoding="utf-8").splitlines()]


def test_a_loop_goes_on_after_the_newest_snapshot_with_what_it_carried(train, tmp_path):
    whole = train(tmp_path / "whole")
    assert whole.given == list(enumerate(BATCHES)) and whole.total == 28 and whole.loop.tokens == 8
    with pytest.raises(KeyboardInterrupt):
        train(tmp_path / "cut", kill=2)
    rest = train(tmp_path / "cut")
    assert rest.given == whole.given[2:] and rest.loop.done == 2
    assert (rest.total, rest.loop.tokens) == (whole.total, whole.loop.tokens)
    assert logged(tmp_path / "cut") == logged(tmp_path / "whole") == whole.loop.tracker.history
    assert [row["tokens"] for row in whole.loop.tracker.history] == [2, 4, 6, 8]


def test_a_step_is_logged_before_its_snapshot_is_written(train, tmp_path, monkeypatch):
    order, log, write = [], Tracker.log, Snapshots._write
    monkeypatch.setattr(Tracker, "log", lambda self, at, row: order.append(("log", at)) or log(self, at, row))
    monkeypatch.setattr(Snapshots, "_write", lambda self, at, kept: order.append(("keep", at)) or write(self, at, kept))
    due = []
    train(tmp_path, CheckpointArguments(save_steps=2), end=lambda loop, *step: due.append(loop.end(*step)))
    assert order == [("log", 1), ("log", 2), ("keep", 2), ("log", 3), ("log", 4)]  # the last one needs none
    assert due == [False, True, False, True]
    assert len(logged(tmp_path / SNAPSHOTS / "step-00000002")) == 2


def test_a_signal_ends_the_loop_after_its_step_with_a_snapshot(train, tmp_path):
    def end(loop, step, *figures):
        if step == 1:
            os.kill(os.getpid(), signal.SIGTERM)
        loop.end(step, *figures)

    with pytest.raises(signals.Stopped) as caught, signals.handled(1000):
        train(tmp_path / "run", CheckpointArguments(save_steps=0), end=end)
    signals.defer(False)
    assert caught.value.kept == "stage run is saved after step 2"
    assert [step for step, _ in train(tmp_path / "run").given] == [2, 3]


def test_what_fails_leaves_no_bar_and_no_finished_run_behind(train, tmp_path, monkeypatch):
    closed = []
    monkeypatch.setattr("stable_rlhf.engine.loop.Bar.close", lambda self: closed.append("bar"))
    monkeypatch.setattr(Tracker, "close", lambda self: closed.append("tracker"))
    with pytest.raises(KeyboardInterrupt):
        train(tmp_path / "run", kill=0)
    assert closed == ["bar"]
    train(tmp_path / "run")
    assert closed == ["bar", "bar", "tracker"]


def test_a_named_snapshot_is_for_one_stage_of_a_run_and_the_settings_stay(train, tmp_path, capsys):
    with pytest.raises(KeyboardInterrupt):
        train(tmp_path / "before" / "one", kill=3)
    named = CheckpointArguments(
        save_steps=1, resume_from_checkpoint=str(tmp_path / "before" / "one" / SNAPSHOTS / "step-00000002")
    )
    before, given = copy.deepcopy(named), {}

    def stage(name):
        def work(folder):
            given[name] = [step for step, _ in train(folder, named).given]
            return {}

        RunDirectory(tmp_path / "run", named).stage(name, {}, work)

    stage("one")
    stage("two")
    assert given == {"one": [2, 3], "two": [0, 1, 2, 3]} and named == before
    with pytest.raises(ValueError, match="is of stage one, and the first that has something to train is two"):
        train(tmp_path / "other" / "two", named)
    shutil.rmtree(tmp_path / "before")  # used up: whoever comes later, in another process too, does not ask for it
    stage("three")
    assert given["three"] == [0, 1, 2, 3]
