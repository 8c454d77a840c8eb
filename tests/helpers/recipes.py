"""Recipes for trainers: a few sections of settings, and metrics in the stage's folder alone."""

from __future__ import annotations

from typing import Any

from stable_rlhf.settings.recipe import Recipe


def quiet(**sections: Any) -> Recipe:
    return Recipe(report_to=[], **sections)
