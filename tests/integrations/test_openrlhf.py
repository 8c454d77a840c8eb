"""The adapters for OpenRLHF in runs of the real one: 0.11.2 beside transformers 5.15.0, in an environment of its own.

`build/frameworks/openrlhf` is made once; where it cannot be installed the tests are skipped. Each prints its versions.
"""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from torch import nn

from helpers.frameworks import openrlhf_python, run_code, run_in
from helpers.launch import ROOT
from stable_rlhf.integrations.openrlhf import BoundedPairLoss, patch_actor


@pytest.fixture(scope="session")
def python() -> Path:
    return openrlhf_python()


@pytest.mark.slow
@pytest.mark.parametrize("case", ["actor", "reward"])
def test_openrlhf_with_ours_is_openrlhf(case, python):
    out = run_in(python, "openrlhf_worker", case, TORCHDYNAMO_DISABLE="1")  # it compiles its entropy
    print(out)
    assert "openrlhf 0.11.2 transformers 5.15.0" in out


@pytest.mark.slow
def test_memory_of_a_logprob_step(python):
    ours, theirs = (
        int(re.search(rf"{whose} (\d+) MiB", run_in(python, "openrlhf_worker", "memory", whose))[1])
        for whose in ("ours", "theirs")
    )
    print(f"log-probs, backward, 1,024 tokens, V 151,936: ours {ours} MiB, OpenRLHF's {theirs} MiB")
    assert ours < theirs / 2


def test_scores_are_held_within_the_margin():
    chosen = torch.tensor([3.0, 1.0], requires_grad=True)
    rejected = torch.tensor([0.5, -4.0])
    pairs = -torch.nn.functional.logsigmoid(chosen - rejected).mean()
    torch.testing.assert_close(BoundedPairLoss(margin=None)(chosen, rejected), pairs)
    assert BoundedPairLoss(margin=5.0)(chosen, rejected) < BoundedPairLoss(margin=2.5)(chosen, rejected)


@pytest.mark.parametrize(
    ("actor", "error"),
    [
        (object(), "actor: expected an openrlhf.models.Actor, got object"),
        (nn.Linear(2, 2), "actor: expected an openrlhf.models.Actor, got Linear"),
    ],
)
def test_what_is_no_actor_is_refused(actor, error):
    with pytest.raises(ValueError, match=error):
        patch_actor(actor)


def test_an_actor_that_sees_images_is_refused():
    actor = nn.Module()
    actor.model, actor.is_vlm = nn.Linear(2, 2), True
    with pytest.raises(ValueError, match="images"):
        patch_actor(actor)


# flash-attn's CUDA part, which a GPU has, and a Triton kernel of its.
STUB = """import sys, types
sys.modules["flash_attn_2_cuda"] = types.ModuleType("flash_attn_2_cuda")
sys.modules["flash_attn.ops.triton.cross_entropy"] = None
"""
PAGE = (ROOT / "docs" / "guide" / "integrations.md").read_text(encoding="utf-8")


@pytest.mark.slow
def test_what_the_page_says_runs(python, tmp_path):
    """Pasted into a script. Negative control: with another name it does not run."""
    (code,) = re.findall(r"^```python\n([^`]*integrations\.openrlhf.*?)^```", PAGE, flags=re.DOTALL | re.MULTILINE)
    run_code(python, STUB + code, tmp_path)
    with pytest.raises(AssertionError, match="ImportError"):
        run_code(
            python, STUB + re.sub(r"(from stable_rlhf\.integrations\.\w+ import) \w+", r"\1 nothing", code), tmp_path
        )
