"""Engines in float16 and steps of every kind. As a program, under torchrun: two ranks, of which one overflows."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch
from deepspeed.accelerator import get_accelerator

from stable_rlhf.engine.engine import Engine, Schedule
from stable_rlhf.engine.process import finish, start
from stable_rlhf.engine.weights import gathered
from stable_rlhf.models.policy import PolicyModel
from stable_rlhf.ops import PolicyLossConfig
from stable_rlhf.ranks import barrier, rank, sum_over_ranks, world_size
from stable_rlhf.settings.recipe import EngineArguments
from stable_rlhf.world import build_model, build_tokenizer

TARGET = torch.tensor([[6, 7, 8, -100], [10, 11, -100, -100]])


class Run:
    """An engine, and optimiser steps of two micro-steps each on one small batch.

    Kinds of steps: ``.`` an ordinary one; ``o`` the gradient of its first micro-step is finite on the last rank, too
    large for float16 once it is scaled; ``i`` it is infinite there; ``n`` the first loss is not a number; ``d`` the
    step is dropped. ``small``: a factor on loss and gradients; at 1 the first scale would be too large for them.
    ``critic``: whether ordinary steps train the value head too.
    """

    def __init__(
        self, model: Any, stage: int, *, half: bool = True, small: float = 0.01, critic: bool = True
    ) -> None:  # fmt: skip
        self.policy, self.small, self.critic = PolicyModel(model, value_head=True), small, critic
        self.losses: list[float] = []
        self.engine = Engine(
            self.policy, EngineArguments(zero_stage=stage, fp16=half), Schedule(1e-2, 9),
            gradient_accumulation_steps=2,
        )  # fmt: skip
        self.engine.train()

    def step(self, kind: str = ".") -> bool:
        moved, total = True, 0.0
        for first in (True, False):
            inputs = self.policy.trunk.inputs([[5, 6, 7, 8], [9, 10, 11]])
            options = {
                "kind": (TARGET >= 0) * 2, "config": PolicyLossConfig(rehearsal_coef=self.small),
                "rehearsal_denominator": 10.0 * world_size(), "grad_scale": self.engine.loss_scale,
            }  # fmt: skip
            result = self.engine(inputs, TARGET, loss=options)
            loss, value = result["output"].loss, result["value"].mean()
            if self.critic:
                loss = loss + self.small * (value - 1) ** 2
            if first and kind in "oi" and rank() == world_size() - 1:  # its value stays as it is
                still = value - value.detach()
                loss = loss + (3e4 * still if kind == "o" else still.clamp_min(0).sqrt())
            if first and kind == "n":
                loss = loss * float("nan")
            total += float(loss.detach())
            self.engine.backward(loss, drop=kind == "d" and not first)
            moved = self.engine.step()
        self.losses.append(sum_over_ranks([total])[0])
        return moved

    def weights(self) -> torch.Tensor:
        with gathered(list(self.engine.module.parameters())):
            return torch.cat([p.detach().float().flatten() for p in self.policy.parameters()]).clone()

    def state(self) -> dict[str, Any]:
        return dict(vars(self.engine._scaler))

    def set_scale(self, scale: float) -> None:
        self.engine._scaler.cur_scale = scale
        self.engine._take_scale()


def main() -> None:
    folder = Path(sys.argv[1])
    torch.set_num_threads(1)
    get_accelerator().is_fp16_supported = lambda: True
    start(0)
    tokenizer, found = build_tokenizer(), {}

    def model() -> Any:
        return build_model(tokenizer, hidden_size=32, num_hidden_layers=2, num_attention_heads=2, seed=0)

    for stage in (1, 2, 3):
        run = Run(model(), stage)
        moved = [run.step(kind) for kind in ".oo"]
        snapshot = folder / str(stage)
        snapshot.mkdir(exist_ok=True)
        run.engine.save(snapshot)
        barrier()
        moved += [run.step(kind) for kind in ".o."]
        want, state, losses = run.weights(), run.state(), run.losses
        run.engine.close()
        again = Run(model(), stage)
        again.engine.load(snapshot)
        for kind in ".o.":
            again.step(kind)
        same = torch.equal(again.weights(), want) and again.state() == state and again.losses == losses[3:]
        again.engine.close()
        plain = Run(model(), stage, half=False)
        for _ in range(3):
            plain.step()
        found[stage] = {
            "moved": moved, "scale": state["cur_scale"], "same": sum_over_ranks([float(same)])[0],
            "losses": [losses[0], losses[3], losses[5]], "float32": plain.losses,
        }  # fmt: skip
        plain.engine.close()
    if rank() == 0:
        (folder / "found.json").write_text(json.dumps(found), encoding="utf-8")
    finish()


if __name__ == "__main__":
    main()
