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


def loss_and_gradients(call: PolicyCall) -> tuple[Tensor, ...] | None:
    """What `fused` makes of the same call; None: it is not for here."""
    module, weight, config, count = extension(), call.weight, call.config, call.target.numel()
    if module is None or weight is None or not _takes(call, count * call.width, weight.shape[1]):
        return None
    vocabulary, width = weight.shape
    target, kind = call.target.contiguous(), call.kind
    if kind is not None:
        kind = kind.to(torch.int64).contiguous()
    places = torch.empty(3 * count, dtype=torch.int64, device="cpu")  # index, targets and, in 8 bits, kinds
    index, targets, kinds = (places.data_ptr() + part * 8 * count for part in range(3))
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
    floats = torch.empty((len(PER_ROW) + 6) * active, dtype=torch.float32, device="cpu")
    rows = [floats.data_ptr() + part * 4 * active for part in range(len(PER_ROW) + 6)]
    sources = {name: value.to(torch.float32).contiguous() for name, value in _given(call).items()}
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
    inverse_temperature = torch.full((active,), 1.0 / float(call.temperature), dtype=torch.float32, device="cpu")
    logprobs, entropies = (torch.empty(call.target.shape, dtype=torch.float32, device="cpu") for _ in range(2))
    logprob, entropy = (logprobs.data_ptr(), entropies.data_ptr()) if whole else rows[-2:]

    hidden = call.source.reshape(-1, width)
    if not whole:
        hidden = hidden.index_select(0, places[:active])
    logits = workspace(active, vocabulary, torch.float32, call.source.device)
    torch.mm(hidden, weight.t(), out=logits)
    module.rows(
        mode=1, type=LOGITS_TYPES[logits.dtype], logits=logits.data_ptr(), gradient=logits.data_ptr(),
        gradient_type=LOGITS_TYPES[logits.dtype], logits_stride=vocabulary, gradient_stride=vocabulary, count=active,
        vocabulary=vocabulary, softcap=config.softcap or 0.0, num_threads=torch.get_num_threads(), isa=cpu_isa(),
        target=targets, inverse_temperature=inverse_temperature.data_ptr(), logprob=logprob, entropy=entropy,
        max=rows[4], log_sum=rows[5], coefficient=rows[6], entropy_coefficient=rows[7], **terms,
        rehearsal_scale=config.rehearsal_coef / denominators[1],
    )  # fmt: skip
    gradients = _gradients(call, logits, hidden, None if whole else places[:active])

    loss, metrics = (torch.empty(shape, dtype=torch.float32, device="cpu") for shape in ((), METRICS))
    counts = torch.empty(2, dtype=torch.int64, device="cpu")
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
        and not any(
            isinstance(x, Tensor) for x in (call.temperature, call.policy_denominator, call.rehearsal_denominator)
        )
    )


def _given(call: PolicyCall) -> dict[str, Tensor]:
    """The arguments that are there and are read, one number a row."""
    values = {name: getattr(call, name) for name in PER_ROW if name != "ref_logprob" or call.config.kl_coef != 0.0}
    return {name: value for name, value in values.items() if value is not None}


def _gradients(call: PolicyCall, gradient: Tensor, hidden: Tensor, index: Tensor | None) -> list[Tensor]:
    """Of the source, the weight and the bias, from that of the logits; empty where none is asked for. The products
    write to memory that is there: those that make their own would obey autocast."""
    weight, of_source, of_weight = call.weight, call.source.new_empty(0), call.source.new_empty(0)
    assert weight is not None
    if call.needs[0]:
        of_source = torch.mm(gradient, weight, out=torch.empty(hidden.shape, dtype=hidden.dtype, device="cpu"))
        if index is not None:
            whole = hidden.new_zeros(call.target.numel(), hidden.shape[1])
            of_source = whole.index_copy_(0, index, of_source)
        of_source = of_source.view(call.source.shape)
    if call.needs[1]:
        of_weight = torch.mm(gradient.t(), hidden, out=torch.empty(weight.shape, dtype=hidden.dtype, device="cpu"))
    return [of_source, of_weight, call.source.new_empty(0)]
