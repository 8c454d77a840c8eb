"""A language-model head that runs the loss inside its own ``forward``."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from stable_rlhf.ops._policy_config import PolicyLossOutput
from stable_rlhf.ops._policy_loss import linear_logprob, linear_policy_loss


class PolicyHead(nn.Module):
    """The head of a causal language model: hidden states in, loss or log-probs out, logits never whole.

    ZeRO-3 and FSDP gather a module's weights while its ``forward`` runs. A loss that takes ``lm_head.weight`` from
    outside finds an empty shard there; this module owns the same parameter (tied to the embedding or not) and uses it
    where it is whole.

        model.lm_head = PolicyHead.from_linear(model.lm_head)  # head(hidden) still is logits
        output = model.lm_head(hidden, target, kind, old_logprob=..., advantage=...)
    """

    def __init__(self, weight: Tensor, bias: Tensor | None = None) -> None:
        super().__init__()
        self.weight = weight  # [V, H]
        self.bias = bias  # [V]

    @classmethod
    def from_linear(cls, linear: nn.Linear) -> PolicyHead:
        """The head over a linear layer's own parameters, which stay tied to whatever they are tied to."""
        return cls(linear.weight, linear.bias)

    def forward(
        self,
        hidden: Tensor,
        target: Tensor | None = None,
        kind: Tensor | None = None,
        *,
        loss: bool = True,
        **options: Any,
    ) -> Tensor | PolicyLossOutput | tuple[Tensor, Tensor | None]:
        """Logits [..., V] without ``target``; with it the output of :func:`linear_policy_loss`, or with ``loss=False``
        that of :func:`linear_logprob`. ``options`` are theirs."""
        if target is None:
            return nn.functional.linear(hidden, self.weight, self.bias)
        if loss:
            return linear_policy_loss(hidden, self.weight, target, kind, bias=self.bias, **options)
        if kind is not None:
            raise ValueError("kind: log-probs know no kinds; put -100 where target is to be ignored")
        return linear_logprob(hidden, self.weight, target, bias=self.bias, **options)
