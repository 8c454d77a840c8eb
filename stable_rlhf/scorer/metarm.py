"""First-order MetaRM (arXiv 2401.06080) inside the engine: the ranking loss takes its gradient a step away.

At every optimiser step, with J of `response_difference` on unlabelled responses of the policy that has moved on,

    θ' = θ + η ∇J(θ)                       before the step's first micro-step, for all weights that train
    gradient of the ranking loss at θ'     the step's micro-steps, as ever
    θ ← optimiser(θ, that gradient)        after θ has been put back, to the bit
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from stable_rlhf.data.encoding import Encoded, encode, encode_rows, fit, surely_too_long
from stable_rlhf.data.records import DataError, ResponseSet
from stable_rlhf.engine.engine import Engine
from stable_rlhf.engine.order import shuffled_steps, stream_seed
from stable_rlhf.engine.weights import shard
from stable_rlhf.models.features import FeatureCache
from stable_rlhf.ranks import rank, sum_over_ranks, world_size
from stable_rlhf.scorer.model import AdvantageModel
from stable_rlhf.settings.stages import ScorerArguments
from stable_rlhf.show.progress import say


def response_difference(reward: Tensor, counts: Sequence[int]) -> Tensor:
    """J = (2 / k²) Σ_{i<j} σ(|r(s_i) − r(s_j)|) of each prompt's k responses.

    Two equal rewards give σ(0) = 1/2 and no gradient, so J lies between (k − 1)/(2k) and (k − 1)/k.

    Args:
        reward: [R] rewards, prompt by prompt.
        counts: responses of each prompt, k >= 2, R in all.

    Returns:
        [len(counts)], in the type of ``reward``.
    """
    first, second, owner, weight = [], [], [], []
    start = 0
    for prompt, k in enumerate(counts):
        i, j = torch.triu_indices(k, k, offset=1, dtype=torch.int64, device="cpu")
        first.append(start + i)
        second.append(start + j)
        owner.append(torch.full_like(i, prompt))
        weight.append(torch.full(i.shape, 2 / k**2, dtype=reward.dtype, device="cpu"))
        start += k
    i, j, prompt_of, share = (torch.cat(parts).to(reward.device) for parts in (first, second, owner, weight))
    difference = torch.sigmoid((reward[i] - reward[j]).abs())
    return reward.new_zeros(len(counts)).index_add(0, prompt_of, share * difference)


def encode_responses(
    rows: Sequence[ResponseSet], tokenizer: Any, max_length: int, max_prompt_length: int, *, on_bad_row: str = "error"
) -> list[list[Encoded]]:
    """The responses of each row as token ids; rows with a prompt or a response that is too long are left out, and told.
    Where a row's ``finished`` says of a response that it was cut off, it has no end. One that is empty as well has no
    token to be scored at and is left out, and so is a row of which fewer than two are left: both are told.

    Raises:
        DataError: no row fits.
    """

    def one(row: ResponseSet) -> list[Encoded]:
        return [
            encode(tokenizer, row.prompt, r, finished=f, source=row.source)
            for r, f in zip(row.responses, _finished(row), strict=True)
        ]

    short = [
        row for row in rows if not surely_too_long(tokenizer, row.prompt, row.responses, max_length, max_prompt_length)
    ]
    everything = [encoded for _, encoded in encode_rows("unlabelled responses", short, one, on_bad_row)]
    scored = [[e for e in row if e.response] for row in everything]
    fitting = [e for e in scored if len(e) > 1]
    if lost := sum(map(len, everything)) - sum(map(len, scored)):
        say(
            f"  unlabelled responses: {lost} were cut off before their first token: left out, and with them "
            f"{len(scored) - len(fitting)} rows of fewer than two others"
        )
    kept = [row for row in fitting if fit(row, max_length, max_prompt_length)]
    if not kept:
        raise DataError(
            f"scorer.meta_responses: none of {len(rows)} rows fits max_length {max_length} and max_prompt_length "
            f"{max_prompt_length}"
        )
    if long := len(rows) - len(short) + len(fitting) - len(kept):
        say(f"  {long} of {len(rows)} rows of unlabelled responses are too long: left out")
    return kept


def check_meta_batch(arguments: ScorerArguments) -> None:
    """The prompts of a step must divide over the ranks."""
    if arguments.meta_batch_size % world_size():
        raise ValueError(
            f"scorer.meta_batch_size {arguments.meta_batch_size} must be a multiple of the {world_size()} ranks"
        )


def _finished(row: ResponseSet) -> list[bool]:
    told = row.meta.get("finished")
    return [f is not False for f in told] if isinstance(told, list) else [True] * len(row.responses)


class MetaRM:
    """The ascent of each step on ``rows``, the responses of each prompt.

    It holds a copy of the weights that train and their gradient in float32; under ZeRO-3 each rank those of its shards.

    Raises:
        ValueError: ``meta_batch_size`` is no multiple of the number of ranks.
    """

    def __init__(
        self, engine: Engine, model: AdvantageModel, rows: Sequence[Sequence[Encoded]], arguments: ScorerArguments,
        cache: FeatureCache, *, steps: int, seed: int,
    ) -> None:  # fmt: skip
        check_meta_batch(arguments)
        self.engine, self.model, self.rows, self.arguments, self.cache = engine, model, rows, arguments, cache
        self.trained = [p for p in model.parameters() if p.requires_grad]
        self.batches = list(shuffled_steps(len(rows), arguments.meta_batch_size, steps, stream_seed(seed, "meta")))

    @contextmanager
    def ascended(self, step: int) -> Iterator[dict[str, float]]:
        """Context in which the model's weights are θ' of ``step``; gives J and the norm of its gradient.

        Where that gradient overflows in fp16 at the present loss scale, nothing moves, and the engine leaves the step
        out as it does when its own gradient overflows.

        Raises:
            FloatingPointError: the gradient is not finite; nothing has moved.
        """
        difference, gradient = self._gradient(self.batches[step])
        norm = self._norm(gradient)
        if not math.isfinite(norm):
            with self._shards_alone():
                pass  # ZeRO-3 is left as after an ascent
            if not (math.isfinite(difference) and self.engine.overflow()):
                raise FloatingPointError(
                    "the gradient of MetaRM's objective on scorer.meta_responses is not finite; the weights are those "
                    "of the step before. Lower scorer.learning_rate or scorer.meta_learning_rate"
                )
            yield {"meta_difference": difference}
            return
        before = self._ascend(gradient)
        del gradient
        try:
            yield {"meta_difference": difference, "meta_gradient_norm": norm}
        except FloatingPointError:  # the engine raises it on every rank; of other errors the other ranks know nothing
            self._restore(before)
            raise
        self._restore(before)

    @property
    def _sharded(self) -> bool:
        return self.engine.zero_stage == 3

    def _gradient(self, batch: Sequence[int]) -> tuple[float, list[Tensor]]:
        """J, the mean over the prompts of all ranks, and its gradient in float32: of every weight that trains what this
        rank holds."""
        gradients = [torch.zeros_like(shard(p), dtype=torch.float32) for p in self.trained]
        hooks = [p.register_hook(partial(self._keep, p, g)) for p, g in zip(self.trained, gradients, strict=True)]
        value, mine = 0.0, batch[rank() :: world_size()]
        width, scale = self.arguments.per_device_train_batch_size, self.engine.loss_scale
        try:
            for start in range(0, len(mine), width):
                sets = [self.rows[i] for i in mine[start : start + width]]
                # The module itself: what goes through the engine's forward is scaled for its backward.
                reward = self.model(*self.model.prepare([e for s in sets for e in s], self.cache))[0]
                part = response_difference(reward, [len(s) for s in sets]).sum() / len(batch)
                # Not `backward`: no `.grad` is touched, and none of DeepSpeed's hooks that gather gradients runs.
                torch.autograd.grad(part * scale, self.trained, allow_unused=True)
                value += float(part.detach())
        finally:
            for hook in hooks:
                hook.remove()
        if world_size() > 1 and not self._sharded:
            for gradient in gradients:
                dist.all_reduce(gradient)
        for gradient in gradients:
            gradient.div_(scale)
        return sum_over_ranks([value])[0], gradients

    def _keep(self, parameter: Tensor, into: Tensor, gradient: Tensor) -> Tensor:
        """Add a weight's gradient to what is kept of it as soon as it is made; autograd goes on with zeros that take no
        memory, so that no device ever holds the gradient of a sharded model whole."""
        if self._sharded:
            whole = gradient.to(torch.float32, copy=True).flatten()
            dist.all_reduce(whole)
            part = whole[rank() * into.numel() : (rank() + 1) * into.numel()]
            into[: part.numel()] += part  # the last shards are padded
        else:
            into += gradient
        return gradient.new_zeros(()).expand_as(gradient)

    def _norm(self, gradient: Sequence[Tensor]) -> float:
        norm = float(nn.utils.get_total_norm(gradient))
        return math.sqrt(sum_over_ranks([norm**2])[0]) if self._sharded else norm

    @torch.no_grad()
    def _ascend(self, gradient: Sequence[Tensor]) -> list[Tensor]:
        """Move to θ'; returns θ."""
        before = []
        with self._shards_alone():
            for parameter, direction in zip(self.trained, gradient, strict=True):
                held = shard(parameter)
                before.append(held.clone())
                held.copy_(held.float() + self.arguments.meta_learning_rate * direction)
        return before

    @torch.no_grad()
    def _restore(self, before: Sequence[Tensor]) -> None:
        with self._shards_alone():
            for parameter, value in zip(self.trained, before, strict=True):
                shard(parameter).copy_(value)

    @contextmanager
    def _shards_alone(self) -> Iterator[None]:
        """Context in which shards are all there is: ZeRO-3's gathered weights are dropped, and gathered anew after."""
        if not self._sharded:
            yield
            return
        optimizer = self.engine.optimizer
        optimizer.checkpoint_event_prologue()
        try:
            yield
        finally:
            optimizer.checkpoint_event_epilogue()
