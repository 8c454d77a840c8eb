"""The adaptive KL coefficient of Ziegler et al. (arXiv 1909.08593, section 2.2)."""

from __future__ import annotations

import math

_GAIN, _MOST = 0.1, 0.2  # K_beta and the bound on the error, both as published


class KLController:
    """beta of the reward's KL penalty: constant without a ``target``, else led towards it.

    After each step, with KL in nats a response:  e = clip(KL / target - 1, -0.2, 0.2),  beta <- beta * (1 + 0.1 e).
    """

    def __init__(self, kl_coef: float, target: float | None = None) -> None:
        if target is not None and not kl_coef > 0:
            raise ValueError(f"kl_target needs a kl_coef above 0 to begin with, got {kl_coef:g}")
        self.value, self.target = kl_coef, target

    def update(self, kl: float) -> None:
        """Take up the mean KL of a step's responses."""
        if self.target is not None and math.isfinite(kl):  # what is not finite asks for nothing
            error = kl / self.target - 1
            self.value *= 1 + _GAIN * max(-_MOST, min(_MOST, error))

    def lower_target(self) -> None:
        """Ask for half the KL from now on."""
        if self.target is not None:
            self.target *= 0.5
