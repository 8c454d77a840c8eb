"""PPO with Selective Rehearsal (Eq. 2 and 9), from top to bottom.

for every step:
    sample responses with the policy              rollout/: generate, or a vLLM server that gets its weights first
    observe them                                  the scorer's score; policy, reference and critic at every token
    add rewards of one's own                      reward_functions.py
    groups of equal scores: other prompts         where ``ppo.dynamic_sampling`` asks for that
    rewards: score at the end, KL at each token   experience.py
    advantages                                    GAE, whitened over all ranks, corrected for another rollout engine;
                                                  critic-free: estimators.py, over the responses to a prompt or tokens
    for every mini-batch:
        one mixed batch: rollouts + rehearsal     mixed_batch.py
        one loss, one backward, one step
    adapt the KL coefficient, watch the figures   kl.py, guard.py
"""

from __future__ import annotations

import math
import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, replace
from itertools import chain
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
from stable_rlhf.engine.signals import Stopped, StoppedByCallback
from stable_rlhf.engine.snapshots import Kept
from stable_rlhf.engine.tracking import Tracker
from stable_rlhf.models.features import FeatureCache, share_lower
from stable_rlhf.models.policy import PolicyModel
from stable_rlhf.models.views import chunks, response_span, view
from stable_rlhf.ops import PolicyLossConfig
from stable_rlhf.policy.dose import RehearsalController
from stable_rlhf.policy.estimators import OF_GROUPS, without_signal
from stable_rlhf.policy.experience import (
    Experience,
    RunningMoments,
    corrected_for_rollouts,
    same_weights,
    scores_less_kl,
    with_advantages,
    with_one_advantage,
)
from stable_rlhf.policy.guard import KLTooHigh, StabilityGuard
from stable_rlhf.policy.kl import KLController
from stable_rlhf.policy.metrics import group_metrics, rollout_metrics
from stable_rlhf.policy.mixed_batch import mix, mixed_loss
from stable_rlhf.policy.page import Page
from stable_rlhf.policy.reward_functions import Rewards
from stable_rlhf.policy.scores import less_overlong, less_penalty, refuse_nonfinite, scores_or_nan
from stable_rlhf.policy.sft import save_policy
from stable_rlhf.ranks import barrier, gather_objects, max_over_ranks, on_first_rank, rank, sum_over_ranks, world_size
from stable_rlhf.rollout.local import GenerationSettings, LocalRollouts, Rollout, RolloutEngine
from stable_rlhf.scorer.model import AdvantageModel
from stable_rlhf.settings.advantages import check_advantages
from stable_rlhf.settings.recipe import Recipe
from stable_rlhf.settings.stages import EstimatorName, PPOArguments
from stable_rlhf.show.progress import is_main_process
from stable_rlhf.system.folders import remove_folder


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

    ``scorer``: None where the settings' rewards do without.
    ``reference``: the initial policy, where it is another than the one that training begins with, or a copy cannot be
    taken (a policy loaded in shards, without LoRA).
    ``rollouts``: where responses come from; None: the policy itself.
    ``estimator``: of advantages; None: ``ppo.advantage_estimator``. ``gae`` needs a policy with a value head, the
    others one without.
    """

    def __init__(
        self,
        policy: PolicyModel,
        tokenizer: Any,
        scorer: AdvantageModel | None,
        recipe: Recipe,
        *,
        reference: PolicyModel | None = None,
        rehearsal: Sequence[Encoded] = (),
        moving_average: bool = False,
        rollouts: RolloutEngine | None = None,
        estimator: EstimatorName | None = None,
        seed: int = 0,
    ) -> None:
        arguments = recipe.ppo
        check_advantages(arguments)
        check_sizes(arguments)
        self.estimator: EstimatorName = estimator or arguments.advantage_estimator
        if (self.estimator == "gae") != (policy.value_head is not None):
            raise ValueError(
                f"estimator {self.estimator!r} needs a policy {'with' if self.estimator == 'gae' else 'without'} a "
                f"value head: PolicyModel(..., value_head={self.estimator == 'gae'})"
            )
        self.tokenizer, self.policy, self.recipe, self.arguments = tokenizer, policy, recipe, arguments
        # A copy, taken before the engine shards the policy, unless the adapters of LoRA can be switched off.
        copy = reference or (None if recipe.engine.lora_r else policy.reference())
        self.rehearsal, self.seed = list(rehearsal), seed
        self.moments = RunningMoments() if moving_average else None
        self.kl = KLController(arguments.kl_coef, arguments.kl_target)
        self.dose = RehearsalController(arguments.rehearsal_coef, arguments.rehearsal_target)
        self.guard = StabilityGuard(recipe.guard, self.kl.lower_target)
        shares = micro_steps(
            list(range(arguments.rollout_batch_size)), arguments.per_device_train_batch_size, rank(), world_size()
        )
        self.places = [place for share in shares for place in share]  # this rank's, in the global batch
        # [B] of the global batch: the responses to a prompt stand side by side, on whatever ranks.
        places = torch.arange(arguments.rollout_batch_size, dtype=torch.int64, device="cpu")
        self.groups = places // arguments.num_generations
        self.accumulation = arguments.rollout_batch_size // (
            arguments.num_mini_batches * arguments.per_device_train_batch_size * world_size()
        )
        # Rehearsal sequences of one random stream: those of a micro-step, in the cut that the stage began with.
        self.drawn_together = arguments.per_device_rehearsal_batch_size * world_size()
        schedule = Schedule(
            arguments.learning_rate, arguments.total_steps * arguments.num_ppo_epochs * arguments.num_mini_batches,
            arguments.warmup_ratio, head_learning_rate=arguments.head_learning_rate,
        )  # fmt: skip
        self.engine = Engine(
            policy, recipe.engine, schedule, micro_batch_size=arguments.per_device_train_batch_size,
            gradient_accumulation_steps=self.accumulation, skip_nonfinite=recipe.guard.on_nonfinite == "skip",
        )  # fmt: skip
        self.reference = self.engine.without_adapters if copy is None else read_only(copy, recipe.engine)
        self.rewards = Rewards(recipe.rewards, arguments.max_new_tokens)
        self.scorer = None if scorer is None else read_only(scorer, recipe.engine)
        self.rollouts = rollouts or LocalRollouts(policy.causal_lm, tokenizer, self.engine.gathers_for_generation)
        # Where nothing asks for the policy's log-probs before the one update that a rollout gets, and that update
        # computes the same numbers, its own forward gives them: a pass over every response saved.
        self.on_policy = (
            self.estimator in OF_GROUPS
            and (arguments.kl_in == "loss" or not arguments.kl_coef)
            and arguments.num_ppo_epochs * arguments.num_mini_batches == 1
            and arguments.rollout_importance_clip is None
            and not self.rollouts.holds_a_copy
            and not policy.draws
        )
        self.sampling = GenerationSettings(
            arguments.max_new_tokens, arguments.temperature, arguments.top_p, tuple(arguments.stop)
        )
        self.first_gap: float | None = None  # between the policy and its first copy in a rollout engine
        self.shares_features = scorer is not None and share_lower(policy.trunk, scorer.trunk)
        self.cache = FeatureCache()
        self.cache.fill(policy.trunk, [e.ids for e in self.rehearsal], description="rehearsal hidden states")
        self.loss_config = PolicyLossConfig(
            clip_low=arguments.cliprange,
            clip_high=arguments.cliprange if arguments.cliprange_high is None else arguments.cliprange_high,
            entropy_coef=arguments.entropy_coef,
            rehearsal_coef=self.dose.value if self.rehearsal else 0.0,
            objective=arguments.objective, importance_level=arguments.importance_level, dual_clip=arguments.dual_clip,
        )  # fmt: skip
        if arguments.kl_in == "loss":
            self.loss_config = replace(
                self.loss_config, kl_coef=arguments.kl_coef, kl_estimator=arguments.kl_estimator,
                kl_unbiased=arguments.kl_unbiased,
            )  # fmt: skip

    def train(
        self,
        prompts: Sequence[EncodedPrompt],
        folder: Path,
        *,
        name: str = "PPO",
        gold: Callable[[PromptRow, str], float] | None = None,
        samples: Sequence[EncodedPrompt] = (),
    ) -> dict[str, Any]:
        """Run ``total_steps`` steps and save the policy to ``folder``; ``gold`` is logged beside the score, unseen by
        the policy. Every ``rollout.sample_steps`` steps ``samples`` are answered and kept."""
        a = self.arguments
        sample_steps = self.recipe.rollout.sample_steps if samples else 0
        settings = {"ppo": asdict(a), "guard": asdict(self.recipe.guard), "seed": self.seed, "ranks": world_size()}
        asked_for = a.rollout_batch_size // a.num_generations
        batches = shuffled_steps(len(prompts), asked_for, a.total_steps, stream_seed(self.seed, "prompts"))
        with Loop(
            name, batches, self.engine, self.recipe, folder, steps=a.total_steps, kept=self._kept(), settings=settings
        ) as loop:  # fmt: skip
            if loop.done:  # the loop has restored the engine; these numbers are ours
                self._resume(loop)
            page = Page(folder, name, settings, loop.tracker, self.guard, total_steps=a.total_steps)
            for step, rows in loop:
                self.publish(folder, step)
                if sample_steps and step % sample_steps == 0:
                    self.show(samples, step, loop.tracker)
                asked = [prompts[rows[place // a.num_generations]] for place in self.places]
                asked, rollouts, observed, of_rewards = self.collect(prompts, asked, step)
                if self.rollouts.holds_a_copy:
                    self.first_gap = same_weights(observed, self.first_gap)
                experiences = self.with_advantages(observed)
                metrics = self.update(experiences, step)

                golds = [gold(p.row, r.text) for p, r in zip(asked, rollouts, strict=True)] if gold else []
                of_rollouts, tokens = rollout_metrics(rollouts, experiences, golds)
                loop.tokens += tokens
                if a.num_generations > 1:
                    metrics |= self.of_groups(experiences)
                metrics |= of_rollouts | of_rewards | {"kl_coef": self.kl.value, "seconds": loop.seconds}
                self.kl.update(metrics["kl"])
                if self.rehearsal:
                    metrics["rehearsal_coef"] = self.dose.value
                    self.dose.update(metrics.get("rehearsal_share", math.nan))
                try:
                    self.watch(asked, experiences, metrics, step)
                except KLTooHigh as error:
                    loop.log(step, metrics)
                    stopped = self.save_stopped(folder)
                    page.write()
                    raise KLTooHigh(f"{error}. The policy of that step is in {str(stopped)!r}") from None
                note = f"score {metrics['score']:.3f} kl {metrics['kl']:.3f}"
                try:
                    if loop.end(step, metrics, self.state(), note=note):
                        page.keep_up()
                except (Stopped, StoppedByCallback):
                    page.write()
                    raise
            if sample_steps:
                self.publish(folder, a.total_steps)
                self.show(samples, a.total_steps, loop.tracker)
            save_policy(self.engine, self.policy, self.tokenizer, folder)
            page.write()
        self.engine.close()
        release(self.reference)
        release(self.scorer)
        return {"steps": a.total_steps, "tokens_seen": loop.tokens, "curve": loop.tracker.history}

    # -- rollouts ------------------------------------------------------------------------------------------------------

    def publish(self, folder: Path, step: int) -> None:
        """Give a rollout engine that holds a copy of the policy its present weights, through a folder."""
        if not self.rollouts.holds_a_copy:
            return
        path = folder / "rollout-weights" / str(step)  # another name each time: a loader may remember what it has read
        # A server's loader looks for a tied head under its own name, where it serves the two apart.
        self.engine.save_model(path, untied=True)

        def load() -> None:
            try:
                self.rollouts.load(path)
            finally:
                remove_folder(path.parent)

        on_first_rank(load, ValueError)  # and nobody samples before the weights are there

    def sample(
        self, prompts: Sequence[EncodedPrompt], step: int, places: Sequence[int] | None = None, attempt: int = 0
    ) -> list[Rollout]:
        """One response to each prompt of this rank, or of those at some of its ``places``; a prompt's place in the
        global batch, and the attempt at it, seed its draws."""
        again = (attempt,) if attempt else ()
        seeds = [
            stream_seed(self.seed, "rollout", step, place, *again)
            for place in (self.places if places is None else places)
        ]
        return self.rollouts.sample([p.ids for p in prompts], self.sampling, seeds=seeds)

    def rewarded(
        self, asked: Sequence[EncodedPrompt], rollouts: Sequence[Rollout], observed: Sequence[Experience], step: int
    ) -> tuple[list[Experience], dict[str, float]]:
        """What was observed, with the score that all rewards give, less the penalties; and the mean of each reward."""
        scores, figures = self.rewards.of(
            [p.row for p in asked], rollouts, [e.score for e in observed], step=step, steps=self.arguments.total_steps
        )
        a = self.arguments
        scores = less_penalty(scores, rollouts, a.missing_eos_penalty)
        scores = less_overlong(scores, rollouts, a.max_new_tokens, a.overlong_buffer, a.overlong_penalty)
        return [replace(e, score=score) for e, score in zip(observed, scores, strict=True)], figures

    def collect(
        self, prompts: Sequence[EncodedPrompt], asked: Sequence[EncodedPrompt], step: int
    ) -> tuple[list[EncodedPrompt], list[Rollout], list[Experience], dict[str, float]]:
        """What was asked on this rank, the responses, what was observed of them, and figures of the rewards: those of
        the first draw, whatever is sampled anew.

        Groups whose scores are all equal are sampled anew, from other prompts, ``dynamic_sampling`` times at most
        (arXiv 2503.14476)."""
        asked = list(asked)
        rollouts = self.sample(asked, step)
        observed, figures = self.rewarded(asked, rollouts, self.observe(rollouts), step)
        resampled = 0
        for attempt in range(1, self.arguments.dynamic_sampling + 1):
            dull = set(without_signal(self._of_all_ranks([e.score for e in observed]), self.groups).tolist())
            if not dull:
                break
            resampled += len(dull)
            anew = [i for i, place in enumerate(self.places) if int(self.groups[place]) in dull]
            # As many rows on every rank, since all of them run the same forwards under ZeRO-3: some answer rows that
            # need no answer.
            most = int(max_over_ranks([len(anew)])[0])
            rows = anew + [i for i in range(len(asked)) if i not in set(anew)][: most - len(anew)]
            others = [prompts[self._another(step, attempt, self.places[i]) % len(prompts)] for i in rows]
            answers = self.sample(others, step, [self.places[i] for i in rows], attempt)
            seen, _ = self.rewarded(others, answers, self.observe(answers), step)
            for i, prompt, answer, experience in zip(anew, others, answers, seen, strict=False):
                asked[i], rollouts[i], observed[i] = prompt, answer, experience
        if self.arguments.num_generations > 1:
            figures = figures | {"resampled_groups": float(resampled)}
        return asked, rollouts, observed, figures

    def _another(self, step: int, attempt: int, place: int) -> int:
        """A number that chooses the prompt of a place's whole group."""
        return stream_seed(self.seed, "another prompt", step, attempt, int(self.groups[place]))

    def _of_all_ranks(self, values: Sequence[float]) -> torch.Tensor:
        """[B] float64: a number of each response, in the order of the global batch, the same on every rank."""
        everyone = sorted(chain(*gather_objects(list(zip(self.places, values, strict=True)))))
        return torch.tensor([value for _, value in everyone], dtype=torch.float64, device="cpu")

    @torch.no_grad()
    def observe(self, rollouts: Sequence[Rollout]) -> list[Experience]:
        """Attach the scorer's score, and the policy's (unless ``on_policy``), the reference's and the critic's view of
        every token."""
        self.engine.eval()
        parts = [self._observed(chunk) for chunk in chunks(rollouts, self.arguments.per_device_train_batch_size)]
        experiences = [experience for part in parts for experience in part]
        refuse_nonfinite([e.score for e in experiences], rollouts)
        return experiences

    def _observed(self, rollouts: Sequence[Rollout]) -> list[Experience]:
        trunk, temperature = self.policy.trunk, self.arguments.temperature
        examples = [r.encoded for r in rollouts]
        features = trunk.features([e.ids for e in examples]) if trunk.lower is not None else None
        seen = view(trunk, examples, features)
        reference = self.reference(*seen, temperature=temperature)
        unread = torch.full_like(reference["logprob"], math.nan)
        policy = {"logprob": unread} if self.on_policy else self.engine(*seen, temperature=temperature)
        scores = self._scores(examples, seen.inputs if self.shares_features else None)
        experiences: list[Experience] = []
        for i, (example, rollout) in enumerate(zip(examples, rollouts, strict=True)):
            where, known = response_span(example), rollout.logprobs
            no_value = torch.zeros(len(example.response), dtype=torch.float32, device="cpu")
            experiences.append(
                Experience(
                    example,
                    scores[i],
                    old_logprob=policy["logprob"][i, where].cpu(),
                    ref_logprob=reference["logprob"][i, where].cpu(),
                    value=policy["value"][i, where].cpu() if "value" in policy else no_value,
                    rollout_logprob=None if known is None else torch.tensor(known, dtype=torch.float32, device="cpu"),
                    features=features[i] if features is not None else None,
                    on_policy=self.on_policy,
                )
            )
        return experiences

    def _scores(self, chunk: Sequence[Encoded], inputs: dict[str, torch.Tensor] | None) -> list[float]:
        if self.scorer is None:
            return [0.0] * len(chunk)
        prepared, last, prompt_last = self.scorer.prepare(chunk) if inputs is None else (inputs, None, None)
        if last is None or prompt_last is None:
            device = self.policy.trunk.device
            # The policy's inputs are right-padded.
            last = torch.tensor([len(e) - 1 for e in chunk], device=device, dtype=torch.int64)
            prompt_last = torch.tensor([e.prompt_length - 1 for e in chunk], device=device, dtype=torch.int64)
        return scores_or_nan(self.scorer, *self.scorer(prepared, last, prompt_last))

    def with_advantages(self, experiences: Sequence[Experience]) -> list[Experience]:
        """The same with rewards, advantages and returns, from scores that are normalised where a moving average is
        kept."""
        experiences = [replace(e, raw_score=e.score) for e in experiences]
        if self.moments is not None:
            scores = [e.raw_score for e in experiences]
            self.moments.update(*sum_over_ranks([len(scores), sum(scores), sum(s * s for s in scores)]))
            experiences = [replace(e, score=self.moments.normalise(e.raw_score)) for e in experiences]
        a = self.arguments
        kl_coef = self.kl.value if a.kl_in == "reward" else 0.0
        if of_groups := OF_GROUPS.get(self.estimator):
            scale = {"scale": a.advantage_scale} if self.estimator == "grpo" else {}
            everyones = self._of_all_ranks(scores_less_kl(experiences, kl_coef, a.kl_estimator))
            advantages = of_groups(everyones, self.groups, **scale).tolist()
            experiences = with_one_advantage(experiences, [advantages[place] for place in self.places])
        else:
            group = torch.distributed.group.WORLD if world_size() > 1 else None
            experiences = with_advantages(
                experiences, estimator=self.estimator, kl_coef=kl_coef, kl_estimator=a.kl_estimator, gamma=a.gamma,
                lam=a.lam, whiten=a.whiten_advantages, group=group, device=self.policy.trunk.device,
            )  # fmt: skip
        if a.rollout_importance_clip is not None:
            experiences = corrected_for_rollouts(experiences, a.rollout_importance_clip)
        return experiences

    # -- updates -------------------------------------------------------------------------------------------------------

    def update(self, experiences: Sequence[Experience], step: int) -> dict[str, float]:
        """All passes over this rank's rollouts; metrics are means over the updates that were made, of global values."""
        totals: dict[str, float] = {}
        updates, skipped, largest = 0, 0, 0.0
        self.engine.train()
        for micros, rehearsal in self._mini_batches(experiences, step):
            metrics, moved, too_far = self._optimise(micros, rehearsal)
            largest = max(largest, metrics.pop("max_log_ratio"))
            if moved:
                updates += 1
                metrics["gradient_norm"] = self.engine.gradient_norm
                for name, value in metrics.items():
                    totals[name] = totals.get(name, 0.0) + value
            else:
                skipped += not self.engine.overflowed  # an overflow of fp16 is no fault, and has a metric of its own
            if too_far:
                break
        means = {name: total / updates for name, total in totals.items()}
        return means | {"skipped_updates": float(skipped), "max_log_ratio": largest}

    def _mini_batches(
        self, experiences: Sequence[Experience], step: int
    ) -> Iterator[tuple[list[Sequence[Experience]], list[list[Encoded]]]]:
        """For each optimiser step: its micro-batches of rollouts, and the rehearsal sequences of each (all ranks').

        A mini-batch is a block of consecutive rows of the step's batch, whose prompts are in random order; each pass
        takes the blocks in another order. So every cut into ranks and micro-steps has the same ones, and each rank its
        share of each."""
        micros = list(chunks(experiences, self.arguments.per_device_train_batch_size))
        for epoch in range(self.arguments.num_ppo_epochs):
            seed = stream_seed(self.seed, "mini-batches", step, epoch)
            blocks, within = (  # the order within one is of no account but for rounding
                torch.randperm(
                    count, generator=torch.Generator(device="cpu").manual_seed(seed), dtype=torch.int64, device="cpu"
                ).tolist()
                for count in (self.arguments.num_mini_batches, self.accumulation)
            )
            for number, block in enumerate(blocks):
                rehearsal = self._rehearsal(step, epoch, number)
                width = len(rehearsal) // self.accumulation
                yield (
                    [micros[block * self.accumulation + i] for i in within],
                    [rehearsal[i * width : (i + 1) * width] for i in range(self.accumulation)],
                )

    def _optimise(
        self, micros: Sequence[Sequence[Experience]], rehearsal: Sequence[Sequence[Encoded]]
    ) -> tuple[dict[str, float], bool, bool]:
        """One optimiser step; returns its metrics, whether the weights moved, and whether the policy was too far."""
        a, world = self.arguments, world_size()
        tokens = sum_over_ranks([sum(len(e.encoded.response) for micro in micros for e in micro)])[0]
        lengths = [len(e.response) for part in rehearsal for e in part]
        counts = {"mean": sum(lengths), "sum": len(lengths)}
        responses = a.rollout_batch_size // a.num_mini_batches
        denominators = {
            "token_mean": tokens, "sequence_mean": responses, "sequence_sum": responses * a.max_new_tokens
        }  # fmt: skip
        config = replace(self.loss_config, kl_coef=self.kl.value) if a.kl_in == "loss" else self.loss_config
        if self.rehearsal:
            config = replace(config, rehearsal_coef=self.dose.value)
        metrics: dict[str, float] = {}
        largest, moved, too_far, squares = 0.0, True, False, [0.0, 0.0]
        for i, (micro, rehearsed) in enumerate(zip(micros, rehearsal, strict=True)):
            share = rehearsed[rank() * len(rehearsed) // world : (rank() + 1) * len(rehearsed) // world]
            batch = mix(self.policy, micro, share, self.cache)
            loss, parts = mixed_loss(
                self.engine, batch, config,
                temperature=a.temperature, cliprange_value=a.cliprange_value, vf_coef=a.vf_coef,
                policy_denominator=denominators[a.loss_aggregation], tokens=tokens,
                rehearsal_denominator=max(1, counts[a.rehearsal_reduction]),
                sequence_means=a.loss_aggregation == "sequence_mean", grad_scale=self.engine.loss_scale,
            )  # fmt: skip
            largest = max(largest, float(parts.pop("max_log_ratio")))
            for name, part in parts.items():
                metrics[name] = metrics.get(name, 0.0) + float(part)
            if i == len(micros) - 1 and (most := self.recipe.guard.max_update_kl) is not None:
                too_far = not sum_over_ranks([metrics["approx_kl"]])[0] <= most  # NaN is too far
            self.engine.backward(loss, drop=too_far)
            if batch.squares is not None:
                squares = [a + b for a, b in zip(squares, batch.squares.tolist(), strict=True)]
            moved = self.engine.step()
        metrics = dict(zip(metrics, sum_over_ranks(metrics.values()), strict=True))
        if self.rehearsal:
            policys, rehearsals = (square**0.5 for square in sum_over_ranks(squares))
            metrics["rehearsal_share"] = rehearsals / (policys + rehearsals) if rehearsals else 0.0
        return metrics | {"max_log_ratio": max_over_ranks([largest])[0]}, moved, too_far

    @property
    def rehearsal_rows(self) -> int:
        """Rehearsal sequences of an optimiser step, over all ranks."""
        return (
            self.arguments.per_device_rehearsal_batch_size * world_size() * self.accumulation if self.rehearsal else 0
        )

    def _rehearsal(self, step: int, epoch: int, number: int) -> list[Encoded]:
        """The rehearsal sequences of one optimiser step, over all ranks (every rank draws the same list)."""
        draws, sequences = self.rehearsal_rows // self.drawn_together, list[Encoded]()
        for draw in range(number * draws, (number + 1) * draws):
            seed, size = stream_seed(self.seed, "rehearsal", step, epoch, draw), (self.drawn_together,)
            generator = torch.Generator(device="cpu").manual_seed(seed)
            rows = torch.randint(len(self.rehearsal), size, generator=generator, dtype=torch.int64, device="cpu")
            sequences += [self.rehearsal[i] for i in rows.tolist()]
        return sequences

    def of_groups(self, experiences: Sequence[Experience]) -> dict[str, float]:
        """Figures of the step's groups over all ranks, by the scorer's own scores."""
        scores = self._of_all_ranks([e.raw_score for e in experiences])
        lengths = self._of_all_ranks([float(len(e.encoded.response)) for e in experiences])
        return group_metrics(scores, lengths, self.groups)

    # -- around the algorithm ------------------------------------------------------------------------------------------

    def watch(
        self, prompts: Sequence[EncodedPrompt], experiences: Sequence[Experience], metrics: dict[str, float], step: int
    ) -> None:
        """Show the guard the step's figures, and each task's scores in the order of the global batch.

        Raises:
            KLTooHigh: see :meth:`StabilityGuard.look`; on every rank.
        """
        scores = [
            (place, prompt.row.task, e.raw_score)
            for place, prompt, e in zip(self.places, prompts, experiences, strict=True)
            if prompt.row.task
        ]
        self.guard.look(step + 1, metrics, [row[1:] for row in sorted(chain(*gather_objects(scores)))])

    def show(self, prompts: Sequence[EncodedPrompt], step: int, tracker: Tracker) -> None:
        """Answer fixed prompts, with the same draws every time, and keep the answers and their scores."""
        seeds = [stream_seed(self.seed, "samples", i) for i in range(len(prompts))]
        rollouts = self.rollouts.sample([p.ids for p in prompts], self.sampling, seeds=seeds)
        observed, _ = self.rewarded(prompts, rollouts, self.observe(rollouts), step)
        rows = [
            {
                "prompt": prompt.row.prompt, "task": prompt.row.task, "response": rollout.text,
                "score": experience.score, "length": len(rollout.encoded.response), "finished": rollout.finished,
            }
            for prompt, rollout, experience in zip(prompts, rollouts, observed, strict=True)
        ]  # fmt: skip
        tracker.sample(step, rows)

    def state(self) -> dict[str, Any]:
        """What goes on from step to step beside the weights, ready for JSON."""
        moments = self.moments
        return {
            "moments": [moments.count, moments.mean, moments.m2] if moments else None,
            "kl": [self.kl.value, self.kl.target], "kl_target": self.arguments.kl_target,
            "rehearsal_coef": self.dose.value, "guard": self.guard.state(), "drawn_together": self.drawn_together,
            "first_gap": self.first_gap,
        }  # fmt: skip

    def _resume(self, loop: Loop) -> None:
        """Take up what :meth:`state` gave."""
        carried = loop.carried
        # What is led goes on from where it was; what is a setting is the one given now.
        if self.kl.target is not None:
            self.kl.value, target = carried["kl"]
            if carried.get("kl_target", self.kl.target) == self.kl.target:  # else it is another one now
                self.kl.target = target
        if self.dose.target is not None:
            self.dose.value = carried.get("rehearsal_coef", self.dose.value)
        self.drawn_together = carried.get("drawn_together", self.drawn_together)
        self.first_gap = carried.get("first_gap")
        self.guard.restore(carried["guard"], loop.tracker.history)
        if self.moments is not None:
            self.moments.count, self.moments.mean, self.moments.m2 = carried["moments"]

    def _kept(self) -> list[Kept]:
        if not self.rehearsal:
            return []
        remedy = "choose per_device_rehearsal_batch_size in proportion to per_device_train_batch_size"
        return [Kept("rehearsal sequences an update", self.rehearsal_rows, remedy)]

    def save_stopped(self, folder: Path) -> Path:
        """Save the policy of a stage that the guard stops, beside the stage's folder: the next attempt may begin that
        one again. It takes the place of the one before when it is whole."""
        stopped = folder.with_name(folder.name.removesuffix(".tmp") + "-stopped")
        working = stopped.with_name(stopped.name + ".tmp")
        if is_main_process():
            shutil.rmtree(working, ignore_errors=True)
        save_policy(self.engine, self.policy, self.tokenizer, working)
        if is_main_process():
            shutil.rmtree(stopped, ignore_errors=True)
            working.rename(stopped)
        barrier()  # the error that follows ends all processes
        return stopped
