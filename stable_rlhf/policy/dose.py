"""How much rehearsal beside PPO: gamma of arXiv 2309.10202, eq. 9, led by what it does to the gradient."""

from __future__ import annotations

import math

_FASTEST = 1.5  # by what factor a step may change gamma
_WIDEST = 100.0  # by what factor gamma may leave where it began


class RehearsalController:
    """gamma: constant without a ``target``, else led so that rehearsal's share of the gradient is that.

    The share is s = gamma R / (P + gamma R), P and R the norms of the two terms' gradients, so s / (1 - s) is in
    proportion to gamma. After each step

        gamma <- gamma * sqrt(target / (1 - target) * (1 - s) / s),

    by a factor of at most 1.5 either way, and never beyond 100 times, or a hundredth of, where it began: what is
    remembered has next to no gradient, and to hold a share of nothing gamma would grow without end.
    """

    def __init__(self, rehearsal_coef: float, target: float | None = None) -> None:
        if target is not None and not rehearsal_coef > 0:
            raise ValueError(f"rehearsal_target needs a rehearsal_coef above 0 to begin with, got {rehearsal_coef:g}")
        self.value, self.target, self._first = rehearsal_coef, target, rehearsal_coef

    def update(self, share: float) -> None:
        """Take up the share of a step's gradient, from 0 to 1."""
        if self.target is None or not math.isfinite(share):  # what is not finite asks for nothing
            return
        wanted = self.target / (1 - self.target) * (1 - share)
        factor = _FASTEST if wanted >= _FASTEST**2 * share else max(math.sqrt(wanted / share), 1 / _FASTEST)
        self.value = min(max(self.value * factor, self._first / _WIDEST), self._first * _WIDEST)
