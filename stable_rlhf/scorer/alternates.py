"""Collecting preference pairs: responses from several alternate policies, with everybody's true log-probs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from stable_rlhf.data.encoding import encode, encode_prompt
from stable_rlhf.data.records import PromptRow
from stable_rlhf.engine.order import stream_seed
from stable_rlhf.models.policy import PolicyModel
from stable_rlhf.models.views import response_logprobs
from stable_rlhf.rollout.local import GenerationSettings, generate


@dataclass(frozen=True)
class Alternate:
    """A policy π'_k that collects data: a model and the temperature it samples at."""

    name: str
    policy: PolicyModel
    temperature: float = 1.0


def collect_responses(
    rows: Sequence[PromptRow],
    policy: PolicyModel,
    alternates: Sequence[Alternate],
    tokenizer: Any,
    *,
    max_new_tokens: int,
    seed: int,
    per_batch: int = 256,
) -> list[dict[str, Any]]:
    """Two responses a prompt, from alternates in turn, with per-token ``logprobs`` under ``policy`` (π, at temperature
    1) and ``alt_logprobs`` under every alternate: ``{"prompt", "task", "responses", "logprobs", "alt_logprobs"}``.

    Log-probs are computed on the text as a trainer will tokenise it, so they are true for what is trained on.
    """
    texts: dict[tuple[int, int], str] = {}
    for k, alternate in enumerate(alternates):
        owners = [
            (i, j)
            for i in range(len(rows))
            for j in range(2)
            if (i + j * (1 + i // len(alternates))) % len(alternates) == k
        ]
        rollouts = generate(
            alternate.policy.causal_lm, tokenizer, [encode_prompt(tokenizer, rows[i].prompt) for i, _ in owners],
            GenerationSettings(max_new_tokens, alternate.temperature),
            seeds=[stream_seed(seed, "collect", i, j) for i, j in owners], description=f"responses of {alternate.name}",
        )  # fmt: skip
        texts |= {owner: rollout.text for owner, rollout in zip(owners, rollouts, strict=True)}
    records: list[dict[str, Any]] = []
    for start in range(0, len(rows), per_batch):
        chunk = range(start, min(start + per_batch, len(rows)))
        examples = [encode(tokenizer, rows[i].prompt, texts[i, j]) for i in chunk for j in range(2)]
        ours = response_logprobs(policy, examples)
        theirs = [response_logprobs(a.policy, examples, temperature=a.temperature) for a in alternates]
        for n, i in enumerate(chunk):
            pair = (2 * n, 2 * n + 1)
            records.append(
                {
                    "prompt": rows[i].prompt,
                    "task": rows[i].task,
                    "responses": [texts[i, 0], texts[i, 1]],
                    "logprobs": [ours[m].tolist() for m in pair],
                    "alt_logprobs": [[alternate[m].tolist() for alternate in theirs] for m in pair],
                }
            )
    return records
