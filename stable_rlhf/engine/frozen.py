"""Models that only read: on the device, in host memory, or in shards."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from stable_rlhf.models.policy import PolicyModel
from stable_rlhf.ranks import device
from stable_rlhf.settings.recipe import EngineArguments

HEADS = ("reward_head", "expected_head", "value_head", "contrastive")


def _zero3(arguments: EngineArguments, *, offload: bool) -> dict[str, Any]:
    """DeepSpeed's configuration of a model that only reads, or is being loaded, in shards."""
    zero: dict[str, Any] = {"stage": 3}
    if offload:
        zero["offload_param"] = {"device": "cpu", "pin_memory": torch.cuda.is_available()}
    return {
        "train_micro_batch_size_per_gpu": 1,
        "zero_optimization": zero,
        "bf16": {"enabled": arguments.bf16},
        "fp16": {"enabled": arguments.fp16},
        "steps_per_print": 10**9,
    }


def zero_defaults(stage: int) -> Any:
    """DeepSpeed's own settings of a ZeRO stage, which stand where ours say nothing."""
    from deepspeed.runtime.zero.config import DeepSpeedZeroConfig

    return DeepSpeedZeroConfig(stage=stage)


@contextmanager
def loading_in_shards(arguments: EngineArguments, *, frozen: bool = False) -> Iterator[None]:
    """Context for loading a transformers model that an engine (``frozen``: :func:`read_only`) will take over under
    ZeRO-3: rank 0 alone reads the file, into host memory, and every tensor is divided over the ranks as soon as it is
    there, so that no device ever holds the model whole. Other stages load as usual.
    """
    if arguments.zero_stage != 3:
        yield
        return
    from transformers.integrations import HfDeepSpeedConfig
    from transformers.integrations.deepspeed import unset_hf_deepspeed_config

    kept = HfDeepSpeedConfig(_zero3(arguments, offload=frozen and arguments.offload_frozen))
    try:
        yield
    finally:
        # transformers asks this global in other places too: generate would wait for ranks that have less to do.
        unset_hf_deepspeed_config()
        del kept  # transformers held it by a weak reference


def set_up(module: Any, arguments: EngineArguments) -> None:
    """Let a module compute as the engine's settings say, where nobody has said otherwise."""
    if arguments.packing:
        module.trunk.pack()
    bound = arguments.loss_workspace_mib
    if isinstance(module, PolicyModel) and module.workspace_bytes is None and bound is not None:
        module.workspace_bytes = bound << 20


def read_only(module: Any, arguments: EngineArguments) -> Any:
    """A model that only reads, on this process's device and in the type that the engine trains in: half the memory in
    16 bits. Heads of one output stay in float32, scores and values want the digits.

    Under ZeRO-3, and with ``offload_frozen``, it is an engine of its own that is called as the model is: its weights
    lie in shards on the devices, or in host memory, and each layer's are gathered while it runs.
    """
    set_up(module, arguments)
    sharded = arguments.zero_stage == 3 or arguments.offload_frozen
    if arguments.half:
        for name, child in module.named_children():
            if name not in HEADS:
                child.to(arguments.dtype)
    module.requires_grad_(False)
    if not sharded:
        return module.to(device()).eval()
    import deepspeed

    config = _zero3(arguments, offload=arguments.offload_frozen)
    config["bf16"] = config["fp16"] = {"enabled": False}  # the types are as they shall be
    engine, *_ = deepspeed.initialize(model=module, config=config)
    engine.eval()
    return engine


def release(model: Any) -> None:
    """Let go of an engine, of training or of a model that only reads, so that its memory can be used again."""
    if not hasattr(model, "destroy"):
        return
    from deepspeed.runtime.zero.parameter_offload import FWD_MODULE_STACK

    model.destroy()
    # ZeRO-3 puts every root module there and never takes it out: its shards would stay as long as the process.
    FWD_MODULE_STACK[:] = [m for m in FWD_MODULE_STACK if m is not model.module]
    _forget_traces()


def _forget_traces() -> None:
    """Empty a cache of DeepSpeed's: what each module lets go of, kept for the class and by engine, so that an engine
    that has traced its layers under ZeRO-3 would stay as long as the process. Others fill it again as they run."""
    from deepspeed.runtime.zero.partitioned_param_coordinator import PartitionedParameterCoordinator

    cached: Any = getattr(PartitionedParameterCoordinator, "_PartitionedParameterCoordinator__params_to_release", None)
    while cached is not None and not hasattr(cached, "cache_clear"):  # inside plain closures that measure its time
        inside = [cell.cell_contents for cell in getattr(cached, "__closure__", None) or ()]
        cached = next(filter(callable, inside), None)
    if cached is not None:
        cached.cache_clear()
