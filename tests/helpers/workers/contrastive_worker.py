"""Two ranks that share a batch: losses and gradients against those of one process that holds all rows."""

from __future__ import annotations

import os

import torch
import torch.distributed as dist

import stable_rlhf.ops as ops
from stable_rlhf.engine.process import finish

WIDTH = 9


def close(got: torch.Tensor, want: torch.Tensor, dtype: torch.dtype) -> None:
    scale = {torch.float64: 1e-10, torch.float32: 1e-5, torch.bfloat16: 2e-2}[dtype]
    error = float((got.double() - want.double()).norm() / want.double().norm())
    assert error <= scale, error


def check(rank: int, counts: list[int], dtype: torch.dtype) -> None:
    g = torch.Generator().manual_seed(sum(counts))
    a = torch.randn(sum(counts), WIDTH, generator=g)
    inputs = [a, a + torch.randn(a.shape, generator=g), torch.randn(5, WIDTH, generator=g)]
    inputs = [x.to(dtype) for x in inputs]
    mine = slice(sum(counts[:rank]), sum(counts[: rank + 1]))
    world = {"process_group": dist.group.WORLD}
    for operation, tensors, options in (
        (ops.info_nce, 2, {"workspace_bytes": 3 * 4 * sum(counts)}),
        (ops.swav_loss, 3, {"iterations": 4}),
    ):
        whole = [x.clone().requires_grad_() for x in inputs[:tensors]]
        part = [x[mine].clone().requires_grad_() for x in inputs[:2]] + [
            x.clone().requires_grad_() for x in inputs[2:tensors]
        ]
        want, got = operation(*whole, **options), operation(*part, **options, **world)
        (3 * want).backward()
        (3 * got).backward()
        close(got.detach(), want.detach(), torch.float32 if dtype == torch.bfloat16 else dtype)
        for ours, theirs in zip(part[:2], whole[:2], strict=True):
            if counts[rank]:
                close(ours.grad, theirs.grad[mine], dtype)
        if tensors == 3:  # a replicated parameter: each rank has its share
            total = part[2].grad.clone()
            dist.all_reduce(total)
            close(total, whole[2].grad, dtype)


def errors(rank: int) -> None:
    """What is wrong on one rank is an error on both, and neither waits for the other."""
    good = torch.ones(3, WIDTH)
    cases = [
        ("b: ", good, torch.full_like(good, torch.nan) if rank == 1 else good),
        ("width", torch.ones(3, WIDTH + rank), torch.ones(3, WIDTH + rank)),
        ("type", *(good.to(torch.bfloat16 if rank else torch.float32) for _ in range(2))),
        ("a: no rows", good[:0], good[:0]),
        ("b: requires a gradient on some ranks", good, good.clone().requires_grad_(rank == 0)),
    ]
    for said, a, b in cases:
        try:
            ops.info_nce(a, b, process_group=dist.group.WORLD)
        except ValueError as error:
            assert said in str(error), error
        else:
            raise AssertionError(f"no error: {said}")
    try:
        ops.swav_loss(good, good, torch.ones(2 + rank, WIDTH), process_group=dist.group.WORLD)
    except ValueError as error:
        assert "differ in rows of prototypes" in str(error), error
    else:
        raise AssertionError("prototypes of different number were taken")


def main() -> None:
    dist.init_process_group("gloo")
    torch.set_num_threads(1)
    rank = int(os.environ["RANK"])
    for dtype in (torch.float32, torch.bfloat16, torch.float64):  # float64: plain PyTorch
        check(rank, [4, 7], dtype)
    check(rank, [3, 0], torch.float32)
    errors(rank)
    dist.barrier()  # no rank ends while another still talks to it
    finish()


if __name__ == "__main__":
    main()
