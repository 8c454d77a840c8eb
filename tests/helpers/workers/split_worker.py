"""Two ranks: a split vocabulary against the whole one, and the head module under ZeRO-3 and FSDP2 against none."""

from __future__ import annotations

import os
import sys

import torch
import torch.distributed as dist
from torch import nn

import stable_rlhf.ops as ops
from stable_rlhf.engine.process import finish
from stable_rlhf.integrations.verl import linear_cross_entropy
from stable_rlhf.ops import PolicyHead, PolicyLossConfig

ROWS, VOCABULARY, WIDTH = 37, 101, 12


def case(dtype):
    g = torch.Generator().manual_seed(0)
    inputs = {
        "hidden": torch.randn(ROWS, WIDTH, generator=g).to(dtype),
        "weight": (0.5 * torch.randn(VOCABULARY, WIDTH, generator=g)).to(dtype),
        "bias": (0.2 * torch.randn(VOCABULARY, generator=g)).to(dtype),
    }
    target = torch.randint(0, VOCABULARY, (ROWS,), generator=g)
    target[::9] = -100
    options = {
        "kind": torch.randint(0, 3, (ROWS,), generator=g),
        "old_logprob": -4 + torch.randn(ROWS, generator=g),
        "ref_logprob": -4 + torch.randn(ROWS, generator=g),
        "advantage": torch.randn(ROWS, generator=g),
        "temperature": 0.5 + torch.rand(ROWS, generator=g),
        "config": PolicyLossConfig(kl_coef=0.2, entropy_coef=0.1, softcap=6.0, rehearsal_coef=0.5),
    }
    return inputs, target, options


def close(got, want, dtype) -> None:
    scale = 1e-5 if dtype == torch.float32 else 2e-2
    error = float((got.double() - want.double()).norm() / want.double().norm())
    assert error <= scale, error


BY_SEQUENCE = {
    "config": PolicyLossConfig(kl_coef=0.2, kl_unbiased=True, entropy_coef=0.1, importance_level="sequence"),
    "cu_seqlens": torch.tensor([0, 9, 9, 20, ROWS]),
}
CISPO = {"config": PolicyLossConfig(objective="cispo", kl_coef=0.1, kl_estimator="k3+", entropy_coef=0.1)}


def split_vocabulary(rank: int, dtype: torch.dtype, **more) -> None:
    inputs, target, options = case(dtype)
    options |= more
    mine = slice(0, 40) if rank == 0 else slice(40, VOCABULARY)  # slices of different sizes
    whole = {n: v.clone().requires_grad_() for n, v in inputs.items()}
    part = {n: (v if n == "hidden" else v[mine]).clone().requires_grad_() for n, v in inputs.items()}
    results = []
    for leaves, extra in ((whole, {}), (part, {"process_group": dist.group.WORLD, "workspace_bytes": 3000})):
        out = ops.linear_policy_loss(
            leaves["hidden"], leaves["weight"], target, bias=leaves["bias"], **options, **extra
        )
        out.loss.backward()
        logprob, entropy = ops.linear_logprob(
            leaves["hidden"], leaves["weight"], target, bias=leaves["bias"], softcap=6.0, entropy=True, **extra
        )
        (logprob.square().sum() + entropy.sum()).backward()
        results.append([out.loss.detach(), out.logprob, out.entropy, logprob.detach(), entropy.detach()])
    for got, want in zip(results[1], results[0], strict=True):
        close(got, want, dtype)
    close(part["hidden"].grad, whole["hidden"].grad, dtype)
    close(part["weight"].grad, whole["weight"].grad[mine], dtype)
    close(part["bias"].grad, whole["bias"].grad[mine], dtype)
    logits = inputs["hidden"].float() @ inputs["weight"].float().T
    leaf, slice_leaf = logits.clone().requires_grad_(), logits[:, mine].clone().requires_grad_()
    ops.policy_loss(leaf, target, **options).loss.backward()
    ops.policy_loss(slice_leaf, target, **options, process_group=dist.group.WORLD).loss.backward()
    close(slice_leaf.grad, leaf.grad[:, mine], torch.float32)
    bad = target.clone()
    bad[0] = VOCABULARY
    try:
        ops.linear_policy_loss(part["hidden"], part["weight"], bad, **options, process_group=dist.group.WORLD)
    except ValueError as error:
        assert f"outside [0, {VOCABULARY})" in str(error)
    else:
        raise AssertionError("a target outside the whole vocabulary was taken")


class Gathered(torch.autograd.Function):
    """Megatron's gather before the head, of hidden states that are whole already: on the way back it sums, or not."""

    @staticmethod
    def forward(ctx, hidden, sums):
        ctx.tensor_parallel_output_grad = sums
        return hidden.clone()

    @staticmethod
    def backward(ctx, gradient):
        gradient = gradient.clone()
        if ctx.tensor_parallel_output_grad:
            dist.all_reduce(gradient)
        return gradient, None


def verls_function(rank: int) -> None:
    """The gradient below Megatron's gather, whether it sums the ranks' or not, is that of one rank with it all."""
    inputs, _, _ = case(torch.float32)
    labels = torch.randint(0, VOCABULARY, (ROWS,), generator=torch.Generator().manual_seed(1))
    mine = slice(0, 40) if rank == 0 else slice(40, VOCABULARY)
    found = []
    for weight, gather, group in (
        (inputs["weight"], None, None), *((inputs["weight"][mine], sums, dist.group.WORLD) for sums in (True, False))
    ):  # fmt: skip
        hidden, weight = inputs["hidden"].clone().requires_grad_(), weight.clone().requires_grad_()
        given = hidden if gather is None else Gathered.apply(hidden, gather)
        logprob, entropy = linear_cross_entropy(given, weight, labels, 0.7, "none", group)
        (logprob.square().sum() + entropy.sum()).backward()
        found.append((hidden.grad, weight.grad))
    for hidden_grad, weight_grad in found[1:]:
        close(hidden_grad, found[0][0], torch.float32)
        close(weight_grad, found[0][1][mine], torch.float32)


class Tied(nn.Module):
    """A language model in miniature: the head is the embedding."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embedding = nn.Embedding(VOCABULARY, WIDTH)
        self.body = nn.Linear(WIDTH, WIDTH)
        self.head = PolicyHead(self.embedding.weight)

    def forward(self, ids, target, **options):
        return self.head(torch.tanh(self.body(self.embedding(ids))), target, **options).loss


def steps(model, step) -> list[float]:
    _, target, options = case(torch.float32)
    ids = torch.arange(ROWS) % VOCABULARY
    return [step(model, ids, target, options) for _ in range(3)]


def plain_step(optimizer):
    def step(model, ids, target, options):
        optimizer.zero_grad()
        loss = model(ids, target, **options)
        loss.backward()
        optimizer.step()
        return float(loss.detach())

    return step


def expected() -> list[float]:
    model = Tied()
    return steps(model, plain_step(torch.optim.SGD(model.parameters(), lr=0.02)))


def under_fsdp(want: list[float]) -> None:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    model = Tied()
    fully_shard(model, mesh=init_device_mesh("cpu", (dist.get_world_size(),)))
    _, target, options = case(torch.float32)
    try:
        ops.linear_policy_loss(torch.zeros(ROWS, WIDTH), model.head.weight, target, **options)
    except ValueError as error:
        assert str(error).startswith("weight: a DTensor"), error
    else:
        raise AssertionError("a shard was taken for the whole weight")
    got = steps(model, plain_step(torch.optim.SGD(model.parameters(), lr=0.02)))
    assert torch.allclose(torch.tensor(got), torch.tensor(want), rtol=1e-5), (got, want)


def under_zero(stage: int, want: list[float]) -> None:
    import deepspeed

    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    model = Tied()
    engine, *_ = deepspeed.initialize(
        model=model,
        optimizer=torch.optim.SGD(model.parameters(), lr=0.02),
        config={
            "train_micro_batch_size_per_gpu": 1,
            "zero_optimization": {"stage": stage},
            "zero_allow_untested_optimizer": True,
            "gradient_clipping": 0.0,
        },
    )

    def step(model, ids, target, options):
        loss = model(ids, target, **options)
        model.backward(loss)
        model.step()
        return float(loss.detach())

    got = steps(engine, step)
    assert torch.allclose(torch.tensor(got), torch.tensor(want), rtol=1e-5), (got, want)


def main() -> None:
    dist.init_process_group("gloo")
    torch.set_num_threads(1)
    rank = int(os.environ["RANK"])
    if sys.argv[1] == "split":
        for dtype in (torch.float32, torch.bfloat16):
            for more in ({}, BY_SEQUENCE, CISPO):
                split_vocabulary(rank, dtype, **more)
        verls_function(rank)
    elif sys.argv[1] == "fsdp":
        under_fsdp(expected())
    else:
        under_zero(int(sys.argv[1]), expected())
    finish()


if __name__ == "__main__":
    main()
