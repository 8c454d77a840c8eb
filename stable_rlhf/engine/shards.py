"""What an engine trains (weights, Adam's moments, its count of steps) on disk, whatever the ranks and the ZeRO stage.

Every rank writes the pieces that it owns, unpadded and with their place in the whole parameter, to one safetensors
file. Whoever reads takes the range of a parameter that it owns now from the files that overlap it: nothing is converted
or gathered, and on the same ranks every process reads its own file only. DeepSpeed's checkpoints are bound to a number
of ranks, and its universal ones to either side of ZeRO 3.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

_WEIGHT, _STEP = "weight", "step"
_MOMENTS = ("exp_avg", "exp_avg_sq")


@dataclass(frozen=True)
class _Piece:
    """Elements ``start`` to ``start + length`` of parameter ``name``, which has ``size`` of them: ``flat``, the tensor
    that the optimiser steps on this rank, holds them from ``at`` on."""

    name: str
    size: int
    start: int
    length: int
    flat: Tensor
    at: int

    def of(self, tensor: Tensor) -> Tensor:
        """The piece's view of ``flat``, or of a moment that is laid out like it."""
        return tensor.detach().view(-1).narrow(0, self.at, self.length)


def _pieces(module: nn.Module, optimizer: Any, zero_stage: int) -> Iterator[_Piece]:
    """What this rank owns of every parameter that trains (ZeRO 0: all of it, as every rank)."""
    for name, parameter in module.named_parameters():
        if not parameter.requires_grad:
            continue
        p: Any = parameter
        if zero_stage == 0:
            yield _Piece(name, p.numel(), 0, p.numel(), p, 0)
        elif zero_stage < 3:
            if p._hp_mapping is not None:
                here, there = p._hp_mapping.lp_fragment_address, p._hp_mapping.hp_fragment_address
                (flat,) = optimizer.optimizer.param_groups[p._hp_mapping.param_group_index]["params"]
                yield _Piece(name, p.numel(), here.start, here.numel, flat, there.start)
        else:
            group, at, length = optimizer.grad_position[optimizer.get_param_id(p)]
            start = dist.get_rank() * length
            length = min(length, p.ds_numel - start)  # beyond it is padding
            if length > 0:
                yield _Piece(name, p.ds_numel, start, length, optimizer.fp32_partitioned_groups_flat[group], at)


def _state(optimizer: Any) -> Any:
    """AdamW's state, by the tensors that it steps; DeepSpeed's optimisers hold AdamW inside."""
    return getattr(optimizer, "optimizer", optimizer).state


def save_pieces(path: Path, module: nn.Module, optimizer: Any, zero_stage: int) -> None:
    """Write this rank's pieces to ``path``."""
    state = _state(optimizer)
    index: dict[str, tuple[int, int, int]] = {}
    tensors: dict[str, Tensor] = {}
    if zero_stage or dist.get_rank() == 0:
        for piece in _pieces(module, optimizer, zero_stage):
            index[piece.name] = piece.start, piece.length, piece.size
            tensors[f"{_WEIGHT}/{piece.name}"] = piece.of(piece.flat)
            if adam := state.get(piece.flat):  # none yet for a parameter that never had a gradient
                tensors |= {f"{key}/{piece.name}": piece.of(adam[key]) for key in _MOMENTS}
                tensors[f"{_STEP}/{piece.name}"] = adam[_STEP].detach().reshape(1).clone()
    save_file(tensors, path, metadata={"index": json.dumps(index)})


def load_pieces(paths: Sequence[Path], module: nn.Module, optimizer: Any, zero_stage: int) -> None:
    """Take up what all ranks wrote with :func:`save_pieces`, on any number of ranks and with any ZeRO stage.

    Raises:
        ValueError: a parameter is missing, or has another size.
    """
    state, steps = _state(optimizer), dict[Tensor, Tensor]()
    if zero_stage == 3:
        optimizer.checkpoint_event_prologue()  # small parameters, which every rank keeps whole, are dropped
    with ExitStack() as stack:
        files = [stack.enter_context(safe_open(path, "pt")) for path in paths]
        indices = [json.loads(file.metadata()["index"]) for file in files]
        for piece in _pieces(module, optimizer, zero_stage):
            overlapping = [(file, *index[piece.name]) for file, index in zip(files, indices, strict=True)
                     if piece.name in index]  # fmt: skip
            if not overlapping or {size for *_, size in overlapping} != {piece.size}:
                raise ValueError(
                    f"checkpoint {str(paths[0].parent)!r} has no {piece.name} of {piece.size:,} elements: it is of "
                    "another model, or of other trainable layers"
                )
            targets = {f"{_WEIGHT}/{piece.name}": piece.flat}
            if f"{_STEP}/{piece.name}" in overlapping[0][0].keys():  # noqa: SIM118 - a file, not a mapping
                adam = state[piece.flat]
                count = overlapping[0][0].get_tensor(f"{_STEP}/{piece.name}").reshape(())
                # One count for all parameters of a flat tensor: those with fewer had no gradient for some steps.
                steps[piece.flat] = torch.maximum(steps.get(piece.flat, count), count)
                targets |= {
                    f"{key}/{piece.name}": adam.setdefault(key, torch.zeros_like(piece.flat)) for key in _MOMENTS
                }
            for whole, target in targets.items():
                mine = piece.of(target)
                for file, start, length, _ in overlapping:
                    low, high = max(piece.start, start), min(piece.start + piece.length, start + length)
                    if low < high:
                        part = file.get_slice(whole)[low - start : high - start]
                        mine[low - piece.start : high - piece.start].copy_(part)
    for flat, count in steps.items():
        state[flat][_STEP] = count.to(flat.device)  # where the fused AdamW counts
    # What the model computes with follows from the optimiser's float32 weights.
    if zero_stage == 3:
        for flat, used in zip(
            optimizer.fp32_partitioned_groups_flat, optimizer.fp16_partitioned_groups_flat, strict=True
        ):
            used.data.copy_(flat.data)
        optimizer.checkpoint_event_epilogue()
    elif zero_stage:
        optimizer.update_lp_params()
