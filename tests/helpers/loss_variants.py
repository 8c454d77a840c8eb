"""The losses of verl, OpenRLHF and TRL, and how each is said with the arguments of `linear_policy_loss`."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

# what a loss is divided by: our arguments for it
AGGREGATIONS = {
    "tokens": "",
    "sum": "policy_denominator=1",
    "constant": "policy_denominator=N",
    "sequences": "policy_denominator=nonempty",
    "sequences x length": "policy_denominator=nonempty * L",
    "batch": "policy_denominator=B",
    "batch x length": "policy_denominator=B * L",
    "means": "row_weight=1 / length, policy_denominator=nonempty",
    "batch of means": "row_weight=1 / length, policy_denominator=B",
}


@dataclass(frozen=True)
class Variant:
    """framework, name: as its users write it; theirs: its settings for the test; config: our PolicyLossConfig."""

    framework: str
    name: str
    theirs: dict[str, Any] = field(default_factory=dict)
    config: dict[str, Any] = field(default_factory=dict)
    aggregation: str = "tokens"
    entropy_denominator: bool = False
    weights: bool = False  # of rollouts, by which the advantage is multiplied

    @property
    def row(self) -> str:
        config = ", ".join(f"{name}={value!r}" for name, value in self.config.items())
        rest = [AGGREGATIONS[self.aggregation], "entropy_denominator=tokens" if self.entropy_denominator else ""]
        rest.append("advantage=advantage * weight" if self.weights else "")
        said = ", ".join(part for part in (f"config: {config}" if config else "", *rest) if part)
        return f"| {self.framework} | {self.name} | {f'`{said}`' if said else 'the defaults'} |"


def _verl() -> list[Variant]:
    dual: dict[str, Any] = {"dual_clip": 3.0}
    sequence = {"importance_level": "sequence"}
    k3 = {"kl_coef": 0.2, "kl_clamp": 10.0}
    rows = [("`vanilla`", "vanilla", dual), ("`gspo`", "gspo", sequence)]
    rows += [("`cispo`", "cispo", {"objective": "cispo"}), ("`gpg`", "gpg", {"objective": "reinforce"})]
    variants = [Variant("verl", name, {"loss": loss}, config) for name, loss, config in rows]
    for mode, aggregation in {
        "token-sum": "sum", "seq-mean-token-sum": "sequences", "seq-mean-token-sum-norm": "sequences x length",
        "seq-mean-token-mean": "means",
    }.items():  # fmt: skip
        theirs = {"loss": "vanilla", "mode": mode}
        variants.append(Variant("verl", f"`vanilla`, `{mode}`", theirs, dual, aggregation))
    theirs = {"loss": "gspo", "mode": "seq-mean-token-mean"}
    variants.append(Variant("verl", "`gspo`, `seq-mean-token-mean`", theirs, sequence, "means"))
    for kind in ("k1", "k2", "abs", "k1+", "abs+"):
        config = {**dual, "kl_coef": 0.2, "kl_estimator": kind}
        variants.append(Variant("verl", f"`vanilla`, KL `{kind}`", {"loss": "vanilla", "kl": kind}, config))
    for kind in ("k3", "k3+"):
        config = {**dual, **k3, "kl_estimator": kind}
        variants.append(Variant("verl", f"`vanilla`, KL `{kind}`", {"loss": "vanilla", "kl": kind}, config))
    theirs = {"loss": "vanilla", "kl": "k3"}
    config = {**dual, **k3}
    variants.append(Variant("verl", "`vanilla`, KL `k3`, `rollout_is_weights`", theirs, config, weights=True))
    bonus = {"loss": "vanilla", "mode": "seq-mean-token-mean", "entropy": 0.05}
    config = {**dual, "entropy_coef": 0.05}
    return [*variants, Variant("verl", "`vanilla`, entropy, `seq-mean-token-mean`", bonus, config, "means")]


def _openrlhf() -> list[Variant]:
    gspo: dict[str, Any] = {"importance_level": "sequence"}
    variants = [
        Variant("OpenRLHF", "`ppo`"),
        Variant("OpenRLHF", "`ppo`, `dual_clip`", {"dual_clip": 3.0}, {"dual_clip": 3.0}),
        Variant("OpenRLHF", "`ppo`, sequence means", {"token_level_loss": False}, {}, "means"),
        Variant("OpenRLHF", "`gspo`", {"policy_loss_type": "gspo"}, gspo, "means"),
        Variant("OpenRLHF", "global batch of N tokens", {"tokens": 37.0}, {}, "constant"),
    ]
    for kind in ("k1", "k2", "k3"):
        config = {"kl_coef": 0.2, "kl_estimator": kind, "kl_clamp": 10.0}
        variants.append(Variant("OpenRLHF", f"`ppo`, KL `{kind}`", {"kl": kind}, config))
        unbiased = {**config, "kl_estimator": f"{kind}+", "kl_unbiased": True, "kl_ratio_max": 10.0}
        theirs = {"kl": kind, "unbiased": True}
        variants.append(Variant("OpenRLHF", f"`ppo`, KL `{kind}`, `unbiased_gradient`", theirs, unbiased))
    theirs = {"token_level_loss": False, "entropy": 0.05}
    config = {"entropy_coef": 0.05}
    return [*variants, Variant("OpenRLHF", "sequence means, entropy by tokens", theirs, config, "means", True)]


def _trl() -> list[Variant]:
    kl: dict[str, Any] = {"kl_coef": 0.2, "kl_unbiased": True}
    variants = [
        Variant("TRL", f"`{loss}`", {"loss_type": loss}, kl, aggregation)
        for loss, aggregation in {
            "grpo": "batch of means", "bnpo": "tokens", "dr_grpo": "batch x length", "dapo": "constant",
            "luspo": "batch",
        }.items()
    ]  # fmt: skip
    cispo = {**kl, "objective": "cispo", "clip_low": 1.0, "clip_high": 1.0}  # its epsilon_high is the bound itself
    theirs = {"loss_type": "cispo", "epsilon_high": 2.0}
    variants.append(Variant("TRL", "`cispo`, `epsilon_high` 2", theirs, cispo, "constant"))
    theirs = {"loss_type": "grpo", "importance_sampling_level": "sequence"}
    variants.append(Variant("TRL", "GSPO", theirs, {**kl, "importance_level": "sequence"}, "batch of means"))
    theirs = {"loss_type": "luspo", "importance_sampling_level": "sequence"}
    variants.append(Variant("TRL", "`luspo`, sequence", theirs, {**kl, "importance_level": "sequence"}, "batch"))
    biased = {"loss_type": "grpo", "biased": True}
    variants.append(Variant("TRL", "`use_bias_correction_kl` off", biased, {"kl_coef": 0.2}, "batch of means"))
    theirs = {"loss_type": "grpo", "delta": 1.5}
    variants.append(Variant("TRL", "`grpo`, `delta`", theirs, {**kl, "dual_clip": 1.5}, "batch of means"))
    name = "`grpo`, `vllm_importance_sampling_correction`"
    variants.append(Variant("TRL", name, {"loss_type": "grpo"}, kl, "batch of means", weights=True))
    theirs = {"loss_type": "grpo", "entropy_coef": 0.05}
    config = {**kl, "entropy_coef": 0.05}
    return [*variants, Variant("TRL", "`grpo`, entropy", theirs, config, "batch of means", True)]


VARIANTS = {"verl": _verl(), "openrlhf": _openrlhf(), "trl": _trl()}


def table() -> str:
    """The page's rows."""
    rows = [variant.row for variants in VARIANTS.values() for variant in variants]
    return "\n".join(["| framework | its loss | with our arguments |", "|---|---|---|", *rows])
