"""The policy loss and the log-probs it is made of, with the bare matrix products as floor (table: bench/README.md)."""

from __future__ import annotations

import functools
import math
import time
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

import stable_rlhf.ops as ops
from bench.case import DTYPES, OURS, Case, Contender, Prepared, Settings, copy_floor, on_backend, with_backends
from bench.ops import peers
from bench.ops.accuracy import check, check_logits, check_logprob
from bench.ops.problem import PolicyContender, Problem, floors, make_problem, random_inputs
from stable_rlhf.ops.policy.products import has_native_products

PRODUCTS = {"policy": 3, "logprob": 1, "logprob-grad": 4}


@functools.cache
def real_inputs(model_name: str, text: str, rows: int, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """Float32 hidden states before the head at `rows` response tokens, the head's weight, and the tokens."""
    from stable_rlhf.data import read_comparisons
    from stable_rlhf.data.encoding import encode
    from stable_rlhf.models.loading import context_length, load_causal_lm, load_tokenizer

    model, tokenizer = load_causal_lm(model_name).to(device).eval(), load_tokenizer(model_name)
    longest = min(1024, context_length(model.config))
    states, tokens, count = [], [], 0
    for record in read_comparisons([text]).rows:
        best = record.responses[record.pairs[0][0] if record.pairs else 0]
        encoded = encode(tokenizer, record.prompt, best)
        ids = torch.tensor(encoded.ids[:longest], device=device)
        if len(ids) <= encoded.prompt_length:
            continue
        with torch.no_grad():
            states_here = model.base_model(ids[None]).last_hidden_state[0]
        states.append(states_here[encoded.prompt_length - 1 : -1])  # position t predicts token t + 1
        tokens.append(ids[encoded.prompt_length :])
        count += len(tokens[-1])
        if count >= rows:
            break
    if count < rows:
        raise ValueError(f"--text: only {count} response tokens; {rows} are wanted")
    weight = model.get_output_embeddings().weight.detach().float()
    return torch.cat(states)[:rows].float().contiguous(), weight.clone(), torch.cat(tokens)[:rows].contiguous()


def active_rows(case: Case) -> int:
    return max(1, round(case.shape.get("active", 1.0) * case.shape["rows"]))


def problem_of(case: Case, settings: Settings) -> Problem:
    shape, dtype, device = case.shape, DTYPES[case.dtype], torch.device(settings.device)
    if shape.get("states"):
        if settings.text is None:
            raise ImportError("not installed: real hidden states need --text FILE")
        hidden, weight, target = real_inputs(settings.model, settings.text, shape["rows"], device)
        hidden, weight = hidden.to(dtype), weight.to(dtype)
    else:
        sizes = (shape["rows"], shape["width"], shape["vocabulary"])
        hidden, weight, target = random_inputs(*sizes, dtype, device, settings.seed)
    workspace: int | None = None  # what the operation takes by itself
    if shape.get("chunks"):
        itemsize = dtype.itemsize if has_native_products(dtype, device) else 4
        workspace = math.ceil(active_rows(case) / shape["chunks"]) * weight.shape[0] * itemsize
    return make_problem(
        hidden, weight, target, active=shape.get("active", 1.0), clipped=shape.get("clipped", 0.0),
        rehearsal=shape.get("rehearsal", 0.0), workspace_bytes=workspace, seed=settings.seed,
    )  # fmt: skip


def own_contenders(case: Case, settings: Settings) -> list[PolicyContender]:
    contenders = [PolicyContender(OURS, peers.ours(), "ours", all_rows=True)]
    for name in settings.backends:
        build = functools.partial(lambda name, problem: on_backend(name, lambda: peers.ours()(problem))(), name)
        contenders.append(PolicyContender(f"{OURS}, {name} backend", build, "ours", all_rows=True))
    tolerance = case.shape.get("tolerance")
    if tolerance:
        own = peers.ours(grad_tolerance=tolerance)
        contenders.append(PolicyContender(f"{OURS}, tolerance {tolerance:g}", own, "ours", all_rows=True))
    return contenders


def too_slow(problem: Problem, products: int, limit: float) -> str | None:
    """Why no peer is worth its first call: this machine emulates the type's products, and they alone take longer than
    the limit. A few rows tell."""
    rows = min(32, problem.hidden.shape[0])
    x, weight = problem.hidden[:rows], problem.weight[: min(8192, problem.weight.shape[0])]
    x @ weight.t()
    begin = time.perf_counter()
    x @ weight.t()
    rate = rows * weight.shape[0] / (time.perf_counter() - begin)
    estimate = products * problem.index.numel() * problem.weight.shape[0] / rate
    return f"> {limit:g} s (emulated products)" if estimate > limit else None


_checked: dict[tuple[Any, ...], Mapping[str, Mapping[str, Any]]] = {}


def _once(key: tuple[Any, ...], names: list[str], make: Callable[[], Mapping[str, Any]]) -> Mapping[str, Any]:
    """A check per operation and type is enough: it is made on inputs of its own."""
    key = (*key, *names)
    if key not in _checked:
        _checked[key] = make()
    return _checked[key]


def prepare_linear(case: Case, settings: Settings) -> Prepared:
    """linear_policy_loss or linear_logprob: our contenders, the floors, the peers."""
    dtype, device, products = DTYPES[case.dtype], torch.device(settings.device), PRODUCTS[case.op]
    native, count = has_native_products(dtype, device), active_rows(case)
    problem = problem_of(case, settings)
    active = problem.active()
    if case.op == "policy":
        all_rows = settings.as_called and count < case.shape["rows"]
        contenders = own_contenders(case, settings) + peers.policy_peers(device, all_rows)
    else:
        contenders = peers.logprob_contenders(gradient=products > 1)
    bare = floors(products, count) if native else []
    if dtype != torch.float32 and device.type == "cpu":
        bare += floors(products, count, torch.float32, "float32 floor")
    slow = None if native else too_slow(problem, products, settings.limit)

    def checked(wanted: list[Contender]) -> Mapping[str, Mapping[str, Any]]:
        names = [c.name for c in wanted]
        kept = [c for c in contenders if c.name in names]
        key = (case.op, case.dtype, device.type, bool(case.shape.get("states")))
        if case.op == "policy":
            real = (problem.hidden, problem.weight, problem.target) if case.shape.get("states") else None
            results = _once(key, names, lambda: check(kept, dtype, device, real))
        else:
            results = _once(key, names, lambda: check_logprob(kept, products > 1, dtype, device))
        report = {name: dict(result) for name, result in results.items()}
        for name, result in report.items():
            if result.get("verdict") == "WRONG" and "tolerance" in name:
                result["verdict"] = "inexact, as asked"
            if slow and not name.startswith(OURS):
                report[name] = {"failure": slow}
        return report

    def bind(contender: PolicyContender) -> Contender:
        given = problem if contender.all_rows else active
        return Contender(contender.name, functools.partial(contender.build, given), contender.role, contender.note)

    vocabulary, width = problem.weight.shape
    read = problem.weight.nbytes + active.hidden.nbytes
    return Prepared(
        [bind(contender) for contender in contenders + bare],
        checked,
        # Useful work: the products that the result cannot do without. Making logits twice is not among it.
        flops=2.0 * min(products, 3) * count * width * vocabulary,
        moved=read * (1 if products == 1 else 2),
    )


def prepare_logits(case: Case, settings: Settings) -> Prepared:
    dtype, device = DTYPES[case.dtype], torch.device(settings.device)
    rows, vocabulary = case.shape["rows"], case.shape["vocabulary"]
    g = torch.Generator(device=device).manual_seed(settings.seed)
    logits = torch.empty(rows, vocabulary, dtype=dtype, device=device).normal_(0.0, 2.0, generator=g)
    target = torch.randint(0, vocabulary, (rows,), device=device, generator=g)
    here = ops.policy_loss(logits, target, torch.full_like(target, 2)).logprob
    one = torch.ones(1, 1, dtype=dtype, device=device)
    sequences = math.gcd(rows, 8)
    advantage = torch.randn(sequences, device=device, generator=g).repeat_interleave(rows // sequences)
    problem = Problem(
        one, one, target, torch.ones_like(target), here, advantage, None, sequences=sequences
    )  # of which only the rows' part is read
    contenders: list[Contender] = []
    for contender in peers.logits_contenders(logits, problem):
        contenders += with_backends(contender, settings) if contender.role == "ours" else [contender]
    moved = 2.0 * logits.nbytes
    return Prepared(
        [*contenders, copy_floor(moved, device)],
        lambda wanted: _once(("logits", case.dtype, device.type), [], lambda: check_logits(dtype, device)),
        flops=5.0 * logits.numel(),  # a maximum, an exponential, two sums, a product
        moved=moved,
    )
