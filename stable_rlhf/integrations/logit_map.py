"""What a causal language model does to its head's output before it calls it logits.

Some families scale it (Cohere multiplies by ``logit_scale``, Granite divides by ``logits_scaling``, HyperCLOVA X
multiplies by a field of that same name), some cap it (Gemma's ``final_logit_softcapping``). Whoever computes
log-probabilities from the head's weight alone must do the same, so it is measured rather than read from a config.
"""

from __future__ import annotations

import copy
from operator import itemgetter
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

_TINY = 2.0**-20  # so small that no softcap bends it
_HUGE = 2.0**40  # so large that every softcap has reached its bound
_POINTS = (0.0, _TINY, -_TINY, 0.5, -2.0, 7.0, -30.0, 100.0, _HUGE, -_HUGE)


class LogitMap(NamedTuple):
    """logits = scale · c tanh(z / c) of the head's output z, with c = ``softcap``; None: scale · z.

    A model that scales first and caps at b then has c = b / scale.
    """

    scale: float = 1.0
    softcap: float | None = None

    def __call__(self, z: Tensor) -> Tensor:
        return self.scale * (z if self.softcap is None else self.softcap * torch.tanh(z / self.softcap))


@torch.no_grad()
def logit_map(causal_lm: Any, *, behind_head: bool = False) -> LogitMap:
    """Measure a transformers model's map from its head's output to its logits.

    A family may scale what goes into its head (MiniCPM3). That counts for who takes the decoder's states to the head,
    and not for who takes what the head itself is given: ``behind_head``.

    Its own ``forward`` runs with stand-ins for decoder and head, so it touches no weight: they may lie in shards or on
    the meta device.

    Raises:
        ValueError: the model does something else to the head's output, or cannot be run in this way.
    """
    name = type(causal_lm).__name__
    head = causal_lm.get_output_embeddings()
    place = next((key for key, child in causal_lm._modules.items() if child is head), None)
    if head is None or place is None or causal_lm.base_model is causal_lm:
        raise ValueError(f"model: {name} is not a decoder with a head on it, so its log-probs cannot be computed")
    z = torch.tensor(_POINTS, dtype=torch.float64, device="cpu").repeat(-(-head.out_features // len(_POINTS)))
    z = z[: max(head.out_features, len(_POINTS))][None, None]  # [1, 1, V]: a mask or a bias of single tokens would show
    try:
        stand_in = _with_given_head_output(causal_lm, place, z.clone(), behind_head)
        logits = stand_in(input_ids=torch.zeros(1, 1, dtype=torch.int64, device="cpu"), use_cache=False).logits.double()
        slope, bound = (float(logits[0, 0, _POINTS.index(at)]) for at in (_TINY, _HUGE))
        scale = round(slope / _TINY, 12)  # without the model's own rounding: not 0.9999999999999996
        measured = LogitMap(scale, None if bound > 0.5 * scale * _HUGE else round(bound / scale, 12))
        known = scale > 0 and logits.shape == z.shape and torch.allclose(logits, measured(z), rtol=1e-5, atol=1e-12)
        # a scale before the head would not be one of its bias
        known = known and (scale == 1 or behind_head or getattr(head, "bias", None) is None)
    except Exception as error:  # any: it is the model's own code
        raise ValueError(f"model: cannot find out what {name} does to its head's output: {error}") from error
    if not known:
        raise ValueError(
            f"model: {name} turns its head's output into logits otherwise than by a scale and a softcap, so its "
            "log-probs cannot be computed"
        )
    return measured


class _Decoded(tuple[Tensor]):
    """A decoder's output that holds its last hidden state and answers None for all else that a family may have."""

    last_hidden_state = property(itemgetter(0))

    def __getattr__(self, name: str) -> None:
        return None


class _Given(nn.Module):
    """A head that gives ``z``, or what it is given."""

    def __init__(self, z: Tensor, whatever: bool) -> None:
        super().__init__()
        self.z, self.whatever = z, whatever
        self.weight: Any = z.new_empty(0)  # a forward may ask for its type
        self.bias = None

    def forward(self, hidden: Tensor) -> Tensor:
        return (self.z if self.whatever else hidden).clone()  # some change it in place


def _with_given_head_output(causal_lm: Any, place: str, z: Tensor, behind_head: bool) -> Any:
    """A second object of the model that gives the logits it would make of the head's output ``z``."""

    def stand_in(module: Any) -> Any:
        clone = copy.copy(module)
        clone.forward = lambda *_arguments, **_named: _Decoded((z,))
        clone._modules = {key: stand_in(child) if key == "decoder" else child for key, child in module._modules.items()}
        return clone

    whole = copy.copy(causal_lm)
    whole.__dict__.pop("forward", None)  # patched by a trainer, and so bound to the model: the family's own is asked
    decoder = stand_in(causal_lm.base_model)  # and its own `decoder`, which OPT calls past it
    whole._modules = {**causal_lm._modules, causal_lm.base_model_prefix: decoder, place: _Given(z, behind_head)}
    return whole
