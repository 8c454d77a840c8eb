"""A framework's own losses beside `linear_policy_loss`: `loss_parity_worker.py FRAMEWORK`, in its environment."""

from __future__ import annotations

import sys
import types
import warnings
from collections import defaultdict
from dataclasses import replace
from types import SimpleNamespace

import torch

from helpers.loss_variants import VARIANTS, Variant
from stable_rlhf import ops

BATCH, LENGTH, WIDTH, VOCABULARY = 5, 9, 16, 61


class Data:
    """Ragged rows, one of them empty (all of them, where asked for), with ratios and KLs beyond every bound."""

    def __init__(self, empty: bool = False) -> None:
        draw = torch.Generator().manual_seed(5)
        self.hidden = torch.randn(BATCH, LENGTH, WIDTH, generator=draw)
        self.weight = torch.randn(VOCABULARY, WIDTH, generator=draw) * 0.3
        self.target = torch.randint(0, VOCABULARY, (BATCH, LENGTH), generator=draw)
        lengths = torch.tensor([0] * BATCH if empty else [9, 4, 0, 7, 1])
        self.mask = (torch.arange(LENGTH) < lengths[:, None]).float()
        self.advantage = torch.tensor([1.2, -0.7, 0.4, -1.5, 0.8])[:, None].expand(BATCH, LENGTH).contiguous()
        with torch.no_grad():
            logprob = self.policy(self.hidden, self.weight)[0]
        noise = torch.randn(BATCH, LENGTH, generator=draw)
        self.old = logprob + 0.6 * noise - 0.4 * (noise < -1)
        self.ref = logprob + 0.8 * torch.randn(BATCH, LENGTH, generator=draw)
        # k3 beyond 10 in the one, k1 and k2 in the other
        self.ref[0, 2], self.ref[0, 5] = logprob[0, 2] + 4.0, logprob[0, 5] - 12.0
        self.old[0, 0] = logprob[0, 0] - 2.6  # a ratio beyond 10
        self.weights = torch.rand(BATCH, LENGTH, generator=draw) + 0.5
        self.old[3, 2] = logprob[3, 2] - 1.5  # and one beyond a dual clip

    def policy(self, hidden, weight):
        logits = (hidden @ weight.T).log_softmax(-1)
        logprob = logits.gather(-1, self.target[..., None]).squeeze(-1)
        return logprob, -(logits.exp() * logits).sum(-1)


def ours(data: Data, variant: Variant, hidden, weight) -> torch.Tensor:
    mask, options = data.mask, {}
    count, nonempty = mask.sum(-1), max(float((mask.sum(-1) > 0).sum()), 1.0)
    denominator = {
        "tokens": None, "sum": 1.0, "constant": 37.0, "sequences": nonempty, "sequences x length": nonempty * LENGTH,
        "batch": float(BATCH), "batch x length": float(BATCH * LENGTH), "means": nonempty,
        "batch of means": float(BATCH),
    }[variant.aggregation]  # fmt: skip
    if "means" in variant.aggregation:
        options["row_weight"] = 1.0 / count.clamp(min=1.0)
    if variant.entropy_denominator:
        options["entropy_denominator"] = mask.sum().clamp(min=1.0)
    advantage = data.advantage * data.weights if variant.weights else data.advantage
    return ops.linear_policy_loss(
        hidden, weight, data.target, mask, old_logprob=data.old, advantage=advantage,
        ref_logprob=data.ref if variant.config.get("kl_coef") else None, policy_denominator=denominator,
        config=ops.PolicyLossConfig(**variant.config), **options,
    ).loss  # fmt: skip


def verl(data: Data, settings, logprob, entropy, weights) -> torch.Tensor:
    from verl.trainer.ppo.core_algos import agg_loss, get_policy_loss_fn, kl_penalty
    from verl.workers.config import ActorConfig

    config = ActorConfig(
        strategy="fsdp", rollout_n=1, ppo_micro_batch_size_per_gpu=1, clip_ratio=0.2, clip_ratio_low=0.2,
        clip_ratio_high=0.2, clip_ratio_c=3.0,
    )  # fmt: skip
    mode = settings.get("mode", "token-mean")
    if not data.mask.any():  # it divides by what a whole batch has; by itself it would be NaN
        config.global_batch_info.update(batch_num_tokens=5, global_batch_size=5)
    loss, _ = get_policy_loss_fn(settings["loss"])(
        data.old, logprob, data.advantage, data.mask, mode, config, rollout_is_weights=weights
    )
    terms = []
    if "kl" in settings:
        terms.append((0.2, kl_penalty(logprob, data.ref, settings["kl"])))
    if "entropy" in settings:
        terms.append((-settings["entropy"], entropy))
    for factor, term in terms:  # as its ppo_loss adds them
        loss = loss + factor * agg_loss(term, data.mask, mode, **config.global_batch_info)
    return loss


def openrlhf(data: Data, settings, logprob, entropy, weights) -> torch.Tensor:
    sys.modules["flash_attn_2_cuda"] = types.ModuleType("flash_attn_2_cuda")  # needs a GPU, and is not used
    from openrlhf.models.loss import PolicyLoss, aggregate_loss
    from openrlhf.models.utils import compute_approx_kl

    settings = dict(settings)
    kl, unbiased = settings.pop("kl", None), settings.pop("unbiased", False)
    bonus, tokens = settings.pop("entropy", 0.0), settings.pop("tokens", None)
    batch = {"batch_num_tokens": tokens}
    if not data.mask.any():
        batch = {"batch_num_tokens": 5.0, "global_batch_size": 5.0}
    loss = PolicyLoss(**settings)(logprob, data.old, data.advantage, action_mask=data.mask, **batch)[0]
    if kl is not None:
        estimate = compute_approx_kl(logprob, data.ref, data.old, kl, unbiased)
        loss = loss + 0.2 * aggregate_loss(estimate, data.mask, **batch)
    return loss - bonus * aggregate_loss(entropy, data.mask, **batch) if bonus else loss


def trl(data: Data, settings, logprob, entropy, weights) -> torch.Tensor:
    from trl import GRPOTrainer

    same = {name: (lambda x, **_: x) for name in ("gather", "reduce", "gather_for_metrics")}
    bonus = settings.get("entropy_coef", 0.0)
    trainer = SimpleNamespace(
        _get_per_token_logps_and_entropies=lambda *_, **__: (logprob, entropy, None), aux_loss_enabled=False,
        top_entropy_quantile=1.0, off_policy_mask_threshold=None, beta=0.2, loss_type=settings["loss_type"],
        importance_sampling_level=settings.get("importance_sampling_level", "token"), use_vllm=weights is not None,
        vllm_importance_sampling_correction=True, epsilon_low=0.2, epsilon_high=settings.get("epsilon_high", 0.2),
        args=SimpleNamespace(
            use_bias_correction_kl="biased" not in settings, delta=settings.get("delta"), steps_per_generation=1
        ),
        accelerator=SimpleNamespace(num_processes=1, sync_gradients=True, **same), max_completion_length=LENGTH,
        model=SimpleNamespace(training=True), current_gradient_accumulation_steps=1, use_adaptive_entropy=False,
        _metrics=defaultdict(lambda: defaultdict(list)), _entropy_bonus_enabled=bool(bonus), entropy_coef=bonus,
    )  # fmt: skip
    inputs = {
        "prompt_ids": data.target[:, :1], "prompt_mask": data.mask[:, :1], "completion_ids": data.target,
        "completion_mask": data.mask, "advantages": data.advantage[:, 0], "old_per_token_logps": data.old,
        "ref_per_token_logps": data.ref, "num_items_in_batch": torch.tensor(37.0),
        "importance_sampling_ratio": weights,
    }  # fmt: skip
    return GRPOTrainer._compute_loss(trainer, None, inputs)


def with_gradients(data: Data, loss_of) -> list[torch.Tensor]:
    hidden, weight = (x.clone().requires_grad_() for x in (data.hidden, data.weight))
    loss = loss_of(hidden, weight)
    loss.backward()
    return [loss.detach(), hidden.grad, weight.grad]


def apart(found: list[torch.Tensor], wanted: list[torch.Tensor]) -> tuple[float, float]:
    """The loss's difference, absolute below 1; the larger relative one of the gradients."""
    loss = float((found[0] - wanted[0]).abs() / wanted[0].abs().clamp(min=1.0))
    return loss, max(float((a - b).norm() / b.norm()) for a, b in zip(found[1:], wanted[1:], strict=True))


def main(framework: str) -> None:
    theirs = {"verl": verl, "openrlhf": openrlhf, "trl": trl}[framework]
    data, nothing = Data(), Data(empty=True)
    warnings.simplefilter("ignore")  # of k1 in the loss
    worst = [0.0, 0.0]
    for variant in VARIANTS[framework]:

        def own(data, hidden, weight, variant=variant):
            return theirs(data, variant.theirs, *data.policy(hidden, weight), data.weights if variant.weights else None)

        wanted = with_gradients(data, lambda h, w, own=own: own(data, h, w))
        loss, gradient = apart(with_gradients(data, lambda h, w, v=variant: ours(data, v, h, w)), wanted)
        assert loss <= 1e-6 and gradient <= 1e-5, (variant.name, loss, gradient)
        worst = [max(worst[0], loss), max(worst[1], gradient)]
        # Negative controls: each setting of ours left out, or where there is none the clip moved.
        others = [{n: v for n, v in variant.config.items() if n != name} for name in variant.config]
        for config in others or [{"clip_high": 0.3}]:
            other = replace(variant, config=config, weights=False)
            if variant.weights or ops.PolicyLossConfig(**config) != ops.PolicyLossConfig(**variant.config):
                found = apart(with_gradients(data, lambda h, w, v=other: ours(data, v, h, w)), wanted)
                assert max(found) > 1e-4, (variant.name, config, found)
        empty = with_gradients(nothing, lambda h, w, own=own: own(nothing, h, w))
        empty += with_gradients(nothing, lambda h, w, v=variant: ours(nothing, v, h, w))
        assert not any(value.any() for value in empty), variant.name
        print(f"{variant.name}: loss {loss:.1e}, gradients {gradient:.1e}")
    print(f"{framework}: {len(VARIANTS[framework])} losses, worst {worst[0]:.1e}, {worst[1]:.1e}")


def openrlhf_rewards() -> None:
    """The losses of its reward trainer beside `advantage_loss` without bounds."""
    from openrlhf.models.loss import LogExpLoss, PairWiseLoss

    chosen, rejected, margin = torch.randn(3, 6, generator=torch.Generator().manual_seed(6))
    for criterion, margins in ((PairWiseLoss(), None), (PairWiseLoss(), margin.abs()), (LogExpLoss(), None)):
        found = []
        for bound in ("theirs", None, 2.5):
            reward = (3 * torch.cat([chosen, rejected])).requires_grad_()
            if bound == "theirs":
                loss = criterion(reward[:6], reward[6:], margins)
            else:
                loss = ops.advantage_loss(reward, margin=bound, rank_margin=0.0 if margins is None else margins).loss
            loss.backward()
            found.append([loss.detach(), reward.grad])
        loss, gradient = apart(found[1], found[0])
        assert loss <= 1e-6 and gradient <= 1e-5, (criterion, loss, gradient)
        assert max(apart(found[2], found[0])) > 1e-3  # negative control: with bounds
        print(f"{type(criterion).__name__}: loss {loss:.1e}, gradients {gradient:.1e}")


if __name__ == "__main__":
    main(sys.argv[1])
    if sys.argv[1] == "openrlhf":
        openrlhf_rewards()
