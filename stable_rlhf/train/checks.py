"""Settings that do not go together: what no stage can use is refused before the first one starts."""

from __future__ import annotations

from stable_rlhf.settings import check_settings
from stable_rlhf.train.config import Recipe, StudyArguments


def check(recipe: Recipe) -> None:
    """Refuse values that no stage can use, alone (`stable_rlhf.settings`) or together.

    Raises:
        ValueError: names the setting, what it takes and what it got.
    """
    check_settings(recipe)
    from stable_rlhf.rehearsal.select import check_criteria

    if recipe.scorer.denoise:
        from stable_rlhf.scorer.denoise import parse_bands

        parse_bands("scorer.denoise", recipe.scorer.denoise)
    for name in ("criteria", "minimum", "maximum"):
        check_criteria(f"select.{name}", getattr(recipe.select, name))
    if recipe.engine.bf16 and recipe.engine.fp16:
        raise ValueError("engine.bf16 and engine.fp16: choose one of them")
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
        if len(set(given)) < len(given):
            raise ValueError(f"study.{name}: seeds must be different, got {given}")
    if both := sorted({*study.seeds} & {*study.validation_seeds}):
        raise ValueError(
            f"study.seeds and study.validation_seeds share {both}: what chose the settings cannot judge them"
        )
