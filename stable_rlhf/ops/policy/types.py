"""Constants, call, result and row kinds of the policy losses."""

from __future__ import annotations

import enum
import functools
import math
import warnings
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from stable_rlhf.ops.checks import check_choice, check_flag, check_not_negative, check_number, check_positive

IGNORE = -100
OBJECTIVES = ("ppo", "cispo", "reinforce")  # in the order of csrc/policy.h
KL_ESTIMATORS = ("k1", "k2", "k3", "abs", "k1+", "k2+", "k3+", "abs+")  # the first four are 1 to 4 in the kernels
LOGITS_TYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}  # LogitsType of csrc/policy.h


class Kind(enum.IntEnum):
    """What a row of a call is; csrc/policy.h and kernels.policy have the same numbers."""

    IGNORED = 0
    POLICY = 1
    REHEARSAL = 2


def check_softcap(softcap: float | None) -> None:
    if softcap is not None:
        check_positive("softcap", softcap)


@dataclass(frozen=True)
class PolicyLossConfig:
    """The constants of `linear_policy_loss` and `policy_loss`.

    Args:
        clip_low: the ratio is clipped below 1 - clip_low.
        clip_high: the ratio is clipped above 1 + clip_high.
        dual_clip: bound c > 1 on the loss of negative advantages, -c A at most (arXiv 1912.09729); None: off.
        kl_coef: coefficient of the KL towards `ref_logprob` in the loss.
        kl_estimator: "k1", "k2", "k3" (Schulman's) or "abs", the log-ratio's absolute value; k1's expected gradient on
            policy is 0, so it warns once. With a "+" behind it ("k3+") the value is that estimator's and the gradient
            k2's, which is that of the KL.
        entropy_coef: coefficient of the entropy bonus of policy tokens.
        rehearsal_coef: gamma of arXiv 2309.10202 eq. 9.
        softcap: logits become softcap tanh(logits / softcap) before the temperature; None: off.
        log_ratio_clamp: bound on the absolute value of every log-ratio before it is used.
        objective: "ppo": the clipped ratio times the advantage. "cispo" (arXiv 2506.13585): log pi times the advantage
            and the ratio, clipped on both sides and held constant. "reinforce": log pi times the advantage.
        importance_level: "token", or "sequence" (GSPO, arXiv 2507.18071): the log-ratio of each token is the mean over
            its sequence's policy tokens.
        kl_unbiased: the KL of samples from the old policy: its term times the ratio, with the gradient of both. Of an
            estimator with a "+" the gradient alone is multiplied, by the ratio held constant.
        kl_clamp: bound on the absolute value of the KL's estimate, beyond which its own gradient is 0; None: off.
        kl_ratio_max: the largest ratio that multiplies the gradient of an estimator with a "+"; None: no bound.
    """

    clip_low: float = 0.2
    clip_high: float = 0.2
    dual_clip: float | None = None
    kl_coef: float = 0.0
    kl_estimator: str = "k3"
    entropy_coef: float = 0.0
    rehearsal_coef: float = 0.01
    softcap: float | None = None
    log_ratio_clamp: float = 20.0
    objective: str = "ppo"
    importance_level: str = "token"
    kl_unbiased: bool = False
    kl_clamp: float | None = None
    kl_ratio_max: float | None = None

    def __post_init__(self) -> None:
        check_choice("kl_estimator", self.kl_estimator, KL_ESTIMATORS)
        check_choice("objective", self.objective, OBJECTIVES)
        check_choice("importance_level", self.importance_level, ("token", "sequence"))
        check_flag("kl_unbiased", self.kl_unbiased)
        for name in ("clip_low", "clip_high", "kl_coef", "entropy_coef", "rehearsal_coef", "log_ratio_clamp"):
            object.__setattr__(self, name, check_number(name, getattr(self, name)))
        for name in ("dual_clip", "softcap", "kl_clamp", "kl_ratio_max"):
            if getattr(self, name) is not None:
                object.__setattr__(self, name, check_number(name, getattr(self, name)))
        if not 0.0 <= self.clip_low <= 1.0:
            raise ValueError(f"clip_low: {self.clip_low} is outside [0, 1]")
        if not self.clip_high >= 0.0:
            raise ValueError(f"clip_high: {self.clip_high} is negative")
        if self.dual_clip is not None and not self.dual_clip > 1.0:
            raise ValueError(f"dual_clip: {self.dual_clip} is not greater than 1")
        check_not_negative("kl_coef", self.kl_coef)
        for name in ("entropy_coef", "rehearsal_coef"):
            if not math.isfinite(getattr(self, name)):
                raise ValueError(f"{name}: {getattr(self, name)} is not finite")
        check_softcap(self.softcap)
        for name in ("log_ratio_clamp", "kl_clamp", "kl_ratio_max"):
            if getattr(self, name) is not None and not getattr(self, name) > 0.0:
                raise ValueError(f"{name}: {getattr(self, name)} is not positive")

    @property
    def kl_base(self) -> str:
        """The estimator that the KL's value is from."""
        return self.kl_estimator.removesuffix("+")

    @property
    def kl_apart(self) -> bool:
        """Whether the KL's gradient is that of another estimator, k2."""
        return self.kl_estimator.endswith("+")


DEFAULT = PolicyLossConfig()


class PolicyCall(NamedTuple):
    """A call of the policy losses, or of `linear_logprob`, on its way to the kernels: its shapes, types and devices
    have been checked, its values are where rows are chosen (`formula.select_rows`).

    The arguments are those of `linear_policy_loss`; `linear_logprob` has none of those that only a loss has.
    """

    source: Tensor  # [..., H] hidden states; without a weight the logits [..., V] themselves
    weight: Tensor | None  # [V, H]
    bias: Tensor | None  # [V]
    target: Tensor  # [...]
    temperature: float | Tensor  # [...] when per row
    config: PolicyLossConfig
    kind: Tensor | None = None  # [...], as are the next four
    old_logprob: Tensor | None = None
    advantage: Tensor | None = None
    ref_logprob: Tensor | None = None
    row_weight: Tensor | None = None
    policy_denominator: float | Tensor | None = None
    rehearsal_denominator: float | Tensor | None = None
    entropy_denominator: float | Tensor | None = None  # None: the policy rows' own, and their weights
    cu_seqlens: Tensor | None = None  # [S + 1] into the flattened rows; None: each row of a target [B, L] is a sequence
    logits_dtype: torch.dtype | None = None
    workspace_bytes: int | None = None  # None: by device; not read from logits, which need no workspace
    active_rows: int | None = None  # None: not known to the caller
    grad_tolerance: float = 0.0
    backend: str = "torch"
    group: str = ""  # name of the process group that the vocabulary is split over
    needs: tuple[bool, ...] = (False, False, False)  # whether a gradient is asked for, of source, weight and bias

    @property
    def width(self) -> int:
        """The size of the vocabulary, or of this rank's slice."""
        return self.source.shape[-1] if self.weight is None else self.weight.shape[0]

    @property
    def origin(self) -> str:
        """The arguments that a non-finite logit comes from."""
        return "logits" if self.weight is None else "hidden, weight or bias"


class PolicyLossOutput(NamedTuple):
    """What the policy losses return.

    loss: 0-d, differentiable in hidden states (or logits), weight and bias.
    logprob, entropy: detached, target's shape, float32 (float64 for float64 input), 0 where ignored.
    metrics: detached 0-d tensors on the device. `policy_loss` and `rehearsal_loss` (each over its denominator, the
        latter before `rehearsal_coef`); over policy tokens `clip_fraction` (the clipped, dual clip included),
        `clip_fraction_low` and `clip_fraction_high` (those of a ratio below or above the range; the dual clip's are in
        neither), `approx_kl` (k3 of the new against the old policy), `ref_kl` (mean of the KL's estimate towards
        `ref_logprob`, as `kl_coef` multiplies it but without a ratio; 0 where that is 0), `max_ratio`, `entropy`
        (mean); `policy_tokens` and `rehearsal_tokens` (counts). A mean over no token is 0.
    """

    loss: Tensor
    logprob: Tensor
    entropy: Tensor
    metrics: dict[str, Tensor]


@functools.cache
def warn_k1() -> None:
    warnings.warn(
        "kl_estimator 'k1' in the loss: its expected gradient on policy is 0; "
        "use k2 or k3, or put the KL into the reward",
        stacklevel=5,
    )
