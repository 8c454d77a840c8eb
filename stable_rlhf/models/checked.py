"""Loading other people's checkpoints: whole, or one line that says which file does not fit.

transformers fills weights that a checkpoint lacks with random numbers and drops those that it has too many, with no
more than a warning; here both end the run.
"""

from __future__ import annotations

import logging as python_logging
import os
from collections.abc import Collection, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from stable_rlhf.data.jsonl import read_json
from stable_rlhf.data.records import DataError
from stable_rlhf.ranks import gather_objects, is_lost_rank, rank

# Unset, transformers asks on the terminal whether a repository's own code shall run, and runs it after a "y".
OWN_CODE_ALONE = {"trust_remote_code": False}
# Files of checkpoints that are JSON and no objects.
_LISTS = ("modules.json",)
_MOST_LAYERS = 10_000  # each is built before anything is compared with the file: a wrong number must not take all night


@contextmanager
def loading(what: str, location: str | Path) -> Iterator[None]:
    """Say what it was, and which file, when files are missing or broken. ``what``: as in ``model 'runs/sft'``."""
    try:
        yield
    except (torch.OutOfMemoryError, MemoryError):
        raise  # of the machine, not of the files
    except Exception as error:  # any: libraries read what others wrote, and fail in their own ways
        if is_lost_rank(error):
            raise  # a model in shards is read by all ranks, and another one has ended
        reason = broken_file(location) or f"{_kind(error)}{' '.join(str(error).split())}"
        raise ValueError(f"{what}: {_missing(location)}it cannot be loaded: {reason}") from error


def _kind(error: Exception) -> str:
    return "" if isinstance(error, OSError | ValueError) else f"{type(error).__name__}: "


def _missing(location: str | Path) -> str:
    return "" if Path(location).exists() else "no folder here, and "


def broken_file(location: str | Path) -> str | None:
    """The first file in a folder that is not whole, and what is wrong with it: JSON that is no object, safetensors."""
    from safetensors import SafetensorError, safe_open

    for path in sorted(Path(location).glob("*.json")):
        if path.name not in _LISTS:
            try:
                read_json(path)
            except DataError as error:
                return str(error).removeprefix(f"{path.parent}{os.sep}")
    for path in sorted(Path(location).glob("*.safetensors")):
        try:
            with safe_open(path, "pt"):
                pass
        except (SafetensorError, OSError) as error:
            return f"{path.name}: {error}"
    return None


def read_tensors(path: Path, device: str | torch.device = "cpu") -> dict[str, Tensor]:
    """All tensors of a safetensors file.

    Raises:
        ValueError: the file is missing or not whole; it is named.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        return load_file(path, device=str(device))
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{path}: cannot be read: {' '.join(str(error).split())}") from error


def load_whole(
    auto: Any, location: str, what: str, *, heads: bool = True, beside: Collection[str] = (), **options: Any
) -> Any:
    """``auto.from_pretrained(location)``, every weight of it from the checkpoint and none left over.

    Weights that the model ties are no loss, nor are buffers, which its code fills in. Without ``heads`` those on top of
    the decoder do not count either: a scorer needs a policy's decoder alone, and the other way round. Names in
    ``beside`` may be left over.

    Raises:
        ValueError: the checkpoint does not fit its own configuration, cannot be read, or holds NaN.
    """
    from transformers.integrations import is_deepspeed_zero3_enabled

    options = {**OWN_CODE_ALONE, **options}
    checked = {**options, "output_loading_info": True, "ignore_mismatched_sizes": True}
    _check_layers(location, what)
    with loading(what, location):
        if is_deepspeed_zero3_enabled():
            # There transformers reports neither what is left over nor, but on one rank, what has another size.
            with _whole_ranks():
                model, info = _quietly(auto, location, {**checked, "device_map": "meta"})
        else:
            model, info = _quietly(auto, location, checked)
    info["unexpected_keys"] = set(info["unexpected_keys"]) - set(beside)
    if problem := _misfits(model, info, heads):
        raise ValueError(f"{what}: its weights do not fit its config.json: {problem}")
    if is_deepspeed_zero3_enabled():
        with loading(what, location):
            model = auto.from_pretrained(location, **options)
    if name := _first_not_finite(model):
        raise ValueError(f"{what}: its weights are not finite: {name} holds NaN or infinity")
    return model


def _check_layers(location: str, what: str) -> None:
    file = Path(location) / "config.json"
    with loading(what, location):
        layers = read_json(file).get("num_hidden_layers") if file.is_file() else None
    if isinstance(layers, int) and layers > _MOST_LAYERS:
        raise ValueError(f"{what}: config.json: num_hidden_layers {layers} is more than {_MOST_LAYERS}")


def _first_not_finite(model: Any) -> str | None:
    """Of a model's weights, the same on every rank: where they lie in shards, each rank looks at its own."""
    from transformers.integrations import is_deepspeed_zero3_enabled

    if not is_deepspeed_zero3_enabled():
        return first_not_finite(model.named_parameters())
    return next(
        filter(None, gather_objects(first_not_finite((k, _shard(p)) for k, p in model.named_parameters()))), None
    )


def _shard(weight: Any) -> Tensor:
    """What this rank holds of a weight under ZeRO-3, without what fills the last rank's part up."""
    if not hasattr(weight, "ds_tensor"):
        whole: Tensor = weight
        return whole
    part: Tensor = weight.ds_tensor.detach()
    return part[: max(0, weight.ds_numel - rank() * part.numel())]


def first_not_finite(tensors: Iterable[tuple[str, Tensor]]) -> str | None:
    """Name of the first tensor that holds NaN or infinity."""
    for name, tensor in tensors:
        if tensor.is_floating_point() and not tensor.is_meta:
            values = tensor.detach()
            # A sum needs no room beside the weights, and only one that is not finite asks for a closer look.
            if not values.sum(dtype=torch.float32).isfinite() and not values.isfinite().all():
                return name
    return None


def check_whole(model: Any, what: str, *, besides: str = "") -> None:
    """Refuse a model that others have loaded, from ``model.name_or_path``, where its checkpoint did not fit. Heads do
    not count, nor does a part of the name ``besides``. On the meta device: nothing is read twice.

    Raises:
        ValueError: as in :func:`load_whole`.
    """
    options = {"output_loading_info": True, "ignore_mismatched_sizes": True, "device_map": "meta"}
    with loading(what, model.name_or_path):
        meta, info = _quietly(type(model), model.name_or_path, options)
    if problem := _misfits(meta, info, False, besides):
        raise ValueError(f"{what}: its weights do not fit its config.json: {problem}")


@contextmanager
def _whole_ranks() -> Iterator[None]:
    """transformers without the DeepSpeed configuration that it loads in shards by."""
    from transformers.integrations import deepspeed

    kept = deepspeed._hf_deepspeed_config_weak_ref
    deepspeed._hf_deepspeed_config_weak_ref = None
    try:
        yield
    finally:
        deepspeed._hf_deepspeed_config_weak_ref = kept


def _quietly(auto: Any, location: str, options: dict[str, Any]) -> Any:
    """Without bars, and without transformers' own table of what does not fit (we say it in one line) or accelerate's
    word that weights are on the meta device."""
    from transformers.utils import logging

    # Not by a level: above WARNING transformers begins to speak of tensor parallelism.
    names = ("transformers.modeling_utils", "accelerate.big_modeling")
    loggers, bars = [python_logging.getLogger(name) for name in names], logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    for logger in loggers:
        logger.addFilter(_is_error)
    try:
        return auto.from_pretrained(location, **options)
    finally:
        for logger in loggers:
            logger.removeFilter(_is_error)
        if bars:
            logging.enable_progress_bar()


def _is_error(record: python_logging.LogRecord) -> bool:
    return record.levelno >= python_logging.ERROR


def _misfits(model: Any, info: dict[str, Any], heads: bool, besides: str = "") -> str:
    parameters = {name for name, _ in model.named_parameters(remove_duplicate=False)}
    decoder = {model.base_model_prefix, *(name for name, _ in model.base_model.named_children())} - {besides}

    def counts(name: str) -> bool:
        return heads or name.split(".")[0] in decoder

    missing = {name for name in info["missing_keys"] if name in parameters and counts(name)}
    left_over = {name for name in info["unexpected_keys"] if counts(name)}
    sizes = {name: f"{list(has)}, not {list(wanted)}" for name, has, wanted in info["mismatched_keys"] if counts(name)}
    parts = [_some("missing", missing), _some("left over", left_over), _some("of another size", sizes)]
    return "; ".join(part for part in parts if part)


def _some(what: str, names: Collection[str]) -> str:
    if not names:
        return ""
    first = min(names)
    size = f" {names[first]}" if isinstance(names, dict) else ""
    return f"{len(names)} {what} ({first}{size}{', …' if len(names) > 1 else ''})"
