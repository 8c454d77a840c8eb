"""Rehearsal on real text: the prompts by use, and what the policies of the study make of text that people wrote.

    python -m bench.studies.rehearsed_text prepare --data-dir DIR --output-dir TEXT
    stable-rlhf study recipes/study-rehearsal-text.yaml --data-dir TEXT
    python -m bench.studies.rehearsed_text run runs/study-rehearsal-text --data-dir TEXT    # so, too, ...-text-dose
    python -m bench.studies.rehearsed_text report      # the tables of docs/results/rehearsal_text.md

DIR holds pairs.jsonl.gz, prompts.jsonl.gz and gsm8k-train.jsonl.gz. Held out are solutions of school mathematics, which
PPO never sees, and preferred answers to other tasks: no policy is trained on any. A seed with lines is finished.
"""

from __future__ import annotations

import argparse
import hashlib
import math
import shutil
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import torch

from bench.case import RESULTS, Line, read_lines
from bench.common import ROOT
from bench.pages import append, markdown, rendered
from stable_rlhf.data import read_comparisons, read_demonstrations
from stable_rlhf.data.encoding import Encoded, encode
from stable_rlhf.data.jsonl import read_json, read_jsonl, write_jsonl
from stable_rlhf.data.records import DataError, Prompt
from stable_rlhf.evaluate.over_seeds import paired_difference, seed_mean
from stable_rlhf.metrics import Interval
from stable_rlhf.models.features import FeatureCache
from stable_rlhf.models.loading import load_tokenizer
from stable_rlhf.models.policy import PolicyModel
from stable_rlhf.models.views import response_span, view
from stable_rlhf.ranks import device
from stable_rlhf.run.stages import load_policy
from stable_rlhf.settings.recipe import EngineArguments

OUTPUT = RESULTS / "rehearsed-text.jsonl"
PAGE = ROOT / "docs" / "results" / "rehearsal_text.md"
FORGET = "math"  # the skill that PPO never sees
ROWS, LONGEST, BATCH = 120, 192, 8  # held-out rows a set, their tokens at most, rows a forward
TRAINED = 2  # blocks, as in the recipe
# Of each study the policies' names on the page, and which of them are compared.
NAMES = {
    "rehearsal-text": {
        "SFT": "before PPO", "rm": "RM", "rm-best": "RM, rehearsal", "am": "AM", "am-best": "AM, rehearsal",
    },
    "rehearsal-text-dose": {
        "SFT": "before PPO", "rm": "no rehearsal", "best-5": "γ 5", "best": "35 % of the gradient",
        "chance": "35 %, by chance", "kl": "no rehearsal, kl_coef 0.1",
    },
}  # fmt: skip
COMPARED = {
    "rehearsal-text": (("rm-best", "rm"), ("am-best", "am"), ("am", "rm"), ("am-best", "rm-best")),
    "rehearsal-text-dose": (("best", "rm"), ("kl", "rm"), ("best", "kl"), ("best", "best-5"), ("best", "chance")),
}
OF_TEXT = {"math": "mathematics: nats a token", "main": "other tasks: nats a token"}
OF_TRAINING = {"rise": "rise of the score"}  # from the first tenth of the steps to the last quarter
OF_SETS = {
    "rows": ("rows", 1),
    "math": ("of mathematics %", 100),
    "finished": ("finished %", 100),
    "tokens": ("tokens", 1),
}


def prepare(data: Path, folder: Path) -> None:
    """The study's files: prompts of PPO, prompts of the forget set, and what is read whole."""
    folder.mkdir(parents=True, exist_ok=True)
    prompts = read_jsonl(data / "prompts.jsonl.gz")
    write_jsonl(folder / "main_prompts.jsonl.gz", [row for row in prompts if row["skill"] != FORGET])
    write_jsonl(folder / "math_prompts.jsonl.gz", [row for row in prompts if row["skill"] == FORGET])
    for name in ("pairs.jsonl.gz", "gsm8k-train.jsonl.gz"):
        shutil.copyfile(data / name, folder / name)


def held_out(data: Path, tokenizer: object, rehearsed: set[str]) -> dict[str, list[Encoded]]:
    """Written by people: solutions to problems that were not rehearsed, and preferred answers to other tasks."""
    columns = {"prompt": "question", "response": "answer"}
    solutions = [
        (row.prompt, row.response)
        for row in read_demonstrations([data / "gsm8k-train.jsonl.gz"], columns=columns).rows
        if row.prompt not in rehearsed
    ]
    preferred = [
        (row.prompt, row.responses[row.pairs[0][0]])
        for row in read_comparisons([data / "pairs.jsonl.gz"]).rows
        if row.task != FORGET
    ]
    return {"math": some(solutions, tokenizer), "main": some(preferred, tokenizer)}


def some(texts: Sequence[tuple[Prompt, str]], tokenizer: object) -> list[Encoded]:
    """ROWS of the texts that are short enough, the same for every seed but for those left out."""
    order = sorted(texts, key=lambda text: hashlib.sha256(str(text[0]).encode()).digest())
    found: list[Encoded] = []
    for prompt, response in order:
        example = encode(tokenizer, prompt, response, source=str(prompt))
        if len(example) <= LONGEST and example.response:
            found.append(example)
        if len(found) == ROWS:
            break
    return sorted(found, key=len)


def nats_a_token(policy: PolicyModel, examples: Sequence[Encoded], cache: FeatureCache) -> float:
    """Mean negative log-likelihood of all response tokens."""
    cache.fill(policy.trunk, [e.ids for e in examples], description="hidden states")
    total, count = 0.0, 0
    for start in range(0, len(examples), BATCH):
        part = examples[start : start + BATCH]
        seen = view(policy.trunk, part, cache.get(policy.trunk, [e.ids for e in part]))
        logprob = policy(*seen)["logprob"].float().cpu()
        total -= sum(float(row[response_span(e)].sum()) for row, e in zip(logprob, part, strict=True))
        count += sum(len(e.response) for e in part)
    return total / count


def measure(seed: Path, data: Path) -> Iterator[Line]:
    """Lines of a seed: its selections, and every policy on the held-out text."""
    rehearsed: set[str] = set()
    for folder in sorted(seed.glob("selection*")):
        rows = read_jsonl(folder / "rehearsal.jsonl.gz")
        rehearsed |= {row["prompt"] for row in rows}
        yield {
            "set": folder.name.removeprefix("selection").removeprefix("-") or "am", "rows": len(rows),
            "math": sum(row["task"] == FORGET for row in rows) / len(rows),
            "finished": sum(row["finished"] for row in rows) / len(rows),
            "tokens": sum(row["length"] for row in rows) / len(rows),
        }  # fmt: skip
    tokenizer = load_tokenizer(str(seed / "initial-policy"))
    texts, cache = held_out(data, tokenizer, rehearsed), FeatureCache()
    policies = {"SFT": seed / "initial-policy"}
    policies |= {path.name.removeprefix("ppo-"): path for path in sorted(seed.glob("ppo-*"))}
    engine = EngineArguments(bf16=True)
    for name, path in policies.items():
        policy = load_policy(str(path), engine, num_trainable_layers=TRAINED).to(device()).eval()
        with torch.no_grad():
            yield {"policy": name, **{on: nats_a_token(policy, rows, cache) for on, rows in texts.items()}}


def run(study: Path, data: Path, output: Path) -> None:
    """Lines of the seeds that have none."""
    name = study.resolve().name.removeprefix("study-")
    lines = read_lines(output) if output.exists() else []
    known = {line["seed"] for line in lines if line["study"] == name}
    folders = sorted((path for path in (study / "seeds").iterdir() if path.is_dir()), key=lambda path: path.name)
    if not folders:
        raise DataError(f"{study}: no seed has begun")
    for seed in folders:
        if int(seed.name) in known or not (seed / "summary.json").exists():
            continue
        for line in list(measure(seed, data)):
            append({"study": name, "seed": int(seed.name), **line}, output)


def shown(interval: Interval, digits: int, sign: str = "", most: float = math.inf) -> str:
    """A difference where it has a sign, else a figure from 0 to `most`; of one seed without an interval."""
    value, low, high = interval["value"], interval["low"], interval["high"]
    if not sign:
        low, high = max(0.0, low), min(most, high)
    ends = "" if math.isnan(interval["low"]) else f" [{low:{sign}.{digits}f}, {high:{sign}.{digits}f}]"
    return f"{value:{sign}.{digits}f}{ends}"


Values = dict[tuple[str, str], list[float]]  # of (policy, figure), seed by seed


def figures(study: str) -> Values:
    lines = sorted((line for line in read_lines(OUTPUT) if line["study"] == study), key=lambda line: line["seed"])
    values: Values = defaultdict(list)
    for line in lines:
        for on in OF_TEXT if "policy" in line else ():
            values[line["policy"], on].append(line[on])
    rows = read_json(PAGE.parent / f"{study}.json")["policies"]
    for row in sorted(rows, key=lambda row: row["seed"]):
        trained = row["variant"] != "sft"
        rise = row["train_score_last"] - row["train_score_first"] if trained else 0.0
        values[row["variant"] if trained else "SFT", "rise"].append(rise)
    return values


def block(name: str) -> str:
    """The table of that name: `text`, `differences` or `sets`, of the doses where it begins so."""
    study = "rehearsal-text-dose" if name.startswith("dose-") else "rehearsal-text"
    lines = [line for line in read_lines(OUTPUT) if line["study"] == study]
    seeds = ", ".join(str(seed) for seed in sorted({line["seed"] for line in lines}))
    note = f"Seeds {seeds}; mean [95 % interval over the seeds]."
    if name.endswith("sets"):
        of_set: Mapping[str, list[Line]] = defaultdict(list)
        for line in lines:
            if "set" in line:
                of_set[line["set"]].append(line)
        rows = [
            [
                title,
                *(
                    shown(seed_mean([factor * line[key] for line in own]), 0, most=100.0 if factor == 100 else math.inf)
                    for key, (_, factor) in OF_SETS.items()
                ),
            ]
            for title, own in of_set.items()
        ]
        head = "rehearsed" if study.endswith("dose") else "scorer"
        return f"{markdown([head, *(heading for heading, _ in OF_SETS.values())], rows)}\n\n{note}\n"
    headings, values, names = OF_TEXT | OF_TRAINING, figures(study), NAMES[study]
    if name.endswith("text"):
        rows = [
            [names[one], *(shown(seed_mean(values[one, on]), 3, "+" if on in OF_TRAINING else "") for on in headings)]
            for one in names
        ]
        return f"{markdown(['policy', *headings.values()], rows)}\n\n{note}\n"
    pairs = [(policy, "SFT") for policy in names if policy != "SFT"] + list(COMPARED[study])
    rows = [
        [
            f"{names[one]} less {names[other]}",
            *(shown(paired_difference(values[one, on], values[other, on]), 3, "+") for on in headings),
        ]
        for one, other in pairs
    ]
    return f"{markdown(['difference', *headings.values()], rows)}\n\n{note}\n"


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    prepares = commands.add_parser("prepare", help="write the study's files")
    prepares.add_argument("--data-dir", type=Path, required=True, help="folder of the published files")
    prepares.add_argument("--output-dir", type=Path, required=True, help="folder for the study's files")
    runs = commands.add_parser("run", help="measure the policies of a study")
    runs.add_argument("study", type=Path, help="the study's folder")
    runs.add_argument("--data-dir", type=Path, required=True, help="what `prepare` wrote")
    runs.add_argument("--output", type=Path, default=OUTPUT, help="lines of each seed (%(default)s)")
    commands.add_parser("report", help=f"write the tables of {PAGE.name}")
    arguments = parser.parse_args(argv)
    if arguments.command == "prepare":
        prepare(arguments.data_dir, arguments.output_dir)
    elif arguments.command == "run":
        run(arguments.study, arguments.data_dir, arguments.output)
    else:
        PAGE.write_text(rendered(PAGE.read_text(encoding="utf-8"), "rehearsed-text", block), encoding="utf-8")


if __name__ == "__main__":
    main()
