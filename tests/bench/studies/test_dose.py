"""The factorial of the dose: what names mean, what is made of the rows, and that the page shows its results."""

from __future__ import annotations

import json

import pytest

from bench.pages import rendered
from bench.studies import dose
from bench.studies.dose import Cell
from stable_rlhf.cli.arguments import parse


def test_the_page_shows_its_results():
    results = json.loads(dose.KEPT.read_text(encoding="utf-8"))
    text = dose.PAGE.read_text(encoding="utf-8")
    again = rendered(text, "dose", lambda name: dose.block(results, name))
    assert again == text, "run: python -m bench.studies.dose"
    assert dose.PICTURE.name in text


@pytest.mark.parametrize(
    ("name", "cell"),
    [
        ("rm", Cell("rm", "none", "mean", 0.0)),
        ("am-best-0.01", Cell("am", "best", "mean", 0.01)),
        ("rm-best-sum-10", Cell("rm", "best", "sum", 10.0)),
        ("rm-data-5", Cell("rm", "data", "mean", 5.0)),
        ("am-best-target-0.35", Cell("am", "best", "target", 0.35)),
        ("sft", None),
        ("rm-sr", None),
    ],
)
def test_names_of_cells(name, cell):
    assert dose.cell_of(name) == cell


def test_the_recipe_has_every_cell_with_its_own_settings():
    recipe, _ = parse("study", [str(dose.ROOT / "recipes" / "study-rehearsal-factorial.yaml")])
    found = {}
    for name, (variant, own) in recipe.policies.items():
        cell = dose.cell_of(name)
        assert cell is not None and variant.scorer == cell.scorer and variant.rehearsal == (cell.rehearsed != "none")
        found[cell] = own
    full = {
        Cell(scorer, rehearsed, "mean", gamma)
        for scorer in ("rm", "am")
        for rehearsed in ("best", "chance", "data")
        for gamma in (0.01, 0.1, 1.0, 5.0, 10.0)
    }
    assert full < found.keys() and len(found) == 30 + 10 + 4 + 2
    for cell, own in found.items():
        if cell.rehearsed != "none":
            assert own.select.candidates == ("demonstrations" if cell.rehearsed == "data" else "policy")
            assert own.select.num_clusters == (20 if cell.rehearsed == "best" else 1)
            assert own.ppo.rehearsal_reduction == ("sum" if cell.way == "sum" else "mean")
            assert own.ppo.rehearsal_target == (cell.dose if cell.way == "target" else None)
            assert own.ppo.rehearsal_coef == (1.0 if cell.way == "target" else cell.dose)


def row(variant, seed, main, forget, lose=0.1, share=0.3, coef=1.0):
    return {
        "variant": variant, "seed": seed, "main_gold": main, "forget_gold": forget, "main_gold_gain": main - 0.7,
        "main_lose": 0.2, "forget_lose": lose, "rehearsal_share": share, "train_score_late": 0.05,
        "rehearsal_coef_last": coef,
    }  # fmt: skip


@pytest.fixture
def results():
    rows = [row(scorer, seed, 0.7, 0.9) for scorer in ("rm", "am") for seed in (1, 2)]
    for scorer in ("rm", "am"):
        for rehearsed, gain in (("best", 0.08), ("chance", 0.04), ("data", 0.02)):
            for gamma in (0.1, 1, 5):
                rows += [
                    row(f"{scorer}-{rehearsed}-{gamma}", seed, 0.7 + gain * seed, 0.9 + gain, lose=gain)
                    for seed in (1, 2)
                ]
    rows += [row("rm-best-sum-1", seed, 0.7, 0.8) for seed in (1, 2)]
    rows += [row("rm-best-target-0.35", seed, 0.9, 0.9, coef=2.0 * seed) for seed in (1, 2)]
    return {"policies": rows[::-1]}  # in any order


def test_tables_say_what_the_rows_hold(results):
    head, _, *rows = dose.block(results, "gold").splitlines()
    assert head.endswith("| γ 0.1 | γ 1 | γ 5 |")
    cells = {line.split(" | ")[0].lstrip("| "): line.rstrip(" |").split(" | ")[1:] for line in rows}
    # (0.08 + 0.16) / 2 on the main set and 0.08 on the other, halved
    assert cells["reward model, best"] == ["+0.100 (+0.080, +0.120)"] * 3
    assert cells["Advantage Model, data"] == ["+0.025 (+0.020, +0.030)"] * 3
    assert cells["reward model, best, sum"] == ["–", "-0.050 (-0.050, -0.050)", "–"] and len(cells) == 7
    assert "| reward model, best | 0.30 | 0.30 | 0.30 |" in dose.block(results, "share")
    found = dose.block(results, "contrasts")
    assert "seeds 1, 2" in found
    assert "| reward model: best less chance | +0.040 / +0.080 | +4.0 / +4.0 |" in found
    assert "| Advantage Model: best less data | +0.060 / +0.120 | +6.0 / +6.0 |" in found
    assert "| reward model, 0.35 | 0.30 | +0.100 (+0.100, +0.100) | 20.0 | 10.0 | 0.050 | 2 / 4 |" in dose.block(
        results, "targets"
    )


def test_a_picture_of_both_scorers(results):
    assert dose.draw(dose.by_cell(results))[:4] == b"\x89PNG"
