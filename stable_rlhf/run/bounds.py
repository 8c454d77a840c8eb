"""Settings that do not go together: what no stage can use is refused before the first one starts."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import fields, replace
from typing import Any

from stable_rlhf.settings.advantages import check_advantages
from stable_rlhf.settings.ranges import check_settings
from stable_rlhf.settings.recipe import Recipe, suggestion
from stable_rlhf.settings.stages import BUILT_IN_REWARDS, REGEX, SCORER
from stable_rlhf.settings.variants import VARIANTS
from stable_rlhf.system import plugins
from stable_rlhf.system.http import SECRET_NAME, check_address, has_credentials, without_credentials

# An evaluation answers with every policy alike, and reads them together.
_OF_ALL_POLICIES = ("ppo.max_new_tokens", "ppo.num_trainable_layers", "ppo.top_p", "ppo.stop")


def check(recipe: Recipe) -> None:
    """Refuse values that no stage can use, alone (`stable_rlhf.settings.ranges`) or together.

    Raises:
        ValueError: names the setting, what it takes and what it got.
    """
    check_settings(recipe)
    _check_variations(recipe)
    from stable_rlhf.rehearsal.select import check_criteria

    if recipe.scorer.denoise:
        from stable_rlhf.scorer.denoise import parse_bands

        parse_bands("scorer.denoise", recipe.scorer.denoise)
    for name in ("criteria", "minimum", "maximum"):
        check_criteria(f"select.{name}", getattr(recipe.select, name))
    _check_lengths(recipe)
    if recipe.engine.offload_optimizer and not recipe.engine.zero_stage and not recipe.engine.half:
        raise ValueError("engine.offload_optimizer needs engine.zero_stage 1, 2 or 3")
    if recipe.world.hidden_size % (2 * recipe.world.num_attention_heads):
        raise ValueError(
            f"world.hidden_size {recipe.world.hidden_size} must be a multiple of twice world.num_attention_heads "
            f"{recipe.world.num_attention_heads}"
        )
    if recipe.engine.bf16 and recipe.engine.fp16:
        raise ValueError("engine.bf16 and engine.fp16: choose one of them")
    if not (recipe.variants or recipe.variations) or len(set(recipe.variants)) < len(recipe.variants):
        raise ValueError(f"variants: name at least one, each once, got {recipe.variants}")
    if recipe.select.candidates == "demonstrations" and recipe.model_name_or_path and not recipe.data.demonstrations:
        raise ValueError("select.candidates 'demonstrations' needs data.demonstrations")
    if not all(recipe.ppo.stop):
        raise ValueError("ppo.stop: an empty string would end every response at once")
    _check_rewards(recipe)
    check_advantages(recipe.ppo)
    _check_outside(recipe)
    if recipe.guard.on_kl == "lower_target" and (recipe.ppo.kl_target is None or recipe.guard.max_kl is None):
        raise ValueError("guard.on_kl 'lower_target' needs guard.max_kl and ppo.kl_target")
    for name, (variant, policy) in recipe.policies.items():
        at, ppo = f"variations.{name}: " if name in recipe.variations else "", policy.ppo
        if variant.training == "ppo" and ppo.kl_target is not None and not ppo.kl_coef:
            raise ValueError(f"{at}ppo.kl_target needs a ppo.kl_coef above 0 to begin with")
        if variant.rehearsal and ppo.rehearsal_target is not None and not ppo.rehearsal_coef:
            raise ValueError(f"{at}ppo.rehearsal_target needs a ppo.rehearsal_coef above 0 to begin with")
    if recipe.evaluate.judge == "chat" and not (recipe.evaluate.judge_base_url and recipe.evaluate.judge_model):
        raise ValueError("evaluate.judge 'chat' needs evaluate.judge_base_url and evaluate.judge_model")
    _check_study(recipe)
    for spec in recipe.callbacks:
        plugins.split("callbacks", spec)


def _check_variations(recipe: Recipe) -> None:
    settings = [f"{section}.{f.name}" for section in ("ppo", "select") for f in fields(getattr(recipe, section))]
    known = ["variant", "data.rehearsal", *(name for name in settings if name not in _OF_ALL_POLICIES)]
    for name, own in recipe.variations.items():
        at = f"variations.{name}"
        if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]{0,60}", name) or "-round-" in name:
            raise ValueError(f"{at}: a name is of letters, digits, '.', '_' and '-', and holds no '-round-'")
        if name in VARIANTS or name.endswith("-stopped"):  # the guard's folder of a policy that it stopped
            raise ValueError(f"{at}: is a name already: call it otherwise")
        if not isinstance(own.get("variant"), str) or own["variant"] not in VARIANTS:
            raise ValueError(f"{at}.variant: one of {', '.join(VARIANTS)}, got {own.get('variant')!r}")
        if not VARIANTS[own["variant"]].rehearsal:
            for setting in own:
                if setting == "data.rehearsal" or setting.startswith("ppo.rehearsal_"):
                    raise ValueError(f"{at}: {setting!r} changes nothing, variant {own['variant']!r} does not rehearse")
        if wrong := [setting for setting in own if setting not in known]:
            words = ": it is the same for all policies" if wrong[0] in _OF_ALL_POLICIES else suggestion(wrong, known)
            raise ValueError(f"{at}: {wrong[0]!r} is no setting of one policy{words}")
        try:
            study = replace(recipe.study, compare=[])  # it names others
            alone = replace(recipe, variants=[own["variant"]], variations={name: own}, study=study)
            check(replace(alone.policies[name][1], variations={}))
        except ValueError as error:
            raise ValueError(f"{at}: {error}") from None


def _check_outside(recipe: Recipe) -> None:
    """What is said to servers, and what must not be written into records: settings are, everywhere."""
    evaluate = recipe.evaluate
    for setting, address in (
        ("rollout.server", recipe.rollout.server),
        ("evaluate.judge_base_url", evaluate.judge_base_url),
    ):
        if address is not None:
            check_address(setting, address)
    for setting, text in _texts(recipe.as_dict()):
        if has_credentials(text):
            raise ValueError(
                f"{setting}: {without_credentials(text)!r} holds credentials, and settings are written into every "
                "record of a run: leave them out"
            )
    for setting, name in (
        ("evaluate.judge_api_key_env", evaluate.judge_api_key_env),
        ("rollout.api_key_env", recipe.rollout.api_key_env),
    ):
        if not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]*|", name):
            raise ValueError(f"{setting} is the name of an environment variable, not the key itself")
    ours = {"model", "messages", "stream", "n"}
    for name in evaluate.judge_request:
        if name in ours:
            raise ValueError(f"evaluate.judge_request.{name}: every request has its own, it cannot be set")
        if SECRET_NAME.search(str(name)):
            raise ValueError(
                f"evaluate.judge_request.{name}: settings are written into every record of a run; put a key into the "
                "environment variable that evaluate.judge_api_key_env names"
            )


def _texts(values: Any, name: str = "") -> Iterator[tuple[str, str]]:
    """Every text among settings, with its name."""
    if isinstance(values, str):
        yield name, values
    elif isinstance(values, dict):
        for key, value in values.items():
            yield from _texts(value, f"{name}.{key}" if name else str(key))
    elif isinstance(values, list | tuple):
        for value in values:
            yield from _texts(value, name)


def _check_rewards(recipe: Recipe) -> None:
    rewards = recipe.rewards
    functions, weights = rewards.functions, rewards.weights
    if not functions or len(set(functions)) < len(functions):
        raise ValueError(f"rewards.functions: name at least one, each once, got {functions}")
    if weights and len(weights) != len(functions):
        raise ValueError(f"rewards.weights: expected one for each of the {len(functions)} functions, got {weights}")
    if weights and not any(weights):
        raise ValueError("rewards.weights: all are 0, so there is no reward at all")
    for spec in functions:
        if spec != SCORER and spec not in BUILT_IN_REWARDS:
            plugins.split(f"rewards.functions ({', '.join([SCORER, *BUILT_IN_REWARDS])}, or your own)", spec)
    if (REGEX in functions) != (rewards.pattern is not None):
        raise ValueError(f"rewards.pattern and {REGEX!r} in rewards.functions: give both, or neither")
    try:
        re.compile(rewards.pattern or "")
    except re.error as error:
        raise ValueError(f"rewards.pattern: not a regular expression: {error}") from None
    if functions != [SCORER] and any(v.training == "rejection" for v in recipe.variant_rows):
        raise ValueError("rewards.functions: the variant 'rejection' takes 'scorer' alone")
    if SCORER not in functions and recipe.iterate.rounds > 1:
        raise ValueError(f"iterate.rounds above 1 trains a scorer each round: put {SCORER!r} into rewards.functions")


def _check_lengths(recipe: Recipe) -> None:
    data = recipe.data
    if data.max_length < data.max_prompt_length:
        raise ValueError(
            f"data.max_length {data.max_length} (prompt and response) must be at least data.max_prompt_length "
            f"{data.max_prompt_length}"
        )
    if data.test_fraction + data.judge_fraction >= 1:
        raise ValueError(
            f"data.test_fraction {data.test_fraction} and data.judge_fraction {data.judge_fraction} must be below 1 "
            "together: nothing is left to train on"
        )


def _check_study(recipe: Recipe) -> None:
    study, policies = recipe.study, ("sft", *recipe.variants, *recipe.variations)
    for pair in study.compare:
        if len(pair) != 2 or len(set(pair)) != 2 or not set(pair) <= {*policies}:
            raise ValueError(f"study.compare: pairs of two policies of {', '.join(policies)}, got {pair}")
    for name in ("seeds", "validation_seeds"):
        given: list[int] = getattr(study, name)
        if len(set(given)) < len(given):
            raise ValueError(f"study.{name}: seeds must be different, got {given}")
    if both := sorted({*study.seeds} & {*study.validation_seeds}):
        raise ValueError(
            f"study.seeds and study.validation_seeds share {both}: what chose the settings cannot judge them"
        )
