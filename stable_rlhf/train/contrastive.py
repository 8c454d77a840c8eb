"""The contrastive options of train-scorer: from settings to the module, and the dropout masks of a batch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from stable_rlhf.engine.order import stream_seed
from stable_rlhf.ranks import world_size
from stable_rlhf.scorer.contrastive import Contrastive
from stable_rlhf.scorer.model import AdvantageModel
from stable_rlhf.settings.stages import ScorerArguments


@dataclass(frozen=True)
class ContrastiveTerm:
    """What the trainer adds to its loss: ``coefficient`` times the loss of the model's ``contrastive`` module."""

    coefficient: float
    dropout: float
    width: int
    seed: int

    def views(self, step: int, places: Sequence[int], lengths: Sequence[int]) -> tuple[float, Tensor]:
        """The coefficient, and two dropout masks [2, R, H] for the responses of comparisons at ``places`` of a step's
        batch, ``lengths`` of them each. Masks follow from seed, step and place alone: a resumed run, and any number of
        ranks, draws the same."""
        masks = []
        for place, length in zip(places, lengths, strict=True):
            generator = torch.Generator(device="cpu").manual_seed(stream_seed(self.seed, "views", step, place))
            drawn = torch.rand(2, length, self.width, generator=generator, dtype=torch.float32, device="cpu")
            masks.append(drawn >= self.dropout)
        return self.coefficient, torch.cat(masks, dim=1) / (1 - self.dropout)


def contrastive_term(model: AdvantageModel, arguments: ScorerArguments, seed: int) -> ContrastiveTerm | None:
    """Give ``model`` the module that the settings ask for, and return how it is used; None without one."""
    if arguments.contrastive == "none":
        return None
    swav, differences = arguments.contrastive == "swav", arguments.contrastive_on == "differences"
    temperature, coefficient, prototypes = (0.1, 0.5 if differences else 0.1, 20 if differences else 50)
    if not swav:
        temperature, coefficient, prototypes = 0.05, 1.0, 0
    model.contrastive = Contrastive(
        model.trunk.hidden_size,
        num_prototypes=(arguments.swav_prototypes or prototypes) if swav else 0,
        differences=differences,
        temperature=_or(arguments.contrastive_temperature, temperature),
        seed=stream_seed(seed, "prototypes"),
        process_group=dist.group.WORLD if world_size() > 1 else None,
    )
    coefficient = _or(arguments.contrastive_coef, coefficient)
    return ContrastiveTerm(coefficient, arguments.contrastive_dropout, model.trunk.hidden_size, seed)


def _or(given: float | None, default: float) -> float:
    return default if given is None else given
