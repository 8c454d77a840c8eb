"""Whole studies through the command line: small, but nothing left out."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import time
from pathlib import Path

import pytest

from helpers.cli import CONSOLE_SCRIPT, run
from helpers.files import metric_lines
from helpers.launch import environment

SMALL = """
    --variants rejection,rm,am-critic-free --study.seeds [3,4] --study.validation_seeds [7] --study.workers 2
    --world.hidden_size 32 --world.num_hidden_layers 2 --world.num_attention_heads 2 --world.comparisons 200
    --sft.max_steps 20 --sft.per_device_train_batch_size 32 --scorer.num_train_epochs 1 --ppo.total_steps 4
    --ppo.rollout_batch_size 32 --ppo.per_device_train_batch_size 16 --checkpoint.save_steps 2
"""
RECIPE = Path(__file__).parents[2] / "recipes" / "study-skill-world.yaml"


def arguments(folder: Path, *more: str) -> list[str]:
    return ["study", str(RECIPE), "--output-dir", folder.name, *SMALL.split(), *more]


def figures(folder: Path) -> dict:
    """What must be the same in every study with these settings."""
    found = json.loads((folder / "results.json").read_text(encoding="utf-8"))
    for row in found["policies"]:
        del row["seconds"]
    for part in found["means"]["policies"].values():
        part.pop("seconds", None)
    return {key: found[key] for key in ("policies", "scorers", "means", "comparisons", "claims", "curves", "seeds")}


pytestmark = pytest.mark.slow  # whole runs, a minute and more


@pytest.fixture(scope="module")
def done(tmp_path_factory) -> Path:
    """A finished study (only to be read)."""
    folder = tmp_path_factory.mktemp("study") / "run"
    said = run(*arguments(folder), cwd=folder.parent, timeout=1800).worked()
    assert "| AM, critic-free |" in said.out and "Policy against SFT" in said.out
    return folder


def test_a_study_compares_all_variants_and_seeds(done):
    found = json.loads((done / "results.json").read_text(encoding="utf-8"))
    assert {(r["variant"], r["seed"]) for r in found["policies"]} == {
        (variant, seed) for variant in ("sft", "rejection", "rm", "am-critic-free") for seed in (3, 4)
    }
    assert {(r["scorer"], r["seed"]) for r in found["scorers"]} == {(s, n) for s in ("rm", "am") for n in (3, 4)}
    assert found["kind"] == "reported" and found["validation"] is None and found["judges"] == ["gold"]
    for seed in (3, 4):
        summary = json.loads((done / "seeds" / str(seed) / "summary.json").read_text(encoding="utf-8"))
        assert summary["seed"] == seed and summary["settings"]["ppo"]["total_steps"] == 4
        for row in found["policies"]:
            if row["seed"] == seed and row["variant"] != "sft":
                assert row["main_win"] == summary["policies"][row["variant"]]["main"]["win"]
    worlds = [(done / "seeds" / seed / "world" / "prompts.jsonl.gz").read_bytes() for seed in "34"]
    assert worlds[0] != worlds[1]
    assert sorted(p.name for p in (done / "pictures").iterdir()) == [
        "curves.png", "frontier.png", "outcomes.png", "scorers.png",
    ]  # fmt: skip
    assert (done / "report.html").is_file() and (done / "results.md").is_file()


def test_the_policy_without_a_critic_has_no_value_head(done):
    stage = done / "seeds" / "3" / "ppo-am-critic-free"
    assert (stage / "model.safetensors").is_file() and not (stage / "value_head.safetensors").exists()
    rows = metric_lines(stage)
    assert len(rows) == 4 and all(row["value_loss"] == 0 and "gold" in row for row in rows)
    assert (done / "seeds" / "3" / "ppo-rm" / "value_head.safetensors").is_file()


def test_what_cannot_run_is_refused_before_the_first_seed(tmp_path):
    for more, words in (
        ("--study.seeds []", "study.seeds: name at least one"),
        ("--study.seeds [3,3]", "study.seeds: seeds must be different"),
        ("--study.validation_seeds [4]", "study.seeds and study.validation_seeds share [4]"),
        ("--study.workers 0", "study.workers must be at least 1"),
        ("--ppo.rollout_batch_size 33", "ppo.rollout_batch_size 33"),
    ):
        run(*arguments(tmp_path / "run", *more.split()), cwd=tmp_path).refused(words)
        assert not (tmp_path / "run").exists()
    run(*arguments(tmp_path / "run"), cwd=tmp_path, WORLD_SIZE="2").refused("run it without a launcher")


@pytest.mark.slow
def test_validation_seeds_are_told_and_other_settings_are_refused(done):
    where = done.parent
    run(*arguments(done, "--validation"), cwd=where, timeout=1800).worked()
    assert json.loads((done / "validation" / "results.json").read_text(encoding="utf-8"))["seeds"] == [7]
    said = run(*arguments(done), cwd=where).worked()
    assert "Validation seeds 7 (" in said.out and "ran before, with the very settings reported here" in said.out
    refused = run(*arguments(done, "--ppo.kl_coef", "0.5"), cwd=where)
    refused.refused("2 of 2 seeds failed", "ppo-rejection was made with other settings", "0.05 -> 0.5")


@pytest.mark.slow
def test_a_killed_study_leaves_no_process_behind_and_goes_on(done, tmp_path):
    """Killed when its seeds have just begun, in the middle of a stage (there it is asked to end), and between stages:
    by what lies in its folder, so that no machine is too fast or too slow."""
    seeds = tmp_path / "run" / "seeds"
    for number, there in (
        (signal.SIGKILL, "*.log"), (signal.SIGTERM, "*/sft.tmp/metrics.jsonl"), (signal.SIGKILL, "*/scorer-am*"),
    ):  # fmt: skip
        study = subprocess.Popen(
            [CONSOLE_SCRIPT, *arguments(tmp_path / "run")], cwd=tmp_path, env=environment(),
            stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, encoding="utf-8",
        )  # fmt: skip
        while not any(seeds.glob(there)):
            assert study.poll() is None
            time.sleep(0.01)
        children = _children(study.pid)
        study.send_signal(number)
        assert study.stderr
        said = study.stderr.read()
        assert study.wait() == (-number if number == signal.SIGKILL else 128 + number), said
        if number == signal.SIGTERM:
            assert said.splitlines()[-1] == "stable-rlhf: SIGTERM: ended; the same command goes on where it stopped"
            logs = [log.read_text(encoding="utf-8").rstrip().rpartition("\n")[2] for log in seeds.glob("*.log")]
            assert any(line.startswith("stable-rlhf: SIGTERM: ") for line in logs), logs  # others may still import
        while any(_alive(child) for child in children):  # as soon as they look: one may still be importing
            time.sleep(0.1)
    run(*arguments(tmp_path / "run"), cwd=tmp_path, timeout=1800).worked()
    assert figures(tmp_path / "run") == figures(done)
    assert not list((tmp_path / "run").rglob("*.tmp"))


def _children(pid: int) -> list[int]:
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text(encoding="utf-8").split()]


def _alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return Path(f"/proc/{pid}/stat").read_text(encoding="utf-8").rsplit(")", 1)[1].split()[0] != "Z"
