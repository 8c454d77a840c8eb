"""Cases of the policy losses, and their formulas as a float64 loop over rows."""

from __future__ import annotations

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


def naive_loss(logits, target, kind, *, old, adv, ref, row_weight, temperature, config, denominators=(None, None)):
    """The documented formulas, one row at a time in float64. Returns loss, logprob list, entropy list, metrics."""
    sums, counts = {1: 0.0, 2: 0.0}, {1: 0, 2: 0}
    logprobs, entropies, ratios, clipped, kls, policy_entropies = [], [], [], [], [], []
    c = config
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
            rho, a = torch.exp(lr), float(adv[i])
            size = float(rho.detach())
            low, high = 1 - c.clip_low, 1 + c.clip_high
            cut = (a > 0 and size > high) or (a < 0 and size < low)
            inner = (high if a > 0 else low) * a + 0.0 * rho if cut else rho * a
            if c.dual_clip is not None and a < 0 and float(inner.detach()) < c.dual_clip * a:
                inner, cut = torch.tensor(c.dual_clip * a, dtype=torch.float64) + 0.0 * rho, True
            term = -inner
            if c.kl_coef:
                d = torch.clamp(logprob - ref[i], -bound, bound)
                kl = {"k1": d, "k2": d**2 / 2, "k3": torch.exp(-d) - 1 + d}[c.kl_estimator]
                term = term + c.kl_coef * kl
            if c.entropy_coef:
                term = term - c.entropy_coef * entropy
            ratios.append(size)
            clipped.append(cut)
            kls.append(size - 1 - float(lr.detach()))
            policy_entropies.append(float(entropy.detach()))
        sums[which] = sums[which] + float(row_weight[i]) * term
    mean = {w: sums[w] / (d if d is not None else max(counts[w], 1)) for w, d in zip((1, 2), denominators, strict=True)}
    n = max(counts[1], 1)
    metrics = {
        "policy_loss": float(torch.as_tensor(mean[1]).detach()),
        "rehearsal_loss": float(torch.as_tensor(mean[2]).detach()),
        "clip_fraction": sum(clipped) / n,
        "approx_kl": sum(kls) / n,
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
