"""Comparisons as token ids: encoding, log-probs, scores of a model on them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from stable_rlhf.data.digest import json_digest
from stable_rlhf.data.encoding import Encoded, encode, encode_rows, fit, surely_too_long
from stable_rlhf.data.records import Comparison, DataError
from stable_rlhf.data.splits import prompt_key
from stable_rlhf.metrics import calibration, pair_accuracy
from stable_rlhf.models.features import FeatureCache
from stable_rlhf.models.policy import PolicyModel
from stable_rlhf.models.views import chunks, response_logprobs
from stable_rlhf.scorer.model import AdvantageModel
from stable_rlhf.show.progress import say


@dataclass(frozen=True)
class EncodedComparison:
    """A comparison as token ids; ``samples`` are responses of the policy to be tuned, for ``expected_coef`` only."""

    row: Comparison
    examples: list[Encoded]
    logprobs: list[Tensor] | None = None  # [n] of [tokens]
    samples: tuple[Encoded, ...] = ()


def encode_comparisons(
    rows: Sequence[Comparison], tokenizer: Any, max_length: int, max_prompt_length: int, *, on_bad_row: str = "error"
) -> tuple[list[EncodedComparison], int]:
    """Encode comparisons; those with a prompt or a response that is too long are left out: (kept, left out). So are
    those of which two responses with different ranks have the same tokens, which is no preference; they are told."""
    kept: list[EncodedComparison] = []
    same: list[Comparison] = []

    def one(row: Comparison) -> list[Encoded] | None:
        if surely_too_long(tokenizer, row.prompt, row.responses, max_length, max_prompt_length):
            return None
        return [encode(tokenizer, row.prompt, r, source=row.source) for r in row.responses]

    encoded = encode_rows("comparisons", rows, one, on_bad_row)
    for row, examples in encoded:
        if examples is None or not fit(examples, max_length, max_prompt_length):
            continue
        if any(examples[better] == examples[worse] for better, worse in row.pairs):
            same.append(row)
            continue
        if row.alt_logprobs is not None:
            for i, (example, alternates) in enumerate(zip(examples, row.alt_logprobs, strict=True)):
                for logprob in alternates:
                    if len(logprob) != len(example.response):
                        raise DataError(
                            f"{row.source}: alt_logprobs of response {i} have {len(logprob)} values, but the "
                            f"response has {len(example.response)} tokens with its end; was another tokenizer used?"
                        )
        kept.append(EncodedComparison(row, examples))
    if same:
        what = "responses with different ranks have the same tokens, which is no preference"
        if len(same) == len(rows):
            raise DataError(f"{same[0].source}: {what}; so it is in all {len(rows)} comparisons")
        say(f"  {len(same)} of {len(rows)} comparisons: {what}: left out, the first is {same[0].source}")
    if not kept:
        raise DataError(
            f"none of {len(rows)} comparisons fits max_length {max_length} and max_prompt_length {max_prompt_length}"
        )
    return kept, len(encoded) - len(kept) - len(same)


def with_logprobs(
    rows: Sequence[EncodedComparison], policy: PolicyModel | None, per_batch: int = 32
) -> list[EncodedComparison]:
    """The rows with log π(y) of the policy to be tuned: from the file where it has them, else from ``policy``."""
    todo = [row for row in rows if row.row.alt_logprobs is not None and row.row.logprobs is None]
    if todo and policy is None:
        raise DataError(
            f"{todo[0].row.source}: alt_logprobs without logprobs need the policy to be tuned (model_name_or_path)"
        )

    def of_policy() -> Iterator[Tensor]:
        for chunk in chunks(todo, per_batch):
            assert policy is not None
            yield from response_logprobs(policy, [e for row in chunk for e in row.examples])

    computed = of_policy()

    def complete(row: EncodedComparison) -> EncodedComparison:
        if row.row.alt_logprobs is None:
            return row
        if row.row.logprobs is None:
            return replace(row, logprobs=[next(computed) for _ in row.examples])
        for known, example in zip(row.row.logprobs, row.examples, strict=True):
            if len(known) != len(example.response):
                raise DataError(
                    f"{row.row.source}: logprobs have {len(known)} values for {len(example.response)} tokens"
                )
        known_tensors = [torch.tensor(known, dtype=torch.float32, device="cpu") for known in row.row.logprobs]
        return replace(row, logprobs=known_tensors)

    return [complete(row) for row in rows]


def score_pairs(
    model: AdvantageModel, rows: Sequence[EncodedComparison], cache: FeatureCache | None = None
) -> dict[str, Any]:
    """Scores of every (better, worse) pair as PPO would use them: lists ``chosen``, ``rejected``, ``tasks`` and
    ``prompts``, a number of each pair's prompt."""
    flat = [e for r in rows for e in r.examples]
    scores = iter(model.score_encoded(flat, cache=cache, description="held-out pairs").tolist())
    chosen, rejected, tasks, prompts = [], [], [], []
    numbers: dict[str, int] = {}
    for item in rows:
        own = [next(scores) for _ in item.examples]
        for better, worse in item.row.pairs:
            chosen.append(own[better])
            rejected.append(own[worse])
            tasks.append(item.row.task or "all")
            prompts.append(numbers.setdefault(prompt_key(item.row.prompt), len(numbers)))
    return {"chosen": chosen, "rejected": rejected, "tasks": tasks, "prompts": prompts}


def eval_metrics(scores: dict[str, Any], bins: int) -> dict[str, float]:
    """Metrics of held-out pairs from :func:`score_pairs`. ``eval_loss`` is the mean of −log σ(a_c − a_r): without the
    bounds of Eq. 6, so that reward and Advantage Models compare."""
    chosen, rejected = np.array(scores["chosen"]), np.array(scores["rejected"])
    return {
        "eval_accuracy": pair_accuracy(chosen, rejected),
        "eval_loss": float(np.logaddexp(0.0, rejected - chosen).mean()),
        "eval_ece": calibration(chosen, rejected, bins)[0],
    }


def pairs_digest(rows: list[EncodedComparison]) -> str:
    """What pairs these are, so that two scorers are compared pair by pair only on the same ones."""
    texts = [[r.row.prompt, r.row.responses, r.row.pairs] for r in rows]
    return json_digest(texts, sort_keys=False)
