"""Scorers: the Advantage Model of arXiv 2309.10202 and the plain reward model it is compared with."""

from stable_rlhf.system.extras import require

require("stable_rlhf.scorer", "transformers", "safetensors")

from stable_rlhf.scorer.model import AdvantageModel, ScorerSettings  # noqa: E402  after the look

__all__ = ["AdvantageModel", "ScorerSettings"]
