"""Supervised fine-tuning: next-token NLL on responses."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from stable_rlhf.data.encoding import Encoded
from stable_rlhf.engine.engine import Engine, Schedule
from stable_rlhf.engine.loop import Loop
from stable_rlhf.engine.order import count_steps, micro_steps, shuffled_steps
from stable_rlhf.engine.snapshots import rows_a_step
from stable_rlhf.engine.weights import gathered
from stable_rlhf.models.features import FeatureCache
from stable_rlhf.models.policy import PolicyModel
from stable_rlhf.models.views import view
from stable_rlhf.ops import PolicyLossConfig
from stable_rlhf.ranks import barrier, rank, sum_over_ranks, world_size
from stable_rlhf.settings.recipe import Recipe
from stable_rlhf.show.progress import is_main_process

_NLL = PolicyLossConfig(rehearsal_coef=1.0)  # an SFT token is a rehearsal token of weight one
AVERAGE = "ema"  # folder of the averaged policy inside the policy's
_VALUE_HEAD = "value_head.safetensors"


def nll_step(
    engine: Engine, policy: PolicyModel, micros: Sequence[Sequence[Encoded]], cache: FeatureCache | None = None
) -> float:
    """One optimiser step on this rank's micro-batches; returns the mean NLL per token over all ranks, in nats."""
    tokens = sum(len(e.response) for micro in micros for e in micro)
    denominator = sum_over_ranks([tokens])[0]
    total = 0.0
    for micro in micros:
        features = cache.get(policy.trunk, [e.ids for e in micro]) if cache is not None else None
        inputs, target = view(policy.trunk, micro, features)
        kind = (target >= 0).to(torch.int64) * 2
        loss = engine(
            inputs, target,
            loss={"kind": kind, "config": _NLL, "rehearsal_denominator": denominator, "grad_scale": engine.loss_scale},
        )["output"].loss  # fmt: skip
        engine.backward(loss)
        engine.step()
        total += float(loss.detach())
    return sum_over_ranks([total])[0]


def train_sft(
    policy: PolicyModel,
    tokenizer: Any,
    examples: Sequence[Encoded],
    recipe: Recipe,
    folder: Path,
    *,
    seed: int,
    early_share: float | None = None,
) -> dict[str, float]:
    """Train ``policy`` and save it to ``folder``; with ``early_share``, also the policy after that share of the steps,
    to ``folder/early``."""
    arguments = recipe.sft
    per_device = arguments.per_device_train_batch_size
    global_batch = per_device * world_size() * arguments.gradient_accumulation_steps
    steps = count_steps(len(examples), global_batch, arguments.num_train_epochs, arguments.max_steps)
    engine = Engine(
        policy, recipe.engine,
        Schedule(arguments.learning_rate, steps, arguments.warmup_ratio, arguments.min_lr_ratio),
        micro_batch_size=per_device, gradient_accumulation_steps=arguments.gradient_accumulation_steps,
    )  # fmt: skip
    engine.train()
    batches = shuffled_steps(len(examples), global_batch, steps, seed)
    early = max(1, round(early_share * steps)) if early_share is not None else 0
    loss, cache = 0.0, FeatureCache()
    with Loop("SFT", batches, engine, recipe, folder, steps=steps, kept=[rows_a_step(global_batch)]) as loop:
        # All of them now: computed batch by batch, a resumed stage would have them from other batches.
        cache.fill(policy.trunk, [e.ids for e in examples], description="hidden states")
        for step, rows in loop:
            micros = [[examples[i] for i in m] for m in micro_steps(rows, per_device, rank(), world_size())]
            loss = nll_step(engine, policy, micros, cache)
            loop.tokens += sum(len(examples[i]) for i in rows)
            if step + 1 == early:
                save_policy(engine, policy, tokenizer, folder / "early")
            loop.end(step, {"loss": loss}, note=f"loss {loss:.3f}")
        save_policy(engine, policy, tokenizer, folder)
    engine.close()
    return {"steps": steps, "loss": loss, "tokens_seen": loop.tokens}


def save_policy(engine: Engine, policy: PolicyModel, tokenizer: Any, folder: Path) -> None:
    """Weights (safetensors; adapters merged), configuration and tokenizer as plain transformers loads them, and the
    critic's head; with LoRA also the adapter, in `adapter`, and with `ema_decay` the averaged policy, in `ema`."""
    from safetensors.torch import save_file

    engine.save_model(folder)
    if engine.average is not None:
        engine.save_model(folder / AVERAGE, average=True)
    head = policy.value_head
    with gathered(list(head.parameters()) if head is not None else []):
        if is_main_process():
            for place in (folder, folder / AVERAGE):
                if place.is_dir():
                    tokenizer.save_pretrained(place)
            if head is not None:
                save_file({k: v.detach().clone() for k, v in head.state_dict().items()}, folder / _VALUE_HEAD)
    barrier()
