"""Prompts, and rows to rehearse, of small PPO runs. A test file with other ones has fixtures of these names itself."""

from __future__ import annotations

import pytest

from helpers.ppo_texts import TEXTS
from stable_rlhf.data.encoding import Encoded, encode, encode_prompt
from stable_rlhf.data.prompts import EncodedPrompt
from stable_rlhf.data.records import PromptRow


@pytest.fixture
def prompts(tokenizer) -> list[EncodedPrompt]:
    return [EncodedPrompt(PromptRow(t), encode_prompt(tokenizer, t)) for t in TEXTS]


@pytest.fixture
def rehearsal(tokenizer) -> list[Encoded]:
    return [encode(tokenizer, t, r) for t, r in zip(TEXTS, ("dcba", "zyx", "c", "1", "PQRS"), strict=True)]
