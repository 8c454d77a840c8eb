"""Training of the Advantage Model and the reward model: one trainer, one loss, the bounds on or off."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from stable_rlhf import ops
from stable_rlhf.data.encoding import Encoded
from stable_rlhf.engine.engine import Engine, Schedule
from stable_rlhf.engine.frozen import HEADS
from stable_rlhf.engine.loop import Loop
from stable_rlhf.engine.order import count_steps, micro_steps, shuffled_steps, stream_seed
from stable_rlhf.engine.snapshots import Kept, rows_a_step
from stable_rlhf.engine.weights import gathered
from stable_rlhf.models.features import FeatureCache
from stable_rlhf.ranks import barrier, rank, sum_over_ranks, world_size
from stable_rlhf.scorer.comparisons import EncodedComparison, eval_metrics, score_pairs
from stable_rlhf.scorer.contrastive import Contrastive
from stable_rlhf.scorer.metarm import MetaRM
from stable_rlhf.scorer.model import NO_CLASSIFIER, AdvantageModel
from stable_rlhf.settings.recipe import Recipe
from stable_rlhf.settings.stages import ScorerArguments
from stable_rlhf.show.progress import is_main_process, say


@dataclass(frozen=True)
class ContrastiveTerm:
    """What the trainer adds to its loss: ``coefficient`` times the loss of the model's ``contrastive`` module."""

    coefficient: float
    dropout: float
    width: int
    seed: int

    def views(self, step: int, places: Sequence[int], lengths: Sequence[int]) -> tuple[float, Tensor]:
        """The coefficient, and two dropout masks [2, R, H] for the responses of comparisons at ``places`` of a step's
        batch, ``lengths`` of them each. Masks follow from seed, step and place alone: a resumed run, and any number of
        ranks, draws the same."""
        masks = []
        for place, length in zip(places, lengths, strict=True):
            generator = torch.Generator(device="cpu").manual_seed(stream_seed(self.seed, "views", step + 1, place))
            drawn = torch.rand(2, length, self.width, generator=generator, dtype=torch.float32, device="cpu")
            masks.append(drawn >= self.dropout)
        return self.coefficient, torch.cat(masks, dim=1) / (1 - self.dropout)


def contrastive_term(model: AdvantageModel, arguments: ScorerArguments, seed: int) -> ContrastiveTerm | None:
    """Give ``model`` the module that the settings ask for, and return how it is used; None without one."""
    if arguments.contrastive == "none":
        return None
    swav, differences = arguments.contrastive == "swav", arguments.contrastive_on == "differences"
    temperature, coefficient, prototypes = (0.1, 0.5 if differences else 0.1, 20 if differences else 50)
    if not swav:
        temperature, coefficient, prototypes = 0.05, 1.0, 0
    model.contrastive = Contrastive(
        model.trunk.hidden_size,
        num_prototypes=(arguments.swav_prototypes or prototypes) if swav else 0,
        differences=differences,
        temperature=_or(arguments.contrastive_temperature, temperature),
        seed=stream_seed(seed, "prototypes"),
        process_group=dist.group.WORLD if world_size() > 1 else None,
    )
    coefficient = _or(arguments.contrastive_coef, coefficient)
    return ContrastiveTerm(coefficient, arguments.contrastive_dropout, model.trunk.hidden_size, seed)


def _or(given: float | None, default: float) -> float:
    return default if given is None else given


# What the metrics of a step are made of, summed over micro-steps and ranks.
_SUMS = (
    "pairs", "loss", "correct", "effective_sample_size", "sign_flip_share", "expected_error", "contrastive_loss"
)  # fmt: skip


def scorer_loss(
    engine: Any, model: AdvantageModel, batch: Sequence[EncodedComparison], arguments: ScorerArguments,
    cache: FeatureCache | None, comparisons: int, contrast: tuple[float, Tensor] | None = None,
) -> tuple[Tensor, ops.AdvantageLossOutput, dict[str, Tensor]]:  # fmt: skip
    """This rank's part of the loss of one step with ``comparisons`` comparisons over all ranks: (loss, the op's output,
    this rank's part of the terms beside the ranking loss: ``expected_error``, the mean square error of e(x) where it is
    regressed, and ``contrastive_loss`` with ``contrast``, its coefficient and its dropout masks)."""
    first, pairs, prompt_of, weights, margins = [], [], [], [], []
    smoothing: list[float] = []
    rank_margins: list[float] = []
    examples: list[Encoded] = []
    for i, item in enumerate(batch):
        first.append(len(examples))
        pairs += [(len(examples) + better, len(examples) + worse) for better, worse in item.row.pairs]
        weights += [1.0 / len(item.row.pairs)] * len(item.row.pairs)
        prompt_of += [i] * len(item.examples)
        margins += [arguments.margin if item.row.margin is None else item.row.margin] * len(item.examples)
        of_pairs = item.row.label_smoothing or [None] * len(item.row.pairs)
        smoothing += [arguments.label_smoothing if alpha is None else alpha for alpha in of_pairs]
        rank_margins += item.row.rank_margin or [0.0] * len(item.row.pairs)
        examples += item.examples
    responses = len(examples)
    sampled = [(i, e) for i, item in enumerate(batch) for e in item.samples] if arguments.expected_coef else []
    prepared = model.prepare(examples + [e for _, e in sampled], cache)
    device = prepared[1].device
    couples = torch.tensor(pairs, device=device, dtype=torch.int64)
    views = (contrast[1].to(device), couples) if contrast else ()
    reward, expected, *contrastive = engine(*prepared, *views)
    kwargs: dict[str, Any] = {}
    if model.settings.objective == "am":
        assert expected is not None
        # [P]: every response of a prompt sees the same e(x)
        expected = expected[torch.tensor(first, device=device, dtype=torch.int64)]
        kwargs = {
            "expected": expected, "prompt": torch.tensor(prompt_of, device=device, dtype=torch.int64),
            "margin": torch.tensor(margins, device=device, dtype=torch.float32),
            "num_policies": model.settings.num_policies,
        }  # fmt: skip
        if model.settings.num_alternates:
            kwargs |= _packed_logprobs(batch, device)
            kwargs |= {"weight_mode": arguments.weight_mode, "max_weight": arguments.max_weight}
    else:
        kwargs = {"margin": None}
    output = ops.advantage_loss(
        reward[:responses], pairs=couples, pair_weight=torch.tensor(weights, device=device, dtype=torch.float32),
        label_smoothing=torch.tensor(smoothing, dtype=torch.float32, device=device),
        rank_margin=torch.tensor(rank_margins, dtype=torch.float32, device=device), **kwargs,
    )  # fmt: skip
    # The op's mean over pairs becomes a mean over comparisons of the whole step, however it is cut.
    loss = output.loss * (len(pairs) / comparisons)
    terms: dict[str, Tensor] = {}
    if sampled and expected is not None:
        # Eq. 7: e(x) is the mean reward of the policy's own samples; the reward is not trained by this term.
        owner = torch.tensor([i for i, _ in sampled], device=device, dtype=torch.int64)
        count = torch.zeros_like(expected).index_add(0, owner, torch.ones_like(owner, dtype=expected.dtype))
        mean = torch.zeros_like(expected).index_add(0, owner, reward[responses:].detach()) / count.clamp_min(1)
        terms["expected_error"] = ((expected - mean) ** 2 * (count > 0)).sum() / comparisons
        loss = loss + arguments.expected_coef * terms["expected_error"]
    if contrast:
        world = world_size()
        whole = contrastive[0] * (len(batch) * world / comparisons)  # micro-steps weigh the same
        # Every rank has the loss of all, and the gradient of its own rows: its part of the value is one in `world`.
        terms["contrastive_loss"] = whole / world + (1 - 1 / world) * (whole - whole.detach())
        loss = loss + contrast[0] * terms["contrastive_loss"]
    return loss, output, terms


def _packed_logprobs(batch: Sequence[EncodedComparison], device: torch.device) -> dict[str, Tensor]:
    logprobs, alternates, lengths = [], [], [0]
    for item in batch:
        assert item.logprobs is not None and item.row.alt_logprobs is not None
        logprobs += item.logprobs
        # each [K, tokens]
        alternates += [torch.tensor(of, dtype=torch.float32, device="cpu") for of in item.row.alt_logprobs]
        lengths += [len(e.response) for e in item.examples]
    return {
        "logprob": torch.cat(logprobs).to(device),
        "alt_logprob": torch.cat(alternates, dim=1).to(device),
        "cu_seqlens": torch.tensor(lengths, device=device, dtype=torch.int64).cumsum(0),
    }


def train_scorer(
    model: AdvantageModel,
    train: Sequence[EncodedComparison],
    recipe: Recipe,
    folder: Path,
    *,
    seed: int,
    cache: FeatureCache | None = None,
    meta_responses: Sequence[Sequence[Encoded]] = (),
    test: Sequence[EncodedComparison] = (),
    on_step: Callable[[int], None] | None = None,
) -> dict[str, float]:
    """Train ``model`` on ``train`` and save it to ``folder``; ``meta_responses``: MetaRM's, of each prompt.

    Every ``eval_steps`` steps and at the end ``test`` is scored for the metrics of that step (:func:`eval_metrics`).
    ``on_step`` gets the number of each step, on every rank, while ``model`` has the weights after it."""
    arguments, cache = recipe.scorer, cache if cache is not None else FeatureCache()
    if not arguments.eval_steps:
        test = ()
    cache.fill(model.trunk, [e.ids for r in train for e in (*r.examples, *r.samples)], description="hidden states")
    cache.fill(model.trunk, [e.ids for r in test for e in r.examples], description="held-out hidden states")
    cache.fill(model.trunk, [e.ids for row in meta_responses for e in row], description="unlabelled responses")
    if model.settings.objective == "am" and model.settings.num_alternates == 0:
        say("  no alt_logprobs in the data: the Advantage Model trains with K = 0, a = r - e")
    term = contrastive_term(model, arguments, seed)
    per_device = arguments.per_device_train_batch_size
    global_batch = per_device * world_size() * arguments.gradient_accumulation_steps
    steps = count_steps(len(train), global_batch, arguments.num_train_epochs)
    schedule = Schedule(
        arguments.learning_rate, steps, arguments.warmup_ratio, arguments.min_lr_ratio, arguments.head_learning_rate
    )
    engine = Engine(
        model, recipe.engine, schedule, micro_batch_size=per_device,
        gradient_accumulation_steps=arguments.gradient_accumulation_steps,
    )  # fmt: skip
    engine.train()
    meta = MetaRM(engine, model, meta_responses, arguments, cache, steps=steps, seed=seed) if meta_responses else None
    shares = micro_steps(list(range(global_batch)), per_device, rank(), world_size())  # places in a step's batch
    kept = [rows_a_step(global_batch)]
    if term:
        remedy = "keep scorer.per_device_train_batch_size x ranks"
        kept.append(Kept("comparisons a micro-step, each other's negatives", per_device * world_size(), remedy))
    title = "reward model" if model.settings.objective == "rm" else "Advantage Model"
    batches = shuffled_steps(len(train), global_batch, steps, seed)
    loss = float("nan")
    with Loop(title, batches, engine, recipe, folder, steps=steps, kept=kept) as loop:
        for step, rows in loop:
            sums = dict.fromkeys(_SUMS, 0.0)
            moved: AbstractContextManager[dict[str, float]] = meta.ascended(step) if meta else nullcontext({})
            with moved as ascent:
                for micro, places in enumerate(shares):
                    if micro:
                        engine.step()  # ends the one before; the last one ends outside, where the weights are back
                    batch = [train[rows[place]] for place in places]
                    contrast = term.views(step, places, [len(item.examples) for item in batch]) if term else None
                    part, output, terms = scorer_loss(engine, model, batch, arguments, cache, global_batch, contrast)
                    engine.backward(part)
                    pairs = sum(len(r.row.pairs) for r in batch)
                    summands: dict[str, Any] = {
                        "pairs": pairs, "loss": part, "correct": output.accuracy * pairs,
                        "effective_sample_size": output.effective_sample_size,
                        "sign_flip_share": output.sign_flip_share, **terms,
                    }  # fmt: skip
                    for name, value in summands.items():
                        sums[name] += float(value.detach() if isinstance(value, Tensor) else value)
            engine.step()
            sums = dict(zip(sums, sum_over_ranks(sums.values()), strict=True))
            loss = sums["loss"]
            metrics = {"loss": loss, "accuracy": sums["correct"] / sums["pairs"]} | ascent
            if model.settings.num_alternates:
                micros = world_size() * arguments.gradient_accumulation_steps
                metrics |= {name: sums[name] / micros for name in ("effective_sample_size", "sign_flip_share")}
            if arguments.expected_coef and model.settings.objective == "am":
                metrics["expected_error"] = sums["expected_error"]
            if term:
                metrics["contrastive_loss"] = sums["contrastive_loss"]
            if test and ((step + 1) % arguments.eval_steps == 0 or step + 1 == steps):
                # All pairs on every rank, so that under ZeRO-3 all ranks gather the same layers in step.
                metrics |= eval_metrics(score_pairs(model, test, cache), arguments.bins)
            if on_step is not None:
                on_step(step + 1)
            loop.tokens += sum(len(e) for i in rows for e in train[i].examples)
            loop.end(step, metrics, note=f"loss {loss:.3f}")
        _save(engine, model, folder)
    engine.close()
    return {"steps": steps, "tokens_seen": loop.tokens, "loss": loss}


def _save(engine: Engine, model: AdvantageModel, folder: Path) -> None:
    """The backbone as transformers loads it, and the heads beside it."""
    engine.save_model(folder, beside=NO_CLASSIFIER)
    heads = [m for name, m in model.named_children() if name in HEADS]
    with gathered([p for head in heads for p in head.parameters()]):
        if is_main_process():
            model.save_heads(folder)
    barrier()
