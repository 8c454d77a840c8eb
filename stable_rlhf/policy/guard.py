"""Watches a PPO run's own figures and says what looks wrong, what it means, and what to try."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

from stable_rlhf.settings.recipe import GuardArguments
from stable_rlhf.show.progress import say

_REMEMBERED = 20  # steps that the present one is held against
_QUIET = 20  # steps before the same warning is given again
_SCORES = 32  # of a task: as many of its first are held against as many of its last


class KLTooHigh(ArithmeticError):
    """Training was stopped: the policy has moved further from the initial one than ``guard.max_kl``."""


Row = dict[str, float]


@dataclass(frozen=True)
class _Rule:
    name: str
    broken: Callable[[Row, list[Row]], bool]
    advice: str


def _median(rows: list[Row], name: str) -> float:
    values = [row[name] for row in rows if name in row]  # a step whose every update was left out has fewer metrics
    return statistics.median(values) if values else 0.0


def _drop(now: Row, before: list[Row], name: str, factor: float) -> bool:
    return len(before) >= 5 and name in now and now[name] < factor * _median(before, name)


def _jump(now: Row, before: list[Row], name: str, factor: float) -> bool:
    return len(before) >= 5 and now.get(name, 0.0) > factor * _median(before, name) > 0


def _lasting(now: Row, before: list[Row], name: str) -> float:
    """Median of the last five steps; 0 while there are fewer."""
    return _median([*before[-4:], now], name) if len(before) >= 4 else 0.0


_RULES = (
    _Rule(
        "clip_fraction", lambda now, _: now.get("clip_fraction", 0) > 0.4,
        "most updates are clipped, so the batch teaches little: lower learning_rate or num_ppo_epochs",
    ),
    _Rule(
        "approx_kl", lambda now, _: now.get("approx_kl", 0) > 0.1,
        "one update moves the policy far from the one that sampled: lower learning_rate, raise rollout_batch_size, or "
        "set guard.max_update_kl",
    ),
    _Rule(
        "max_log_ratio", lambda now, _: now.get("max_log_ratio", 0) > 5,
        "within one step some token became over a hundred times more or less likely: lower learning_rate or "
        "num_ppo_epochs; where logprob_gap is large too, the rollout engine holds other weights",
    ),
    _Rule(
        "entropy", lambda now, before: _drop(now, before, "entropy", 0.3),
        "the policy is collapsing onto few responses: raise kl_coef or entropy_coef, or add rehearsal",
    ),
    _Rule(
        "entropy", lambda now, before: _jump(now, before, "entropy", 2.0),
        "the policy is turning into noise: lower learning_rate or entropy_coef, raise kl_coef",
    ),
    _Rule(
        "length", lambda now, before: _jump(now, before, "length", 1.8)
        and "score" in now and now["score"] > _median(before, "score"),
        "the score rises with the length: the scorer may pay for length alone; look at samples, raise kl_coef",
    ),
    _Rule(
        "score_length_correlation", lambda now, before: _lasting(now, before, "score_length_correlation") > 0.6,
        "longer responses of a batch have scored higher for steps: the scorer may pay for length alone; look at "
        "samples, train the scorer on pairs of like lengths, or raise missing_eos_penalty",
    ),
    _Rule(
        "finished", lambda now, _: now.get("finished", 1) < 0.5,
        "fewer than half of the responses end by themselves: raise max_new_tokens or missing_eos_penalty",
    ),
    _Rule(
        "gradient_norm", lambda now, before: _jump(now, before, "gradient_norm", 20.0),
        "the gradient is twenty times its usual size: look at this step's data; lower max_grad_norm",
    ),
    _Rule(
        "kl", lambda now, before: _lasting(now, before, "kl") < -1,
        "it cannot be negative for responses that the policy sampled: their distribution is not the trainer's. Look at "
        "logprob_gap, temperature and top_p",
    ),
    _Rule(
        "logprob_gap", lambda now, _: now.get("logprob_gap", 0) > 0.05,
        "rollout engine and trainer disagree on the probability of the same tokens: start a vLLM server with "
        "--logprobs-mode processed_logprobs, use one dtype in both and top_p 1; or set ppo.rollout_importance_clip 2",
    ),
    _Rule(
        "rollout_ratio_max", lambda now, _: now.get("rollout_ratio_max", 1) > 10,
        "for some token the trainer is over ten times more certain than the rollout engine that drew it: one dtype in "
        "both, the present weights in both; ppo.rollout_importance_clip 2 bounds what such a token weighs",
    ),
    _Rule(
        "rollout_ratio_min", lambda now, _: now.get("rollout_ratio_min", 1) < 0.1,
        "some token that the rollout engine drew has less than a tenth of its probability in the trainer: one dtype in "
        "both, the present weights in both, top_p 1",
    ),
    _Rule(
        "groups_without_signal", lambda now, before: _lasting(now, before, "groups_without_signal") > 0.5,
        "the responses to most prompts all score the same, and teach nothing: leave out prompts that are too easy or "
        "too hard, raise num_generations or temperature, or set ppo.dynamic_sampling 3",
    ),
    _Rule(
        "group_score_std", lambda now, before: _drop(now, before, "group_score_std", 0.3),
        "responses to one prompt score ever more alike, and grpo divides by what is left: look whether entropy falls "
        "too; raise temperature, or choose ppo.advantage_estimator dr_grpo or rloo",
    ),
    _Rule(
        "group_length_correlation", lambda now, before: _lasting(now, before, "group_length_correlation") > 0.6,
        "of the responses to one prompt the longer ones have scored higher for steps: the reward may pay for length "
        "alone; look at samples, set ppo.overlong_buffer, or train the scorer on pairs of like lengths",
    ),
    _Rule(
        "rehearsal_share", lambda now, before: 0 < _lasting(now, before, "rehearsal_share") < 0.01,
        "rehearsal pulls with less than a hundredth of the gradient, so it holds nothing: raise ppo.rehearsal_coef ten "
        "times, or more, or set ppo.rehearsal_target 0.35",
    ),
    _Rule(
        "skipped_updates", lambda now, _: now.get("skipped_updates", 0) > 0,
        "updates of this step that were left out, the weights untouched: look at this step's data; lower learning_rate",
    ),
)  # fmt: skip


class TaskDrift:
    """How each task's mean score has moved since the start, beside the median task.

    A policy that learns one task at the cost of another shows here before it shows in any mean."""

    def __init__(self) -> None:
        self.scores: dict[str, list[float]] = {}  # of a task: its first scores, then its last ones

    def add(self, scores: Iterable[tuple[str, float]]) -> None:
        """Take up (task, score) of a step, in an order that does not depend on the ranks; scores are finite."""
        for task, score in scores:
            kept = self.scores.setdefault(task, [])
            kept.append(score)
            if len(kept) > 2 * _SCORES:
                del kept[_SCORES]

    def worst(self, spread: float) -> tuple[str, float]:
        """The task that moved furthest from the median task's movement, in units of ``spread`` (standard deviation of
        the scores) and with its sign; ("", 0.0) while fewer than three tasks have been seen often enough."""
        moved = {
            task: statistics.fmean(kept[_SCORES:]) - statistics.fmean(kept[:_SCORES])
            for task, kept in self.scores.items() if len(kept) == 2 * _SCORES
        }  # fmt: skip
        if len(moved) < 3 or not spread > 0:
            return "", 0.0
        middle = statistics.median(moved.values())
        task = max(sorted(moved), key=lambda t: abs(moved[t] - middle))
        return task, (moved[task] - middle) / spread


class StabilityGuard:
    """``guard.look(step, metrics)`` after each step of PPO.

    A figure that is not finite is a warning by itself, whichever it is, and no rule sees it: every comparison with NaN
    is false, and a median with one says nothing for twenty steps.
    Warnings go to standard error, each at most every 20 steps, and are kept in ``warnings`` as (step, name, text).
    ``lower_kl_target`` is called where ``guard.on_kl`` asks for that.
    """

    def __init__(self, arguments: GuardArguments, lower_kl_target: Callable[[], None] | None = None) -> None:
        self.arguments, self.lower_kl_target = arguments, lower_kl_target
        self.warnings: list[tuple[int, str, str]] = []
        self.drift = TaskDrift()
        self._before: list[Row] = []

    def state(self) -> dict[str, Any]:
        """What a snapshot keeps of the guard, ready for JSON; the metrics are the tracker's to remember."""
        return {"warnings": self.warnings, "scores": self.drift.scores}

    def restore(self, state: dict[str, Any], history: list[Row]) -> None:
        """Go on from :meth:`state` and the metrics of the steps before."""
        self.warnings = [(int(step), str(name), str(text)) for step, name, text in state["warnings"]]
        self.drift.scores = {task: list(kept) for task, kept in state["scores"].items()}
        self._before = [{k: v for k, v in row.items() if math.isfinite(v)} for row in history[-_REMEMBERED:]]

    def look(self, step: int, metrics: Row, task_scores: Iterable[tuple[str, float]] = ()) -> None:
        """Warn about what looks wrong; ``task_scores`` are (task, score) of the step's responses.

        Raises:
            KLTooHigh: ``metrics["kl"]`` (nats a response) is above ``guard.max_kl`` and ``guard.on_kl`` is ``stop``.
        """
        limit = self.arguments.max_kl
        if limit is not None and not metrics["kl"] <= limit:  # NaN is no KL that is low enough
            text = (
                f"KL to the initial policy is {metrics['kl']:.1f} nats a response, above guard.max_kl {limit:g}: the "
                "score of such text says little; raise kl_coef, lower learning_rate, or take an earlier snapshot"
            )
            if self.arguments.on_kl == "stop":
                raise KLTooHigh(f"stopped after step {step}: {text}")
            if self._warn(step, "max_kl", text) and self.arguments.on_kl == "lower_target" and self.lower_kl_target:
                self.lower_kl_target()
        finite = {name: value for name, value in metrics.items() if math.isfinite(value)}
        for name in sorted({*metrics} - {*finite}):
            self._warn_nonfinite(step, name, metrics[name])
        for rule in _RULES:
            # A step may lack a metric, or have it as no number: what went before is told of by the next that has it.
            if rule.name in finite and rule.broken(finite, self._before):
                self._warn(step, rule.name, f"{rule.name} is {finite[rule.name]:.3g}: {rule.advice}")
        known = list(task_scores)
        for task, score in known:
            if not math.isfinite(score):
                self._warn_nonfinite(step, f"the score of task {task!r}", score)
        self.drift.add((task, score) for task, score in known if math.isfinite(score))
        task, moved = self.drift.worst(finite.get("score_std", 0.0))
        if abs(moved) > 1:
            self._warn(
                step, "task_drift",
                f"since the start the score of task {task!r} has moved {moved:+.1f} standard deviations against the "
                "median task: the policy gains on some tasks at the cost of others. Look at that task's samples, "
                "rehearse it, or give it more prompts",
            )  # fmt: skip
        self._before = [*self._before, finite][-_REMEMBERED:]

    def _warn_nonfinite(self, step: int, name: str, value: float) -> None:
        self._warn(
            step, f"{name}, not finite",
            f"{name} is {value}, so nothing can be said about it: look at this step's data; where logprob_gap is not "
            "finite either, at the rollout engine",
        )  # fmt: skip

    def _warn(self, step: int, name: str, text: str) -> bool:
        """Warn, unless that was done not long ago."""
        last = max((at for at, known, _ in self.warnings if known == name), default=-_QUIET)
        if step - last < _QUIET:
            return False
        self.warnings.append((step, name, text))
        say(f"  WARNING, step {step}: {text}")
        return True
