"""Controls of the study: what they train, that they check the study's own figures, and what the page shows of them."""

from __future__ import annotations

import json

import pytest

from bench.case import read_lines
from bench.pages import marked, rendered
from bench.studies import controls


def policy(win: float, gold: float) -> dict:
    part = {"win": win, "lose": 0.5, "kl": 1.0, "gold": gold, "sft_gold": 0.25}
    return {"main": part, "forget": part | {"win": win / 2}}


@pytest.fixture
def study(tmp_path, monkeypatch):
    """A study of one seed whose commands are noted instead of run; its policies measure what the fixture says."""
    seed = tmp_path / "study" / "seeds" / "3"
    seed.mkdir(parents=True)
    known = {"rm": policy(0.2, 0.5), "am-sr": policy(0.4, 0.75)}
    scorers = {"rm": {"temperature": 1.5}}
    (seed / "summary.json").write_text(json.dumps({"policies": known, "scorers": scorers}), encoding="utf-8")
    calls: list[list[str]] = []
    measured = {"study": known["am-sr"], "changed": policy(0.6, 1.0)}

    def call(*words, log):
        calls.append([str(word) for word in words])
        out = tmp_path / calls[-1][-1]
        if words[0] == "train-ppo":
            folder = out / f"ppo-{calls[-1][calls[-1].index('--variant') + 1]}"
            folder.mkdir(parents=True)
            (folder / "stage.json").write_text('{"seconds": 12.34}', encoding="utf-8")
        if words[0] == "evaluate":
            (out / "evaluation").mkdir(parents=True)
            (out / "evaluation" / "summary.json").write_text(json.dumps({"policies": measured}), encoding="utf-8")

    monkeypatch.setattr(controls, "call", call)
    return tmp_path / "study", calls, measured, known


def test_a_control_trains_from_what_the_study_made(study, tmp_path):
    folder, calls, _, _ = study
    line = controls.measure("sr-5", 3, folder, tmp_path / "work")
    assert [words[0] for words in calls] == ["select", "train-ppo", "evaluate"]
    assert "--select.num_clusters 5 --select.top_k 40" in " ".join(calls[0])
    for words in calls:
        assert words[words.index("--seed") + 1] == "3"
        assert words[words.index("--model-name-or-path") + 1] == str(folder / "seeds" / "3" / "sft")
        assert words[words.index("--data.eval_forget") + 1].endswith("seeds/3/world/eval_forget.jsonl.gz")
    assert calls[1][calls[1].index("--scorer") + 1] == str(folder / "seeds" / "3" / "scorer-am")
    assert calls[1][calls[1].index("--rehearsal") + 1].startswith(str(tmp_path / "work" / "sr-5" / "3"))
    assert (line["main_win"], line["forget_win"], line["main_gold_gain"], line["seconds"]) == (0.6, 0.3, 0.75, 12.3)


def test_only_the_named_setting_changes(study, tmp_path):
    folder, calls, measured, known = study
    measured["study"] = known["rm"]
    controls.measure("rm-kl", 3, folder, tmp_path / "work")
    assert [words[0] for words in calls] == ["train-ppo", "evaluate"]
    assert "--scorer" in calls[0] and calls[0][calls[0].index("--ppo.kl_coef") + 1] == "0.175"
    assert not any(word.startswith("--select") or word == "--rehearsal" for words in calls for word in words)


def test_the_penalty_by_the_scorers_temperature(study, tmp_path):
    folder, calls, measured, known = study
    measured["study"] = known["rm"]
    line = controls.measure("rm-temperature", 3, folder, tmp_path / "work")
    assert calls[0][calls[0].index("--ppo.kl_coef") + 1] == "0.0750" and line["settings"][1] == "0.0750"


def test_a_study_that_measures_otherwise_now_is_an_error(study, tmp_path):
    folder, _, measured, _ = study
    measured["study"] = policy(0.4, 0.5)
    with pytest.raises(RuntimeError, match=r"seeds/3: its am-sr measures .*'main_gold_gain': 0\.25"):
        controls.measure("sr-5", 3, folder, tmp_path / "work")


def test_what_has_a_line_is_not_measured_again(study, tmp_path):
    folder, calls, _, _ = study
    output = tmp_path / "lines.jsonl"
    for _ in range(2):
        controls.run(folder, tmp_path / "work", [3], ["sr-5", "sr-100"], 1, output)
    assert [words[0] for words in calls].count("train-ppo") == 2
    assert [line["control"] for line in read_lines(output)] == ["sr-5", "sr-100"]


def test_the_page_shows_what_the_results_hold():
    page = controls.PAGE.read_text(encoding="utf-8")
    assert [match["name"] for match in marked("controls").finditer(page)] == [
        "study",
        "again",
        "rounding",
        "scale",
        "clusters",
    ]
    assert rendered(page, "controls", controls.block) == page, "run: python -m bench.studies.controls report"
    assert controls.draw(read_lines(controls.OUTPUT)).startswith(b"\x89PNG")
