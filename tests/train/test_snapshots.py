"""A stage that is stopped goes on from its last good snapshot, to the same bits as one that was not."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from stable_rlhf.data.packing import encode, encode_prompt
from stable_rlhf.data.records import PromptRow
from stable_rlhf.models import PolicyModel
from stable_rlhf.scorer import AdvantageModel, ScorerSettings
from stable_rlhf.train.checkpoint import SNAPSHOTS, RunDirectory
from stable_rlhf.train.config import CheckpointArguments, EngineArguments, PPOArguments, SFTArguments
from stable_rlhf.train.ppo import EncodedPrompt, PPOTrainer
from stable_rlhf.train.rejection import train_rejection
from stable_rlhf.train.sft import train_sft
from stable_rlhf.train.tracking import Tracker

TEXTS = ("Reverse the letters of abcd", "Write backwards: xyz", "Give the last letter of abc", "Count the letters of q")
EVERY_STEP = CheckpointArguments(save_steps=1)
PPO = PPOArguments(
    learning_rate=1e-3, total_steps=4, rollout_batch_size=4, per_device_train_batch_size=2, max_new_tokens=4,
    per_device_rehearsal_batch_size=2, rehearsal_coef=0.5, rejection_samples=2, warmup_ratio=0.5,
)  # fmt: skip

pytestmark = pytest.mark.usefixtures("one_process")


class Killed(BaseException):
    pass


@pytest.fixture
def killed_after(monkeypatch):
    """killed_after(n): training stops right after step n is logged, before its snapshot."""
    log = Tracker.log

    def kill(step: int | None) -> None:
        def logged(self, at, metrics):
            log(self, at, metrics)
            if at == step:
                raise Killed

        monkeypatch.setattr(Tracker, "log", logged)

    return kill


@pytest.fixture
def trainers(tiny_model, tokenizer):
    """Each call makes everything anew, as a restarted process does."""
    prompts = [EncodedPrompt(PromptRow(t), encode_prompt(tokenizer, t)) for t in TEXTS]
    rows = [encode(tokenizer, t, r) for t, r in zip(TEXTS, ("dcba", "zyx", "c", "1"), strict=True)]

    def scorer() -> AdvantageModel:
        return AdvantageModel(tiny_model(seed=3).base_model, tokenizer, ScorerSettings(objective="rm"))

    def ppo(folder: Path, engine: EngineArguments, checkpoint: CheckpointArguments) -> None:
        policy = PolicyModel(tiny_model(), value_head=True)
        trainer = PPOTrainer(policy, tokenizer, scorer(), PPO, engine, rehearsal=rows, moving_average=True, seed=7)
        trainer.train(prompts, folder, checkpoint=checkpoint)

    def sft(folder: Path, engine: EngineArguments, checkpoint: CheckpointArguments) -> None:
        arguments = SFTArguments(learning_rate=1e-3, max_steps=4, num_train_epochs=9, per_device_train_batch_size=2)
        train_sft(PolicyModel(tiny_model()), tokenizer, rows, arguments, engine, folder, seed=1, checkpoint=checkpoint)

    def rejection(folder: Path, engine: EngineArguments, checkpoint: CheckpointArguments) -> None:
        train_rejection(
            PolicyModel(tiny_model()), tokenizer, scorer(), prompts, PPO, engine, folder, seed=2, checkpoint=checkpoint
        )

    return {"ppo": ppo, "sft": sft, "rejection": rejection}


def outcome(folder: Path) -> tuple[dict[str, bytes], list[dict]]:
    """The saved weights, and what was logged (without the time it took)."""
    weights = {p.name: p.read_bytes() for p in sorted(folder.glob("*.safetensors"))}
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return weights, [{k: v for k, v in line.items() if k != "seconds"} for line in lines]


def snapshots(folder: Path) -> list[str]:
    return sorted(p.name for p in (folder / SNAPSHOTS).iterdir())


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
@pytest.mark.parametrize("name", ["ppo", "sft", "rejection"])
def test_resumed_equals_uninterrupted_to_the_bit(name, stage, trainers, killed_after, tmp_path):
    if stage and name != "ppo":
        pytest.skip("every ZeRO stage with PPO, the other trainers with none")
    engine = EngineArguments(zero_stage=stage)
    trainers[name](tmp_path / "whole", engine, CheckpointArguments(save_steps=0))
    assert not (tmp_path / "whole" / SNAPSHOTS).exists()
    for step in (2, 3):  # killed twice
        killed_after(step)
        with pytest.raises(Killed):
            trainers[name](tmp_path / "killed", engine, EVERY_STEP)
    killed_after(None)
    trainers[name](tmp_path / "killed", engine, EVERY_STEP)
    assert outcome(tmp_path / "killed") == outcome(tmp_path / "whole")
    assert len(outcome(tmp_path / "whole")[0]) == (2 if name == "ppo" else 1)


@pytest.fixture
def stopped(trainers, killed_after, tmp_path):
    """A folder whose training was killed in its last step, with its snapshots of steps 2 and 3."""
    killed_after(4)
    with pytest.raises(Killed):
        trainers["sft"](tmp_path / "run", EngineArguments(), EVERY_STEP)
    killed_after(None)
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
        (path / "manifest.json").write_text("{")


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


def test_a_stage_finds_its_snapshots_again_only_with_the_same_settings(tmp_path):
    seen = []

    def work(folder: Path) -> dict:
        seen.append(sorted(p.name for p in folder.iterdir()))
        (folder / SNAPSHOTS / "step-00000001").mkdir(parents=True, exist_ok=True)
        if len(seen) < 4:
            raise Killed
        return {}

    for settings in ({"seed": 0}, {"seed": 0}, {"seed": 1}, {"seed": 1}):
        try:
            stage = RunDirectory(tmp_path).stage("sft", settings, work)
        except Killed:
            continue
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
