"""Rehearsal selection beside faiss and scikit-learn, from disk at ten million rows, and on real prompts.

    python -m bench.studies.selection speed    # 64,364 x 768, c 100 and 1,000, 20 iterations: clustering and selecting
    python -m bench.studies.selection disk     # 1, 3 and 10 million x 384 float16 from a memory map: time and memory
    python -m bench.studies.selection purity --prompts prompts.jsonl.gz   # labelled skills against random clusters
    python -m bench.studies.selection threads  # one seed on 1 and 2 threads

Times are wall seconds and the process's CPU seconds: on a machine that others use too, the second is the quieter one.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import shutil
import statistics
import tempfile
import threading
import time
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from bench.case import OURS, RESULTS
from bench.clustering import faiss_kmeans, mixture, sklearn_kmeans
from bench.common import environment, new_result, resident_mib, write_json

ROWS, WIDTH = 64_364, 768  # the prompts of arXiv 2309.10202, and the width of its encoder
ITERATIONS, TOP_K = 20, 16


def timed(step: Any) -> tuple[float, float, Any]:
    wall, cpu = time.perf_counter(), time.process_time()
    result = step()
    return time.perf_counter() - wall, time.process_time() - cpu, result


def select(x: np.ndarray, value: np.ndarray, c: int, seed: int, init: str, **options: Any) -> tuple[float, np.ndarray]:
    """The package's whole path: inertia, and the rows that are kept."""
    from stable_rlhf.rehearsal import choose, cluster_embeddings

    clusters = cluster_embeddings(x, c, niter=ITERATIONS, seed=seed, init=init, **options)
    return clusters.inertia, choose(value, clusters.assignment, c, TOP_K).indices


def speed(rounds: int, counts: list[int]) -> dict[str, Any]:
    """Ours clusters, checks, reports inertia and selects; the peers, begun at random rows, only cluster and assign."""
    x = mixture(ROWS, WIDTH)
    value = np.random.default_rng(1).normal(size=ROWS)
    cases = []
    for c in counts:
        steps = {
            OURS: lambda s, c=c: select(x, value, c, s, "kmeans++")[0],
            f"{OURS}, random start": lambda s, c=c: select(x, value, c, s, "random")[0],
            "faiss": lambda s, c=c: faiss_kmeans(x, c, ITERATIONS, s),
            "scikit-learn": lambda s, c=c: sklearn_kmeans(x, c, ITERATIONS, s),
        }
        samples: dict[str, list[tuple[float, float, float]]] = {name: [] for name in steps}
        for number in range(rounds):
            names = list(steps)
            for name in names[number % 4 :] + names[: number % 4]:
                wall, cpu, inertia = timed(partial(steps[name], number))
                samples[name].append((wall, cpu, inertia))
                print(f"c {c} {name}: {wall:.2f} s wall, {cpu:.2f} s cpu, inertia {inertia:.1f}", flush=True)
        rows: dict[str, dict[str, Any]] = {
            name: {
                "wall_s": statistics.median(s[0] for s in runs), "cpu_s": statistics.median(s[1] for s in runs),
                "wall_min_s": min(s[0] for s in runs), "inertia": statistics.mean(s[2] for s in runs),
                "samples": runs,
            }
            for name, runs in samples.items()
        }  # fmt: skip
        peers = [rows[name] for name in ("faiss", "scikit-learn")]
        for row in rows.values():
            for key in ("wall_s", "cpu_s", "wall_min_s"):
                row[f"{key}_over_better_peer"] = row[key] / min(peer[key] for peer in peers)
            row["inertia_over_better_peer"] = row["inertia"] / min(peer["inertia"] for peer in peers)
        cases.append({"clusters": c, "rows": ROWS, "width": WIDTH, "iterations": ITERATIONS, "results": rows})
    return {"cases": cases}


# -- from disk ---------------------------------------------------------------------------------------------------------


def write_rows(path: Path, n: int, width: int) -> None:
    block = 100_000
    out = np.lib.format.open_memmap(path, mode="w+", dtype=np.float16, shape=(n, width))
    for start in range(0, n, block):
        out[start : start + block] = mixture(min(block, n - start), width, groups=500, start=start)
        out.flush()
        print(f"written {min(start + block, n):,} of {n:,} rows", flush=True)


def disk_child(path: str, n: int, c: int, train_rows: int, reply: Any) -> None:
    from stable_rlhf.rehearsal import choose, cluster_embeddings

    x = np.load(path, mmap_mode="r")[:n]
    value = np.random.default_rng(1).normal(size=n)
    # Memory that is not pages of mapped files.
    peak, before, running = [0.0], resident_mib("RssAnon"), [True]

    def watch() -> None:
        while running[0]:
            peak[0] = max(peak[0], resident_mib("RssAnon"))
            time.sleep(0.01)

    watcher = threading.Thread(target=watch)
    watcher.start()
    wall, cpu, clusters = timed(lambda: cluster_embeddings(x, c, niter=ITERATIONS, train_rows=train_rows))
    more_wall, more_cpu, kept = timed(lambda: choose(value, clusters.assignment, c, TOP_K))
    running[0] = False
    watcher.join()
    reply.put({
        "rows": n, "clusters": c, "trained_on": clusters.trained_on, "wall_s": wall + more_wall,
        "cpu_s": cpu + more_cpu, "select_wall_s": more_wall, "peak_mib": peak[0], "before_mib": before,
        "kept": len(kept.indices), "notes": list(clusters.notes),
    })  # fmt: skip


def disk(sizes: list[int], folder: str | None, c: int, train_rows: int) -> dict[str, Any]:
    width, top = 384, max(sizes)
    where = Path(tempfile.mkdtemp(dir=folder))
    free = shutil.disk_usage(where).free
    if free < 2.2 * top * width:
        raise SystemExit(f"{top:,} rows need {2.2 * top * width / 1e9:.1f} GB, {free / 1e9:.1f} are free")
    context = multiprocessing.get_context("spawn")
    cases = []
    try:
        write_rows(where / "rows.npy", top, width)
        for n in sizes:
            reply = context.Queue()
            child = context.Process(target=disk_child, args=(str(where / "rows.npy"), n, c, train_rows, reply))
            child.start()
            cases.append(reply.get())
            child.join()
            print(json.dumps(cases[-1]), flush=True)
    finally:
        shutil.rmtree(where)
    return {"width": width, "dtype": "float16", "cases": cases}


# -- real prompts, and threads -----------------------------------------------------------------------------------------


def purity(prompts: Path, model: str, embeddings: str | None) -> dict[str, Any]:
    from stable_rlhf.data import read_prompts
    from stable_rlhf.rehearsal import cluster_embeddings, embed_to_folder, prompt_text, skill_purity

    rows = read_prompts(prompts).rows
    skills = np.array([str(row.task) for row in rows])
    folder = Path(embeddings or tempfile.mkdtemp())
    # Raw states once; unit rows are those, scaled.
    raw = embed_to_folder([prompt_text(row.prompt) for row in rows], folder, model, normalize=False).array
    unit = raw / np.linalg.norm(raw, axis=1, keepdims=True)
    largest = np.unique(skills, return_counts=True)
    rest = skills != largest[0][largest[1].argmax()]
    cases = []
    for part, places, counts in (("all prompts", np.arange(len(rows)), (16, 100, 400)),
                                 ("without the largest skill", np.flatnonzero(rest), (16, 40, 80))):  # fmt: skip
        for c in counts:
            for name, x in (("unit length", unit), ("as they are", raw)):
                clusters = cluster_embeddings(np.ascontiguousarray(x[places]), c)
                row = skill_purity(clusters.assignment, skills[places].tolist())
                cases.append({"part": part, "rows": len(places), "skills": len(set(skills[places])),
                              "clusters": c, "rows_are": name, **row})  # fmt: skip
                print(cases[-1], flush=True)
    return {"model": model, "cases": cases}


def threads() -> dict[str, Any]:
    x = mixture(20_000, WIDTH)
    value = np.random.default_rng(1).normal(size=len(x))
    cases = []
    for c, spherical in ((100, False), (1000, False), (100, True)):
        runs = [select(x, value, c, 7, "kmeans++", threads=t, spherical=spherical) for t in (1, 2, 2)]
        same = all(np.array_equal(runs[0][1], other[1]) and runs[0][0] == other[0] for other in runs[1:])
        cases.append({"clusters": c, "spherical": spherical, "same_inertia_and_selection": same})
        print(cases[-1], flush=True)
    return {"rows": len(x), "threads": [1, 2, 2], "cases": cases}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["speed", "disk", "purity", "threads"])
    parser.add_argument("--rounds", type=int, default=3, help="speed: times each, in turns")
    parser.add_argument("--clusters", type=int, nargs="+", default=[100, 1000], help="speed: numbers of clusters")
    parser.add_argument("--sizes", type=int, nargs="+", default=[1_000_000, 3_000_000, 10_000_000], help="disk: rows")
    parser.add_argument("--disk-clusters", type=int, default=100)
    parser.add_argument("--train-rows", type=int, default=200_000, help="disk: rows that k-means trains on")
    parser.add_argument("--folder", help="disk: where 0.77 GB a million rows fit (default: the system's temporary one)")
    parser.add_argument("--prompts", type=Path, help="purity: JSON lines with prompt and skill")
    parser.add_argument("--model", default="minilm", help="purity: encoder")
    parser.add_argument("--embeddings", help="purity: folder to keep the embeddings in")
    a = parser.parse_args()
    if a.what == "speed":
        result = speed(a.rounds, a.clusters)
    elif a.what == "disk":
        result = disk(a.sizes, a.folder, a.disk_clusters, a.train_rows)
    elif a.what == "purity":
        if a.prompts is None:
            parser.error("purity needs --prompts FILE")
        result = purity(a.prompts, a.model, a.embeddings)
    else:
        result = threads()
    record = {"what": f"selection-{a.what}", "environment": environment(torch.device("cpu")), **result}
    path = new_result(RESULTS, f"selection-{a.what}")
    write_json(record, path)
    print(f"written: {path}")


if __name__ == "__main__":
    main()
