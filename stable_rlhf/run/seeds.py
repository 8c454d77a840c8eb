"""Variants x seeds: one whole run a seed, several at a time, and one comparison of them all.

Every seed is an ordinary run in a folder of its own, so a study that was killed goes on like a run does: finished
stages are not redone, an unfinished one goes on from its last snapshot. Seeds run in processes of their own; they end
when the study's process ends, however it ends, so that the next call finds no other at work in its folders.
"""

from __future__ import annotations

import multiprocessing
import os
import threading
import time
from collections.abc import Mapping
from dataclasses import replace
from multiprocessing import connection
from pathlib import Path
from typing import Any

from stable_rlhf.data.digest import json_digest
from stable_rlhf.data.jsonl import read_json, to_json
from stable_rlhf.data.records import DataError
from stable_rlhf.engine import signals
from stable_rlhf.engine.run_folder import RunDirectory
from stable_rlhf.run.circumstances import circumstances
from stable_rlhf.run.recipe import check_inputs, run_recipe
from stable_rlhf.run.summary import write_pictures
from stable_rlhf.settings.recipe import Recipe
from stable_rlhf.show.page import write_html
from stable_rlhf.show.progress import say, tolerant_output

_NOT_A_SETTING = ("title", "output_dir", "seed", "report_to", "checkpoint", "launch", "study")
_REAP = 15.0  # seconds that a study waits for its seeds' processes after the last one should have ended
_LOG_TAIL = 3  # lines of a failed seed's log in the error


def run_study(recipe: Recipe, *, validation: bool = False) -> str:
    """Run (or finish) every seed of the study and write ``results.json``, ``results.md``, ``report.html`` and
    ``pictures/`` to ``recipe.output_dir``, or to its ``validation`` folder; returns the tables as Markdown.

    Raises:
        ValueError: settings that no run can use, a seed that failed, or a launcher around this process.
    """
    from stable_rlhf.evaluate.over_seeds import results
    from stable_rlhf.evaluate.over_seeds_report import make_page, markdown

    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise ValueError("study starts processes of its own (--study.workers): run it without a launcher")
    seeds = recipe.study.validation_seeds if validation else recipe.study.seeds
    if not seeds:
        raise ValueError(f"study.{'validation_seeds' if validation else 'seeds'}: name at least one")
    root = Path(recipe.output_dir)
    run = RunDirectory(root) if root.exists() else None  # of something else, or of a study at work: refused
    check_inputs(recipe)
    run = run or RunDirectory(root)
    folder = root / "validation" if validation else root
    (folder / "seeds").mkdir(parents=True, exist_ok=True)
    _run_seeds({seed: _of_seed(recipe, seed, folder / "seeds" / str(seed)) for seed in seeds}, recipe.study.workers)

    summaries = [read_json(folder / "seeds" / str(seed) / "summary.json") for seed in seeds]
    settings = {name: value for name, value in recipe.as_dict().items() if name not in _NOT_A_SETTING}
    # Which variants run says nothing of the settings each of them has: a validation may do with two.
    shared = {name: value for name, value in settings.items() if name not in ("variants", "variations")}
    fingerprint = json_digest(shared)
    every = [part for summary in summaries for part in summary["policies"].values()]
    study = results(
        summaries,
        {
            "title": recipe.title,
            "kind": "validation" if validation else "reported",
            "seeds": seeds,
            "compare": recipe.study.compare,
            "validation": None if validation else _validation(root, fingerprint, recipe.variations),
            "fingerprint": fingerprint,
            "judges": sorted({part[on]["judge"] for part in every for on in ("main", "forget")}),
            "hours": round(sum(stage["seconds"] for s in summaries for stage in s["stages"]) / 3600, 3),
            **circumstances(),
            "settings": settings,
        },
    )  # fmt: skip
    page, pictures = make_page(study)
    text = markdown(study)
    with signals.whole():
        (folder / "results.json").write_text(to_json(study, indent=1) + "\n", encoding="utf-8")
        (folder / "results.md").write_text(text, encoding="utf-8")
        write_html(folder / "report.html", page)
        write_pictures(pictures, folder / "pictures")
    say(f"report: {folder / 'report.html'}")
    return text


def _validation(root: Path, fingerprint: str, variations: Mapping[str, Any]) -> dict[str, Any] | None:
    """What is known of the validation seeds, and whether they had the settings that are reported now."""
    path = root / "validation" / "results.json"
    if not path.is_file():
        return None
    validation = read_json(path, "seeds", "settings", "fingerprint")
    if not isinstance(validation["settings"], dict) or not isinstance(validation["seeds"], list):
        raise DataError(f"{path}: damaged; run `study --validation` again, or delete it")
    tried = validation["settings"].get("variations", {})
    return {
        "seeds": validation["seeds"], "variants": [*validation["settings"].get("variants", []), *tried],
        "same_settings": validation["fingerprint"] == fingerprint
        and all(tried.get(name) == own for name, own in variations.items()),
    }  # fmt: skip


def _of_seed(recipe: Recipe, seed: int, folder: Path) -> Recipe:
    return replace(recipe, seed=seed, output_dir=str(folder), title=f"{recipe.title}, seed {seed}")


def _run_seeds(recipes: Mapping[int, Recipe], workers: int) -> None:
    """Run every recipe in a process of its own, ``workers`` at a time; one that fails does not stop the others."""
    if "OMP_NUM_THREADS" not in os.environ:
        # The skill world's models are too small for two threads; a larger model gets its share of the cores.
        first = next(iter(recipes.values()))
        share = max(1, (os.cpu_count() or 1) // workers)
        os.environ["OMP_NUM_THREADS"] = "1" if first.model_name_or_path is None else str(share)
    spawn = multiprocessing.get_context("spawn")  # a fork of a process that has loaded torch may hang
    waiting = list(recipes.items())
    running: dict[int, tuple[int, Any, Path, float]] = {}  # by what the operating system signals the end with
    failed: dict[int, str] = {}
    done = 0
    # A signal that ends the study ends the seeds too, each after its step.
    grace = max(recipe.checkpoint.grace_seconds for recipe in recipes.values())
    signals.set_limits(grace + _REAP, unwind=grace + _REAP)
    try:
        while waiting or running:
            while waiting and len(running) < workers:
                seed, recipe = waiting.pop(0)
                log = Path(recipe.output_dir).with_suffix(".log")
                process = spawn.Process(target=_run_seed, args=(recipe, str(log)), name=f"seed {seed}")
                process.start()
                running[process.sentinel] = (seed, process, log, time.monotonic())
                say(f"[seed {seed}] started, its log is {log}")
            for sentinel in connection.wait(list(running)):
                assert isinstance(sentinel, int)
                seed, process, log, began = running.pop(sentinel)
                process.join()
                done += 1
                minutes = (time.monotonic() - began) / 60
                if process.exitcode:
                    failed[seed] = f"exit status {process.exitcode}: {_tail(log)} (log: {log})"
                say(
                    f"[seed {seed}] {'FAILED' if process.exitcode else 'done'} after {minutes:.1f} minutes, "
                    f"{done} of {len(recipes)} seeds"
                )
    finally:
        for _, process, _, _ in running.values():
            process.terminate()
        for _, process, _, _ in running.values():
            process.join()
    if failed:
        words = "; ".join(f"seed {seed}, {reason}" for seed, reason in failed.items())
        raise ValueError(f"{len(failed)} of {len(recipes)} seeds failed, the others are kept: {words}")


def _run_seed(recipe: Recipe, log: str) -> None:
    """The whole life of a seed's process: its output goes to the log, and it ends with the study's process."""
    parent = multiprocessing.parent_process()
    assert parent is not None

    def end_with_parent() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=end_with_parent, daemon=True).start()
    output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    os.dup2(output, 1)
    os.dup2(output, 2)
    tolerant_output()
    with signals.ended_by_one_line(recipe.checkpoint.grace_seconds):
        run_recipe(recipe)


def _tail(log: Path) -> str:
    text = log.read_text(encoding="utf-8", errors="replace") if log.is_file() else "it said nothing"
    lines = [line for line in text.splitlines() if line.strip()]
    return " / ".join(lines[-_LOG_TAIL:])
