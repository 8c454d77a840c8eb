"""Errors against float64: of every contender before it is timed, and of every output and gradient of our operations."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import stable_rlhf.ops as ops
from bench.common import describe
from bench.ops.peers import logits_contenders, logprob_contenders, plain
from bench.ops.problem import Contender, Problem, Step, factors, make_problem, mixed_loss, random_inputs
from stable_rlhf.ops import PolicyLossConfig

CHECK_ROWS, CHECK_WIDTH, CHECK_VOCABULARY = 160, 64, 5000

Errors = dict[str, float]  # relative (Euclidean norm) against float64, by the name of what is compared
Report = dict[str, dict[str, Any]]  # by contender: errors and verdict, or the failure


def relative_error(got: Tensor, want: Tensor) -> float:
    size = float(want.double().norm())
    distance = float((got.double() - want.double()).norm())
    return distance / size if size else distance


def verdict(errors: Errors, plain_errors: Errors, dtype: torch.dtype) -> str:
    """ "right", how many times the error of plain PyTorch it is, or "WRONG"."""
    if not max(errors.values()) <= (1e-3 if dtype == torch.float32 else 0.1):  # NaN is wrong too
        return "WRONG"
    # What is below the rounding of the result itself tells nothing about a contender.
    negligible = 1e-5 if dtype == torch.float32 else 4e-3
    ratios = [error / max(plain_errors[name], 1e-12) for name, error in errors.items() if error > negligible]
    if not ratios or max(ratios) <= 1.25:
        return "right"
    return f"{max(ratios):.1f} x plain"


def _judge(makers: Mapping[str, Callable[[], Errors]], plain_errors: Errors, dtype: torch.dtype) -> Report:
    report: Report = {}
    for name, make in makers.items():
        try:
            errors = make()
        except Exception as error:  # missing, or fails here: reported by name, never fatal
            report[name] = {"failure": describe(error)}
        else:
            report[name] = {"errors": errors, "verdict": verdict(errors, plain_errors, dtype)}
    return report


def _small_problem(inputs: tuple[Tensor, Tensor, Tensor]) -> Problem:
    """A mixed batch with clipped, rehearsal and inactive rows out of hidden states, weight and targets."""
    return make_problem(*inputs, active=0.8, clipped=0.2, rehearsal=0.25, workspace_bytes=256 << 20, seed=1)


def _random(dtype: torch.dtype, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    return random_inputs(CHECK_ROWS, CHECK_WIDTH, CHECK_VOCABULARY, dtype, device, seed=1)


def check(
    contenders: list[Contender],
    dtype: torch.dtype,
    device: torch.device,
    real: tuple[Tensor, Tensor, Tensor] | None = None,
) -> Report:
    """Loss and gradients of every contender on a small mixed batch, random or of `real` inputs, against float64."""
    if real is None:
        problem = _small_problem(_random(dtype, device))
    else:
        hidden, weight, target = real
        problem = _small_problem((hidden[:CHECK_ROWS].to(dtype), weight.to(dtype), target[:CHECK_ROWS]))
    active, rows = problem.active(), problem.index
    want = plain(active.to(torch.float64))()

    def errors_of(contender: Contender) -> Errors:
        got = contender.build(problem if contender.all_rows else active)()
        hidden_grad = got.hidden_grad
        if contender.all_rows:
            ignored = torch.ones(problem.kind.shape[0], dtype=torch.bool, device=device)
            ignored[rows] = False
            if bool(hidden_grad[ignored].any()):
                raise AssertionError("an inactive row has a gradient")
            hidden_grad = hidden_grad[rows]
        return {
            "loss": relative_error(got.loss, want.loss),
            "hidden": relative_error(hidden_grad, want.hidden_grad),
            "weight": relative_error(got.weight_grad, want.weight_grad),
        }

    makers = {c.name: functools.partial(errors_of, c) for c in contenders}
    return _judge(makers, errors_of(Contender("plain PyTorch", plain)), dtype)


def check_outputs(
    makers: Mapping[str, Callable[[], Step]], reference: Step, names: tuple[str, ...], dtype: torch.dtype
) -> Report:
    """Outputs of every contender, by position, against those of `reference` in float64."""
    want = reference()

    def errors_of(make: Callable[[], Step]) -> Errors:
        found = zip(names, make()(), want, strict=True)
        return {name: relative_error(a, b) for name, a, b in found}

    calls = {name: functools.partial(errors_of, make) for name, make in makers.items()}
    return _judge(calls, errors_of(makers["plain PyTorch"]), dtype)


def check_logprob(gradient: bool, dtype: torch.dtype, device: torch.device) -> Report:
    problem = _small_problem(_random(dtype, device)).active()
    wide = {c.name: c.build(problem.to(torch.float64)) for c in logprob_contenders(gradient)}
    names = ("log-prob", "hidden", "weight")[: 3 if gradient else 1]
    makers = {c.name: functools.partial(c.build, problem) for c in logprob_contenders(gradient)}
    return check_outputs(makers, wide["plain PyTorch"], names, dtype)


def check_logits(dtype: torch.dtype, device: torch.device) -> Report:
    inputs = _random(dtype, device)
    problem = make_problem(*inputs, active=1.0, clipped=0.2, rehearsal=0.0, workspace_bytes=256 << 20, seed=1)
    logits = (problem.hidden.float() @ problem.weight.float().t()).to(dtype)
    want = {name: make for name, _, make in logits_contenders(logits.double(), problem)}["plain PyTorch"]()
    return check_outputs(
        {name: make for name, _, make in logits_contenders(logits, problem)}, want, ("loss", "logits"), dtype
    )


# -- every output and gradient, ours beside plain PyTorch --------------------------------------------------------------

Outputs = dict[str, Tensor]


def _statistics(
    hidden: Tensor, weight: Tensor, bias: Tensor, target: Tensor, temperature: float
) -> tuple[Tensor, Tensor]:
    logits = F.linear(hidden, weight, bias)
    log_p = torch.log_softmax((logits if logits.dtype == torch.float64 else logits.float()) / temperature, -1)
    return log_p.gather(-1, target.unsqueeze(-1)).squeeze(-1), -(log_p.exp() * log_p).sum(-1)


def _with_gradients(inputs: list[Tensor], make: Callable[..., tuple[Tensor, Outputs]]) -> Outputs:
    leaves = [x.detach().clone().requires_grad_() for x in inputs]
    loss, outputs = make(*leaves)
    loss.backward()
    names = ("gradient of hidden", "gradient of weight", "gradient of bias")
    gradients = {name: leaf.grad for name, leaf in zip(names, leaves, strict=True) if leaf.grad is not None}
    return {name: value.detach() for name, value in (outputs | gradients).items()}


def error_table(problem: Problem, rows: int) -> list[dict[str, Any]]:
    """Errors on the first `rows` active rows: the loss as in the timed runs, with every option on, and log-probs."""
    small = problem.active()
    cut = {name: getattr(small, name)[:rows] for name in ("hidden", "target", "kind", "old_logprob", "advantage")}
    small = Problem(weight=small.weight, workspace_bytes=small.workspace_bytes, config=small.config, **cut)
    g = torch.Generator().manual_seed(2)
    device, dtype = small.hidden.device, small.hidden.dtype
    bias = (0.3 * torch.randn(small.weight.shape[0], generator=g)).to(device, dtype)
    reference = small.old_logprob + 0.3 * torch.randn(small.old_logprob.shape, generator=g).to(device)
    upstream = torch.randn(2, small.target.numel(), generator=g).to(device)
    everything = PolicyLossConfig(kl_coef=0.1, entropy_coef=0.05, rehearsal_coef=0.5)
    policy, rehearsal = factors(small)
    inputs = [small.hidden, small.weight, bias]
    wide = [x.double() for x in inputs]

    def plain_policy(config: PolicyLossConfig, temperature: float) -> Callable[..., tuple[Tensor, Outputs]]:
        def make(hidden: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, Outputs]:
            logprob, entropy = _statistics(hidden, weight, bias, small.target, temperature)
            scaled = rehearsal * (config.rehearsal_coef / small.config.rehearsal_coef)
            loss = mixed_loss(logprob, small.old_logprob, small.advantage, policy, scaled, config)
            away = reference - logprob
            loss = loss + (policy * (config.kl_coef * (away.exp() - away - 1.0) - config.entropy_coef * entropy)).sum()
            return loss, {"loss": loss, "log-prob": logprob, "entropy": entropy}

        return make

    def own_policy(config: PolicyLossConfig, temperature: float) -> Callable[..., tuple[Tensor, Outputs]]:
        def make(hidden: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, Outputs]:
            out = ops.linear_policy_loss(
                hidden, weight, small.target, small.kind, old_logprob=small.old_logprob, advantage=small.advantage,
                ref_logprob=reference, bias=bias, temperature=temperature, config=config,
                workspace_bytes=small.workspace_bytes,
            )  # fmt: skip
            return out.loss, {"loss": out.loss, "log-prob": out.logprob, "entropy": out.entropy}

        return make

    def plain_statistics(hidden: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, Outputs]:
        logprob, entropy = _statistics(hidden, weight, bias, small.target, 1.0)
        return (upstream[0] * logprob + upstream[1] * entropy).sum(), {"log-prob": logprob, "entropy": entropy}

    def own_statistics(hidden: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, Outputs]:
        logprob, entropy = ops.linear_logprob(
            hidden, weight, small.target, bias=bias, entropy=True, workspace_bytes=small.workspace_bytes
        )
        assert entropy is not None
        return (upstream[0] * logprob + upstream[1] * entropy).sum(), {"log-prob": logprob, "entropy": entropy}

    compared = {
        "linear_policy_loss": (own_policy(small.config, 1.0), plain_policy(small.config, 1.0)),
        "linear_policy_loss, KL + entropy, temperature 0.7": (
            own_policy(everything, 0.7),
            plain_policy(everything, 0.7),
        ),
        "linear_logprob": (own_statistics, plain_statistics),
    }
    report = []
    for operation, (own, other) in compared.items():
        want = _with_gradients(wide, other)
        got, theirs = _with_gradients(inputs, own), _with_gradients(inputs, other)
        for name, truth in want.items():
            ours, plain_error = relative_error(got[name], truth), relative_error(theirs[name], truth)
            report.append({"operation": operation, "what": name, "error": ours, "plain_error": plain_error})
    return report
