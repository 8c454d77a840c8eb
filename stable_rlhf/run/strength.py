"""Preference strength as stages of a run: one for each scorer, so that a kill costs one at most, and one that sums up.

With ``strength.heads_only`` the backbone reads every response once, and M scorers cost little more than one. With
``scorer.num_trainable_layers`` the frozen lower blocks are read once. Otherwise each scorer trains alone.
"""

from __future__ import annotations

import functools
import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import accumulate
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from stable_rlhf import ops
from stable_rlhf.data.encoding import last_positions
from stable_rlhf.data.jsonl import to_json, write_jsonl
from stable_rlhf.data.readers import comparison_row
from stable_rlhf.data.records import Comparison, DataError, PairStrength, as_text
from stable_rlhf.data.splits import prompt_key, split_rows
from stable_rlhf.engine.engine import Schedule
from stable_rlhf.engine.order import count_steps, shuffled_steps, stream_seed
from stable_rlhf.engine.run_folder import RunDirectory, Stage
from stable_rlhf.models.checked import read_tensors
from stable_rlhf.models.features import FeatureCache
from stable_rlhf.models.loading import context_length, load_backbone, load_config, load_tokenizer
from stable_rlhf.models.trunk import Trunk, length_batches
from stable_rlhf.ranks import barrier, device, rank, world_size
from stable_rlhf.run.datasets import read_preferences, split_preferences
from stable_rlhf.scorer.comparisons import EncodedComparison, encode_comparisons, score_pairs
from stable_rlhf.scorer.model import AdvantageModel, ScorerSettings, new_head
from stable_rlhf.scorer.report import write_report
from stable_rlhf.scorer.strength import notable_pairs, preference_strength, strength_summary
from stable_rlhf.scorer.train import train_scorer
from stable_rlhf.settings.recipe import EngineArguments, Recipe
from stable_rlhf.settings.stages import ScorerArguments
from stable_rlhf.show.progress import is_main_process, progress, say

_HELD_OUT = -1
_DIFFERENCES = "differences.json"
_RESAMPLES = 1000


@dataclass
class _Pairs:
    """The preference data of a recipe: all rows in their order; those that fit, and of each of these its fold."""

    rows: list[Comparison]
    encoded: list[EncodedComparison]
    fold: list[int]  # _HELD_OUT: of the test or the judge's split, never trained on
    check: list[float | None] | None  # of every pair of ``encoded``

    @property
    def first(self) -> list[int]:
        """Place of each encoded row's first response among all responses."""
        return [0, *accumulate(len(item.examples) for item in self.encoded)][:-1]


def measure_strength(
    recipe: Recipe, run: RunDirectory, backbone: str, settings: dict[str, Any], inputs: Sequence[Stage] = ()
) -> Stage:  # fmt: skip
    """Train the scorers and sum up; returns the stage whose folder holds ``pairs.jsonl.gz`` with each pair's strength.

    ``settings``: what the scorers depend on beside ``recipe.strength``. Scorers train on the training split only, so
    the strengths of training pairs owe nothing to held-out ones; every pair that fits is measured."""
    s = recipe.strength
    load = functools.cache(lambda: _load(recipe, backbone))
    cache = FeatureCache()  # its own: the scorers after it read other rows together
    settings = {**settings, "scorer": {k: v for k, v in settings["scorer"].items() if k != "denoise"}}
    run.refuse_changed("strength", {"strength": recipe.as_dict()["strength"]})
    hidden: Stage | None = None
    if s.heads_only:
        hidden = run.stage(
            "strength-hidden", {k: v for k, v in settings.items() if k != "scorer"},
            lambda folder: _read_hidden(load(), backbone, recipe, folder), inputs,
        )  # fmt: skip
    sources = [*inputs, *([hidden] if hidden else [])]
    voters: list[Stage] = []
    shape = {"folds": s.folds, "heads_only": s.heads_only}
    for fold in range(s.folds):
        for member in range(s.num_scorers):
            name = f"strength-scorer-{member + 1}" + (f"-fold-{fold + 1}" if s.folds > 1 else "")
            seed = stream_seed(recipe.seed, "strength", fold, member)

            def vote(folder: Path, fold: int = fold, seed: int = seed) -> dict[str, Any]:
                if hidden is not None:
                    return _vote_by_head(load(), recipe, hidden.folder, fold, seed, folder)
                return _vote(load(), recipe, backbone, fold, seed, folder, cache.for_stage())

            voters.append(run.stage(name, {**settings, "strength": shape}, vote, sources))
    return run.stage(
        "strength", {**settings, "strength": recipe.as_dict()["strength"]},
        lambda folder: _sum_up(load(), recipe, [v.folder for v in voters], folder), [*inputs, *voters],
    )  # fmt: skip


def _load(recipe: Recipe, backbone: str) -> _Pairs:
    tokenizer, config = load_tokenizer(backbone), load_config(backbone)
    rows = read_preferences(recipe.data, recipe.seed)
    train = split_preferences(recipe.data, rows, recipe.seed).train
    folds = recipe.strength.folds
    try:
        parts = split_rows(train, [1 / folds] * folds, recipe.seed)
    except ValueError as error:
        raise DataError(f"strength.folds: {error}") from None
    fold_of = {id(row): fold for fold, part in enumerate(parts) for row in part}
    limit = min(recipe.data.max_length, context_length(config))
    encoded, left_out = encode_comparisons(
        rows, tokenizer, limit, recipe.data.max_prompt_length, on_bad_row=recipe.data.on_bad_row
    )
    if left_out:
        say(f"  {left_out} of {len(rows)} comparisons are too long: they get no strength")
    fold = [fold_of.get(id(item.row), _HELD_OUT) for item in encoded]
    name = recipe.strength.check
    check = None
    if name is not None:
        check_column(name, [item.row for item in encoded])
        check = [_number(item.row.meta.get(name)) for item in encoded for _ in item.row.pairs]
    return _Pairs(rows, encoded, fold, check)


def check_column(name: str, rows: Sequence[Comparison]) -> None:
    """The column that strengths are held against must have numbers.

    Raises:
        DataError: none of the rows has one.
    """
    if all(_number(row.meta.get(name)) is None for row in rows):
        raise DataError(f"strength.check {name!r}: no pair has a number, true or false there")


def _number(value: Any) -> float | None:
    return float(value) if isinstance(value, bool | int | float) and abs(value) <= sys.float_info.max else None


def _rows_to_train_and_vote_on(pairs: _Pairs, fold: int, folds: int) -> tuple[list[int], list[int]]:
    """Places of the rows that the scorers of a fold train on, and of those they vote on."""
    every_row = range(len(pairs.encoded))
    if folds == 1:
        train_rows, vote_rows = [i for i in every_row if pairs.fold[i] != _HELD_OUT], list(every_row)
    else:
        train_rows = [i for i in every_row if pairs.fold[i] not in (fold, _HELD_OUT)]
        vote_rows = [i for i in every_row if pairs.fold[i] in (fold, _HELD_OUT)]
    if not train_rows:
        raise DataError("strength: no training pair is left that fits data.max_length and data.max_prompt_length")
    return train_rows, vote_rows


def _vote(
    pairs: _Pairs, recipe: Recipe, backbone: str, fold: int, seed: int, folder: Path, cache: FeatureCache
) -> dict[str, Any]:
    """Train one reward model as ``train-scorer`` would, and let it vote."""
    arguments = recipe.scorer
    train_rows, vote_rows = _rows_to_train_and_vote_on(pairs, fold, recipe.strength.folds)
    model = AdvantageModel(
        load_backbone(backbone, dtype=recipe.engine.dtype), load_tokenizer(backbone),
        ScorerSettings(objective="rm"), num_trainable_layers=arguments.num_trainable_layers,
        seed=stream_seed(seed, "heads"),
    )  # fmt: skip
    sequences = [e.ids for item in pairs.encoded for e in item.examples]
    cache.fill(model.trunk.to(device()), sequences, description="hidden states")
    result: dict[str, Any] = dict(
        train_scorer(
            model, [pairs.encoded[i] for i in train_rows], recipe, folder, seed=seed, cache=cache
        )
    )  # fmt: skip
    barrier()
    saved = AdvantageModel.from_pretrained(
        folder, dtype=recipe.engine.dtype, num_trainable_layers=arguments.num_trainable_layers
    ).to(device())  # fmt: skip
    scores = score_pairs(saved, [pairs.encoded[i] for i in vote_rows], cache)
    difference = [c - r for c, r in zip(scores["chosen"], scores["rejected"], strict=True)]
    barrier()
    if is_main_process():
        for weights in (*folder.glob("*.safetensors"), *folder.glob("*.index.json")):
            weights.unlink()  # only the votes count; M backbones would fill a disk
    return result | _write_votes(pairs, vote_rows, difference, len(train_rows), folder)


@torch.no_grad()
def _read_hidden(pairs: _Pairs, backbone: str, recipe: Recipe, folder: Path) -> dict[str, Any]:
    """The backbone's last hidden state at the last token of every response; each rank reads and writes its share."""
    from safetensors.torch import save_file

    trunk = Trunk(load_backbone(backbone, dtype=recipe.engine.dtype)).to(device()).eval()
    responses = [e for item in pairs.encoded for e in item.examples]
    mine = responses[rank() :: world_size()]
    hidden = torch.empty(len(mine), trunk.hidden_size, dtype=torch.float32, device="cpu")
    with progress("hidden states", total=sum(map(len, mine)), unit="tokens") as bar:
        for places in length_batches([len(e) for e in mine], trunk.batch_tokens):
            batch = [mine[i] for i in places]
            inputs = trunk.inputs([e.ids for e in batch])
            last = last_positions(inputs["attention_mask"], [len(e) for e in batch])
            states = trunk(**inputs)  # [B, L, H]
            rows = torch.arange(len(batch), device=states.device, dtype=torch.int64)
            hidden[places] = states[rows, last].float().cpu()
            bar.advance(sum(map(len, batch)))
    save_file({"hidden": hidden}, folder / f"hidden-{rank():05d}-of-{world_size():05d}.safetensors")
    return {"responses": len(responses), "width": trunk.hidden_size}


def _vote_by_head(
    pairs: _Pairs, recipe: Recipe, hidden_folder: Path, fold: int, seed: int, folder: Path
) -> dict[str, Any]:
    """Train one linear head on the hidden states, and let it vote. The same on every rank."""
    shares = [read_tensors(path)["hidden"] for path in sorted(hidden_folder.glob("hidden-*.safetensors"))]
    hidden = torch.empty(sum(map(len, shares)), shares[0].shape[1], dtype=torch.float32, device="cpu")
    for i, share in enumerate(shares):
        hidden[i :: len(shares)] = share
    train_rows, vote_rows = _rows_to_train_and_vote_on(pairs, fold, recipe.strength.folds)
    first = pairs.first
    placed = [[(first[i] + b, first[i] + w) for b, w in pairs.encoded[i].row.pairs] for i in train_rows]
    score = train_head(hidden, placed, recipe.scorer, recipe.engine, seed).tolist()
    difference = [score[first[i] + b] - score[first[i] + w] for i in vote_rows for b, w in pairs.encoded[i].row.pairs]
    return _write_votes(pairs, vote_rows, difference, len(train_rows), folder)


def train_head(
    hidden: Tensor, pairs: Sequence[Sequence[tuple[int, int]]], arguments: ScorerArguments,
    engine_arguments: EngineArguments, seed: int,
) -> Tensor:  # fmt: skip
    """Scores [n] of all rows of ``hidden`` [n, H] by a linear head trained on the comparisons ``pairs``, each a list of
    (better, worse) rows, with the optimiser, schedule and batches of ``train_scorer``.

    Every feature is first scaled to mean 0 and deviation 1 over the rows trained on: the same heads, well conditioned.
    The learning rate is ``head_learning_rate`` where it is set."""
    used = sorted({row for comparison in pairs for pair in comparison for row in pair})
    deviation, mean = torch.std_mean(hidden[used], dim=0, correction=0)
    scaled = (hidden - mean) / deviation.clamp_min(1e-6)
    head = new_head(hidden.shape[1], torch.Generator(device="cpu").manual_seed(stream_seed(seed, "heads")))
    rate = arguments.learning_rate if arguments.head_learning_rate is None else arguments.head_learning_rate
    optimizer = torch.optim.AdamW(
        head.parameters(), lr=rate, betas=(engine_arguments.adam_beta1, engine_arguments.adam_beta2), eps=1e-8,
        weight_decay=engine_arguments.weight_decay,
    )  # fmt: skip
    batch = arguments.per_device_train_batch_size * world_size() * arguments.gradient_accumulation_steps
    steps = count_steps(len(pairs), batch, arguments.num_train_epochs)
    factor = Schedule(rate, steps, arguments.warmup_ratio, arguments.min_lr_ratio).factor
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, factor)
    with progress("head", total=steps, unit="steps") as bar:
        for indices in shuffled_steps(len(pairs), batch, steps, seed):
            chosen = [pair for i in indices for pair in pairs[i]]
            couples = torch.tensor(chosen, dtype=torch.int64, device="cpu")  # [M, 2]
            shares = [1.0 / len(pairs[i]) for i in indices for _ in pairs[i]]
            weight = torch.tensor(shares, dtype=torch.float32, device="cpu")
            reward = head(scaled[couples.T.flatten()]).squeeze(-1)  # better ones, then worse ones
            loss = ops.advantage_loss(
                reward, margin=None, pair_weight=weight, label_smoothing=arguments.label_smoothing
            ).loss * (len(couples) / batch)  # fmt: skip
            optimizer.zero_grad()
            loss.backward()
            if engine_arguments.max_grad_norm:
                nn.utils.clip_grad_norm_(head.parameters(), engine_arguments.max_grad_norm)
            optimizer.step()
            schedule.step()
            bar.advance()
    with torch.no_grad():
        return head(scaled).squeeze(-1)


def _write_votes(
    pairs: _Pairs, vote_rows: Sequence[int], difference: Sequence[float], trained_on: int, folder: Path
) -> dict[str, Any]:
    """One scorer's score differences over all pairs, null where it does not vote."""
    votes = iter(difference)
    voted_on = set(vote_rows)
    values = [next(votes) if i in voted_on else None for i, item in enumerate(pairs.encoded) for _ in item.row.pairs]
    if is_main_process():
        (folder / _DIFFERENCES).write_text(to_json(values) + "\n", encoding="utf-8")
    return {
        "trained_on": trained_on,
        "judged": len(vote_rows),
        "positive": sum(d > 0 for d in difference) / len(difference),
    }


def _read_votes(path: Path) -> list[float | None]:
    """What `_write_votes` wrote."""
    try:
        content = json.loads(path.read_bytes())
        if isinstance(content, list) and all(v is None or isinstance(v, float) for v in content):
            return content
        problem = "not a list of numbers"
    except (OSError, ValueError, RecursionError) as error:
        problem = str(error)
    raise DataError(f"{path}: {problem}; delete {str(path.parent)!r} to redo that scorer")


def _sum_up(pairs: _Pairs, recipe: Recipe, voters: Sequence[Path], folder: Path) -> dict[str, Any]:
    """Mean and deviation of every pair, into the rows and into pictures, tables and figures to read."""
    votes = [_read_votes(voter / _DIFFERENCES) for voter in voters]
    mean, std = preference_strength(np.array(votes, dtype=np.float64))  # None becomes NaN
    every = iter(PairStrength(float(m), float(s)) for m, s in zip(mean, std, strict=True))
    of_row = {id(item.row): tuple(next(every) for _ in item.row.pairs) for item in pairs.encoded}
    s = recipe.strength
    summary: dict[str, Any] = {
        "scorers": s.num_scorers, "folds": s.folds, "heads_only": s.heads_only, **strength_summary(mean, std)
    }  # fmt: skip
    if pairs.check is not None:
        prompts = [prompt_key(item.row.prompt) for item in pairs.encoded for _ in item.row.pairs]
        summary["check"] = {"column": s.check, **check_against(mean, pairs.check, prompts)}
    flat = [(item.row, pair) for item in pairs.encoded for pair in item.row.pairs]
    summary["notable"] = {
        name: [_to_read(*flat[i], PairStrength(float(mean[i]), float(std[i]))) for i in places]
        for name, places in notable_pairs(mean, s.examples).items()
    }
    if is_main_process():
        enriched = (comparison_row(replace(row, strength=of_row.get(id(row)))) for row in pairs.rows)
        write_jsonl(folder / "pairs.jsonl.gz", enriched)
        (folder / "strength.json").write_text(to_json(summary, indent=1) + "\n", encoding="utf-8")
        write_report(f"Preference strength: {recipe.title}", summary, mean, std, pairs.check, folder)
    return {k: v for k, v in summary.items() if k not in ("notable", "curve")}


def check_against(mean: np.ndarray, check: Sequence[float | None], prompts: Sequence[str]) -> dict[str, Any]:
    """How strength goes with a column of the data (None where a pair has no value).

    Spearman's rank correlation; where the column has two values also the AUC, the chance that a pair of the higher one
    is the stronger (a tie counts half). Their 95 % intervals are the bootstrap's over the prompts: pairs of one prompt
    are too much alike to count as independent. Both are None without two different values and two prompts. Then the
    mean strength at each value where there are at most ten."""
    known = np.array([value is not None for value in check])
    mu, value = mean[known], np.array([v for v in check if v is not None], dtype=np.float64)
    place: dict[str, int] = {}
    group = np.array([place.setdefault(prompt, len(place)) for prompt, k in zip(prompts, known, strict=True) if k])
    distinct = np.unique(value)
    statistics = {"spearman": _spearman} | ({"auc": _auc} if len(distinct) == 2 else {})
    result: dict[str, Any] = {"pairs": len(mu), "prompts": len(place), **dict.fromkeys(statistics)}
    if np.ptp(mu) > 0 and len(distinct) > 1 and len(place) > 1:
        rng, resamples = np.random.default_rng(0), []
        for _ in range(_RESAMPLES):
            times = np.bincount(rng.integers(0, len(place), len(place)), minlength=len(place))
            rows = np.repeat(np.arange(len(mu)), times[group])
            if np.ptp(mu[rows]) > 0 and np.ptp(value[rows]) > 0:
                resamples.append([statistic(mu[rows], value[rows]) for statistic in statistics.values()])
        ends = np.quantile(resamples, [0.025, 0.975], axis=0).T
        for (name, statistic), (low, high) in zip(statistics.items(), ends.tolist(), strict=True):
            result[name] = {"value": statistic(mu, value), "low": low, "high": high}
    if len(distinct) <= 10:
        result["by_value"] = [
            {
                "value": float(v), "pairs": int((value == v).sum()), "mean": float(mu[value == v].mean()),
                "below_zero": float((mu[value == v] < 0).mean()),
            }
            for v in distinct
        ]  # fmt: skip
    return result


def _spearman(mu: np.ndarray, value: np.ndarray) -> float:
    from scipy.stats import spearmanr

    return float(spearmanr(mu, value).statistic)


def _auc(mu: np.ndarray, value: np.ndarray) -> float:
    from sklearn.metrics import roc_auc_score

    return float(roc_auc_score(value == value.max(), mu))


def _to_read(row: Comparison, pair: tuple[int, int], strength: PairStrength) -> dict[str, Any]:
    return {
        "mean": strength.mean, "std": strength.std, "task": row.task, "source": row.source,
        "prompt": as_text(row.prompt), "chosen": row.responses[pair[0]], "rejected": row.responses[pair[1]],
    }  # fmt: skip
