"""Other projects' ways to the losses that are measured, and ours: one adapter each, all for the same `Problem`.

Every adapter uses the public interface of its project. Its import belongs to its build, so that a peer that is not
installed, or fails, is listed with the reason and takes nobody with it. `policy_peers` gives each the active rows only,
which is to its advantage, and once more all rows with a mask, as its users call it (`, all rows`).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import stable_rlhf.ops as ops
from bench.case import OURS, Contender
from bench.common import Step
from bench.ops import verl_peer
from bench.ops.problem import (
    POLICY,
    REHEARSAL,
    PolicyContender,
    Problem,
    factors,
    loss_from_logprob,
    own_loss,
    plain_logprob,
    with_gradients,
)  # fmt: skip

Logprob = Callable[[Tensor, Tensor, Tensor], Tensor]


def _from_logprob(logprob_of: Logprob) -> Callable[[Problem], Step]:
    """A contender out of anything that gives differentiable log-probs: the loss above, then autograd."""

    def build(problem: Problem) -> Step:
        loss_of = loss_from_logprob(problem)
        return _step(problem, lambda hidden, weight: loss_of(logprob_of(hidden, weight, problem.target)))

    return build


def _step(problem: Problem, loss_of: Callable[[Tensor, Tensor], Tensor]) -> Step:
    return with_gradients(loss_of, problem.hidden, problem.weight)


plain = _from_logprob(plain_logprob)


def compiled_plain(problem: Problem) -> Step:
    loss_of = loss_from_logprob(problem)
    # Shapes are compiled in: a shape of its own is the best case for the compiler.
    return _step(problem, torch.compile(lambda h, w: loss_of(plain_logprob(h, w, problem.target)), dynamic=False))


def ours(**options: Any) -> Callable[[Problem], Step]:
    return lambda problem: _step(problem, lambda hidden, weight: own_loss(problem, hidden, weight, **options))


# -- other projects ----------------------------------------------------------------------------------------------------


def _cut_cross_entropy(device: torch.device, **options: Any) -> Logprob:
    from cut_cross_entropy import linear_cross_entropy

    impl = "cce" if device.type == "cuda" else "torch_compile"
    return lambda hidden, weight, target: (
        -linear_cross_entropy(hidden, weight, target, impl=impl, reduction="none", **options)
    )


def _torch_linear_cross_entropy() -> Logprob:
    function, settings = F.linear_cross_entropy, torch.nn.LinearCrossEntropyOptions()
    return lambda hidden, weight, target: -function(hidden, weight, target, reduction="none", options=settings)


def _trl_chunked() -> Logprob:
    """TRL's tiles over rows and vocabulary, recomputed in the backward; 32,768 columns a tile, as its trainers do."""
    from trl.kernels import ChunkedLogProbFunction

    def logprob(hidden: Tensor, weight: Tensor, target: Tensor) -> Tensor:
        outputs: tuple[Tensor, ...] = ChunkedLogProbFunction.apply(
            hidden, weight, None, target, 1.0, 32768, None, 1.0, ()
        )
        return outputs[0]

    return logprob


def _trl_fused_head() -> Logprob:
    """The head that TRL's trainers put on a model, on one whose backbone gives the hidden states back as they are.
    Without Triton it scores every position, those of the target -100 too, so that its tiles keep their shapes."""
    from trl.trainer.utils import add_fused_lm_head

    head = SimpleNamespace(weight=None, bias=None)

    class Model:
        config = SimpleNamespace(get_text_config=SimpleNamespace)

        def base_model(self, hidden: Tensor, use_cache: bool) -> SimpleNamespace:
            return SimpleNamespace(last_hidden_state=hidden)

        def get_output_embeddings(self) -> SimpleNamespace:
            return head

        def forward(self, hidden: Tensor, **how: Any) -> Any:
            raise NotImplementedError("the fused head alone is asked for")

    model = Model()
    add_fused_lm_head(model)

    def logprob(hidden: Tensor, weight: Tensor, target: Tensor) -> Tensor:
        head.weight = weight
        try:
            outputs = model.forward(hidden.unsqueeze(0), shift_labels=target.unsqueeze(0), fused_lm_head=True)
        finally:
            head.weight = None  # a step keeps nothing of an earlier one
        return outputs.log_probs.squeeze(0)

    return logprob


def _trl_selective(chunk: int = 256) -> Logprob:
    from trl.trainer.utils import selective_log_softmax

    def logprob(hidden: Tensor, weight: Tensor, target: Tensor) -> Tensor:
        parts = []
        for begin in range(0, hidden.shape[0], chunk):
            logits = F.linear(hidden[begin : begin + chunk], weight)
            parts.append(selective_log_softmax(logits, target[begin : begin + chunk]))
        return torch.cat(parts)

    return logprob


def _liger_scaled() -> Logprob:
    """Liger's NLL a token, CUTLASS kernels on Hopper and chunks in plain PyTorch elsewhere; without its entropy."""
    from liger_kernel.ops import LigerFusedLinearScaledCrossEntropyFunction

    def logprob(hidden: Tensor, weight: Tensor, target: Tensor) -> Tensor:
        outputs = LigerFusedLinearScaledCrossEntropyFunction.apply(hidden, weight, target, 1.0, -100, 1, False)
        nll: Tensor = outputs[0] if isinstance(outputs, tuple) else outputs
        return -nll

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

    def loss_of(hidden: Tensor, weight: Tensor) -> Tensor:
        loss: Any = 0.0
        for function, factor, rows, advantage, old in calls:
            x, target = (hidden, problem.target) if everything else (hidden[rows], problem.target[rows])
            mask = torch.ones(len(rows), 1, device=x.device)
            outputs = function(x.unsqueeze(1), weight, target.unsqueeze(1), mask, advantage, old_per_token_logps=old)
            loss = loss + factor * outputs[0]
        return loss

    return _step(problem, loss_of)


def _lazily(make: Callable[[], Logprob]) -> Callable[[Problem], Step]:
    """The import of a peer belongs to its build, where a failure is reported and does no harm."""
    return lambda problem: _from_logprob(make())(problem)


def liger_grpo_sequences(problem: Problem) -> Step:
    """Liger's fused linear GRPO loss as its users call it: whole sequences with a mask, one sequence a chunk (its
    default), one advantage a sequence. Rehearsal tokens take a second call, as in `liger_grpo`."""
    from liger_kernel.chunked_loss import LigerFusedLinearGRPOLoss

    config, shape = problem.config, (problem.sequences, -1)
    masks = [(problem.kind == kind).float().view(shape) for kind in (POLICY, REHEARSAL)]
    target, old = problem.target.view(shape), problem.old_logprob.view(shape)
    advantage = problem.advantage.view(shape)[:, 0].contiguous()
    ppo = LigerFusedLinearGRPOLoss(
        beta=0.0, use_ref_model=False, loss_type="dapo", epsilon_low=config.clip_low, epsilon_high=config.clip_high
    )
    nll = LigerFusedLinearGRPOLoss(beta=0.0, use_ref_model=False, loss_type="cispo", epsilon_high=5.0)

    def loss_of(hidden: Tensor, weight: Tensor) -> Tensor:
        x = hidden.view(problem.sequences, -1, hidden.shape[-1])
        loss: Tensor = ppo(x, weight, target, masks[0], advantage, old_per_token_logps=old)[0]
        if bool(masks[1].any()):
            ones = torch.ones_like(advantage)
            loss = loss + config.rehearsal_coef * nll(x, weight, target, masks[1], ones)[0]
        return loss

    return _step(problem, loss_of)


def _ignoring(build: Callable[[Problem], Step]) -> Callable[[Problem], Step]:
    """Inactive rows with the target that cross-entropies skip."""
    return lambda problem: build(replace(problem, target=problem.target.masked_fill(problem.kind == 0, -100)))


def policy_peers(device: torch.device, all_rows: bool) -> list[PolicyContender]:
    """Every peer on the active rows; with `all_rows`, where some are inactive, once more as its users call it."""
    cut = _lazily(lambda: _cut_cross_entropy(device))
    contenders = [
        PolicyContender("plain PyTorch", plain),
        PolicyContender("torch.compile", compiled_plain, note="compiled for this shape"),
        PolicyContender("cut-cross-entropy", cut, note="its NLL, then PPO"),
    ]
    if device.type == "cuda":
        unfiltered = _lazily(lambda: _cut_cross_entropy(device, filter_eps=None))
        contenders.append(PolicyContender("cut-cross-entropy, no filter", unfiltered, note="filter_eps=None"))
    chunked, selective, scaled = _lazily(_trl_chunked), _lazily(_trl_selective), _lazily(_liger_scaled)
    contenders += [
        PolicyContender("Liger GRPO", liger_grpo, note="a row is a sequence of one token"),
        PolicyContender("Liger scaled cross-entropy", scaled, note="its NLL, then PPO"),
        PolicyContender("TRL chunked log-prob", chunked, note="trl.kernels"),
        PolicyContender("TRL selective_log_softmax", selective, note="chunks of 256 rows"),
        PolicyContender(
            "F.linear_cross_entropy", _lazily(_torch_linear_cross_entropy), note="chunked, its NLL, then PPO"
        ),
        PolicyContender("verl fused head and PPO loss", verl_peer.policy, note=f"{verl_peer.HEAD}, {verl_peer.LOSS}"),
    ]
    if not all_rows:
        return contenders
    masked = "a factor 0 for inactive rows"
    as_called = [
        ("plain PyTorch", plain, masked),
        ("torch.compile", compiled_plain, masked),
        ("cut-cross-entropy", _ignoring(cut), "target -100 for inactive rows"),
        ("Liger GRPO", liger_grpo_sequences, "sequences with a mask, one a chunk"),
        ("Liger scaled cross-entropy", _ignoring(scaled), "target -100 for inactive rows"),
        ("TRL chunked log-prob", chunked, masked),
        # On the active rows alone it is the chunked log-prob.
        ("TRL fused head", _ignoring(_lazily(_trl_fused_head)), "target -100 for inactive rows"),
        ("verl fused head and PPO loss", verl_peer.policy, "sequences with a mask"),
    ]
    return contenders + [
        PolicyContender(f"{name}, all rows", make, all_rows=True, note=note) for name, make, note in as_called
    ]


# -- linear_logprob and policy_loss ------------------------------------------------------------------------------------


def _logprob_step(problem: Problem, make: Callable[[Tensor, Tensor], Tensor], gradient: bool) -> Step:
    @torch.no_grad()
    def without() -> tuple[Tensor]:
        return (make(problem.hidden, problem.weight),)

    return _step(problem, make) if gradient else without


def logprob_contenders(gradient: bool) -> list[PolicyContender]:
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

    def of(make: Callable[[], Logprob]) -> Callable[[Problem], Step]:
        def build(p: Problem) -> Step:
            function = make()
            return _logprob_step(p, lambda h, w: function(h, w, p.target), gradient)

        return build

    return [
        PolicyContender(OURS, own(False), "ours"),
        PolicyContender(f"{OURS}, entropy", own(True), "ours"),
        PolicyContender("plain PyTorch", whole),
        PolicyContender("torch.compile", compiled),
        PolicyContender("Liger scaled cross-entropy", of(_liger_scaled)),
        PolicyContender("TRL chunked log-prob", of(_trl_chunked), note="trl.kernels"),
        PolicyContender("TRL fused head", of(_trl_fused_head)),
        PolicyContender("verl fused head", of(verl_peer.logprob), note=f"{verl_peer.HEAD}; entropy besides"),
    ]


def _flash_attn_nll() -> Callable[[Tensor, Tensor], Tensor]:
    from flash_attn.ops.triton.cross_entropy import cross_entropy_loss

    return lambda logits, target: cross_entropy_loss(logits, target)[0]


def _quack_nll() -> Callable[[Tensor, Tensor], Tensor]:
    from quack.cross_entropy import cross_entropy

    return lambda logits, target: cross_entropy(logits, target, reduction="none")


def _liger_triton(logits: Tensor, problem: Problem) -> Step:
    """Liger's Triton GRPO from logits [S, L + 1, V], as whole models make them: the last position is not read. That
    layout is made beforehand."""
    from liger_kernel.transformers.grpo_loss import triton_grpo_loss

    if bool((problem.kind == REHEARSAL).any()):
        raise NotImplementedError("knows no rehearsal rows")
    config, shape = problem.config, (problem.sequences, problem.target.numel() // problem.sequences)
    policy, _ = factors(problem)
    padded = F.pad(logits.detach().view(*shape, -1), (0, 0, 0, 1))
    old, tokens = problem.old_logprob.view(shape), problem.target.view(shape)
    advantage = problem.advantage.view(shape)[:, 0].contiguous()

    def step() -> tuple[Tensor, Tensor]:
        leaf = padded.detach().requires_grad_()
        per_token = triton_grpo_loss(
            leaf, old, None, tokens, advantage, temperature=1.0, beta=0.0, eps_low=config.clip_low,
            eps_high=config.clip_high, inplace=False,
        )[0]  # fmt: skip
        loss = (per_token.reshape(-1) * policy).sum()
        loss.backward()
        assert leaf.grad is not None
        return loss.detach(), leaf.grad[:, :-1].reshape(logits.shape)

    return step


def logits_contenders(logits: Tensor, problem: Problem) -> list[Contender]:
    """`policy_loss` from logits that exist."""
    loss_of = loss_from_logprob(problem)

    def plain_loss(leaf: Tensor) -> Tensor:
        wide = leaf if leaf.dtype == torch.float64 else leaf.float()
        logprob = torch.log_softmax(wide, -1).gather(-1, problem.target.unsqueeze(-1)).squeeze(-1)
        return loss_of(logprob)

    def own_loss(leaf: Tensor) -> Tensor:
        return ops.policy_loss(
            leaf, problem.target, problem.kind, old_logprob=problem.old_logprob, advantage=problem.advantage,
            config=problem.config,
        ).loss  # fmt: skip

    def from_nll(nll: Callable[[Tensor, Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
        return lambda leaf: loss_of(-nll(leaf, problem.target))

    def with_gradient(make: Callable[[], Callable[[Tensor], Tensor]]) -> Callable[[], Step]:
        return lambda: with_gradients(make(), logits)

    return [
        Contender(OURS, with_gradient(lambda: own_loss), "ours"),
        Contender("plain PyTorch", with_gradient(lambda: plain_loss)),
        Contender("torch.compile", with_gradient(lambda: torch.compile(plain_loss, dynamic=False))),
        Contender("Liger Triton GRPO", lambda: _liger_triton(logits, problem)),
        Contender("flash-attn cross-entropy", with_gradient(lambda: from_nll(_flash_attn_nll()))),
        Contender("quack cross-entropy", with_gradient(lambda: from_nll(_quack_nll()))),
    ]
