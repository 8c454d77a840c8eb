"""Run folders: what is finished is kept, what is not is redone, what is foreign is not touched."""

from __future__ import annotations

import json
import os
import shutil
import signal
from pathlib import Path

import pytest
import torch

from helpers.files import contents
from stable_rlhf.engine import run_folder as checkpoint
from stable_rlhf.engine import signals
from stable_rlhf.engine.run_folder import SNAPSHOTS, RunDirectory, RunError
from stable_rlhf.settings.recipe import CheckpointArguments

SETTINGS = {"seed": 0, "ppo": {"kl_coef": 0.05, "tasks": ["a", "b"]}}


class Work:
    """A stage that counts its runs and remembers what lay in its folder when it began."""

    def __init__(self, result=None, fails: bool = False) -> None:
        self.result, self.fails = result or {"loss": 0.5, "curve": [1, 2]}, fails
        self.runs, self.found = 0, []

    def __call__(self, folder: Path) -> dict:
        self.runs += 1
        self.found = sorted(p.name for p in folder.iterdir() if p.name != "attempt.json")
        (folder / "weights.bin").write_text(f"run {self.runs}", encoding="utf-8")
        if self.fails:
            raise RuntimeError("out of memory")
        return self.result


def names(folder: Path) -> list[str]:
    return sorted(p.name for p in folder.iterdir() if p.name != ".lock")


def finish(folder: Path, settings=None, name: str = "ppo-am") -> Work:
    work = Work()
    RunDirectory(folder).stage(name, settings or SETTINGS, work)
    return work


def test_a_stage_leaves_its_folder_with_settings_result_and_seconds(tmp_path):
    run = RunDirectory(tmp_path / "run")
    work = Work()
    stage = run.stage("ppo-am", SETTINGS, work)
    assert work.runs == 1 and not stage.skipped and stage.result == work.result
    assert stage.folder == tmp_path / "run" / "ppo-am" and run.stages == [stage]
    assert (stage.folder / "weights.bin").read_text(encoding="utf-8") == "run 1"
    record = json.loads((stage.folder / "stage.json").read_text(encoding="utf-8"))
    assert record["settings"] == SETTINGS and record["result"] == work.result and record["seconds"] >= 0
    assert names(run.root) == ["ppo-am", "run.json"]


def test_a_finished_stage_is_not_run_again_and_its_result_is_returned(tmp_path):
    first = RunDirectory(tmp_path).stage("ppo-am", SETTINGS, Work())
    before = contents(tmp_path)
    again = Work({"loss": 9.0})
    run = RunDirectory(tmp_path)
    stage = run.stage("ppo-am", SETTINGS, again)
    assert again.runs == 0 and stage.skipped
    assert stage.result == {"loss": 0.5, "curve": [1, 2]}
    assert (stage.folder, stage.fingerprint, stage.seconds) == (first.folder, first.fingerprint, first.seconds)
    assert run.stages == [stage] and contents(tmp_path) == before


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"seed": 1, "ppo": SETTINGS["ppo"]}, r"seed: 0 -> 1\)"),
        ({"seed": 0, "ppo": {"kl_coef": 0.1, "tasks": ["a", "b"]}}, r"\(ppo\.kl_coef: 0\.05 -> 0\.1\)"),
        ({"seed": 0, "ppo": {"kl_coef": 0.05, "tasks": ["a"]}}, r"\(ppo\.tasks: \['a', 'b'\] -> \['a'\]\)"),
        ({"seed": 0, "ppo": {"tasks": ["a", "b"]}}, r"\(ppo\.kl_coef: 0\.05 -> None\)"),
        ({**SETTINGS, "bf16": True}, r"\(bf16: None -> True\)"),
        ({"seed": 2, "ppo": {"kl_coef": 1.0, "tasks": ["a", "b"]}}, r"ppo\.kl_coef: 0\.05 -> 1\.0, seed: 0 -> 2"),
    ],
)
def test_changed_settings_are_an_error_that_names_old_and_new(tmp_path, settings, message):
    finish(tmp_path)
    before = contents(tmp_path)
    work = Work()
    with pytest.raises(RunError, match=message) as caught:
        RunDirectory(tmp_path).stage("ppo-am", settings, work)
    assert "stage ppo-am" in str(caught.value) and repr(str(tmp_path / "ppo-am")) in str(caught.value)
    assert work.runs == 0 and contents(tmp_path) == before


def test_settings_that_json_writes_alike_are_the_same(tmp_path):
    finish(tmp_path, {"a": 1, "b": (1, 2)})
    work = Work()
    assert RunDirectory(tmp_path).stage("ppo-am", {"b": [1, 2], "a": 1}, work).skipped and work.runs == 0


def test_a_changed_input_stage_is_an_error(tmp_path):
    run = RunDirectory(tmp_path)
    scorer = run.stage("scorer", {"margin": 2.5}, Work())
    run.stage("ppo-am", SETTINGS, Work(), [scorer])
    again, work = RunDirectory(tmp_path), Work()
    same = again.stage("scorer", {"margin": 2.5}, work)
    assert again.stage("ppo-am", SETTINGS, work, [same]).skipped
    for stage in ("scorer", "other"):
        other = RunDirectory(tmp_path / "elsewhere").stage(stage, {"margin": 1.5}, Work())
        with pytest.raises(RunError, match=r"stage ppo-am .*\(its input stages\)"):
            again.stage("ppo-am", SETTINGS, work, [other])
    with pytest.raises(RunError, match="its input stages"):
        again.stage("ppo-am", SETTINGS, work)
    assert work.runs == 0


def test_a_deleted_stage_is_redone_alone(tmp_path):
    import shutil

    run = RunDirectory(tmp_path)
    scorer = run.stage("scorer", {"margin": 2.5}, Work())
    run.stage("ppo-am", SETTINGS, Work(), [scorer])
    shutil.rmtree(tmp_path / "scorer")
    again, first, second = RunDirectory(tmp_path), Work(), Work()
    scorer = again.stage("scorer", {"margin": 2.5}, first)
    assert again.stage("ppo-am", SETTINGS, second, [scorer]).skipped
    assert (first.runs, second.runs) == (1, 0)


def test_a_foreign_folder_is_refused_and_left_alone(tmp_path):
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "chapter.txt").write_text("years of work", encoding="utf-8")
    (tmp_path / ".hidden").write_text("x", encoding="utf-8")
    before = contents(tmp_path)
    with pytest.raises(RunError, match=r"output_dir .*not empty") as caught:
        RunDirectory(tmp_path)
    assert repr(str(tmp_path)) in str(caught.value)
    assert contents(tmp_path) == before and not (tmp_path / "run.json").exists()


def test_an_empty_folder_is_taken(tmp_path):
    assert finish(tmp_path).runs == 1
    assert (tmp_path / "run.json").is_file()


def test_an_output_dir_that_is_a_file_is_an_error(tmp_path):
    file = tmp_path / "out"
    file.write_text("keep me", encoding="utf-8")
    with pytest.raises(RunError, match=r"output_dir .* is a file"):
        RunDirectory(file)
    assert file.read_text(encoding="utf-8") == "keep me"


@pytest.mark.parametrize("text", ["", "{", "[]", "{}", '"format"', "\x00", "[" * 10**5])
def test_a_damaged_run_json_is_an_error(tmp_path, text):
    finish(tmp_path)
    (tmp_path / "run.json").write_text(text, encoding="utf-8")
    before = contents(tmp_path)
    with pytest.raises(RunError, match=r"output_dir .*run\.json is damaged"):
        RunDirectory(tmp_path)
    assert contents(tmp_path) == before


def test_the_folder_of_another_version_is_an_error_that_names_it(tmp_path):
    (tmp_path / "run.json").write_text(json.dumps({"format": 99}), encoding="utf-8")
    with pytest.raises(RunError, match=r"another version \(format 99\)"):
        RunDirectory(tmp_path)


RECORD = {"fingerprint": "x", "settings": {}, "inputs": {}, "seconds": 1.5, "result": {}}


@pytest.mark.parametrize(
    "damage",
    ["missing", "", "{", "[]", '{"fingerprint": "x"}', "null", "[" * 10**5]
    + [json.dumps(RECORD | {name: wrong}) for name in RECORD for wrong in (None, [1])],
)
def test_a_stage_folder_without_a_readable_record_is_an_error(tmp_path, damage):
    finish(tmp_path)
    record = tmp_path / "ppo-am" / "stage.json"
    if damage == "missing":
        record.unlink()
    else:
        record.write_text(damage, encoding="utf-8")
    before, work = contents(tmp_path), Work()
    with pytest.raises(RunError, match=r"stage ppo-am: .*no readable stage\.json, .*ppo-am/stage\.json.*; delete"):
        RunDirectory(tmp_path).stage("ppo-am", SETTINGS, work)
    assert work.runs == 0 and contents(tmp_path) == before


def test_a_file_in_the_place_of_a_stage_is_an_error(tmp_path):
    RunDirectory(tmp_path)
    (tmp_path / "ppo-am").write_text("not a folder", encoding="utf-8")
    with pytest.raises(RunError, match="stage ppo-am"):
        RunDirectory(tmp_path).stage("ppo-am", SETTINGS, Work())
    assert (tmp_path / "ppo-am").read_text(encoding="utf-8") == "not a folder"


def test_what_a_killed_attempt_left_is_redone_from_scratch(tmp_path):
    RunDirectory(tmp_path)
    left = tmp_path / "ppo-am.tmp"
    (left / "early").mkdir(parents=True)
    (left / "weights.bin").write_text("half", encoding="utf-8")
    (left / "stale.bin").write_text("old", encoding="utf-8")
    work = Work()
    stage = RunDirectory(tmp_path).stage("ppo-am", SETTINGS, work)
    assert work.runs == 1 and work.found == [] and not stage.skipped
    assert sorted(p.name for p in stage.folder.iterdir()) == ["stage.json", "weights.bin"]
    assert not left.exists()


@pytest.mark.parametrize("left", ["everything", "no snapshots", "only what it made"])
def test_a_kill_while_a_finished_stage_is_tidied_up_costs_nothing(left, tmp_path, monkeypatch):
    def killed(*_):
        raise KeyboardInterrupt

    class Snapshooting(Work):
        def __call__(self, folder):
            (folder / SNAPSHOTS / "step-3").mkdir(parents=True)
            return super().__call__(folder)

    first = Snapshooting()
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(checkpoint, "_put_in_place", killed)
        RunDirectory(tmp_path).stage("ppo-am", SETTINGS, first)
    working = tmp_path / "ppo-am.tmp"
    if left != "everything":
        shutil.rmtree(working / SNAPSHOTS)
    if left == "only what it made":
        (working / "attempt.json").unlink()
    again = Work()
    stage = RunDirectory(tmp_path).stage("ppo-am", SETTINGS, again)
    assert (first.runs, again.runs) == (1, 0) and stage.skipped and stage.result == {"loss": 0.5, "curve": [1, 2]}
    assert names(tmp_path) == ["ppo-am", "run.json"]
    assert sorted(p.name for p in stage.folder.iterdir()) == ["stage.json", "weights.bin"]


def test_another_layout_is_the_same_stage_only_with_the_same_rows_a_step(tmp_path):
    def settings(per_device, accumulation):
        return {"sft": {"per_device_train_batch_size": per_device, "gradient_accumulation_steps": accumulation}}

    universal = CheckpointArguments(universal=True)
    RunDirectory(tmp_path).stage("sft", settings(8, 1), Work())
    again = Work()
    assert RunDirectory(tmp_path, universal).stage("sft", settings(2, 4), again).skipped and again.runs == 0
    with pytest.raises(RunError, match=r"other rows a step: sft\.gradient_accumulation_steps: 1 -> 8"):
        RunDirectory(tmp_path, universal).stage("sft", settings(8, 8), again)


def test_a_stage_draws_the_same_masks_whatever_ran_before_it(tmp_path):
    drawn = []

    def draw(folder):
        drawn.append(torch.rand(3).tolist())
        return {}

    for root, before in ((tmp_path / "a", 0), (tmp_path / "b", 5)):
        torch.rand(before)
        RunDirectory(root).stage("sft", SETTINGS, draw)
    RunDirectory(tmp_path / "c").stage("sft", {**SETTINGS, "seed": 1}, draw)
    RunDirectory(tmp_path / "a").stage("ppo-am", SETTINGS, draw)
    assert drawn[0] == drawn[1] and drawn[0] != drawn[2] != drawn[3] != drawn[0]


def test_a_signal_after_the_last_step_lets_the_stage_finish_and_no_other_begin(tmp_path):
    class Trained(Work):
        def __call__(self, folder: Path) -> dict:
            signals.defer(True)  # as Snapshots does
            os.kill(os.getpid(), signal.SIGUSR1)
            return super().__call__(folder)

    with pytest.raises(signals.Stopped) as caught, signals.handled(1000):
        RunDirectory(tmp_path).stage("sft", SETTINGS, Trained())
    assert (caught.value.number, caught.value.kept) == (signal.SIGUSR1, "stage sft is finished")
    assert RunDirectory(tmp_path).stage("sft", SETTINGS, Work()).skipped
    with pytest.raises(signals.Stopped, match=r"^SIGUSR1$"), signals.handled(1000):  # elsewhere it ends where it is
        RunDirectory(tmp_path).stage("selection", SETTINGS, lambda _: os.kill(os.getpid(), signal.SIGUSR1) or {})
    assert sorted(p.name for p in tmp_path.iterdir() if p.is_dir()) == ["selection.tmp", "sft"]


def test_a_stage_that_fails_is_not_finished_and_the_next_attempt_redoes_it(tmp_path):
    run = RunDirectory(tmp_path)
    with pytest.raises(RuntimeError, match="out of memory"):
        run.stage("ppo-am", SETTINGS, Work(fails=True))
    assert not (tmp_path / "ppo-am").exists() and run.stages == []
    work = Work()
    # The settings may be other ones now: nothing was finished with the old ones.
    stage = RunDirectory(tmp_path).stage("ppo-am", {"seed": 5}, work)
    assert work.runs == 1 and work.found == [] and not stage.skipped
    assert not (tmp_path / "ppo-am.tmp").exists()


def test_another_rank_leaves_the_folder_to_rank_0(tmp_path, monkeypatch):
    monkeypatch.setenv("RANK", "1")
    RunDirectory(tmp_path / "run")
    assert not (tmp_path / "run").exists()
