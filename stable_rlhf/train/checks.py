"""Bounds of the settings: what no stage can use is refused before the first one starts."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from stable_rlhf.train.config import Recipe, StudyArguments

_AT_LEAST_ONE = (
    "launch.nodes launch.devices_per_node launch.port data.eval_prompts data.max_prompt_length data.max_length "
    "world.hidden_size world.num_hidden_layers world.num_attention_heads world.comparisons "
    "sft.per_device_train_batch_size sft.gradient_accumulation_steps scorer.per_device_train_batch_size "
    "scorer.gradient_accumulation_steps scorer.num_policies scorer.bins scorer.num_trainable_layers "
    "scorer.swav_prototypes scorer.meta_batch_size strength.num_scorers strength.folds select.num_clusters "
    "select.top_k select.niter select.train_rows select.embedding_batch_size ppo.total_steps ppo.rollout_batch_size "
    "ppo.num_ppo_epochs ppo.num_mini_batches ppo.per_device_train_batch_size ppo.per_device_rehearsal_batch_size "
    "ppo.max_new_tokens ppo.num_trainable_layers ppo.rejection_samples iterate.rounds iterate.prompts "
    "rollout.sample_prompts "
    "checkpoint.save_total_limit engine.lora_alpha engine.loss_workspace_mib evaluate.judge_workers study.workers"
)
_ABOVE_ZERO = (
    "launch.device_memory_gib sft.num_train_epochs scorer.num_train_epochs scorer.margin scorer.max_weight "
    "scorer.contrastive_temperature world.hot_temperature ppo.temperature ppo.kl_target ppo.rollout_importance_clip "
    "guard.max_update_kl select.near_duplicate"
)
_NOT_NEGATIVE = (
    "seed launch.max_restarts checkpoint.save_steps rollout.sample_steps data.max_pairs data.max_prompts_per_task "
    "engine.max_grad_norm engine.weight_decay engine.lora_r guard.max_kl world.length_bonus sft.learning_rate "
    "sft.max_steps scorer.learning_rate scorer.head_learning_rate scorer.expected_coef scorer.contrastive_coef "
    "scorer.eval_steps scorer.meta_learning_rate strength.examples select.max_candidates ppo.learning_rate "
    "ppo.head_learning_rate ppo.rehearsal_coef ppo.kl_coef ppo.cliprange ppo.cliprange_high ppo.cliprange_value "
    "ppo.vf_coef evaluate.temperature evaluate.tie_margin"
)
_SHARES = (
    "data.test_fraction data.judge_fraction world.wrong_labels world.early_share sft.warmup_ratio sft.min_lr_ratio "
    "scorer.warmup_ratio scorer.min_lr_ratio scorer.label_smoothing scorer.contrastive_dropout ppo.gamma ppo.lam "
    "ppo.top_p ppo.warmup_ratio engine.lora_dropout engine.ema_decay"
)


def check(recipe: Recipe) -> None:
    """Refuse numbers that no stage can use, before the first stage starts.

    Raises:
        ValueError: names the setting, what it takes and what it got.
    """
    limits: tuple[tuple[str, str, Callable[[float], bool]], ...] = (
        (_AT_LEAST_ONE, "at least 1", lambda v: v >= 1),
        (_ABOVE_ZERO, "above 0", lambda v: v > 0),
        (_NOT_NEGATIVE, "at least 0", lambda v: v >= 0),
        (_SHARES, "between 0 and 1", lambda v: 0 <= v <= 1),
    )
    for names, words, holds in limits:
        for name in names.split():
            value: Any = recipe
            for part in name.split("."):
                value = getattr(value, part)
            if value is not None and not holds(value):
                raise ValueError(f"{name} must be {words}, got {value}")
    from stable_rlhf.rehearsal.select import check_criteria

    if recipe.scorer.denoise:
        from stable_rlhf.scorer.denoise import parse_bands

        parse_bands("scorer.denoise", recipe.scorer.denoise)
    for name in ("criteria", "minimum", "maximum"):
        check_criteria(f"select.{name}", getattr(recipe.select, name))
    if recipe.select.near_duplicate is not None and recipe.select.near_duplicate > 1:
        raise ValueError(f"select.near_duplicate is a cosine, at most 1, got {recipe.select.near_duplicate}")
    if recipe.engine.bf16 and recipe.engine.fp16:
        raise ValueError("engine.bf16 and engine.fp16: choose one of them")
    for section, name in (("engine", "lora_dropout"), ("engine", "ema_decay"), ("scorer", "contrastive_dropout")):
        if getattr(getattr(recipe, section), name) == 1:
            raise ValueError(f"{section}.{name} must be below 1: at 1 nothing is left to train with")
    if recipe.iterate.responses_per_prompt < 2:
        raise ValueError(f"iterate.responses_per_prompt must be at least 2, got {recipe.iterate.responses_per_prompt}")
    if recipe.launch.port > 65535:
        raise ValueError(f"launch.port must be at most 65535, got {recipe.launch.port}")
    if not recipe.variants or len(set(recipe.variants)) < len(recipe.variants):
        raise ValueError(f"variants: name at least one, each once, got {recipe.variants}")
    if not all(recipe.ppo.stop):
        raise ValueError("ppo.stop: an empty string would end every response at once")
    server = recipe.rollout.server
    if server is not None and not server.startswith(("http://", "https://")):
        raise ValueError(f"rollout.server must be an address, http://host:port, got {server!r}")
    if recipe.guard.on_kl == "lower_target" and (recipe.ppo.kl_target is None or recipe.guard.max_kl is None):
        raise ValueError("guard.on_kl 'lower_target' needs guard.max_kl and ppo.kl_target")
    if recipe.evaluate.judge == "chat" and not (recipe.evaluate.judge_base_url and recipe.evaluate.judge_model):
        raise ValueError("evaluate.judge 'chat' needs evaluate.judge_base_url and evaluate.judge_model")
    _check_seeds(recipe.study)


def _check_seeds(study: StudyArguments) -> None:
    for name in ("seeds", "validation_seeds"):
        given: list[int] = getattr(study, name)
        if any(seed < 0 for seed in given) or len(set(given)) < len(given):
            raise ValueError(f"study.{name}: seeds must be at least 0 and different, got {given}")
    if both := sorted({*study.seeds} & {*study.validation_seeds}):
        raise ValueError(
            f"study.seeds and study.validation_seeds share {both}: what chose the settings cannot judge them"
        )
