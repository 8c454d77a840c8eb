"""TRL's GRPOTrainer with an exported scorer as its reward function: `trl_reward_worker.py FOLDER`."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch
import transformers
import trl
from datasets import Dataset
from transformers import AutoTokenizer
from trl import GRPOConfig, GRPOTrainer

from helpers.tiny_model import redraw
from stable_rlhf.data.encoding import encode
from stable_rlhf.scorer import AdvantageModel
from stable_rlhf.world import build_model, build_tokenizer

PROMPTS = ["Reverse the letters of abcd", "Sort the letters of dcb"]


def main(folder: Path) -> None:
    tokenizer = build_tokenizer()
    policy = build_model(tokenizer, hidden_size=32, num_hidden_layers=2, num_attention_heads=2, seed=1)
    redraw(policy, 0.2, torch.Generator().manual_seed(1))
    seen: list[tuple[Any, Any, torch.Tensor]] = []

    class Watched(GRPOTrainer):
        def _calculate_rewards(self, inputs: Any, prompts: Any, completions: Any, completion_ids: Any) -> torch.Tensor:
            rewards = super()._calculate_rewards(inputs, prompts, completions, completion_ids)
            seen.append((prompts, completions, rewards.clone()))
            return rewards

    rows = [{"prompt": [{"role": "user", "content": prompt}]} for prompt in PROMPTS]
    settings = GRPOConfig(
        str(folder / "trl"), max_steps=2, per_device_train_batch_size=4, num_generations=2, max_completion_length=6,
        report_to=[], use_cpu=True, bf16=False, save_strategy="no", logging_steps=1, gradient_checkpointing=False,
    )  # fmt: skip
    trainer = Watched(
        policy, reward_funcs=str(folder / "exported"), args=settings, train_dataset=Dataset.from_list(rows),
        processing_class=tokenizer, reward_processing_classes=AutoTokenizer.from_pretrained(folder / "exported"),
    )  # fmt: skip
    trainer.train()

    scorer = AdvantageModel.from_pretrained(folder / "scorer")
    bias, count = float(scorer.reward_head.bias.detach()), 0
    for prompts, completions, rewards in seen:
        for prompt, completion, reward in zip(prompts, completions, rewards[:, 0], strict=True):
            example = encode(scorer.tokenizer, prompt, completion[0]["content"])
            with torch.no_grad():
                wanted = scorer(*scorer.prepare([example]))[0]
            torch.testing.assert_close(reward[None] + bias, wanted.to(reward.device), rtol=0, atol=1e-6)
            late = scorer(*scorer.prepare([type(example)(example.ids[:-1], example.prompt_length)]))[0]
            assert (late - reward - bias).abs() > 1e-4  # a control: read a token before, it is another
            count += 1
    assert count == 8, count
    print(f"trl {trl.__version__} transformers {transformers.__version__}: {count} rewards are the scorer's")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
