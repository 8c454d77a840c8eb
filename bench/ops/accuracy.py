"""Errors against float64 of every contender, before it is timed."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from bench.common import Step, describe
from bench.ops.peers import logits_contenders, logprob_contenders, plain
from bench.ops.problem import PolicyContender, Problem, make_problem, random_inputs

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
    return make_problem(*inputs, active=0.8, clipped=0.2, rehearsal=0.25, workspace_bytes=None, seed=1)


def _random(dtype: torch.dtype, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    return random_inputs(CHECK_ROWS, CHECK_WIDTH, CHECK_VOCABULARY, dtype, device, seed=1)


def check(
    contenders: list[PolicyContender],
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
    names = ("loss", "hidden", "weight")

    def errors_of(contender: PolicyContender) -> Errors:
        loss, hidden_grad, weight_grad = contender.build(problem if contender.all_rows else active)()
        if contender.all_rows:
            ignored = torch.ones(problem.kind.shape[0], dtype=torch.bool, device=device)
            ignored[rows] = False
            if bool(hidden_grad[ignored].any()):
                raise AssertionError("an inactive row has a gradient")
            hidden_grad = hidden_grad[rows]
        got = zip(names, (loss, hidden_grad, weight_grad), want, strict=True)
        return {name: relative_error(a, b) for name, a, b in got}

    makers = {c.name: functools.partial(errors_of, c) for c in contenders}
    return _judge(makers, errors_of(PolicyContender("plain PyTorch", plain)), dtype)


def check_outputs(
    makers: Mapping[str, Callable[[], Step]], reference: Step, names: tuple[str, ...], dtype: torch.dtype
) -> Report:
    """Outputs of every contender, by position, against those of `reference` in float64."""
    want = reference()

    def errors_of(make: Callable[[], Step]) -> Errors:
        pairs = zip(names, make()(), want, strict=True)
        return {name: relative_error(a, b) for name, a, b in pairs}

    calls = {name: functools.partial(errors_of, make) for name, make in makers.items()}
    return _judge(calls, errors_of(makers["plain PyTorch"]), dtype)


def check_logprob(
    contenders: list[PolicyContender], gradient: bool, dtype: torch.dtype, device: torch.device
) -> Report:
    """Log-probs, and with `gradient` those of their sum, of every contender against float64."""
    problem = _small_problem(_random(dtype, device)).active()
    judge = next(c for c in logprob_contenders(gradient) if c.name == "plain PyTorch")
    names = ("log-prob", "hidden", "weight")[: 3 if gradient else 1]
    makers = {c.name: functools.partial(c.build, problem) for c in (judge, *contenders)}
    return check_outputs(makers, judge.build(problem.to(torch.float64)), names, dtype)


def check_logits(dtype: torch.dtype, device: torch.device) -> Report:
    inputs = _random(dtype, device)
    problem = make_problem(*inputs, active=1.0, clipped=0.2, rehearsal=0.0, workspace_bytes=None, seed=1)
    logits = (problem.hidden.float() @ problem.weight.float().t()).to(dtype)
    want = {c.name: c.make for c in logits_contenders(logits.double(), problem)}["plain PyTorch"]()
    makers = {c.name: c.make for c in logits_contenders(logits, problem)}
    return check_outputs(makers, want, ("loss", "logits"), dtype)
