"""Estimators of advantages beside those of a framework, in an environment that has it: `estimators_worker.py NAME`."""

from __future__ import annotations

import inspect
import sys
import textwrap
from types import SimpleNamespace

import torch

from stable_rlhf.policy import estimators

GROUP, TOKENS = 4, 7


def drawn() -> tuple[torch.Tensor, torch.Tensor]:
    """Scores and groups: of one the scores are all equal, of another nearly."""
    scores = 3 * torch.randn(6 * GROUP, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    scores[:GROUP], scores[GROUP : 2 * GROUP] = 1.5, 1.5 + 1e-3 * scores[GROUP : 2 * GROUP]
    return scores, torch.arange(len(scores)) // GROUP


def agree(name: str, ours: torch.Tensor, theirs: torch.Tensor, other: torch.Tensor, rtol: float = 1e-9) -> None:
    """Negative control: another estimator of ours does not."""
    torch.testing.assert_close(ours, theirs.double(), rtol=rtol, atol=1e-9, msg=lambda text: f"{name}: {text}")
    assert not torch.allclose(other, theirs.double(), rtol=1e-3), name
    print(f"{name}: largest difference {float((ours - theirs).abs().max()):.1e}")


def of_trl() -> str:
    """The lines of GRPOTrainer that make advantages of rewards, as they stand there."""
    import trl
    from trl.trainer import grpo_trainer

    source = inspect.getsource(grpo_trainer.GRPOTrainer._generate_and_score_completions)
    start = source.index("        unscorable_mask = torch.isnan(rewards_per_func)")
    end = source.index("        # Slice to keep only the local part of the data", start)
    lines = compile(textwrap.dedent(source[start:end]), "trl", "exec")
    scores, groups = drawn()
    for scale, ours, other in (
        ("group", estimators.grpo(scores, groups, eps=1e-4), estimators.dr_grpo(scores, groups)),
        ("batch", estimators.grpo(scores, groups, scale="batch", eps=1e-4), estimators.grpo(scores, groups, eps=1e-4)),
        ("none", estimators.dr_grpo(scores, groups), estimators.rloo(scores, groups)),
    ):
        trainer = SimpleNamespace(
            scale_rewards=scale, multi_objective_aggregation="sum_then_normalize", reward_weights=torch.ones(1).double()
        )
        found = {
            "torch": torch, "nanstd": grpo_trainer.nanstd, "self": trainer, "device": torch.device("cpu"),
            "num_generations": GROUP, "rewards_per_func": scores[:, None],
        }  # fmt: skip
        exec(lines, found)
        agree(f"scale_rewards {scale}", ours, found["advantages"], other, rtol=6e-8)  # n / (n - 1) is float32 there
    return trl.__version__


def of_verl() -> str:
    import verl
    from verl.trainer.ppo import core_algos

    scores, groups = drawn()
    lengths = torch.randint(1, TOKENS + 1, scores.shape, generator=torch.Generator().manual_seed(1))
    mask = (torch.arange(TOKENS) < lengths[:, None]).double()  # [B, L]
    at_end = torch.zeros_like(mask)
    at_end[torch.arange(len(scores)), lengths - 1] = scores
    index = groups.numpy()

    def of_response(advantages: torch.Tensor) -> torch.Tensor:
        """[B]; the same for each of a response's tokens."""
        assert torch.equal(advantages, advantages[:, :1] * mask)
        return advantages[:, 0]

    for scaled, ours, other in (
        (True, estimators.grpo(scores, groups), estimators.grpo(scores, groups, scale="batch")),
        (False, estimators.dr_grpo(scores, groups), estimators.rloo(scores, groups)),
    ):
        theirs, _ = core_algos.compute_grpo_outcome_advantage(at_end, mask, index, norm_adv_by_std_in_grpo=scaled)
        agree(f"grpo, by the standard deviation: {scaled}", ours, of_response(theirs), other)
    theirs, _ = core_algos.compute_rloo_outcome_advantage(at_end, mask, index)
    agree("rloo", estimators.rloo(scores, groups), of_response(theirs), estimators.dr_grpo(scores, groups))
    penalty = 0.1 * torch.randn(mask.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    rewards, valid = (at_end - penalty) * mask, mask.bool()
    bounds = torch.cat([torch.zeros(1, dtype=torch.int64), lengths.cumsum(0)])
    for gamma in (1.0, 0.9):
        theirs, returns = core_algos.compute_reinforce_plus_plus_outcome_advantage(
            rewards, mask, SimpleNamespace(gamma=gamma)
        )
        advantage, ours = estimators.reinforce_plus_plus(rewards[valid], bounds, gamma=gamma)
        agree(f"reinforce_plus_plus, gamma {gamma}, returns", ours, returns[valid], rewards[valid])
        n = len(ours)  # theirs whitens by the variance over n - 1
        agree("... advantages", advantage * ((n - 1) / n) ** 0.5, theirs[valid], advantage * ((n - 1) / n))
    return verl.__version__


if __name__ == "__main__":
    print(sys.argv[1], {"trl": of_trl, "verl": of_verl}[sys.argv[1]]())
