"""An exported scorer in TRL: trl 1.16.0 beside transformers 5.23.0, in an environment of its own."""

from __future__ import annotations

import pytest
import torch

from helpers.frameworks import framework_python, run_in
from stable_rlhf.run.export import export_scorer
from stable_rlhf.scorer import AdvantageModel


@pytest.mark.slow
@pytest.mark.parametrize("template", ["its own", "with a line break behind the end"])
def test_grpo_takes_an_exported_scorer_as_reward_function(tiny_model, tokenizer, tmp_path, template):
    """Its rewards are the scorer's r(x, y), of every completion that two steps sampled."""
    own = tokenizer.chat_template
    try:
        if template != "its own":
            tokenizer.chat_template = own.replace("+ eos_token }}", "+ eos_token + '+' }}")
            assert tokenizer.chat_template != own
        scorer = AdvantageModel(tiny_model("llama").base_model, tokenizer).eval()
        torch.nn.init.constant_(scorer.reward_head.bias, 0.7)
        scorer.save_pretrained(tmp_path / "scorer")
    finally:
        tokenizer.chat_template = own
    export_scorer(str(tmp_path / "scorer"), str(tmp_path / "exported"))
    out = run_in(framework_python("trl", "trl==1.16.0", "datasets==5.2.0"), "trl_reward_worker", tmp_path)
    print(out)
    assert "8 rewards are the scorer's" in out
