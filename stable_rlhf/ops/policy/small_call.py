"""A loss on few rows, whose products take less time than all the steps between them: in one stretch, on the CPU.

The kernels and the products are those of `fused`'s own way, for one chunk of rows. What does not fit here (more rows,
16 bits, a choice of columns, a split vocabulary, ratios of sequences, numbers that differ by row) goes that way, and
so does a call with a wrong value in it, which that way names.
"""

from __future__ import annotations

import torch
from torch import Tensor

from stable_rlhf.ops.backends import cpu_isa, extension
from stable_rlhf.ops.memory import workspace
from stable_rlhf.ops.policy.cpu import constants
from stable_rlhf.ops.policy.cpu_call import METRICS, PER_ROW
from stable_rlhf.ops.policy.types import LOGITS_TYPES, PolicyCall

# Logits, and what a product multiplies. Beyond, the steps between products are little, and rows that turn out to have
# no gradient, which the other way leaves out of two of them, are much.
_MOST_LOGITS, _MOST_WORK = 1 << 18, 1 << 24
_SCRATCH = 2 + 2 + 1 + len(PER_ROW) + 6  # floats a row: index and target of 64 bits, kind, arguments, statistics


def loss_and_gradients(call: PolicyCall) -> tuple[Tensor, ...] | None:
    """What `fused` makes of the same call; None: it is not for here."""
    module, weight, config, count = extension(), call.weight, call.config, call.target.numel()
    if module is None or weight is None or not _takes(call, count * weight.shape[0], weight.shape[1]):
        return None
    vocabulary, width = weight.shape
    target, kind, device = call.target.contiguous(), call.kind, call.source.device
    if kind is not None:
        kind = kind.to(torch.int64).contiguous()
    scratch = workspace(_SCRATCH, count, torch.float32, device, "rows")
    index = scratch.data_ptr()
    targets = index + 8 * count
    kinds = targets + 8 * count
    active, policy, sound = module.choose_rows(
        target=target.data_ptr(), kind=0 if kind is None else kind.data_ptr(), count=count, vocabulary=vocabulary,
        index=index, chosen=targets, kinds=kinds,
    )  # fmt: skip
    denominators = [
        float(given if given is not None else rows) if rows else 1.0
        for given, rows in ((call.policy_denominator, policy), (call.rehearsal_denominator, active - policy))
    ]
    if not sound or active == 0 or call.active_rows not in (None, active) or min(denominators) < 1e-30:
        return None

    # Four arguments, then what the row kernel makes of each row beside its log-prob and entropy.
    rows = [kinds + 4 * (count + part * active) for part in range(len(PER_ROW) + 6)]
    sources = {name: _float32(value) for name, value in _given(call).items()}
    whole = active == count
    if not module.gather_rows(
        kind=kinds, index=0 if whole else index, count=active, out=rows[0],
        **{name: value.data_ptr() for name, value in sources.items()},
    ):  # fmt: skip
        return None
    terms = {
        **constants(config), "kind": kinds, "policy_scale": 1.0 / denominators[0],
        **{name: row for name, row in zip(PER_ROW, rows, strict=False) if name in sources},
    }  # fmt: skip
    logprobs = torch.empty_like(target, dtype=torch.float32)
    entropies = torch.empty_like(logprobs)
    logprob, entropy = (logprobs.data_ptr(), entropies.data_ptr()) if whole else rows[-2:]

    hidden, places = call.source, None
    if hidden.ndim != 2:
        hidden = hidden.reshape(-1, width)
    if not whole:
        places = scratch.view(-1)[: 2 * active].view(torch.int64)
        hidden = hidden.index_select(0, places)
    logits = workspace(active, vocabulary, torch.float32, device)
    torch.mm(hidden, weight.t(), out=logits)
    module.rows(
        mode=1, type=LOGITS_TYPES[torch.float32], logits=logits.data_ptr(), gradient=logits.data_ptr(),
        gradient_type=LOGITS_TYPES[torch.float32], logits_stride=vocabulary, gradient_stride=vocabulary, count=active,
        vocabulary=vocabulary, softcap=config.softcap or 0.0, num_threads=torch.get_num_threads(), isa=cpu_isa(),
        target=targets, inverse_temperature_of_all=1.0 / float(call.temperature), logprob=logprob, entropy=entropy,
        max=rows[4], log_sum=rows[5], coefficient=rows[6], entropy_coefficient=rows[7], between_products=True, **terms,
        rehearsal_scale=config.rehearsal_coef / denominators[1],
    )  # fmt: skip
    gradients = _gradients(call, logits, hidden, places)

    loss, metrics = (torch.empty(shape, dtype=torch.float32, device=device) for shape in ((), METRICS))
    counts = torch.empty(2, dtype=torch.int64, device=device)
    if not module.policy_totals(
        logprob=logprob, entropy=entropy, index=index, count=active, places=count,
        logprobs=0 if whole else logprobs.data_ptr(), entropies=0 if whole else entropies.data_ptr(),
        loss=loss.data_ptr(), metrics=metrics.data_ptr(), counts=counts.data_ptr(), **terms,
        rehearsal_scale=1.0 / denominators[1], rehearsal_coef=config.rehearsal_coef,
    ):  # fmt: skip
        return None
    return loss, logprobs, entropies, metrics, counts, *gradients


def _takes(call: PolicyCall, logits: int, width: int) -> bool:
    config = call.config
    return (
        call.backend == "cpu"
        and not call.group
        and 0 < logits <= min(_MOST_LOGITS, _MOST_WORK // width, (call.workspace_bytes or 4 * _MOST_LOGITS) // 4)
        and call.source.dtype == torch.float32
        and any(call.needs)
        and call.bias is None
        and call.grad_tolerance == 0.0
        and config.importance_level == "token"
        and call.advantage is not None
        and (config.kl_coef == 0.0 or (call.ref_logprob is not None and config.kl_estimator != "k1"))  # which warns
        and (call.entropy_denominator is None or config.entropy_coef == 0.0)
        and not isinstance(call.temperature, Tensor)
        and not isinstance(call.policy_denominator, Tensor)
        and not isinstance(call.rehearsal_denominator, Tensor)
    )


def _given(call: PolicyCall) -> dict[str, Tensor]:
    """The arguments that are there and are read, one number a row."""
    values = {name: getattr(call, name) for name in PER_ROW if name != "ref_logprob" or call.config.kl_coef != 0.0}
    return {name: value for name, value in values.items() if value is not None}


def _float32(value: Tensor) -> Tensor:
    return (value if value.dtype == torch.float32 else value.to(torch.float32)).contiguous()


def _gradients(call: PolicyCall, gradient: Tensor, hidden: Tensor, index: Tensor | None) -> list[Tensor]:
    """Of the source, the weight and the bias, from that of the logits; empty where none is asked for. The products
    write to memory that is there: those that make their own would obey autocast."""
    weight, nothing, contiguous = call.weight, call.source.new_empty, torch.contiguous_format
    assert weight is not None
    of_source = of_weight = None
    if call.needs[0]:
        of_source = torch.mm(gradient, weight, out=torch.empty_like(hidden, memory_format=contiguous))
        if index is not None:
            whole = hidden.new_zeros(call.target.numel(), hidden.shape[1])
            of_source = whole.index_copy_(0, index, of_source)
        of_source = of_source.view(call.source.shape)
    if call.needs[1]:
        of_weight = torch.mm(gradient.t(), hidden, out=torch.empty_like(weight, memory_format=contiguous))
    return [nothing(0) if x is None else x for x in (of_source, of_weight, None)]
