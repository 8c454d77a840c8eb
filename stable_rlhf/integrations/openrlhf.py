"""OpenRLHF: an Actor whose log-probs need no logits, and rewards with bounds.

Importing this imports no OpenRLHF.
"""

from __future__ import annotations

import types
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from stable_rlhf import ops
from stable_rlhf.integrations.transformers import FusedOutput, fuse_lm_head

__all__ = ["BoundedPairLoss", "patch_actor"]

IGNORE = -100


def patch_actor(actor: Any) -> Callable[[], None]:
    """Let an ``openrlhf.models.Actor`` make log-probs and entropies from hidden states, without [B, L, V] logits.

    Calls with ``action_mask`` or ``return_logprobs`` return what they did; their ``output`` (``return_output=True``)
    has ``entropy`` and ``aux_loss``, and no logits. Every other call, ``generate`` and saving are the actor's own. With
    an ``action_mask`` only its tokens reach the head: entropies elsewhere are 0. Tied heads, softcaps, logit scales and
    LoRA are as in :func:`~stable_rlhf.integrations.transformers.fuse_lm_head`; patch before DeepSpeed wraps the model.

    Returns:
        A function that undoes it.

    Raises:
        ValueError: the model behind the actor cannot be fused, sees images, or is patched already.
    """
    if not (isinstance(actor, nn.Module) and isinstance(getattr(actor, "model", None), nn.Module)):
        raise ValueError(f"actor: expected an openrlhf.models.Actor, got {type(actor).__name__}")
    if "forward" in actor.__dict__:
        raise ValueError("actor: its forward is replaced already; undo that first")
    if getattr(actor, "is_vlm", False):
        raise ValueError("actor: models that see images are not supported; leave this actor unpatched")
    model: Any = actor.model
    while isinstance(getattr(model, "module", None), nn.Module):  # DeepSpeed's engine
        model = model.module
    undo_head = fuse_lm_head(model)
    forward = types.MethodType(_forward, actor)
    actor.forward = forward

    def undo() -> None:
        if actor.__dict__.get("forward") is not forward:
            raise ValueError("actor: its forward was replaced after it was patched; undo that first")
        undo_head()
        del actor.forward

    return undo


def _forward(
    self: Any,
    sequences: Tensor,  # [B, L]
    action_mask: Tensor | None = None,  # [B, A], of the last A tokens
    attention_mask: Tensor | None = None,
    return_output: bool = False,
    allgather_logits: bool = False,
    return_logprobs: bool = False,
    ring_attn_group: Any = None,
    packed_seq_lens: list[int] | None = None,
    return_entropy: bool = False,
    **multimodal: Any,
) -> Any:
    """``Actor.forward``, its logits made only where they are asked for."""
    if action_mask is None and not return_logprobs:
        return type(self).forward(
            self, sequences, attention_mask=attention_mask, return_output=return_output,
            allgather_logits=allgather_logits, ring_attn_group=ring_attn_group, packed_seq_lens=packed_seq_lens,
            return_entropy=return_entropy, **multimodal,
        )  # fmt: skip
    if attention_mask is None:
        raise ValueError("attention_mask: required, [B, L]")
    if return_entropy and not return_output:
        raise ValueError("return_entropy: the entropy comes with the output; set return_output=True")
    batch, length = sequences.shape
    wanted = None if action_mask is None else _at_their_predictors(action_mask, sequences)
    if self.packing_samples:
        from openrlhf.models.ring_attn_utils import gather_and_pad_tensor, unpad_and_slice_tensor

        sequences, position, target, pad, indices = unpad_and_slice_tensor(sequences, attention_mask, ring_attn_group)
        model_mask = None
        if wanted is not None:  # where a ring has cut the rows, all of them are scored
            wanted = wanted.reshape(1, -1)[:, indices] if ring_attn_group is None else None
    else:
        target, model_mask = torch.roll(sequences, shifts=-1, dims=1), attention_mask
        position = (attention_mask.long().cumsum(-1) - 1).masked_fill(attention_mask == 0, 1)
    if wanted is not None:
        target = target.masked_fill(~wanted, IGNORE)
    fused: FusedOutput = self.model(
        sequences, attention_mask=model_mask, position_ids=position, shift_labels=target, fused=True,
        temperature=self.temperature, entropy=return_entropy, **multimodal,
    )  # fmt: skip
    logprob, entropy = fused.logprob, fused.entropy
    if self.packing_samples:
        logprob = gather_and_pad_tensor(logprob, ring_attn_group, pad, indices, batch, length)
        if entropy is not None:
            entropy = gather_and_pad_tensor(entropy, ring_attn_group, pad, indices, batch, length)
    logprob = logprob[:, :-1]
    if action_mask is not None:
        logprob = logprob[:, -action_mask.shape[1] :] * action_mask.float()
    if not return_output:
        return logprob
    return logprob, _output(None if entropy is None else entropy[:, :-1], fused.aux_loss)


def _at_their_predictors(action_mask: Tensor, sequences: Tensor) -> Tensor:
    """[B, L] bool: the columns from which a masked-in action is predicted."""
    batch, length = sequences.shape
    count = action_mask.shape[1]
    wanted = torch.zeros(batch, length, dtype=torch.bool, device=sequences.device)
    wanted[:, length - 1 - count : length - 1] = action_mask != 0
    return wanted


def _output(entropy: Tensor | None, aux_loss: Tensor | None) -> Any:
    from transformers.modeling_outputs import MoeCausalLMOutputWithPast

    output = MoeCausalLMOutputWithPast(aux_loss=aux_loss)
    output.entropy = entropy
    return output


class BoundedPairLoss(nn.Module):
    """``loss_fn`` of OpenRLHF's ``RewardModelTrainer``: :func:`stable_rlhf.ops.advantage_loss`.

        trainer = RewardModelTrainer(...)
        trainer.loss_fn = BoundedPairLoss(margin=2.5)

    Args:
        margin: scores are held within it; None: no bounds, which is OpenRLHF's ``PairWiseLoss``.
    """

    def __init__(self, margin: float | None = 2.5) -> None:
        super().__init__()
        self.margin = margin

    def forward(self, chosen_reward: Tensor, reject_reward: Tensor, margin: Tensor | None = None) -> Tensor:
        """The mean over pairs; ``margin`` [B] is by how much a chosen response is to be ahead."""
        reward = torch.cat([chosen_reward, reject_reward])
        return ops.advantage_loss(reward, margin=self.margin, rank_margin=0.0 if margin is None else margin).loss
