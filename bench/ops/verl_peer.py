"""verl's functions as peers. They lie in `build/peers/verl` (`make bench-peers`), or are installed.

A missing verl, or something that its import asks for, is an ImportError when a contender is made, and so listed.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from bench.common import Step, find_peers
from bench.ops.problem import POLICY, REHEARSAL, Problem, with_gradients

HEAD, LOSS, GAE = "FusedLinearForPPO", "compute_policy_loss_vanilla", "compute_gae_advantage_return"


def _make_importable() -> None:
    find_peers()
    os.environ["VERL_USE_EXTERNAL_PLUGINS"] = "none"  # of which ours is one: the peer is verl's own code


def logprob() -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    """Chunks of 512 rows in plain PyTorch, made again in the backward, with the entropy of every row."""
    _make_importable()
    from verl.utils.experimental.torch_functional import FusedLinearForPPO

    head = FusedLinearForPPO(impl_backend="torch")

    def of(hidden: Tensor, weight: Tensor, target: Tensor) -> Tensor:
        outputs: tuple[Tensor, Tensor] = head(hidden, weight, target)
        return outputs[0]

    return of


def _core() -> ModuleType:
    _make_importable()
    from verl.trainer.ppo import core_algos

    return core_algos


def _actor(problem: Problem) -> Any:
    from verl.workers.config import ActorConfig

    return ActorConfig(
        strategy="fsdp", rollout_n=1, use_dynamic_bsz=True, clip_ratio_low=problem.config.clip_low,
        clip_ratio_high=problem.config.clip_high,
        # Its clip is always dual. A bound that no ratio reaches, since log-ratios are held within 20, leaves PPO's.
        clip_ratio_c=math.exp(21.0),
    )  # fmt: skip


def policy(problem: Problem) -> Step:
    """verl's fused head and its PPO loss over whole sequences with a mask; the metrics that it reads on the way
    (`.item()`) belong to its time. Rehearsal rows have no place in that loss: they are its mean over tokens of the
    negative log-probs of the same head."""
    core, head, actor, config = _core(), logprob(), _actor(problem), problem.config
    shape = (problem.sequences, -1)
    masks = [(problem.kind == kind).float().view(shape) for kind in (POLICY, REHEARSAL)]
    old, advantage = problem.old_logprob.view(shape), problem.advantage.view(shape)
    has_policy, has_rehearsal = (bool(mask.any()) for mask in masks)

    def loss_of(hidden: Tensor, weight: Tensor) -> Tensor:
        here = head(hidden, weight, problem.target).view(shape)
        loss = here.new_zeros(())
        if has_policy:
            loss = loss + core.compute_policy_loss_vanilla(old, here, advantage, masks[0], "token-mean", actor)[0]
        if has_rehearsal:
            loss = loss + config.rehearsal_coef * core.agg_loss(-here, masks[1], "token-mean")
        return loss

    return with_gradients(loss_of, problem.hidden, problem.weight)


def gae() -> Callable[[Tensor, Tensor, float, float], tuple[Tensor, Tensor]]:
    """Advantages and returns of full sequences [S, L]. verl gives its advantages whitened, within the same function:
    those before are its returns less the values."""
    core = _core()

    def of(reward: Tensor, value: Tensor, gamma: float, lam: float) -> tuple[Tensor, Tensor]:
        _, returns = core.compute_gae_advantage_return(reward, value, torch.ones_like(reward), gamma, lam)
        return returns - value, returns

    return of
