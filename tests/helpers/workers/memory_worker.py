"""What an engine's tensors weigh. As a program, under torchrun: ZeRO 1 to 3 in both types, to a JSON file (rank 0)."""

from __future__ import annotations

import gc
import json
import sys
from pathlib import Path
from typing import Any

import torch

from stable_rlhf.engine.engine import Engine, Schedule
from stable_rlhf.engine.process import start
from stable_rlhf.launch.memory import Lora, engine_bytes, model_sizes
from stable_rlhf.models.policy import PolicyModel
from stable_rlhf.ops import release_workspace
from stable_rlhf.ranks import rank, world_size
from stable_rlhf.settings.recipe import EngineArguments
from stable_rlhf.world import build_model, build_tokenizer

BUCKET = 10**9  # bytes: no tensor of these models is as large, ZeRO 3's buffer for gradients is


def held() -> dict[int, int]:
    """Bytes of every tensor storage that is alive, by address."""
    gc.collect()
    found = {}
    for thing in gc.get_objects():
        # Not what stands for tensors without memory or with several, which other tests of the process may have left.
        if type(thing) not in (torch.Tensor, torch.nn.Parameter) or thing.device.type != "cpu":
            continue
        if thing.layout is torch.strided and not thing.is_nested:
            for tensor in (thing, thing.grad if thing.is_leaf else None):
                if tensor is not None:
                    found[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
    return found


def measure(tokenizer: Any, arguments: EngineArguments, layers: int | None) -> tuple[int, dict[str, int], int]:
    """Bytes of an engine's tensors just before its second step, their estimate, and how many weights train."""
    release_workspace()  # what the loss keeps is no engine's, and on some processors another test has kept enough
    before = held()
    built = build_model(tokenizer, hidden_size=128, num_hidden_layers=3, num_attention_heads=4)
    lora = Lora(arguments.lora_r, arguments.lora_dropout, ()) if arguments.lora_r else None
    sizes = model_sizes(built.config, "", layers, lora=lora)
    policy = PolicyModel(built, num_trainable_layers=layers, value_head=True)
    engine = Engine(policy, arguments, Schedule(1e-3, 4))
    for step in range(2):
        inputs = policy.trunk.inputs([[5, 6, 7, 8], [9, 10, 11, 12]])
        result = engine(inputs, torch.ones(2, 4, dtype=torch.long))
        engine.backward(-result["logprob"].mean() + result["value"].sum())
        if step == 0:
            engine.step()  # the optimiser's moments come with its first step
    del inputs, result
    release_workspace()
    measured = sum(size for address, size in held().items() if address not in before and size < BUCKET)
    wanted, host = engine_bytes(sizes, arguments, world_size())
    assert host == 0
    engine.close()
    return measured, wanted, sizes.trained


def main() -> None:
    torch.set_num_threads(1)
    start(0)
    tokenizer, rows = build_tokenizer(), []
    for stage in (1, 2, 3):
        for bf16 in (False, True):
            measured, wanted, _ = measure(tokenizer, EngineArguments(zero_stage=stage, bf16=bf16), None)
            rows.append(
                {"stage": stage, "bf16": bf16, "measured": measured, "estimated": sum(wanted.values())} | wanted
            )
    if rank() == 0:
        Path(sys.argv[1]).write_text(json.dumps(rows), encoding="utf-8")


if __name__ == "__main__":
    main()
