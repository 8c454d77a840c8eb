"""A model's weights as plain transformers loads them: whole, adapters merged, written by rank 0; and their average."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from stable_rlhf.models.lora import adapted_layers, adapter_of, adapter_weights, save_adapter
from stable_rlhf.show.progress import is_main_process

ADAPTER = "adapter"  # folder inside a saved model's

Whole = Callable[[Tensor], Tensor | None]


def gathered(parameters: list[Any]) -> AbstractContextManager[Any]:
    """Context in which these parameters are whole on every rank: ZeRO-3's shards are gathered, others left alone."""
    import deepspeed

    sharded = [p for p in parameters if hasattr(p, "ds_id")]
    context: AbstractContextManager[Any] = deepspeed.zero.GatheredParameters(sharded, enabled=bool(sharded))
    return context


@contextmanager
def gathered_once(model: nn.Module, engine: Any) -> Iterator[None]:
    """Context in which every weight that ZeRO-3's ``engine`` holds of ``model`` is whole, and its hooks, which would
    gather layer by layer, are off: for sampling, where that would be for every token (about a hundred times slower)."""
    sharded = [p for p in model.parameters() if hasattr(p, "ds_id")]
    if not sharded:
        yield
        return
    with gathered(sharded):
        offload = getattr(engine.optimizer, "parameter_offload", engine.optimizer)  # the latter of a model that reads
        offload._remove_module_hooks()
        offload.forward_hooks.clear()
        offload.backward_hooks.clear()
        try:
            yield
        finally:
            offload.setup_zero_stage3_hooks()


def whole(tensor: Tensor) -> Tensor | None:
    """A weight's full value on rank 0, nothing on others; of a ZeRO-3 shard a copy in host memory."""
    with gathered([tensor]):
        if not is_main_process():
            return None
        return tensor.detach().to("cpu", copy=True) if hasattr(tensor, "ds_id") else tensor.detach()


def plain_weights(model: nn.Module, value_of: Whole = whole) -> dict[str, Tensor]:
    """Weights and buffers of a transformers model under its own names, on rank 0 (nothing on others): ZeRO-3's shards
    are gathered one tensor at a time, and LoRA's adapters are added to the weights they adapt.

    Every rank calls this. ``value_of`` gives a weight's full value, another one than its own where an average is saved.
    """
    adapted = {id(layer.base_layer.weight): layer for layer in adapted_layers(model)}
    weights: dict[str, Tensor] = {}
    seen: dict[int, Tensor | None] = {}  # tied weights stay one tensor
    for name, tensor in model.state_dict(keep_vars=True).items():
        if ".lora_" in name:
            continue
        if id(tensor) not in seen:
            value = value_of(tensor)
            if id(tensor) in adapted:
                first, second, scaling = adapter_of(adapted[id(tensor)])
                a, b = value_of(first), value_of(second)
                if value is not None and a is not None and b is not None:
                    value = (value.float() + scaling * (b.float() @ a.float()).to(value.device)).cpu()
            seen[id(tensor)] = None if value is None else value.to(tensor.dtype)
        if (kept := seen[id(tensor)]) is not None:
            weights[name.replace(".base_layer.", ".")] = kept
    return weights


def save_model(
    model: Any,
    folder: Path,
    value_of: Whole = whole,
    beside: Mapping[str, Tensor] | None = None,
    *,
    untied: bool = False,
) -> None:
    """Write a transformers model to ``folder`` as safetensors, with the tensors ``beside`` its own, and its adapter,
    where it has one, to ``folder/adapter``; ``untied``: a tied weight under each of its names. Every rank calls this;
    rank 0 writes."""
    weights = {**plain_weights(model, value_of), **(beside or {})}
    if untied:  # transformers leaves out what lies in the same memory
        first = {id(tensor): name for name, tensor in reversed(weights.items())}
        weights = {name: t if first[id(t)] == name else t.clone() for name, t in weights.items()}
    if is_main_process():
        model.save_pretrained(folder, state_dict=weights)
    if adapted_layers(model):
        adapter = adapter_weights(model, value_of)
        if is_main_process():
            save_adapter(model, adapter, folder / ADAPTER)


class Average:
    """Exponential moving average of the weights that train, in float32: e ← decay · e + (1 − decay) · w.

    Under ZeRO-3 each rank averages its own shards.
    """

    def __init__(self, parameters: Mapping[str, Any], decay: float) -> None:
        self.parameters, self.decay = dict(parameters), decay
        self.values = {id(p): shard(p).detach().float().clone() for p in self.parameters.values()}

    @torch.no_grad()
    def update(self) -> None:
        """Take up the weights as they are now: once after each optimiser step."""
        for parameter in self.parameters.values():
            value = self.values[id(parameter)]
            value.lerp_(shard(parameter).detach().to(value.dtype), 1 - self.decay)

    def whole(self, tensor: Any) -> Tensor | None:
        """Like :func:`whole`, but the average of a weight that trains."""
        value = self.values.get(id(tensor))
        if value is None:
            return whole(tensor)
        if hasattr(tensor, "ds_id"):
            parts = [torch.empty_like(value) for _ in range(dist.get_world_size())]
            dist.all_gather(parts, value)
            value = torch.cat(parts)[: tensor.ds_numel].view(tensor.ds_shape)
        return value.cpu() if is_main_process() else None

    def state(self) -> dict[str, Tensor]:
        """The averages by the parameters' names, whole, on rank 0; every rank calls this."""
        values = {name: self.whole(p) for name, p in self.parameters.items()}
        return {name: value for name, value in values.items() if value is not None}

    def load(self, state: Mapping[str, Tensor]) -> None:
        """Take up what :meth:`state` gave, on any number of ranks."""
        for name, parameter in self.parameters.items():
            value, own = state[name].flatten(), self.values[id(parameter)]
            if hasattr(parameter, "ds_id"):  # the last shards are padded
                start = dist.get_rank() * own.numel()
                value = nn.functional.pad(value, (0, own.numel() * dist.get_world_size() - value.numel()))
                value = value[start : start + own.numel()]
            own.copy_(value.view_as(own))


def shard(parameter: Any) -> Tensor:
    """What this rank holds of a weight: its ZeRO-3 shard, flat and padded, else all of it."""
    held: Tensor = parameter.ds_tensor if hasattr(parameter, "ds_id") else parameter
    return held
