"""Watches a PPO run's own figures and says what looks wrong, what it means, and what to try."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from dataclasses import dataclass

from stable_rlhf.progress import say
from stable_rlhf.train.config import GuardArguments

_REMEMBERED = 20  # steps that the present one is held against
_QUIET = 20  # steps before the same warning is given again


class KLTooHigh(ArithmeticError):
    """Training was stopped: the policy has moved further from the initial one than ``guard.max_kl``."""


@dataclass(frozen=True)
class _Rule:
    name: str
    broken: Callable[[dict[str, float], list[dict[str, float]]], bool]
    advice: str


def _median(rows: list[dict[str, float]], name: str) -> float:
    return statistics.median(row[name] for row in rows)


def _drop(now: dict[str, float], before: list[dict[str, float]], name: str, factor: float) -> bool:
    return len(before) >= 5 and now[name] < factor * _median(before, name)


def _jump(now: dict[str, float], before: list[dict[str, float]], name: str, factor: float) -> bool:
    return len(before) >= 5 and now[name] > factor * _median(before, name) > 0


_RULES = (
    _Rule(
        "clip_fraction", lambda now, _: now["clip_fraction"] > 0.4,
        "most updates are clipped, so the batch teaches little: lower learning_rate or num_ppo_epochs",
    ),
    _Rule(
        "approx_kl", lambda now, _: now["approx_kl"] > 0.1,
        "one update moves the policy far from the one that sampled: lower learning_rate, or raise rollout_batch_size",
    ),
    _Rule(
        "entropy", lambda now, before: _drop(now, before, "entropy", 0.3),
        "the policy is collapsing onto few responses: raise kl_coef or entropy_coef, or add rehearsal",
    ),
    _Rule(
        "length", lambda now, before: _jump(now, before, "length", 1.8) and now["score"] > _median(before, "score"),
        "the score rises with the length: the scorer may pay for length alone; look at samples, raise kl_coef",
    ),
    _Rule(
        "finished", lambda now, _: now["finished"] < 0.5,
        "fewer than half of the responses end by themselves: raise max_new_tokens or missing_eos_penalty",
    ),
    _Rule(
        "gradient_norm", lambda now, before: _jump(now, before, "gradient_norm", 20.0),
        "the gradient is twenty times its usual size: look at this step's data; lower max_grad_norm",
    ),
)  # fmt: skip


class StabilityGuard:
    """``guard.look(step, metrics)`` after each step of PPO.

    Warnings go to standard error, each at most every 20 steps, and are kept in ``warnings`` as (step, name, text).
    """

    def __init__(self, arguments: GuardArguments) -> None:
        self.arguments = arguments
        self.warnings: list[tuple[int, str, str]] = []
        self._before: list[dict[str, float]] = []

    def look(self, step: int, metrics: dict[str, float]) -> None:
        """Warn about what looks wrong.

        Raises:
            KLTooHigh: ``metrics["kl"]`` (nats a response) is above ``guard.max_kl`` and ``guard.on_kl`` is ``stop``.
        """
        limit = self.arguments.max_kl
        if limit is not None and metrics["kl"] > limit:
            text = (
                f"KL to the initial policy is {metrics['kl']:.1f} nats a response, above guard.max_kl {limit:g}: the "
                "score of such text says little; raise kl_coef, lower learning_rate, or take an earlier snapshot"
            )
            if self.arguments.on_kl == "stop":
                raise KLTooHigh(f"stopped after step {step}: {text}")
            self._warn(step, "kl", text)
        for rule in _RULES:
            if rule.broken(metrics, self._before):
                self._warn(step, rule.name, f"{rule.name} is {metrics[rule.name]:.3g}: {rule.advice}")
        self._before = [*self._before, metrics][-_REMEMBERED:]

    def _warn(self, step: int, name: str, text: str) -> None:
        last = max((at for at, known, _ in self.warnings if known == name), default=-_QUIET)
        if step - last < _QUIET:
            return
        self.warnings.append((step, name, text))
        say(f"  WARNING, step {step}: {text}")
