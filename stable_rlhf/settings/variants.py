"""The policies that a run can train and compare, a row each: a new combination is a row of this table."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from stable_rlhf.settings.stages import SCORER, EstimatorName, PPOArguments, RewardArguments

_METHODS: dict[EstimatorName, str] = {
    "gae": "PPO", "grpo": "GRPO", "dr_grpo": "Dr. GRPO", "rloo": "RLOO", "reinforce_plus_plus": "REINFORCE++",
    "score": "critic-free PPO",
}  # fmt: skip


@dataclass(frozen=True)
class Variant:
    """How one policy is trained.

    Args:
        name: As recipes, folders and summaries have it.
        label: As reports have it.
        colour: As pictures have it.
        scorer: Reward model (``rm``) or Advantage Model (``am``); with rehearsal it scores the candidates as well.
        training: ``ppo``, or ``rejection`` sampling.
        advantages: Its estimator of advantages; None: ``ppo.advantage_estimator``.
        rehearsal: Whether selected responses of the initial policy are rehearsed.
        moving_average: Whether scores are normalised by their moving average.
    """

    name: str
    label: str
    colour: str
    scorer: Literal["rm", "am"]
    training: Literal["ppo", "rejection"] = "ppo"
    advantages: EstimatorName | None = None
    rehearsal: bool = False
    moving_average: bool = False

    def estimator(self, ppo: PPOArguments) -> EstimatorName:
        """Its estimator of advantages under these settings; ``gae`` alone has a critic."""
        return self.advantages or ppo.advantage_estimator

    def label_under(self, ppo: PPOArguments, rewards: RewardArguments) -> str:
        """Its label under these settings: by the method that their estimator makes of PPO, and without the scorer where
        no reward asks for one; that one still selects what is rehearsed."""
        if self.training != "ppo" or self.advantages is not None:
            return self.label
        label = self.label.replace("PPO", _METHODS[ppo.advantage_estimator])
        if SCORER in rewards.functions:
            return label
        label = label.removeprefix(f"{self.scorer.upper()}-")
        return f"{label} by {self.scorer.upper()}" if self.rehearsal else label


# In the order of reports.
VARIANTS = {
    row.name: row
    for row in (
        Variant("rejection", "Rejection sampling", "#7F7F7F", "rm", training="rejection"),
        Variant("rm", "RM-PPO", "#D55E00", "rm"),
        Variant("rm-ma", "RM-PPO w/ MA", "#E69F00", "rm", moving_average=True),
        Variant("rm-sr", "RM-PPO-SR", "#882255", "rm", rehearsal=True),
        Variant("am", "AM-PPO", "#0072B2", "am"),
        Variant("am-sr", "AM-PPO-SR", "#009E73", "am", rehearsal=True),
        Variant("am-critic-free", "AM, critic-free", "#56B4E9", "am", advantages="score"),
    )
}

if TYPE_CHECKING:
    VariantName = str
else:
    VariantName = Literal[tuple(VARIANTS)]


def scorers_that_select(variants: Iterable[Variant]) -> list[str]:
    """The scorers that choose rehearsal data for some of these variants."""
    return list(dict.fromkeys(v.scorer for v in variants if v.rehearsal))
