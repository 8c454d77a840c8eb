"""Comparisons as token ids: encoding, log-probs, scores of a model on them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from stable_rlhf.data.digest import json_digest
from stable_rlhf.data.encoding import Encoded, encode, encode_rows, fit, surely_too_long
from stable_rlhf.data.records import Comparison, DataError
from stable_rlhf.metrics import calibration, pair_accuracy
from stable_rlhf.models.features import FeatureCache
from stable_rlhf.models.policy import PolicyModel
from stable_rlhf.models.views import response_logprobs
from stable_rlhf.scorer.model import AdvantageModel
from stable_rlhf.show.progress import say


@dataclass
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


@torch.no_grad()
def fill_logprobs(rows: Sequence[EncodedComparison], policy: PolicyModel | None, per_batch: int = 32) -> None:
    """Attach log π(y) of the policy to be tuned, once: from the file where it has them, else from ``policy``."""
    todo = []
    for row in rows:
        if row.row.alt_logprobs is None:
            continue
        if row.row.logprobs is not None:
            row.logprobs = [torch.tensor(lp, dtype=torch.float32, device="cpu") for lp in row.row.logprobs]
            for lp, example in zip(row.logprobs, row.examples, strict=True):
                if len(lp) != len(example.response):
                    raise DataError(
                        f"{row.row.source}: logprobs have {len(lp)} values for {len(example.response)} tokens"
                    )
        else:
            todo.append(row)
    if todo and policy is None:
        raise DataError(
            f"{todo[0].row.source}: alt_logprobs without logprobs need the policy to be tuned (model_name_or_path)"
        )
    for start in range(0, len(todo), per_batch):
        chunk = todo[start : start + per_batch]
        assert policy is not None
        found = iter(response_logprobs(policy, [e for r in chunk for e in r.examples]))
        for row in chunk:
            row.logprobs = [next(found) for _ in row.examples]


def score_pairs(
    model: AdvantageModel, rows: Sequence[EncodedComparison], cache: FeatureCache | None = None
) -> dict[str, Any]:
    """Scores of every (better, worse) pair as PPO would use them: lists ``chosen``, ``rejected``, ``tasks``."""
    flat = [e for r in rows for e in r.examples]
    scores = iter(model.score_encoded(flat, cache=cache, description="held-out pairs").tolist())
    chosen, rejected, tasks = [], [], []
    for item in rows:
        own = [next(scores) for _ in item.examples]
        for better, worse in item.row.pairs:
            chosen.append(own[better])
            rejected.append(own[worse])
            tasks.append(item.row.task or "all")
    return {"chosen": chosen, "rejected": rejected, "tasks": tasks}


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
