"""Data: record types, readers and splits."""

from __future__ import annotations

from stable_rlhf.data.readers import ReadResult, read_comparisons, read_demonstrations, read_prompts, write_jsonl
from stable_rlhf.data.records import (
    Comparison,
    DataError,
    Demonstration,
    LogProbs,
    Message,
    Prompt,
    PromptRow,
    as_messages,
)
from stable_rlhf.data.splits import prompt_key, split_rows

__all__ = [
    "Comparison",
    "DataError",
    "Demonstration",
    "LogProbs",
    "Message",
    "Prompt",
    "PromptRow",
    "ReadResult",
    "as_messages",
    "prompt_key",
    "read_comparisons",
    "read_demonstrations",
    "read_prompts",
    "split_rows",
    "write_jsonl",
]
