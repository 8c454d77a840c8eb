"""The contenders: our operations, the floors made of bare matrix products, and other projects' ways to the same loss.

Each contender is built for a `Problem` and is then a step without arguments that makes loss and gradients from nothing.
Peers are called through their public interface and get the active rows only, which is to their advantage.
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
from stable_rlhf.ops import PolicyLossConfig

POLICY, REHEARSAL = 1, 2


@dataclass(frozen=True)
class Problem:
    """One mixed batch: T rows, of which the active ones also lie gathered, for the peers."""

    hidden: Tensor  # [T, H]
    weight: Tensor  # [V, H]
    target: Tensor  # [T]
    kind: Tensor  # [T]
    old_logprob: Tensor  # [T] float32
    advantage: Tensor  # [T] float32
    workspace_bytes: int
    config: PolicyLossConfig = field(default_factory=PolicyLossConfig)

    @property
    def index(self) -> Tensor:
        return self.kind.nonzero()[:, 0]

    def active(self) -> Problem:
        """The same loss without the inactive rows."""
        rows = self.index
        parts = (x[rows].contiguous() for x in (self.hidden, self.target, self.kind, self.old_logprob, self.advantage))
        hidden, target, kind, old, advantage = parts
        return replace(self, hidden=hidden, target=target, kind=kind, old_logprob=old, advantage=advantage)

    def to(self, dtype: torch.dtype) -> Problem:
        return replace(self, hidden=self.hidden.to(dtype), weight=self.weight.to(dtype))

    def leaves(self) -> tuple[Tensor, Tensor]:
        """Hidden states and weight as fresh leaves: no gradient of an earlier call is there to be added to."""
        return self.hidden.detach().requires_grad_(), self.weight.detach().requires_grad_()


@dataclass(frozen=True)
class Result:
    """What a contender makes, the hidden gradient of the rows it was given."""

    loss: Tensor
    hidden_grad: Tensor
    weight_grad: Tensor


Step = Callable[[], Any]


@dataclass(frozen=True)
class Contender:
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


def plain_logprob(hidden: Tensor, weight: Tensor, target: Tensor) -> Tensor:
    """From whole logits, with statistics in float32 (float64 for float64)."""
    logits = F.linear(hidden, weight)
    wide = logits if logits.dtype == torch.float64 else logits.float()
    return torch.log_softmax(wide, dim=-1).gather(-1, target.unsqueeze(-1)).squeeze(-1)


def _from_logprob(logprob_of: Callable[[Tensor, Tensor, Tensor], Tensor]) -> Callable[[Problem], Step]:
    """A contender out of anything that gives differentiable log-probs: the loss above, then autograd."""

    def build(problem: Problem) -> Step:
        policy, rehearsal = factors(problem)

        def step() -> Result:
            hidden, weight = problem.leaves()
            logprob = logprob_of(hidden, weight, problem.target)
            loss = mixed_loss(logprob, problem.old_logprob, problem.advantage, policy, rehearsal, problem.config)
            loss.backward()
            assert hidden.grad is not None and weight.grad is not None
            return Result(loss.detach(), hidden.grad, weight.grad)

        return step

    return build


plain = _from_logprob(plain_logprob)


def compiled_plain(problem: Problem) -> Step:
    policy, rehearsal = factors(problem)

    def loss_of(hidden: Tensor, weight: Tensor) -> Tensor:
        logprob = plain_logprob(hidden, weight, problem.target)
        return mixed_loss(logprob, problem.old_logprob, problem.advantage, policy, rehearsal, problem.config)

    # Shapes are compiled in: a shape of its own is the best case for the compiler.
    compiled = torch.compile(loss_of, dynamic=False)

    def step() -> Result:
        hidden, weight = problem.leaves()
        loss = compiled(hidden, weight)
        loss.backward()
        assert hidden.grad is not None and weight.grad is not None
        return Result(loss.detach(), hidden.grad, weight.grad)

    return step


# -- ours --------------------------------------------------------------------------------------------------------------


def ours(**options: Any) -> Callable[[Problem], Step]:
    def build(problem: Problem) -> Step:
        def step() -> Result:
            hidden, weight = problem.leaves()
            out = ops.linear_policy_loss(
                hidden, weight, problem.target, problem.kind, old_logprob=problem.old_logprob,
                advantage=problem.advantage, config=problem.config, workspace_bytes=problem.workspace_bytes, **options,
            )  # fmt: skip
            out.loss.backward()
            assert hidden.grad is not None and weight.grad is not None
            return Result(out.loss.detach(), hidden.grad, weight.grad)

        return step

    return build


def accepts_grad_tolerance() -> bool:
    """Whether this version of the operation drops columns below a tolerance, or only knows the exact gradient."""
    hidden, weight = torch.ones(2, 4, requires_grad=True), torch.ones(8, 4, requires_grad=True)
    try:
        zeros = torch.zeros(2)
        ops.linear_policy_loss(
            hidden, weight, torch.zeros(2, dtype=torch.int64), old_logprob=zeros, advantage=zeros, grad_tolerance=1e-3
        )
    except NotImplementedError:
        return False
    return True


# -- the floors --------------------------------------------------------------------------------------------------------


def floor(products: int, chunk: int | None, dtype: torch.dtype | None = None) -> Callable[[Problem], Step]:
    """Nothing but the matrix products: 1 (logits), 3 (and both gradients) or 4 (and the logits once more).

    The buffer for logits is reused from call to call and gradients are fresh memory, as in any training step.
    """

    def build(problem: Problem) -> Step:
        given = problem if dtype is None else problem.to(dtype)
        x, weight = given.hidden.detach(), given.weight.detach()
        count = x.shape[0]
        size = min(chunk or count, count)
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

    return build


def floors(products: int, rows: int, dtype: torch.dtype | None = None, label: str = "floor") -> list[Contender]:
    """The floor over chunks of 256, 512 and all rows; the fastest of them is *the* floor."""
    chunks = [c for c in (256, 512) if c < rows]
    named = [(f"{label}, chunks of {c}", c) for c in chunks] + [(f"{label}, all rows", None)]
    return [Contender(name, floor(products, chunk, dtype), "floor") for name, chunk in named]


# -- other projects ----------------------------------------------------------------------------------------------------


def _cut_cross_entropy(device: torch.device, **options: Any) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    from cut_cross_entropy import linear_cross_entropy

    impl = "cce" if device.type == "cuda" else "torch_compile"
    return lambda hidden, weight, target: (
        -linear_cross_entropy(hidden, weight, target, impl=impl, reduction="none", **options)
    )


def _torch_linear_cross_entropy() -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    function, settings = F.linear_cross_entropy, torch.nn.LinearCrossEntropyOptions()
    return lambda hidden, weight, target: -function(hidden, weight, target, reduction="none", options=settings)


def _trl_chunked() -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    """TRL's tiles over rows and vocabulary, recomputed in the backward; 32,768 columns a tile, as its trainers do."""
    from trl.kernels import ChunkedLogProbFunction

    def logprob(hidden: Tensor, weight: Tensor, target: Tensor) -> Tensor:
        found: tuple[Tensor, ...] = ChunkedLogProbFunction.apply(
            hidden, weight, None, target, 1.0, 32768, None, 1.0, ()
        )
        return found[0]

    return logprob


def _selective_log_softmax(logits: Tensor, target: Tensor) -> Tensor:
    """What TRL's function of this name computes: row by row, and in 16 bits where the logits are."""
    if logits.dtype in (torch.float32, torch.float64):
        sums = torch.stack([row.logsumexp(-1) for row in logits])
        return logits.gather(-1, target.unsqueeze(-1)).squeeze(-1) - sums
    rows = [row.log_softmax(-1)[token] for row, token in zip(logits, target, strict=True)]
    return torch.stack(rows)


def _trl_selective(chunk: int = 256) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    try:
        from trl.trainer.utils import selective_log_softmax
    except Exception:  # TRL's trainers import much that a benchmark does not need
        selective_log_softmax = _selective_log_softmax

    def logprob(hidden: Tensor, weight: Tensor, target: Tensor) -> Tensor:
        parts = []
        for begin in range(0, hidden.shape[0], chunk):
            logits = F.linear(hidden[begin : begin + chunk], weight)
            parts.append(selective_log_softmax(logits, target[begin : begin + chunk]))
        return torch.cat(parts)

    return logprob


def liger_grpo(problem: Problem) -> Step:
    """Liger's fused linear GRPO loss. Its advantage belongs to a sequence, so each row is a sequence of one token; one
    chunk of all rows is its cheapest setting, since it streams over the vocabulary inside. Rehearsal rows have no place
    in that loss and take a second call: CISPO with ratio 1 and advantage 1 is the negative log-likelihood."""
    from liger_kernel.chunked_loss import LigerFusedLinearGRPOLoss

    config = problem.config
    policy_rows, rehearsal_rows = ((problem.kind == kind).nonzero()[:, 0] for kind in (POLICY, REHEARSAL))
    calls: list[tuple[Any, float, Tensor, Tensor, Tensor | None]] = []
    if len(policy_rows):
        ppo = LigerFusedLinearGRPOLoss(
            beta=0.0, use_ref_model=False, chunk_size=len(policy_rows), loss_type="dapo", epsilon_low=config.clip_low,
            epsilon_high=config.clip_high,
        )  # fmt: skip
        calls.append((ppo, 1.0, policy_rows, problem.advantage[policy_rows], problem.old_logprob[policy_rows, None]))
    if len(rehearsal_rows):
        nll = LigerFusedLinearGRPOLoss(
            beta=0.0, use_ref_model=False, chunk_size=len(rehearsal_rows), loss_type="cispo", epsilon_high=5.0
        )
        calls.append((nll, config.rehearsal_coef, rehearsal_rows, torch.ones_like(rehearsal_rows).float(), None))
    everything = len(calls) == 1

    def step() -> Result:
        hidden, weight = problem.leaves()
        loss: Any = 0.0
        for function, factor, rows, advantage, old in calls:
            x, target = (hidden, problem.target) if everything else (hidden[rows], problem.target[rows])
            mask = torch.ones(len(rows), 1, device=x.device)
            made = function(x.unsqueeze(1), weight, target.unsqueeze(1), mask, advantage, old_per_token_logps=old)
            loss = loss + factor * made[0]
        loss.backward()
        assert hidden.grad is not None and weight.grad is not None
        return Result(loss.detach(), hidden.grad, weight.grad)

    return step


def _lazily(make: Callable[[], Callable[[Tensor, Tensor, Tensor], Tensor]]) -> Callable[[Problem], Step]:
    """The import of a peer belongs to its build, where a failure is reported and does no harm."""
    return lambda problem: _from_logprob(make())(problem)


def policy_peers(device: torch.device) -> list[Contender]:
    found = [
        Contender("plain PyTorch", plain),
        Contender("torch.compile", compiled_plain, note="compiled for this shape"),
        Contender("cut-cross-entropy", _lazily(lambda: _cut_cross_entropy(device)), note="its NLL, then PPO"),
    ]
    if device.type == "cuda":
        unfiltered = _lazily(lambda: _cut_cross_entropy(device, filter_eps=None))
        found.append(Contender("cut-cross-entropy, no filter", unfiltered, note="filter_eps=None"))
    return [
        *found,
        Contender("Liger GRPO", liger_grpo, note="a row is a sequence of one token"),
        Contender("TRL chunked log-prob", _lazily(_trl_chunked), note="trl.kernels"),
        Contender("TRL selective_log_softmax", _lazily(_trl_selective), note="chunks of 256 rows"),
        Contender("F.linear_cross_entropy", _lazily(_torch_linear_cross_entropy), note="chunked, its NLL, then PPO"),
    ]


# -- linear_logprob and policy_loss ------------------------------------------------------------------------------------


def _logprob_step(problem: Problem, make: Callable[[Tensor, Tensor], Tensor], gradient: bool) -> Step:
    def step() -> tuple[Tensor | None, ...]:
        if not gradient:
            with torch.no_grad():
                return (make(problem.hidden, problem.weight),)
        hidden, weight = problem.leaves()
        logprob = make(hidden, weight)
        logprob.sum().backward()
        return logprob.detach(), hidden.grad, weight.grad

    return step


def logprob_contenders(gradient: bool) -> list[Contender]:
    def own(entropy: bool) -> Callable[[Problem], Step]:
        return lambda p: _logprob_step(
            p, lambda h, w: ops.linear_logprob(
                h, w, p.target, entropy=entropy, workspace_bytes=p.workspace_bytes
            )[0], gradient,
        )  # fmt: skip

    def whole(p: Problem) -> Step:
        return _logprob_step(p, lambda h, w: plain_logprob(h, w, p.target), gradient)

    def compiled(p: Problem) -> Step:
        function = torch.compile(plain_logprob, dynamic=False)
        return _logprob_step(p, lambda h, w: function(h, w, p.target), gradient)

    return [
        Contender("stable_rlhf", own(False), "ours"),
        Contender("stable_rlhf, entropy", own(True), "ours"),
        Contender("plain PyTorch", whole),
        Contender("torch.compile", compiled),
    ]


def logits_contenders(logits: Tensor, problem: Problem) -> dict[str, tuple[str, Step]]:
    """`policy_loss` from logits that exist: (role, step) by name. The floor is a copy, which moves the same bytes as
    reading logits once and writing their gradient once."""
    policy, rehearsal = factors(problem)
    given = (problem.old_logprob, problem.advantage, policy, rehearsal)
    other = torch.empty_like(logits)

    def plain_loss(leaf: Tensor) -> Tensor:
        wide = leaf if leaf.dtype == torch.float64 else leaf.float()
        logprob = torch.log_softmax(wide, -1).gather(-1, problem.target.unsqueeze(-1)).squeeze(-1)
        return mixed_loss(logprob, *given, problem.config)

    def own_loss(leaf: Tensor) -> Tensor:
        return ops.policy_loss(
            leaf, problem.target, problem.kind, old_logprob=problem.old_logprob, advantage=problem.advantage,
            config=problem.config,
        ).loss  # fmt: skip

    def with_gradient(loss_of: Callable[[Tensor], Tensor]) -> Step:
        def step() -> tuple[Tensor, Tensor | None]:
            leaf = logits.detach().requires_grad_()
            loss = loss_of(leaf)
            loss.backward()
            return loss.detach(), leaf.grad

        return step

    return {
        "stable_rlhf": ("ours", with_gradient(own_loss)),
        "floor, copy of the logits": ("floor", lambda: other.copy_(logits)),
        "plain PyTorch": ("peer", with_gradient(plain_loss)),
        "torch.compile": ("peer", with_gradient(torch.compile(plain_loss, dynamic=False))),
    }


# -- problems ----------------------------------------------------------------------------------------------------------


def make_problem(
    hidden: Tensor,
    weight: Tensor,
    target: Tensor,
    *,
    active: float,
    clipped: float,
    rehearsal: float,
    workspace_bytes: int,
    seed: int = 0,
) -> Problem:
    """Kinds, advantages and old log-probs such that `clipped` of the policy rows are cut off by PPO's clip.

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
    advantage = torch.randn(rows, generator=g)
    # The log-ratio of a clipped row is 0.5 in the direction of its advantage; the others stay well inside the clip.
    log_ratio = 0.1 * (2.0 * torch.rand(rows, generator=g) - 1.0)
    cut = policy_rows[: round(clipped * len(policy_rows))]
    log_ratio[cut] = 0.5 * torch.where(advantage[cut] < 0, -1.0, 1.0)
    with torch.no_grad():
        here, _ = ops.linear_logprob(hidden, weight, target, workspace_bytes=workspace_bytes)
    return Problem(
        hidden, weight, target, kind.to(device), here.float() - log_ratio.to(device), advantage.to(device),
        workspace_bytes,
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
