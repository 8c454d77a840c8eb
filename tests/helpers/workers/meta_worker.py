"""MetaRM's two steps under each ZeRO stage, beside an explicit version in plain autograd; rank 0 writes what differs.

Run by test_metarm_training.py under one and two ranks. Arguments: output file, micro-batch per rank, ZeRO stages.
"""

from __future__ import annotations

import json
import sys
import tempfile
from pathlib import Path

import torch
from safetensors import safe_open
from torch import nn
from torch.func import functional_call

from helpers.tiny_model import redraw
from stable_rlhf.data.encoding import encode
from stable_rlhf.data.records import Comparison
from stable_rlhf.engine.engine import Engine, Schedule
from stable_rlhf.engine.order import micro_steps, shuffled_steps, stream_seed
from stable_rlhf.engine.process import finish, start
from stable_rlhf.engine.weights import gathered
from stable_rlhf.models.features import FeatureCache
from stable_rlhf.ranks import barrier, gather_objects, rank, sum_over_ranks, world_size
from stable_rlhf.scorer import AdvantageModel, ScorerSettings
from stable_rlhf.scorer.comparisons import EncodedComparison
from stable_rlhf.scorer.metarm import MetaRM
from stable_rlhf.scorer.train import scorer_loss
from stable_rlhf.settings.recipe import EngineArguments
from stable_rlhf.settings.stages import ScorerArguments
from stable_rlhf.world import build_model, build_tokenizer

STEPS, ACCUMULATION, RATE, ETA, BATCH = 4, 2, 1e-4, 0.5, 4
DRAWS = 10


def data(tokenizer):
    generator = torch.Generator().manual_seed(2)

    def text() -> str:
        length = int(torch.randint(1, 7, (1,), generator=generator))
        return "".join("abcdefgh"[i] for i in torch.randint(8, (length,), generator=generator).tolist())

    rows, shifted = [], []
    for i in range(20):
        prompt = f"Reverse the letters of {text()}"
        row = Comparison(prompt, (f"{text()}0", f"{text()}1"), ((0, 1),))
        rows.append(EncodedComparison(row, [encode(tokenizer, prompt, r) for r in row.responses]))
        shifted.append([encode(tokenizer, f"Write backwards: {text()}", text()) for _ in range(2 + i % 3)])
    return rows, shifted


def scorer(tokenizer) -> AdvantageModel:
    model = build_model(tokenizer, hidden_size=64, num_hidden_layers=2, num_attention_heads=2, seed=0)
    generator = torch.Generator().manual_seed(1)
    redraw(model, 0.15, generator)
    with torch.no_grad():
        # More weights than ZeRO-3 leaves whole on every rank.
        mlp = model.base_model.layers[0].mlp
        mlp.gate_proj, mlp.up_proj = (nn.Linear(64, 1603, bias=False) for _ in "ab")
        mlp.down_proj = nn.Linear(1603, 64, bias=False)
        for layer in (mlp.gate_proj, mlp.up_proj, mlp.down_proj):
            layer.weight.copy_(0.05 * torch.randn(layer.weight.shape, generator=generator))
    return AdvantageModel(model.base_model, tokenizer, ScorerSettings(objective="am"))


def two_steps(model, rows, shifted, indices, others, global_batch: int):
    """Loss at the moved weights and its gradient, J, and the moved weights, in plain autograd."""
    names, weights = zip(*model.named_parameters(), strict=True)
    objective = torch.zeros(())
    for i in others:
        k = len(shifted[i])
        reward = torch.cat([model(*model.prepare([e]))[0] for e in shifted[i]]).float()
        for first in range(k):
            for second in range(first + 1, k):
                objective = objective + 2 / k**2 * torch.sigmoid((reward[first] - reward[second]).abs()) / BATCH
    gradient = torch.autograd.grad(objective, weights, allow_unused=True)
    moved = {
        name: (w if g is None else w.float() + ETA * g.float()).to(w.dtype).detach().requires_grad_()
        for name, w, g in zip(names, weights, gradient, strict=True)
    }
    loss, *_ = scorer_loss(
        lambda *a: functional_call(model, moved, a), model, [rows[i] for i in indices],
        ScorerArguments(), None, global_batch,
    )  # fmt: skip
    found = torch.autograd.grad(loss, list(moved.values()))
    return [float(loss.detach()), float(objective.detach())], found, [w.detach() for w in moved.values()]


def explicit(tokenizer, rows, shifted, global_batch: int):
    """Loss and J of each step; the weights before each, moved in each, and at the end; Adam's mean gradient there."""
    model = scorer(tokenizer)
    weights = list(model.parameters())
    optimizer = torch.optim.AdamW(weights, lr=RATE, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.0)
    figures, kept = [], []
    for indices, others in steps(rows, shifted, global_batch):
        figure, gradient, moved = two_steps(model, rows, shifted, indices, others, global_batch)
        kept += [[w.detach().clone() for w in weights], [w.clone() for w in moved]]
        for weight, found in zip(weights, gradient, strict=True):
            weight.grad = found
        nn.utils.clip_grad_norm_(weights, 1.0)
        optimizer.step()
        figures.append(figure)
    kept.append([w.detach().clone() for w in weights])
    return figures, kept, [optimizer.state[w]["exp_avg"].flatten() for w in weights]


def steps(rows, shifted, global_batch: int):
    batches = shuffled_steps(len(shifted), BATCH, STEPS, stream_seed(5, "meta"))
    return zip(shuffled_steps(len(rows), global_batch, STEPS, seed=3), batches, strict=True)


def deviation(figures, before, moved, wanted, weights) -> list[float]:
    """How far the first step's loss, J and movement of the weights are from those in float32; the last, relatively."""
    ours, theirs = (
        torch.cat([(b.double() - a.double()).flatten() for a, b in zip(*pair, strict=True)])
        for pair in ((before, moved), weights[:2])
    )
    movement = float((ours - theirs).norm() / theirs.norm())
    return [*(abs(a - b) for a, b in zip(figures, wanted[0], strict=True)), movement]


def roundings(tokenizer, rows, shifted, global_batch: int, wanted, weights) -> list[list[float]]:
    """The same deviations of plain autograd in bfloat16, once for each of several ways to round the weights to it."""
    found, generator = [], torch.Generator().manual_seed(8)
    indices, others = next(iter(steps(rows, shifted, global_batch)))
    for _ in range(DRAWS):
        model = scorer(tokenizer)
        with torch.no_grad():
            for weight in model.parameters():
                within = (torch.rand(weight.shape, generator=generator) - 0.5) * weight.abs() * 2**-8  # a bit's half
                weight.add_(within)
        model.to(torch.bfloat16)
        before = [w.detach().clone() for w in model.parameters()]
        figures, _, moved = two_steps(model, rows, shifted, indices, others, global_batch)
        found.append(deviation(figures, before, moved, wanted, weights))
    return found


def trained(tokenizer, rows, shifted, micro: int, engine_arguments: EngineArguments):
    """The same by the trainer's parts, and how many of the restored weights differ from those before."""
    arguments = ScorerArguments(meta_learning_rate=ETA, meta_batch_size=BATCH, per_device_train_batch_size=1)
    model = scorer(tokenizer)
    engine = Engine(
        model, engine_arguments, Schedule(RATE, STEPS), micro_batch_size=micro,
        gradient_accumulation_steps=ACCUMULATION,
    )  # fmt: skip
    engine.train()
    meta = MetaRM(engine, model, shifted, arguments, FeatureCache(), steps=STEPS, seed=5)

    def weights() -> list[torch.Tensor]:
        with gathered(list(engine.module.parameters())):
            return [p.detach().float().clone() for p in model.parameters()]

    figures, kept, changed = [], [], 0
    global_batch = micro * world_size() * ACCUMULATION
    for step, indices in enumerate(shuffled_steps(len(rows), global_batch, STEPS, seed=3)):
        total = 0.0
        kept.append(weights())
        with meta.ascended(step) as found:
            kept.append(weights())
            for n, share in enumerate(micro_steps(indices, micro, rank(), world_size())):
                if n:
                    engine.step()
                loss, *_ = scorer_loss(engine, model, [rows[i] for i in share], arguments, None, global_batch)
                engine.backward(loss)
                total += float(loss.detach())
        changed += sum(int((a != b).sum()) for a, b in zip(weights(), kept[-2], strict=True))
        engine.step()
        figures.append([sum_over_ranks([total])[0], found["meta_difference"]])
    kept.append(weights())
    with tempfile.TemporaryDirectory() as own:
        folder = Path(gather_objects(own)[0])
        engine.save(folder)
        barrier()
        means = mean_gradients(folder, model)
        barrier()
    engine.close()
    return figures, kept, means, changed


def mean_gradients(folder: Path, model: AdvantageModel) -> list[torch.Tensor]:
    """Adam's first moment of every weight, put together from the pieces of all ranks' snapshots."""
    found = {name: torch.zeros(0) for name, _ in model.named_parameters()}
    for path in sorted(folder.glob("engine-*.safetensors")):
        with safe_open(path, "pt") as file:
            for name, (start, length, size) in json.loads(file.metadata()["index"]).items():
                if not len(found[name]):
                    found[name] = torch.zeros(size)
                found[name][start : start + length] = file.get_tensor(f"exp_avg/{name}").float()
    return list(found.values())


def largest(ours, theirs) -> float:
    return max(float((a - b).abs().max()) for a, b in zip(ours, theirs, strict=True))


def main() -> None:
    arguments = [a for a in sys.argv[1:] if not a.startswith("--local_rank")]
    output, micro, stages = Path(arguments[0]), int(arguments[1]), [int(s) for s in arguments[2].split(",")]
    torch.set_num_threads(1)
    start(0)
    tokenizer = build_tokenizer()
    rows, shifted = data(tokenizer)
    global_batch = micro * world_size() * ACCUMULATION
    wanted, weights, gradients = explicit(tokenizer, rows, shifted, global_batch)
    by_rounding = roundings(tokenizer, rows, shifted, global_batch, wanted, weights) if rank() == 0 else []
    found = {}
    for name, settings in [(str(s), {"zero_stage": s}) for s in stages] + [
        (f"bf16 {s}", {"zero_stage": s, "bf16": True}) for s in stages if s
    ]:
        figures, kept, means, changed = trained(tokenizer, rows, shifted, micro, EngineArguments(**settings))
        found[name] = {
            "figures": figures, "explicit": wanted, "changed": changed,
            "weights": [largest(ours, theirs) for ours, theirs in zip(kept[:2], weights, strict=False)],
            "gradients": largest(means, gradients), "gradient": largest(gradients, [0.0] * len(gradients)),
            "deviation": deviation(figures[0], *kept[:2], wanted, weights), "roundings": by_rounding,
            "moved": [largest(kept[2 * step], kept[2 * step + 1]) for step in range(STEPS)],
        }  # fmt: skip
    if rank() == 0:
        output.write_text(json.dumps(found), encoding="utf-8")
    finish()


main()
