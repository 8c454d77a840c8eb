"""PPO on models that are loaded in shards, rollouts gathered and layer by layer, and LoRA; run by test_shards.py.

Arguments: the model's folder, where to save. The prompts of the two ranks differ in number of tokens and batches.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch

from helpers.recipes import quiet
from stable_rlhf.data.encoding import encode, encode_prompt
from stable_rlhf.data.prompts import EncodedPrompt
from stable_rlhf.data.records import PromptRow
from stable_rlhf.engine.frozen import loading_in_shards
from stable_rlhf.engine.process import finish, start
from stable_rlhf.models.loading import load_tokenizer
from stable_rlhf.policy.ppo import PPOTrainer
from stable_rlhf.ranks import barrier, rank, world_size
from stable_rlhf.run.stages import load_policy
from stable_rlhf.scorer import AdvantageModel
from stable_rlhf.settings.recipe import EngineArguments
from stable_rlhf.settings.stages import PPOArguments

TEXTS = ("Reverse the letters of abcd", "Write backwards: xyz", "Give the last letter of abc", "Count the letters of q")


def main() -> None:
    model, out = (Path(a) for a in [a for a in sys.argv[1:] if not a.startswith("--local_rank")])
    torch.set_num_threads(1)
    start(0)
    tokenizer = load_tokenizer(str(model))
    if rank() == 0:
        with torch.random.fork_rng():
            AdvantageModel(load_policy(str(model)).trunk.backbone, tokenizer).save_pretrained(out / "scorer")
    barrier()
    prompts = [EncodedPrompt(PromptRow(t), encode_prompt(tokenizer, t)) for t in TEXTS]
    arguments = PPOArguments(
        learning_rate=1e-3, total_steps=3, rollout_batch_size=4, per_device_train_batch_size=4 // world_size(),
        per_device_rehearsal_batch_size=4 // world_size(), max_new_tokens=6, rehearsal_coef=0.5,
    )  # fmt: skip
    for name, settings in (
        ("gathered", {}), ("layered", {"ds3_gather_for_generation": False}), ("lora", {"lora_r": 4}),
    ):  # fmt: skip
        engine = EngineArguments(zero_stage=3, **settings)
        with loading_in_shards(engine, frozen=True):
            scorer = AdvantageModel.from_pretrained(out / "scorer")
        policy = load_policy(str(model), engine, value_head=True)
        reference = load_policy(str(model), engine, frozen=True) if name != "lora" else None
        for module in (policy.trunk, scorer.trunk):
            counts = [(p.ds_tensor.numel(), p.ds_numel) for p in module.parameters()]
            assert sum(c for c, _ in counts) <= sum(n for _, n in counts) / world_size() + len(counts)
        rehearsal = [encode(tokenizer, t, t[:4]) for t in TEXTS]
        recipe = quiet(ppo=arguments, engine=engine)
        trainer = PPOTrainer(policy, tokenizer, scorer, recipe, reference=reference, rehearsal=rehearsal)
        trainer.train(prompts, out / name)
    finish()


main()
