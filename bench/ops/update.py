"""End to end: one update of the policy on a mixed batch (PPO-SR), one of the scorer; fused against plain PyTorch.

Small Llama and BLOOM shapes with random weights. The step is cut at the backbone's output, for everyone alike: backbone
forward, loss with its gradient, backbone backward, optimizer; these four parts tell where the time goes. The floor of a
policy update is the same step with the three bare products of the active rows in place of the loss; that of a scorer
update is the step with a sum over the rewards in its place.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

import stable_rlhf.ops as ops
from bench.case import DTYPES, OURS, Case, Contender, Prepared, Settings
from bench.ops.advantage import plain_loss as plain_advantage_loss
from bench.ops.problem import Problem, loss_from_logprob, make_problem, own_loss, plain_logprob, with_gradients
from bench.ops.problem import floor as products_floor

PARTS = ("backbone forward", "loss and its gradient", "backbone backward", "optimizer")

HeadStep = Callable[[Tensor], tuple[Tensor, Tensor | None]]  # hidden [B, L, H] -> (loss, gradient of hidden)


def backbone(shape: Any) -> nn.Module:
    """Llama or BLOOM without its head, random weights."""
    import transformers

    heads = max(1, shape["width"] // 64)
    if shape["model"] == "bloom":
        settings: Any = transformers.BloomConfig(
            hidden_size=shape["width"], n_layer=shape["layers"], n_head=heads, vocab_size=shape["vocabulary"]
        )
        return transformers.BloomModel(settings)
    settings = transformers.LlamaConfig(
        hidden_size=shape["width"], intermediate_size=8 * shape["width"] // 3, num_hidden_layers=shape["layers"],
        num_attention_heads=heads, num_key_value_heads=heads, vocab_size=shape["vocabulary"],
        max_position_embeddings=shape["length"],
    )  # fmt: skip
    return transformers.LlamaModel(settings)


class Update:
    """One step with its parts timed; the optimizer moves the backbone and the head."""

    def __init__(self, model: nn.Module, head: nn.ParameterList, ids: Tensor, loss: HeadStep) -> None:
        self.model, self.ids, self.loss, self.device = model, ids, loss, ids.device
        self.parameters = [*model.parameters(), *head]
        # A learning rate of nothing: every round then sees the same problem, at the cost of a real step.
        self.optimizer = torch.optim.AdamW(self.parameters, lr=0.0, weight_decay=0.0)
        self.seconds: list[list[float]] = []

    def __call__(self) -> Tensor:
        marks = [self._now()]
        hidden = self.model(self.ids).last_hidden_state
        marks.append(self._now())
        loss, gradient = self.loss(hidden)
        marks.append(self._now())
        hidden.backward(gradient)
        marks.append(self._now())
        self.optimizer.step()
        self.optimizer.zero_grad()
        marks.append(self._now())
        self.seconds.append([after - before for before, after in itertools.pairwise(marks)])
        return loss

    def _now(self) -> float:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return time.perf_counter()

    def parts(self) -> dict[str, Any]:
        """Median seconds of each part over all calls but the first."""
        timed = torch.tensor(self.seconds[1:] or self.seconds)
        return {"parts_s": dict(zip(PARTS, timed.median(0).values.tolist(), strict=True))}


# -- the policy --------------------------------------------------------------------------------------------------------


def _policy_losses(problem: Problem, weight: nn.Parameter) -> dict[str, tuple[str, Callable[[], HeadStep]]]:
    """By name: role, and what turns hidden states into the loss and its gradients, the head's left in `weight.grad`."""
    loss_of_logprob = loss_from_logprob(problem)

    def from_leaf(loss_of: Callable[[Tensor], Tensor]) -> HeadStep:
        return lambda hidden: with_gradients(lambda leaf: loss_of(leaf.view(-1, leaf.shape[-1])), hidden)()

    def plain(hidden: Tensor, weight: Tensor) -> Tensor:
        """All rows, as a trainer without this operation does it."""
        return loss_of_logprob(plain_logprob(hidden, weight, problem.target))

    def compiled() -> HeadStep:
        function = torch.compile(plain, dynamic=False)
        return from_leaf(lambda hidden: function(hidden, weight))

    def bare() -> HeadStep:
        rows = problem.index

        def step(hidden: Tensor) -> tuple[Tensor, Tensor]:
            flat = hidden.detach().view(-1, hidden.shape[-1])
            active = Problem(flat[rows], weight.detach(), *(problem.target,) * 2, *(problem.advantage,) * 2, None)
            hidden_grad, weight.grad = products_floor(3, 512)(active)()
            gradient = torch.zeros_like(flat)
            gradient[rows] = hidden_grad
            return gradient.sum(), gradient.view_as(hidden)

        return step

    return {
        OURS: ("ours", lambda: from_leaf(lambda hidden: own_loss(problem, hidden, weight))),
        "plain PyTorch": ("peer", lambda: from_leaf(lambda hidden: plain(hidden, weight))),
        "torch.compile": ("peer", compiled),
        "bare products": ("floor", bare),
    }


def prepare_policy(case: Case, settings: Settings, model: nn.Module, ids: Tensor) -> Any:
    shape, dtype, device = case.shape, DTYPES[case.dtype], ids.device
    weight = nn.Parameter(0.05 * torch.randn(shape["vocabulary"], shape["width"], device=device).to(dtype))
    with torch.no_grad():
        hidden = model(ids).last_hidden_state.view(-1, shape["width"])
    target = ids.roll(-1, 1).reshape(-1)
    problem = make_problem(
        hidden, weight.detach(), target, active=shape["active"], clipped=shape.get("clipped", 0.0),
        rehearsal=shape.get("rehearsal", 0.0), workspace_bytes=None, seed=settings.seed,
    )  # fmt: skip
    return nn.ParameterList([weight]), _policy_losses(problem, weight)


# -- the scorer --------------------------------------------------------------------------------------------------------


def prepare_scorer(case: Case, settings: Settings, model: nn.Module, ids: Tensor) -> Any:
    """Two heads on the last token: reward and expectation; half of the batch chosen against the other half."""
    shape, device = case.shape, ids.device
    heads = nn.ParameterList(
        nn.Parameter(0.05 * torch.randn(shape["width"], device=device).to(DTYPES[case.dtype])) for _ in range(2)
    )
    pairs, count, length = ids.shape[0] // 2, shape["alternates"], shape["length"]
    g = torch.Generator().manual_seed(settings.seed)
    logprob = -2.0 * torch.rand(2 * pairs * length, generator=g)
    alternates = logprob + 0.2 * torch.randn(count, logprob.numel(), generator=g)
    limits = torch.arange(0, logprob.numel() + 1, length, device=device)
    packed: dict[str, Any] = {"logprob": logprob.to(device), "alt_logprob": alternates.to(device), "cu_seqlens": limits}
    rows = packed["logprob"].view(2 * pairs, length)
    padded = rows, packed["alt_logprob"].view(count, 2 * pairs, length), torch.ones_like(rows)

    def from_scores(loss_of: Callable[[Tensor, Tensor], Tensor]) -> HeadStep:
        def loss(leaf: Tensor) -> Tensor:
            return loss_of((leaf[:, -1] @ heads[0]).float(), (leaf[:pairs, 0] @ heads[1]).float())

        return lambda hidden: with_gradients(loss, hidden)()

    return heads, {
        OURS: ("ours", lambda: from_scores(lambda r, e: ops.advantage_loss(r, e, **packed).loss)),
        "plain PyTorch": ("peer", lambda: from_scores(lambda r, e: plain_advantage_loss(r, e, *padded))),
        "sum of the rewards": ("floor", lambda: from_scores(lambda r, e: r.sum() + e.sum())),
    }


def prepare(case: Case, settings: Settings) -> Prepared:
    shape, device, dtype = case.shape, torch.device(settings.device), DTYPES[case.dtype]
    torch.manual_seed(settings.seed)
    with device:  # where its weights are drawn: a billion of them take a processor a while
        model = backbone(shape).to(dtype)
    ids = torch.randint(0, shape["vocabulary"], (shape["batch"], shape["length"]), device=device)
    parts = prepare_policy if case.op == "ppo-update" else prepare_scorer
    head, losses = parts(case, settings, model, ids)
    updates: dict[str, Update] = {}

    def maker(name: str, make: Callable[[], HeadStep]) -> Callable[[], Update]:
        def build() -> Update:
            updates[name] = Update(model, head, ids, make())
            return updates[name]

        return build

    def checked(wanted: list[Contender]) -> dict[str, Any]:
        """The loss of every way against that of plain PyTorch, on this very batch; the operations' own cases hold
        their gradients against float64."""
        with torch.no_grad():
            hidden = model(ids).last_hidden_state
        want = float(losses["plain PyTorch"][1]()(hidden)[0])
        report: dict[str, Any] = {}
        for contender in wanted:
            if contender.role == "floor" or contender.name == "torch.compile":
                continue  # a compiled one is compiled once, when it is timed
            error = abs(float(losses[contender.name][1]()(hidden)[0]) - want) / max(abs(want), 1e-3)
            right = error < (1e-3 if dtype == torch.float32 else 3e-2)
            report[contender.name] = {"errors": {"loss": error}, "verdict": "right" if right else "WRONG"}
        for parameter in head:
            parameter.grad = None
        return report

    contenders = [Contender(name, maker(name, make), role) for name, (role, make) in losses.items()]
    return Prepared(contenders, checked, extra=lambda name: updates[name].parts())
