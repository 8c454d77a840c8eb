"""Findings, pictures and report of a synthetic summary."""

from __future__ import annotations

import base64
import copy
import json
import re
import struct
import subprocess
import sys
from html.parser import HTMLParser
from typing import Any

import pytest
from rich.console import Console

from stable_rlhf.evaluate import figures, paper
from stable_rlhf.evaluate.findings import CANNOT_TELL, findings, scorer_names, variant_names, verdict
from stable_rlhf.evaluate.judge import compare_rewards
from stable_rlhf.evaluate.report import make_report, summary_table
from stable_rlhf.rehearsal import figures as selection_figures
from stable_rlhf.settings.stages import PPOArguments, RewardArguments
from stable_rlhf.settings.variants import VARIANTS

SECTIONS = ["findings", "scorers", "policies", "selection", "time", "settings"]


def held(summary: dict[str, Any]) -> dict[str, bool | None]:
    return {item["claim"]: item["held"] for item in findings(summary)}


def size_of(png: bytes) -> tuple[int, int]:
    assert png.startswith(b"\x89PNG\r\n\x1a\n")
    width, height = struct.unpack(">II", png[16:24])
    return width, height


class Page(HTMLParser):
    """Collects ids, tags left open, and every attribute that could fetch something."""

    VOID = ("meta", "img", "br", "link", "input", "hr")

    def __init__(self, text: str) -> None:
        super().__init__()
        self.ids: list[str] = []
        self.links: list[str] = []
        self.open: list[str] = []
        self.tags: set[str] = set()
        self.text = ""
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        if tag not in self.VOID:
            self.open.append(tag)
        for name, value in attrs:
            if name == "id":
                self.ids.append(value or "")
            if name in ("src", "href", "srcset", "data", "action"):
                self.links.append(value or "")

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data


@pytest.fixture
def undrawn(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pictures are composed but not rasterised, for tests that look at the text."""
    for drawing in (figures, selection_figures):
        monkeypatch.setattr(drawing, "png", lambda figure, dpi=0: b"\x89PNG")


@pytest.fixture(scope="module")
def html(summary: dict[str, Any]) -> str:
    return make_report(summary)[0]


def test_paper_constants_add_up() -> None:
    for row in paper.TABLE_2.values():
        for part in row.values():
            assert part["win"] + part["lose"] + part["tie"] == pytest.approx(100, abs=0.03)
    assert paper.TABLE_1["HH-RLHF"]["am"] == {"accuracy": 69.43, "ece": 3.48}
    assert json.loads(json.dumps(paper.constants())) == paper.constants()


def test_claims_hold_where_they_were_planted_and_flip_with_the_numbers(make_summary: Any) -> None:
    straight, flipped = held(make_summary()), held(make_summary(swap=True))
    assert list(straight) == list(flipped)
    certain = [
        "The Advantage Model is better calibrated than the reward model (lower ECE).",
        "The Advantage Model ranks as accurately as the reward model (less than 2 points below).",
        "Mean scores differ less from task to task under the Advantage Model.",
        "RM-PPO hacks its reward: its score rises while quality falls.",
        "On the main set, AM-PPO-SR wins against SFT more often than RM-PPO does.",
        "On the forget set, RM-PPO loses to SFT more often than AM-PPO-SR does.",
    ]
    for claim in certain:
        assert straight[claim] is True, claim
        assert flipped[claim] is False, claim
    assert straight["RM-PPO forgets: on the forget set it loses to SFT more than it wins."] is True


def test_a_fitted_temperature_is_named_as_good(summary: dict[str, Any]) -> None:
    """The planted reward model errs by scale alone, so nothing may be claimed for AM beyond its scale."""
    item = next(item for item in findings(summary) if "one fitted temperature" in item["claim"])
    assert item["held"] is None
    assert "cross-fitted in two halves" in item["detail"]


def test_few_items_cannot_tell(make_summary: Any, undrawn: None) -> None:
    small = held(make_summary(pairs=12, prompts=10))
    assert small["The Advantage Model ranks as accurately as the reward model (less than 2 points below)."] is not False
    assert small["On the main set, AM-PPO-SR wins against SFT more often than RM-PPO does."] is None
    assert small["Selective rehearsal lowers AM-PPO's losses on the forget set further."] is None
    assert CANNOT_TELL in make_report(make_summary(pairs=12, prompts=10))[0].lower()


def test_equal_scorers_leave_the_calibration_open(summary: dict[str, Any]) -> None:
    same = copy.deepcopy(summary)
    same["scorers"]["am"] = same["scorers"]["rm"]
    items = held(same)
    assert items["The Advantage Model is better calibrated than the reward model (lower ECE)."] is None
    assert items["Mean scores differ less from task to task under the Advantage Model."] is None
    assert items["The Advantage Model ranks as accurately as the reward model (less than 2 points below)."] is True


def test_smaller_scale_alone_is_not_taken_for_closer_tasks(summary: dict[str, Any]) -> None:
    shrunk = copy.deepcopy(summary)
    rm, am = shrunk["scorers"]["rm"], copy.deepcopy(shrunk["scorers"]["rm"])
    for key in ("chosen", "rejected"):
        am[key] = [value / 5 for value in rm[key]]
    shrunk["scorers"]["am"] = am
    items = held(shrunk)
    assert items["Mean scores differ less from task to task under the Advantage Model."] is True
    relative = next(claim for claim in items if "not merely by a smaller scale" in claim)
    assert items[relative] is None


def test_scorers_of_different_pairs_fall_back_to_independent_intervals(summary: dict[str, Any]) -> None:
    apart = copy.deepcopy(summary)
    apart["scorers"]["am"]["pair_tasks"] = apart["scorers"]["am"]["pair_tasks"][::-1]
    items = held(apart)
    assert items["The Advantage Model is better calibrated than the reward model (lower ECE)."] is True
    assert next(value for claim, value in items.items() if "one fitted temperature" in claim) is None
    assert not any("task to task" in claim for claim in items)


def test_verdict_words() -> None:
    assert [verdict(value) for value in (True, False, None)] == ["reproduced", "not reproduced", CANNOT_TELL]


def test_findings_are_json_and_say_numbers(summary: dict[str, Any]) -> None:
    for item in json.loads(json.dumps(findings(summary))):
        assert set(item) == {"claim", "held", "detail"}
        assert len(re.findall(r"\d+\.\d+", item["detail"])) >= 3


def test_report_holds_every_section_and_its_pictures(html: str, summary: dict[str, Any]) -> None:
    page = Page(html)
    assert page.ids == SECTIONS
    assert page.open == []
    pictures = [link for link in page.links if link.startswith("data:image/png;base64,")]
    assert len(pictures) == 10
    drawn = make_report(summary)[1]
    assert [base64.b64encode(picture.png).decode() for picture in drawn] == [p.partition(",")[2] for p in pictures]
    assert len({picture.name for picture in drawn}) == 10
    for link in pictures:
        width, _ = size_of(base64.b64decode(link.partition(",")[2], validate=True))
        assert width == 1350
    for words in ("Reward model", "AM-PPO-SR", "29.28", "3.48", "learning_rate", "2.13.0", "stable-rlhf quickstart"):
        assert words in page.text, words
    assert "1,234,567" in page.text


def test_report_fetches_nothing_and_runs_nothing(html: str) -> None:
    page = Page(html)
    assert all(link.startswith("data:image/png;base64,") for link in page.links)
    assert not {"script", "link", "iframe", "object", "embed"} & page.tags
    assert "http://" not in html
    assert "https://" not in html
    assert not re.search(r"url\(|@import", html)


def test_examples_and_settings_are_escaped(html: str, summary: dict[str, Any]) -> None:
    assert any("<script>" in row["example"] for row in summary["selection"]["clusters"])
    assert "<script>" not in html
    assert "&lt;script&gt;alert(&#39;x&#39;)&lt;/script&gt;" in html
    assert "&lt;i&gt;" in html
    assert "&amp; more" in html


@pytest.mark.parametrize(
    "missing, gone",
    [
        (["selection"], ["selection"]),
        (["scorers"], ["scorers"]),
        (["policies"], ["policies"]),
        (["stages"], ["time"]),
        (["scorers", "policies", "findings"], ["findings", "scorers", "policies"]),
    ],
)
def test_missing_parts_leave_out_their_sections(
    summary: dict[str, Any], missing: list[str], gone: list[str], undrawn: None
) -> None:
    part = {key: value for key, value in summary.items() if key not in missing}
    page = Page(make_report(part)[0])
    assert page.ids == [section for section in SECTIONS if section not in gone]
    assert page.open == []
    Console(width=80, file=open("/dev/null", "w", encoding="utf-8")).print(summary_table(part))  # noqa: SIM115


def test_nearly_empty_summary_still_renders() -> None:
    page = Page(make_report({"title": "empty"})[0])
    assert page.ids == []
    assert "empty" in page.text


@pytest.mark.slow
def test_one_scorer_and_one_variant(make_summary: Any) -> None:
    lone = make_summary(pairs=40, prompts=20, variants=("am",), kind="real")
    del lone["scorers"]["rm"]
    del lone["policies"]["am"]["forget"]
    for row in lone["policies"]["am"]["curve"]:
        del row["gold"]
    lone["findings"] = findings(lone)
    assert lone["findings"] == []
    page = Page(make_report(lone)[0])
    assert "Advantage Model" in page.text
    assert "RM-PPO forgets" not in page.text
    assert size_of(figures.overview(lone)) == (1200, 500)


def test_names_of_their_own_are_shown_with_colours_of_their_own(make_summary: Any) -> None:
    other = make_summary(pairs=60, prompts=20, variants=("am",))
    other["scorers"] |= {"mine <b>": other["scorers"].pop("rm")}
    other["policies"] |= {"bare": other["policies"]["am"]}
    other |= {"kind": "evaluation", "findings": findings(other)}
    page = Page(make_report(other)[0])
    assert "mine <b>" in page.text and "bare" in page.text and "trained before" in page.text
    paint = figures.colours(["am", "mine", "bare", "third"])
    assert paint["am"] == figures.COLOURS["am"] and len(set(paint.values())) == 4


def test_later_rounds_follow_their_variant_and_go_on_where_the_last_one_ended(
    make_summary: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    policies = make_summary(pairs=40, prompts=20, variants=("rm", "am"))["policies"]
    policies |= {
        "am-round-2": policies["am"],
        "rm-round-10": policies["rm"],
        "rm-round-2": policies["rm"],
        "mine": {1: 1},
    }
    names = variant_names(policies)
    assert list(names) == ["rm", "rm-round-2", "rm-round-10", "am", "am-round-2", "mine"]
    assert list(scorer_names({"rm": 1, "am": 1, "rm-round-2": 1})) == ["rm", "rm-round-2", "am"]
    assert names["rm-round-10"] == "RM-PPO, round 10"
    paint = figures.colours(names)
    assert paint["am"] == figures.COLOURS["am"] and len(set(paint.values())) == 6
    light = [sum(bytes.fromhex(paint[key][1:])) for key in ("rm", "rm-round-2", "rm-round-10")]
    assert light == sorted(light, reverse=True)
    drawn: list[Any] = []
    monkeypatch.setattr(figures, "png", lambda figure, dpi=0: drawn.append(figure) or b"")
    figures.ppo_curves(policies)
    for axes in drawn[0].axes:
        first = {line.get_label(): line.get_xdata()[0] for line in axes.get_lines() if "PPO" in str(line.get_label())}
        assert first == {
            "RM-PPO": 0,
            "RM-PPO, round 2": 59,
            "RM-PPO, round 10": 118,
            "AM-PPO": 0,
            "AM-PPO, round 2": 59,
        }


def test_many_scorers_take_further_rows(make_summary: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    scorers = make_summary(pairs=40, prompts=20, variants=("rm",))["scorers"]
    scorers |= {f"{key}-round-{number}": scorers[key] for key in ("rm", "am") for number in (2, 3)}
    drawn: list[Any] = []
    monkeypatch.setattr(figures, "png", lambda figure, dpi=0: drawn.append(figure) or b"")
    for draw in (figures.reliability, figures.difference, figures.densities, figures.task_densities):
        draw(scorers)
        titles = [axes.get_title().split("\n")[0] for axes in drawn[-1].axes if axes.get_visible()]
        assert [title for title in titles if not title.endswith("/ T")] == list(scorer_names(scorers).values())
        assert drawn[-1].axes[0].get_gridspec().ncols == 3
    figures.overview({"scorers": scorers})
    assert [axes.get_title().split("\n")[0] for axes in drawn[-1].axes] == ["Reward model", "Advantage Model"]


@pytest.mark.slow
def test_scorers_of_other_tasks_show_what_they_share(make_summary: Any) -> None:
    apart = make_summary(pairs=80, prompts=20)
    part = apart["scorers"]["am"]
    part["tasks"] = {name: row for name, row in part["tasks"].items() if name != "sort"}
    make_report(apart)[0]
    part["tasks"] = {"elsewhere": {"count": 3, "mean": 0.0, "std": 1.0, "accuracy": 1.0}}
    assert not figures.has_tasks(apart["scorers"])
    assert "Scores task by task" not in make_report(apart)[0]


def test_a_chat_judges_agreement_is_told(make_summary: Any, undrawn: None) -> None:
    asked = make_summary(pairs=40, prompts=20, variants=("am",))
    asked["policies"]["am"]["main"] |= {
        "asked": 17, "order_agreement": 0.625, "order_kappa": 0.4, "first_position": 0.75, "unreadable": 2,
    }  # fmt: skip
    page = Page(make_report(asked)[0]).text
    assert "AM-PPO, main set1762.50.4075.02" in page.replace("\n", "")
    assert "AM-PPO, forget set" not in page


def test_rewards_of_the_answers_stand_beside_the_initial_policys(make_summary: Any, undrawn: None) -> None:
    found = make_summary(pairs=40, prompts=20, variants=("rm", "am"))
    assert "Rewards of the same answers" not in Page(make_report(found)[0]).text
    values = {"exact": [1.0, 0.0, None, 1.0, 1.0, 0.0], "nowhere": [None] * 6, "same": [0.5] * 6}
    initial = {"exact": [0.0, 0.0, 1.0, 1.0, None, 0.0], "nowhere": [1.0] * 6, "same": [0.5] * 6}
    rewards = compare_rewards(values, initial, seed=3)
    assert set(rewards) == {"exact", "same"}
    exact, same = rewards["exact"], rewards["same"]
    assert (exact["value"], exact["sft"], exact["n"]) == (0.5, 0.25, 4) and exact["difference"]["value"] == 0.25
    assert -0.5 < exact["difference"]["low"] < 0.25 < exact["difference"]["high"] <= 1
    assert same["difference"] == {"value": 0.0, "low": None, "high": None} and same["n"] == 6
    found["policies"]["am"]["main"]["rewards"] = rewards
    page = Page(make_report(found)[0]).text.replace("\n", "")
    ends = f"[{exact['difference']['low']:+.3f}, {exact['difference']['high']:+.3f}]"
    assert f"AM-PPO, main set: exact0.5000.250+0.250{ends}4" in page and "main set: same0.5000.500+0.0006" in page
    assert "forget set: exact" not in page
    console = Console(width=80, record=True, file=open("/dev/null", "w", encoding="utf-8"))  # noqa: SIM115
    console.print(summary_table(found))
    text = console.export_text()
    assert "exact" in text and max(len(line) for line in text.splitlines()) <= 80


def test_names_follow_the_estimator_and_claims_about_ppo_are_left_out(make_summary: Any, undrawn: None) -> None:
    ppo, own = PPOArguments(advantage_estimator="grpo"), RewardArguments(functions=["exact_number"])
    scored = RewardArguments(functions=["scorer", "length"])
    names = {name: (row.label_under(ppo, scored), row.label_under(ppo, own)) for name, row in VARIANTS.items()}
    assert names == {
        "rejection": ("Rejection sampling",) * 2, "rm": ("RM-GRPO", "GRPO"), "rm-ma": ("RM-GRPO w/ MA", "GRPO w/ MA"),
        "rm-sr": ("RM-GRPO-SR", "GRPO-SR by RM"), "am": ("AM-GRPO", "GRPO"), "am-sr": ("AM-GRPO-SR", "GRPO-SR by AM"),
        "am-critic-free": ("AM, critic-free",) * 2,
    }  # fmt: skip
    assert all(row.label_under(PPOArguments(), RewardArguments()) == row.label for row in VARIANTS.values())
    found = make_summary(pairs=40, prompts=20, variants=("rm", "am", "am-sr"))
    for name, part in found["policies"].items():
        part["label"] = VARIANTS[name].label_under(PPOArguments(), RewardArguments())
    claims = [item["claim"] for item in findings(found)]
    assert sum("PPO" in claim for claim in claims) == 7
    for name, part in found["policies"].items():
        part["label"] = VARIANTS[name].label_under(ppo, scored)
    left = findings(found)
    assert [item["claim"] for item in left] == [claim for claim in claims if "PPO" not in claim] != []
    page = Page(make_report(found | {"findings": left})[0]).text
    assert "AM-GRPO-SR" in page and "AM-GRPO, forget set" not in page


def test_reports_say_plainly_what_is_not_reproduced(make_summary: Any, undrawn: None) -> None:
    flipped = make_summary(swap=True, pairs=600)
    page = Page(make_report(flipped)[0])
    assert "Not reproduced." in page.text


def test_tables_carry_figures_intervals_and_tokens(summary: dict[str, Any]) -> None:
    console = Console(width=80, record=True, file=open("/dev/null", "w", encoding="utf-8"))  # noqa: SIM115
    console.print(summary_table(summary))
    text = console.export_text()
    assert max(len(line) for line in text.splitlines()) <= 80
    rm, forget = summary["scorers"]["rm"], summary["policies"]["rm"]["forget"]
    page = Page(make_report(summary)[0]).text
    for low, high in ((rm["ece"]["low"], rm["ece"]["high"]), forget["lose_ci"]):
        assert f"{100 * low:.1f}–{100 * high:.1f}" in text
        assert f"[{100 * low:.1f}, {100 * high:.1f}]" in page
    for out in (text, page):
        assert "RM-PPO w/ MA" in out
        assert "29.28" in out
    assert "AM-PPO-SR 1,234,567" in page
    assert "Reward model 55,555," in page


def test_pictures_have_their_size_and_follow_the_figures(summary: dict[str, Any]) -> None:
    scorers = summary["scorers"]
    assert size_of(figures.overview(summary)) == (1200, 500)
    assert size_of(figures.reliability(scorers)) == (1350, 1050)
    assert size_of(figures.reliability(dict.fromkeys(["a", "b", "c", "d"], scorers["am"]))) == (1350, 2100)
    assert figures.reliability(scorers) == figures.reliability(scorers)
    assert figures.reliability(scorers) != figures.reliability({"rm": scorers["am"], "am": scorers["rm"]})
    with pytest.raises(ValueError, match="nothing to draw"):
        figures.overview({})


@pytest.mark.slow
def test_pictures_bear_many_long_task_names_and_degenerate_scores() -> None:
    from stable_rlhf.metrics import scorer_evaluation

    tasks = [f"a very long name of task number {k} with $x^2 and _ {{" for k in range(61)]
    many = {"rm": scorer_evaluation([float(k) for k in range(61)], [0.0] * 61, tasks)}
    flat = {"am": scorer_evaluation([1.0], [1.0], ["one"])}
    for scorers in (many, flat):
        for draw in (
            figures.reliability,
            figures.difference,
            figures.densities,
            figures.task_densities,
            figures.per_task,
        ):
            assert size_of(draw(scorers))[0] == 1350
    assert figures.has_tasks(many)
    assert not figures.has_tasks(flat)


def test_importing_the_report_does_not_import_matplotlib_or_torch() -> None:
    code = (
        "import sys, stable_rlhf.evaluate.report, stable_rlhf.evaluate.judge\n"
        "print([name for name in ('matplotlib', 'torch', 'jinja2', 'scipy') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, encoding="utf-8", check=True)
    assert done.stdout.strip() == "[]"
