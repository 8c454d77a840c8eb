"""Peak memory of GRPO's loss and backward at a large vocabulary, beside TRL's own.

    python -m bench.studies.trl_memory [--rows 512] [--width 896] [--vocabulary 151936] [--dtype bfloat16]
        [--tied]

It runs in an environment with TRL. The model is one small decoder block under a head of that size, whose weight trains,
while the embedding of the same size does not; rows are response tokens. Each contender has a process of its own: a tiny
call first, then the resident set's peak in a full step over what it was with the model made and no gradient. The
weight's gradient, which every contender must make, is in the peak.
"""

from __future__ import annotations

import argparse
import gc
import json
import subprocess
import sys
from typing import Any

import torch
from torch import Tensor

from bench.common import PROCESS, processor, resident_mib

CONTENDERS = {
    "logits": "logits [B, L, V], log_softmax",
    "trl": "TRL's fused head",
    "patched": "TRL with `patch_logprob()`",
    "one pass": "`fused_policy_loss`, as `FusedGRPOTrainer`",
}


def build(width: int, vocabulary: int, dtype: torch.dtype, tied: bool) -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=vocabulary, hidden_size=width, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2,
        head_dim=16, tie_word_embeddings=tied,
    )  # fmt: skip
    torch.manual_seed(0)
    model: Any = LlamaForCausalLM(config)
    model.model.embed_tokens.requires_grad_(tied)
    return model.to(dtype)


def make(name: str, model: Any, rows: int) -> Any:
    """A step: the loss of GRPO with clipped ratios on two sequences, and its backward."""
    from trl.trainer.utils import add_fused_lm_head

    from stable_rlhf.integrations.transformers import fuse_lm_head, fused_policy_loss
    from stable_rlhf.integrations.trl import patch_logprob

    length = rows // 2 + 1
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(0, model.config.vocab_size, (2, length), generator=generator)
    old = -12.0 + 0.2 * torch.randn(2, length - 1, generator=generator)
    advantage = torch.tensor([[1.0], [-1.0]])
    if name == "one pass":
        fuse_lm_head(model)
        target = torch.nn.functional.pad(ids[:, 1:], (0, 1), value=-100)
        padded = torch.nn.functional.pad(old, (0, 1))

        def loss() -> Tensor:
            inputs = {"input_ids": ids}
            value = fused_policy_loss(model, inputs, target, old_logprob=padded, advantage=advantage).loss
            assert value is not None
            return value
    else:
        if name != "logits":
            add_fused_lm_head(model, outputs=("log_probs", "entropy"))
        if name == "patched":
            patch_logprob()

        def loss() -> Tensor:
            if name == "logits":
                logits = model(input_ids=ids).logits[:, :-1].float()
                logprob = logits.log_softmax(-1).gather(-1, ids[:, 1:, None])[..., 0]
            else:
                logprob = model(input_ids=ids, labels=ids, fused_lm_head=True).log_probs
            ratio = (logprob - old).exp()
            return -torch.min(ratio * advantage, ratio.clamp(0.8, 1.2) * advantage).mean()

    def step() -> float:
        model.zero_grad(set_to_none=True)
        value = loss()
        value.backward()
        return float(value.detach())

    return step


def measure(name: str, rows: int, width: int, vocabulary: int, dtype: str, tied: bool) -> dict[str, float]:
    kind = getattr(torch, dtype)
    make(name, build(32, 64, kind, tied), 8)()
    model = build(width, vocabulary, kind, tied)
    step = make(name, model, rows)
    gc.collect()
    before = resident_mib("VmRSS")
    (PROCESS / "clear_refs").write_text("5", encoding="utf-8")  # the peak restarts at what is resident now
    value = step()
    peak = resident_mib("VmHWM") - before
    weight = model.lm_head.weight
    return {"loss": value, "peak_mib": peak, "weight_mib": weight.nbytes / 2**20}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=512)
    parser.add_argument("--width", type=int, default=896)
    parser.add_argument("--vocabulary", type=int, default=151_936)
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument(
        "--tied", action="store_true", help="the head is the embedding, which has a gradient of its own"
    )
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--contender", choices=tuple(CONTENDERS), help="this one, in this process")
    chosen = parser.parse_args()
    torch.set_num_threads(chosen.threads)
    shape = (chosen.rows, chosen.width, chosen.vocabulary, chosen.dtype, chosen.tied)
    if chosen.contender:
        print(json.dumps(measure(chosen.contender, *shape)))
        return
    print(f"{processor()}, {chosen.threads} threads; rows, width, vocabulary, type, tied: {shape}")
    print("| log-probs and gradient by | peak MiB | of it the weight's gradient | loss |\n|---|---|---|---|")
    for name, words in CONTENDERS.items():
        arguments = [*sys.argv[1:], "--contender", name]
        done = subprocess.run(
            [sys.executable, "-m", "bench.studies.trl_memory", *arguments], capture_output=True, encoding="utf-8"
        )
        if done.returncode:
            raise SystemExit(f"{name}: {done.stderr[-2000:]}")
        found = json.loads(done.stdout.splitlines()[-1])
        figures = f"{found['peak_mib']:.0f} | {found['weight_mib']:.0f} | {found['loss']:.4f}"
        print(f"| {words} | {figures} |")


if __name__ == "__main__":
    main()
