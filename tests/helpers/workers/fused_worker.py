"""A fused transformers model under FSDP2 and ZeRO-3: losses of some steps, against one process. Under torchrun."""

from __future__ import annotations

import os
import sys

import torch
import torch.distributed as dist
from transformers import LlamaConfig, LlamaForCausalLM

from stable_rlhf.integrations.transformers import fuse_lm_head, fused_policy_loss
from stable_rlhf.ops import PolicyLossConfig

LENGTH, STEPS = 7, 4


def build() -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        tie_word_embeddings=sys.argv[2] == "tied",
    )  # fmt: skip
    model = LlamaForCausalLM(config)
    fuse_lm_head(model)
    return model


def losses(model, step, rows: slice) -> list[float]:
    generator, found = torch.Generator().manual_seed(1), []
    for _ in range(STEPS):
        ids = torch.randint(0, 64, (2, LENGTH), generator=generator)[rows]
        advantage = torch.randn(2, LENGTH, generator=generator)[rows]
        old = -4.0 - torch.rand(2, LENGTH, generator=generator)[rows]  # 16 bits would round them
        target = torch.nn.functional.pad(ids[:, 1:], (0, 1), value=-100)
        output = fused_policy_loss(
            model, {"input_ids": ids}, target, old_logprob=old, advantage=advantage, policy_denominator=2.0,
            config=PolicyLossConfig(entropy_coef=0.01),
        )  # fmt: skip
        scored = model(input_ids=ids, labels=ids, fused=True).logprob
        assert torch.allclose(scored, output.logprob[:, :-1], atol=1e-5)
        loss = output.loss * dist.get_world_size() if rows != slice(None) else output.loss  # ranks are averaged
        step(loss)
        value = output.loss.detach().clone()
        if rows != slice(None):
            dist.all_reduce(value)
        found.append(float(value))
    return found


def plain_step(model):
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)

    def step(loss: torch.Tensor) -> None:
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def sharded(rows: slice) -> list[float]:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    model = build()
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    if sys.argv[2] != "tied":
        fully_shard(model.lm_head, mesh=mesh)  # a group of its own: whole in its own forward alone
    for layer in model.model.layers:
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    return losses(model, plain_step(model), rows)


def under_zero(rows: slice) -> list[float]:
    import deepspeed

    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    model = build()
    engine, *_ = deepspeed.initialize(
        model=model, optimizer=torch.optim.SGD(model.parameters(), lr=0.05),
        config={
            "train_micro_batch_size_per_gpu": 1, "zero_optimization": {"stage": 3},
            "zero_allow_untested_optimizer": True, "gradient_clipping": 0.0,
        },
    )  # fmt: skip

    def step(loss: torch.Tensor) -> None:
        engine.backward(loss)
        engine.step()

    return losses(engine, step, rows)


def main() -> None:
    dist.init_process_group("gloo")
    rank = int(os.environ["RANK"])
    model = build()
    want = losses(model, plain_step(model), slice(None))
    got = (sharded if sys.argv[1] == "fsdp" else under_zero)(slice(rank, rank + 1))
    assert max(want) - min(want) > 1e-3, want
    assert torch.allclose(torch.tensor(got), torch.tensor(want), rtol=1e-5, atol=1e-6), (got, want)
    dist.barrier()
    dist.destroy_process_group()


main()
