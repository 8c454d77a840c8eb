"""The cases of every preset: what is measured, for which table, plot or guard."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

from bench.case import Case

SMALL = {"rows": 1024, "width": 576, "vocabulary": 49_152}  # SmolLM2-135M's head, and as many rows as fill two cores


def linear(op: str, shape: dict[str, int], dtype: str = "float32", study: str = "", **more: float) -> Case:
    return Case(op, {**shape, **more}, dtype, study, memory=op == "policy")


def small_ops(study: str, sequences: int = 4096, length: int = 512, rows: int = 10_000_000) -> list[Case]:
    packed = {"sequences": sequences, "length": length}
    return [
        Case("gae", packed, study=study),
        Case("token_rewards", {**packed, "estimator": "k3"}, study=study),
        Case("masked_whiten", packed, study=study),
        Case("topk", {"rows": rows, "clusters": max(1, rows // 10_000), "keep": 100}, study=study),
    ]


def advantage(study: str, pairs: int = 512, length: int = 512, small: int = 2048) -> list[Case]:
    return [
        Case("advantage", {"pairs": pairs, "alternates": 4, "length": length}, study=study),
        Case("advantage", {"pairs": small, "alternates": 0, "expected": 0}, study=study),
        Case("advantage", {"pairs": small, "alternates": 0, "expected": 1}, study=study),
    ]


def contrastive(study: str, rows: int, width: int, prototypes: int = 50, dtype: str = "float32") -> list[Case]:
    shape = {"rows": rows, "width": width}
    return [Case("info-nce", shape, dtype, study), Case("swav", {**shape, "prototypes": prototypes}, dtype, study)]


def updates(study: str, width: int, layers: int, vocabulary: int, batch: int, length: int, dtype: str) -> list[Case]:
    shape = {"width": width, "layers": layers, "vocabulary": vocabulary, "batch": batch, "length": length}
    mixed = {"active": 0.5, "rehearsal": 0.1}
    return [
        Case("ppo-update", {"model": "llama", **shape, **mixed}, dtype, study, memory=True),
        Case("ppo-update", {"model": "bloom", **shape, **mixed}, dtype, study),
        Case("scorer-update", {"model": "llama", **shape, "alternates": 4}, dtype, study),
    ]


def quick() -> list[Case]:
    """Minutes, not figures: every operation once, at sizes that tell something about it all the same."""
    shape = {"rows": 256, "width": 256, "vocabulary": 8_192}
    return [
        linear("policy", shape, study="quick", active=0.5, rehearsal=0.1),
        linear("logprob", shape, study="quick"),
        Case("logits", {"rows": 256, "vocabulary": 8_192}, study="quick"),
        *advantage("quick", pairs=128)[:2],
        *contrastive("quick", 1024, 256),
        *small_ops("quick", sequences=512, length=256, rows=1_000_000),
        Case("kmeans", {"rows": 8_192, "width": 256, "clusters": 64, "iterations": 10}, study="quick"),
        *(replace(case, memory=False) for case in updates("quick", 128, 2, 8_192, 4, 32, "float32")[::2]),
    ]


def readme() -> list[Case]:
    """What docs/benchmarks.md shows, and the README of it: `python -m bench report --readme` reads these lines."""
    real: dict[str, Any] = {"states": 1, "tolerance": 2.0**-8}
    cases = [
        linear("policy", SMALL, study="policy-loss", active=0.5, rehearsal=0.1),
        linear("policy", SMALL, study="policy-loss"),
        linear("policy", SMALL, study="policy-loss", **real),
        linear("logprob", SMALL, study="policy-loss"),
        linear("logprob-grad", SMALL, study="policy-loss"),
        Case("logits", {"rows": 1024, "vocabulary": 49_152}, study="policy-loss"),
        *advantage("advantage-loss"),
        *contrastive("contrastive", 8192, 768),
        *small_ops("small-operations"),
        *updates("updates", 256, 4, 49_152, 8, 128, "float32"),
    ]
    weighed = (SMALL, cases[-3].shape)  # the last but two: the first update
    return [
        replace(case, memory=case.op == "info-nce" or (case.shape in weighed and case.op in ("policy", "ppo-update")))
        for case in cases
    ]


def sweep() -> list[Case]:
    """The lines of the plots: time against rows, vocabulary and active share, memory against vocabulary."""
    base = {"rows": 256, "width": 512, "vocabulary": 16_384}
    heads, large_heads = (8_192, 16_384, 32_768, 65_536), (32_768, 65_536, 131_072, 250_880)
    # Enough rows that their logits outgrow any workspace; narrow, since memory does not mind and time does.
    many = {"rows": 1024, "width": 64}
    return [
        *(
            replace(linear("policy", {**base, "rows": n}, study="sweep:rows"), memory=False)
            for n in (64, 128, 256, 512)
        ),
        *(replace(linear("policy", {**base, "vocabulary": v}, study="sweep:vocabulary"), memory=False) for v in heads),
        *(linear("policy", {**many, "vocabulary": v}, study="sweep:memory") for v in large_heads),
        *(
            replace(linear("policy", base, study="sweep:active", active=share), memory=False)
            for share in (0.1, 0.25, 0.5, 0.75, 1.0)
        ),
    ]


def guard() -> list[Case]:
    """Two minutes of ratios to the floor: where a slower kernel shows, small enough for many rounds."""
    shape = {"rows": 512, "width": 256, "vocabulary": 32_768}
    cases = [
        linear("policy", shape, study="guard"),
        linear("policy", shape, study="guard", active=0.5, rehearsal=0.1),
        linear("logprob", shape, study="guard"),
        Case("logits", {"rows": 512, "vocabulary": 32_768}, study="guard"),
        *advantage("guard")[::2],
        *contrastive("guard", 2048, 256),
        *small_ops("guard", sequences=2048, rows=2_000_000),
    ]
    return [replace(case, memory=False) for case in cases]


def cpu() -> list[Case]:
    """16-bit types, large vocabularies and several chunks, beside the float32 cases of `readme`."""
    wide = {"rows": 1024, "width": 1024, "vocabulary": 250_880}
    return [
        linear("policy", SMALL, "bfloat16", "cpu"),
        linear("policy", SMALL, "bfloat16", "cpu", active=0.5, clipped=0.2, rehearsal=0.1),
        linear("policy", wide, "bfloat16", "cpu", active=0.5),
        linear("policy", {**SMALL, "rows": 4096}, "bfloat16", "cpu", chunks=4),
        linear("policy", {**SMALL, "rows": 4096}, study="cpu", chunks=4),
        replace(linear("policy", SMALL, "bfloat16", "cpu", states=1, tolerance=2.0**-8), memory=False),
        linear("logprob", SMALL, "bfloat16", "cpu"),
        linear("logprob-grad", SMALL, "bfloat16", "cpu"),
        linear("policy", wide, study="large-vocabulary", active=0.5),
    ]


def native() -> list[Case]:
    """bfloat16 beside its peers, on a processor that multiplies it."""
    one, large = "policy-loss-native", "large-vocabulary-native"
    weighed = linear("policy", SMALL, "bfloat16", one)
    cases = [
        linear("policy", SMALL, "bfloat16", one, active=0.5, rehearsal=0.1),
        weighed,
        linear("policy", SMALL, "bfloat16", one, states=1, tolerance=2.0**-8),
        linear("logprob", SMALL, "bfloat16", one),
        linear("logprob-grad", SMALL, "bfloat16", one),
        Case("logits", {"rows": 1024, "vocabulary": 49_152}, "bfloat16", one),
        linear("policy", {"rows": 1024, "width": 1024, "vocabulary": 250_880}, "bfloat16", large, active=0.5),
        linear("policy", {**SMALL, "rows": 4096}, "bfloat16", large),
        linear("policy", {**SMALL, "rows": 4096}, "bfloat16", large, states=1, tolerance=2.0**-8),
    ]
    return [replace(case, memory=case is weighed) for case in cases]


GPU_SHAPES = (
    {"rows": 8192, "width": 4096, "vocabulary": 250_880},
    {"rows": 8192, "width": 4096, "vocabulary": 128_256},
    {"rows": 16_384, "width": 2048, "vocabulary": 151_936},
    {"rows": 8192, "width": 1024, "vocabulary": 250_880},
)


def gpu() -> list[Case]:
    """The shapes of real heads, most telling first: a deadline cuts from the end."""
    mixed = {"active": 0.45, "clipped": 0.2, "rehearsal": 0.1}
    cases = [linear("policy", shape, "bfloat16", "gpu", **more) for shape in GPU_SHAPES for more in ({}, mixed)]
    cases += [linear("logprob", shape, "bfloat16", "gpu") for shape in GPU_SHAPES]
    cases += [Case("logits", {"rows": 8192, "vocabulary": v}, "bfloat16", "gpu") for v in (151_936, 250_880)]
    cases += advantage("gpu")
    cases += contrastive("gpu", 8192, 768, dtype="bfloat16") + contrastive("gpu", 32_768, 4096, 3000, "bfloat16")
    cases += small_ops("gpu", sequences=4096, length=1024)
    cases += [
        Case("kmeans", {"rows": 1_000_000, "width": 768, "clusters": c, "iterations": 20}, study="gpu")
        for c in (100, 1000, 4096)
    ]
    cases += updates("gpu", 2048, 16, 151_936, 8, 1024, "bfloat16")
    return [*cases, linear("logprob-grad", GPU_SHAPES[-1], "bfloat16", "gpu")]


def dry() -> list[Case]:
    """Every case of the GPU preset at sizes for a laptop without one."""
    cases = {case.tiny().key: replace(case.tiny(), study="dry") for case in gpu()}
    return list(cases.values())


PRESETS: dict[str, Callable[[], list[Case]]] = {
    "quick": quick, "readme": readme, "sweep": sweep, "guard": guard, "cpu": cpu, "native": native, "gpu": gpu,
    "dry": dry,
}  # fmt: skip
