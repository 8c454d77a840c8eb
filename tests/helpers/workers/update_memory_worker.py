"""Peak memory of one whole policy update with BLOOM's vocabulary, above weights, gradients and optimiser, in MiB.

A process of its own: ``update_memory_worker.py fused|plain ZERO_STAGE`` prints it. The plain loss is the one that the
benchmarks hold the fused one against: whole logits, log_softmax, gather.
"""

from __future__ import annotations

import ctypes
import gc
import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import stable_rlhf.ops as ops
from bench.ops.problem import mixed_loss, plain_logprob
from stable_rlhf.engine.engine import Engine, Schedule
from stable_rlhf.engine.process import start
from stable_rlhf.models.policy import PolicyModel
from stable_rlhf.settings.recipe import EngineArguments

MIB, ROWS, LENGTH = 1 << 20, 4, 256


class Plain(PolicyModel):
    """The same model with its loss as a trainer without the operation has it."""

    def forward(self, inputs: dict[str, Tensor], target: Tensor, *, loss: dict[str, Any], **_: Any) -> dict[str, Any]:
        hidden = self.trunk(**inputs).flatten(0, 1)
        logprob = plain_logprob(hidden, self.head.weight, target.flatten())
        share = torch.full_like(logprob, 1.0 / len(logprob))
        old, advantage = loss["old_logprob"].flatten(), loss["advantage"].flatten()
        return {"loss": mixed_loss(logprob, old, advantage, share, 0.0 * share, ops.PolicyLossConfig())}


def resident(name: str) -> int:
    lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(name + ":")) << 10


def main() -> None:
    from transformers import BloomConfig, BloomForCausalLM

    which, stage = sys.argv[1], int(sys.argv[2])
    start(0)
    vocabulary, width = 250_880, 1024
    model = BloomForCausalLM(BloomConfig(vocab_size=vocabulary, hidden_size=width, n_layer=2, n_head=width // 64))
    assert model.lm_head.weight is model.transformer.word_embeddings.weight
    policy = (PolicyModel if which == "fused" else Plain)(model)
    engine = Engine(policy, EngineArguments(zero_stage=stage, loss_workspace_mib=64), Schedule(1e-5, 9))
    engine.train()
    ids = torch.randint(vocabulary, (ROWS, LENGTH))
    inputs = policy.trunk.inputs(ids.tolist())
    options = {"old_logprob": torch.full(ids.shape, -12.0), "advantage": torch.randn(ids.shape)}

    def update() -> float:
        result = engine(inputs, ids.roll(-1, 1), loss=options)
        loss = result["output"].loss if which == "fused" else result["loss"]
        engine.backward(loss)
        assert engine.step()
        return float(loss.detach())

    update()  # makes the optimiser's moments, loads code
    ops.release_workspace()
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    before = resident("VmRSS")
    trained = 4 * sum(p.numel() for p in policy.parameters())
    assert before > 3 * trained, "weights and both moments are there"
    Path("/proc/self/clear_refs").write_text("5", encoding="utf-8")  # the peak starts again from here
    update()
    print((resident("VmHWM") - before - trained) / MIB)  # no gradient is there between two updates


if __name__ == "__main__":
    main()
