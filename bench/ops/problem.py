"""One mixed batch of PPO and rehearsal rows, its loss in plain PyTorch, and the bare products below which nothing goes.

Everything here is the common ground of the contenders: peers.py and policy.py build theirs for a `Problem`.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import stable_rlhf.ops as ops
from bench.common import Step
from stable_rlhf.ops import PolicyLossConfig
from stable_rlhf.ops.policy.types import Kind

POLICY, REHEARSAL = int(Kind.POLICY), int(Kind.REHEARSAL)


@dataclass(frozen=True)
class Problem:
    """One mixed batch: T rows, of which the active ones also lie gathered, for the peers."""

    hidden: Tensor  # [T, H]
    weight: Tensor  # [V, H]
    target: Tensor  # [T]
    kind: Tensor  # [T]
    old_logprob: Tensor  # [T] float32
    advantage: Tensor  # [T] float32
    workspace_bytes: int | None  # None: what our operations take by themselves
    config: PolicyLossConfig = field(default_factory=PolicyLossConfig)
    sequences: int = 1  # the T rows are as many sequences of equal length, each with one advantage

    @property
    def index(self) -> Tensor:
        return self.kind.nonzero()[:, 0]

    def active(self) -> Problem:
        """The same loss without the inactive rows."""
        rows = self.index
        parts = (x[rows].contiguous() for x in (self.hidden, self.target, self.kind, self.old_logprob, self.advantage))
        hidden, target, kind, old, advantage = parts
        return replace(
            self, hidden=hidden, target=target, kind=kind, old_logprob=old, advantage=advantage, sequences=len(rows)
        )

    def to(self, dtype: torch.dtype) -> Problem:
        return replace(self, hidden=self.hidden.to(dtype), weight=self.weight.to(dtype))


@dataclass(frozen=True)
class PolicyContender:
    """Who is timed on a `Problem`; a step gives the loss and the gradients of hidden rows (those given) and weight."""

    name: str
    build: Callable[[Problem], Step]
    role: str = "peer"  # ours | floor | peer
    all_rows: bool = False  # is given the inactive rows too, and has to skip them itself
    note: str = ""


# -- the loss in terms of log-probs ------------------------------------------------------------------------------------


def mixed_loss(
    logprob: Tensor, old_logprob: Tensor, advantage: Tensor, policy: Tensor, rehearsal: Tensor, config: PolicyLossConfig
) -> Tensor:
    """PPO's clipped loss over policy rows plus the rehearsal rows' negative log-likelihood.

    `policy` and `rehearsal` [A] hold each row's factor: one over the count of its kind (times rehearsal_coef), or 0.
    """
    log_ratio = (logprob - old_logprob).clamp(-config.log_ratio_clamp, config.log_ratio_clamp)
    ratio = log_ratio.exp()
    clipped = ratio.clamp(1.0 - config.clip_low, 1.0 + config.clip_high)
    surrogate = torch.minimum(ratio * advantage, clipped * advantage)
    return -(policy * surrogate + rehearsal * logprob).sum()


def factors(problem: Problem) -> tuple[Tensor, Tensor]:
    is_policy, is_rehearsal = (problem.kind == POLICY).float(), (problem.kind == REHEARSAL).float()
    policy = is_policy / is_policy.sum().clamp(min=1.0)
    rehearsal = problem.config.rehearsal_coef * is_rehearsal / is_rehearsal.sum().clamp(min=1.0)
    return policy, rehearsal


def loss_from_logprob(problem: Problem) -> Callable[[Tensor], Tensor]:
    """`mixed_loss` of a problem's rows, as a function of their log-probs alone."""
    given = (problem.old_logprob, problem.advantage, *factors(problem), problem.config)
    return lambda logprob: mixed_loss(logprob, *given)


def own_loss(problem: Problem, hidden: Tensor, weight: Tensor, **options: Any) -> Tensor:
    """The same by our operation."""
    return ops.linear_policy_loss(
        hidden, weight, problem.target, problem.kind, old_logprob=problem.old_logprob, advantage=problem.advantage,
        config=problem.config, workspace_bytes=problem.workspace_bytes, **options,
    ).loss  # fmt: skip


def with_gradients(loss_of: Callable[..., Tensor], *inputs: Tensor) -> Step:
    """A step that gives what is made (a loss, or log-probs) and the gradients of its sum. Its leaves are fresh in every
    call: nothing of an earlier one is there to be added to."""

    def step() -> tuple[Tensor | None, ...]:
        leaves = [x.detach().requires_grad_() for x in inputs]
        loss = loss_of(*leaves)
        (loss.sum() if loss.dim() else loss).backward()
        return (loss.detach(), *(x.grad for x in leaves))

    return step


def plain_logprob(hidden: Tensor, weight: Tensor, target: Tensor) -> Tensor:
    """From whole logits, with statistics in float32 (float64 for float64)."""
    logits = F.linear(hidden, weight)
    wide = logits if logits.dtype == torch.float64 else logits.float()
    return torch.log_softmax(wide, dim=-1).gather(-1, target.unsqueeze(-1)).squeeze(-1)


# -- the floors --------------------------------------------------------------------------------------------------------


def bare_products(x: Tensor, weight: Tensor, products: int, chunk: int) -> Step:
    """Nothing but the matrix products: 1 (logits), 3 (and both gradients) or 4 (and the logits once more).

    The buffer for logits is reused from call to call and gradients are fresh memory, as in any training step.
    """
    count = x.shape[0]
    size = min(chunk, count)
    buffer = torch.empty(size, weight.shape[0], dtype=x.dtype, device=x.device)

    def step() -> tuple[Tensor | None, Tensor | None]:
        hidden_grad = torch.empty_like(x) if products > 1 else None
        weight_grad: Tensor | None = None
        for begin in range(0, count, size):
            part = x[begin : begin + size]
            logits = buffer[: part.shape[0]]
            torch.mm(part, weight.t(), out=logits)
            if products == 4:
                torch.mm(part, weight.t(), out=logits)
            if hidden_grad is not None:
                torch.mm(logits, weight, out=hidden_grad[begin : begin + size])
                if weight_grad is None:
                    weight_grad = torch.mm(logits.t(), part)
                else:
                    weight_grad.addmm_(logits.t(), part)
        return hidden_grad, weight_grad

    return step


def floor(products: int, chunk: int | None, dtype: torch.dtype | None = None) -> Callable[[Problem], Step]:
    """`bare_products` of a problem, all rows at once where `chunk` is None."""

    def build(problem: Problem) -> Step:
        given = problem if dtype is None else problem.to(dtype)
        x = given.hidden.detach()
        return bare_products(x, given.weight.detach(), products, chunk or x.shape[0])

    return build


def floors(products: int, rows: int, dtype: torch.dtype | None = None, label: str = "floor") -> list[PolicyContender]:
    """The floor over chunks of 256, 512 and all rows; the fastest of them is *the* floor."""
    chunks = [c for c in (256, 512) if c < rows]
    named = [(f"{label}, chunks of {c}", c) for c in chunks] + [(f"{label}, all rows", None)]
    return [PolicyContender(name, floor(products, chunk, dtype), "floor") for name, chunk in named]


# -- problems ----------------------------------------------------------------------------------------------------------


def make_problem(
    hidden: Tensor,
    weight: Tensor,
    target: Tensor,
    *,
    active: float,
    clipped: float,
    rehearsal: float,
    workspace_bytes: int | None,
    seed: int = 0,
) -> Problem:
    """Kinds, advantages and old log-probs such that `clipped` of the policy rows are cut off by PPO's clip.

    Eight sequences, where the rows divide by eight, have one advantage each: some peers know no other form.
    Shares are exact up to rounding: `active` of all rows, `rehearsal` of the active ones. Which rows is random.
    """
    device, rows = hidden.device, hidden.shape[0]
    g = torch.Generator().manual_seed(seed)
    count = max(1, round(active * rows))
    rehearsed = round(rehearsal * count)
    order = torch.randperm(rows, generator=g)
    kind = torch.zeros(rows, dtype=torch.int64)
    kind[order[:count]] = POLICY
    kind[order[:rehearsed]] = REHEARSAL
    policy_rows = order[rehearsed:count]
    sequences = math.gcd(rows, 8)
    advantage = torch.randn(sequences, generator=g).repeat_interleave(rows // sequences)
    # The log-ratio of a clipped row is 0.5 in the direction of its advantage; the others stay well inside the clip.
    log_ratio = 0.1 * (2.0 * torch.rand(rows, generator=g) - 1.0)
    cut = policy_rows[: round(clipped * len(policy_rows))]
    log_ratio[cut] = 0.5 * torch.where(advantage[cut] < 0, -1.0, 1.0)
    with torch.no_grad():
        here, _ = ops.linear_logprob(hidden, weight, target, workspace_bytes=workspace_bytes)
    return Problem(
        hidden, weight, target, kind.to(device), here.float() - log_ratio.to(device), advantage.to(device),
        workspace_bytes, sequences=sequences,
    )  # fmt: skip


def random_inputs(
    rows: int, width: int, vocabulary: int, dtype: torch.dtype, device: torch.device, seed: int = 0
) -> tuple[Tensor, Tensor, Tensor]:
    """Hidden states, weight and targets; the logits have standard deviation 2."""
    g = torch.Generator(device=device).manual_seed(seed)
    hidden = torch.randn(rows, width, generator=g, device=device)
    weight = torch.randn(vocabulary, width, generator=g, device=device) * (2.0 / math.sqrt(width))
    target = torch.randint(0, vocabulary, (rows,), generator=g, device=device)
    return hidden.to(dtype), weight.to(dtype), target
