"""A user's callbacks: what they see, how they stop a stage, and what is said of one that fails."""

from __future__ import annotations

import json

import pytest
from torch import nn

from helpers.recipes import quiet
from stable_rlhf.engine.engine import Engine, Schedule
from stable_rlhf.engine.hooks import check_callbacks
from stable_rlhf.engine.loop import Loop
from stable_rlhf.engine.run_folder import SNAPSHOTS
from stable_rlhf.engine.signals import StoppedByCallback
from stable_rlhf.engine.tracking import METRICS
from stable_rlhf.run.bounds import check
from stable_rlhf.settings.recipe import CheckpointArguments, Recipe

pytestmark = pytest.mark.usefixtures("one_process")
BATCHES = [[0], [1], [2], [3]]
CODE = """
import json, pathlib
NOTES = pathlib.Path(__file__).with_suffix(".notes")
def note(*what):
    with NOTES.open("a", encoding="utf-8") as file:
        file.write(json.dumps(what) + "\\n")
class Watches:
    def on_step_end(self, metrics, state):
        note("step", state.stage, state.step, state.steps, state.tokens, metrics)
        metrics.clear()  # its own copy
    def on_stage_end(self, metrics, state):
        note("end", state.step, metrics["step"], state.folder.is_dir())
class Stops:
    def on_step_end(self, metrics, state):
        if metrics["total"] >= 1 and state.step in (2, 4):
            state.stop("enough")
class Raises:
    def on_step_end(self, metrics, state):
        metrics["nothing"]
class RaisesLate:
    def on_stage_end(self, metrics, state):
        raise OSError("disk")
class HasNone:
    pass
class Asks:
    def __init__(self, needed):
        pass
    def on_stage_end(self, metrics, state):
        pass
"""


@pytest.fixture
def own(tmp_path):
    path = tmp_path / "own.py"
    path.write_text(CODE, encoding="utf-8")
    return lambda name: f"{path}:{name}"


@pytest.fixture
def train(tmp_path):
    """``train(*callbacks)`` runs the loop in one folder; returns the steps that it gave."""
    engine = Engine(nn.Linear(2, 1), quiet().engine, Schedule(0.1, 4))

    def run(*callbacks):
        recipe, given = quiet(checkpoint=CheckpointArguments(save_steps=0), callbacks=list(callbacks)), []
        with Loop("a stage", BATCHES, engine, recipe, tmp_path / "one.tmp", steps=len(BATCHES)) as loop:
            total = loop.carried.get("total", 0)
            for step, rows in loop:
                given.append(step)
                total, loop.tokens = total + sum(rows), loop.tokens + 2
                loop.end(step, {"total": total}, {"total": total})
        return given

    yield run
    engine.close()


def notes(tmp_path):
    return [json.loads(line) for line in (tmp_path / "own.notes").read_text(encoding="utf-8").splitlines()]


def test_callbacks_see_every_step_as_it_is_logged_and_the_end(train, own, tmp_path):
    assert train(own("Watches")) == [0, 1, 2, 3]
    logged = [json.loads(line) for line in (tmp_path / "one.tmp" / METRICS).read_text(encoding="utf-8").splitlines()]
    *steps, end = notes(tmp_path)
    assert steps == [["step", "one", i + 1, 4, 2.0 * (i + 1), logged[i]] for i in range(4)]
    assert end == ["end", 4, 4, True] and all("total" in row for row in logged)


def test_a_stage_that_is_stopped_is_saved_and_goes_on(train, own, tmp_path):
    words = r"callback '.*own\.py:Stops' \(enough\) stopped stage one, which is saved after step 2"
    with pytest.raises(StoppedByCallback, match=words):
        train(own("Watches"), own("Stops"))
    assert [p.name for p in (tmp_path / "one.tmp" / SNAPSHOTS).iterdir()] == ["step-00000002"]
    assert [note[0] for note in notes(tmp_path)] == ["step", "step"]  # it has not ended
    assert train(own("Watches"), own("Stops")) == [2, 3]  # asked for after the last step, it stops nothing
    assert [note[0] for note in notes(tmp_path)] == ["step"] * 4 + ["end"]
    assert notes(tmp_path)[3][5]["total"] == 6


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("Raises", r"own\.py:Raises': on_step_end failed after step 1 of stage one: KeyError: 'nothing'"),
        ("RaisesLate", r"own\.py:RaisesLate': on_stage_end failed after step 4 of stage one: OSError: disk"),
        ("HasNone", r"own\.py:HasNone' has neither of on_step_end and on_stage_end"),
        ("Asks", r"own\.py:Asks' cannot be made: TypeError: .*needed"),
        ("Watched", r"has no 'Watched'; did you mean 'Watches'\?"),
        ("NOTES", r"own\.py:NOTES' is PosixPath, expected a function or a class"),
    ],
)
def test_what_fails_names_the_class_and_the_hook(train, own, name, words):
    with pytest.raises(ValueError, match=f"^callbacks: .*{words}"):
        train(own(name))


def test_callbacks_are_looked_for_before_the_first_stage(own, tmp_path, monkeypatch):
    with pytest.raises(ValueError, match=r"callbacks: expected path/to/file.py:name or .*, got 'Mine'"):
        check(Recipe(callbacks=["Mine"]))
    with pytest.raises(ValueError, match=r"callbacks: 'no.such:Mine' cannot be imported: ModuleNotFoundError"):
        check_callbacks(["no.such:Mine"])
    monkeypatch.chdir(tmp_path)  # a module beside the command
    (tmp_path / "own_hooks_of_a_test.py").write_text("class Mine:\n    def on_stage_end(self, m, s): ...\n", "utf-8")
    assert [each.__name__ for each in check_callbacks(["own_hooks_of_a_test:Mine", own("Stops")])] == ["Mine", "Stops"]
