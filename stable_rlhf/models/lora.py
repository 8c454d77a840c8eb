"""LoRA (arXiv 2106.09685) through peft: adapters put into a model's linear layers in place, switched off, saved.

The model stays the transformers model that it was, and every weight but the adapters is frozen. With the adapters
switched off it is the model that training began with, so a policy is its own reference and no second copy is held.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

_NAME = "default"  # peft's name of an adapter that is the only one


def add_lora(
    model: nn.Module,
    blocks: nn.Module,
    *,
    r: int,
    alpha: int,
    dropout: float = 0.0,
    target_modules: Sequence[str] = (),
    seed: int = 0,
) -> None:
    """Give linear layers an adapter: y = W x + (alpha / r) · B A dropout(x), with B = 0 at first.

    ``model`` is the transformers model that will be saved, ``blocks`` the part of it that trains (its decoder, or the
    upper part of a split one); every linear layer there gets an adapter, or those whose last name is in
    ``target_modules``.

    Raises:
        ValueError: peft is not installed, or ``target_modules`` names no linear layer of the blocks.
    """
    try:
        from peft import LoraConfig, inject_adapter_in_model
    except ImportError as error:
        raise ValueError("engine.lora_r needs peft: pip install 'stable-rlhf[lora]'") from error
    linear = {id(m) for m in blocks.modules() if isinstance(m, nn.Linear)}
    names = [name for name, m in model.named_modules() if id(m) in linear]
    known = sorted({name.rpartition(".")[2] for name in names})
    if unknown := sorted(set(target_modules) - set(known)):
        raise ValueError(f"engine.lora_target_modules {unknown}: the linear layers of the blocks are {known}")
    chosen = [name for name in names if not target_modules or name.rpartition(".")[2] in target_modules]
    config = LoraConfig(
        r=r, lora_alpha=alpha, lora_dropout=dropout, target_modules=chosen,
        base_model_name_or_path=str(getattr(model, "name_or_path", "")),
        task_type="CAUSAL_LM" if hasattr(model, "lm_head") else "FEATURE_EXTRACTION",
    )  # fmt: skip
    with torch.random.fork_rng(devices=[]):  # the same A on every rank and after every restart
        torch.random.default_generator.manual_seed(seed)
        inject_adapter_in_model(config, model, _NAME)


def adapted_layers(model: nn.Module) -> list[Any]:
    """peft's layers of a model: each has ``base_layer`` and its adapter."""
    return [m for m in model.modules() if hasattr(m, "lora_A") and hasattr(m, "base_layer")]


@contextmanager
def adapters_off(model: nn.Module) -> Iterator[None]:
    """Context in which the model is what it was before it got adapters."""
    layers = adapted_layers(model)
    for layer in layers:
        layer.enable_adapters(False)
    try:
        yield
    finally:
        for layer in layers:
            layer.enable_adapters(True)


def adapter_of(layer: Any) -> tuple[nn.Parameter, nn.Parameter, float]:
    """(A [r, in], B [out, r], scaling) of an adapted layer: its weight is W + scaling · B A."""
    return layer.lora_A[_NAME].weight, layer.lora_B[_NAME].weight, float(layer.scaling[_NAME])


def adapter_weights(model: nn.Module, whole: Callable[[Tensor], Tensor | None]) -> dict[str, Tensor]:
    """The adapters' weights under the names that peft loads; ``whole`` gives a parameter's full tensor, or nothing on a
    rank that does not save."""
    tensors = {}
    for name, parameter in model.named_parameters():
        if ".lora_" in name and (tensor := whole(parameter)) is not None:
            tensors[f"base_model.model.{name.replace(f'.{_NAME}.', '.')}"] = tensor
    return tensors


def save_adapter(model: Any, weights: dict[str, Tensor], folder: Path) -> None:
    """Write what ``peft.PeftModel.from_pretrained(base, folder)`` loads onto the model that training began with."""
    from safetensors.torch import save_file

    folder.mkdir(parents=True, exist_ok=True)
    save_file({k: v.contiguous() for k, v in weights.items()}, folder / "adapter_model.safetensors")
    model.peft_config[_NAME].save_pretrained(folder)
