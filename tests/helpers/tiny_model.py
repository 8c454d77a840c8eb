"""Untrained models whose outputs are far from uniform."""

from __future__ import annotations

from typing import Any

import torch


@torch.no_grad()
def redraw(model: Any, scale: float, generator: torch.Generator) -> Any:
    """The same model with every matrix drawn anew, ``scale`` its standard deviation."""
    for parameter in model.parameters():
        if parameter.ndim > 1:
            parameter.copy_(scale * torch.randn(parameter.shape, generator=generator))
    return model
