"""Cases of the policy losses, and their formulas as a float64 loop over rows."""

from __future__ import annotations

import math
from itertools import pairwise

import torch
from torch import Tensor

import stable_rlhf.ops as ops
from stable_rlhf.ops import PolicyLossConfig

PER_ROW = ("old_logprob", "advantage", "ref_logprob", "row_weight")


def naive_row(z: Tensor, target: int, temperature: float, softcap: float | None) -> tuple[Tensor, Tensor]:
    """(log-probability, entropy) of one row of float64 logits, from their definitions."""
    if softcap is not None:
        z = softcap * torch.tanh(z / softcap)
    z = z / temperature
    z = z - z.max().detach()
    log_p = z - z.exp().sum().log()
    return log_p[target], -(log_p.exp() * log_p).sum()


def sequence_log_ratios(logits, target, kind, old, temperature, config, bounds):
    """The mean log-ratio of each row's sequence, over its policy rows."""
    means = {}
    for begin, end in pairwise(bounds):
        rows = [i for i in range(begin, end) if int(kind[i]) == 1 and int(target[i]) != -100]
        each = [naive_row(logits[i], int(target[i]), float(temperature[i]), config.softcap)[0] - old[i] for i in rows]
        means |= dict.fromkeys(rows, sum(each) / max(len(each), 1))
    return means


def naive_kl(d, rho, config):
    """The KL's estimate, and the term that stands for it in the loss."""
    c = config
    kl = {"k1": d, "k2": d**2 / 2, "k3": torch.exp(-d) - 1 + d, "abs": abs(d)}[c.kl_estimator.removesuffix("+")]
    if c.kl_clamp is not None and abs(float(kl.detach())) > c.kl_clamp:
        kl = torch.tensor(math.copysign(c.kl_clamp, float(kl.detach())), dtype=torch.float64) + 0.0 * d
    if c.kl_estimator.endswith("+"):
        by = d**2 / 2
        if c.kl_unbiased:
            by = by * min(float(rho.detach()), math.inf if c.kl_ratio_max is None else c.kl_ratio_max)
        return kl.detach(), kl.detach() + by - by.detach()
    return kl.detach(), kl * rho if c.kl_unbiased else kl


def naive_loss(
    logits, target, kind, *, old, adv, ref, row_weight, temperature, config, denominators=(None, None),
    entropy_denominator=None, bounds=None,
):  # fmt: skip
    """The documented formulas, one row at a time in float64. Returns loss, logprob list, entropy list, metrics."""
    sums, counts = {1: 0.0, 2: 0.0}, {1: 0, 2: 0}
    logprobs, entropies, ratios, clipped, kls, policy_entropies = [], [], [], [], [], []
    below, above, ref_kls, bonus = [], [], [], 0.0
    c = config
    of_sequence = {} if bounds is None else sequence_log_ratios(logits, target, kind, old, temperature, config, bounds)
    for i in range(logits.shape[0]):
        which = int(kind[i])
        if which == 0 or int(target[i]) == -100:
            logprobs.append(0.0)
            entropies.append(0.0)
            continue
        logprob, entropy = naive_row(logits[i], int(target[i]), float(temperature[i]), c.softcap)
        logprobs.append(float(logprob.detach()))
        entropies.append(float(entropy.detach()))
        counts[which] += 1
        if which == 2:
            term = -logprob
        else:
            bound = c.log_ratio_clamp
            lr = torch.clamp(logprob - old[i], -bound, bound)
            rho, a = torch.exp(torch.clamp(of_sequence[i], -bound, bound) if bounds else lr), float(adv[i])
            size = float(rho.detach())
            low, high = 1 - c.clip_low, 1 + c.clip_high
            if c.objective == "ppo":
                cut = (a > 0 and size > high) or (a < 0 and size < low)
                below.append(a < 0 and size < low)
                above.append(a > 0 and size > high)
                inner = (high if a > 0 else low) * a + 0.0 * rho if cut else rho * a
                if c.dual_clip is not None and a < 0 and float(inner.detach()) < c.dual_clip * a:
                    inner, cut = torch.tensor(c.dual_clip * a, dtype=torch.float64) + 0.0 * rho, True
            elif c.objective == "cispo":
                below.append(size < low)
                above.append(size > high)
                cut = below[-1] or above[-1]
                inner = min(max(size, low), high) * a * logprob
            else:
                inner, cut = a * logprob, False
            term = -inner
            if c.kl_coef:
                estimate, kl = naive_kl(torch.clamp(logprob - ref[i], -bound, bound), rho, c)
                ref_kls.append(float(estimate))
                term = term + c.kl_coef * kl
            if c.entropy_coef and entropy_denominator is None:
                term = term - c.entropy_coef * entropy
            elif c.entropy_coef:
                bonus = bonus + c.entropy_coef * entropy / entropy_denominator
            ratios.append(size)
            clipped.append(cut)
            kls.append(math.exp(float(lr.detach())) - 1 - float(lr.detach()))
            policy_entropies.append(float(entropy.detach()))
        sums[which] = sums[which] + float(row_weight[i]) * term
    mean = {w: sums[w] / (d if d is not None else max(counts[w], 1)) for w, d in zip((1, 2), denominators, strict=True)}
    mean[1] = mean[1] - bonus
    n = max(counts[1], 1)
    metrics = {
        "policy_loss": float(torch.as_tensor(mean[1]).detach()),
        "rehearsal_loss": float(torch.as_tensor(mean[2]).detach()),
        "clip_fraction": sum(clipped) / n,
        "clip_fraction_low": sum(below) / n,
        "clip_fraction_high": sum(above) / n,
        "approx_kl": sum(kls) / n,
        "ref_kl": sum(ref_kls) / n,
        "max_ratio": max(ratios, default=0.0),
        "entropy": sum(policy_entropies) / n,
        "policy_tokens": counts[1],
        "rehearsal_tokens": counts[2],
    }
    return mean[1] + c.rehearsal_coef * mean[2], logprobs, entropies, metrics


def make_case(rows: int, vocabulary: int, width: int = 12, seed: int = 0, dtype=torch.float32, kinds=(0, 1, 2)):
    g = torch.Generator().manual_seed(seed)
    case = {
        "hidden": torch.randn(rows, width, generator=g).to(dtype),
        "weight": (0.4 * torch.randn(vocabulary, width, generator=g)).to(dtype),
        "bias": (0.3 * torch.randn(vocabulary, generator=g)).to(dtype),
        "target": torch.randint(0, vocabulary, (rows,), generator=g),
        "kind": torch.tensor(kinds)[torch.randint(0, len(kinds), (rows,), generator=g)],
        "advantage": torch.randn(rows, generator=g),
        "row_weight": torch.rand(rows, generator=g) + 0.2,
        "temperature": torch.rand(rows, generator=g) + 0.5,
    }
    case["target"][torch.rand(rows, generator=g) < 0.1] = -100
    z = (case["hidden"].double() @ case["weight"].double().T + case["bias"].double()) / case["temperature"][:, None]
    here = torch.log_softmax(z, -1).gather(1, case["target"].clamp(min=0)[:, None])[:, 0]
    case["old_logprob"] = (here + 0.4 * torch.randn(rows, generator=g)).float()
    case["ref_logprob"] = (here + 0.7 * torch.randn(rows, generator=g)).float()
    return case


CONFIGS = {
    "plain": PolicyLossConfig(),
    "asymmetric clip, dual clip": PolicyLossConfig(clip_low=0.1, clip_high=0.3, dual_clip=1.2),
    "k2": PolicyLossConfig(kl_coef=0.3, kl_estimator="k2"),
    "k3, entropy": PolicyLossConfig(kl_coef=0.3, kl_estimator="k3", entropy_coef=0.05),
    "softcap": PolicyLossConfig(softcap=1.5, rehearsal_coef=0.7),
    "everything": PolicyLossConfig(0.15, 0.25, 1.3, 0.2, "k3", 0.1, 0.5, 2.0, 1.0),
    "cispo": PolicyLossConfig(0.1, 0.2, objective="cispo", kl_coef=0.1),
    "reinforce": PolicyLossConfig(objective="reinforce", entropy_coef=0.1),
    "unbiased k3": PolicyLossConfig(kl_coef=0.3, kl_unbiased=True),
    "unbiased k2, clamped": PolicyLossConfig(kl_coef=0.3, kl_estimator="k2", kl_unbiased=True, kl_clamp=0.2),
    "clamped k3": PolicyLossConfig(kl_coef=0.3, kl_clamp=0.15),
    "abs": PolicyLossConfig(kl_coef=0.3, kl_estimator="abs", log_ratio_clamp=1.0),
    "k3+": PolicyLossConfig(kl_coef=0.3, kl_estimator="k3+", kl_clamp=0.2),
    "unbiased abs+": PolicyLossConfig(kl_coef=0.3, kl_estimator="abs+", kl_unbiased=True, kl_ratio_max=1.1),
}


def naive_of(case, config, **extra):
    """The naive loss with leaves, so that autograd gives reference gradients."""
    leaves = {
        name: case[name].detach().to(torch.float64, copy=True).requires_grad_() for name in ("hidden", "weight", "bias")
    }
    logits = leaves["hidden"] @ leaves["weight"].T + leaves["bias"]
    temperature = case["temperature"].double()
    loss, *rest = naive_loss(
        logits,
        case["target"],
        case["kind"],
        old=case["old_logprob"].double(),
        adv=case["advantage"].double(),
        ref=case["ref_logprob"].double(),
        row_weight=case["row_weight"].double(),
        temperature=temperature,
        config=config,
        **extra,
    )
    return leaves, loss, *rest


def fused_of(case, config, **extra):
    leaves = {name: case[name].detach().clone().requires_grad_() for name in ("hidden", "weight", "bias")}
    given = {name: case[name] for name in PER_ROW}
    out = ops.linear_policy_loss(
        leaves["hidden"],
        leaves["weight"],
        case["target"],
        case["kind"],
        bias=leaves["bias"],
        temperature=case["temperature"],
        config=config,
        **given,
        **extra,
    )
    return leaves, out


def relative(got: Tensor, want: Tensor) -> float:
    return float((got.double() - want.double()).norm() / want.double().norm().clamp(min=1e-30))


def on_policy_is_its_own_log_probs(backend: str, config: PolicyLossConfig) -> None:
    """Without old log-probs the loss is the one with the log-probs that come out, given as constants."""
    case = make_case(37, 31)
    given = {name: case[name] for name in ("advantage", "ref_logprob", "row_weight")}

    def run(old):
        leaves = [case[name].detach().clone().requires_grad_() for name in ("hidden", "weight")]
        with ops.backend(backend):
            out = ops.linear_policy_loss(
                *leaves, case["target"], case["kind"], old_logprob=old, config=config, **given
            )  # fmt: skip
        out.loss.backward()
        return out, [leaf.grad for leaf in leaves]

    out, gradients = run(None)
    again, want = run(out.logprob.detach())
    for ours, theirs in zip([out.loss.detach(), *gradients], [again.loss.detach(), *want], strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)
    assert float(out.metrics["clip_fraction"]) == 0.0 and float(out.metrics["max_ratio"]) == 1.0
    assert float(out.metrics["approx_kl"]) == 0.0 and gradients[0].any()
