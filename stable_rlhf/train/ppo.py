"""PPO with Selective Rehearsal (Eq. 2 and 9), from top to bottom.

for every step:
    sample responses with the policy              generate
    score them                                    AdvantageModel (or reward model)
    rewards: score at the end, KL at each token   ppo.rewards
    advantages                                    GAE, whitened over all ranks
    for every mini-batch:
        one mixed batch: rollouts + rehearsal     ppo.update
        one loss, one backward, one step
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from stable_rlhf.data.packing import Encoded, response_targets
from stable_rlhf.data.records import DataError, PromptRow
from stable_rlhf.generate import GenerationSettings, Rollout, generate
from stable_rlhf.models import FeatureCache, PolicyModel, share_lower
from stable_rlhf.ops import PolicyLossConfig
from stable_rlhf.ppo.rewards import Experience, RunningMoments, add_advantages
from stable_rlhf.ppo.update import mix, mixed_loss
from stable_rlhf.progress import progress, say
from stable_rlhf.scorer.model import AdvantageModel
from stable_rlhf.train.batches import micro_steps, shuffled_steps, stream_seed
from stable_rlhf.train.config import CheckpointArguments, EngineArguments, GuardArguments, PPOArguments
from stable_rlhf.train.engine import Engine, rank, read_only, sum_over_ranks, world_size
from stable_rlhf.train.guard import KLTooHigh, StabilityGuard
from stable_rlhf.train.sft import save_policy
from stable_rlhf.train.snapshots import Snapshots
from stable_rlhf.train.tracking import Tracker


@dataclass(frozen=True)
class EncodedPrompt:
    row: PromptRow
    ids: list[int]


def check_sizes(arguments: PPOArguments, ranks: int | None = None) -> None:
    """Rollouts must divide into mini-batches of whole micro-steps, on ``ranks`` processes (unset: those there are)."""
    ranks = ranks or world_size()
    width = arguments.num_mini_batches * arguments.per_device_train_batch_size * ranks
    if arguments.rollout_batch_size % width:
        raise ValueError(
            f"ppo.rollout_batch_size {arguments.rollout_batch_size} must be a multiple of num_mini_batches "
            f"{arguments.num_mini_batches} x per_device_train_batch_size {arguments.per_device_train_batch_size} x "
            f"{ranks} ranks = {width}"
        )


class PPOTrainer:
    """Holds the policy's engine, the frozen reference and the scorer; :meth:`train` is the algorithm."""

    def __init__(
        self,
        policy: PolicyModel,
        tokenizer: Any,
        scorer: AdvantageModel,
        arguments: PPOArguments,
        engine_arguments: EngineArguments,
        *,
        rehearsal: Sequence[Encoded] = (),
        moving_average: bool = False,
        seed: int = 0,
    ) -> None:
        check_sizes(arguments)
        self.tokenizer, self.scorer, self.arguments = tokenizer, scorer, arguments
        self.policy, self.reference = policy, policy.reference()
        self.rehearsal, self.seed = list(rehearsal), seed
        self.moments = RunningMoments() if moving_average else None
        self.accumulation = arguments.rollout_batch_size // (
            arguments.num_mini_batches * arguments.per_device_train_batch_size * world_size()
        )
        self.engine = Engine(
            policy, engine_arguments, learning_rate=arguments.learning_rate,
            head_learning_rate=arguments.head_learning_rate,
            total_steps=arguments.total_steps * arguments.num_ppo_epochs * arguments.num_mini_batches,
            warmup_ratio=arguments.warmup_ratio, micro_batch_size=arguments.per_device_train_batch_size,
            gradient_accumulation_steps=self.accumulation,
        )  # fmt: skip
        read_only(self.reference, engine_arguments)
        read_only(self.scorer, engine_arguments)
        self.shares_features = share_lower(policy.trunk, scorer.trunk)
        self.cache = FeatureCache()
        self.cache.fill(policy.trunk, [e.ids for e in self.rehearsal], description="rehearsal hidden states")
        self.loss_config = PolicyLossConfig(
            clip_low=arguments.cliprange,
            clip_high=arguments.cliprange if arguments.cliprange_high is None else arguments.cliprange_high,
            entropy_coef=arguments.entropy_coef,
            rehearsal_coef=arguments.rehearsal_coef if self.rehearsal else 0.0,
        )

    # -- rollouts ------------------------------------------------------------------------------------------------------

    def sample(self, prompts: Sequence[EncodedPrompt], step: int, places: Sequence[int]) -> list[Rollout]:
        """One response per prompt; ``places`` are the prompts' places in the global batch, which seed their draws."""
        settings = GenerationSettings(self.arguments.max_new_tokens, self.arguments.temperature, self.arguments.top_p)
        return generate(
            self.policy.causal_lm, self.tokenizer, [p.ids for p in prompts], settings,
            seeds=[stream_seed(self.seed, "rollout", step, place) for place in places], engine=self.engine.deepspeed,
            description="rollouts",
        )  # fmt: skip

    @torch.no_grad()
    def judge(self, rollouts: Sequence[Rollout]) -> list[Experience]:
        """Score rollouts and attach the policy's, the reference's and the critic's view of every token."""
        per_device = self.arguments.per_device_train_batch_size
        experiences: list[Experience] = []
        self.engine.eval()
        # Fixed chunks, not length-sorted ones: under ZeRO-3 every rank must run the same number of forwards.
        for start in range(0, len(rollouts), per_device):
            chunk = [r.encoded for r in rollouts[start : start + per_device]]
            sequences = [e.ids for e in chunk]
            features = self.policy.trunk.features(sequences) if self.policy.trunk.lower is not None else None
            inputs = self.policy.trunk.inputs(sequences, features=features)
            target = response_targets(chunk, inputs["attention_mask"].shape[1], self.policy.trunk.device)
            now = self.engine(inputs, target, temperature=self.arguments.temperature)
            initial = self.reference(inputs, target, temperature=self.arguments.temperature)
            scored = inputs if self.shares_features else None
            scores = self._scores(chunk, scored)
            for i, (example, rollout) in enumerate(zip(chunk, rollouts[start:], strict=False)):
                where = slice(example.prompt_length - 1, example.prompt_length - 1 + len(example.response))
                score = scores[i] - (0.0 if rollout.finished else self.arguments.missing_eos_penalty)
                experiences.append(
                    Experience(
                        example,
                        score,
                        old_logprob=now["logprob"][i, where].cpu(),
                        ref_logprob=initial["logprob"][i, where].cpu(),
                        value=now["value"][i, where].cpu(),
                        features=features[i] if features is not None else None,
                    )
                )
        bad = [i for i, e in enumerate(experiences) if not math.isfinite(e.score)]
        if sum_over_ranks([len(bad)])[0]:  # on every rank: none waits for one that stopped
            whose = f"to the response {rollouts[bad[0]].text[:60]!r}" if bad else "on another rank"
            raise ValueError(
                f"the scorer gave a score that is not finite {whose}; the policy's weights are those of the step "
                "before. Are the scorer's own weights finite?"
            )
        return experiences

    def _scores(self, chunk: Sequence[Encoded], inputs: dict[str, torch.Tensor] | None) -> list[float]:
        prepared, last, prompt_last = self.scorer.prepare(chunk) if inputs is None else (inputs, None, None)
        if last is None or prompt_last is None:
            device = self.policy.trunk.device
            last = torch.tensor([len(e) - 1 for e in chunk], device=device)  # the policy's inputs are right-padded
            prompt_last = torch.tensor([e.prompt_length - 1 for e in chunk], device=device)
        reward, expected = self.scorer(prepared, last, prompt_last)
        finite = torch.isfinite(reward) if expected is None else torch.isfinite(reward) & torch.isfinite(expected)
        if not finite.all():  # the operation would stop this rank alone: `judge` stops all
            return torch.where(finite, reward, math.nan).tolist()
        return self.scorer.advantage(reward, expected).tolist()

    def estimate(self, experiences: Sequence[Experience]) -> None:
        """Normalise scores when a moving average is kept, then rewards, advantages and returns."""
        if self.moments is not None:
            scores = [e.score for e in experiences]
            self.moments.update(*sum_over_ranks([len(scores), sum(scores), sum(s * s for s in scores)]))
            for experience in experiences:
                experience.score = self.moments.normalise(experience.score)
        a = self.arguments
        group = torch.distributed.group.WORLD if world_size() > 1 else None
        add_advantages(
            experiences, kl_coef=a.kl_coef, kl_estimator=a.kl_estimator, gamma=a.gamma, lam=a.lam,
            whiten=a.whiten_advantages, group=group,
        )  # fmt: skip

    # -- updates -------------------------------------------------------------------------------------------------------

    def update(self, experiences: Sequence[Experience], step: int) -> dict[str, float]:
        """All passes over this rank's rollouts; metrics are means over optimiser steps, of global values."""
        a = self.arguments
        per_device, world = a.per_device_train_batch_size, world_size()
        micro = [experiences[s : s + per_device] for s in range(0, len(experiences), per_device)]
        totals: dict[str, float] = {}
        updates = 0
        self.engine.train()
        for epoch in range(a.num_ppo_epochs):
            generator = torch.Generator().manual_seed(stream_seed(self.seed, "mini-batches", step, epoch))
            order = torch.randperm(len(micro), generator=generator).tolist()
            for start in range(0, len(order), self.accumulation):
                chosen = [micro[i] for i in order[start : start + self.accumulation]]
                old = [self._rehearsal(step, epoch, start + i) for i in range(len(chosen))]
                tokens = sum(len(e.encoded.response) for group in chosen for e in group)
                tokens_everywhere = sum_over_ranks([tokens])[0]
                everyone = [e for row in old for e in row]
                counts = {"mean": sum(len(e.response) for e in everyone), "sum": len(everyone)}
                metrics: dict[str, float] = {}
                for group, row in zip(chosen, old, strict=True):
                    ours = row[rank() * len(row) // world : (rank() + 1) * len(row) // world]
                    loss, parts = mixed_loss(
                        self.engine, mix(self.policy, group, ours, self.cache), self.loss_config,
                        temperature=a.temperature, cliprange_value=a.cliprange_value, vf_coef=a.vf_coef,
                        policy_denominator=tokens_everywhere,
                        rehearsal_denominator=max(1, counts[a.rehearsal_reduction]),
                    )  # fmt: skip
                    self.engine.backward(loss)
                    self.engine.step()
                    for name, part in parts.items():
                        metrics[name] = metrics.get(name, 0.0) + float(part)
                for name, value in zip(metrics, sum_over_ranks(metrics.values()), strict=True):
                    totals[name] = totals.get(name, 0.0) + value
                totals["gradient_norm"] = totals.get("gradient_norm", 0.0) + self.engine.gradient_norm
                updates += 1
        return {name: value / updates for name, value in totals.items()}

    def _rehearsal(self, step: int, epoch: int, micro: int) -> list[Encoded]:
        """The rehearsal sequences of one micro-step, over all ranks (every rank draws the same list)."""
        if not self.rehearsal:
            return []
        generator = torch.Generator().manual_seed(stream_seed(self.seed, "rehearsal", step, epoch, micro))
        count = self.arguments.per_device_rehearsal_batch_size * world_size()
        return [self.rehearsal[i] for i in torch.randint(len(self.rehearsal), (count,), generator=generator).tolist()]

    def watch(self, guard: StabilityGuard, step: int, metrics: dict[str, float], folder: Path) -> None:
        """Let the guard look; when it stops the run, the policy of this moment is kept in ``folder/stopped``."""
        try:
            guard.look(step, metrics)
        except KLTooHigh:
            save_policy(self.engine, self.policy, self.tokenizer, folder / "stopped")
            raise

    # -- the run -------------------------------------------------------------------------------------------------------

    def train(
        self,
        prompts: Sequence[EncodedPrompt],
        folder: Path,
        *,
        name: str = "PPO",
        report_to: Sequence[str] = (),
        checkpoint: CheckpointArguments | None = None,
        guard_arguments: GuardArguments | None = None,
        gold: Callable[[PromptRow, str], float] | None = None,
    ) -> dict[str, Any]:
        """Run ``total_steps`` steps and save the policy to ``folder``; ``gold`` is logged beside the score, unseen by
        the policy."""
        a, snapshots = self.arguments, Snapshots(folder, self.engine, checkpoint)
        guard = StabilityGuard(guard_arguments or GuardArguments())
        done, carried = snapshots.restore()
        tracker, tokens = Tracker(folder, report_to, after=done), carried.get("tokens", 0.0)
        if self.moments is not None and done:
            self.moments.count, self.moments.mean, self.moments.m2 = carried["moments"]
        batches = shuffled_steps(len(prompts), a.rollout_batch_size, a.total_steps, stream_seed(self.seed, "prompts"))
        with progress(name, total=a.total_steps, unit="steps") as bar:
            bar.advance(done)
            for step, indices in enumerate(batches):
                if step < done:
                    continue
                began = time.monotonic()
                shares = micro_steps(list(range(len(indices))), a.per_device_train_batch_size, rank(), world_size())
                places = [place for share in shares for place in share]
                mine = [prompts[indices[place]] for place in places]
                rollouts = self.sample(mine, step, places)
                experiences = self.judge(rollouts)
                raw_scores = [e.score for e in experiences]
                self.estimate(experiences)
                metrics = self.update(experiences, step)
                golds = [gold(p.row, r.text) for p, r in zip(mine, rollouts, strict=True)] if gold else []
                kl = [float((e.old_logprob - e.ref_logprob).sum()) for e in experiences]
                n, score, squares, golden, kl_sum, length, finished, seen = sum_over_ranks(
                    [
                        len(mine), sum(raw_scores), sum(s * s for s in raw_scores), sum(golds), sum(kl),
                        sum(len(e.encoded.response) for e in experiences), sum(r.finished for r in rollouts),
                        sum(len(e.encoded) for e in experiences),
                    ]
                )  # fmt: skip
                tokens += seen
                metrics |= {
                    "score": score / n, "score_std": max(0.0, squares / n - (score / n) ** 2) ** 0.5,
                    "kl": kl_sum / n, "length": length / n, "finished": finished / n, "tokens": tokens,
                    "learning_rate": self.engine.learning_rate, "seconds": time.monotonic() - began,
                }  # fmt: skip
                if gold:
                    metrics["gold"] = golden / n
                tracker.log(step + 1, metrics)
                self.watch(guard, step + 1, metrics, folder)
                bar.advance(note=f"score {score / n:.3f} kl {kl_sum / n:.3f}")
                moments = self.moments
                carried = {"tokens": tokens, "moments": [moments.count, moments.mean, moments.m2] if moments else None}
                snapshots.save(step + 1, carried, last=a.total_steps)
        save_policy(self.engine, self.policy, self.tokenizer, folder)
        tracker.close()
        self.engine.close()
        return {"steps": a.total_steps, "tokens_seen": tokens, "curve": tracker.history}


def encode_prompts(
    rows: Sequence[PromptRow], encode_one: Callable[[Any], list[int]], max_prompt_length: int
) -> list[EncodedPrompt]:
    """Encode prompts; those that are too long are left out and counted."""
    encoded = [EncodedPrompt(row, encode_one(row.prompt)) for row in rows]
    kept = [p for p in encoded if len(p.ids) <= max_prompt_length]
    if not kept:
        raise DataError(f"none of {len(rows)} prompts fits max_prompt_length {max_prompt_length}")
    if len(kept) < len(encoded):
        say(f"  {len(encoded) - len(kept)} of {len(encoded)} prompts have over {max_prompt_length} tokens: left out")
    return kept
