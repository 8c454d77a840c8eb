"""The Advantage Model's score and loss (arXiv 2309.10202, eqs. 6 and 8); without bounds, the plain reward model's."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from stable_rlhf.ops.advantage import fused, reference
from stable_rlhf.ops.advantage.reference import AdvantageCall, PromptRule
from stable_rlhf.ops.backends import choice
from stable_rlhf.ops.checks import (
    FLOATS,
    INTEGERS,
    check_bounded,
    check_choice,
    check_constant,
    check_integer,
    check_number,
    check_tensor,
    statistics_dtype,
)
from stable_rlhf.ops.operators import needs_operator

WEIGHT_MODES = ("length_normalized", "sequence")
_GIVEN, _HALVES, _OF_PAIRS, _SAME_INDEX = PromptRule


class AdvantageLossOutput(NamedTuple):
    """What `advantage_loss` returns: a differentiable loss, and detached figures about it.

    loss: 0-d, differentiable in reward and expected.
    score: [R] a(x, y) of every response, detached.
    figures: [7], the properties below in their order; each is 0-d.
    """

    loss: Tensor
    score: Tensor
    figures: Tensor

    @property
    def ranking_loss(self) -> Tensor:
        """The first of the three terms, which add up to the loss."""
        return self.figures[0]

    @property
    def upper_bound_loss(self) -> Tensor:
        """The term of a_c below its margin; 0 without bounds."""
        return self.figures[1]

    @property
    def lower_bound_loss(self) -> Tensor:
        """The term of a_r above minus its margin; 0 without bounds."""
        return self.figures[2]

    @property
    def accuracy(self) -> Tensor:
        """Share of pairs whose chosen response scores higher, ties counted half."""
        return self.figures[3]

    @property
    def effective_sample_size(self) -> Tensor:
        """(sum w)^2 / sum w^2 over the responses, averaged over the K alternates; R without alternates."""
        return self.figures[4]

    @property
    def sign_flip_share(self) -> Tensor:
        """Share of responses with sum_k w_k > N, whose reward counts with the wrong sign."""
        return self.figures[5]

    @property
    def bound_violation_share(self) -> Tensor:
        """Share of the pairs' scores past their bound (a_c > m, or a_r < -m); 0 without bounds."""
        return self.figures[6]


def advantage_loss(
    reward: Tensor,
    expected: Tensor | None = None,
    *,
    pairs: Tensor | None = None,
    prompt: Tensor | None = None,
    margin: float | Tensor | None = 2.5,
    rank_margin: float | Tensor = 0.0,
    label_smoothing: float | Tensor = 0.0,
    num_policies: int | None = None,
    logprob: Tensor | None = None,
    alt_logprob: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    weight_mode: str = "length_normalized",
    max_weight: float | None = 1.0,
    pair_weight: float | Tensor | None = None,
) -> AdvantageLossOutput:
    """The Advantage Model's loss over pairs of responses.

    Score (eq. 8): a = r - (N - K)/N e(x) - 1/N sum_k w_k r,  w_k = pi(y|x) / pi'_k(y|x), without gradient.
    Loss (eq. 6) of a pair with Delta = a_c - a_r, mu = rank_margin, alpha = label_smoothing, m = margin:

        l = -(1 - alpha) log sigma(Delta - mu) - alpha log sigma(-(Delta - mu))
            - log sigma(m_c - a_c) - log sigma(m_r + a_r)
        loss = sum_i pair_weight_i l_i / M

    Args:
        reward: [R] or [R, 1] r of every response.
        expected: [P] or [P, 1] e of every prompt; None: e = 0 (with margin=None and no alternates: the plain reward
            model).
        pairs: [M, 2] integer, rows (chosen, rejected) of indices into reward; None: reward's first half was chosen
            against its second half.
        prompt: [R] integer, each response's prompt as an index into expected; None: pair i has prompt i.
        margin: m, one for all or [R] for each response (its prompt's); None: no bounds.
        rank_margin, label_smoothing: one for all or [M]; label_smoothing in [0, 1].
        num_policies: N >= K and at least 1; None: K + 1.
        logprob, alt_logprob, cu_seqlens: [T], [K, T], [R + 1]: packed response tokens' log-probabilities under the
            policy to be tuned and the K alternates that collected the data; all three or none (K = 0).
        weight_mode: "length_normalized" (w_k to the power 1/|y|) or "sequence" (the paper).
        max_weight: each w_k is clamped there, in log space; None: never.
        pair_weight: one for all or [M]; None: 1. For all pairs of a ranking of n: 1 / (n choose 2).

    Margins, smoothing and weights are constants: tensors that require a gradient are refused. Log-probabilities are
    data, and are detached.

    Raises:
        ValueError: names the argument whose shape, type, device or value is wrong, non-finite input included.
    """
    reward, expected = _column(reward), _column(expected)
    responses = _check_reward(reward)
    if pairs is not None:
        pairs = _indices("pairs", pairs, reward)
        if pairs.ndim != 2 or pairs.shape[1] != 2:
            raise ValueError(f"pairs: shape {tuple(pairs.shape)} instead of [M, 2]")
        count = pairs.shape[0]
    elif responses % 2:
        raise ValueError(f"pairs: required for an odd number of responses ({responses})")
    else:
        count = responses // 2
    rule = _GIVEN
    if expected is not None and prompt is None:
        rule = _HALVES if pairs is None else _OF_PAIRS
        if isinstance(expected, Tensor) and expected.ndim == 1 and expected.shape[0] != count:
            raise ValueError(f"expected: {expected.shape[0]} values for {count} pairs, and no prompt given")
        if 2 * count != responses:
            raise ValueError("prompt: required unless every response is in exactly one pair")
    call = _checked(
        "advantage_loss", reward, expected, prompt=prompt, prompt_rule=rule, num_policies=num_policies,
        num_alternates=None, logprob=logprob, alt_logprob=alt_logprob, cu_seqlens=cu_seqlens, weight_mode=weight_mode,
        max_weight=max_weight, pairs=pairs,
        margin=None if margin is None else _per("margin", margin, responses, reward),
        rank_margin=_per("rank_margin", rank_margin, count, reward),
        label_smoothing=_per("label_smoothing", label_smoothing, count, reward),
        pair_weight=1.0 if pair_weight is None else _per("pair_weight", pair_weight, count, reward),
    )  # fmt: skip
    if isinstance(call.label_smoothing, float) and not 0.0 <= call.label_smoothing <= 1.0:
        raise ValueError("label_smoothing: has values outside [0, 1]")
    if call.backend == "torch" and not needs_operator(reward, "torch"):
        return AdvantageLossOutput(*reference.loss(call))
    return AdvantageLossOutput(*fused.loss(call))


class AdvantageLoss(nn.Module):
    """`advantage_loss` with its settings kept, for a trainer that builds its loss once.

    Args:
        margin, rank_margin, label_smoothing, num_policies, weight_mode, max_weight: as in `advantage_loss`. A call may
            give each of them anew.

    Raises:
        ValueError: an unknown weight_mode here; everything else when it is called.
    """

    def __init__(
        self,
        margin: float | None = 2.5,
        *,
        rank_margin: float = 0.0,
        label_smoothing: float = 0.0,
        num_policies: int | None = None,
        weight_mode: str = "length_normalized",
        max_weight: float | None = 1.0,
    ) -> None:
        super().__init__()
        check_choice("weight_mode", weight_mode, WEIGHT_MODES)
        self.settings: dict[str, Any] = {
            "margin": margin, "rank_margin": rank_margin, "label_smoothing": label_smoothing,
            "num_policies": num_policies, "weight_mode": weight_mode, "max_weight": max_weight,
        }  # fmt: skip

    def forward(self, reward: Tensor, expected: Tensor | None = None, **arguments: Any) -> AdvantageLossOutput:
        """`advantage_loss(reward, expected, **arguments)`, with the settings where the call says nothing else."""
        return advantage_loss(reward, expected, **{**self.settings, **arguments})

    def extra_repr(self) -> str:
        return ", ".join(f"{name}={value!r}" for name, value in self.settings.items())


def advantage_score(
    reward: Tensor,
    expected: Tensor | None = None,
    *,
    prompt: Tensor | None = None,
    num_policies: int | None = None,
    num_alternates: int | None = None,
    logprob: Tensor | None = None,
    alt_logprob: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    weight_mode: str = "length_normalized",
    max_weight: float | None = 1.0,
) -> Tensor:
    """The Advantage Model's score a(x, y) of every response, for PPO, selection and evaluation.

    With log-probabilities of the alternates this is eq. 8. Without, where nothing but r and e is known, w_k = 1 and
    a = (N - K)/N (r - e); r - e alone would be (K + 1) times too large at the default N = K + 1.

    Args:
        reward: [R]; differentiable.
        expected: [P] or None for e = 0.
        prompt: [R] integer into expected; None: response i has prompt i, so P = R.
        num_policies, num_alternates: N and K that the scorer was trained with. None: K from alt_logprob (0 without),
            N = K + 1. N >= K >= 0 and N >= 1; with N = K the score without alternates is 0 everywhere.
        logprob, alt_logprob, cu_seqlens, weight_mode, max_weight: as in `advantage_loss`.

    Returns:
        [R] float32 (float64 for float64 input).

    Raises:
        ValueError: names the argument whose shape, type, device or value is wrong.
    """
    reward, expected = _column(reward), _column(expected)
    responses = _check_reward(reward)
    if expected is not None and prompt is None and isinstance(expected, Tensor) and expected.numel() != responses:
        raise ValueError(f"expected: {expected.numel()} values for {responses} responses, and no prompt given")
    rule = _SAME_INDEX if prompt is None else _GIVEN
    call = _checked(
        "advantage_score", reward, expected, prompt=prompt, prompt_rule=rule, num_policies=num_policies,
        num_alternates=num_alternates, logprob=logprob, alt_logprob=alt_logprob, cu_seqlens=cu_seqlens,
        weight_mode=weight_mode, max_weight=max_weight,
    )  # fmt: skip
    if call.backend == "torch" and not needs_operator(reward, "torch"):
        return reference.score(call)
    return fused.score(call)


def _column(value: Any) -> Any:
    """[n] of a head's [n, 1]."""
    if not isinstance(value, Tensor) or value.is_nested or value.ndim != 2 or value.shape[1] != 1:
        return value
    return value.squeeze(1)


def _check_reward(reward: Tensor) -> int:
    check_tensor("reward", reward)
    if reward.ndim != 1:
        raise ValueError(f"reward: shape {tuple(reward.shape)} instead of [R]")
    return reward.shape[0]


def _checked(
    op: str,
    reward: Tensor,
    expected: Tensor | None,
    *,
    prompt: Tensor | None,
    prompt_rule: int,
    num_policies: int | None,
    num_alternates: int | None,
    logprob: Tensor | None,
    alt_logprob: Tensor | None,
    cu_seqlens: Tensor | None,
    weight_mode: str,
    max_weight: float | None,
    **by_pair: Any,
) -> AdvantageCall:
    """Checks all that needs no tensor's values; those are looked at where they are read anyway."""
    device, dtype = reward.device, statistics_dtype(reward.dtype)
    if expected is not None:
        check_tensor("expected", expected, device=device)
        if expected.ndim != 1:
            raise ValueError(f"expected: shape {tuple(expected.shape)} instead of [P]")
        dtype = statistics_dtype(reward.dtype, expected.dtype)
        if expected.dtype != dtype:
            expected = expected.to(dtype)
        if prompt is not None:
            prompt = _indices("prompt", prompt, reward)
            if prompt.shape != reward.shape:
                raise ValueError(f"prompt: shape {tuple(prompt.shape)} instead of {tuple(reward.shape)}")
    elif prompt is not None:
        raise ValueError("prompt: given without expected")
    check_choice("weight_mode", weight_mode, WEIGHT_MODES)
    if max_weight is not None:
        max_weight = check_number("max_weight", max_weight)
        if not max_weight > 0.0:
            raise ValueError(f"max_weight: {max_weight} is not positive")
    known = 0
    if alt_logprob is None:
        for name, value in (("logprob", logprob), ("cu_seqlens", cu_seqlens)):
            if value is not None:
                raise ValueError(f"{name}: given without alt_logprob")
    else:
        if logprob is None or cu_seqlens is None:
            raise ValueError(f"{'logprob' if logprob is None else 'cu_seqlens'}: required with alt_logprob")
        check_tensor("logprob", logprob, device=device)
        if logprob.ndim != 1:
            raise ValueError(f"logprob: shape {tuple(logprob.shape)} instead of [T]")
        check_tensor("alt_logprob", alt_logprob, device=device)
        if alt_logprob.ndim != 2 or alt_logprob.shape[1] != logprob.shape[0]:
            raise ValueError(f"alt_logprob: shape {tuple(alt_logprob.shape)} instead of [K, {logprob.shape[0]}]")
        cu_seqlens = _indices("cu_seqlens", cu_seqlens, reward)
        if cu_seqlens.ndim != 1 or cu_seqlens.shape[0] != reward.shape[0] + 1:
            raise ValueError(
                f"cu_seqlens: {cu_seqlens.numel()} entries instead of {reward.shape[0] + 1} "
                f"for {reward.shape[0]} responses"
            )
        known = alt_logprob.shape[0]
        logprob, alt_logprob = logprob.detach(), alt_logprob.detach()
    if num_alternates is None:
        num_alternates = known
    else:
        num_alternates = check_integer("num_alternates", num_alternates, 0, 2**31)
        if known and num_alternates != known:
            raise ValueError(f"num_alternates: {num_alternates}, but alt_logprob holds {known}")
    policies = num_alternates + 1
    if num_policies is not None:
        policies = check_integer("num_policies", num_policies, 0, 2**31)
    if policies < max(num_alternates, 1):
        raise ValueError(f"num_policies: N = {policies} is less than 1 or than the K = {num_alternates} alternates")
    if reward.dtype != dtype:
        reward = reward.to(dtype)
    return AdvantageCall(
        reward, expected, prompt=prompt, prompt_rule=prompt_rule, num_policies=policies, num_alternates=num_alternates,
        logprob=logprob, alt_logprob=alt_logprob, cu_seqlens=cu_seqlens,
        length_normalized=weight_mode == "length_normalized", max_weight=max_weight, backend=choice(op, device),
        **by_pair,
    )  # fmt: skip


def _indices(name: str, value: Tensor, like: Tensor) -> Tensor:
    return check_tensor(name, value, device=like.device, dtypes=INTEGERS).to(torch.int64)


def _per(name: str, value: float | Tensor, count: int, like: Tensor) -> float | Tensor:
    """`value` as a float for all, or as a tensor [count]."""
    if type(value) is float and -1e30 <= value <= 1e30:
        return value
    if isinstance(value, Tensor):
        check_constant(name, value)
        check_tensor(name, value, dtypes=FLOATS + INTEGERS)
        if value.ndim > 0:
            check_tensor(name, value, shape=(count,), device=like.device, dtypes=FLOATS + INTEGERS)
            return value.detach() if value.is_floating_point() else value.to(statistics_dtype(like.dtype))
        if torch.compiler.is_compiling():  # its value is not known there
            return value.detach().expand(count)
    return float(check_bounded(name, value))
