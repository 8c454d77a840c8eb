"""A backbone split into frozen lower and trainable upper blocks.

A split backbone lets small machines train the last blocks of a model: the lower blocks never change, so their hidden
states are computed once per sequence and reused by every epoch, by the reference policy and by a scorer that stands on
the same lower blocks.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from stable_rlhf.data.encoding import PaddedBatch, pad_sequences
from stable_rlhf.models.loading import context_length, hidden_width


@dataclass(frozen=True)
class _Layout:
    blocks: str
    final_norm: str
    embedding: str
    embedding_norm: str | None


_LAYOUTS = (
    _Layout("layers", "norm", "embed_tokens", None),  # Llama, Qwen, Mistral, Gemma, …
    _Layout("h", "ln_f", "word_embeddings", "word_embeddings_layernorm"),  # BLOOM
)


def _layout(backbone: nn.Module) -> _Layout:
    for layout in _LAYOUTS:
        if hasattr(backbone, layout.blocks) and hasattr(backbone, layout.final_norm):
            return layout
    raise ValueError(_cannot_split(backbone, "it is not laid out like Llama or BLOOM"))


def _view(module: Any) -> Any:
    """A second module object over the same sub-modules, whose table of children can change without the first's."""
    clone = copy.copy(module)
    for name, hooks in vars(module).items():  # of its own: ZeRO-3 hangs some on one part alone
        if name.endswith(("_hooks", "_with_kwargs", "_always_called")):
            setattr(clone, name, copy.copy(hooks))
    clone._modules = dict(module._modules)
    clone.config = copy.deepcopy(module.config)
    return clone


def split_backbone(backbone: Any, num_trainable_layers: int) -> tuple[nn.Module, nn.Module]:
    """Split a decoder into ``(lower, upper)`` that share its weights.

    ``upper(inputs_embeds=lower(input_ids).last_hidden_state)`` equals ``backbone(input_ids)``. The lower part and the
    embedding are frozen (``requires_grad`` off); the last ``num_trainable_layers`` blocks and the final norm train.

    Raises:
        ValueError: the model is not laid out in a known way, has too few blocks, or its parts in turn do not compute
            what the whole does (a few tokens are tried, but of weights in shards or on the meta device).
    """
    layout = _layout(backbone)
    blocks = getattr(backbone, layout.blocks)
    if not 0 < num_trainable_layers < len(blocks):
        raise ValueError(
            f"num_trainable_layers must be between 1 and {len(blocks) - 1} for this model, got {num_trainable_layers}"
        )
    cut = len(blocks) - num_trainable_layers
    lower, upper = _view(backbone), _view(backbone)
    lower._modules[layout.blocks] = blocks[:cut]
    lower._modules[layout.final_norm] = nn.Identity()
    lower.config.num_hidden_layers = cut
    for name, child in lower._modules.items():
        # Rotary tables: in common, ZeRO-3 would take the lower part's calls, of which ranks make different numbers, for
        # the upper one's.
        if isinstance(child, nn.Module) and not any(True for _ in child.parameters()):
            lower._modules[name] = copy.deepcopy(child)
    upper._modules[layout.blocks] = blocks[cut:]
    upper._modules[layout.embedding] = None
    upper.config.num_hidden_layers = num_trainable_layers
    if getattr(backbone.config, "layer_types", None):  # a decoder's loop looks its blocks' kinds up by their place
        lower.config.layer_types, upper.config.layer_types = (
            list(backbone.config.layer_types[part]) for part in (slice(cut), slice(cut, None))
        )
    if hasattr(upper, "embedding_multiplier"):  # Granite's, which the lower part has applied
        upper.embedding_multiplier = 1.0
    if layout.embedding_norm is not None:
        upper._modules[layout.embedding_norm] = nn.Identity()
    if not any(p.is_meta or hasattr(p, "ds_id") for p in backbone.parameters()):
        _check_split(backbone, lower, upper)
    for parameter in lower.parameters():
        parameter.requires_grad_(False)
    return lower, upper


@torch.no_grad()
def _check_split(backbone: Any, lower: Any, upper: Any) -> None:
    """Raise where ``lower`` and ``upper`` in turn give something else than ``backbone``: other families may well have
    more that depends on a block's place or on the embedding."""
    parts = (backbone, lower, upper)
    window = getattr(backbone.config, "sliding_window", None) or 0
    length = min(16 + (window if window <= 128 else 0), context_length(backbone.config))
    embedding = backbone.get_input_embeddings()
    ids = [(3 + 7 * i) % embedding.num_embeddings for i in range(length)]
    inputs = pad_sequences([ids], device=embedding.weight.device).as_inputs()
    modes = [(module, module.training) for part in parts for module in part.modules()]
    attention = [(part.config, part.config._attn_implementation) for part in parts]
    try:
        for module, _ in modes:
            module.training = False
        for config, _ in attention:
            config._attn_implementation = "eager"  # flash-attn cannot run where a model is made, on the CPU
        expected = backbone(**inputs, use_cache=False).last_hidden_state
        inputs["inputs_embeds"] = lower(**inputs, use_cache=False).last_hidden_state
        del inputs["input_ids"]
        error = (upper(**inputs, use_cache=False).last_hidden_state - expected).float().norm() / expected.float().norm()
    except Exception as problem:  # any: it is the model's own code
        raise ValueError(_cannot_split(backbone, f"its blocks do not run in two parts: {problem}")) from problem
    finally:
        for module, training in modes:
            module.training = training
        for config, implementation in attention:
            config._attn_implementation = implementation
    if not error <= max(1e-4, 4 * torch.finfo(expected.dtype).eps):
        raise ValueError(_cannot_split(backbone, f"its blocks in two parts compute something else ({error:.1%} off)"))


def _cannot_split(backbone: Any, reason: str) -> str:
    return (
        f"num_trainable_layers: {type(backbone).__name__} cannot be split: {reason}; leave num_trainable_layers unset "
        "to train the whole model"
    )


class Trunk(nn.Module):
    """A decoder without its language-model head: token ids to final hidden states [B, L, H].

    With ``num_trainable_layers`` set, the frozen lower blocks stay outside the module tree (an optimiser or a ZeRO
    engine never sees them) and :meth:`inputs` runs them once, without gradient.
    """

    def __init__(self, backbone: Any, num_trainable_layers: int | None = None) -> None:
        super().__init__()
        lower, upper = None, backbone
        if num_trainable_layers is not None:
            lower, upper = split_backbone(backbone, num_trainable_layers)
        self.upper = upper
        self.num_trainable_layers = num_trainable_layers
        self.packing = False
        # Plain attributes: not children, so not parameters of this module.
        self.lower: Any
        self.backbone: Any
        object.__setattr__(self, "lower", lower)
        object.__setattr__(self, "backbone", backbone)

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        # `.to()`, `.double()` and their like walk the module tree, which the frozen lower blocks are not part of.
        if recurse and self.lower is not None:
            self.lower._apply(fn)
        return super()._apply(fn, recurse)

    @property
    def device(self) -> torch.device:
        return next(self.upper.parameters()).device

    @property
    def hidden_size(self) -> int:
        return hidden_width(self.upper.config)

    @torch.no_grad()
    def features(self, sequences: Sequence[Sequence[int]]) -> list[Tensor]:
        """Hidden states below the first trainable block, one [length, H] tensor a sequence; batches by length."""
        if self.lower is None:
            raise ValueError("features() needs a split backbone (num_trainable_layers)")
        by_sequence: list[Tensor | None] = [None] * len(sequences)
        for rows in length_batches([len(s) for s in sequences], self.batch_tokens):
            batch = pad_sequences([sequences[i] for i in rows], device=self.device)
            hidden = self.lower(**batch.as_inputs(), use_cache=False).last_hidden_state  # [B, L, H]
            for i, row in zip(rows, hidden, strict=True):
                by_sequence[i] = row[: len(sequences[i])].clone()
        return [f for f in by_sequence if f is not None]

    @property
    def batch_tokens(self) -> int:
        """Padded tokens a batch of :meth:`features`."""
        # On two CPU cores 1,024 tokens a batch ran a quarter faster than 8,192 (135M parameters, float32): cache sizes.
        return 1024 if self.device.type == "cpu" else 16384

    def inputs(
        self, sequences: Sequence[Sequence[int]], *, features: Sequence[Tensor] | None = None, side: str = "right"
    ) -> dict[str, Tensor]:
        """Padded keyword arguments for :meth:`forward`, from token ids and, when known, their cached features."""
        batch: PaddedBatch = pad_sequences(sequences, device=self.device, side=side)
        if self.lower is None:
            return batch.as_inputs()
        if features is None:
            features = self.features(sequences)
        padded = features[0].new_zeros(*batch.input_ids.shape, features[0].shape[-1])
        padded[batch.attention_mask.bool()] = torch.cat(list(features))
        return {
            "inputs_embeds": padded.to(next(self.upper.parameters()).dtype),
            "attention_mask": batch.attention_mask,
            "position_ids": batch.position_ids,
        }

    def forward(self, **inputs: Tensor) -> Tensor:
        """Hidden states [B, L, H] of right- or left-padded rows.

        With :attr:`packing` the rows' tokens run end to end as one row, without padding; positions that start again at
        0 tell attention where a sequence begins, so that none sees another's tokens (a block-diagonal mask in SDPA,
        kernels for unequal lengths in flash-attn). The result is padded as the input was, with zeros.
        """
        if self.packing:
            mask = inputs.pop("attention_mask").bool()
            packed = {name: value[mask][None] for name, value in inputs.items()}
            hidden = self.upper(**packed, use_cache=False).last_hidden_state[0]  # [tokens, H]
            return hidden.new_zeros(*mask.shape, hidden.shape[-1]).masked_scatter(mask[..., None], hidden)
        if not _takes_positions(self.upper):
            inputs.pop("position_ids", None)
        return self.upper(**inputs, use_cache=False).last_hidden_state

    def pack(self) -> None:
        """Turn :attr:`packing` on.

        Raises:
            ValueError: the model takes no positions, so nothing would tell it where a sequence begins.
        """
        if not _takes_positions(self.upper):
            raise ValueError(
                f"engine.packing: a {self.upper.config.model_type} model takes no positions, by which the sequences of "
                "a pack are told apart; leave it off"
            )
        self.packing = True


def _takes_positions(module: Any) -> bool:
    # BLOOM's ALiBi derives positions from the attention mask.
    return module.config.model_type != "bloom"


def length_batches(lengths: Sequence[int], max_tokens: int) -> list[list[int]]:
    """Group indices into batches of similar length, at most ``max_tokens`` padded tokens (always at least one row)."""
    batches: list[list[int]] = []
    current: list[int] = []
    for i in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        if current and lengths[current[0]] * (len(current) + 1) > max_tokens:
            batches.append(current)
            current = []
        current.append(i)
    if current:
        batches.append(current)
    return batches
