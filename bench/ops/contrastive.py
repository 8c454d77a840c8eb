"""The contrastive losses, forward + backward, beside the bare matrix products that they cannot do without.

InfoNCE on B rows needs three (similarities [B, B] and the gradients of both sides), SwAV three for both views together
(scores [2 B, K], the gradients of the rows and of the prototypes). Scaling rows to unit length, and its gradient, comes
on top for everybody.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import stable_rlhf.ops as ops
from bench.case import DTYPES, OURS, Case, Contender, Prepared, Settings, on_reference, with_backends
from bench.ops.accuracy import check_outputs
from bench.ops.problem import bare_products, with_gradients
from stable_rlhf.ops.policy.products import has_native_products

CHECKED = {"rows": 160, "width": 64, "prototypes": 20}  # sizes of the inputs on which errors are looked at
TEMPERATURE, EPSILON, ITERATIONS = 0.1, 0.05, 3  # of SwAV


def plain_info_nce(a: Tensor, b: Tensor) -> Tensor:
    similarity = F.normalize(a, dim=1) @ F.normalize(b, dim=1).T
    wide = similarity if similarity.dtype == torch.float64 else similarity.float()
    return F.cross_entropy(wide / 0.05, torch.arange(a.shape[0], device=a.device))


def _codes(scores: Tensor) -> Tensor:
    """As in the authors' code: the whole matrix divided by its sums in turn."""
    q = torch.exp(scores / EPSILON).T
    q = q / q.sum()
    for _ in range(ITERATIONS):
        q = q / q.sum(1, keepdim=True) / q.shape[0]
        q = q / q.sum(0, keepdim=True) / q.shape[1]
    return (q * q.shape[1]).T


def plain_swav(a: Tensor, b: Tensor, prototypes: Tensor) -> Tensor:
    centres = F.normalize(prototypes, dim=1)
    scores = [F.normalize(x, dim=1) @ centres.T for x in (a, b)]
    scores = [s if s.dtype == torch.float64 else s.float() for s in scores]
    with torch.no_grad():
        first, second = (_codes(s) for s in scores)
    terms = [
        (q * F.log_softmax(s / TEMPERATURE, dim=1)).sum(1).mean() for q, s in zip((second, first), scores, strict=True)
    ]
    return -0.5 * (terms[0] + terms[1])


def own_swav(a: Tensor, b: Tensor, prototypes: Tensor) -> Tensor:
    return ops.swav_loss(a, b, prototypes, temperature=TEMPERATURE, epsilon=EPSILON, iterations=ITERATIONS)


LOSSES: dict[str, tuple[Callable[..., Tensor], Callable[..., Tensor]]] = {
    "info-nce": (ops.info_nce, plain_info_nce),
    "swav": (own_swav, plain_swav),
}


def _inputs(op: str, shape: Any, dtype: torch.dtype, device: torch.device, seed: int) -> list[Tensor]:
    """Rows and their partners (cosine about 0.8), and prototypes."""
    g = torch.Generator().manual_seed(seed)
    a = torch.randn(shape["rows"], shape["width"], generator=g)
    tensors = [a, a + 0.7 * torch.randn(a.shape, generator=g)]
    if op == "swav":
        tensors.append(torch.randn(shape["prototypes"], shape["width"], generator=g))
    return [x.to(device, dtype) for x in tensors]


def _floors(op: str, inputs: list[Tensor], native: bool) -> list[Contender]:
    """The products over chunks of 512, 1024 and 2048 rows and over all at once; the fastest is the floor."""
    given = inputs if native else [x.float() for x in inputs]
    rows, other = (given[0], given[1]) if op == "info-nce" else (torch.cat(given[:2]), given[2])
    count, label = rows.shape[0], "floor" if native else "float32 floor"
    sizes = {f"{label}, chunks of {size}": size for size in (512, 1024, 2048) if size < count}
    sizes[f"{label}, all rows"] = count
    return [
        Contender(name, functools.partial(bare_products, rows, other, 3, size), "floor") for name, size in sizes.items()
    ]


def prepare(case: Case, settings: Settings) -> Prepared:
    dtype, device, shape = DTYPES[case.dtype], torch.device(settings.device), case.shape
    own_loss, plain_loss = LOSSES[case.op]
    inputs = _inputs(case.op, shape, dtype, device, settings.seed)
    small = _inputs(case.op, CHECKED, dtype, device, 1)

    def contenders(given: list[Tensor]) -> list[Contender]:
        own = Contender(OURS, lambda: with_gradients(own_loss, *given), "ours")
        return [
            *with_backends(own, settings),
            on_reference(own),
            Contender("plain PyTorch", lambda: with_gradients(plain_loss, *given)),
            Contender("torch.compile", lambda: with_gradients(torch.compile(plain_loss, dynamic=False), *given)),
        ]

    def checked(wanted: list[Contender]) -> dict[str, dict[str, Any]]:
        names = {c.name for c in wanted} | {"plain PyTorch"}
        makers = {c.name: c.make for c in contenders(small) if c.name in names}
        compared = ("loss", "a", "b", "prototypes")[: 1 + len(small)]
        return check_outputs(makers, with_gradients(plain_loss, *(x.double() for x in small)), compared, dtype)

    count, width = shape["rows"], shape["width"]
    products = float(count) * count if case.op == "info-nce" else 2.0 * count * shape["prototypes"]
    return Prepared(
        contenders(inputs) + _floors(case.op, inputs, has_native_products(dtype, device)),
        checked,
        flops=3 * 2.0 * width * products,
        moved=2.0 * sum(x.nbytes for x in inputs),
    )
