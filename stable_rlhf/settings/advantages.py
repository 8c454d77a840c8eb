"""Settings of PPO about advantages, groups and the loss that do not go together: refused before the first step."""

from __future__ import annotations

from stable_rlhf.settings.stages import GROUP_RELATIVE, PPOArguments

_CRITICS = ("head_learning_rate", "cliprange_value", "vf_coef", "lam")


def check_advantages(ppo: PPOArguments) -> None:
    """Refuse what an estimator, an objective or a place of the KL penalty cannot use.

    Raises:
        ValueError: names the setting, what it takes and what it got.
    """
    estimator, default = ppo.advantage_estimator, PPOArguments()
    if estimator in GROUP_RELATIVE and ppo.num_generations < 2:
        raise ValueError(
            f"ppo.num_generations must be at least 2 for ppo.advantage_estimator {estimator!r}, which holds responses "
            f"to one prompt against each other, got {ppo.num_generations}"
        )
    if estimator != "gae":
        for name in _CRITICS + (() if estimator == "reinforce_plus_plus" else ("gamma",)):
            if getattr(ppo, name) != getattr(default, name):
                raise ValueError(
                    f"ppo.{name} {getattr(ppo, name)} says nothing to ppo.advantage_estimator {estimator!r}: leave it "
                    "out, or choose 'gae'"
                )
    if estimator == "reinforce_plus_plus" and not ppo.whiten_advantages:
        raise ValueError(
            "ppo.whiten_advantages false: 'reinforce_plus_plus' is whitened returns; ppo.advantage_estimator 'score' "
            "can do without"
        )
    if ppo.advantage_scale == "batch" and estimator != "grpo":
        raise ValueError(f"ppo.advantage_scale 'batch' needs ppo.advantage_estimator 'grpo', got {estimator!r}")
    _check_groups(ppo)
    if ppo.overlong_buffer > ppo.max_new_tokens:
        raise ValueError(
            f"ppo.overlong_buffer must be at most ppo.max_new_tokens {ppo.max_new_tokens}, got {ppo.overlong_buffer}"
        )
    if ppo.kl_in == "loss" and ppo.kl_estimator == "k1":
        raise ValueError(
            "ppo.kl_in 'loss' needs ppo.kl_estimator 'k2' or 'k3': the gradient of 'k1' is 0 in expectation"
        )
    if ppo.kl_unbiased and ppo.kl_in != "loss":
        raise ValueError("ppo.kl_unbiased true needs ppo.kl_in 'loss': in the reward there is no gradient to weigh")
    if ppo.dual_clip is not None and ppo.objective != "ppo":
        raise ValueError(f"ppo.dual_clip needs ppo.objective 'ppo', got {ppo.objective!r}")
    if ppo.dual_clip is not None and ppo.dual_clip <= 1:
        raise ValueError(f"ppo.dual_clip must be above 1, got {ppo.dual_clip:g}")


def _check_groups(ppo: PPOArguments) -> None:
    """Groups are whole in a mini-batch, so that no group is in two optimiser steps of a pass."""
    if ppo.num_generations > 1 and ppo.rollout_batch_size % (ppo.num_generations * ppo.num_mini_batches):
        raise ValueError(
            f"ppo.rollout_batch_size {ppo.rollout_batch_size} must be a multiple of num_generations "
            f"{ppo.num_generations} x num_mini_batches {ppo.num_mini_batches} = "
            f"{ppo.num_generations * ppo.num_mini_batches}: a mini-batch has whole groups"
        )
    if ppo.dynamic_sampling and ppo.num_generations < 2:
        raise ValueError(
            "ppo.dynamic_sampling needs groups: set ppo.num_generations to 2 or more, or leave it out, got "
            f"num_generations {ppo.num_generations}"
        )
