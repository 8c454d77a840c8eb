"""Rollouts: one interface, and transformers' ``generate`` behind it, reproducible prompt by prompt.

Every prompt draws its tokens from its own stream of uniform numbers, seeded by the caller (for training: by the
prompt's global index and step), so what is sampled does not depend on the batch size or on how many ranks share
the work. ``vllm.py`` has the same interface over a vLLM server.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from stable_rlhf.data.encoding import Encoded, pad_sequences
from stable_rlhf.data.turns import StopStrings, ends_in_text, ends_of_turn
from stable_rlhf.models.loading import context_length
from stable_rlhf.models.trunk import length_batches
from stable_rlhf.settings.ranges import PositiveShare, TemperatureOrGreedy, Tokens, check_settings
from stable_rlhf.show.progress import progress

Gather = Callable[[], AbstractContextManager[None]]


@dataclass(frozen=True)
class GenerationSettings:
    """How responses are sampled: ``temperature`` 0 is greedy, ``top_p`` keeps the smallest set of tokens with at least
    that probability, and a response ends with a token that ends a turn (:func:`ends_of_turn`) or with the one that
    completes one of the ``stop`` strings."""

    max_new_tokens: Tokens = 128
    temperature: TemperatureOrGreedy = 1.0
    top_p: PositiveShare = 1.0
    stop: Sequence[str] = ()

    def __post_init__(self) -> None:
        check_settings(self)
        if isinstance(self.stop, str) or not all(isinstance(text, str) and text for text in self.stop):
            raise ValueError(f"stop must be a list of strings, none of them empty, got {self.stop!r}")


@dataclass(frozen=True)
class Rollout:
    """One sampled response.

    encoded: token ids of prompt and response; what ended it, a token or those of a stop string, included.
    text: of the response, without what ended it.
    finished: it ended by itself, not at ``max_new_tokens``.
    logprobs: of each response token under the distribution that it was drawn from (``temperature`` and ``top_p``
        applied), nats; None when greedy.
    """

    encoded: Encoded
    text: str
    finished: bool
    logprobs: tuple[float, ...] | None = None


class RolloutEngine(Protocol):
    """Where a trainer's responses come from."""

    holds_a_copy: bool  # of the policy: its weights must be loaded after every update

    def sample(
        self, prompts: Sequence[Sequence[int]], settings: GenerationSettings, *, seeds: Sequence[int] | None = None
    ) -> list[Rollout]:
        """One response per prompt (token ids), drawn from the stream of its own seed; every rank calls this."""
        ...

    def load(self, folder: Path) -> None:
        """Take up the weights (safetensors, as transformers saves them) in ``folder``; only the first rank calls."""
        ...


class LocalRollouts:
    """The policy itself, by transformers' ``generate``; ``gather``: see :func:`generate`."""

    holds_a_copy = False

    def __init__(self, causal_lm: Any, tokenizer: Any, gather: Gather | None = None) -> None:
        self.causal_lm, self.tokenizer, self.gather = causal_lm, tokenizer, gather

    def sample(
        self, prompts: Sequence[Sequence[int]], settings: GenerationSettings, *, seeds: Sequence[int] | None = None
    ) -> list[Rollout]:
        return generate(
            self.causal_lm, self.tokenizer, prompts, settings, seeds=seeds, gather=self.gather, description="rollouts"
        )

    def load(self, folder: Path) -> None:
        raise ValueError("the policy samples itself: there is no copy to load weights into")


def response_text(tokenizer: Any, response: Sequence[int], stop: Sequence[str], ends: Sequence[int] = ()) -> str:
    """The text of response tokens, up to the first stop string in it; without the one of ``ends`` that it ends with,
    which a tokenizer need not count among its special ones."""
    text = StopStrings(tokenizer, stop).text_before(response)
    if len(response) and response[-1] in ends:
        return min(text, tokenizer.decode(response[:-1], skip_special_tokens=True), key=len)
    return text


class _SampleByUniforms:
    """A logits processor that turns greedy decoding into sampling by inverse transform: token t of row i is the first
    whose cumulative probability passes ``uniforms[i, t]``."""

    def __init__(self, uniforms: Tensor, prompt_length: int, settings: GenerationSettings) -> None:
        from transformers import TemperatureLogitsWarper, TopPLogitsWarper

        self.uniforms = uniforms  # [B, max_new_tokens] float64
        self.prompt_length = prompt_length
        self.logprobs: list[Tensor] = []  # of what was drawn, [B] a step
        self.warpers: list[Any] = [TemperatureLogitsWarper(float(settings.temperature))]
        if settings.top_p < 1:
            self.warpers.append(TopPLogitsWarper(settings.top_p))

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        scores = scores.float()
        for warper in self.warpers:
            scores = warper(input_ids, scores)
        probability = scores.softmax(-1)
        cumulative = probability.double().cumsum(-1)  # [B, V]
        draw = self.uniforms[:, input_ids.shape[1] - self.prompt_length, None] * cumulative[:, -1:]
        chosen = torch.searchsorted(cumulative, draw, right=True)
        # A draw of the very last bit could fall on trailing tokens of probability 0: step back to a possible one.
        chosen = chosen.clamp_max(scores.shape[-1] - 1)
        self.logprobs.append(probability.gather(1, chosen).log().squeeze(1))
        return torch.full_like(scores, float("-inf")).scatter(1, chosen, 0.0)


class _StopAtStrings:
    """A stopping criterion: a row ends with the token that completes a stop string in the response's text.

    (transformers' own also matches strings that begin inside the prompt, and does not say where a row ended.)"""

    def __init__(self, tokenizer: Any, stop: Sequence[str], prompt_length: int, rows: int) -> None:
        self.stop, self.prompt_length = StopStrings(tokenizer, stop), prompt_length
        # A token has at least one byte of text; four more, lest a piece of a character or a stripped space be first.
        self.window = max(len(s.encode()) for s in stop) + 4
        self.ends: list[int | None] = [None] * rows  # response tokens, the completing one included

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:
        length = input_ids.shape[1] - self.prompt_length
        tails = input_ids[:, input_ids.shape[1] - min(length, self.window) :].tolist()
        for i, tail in enumerate(tails):
            if self.ends[i] is None and self.stop.hold(tail):
                self.ends[i] = length
        return torch.tensor([end is not None for end in self.ends], device=input_ids.device, dtype=torch.bool)


def _uniforms(seeds: Sequence[int], count: int, device: torch.device) -> Tensor:
    draws = [
        torch.rand(count, generator=torch.Generator(device="cpu").manual_seed(s), dtype=torch.float64, device="cpu")
        for s in seeds
    ]
    return torch.stack(draws).to(device)


def _most_over_ranks(count: int, device: torch.device) -> int:
    most = torch.tensor(count, device=device, dtype=torch.int64)
    torch.distributed.all_reduce(most, torch.distributed.ReduceOp.MAX)
    return int(most)


@torch.no_grad()
def generate(
    causal_lm: Any,
    tokenizer: Any,
    prompts: Sequence[Sequence[int]],
    settings: GenerationSettings,
    *,
    seeds: Sequence[int] | None = None,
    max_tokens: int = 8192,
    gather: Gather | None = None,
    description: str = "generating",
) -> list[Rollout]:
    """Sample one response per prompt.

    ``prompts``: token ids. ``seeds``: one integer a prompt (not needed when greedy). ``max_tokens`` bounds the padded
    tokens of a batch, new ones included. ``gather``: a context in which the weights are whole, if ZeRO-3 holds them;
    sharded weights without it are gathered layer by layer for every token, all ranks in step, which needs no room for a
    whole model and takes far longer.
    """
    greedy = settings.temperature == 0
    if not greedy and (seeds is None or len(seeds) != len(prompts)):
        raise ValueError("seeds: one integer a prompt is needed when temperature > 0")
    if any(len(p) == 0 for p in prompts):
        raise ValueError("prompts: every prompt needs at least one token")
    limit, embedding = context_length(causal_lm.config), causal_lm.get_input_embeddings()
    for i, prompt in enumerate(prompts):
        if max(prompt) >= embedding.num_embeddings:
            raise ValueError(
                f"prompt {i} has the token id {max(prompt)}, and the model's embedding {embedding.num_embeddings} rows"
            )
        if len(prompt) + settings.max_new_tokens > limit:
            raise ValueError(
                f"prompt {i} has {len(prompt)} tokens; with max_new_tokens {settings.max_new_tokens} that is more than "
                f"the model's context of {limit}: lower data.max_prompt_length or ppo.max_new_tokens"
            )
    from transformers import GenerationConfig, LogitsProcessorList, StoppingCriteriaList

    turn_ends, pad = ends_of_turn(tokenizer, causal_lm), tokenizer.pad_token_id
    stop = ends_in_text(causal_lm, settings.stop)
    if pad is None or pad >= embedding.num_embeddings:  # added after training: it is masked, so any id will do
        pad = 0
    config = GenerationConfig(
        max_new_tokens=settings.max_new_tokens, do_sample=False, eos_token_id=list(turn_ends), pad_token_id=pad,
        use_cache=True,
    )  # fmt: skip
    device = embedding.weight.device  # a multimodal model's other parts may lie elsewhere
    was_training, own_config = causal_lm.training, causal_lm.generation_config
    # transformers fills what a configuration leaves open from the model's own: a repetition penalty there, say, would
    # sample from another distribution than the one that is trained.
    causal_lm.generation_config = config
    causal_lm.eval()
    rollouts: list[Rollout | None] = [None] * len(prompts)
    batches = length_batches([len(p) + settings.max_new_tokens for p in prompts], max_tokens)
    in_step = gather is None and any(hasattr(p, "ds_id") for p in causal_lm.parameters())
    if in_step and batches:  # every rank must run the same number of forwards: some repeat their last batch
        batches += [batches[-1]] * (_most_over_ranks(len(batches), device) - len(batches))
    try:
        with (gather or nullcontext)(), progress(description, total=len(prompts), unit="responses") as bar:
            for rows in batches:
                batch = pad_sequences([prompts[i] for i in rows], side="left", pad_token_id=pad, device=device)
                width = batch.input_ids.shape[1]
                sampler, stopper = None, None
                if not greedy:
                    assert seeds is not None
                    uniforms = _uniforms([seeds[i] for i in rows], settings.max_new_tokens, device)
                    sampler = _SampleByUniforms(uniforms, width, settings)
                if stop:
                    stopper = _StopAtStrings(tokenizer, stop, width, len(rows))
                output = causal_lm.generate(
                    input_ids=batch.input_ids, attention_mask=batch.attention_mask, generation_config=config,
                    logits_processor=LogitsProcessorList([sampler] if sampler else []),
                    stopping_criteria=StoppingCriteriaList([stopper] if stopper else []), synced_gpus=in_step,
                )  # fmt: skip
                logprobs = torch.stack(sampler.logprobs, 1).tolist() if sampler else None
                for row, (i, new) in enumerate(zip(rows, output[:, width:].tolist(), strict=True)):
                    # The first end of a turn or stop string ends the response; padding follows, whatever its id.
                    ends = [at for at, token in enumerate(new, start=1) if token in turn_ends][:1]
                    if stopper and (end := stopper.ends[row]) is not None:
                        ends.append(end)
                    response = new[: min(ends, default=len(new))]
                    rollouts[i] = Rollout(
                        Encoded((*prompts[i], *response), len(prompts[i])),
                        response_text(tokenizer, response, stop, turn_ends),
                        finished=bool(ends),
                        logprobs=tuple(logprobs[row][: len(response)]) if logprobs else None,
                    )
                bar.advance(len(rows))
    finally:
        causal_lm.generation_config = own_config
        causal_lm.train(was_training)
    return [r for r in rollouts if r is not None]
