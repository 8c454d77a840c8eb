"""Scorers: the Advantage Model of arXiv 2309.10202 and the plain reward model it is compared with."""

from stable_rlhf.scorer.model import AdvantageModel, ScorerSettings

__all__ = ["AdvantageModel", "ScorerSettings"]
