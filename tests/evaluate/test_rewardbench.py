"""RewardBench and RewardBench 2: their files, and figures that are the rewardbench package's own."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from helpers.files import write_lines
from helpers.frameworks import framework_python, run_code, run_in
from stable_rlhf.data.records import DataError
from stable_rlhf.evaluate.report import make_report
from stable_rlhf.evaluate.rewardbench import SECTIONS, Item, benchmark_figures, pairs_of, read_benchmark, ties_figures

SUBSETS = ["alpacaeval-easy", "mt-bench-med", "llmbar-natural", "donotanswer", "math-prm", "hep-cpp", "hep-go"]


def first_rows(count: int = 40) -> list[dict[str, Any]]:
    return [
        {"prompt": f"p{i}", "chosen": f"c{i}", "chosen_model": "a", "rejected": f"r{i}", "rejected_model": "b",
         "subset": SUBSETS[i % len(SUBSETS)], "id": i}
        for i in range(count)
    ]  # fmt: skip


def second_rows(count: int = 24) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = []
    for i in range(count):
        rows.append({"id": str(i), "prompt": f"p{i}", "chosen": [f"c{i}"], "rejected": [f"r{i}{j}" for j in range(3)],
                     "subset": ("Factuality", "Math")[i % 2]})  # fmt: skip
    for i in range(count):
        right = 1 + (i % 4)
        for kind, n in (("ref", 1), ("tied", right)):
            rows.append({"id": f"{kind}:{i}", "prompt": f"t{kind}{i}", "chosen": [f"c{j}" for j in range(n)],
                         "rejected": [f"w{j}" for j in range(1 + i % 3)], "subset": "Ties"})  # fmt: skip
    for row in rows:
        row |= {"num_correct": len(row["chosen"]), "num_incorrect": len(row["rejected"]), "models": ["m"]}
        row["total_completions"] = row["num_correct"] + row["num_incorrect"]
    return rows


ROWS = {"rewardbench": first_rows, "rewardbench2": second_rows}


def draw(items: list[Item], seed: int = 0) -> list[list[float]]:
    """Scores on a coarse grid, so that some are the same; right ones lie higher on the whole."""
    rng = np.random.default_rng(seed)
    return [
        [float(round(rng.normal() + 1.5 * (i < item.right), 1)) for i in range(len(item.responses))] for item in items
    ]


@pytest.fixture(scope="session")
def python() -> Path:
    return framework_python("rewardbench", "--no-deps", "rewardbench==0.1.4", "datasets==5.2.0", "pandas", "pyarrow",
                            "dill", "multiprocess", "xxhash", "pytz", "tzdata")  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("benchmark", ROWS)
def test_a_parquet_file_is_read_as_lines_are(benchmark, python, tmp_path):
    """And a data set under a name, which is a folder here, by the published split; a wrong name is one clear error."""
    code = f"""
from dataclasses import replace
import pandas
from stable_rlhf.evaluate.rewardbench import HUB, read_benchmark
lines = read_benchmark({benchmark!r}, "rows.jsonl")
frame = pandas.read_json("rows.jsonl", lines=True, dtype=False)
frame.to_parquet("rows.parquet")
folder = __import__("pathlib").Path("set/data"); folder.mkdir(parents=True)
frame.to_parquet(folder / (HUB[{benchmark!r}][1] + "-00000-of-00001.parquet"))
bare = [replace(item, source="") for item in lines]
for source in ("rows.parquet", "./set"):
    assert [replace(item, source="") for item in read_benchmark({benchmark!r}, source)] == bare, source
try:
    read_benchmark({benchmark!r}, "nobody/nothing")
except ValueError as error:
    print(error)
"""
    write_lines(tmp_path / "rows.jsonl", ROWS[benchmark]())
    assert run_code(python, code, tmp_path, HF_HUB_OFFLINE="1").startswith("nobody/nothing: cannot be read: ")


@pytest.mark.slow
@pytest.mark.parametrize("benchmark", ROWS)
def test_figures_are_the_packages(benchmark, python, tmp_path):
    """rewardbench 0.1.4's own functions on the same file and scores, in an environment of its own."""
    path = write_lines(tmp_path / "rows.jsonl", ROWS[benchmark]())
    items = read_benchmark(benchmark, str(path))
    scores = draw(items)
    (tmp_path / "scores.json").write_text(json.dumps(scores), encoding="utf-8")
    theirs = json.loads(
        run_in(python, "rewardbench_worker", benchmark, path, tmp_path / "scores.json").splitlines()[-1]
    )
    ours = benchmark_figures(benchmark, items, scores)
    assert set(theirs["subsets"]) == set(ours["subsets"])
    for name, value in theirs["subsets"].items():
        assert ours["subsets"][name]["value"] == pytest.approx(value, abs=1e-12), name
    if benchmark == "rewardbench":
        assert ours["sections"] == pytest.approx(theirs["sections"], abs=1e-12)
    # A control: another response's score, and the figures part.
    other = [[own[-1], *own[1:]] for own in scores]
    changed = benchmark_figures(benchmark, items, other)["subsets"]
    assert all(abs(changed[name]["value"] - value) > 1e-3 for name, value in theirs["subsets"].items())


def test_first_by_hand():
    names = ["math-prm", "hep-cpp", "hep-go", "alpacaeval-easy", "mt-bench-easy"]
    items = [Item("p", ("a", "b"), 1, name, str(i)) for i, name in enumerate(names)]
    figures = benchmark_figures("rewardbench", items, [[2, 1], [1, 2], [2, 1], [1, 1], [2, 1]])
    assert [figures["subsets"][n]["value"] for n in names] == [1, 0, 1, 0, 1]  # equal scores are no win
    assert figures["sections"]["Reasoning"] == pytest.approx((984 + 164) / (984 + 2 * 164))
    assert figures["sections"]["Chat"] == pytest.approx(28 / 128)
    assert figures["sections"]["Safety"] is None
    assert figures["score"] == pytest.approx(((984 + 164) / (984 + 2 * 164) + 28 / 128) / 2)
    code = sum(weight for name, weight in SECTIONS["Reasoning"].items() if name.startswith("hep"))
    assert code == SECTIONS["Reasoning"]["math-prm"]  # math and code count the same


def test_second_by_hand():
    items = [Item("p", tuple("abcd"), 1, "Math", str(i)) for i in range(4)]
    figures = benchmark_figures("rewardbench2", items, [[3, 1, 2, 0], [3, 3, 2, 0], [1, 3, 0, 0], [1, 1, 1, 1]])
    assert figures["subsets"]["Math"]["value"] == pytest.approx((1 + 1 / 2 + 0 + 1 / 4) / 4)
    ref, tied = Item("p", ("a", "w"), 1, "Ties", "ref:0"), Item("q", ("a", "b", "w"), 2, "Ties", "tied:0")
    ties = ties_figures([(ref, [3.0, 1.0]), (tied, [5.0, 4.0, 1.0])])
    # Margins: 2 beside one right answer, 3 beside two, which are 1 apart.
    assert ties["value"] == pytest.approx(0.3 + 0.3 + 0.2 + 0.2 + 0.01 * math.tanh(2 / 1 - 1))
    assert ties_figures([(ref, [3.0, 1.0])])["value"] == pytest.approx(0.3)
    worse = ties_figures([(ref, [3.0, 2.5]), (tied, [5.0, 4.0, 1.0])])
    assert worse["preferred"] == 1 and worse["preferred_hard"] == 0


def test_pairs_of_a_benchmark_are_every_right_one_against_every_wrong_one():
    items = [Item("p", ("a", "b", "c"), 2, "Ties", "tied:0"), Item("q", ("a", "b"), 1, "Math", "1")]
    pairs = pairs_of(items, [[3.0, 2.0, 1.0], [5.0, 6.0]])
    assert pairs == {
        "chosen": [3.0, 2.0, 5.0], "rejected": [1.0, 1.0, 6.0], "tasks": ["Ties", "Ties", "Math"], "prompts": [0, 0, 1],
    }  # fmt: skip


@pytest.mark.parametrize(
    ("benchmark", "change", "reason"),
    [
        ("rewardbench", {"chosen": ["c"]}, "'chosen' must be a text, got an array"),
        ("rewardbench", {"subset": None}, "'subset' must be a text, got null"),
        ("rewardbench", {"prompt": []}, "'prompt' must be a text, got an array"),
        ("rewardbench", {"prompt": [{"content": "a"}, {"content": "b"}]}, "messages that end with the user's"),
        ("rewardbench2", {"chosen": "c"}, "'chosen' must be a list of texts, at least one, as RewardBench 2 has them"),
        ("rewardbench2", {"rejected": []}, "'rejected' must be a list of texts"),
        ("rewardbench2", {"num_correct": 2}, "'num_correct' is 2, where 'chosen' and 'rejected' have 1"),
        ("rewardbench2", {"subset": "Ties"}, "'id' of the Ties subset must be ref:N or tied:N, got '0'"),
        ("rewardbench2", {"chosen": ["a", "b"], "num_correct": 2, "total_completions": 5}, "'chosen' has 2 texts"),
    ],
)  # fmt: skip
def test_rows_of_another_format_are_refused(benchmark, change, reason, tmp_path):
    rows = ROWS[benchmark](2)
    path = write_lines(tmp_path / "rows.jsonl", [{**rows[0], **change}, *rows[1:]])
    with pytest.raises(DataError, match=r"rows\.jsonl:1: ") as error:
        read_benchmark(benchmark, str(path))
    assert reason in str(error.value)


def test_prompts_may_be_chats_and_ids_of_ties_stand_once(tmp_path):
    turns = [{"role": "human", "content": "a"}, {"role": "bot", "content": "b"}, {"role": "human", "content": "c"}]
    path = write_lines(tmp_path / "rows.jsonl", [{**first_rows(1)[0], "prompt": turns}])
    (item,) = read_benchmark("rewardbench", str(path))
    assert [m["role"] for m in item.prompt] == ["user", "assistant", "user"]
    rows = [row for row in second_rows(1) if row["subset"] == "Ties"]
    path = write_lines(tmp_path / "ties.jsonl", [*rows, rows[0]])
    with pytest.raises(DataError, match=r"ties\.jsonl:3: id 'ref:0' of the Ties subset stands at .*ties\.jsonl:1 too"):
        read_benchmark("rewardbench2", str(path))


@pytest.mark.parametrize("benchmark", ROWS)
def test_the_page_has_every_subset(benchmark, tmp_path):
    items = read_benchmark(benchmark, str(write_lines(tmp_path / "rows.jsonl", ROWS[benchmark]())))
    parts = {name: benchmark_figures(benchmark, items, draw(items, seed)) for seed, name in enumerate(("rm", "mine"))}
    own = {"name": benchmark, "source": "<rows>", "items": len(items), "scorers": parts}
    page, _ = make_report({"kind": "evaluation", "benchmark": own})
    assert "Reward model %" in page and "mine %" in page and "&lt;rows&gt;" in page
    for name, part in parts["rm"]["subsets"].items():
        assert f"{name} ({part['n']})" in page and f"{100 * part['value']:.1f}" in page


# -- the command -------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def scorer(server, tmp_path_factory) -> Path:
    from helpers.cli import small_scorer
    from helpers.files import tiny_files

    return small_scorer(server, tiny_files(tmp_path_factory.mktemp("files")))


@pytest.mark.parametrize("benchmark", ROWS)
def test_the_command(cli, tmp_path, scorer, benchmark):
    from stable_rlhf.scorer import AdvantageModel

    path = write_lines(tmp_path / "rows.jsonl", ROWS[benchmark]())
    call = ["evaluate", "--scorers", f"am={scorer}", "--benchmark", benchmark, "--benchmark-data", path]
    told = json.loads(cli(*call, "--output-dir", "o").worked().out)
    items = read_benchmark(benchmark, str(path))
    model = AdvantageModel.from_pretrained(scorer)
    scores = [model.score([i.prompt] * len(i.responses), i.responses).tolist() for i in items]
    figures, found = benchmark_figures(benchmark, items, scores), told["benchmark"]["scorers"]["am"]
    assert found["score"] == pytest.approx(figures["score"]) and found["cut"] == 0
    assert found["subsets"].keys() == figures["subsets"].keys()
    pairs = sum(i.right * (len(i.responses) - i.right) for i in items)
    assert told["scorers"]["am"]["pairs"] == pairs and "ece" in told["scorers"]["am"]
    assert 'id="benchmark"' in (tmp_path / "o" / "evaluation" / "report.html").read_text(encoding="utf-8")
    assert "finished before" in cli(*call, "--output-dir", "o").worked().err
    write_lines(path, ROWS[benchmark](8))
    cli(*call, "--output-dir", "o").refused("was made with other settings (benchmark")


def test_responses_beyond_the_context_are_cut_there_and_told(cli, tmp_path, scorer):
    rows = first_rows(3)
    rows[1]["chosen"] = "a" * 5000
    path = write_lines(tmp_path / "rows.jsonl", rows)
    done = cli("evaluate", "--scorers", f"am={scorer}", "--benchmark", "rewardbench", "--benchmark-data", path).worked()
    assert "1 responses were longer than" in done.err and json.loads(done.out)["benchmark"]["scorers"]["am"]["cut"] == 1


@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        ("--scorers a=x --benchmark rewardbench3", ["--benchmark", "rewardbench3"]),
        ("--policies a=x --benchmark rewardbench --model-name-or-path m", ["--benchmark is for scorers"]),
        ("--scorers a=x --benchmark-data x.jsonl", ["--benchmark_data says where a benchmark is", "--benchmark"]),
        (
            "--scorers a=x --benchmark rewardbench --benchmark-data no.jsonl",
            ["--benchmark_data: no.jsonl: no such file"],
        ),
    ],
)
def test_wrong_calls(cli, arguments, parts):
    cli("evaluate", *arguments.split()).refused(*parts)


def test_a_hub_without_datasets(monkeypatch):
    from stable_rlhf.system import extras

    monkeypatch.setattr(extras.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(
        extras.MissingExtra, match=r"RewardBench 2 from a hub or a parquet file needs stable-rlhf\[data\]"
    ):
        read_benchmark("rewardbench2")
