"""A transformers causal language model that gives log-probs or a loss in place of logits, inside its own forward.

The model's own ``forward`` runs, whatever its family does there, with a stand-in for its head that keeps the hidden
states; then the head itself is called, with the operation as its ``forward``. So ZeRO-3 and FSDP2 gather its weight by
their own hooks, adapters and wrappers are found on each call, and nothing here knows a family.
"""

from __future__ import annotations

import functools
import types
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from stable_rlhf import ops
from stable_rlhf.integrations.logit_map import LogitMap, logit_map

IGNORE = -100
_INNER = "_unfused_forward"
_MAP = "_fused_logit_map"


class FusedOutput(NamedTuple):
    """What a fused model returns.

    loss, metrics: those of :func:`stable_rlhf.ops.linear_policy_loss`; None and empty where only log-probs were asked
        for.
    logprob, entropy: float32, 0 where a label is -100; differentiable where only log-probs were asked for. Entropy is
        None where it was not.
    aux_loss: the router loss of a model that makes one (``output_router_logits``), in no other figure; else None.
    """

    loss: Tensor | None
    logprob: Tensor
    entropy: Tensor | None
    metrics: dict[str, Tensor]
    aux_loss: Tensor | None


@dataclass(frozen=True, eq=False)
class _PolicyLoss:
    """A loss on its way through wrappers. They cast and move the tensors of arguments that they can look into, and
    would round old log-probs to 16 bits; into this they cannot."""

    target: Tensor
    kind: Tensor | None
    options: dict[str, Any]


def fuse_lm_head(model: Any) -> Callable[[], None]:
    """Let ``model(..., labels=labels, fused=True)`` return log-probs and no logits (:class:`FusedOutput`).

    Without ``fused`` the model is what it was, so generation, saving and evaluation are unchanged. With it:

    - ``labels`` [B, L] are shifted by the model, as always in transformers: log-probs are [B, L - 1]. Or
      ``shift_labels`` [B, L], shifted already. -100 is ignored, and its row reaches no product with the head.
    - ``temperature`` (1.0), by which logits are divided, a float or [B, L - 1], and ``entropy`` (False) are options of
      that call.
    - :func:`fused_policy_loss` computes a loss there.

    Tied heads, biases, softcaps and logit scales are handled, and LoRA on the head: its product joins the head's,
    [hidden, A hidden] [W, B]^T, at the cost of one copy of the head's weight. Fuse before the model is wrapped or
    sharded; of a peft model its base model is fused.

    Returns:
        A function that undoes it.

    Raises:
        ValueError: this is no causal language model, one that turns its head's output into logits in a way that is
            not known, or it is fused already.
    """
    model = model.get_base_model() if hasattr(model, "get_base_model") else model
    name = type(model).__name__
    if not (isinstance(model, nn.Module) and hasattr(model, "get_output_embeddings")):
        raise ValueError(f"model: expected a transformers model, got {name}; fuse it before it is wrapped")
    if hasattr(model, _INNER):
        raise ValueError(f"model: this {name} is fused already; undo that first")
    before = model.__dict__.get("forward")
    setattr(model, _MAP, logit_map(model, behind_head=True))
    # A method, and not a closure over the model: a deep copy of the model has one of its own.
    setattr(model, _INNER, model.forward)
    model.forward = fused = types.MethodType(_fused_forward(type(model).forward), model)

    def undo() -> None:
        if model.__dict__.get("forward") is not fused:
            raise ValueError(f"model: the forward of this {name} was replaced after it was fused; undo that first")
        if before is None:
            del model.forward
        else:
            model.forward = before
        delattr(model, _INNER)
        delattr(model, _MAP)

    return undo


def fused_policy_loss(
    model: Any, inputs: Mapping[str, Any], target: Tensor, kind: Tensor | None = None, **options: Any
) -> FusedOutput:
    """:func:`stable_rlhf.ops.linear_policy_loss` in the forward of a model that :func:`fuse_lm_head` was given.

    Args:
        model: the model, or what it is wrapped in (peft, DDP, FSDP2, a DeepSpeed engine).
        inputs: its inputs: ``input_ids``, ``attention_mask``, …
        target, kind: [B, L] as the operation takes them: ``target`` is shifted, column t is the token after t.
        options: its other arguments, all but ``hidden``, ``weight``, ``bias`` and ``logit_scale``. A softcap is the
            model's own.

    Raises:
        ValueError: the model is not fused, or an argument is refused by the operation.
    """
    if given := sorted({"hidden", "weight", "bias", "logit_scale"} & set(options)):
        raise ValueError(f"{given[0]}: is the model's own and cannot be given")
    output = model(**inputs, fused=_PolicyLoss(target, kind, options))
    if not isinstance(output, FusedOutput):
        raise ValueError(f"model: this {type(model).__name__} is not fused; call fuse_lm_head(model) first")
    return output


def _fused_forward(plain: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(plain)  # generate and Trainer read the signature
    def forward(self: Any, *arguments: Any, fused: bool | _PolicyLoss = False, **named: Any) -> Any:
        inner = getattr(self, _INNER)
        if fused is False:
            return inner(*arguments, **named)
        if "logits_to_keep" in named:
            raise ValueError("logits_to_keep: has no meaning with fused; put -100 where labels are not wanted")
        labels, shifted = named.pop("labels", None), named.pop("shift_labels", None)
        options: dict[str, Any] = {name: named.pop(name) for name in ("temperature", "entropy") if name in named}
        if isinstance(fused, _PolicyLoss):
            if labels is not None or shifted is not None:
                raise ValueError("labels: a policy loss takes target, shifted, and no labels")
            job = fused
        else:
            job = _scoring(labels, shifted, options)
        hidden, outputs = _hidden(self, inner, arguments, named)
        if job.target.shape != hidden.shape[:-1]:
            what = "target" if job is fused else "labels"
            raise ValueError(f"{what}: shape {tuple(job.target.shape)} instead of {tuple(hidden.shape[:-1])}")
        result = _through_head(self, hidden, job, is_loss=job is fused)
        if labels is not None and shifted is None:  # the last column predicts nothing
            entropy = None if result.entropy is None else result.entropy[:, :-1].clone()
            result = result._replace(logprob=result.logprob[:, :-1].clone(), entropy=entropy)
        return result._replace(aux_loss=getattr(outputs, "aux_loss", None))

    return forward


def _scoring(labels: Tensor | None, shifted: Tensor | None, options: dict[str, Any]) -> _PolicyLoss:
    """Labels as targets: all columns stay, the last one with nothing to predict, so that no hidden state is copied."""
    if shifted is not None:
        return _PolicyLoss(shifted, None, options)
    if labels is None:
        raise ValueError("labels: required with fused=True, [B, L] or shift_labels of that shape")
    temperature = options.get("temperature")
    if isinstance(temperature, Tensor) and temperature.ndim:
        options = {**options, "temperature": nn.functional.pad(temperature, (0, 1), value=1.0)}
    return _PolicyLoss(nn.functional.pad(labels[:, 1:], (0, 1), value=IGNORE), None, options)


class _HeadStandIn(nn.Module):
    """Keeps the hidden states that the head would get, and answers with one logit a token."""

    def __init__(self, head: nn.Module) -> None:
        super().__init__()
        self.hidden: Tensor | None = None
        object.__setattr__(self, "head", head)

    def forward(self, hidden: Tensor) -> Tensor:
        self.hidden = hidden
        return hidden.detach()[..., :1].clone()  # some models work on logits in place

    def __getattr__(self, name: str) -> Any:  # a forward may ask for the weight's type
        return getattr(self.__dict__["head"], name)


def _hidden(
    model: Any, inner: Callable[..., Any], arguments: tuple[Any, ...], named: dict[str, Any]
) -> tuple[Tensor, Any]:
    """What the model's own forward gives its head, and what it returns."""
    head = model.get_output_embeddings()
    place = next(key for key, child in model._modules.items() if child is head)
    stand_in = _HeadStandIn(head)
    model._modules[place] = stand_in
    try:
        outputs = inner(*arguments, **{"use_cache": False, **named, "return_dict": True})
    finally:
        model._modules[place] = head
    if stand_in.hidden is None:
        raise ValueError(f"model: the forward of {type(model).__name__} did not call its head")
    return stand_in.hidden, outputs


def _through_head(model: Any, hidden: Tensor, job: _PolicyLoss, *, is_loss: bool) -> FusedOutput:
    head, known, metrics = model.get_output_embeddings(), getattr(model, _MAP), {}

    def forward(hidden: Tensor) -> tuple[Tensor | None, Tensor, Tensor | None]:
        hidden, weight, bias = _operands(head, hidden)
        options = {**job.options, "temperature": job.options.get("temperature", 1.0) / known.scale, "bias": bias}
        if not is_loss:
            logprob, entropy = ops.linear_logprob(hidden, weight, job.target, softcap=known.softcap, **options)
            # FSDP2 hangs its hooks on what is returned, and a view may lose them.
            return None, logprob.clone(), None if entropy is None else entropy.clone()
        options["config"] = _with_softcap(options.get("config"), known)
        output = ops.linear_policy_loss(hidden, weight, job.target, job.kind, **options)
        metrics.update(output.metrics)
        return output.loss, output.logprob, output.entropy

    with _forward_of(head, forward):
        loss, logprob, entropy = head(hidden)  # called, so that hooks gather its weight
    return FusedOutput(loss, logprob, entropy, metrics, None)


def _with_softcap(config: ops.PolicyLossConfig | None, known: LogitMap) -> ops.PolicyLossConfig:
    config = config or ops.PolicyLossConfig()
    if config.softcap not in (None, known.softcap):
        raise ValueError(f"config.softcap: {config.softcap}, where the model's own is {known.softcap}; leave it out")
    return replace(config, softcap=known.softcap)


@contextmanager
def _forward_of(module: nn.Module, forward: Callable[..., Any]) -> Iterator[None]:
    before = module.__dict__.get("forward")
    object.__setattr__(module, "forward", forward)
    try:
        yield
    finally:
        if before is None:
            object.__delattr__(module, "forward")
        else:
            object.__setattr__(module, "forward", before)


def _operands(head: Any, hidden: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
    """The one product that is the head's output: hidden states, weight, bias."""
    layer = getattr(head, "base_layer", None)
    if layer is None:
        return hidden, head.weight, getattr(head, "bias", None)
    if head.disable_adapters and head.merged:
        head.unmerge()  # as its own forward does
    if head.disable_adapters or head.merged:
        return hidden, layer.weight, layer.bias
    if not hasattr(head, "lora_A"):
        raise ValueError(f"model: the adapter {type(head).__name__} of its head is not LoRA; merge it, or leave it out")
    hiddens, weights, bias = [hidden], [layer.weight], layer.bias
    for name in head.active_adapters:
        if name in head.lora_variant:
            raise ValueError(f"model: adapter {name!r} of its head is a variant of LoRA; merge it, or leave it out")
        if name not in head.lora_A:
            continue
        down, up, scale = head.lora_A[name], head.lora_B[name], head.scaling[name]
        states = head.lora_dropout[name](hidden.to(down.weight.dtype))
        hiddens.append((down(states) * scale).to(hidden.dtype))
        weights.append(up.weight.to(layer.weight.dtype))
        if up.bias is not None:
            bias = up.bias * scale if bias is None else bias + up.bias * scale
    if any(isinstance(weight, DTensor) or weight.numel() == 0 for weight in weights):
        raise ValueError("model: its head has LoRA and lies in shards; leave the head out of target_modules")
    return torch.cat(hiddens, -1), torch.cat(weights, -1), bias
