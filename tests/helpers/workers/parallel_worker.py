"""Trains a scorer and policies for five updates on recorded data under each ZeRO stage; rank 0 writes the losses.

Run by test_parallel.py under one and two ranks. Arguments: output file, micro-batch per rank, ZeRO stages.
"""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path

import torch

from helpers.recipes import quiet
from helpers.tiny_model import redraw
from stable_rlhf.data.encoding import Encoded, encode
from stable_rlhf.data.prompts import EncodedPrompt
from stable_rlhf.data.records import Comparison, PromptRow
from stable_rlhf.engine.engine import Engine, Schedule
from stable_rlhf.engine.order import micro_steps, shuffled_steps
from stable_rlhf.engine.process import finish, start
from stable_rlhf.engine.snapshots import Snapshots
from stable_rlhf.engine.tracking import Tracker
from stable_rlhf.engine.weights import gathered
from stable_rlhf.models.policy import PolicyModel
from stable_rlhf.ops import PolicyLossConfig
from stable_rlhf.policy.experience import Experience
from stable_rlhf.policy.ppo import PPOTrainer
from stable_rlhf.policy.rejection import _imitate
from stable_rlhf.ranks import gather_objects, rank, sum_over_ranks, world_size
from stable_rlhf.rollout.local import GenerationSettings, generate
from stable_rlhf.scorer import AdvantageModel, ScorerSettings
from stable_rlhf.scorer.comparisons import EncodedComparison
from stable_rlhf.scorer.train import contrastive_term, scorer_loss
from stable_rlhf.settings.recipe import CheckpointArguments, EngineArguments
from stable_rlhf.settings.stages import PPOArguments, ScorerArguments
from stable_rlhf.world import build_model, build_tokenizer

UPDATES = 5


def model(tokenizer):
    built = build_model(tokenizer, hidden_size=32, num_hidden_layers=2, num_attention_heads=2, seed=0)
    return redraw(built, 0.15, torch.Generator().manual_seed(1))


def scorer_losses(stage: int, micro: int, tokenizer, **contrastive) -> list[float]:
    generator = torch.Generator().manual_seed(2)

    def text(low: int = 1) -> str:
        length = int(torch.randint(low, 6, (1,), generator=generator))
        return "".join("abcdefgh"[i] for i in torch.randint(8, (length,), generator=generator).tolist())

    rows = []
    for i in range(24):
        prompt = f"Reverse the letters of {text()}"
        responses = tuple(f"{text()}{j}" for j in range(3 if i % 3 == 0 else 2))
        pairs = ((0, 1), (0, 2), (1, 2)) if len(responses) == 3 else ((0, 1),)
        examples = [encode(tokenizer, prompt, r) for r in responses]
        ours = [-2 * torch.rand(len(e.response), generator=generator) for e in examples]
        alternates = tuple(
            tuple(tuple((-2 * torch.rand(len(e.response), generator=generator)).tolist()) for _ in range(2))
            for e in examples
        )
        row = Comparison(prompt, responses, pairs, alt_logprobs=alternates)
        rows.append(EncodedComparison(row, examples, ours))
    scorer = AdvantageModel(model(tokenizer).base_model, tokenizer, ScorerSettings(num_policies=3, num_alternates=2))
    arguments = ScorerArguments(contrastive_dropout=0.2, **contrastive)
    term = contrastive_term(scorer, arguments, seed=8)
    engine = Engine(
        scorer, EngineArguments(zero_stage=stage), Schedule(1e-3 if contrastive else 1e-2, UPDATES),
        micro_batch_size=micro, gradient_accumulation_steps=2,
    )  # fmt: skip
    engine.train()
    global_batch = micro * world_size() * 2
    losses = []
    for step, indices in enumerate(shuffled_steps(len(rows), global_batch, UPDATES, seed=3)):
        total = 0.0
        for places in micro_steps(list(range(global_batch)), micro, rank(), world_size()):
            share = [rows[indices[place]] for place in places]
            contrast = term and term.views(step, places, [len(item.examples) for item in share])
            loss, _, _ = scorer_loss(engine, scorer, share, arguments, None, global_batch, contrast)
            engine.backward(loss)
            engine.step()
            total += float(loss.detach())
        losses.append(sum_over_ranks([total])[0])
        if term:
            losses.append(engine.gradient_norm)
    engine.close()
    return losses


def recorded(tokenizer) -> tuple[list[Experience], list[Encoded]]:
    generator = torch.Generator().manual_seed(4)
    experiences = []
    for _ in range(16):
        prompt, response = (
            torch.randint(4, 20, (int(torch.randint(2, 8, (1,), generator=generator)),), generator=generator)
            for _ in "ab"
        )
        n = len(response)
        experiences.append(
            Experience(
                Encoded((*prompt.tolist(), *response.tolist()), len(prompt)),
                float(torch.randn(1, generator=generator)),
                old_logprob=-3 + 0.1 * torch.randn(n, generator=generator),
                ref_logprob=-3 + 0.1 * torch.randn(n, generator=generator),
                value=0.1 * torch.randn(n, generator=generator),
            )
        )
    rehearsal = [Encoded(tuple(torch.randint(4, 20, (6,), generator=generator).tolist()), 2) for _ in range(10)]
    return experiences, rehearsal


def ppo_losses(
    stage: int, micro: int, tokenizer, rehearse: bool, mini_batches: int = 1, updates: int = UPDATES
) -> tuple[list[float], list[float], list[list[int]]]:
    """Losses and gradient norms of PPO with its critic, and what is sampled after it."""
    experiences, rehearsal = recorded(tokenizer)
    arguments = PPOArguments(
        learning_rate=1e-2, total_steps=updates, rollout_batch_size=16, per_device_train_batch_size=micro,
        per_device_rehearsal_batch_size=micro, rehearsal_coef=0.5, vf_coef=0.3, entropy_coef=0.01,
        max_new_tokens=12, num_mini_batches=mini_batches,
    )  # fmt: skip
    scorer = AdvantageModel(model(tokenizer).base_model, tokenizer)
    policy = PolicyModel(model(tokenizer), value_head=True)
    recipe = quiet(ppo=arguments, engine=EngineArguments(zero_stage=stage))
    trainer = PPOTrainer(policy, tokenizer, scorer, recipe, rehearsal=rehearsal if rehearse else ())
    places = [p for share in micro_steps(list(range(16)), micro, rank(), world_size()) for p in share]
    losses, norms = [], []
    for step in range(updates):
        mine = [experiences[p] for p in places]
        metrics = trainer.update(trainer.with_advantages(mine), step)
        losses.append(metrics["loss"])
        norms.append(metrics["gradient_norm"])
    # Sampling from the trained (under ZeRO-3: partitioned) weights, then one more update through the restored hooks.
    prompts = [EncodedPrompt(PromptRow(""), list(e.encoded.ids[: e.encoded.prompt_length])) for e in experiences]
    rollouts = trainer.sample([prompts[p] for p in places], 9)
    with gathered(list(trainer.engine.module.parameters())):
        plain = generate(
            policy.causal_lm, tokenizer, [prompts[0].ids], GenerationSettings(4, temperature=0)
        ) if stage != 3 else []  # fmt: skip
    mine = trainer.with_advantages([experiences[p] for p in places])
    losses.append(trainer.update(mine, updates)["loss"])
    assert stage == 3 or plain
    drawn = torch.full((16, 64), -1, dtype=torch.float64)
    for place, rollout in zip(places, rollouts, strict=True):
        drawn[place, : len(rollout.encoded.response)] = torch.tensor(rollout.encoded.response, dtype=torch.float64)
    everyone = torch.tensor(sum_over_ranks((drawn + 1).flatten().tolist())).reshape(16, 64) - 1
    trainer.engine.close()
    return losses, norms, everyone.int().tolist()


def group_losses(stage: int, micro: int, tokenizer, estimator: str, **settings) -> list[float]:
    """Losses and gradient norms without a critic, on four recorded groups of four, each of them on both ranks where
    there are two; and the figures of those groups."""
    experiences, rehearsal = recorded(tokenizer)
    arguments = PPOArguments(
        learning_rate=1e-2, total_steps=4, rollout_batch_size=16, num_generations=4, advantage_estimator=estimator,
        per_device_train_batch_size=micro, per_device_rehearsal_batch_size=micro, rehearsal_coef=0.5, kl_coef=0.3,
        num_mini_batches=2, **settings,
    )  # fmt: skip
    scorer = AdvantageModel(model(tokenizer).base_model, tokenizer)
    recipe = quiet(ppo=arguments, engine=EngineArguments(zero_stage=stage))
    trainer = PPOTrainer(PolicyModel(model(tokenizer)), tokenizer, scorer, recipe, rehearsal=rehearsal)
    found = []
    for step in range(4):
        mine = trainer.with_advantages([experiences[p] for p in trainer.places])
        metrics = trainer.update(mine, step)
        found += [metrics["loss"], metrics["gradient_norm"]]
    found += trainer.of_groups(mine).values()
    trainer.engine.close()
    return found


def group_draws(stage: int, micro: int, tokenizer) -> list[list[int]]:
    """What a step consists of where some groups, each on one rank of two, are sampled anew: for every place its prompt
    and response; and how many were."""
    arguments = PPOArguments(
        rollout_batch_size=16, num_generations=2, advantage_estimator="grpo", per_device_train_batch_size=micro,
        max_new_tokens=4, dynamic_sampling=2,
    )  # fmt: skip
    scorer = AdvantageModel(model(tokenizer).base_model, tokenizer)
    recipe = quiet(ppo=arguments, engine=EngineArguments(zero_stage=stage))
    trainer = PPOTrainer(PolicyModel(model(tokenizer)), tokenizer, scorer, recipe)
    observe, asked_at_once = trainer.observe, []

    def scored(rollouts):
        asked_at_once.append(len(rollouts))
        found = observe(rollouts)
        flat = [sum(e.encoded.ids[: e.encoded.prompt_length]) % 2 for e in found]
        return [
            replace(e, score=1.0 if f else float(sum(e.encoded.response))) for e, f in zip(found, flat, strict=True)
        ]

    trainer.observe = scored
    prompts = [
        EncodedPrompt(PromptRow(""), list(e.encoded.ids[: e.encoded.prompt_length])) for e in recorded(tokenizer)[0]
    ]
    asked = [prompts[place // 2] for place in trainer.places]
    asked, rollouts, _, figures = trainer.collect(prompts, asked, 3)
    mine = [(p, a.ids, r.encoded.response) for p, a, r in zip(trainer.places, asked, rollouts, strict=True)]
    everyone = sorted(row for part in gather_objects(mine) for row in part)
    assert len(set(map(tuple, gather_objects(asked_at_once)))) == 1  # as many forwards on every rank
    trainer.engine.close()
    return [[*ids, -1, *response] for _, ids, response in everyone] + [[int(figures["resampled_groups"])]]


def imitation_losses(stage: int, micro: int, tokenizer, layers: int | None) -> list[float]:
    """Of rejection sampling's steps on 1, 3 and 16 kept responses, and on the last ones once more."""
    kept = [e.encoded for e in recorded(tokenizer)[0]]
    policy = PolicyModel(model(tokenizer), num_trainable_layers=layers)
    engine = Engine(
        policy, EngineArguments(zero_stage=stage), Schedule(1e-2, 4), micro_batch_size=micro,
        gradient_accumulation_steps=16 // (micro * world_size()),
    )  # fmt: skip
    engine.train()
    losses = [_imitate(engine, policy, kept[:count], micro) for count in (1, 3, 16, 16)]
    engine.close()
    return losses


def head_gradient(stage: int, micro: int, tied: bool) -> list[float]:
    """Of the policy's head, projected on a few fixed directions: after a mixed batch through the fused loss."""
    from deepspeed.utils import safe_get_full_grad
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(5)
    # 131,072 weights: what has up to 100,000 is whole on every rank under ZeRO-3 too.
    config = LlamaConfig(
        vocab_size=4096, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=2, tie_word_embeddings=tied, initializer_range=0.15,
    )  # fmt: skip
    policy = PolicyModel(LlamaForCausalLM(config))
    engine = Engine(policy, EngineArguments(zero_stage=stage), Schedule(1e-3, 2))
    engine.train()
    rows = torch.randint(4, 4096, (16, 7), generator=torch.Generator().manual_seed(6))
    mine = rows[rank() * micro * 4 : (rank() + 1) * micro * 4]  # one rank has 16, two have 8 each
    inputs = policy.trunk.inputs(mine.tolist())
    target = torch.cat([mine[:, 1:], torch.full((len(mine), 1), -1)], dim=1)
    kind = torch.tensor([1, 1, 1, 2, 2, 2, 0]).expand_as(mine)
    old = -8 + 0.1 * torch.cos(mine.float())
    loss = engine(inputs, target, loss={
        "kind": kind, "config": PolicyLossConfig(rehearsal_coef=0.5), "old_logprob": old, "advantage": old.sin(),
        "policy_denominator": 48, "rehearsal_denominator": 48,
    })["output"].loss  # fmt: skip
    engine.backward(loss)
    gradient = safe_get_full_grad(policy.head.weight) if stage else policy.head.weight.grad
    directions = torch.randn(8, *gradient.shape, generator=torch.Generator().manual_seed(7))
    found = (directions * gradient).sum((1, 2)).tolist()
    engine.step()
    engine.close()
    return found


def nonfinite(stage: int, tokenizer) -> list[float]:
    """Two steps, the first with an infinite gradient on the last rank alone; returns for each whether the weights moved
    (as the engine says) and by how much."""
    policy = PolicyModel(model(tokenizer))
    engine = Engine(policy, EngineArguments(zero_stage=stage), Schedule(1e-2, 9))
    engine.skip_nonfinite = True
    engine.train()

    def weights() -> torch.Tensor:
        with gathered(list(engine.module.parameters())):
            return torch.cat([p.detach().flatten() for p in policy.parameters()]).clone()

    found, before = [], weights()
    for planted in (True, False):
        logprob = engine(policy.trunk.inputs([[5, 6, 7], [8, 9]]), torch.full((2, 3), 7))["logprob"]
        loss = -logprob.mean()
        if planted and rank() == world_size() - 1:  # its value is as before, its gradient is infinite
            loss = loss + (logprob - logprob.detach()).clamp_min(0).sqrt().sum()
        engine.backward(loss)
        found += [float(engine.step()), float((weights() - before).abs().max())]
    engine.close()
    return found


def dropout(stage: int, tokenizer, folder: Path) -> list[list[float]]:
    """Each rank's forward of the same rows with dropout: before a snapshot, after it, and gone on from it."""
    built = model(tokenizer)
    for layer in built.base_model.layers:
        layer.self_attn.attention_dropout = 0.5
    torch.manual_seed(4)
    policy = PolicyModel(built)
    engine = Engine(policy, EngineArguments(zero_stage=stage), Schedule(1e-2, 9))
    engine.train()
    tracker, snapshots = Tracker(folder, ()), Snapshots(folder, engine, CheckpointArguments(save_steps=1))

    def draw() -> float:
        with torch.no_grad():
            logprob = engine(policy.trunk.inputs([[5, 6, 7, 8], [8, 9, 10, 11]]), torch.full((2, 4), 7))["logprob"]
        return float(logprob.sum())

    found = [draw()]
    tracker.log(1, {"loss": 0.0})
    snapshots.save(1, {}, last=9)
    found.append(draw())
    snapshots.restore()
    found.append(draw())
    tracker.close()
    engine.close()
    return gather_objects(found)


def main() -> None:
    arguments = [a for a in sys.argv[1:] if not a.startswith("--local_rank")]
    output, micro, stages = Path(arguments[0]), int(arguments[1]), [int(s) for s in arguments[2].split(",")]
    torch.set_num_threads(1)
    start(0)
    tokenizer = build_tokenizer()
    found = {}
    for stage in stages:
        plain, norms, drawn = ppo_losses(stage, micro, tokenizer, rehearse=False)
        rehearsed, norms_too, drawn_too = ppo_losses(stage, micro, tokenizer, rehearse=True)
        # Micro-steps of half the width on two ranks, so twice as many.
        cut, *_ = ppo_losses(stage, micro // world_size(), tokenizer, rehearse=False, mini_batches=2, updates=3)
        found[stage] = {
            "scorer": scorer_losses(stage, micro, tokenizer), "ppo": plain, "ppo-sr": rehearsed,
            "mini-batches": cut,
            "simcse": scorer_losses(stage, micro, tokenizer, contrastive="simcse", contrastive_on="differences"),
            "swav": scorer_losses(stage, micro, tokenizer, contrastive="swav", swav_prototypes=6),
            "norms": norms + norms_too, "sampled anew": group_draws(stage, micro, tokenizer),
            "grpo": group_losses(stage, micro, tokenizer, "grpo", loss_aggregation="sequence_mean"),
            "rloo": group_losses(
                stage, micro, tokenizer, "rloo", kl_in="loss", kl_estimator="k3",
                importance_level="sequence",
            ),
            "imitation": imitation_losses(stage, micro, tokenizer, layers=None),
            "split imitation": imitation_losses(stage, micro, tokenizer, layers=1),
            "head": head_gradient(stage, micro, tied=False), "tied head": head_gradient(stage, micro, tied=True),
            "drawn": [drawn, drawn_too], "nonfinite": nonfinite(stage, tokenizer),
            "dropout": dropout(stage, tokenizer, output.with_suffix("") / str(stage)),
        }  # fmt: skip
    if rank() == 0:
        output.write_text(json.dumps(found), encoding="utf-8")
    # A rank that ends while another still talks to it can take that one down with it.
    finish()


main()
