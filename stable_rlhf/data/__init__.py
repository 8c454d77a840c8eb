"""Data: record types, readers and splits."""

from __future__ import annotations

from stable_rlhf.data.jsonl import write_jsonl
from stable_rlhf.data.readers import (
    ReadResult,
    comparison_row,
    read_comparisons,
    read_demonstrations,
    read_prompts,
    read_responses,
)
from stable_rlhf.data.records import (
    Comparison,
    DataError,
    Demonstration,
    LogProbs,
    Message,
    PairStrength,
    Prompt,
    PromptRow,
    ResponseSet,
    as_messages,
)
from stable_rlhf.data.splits import prompt_key, split_rows

__all__ = [
    "Comparison", "DataError", "Demonstration", "LogProbs", "Message", "PairStrength", "Prompt", "PromptRow",
    "ReadResult", "ResponseSet", "as_messages", "comparison_row", "prompt_key", "read_comparisons",
    "read_demonstrations", "read_prompts", "read_responses", "split_rows", "write_jsonl",
]  # fmt: skip
