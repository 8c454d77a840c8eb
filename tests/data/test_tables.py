"""Data as it lies on hubs: CSV, parquet, Arrow, `datasets`, columns of other names, and more prompts than memory."""

from __future__ import annotations

import json
import re
import shutil
from collections import Counter
from datetime import datetime
from pathlib import Path

import pytest

from stable_rlhf.data import DataError, comparison_row, read_comparisons, read_demonstrations, read_prompts, write_jsonl
from stable_rlhf.data.readers import read_scored
from stable_rlhf.run.datasets import digests, load_prompts, locate
from stable_rlhf.settings.recipe import DataArguments

datasets = pytest.importorskip("datasets")
pandas = pytest.importorskip("pandas")
pyarrow = pytest.importorskip("pyarrow")

ASK = [{"role": "user", "content": "Sky?"}]
SAY = [{"role": "assistant", "content": "blue"}]
WRONG = [{"role": "assistant", "content": "green"}]
ROWS = [{"prompt": "Say hi", "chosen": "hi", "rejected": "", "margin": 2.0, "note": "ä,\n\"b\""},
        {"prompt": "Say ho", "chosen": "ho", "rejected": "no", "margin": None, "note": None}]  # fmt: skip


@pytest.fixture(autouse=True)
def offline(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.chdir(tmp_path)


def save(path: Path, rows=ROWS) -> Path:
    frame = pandas.DataFrame(rows)
    if path.name.endswith((".csv", ".csv.gz")):
        frame.to_csv(path, index=False)
    elif path.suffix == ".parquet":
        frame.to_parquet(path)
    elif path.suffix == ".feather":
        with pyarrow.OSFile(str(path.with_suffix(".arrow")), "wb") as sink:
            table = pyarrow.Table.from_pylist(rows)
            with pyarrow.ipc.new_file(sink, table.schema) as writer:
                writer.write_table(table)
        return path.with_suffix(".arrow")
    elif path.name == "saved":
        datasets.Dataset.from_list(rows).save_to_disk(str(path))
    elif path.name == "data-00000-of-00001.arrow":
        datasets.Dataset.from_list(rows).save_to_disk(str(path.parent))
    elif path.name == "shuffled":
        datasets.Dataset.from_list(rows[::-1]).select([1, 0]).save_to_disk(str(path))
    else:  # a folder of parts
        path.mkdir()
        for i, row in enumerate(rows):
            pandas.DataFrame([row]).to_parquet(path / f"part-{i}.parquet")
    return path


@pytest.mark.parametrize(
    "name",
    ["a.csv", "a.csv.gz", "a.parquet", "a.feather", "saved", "one/data-00000-of-00001.arrow", "shuffled", "parts"],
)
def test_every_format_gives_the_rows_of_json_lines(tmp_path, name):
    write_jsonl(tmp_path / "a.jsonl", ROWS)
    path = save(tmp_path / name)
    wanted, found = (read_comparisons(p).rows for p in (tmp_path / "a.jsonl", path))
    for i, (a, b) in enumerate(zip(wanted, found, strict=True)):
        empty = {"note": ""} if ".csv" in name else {}
        meta = {k: v for k, v in a.meta.items() if v is not None} or empty
        assert (b.prompt, b.responses, b.margin, b.meta) == (a.prompt, a.responses, a.margin, meta)
        assert b.source == f"{path}:{i + 1}"


def test_a_bad_row_is_told_with_its_file_and_number(tmp_path):
    for name in ("a.csv", "a.parquet", "saved"):
        path = save(tmp_path / name, [ROWS[0], {**ROWS[1], "rejected": "ho"}, ROWS[0]])
        with pytest.raises(DataError, match=rf"^{path}:2: 'chosen' and 'rejected' are the same"):
            read_comparisons(path)
        assert len(read_comparisons(path, on_bad_row="skip").rows) == 2
    dated = save(tmp_path / "dated.parquet", [{"prompt": "a", "when": datetime(2020, 1, 1)}])
    with pytest.raises(DataError, match=rf"^{dated}:1: holds what JSON has no word for: .*(datetime|Timestamp)"):
        read_prompts(dated)


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("a.csv", b"prompt,prompt\n1,2\n", "two columns have one name"),
        ("a.csv", b"prompt,task\na\n", ":1: has 1 cells for 2 columns"),
        ("a.csv", b"prompt,score,response\na,b,c\n", ":1: 'score' must be a number, got 'b'"),
        ("a.csv", b"prompt\n\xff\n", "cannot be read as CSV in UTF-8, after row 0"),
        ("a.csv.gz", b"prompt\na\n", "cannot be read as CSV"),
        ("a.csv", b"", "the file has no rows"),
        ("a.parquet", b"PAR1 not", "cannot be read as parquet"),
        ("a.arrow", b"ARROW1 not", "cannot be read as Arrow"),
    ],
)
def test_files_that_are_not_what_their_name_says(tmp_path, name, content, words):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=re.escape(words)):
        read_prompts(tmp_path / name)


def test_splits_that_were_saved_together_are_named(tmp_path):
    made = datasets.Dataset.from_list(ROWS)
    datasets.DatasetDict(train=made, test=made.select([1])).save_to_disk(str(tmp_path / "both"))
    with pytest.raises(DataError, match=r"holds the splits test, train; name one of them: .*both/test"):
        read_prompts(tmp_path / "both")
    assert [r.prompt for r in read_prompts(tmp_path / "both" / "test").rows] == ["Say ho"]
    for name in ("train", "test"):  # a copy that was broken off
        shutil.rmtree(tmp_path / "both" / name)
    with pytest.raises(DataError, match=r"both: names splits, and none of their folders is there"):
        read_prompts(tmp_path / "both")


def test_what_a_stage_of_ours_wrote_has_our_names(tmp_path):
    """Whatever those were that it read: here each is the other's."""
    columns = {"chosen": "rejected", "rejected": "chosen"}
    (tmp_path / "a.jsonl").write_text('{"prompt": "p", "chosen": "worse", "rejected": "better"}\n', encoding="utf-8")
    (first,) = read_comparisons(tmp_path / "a.jsonl", columns=columns).rows
    (tmp_path / "denoised").mkdir()
    write_jsonl(tmp_path / "denoised" / "pairs.jsonl.gz", [comparison_row(first)])
    (tmp_path / "denoised" / "stage.json").write_text("{}", encoding="utf-8")
    (again,) = read_comparisons(tmp_path / "denoised" / "pairs.jsonl.gz", columns=columns).rows
    assert [row.responses[better] for row in (first, again) for better, _ in row.pairs] == ["better", "better"]


@pytest.mark.parametrize("columns", [None, {"finished": "done", "task": "kind", "margin": "bound"}])
def test_empty_cells_of_csv_are_none_where_a_column_may_be_absent(tmp_path, columns):
    named = [(columns or {}).get(name, name) for name in ("finished", "task")]
    path = tmp_path / "a.csv"
    path.write_text(f"prompt,response,{','.join(named)}\np,r,False,add\nq,,,\n", encoding="utf-8")
    first, second = read_demonstrations(path, columns=columns).rows
    assert (first.task, first.meta["finished"], second.task, second.response) == ("add", False, None, "")
    assert "finished" not in second.meta
    margin = (columns or {}).get("margin", "margin")
    path.write_text(f"prompt,chosen,rejected,{margin}\np,a,b,\nq,a,b,2\n", encoding="utf-8")
    assert [row.margin for row in read_comparisons(path, columns=columns).rows] == [None, 2.0]


def test_a_name_on_a_hub(tmp_path):
    """`datasets` takes a folder beside the process for a repository of that name."""
    (tmp_path / "me" / "pairs").mkdir(parents=True)
    pandas.DataFrame(ROWS).to_parquet(tmp_path / "me" / "pairs" / "train.parquet")
    pandas.DataFrame(ROWS[:1]).to_parquet(tmp_path / "me" / "pairs" / "test.parquet")
    assert [r.source for r in read_comparisons("hub:me/pairs").rows] == ["hub:me/pairs:1", "hub:me/pairs:2"]
    assert len(read_comparisons("hub:me/pairs:test").rows) == 1
    assert len(read_comparisons("hub:me/pairs:default:test").rows) == 1
    with pytest.raises(DataError, match="hub:me/pairs:dev: cannot be loaded: ValueError"):
        read_comparisons("hub:me/pairs:dev")
    with pytest.raises(DataError, match="expected hub:NAME, hub:NAME:SPLIT"):
        read_comparisons("hub:a:b:c:d")
    arguments = DataArguments(data_dir=str(tmp_path), pairs=["hub:me/pairs", "x.jsonl"])
    assert locate(arguments, arguments.pairs) == [Path("hub:me/pairs"), tmp_path / "x.jsonl"]
    assert digests(arguments, ["hub:me/pairs"]) == {} and digests(arguments, ["me"]).keys() == {"me"}


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": ASK, "chosen": SAY, "rejected": WRONG},  # TRL: conversational, explicit prompt
        {"chosen": ASK + SAY, "rejected": ASK + WRONG},  # implicit prompt
        {"prompt": "Sky?", "chosen": ASK + SAY, "rejected": ASK + WRONG},  # UltraFeedback, binarized
        {"prompt": "Sky?", "chosen": "blue", "rejected": "green"},
    ],
)
def test_trls_preference_formats(tmp_path, row):
    (found,) = read_comparisons(save(tmp_path / "a.parquet", [row])).rows
    assert found.responses == ("blue", "green") and found.prompt in (ASK, "Sky?")


def test_trls_other_formats(tmp_path):
    for row in ({"prompt": ASK, "completion": SAY}, {"messages": ASK + SAY}, {"prompt": ASK, "response": "blue"}):
        (found,) = read_demonstrations(save(tmp_path / "a.parquet", [row])).rows
        assert (found.prompt, found.response) == (ASK, "blue")


def test_columns_of_other_names(tmp_path):
    completions = [{"response": "green", "overall_score": 3.0}, {"response": "blue", "overall_score": 9.5}]
    path = save(tmp_path / "ultra.parquet", [{"instruction": "Sky?", "source": "x", "completions": completions}])
    columns = {"prompt": "instruction", "responses": "completions.response", "scores": "completions.overall_score"}
    (found,) = read_comparisons(path, columns=columns).rows
    assert (found.prompt, found.responses, found.pairs) == ("Sky?", ("green", "blue"), ((1, 0),))
    assert found.meta == {"source": "x"}
    with pytest.raises(DataError, match="expected the keys"):
        read_comparisons(path)

    steer = {"context": ASK, "response1": "blue", "response2": "green"}
    columns = {"prompt": "context", "response_1": "response1", "response_2": "response2",
               "preference": "overall_preference"}  # fmt: skip
    rows = [{**steer, "overall_preference": p} for p in (-2, 1, 0)]
    result = read_comparisons(save(tmp_path / "steer.parquet", rows), columns=columns, on_bad_row="skip")
    assert [r.responses for r in result.rows] == [("blue", "green"), ("green", "blue")]
    assert "'preference' is 0, which is no preference" in str(result.skipped[0])

    path = save(tmp_path / "steer1.csv", [{"prompt": "Sky?", "response": "blue", "helpfulness": 4}])
    (row,) = read_scored(path, columns={"score": "helpfulness"}).rows
    assert row.meta == {"score": 4.0}


def test_a_scored_response_a_row_is_compared_with_its_neighbours(tmp_path):
    """As HelpSteer and HelpSteer2 are published: the rows of a prompt follow each other."""
    steer = [("Sky?", "blue", 4, 3), ("Sky?", "green", 1, 3), ("Sun?", "hot", 2, 1), ("Sun?", "warm", 2, 0),
             ("Sea?", "wet", 4, 4)]  # fmt: skip
    rows = [dict(zip(("prompt", "response", "helpfulness", "verbosity"), row, strict=True)) for row in steer]
    more = [{"prompt": "Ice?", "chosen": "cold", "rejected": "hot"}, {"prompt": "Fog?", "response": "x", "score": "a"},
            {"prompt": "Fog?", "response": "y", "score": 1}, {"prompt": ["no prompt"], "response": "z", "score": 1},
            {"prompt": ["no prompt"], "response": "w", "score": 2}]  # fmt: skip
    for path in (save(tmp_path / "a.parquet", rows), save(tmp_path / "b.csv", rows)):
        result = read_comparisons(path, columns={"score": "helpfulness"}, on_bad_row="skip")
        (found,) = result.rows
        assert (found.prompt, found.responses, found.pairs) == ("Sky?", ("blue", "green"), ((0, 1),))
        assert found.source == f"{path}:1" and {k: float(v) for k, v in found.meta.items()} == {"verbosity": 3.0}
        same, alone = map(str, result.skipped)
        assert same.startswith(f"{path}:3: 'ranks' are all equal") and alone.startswith(f"{path}:5: a 'response' with")
    write_jsonl(tmp_path / "c.jsonl", more)
    with (tmp_path / "c.jsonl").open("a", encoding="utf-8") as file:
        file.write("{\n" + json.dumps({"prompt": "Rain?", "response": "dry", "score": 1}) + "\n")
        file.write(json.dumps({"prompt": "Rain?", "response": "wet", "score": 2}) + "\n")
    result = read_comparisons(tmp_path / "c.jsonl", on_bad_row="skip")
    assert [(row.prompt, row.pairs) for row in result.rows] == [("Ice?", ((0, 1),)), ("Rain?", ((1, 0),))]
    assert [str(error).split(": ")[0].rpartition(":")[2] for error in result.skipped] == ["2", "4", "6"]
    assert "'score' must be a number, not a string (of" in str(result.skipped[0]) and "'prompt[0]'" in str(
        result.skipped[1]
    )


def test_scores_that_are_none_of_a_ranking(tmp_path):
    write_jsonl(tmp_path / "a.jsonl", [{"prompt": "a", "responses": ["b", "c"], "scores": [1.0, "2"]}])
    with pytest.raises(DataError, match="'scores' must be a list with one number a response"):
        read_comparisons(tmp_path / "a.jsonl")


def test_some_of_more_prompts_than_fit(tmp_path, tokenizer):
    path = tmp_path / "many.csv"
    path.write_text("prompt,task\n" + "".join(f"p{i},{'ab'[i % 2]}\n" for i in range(40)), encoding="utf-8")
    some = [[r.prompt for r in read_prompts(path, most=5, seed=seed).rows] for seed in range(400)]
    assert some[0] == [r.prompt for r in read_prompts(path, most=5, seed=0).rows] != some[1]
    assert all(len(set(s)) == 5 and s == sorted(s, key=lambda p: int(p[1:])) for s in some)
    counts = Counter(p for s in some for p in s)  # 50 each are expected, with a deviation of 6.6
    assert len(counts) == 40 and min(counts.values()) > 15 and max(counts.values()) < 90
    assert len(read_prompts(path, most=100).rows) == len(read_prompts(path).rows) == 40
    arguments = DataArguments(prompts=[str(path)], forget_tasks=["a"], eval_prompts=2, max_prompts=12)
    splits = load_prompts(arguments, tokenizer, seed=0)
    assert len(splits.train) + len(splits.main) + len(splits.forget) == 12
