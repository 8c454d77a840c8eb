"""The stages of a run, one function each, from paths to a folder of results: for ``run`` and single commands alike."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

import torch

from stable_rlhf.data.encoding import Encoded
from stable_rlhf.data.jsonl import to_json, write_jsonl
from stable_rlhf.data.prompts import EncodedPrompt
from stable_rlhf.data.readers import read_demonstrations, read_prompts, read_responses, tell_skipped
from stable_rlhf.data.records import Comparison, DataError, PromptRow
from stable_rlhf.data.turns import end_of_turn, ends_in_text, ends_of_turn
from stable_rlhf.engine.frozen import loading_in_shards, read_only, release
from stable_rlhf.engine.order import stream_seed
from stable_rlhf.models.features import FeatureCache
from stable_rlhf.models.loading import (
    context_length,
    load_backbone,
    load_causal_lm,
    load_config,
    load_tokenizer,
    resolve_model,
)
from stable_rlhf.models.policy import PolicyModel
from stable_rlhf.models.views import mean_entropies
from stable_rlhf.policy.ppo import PPOTrainer
from stable_rlhf.policy.rejection import train_rejection
from stable_rlhf.policy.reward_functions import Rewards
from stable_rlhf.policy.sft import train_sft
from stable_rlhf.ranks import barrier, device, gather_objects, on_first_rank, rank, together, world_size
from stable_rlhf.rollout.local import GenerationSettings, Rollout, generate
from stable_rlhf.rollout.vllm import VLLMRollouts
from stable_rlhf.run.datasets import (
    encode_demonstrations,
    load_demonstrations,
    load_preferences,
    load_prompts,
    locate,
    reading,
)
from stable_rlhf.scorer.alternates import Alternate, collect_responses
from stable_rlhf.scorer.comparisons import (
    EncodedComparison,
    encode_comparisons,
    pairs_digest,
    score_pairs,
    with_logprobs,
)
from stable_rlhf.scorer.denoise import denoise, parse_bands
from stable_rlhf.scorer.metarm import encode_responses
from stable_rlhf.scorer.model import AdvantageModel, ScorerSettings, check_scorer_folder
from stable_rlhf.scorer.train import train_scorer
from stable_rlhf.settings.recipe import SAMPLE_PROMPTS, EngineArguments, EvaluateArguments, Recipe, RolloutArguments
from stable_rlhf.settings.stages import HOT_TEMPERATURE, SCORER, PPOArguments, ScorerArguments, SelectArguments
from stable_rlhf.settings.variants import Variant
from stable_rlhf.show.progress import is_main_process, say
from stable_rlhf.system.http import read_key

Result = dict[str, Any]
RESPONSES = "responses.jsonl.gz"  # in the folder of `run_responses`


def load_policy(
    path: str, engine: EngineArguments | None = None, *, num_trainable_layers: int | None = None,
    value_head: bool = False, frozen: bool = False,
) -> PolicyModel:  # fmt: skip
    """A policy on this process's device in the engine's type (without one float32); in shards, for an engine to take
    over, where ``in_shards`` says so."""
    shards = engine is not None and in_shards(engine, path, num_trainable_layers)
    with loading_in_shards(engine, frozen=frozen) if engine and shards else nullcontext():
        # To train as well: DeepSpeed casts to 16 bits before it makes its float32 master weights.
        model = load_causal_lm(path, dtype=engine.dtype if engine else torch.float32)
    return PolicyModel(model, num_trainable_layers=num_trainable_layers, value_head=value_head).to(device())


def in_shards(engine: EngineArguments, path: str, num_trainable_layers: int | None) -> bool:
    """Whether a model is divided over the ranks while it is loaded: under ZeRO-3, but for split backbones (no engine
    gathers their frozen lower blocks) and GGUF files (every rank reads those)."""
    return engine.zero_stage == 3 and num_trainable_layers is None and resolve_model(path)[1] is None


def load_reader(path: str, engine: EngineArguments, *, num_trainable_layers: int | None = None) -> Any:
    """A policy that only reads, whole on this device. Where the settings say that a device cannot hold one
    (``ds3_gather_for_generation`` false) it lies in shards, and all ranks must use it in step."""
    if engine.zero_stage != 3 or engine.ds3_gather_for_generation:
        whole = replace(engine, zero_stage=0)
        return load_policy(path, whole, num_trainable_layers=num_trainable_layers)
    return read_only(load_policy(path, engine, num_trainable_layers=num_trainable_layers, frozen=True), engine)


def answer(
    model: Any, tokenizer: Any, prompts: Sequence[EncodedPrompt], settings: GenerationSettings, seeds: Sequence[int],
    description: str,
) -> list[Rollout]:  # fmt: skip
    """One response a prompt, all of them on every rank. A policy in shards is slow to sample from, whatever the size of
    a batch, so there each rank answers a share of the prompts."""
    world = 1 if isinstance(model, PolicyModel) else world_size()
    mine = list(range(rank() % world, len(prompts), world)) or [0]  # no rank may stay away from the others' forwards
    rollouts = generate(
        model.causal_lm, tokenizer, [prompts[i].ids for i in mine], settings, seeds=[seeds[i] for i in mine],
        description=description,
    )  # fmt: skip
    parts = gather_objects(rollouts) if world > 1 else [rollouts]
    return [parts[i % world][i // world] for i in range(len(prompts))]


def sampling_settings(recipe: Recipe, temperature: float) -> GenerationSettings:
    """How PPO's responses are drawn, at another temperature."""
    return GenerationSettings(recipe.ppo.max_new_tokens, temperature, recipe.ppo.top_p, tuple(recipe.ppo.stop))


def check_same_tokenizer(policy: Any, scorer: Any, folder: str) -> None:
    """The scorer reads the policy's token ids as they are, so both must mean the same by them.

    Padding may differ, which is masked and often added after training, and so may tokens beyond the policy's embedding.
    """
    rows, padding = getattr(policy, "embedding_rows", math.inf), {policy.pad_token, scorer.pad_token}
    differing = {token for token, index in policy.get_vocab().items() ^ scorer.get_vocab().items() if index < rows}
    if differing - padding or end_of_turn(policy) != end_of_turn(scorer):
        raise ValueError(
            f"scorer {folder!r} has another tokenizer than the policy, or one that ends a response with another token; "
            "train it on a backbone of the policy's family"
        )


def check_scorer_context(recipe: Recipe, prompts: Sequence[EncodedPrompt], scorer: str) -> None:
    """What the policy answers must fit the scorer's context, which may be shorter than the policy's own.

    Raises:
        ValueError: names the scorer, and the settings where they do not fit.
    """
    context, new = context_length(load_config(str(check_scorer_folder(scorer)))), recipe.ppo.max_new_tokens
    longest = max((len(prompt.ids) for prompt in prompts), default=0)
    if longest + new > context:
        raise ValueError(
            f"scorer {scorer!r}: a prompt of {longest} tokens and ppo.max_new_tokens {new} do not fit its context of "
            f"{context}: lower data.max_prompt_length or ppo.max_new_tokens"
        )


def run_world(recipe: Recipe, folder: Path) -> Result:
    """Write the skill world's files and its untrained model."""
    from stable_rlhf.world import build_model, build_tokenizer, write_world

    w = recipe.world
    if is_main_process():
        write_world(folder, recipe.seed, forget_set=w.forget_set)
        tokenizer = build_tokenizer(w.forget_set)
        model = build_model(
            tokenizer, hidden_size=w.hidden_size, num_hidden_layers=w.num_hidden_layers,
            num_attention_heads=w.num_attention_heads, architecture=w.architecture, seed=recipe.seed,
        )  # fmt: skip
        model.save_pretrained(folder / "model")
        tokenizer.save_pretrained(folder / "model")
        return {"parameters": sum(p.numel() for p in model.parameters())}
    return {}


def run_materialise(recipe: Recipe, folder: Path) -> Result:
    """Load the initial policy once (hub, folder or GGUF) and keep it as plain safetensors."""
    assert recipe.model_name_or_path is not None
    result: Result = {"model": recipe.model_name_or_path}
    if is_main_process():  # alone: a large model is not read once a process
        model = load_causal_lm(recipe.model_name_or_path, dtype=recipe.engine.dtype)
        model.save_pretrained(folder)
        load_tokenizer(recipe.model_name_or_path).save_pretrained(folder)
        result["parameters"] = sum(p.numel() for p in model.parameters())
    barrier()
    return result


def run_sft(recipe: Recipe, model: str, folder: Path, *, early_share: float | None = None) -> Result:
    """Fine-tune ``model`` on the demonstrations."""
    if not recipe.data.demonstrations:
        raise DataError("data.demonstrations: name at least one prompt/response file")
    tokenizer = load_tokenizer(model)
    policy = load_policy(model, recipe.engine)
    data = replace(recipe.data, max_length=min(recipe.data.max_length, context_length(policy.causal_lm.config)))
    examples, _ = load_demonstrations(data, data.demonstrations, tokenizer)
    return dict(train_sft(policy, tokenizer, examples, recipe, folder, seed=recipe.seed, early_share=early_share))


def run_pairs(recipe: Recipe, world: Path, sft: Path, folder: Path) -> Result:
    """Sample responses from two alternate policies and let the simulated annotator compare them."""
    from stable_rlhf.world import label_pairs

    w = recipe.world
    tokenizer = load_tokenizer(str(sft))
    prompts = read_prompts(world / "pair_prompts.jsonl.gz").rows
    rows = [prompts[i % len(prompts)] for i in range(w.comparisons)]
    alternates = [
        Alternate("SFT stopped early", load_policy(str(sft / "early"))),
        Alternate(f"SFT at temperature {HOT_TEMPERATURE}", load_policy(str(sft)), HOT_TEMPERATURE),
    ]
    samples = collect_responses(
        rows, load_policy(str(sft)), alternates, tokenizer,
        max_new_tokens=recipe.ppo.max_new_tokens, seed=stream_seed(recipe.seed, "pairs"),
    )  # fmt: skip
    pairs, counts = label_pairs(
        samples, stream_seed(recipe.seed, "annotator"), length_bonus=w.length_bonus, flip_share=w.wrong_labels
    )
    if is_main_process():
        write_jsonl(folder / "pairs.jsonl.gz", pairs)
    barrier()
    return {"pairs": counts.pairs, "flipped": counts.flipped, "identical": counts.identical}


def run_scorer(
    recipe: Recipe, objective: str, backbone: str, policy: str | None, folder: Path,
    *, cache: FeatureCache | None = None, split: str = "train",
) -> Result:  # fmt: skip
    """Train a scorer on the preference data and keep its scores on the held-out pairs.

    ``split``: ``"train"``, or ``"judge"`` for the pairs that only the judge sees. ``policy`` is the policy to be tuned,
    needed for importance weights (rows with ``alt_logprobs`` but no ``logprobs``) and for ``expected_coef``."""
    arguments = recipe.scorer
    tokenizer = load_tokenizer(backbone)
    rows = load_preferences(recipe.data, recipe.seed)
    comparisons: list[Comparison] = rows.train if split == "train" else rows.judge
    if not comparisons:
        raise DataError("data.judge_fraction is 0, so there are no pairs to train a judge on")
    shards = in_shards(recipe.engine, backbone, arguments.num_trainable_layers)
    with loading_in_shards(recipe.engine) if shards else nullcontext():
        trunk = load_backbone(backbone, dtype=recipe.engine.dtype)
    limits = min(recipe.data.max_length, context_length(trunk.config)), recipe.data.max_prompt_length
    train, long = encode_comparisons(comparisons, tokenizer, *limits, on_bad_row=recipe.data.on_bad_row)
    counts: dict[str, int] = {}
    if arguments.denoise and split == "train":
        train, counts = _denoised(train, arguments, folder)
    test, long_test = encode_comparisons(rows.test, tokenizer, *limits, on_bad_row=recipe.data.on_bad_row)
    if long or long_test:
        say(f"  {long + long_test} of {len(comparisons) + len(rows.test)} comparisons are too long: left out")
    meta_responses: list[list[Encoded]] = []
    if arguments.meta_responses and split == "train":
        responses = read_responses(locate(recipe.data, [arguments.meta_responses]), **reading(recipe.data))
        tell_skipped("unlabelled responses", responses)
        meta_responses = encode_responses(responses.rows, tokenizer, *limits, on_bad_row=recipe.data.on_bad_row)
    alternates = len(train[0].row.alt_logprobs[0]) if objective == "am" and train[0].row.alt_logprobs else 0
    if alternates and any(r.row.logprobs is None for r in train) and policy is None:
        raise DataError("alt_logprobs without logprobs: give the policy to be tuned (--policy)")
    if alternates or (objective == "am" and arguments.expected_coef):
        train = _with_policys_view(train, policy, tokenizer, recipe, alternates)
    model = AdvantageModel(
        trunk, tokenizer,
        ScorerSettings(
            objective=objective, margin=arguments.margin, num_alternates=alternates,
            num_policies=(arguments.num_policies or alternates + 1) if objective == "am" else 1,
        ),
        num_trainable_layers=arguments.num_trainable_layers, seed=stream_seed(recipe.seed, "heads"),
    )  # fmt: skip
    cache = cache.for_stage() if cache is not None else FeatureCache()
    cache.fill(
        model.trunk.to(device()), [e.ids for r in (*train, *test) for e in r.examples], description="hidden states"
    )
    result: Result = dict(
        train_scorer(
            model, train, recipe, folder, seed=stream_seed(recipe.seed, "scorer", split), cache=cache,
            meta_responses=meta_responses, test=test,
        )
    )  # fmt: skip
    # Scores are taken from what was saved: what a user loads is what is measured.
    barrier()
    saved = AdvantageModel.from_pretrained(
        folder, dtype=recipe.engine.dtype, num_trainable_layers=arguments.num_trainable_layers
    ).to(device())  # fmt: skip
    scores = score_pairs(saved, test, cache)
    scores["rows"] = pairs_digest(test)
    if is_main_process():
        (folder / "scores.json").write_text(to_json(scores) + "\n", encoding="utf-8")
    correct = [(c > r) + 0.5 * (c == r) for c, r in zip(scores["chosen"], scores["rejected"], strict=True)]
    result |= {"train": len(train), "test": len(test), "num_alternates": alternates, "left_out": long + long_test}
    result["accuracy"] = sum(correct) / len(correct)
    if counts:
        result["denoise"] = counts
    return result


def _denoised(
    rows: list[EncodedComparison], arguments: ScorerArguments, folder: Path
) -> tuple[list[EncodedComparison], dict[str, int]]:
    """The rows as ``scorer.denoise`` leaves them, and counts; ``denoise.jsonl.gz`` tells what became of every pair."""
    outcome = denoise([item.row for item in rows], parse_bands("scorer.denoise", arguments.denoise))
    say("  denoise: " + ", ".join(f"{count} {what.replace('_', ' ')}" for what, count in outcome.counts.items()))
    if is_main_process():
        write_jsonl(
            folder / "denoise.jsonl.gz",
            (
                {
                    "prompt": item.row.prompt, "chosen": item.row.responses[better],
                    "rejected": item.row.responses[worse], "source": item.row.source, "denoise": decision,
                }
                for item, decisions in zip(rows, outcome.decisions, strict=True)
                for (better, worse), decision in zip(item.row.pairs, decisions, strict=True)
            ),
        )  # fmt: skip
    pairs = zip(rows, outcome.rows, strict=True)
    return [replace(item, row=row) for item, row in pairs if row is not None], outcome.counts


def _with_policys_view(
    rows: list[EncodedComparison], policy: str | None, tokenizer: Any, recipe: Recipe, alternates: int
) -> list[EncodedComparison]:
    """The rows with log-probs of the policy to be tuned, and its own samples when e(x) is regressed on them."""
    sampling = recipe.scorer.expected_coef > 0
    model = load_policy(policy) if policy else None
    if alternates:
        rows = with_logprobs(rows, model)
    if not sampling:
        return rows
    if model is None:
        raise DataError(
            "scorer.expected_coef needs the policy to be tuned (--policy): e(x) is its expected reward (Eq. 7)"
        )
    settings = sampling_settings(recipe, recipe.ppo.temperature)
    seeds = [stream_seed(recipe.seed, "expected", i) for i in range(len(rows))]
    prompts = [row.examples[0].ids[: row.examples[0].prompt_length] for row in rows]
    rollouts = generate(model.causal_lm, tokenizer, prompts, settings, seeds=seeds, description="policy samples")
    return [replace(row, samples=(rollout.encoded,)) for row, rollout in zip(rows, rollouts, strict=True)]


_Row = TypeVar("_Row")


def _some(rows: list[_Row], count: int, seed: int) -> list[_Row]:
    """``count`` of the rows, or all there are, in their order."""
    generator = torch.Generator(device="cpu").manual_seed(seed)
    order = torch.randperm(len(rows), generator=generator, dtype=torch.int64, device="cpu").tolist()
    return [rows[i] for i in sorted(order[:count])]


def run_responses(recipe: Recipe, policy: str, folder: Path) -> Result:
    """Several responses of a policy to some training prompts, unlabelled, for MetaRM."""
    tokenizer = load_tokenizer(policy)
    every_prompt = load_prompts(recipe.data, tokenizer, recipe.seed).train
    prompts = _some(every_prompt, recipe.iterate.prompts, stream_seed(recipe.seed, "iterate"))
    k = recipe.iterate.responses_per_prompt
    seeds = [stream_seed(recipe.seed, "responses", i, j) for i in range(len(prompts)) for j in range(k)]
    model = load_reader(policy, recipe.engine)
    repeated = [p for p in prompts for _ in range(k)]
    rollouts = answer(model, tokenizer, repeated, sampling_settings(recipe, recipe.ppo.temperature), seeds, "responses")
    release(model)
    sets = [rollouts[start : start + k] for start in range(0, len(rollouts), k)]
    rows = [
        {
            "prompt": p.row.prompt, "task": p.row.task, "responses": [r.text for r in responses],
            "finished": [r.finished for r in responses],
        }
        for p, responses in zip(prompts, sets, strict=True)
    ]  # fmt: skip
    if is_main_process():
        write_jsonl(folder / RESPONSES, rows)
    barrier()
    return {"prompts": len(prompts), "responses": len(rollouts)}


def run_select(recipe: Recipe, policy: str, scorer: str, folder: Path, *, needed: bool = False) -> Result:
    """Answer the training prompts with the initial policy, score, embed, cluster, keep the best of each cluster.

    ``needed``: something is trained on the result next, so that it must not be empty."""
    from stable_rlhf.rehearsal import needs_embeddings, select_to_folder
    from stable_rlhf.rehearsal.embed import find_embedding_model

    s = recipe.select
    if needs_embeddings(s.group_by, s.num_clusters, s.sweep, s.near_duplicate):
        find_embedding_model(s.embedding_model)  # before answering all prompts, not after
    tokenizer = load_tokenizer(policy)
    model = load_reader(policy, recipe.engine)
    make = _answers if s.candidates == "policy" else _demonstrations
    encoded, candidates = make(recipe, model, tokenizer, scorer)
    scorer_model = AdvantageModel.from_pretrained(scorer, dtype=recipe.engine.dtype).to(device())
    check_same_tokenizer(tokenizer, scorer_model.tokenizer, scorer)
    scores = scorer_model.score_encoded(encoded, description="scoring candidates")
    if "entropy" in s.criteria:
        for candidate, value in zip(candidates, mean_entropies(model, encoded), strict=True):
            candidate["entropy"] = value
    release(model)
    outside = []
    if recipe.data.rehearsal:
        result = read_demonstrations(locate(recipe.data, recipe.data.rehearsal), **reading(recipe.data))
        tell_skipped("rehearsal data", result)
        outside = result.rows
    selection = select_to_folder(
        candidates, scores, folder, embeddings_folder=folder.parent / "embeddings", outside=outside,
        seed=stream_seed(recipe.seed, "clusters") % 2**31, title=f"Rehearsal selection: {recipe.title}",
        needed=needed, **select_settings(s),
    )  # fmt: skip
    barrier()
    return {"candidates": len(candidates), "kept": len(selection.rows), "outside": len(outside)}


_Candidates = tuple[list[Encoded], list[dict[str, Any]]]


def _answers(recipe: Recipe, model: Any, tokenizer: Any, scorer: str) -> _Candidates:
    """The policy's own to the training prompts and those that are only rehearsed."""
    splits = load_prompts(recipe.data, tokenizer, recipe.seed)
    prompts = splits.train + splits.rehearsal
    if recipe.select.max_candidates:
        prompts = _some(prompts, recipe.select.max_candidates, stream_seed(recipe.seed, "candidates"))
    check_scorer_context(recipe, prompts, scorer)
    settings = sampling_settings(recipe, recipe.ppo.temperature)
    seeds = [stream_seed(recipe.seed, "select", i) for i in range(len(prompts))]
    rollouts = answer(model, tokenizer, prompts, settings, seeds, "candidates")
    return [r.encoded for r in rollouts], [
        {
            "prompt": p.row.prompt, "response": r.text, "task": p.row.task, "length": len(r.encoded.response),
            "finished": r.finished,
        }
        for p, r in zip(prompts, rollouts, strict=True)
    ]  # fmt: skip


def _demonstrations(recipe: Recipe, model: Any, tokenizer: Any, scorer: str) -> _Candidates:
    """Those of the data, as many as the scorer's context takes."""
    context = context_length(load_config(str(check_scorer_folder(scorer))))
    data = replace(recipe.data, max_length=min(recipe.data.max_length, context))
    examples, rows = load_demonstrations(data, data.demonstrations, tokenizer)
    places = list(range(len(rows)))
    if recipe.select.max_candidates:
        places = _some(places, recipe.select.max_candidates, stream_seed(recipe.seed, "candidates"))
    return [examples[i] for i in places], [
        {
            "prompt": rows[i].prompt, "response": rows[i].response, "task": rows[i].task,
            "length": len(examples[i].response), "finished": rows[i].meta.get("finished") is not False,
        }
        for i in places
    ]  # fmt: skip


def run_select_file(recipe: Recipe, candidates: list[str], folder: Path) -> Result:
    """Select from candidates that are answered and scored already: no policy, no scorer, no engine."""
    from stable_rlhf.rehearsal import select_file

    outside = locate(recipe.data, recipe.data.rehearsal) if recipe.data.rehearsal else None
    selection = select_file(
        locate(recipe.data, candidates), folder, outside=outside, **reading(recipe.data),
        embeddings_folder=folder.parent / "embeddings", seed=stream_seed(recipe.seed, "clusters") % 2**31,
        title=f"Rehearsal selection: {recipe.title}", **select_settings(recipe.select),
    )  # fmt: skip
    barrier()
    return {"candidates": len(selection.value), "kept": len(selection.rows)}


def select_settings(s: SelectArguments) -> dict[str, Any]:
    """The settings of a recipe as keywords of `select_to_folder`."""
    return {
        "group_by": s.group_by, "num_clusters": s.num_clusters, "top_k": s.top_k, "criteria": s.criteria,
        "minimum": s.minimum, "maximum": s.maximum, "near_duplicate": s.near_duplicate, "method": s.method,
        "niter": s.niter, "spherical": s.spherical, "train_rows": s.train_rows, "backend": s.backend,
        "devices": s.devices, "sweep": s.sweep, "embedding_model": s.embedding_model,
        "embedding": {"normalize": s.normalize, "batch_size": s.embedding_batch_size, "dtype": s.embedding_dtype},
    }  # fmt: skip


def run_ppo(
    recipe: Recipe, variant: Variant, policy: str, scorer: str | None, rehearsal: Path | None, folder: Path,
    *, reference: str | None = None,
) -> Result:  # fmt: skip
    """Train one policy. ``scorer``: None where the rewards do without. ``reference``: the initial policy of the KL
    penalty, where ``policy`` has moved on from it."""
    tokenizer = load_tokenizer(policy)
    splits = load_prompts(recipe.data, tokenizer, recipe.seed)
    prompts = splits.train
    check_gold(recipe.evaluate, [p.row for p in prompts])
    arguments: PPOArguments = recipe.ppo
    check_rewards(recipe, [p.row for p in prompts])
    scorer_model = None
    if SCORER in recipe.rewards.functions:
        if scorer is None:
            raise ValueError(f"rewards.functions has {SCORER!r}: give one (--scorer)")
        scorer_model = _load_scorer(recipe, variant, scorer)
        check_same_tokenizer(tokenizer, scorer_model.tokenizer, scorer)
        check_scorer_context(recipe, prompts, scorer)
    layers = arguments.num_trainable_layers
    critic = variant.training == "ppo" and variant.estimator(arguments) == "gae"
    model = load_policy(policy, recipe.engine, num_trainable_layers=layers, value_head=critic)
    reference_model = None
    if reference is not None or (in_shards(recipe.engine, policy, layers) and not recipe.engine.lora_r):
        # Another model, or shards, which cannot be copied.
        reference_model = load_policy(reference or policy, recipe.engine, num_trainable_layers=layers, frozen=True)
    gold = _gold(recipe)
    seed = stream_seed(recipe.seed, "ppo")  # the same prompts and draws for every variant
    if variant.training == "rejection":
        if scorer_model is None or recipe.rewards.functions != [SCORER]:
            raise ValueError(f"rewards.functions: rejection sampling takes {SCORER!r} alone")
        return train_rejection(
            model, tokenizer, scorer_model, prompts, recipe, folder, seed=seed, gold=gold, reference=reference_model
        )
    rehearsed: list[Encoded] = []
    if variant.rehearsal:
        if rehearsal is None:
            raise ValueError(f"variant {variant.name!r} needs rehearsal data (--rehearsal)")
        read = read_demonstrations(rehearsal, on_bad_row=recipe.data.on_bad_row)
        tell_skipped("rehearsal data", read)
        pairs = encode_demonstrations(read.rows, tokenizer, on_bad_row=recipe.data.on_bad_row)
        rehearsed = [e for e, _ in pairs if len(e) <= recipe.data.max_length]
        if not rehearsed:
            raise DataError(f"{rehearsal}: no rehearsal row fits max_length {recipe.data.max_length}")
        if long := len(pairs) - len(rehearsed):
            say(f"  {long} of {len(pairs)} rehearsal rows are too long: left out")
        if not arguments.rehearsal_prompts_in_ppo:
            reserved = {e.ids[: e.prompt_length] for e in rehearsed}
            prompts = [p for p in prompts if tuple(p.ids) not in reserved]
            if not prompts:
                raise DataError(
                    "ppo.rehearsal_prompts_in_ppo is false and every prompt was selected: nothing is left for PPO"
                )
    trainer = PPOTrainer(
        model, tokenizer, scorer_model, recipe, reference=reference_model, rehearsal=rehearsed,
        moving_average=variant.moving_average, rollouts=_server(recipe, tokenizer, model),
        estimator=variant.estimator(arguments), seed=seed,
    )  # fmt: skip
    name = f"PPO {variant.name}"
    return trainer.train(prompts, folder, name=name, gold=gold, samples=splits.main[:SAMPLE_PROMPTS])


def check_rewards(recipe: Recipe, rows: Sequence[PromptRow]) -> None:
    """Load every reward function and try it on the first rows.

    Raises:
        ValueError: see `Rewards`; on every rank.
    """
    with together(ValueError):
        rewards = Rewards(recipe.rewards, recipe.ppo.max_new_tokens)
    on_first_rank(lambda: rewards.check(rows), ValueError)


def _load_scorer(recipe: Recipe, variant: Variant, scorer: str) -> AdvantageModel:
    layers = recipe.scorer.num_trainable_layers
    with loading_in_shards(recipe.engine, frozen=True) if layers is None else nullcontext():
        model = AdvantageModel.from_pretrained(scorer, dtype=recipe.engine.dtype, num_trainable_layers=layers)
    settings = model.settings
    if settings.objective != variant.scorer:
        raise ValueError(
            f"variant {variant.name!r} needs a scorer with objective {variant.scorer!r}; {scorer!r} has "
            f"{settings.objective!r}" + (" (no e(x), so no advantage)" if variant.scorer == "am" else "")
        )
    if settings.objective == "am" and settings.num_policies == settings.num_alternates:
        raise ValueError(
            f"scorer {scorer!r} has N = K, which scores every response 0 without alternates; PPO needs N > K"
        )
    return model


def _server(recipe: Recipe, tokenizer: Any, model: PolicyModel) -> VLLMRollouts | None:
    if not recipe.rollout.server:
        return None
    variable = recipe.rollout.api_key_env
    return VLLMRollouts(
        recipe.rollout.server, tokenizer, ends=ends_of_turn(tokenizer, model.causal_lm),
        stop=ends_in_text(model.causal_lm), timeout=recipe.rollout.timeout,
        api_key=read_key("rollout.api_key_env", variable, default=RolloutArguments.api_key_env),
        vocabulary=model.causal_lm.get_input_embeddings().num_embeddings,
    )  # fmt: skip


def check_gold(evaluate: EvaluateArguments, prompts: Sequence[PromptRow]) -> None:
    """The skill world's judge knows the answers to its own prompts alone.

    Raises:
        DataError: it is to judge, and one of the prompts is not the world's.
    """
    if evaluate.judge != "gold":
        return
    from stable_rlhf.world import gold_score

    for row in prompts:
        try:
            gold_score(row.prompt, "")
        except ValueError:
            raise DataError(
                f"{row.source}: evaluate.judge 'gold' knows prompts of the skill world alone, and this is none: choose "
                "'scorer' or 'chat'"
            ) from None


def _gold(recipe: Recipe) -> Callable[[PromptRow, str], float] | None:
    if recipe.evaluate.judge != "gold":
        return None
    from stable_rlhf.world import gold_score

    return lambda row, response: gold_score(row.prompt, response)
