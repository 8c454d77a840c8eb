"""The calls that are counted: every operation that has a CUDA path, at the sizes that matter for it."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from bench.count.device import CUDA, MIB
from bench.count.rates import Rates
from bench.presets import GPU_SHAPES
from stable_rlhf import ops
from stable_rlhf.ops.policy.types import Kind

Step = Callable[[], Any]
Shape = tuple[int, int, int]  # T, H, V

SHAPES: tuple[Shape, ...] = tuple((s["rows"], s["width"], s["vocabulary"]) for s in GPU_SHAPES)
ACTIVE, REHEARSAL, DROPPED = 0.45, 0.1, 0.2  # of all rows; of the active rows; of the policy rows


@dataclass(frozen=True)
class Case:
    """One call.

    Args:
        name: what tells it from others of its operation.
        build: makes its inputs and returns the call; what that returns is held until all is counted.
        floor: seconds below which no implementation gets.
        limit: bytes up to which new tensors have data.
        capturing: under graph capture.
        shape: its sizes.
        parts: where every program has to run, because what one does depends on what others found, this would take
            hours: the call is then made at two shares of its size, and what they differ by is gone on with.
        parted: the same call at a share of its size.
    """

    op: str
    name: str
    build: Callable[[], Step]
    floor: Callable[[Rates], float]
    limit: int = 4 * MIB
    capturing: bool = False
    shape: dict[str, int] = field(default_factory=dict)
    parts: tuple[float, float] | None = None
    parted: Callable[[float], Step] | None = None

    @property
    def key(self) -> str:
        return f"{self.op}: {self.name}"


def _leaf(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    return torch.empty(*shape, dtype=dtype, device=CUDA)


def _rows(count: int, vocabulary: int, mixed: bool) -> tuple[Tensor, dict[str, Any]]:
    """Targets and what a loss wants of each row. Logits without data are all alike, so every log-prob is that of a
    uniform softmax, or a higher one where not all columns were gone over. With that as the old one no row of a negative
    advantage is clipped, and those without an advantage have no gradient."""
    kind = torch.full((count,), int(Kind.POLICY), dtype=torch.int64)
    advantage = torch.full((count,), -1.0)
    if mixed:
        order = torch.randperm(count, generator=torch.Generator().manual_seed(0))
        active = order[: round(ACTIVE * count)]
        kind[order[len(active) :]] = int(Kind.IGNORED)
        rehearsed = round(REHEARSAL * len(active))
        kind[active[:rehearsed]] = int(Kind.REHEARSAL)
        dropped = round(DROPPED * (len(active) - rehearsed))
        advantage[active[rehearsed : rehearsed + dropped]] = 0.0
    target = torch.arange(count) % vocabulary
    old = torch.full((count,), -math.log(vocabulary))
    given = {"kind": kind, "advantage": advantage, "old_logprob": old}
    return target.to(CUDA), {name: value.to(CUDA) for name, value in given.items()}


def policy_step(shape: Shape, mixed: bool, **options: Any) -> Step:
    rows, width, vocabulary = shape
    hidden, weight = _leaf(rows, width), _leaf(vocabulary, width)
    target, given = _rows(rows, vocabulary, mixed)

    def step() -> Any:
        x, w = hidden.detach().requires_grad_(), weight.detach().requires_grad_()
        out = ops.linear_policy_loss(x, w, target, **given, **options)
        out.loss.backward()
        return out, x.grad, w.grad

    return step


def _logprob(shape: Shape, **options: Any) -> Step:
    rows, width, vocabulary = shape
    hidden, weight = _leaf(rows, width), _leaf(vocabulary, width)
    target, _given = _rows(rows, vocabulary, False)

    def step() -> Any:
        with torch.no_grad():
            return ops.linear_logprob(hidden, weight, target, **options)

    return step


def _logits(rows: int, vocabulary: int) -> Step:
    logits = _leaf(rows, vocabulary)
    target, given = _rows(rows, vocabulary, False)

    def step() -> Any:
        leaf = logits.detach().requires_grad_()
        out = ops.policy_loss(leaf, target, **given)
        out.loss.backward()
        return out, leaf.grad

    return step


def _advantage(pairs: int, alternates: int, length: int) -> Step:
    reward, expected = (torch.linspace(-1.0, 1.0, n).to(CUDA) for n in (2 * pairs, pairs))
    options: dict[str, Any] = {}
    if alternates:
        tokens = 2 * pairs * length
        options = {
            "logprob": _leaf(tokens, dtype=torch.float32),
            "alt_logprob": _leaf(alternates, tokens, dtype=torch.float32),
            "cu_seqlens": torch.arange(0, tokens + 1, length).to(CUDA),
        }

    def step() -> Any:
        r, e = reward.detach().requires_grad_(), expected.detach().requires_grad_()
        out = ops.advantage_loss(r, e, **options)
        out.loss.backward()
        return out, r.grad, e.grad

    return step


def _gae(sequences: int, length: int) -> Step:
    tokens = sequences * length
    reward, value = (_leaf(tokens, dtype=torch.float32) for _ in range(2))
    limits = torch.arange(0, tokens + 1, length).to(CUDA)
    return lambda: ops.gae(reward, value, limits)


def _token_rewards(sequences: int, length: int) -> Step:
    tokens = sequences * length
    logprob, reference = (_leaf(tokens, dtype=torch.float32) for _ in range(2))
    score, limits = torch.zeros(sequences).to(CUDA), torch.arange(0, tokens + 1, length).to(CUDA)
    return lambda: ops.token_rewards(logprob, reference, score, limits, kl_coef=0.1, kl_estimator="k3")


def _whiten(tokens: int) -> Step:
    x, mask = _leaf(tokens, dtype=torch.float32), torch.ones(tokens, dtype=torch.bool).to(CUDA)
    return lambda: ops.masked_whiten(x, mask)


def _topk(rows: int, clusters: int, keep: int) -> Step:
    g = torch.Generator().manual_seed(0)
    score = torch.rand(rows, generator=g).to(CUDA)
    cluster = torch.randint(0, clusters, (rows,), generator=g).to(CUDA)
    return lambda: ops.topk_by_cluster(score, cluster, clusters, keep)


def _active(shape: Shape) -> int:
    return round(ACTIVE * shape[0])


def policy_cases(shape: Shape) -> list[Case]:
    rows, width, vocabulary = shape
    sizes = {"rows": rows, "width": width, "vocabulary": vocabulary}
    at = f"{rows}, {width}, {vocabulary}"

    def products(count: int, each: int) -> Callable[[Rates], float]:
        return lambda rates: rates.floor_of_products(2.0 * each * count * width * vocabulary)

    def case(op: str, name: str, build: Callable[[], Step], floor: Callable[[Rates], float], **more: Any) -> Case:
        return Case(op, name, build, floor, shape=sizes, **more)

    op = "linear_policy_loss"
    cases = [
        case(op, f"{at}, all active", lambda: policy_step(shape, False), products(rows, 3)),
        case(op, f"{at}, 45 % active", lambda: policy_step(shape, True), products(_active(shape), 3)),
        case(op, f"{at}, captured", lambda: policy_step(shape, False), products(rows, 3), capturing=True),
        case("linear_logprob", f"{at}, no gradient", lambda: _logprob(shape), products(rows, 1)),
    ]
    if shape == SHAPES[0]:
        cases.insert(
            2, case(op, f"{at}, 45 % active, count given", lambda: policy_step(shape, True, active_rows=_active(shape)),
                    products(_active(shape), 3)),
        )  # fmt: skip
        cases.insert(3, case(op, f"{at}, 256 MiB", lambda: policy_step(shape, False, workspace_bytes=256 * MIB),
                             products(rows, 3)))  # fmt: skip
    return cases


def _bytes_case(
    op: str, name: str, build: Callable[[], Step], moved: float, limit: int = 4 * MIB, **sizes: int
) -> Case:
    return Case(op, name, build, lambda rates: rates.floor_of_bytes(moved), limit, shape=sizes)


def topk_case(rows: int, clusters: int, keep: int, parts: tuple[float, float]) -> Case:
    """Scores and clusters read once, and the kept indices written."""

    def parted(share: float) -> Step:
        return _topk(round(share * rows), round(share * clusters), keep)

    moved = 12.0 * rows + 8.0 * clusters * keep
    return Case(
        "topk_by_cluster", f"{rows} rows, {clusters} clusters, {keep} each", lambda: parted(1.0),
        lambda rates: rates.floor_of_bytes(moved), 256 * MIB,
        shape={"rows": rows, "clusters": clusters, "keep": keep}, parts=parts, parted=parted,
    )  # fmt: skip


def _logits_case(rows: int, vocabulary: int) -> Case:
    return _bytes_case(
        "policy_loss", f"{rows}, {vocabulary}", lambda: _logits(rows, vocabulary), 4.0 * rows * vocabulary,
        rows=rows, vocabulary=vocabulary,
    )  # fmt: skip


def _advantage_case(pairs: int, alternates: int, length: int) -> Case:
    tokens = 2 * pairs * length if alternates else 0
    # Log-probs; reward, its score and its gradient of two responses a pair; expected and its gradient.
    moved = 4.0 * tokens * (alternates + 1) + 4.0 * 8 * pairs
    return _bytes_case(
        "advantage_loss", f"K {alternates}, {pairs} pairs", lambda: _advantage(pairs, alternates, length), moved, MIB,
        pairs=pairs, alternates=alternates, length=length,
    )  # fmt: skip


def small_cases() -> list[Case]:
    packed = {"sequences": 4096, "length": 1024}
    tokens = 4096 * 1024
    return [
        *(_logits_case(8192, vocabulary) for vocabulary in (151_936, 250_880)),
        *(_advantage_case(1024, alternates, 512) for alternates in (0, 4)),
        _bytes_case("gae", "4096 x 1024", lambda: _gae(4096, 1024), 16.0 * tokens, **packed),
        _bytes_case("token_rewards", "4096 x 1024", lambda: _token_rewards(4096, 1024), 12.0 * tokens, **packed),
        _bytes_case("masked_whiten", "4096 x 1024", lambda: _whiten(tokens), 9.0 * tokens, **packed),
        topk_case(10_000_000, 1000, 10, parts=(1 / 50, 1 / 25)),
    ]


def all_cases() -> list[Case]:
    return [case for shape in SHAPES for case in policy_cases(shape)] + small_cases()
