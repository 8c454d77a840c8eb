"""PPO with Selective Rehearsal (Eq. 2 and 9), from top to bottom.

for every step:
    sample responses with the policy              generate, or a vLLM server that gets its weights first
    score them                                    AdvantageModel (or reward model)
    rewards: score at the end, KL at each token   ppo.rewards
    advantages                                    GAE, whitened over all ranks, corrected for another rollout engine;
                                                  critic-free: the score itself
    for every mini-batch:
        one mixed batch: rollouts + rehearsal     ppo.update
        one loss, one backward, one step
    watch the figures, adapt the KL coefficient   guard, ppo.kl
"""

from __future__ import annotations

import math
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any

import torch

from stable_rlhf.data.encoding import Encoded
from stable_rlhf.data.prompts import EncodedPrompt
from stable_rlhf.data.records import PromptRow
from stable_rlhf.engine.engine import Engine
from stable_rlhf.engine.frozen import read_only, release
from stable_rlhf.engine.order import micro_steps, shuffled_steps, stream_seed
from stable_rlhf.engine.snapshots import Kept, Snapshots
from stable_rlhf.engine.tracking import Tracker
from stable_rlhf.models.features import FeatureCache, share_lower
from stable_rlhf.models.policy import PolicyModel
from stable_rlhf.models.views import response_span, view
from stable_rlhf.ops import PolicyLossConfig
from stable_rlhf.policy.experience import Experience, RunningMoments, add_advantages, correct_for_rollouts
from stable_rlhf.policy.guard import KLTooHigh, StabilityGuard
from stable_rlhf.policy.kl import KLController
from stable_rlhf.policy.metrics import rollout_metrics
from stable_rlhf.policy.mixed_batch import mix, mixed_loss
from stable_rlhf.policy.page import write_page
from stable_rlhf.policy.sft import save_policy
from stable_rlhf.ranks import barrier, gather_objects, max_over_ranks, rank, sum_over_ranks, world_size
from stable_rlhf.rollout.local import GenerationSettings, LocalRollouts, Rollout, RolloutEngine
from stable_rlhf.scorer.model import AdvantageModel
from stable_rlhf.settings.recipe import CheckpointArguments, EngineArguments, GuardArguments
from stable_rlhf.settings.stages import PPOArguments
from stable_rlhf.show.progress import is_main_process, progress


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
    """Holds the policy's engine, the frozen reference and the scorer; :meth:`train` is the algorithm.

    ``reference``: the initial policy, where it is another than the one that training begins with, or a copy cannot be
    taken (a policy loaded in shards, without LoRA).
    ``rollouts``: where responses come from; None: the policy itself.
    """

    def __init__(
        self,
        policy: PolicyModel,
        tokenizer: Any,
        scorer: AdvantageModel,
        arguments: PPOArguments,
        engine_arguments: EngineArguments,
        *,
        reference: PolicyModel | None = None,
        rehearsal: Sequence[Encoded] = (),
        moving_average: bool = False,
        rollouts: RolloutEngine | None = None,
        seed: int = 0,
    ) -> None:
        check_sizes(arguments)
        self.tokenizer, self.policy, self.arguments = tokenizer, policy, arguments
        # A copy, taken before the engine shards the policy, unless the adapters of LoRA can be switched off.
        initial = reference or (None if engine_arguments.lora_r else policy.reference())
        self.rehearsal, self.seed = list(rehearsal), seed
        self.moments = RunningMoments() if moving_average else None
        self.kl = KLController(arguments.kl_coef, arguments.kl_target)
        self.max_update_kl: float | None = None
        self.accumulation = arguments.rollout_batch_size // (
            arguments.num_mini_batches * arguments.per_device_train_batch_size * world_size()
        )
        # Rehearsal sequences of one random stream: those of a micro-step, in the cut that the stage began with.
        self.drawn_together = arguments.per_device_rehearsal_batch_size * world_size()
        self.engine = Engine(
            policy, engine_arguments, learning_rate=arguments.learning_rate,
            head_learning_rate=arguments.head_learning_rate,
            total_steps=arguments.total_steps * arguments.num_ppo_epochs * arguments.num_mini_batches,
            warmup_ratio=arguments.warmup_ratio, micro_batch_size=arguments.per_device_train_batch_size,
            gradient_accumulation_steps=self.accumulation,
        )  # fmt: skip
        self.reference = self.engine.without_adapters if initial is None else read_only(initial, engine_arguments)
        self.scorer = read_only(scorer, engine_arguments)
        self.rollouts = rollouts or LocalRollouts(policy.causal_lm, tokenizer, self.engine.gathers_for_generation)
        self.sampling = GenerationSettings(
            arguments.max_new_tokens, arguments.temperature, arguments.top_p, tuple(arguments.stop)
        )
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

    def publish(self, folder: Path, step: int) -> None:
        """Give a rollout engine that holds a copy of the policy its present weights, through a folder."""
        if not self.rollouts.holds_a_copy:
            return
        path = folder / "rollout-weights" / str(step)  # another name each time: a loader may remember what it has read
        self.engine.save_model(path)
        problem = None
        if is_main_process():
            try:
                self.rollouts.load(path)
            except ValueError as error:
                problem = str(error)
            shutil.rmtree(path.parent)
        problem = gather_objects(problem)[0]  # and nobody samples before the weights are there
        if problem:
            raise ValueError(problem)

    def sample(self, prompts: Sequence[EncodedPrompt], step: int, places: Sequence[int]) -> list[Rollout]:
        """One response per prompt; ``places`` are the prompts' places in the global batch, which seed their draws."""
        seeds = [stream_seed(self.seed, "rollout", step, place) for place in places]
        return self.rollouts.sample([p.ids for p in prompts], self.sampling, seeds=seeds)

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
            inputs, target = view(self.policy.trunk, chunk, features)
            now = self.engine(inputs, target, temperature=self.arguments.temperature)
            initial = self.reference(inputs, target, temperature=self.arguments.temperature)
            scored = inputs if self.shares_features else None
            scores = self._scores(chunk, scored)
            for i, (example, rollout) in enumerate(zip(chunk, rollouts[start:], strict=False)):
                where = response_span(example)
                score = scores[i] - (0.0 if rollout.finished else self.arguments.missing_eos_penalty)
                experiences.append(
                    Experience(
                        example,
                        score,
                        old_logprob=now["logprob"][i, where].cpu(),
                        ref_logprob=initial["logprob"][i, where].cpu(),
                        value=(
                            now["value"][i, where].cpu()
                            if "value" in now
                            else torch.zeros(len(example.response), dtype=torch.float32, device="cpu")
                        ),
                        rollout_logprob=(
                            torch.tensor(rollout.logprobs, dtype=torch.float32, device="cpu")
                            if rollout.logprobs is not None
                            else None
                        ),
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
            # The policy's inputs are right-padded.
            last = torch.tensor([len(e) - 1 for e in chunk], device=device, dtype=torch.int64)
            prompt_last = torch.tensor([e.prompt_length - 1 for e in chunk], device=device, dtype=torch.int64)
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
        # Without a critic every value is 0. Undiscounted GAE then gives each token the score, less the KL penalty from
        # that token on; an Advantage Model's score is an advantage already (Eq. 8), nothing is left to subtract.
        gamma, lam = (a.gamma, a.lam) if self.policy.value_head is not None else (1.0, 1.0)
        add_advantages(
            experiences, kl_coef=self.kl.value, kl_estimator=a.kl_estimator, gamma=gamma, lam=lam,
            whiten=a.whiten_advantages, group=group, device=self.policy.trunk.device,
        )  # fmt: skip
        if a.rollout_importance_clip is not None:
            correct_for_rollouts(experiences, a.rollout_importance_clip)

    def show(self, prompts: Sequence[EncodedPrompt], step: int, tracker: Tracker) -> None:
        """Answer fixed prompts, with the same draws every time, and keep the answers and their scores."""
        seeds = [stream_seed(self.seed, "samples", i) for i in range(len(prompts))]
        rollouts = self.rollouts.sample([p.ids for p in prompts], self.sampling, seeds=seeds)
        rows = [
            {
                "prompt": prompt.row.prompt, "task": prompt.row.task, "response": rollout.text,
                "score": experience.score, "length": len(rollout.encoded.response), "finished": rollout.finished,
            }
            for prompt, rollout, experience in zip(prompts, rollouts, self.judge(rollouts), strict=True)
        ]  # fmt: skip
        tracker.sample(step, rows)

    # -- updates -------------------------------------------------------------------------------------------------------

    def update(self, experiences: Sequence[Experience], step: int) -> dict[str, float]:
        """All passes over this rank's rollouts; metrics are means over the updates that were made, of global values."""
        totals: dict[str, float] = {}
        made, skipped, largest = 0, 0, 0.0
        self.engine.train()
        for groups, old in self._mini_batches(experiences, step):
            metrics, moved, too_far = self._optimise(groups, old)
            largest = max(largest, metrics.pop("max_log_ratio"))
            if moved:
                made += 1
                metrics["gradient_norm"] = self.engine.gradient_norm
                for name, value in metrics.items():
                    totals[name] = totals.get(name, 0.0) + value
            else:
                skipped += not self.engine.overflowed  # an overflow of fp16 is no fault, and has a metric of its own
            if too_far:
                break
        found = {name: value / made for name, value in totals.items()}
        return found | {"skipped_updates": float(skipped), "max_log_ratio": largest}

    def _mini_batches(
        self, experiences: Sequence[Experience], step: int
    ) -> Iterator[tuple[list[Sequence[Experience]], list[list[Encoded]]]]:
        """For each optimiser step: its micro-batches of rollouts, and the rehearsal sequences of each (all ranks').

        A mini-batch is a block of consecutive rows of the step's batch, whose prompts are in random order; each pass
        takes the blocks in another order. So every cut into ranks and micro-steps has the same ones, and each rank its
        share of each."""
        per_device = self.arguments.per_device_train_batch_size
        micro = [experiences[s : s + per_device] for s in range(0, len(experiences), per_device)]
        for epoch in range(self.arguments.num_ppo_epochs):
            seed = stream_seed(self.seed, "mini-batches", step, epoch)
            blocks, within = (  # the order within one is of no account but for rounding
                torch.randperm(
                    count, generator=torch.Generator(device="cpu").manual_seed(seed), dtype=torch.int64, device="cpu"
                ).tolist()
                for count in (self.arguments.num_mini_batches, self.accumulation)
            )
            for number, block in enumerate(blocks):
                old = self._rehearsal(step, epoch, number)
                width = len(old) // self.accumulation
                yield (
                    [micro[block * self.accumulation + i] for i in within],
                    [old[i * width : (i + 1) * width] for i in range(self.accumulation)],
                )

    def _optimise(
        self, groups: Sequence[Sequence[Experience]], old: Sequence[Sequence[Encoded]]
    ) -> tuple[dict[str, float], bool, bool]:
        """One optimiser step; returns its metrics, whether the weights moved, and whether the policy was too far."""
        a, world = self.arguments, world_size()
        tokens = sum_over_ranks([sum(len(e.encoded.response) for group in groups for e in group)])[0]
        everyone = [e for row in old for e in row]
        counts = {"mean": sum(len(e.response) for e in everyone), "sum": len(everyone)}
        metrics: dict[str, float] = {}
        largest, moved, too_far = 0.0, True, False
        for i, (group, row) in enumerate(zip(groups, old, strict=True)):
            ours = row[rank() * len(row) // world : (rank() + 1) * len(row) // world]
            loss, parts = mixed_loss(
                self.engine, mix(self.policy, group, ours, self.cache), self.loss_config,
                temperature=a.temperature, cliprange_value=a.cliprange_value, vf_coef=a.vf_coef,
                policy_denominator=tokens, rehearsal_denominator=max(1, counts[a.rehearsal_reduction]),
                grad_scale=self.engine.loss_scale,
            )  # fmt: skip
            largest = max(largest, float(parts.pop("max_log_ratio")))
            for name, part in parts.items():
                metrics[name] = metrics.get(name, 0.0) + float(part)
            if i == len(groups) - 1 and self.max_update_kl is not None:
                too_far = not sum_over_ranks([metrics["approx_kl"]])[0] <= self.max_update_kl  # NaN is too far
            self.engine.backward(loss, drop=too_far)
            moved = self.engine.step()
        found = dict(zip(metrics, sum_over_ranks(metrics.values()), strict=True))
        return found | {"max_log_ratio": max_over_ranks([largest])[0]}, moved, too_far

    @property
    def rehearsal_rows(self) -> int:
        """Rehearsal sequences of an optimiser step, over all ranks."""
        return (
            self.arguments.per_device_rehearsal_batch_size * world_size() * self.accumulation if self.rehearsal else 0
        )

    def _rehearsal(self, step: int, epoch: int, number: int) -> list[Encoded]:
        """The rehearsal sequences of one optimiser step, over all ranks (every rank draws the same list)."""
        draws, found = self.rehearsal_rows // self.drawn_together, list[Encoded]()
        for draw in range(number * draws, (number + 1) * draws):
            seed, size = stream_seed(self.seed, "rehearsal", step, epoch, draw), (self.drawn_together,)
            generator = torch.Generator(device="cpu").manual_seed(seed)
            rows = torch.randint(len(self.rehearsal), size, generator=generator, dtype=torch.int64, device="cpu")
            found += [self.rehearsal[i] for i in rows.tolist()]
        return found

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
        samples: Sequence[EncodedPrompt] = (),
        sample_steps: int = 0,
    ) -> dict[str, Any]:
        """Run ``total_steps`` steps and save the policy to ``folder``; ``gold`` is logged beside the score, unseen by
        the policy. Every ``sample_steps`` steps (0: never) ``samples`` are answered and kept."""
        a, same = self.arguments, list[Kept]()
        if self.rehearsal:
            remedy = "choose per_device_rehearsal_batch_size in proportion to per_device_train_batch_size"
            same = [Kept("rehearsal sequences an update", self.rehearsal_rows, remedy)]
        snapshots = Snapshots(folder, self.engine, checkpoint, same)
        limits = guard_arguments or GuardArguments()
        guard = StabilityGuard(limits, self.kl.lower_target)
        self.engine.skip_nonfinite, self.max_update_kl = limits.on_nonfinite == "skip", limits.max_update_kl
        done, carried = snapshots.restore()
        settings = {"ppo": asdict(a), "guard": asdict(limits), "seed": self.seed, "ranks": world_size()}
        tracker, tokens = Tracker(folder, report_to, after=done, settings=settings), carried.get("tokens", 0.0)
        if done:
            self.kl.value, self.kl.target = carried["kl"]
            self.drawn_together = carried.get("drawn_together", self.drawn_together)
            guard.restore(carried["guard"], tracker.history)
            if self.moments is not None:
                self.moments.count, self.moments.mean, self.moments.m2 = carried["moments"]
        page = partial(write_page, folder, name, settings, tracker, guard, total_steps=a.total_steps)
        batches = shuffled_steps(len(prompts), a.rollout_batch_size, a.total_steps, stream_seed(self.seed, "prompts"))
        with progress(name, total=a.total_steps, unit="steps") as bar:
            bar.advance(done)
            for step, indices in enumerate(batches):
                if step < done:
                    continue
                began = time.monotonic()
                self.publish(folder, step)
                if samples and sample_steps and step % sample_steps == 0:
                    self.show(samples, step, tracker)
                shares = micro_steps(list(range(len(indices))), a.per_device_train_batch_size, rank(), world_size())
                places = [place for share in shares for place in share]
                mine = [prompts[indices[place]] for place in places]
                rollouts = self.sample(mine, step, places)
                experiences = self.judge(rollouts)
                scores = [e.score for e in experiences]
                self.estimate(experiences)
                metrics = self.update(experiences, step)
                golds = [gold(p.row, r.text) for p, r in zip(mine, rollouts, strict=True)] if gold else []
                metrics |= rollout_metrics(rollouts, experiences, scores, golds)
                tokens += metrics.pop("seen")
                metrics |= {
                    "tokens": tokens, "kl_coef": self.kl.value, "learning_rate": self.engine.learning_rate,
                    "seconds": time.monotonic() - began,
                } | self.engine.scaling_metrics()  # fmt: skip
                self.kl.update(metrics["kl"])
                tracker.log(step + 1, metrics)
                by_task = [(at, p.row.task, s) for at, p, s in zip(places, mine, scores, strict=True) if p.row.task]
                try:
                    guard.look(step + 1, metrics, [row[1:] for row in sorted(chain(*gather_objects(by_task)))])
                except KLTooHigh as error:
                    kept = self._save_stopped(folder)
                    page()
                    raise KLTooHigh(f"{error}. The policy of that step is in {str(kept)!r}") from None
                bar.advance(note=f"score {metrics['score']:.3f} kl {metrics['kl']:.3f}")
                moments = self.moments
                carried = {
                    "tokens": tokens, "moments": [moments.count, moments.mean, moments.m2] if moments else None,
                    "kl": [self.kl.value, self.kl.target], "guard": guard.state(),
                    "drawn_together": self.drawn_together,
                }  # fmt: skip
                snapshots.save(step + 1, carried, last=a.total_steps)
                if snapshots.arguments.save_steps and (step + 1) % snapshots.arguments.save_steps == 0:
                    page()
        if samples and sample_steps:
            self.publish(folder, a.total_steps)
            self.show(samples, a.total_steps, tracker)
        save_policy(self.engine, self.policy, self.tokenizer, folder)
        page()
        tracker.close()
        self.engine.close()
        release(self.reference)
        release(self.scorer)
        return {"steps": a.total_steps, "tokens_seen": tokens, "curve": tracker.history}

    def _save_stopped(self, folder: Path) -> Path:
        """Save the policy of a stage that the guard stops, beside the stage's folder: the next attempt may begin that
        one again. It takes the place of the one before when it is whole."""
        kept = folder.with_name(folder.name.removesuffix(".tmp") + "-stopped")
        working = kept.with_name(kept.name + ".tmp")
        if is_main_process():
            shutil.rmtree(working, ignore_errors=True)
        save_policy(self.engine, self.policy, self.tokenizer, working)
        if is_main_process():
            shutil.rmtree(kept, ignore_errors=True)
            working.rename(kept)
        barrier()  # the error that follows ends all processes
        return kept
