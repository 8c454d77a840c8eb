"""How much memory a run needs on each device, from the sizes of its models alone: nothing is loaded.

Symbols, all of one device unless said otherwise; every figure is in bytes:

    P    parameters of a model, counted by building it on the meta device      W   processes (devices) of the run
    Q    those of them inside the DeepSpeed engine (with num_trainable_layers: the last blocks and the head)
    R    those of them that train (LoRA: adapters and heads)                 e   bytes of a weight: 2 in 16 bits, else 4
    T    padded tokens of a micro-batch, B rows of L tokens                    n   blocks through which gradients flow
    h    width; k width of all key (or value) heads; f width of the MLP; a heads; V vocabulary

    weights       e·Q (ZeRO 3: e·Q/W, and e for those of tensors below DeepSpeed's param_persistence_threshold, which
                  stay whole), and e·(P - Q) for frozen lower blocks, which no stage shards
    gradients     e·R (ZeRO 2 and 3: e·R/W)
    optimiser     two moments and a float32 copy of the weights, 12·R. ZeRO 0 in float32 needs no copy: 8·R. ZeRO 1 to 3
                  share it out: 12·R/W; DeepSpeed keeps the copy in float32 training too. In 16 bits the engine runs
                  ZeRO 0 as ZeRO 1
                  With offload_optimizer it lies in host memory, with float32 gradients: 16·R/W
    average       ema_decay: 4·R of a policy (ZeRO 3: /W)
    frozen        the models that only read, e each: for PPO the reference (what it does not share with the policy, Q
                  without the value head; with LoRA nothing) and the scorer: whole; ZeRO 3: /W; offload_frozen: on the
                  host, and on the device what is gathered at once
    activations   of one block with sdpa attention and RMSNorm, gated MLP:  T·(e·(6h + 2k + 4f) + 8h)
                  of one block with LayerNorm, plain MLP:                   T·e·(6h + 2k + 2f)
                  with eager attention besides: B·a·L²·e, and another B·a·L²·4 in 16 bits for the float32 softmax;
                  with LoRA T·e·r an adapted layer, and with its dropout T·(e + 1) an input of such a layer.
                  All n blocks; with gradient_checkpointing n·T·e·h for the blocks' inputs and one block whole.
                  Then the final norm, T·h·(2e + 4), and what backward holds on its way, T·e·(2h + 2f)
    communication ZeRO 1 and 2: e · reduce_bucket_size during an update; ZeRO 3: that buffer all the time, and during an
                  update the weights gathered at once, e · min(Q, max_live_parameters), the head at least
    loss          linear_policy_loss: logits of a chunk of rows, min(loss_workspace_mib, rows·V·e), one row at least
                  (without the setting what a GPU of 80 GB takes: 4·V·h or 3.2 GB, 1 GiB where no head trains);
                  the gradient of hidden states, rows·e·h; where the head trains its gradient, e·V·h, and where the
                  rows need several chunks in 16 bits their float32 sum, 4·V·h
    metarm        with unlabelled responses: the gradient of its ascent, 4·R, and the weights from before it while the
                  update runs, e·R (ZeRO 3: /W); the ascent reads iterate.responses_per_prompt responses a prompt
    generation    the cache, 2·n_blocks·k·e a token of a batch (at most generate's max_tokens); logits of one position
                  a row for sampling, 28 bytes each (16-bit and float32 logits, softmax, float64 sums, the chosen one)
    step          while the optimiser steps, without activations: the gradients once more in one piece, e·R, and in 16
                  bits in float32, 4·R (ZeRO 1 to 3: /W). ZeRO 0: none on one device; on several, while they are summed,
                  as much as DeepSpeed sums at once
    gathered      ZeRO 3 while it samples: the weights whole, e·Q (not with ds3_gather_for_generation false: then layer
                  by layer, as in an update); while it saves: the largest tensor
    loading       the policy whole, e·P, and for PPO its reference, e·Q (with LoRA nothing); ZeRO 3: /W, with the
                  scorer, and the largest tensor; split backbones are always loaded whole
    host          of a node: each of its processes reads policy and scorer, e·P each, before they go to the device;
                  under ZeRO 3 one process alone; or their shares of what is offloaded, where that is more
    reserve       CUDA's context, NCCL's buffers, the allocator's fragments: 1 GiB and a twentieth of the rest

A stage's need is the largest of its moments (loading, rollouts, ascent, update, step, saving), not their sum.
"""

from __future__ import annotations

import functools
import importlib.util
import inspect
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import nn

from stable_rlhf.engine.frozen import zero_defaults
from stable_rlhf.models.loading import context_length, hidden_width, load_config, text_config, text_decoder
from stable_rlhf.models.lora import adapted_layers, add_lora
from stable_rlhf.models.policy import PolicyModel
from stable_rlhf.models.trunk import Trunk
from stable_rlhf.settings.recipe import EngineArguments, Recipe, with_settings

GIB = 2**30
_RESERVE, _FRAGMENTS = GIB, 0.05


@dataclass(frozen=True)
class ModelSizes:
    """The numbers of one model that memory depends on; parameters are counts, widths are elements."""

    source: str
    parameters: int
    in_engine: int
    small: int
    largest: int
    trained: int
    trains_head: bool
    blocks: int
    trained_blocks: int
    hidden: int
    key_width: int
    mlp_width: int
    heads: int
    vocabulary: int
    context: int
    gated: bool
    eager: bool
    adapter_ranks: int = 0  # of all adapted layers of a block, summed
    adapter_inputs: int = 0  # their widths, where each drops out an input of its own

    @property
    def split(self) -> bool:
        return self.trained_blocks < self.blocks


@dataclass(frozen=True)
class Moment:
    """One moment of a stage: what lies on a device then, in bytes."""

    stage: str
    name: str
    items: dict[str, int]

    @property
    def total(self) -> int:
        items = sum(self.items.values())
        return items + _RESERVE + int(_FRAGMENTS * items)


@dataclass(frozen=True)
class Estimate:
    """Every moment of a run, and the most host memory of a node: its processes, each with its share of an offloaded
    optimiser, or reading the models before they go to the device."""

    models: dict[str, ModelSizes]
    moments: list[Moment]
    host_bytes: int

    @property
    def peak(self) -> Moment:
        return max(self.moments, key=lambda m: m.total)


def read_config(name: str, shape: dict[str, Any]) -> tuple[Any, str]:
    """The transformers config of a model, and where it came from: its folder or the hub's cache, else ``shape``, else
    the hub.

    Raises:
        ValueError: none of them has it.
    """
    from transformers import AutoConfig

    try:
        return load_config(name, local_files_only=True), f"the config of {name}"
    except (OSError, ValueError):
        pass
    if shape:
        fields = dict(shape)
        kind = fields.pop("model_type", None)
        try:
            return AutoConfig.for_model(str(kind), **fields), f"model_shape ({name} is not on this machine)"
        except ValueError as error:
            raise ValueError(f"model_shape.model_type {kind!r}: transformers knows no such model") from error
        except Exception as error:  # of the checks of each model's own config
            *_, last = "", *str(error).strip().splitlines()
            raise ValueError(f"model_shape: {type(error).__name__}: {last}") from error
    try:
        return load_config(name), f"the hub's config of {name}"
    except (OSError, ValueError) as error:
        raise ValueError(
            f"model {name!r}: its config is neither on this machine nor to be had from the hub, so its memory cannot "
            "be estimated; give its sizes in the recipe as model_shape: {model_type: llama, hidden_size: …}"
        ) from error


def model_sizes(
    config: Any, source: str, num_trainable_layers: int | None, *, scorer: bool = False, lora: Lora | None = None
) -> ModelSizes:
    """Sizes of a policy with its value head, or of a scorer with its two heads, as the trainers build it. On the meta
    device: no weight is allocated."""
    from transformers import AutoModelForCausalLM

    threshold = zero_defaults(3).param_persistence_threshold
    model: Any
    with torch.device("meta"):
        causal_lm = AutoModelForCausalLM.from_config(config)
        if scorer:
            model = nn.ModuleDict({"trunk": Trunk(text_decoder(causal_lm), num_trainable_layers)})
            model["heads"] = nn.Linear(hidden_width(config), 2)
        else:
            model = PolicyModel(causal_lm, num_trainable_layers=num_trainable_layers, value_head=True)
        whole = text_decoder(causal_lm) if scorer else causal_lm
        trunk = model["trunk"] if scorer else model.trunk
        if lora is not None:
            add_lora(
                whole, trunk.upper, r=lora.r, alpha=1, dropout=lora.dropout, target_modules=lora.target_modules
            )  # fmt: skip
    config = text_config(config)
    adapted = adapted_layers(trunk.upper)
    everything = {id(p): p for p in (*whole.parameters(), *model.parameters())}
    blocks = int(config.num_hidden_layers)
    heads = int(config.num_attention_heads)
    key_heads = int(getattr(config, "num_key_value_heads", None) or heads)
    head_width = int(getattr(config, "head_dim", None) or config.hidden_size // heads)
    mlp = getattr(config, "intermediate_size", None) or getattr(config, "n_inner", None) or 4 * config.hidden_size
    trained_blocks = min(blocks, num_trainable_layers or blocks)
    return ModelSizes(
        source=source,
        parameters=sum(p.numel() for p in everything.values()),
        in_engine=sum(p.numel() for p in model.parameters()),
        small=sum(p.numel() for p in model.parameters() if p.numel() <= threshold),
        largest=max(p.numel() for p in model.parameters()),
        trained=sum(p.numel() for p in model.parameters() if p.requires_grad),
        trains_head=not scorer and model.head.weight.requires_grad,
        blocks=blocks,
        trained_blocks=trained_blocks,
        hidden=int(config.hidden_size),
        key_width=key_heads * head_width,
        mlp_width=int(mlp),
        heads=heads,
        vocabulary=int(config.vocab_size),
        context=context_length(config),
        gated=any("gate" in name for name, _ in causal_lm.named_parameters()),
        eager=not getattr(causal_lm, "_supports_sdpa", False),
        adapter_ranks=lora.r * len(adapted) // trained_blocks if lora else 0,
        adapter_inputs=sum(m.in_features for m in adapted) // trained_blocks if lora and lora.dropout else 0,
    )


def block_bytes(m: ModelSizes, rows: int, length: int, itemsize: int) -> int:
    """What autograd keeps of one block for its backward pass: see the module's formulas."""
    tokens, h = rows * length, m.hidden
    per_token = itemsize * (6 * h + 2 * m.key_width + (4 if m.gated else 2) * m.mlp_width) + (8 * h if m.gated else 0)
    per_token += itemsize * m.adapter_ranks + (itemsize + 1) * m.adapter_inputs
    scores = rows * m.heads * length**2 * (itemsize + (4 if itemsize == 2 else 0)) if m.eager else 0
    return tokens * per_token + scores


def activation_bytes(m: ModelSizes, rows: int, length: int, itemsize: int, checkpointing: bool) -> int:
    """What a micro-batch of ``rows`` padded to ``length`` keeps for its backward pass, without head and loss."""
    tokens, n = rows * length, m.trained_blocks
    block = block_bytes(m, rows, length, itemsize)
    blocks = n * tokens * itemsize * m.hidden + block if checkpointing else n * block
    return blocks + tokens * (m.hidden * (2 * itemsize + 4) + itemsize * 2 * (m.hidden + m.mlp_width))


def loss_bytes(m: ModelSizes, rows: int, itemsize: int, bound: int) -> int:
    """Workspace, at most ``bound``, and gradients of ``linear_policy_loss`` over ``rows`` active tokens."""
    row = m.vocabulary * itemsize
    chunk = max(row, min(bound, rows * row))
    head = 0
    if m.trains_head:
        head = m.vocabulary * m.hidden * (itemsize + (4 if itemsize == 2 and rows * row > bound else 0))
    return chunk + rows * itemsize * m.hidden + head


def _loss_bound(m: ModelSizes, engine: EngineArguments) -> int:
    """The bound on the loss's logits: the setting, or what ``ops.policy.chunks`` takes on a GPU of 80 GB."""
    if engine.loss_workspace_mib is not None:
        return engine.loss_workspace_mib << 20
    return max(4 * m.vocabulary * m.hidden, 32 * 10**8) if m.trains_head else GIB


def _stage(engine: EngineArguments) -> int:
    # As the engine does: without ZeRO there is no right optimiser for 16 bits.
    return max(engine.zero_stage, 1) if engine.half else engine.zero_stage


def engine_bytes(m: ModelSizes, engine: EngineArguments, world_size: int) -> tuple[dict[str, int], int]:
    """Weights, gradients and optimiser on a device, and what offloading keeps on the host for each process."""
    e, stage = (2 if engine.half else 4), _stage(engine)
    share = lambda count, first: -(-count // (world_size if stage >= first else 1))  # noqa: E731
    copy = 4 if engine.half or stage else 0
    optimiser, host = share(m.trained * (8 + copy), 1), 0
    if engine.offload_optimizer and stage:
        host, optimiser = optimiser + share(4 * m.trained, 1), 0
    weights = share(e * m.in_engine, 3) + e * (m.parameters - m.in_engine) + (e * m.small if stage == 3 else 0)
    items = {"weights": weights, "gradients": share(e * m.trained, 2), "optimiser": optimiser}
    if engine.ema_decay:
        items["average"] = share(4 * m.trained, 3)
    return items, host


def _live(m: ModelSizes, itemsize: int) -> int:
    """What ZeRO-3 has gathered at once while a model runs layer by layer."""
    return itemsize * max(min(m.in_engine, zero_defaults(3).max_live_parameters), m.largest)


def _held(models: Sequence[ModelSizes], engine: EngineArguments, world_size: int) -> int:
    """Weights of models that lie in shards, on a device."""
    e = 2 if engine.half else 4
    return sum(-(-e * m.parameters // world_size) + e * m.small for m in models)


def _loading(models: Sequence[ModelSizes], engine: EngineArguments, world_size: int) -> int:
    """A device while models are loaded one after the other: those of ZeRO-3 are divided tensor by tensor."""
    e, sharded = (2 if engine.half else 4), [m for m in models if engine.zero_stage == 3 and not m.split]
    largest = e * max((m.largest for m in sharded), default=0)
    return _held(sharded, engine, world_size) + largest + sum(e * m.parameters for m in models if m not in sharded)


def _frozen(m: ModelSizes, policy: ModelSizes, engine: EngineArguments, world_size: int) -> tuple[int, int]:
    """Reference and scorer of PPO: on a device, and on the host for each process."""
    e, counts = (2 if engine.half else 4), m.parameters + (0 if engine.lora_r else policy.in_engine)
    share = -(-e * counts // world_size)
    if engine.offload_frozen:
        return _live(policy, e), share
    return (share + e * (m.small + policy.small) if engine.zero_stage == 3 else e * counts), 0


def _buffers(m: ModelSizes, engine: EngineArguments) -> tuple[int, int]:
    """Communication's memory: what DeepSpeed holds all the time, and what it takes besides during an update."""
    stage = _stage(engine)
    if stage == 0:
        return 0, 0
    config, e = zero_defaults(stage), 2 if engine.half else 4
    if stage < 3:
        return 0, e * config.reduce_bucket_size
    return e * config.reduce_bucket_size, _live(m, e)


def _generation(m: ModelSizes, rows: int, length: int, itemsize: int) -> int:
    from stable_rlhf.rollout.local import generate

    bound: int = inspect.signature(generate).parameters["max_tokens"].default
    rows = max(1, min(rows, bound // length))
    return rows * length * 2 * m.blocks * m.key_width * itemsize + rows * m.vocabulary * 28


def _training_moments(
    stage: str, m: ModelSizes, engine: EngineArguments, world_size: int, rows: int, length: int, **more: int
) -> Iterator[Moment]:
    state, _ = engine_bytes(m, engine, world_size)
    e = 2 if engine.half else 4
    yield Moment(
        stage, "update",
        state | {
            "activations": activation_bytes(m, rows, length, e, engine.gradient_checkpointing),
            "communication": sum(_buffers(m, engine)),
        } | more,
    )  # fmt: skip
    if _stage(engine):
        temporary = -(-m.trained * (6 if engine.half else 4) // world_size)
    else:  # DeepSpeed's buckets of an all-reduce, which end with the tensor that makes them full
        temporary = 4 * min(m.trained, 500_000_000 + m.largest) if world_size > 1 else 0
    if not engine.offload_optimizer:
        frozen = {k: v for k, v in more.items() if k == "frozen"}
        yield Moment(stage, "step", state | {"step": temporary, "communication": _buffers(m, engine)[0]} | frozen)
    if engine.zero_stage == 3:
        gathered = {"gathered": e * m.largest, "communication": _buffers(m, engine)[0]}
        yield Moment(stage, "saving", state | gathered | {k: v for k, v in more.items() if k == "frozen"})


def estimate(recipe: Recipe, *, world_size: int, devices_per_node: int) -> Estimate:
    """Memory of the stages that load the large models: SFT, scorers, selection, PPO and evaluation.

    Raises:
        ValueError: a model's sizes are not known.
    """
    policy, scorer = _models(recipe)
    engine, ppo, data = recipe.engine, recipe.ppo, recipe.data
    e = 2 if engine.half else 4
    longest = min(data.max_length, policy.context)
    rolled = min(data.max_prompt_length + ppo.max_new_tokens, policy.context)
    moments: list[Moment] = []
    if data.demonstrations or recipe.model_name_or_path is None:
        whole = _policy_sizes(recipe, None)
        rows = recipe.sft.per_device_train_batch_size
        moments.append(Moment("sft", "loading", {"loading": _loading([whole], engine, world_size)}))
        loss = loss_bytes(whole, rows * longest, e, _loss_bound(whole, engine))
        moments += _training_moments("sft", whole, engine, world_size, rows, longest, **{"loss": loss})
    pairs = 2 * recipe.scorer.per_device_train_batch_size  # chosen and rejected
    moments.append(Moment("scorer", "loading", {"loading": _loading([scorer], engine, world_size)}))
    scoring = replace(engine, ema_decay=0.0)  # policies alone are averaged
    longest_pair, saved = min(data.max_length, scorer.context), {}
    if recipe.scorer.meta_responses or recipe.iterate.rounds > 1:
        mine = -(-scorer.trained // (world_size if engine.zero_stage == 3 else 1))
        saved = {"metarm": e * mine}
        responses = recipe.scorer.per_device_train_batch_size * recipe.iterate.responses_per_prompt
        items = engine_bytes(scorer, scoring, world_size)[0] | {
            "activations": activation_bytes(scorer, responses, longest_pair, e, engine.gradient_checkpointing),
            "communication": sum(_buffers(scorer, engine)), "metarm": 4 * mine,
        }  # fmt: skip
        moments.append(Moment("scorer", "ascent", items))
    moments += _training_moments("scorer", scorer, scoring, world_size, pairs, longest_pair, **saved)
    answering = _generation(policy, recipe.ppo.rollout_batch_size, rolled, e)
    in_shards = engine.zero_stage == 3 and not engine.ds3_gather_for_generation
    reader = _held([policy], engine, world_size) if in_shards else e * policy.parameters
    live = {"communication": _live(policy, e)} if in_shards else {}
    rehearsal = any(v.rehearsal for v in recipe.variant_rows)
    if rehearsal:
        items = {"weights": reader, "frozen": e * scorer.parameters, "generation": answering} | live
        moments.append(Moment("selection", "rollouts", items))
    held, frozen_host = _frozen(scorer, policy, engine, world_size)
    frozen = {"frozen": held}
    state, _ = engine_bytes(policy, engine, world_size)
    models = [policy, scorer] if engine.zero_stage == 3 else [policy]  # else the scorer is read into host memory
    reference = 0 if engine.lora_r else e * policy.in_engine
    if engine.zero_stage == 3 and not policy.split and reference:
        reference = _held([policy], engine, world_size)
    moments.append(Moment("ppo", "loading", {"loading": _loading(models, engine, world_size) + reference}))
    share = -(-ppo.rollout_batch_size // world_size)
    rollouts = {k: v for k, v in state.items() if k != "gradients" or engine.zero_stage == 3} | frozen
    rollouts["generation"] = _generation(policy, share, rolled, e)
    if engine.zero_stage == 3:
        bucket = _buffers(policy, engine)[0]
        if in_shards:
            rollouts |= {"communication": bucket + _live(policy, e)}
        else:
            rollouts |= {"gathered": e * policy.in_engine, "communication": bucket}
    moments.append(Moment("ppo", "rollouts", rollouts))
    old = ppo.per_device_rehearsal_batch_size if rehearsal else 0
    rows, length = ppo.per_device_train_batch_size + old, max(rolled, longest if old else 0)
    active = ppo.per_device_train_batch_size * ppo.max_new_tokens + old * length
    loss = loss_bytes(policy, active, e, _loss_bound(policy, engine))
    moments += _training_moments("ppo", policy, engine, world_size, rows, length, **frozen, loss=loss)
    judge = e * scorer.parameters if recipe.evaluate.judge == "scorer" else 0
    items = {"weights": reader, "frozen": reader + judge, "generation": answering} | live
    moments.append(Moment("evaluation", "rollouts", items))
    reading = sum(
        e * m.parameters * (1 if engine.zero_stage == 3 and not m.split else devices_per_node) for m in (policy, scorer)
    )
    policy_host, scorer_host = (engine_bytes(m, engine, world_size)[1] for m in (policy, scorer))
    offloaded = max(policy_host + frozen_host, scorer_host)
    host = max(reading, offloaded * devices_per_node)
    return Estimate({"policy": policy, "scorer": scorer}, moments, host)


@dataclass(frozen=True)
class Lora:
    """The settings of LoRA that sizes depend on."""

    r: int
    dropout: float
    target_modules: tuple[str, ...]


def _lora(engine: EngineArguments) -> Lora | None:
    return Lora(engine.lora_r, engine.lora_dropout, tuple(engine.lora_target_modules)) if engine.lora_r else None


def _policy_sizes(recipe: Recipe, num_trainable_layers: int | None, *, scorer: bool = False) -> ModelSizes:
    if recipe.model_name_or_path is None:
        w = recipe.world
        return _world_sizes(
            w.hidden_size, w.num_hidden_layers, w.num_attention_heads, w.architecture, num_trainable_layers, scorer,
            _lora(recipe.engine),
        )  # fmt: skip
    shape = json.dumps(recipe.model_shape)
    return _sizes(recipe.model_name_or_path, shape, num_trainable_layers, scorer, _lora(recipe.engine))


def _models(recipe: Recipe) -> tuple[ModelSizes, ModelSizes]:
    policy = _policy_sizes(recipe, recipe.ppo.num_trainable_layers)
    layers = recipe.scorer.num_trainable_layers
    if recipe.scorer_model_name_or_path is None:
        return policy, _policy_sizes(recipe, layers, scorer=True)
    shape = json.dumps(recipe.scorer_model_shape or recipe.model_shape)
    return policy, _sizes(recipe.scorer_model_name_or_path, shape, layers, True, _lora(recipe.engine))


# Remembered: the search for remedies asks for the same few models many times.
@functools.cache
def _sizes(name: str, shape: str, num_trainable_layers: int | None, scorer: bool, lora: Lora | None) -> ModelSizes:
    config, source = read_config(name, json.loads(shape))
    return model_sizes(config, source, num_trainable_layers, scorer=scorer, lora=lora)


@functools.cache
def _world_sizes(
    width: int, blocks: int, heads: int, architecture: Literal["llama", "bloom"], layers: int | None, scorer: bool,
    lora: Lora | None,
) -> ModelSizes:  # fmt: skip
    from stable_rlhf.world import build_model, build_tokenizer

    built = build_model(
        build_tokenizer(), hidden_size=width, num_hidden_layers=blocks, num_attention_heads=heads,
        architecture=architecture,
    )  # fmt: skip
    return model_sizes(built.config, "the skill world's settings", layers, scorer=scorer, lora=lora)


def remedies(recipe: Recipe, *, world_size: int, devices_per_node: int, limit: int) -> list[str]:
    """Settings that lower the peak, each with what it alone leaves, in words, the best first."""
    before = estimate(recipe, world_size=world_size, devices_per_node=devices_per_node).peak.total
    changes: list[tuple[str, dict[str, Any]]] = [("engine.bf16 true", {"engine.bf16": True})]
    changes += [(f"engine.zero_stage {s}", {"engine.zero_stage": s}) for s in (1, 2, 3)]
    changes += [
        ("engine.gradient_checkpointing true", {"engine.gradient_checkpointing": True}),
        ("engine.offload_optimizer true", {"engine.offload_optimizer": True,
                                           "engine.zero_stage": max(1, recipe.engine.zero_stage)}),
        ("micro-batches of 1", {f"{s}.per_device_train_batch_size": 1 for s in ("sft", "scorer", "ppo")}
         | {"ppo.per_device_rehearsal_batch_size": 1}),
    ]  # fmt: skip
    if importlib.util.find_spec("peft") and not recipe.engine.lora_r:
        changes.append(("engine.lora_r 16", {"engine.lora_r": 16}))
    if recipe.engine.ds3_gather_for_generation:
        changes.append(("engine.ds3_gather_for_generation false, with engine.zero_stage 3",
                        {"engine.ds3_gather_for_generation": False, "engine.zero_stage": 3}))  # fmt: skip
    blocks = _policy_sizes(recipe, None).blocks
    layers = max(1, min(blocks - 1, blocks // 8))
    if blocks > 1 and recipe.ppo.num_trainable_layers is None:
        names = [f"{s}.num_trainable_layers" for s in ("ppo", "scorer")]
        changes.append((f"{' and '.join(names)} {layers}", dict.fromkeys(names, layers)))
    if world_size > 1 or recipe.engine.zero_stage:
        changes.append(("twice the nodes", {}))
    totals: list[tuple[int, str]] = []
    everything: dict[str, Any] = {}
    for words, values in changes:
        everything |= values
        ranks = world_size if values else 2 * world_size
        total = estimate(with_settings(recipe, values), world_size=ranks, devices_per_node=devices_per_node).peak.total
        if total < before:
            totals.append((total, words))
    if len(totals) > 1:
        most = with_settings(recipe, everything)
        total = estimate(most, world_size=world_size, devices_per_node=devices_per_node).peak.total
        totals = [*sorted(totals), (total, "all of these on as many devices")]
    return [f"{words}: {total / GIB:.1f} GiB" + (", which fits" if total <= limit else "") for total, words in totals]
