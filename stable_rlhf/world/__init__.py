"""The skill world: a generated task family with an exact score, to run the whole method on without any download."""

from __future__ import annotations

from stable_rlhf.world.annotator import UTILITY_SCALES, LabelCounts, label_pairs, utility
from stable_rlhf.world.corpus import WRONG_SHARES, WorldFiles, WorldSizes, near_miss, write_world
from stable_rlhf.world.skills import (
    FORGET_SKILLS,
    LOOKALIKES,
    SKILLS,
    STRONG_SKILLS,
    WEAK_SKILLS,
    Skill,
    gold_score,
    misread,
    right_answer,
    skills_of,
    task_of,
)
from stable_rlhf.world.tokenizer import build_model, build_tokenizer

__all__ = [
    "FORGET_SKILLS", "LOOKALIKES", "SKILLS", "STRONG_SKILLS", "UTILITY_SCALES", "WEAK_SKILLS", "WRONG_SHARES",
    "LabelCounts", "Skill", "WorldFiles", "WorldSizes", "build_model", "build_tokenizer", "gold_score", "label_pairs",
    "misread", "near_miss", "right_answer", "skills_of", "task_of", "utility", "write_world",
]  # fmt: skip
