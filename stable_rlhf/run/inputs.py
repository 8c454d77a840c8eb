"""What a late stage of a run would stop at, found out before the first one starts."""

from __future__ import annotations

import os
from collections.abc import Sequence

from stable_rlhf.data.readers import read_comparisons, read_demonstrations, read_responses
from stable_rlhf.data.records import Comparison, DataError
from stable_rlhf.engine.hooks import check_callbacks
from stable_rlhf.engine.tracking import check_reporters
from stable_rlhf.models.loading import context_length, load_config, load_tokenizer
from stable_rlhf.policy.ppo import check_sizes
from stable_rlhf.policy.rejection import check_rounds
from stable_rlhf.rehearsal.cluster import check_clustering
from stable_rlhf.rehearsal.embed import find_embedding_model
from stable_rlhf.rehearsal.pipeline import needs_embeddings
from stable_rlhf.run.datasets import check_evaluation_sets, load_prompts, locate, read_some_prompts, reading
from stable_rlhf.run.stages import check_gold, check_rewards, check_same_tokenizer
from stable_rlhf.run.strength import check_column
from stable_rlhf.scorer.metarm import check_meta_batch
from stable_rlhf.settings.recipe import EvaluateArguments, Recipe
from stable_rlhf.settings.variants import Variant

_WORLD_ALTERNATES = 2  # policies besides SFT that the skill world's pairs come from


def check_inputs(recipe: Recipe) -> None:
    """Find out what a late stage would stop at, before the first stage starts.

    Raises:
        ValueError: settings that do not fit each other or the data, sizes that do not divide, a file that is missing or
            has bad rows, a package or a key that is not there.
    """
    data = recipe.data
    alternates = _WORLD_ALTERNATES
    if data.test_fraction == 0:
        raise DataError(
            "data.test_fraction must be above 0: scorers are compared on pairs that they were not trained on"
        )
    if recipe.model_name_or_path is not None:
        alternates = _check_files(recipe)
    else:
        check_rewards(recipe, [])
    check_policies(recipe, alternates)
    if recipe.scorer.meta_responses or recipe.iterate.rounds > 1:
        check_meta_batch(recipe.scorer)
    if recipe.scorer.meta_responses:
        read_responses(locate(data, [recipe.scorer.meta_responses]), **reading(data))
    check_reporters(recipe.report_to)
    check_callbacks(recipe.callbacks)
    check_key(recipe.evaluate)
    for name, (variant, own) in recipe.policies.items():
        try:
            _check_policy(variant, own)
        except ValueError as error:
            raise ValueError(f"variations.{name}: {error}" if name in recipe.variations else str(error)) from None


def _check_policy(variant: Variant, recipe: Recipe) -> None:
    """Of one policy, with its own settings."""
    if variant.training == "rejection":
        check_rounds(recipe.ppo)
    else:
        check_sizes(recipe.ppo)
    if variant.rehearsal:
        s = recipe.select
        if needs_embeddings(s.group_by, s.num_clusters, s.sweep, s.near_duplicate):
            find_embedding_model(s.embedding_model)
        try:
            check_clustering(s.method, s.backend, s.devices, s.spherical)
        except ValueError as error:
            raise ValueError(f"select: {error}") from None
        if recipe.data.rehearsal:
            read_demonstrations(locate(recipe.data, recipe.data.rehearsal), **reading(recipe.data))


def _check_files(recipe: Recipe) -> int:
    """Read every data file once; returns the number of alternate policies in the pairs."""
    data = recipe.data
    for name in ("pairs", "prompts") if needs_pairs(recipe) else ("prompts",):
        if not getattr(data, name):
            raise DataError(f"data.{name}: name at least one file")
    if recipe.evaluate.judge == "scorer" and not data.judge_fraction:
        raise DataError("evaluate.judge 'scorer' needs pairs of its own: set data.judge_fraction above 0")
    if not (data.eval_main or data.forget_tasks or data.forget_prompts):
        raise DataError(
            "data.forget_tasks: name the forget set's tasks (or give data.forget_prompts, or data.eval_main and "
            ".eval_forget)"
        )
    prompts = read_some_prompts(data, data.prompts, recipe.seed).rows
    check_evaluation_sets(data, prompts)
    check_rewards(recipe, prompts)
    for files in filter(None, (data.eval_main, data.eval_forget, data.forget_prompts)):
        prompts += read_some_prompts(data, files, recipe.seed).rows
    check_gold(recipe.evaluate, prompts)
    if data.demonstrations:
        read_demonstrations(locate(data, data.demonstrations), **reading(data))
    if not data.pairs:
        return 0
    pairs = read_comparisons(locate(data, data.pairs), **reading(data)).rows
    if recipe.scorer.denoise and recipe.strength.check is not None:
        check_column(recipe.strength.check, pairs)
    return _alternates(pairs)


def needs_pairs(recipe: Recipe) -> bool:
    """Whether a run trains a scorer, to reward, to select or to judge."""
    return bool(recipe.scorers) or recipe.evaluate.judge == "scorer" or bool(recipe.scorer.denoise)


def _alternates(pairs: Sequence[Comparison]) -> int:
    first = pairs[0].alt_logprobs
    return len(first[0]) if first else 0


def check_policies(recipe: Recipe, alternates: int) -> None:
    """N of Eq. 8 against the alternate policies K that the pairs tell of.

    Raises:
        ValueError: N < K, or N = K where PPO is to score by it.
    """
    given = recipe.scorer.num_policies
    if given is None or not alternates:
        return
    needs = "at least" if given < alternates else "above" if any(v.scorer == "am" for v in recipe.variant_rows) else ""
    if given < alternates or (needs and given == alternates):
        raise ValueError(
            f"scorer.num_policies must be {needs} the {alternates} alternate policies of the pairs, got {given}"
            + ("; with as many every response scores 0 in PPO" if given == alternates else "")
        )


def check_key(evaluate: EvaluateArguments) -> None:
    """A key's variable that was named must be there, or the judge refuses every question at the run's end.

    Raises:
        ValueError: names the setting and the variable.
    """
    name, default = evaluate.judge_api_key_env, EvaluateArguments().judge_api_key_env
    if evaluate.judge == "chat" and name != default and not os.environ.get(name):
        raise ValueError(f"evaluate.judge_api_key_env: the environment has no variable {name!r}")


def check_model(recipe: Recipe, folder: str) -> None:
    """Settings that must fit the initial policy, now that it is here, and a scorer's backbone of its own.

    Raises:
        ValueError: a number of trainable layers that it has not, prompts and responses longer than its context, a
            scorer's backbone that reads other tokens.
    """
    policy = load_config(folder)
    backbone = recipe.scorer_model_name_or_path
    scorer = policy if backbone is None else load_config(backbone)
    for name, config, layers in (
        ("ppo", policy, recipe.ppo.num_trainable_layers), ("scorer", scorer, recipe.scorer.num_trainable_layers),
    ):  # fmt: skip
        blocks = getattr(config.get_text_config(decoder=True), "num_hidden_layers", None)
        if layers is not None and blocks is not None and layers >= blocks:
            words = f"between 1 and {blocks - 1}" if blocks > 1 else "unset"
            raise ValueError(
                f"{name}.num_trainable_layers must be {words} for this model of {blocks} blocks, got {layers}"
            )
    tokenizer = load_tokenizer(folder)
    if backbone is not None:
        check_same_tokenizer(tokenizer, load_tokenizer(backbone), backbone)
    new, context = recipe.ppo.max_new_tokens, context_length(policy)
    if recipe.model_name_or_path is not None and recipe.data.max_prompt_length + new > context:
        splits = load_prompts(recipe.data, tokenizer, recipe.seed)
        parts = splits.train, splits.main, splits.forget, splits.rehearsal
        longest = max(len(p.ids) for part in parts for p in part)
        if longest + new > context:
            raise DataError(
                f"a prompt of {longest} tokens and ppo.max_new_tokens {new} do not fit the model's context of {context}"
                ": lower data.max_prompt_length or ppo.max_new_tokens"
            )
