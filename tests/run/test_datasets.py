"""From data settings to rows: where files are looked up, what is left out, and that no prompt is on two sides."""

from __future__ import annotations

import json

import pytest

from stable_rlhf.data.encoding import encode_prompt
from stable_rlhf.data.records import DataError
from stable_rlhf.run.datasets import contents, load_demonstrations, load_preferences, load_prompts, locate
from stable_rlhf.settings.recipe import DataArguments

TASKS = ("reverse", "upper", "count")


@pytest.fixture
def write(tmp_path):
    def to(name: str, rows: list[dict]) -> str:
        (tmp_path / name).write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        return name

    return to


@pytest.fixture
def settings(tmp_path):
    return lambda **given: DataArguments(**{"data_dir": str(tmp_path), "forget_tasks": ["reverse"], **given})


def prompt_rows(per_task: int = 20) -> list[dict]:
    letters = "abcdefghijklmnopqrstuvwxyz"
    return [{"prompt": f"{task} {letters[i]}{letters[i + 1]}", "task": task} for task in TASKS for i in range(per_task)]


def pair_rows(prompts: int = 40, each: int = 2) -> list[dict]:
    return [{"prompt": f"p{i}", "chosen": f"c{j}", "rejected": f"r{j}"} for j in range(each) for i in range(prompts)]


def texts(prompts) -> list[str]:
    return [p.row.prompt for p in prompts]


def test_files_are_looked_up_in_data_dir(tmp_path):
    assert locate(DataArguments(data_dir=str(tmp_path)), ["a.jsonl", "b/c.jsonl"]) == [
        tmp_path / "a.jsonl", tmp_path / "b" / "c.jsonl",
    ]  # fmt: skip
    absolute = tmp_path / "elsewhere" / "a.jsonl"
    assert locate(DataArguments(data_dir=str(tmp_path)), [str(absolute)]) == [absolute]
    assert [str(p) for p in locate(DataArguments(), ["a.jsonl"])] == ["a.jsonl"]


def test_a_missing_data_dir_or_file_is_named(tmp_path):
    missing = str(tmp_path / "nowhere")
    with pytest.raises(DataError, match=r"data\.data_dir '.*nowhere' is not a folder"):
        locate(DataArguments(data_dir=missing), ["a.jsonl"])
    with pytest.raises(DataError, match=r"data\.data_dir"):
        load_preferences(DataArguments(data_dir=missing, pairs=["a.jsonl"]), 0)
    with pytest.raises(DataError, match=r"a\.jsonl: no such file"):
        load_preferences(DataArguments(data_dir=str(tmp_path), pairs=["a.jsonl"]), 0)


def test_no_files_at_all_is_named(tokenizer):
    with pytest.raises(DataError, match=r"data\.pairs"):
        load_preferences(DataArguments(), 0)
    with pytest.raises(DataError, match=r"data\.prompts"):
        load_prompts(DataArguments(), tokenizer, 0)


def test_no_preference_prompt_stands_in_two_of_train_test_and_judge(write, settings):
    arguments = settings(pairs=[write("pairs.jsonl", pair_rows())], test_fraction=0.2, judge_fraction=0.3)
    splits = load_preferences(arguments, 0)
    parts = [splits.train, splits.test, splits.judge]
    assert [len(part) for part in parts] == [40, 16, 24]
    prompts = [{row.prompt for row in part} for part in parts]
    assert not prompts[0] & prompts[1] and not prompts[0] & prompts[2] and not prompts[1] & prompts[2]
    assert len(set.union(*prompts)) == 40
    again = load_preferences(arguments, 0)
    assert [r.prompt for r in again.train] == [r.prompt for r in splits.train]
    assert [r.prompt for r in load_preferences(arguments, 1).train] != [r.prompt for r in splits.train]


def test_without_a_judge_there_is_no_third_split(write, settings):
    splits = load_preferences(settings(pairs=[write("pairs.jsonl", pair_rows())], test_fraction=0.2), 0)
    assert splits.judge == [] and (len(splits.train), len(splits.test)) == (64, 16)


def test_the_test_pairs_do_not_depend_on_the_order_of_the_rows(write, settings):
    one = load_preferences(settings(pairs=[write("a.jsonl", pair_rows())]), 0)
    two = load_preferences(settings(pairs=[write("b.jsonl", pair_rows()[::-1])]), 0)
    assert {r.prompt for r in one.test} == {r.prompt for r in two.test}


@pytest.mark.parametrize(("most", "each"), [(30, 1), (31, 2), (100, 2)])
def test_max_pairs_is_the_most_that_is_used(write, settings, most, each):
    arguments = settings(pairs=[write("pairs.jsonl", pair_rows(40, each))], max_pairs=most, test_fraction=0.2)
    splits = load_preferences(arguments, 0)
    used = len(splits.train) + len(splits.test)
    assert used <= most and used >= min(most, 40 * each) - (each - 1)


def test_max_pairs_holds_when_every_prompt_has_several_rows(write, settings):
    arguments = settings(pairs=[write("pairs.jsonl", pair_rows(2, 20))], max_pairs=15, test_fraction=0.5)
    with pytest.raises(DataError, match=r"data\.max_pairs|data\.test_fraction"):
        load_preferences(arguments, 0)


@pytest.mark.parametrize(("test", "judge"), [(0.0, 0.2), (1.0, 0.0), (0.6, 0.4), (0.7, 0.5), (-0.1, 0.0)])
def test_impossible_fractions_are_named(write, settings, test, judge):
    arguments = settings(pairs=[write("pairs.jsonl", pair_rows())], test_fraction=test, judge_fraction=judge)
    with pytest.raises(DataError, match=r"data\.test_fraction.*data\.judge_fraction"):
        load_preferences(arguments, 0)


def test_fractions_that_leave_a_set_empty_are_named(write, settings):
    arguments = settings(pairs=[write("pairs.jsonl", pair_rows(5, 1))], test_fraction=0.01)
    with pytest.raises(DataError, match=r"data\.test_fraction"):
        load_preferences(arguments, 0)


def test_the_evaluation_sets_are_held_out_by_task(write, settings, tokenizer):
    arguments = settings(prompts=[write("prompts.jsonl", prompt_rows())], eval_prompts=7)
    splits = load_prompts(arguments, tokenizer, 0)
    assert len(splits.main) == len(splits.forget) == 7
    assert {p.row.task for p in splits.forget} == {"reverse"}
    assert {p.row.task for p in splits.main} <= {"upper", "count"}
    assert {p.row.task for p in splits.train} == set(TASKS)
    everything = texts(splits.train) + texts(splits.main) + texts(splits.forget)
    assert sorted(everything) == sorted(row["prompt"] for row in prompt_rows())
    assert splits.main[0].ids == encode_prompt(tokenizer, splits.main[0].row.prompt)


def test_at_most_half_of_the_prompts_is_held_out(write, settings, tokenizer):
    arguments = settings(prompts=[write("prompts.jsonl", prompt_rows(6))], eval_prompts=1000)
    splits = load_prompts(arguments, tokenizer, 0)
    assert (len(splits.main), len(splits.forget), len(splits.train)) == (6, 3, 9)


def test_given_evaluation_files_are_taken_as_they_are(write, settings, tokenizer):
    rows = prompt_rows()
    arguments = settings(
        prompts=[write("p.jsonl", rows[:30])], eval_main=[write("m.jsonl", rows[30:35])],
        eval_forget=[write("f.jsonl", rows[35:38])], forget_tasks=[],
    )  # fmt: skip
    splits = load_prompts(arguments, tokenizer, 0)
    assert texts(splits.main) == [r["prompt"] for r in rows[30:35]]
    assert texts(splits.forget) == [r["prompt"] for r in rows[35:38]]
    assert len(splits.train) == 30


def test_what_must_not_be_forgotten_may_have_files_of_its_own(write, settings, tokenizer):
    """PPO is trained on none of it; what is not held out may be rehearsed."""
    rows = prompt_rows()
    forget = write("forget.jsonl", [{k: v for k, v in row.items() if k != "task"} for row in rows[20:]])
    arguments = settings(
        prompts=[write("p.jsonl", rows[:24])], forget_prompts=[forget], forget_tasks=[], eval_prompts=5
    )  # fmt: skip
    splits = load_prompts(arguments, tokenizer, 0)
    ours, apart = ({row["prompt"] for row in part} for part in (rows[:24], rows[24:]))
    assert (len(splits.main), len(splits.forget)) == (5, 5)
    assert set(texts(splits.train)) | set(texts(splits.main)) == ours
    assert set(texts(splits.rehearsal)) | set(texts(splits.forget)) == apart
    assert len(splits.train) + len(splits.main) + len(splits.forget) + len(splits.rehearsal) == len(rows)
    arguments.max_prompts_per_task = 4
    capped = load_prompts(arguments, tokenizer, 0)
    assert len(capped.rehearsal) == 4 and texts(capped.forget) == texts(splits.forget)
    for name in ("eval_forget", "forget_tasks"):
        both = settings(**{"prompts": ["p.jsonl"], "forget_prompts": [forget], "forget_tasks": [], name: ["p.jsonl"]})
        with pytest.raises(DataError, match=rf"data\.forget_prompts and data\.{name} both"):
            load_prompts(both, tokenizer, 0)
    with pytest.raises(DataError, match=r"data\.forget_prompts: only one prompt"):  # all are trained on
        load_prompts(settings(prompts=["p.jsonl"], forget_prompts=["p.jsonl"], forget_tasks=[]), tokenizer, 0)


@pytest.mark.parametrize("given", ["eval_main", "eval_forget"])
def test_one_evaluation_file_without_the_other_is_an_error(write, settings, tokenizer, given):
    name = write("p.jsonl", prompt_rows())
    with pytest.raises(DataError, match=r"data\.eval_main and data\.eval_forget"):
        load_prompts(settings(prompts=[name], **{given: [name]}), tokenizer, 0)


@pytest.mark.parametrize(
    ("tasks", "named"),
    [([], r"\[\]"), (["poetry"], "'poetry'"), (["reverse", "poetry"], "'poetry'"), (list(TASKS), "'upper'")],
)
def test_forget_tasks_that_do_not_divide_the_data_are_named(write, settings, tokenizer, tasks, named):
    arguments = settings(prompts=[write("p.jsonl", prompt_rows())], forget_tasks=tasks)
    with pytest.raises(DataError, match=rf"data\.forget_tasks.*{named}"):
        load_prompts(arguments, tokenizer, 0)


def test_a_task_with_too_few_prompts_to_hold_one_out_is_named(write, settings, tokenizer):
    rows = [*prompt_rows(), {"prompt": "poem", "task": "poetry"}]
    arguments = settings(prompts=[write("p.jsonl", rows)], forget_tasks=["poetry"])
    with pytest.raises(DataError, match=r"data\.forget_tasks"):
        load_prompts(arguments, tokenizer, 0)


def test_training_prompts_of_each_task_are_capped(write, settings, tokenizer):
    name = write("p.jsonl", prompt_rows())
    full = load_prompts(settings(prompts=[name], eval_prompts=3), tokenizer, 0)
    capped = load_prompts(settings(prompts=[name], eval_prompts=3, max_prompts_per_task=5), tokenizer, 0)
    assert [sum(p.row.task == t for p in capped.train) for t in TASKS] == [5, 5, 5]
    assert set(texts(capped.train)) < set(texts(full.train))
    assert texts(capped.main) == texts(full.main) and texts(capped.forget) == texts(full.forget)
    loose = load_prompts(settings(prompts=[name], eval_prompts=3, max_prompts_per_task=500), tokenizer, 0)
    assert sorted(texts(loose.train)) == sorted(texts(full.train))


def test_the_cap_holds_for_repeated_prompts(write, settings, tokenizer):
    rows = [*prompt_rows(), *[{"prompt": "poem", "task": "poetry"}] * 3]
    arguments = settings(prompts=[write("p.jsonl", rows)], eval_prompts=1, max_prompts_per_task=1)
    splits = load_prompts(arguments, tokenizer, 0)
    assert sum(p.row.task == "poetry" for p in [*splits.train, *splits.main]) <= 3
    assert max(sum(p.row.task == t for p in splits.train) for t in (*TASKS, "poetry")) == 1


def test_prompts_that_are_too_long_are_left_out_and_counted(write, settings, tokenizer, capsys):
    rows = [*prompt_rows(), {"prompt": "z" * 30, "task": "upper"}, {"prompt": "y" * 31, "task": "count"}]
    arguments = settings(prompts=[write("p.jsonl", rows)], max_prompt_length=31)
    splits = load_prompts(arguments, tokenizer, 0)
    everything = texts(splits.train) + texts(splits.main) + texts(splits.forget)
    assert sorted(everything) == sorted(r["prompt"] for r in prompt_rows())
    assert "2 of 62 prompts have over 31 tokens: left out" in capsys.readouterr().err
    with pytest.raises(DataError, match="none of 62 prompts fits max_prompt_length 2"):
        load_prompts(settings(prompts=[arguments.prompts[0]], max_prompt_length=2), tokenizer, 0)


def test_demonstrations_that_are_too_long_are_left_out_and_counted(write, settings, tokenizer, capsys):
    rows = [
        {"prompt": "ab", "response": "ba"},
        {"prompt": "a" * 20, "response": "b"},
        {"prompt": "a", "response": "b" * 40},
    ]
    name = write("sft.jsonl", rows)
    encoded, kept = load_demonstrations(settings(max_prompt_length=8, max_length=16), [name], tokenizer)
    assert [r.response for r in kept] == ["ba"]
    assert encoded[0].ids[-1] == tokenizer.eos_token_id and len(encoded) == 1
    assert "2 of 3 demonstrations are too long: left out" in capsys.readouterr().err
    both, _ = load_demonstrations(settings(), [name], tokenizer)
    assert len(both) == 3 and capsys.readouterr().err == ""
    for limits, named in [({"max_length": 3}, "max_length 3"), ({"max_prompt_length": 2}, "max_prompt_length 2")]:
        with pytest.raises(DataError, match=f"none of 3 demonstrations fits .*{named}"):
            load_demonstrations(settings(**limits), [name], tokenizer)


def test_bad_rows_are_skipped_and_counted_only_when_asked(write, settings, capsys):
    rows = [*pair_rows(), {"prompt": "p", "chosen": "same", "rejected": "same"}]
    name = write("pairs.jsonl", rows)
    with pytest.raises(DataError, match=r"pairs\.jsonl:81"):
        load_preferences(settings(pairs=[name]), 0)
    splits = load_preferences(settings(pairs=[name], on_bad_row="skip"), 0)
    assert len(splits.train) + len(splits.test) == 80
    assert "1 bad rows left out" in capsys.readouterr().err


def test_evaluation_prompts_never_train(tmp_path, tokenizer, capsys):
    rows = [{"prompt": f"Reverse: {'abc'[i % 3] * (1 + i // 3)}", "task": "t"} for i in range(12)]
    for name, part in (("all", rows), ("main", rows[:3]), ("forget", rows[3:5])):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(r) + "\n" for r in part), encoding="utf-8")
    files = {"prompts": ["all.jsonl"], "eval_main": ["main.jsonl"], "eval_forget": ["forget.jsonl"]}
    splits = load_prompts(DataArguments(data_dir=str(tmp_path), **files), tokenizer, 0)
    assert {p.row.prompt for p in splits.train} == {r["prompt"] for r in rows[5:]}
    assert "5 of 12 training prompts are in an evaluation set too" in capsys.readouterr().err


def test_a_changed_file_has_another_digest(tmp_path):
    (tmp_path / "a.jsonl").write_text("{}\n", encoding="utf-8")
    arguments = DataArguments(data_dir=str(tmp_path), pairs=["a.jsonl"], prompts=["missing.jsonl"])
    first = contents(arguments)
    assert list(first) == ["a.jsonl"] and contents(arguments) == first
    (tmp_path / "a.jsonl").write_text("{ }\n", encoding="utf-8")
    assert contents(arguments) != first


def test_demonstrations_that_were_cut_off_are_rehearsed_without_an_end(write, settings, tokenizer, monkeypatch):
    from types import SimpleNamespace

    from stable_rlhf.run import stages
    from stable_rlhf.run.datasets import encode_demonstrations
    from stable_rlhf.settings.recipe import Recipe

    rows = [{"prompt": "ab", "response": "ba", "finished": False}, {"prompt": "cd", "response": "dc"}]
    name = write("sft.jsonl", rows)
    monkeypatch.setattr(stages, "check_scorer_folder", lambda folder: folder)
    monkeypatch.setattr(stages, "load_config", lambda folder: SimpleNamespace(max_position_embeddings=64))
    recipe = Recipe(data=settings(demonstrations=[name]))
    _, candidates = stages._demonstrations(recipe, None, tokenizer, "scorer")
    assert [row["finished"] for row in candidates] == [False, True]
    chosen = write("rehearsal.jsonl", candidates)
    read = stages.read_demonstrations(stages.locate(settings(), [chosen])[0])
    ends = [e.ids[-1] == tokenizer.eos_token_id for e, _ in encode_demonstrations(read.rows, tokenizer)]
    assert ends == [False, True]
