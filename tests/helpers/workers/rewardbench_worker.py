"""The rewardbench package's own figures of a file and scores: `rewardbench_worker BENCHMARK ROWS SCORES`.

Its functions run as they are. What they do not use, fastchat's conversations and a registry of models whose libraries
are not installed, is an empty module here.
"""

from __future__ import annotations

import importlib.util
import json
import sys
import types
from importlib import metadata
from pathlib import Path
from typing import Any


def package() -> tuple[Any, Any]:
    """Its modules `constants` and `utils`."""
    assert metadata.version("rewardbench") == "0.1.4"
    root = Path(str(metadata.distribution("rewardbench").locate_file("rewardbench")))
    for name, attribute in (("fastchat.conversation", "Conversation"), ("rewardbench.models", "REWARD_MODEL_CONFIG")):
        module = types.ModuleType(name)
        setattr(module, attribute, dict)
        sys.modules[name.split(".")[0]] = types.ModuleType(name.split(".")[0])
        sys.modules[name] = module
    modules = []
    for name in ("constants", "utils"):
        spec = importlib.util.spec_from_file_location(f"rewardbench_{name}", root / f"{name}.py")
        assert spec and spec.loader
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        modules.append(module)
    return modules[0], modules[1]


def main(benchmark: str, rows: list[dict[str, Any]], scores: list[list[float]]) -> dict[str, Any]:
    from datasets import Dataset

    constants, utils = package()
    names = sorted({row["subset"] for row in rows})
    if benchmark == "rewardbench":  # scripts/run_rm.py
        results = [1 if chosen > rejected else 0 for chosen, rejected in scores]
        of = {name: [r for r, row in zip(results, rows, strict=True) if row["subset"] == name] for name in names}
        subsets = {name: sum(part) / len(part) for name, part in of.items()}
        found = utils.calculate_scores_per_section(constants.EXAMPLE_COUNTS, constants.SUBSET_MAPPING, subsets)
        here = {s for s, tests in constants.SUBSET_MAPPING.items() if set(tests) & subsets.keys()}
        return {"subsets": subsets, "sections": {s: v if s in here else None for s, v in found.items()}}
    flat = [
        {"text": "", "scores": score, "subset": row["subset"], "id": row["id"]}
        for row, own in zip(rows, scores, strict=True)
        for score in own
    ]
    # scripts/run_v2.py
    out = utils.reroll_and_score_dataset(Dataset.from_list(flat), [row["total_completions"] for row in rows])
    out = out.add_column("num_correct", [row["num_correct"] for row in rows])
    subsets = {}
    for name in names:
        part = out.filter(lambda example, name=name: example["subset"] == name)
        if name.lower() == "ties":
            subsets[name] = float(utils.process_single_model(part)[1])
        else:
            subsets[name] = sum(part["results"]) / len(part["results"])
    return {"subsets": subsets}


if __name__ == "__main__":
    _, benchmark, rows, scores = sys.argv
    lines = Path(rows).read_text(encoding="utf-8").splitlines()
    print(json.dumps(main(benchmark, list(map(json.loads, lines)), json.loads(Path(scores).read_text("utf-8")))))
