"""A causal language model whose every loss and log-prob is computed inside its own forward."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from stable_rlhf import ops
from stable_rlhf.integrations.logit_map import logit_map
from stable_rlhf.models.loading import text_decoder
from stable_rlhf.models.trunk import Trunk


class _Rows(torch.autograd.Function):
    """Rows of a weight, which is no input to autograd: their gradient goes straight to the weight's ``grad``."""

    @staticmethod
    def forward(ctx: Any, _anchor: Tensor, ids: Tensor, embedding: nn.Embedding) -> Tensor:
        ctx.ids, ctx.embedding = ids, embedding
        return nn.functional.embedding(ids, embedding.weight)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[None, None, None]:
        weight, ids = ctx.embedding.weight, ctx.ids.flatten()
        rows = gradient.flatten(0, -2)
        if ctx.embedding.padding_idx is not None:
            rows = rows * (ids != ctx.embedding.padding_idx)[:, None]
        if weight.grad is None:  # the head's usually came first
            weight.grad = torch.zeros_like(weight)
        weight.grad.index_add_(0, ids, rows)
        return None, None, None


def _look_up(embedding: nn.Embedding, arguments: tuple[Tensor, ...], output: Tensor) -> Tensor:
    if not output.requires_grad:
        return output
    anchor = torch.zeros((), requires_grad=True, dtype=torch.float32, device="cpu")  # so that autograd comes back here
    rows: Tensor = _Rows.apply(anchor, arguments[0], embedding)
    return rows


class PolicyModel(nn.Module):
    """A causal language model whose every loss and log-prob is computed inside its own ``forward``.

    That is what ZeRO-3 needs: the head's weight is gathered while the module that uses it runs. ``value_head``
    reads the hidden state that predicts a token, so its output is V(s_t) for that token. ``workspace_bytes`` bounds the
    logits that exist at once; unset, an engine says. Log-probs are those of the logits that the model itself gives,
    divided by a temperature: what it does to its head's output (a softcap, a scale) is done here too.
    """

    workspace_bytes: int | None = None

    def __init__(self, causal_lm: Any, *, num_trainable_layers: int | None = None, value_head: bool = False) -> None:
        super().__init__()
        self.trunk = Trunk(text_decoder(causal_lm), num_trainable_layers)
        self.causal_lm: Any
        self.head = causal_lm.get_output_embeddings()
        self.logit_map = logit_map(causal_lm)
        if num_trainable_layers is not None:
            for parameter in self.head.parameters():
                parameter.requires_grad_(False)  # tied to the frozen embedding, or of its rank: it stays with it

        self.value_head: nn.Linear | None = None
        if value_head:
            self.value_head = nn.Linear(self.trunk.hidden_size, 1, dtype=torch.float32)
            nn.init.zeros_(self.value_head.weight)  # the critic starts at 0 everywhere: no random first advantages
            nn.init.zeros_(self.value_head.bias)
        object.__setattr__(self, "causal_lm", causal_lm)

    def join_tied_gradients(self) -> Any:
        """Add the gradient of an embedding that is tied to the head to the head's own, row by row, where autograd makes
        a second one of the same size (V·H) to add up. Whoever trains must leave gradients in ``grad``. Returns the hook
        that does it, to be removed afterwards, or None where nothing is tied or trained."""
        if not self.head.weight.requires_grad:
            return None
        embedding = self.causal_lm.get_input_embeddings()
        if embedding.weight is not self.head.weight or embedding.max_norm is not None or embedding.scale_grad_by_freq:
            return None
        return embedding.register_forward_hook(_look_up)

    @property
    def draws(self) -> bool:
        """Whether a forward in training draws dropout masks, by whatever name its modules have for that."""
        return any(
            (isinstance(module, nn.Dropout) and module.p > 0)
            or any("dropout" in name and isinstance(p, float) and p > 0 for name, p in vars(module).items())
            for module in self.causal_lm.modules()
        )

    def reference(self) -> PolicyModel:
        """A frozen copy of the policy as it is now; the frozen lower blocks are shared, not copied."""
        clone = PolicyModel.__new__(PolicyModel)
        nn.Module.__init__(clone)
        trunk = Trunk.__new__(Trunk)
        nn.Module.__init__(trunk)
        copied: dict[int, Any] = {}  # one for both: a head that is tied to the embedding stays tied
        trunk.upper = copy.deepcopy(self.trunk.upper, copied)
        trunk.num_trainable_layers = self.trunk.num_trainable_layers
        trunk.packing = self.trunk.packing
        object.__setattr__(trunk, "lower", self.trunk.lower)
        object.__setattr__(trunk, "backbone", None)
        clone.trunk = trunk
        clone.head = copy.deepcopy(self.head, copied)
        clone.logit_map = self.logit_map
        clone.value_head = None
        object.__setattr__(clone, "causal_lm", None)
        return clone.requires_grad_(False).eval()

    def forward(
        self,
        inputs: dict[str, Tensor],
        target: Tensor,
        *,
        temperature: float | Tensor = 1.0,
        entropy: bool = False,
        loss: dict[str, Any] | None = None,
        watch: Callable[[Tensor], None] | None = None,
    ) -> dict[str, Any]:
        """Without ``loss``: log-probs (and entropy, values) of ``target`` [B, L]. With ``loss``: keyword arguments of
        :func:`stable_rlhf.ops.linear_policy_loss`, whose output is returned under ``"output"``; ``watch`` is shown the
        gradient of that loss alone with respect to the hidden states, [B, L, H], in the backward pass."""
        hidden = self.trunk(**inputs)  # [B, L, H]
        result: dict[str, Any] = {}
        if self.value_head is not None:
            result["value"] = self.value_head(hidden.to(self.value_head.weight.dtype)).squeeze(-1).float()  # [B, L]
        weight, bias = self.head.weight, self.head.bias
        temperature = temperature / self.logit_map.scale  # not the hidden states: in 16 bits that would round them
        if loss is not None:
            if self.logit_map.softcap is not None:
                config = loss.get("config") or ops.PolicyLossConfig()
                loss = {**loss, "config": replace(config, softcap=self.logit_map.softcap)}
            if watch is not None and hidden.requires_grad:
                hidden = hidden.view_as(hidden)  # of which the critic's share is no part
                hidden.register_hook(watch)
            result["output"] = ops.linear_policy_loss(
                hidden, weight, target, bias=bias, temperature=temperature, workspace_bytes=self.workspace_bytes, **loss
            )
        else:
            result["logprob"], result["entropy"] = ops.linear_logprob(
                hidden, weight, target, bias=bias, temperature=temperature, softcap=self.logit_map.softcap,
                entropy=entropy, workspace_bytes=self.workspace_bytes,
            )  # fmt: skip
        return result
