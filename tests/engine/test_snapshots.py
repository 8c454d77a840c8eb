"""A stage that is stopped goes on from its last good snapshot, to the same bits as one that was not."""

from __future__ import annotations

import errno
import json
import os
import shutil
import signal
from dataclasses import replace
from importlib import import_module
from pathlib import Path

import pytest
import torch
from deepspeed.accelerator import get_accelerator

from helpers.files import metric_lines
from helpers.recipes import quiet
from stable_rlhf.data.encoding import encode, encode_prompt
from stable_rlhf.data.prompts import EncodedPrompt
from stable_rlhf.data.records import PromptRow
from stable_rlhf.engine import signals
from stable_rlhf.engine.run_folder import SNAPSHOTS, RunDirectory, RunError
from stable_rlhf.engine.tracking import Tracker
from stable_rlhf.models.policy import PolicyModel
from stable_rlhf.models.trunk import Trunk
from stable_rlhf.policy.ppo import PPOTrainer
from stable_rlhf.policy.rejection import train_rejection
from stable_rlhf.policy.sft import train_sft
from stable_rlhf.scorer import AdvantageModel, ScorerSettings
from stable_rlhf.settings.recipe import CheckpointArguments, EngineArguments
from stable_rlhf.settings.stages import PPOArguments, RewardArguments, SFTArguments

TEXTS = ("Reverse the letters of abcd", "Write backwards: xyz", "Give the last letter of abc", "Count the letters of q")
EVERY_STEP = CheckpointArguments(save_steps=1)
PPO = PPOArguments(
    learning_rate=1e-3, total_steps=4, rollout_batch_size=4, per_device_train_batch_size=2, max_new_tokens=4,
    per_device_rehearsal_batch_size=2, rehearsal_coef=0.5, rejection_samples=2, warmup_ratio=0.5,
)  # fmt: skip

pytestmark = pytest.mark.usefixtures("one_process")


@pytest.fixture
def trainers(tiny_model, tokenizer, tmp_path):
    """Each call makes everything anew, as a restarted process does."""
    prompts = [EncodedPrompt(PromptRow(t), encode_prompt(tokenizer, t)) for t in TEXTS]
    rows = [encode(tokenizer, t, r) for t, r in zip(TEXTS, ("dcba", "zyx", "c", "1"), strict=True)]

    def scorer() -> AdvantageModel:
        return AdvantageModel(tiny_model(seed=3).base_model, tokenizer, ScorerSettings(objective="rm"))

    def ppo(folder: Path, engine: EngineArguments, checkpoint: CheckpointArguments) -> None:
        policy = PolicyModel(tiny_model(), value_head=True)
        recipe = quiet(ppo=PPO, engine=engine, checkpoint=checkpoint)
        trainer = PPOTrainer(policy, tokenizer, scorer(), recipe, rehearsal=rows, moving_average=True, seed=7)
        trainer.train(prompts, folder)

    def grpo(folder: Path, engine: EngineArguments, checkpoint: CheckpointArguments) -> None:
        """Groups, no critic, no scorer, a reward function of one's own, and rehearsal."""
        own = tmp_path / "own.py"
        own.write_text(
            "def vowels(responses):\n    return [sum(c in 'aeiou' for c in r) for r in responses]\n", "utf-8"
        )
        rewards = RewardArguments(functions=[f"{own}:vowels", "length"], weights=[1.0, -0.5])
        arguments = replace(PPO, advantage_estimator="grpo", num_generations=2, kl_in="loss", kl_estimator="k3")
        recipe = quiet(ppo=arguments, rewards=rewards, engine=engine, checkpoint=checkpoint)
        trainer = PPOTrainer(PolicyModel(tiny_model()), tokenizer, None, recipe, rehearsal=rows, seed=7)
        trainer.train(prompts, folder)

    def sft(folder: Path, engine: EngineArguments, checkpoint: CheckpointArguments) -> None:
        arguments = SFTArguments(learning_rate=1e-3, max_steps=4, num_train_epochs=9, per_device_train_batch_size=2)
        recipe = quiet(sft=arguments, engine=engine, checkpoint=checkpoint)
        train_sft(PolicyModel(tiny_model()), tokenizer, rows, recipe, folder, seed=1)

    def rejection(folder: Path, engine: EngineArguments, checkpoint: CheckpointArguments) -> None:
        recipe = quiet(ppo=PPO, engine=engine, checkpoint=checkpoint)
        train_rejection(PolicyModel(tiny_model()), tokenizer, scorer(), prompts, recipe, folder, seed=2)

    return {"ppo": ppo, "grpo": grpo, "sft": sft, "rejection": rejection}


def outcome(folder: Path) -> tuple[dict[str, bytes], list[dict]]:
    """The saved weights, and what was logged (without the time it took)."""
    weights = {p.name: p.read_bytes() for p in sorted(folder.glob("*.safetensors"))}
    lines = metric_lines(folder)
    return weights, [{k: v for k, v in line.items() if k != "seconds"} for line in lines]


def snapshots(folder: Path) -> list[str]:
    return sorted(p.name for p in (folder / SNAPSHOTS).iterdir())


@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("ppo", {}), *(pytest.param("ppo", {"zero_stage": s}, marks=pytest.mark.slow) for s in (1, 2, 3)),
        ("grpo", {}), pytest.param("grpo", {"zero_stage": 3}, marks=pytest.mark.slow),
        ("sft", {}), ("rejection", {}), ("sft", {"bf16": True}),
        pytest.param("sft", {"bf16": True, "zero_stage": 3}, marks=pytest.mark.slow),
        pytest.param("sft", {"offload_optimizer": True, "zero_stage": 2}, marks=pytest.mark.slow),
        ("sft", {"offload_optimizer": True, "zero_stage": 3}),
        pytest.param("ppo", {"fp16": True}, marks=pytest.mark.slow),
    ],
)  # fmt: skip
def test_resumed_equals_uninterrupted_to_the_bit(name, settings, trainers, killed_after, tmp_path, monkeypatch):
    monkeypatch.setattr(get_accelerator(), "is_fp16_supported", lambda: True)  # see test_fp16
    engine = EngineArguments(**settings)
    trainers[name](tmp_path / "whole", engine, CheckpointArguments(save_steps=0))
    assert not (tmp_path / "whole" / SNAPSHOTS).exists()
    for step in (2, 3):  # killed twice
        with killed_after(step):
            trainers[name](tmp_path / "killed", engine, EVERY_STEP)
    trainers[name](tmp_path / "killed", engine, EVERY_STEP)
    assert outcome(tmp_path / "killed") == outcome(tmp_path / "whole")
    assert len(outcome(tmp_path / "whole")[0]) == (2 if name == "ppo" else 1)


@pytest.mark.parametrize("name", ["sft", "ppo", "rejection"])
def test_a_signal_is_answered_by_a_snapshot_after_the_step(name, trainers, tmp_path, monkeypatch, capsys):
    """In the middle of the second step, though no snapshot is due: the third is not begun, and nothing is lost."""
    none = CheckpointArguments(save_steps=0)
    trainers[name](tmp_path / "whole", EngineArguments(), none)
    log = Tracker.log

    def logged(self, at, metrics):
        log(self, at, metrics)
        if at == 2:
            os.kill(os.getpid(), signal.SIGTERM)

    with monkeypatch.context() as patched, pytest.raises(signals.Stopped) as caught, signals.handled(1000):
        patched.setattr(Tracker, "log", logged)
        trainers[name](tmp_path / "run", EngineArguments(), none)
    assert caught.value.number == signal.SIGTERM and caught.value.kept == "stage run is saved after step 2"
    assert snapshots(tmp_path / "run") == ["step-00000002"]
    trainers[name](tmp_path / "run", EngineArguments(), none)
    assert "going on after step 2" in capsys.readouterr().err
    assert outcome(tmp_path / "run") == outcome(tmp_path / "whole")


def test_a_resumed_sft_has_its_hidden_states_from_the_same_batches(
    tiny_model, tokenizer, killed_after, tmp_path, monkeypatch
):
    """The rounding of hidden states depends on their batch: here by much more than rounding."""
    right = Trunk.features
    monkeypatch.setattr(
        Trunk, "features", lambda self, batch: [f * (1 + sum(map(len, batch))) for f in right(self, batch)]
    )
    rows = [encode(tokenizer, t, r) for t, r in zip(TEXTS, ("dcba", "zyx", "c", "1"), strict=True)]
    arguments = SFTArguments(learning_rate=1e-3, max_steps=4, num_train_epochs=9, per_device_train_batch_size=2)

    def train(name: str) -> None:
        policy = PolicyModel(tiny_model(), num_trainable_layers=1)
        train_sft(policy, tokenizer, rows, quiet(sft=arguments, checkpoint=EVERY_STEP), tmp_path / name, seed=1)

    train("whole")
    with killed_after(3):
        train("killed")
    train("killed")
    assert outcome(tmp_path / "killed") == outcome(tmp_path / "whole")


@pytest.fixture
def stopped(trainers, killed_after, tmp_path):
    """A folder whose training was killed in its last step, with its snapshots of steps 2 and 3."""
    with killed_after(4):
        trainers["sft"](tmp_path / "run", EngineArguments(), EVERY_STEP)
    assert snapshots(tmp_path / "run") == ["step-00000002", "step-00000003"]  # the limit is two
    return tmp_path / "run"


def damage(path: Path, how: str) -> None:
    largest = max((p for p in path.rglob("*") if p.is_file()), key=lambda p: p.stat().st_size)
    if how == "truncated":
        largest.write_bytes(largest.read_bytes()[:-7])
    elif how == "a flipped bit":
        content = bytearray(largest.read_bytes())
        content[len(content) // 2] ^= 1
        largest.write_bytes(content)
    elif how == "a missing file":
        largest.unlink()
    elif how == "no manifest":
        (path / "manifest.json").unlink()
    else:
        (path / "manifest.json").write_text("{", encoding="utf-8")


@pytest.mark.parametrize("how", ["truncated", "a flipped bit", "a missing file", "no manifest", "a broken manifest"])
def test_a_damaged_snapshot_is_told_and_the_one_before_it_is_used(how, stopped, trainers, tmp_path, capsys):
    damage(stopped / SNAPSHOTS / "step-00000003", how)
    trainers["sft"](stopped, EngineArguments(), EVERY_STEP)
    said = capsys.readouterr().err
    assert "WARNING: checkpoint" in said and "step-00000003" in said and "going on after step 2" in said
    trainers["sft"](tmp_path / "whole", EngineArguments(), CheckpointArguments(save_steps=0))
    assert outcome(stopped) == outcome(tmp_path / "whole")


def test_nothing_good_left_begins_again(stopped, trainers, tmp_path, capsys):
    for path in (stopped / SNAPSHOTS).iterdir():
        damage(path, "truncated")
    trainers["sft"](stopped, EngineArguments(), EVERY_STEP)
    assert capsys.readouterr().err.count("WARNING") == 2
    trainers["sft"](tmp_path / "whole", EngineArguments(), CheckpointArguments(save_steps=0))
    assert outcome(stopped) == outcome(tmp_path / "whole")


def test_a_write_that_was_cut_off_is_no_snapshot_and_leaves_no_litter(stopped, trainers, capsys):
    torn = stopped / SNAPSHOTS / "step-00000004.tmp"
    shutil.copytree(stopped / SNAPSHOTS / "step-00000003", torn)
    trainers["sft"](stopped, EngineArguments(), EVERY_STEP)
    assert "going on after step 3" in capsys.readouterr().err
    assert not torn.exists()


def test_a_snapshot_of_an_earlier_version(stopped, trainers, capsys):
    """Its manifest has the rows of a step at its top, and they still count."""
    for change, said in ((1, "was made with .* rows a step, this run has .*: choose per_device"), (0, "")):
        for path in (stopped / SNAPSHOTS).glob("step-*/manifest.json"):
            record = json.loads(path.read_text(encoding="utf-8"))
            rows = record.pop("kept", {}).get("rows a step") or record["rows"] - 1
            path.write_text(json.dumps(record | {"rows": rows + change}), encoding="utf-8")
        if said:
            with pytest.raises(ValueError, match=said):
                trainers["sft"](stopped, EngineArguments(), EVERY_STEP)
    trainers["sft"](stopped, EngineArguments(), EVERY_STEP)
    assert "going on after step 3" in capsys.readouterr().err


def test_a_folder_by_name(stopped, trainers, tmp_path, capsys):
    two = stopped / SNAPSHOTS / "step-00000002"
    trainers["sft"](stopped, EngineArguments(), replace(EVERY_STEP, resume_from_checkpoint=str(two)))
    assert "going on after step 2" in capsys.readouterr().err
    damage(two, "truncated")
    for path, message in ((two, "is damaged"), (tmp_path / "nowhere", "there is no checkpoint")):
        wrong = replace(EVERY_STEP, resume_from_checkpoint=str(path))
        with pytest.raises(ValueError, match=rf"checkpoint\.resume_from_checkpoint: .*{message}"):
            trainers["sft"](stopped, EngineArguments(), wrong)


def test_none_begins_again(stopped, trainers, capsys):
    trainers["sft"](stopped, EngineArguments(), replace(EVERY_STEP, resume_from_checkpoint="none"))
    assert "going on" not in capsys.readouterr().err


def test_another_zero_stage_is_an_error_that_names_both(stopped, trainers):
    with pytest.raises(ValueError, match=r"made with 1 rank and engine.zero_stage 0, this run has .*zero_stage 2"):
        trainers["sft"](stopped, EngineArguments(zero_stage=2), EVERY_STEP)


_WHOLE: dict[str, list[dict]] = {}


@pytest.mark.parametrize(
    ("before", "after"),
    [(3, 0), *(pytest.param(*pair, marks=pytest.mark.slow) for pair in ((0, 1), (1, 2), (2, 3), (0, 3), (3, 1)))],
)
def test_universal_goes_on_with_another_zero_stage(before, after, trainers, killed_after, tmp_path, capsys):
    if not _WHOLE:
        trainers["ppo"](tmp_path / "whole", EngineArguments(), CheckpointArguments(save_steps=0))
        _WHOLE["ppo"] = outcome(tmp_path / "whole")[1]
    with killed_after(3):
        trainers["ppo"](tmp_path / "run", EngineArguments(zero_stage=before), EVERY_STEP)
    trainers["ppo"](tmp_path / "run", EngineArguments(zero_stage=after), replace(EVERY_STEP, universal=True))
    assert "results go on to rounding, not to the bit\n  going on after step 2" in capsys.readouterr().err
    for found, wanted in zip(outcome(tmp_path / "run")[1], _WHOLE["ppo"], strict=True):
        assert found == pytest.approx(wanted, abs=1e-5, rel=1e-5)


def test_a_snapshot_of_another_model_is_refused(stopped, tiny_model, tokenizer):
    wider = PolicyModel(tiny_model(layers=4))
    rows = [encode(tokenizer, TEXTS[0], "dcba")] * 2
    arguments = SFTArguments(max_steps=4, num_train_epochs=9, per_device_train_batch_size=2)
    with pytest.raises(ValueError, match=r"step-00000003' has no trunk\.upper\.layers\.3\..* elements"):
        train_sft(wider, tokenizer, rows, quiet(sft=arguments, checkpoint=EVERY_STEP), stopped, seed=1)


@pytest.mark.parametrize(
    "call", ["shards.save_file", "snapshots.save_file", "snapshots.shutil.copy", "snapshots.file_digest"]
)
@pytest.mark.parametrize("good", [0, 1, 2])
def test_a_disk_that_is_full_while_a_snapshot_is_written(call, good, trainers, tmp_path, monkeypatch):
    """The write breaks off, after so many good ones: nothing of it is left, and what was there is whole."""
    module, name = call.split(".", 1)
    target = import_module(f"stable_rlhf.engine.{module}")
    torn = tmp_path / "run" / SNAPSHOTS / f"step-{good + 1:08d}.tmp"
    if name == "shutil.copy":
        target, name = shutil, "copy"
    right = getattr(target, name)

    def breaks(*arguments, **keywords):
        found = right(*arguments, **keywords)
        if torn.exists():
            raise OSError(errno.ENOSPC, "No space left on device")
        return found

    monkeypatch.setattr(target, name, breaks)
    last = f"step-{good:08d}" if good else "none"
    wanted = (
        rf"step-{good + 1:08d}' could not be written: .*No space left on device \(rank 0\); {last} is the last good"
    )
    with pytest.raises(OSError, match=wanted):
        trainers["sft"](tmp_path / "run", EngineArguments(), EVERY_STEP)
    assert snapshots(tmp_path / "run") == [f"step-{i:08d}" for i in range(1, good + 1)]
    monkeypatch.undo()
    trainers["sft"](tmp_path / "run", EngineArguments(), EVERY_STEP)
    trainers["sft"](tmp_path / "whole", EngineArguments(), CheckpointArguments(save_steps=0))
    assert outcome(tmp_path / "run") == outcome(tmp_path / "whole")


def test_a_snapshot_of_another_folder(stopped, trainers, tmp_path):
    """Named by its path: the metrics before it come along."""
    two = stopped / SNAPSHOTS / "step-00000002"
    elsewhere = tmp_path / "elsewhere" / "run"
    trainers["sft"](elsewhere, EngineArguments(), replace(EVERY_STEP, resume_from_checkpoint=str(two)))
    trainers["sft"](tmp_path / "whole", EngineArguments(), CheckpointArguments(save_steps=0))
    assert outcome(elsewhere) == outcome(tmp_path / "whole")
    with pytest.raises(ValueError, match=r"is of stage run, and the first that has something to train is other"):
        trainers["sft"](tmp_path / "other", EngineArguments(), replace(EVERY_STEP, resume_from_checkpoint=str(two)))


def test_metrics_that_a_kill_cut_off_come_from_the_snapshot(stopped, trainers, tmp_path):
    (stopped / "metrics.jsonl").write_text("", encoding="utf-8")
    trainers["sft"](stopped, EngineArguments(), EVERY_STEP)
    trainers["sft"](tmp_path / "whole", EngineArguments(), CheckpointArguments(save_steps=0))
    assert outcome(stopped) == outcome(tmp_path / "whole")


def test_what_was_given_up_is_not_the_newest(trainers, killed_after, tmp_path):
    """A stage that goes on from an earlier step, or begins again, must not find its later steps after the next kill."""
    run, all_kept = tmp_path / "run", replace(EVERY_STEP, save_total_limit=9)
    first = str(run / SNAPSHOTS / "step-00000001")
    for kill, resume, left in ((4, "auto", 3), (3, first, 2), (2, "none", 1)):
        with killed_after(kill):
            trainers["sft"](run, EngineArguments(), replace(all_kept, resume_from_checkpoint=resume))
        assert snapshots(run) == [f"step-{i:08d}" for i in range(1, left + 1)]


@pytest.mark.parametrize("limit", [1, 2, 9])
def test_the_newest_snapshots_are_kept(limit, trainers, killed_after, tmp_path):
    with killed_after(4):
        trainers["sft"](tmp_path, EngineArguments(), replace(EVERY_STEP, save_total_limit=limit))
    assert snapshots(tmp_path) == ["step-00000001", "step-00000002", "step-00000003"][-limit:]


def test_a_score_that_is_not_finite_stops_before_the_update(trainers, monkeypatch, tmp_path):
    """One planted in the third step: the snapshot of the second is whole, and without it the run is as any other."""
    scores, calls = PPOTrainer._scores, []

    def planted(self, chunk, inputs):
        calls.append(chunk)
        found = scores(self, chunk, inputs)
        return found if len(calls) < 6 else [found[0], float("nan")]  # the last of two chunks in step 3

    monkeypatch.setattr(PPOTrainer, "_scores", planted)
    with pytest.raises(ValueError, match=r"a score that is not finite to the response .*weights are those of the step"):
        trainers["ppo"](tmp_path / "run", EngineArguments(), EVERY_STEP)
    monkeypatch.undo()
    assert snapshots(tmp_path / "run") == ["step-00000001", "step-00000002"]
    trainers["ppo"](tmp_path / "run", EngineArguments(), EVERY_STEP)
    trainers["ppo"](tmp_path / "whole", EngineArguments(), CheckpointArguments(save_steps=0))
    assert outcome(tmp_path / "run") == outcome(tmp_path / "whole")


def test_a_stage_finds_its_snapshots_again_only_with_the_same_settings(tmp_path):
    seen = []

    def work(folder: Path) -> dict:
        seen.append(sorted(p.name for p in folder.iterdir()))
        (folder / SNAPSHOTS / "step-00000001").mkdir(parents=True, exist_ok=True)
        if len(seen) < 4:
            raise KeyboardInterrupt
        return {}

    def stage(settings: dict, **arguments):
        return RunDirectory(tmp_path, CheckpointArguments(**arguments)).stage("sft", settings, work)

    for _ in range(2):
        with pytest.raises(KeyboardInterrupt):
            stage({"seed": 0})
    with pytest.raises(RunError, match=r"holds checkpoints of an attempt with other settings \(seed: 0 -> 1\)"):
        stage({"seed": 1})
    with pytest.raises(RunError, match=r"\(seed: 0 -> 1\)"):
        stage({"seed": 1}, universal=True)
    with pytest.raises(KeyboardInterrupt):
        stage({"seed": 1}, resume_from_checkpoint="none")
    stage = stage({"seed": 1})
    fresh, kept = ["attempt.json"], ["attempt.json", SNAPSHOTS]
    assert seen == [fresh, kept, fresh, kept]
    assert sorted(p.name for p in stage.folder.iterdir()) == ["stage.json"]  # a finished stage keeps none


def test_torchs_generator_goes_on_where_it_was(stopped, trainers):
    """Dropout draws from it: the resumed run must not start its stream again."""
    torch.manual_seed(123)
    trainers["sft"](stopped, EngineArguments(), EVERY_STEP)
    first = torch.rand(3)
    torch.manual_seed(456)
    trainers["sft"](stopped, EngineArguments(), EVERY_STEP)
    assert torch.equal(torch.rand(3), first)
