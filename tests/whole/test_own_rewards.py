"""A whole run without a scorer among its rewards."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from helpers.files import tiny_files, write_lines


@pytest.mark.slow
def test_verifiable_rewards_with_what_must_not_be_forgotten_apart(server, tmp_path):
    """recipes/gsm8k-grpo.yaml in small: GRPO with a reward of one's own, scorers that select and judge alone."""
    tiny_files(tmp_path / "files", pairs=60, prompts=60)
    rows = [json.loads(line) for line in (tmp_path / "files/prompts.jsonl").read_text(encoding="utf-8").splitlines()]
    sums = [{"question": f"What is {i} + {i}?", "answer": f"#### {2 * i}"} for i in range(24)]
    write_lines(tmp_path / "files/sums.jsonl", sums)
    write_lines(tmp_path / "files/others.jsonl", [*rows, {"prompt": sums[0]["question"]}])
    recipe = Path(__file__).parents[2] / "recipes/gsm8k-grpo.yaml"
    small = """--model-name-or-path files/model --output-dir run --report-to [] --data.prompts [files/sums.jsonl]
        --data.forget_prompts [files/others.jsonl] --data.pairs [files/pairs.jsonl] --data.eval_prompts 6
        --scorer.num_trainable_layers null --ppo.num_trainable_layers null --scorer.num_train_epochs 1
        --select.num_clusters 3 --select.top_k 4 --select.max_candidates 0 --ppo.total_steps 2 --ppo.max_new_tokens 4
        --ppo.num_generations 2 --ppo.rollout_batch_size 8 --rewards.functions [exact_number,length]"""
    server("run", recipe, *small.split(), cwd=tmp_path).worked()
    summary = json.loads((tmp_path / "run/summary.json").read_text(encoding="utf-8"))
    stages = [stage["name"] for stage in summary["stages"]]
    scorers = ["scorer-rm", "scorer-judge", "selection-rm"]
    assert stages == ["initial-policy", *scorers, "ppo-rm", "ppo-rm-sr", "evaluation"]
    assert summary["selection-rm"]["candidates"] == (24 - 6) + (60 - 6)  # what PPO is trained on, and what it is not
    for name, label in (("rm", "GRPO"), ("rm-sr", "GRPO-SR by RM")):
        policy = summary["policies"][name]
        assert policy["label"] == label and set(policy["main"]["rewards"]) == {"exact_number", "length"}
        assert policy["main"]["rewards"]["exact_number"]["n"] == 6 == policy["forget"]["n"]
        assert set(policy["forget"]["rewards"]) == {"length"}  # no answers there
        length = policy["main"]["rewards"]["length"]
        assert length["value"] == pytest.approx(policy["main"]["length"] / 4)
    page = (tmp_path / "run/report.html").read_text(encoding="utf-8")
    assert "GRPO-SR by RM, main set: exact_number" in page and "AM-PPO-SR improves" not in page
    asked = ["evaluate", "--config", recipe, *small.split(), "--policies", "mine=run/ppo-rm", "--output-dir", "again"]
    again = json.loads(server(*asked, "--judge-scorer", "run/scorer-judge", cwd=tmp_path).worked().out)
    assert again["policies"]["mine"]["main"]["rewards"] == summary["policies"]["rm"]["main"]["rewards"]
    other = [*asked, "--judge-scorer", "run/scorer-judge", "--rewards.functions", "[exact_number]"]
    server(*other, cwd=tmp_path).refused("evaluation", "made with other settings")
