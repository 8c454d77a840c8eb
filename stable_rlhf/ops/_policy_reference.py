"""The plain PyTorch form of the policy losses: the truth that every other backend is tested against.

Statistics in float32 (float64 for float64 input), one chunk of rows at a time, each chunk recomputed in the backward
pass so that logits [T, V] never exist whole. Gradients by autograd.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from stable_rlhf.ops._policy_rows import Rows
from stable_rlhf.ops.backends import transformed
from stable_rlhf.ops.checks import statistics_dtype


def row_statistics(
    logits: Tensor, target: Tensor, temperature: float | Tensor, softcap: float | None, entropy_grad: bool
) -> tuple[Tensor, Tensor]:
    """Log-probability of the target and entropy, both [n], of logits [n, V]."""
    z = logits.to(statistics_dtype(logits.dtype))
    if softcap is not None:
        z = softcap * torch.tanh(z / softcap)
    if isinstance(temperature, Tensor):
        z = z / temperature.to(z.dtype).unsqueeze(-1)
    elif temperature != 1.0:
        z = z / temperature
    # From log_softmax and not as z[target] - logsumexp(z): at logits of 1e4 that difference loses three digits.
    log_p = torch.log_softmax(z, dim=-1)
    logprob = log_p.gather(-1, target.unsqueeze(-1)).squeeze(-1)
    if not entropy_grad:
        log_p = log_p.detach()
    return logprob, -(log_p.exp() * log_p).sum(-1)


def linear_statistics(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    rows: Rows,
    softcap: float | None,
    entropy_grad: bool,
    logits_dtype: torch.dtype | None,
    workspace_bytes: int,
) -> tuple[Tensor, Tensor]:
    """`row_statistics` of the active rows' logits, chunk by chunk; hidden is [A, H]."""
    wide = logits_dtype not in (None, hidden.dtype)
    inputs = (hidden, weight) if bias is None else (hidden, weight, bias)
    needs_grad = torch.is_grad_enabled() and any(x.requires_grad for x in inputs)
    statistics_bytes = statistics_dtype(hidden.dtype).itemsize
    # At the peak a chunk holds about five arrays of statistics beside its logits.
    chunk = max(1, workspace_bytes // (weight.shape[0] * (5 * statistics_bytes + hidden.element_size())))
    count = hidden.shape[0]

    # Gradients of several chunks add up where the chunks' graphs join. Joining at a float32 copy of a 16-bit weight
    # keeps that sum in float32: summed in bfloat16 it is off by 1.5 times as much.
    def join(x: Tensor | None) -> Tensor | None:
        widen = needs_grad and count > chunk and x is not None and x.requires_grad and x.element_size() == 2
        return x.float() if widen and x is not None else x

    def statistics(h: Tensor, w: Tensor, b: Tensor | None, target: Tensor, temperature: float | Tensor):
        with torch.autocast(h.device.type, enabled=not wide and torch.is_autocast_enabled(h.device.type)):
            if wide:
                h, w, b = h.to(logits_dtype), w.to(logits_dtype), None if b is None else b.to(logits_dtype)
            else:
                w, b = w.to(weight.dtype), None if b is None or bias is None else b.to(bias.dtype)
            logits = F.linear(h, w, b)
        return row_statistics(logits, target, temperature, softcap, entropy_grad)

    step: Callable[..., tuple[Tensor, Tensor]] = statistics
    if needs_grad and count > chunk and not transformed():  # which take no checkpoints: every chunk is kept
        step = functools.partial(checkpoint, statistics, use_reentrant=False, preserve_rng_state=False)
    joined_weight, joined_bias = join(weight), join(bias)
    parts = []
    # No row at all still makes one (empty) chunk: its zero keeps the loss connected to hidden and weight.
    for begin in range(0, max(count, 1), chunk):
        part = slice(begin, min(begin + chunk, count))
        temperature = rows.temperature[part] if isinstance(rows.temperature, Tensor) else rows.temperature
        parts.append(step(hidden[part], joined_weight, joined_bias, rows.target[part], temperature))
    if len(parts) == 1:
        return parts[0]
    return torch.cat([p[0] for p in parts]), torch.cat([p[1] for p in parts])
