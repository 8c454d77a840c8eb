"""The fused policy losses: chunks of rows through one bounded buffer, three products, one row kernel.

    for each chunk of active rows:
        logits = hidden W^T                        first product, into the buffer
        row kernel: statistics, loss coefficient, gradient in place
        hidden gradient = G W                      second product, rows with a gradient only
        weight gradient += G^T hidden              third product, the same rows

The same for every device; the row kernels are `cpu` (C++) and `kernels.policy` (Triton). Each forward makes the
gradients along with the loss, because a token's gradient depends on its log-prob alone; the backward only scales them.
Without any gradient asked for, only the statistics are made. Ratios of whole sequences are known when all their rows
are: then the statistics come first, and the gradients in a second pass that makes the logits again. The backend "torch"
is the reference: under `torch.compile` it runs inside the operator too, because how many rows are active depends on
values.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from stable_rlhf.kernels import tuning
from stable_rlhf.ops.checks import check_values, statistics_dtype
from stable_rlhf.ops.memory import fresh
from stable_rlhf.ops.operators import (
    Differentiable,
    Form,
    autograd_inside,
    loss_operation,
    refuse_second_derivative,
    register_operator,
    shapes_of_gradients,
)
from stable_rlhf.ops.policy import chunks, cpu_call, small_call
from stable_rlhf.ops.policy.denominators import check_denominator, wanted_denominators
from stable_rlhf.ops.policy.formula import (
    Rows,
    RowState,
    Sequences,
    Terms,
    check_statistics,
    gather_terms,
    loss_of,
    loss_of_logprobs,
    select_rows,
    sequences_of,
    statistics_of,
    total_loss,
)
from stable_rlhf.ops.policy.products import CHUNK_ROWS, HeadProducts, Selection, select_columns
from stable_rlhf.ops.policy.split_vocabulary import SplitVocabulary
from stable_rlhf.ops.policy.types import Kind, PolicyCall, PolicyLossConfig, PolicyLossOutput

METRICS = (
    "policy_loss", "rehearsal_loss", "clip_fraction", "clip_fraction_low", "clip_fraction_high", "approx_kl", "ref_kl",
    "max_ratio", "entropy",
)  # fmt: skip
COUNTS = ("policy_tokens", "rehearsal_tokens")
_INPUTS = ("source", "weight", "bias")  # fields of a call that get gradients

Gradients = tuple[Tensor | None, Tensor | None, Tensor | None]  # of hidden [A, H], weight, bias


def row_kernels(backend: str, group: str, width: int, device: torch.device) -> tuple[Any, int]:
    """The row kernels of a backend, "cpu" or "triton", and the size of the vocabulary, of which `width` tokens are this
    rank's when `group` names a process group."""
    kernels = importlib.import_module(
        "stable_rlhf.ops.policy.cpu" if backend == "cpu" else "stable_rlhf.kernels.policy"
    )
    if not group:
        return kernels, width
    split = SplitVocabulary(kernels, group, width, device)
    return split, split.vocabulary


def _run(
    kernels: Any,
    products: HeadProducts,
    count: int,
    workspace_bytes: int | None,
    work: Callable[[slice, Tensor, Tensor], Tensor | None],
    select: Callable[[Tensor, Tensor], Iterator[Selection]] | None = None,
) -> Gradients:
    """`work(part, logits, gradient)` runs the row kernel on a chunk and says which rows the gradient rows are;
    `select(rows, gradient)`, block by block, which of their columns count."""
    buffers = None
    width, split = products.weight.shape[0], isinstance(kernels, SplitVocabulary)
    if isinstance(kernels, SplitVocabulary):
        width = kernels.widest
        products.keep_hidden_wide()  # what is rounded before it is summed is rounded once a rank
    device, row_bytes = products.hidden.device, width * products.bytes_per_logit
    if workspace_bytes is None and (tuned := tuning.chunk_rows(device)) is not None:
        workspace_bytes = tuned * row_bytes
    if workspace_bytes is None:
        sum_bytes = 4 * width * products.weight.shape[1] if products.needs[1] else 0
        workspace_bytes = chunks.workspace_bytes(device, count * row_bytes, sum_bytes, ask=not split)
    most = max(1, workspace_bytes // row_bytes)
    for part, last in chunks.chunks(count, most, 1 if device.type == "cpu" else chunks.TILE_ROWS):
        if buffers is None:
            buffers = products.buffers(part.stop - part.start)
        rows = part.stop - part.start
        logits, gradient = (buffer[:rows] for buffer in buffers)
        products.logits(part, logits)
        order = work(part, logits, gradient)
        if not any(products.needs):
            continue
        if order is not None:
            gradient = gradient[: order.numel()]
        if select is None:
            products.backward(part, gradient, order, last)
            continue
        places = torch.arange(rows, device=gradient.device, dtype=torch.int64) if order is None else order
        if products.hidden_grad is not None:
            products.hidden_grad[part] = 0.0
        for selection in select(part.start + places, gradient):
            products.backward_columns(part.start + places, gradient, selection)
        if products.needs[2]:
            products.add_bias(gradient)
    products.finish()
    if isinstance(kernels, SplitVocabulary) and products.hidden_grad is not None:
        products.hidden_grad = kernels.sum(products.hidden_grad).to(products.dtype)
    return products.hidden_grad, products.weight_grad, products.bias_grad


def in_product(call: PolicyCall) -> bool:
    """Whether statistics without a gradient are made in a product of our own, and no logits are written."""
    if call.backend != "triton":
        return False
    from stable_rlhf.kernels.policy_head import takes

    return takes(call)


def statistics(
    kernels: Any, products: HeadProducts, rows: Rows, softcap: float | None, workspace_bytes: int | None
) -> RowState:
    """Log-prob, entropy, max and log_sum of the active rows; one product."""
    state = RowState.of(rows)

    def work(part: slice, logits: Tensor, gradient: Tensor) -> None:
        kernels.statistics(logits, state.cut(part), softcap)

    _run(kernels, products, rows.target.numel(), workspace_bytes, work)
    return state


def policy(
    kernels: Any,
    products: HeadProducts,
    rows: Rows,
    terms: Terms,
    config: PolicyLossConfig,
    workspace_bytes: int | None,
    grad_tolerance: float = 0.0,
    *,
    compact: bool = True,
) -> tuple[RowState, Gradients]:
    """Statistics of the active rows and the gradients of the loss; three products, the last two over some columns only
    when there is a tolerance. `compact`: rows may turn out to have no gradient, and are then left out."""
    state = RowState.of(rows)

    def work(part: slice, logits: Tensor, gradient: Tensor) -> Tensor | None:
        order: Tensor | None = kernels.policy(
            logits, gradient, state.cut(part), rows.kind[part], terms.cut(part), config, compact=compact
        )
        return order

    def select(places: Tensor, gradient: Tensor) -> Iterator[Selection]:
        # Rows that are alike in confidence need columns that are alike in number.
        for block in torch.argsort(state.entropy[places], stable=True).split(CHUNK_ROWS):
            rows_of_block = places[block]
            scale = state.coefficient[rows_of_block].abs() * state.inverse_temperature[rows_of_block]
            yield select_columns(gradient, block, scale, state.target[rows_of_block] - offset, grad_tolerance)

    offset = kernels.offset if isinstance(kernels, SplitVocabulary) else 0
    # On a GPU the choice takes longer than the products that it saves.
    chosen = select if grad_tolerance > 0.0 and products.on_cpu else None
    return state, _run(kernels, products, rows.target.numel(), workspace_bytes, work, chosen)


def given(
    kernels: Any, products: HeadProducts, state: RowState, softcap: float | None, workspace_bytes: int | None
) -> Gradients:
    """Gradients for the coefficients in `state`, whose statistics are known; the logits are made again."""

    def work(part: slice, logits: Tensor, gradient: Tensor) -> None:
        kernels.given(logits, gradient, state.cut(part), softcap)

    return _run(kernels, products, state.target.numel(), workspace_bytes, work)


# -- the losses --------------------------------------------------------------------------------------------------------


def _leaves(call: PolicyCall) -> PolicyCall:
    """The call with its inputs as leaves of a graph of their own."""
    inputs = [getattr(call, name) for name in _INPUTS]
    leaves: list[Any] = [
        None if x is None else x.detach().requires_grad_(need) for x, need in zip(inputs, call.needs, strict=True)
    ]
    return call._replace(**dict(zip(_INPUTS, leaves, strict=True)))


def _gradients(outputs: list[Tensor], upstream: list[Tensor] | None, call: PolicyCall) -> list[Tensor]:
    """The gradients of a call's inputs, contiguous however these lie; an empty tensor where none is asked for."""
    leaves = [getattr(call, name) for name in _INPUTS]
    asked = [leaf for leaf, need in zip(leaves, call.needs, strict=True) if need]
    gradients = iter(torch.autograd.grad(outputs, asked, upstream) if asked else ())
    return [next(gradients).contiguous() if need else call.source.new_empty(0) for need in call.needs]


def _spread(rows: Rows, gradient: Tensor | None, like: Tensor) -> Tensor:
    """[A, n] back to the shape of `like`, 0 where ignored; an empty tensor where no gradient was asked for."""
    if gradient is None:
        return like.new_empty(0)
    if rows.index is None:
        return gradient.reshape(like.shape)
    whole = fresh(torch.empty_like(like, memory_format=torch.contiguous_format)).zero_()
    whole.view(-1, like.shape[-1]).index_copy_(0, rows.index, gradient)
    return whole


def _or_empty(call: PolicyCall, rows: Rows, gradients: Gradients) -> tuple[Tensor, Tensor, Tensor]:
    empty = call.source.new_empty
    return (
        _spread(rows, gradients[0], call.source),
        empty(0) if gradients[1] is None else gradients[1],
        empty(0) if gradients[2] is None else gradients[2],
    )


def _flat(out: PolicyLossOutput) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    metrics, counts = ([out.metrics[name] for name in names] for names in (METRICS, COUNTS))
    return out.loss.detach(), out.logprob, out.entropy, torch.stack(metrics), torch.stack(counts)


def _products(call: PolicyCall, rows: Rows, weight: Tensor, needs: tuple[bool, ...]) -> HeadProducts:
    hidden = rows.gather(call.source)
    if rows.policy_count is None:  # rows that are not active take part: nothing of them may reach a sum
        hidden = torch.where((rows.kind != Kind.IGNORED)[:, None], hidden, 0.0).to(hidden.dtype)
    return HeadProducts(hidden, weight, call.bias, call.logits_dtype, (needs[0], needs[1], needs[2]))


def _chosen_rows(call: PolicyCall, vocabulary: int) -> Rows:
    """The active rows, by a kernel of their own."""
    if call.backend == "cpu":
        return cpu_call.select(call, vocabulary)
    from stable_rlhf.kernels.policy_call import select

    return select(call, vocabulary)


def _totals(
    call: PolicyCall, rows: Rows, state: RowState, terms: Terms, sequences: Sequences | None
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Loss, log-probs, entropies, metrics and counts; statistics that are not finite are an error."""
    if call.backend == "cpu" and sequences is None:
        return cpu_call.totals(call, rows, state, terms)
    check_statistics(state.logprob, state.entropy, rows, call.origin)
    if call.backend == "cpu":
        return _flat(total_loss(rows, state.logprob, state.entropy, terms, call.config, sequences))
    from stable_rlhf.kernels.policy_call import noted_totals, totals

    if sequences is not None:
        return _flat(noted_totals(rows, state, terms, call.config, sequences))
    loss, metrics, counts = totals(rows, state, terms, call.config)
    return loss, rows.scatter(state.logprob), rows.scatter(state.entropy), metrics, counts


def _loss_and_gradients(call: PolicyCall) -> tuple[Tensor, ...]:
    """Loss, log-probs, entropies, metrics, counts, and the gradients of the inputs."""
    if call.backend == "torch":
        with autograd_inside(call.source.device):
            call = _leaves(call)
            out = loss_of(call)
            by_autograd = _gradients([out.loss], None, call)
        return *_flat(out), *by_autograd
    if (made := small_call.loss_and_gradients(call)) is not None:
        return made
    kernels, vocabulary = row_kernels(call.backend, call.group, call.width, call.source.device)
    if _counts_may_wait(call):
        return _in_place(kernels, call, vocabulary)
    rows = _chosen_rows(call, vocabulary)
    gather = cpu_call.gather if call.backend == "cpu" else gather_terms
    terms, sequences = gather(rows, call, torch.float32), sequences_of(call, rows)
    make = _from_logits if call.weight is None else _from_hidden
    state, gradients = make(kernels, call, rows, terms, sequences)
    return *_totals(call, rows, state, terms, sequences), *gradients


def _counts_may_wait(call: PolicyCall) -> bool:
    """Whether a loss from logits needs no count of rows before it is queued. What rows of the policy need may be absent
    where there are none: the host has to look first."""
    config = call.config
    complete = call.advantage is not None and (config.kl_coef == 0.0 or call.ref_logprob is not None)
    alone = not call.group and config.importance_level == "token"
    return call.backend == "triton" and call.weight is None and call.needs[0] and alone and complete


def _in_place(kernels: Any, call: PolicyCall, vocabulary: int) -> tuple[Tensor, ...]:
    """The loss from logits on a GPU. Every row stays at its place, and which are active the device knows; the host
    reads it when all work is queued, and under graph capture not at all."""
    from stable_rlhf.kernels.policy_call import choose

    chosen = choose(call, vocabulary, index=False)
    rows = chosen.unread(call)
    terms = gather_terms(rows, call, torch.float32)
    state, gradients = _from_logits(kernels, call, rows, terms, None)
    totals = _totals(call, rows, state, terms, None)
    if not chosen.late:
        for name, value, count in wanted_denominators(call, *chosen.read(call, vocabulary)[1:]):
            if not isinstance(value, Tensor):
                check_denominator(name, value, count)
    return *totals, *gradients


def _set_coefficients(
    state: RowState, rows: Rows, terms: Terms, config: PolicyLossConfig, sequences: Sequences
) -> None:
    """The coefficients of rows whose ratios hang together, from all rows' statistics."""
    part = rows.kind != Kind.IGNORED
    with autograd_inside(state.logprob.device):
        logprob, entropy = (torch.where(part, x, 0.0).requires_grad_() for x in (state.logprob, state.entropy))
        loss = total_loss(rows, logprob, entropy, terms, config, sequences).loss
        by_logprob, by_entropy = torch.autograd.grad(loss, (logprob, entropy), allow_unused=True)
    assert by_logprob is not None
    state.coefficient.copy_(by_logprob)
    if by_entropy is None:
        state.entropy_coefficient.zero_()
    else:
        state.entropy_coefficient.copy_(by_entropy)


def _from_hidden(
    kernels: Any, call: PolicyCall, rows: Rows, terms: Terms, sequences: Sequences | None
) -> tuple[RowState, tuple[Tensor, Tensor, Tensor]]:
    assert call.weight is not None
    config, workspace_bytes = call.config, call.workspace_bytes
    gradients: Gradients = (None, None, None)
    if any(call.needs) and sequences is None:
        products = _products(call, rows, call.weight, call.needs)
        state, gradients = policy(kernels, products, rows, terms, config, workspace_bytes, call.grad_tolerance)
        return state, _or_empty(call, rows, gradients)
    products = _products(call, rows, call.weight, (False, False, False))
    if in_product(call):
        from stable_rlhf.kernels.policy_head import statistics as made_in_product

        state = RowState.of(rows)
        made_in_product(products.hidden, products.weight, products.logits_dtype, state)
    else:
        state = statistics(kernels, products, rows, config.softcap, workspace_bytes)
    if any(call.needs) and sequences is not None:
        _set_coefficients(state, rows, terms, config, sequences)
        products = _products(call, rows, call.weight, call.needs)
        gradients = given(kernels, products, state, config.softcap, workspace_bytes)
    return state, _or_empty(call, rows, gradients)


def _from_logits(
    kernels: Any, call: PolicyCall, rows: Rows, terms: Terms, sequences: Sequences | None
) -> tuple[RowState, tuple[Tensor, Tensor, Tensor]]:
    logits, config = call.source, call.config
    flat = logits.contiguous().view(-1, logits.shape[-1])
    state = RowState.of(rows)
    gradient = logits.new_empty(0)
    if call.needs[0]:
        gradient = fresh(torch.empty_like(logits, memory_format=torch.contiguous_format))
        if rows.index is not None:
            gradient.zero_()
    if call.needs[0] and sequences is None:
        kernels.policy(flat, gradient.view(flat.shape), state, rows.kind, terms, config, row=rows.index, compact=False)
    else:
        kernels.statistics(flat, state, config.softcap, row=rows.index)
    if call.needs[0] and sequences is not None:
        _set_coefficients(state, rows, terms, config, sequences)
        kernels.given(flat, gradient.view(flat.shape), state, config.softcap, row=rows.index)
    return state, (gradient, logits.new_empty(0), logits.new_empty(0))


def _loss_shapes(call: PolicyCall) -> tuple[Tensor, ...]:
    per_row = call.target.new_empty(call.target.shape, dtype=statistics_dtype(call.source.dtype))
    return (
        per_row.new_empty(()),
        per_row,
        torch.empty_like(per_row),
        per_row.new_empty(len(METRICS)),
        call.target.new_empty(len(COUNTS)),
        *shapes_of_gradients(call.needs, call.source, call.weight, call.bias),
    )


linear_policy_loss, policy_loss = (
    loss_operation(name, PolicyCall, _INPUTS, 8, body=_loss_and_gradients, shapes=_loss_shapes)
    for name in ("linear_policy_loss", "policy_loss")
)


class LogprobLossCall(NamedTuple):
    """A call of the loss from log-probs that exist; `call` has the rest, and target in the place of its source."""

    logprob: Tensor  # [...]
    entropy: Tensor | None  # [...]
    call: PolicyCall

    @property
    def needs(self) -> tuple[bool, ...]:
        return self.call.needs[:2]

    def loss(self) -> PolicyLossOutput:
        return loss_of_logprobs(self.call._replace(source=self.logprob), self.entropy)


def _loss_of_logprobs(call: LogprobLossCall) -> tuple[Tensor, ...]:
    logprob = call.logprob.detach().requires_grad_()
    entropy = None if call.entropy is None else call.entropy.detach().requires_grad_()
    inputs = [x if need else None for x, need in zip((logprob, entropy), call.needs, strict=True)]
    with autograd_inside(logprob.device):
        out = call._replace(logprob=logprob, entropy=entropy).loss()
        asked = [x for x in inputs if x is not None]
        made = iter(torch.autograd.grad(out.loss, asked, allow_unused=True, materialize_grads=True) if asked else ())
    gradients = (logprob.new_empty(0) if x is None else next(made).contiguous() for x in inputs)
    return *_flat(out), *gradients


def _shapes_of_logprob_loss(call: LogprobLossCall) -> tuple[Tensor, ...]:
    placed = call.call._replace(source=call.logprob, needs=(False, False, False))
    return *_loss_shapes(placed)[:5], *shapes_of_gradients(call.needs, call.logprob, call.entropy)


logprob_policy_loss = loss_operation(
    "logprob_policy_loss", LogprobLossCall, ("logprob", "entropy"), 7,
    body=_loss_of_logprobs, shapes=_shapes_of_logprob_loss,
)  # fmt: skip


# -- log-probs ---------------------------------------------------------------------------------------------------------


class LogprobBackward(NamedTuple):
    """The backward pass of `linear_logprob`, which makes the logits again."""

    logprob_grad: Tensor
    entropy_grad: Tensor
    entropy: Tensor
    max: Tensor
    log_sum: Tensor
    call: PolicyCall


def _logprob(call: PolicyCall) -> tuple[Tensor, ...]:
    """Log-probs, entropies, and what the backward pass needs of each row: max and log_sum."""
    if call.backend == "torch":
        rows = select_rows(call, call.width)
        with torch.no_grad(), torch.autocast(call.source.device.type, enabled=False):
            both = statistics_of(call, rows, True)
        return *(rows.scatter(x) for x in both), *(both[0].new_zeros(call.target.shape) for _ in range(2))
    assert call.weight is not None
    if in_product(call):
        from stable_rlhf.kernels.policy_head import logprobs

        state = logprobs(call)
        return tuple(x.reshape(call.target.shape) for x in (state.logprob, state.entropy, state.max, state.log_sum))
    kernels, vocabulary = row_kernels(call.backend, call.group, call.width, call.source.device)
    rows = _chosen_rows(call, vocabulary)
    products = _products(call, rows, call.weight, (False, False, False))
    state = statistics(kernels, products, rows, call.config.softcap, call.workspace_bytes)
    check_statistics(state.logprob, state.entropy, rows, call.origin)
    if call.backend == "triton" and not check_values(state.logprob.device):
        from stable_rlhf.kernels.policy_call import note_statistics

        note_statistics(state)
    results = [state.logprob, state.entropy, state.max, state.log_sum]
    if rows.policy_count is None:
        results = [torch.where(rows.kind == Kind.IGNORED, 0.0, x) for x in results]
    return tuple(rows.scatter(x) for x in results)


def _logprob_gradients(backward: LogprobBackward) -> tuple[Tensor, ...]:
    call = backward.call
    if call.backend == "torch":
        rows = select_rows(call, call.width)
        upstream = [rows.take("upstream", g, g.dtype) for g in (backward.logprob_grad, backward.entropy_grad)]
        with autograd_inside(call.source.device):
            call = _leaves(call)
            outputs = statistics_of(call, rows, True)
            return tuple(_gradients(list(outputs), [g for g in upstream if g is not None], call))
    assert call.weight is not None
    kernels, vocabulary = row_kernels(call.backend, call.group, call.width, call.source.device)
    rows = _chosen_rows(call, vocabulary)
    products = _products(call, rows, call.weight, call.needs)
    state = RowState.of(rows)
    known = {
        "entropy": backward.entropy, "max": backward.max, "log_sum": backward.log_sum,
        "coefficient": backward.logprob_grad, "entropy_coefficient": backward.entropy_grad,
    }  # fmt: skip
    for name, value in known.items():
        values = rows.take(name, value, torch.float32)
        assert values is not None
        if rows.policy_count is None:
            values = torch.where(rows.kind == Kind.IGNORED, 0.0, values)
        getattr(state, name).copy_(values)
    gradients = given(kernels, products, state, call.config.softcap, call.workspace_bytes)
    return _or_empty(call, rows, gradients)


def _logprob_shapes(call: PolicyCall) -> tuple[Tensor, ...]:
    return tuple(call.target.new_empty(call.target.shape, dtype=statistics_dtype(call.source.dtype)) for _ in range(4))


def _keep_statistics(ctx: Any, call: PolicyCall, outputs: tuple[Tensor, ...]) -> None:
    tensors: dict[str, Any] = {name: x for name, x in call._asdict().items() if isinstance(x, Tensor)}
    ctx.names, ctx.rest = list(tensors), call._replace(**dict.fromkeys(tensors))  # type: ignore[arg-type]
    ctx.save_for_backward(*outputs[1:], *tensors.values())


def _logprob_backward(ctx: Any, logprob_grad: Tensor, entropy_grad: Tensor, *_unused: Any) -> list[Tensor | None]:
    refuse_second_derivative("linear_logprob")
    entropy, max, log_sum, *tensors = ctx.saved_tensors
    call = ctx.rest._replace(**dict(zip(ctx.names, tensors, strict=True)))
    backward = LogprobBackward(logprob_grad, entropy_grad, entropy, max, log_sum, call)
    gradients = linear_logprob_backward(*_BACKWARD.flat(backward))  # which vmap calls once for each upstream gradient
    return [g if need else None for g, need in zip(gradients, call.needs, strict=True)]


linear_logprob = Differentiable(
    "linear_logprob", PolicyCall, _INPUTS, 4,
    body=_logprob, shapes=_logprob_shapes, setup=_keep_statistics, backward=_logprob_backward,
    differentiable=2,
)  # fmt: skip
_BACKWARD = Form(LogprobBackward)
linear_logprob_backward = register_operator(
    "linear_logprob_backward", _BACKWARD, 3, _logprob_gradients,
    lambda b: tuple(shapes_of_gradients(b.call.needs, b.call.source, b.call.weight, b.call.bias)),
)  # fmt: skip
