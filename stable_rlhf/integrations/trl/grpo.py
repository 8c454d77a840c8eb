"""TRL's GRPO with its loss and its gradient made in one pass over the head, and rehearsal rows in that same pass."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad
from trl import GRPOTrainer

from stable_rlhf.integrations.transformers import FusedOutput, fuse_lm_head, fused_policy_loss
from stable_rlhf.integrations.trl import patch_logprob
from stable_rlhf.integrations.trl.rehearsal import RehearsalRows, padded
from stable_rlhf.ops import PolicyLossConfig

_LOSSES = ("grpo", "bnpo", "dr_grpo", "dapo", "cispo", "luspo")
_IMAGES = (
    "pixel_values", "image_grid_thw", "num_images", "pixel_attention_mask", "spatial_shapes", "num_tiles",
    "image_sizes", "token_type_ids", "mm_token_type_ids", "image_position_ids",
)  # fmt: skip


class FusedGRPOTrainer(GRPOTrainer):
    """TRL's ``GRPOTrainer``: the same losses, weights and metrics, from
    :func:`stable_rlhf.integrations.transformers.fused_policy_loss`.

    What one pass cannot say is TRL's own loss on our log-probs: ``sapo``, ``vespo``, ``top_entropy_quantile`` below 1,
    ``off_policy_mask_threshold``, ``cast_lm_head_to_fp32``, images, models that do more to their logits than scale and
    cap them, and a few bounds (docs/guide/integrations.md).

    Args:
        rehearsal_dataset: examples to go on learning beside the rewards (SFT or pre-training data), in TRL's formats:
            prompt and completion, messages, or text. As many rows as the policy's join each forward and backward.
        rehearsal_coef: factor on their mean negative log-prob in the loss.

    Raises:
        ValueError: rehearsal beside a loss that one pass cannot say, or a data set that is none.
    """

    def __init__(self, *arguments: Any, rehearsal_dataset: Any = None, rehearsal_coef: float = 1.0, **named: Any):
        super().__init__(*arguments, **named)
        self._unsaid = _unsaid(self) or _refused(self.model)
        self._scored: tuple[Tensor, Tensor, Tensor | None] | None = None
        self._rehearsal, self._rehearsal_coef = None, PolicyLossConfig(rehearsal_coef=rehearsal_coef).rehearsal_coef
        self._at = (-1, 0)  # step, calls in it
        if rehearsal_dataset is not None:
            if self._unsaid:
                raise ValueError(f"rehearsal_dataset: cannot join a loss with {self._unsaid}; change that, or leave it")
            self._rehearsal = RehearsalRows(rehearsal_dataset, self.processing_class, self.args.seed)

    def _get_per_token_logps_and_entropies(self, *arguments: Any, **named: Any) -> Any:
        if self._scored is not None:
            return self._scored
        with patch_logprob():
            return super()._get_per_token_logps_and_entropies(*arguments, **named)

    def _compute_loss(self, model: Any, inputs: dict[str, Any]) -> Tensor:
        images = [name for name in _IMAGES if inputs.get(name) is not None]
        if self._unsaid or images:
            if self._rehearsal is not None:
                raise ValueError(f"rehearsal_dataset: cannot join rows with {images[0]}; train without images")
            own: Tensor = super()._compute_loss(model, inputs)
            return own
        training = self.model.training
        accumulation = self.current_gradient_accumulation_steps if training else 1
        output, scored = self._one_pass(model, inputs, accumulation, training)
        # TRL's own function makes its metrics, and moves its entropy coefficient, from the log-probs of this pass.
        aux_loss = None if output.aux_loss is None else output.aux_loss.detach()
        self._scored = (*scored, aux_loss)
        try:
            super()._compute_loss(model, inputs)
        finally:
            self._scored = None
        assert output.loss is not None
        if self.aux_loss_enabled:
            return output.loss + self.router_aux_loss_coef * output.aux_loss / accumulation
        return output.loss

    def _one_pass(
        self, model: Any, inputs: dict[str, Any], accumulation: int, training: bool
    ) -> tuple[FusedOutput, tuple[Tensor, Tensor]]:
        """The loss, and the completions' log-probs and entropies [B, C]."""
        ids = torch.cat([inputs["prompt_ids"], inputs["completion_ids"]], 1)  # [B, P + C]
        attention = torch.cat([inputs["prompt_mask"], inputs["completion_mask"]], 1)
        mask = inputs["completion_mask"]
        mask = mask * inputs["tool_mask"] if "tool_mask" in inputs else mask  # [B, C]
        first = inputs["prompt_ids"].shape[1] - 1  # the column that predicts a completion's first token
        columns = slice(first, first + mask.shape[1])
        advantage = inputs["advantages"]
        advantage = advantage.unsqueeze(1) if advantage.dim() == 1 else advantage
        if self.use_vllm and self.vllm_importance_sampling_correction:
            advantage = advantage * inputs["importance_sampling_ratio"]  # not the row's weight, which the KL has too
        tokens = {
            "kind": mask.to(torch.int64),
            "advantage": advantage.expand(mask.shape),
            "old_logprob": inputs.get("old_per_token_logps"),
            "ref_logprob": inputs["ref_per_token_logps"] if self.beta != 0.0 else None,
        }
        weight, denominator = self._weights(inputs, mask, accumulation, training)
        tokens["row_weight"] = None if weight is None else weight.expand(mask.shape)
        rows: dict[str, Any] = {k: None if v is None else pad(v, (first, 1)) for k, v in tokens.items()}
        target = pad(ids[:, 1:], (0, 1), value=-100)
        rows["temperature"] = self.temperature
        if self._rehearsal is not None and training:
            ids, attention, target, rows = self._with_rehearsal(ids, attention, target, rows, accumulation)
        named = {"output_router_logits": True} if self.aux_loss_enabled else {}
        with self.accelerator.autocast():
            output = fused_policy_loss(
                model, {"input_ids": ids, "attention_mask": attention, **named}, target, config=self._config(),
                policy_denominator=denominator, entropy_denominator=mask.sum().clamp(min=1.0) * accumulation,
                grad_scale=self._loss_scale() if training else 1.0, **rows,
            )  # fmt: skip
        if "rehearsal_denominator" in rows:
            loss = output.metrics["rehearsal_loss"] * accumulation
            self._metrics["train"]["rehearsal_loss"].append(self.accelerator.gather(loss).mean().item())
        assert output.entropy is not None
        count = mask.shape[0]
        return output, (output.logprob[:count, columns].detach(), output.entropy[:count, columns].detach())

    def _loss_scale(self) -> float:
        """What fp16 training will scale the loss by: the gradients are made before, and would be rounded to 0."""
        if self.accelerator.scaler is not None:
            return float(self.accelerator.scaler.get_scale())
        engine = getattr(getattr(self.accelerator, "deepspeed_engine_wrapped", None), "engine", None)
        return float(getattr(getattr(engine, "optimizer", None), "loss_scale", None) or 1.0)

    def _weights(
        self, inputs: dict[str, Any], mask: Tensor, accumulation: int, training: bool
    ) -> tuple[Tensor | None, float | Tensor]:
        """Each token's weight, and what their sum is divided by."""
        if self.loss_type == "grpo":
            return 1.0 / mask.sum(-1, keepdim=True).clamp(min=1.0), float(len(mask) * accumulation)
        if self.loss_type == "luspo":
            return None, float(len(mask) * accumulation)
        if self.loss_type == "bnpo":
            return None, mask.sum().clamp(min=1.0) * accumulation
        if self.loss_type == "dr_grpo":
            return None, float(len(mask) * self.max_completion_length * accumulation)
        whole = inputs["num_items_in_batch"].clamp(min=1.0) / self.accelerator.num_processes  # dapo, cispo
        return None, whole * accumulation / self.args.steps_per_generation if training else whole

    def _config(self) -> PolicyLossConfig:
        coefficient = self.entropy_coef if self._entropy_bonus_enabled else 0.0
        if self.use_adaptive_entropy and self._last_world_entropy > self.args.entropy_target:
            coefficient = 0.0
        cispo = self.loss_type == "cispo"
        return PolicyLossConfig(
            objective="cispo" if cispo else "ppo",
            importance_level=self.importance_sampling_level,
            clip_low=1.0 if cispo else self.epsilon_low,
            clip_high=self.epsilon_high - 1.0 if cispo else self.epsilon_high,
            dual_clip=None if cispo else self.args.delta,
            kl_coef=self.beta,
            kl_unbiased=self.args.use_bias_correction_kl,
            entropy_coef=coefficient,
            rehearsal_coef=self._rehearsal_coef,
        )

    def _with_rehearsal(
        self, ids: Tensor, attention: Tensor, target: Tensor, rows: dict[str, Any], accumulation: int
    ) -> tuple[Tensor, Tensor, Tensor, dict[str, Any]]:
        """The batch with as many rehearsal rows below it."""
        assert self._rehearsal is not None
        step = self.state.global_step
        calls = self._at[1] if self._at[0] == step else 0
        self._at = (step, calls + 1)
        number = step * self.args.gradient_accumulation_steps + calls
        number = number * self.accelerator.num_processes + self.accelerator.process_index
        filler = self._tokenizer.pad_token_id
        more = padded(self._rehearsal.batch(number, len(ids)), filler, ids.device)
        width = max(ids.shape[1], more[0].shape[1])

        def joined(above: Tensor, below: Tensor, value: float) -> Tensor:
            return torch.cat([pad(x, (0, width - x.shape[1]), value=value) for x in (above, below)])

        nothing = torch.zeros(more[2].shape, dtype=torch.float32, device=ids.device)
        temperature = torch.full(target.shape, self.temperature, dtype=torch.float32, device=ids.device)
        learnt = more[2] != -100
        rows = {
            **{k: v if v is None else joined(v, nothing, 0.0) for k, v in rows.items() if k != "temperature"},
            "kind": joined(rows["kind"], learnt * 2, 0),
            "temperature": joined(temperature, nothing + 1.0, 1.0),
            "rehearsal_denominator": learnt.sum() * accumulation,
        }
        if rows["row_weight"] is not None:
            rows["row_weight"][len(ids) :] = 1.0
        return (
            joined(ids, more[0], filler),
            joined(attention, more[1], 0),
            joined(target, more[2], -100),
            rows,
        )


def _unsaid(trainer: Any) -> str | None:
    """What of a trainer's settings one pass cannot say."""
    arguments, cispo = trainer.args, trainer.loss_type == "cispo"
    reasons = {
        f"loss_type={trainer.loss_type!r}": trainer.loss_type not in _LOSSES,
        f"top_entropy_quantile={trainer.top_entropy_quantile}": trainer.top_entropy_quantile < 1.0,
        f"off_policy_mask_threshold={trainer.off_policy_mask_threshold}": trainer.off_policy_mask_threshold is not None,
        "cast_lm_head_to_fp32": arguments.cast_lm_head_to_fp32,
        f"epsilon={trainer.epsilon_low}": not cispo and trainer.epsilon_low > 1.0,
        f"epsilon_high={trainer.epsilon_high}": cispo and trainer.epsilon_high < 1.0,
        # Below the clip it bounds positive advantages too.
        f"delta={arguments.delta}": not cispo
        and arguments.delta is not None
        and arguments.delta <= 1.0 + trainer.epsilon_high,
    }
    return next((reason for reason, holds in reasons.items() if holds), None)


def _refused(model: Any) -> str | None:
    """Why a model cannot be fused, or it is from now on."""
    try:
        fuse_lm_head(model)
    except ValueError as error:
        return f"this {error}"
    return None
