"""The DeepSpeed engine, and the few collectives the runs need."""

from __future__ import annotations

import functools
import json
import math
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from stable_rlhf.data.jsonl import to_json
from stable_rlhf.engine.frozen import HEADS, release, set_up
from stable_rlhf.engine.order import stream_seed
from stable_rlhf.engine.shards import load_pieces, save_pieces
from stable_rlhf.engine.weights import Average, Whole, gathered_once, save_model, whole
from stable_rlhf.models.lora import adapters_off, add_lora
from stable_rlhf.models.policy import PolicyModel
from stable_rlhf.ranks import device, gather_objects, rank, sum_over_ranks, world_size
from stable_rlhf.settings.recipe import EngineArguments

_SCHEDULE = "schedule.json"
_LOSS_SCALE = "loss-scale.json"
_SCALER_STATE = ("cur_scale", "cur_iter", "last_overflow_iter", "cur_hysteresis")
_AVERAGE = "average.safetensors"


def _part_generators() -> None:
    """Let every rank draw dropout masks of its own, rank 0 those of one process alone. For when the model is made:
    until then all ranks draw the same."""
    seed = torch.initial_seed()
    first = gather_objects(seed)[0]
    if rank() and seed == first:  # else an engine before this one has done it
        torch.manual_seed(stream_seed(seed, "rank", rank()))


@dataclass(frozen=True)
class Schedule:
    """Learning rates over the steps: linear warm-up, then a cosine down to ``min_lr_ratio``. Heads have a rate of their
    own where ``head_learning_rate`` says so."""

    learning_rate: float
    total_steps: int
    warmup_ratio: float = 0.0
    min_lr_ratio: float = 1.0
    head_learning_rate: float | None = None

    def factor(self, step: int) -> float:
        """Of the learning rates, at a step."""
        warmup = math.ceil(self.warmup_ratio * self.total_steps)
        if step < warmup:
            return (step + 1) / (warmup + 1)
        done = min(1.0, (step - warmup) / max(1, self.total_steps - warmup))
        return self.min_lr_ratio + (1 - self.min_lr_ratio) * 0.5 * (1 + math.cos(math.pi * done))


class _AdamW(torch.optim.AdamW):
    """AdamW with the flag of DeepSpeed's own optimisers: while ``overflow`` is set a step leaves the weights alone."""

    overflow = False

    def step(self, closure: Any = None) -> Any:
        return None if self.overflow else super().step(closure)


class Engine:
    """One DeepSpeed engine around a module whose ``forward`` computes its own loss.

    Gradients of all micro-steps and ranks are **summed** (DeepSpeed averages; :meth:`backward` undoes that), so a loss
    divided by a global count gives the same step however the batch is cut.

    A loss or a gradient norm that is not finite never reaches the weights: it raises FloatingPointError, or, with
    ``skip_nonfinite``, the optimiser step is left out (and so are all its micro-steps).

    In fp16 DeepSpeed's dynamic loss scaling runs: a gradient that is not finite is taken for an overflow of the scaled
    loss; its step is left out, counted, and lowers the scale. At the lowest scale it is not finite by itself, as above.
    """

    def __init__(
        self,
        module: nn.Module,
        arguments: EngineArguments,
        schedule: Schedule,
        *,
        micro_batch_size: int = 1,
        gradient_accumulation_steps: int = 1,
        skip_nonfinite: bool = False,
    ) -> None:
        import deepspeed
        from deepspeed.accelerator import get_accelerator

        self.arguments, self.accumulation = arguments, gradient_accumulation_steps
        if arguments.fp16 and not get_accelerator().is_fp16_supported():
            raise ValueError("engine.fp16: DeepSpeed does not train in float16 on this device; engine.bf16 may do")
        # DeepSpeed's own optimisers for 16 bits without ZeRO step once, with gradients of 0, when they are made: Adam's
        # count is one ahead and the first update a quarter too small. ZeRO 1 starts right and needs no more memory.
        self.zero_stage = max(arguments.zero_stage, 1) if arguments.half else arguments.zero_stage
        trunk: Any = getattr(module, "trunk", None)
        # The transformers model that is saved: what a policy or a scorer stands on.
        self.plain: Any = getattr(module, "causal_lm", getattr(trunk, "backbone", module))
        if arguments.lora_r:
            add_lora(
                self.plain, trunk.upper, r=arguments.lora_r, alpha=arguments.lora_alpha, dropout=arguments.lora_dropout,
                target_modules=arguments.lora_target_modules, seed=gather_objects(torch.initial_seed())[0],
            )  # fmt: skip
        set_up(module, arguments)
        self._joined: Any = None
        if (
            isinstance(module, PolicyModel) and self.zero_stage == 0
        ):  # ZeRO takes a gradient away as soon as it is there
            self._joined = module.join_tied_gradients()
        named = [(n, p) for n, p in module.named_parameters() if p.requires_grad]
        if not named:
            raise ValueError("nothing to train: every parameter is frozen")
        heads = [p for n, p in named if n.split(".")[0] in HEADS]
        held, rate = {id(p) for p in heads}, schedule.learning_rate
        head_rate = rate if schedule.head_learning_rate is None else schedule.head_learning_rate
        groups = [{"params": [p for _, p in named if id(p) not in held], "lr": rate}]
        groups.append({"params": heads, "lr": head_rate})
        groups = [g for g in groups if g["params"]]
        kind = _AdamW if self.zero_stage == 0 else torch.optim.AdamW
        optimizer = kind(
            groups, lr=rate, betas=(arguments.adam_beta1, arguments.adam_beta2), eps=1e-8,
            weight_decay=arguments.weight_decay, fused=True,  # unfused, it makes copies as large as the weights
        )  # fmt: skip
        config: dict[str, Any] = {
            "train_micro_batch_size_per_gpu": micro_batch_size,
            "gradient_accumulation_steps": gradient_accumulation_steps,
            "gradient_clipping": arguments.max_grad_norm,
            "zero_optimization": {"stage": self.zero_stage},
            "bf16": {"enabled": arguments.bf16, "check_grad_overflow": True},
            "fp16": {"enabled": arguments.fp16},
            "zero_allow_untested_optimizer": True,
            "wall_clock_breakdown": False,
            "steps_per_print": 10**9,
        }
        if arguments.offload_optimizer:
            if self.zero_stage == 0:
                raise ValueError("engine.offload_optimizer needs engine.zero_stage 1, 2 or 3")
            config["zero_optimization"]["offload_optimizer"] = {"device": "cpu"}
            config["zero_force_ds_cpu_optimizer"] = False
        if arguments.half and getattr(trunk, "lower", None) is not None:
            trunk.lower.to(arguments.dtype)  # outside the module tree: DeepSpeed does not see it
        if arguments.gradient_checkpointing:
            trunk.upper.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        self.module = module.to(device())
        self.deepspeed, self.optimizer, _, self.scheduler = deepspeed.initialize(
            model=module,
            model_parameters=[p for _, p in named],
            optimizer=optimizer,
            lr_scheduler=lambda opt: torch.optim.lr_scheduler.LambdaLR(opt, schedule.factor),
            config=config,
        )
        if self.zero_stage == 0 and world_size() == 1:
            # It would copy all gradients into one tensor and back, to sum them over this rank alone.
            self.deepspeed.enable_backward_allreduce = False
        self._norm = float("nan")
        averages = arguments.ema_decay and isinstance(module, PolicyModel)  # nothing would read a scorer's
        self.average = Average(dict(named), arguments.ema_decay) if averages else None
        self.skip_nonfinite = skip_nonfinite
        self._dropping, self._overflowing = False, False
        self.overflowed, self.overflowed_steps = False, 0  # whether the last step was, and how many so far
        self._scaler: Any = None
        if arguments.fp16:
            self._scaler = self.optimizer.loss_scaler
            self._scaler.raise_error_at_min_scale = False  # `step` does, in words
            self._take_scale()
        _part_generators()

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.deepspeed(*args, **kwargs)

    def without_adapters(self, *args: Any, **kwargs: Any) -> Any:
        """The model as it was before training: the same call with LoRA's adapters switched off."""
        with adapters_off(self.module):
            return self.deepspeed(*args, **kwargs)

    def train(self) -> None:
        self.deepspeed.train()

    def eval(self) -> None:
        self.deepspeed.eval()

    def backward(self, loss: Tensor, *, drop: bool = False) -> None:
        """One micro-step: exactly one ``backward`` before each ``step``.

        ``drop``, the same on every rank: leave out the optimiser step that this micro-step belongs to.

        Raises:
            FloatingPointError: the loss is not finite on some rank; this step has not touched the weights.
        """
        broken = sum_over_ranks([float(not torch.isfinite(loss))])[0] > 0
        if broken and not self.skip_nonfinite:
            raise FloatingPointError(
                f"the loss is not finite (rank {rank()}: {float(loss.detach()):g}); the weights are those of the step "
                "before. Look at the last rows of metrics.jsonl; lower learning_rate, or set max_grad_norm"
            )
        if broken or drop or self._overflowing:
            # No finite gradient is left: under every ZeRO stage DeepSpeed then leaves the step out by itself, and
            # forgets what the step's other micro-steps have gathered.
            self._dropping |= broken or drop
            loss = loss * float("nan")
        self.deepspeed.backward(loss * (world_size() * self.accumulation))

    def overflow(self) -> bool:
        """Leave out the coming optimiser step, on every rank, as one whose own gradient has overflowed: it is counted
        and lowers the loss scale. False where no scale is left to lower."""
        self._overflowing = self._scaler is not None and self._scaler.cur_scale > self._scaler.min_scale
        return self._overflowing

    def step(self) -> bool:
        """Ends a micro-step; the optimiser moves at each accumulation boundary. False: this step was left out.

        Raises:
            FloatingPointError: the gradient's norm is not finite, in fp16 at the lowest loss scale; this step has not
                touched the weights.
        """
        boundary = self.deepspeed.is_gradient_accumulation_boundary()
        scaler = dict(vars(self._scaler)) if self._scaler is not None else {}
        if self.zero_stage == 0 and boundary:
            # Plain float32 training: DeepSpeed clips without keeping the norm, and looks at nothing before it steps.
            gradients = [p.grad for p in self.module.parameters() if p.grad is not None]
            self._norm = float(nn.utils.get_total_norm(gradients)) if gradients else float("nan")
            self.optimizer.overflow = bool(gradients) and not math.isfinite(self._norm)
        self.deepspeed.step()
        if not boundary:
            return True
        dropped, self._dropping, self._overflowing = self._dropping, False, False
        moved = self.deepspeed.was_step_applied()
        if self._scaler is not None:
            self.overflowed = not (moved or dropped) and scaler["cur_scale"] > scaler["min_scale"]
            self.overflowed_steps += self.overflowed
            if dropped:
                vars(self._scaler).update(scaler)  # a gradient that was spoiled on purpose says nothing of the scale
            self._take_scale()
        if moved:
            if self.average is not None:
                self.average.update()
            return True
        if self.zero_stage == 3:
            self._clean_up()
        if not (dropped or self.overflowed or self.skip_nonfinite):
            raise FloatingPointError(
                "the gradient's norm is not finite; the weights are those of the step before. Look at this step's data "
                "and the last rows of metrics.jsonl; lower learning_rate"
            )
        return False

    def _clean_up(self) -> None:
        """What DeepSpeed's ZeRO 3 does after a step, and forgets after one that it left out."""
        # It looks for overflows in all of this, and what has no gradient in the next step would stay there.
        self.optimizer.grad_partitions_flat_buffer.zero_()
        # Small parameters are whole between steps: where they are not, the next forward goes another way than the one
        # that was recorded ("tracing error").
        if small := self.optimizer.persistent_parameters:
            small[0].all_gather(small)

    def _take_scale(self) -> None:
        """Scale by the scaler's scale from now on. Left alone, DeepSpeed takes up a new scale in the middle of a step:
        the step that raises it would divide its gradients by twice what they were multiplied by."""
        self.optimizer.override_loss_scale(self._scaler.cur_scale)

    @property
    def loss_scale(self) -> float:
        """What a loss is multiplied by on its way back, so that float16 does not round gradients to 0 (1 but in fp16).
        Operations that make gradients before they meet that factor have to be told: ``grad_scale``."""
        return float(self._scaler.cur_scale) if self._scaler is not None else 1.0

    def scaling_metrics(self) -> dict[str, float]:
        """How fp16's loss scaling goes; nothing for other types."""
        if self._scaler is None:
            return {}
        return {"loss_scale": self.loss_scale, "overflowed_steps": float(self.overflowed_steps)}

    @property
    def learning_rate(self) -> float:
        return float(self.deepspeed.get_lr()[0])

    @property
    def gradient_norm(self) -> float:
        """Global norm of the last optimiser step's gradient, before clipping."""
        norm = self.deepspeed.get_global_grad_norm()
        return float(norm) if norm is not None else self._norm

    @property
    def gathers_for_generation(self) -> Callable[[], AbstractContextManager[None]] | None:
        """Makes the context in which ``generate`` finds ZeRO-3's weights whole, gathered once a rollout; nothing where
        the settings say layer by layer."""
        if not self.arguments.ds3_gather_for_generation:
            return None
        return functools.partial(gathered_once, self.plain, self.deepspeed)

    def save_model(
        self, folder: Path, *, average: bool = False, beside: Mapping[str, Tensor] | None = None, untied: bool = False
    ) -> None:  # fmt: skip
        """Write the transformers model, adapters merged, or its moving average, and the tensors ``beside`` its own;
        ``untied``: tied weights under each of their names. Every rank calls this."""
        value_of: Whole = self.average.whole if average and self.average is not None else whole
        save_model(self.plain, folder, value_of, beside, untied=untied)

    def save(self, folder: Path) -> None:
        """Write this rank's share of what trains (weights, optimiser, schedule) to ``folder``; all ranks call this."""
        # Before any file: a rank that cannot write would leave the others in ZeRO-3's collectives.
        average = self.average.state() if self.average is not None else {}
        save_pieces(folder / f"engine-{rank()}.safetensors", self.module, self.optimizer, self.zero_stage)
        if rank() == 0:
            (folder / _SCHEDULE).write_text(to_json(self.scheduler.state_dict()) + "\n", encoding="utf-8")
            if self._scaler is not None:
                scale = {name: getattr(self._scaler, name) for name in _SCALER_STATE}
                (folder / _LOSS_SCALE).write_text(to_json([scale, self.overflowed_steps]) + "\n", encoding="utf-8")
            if self.average is not None:
                save_file({k: v.contiguous() for k, v in average.items()}, folder / _AVERAGE)

    def load(self, folder: Path) -> None:
        """Take up what :meth:`save` wrote, on any number of ranks and with any ZeRO stage."""
        load_pieces(sorted(folder.glob("engine-*.safetensors")), self.module, self.optimizer, self.zero_stage)
        self.scheduler.load_state_dict(json.loads((folder / _SCHEDULE).read_text(encoding="utf-8")))
        for group, value in zip(self.scheduler.optimizer.param_groups, self.scheduler.get_last_lr(), strict=True):
            group["lr"] = value
        if self._scaler is not None and (folder / _LOSS_SCALE).exists():  # not in a snapshot of another type
            scale, self.overflowed_steps = json.loads((folder / _LOSS_SCALE).read_text(encoding="utf-8"))
            vars(self._scaler).update(scale)
            self._take_scale()
        if self.average is not None:
            self.average.load(load_file(folder / _AVERAGE))

    def close(self) -> None:
        """Drop DeepSpeed's hooks and buffers; the module keeps its weights (ZeRO 0 to 2)."""
        if self._joined is not None:
            self._joined.remove()
        release(self.deepspeed)
