"""Rejection sampling (Eq. 3 and 4): sample, keep what scores well, imitate it, repeat. A baseline for PPO."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from stable_rlhf.data.encoding import Encoded
from stable_rlhf.data.prompts import EncodedPrompt
from stable_rlhf.data.records import PromptRow
from stable_rlhf.engine.engine import Engine, Schedule
from stable_rlhf.engine.frozen import read_only, release
from stable_rlhf.engine.loop import Loop
from stable_rlhf.engine.order import micro_steps, shuffled_steps, stream_seed
from stable_rlhf.models.policy import PolicyModel
from stable_rlhf.models.views import Policy, chunks, summed_log_ratio, view
from stable_rlhf.policy.scores import less_penalty, refuse_nonfinite, scores_or_nan
from stable_rlhf.policy.sft import nll_step, save_policy
from stable_rlhf.ranks import gather_objects, rank, sum_over_ranks, world_size
from stable_rlhf.rollout.local import GenerationSettings, Rollout, generate
from stable_rlhf.scorer.model import AdvantageModel
from stable_rlhf.settings.recipe import Recipe
from stable_rlhf.settings.stages import PPOArguments


def keep(scores: Sequence[float], samples: int, threshold: float | None) -> list[int]:
    """Indices kept out of ``samples`` responses a prompt: the best of each prompt (first wins a tie), or all with a
    score of at least ``threshold``."""
    if threshold is not None:
        return [i for i, s in enumerate(scores) if s >= threshold]
    starts = range(0, len(scores), samples)
    return [max(range(start, start + samples), key=lambda i: (scores[i], -i)) for start in starts]


def check_rounds(arguments: PPOArguments) -> int:
    """Prompts a rank and round; responses must divide into whole prompts."""
    world = world_size()
    per_round, left = divmod(arguments.rollout_batch_size, arguments.rejection_samples * world)
    if left or not per_round:
        raise ValueError(
            f"ppo.rollout_batch_size {arguments.rollout_batch_size} must be a multiple of rejection_samples "
            f"{arguments.rejection_samples} x {world} ranks"
        )
    return per_round


def train_rejection(
    policy: PolicyModel,
    tokenizer: Any,
    scorer: AdvantageModel,
    prompts: Sequence[EncodedPrompt],
    recipe: Recipe,
    folder: Path,
    *,
    seed: int,
    gold: Callable[[PromptRow, str], float] | None = None,
    reference: PolicyModel | None = None,
) -> dict[str, Any]:
    """``total_steps`` rounds of ``rollout_batch_size`` responses, ``rejection_samples`` a prompt; one optimiser step a
    round on what is kept."""
    a, world = recipe.ppo, world_size()
    per_round = check_rounds(a)
    copy = reference or (None if recipe.engine.lora_r else policy.reference())
    per_device = a.per_device_train_batch_size
    most = a.rollout_batch_size if a.rejection_threshold is not None else per_round * world
    engine = Engine(
        policy, recipe.engine, Schedule(a.learning_rate, a.total_steps, a.warmup_ratio),
        micro_batch_size=per_device, gradient_accumulation_steps=math.ceil(most / (per_device * world)),
    )  # fmt: skip
    reference_policy = engine.without_adapters if copy is None else read_only(copy, recipe.engine)
    scorer = read_only(scorer, recipe.engine)
    settings = GenerationSettings(a.max_new_tokens, a.temperature, a.top_p, tuple(a.stop))
    batches = shuffled_steps(len(prompts), per_round * world, a.total_steps, stream_seed(seed, "prompts"))
    places = micro_steps(list(range(per_round * world)), per_round, rank(), world)[0]  # this rank's, in every batch
    with Loop("rejection sampling", batches, engine, recipe, folder, steps=a.total_steps) as loop:
        for step, rows in loop:
            asked = [prompts[rows[p]] for p in places for _ in range(a.rejection_samples)]
            seeds = [stream_seed(seed, "rollout", step, p, k) for p in places for k in range(a.rejection_samples)]
            rollouts: list[Rollout] = generate(
                policy.causal_lm, tokenizer, [p.ids for p in asked], settings, seeds=seeds,
                gather=engine.gathers_for_generation,
            )  # fmt: skip
            examples = [r.encoded for r in rollouts]
            scores = less_penalty(_scores(scorer, rollouts, per_device), rollouts, a.missing_eos_penalty)
            kl = _kl(policy, reference_policy, engine, examples, per_device, a.temperature)
            kept = [examples[i] for i in keep(scores, a.rejection_samples, a.rejection_threshold)]
            loss = _imitate(engine, policy, [e for part in gather_objects(kept) for e in part], per_device)
            golds = [gold(p.row, r.text) for p, r in zip(asked, rollouts, strict=True)] if gold else []
            n, score, golden, kl_sum, length, kept_count, seen = sum_over_ranks(
                [len(asked), sum(scores), sum(golds), kl, sum(len(e.response) for e in examples), len(kept),
                 sum(map(len, examples))]
            )  # fmt: skip
            loop.tokens += seen
            metrics = {
                "loss": loss, "score": score / n, "kl": kl_sum / n, "length": length / n, "kept": kept_count / n,
                "seconds": loop.seconds,
            }  # fmt: skip
            if gold:
                metrics["gold"] = golden / n
            loop.end(step, metrics, note=f"score {score / n:.3f}")
        save_policy(engine, policy, tokenizer, folder)
    engine.close()
    release(reference_policy)
    release(scorer)
    return {"steps": a.total_steps, "tokens_seen": loop.tokens, "curve": loop.tracker.history}


@torch.no_grad()
def _scores(scorer: Any, rollouts: Sequence[Rollout], per_device: int) -> list[float]:
    parts = [scorer(*scorer.prepare(chunk)) for chunk in chunks([r.encoded for r in rollouts], per_device)]
    reward = torch.cat([reward for reward, _ in parts])
    expected = torch.cat([expected for _, expected in parts]) if parts[0][1] is not None else None
    scores = scores_or_nan(scorer, reward, expected)
    refuse_nonfinite(scores, rollouts)
    return scores


def _kl(
    policy: PolicyModel, reference: Policy, engine: Engine, examples: Sequence[Encoded], per_device: int,
    temperature: float,
) -> float:  # fmt: skip
    """Sum over responses of log π(y) − log π_init(y)."""
    engine.eval()
    ratios = [
        summed_log_ratio(engine, reference, view(policy.trunk, chunk), temperature=temperature)
        for chunk in chunks(examples, per_device)
    ]
    engine.train()
    return sum(ratios)


def _imitate(engine: Engine, policy: PolicyModel, kept: Sequence[Encoded], per_device: int) -> float:
    """One NLL step on the kept responses of all ranks, in micro-steps of ``per_device`` rows a rank."""
    if not kept:
        return float("nan")  # nothing passed the threshold this round: no step
    # Rows without a response, so without a loss, fill the micro-steps up: the engine takes the same number every round.
    filler = Encoded(kept[0].ids[:1], 1)
    rows = [*kept, *[filler] * (engine.accumulation * per_device * world_size() - len(kept))]
    # Without a cache: one that knows the filler already would run fewer forwards on this rank than on another (ZeRO-3).
    return nll_step(engine, policy, micro_steps(rows, per_device, rank(), world_size()))
