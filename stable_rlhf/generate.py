"""Rollouts with transformers' ``generate``, reproducible prompt by prompt.

Every prompt draws its tokens from its own stream of uniform numbers, seeded by the caller (for training: by the
prompt's global index and step), so what is sampled does not depend on the batch size or on how many ranks share
the work.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from stable_rlhf.data.packing import Encoded, pad_sequences
from stable_rlhf.models import context_length, length_batches
from stable_rlhf.progress import progress


@dataclass(frozen=True)
class GenerationSettings:
    """How responses are sampled: ``temperature`` 0 is greedy, ``top_p`` keeps the smallest set of tokens with at least
    that probability."""

    max_new_tokens: int = 128
    temperature: float = 1.0
    top_p: float = 1.0

    def __post_init__(self) -> None:
        if self.max_new_tokens < 1:
            raise ValueError(f"max_new_tokens must be at least 1, got {self.max_new_tokens}")
        if self.temperature < 0:
            raise ValueError(f"temperature must not be negative, got {self.temperature}")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p must be in (0, 1], got {self.top_p}")


@dataclass(frozen=True)
class Rollout:
    """One sampled response: its token ids with the prompt's, its text, and whether it ended by itself (EOS)."""

    encoded: Encoded
    text: str
    finished: bool


class _SampleByUniforms:
    """A logits processor that turns greedy decoding into sampling by inverse transform: token t of row i is the first
    whose cumulative probability passes ``uniforms[i, t]``."""

    def __init__(self, uniforms: Tensor, prompt_length: int, settings: GenerationSettings) -> None:
        from transformers import TemperatureLogitsWarper, TopPLogitsWarper

        self.uniforms = uniforms  # [B, max_new_tokens] float64
        self.prompt_length = prompt_length
        self.warpers: list[Any] = [TemperatureLogitsWarper(float(settings.temperature))]
        if settings.top_p < 1:
            self.warpers.append(TopPLogitsWarper(settings.top_p))

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        scores = scores.float()
        for warper in self.warpers:
            scores = warper(input_ids, scores)
        cumulative = scores.softmax(-1).double().cumsum(-1)  # [B, V]
        draw = self.uniforms[:, input_ids.shape[1] - self.prompt_length, None] * cumulative[:, -1:]
        chosen = torch.searchsorted(cumulative, draw, right=True)
        # A draw of the very last bit could fall on trailing tokens of probability 0: step back to a possible one.
        chosen = chosen.clamp_max(scores.shape[-1] - 1)
        return torch.full_like(scores, float("-inf")).scatter(1, chosen, 0.0)


def _uniforms(seeds: Sequence[int], count: int, device: torch.device) -> Tensor:
    draws = [torch.rand(count, generator=torch.Generator().manual_seed(s), dtype=torch.float64) for s in seeds]
    return torch.stack(draws).to(device)


@contextmanager
def _whole_weights(model: torch.nn.Module, engine: Any) -> Iterator[None]:
    """Under ZeRO-3, gather every weight once for the whole rollout and take the per-layer hooks off meanwhile
    (gathering token by token is about a hundred times slower). Without an engine the hooks stay and gather."""
    partitioned = _partitioned(model)
    if not partitioned or engine is None:
        yield
        return
    import deepspeed

    with deepspeed.zero.GatheredParameters(partitioned):
        offload = getattr(engine.optimizer, "parameter_offload", engine.optimizer)  # the latter of a model that reads
        offload._remove_module_hooks()
        offload.forward_hooks.clear()
        offload.backward_hooks.clear()
        try:
            yield
        finally:
            offload.setup_zero_stage3_hooks()


def _partitioned(model: torch.nn.Module) -> list[torch.nn.Parameter]:
    return [p for p in model.parameters() if hasattr(p, "ds_id")]


def _most_over_ranks(count: int, device: torch.device) -> int:
    most = torch.tensor(count, device=device)
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
    engine: Any = None,
    description: str = "generating",
) -> list[Rollout]:
    """Sample one response per prompt.

    ``prompts``: token ids. ``seeds``: one integer a prompt (not needed when greedy). ``max_tokens`` bounds the padded
    tokens of a batch, new ones included. ``engine``: the DeepSpeed engine whose ZeRO-3 holds the weights, if any, to
    gather them once; sharded weights without it are gathered layer by layer for every token, all ranks in step, which
    needs no room for a whole model and takes far longer.
    """
    greedy = settings.temperature == 0
    if not greedy and (seeds is None or len(seeds) != len(prompts)):
        raise ValueError("seeds: one integer a prompt is needed when temperature > 0")
    if any(len(p) == 0 for p in prompts):
        raise ValueError("prompts: every prompt needs at least one token")
    limit = context_length(causal_lm.config)
    for i, prompt in enumerate(prompts):
        if len(prompt) + settings.max_new_tokens > limit:
            raise ValueError(
                f"prompt {i} has {len(prompt)} tokens; with max_new_tokens {settings.max_new_tokens} that is more than "
                f"the model's context of {limit}: lower data.max_prompt_length or ppo.max_new_tokens"
            )
    from transformers import GenerationConfig, LogitsProcessorList

    eos, pad = tokenizer.eos_token_id, tokenizer.pad_token_id
    config = GenerationConfig(
        max_new_tokens=settings.max_new_tokens, do_sample=False, eos_token_id=eos, pad_token_id=pad, use_cache=True
    )
    device = next(causal_lm.parameters()).device
    was_training = causal_lm.training
    causal_lm.eval()
    rollouts: list[Rollout | None] = [None] * len(prompts)
    batches = length_batches([len(p) + settings.max_new_tokens for p in prompts], max_tokens)
    in_step = engine is None and bool(_partitioned(causal_lm))
    if in_step and batches:  # every rank must run the same number of forwards: some repeat their last batch
        batches += [batches[-1]] * (_most_over_ranks(len(batches), device) - len(batches))
    with _whole_weights(causal_lm, engine), progress(description, total=len(prompts), unit="responses") as bar:
        for rows in batches:
            batch = pad_sequences([prompts[i] for i in rows], side="left", pad_token_id=pad, device=device)
            processors = LogitsProcessorList()
            width = batch.input_ids.shape[1]
            if not greedy:
                assert seeds is not None
                uniforms = _uniforms([seeds[i] for i in rows], settings.max_new_tokens, device)
                processors.append(_SampleByUniforms(uniforms, width, settings))
            output = causal_lm.generate(
                input_ids=batch.input_ids, attention_mask=batch.attention_mask,
                generation_config=config, logits_processor=processors, synced_gpus=in_step,
            )  # fmt: skip
            for i, new in zip(rows, output[:, width:].tolist(), strict=True):
                # The first EOS ends the response; what follows is padding, even where both have the same id.
                finished = eos in new
                response = new[: new.index(eos) + 1] if finished else new
                text = tokenizer.decode(response[:-1] if finished else response, skip_special_tokens=True)
                rollouts[i] = Rollout(Encoded((*prompts[i], *response), len(prompts[i])), text, finished)
            bar.advance(len(rows))
    causal_lm.train(was_training)
    return [r for r in rollouts if r is not None]
