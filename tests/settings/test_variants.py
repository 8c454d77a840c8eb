"""The table of variants: whatever row is added, recipes take it and the page names it."""

from __future__ import annotations

from pathlib import Path

import pytest

from stable_rlhf.cli.arguments import parse
from stable_rlhf.cli.usage import USAGE
from stable_rlhf.settings.stages import PPOArguments
from stable_rlhf.settings.variants import VARIANTS, scorers_that_select

PAGE = Path(__file__).parents[2] / "docs" / "guide" / "train.md"


@pytest.mark.parametrize("name", VARIANTS)
def test_a_row_is_all_that_a_variant_needs(name):
    recipe, _ = parse("sft", ["--variants", name])
    assert recipe.variant_rows == [VARIANTS[name]] and VARIANTS[name].name == name
    assert f"| `{name}` |" in PAGE.read_text(encoding="utf-8") and name in USAGE
    recipe, own = parse("train-ppo", ["--variant", name, "--scorer", "s"])
    assert own.variant == name


def test_rows_differ_in_what_they_are_called_and_in_what_they_do():
    rows = list(VARIANTS.values())
    for what in ("label", "colour"):
        assert len({getattr(row, what) for row in rows}) == len(rows)
    assert len({(r.scorer, r.training, r.advantages, r.rehearsal, r.moving_average) for r in rows}) == len(rows)
    assert {name for name, row in VARIANTS.items() if row.estimator(PPOArguments()) != "gae"} == {"am-critic-free"}


def test_the_settings_choose_the_estimator_of_every_row_but_one_that_has_its_own():
    chosen = {row.estimator(PPOArguments(advantage_estimator="rloo")) for row in VARIANTS.values()}
    assert chosen == {"rloo", "score"}


def test_each_scorer_chooses_once():
    assert scorers_that_select(VARIANTS.values()) == ["rm", "am"]
    assert scorers_that_select([VARIANTS["am-sr"], VARIANTS["rm"], VARIANTS["am-sr"]]) == ["am"]
