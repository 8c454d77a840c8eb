"""A scorer as a folder that others load: `stable-rlhf export`."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import torch

from stable_rlhf import __version__
from stable_rlhf.data.jsonl import read_json
from stable_rlhf.engine.run_folder import RunError
from stable_rlhf.engine.signals import whole
from stable_rlhf.scorer.classifier import BIAS_FIELD, Exported, export_classifier
from stable_rlhf.scorer.model import AdvantageModel, ScorerSettings, check_scorer_folder
from stable_rlhf.show.progress import say

_CHANGES = {
    "as it was": "the chat template writes what the scorer reads",
    "cut": "what the chat template wrote behind the end of a response is cut off now: r is read at that end",
    "other": "the chat template writes something else than the scorer reads: make token ids as its card says",
    "none": "the tokenizer has no chat template: make token ids as its card says",
}


def export_scorer(scorer: str, output_dir: str) -> dict[str, Any]:
    """Write the reward model of the folder ``scorer`` to ``output_dir`` as a sequence-classification model with one
    label, in the type that it was saved in, and say what is to be known of it.

    Raises:
        ValueError: ``scorer`` is none, ``output_dir`` is not empty, or the family has no such class.
    """
    source, target = check_scorer_folder(scorer), Path(output_dir).resolve()
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        what = "is not empty" if target.is_dir() else "is a file"
        raise RunError(f"output_dir {output_dir!r} {what}; nothing is overwritten: choose another output_dir")
    model = AdvantageModel.from_pretrained(source, dtype=_saved_type(source))
    exported = export_classifier(model)
    target.parent.mkdir(parents=True, exist_ok=True)
    # A name of its own: NAME.tmp may be somebody's, and is a stage's that is not finished.
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=f".{target.name}-") as name:
        working = Path(name) / "model"
        working.mkdir()  # with the permissions of any new folder, which a temporary one has not
        exported.model.save_pretrained(working)
        exported.tokenizer.save_pretrained(working)
        (working / "README.md").write_text(card(exported, model.settings), encoding="utf-8")
        with whole():
            if target.exists():
                target.rmdir()
            working.rename(target)
    return _told(exported, model.settings, output_dir)


def _saved_type(folder: Path) -> torch.dtype:
    config = read_json(folder / "config.json")
    found = getattr(torch, str(config.get("dtype") or config.get("torch_dtype") or "float32"), None)
    return found if found in (torch.bfloat16, torch.float16) else torch.float32


def _told(exported: Exported, settings: ScorerSettings, output_dir: str) -> dict[str, Any]:
    family = type(exported.model).__name__
    if exported.bias:
        say(
            f"  {family} has no place for the reward head's bias: r = logit + {exported.bias:.9g}, a constant that no "
            f"comparison of two responses sees ({BIAS_FIELD} of config.json)"
        )
    if settings.objective == "am":
        say("  e(x) of the Advantage Model has no place in it: the logit is r(x, y)")
    if exported.new_pad:
        say(f"  padding is a new token, {exported.tokenizer.pad_token}: the scorer's own is what ends a response")
    if exported.template != "as it was":
        say(f"  {_CHANGES[exported.template]}")
    if not exported.left:
        say("  rows must be padded on the right: this family counts positions from a row's first column")
    return {
        "folder": output_dir, "class": family, "objective": settings.objective, "bias": exported.bias,
        "pad_token": exported.tokenizer.pad_token, "chat_template": exported.template, "left_padding": exported.left,
    }  # fmt: skip


_USE = """
```python
from transformers import AutoModelForSequenceClassification, AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained(FOLDER)
model = AutoModelForSequenceClassification.from_pretrained(FOLDER, dtype="auto")
{example}```
"""
_EXAMPLE = """\
chat = [{"role": "user", "content": "Hello"}, {"role": "assistant", "content": "Hi there."}]
text = tokenizer.apply_chat_template(chat, tokenize=False)
batch = tokenizer([text], return_tensors="pt", padding=True, add_special_tokens=False)
print(model(**batch).logits)  # [1, 1]
"""
_HEADER = """\
---
library_name: transformers
pipeline_tag: text-classification
tags: [reward-model, stable-rlhf]
---

# Reward model

Exported by stable-rlhf {version}: `{family}` with one label, whose logit is the reward r(x, y), read at the last token
that is not padding: the one that ends a response.

"""


def card(exported: Exported, settings: ScorerSettings) -> str:
    """The model card: what the logit is, and how to get the scorer's own numbers from it."""
    change, points = _CHANGES[exported.template], []
    if exported.bias:
        points.append(
            f"**Bias.** The class has no place for the reward head's bias, so r(x, y) = logit + {exported.bias!r} "
            f"(`{BIAS_FIELD}` in config.json; stable-rlhf adds it). No comparison of responses sees this constant."
        )
    if settings.objective == "am":
        share = (settings.num_policies - settings.num_alternates) / settings.num_policies
        points.append(
            "**An Advantage Model without its expectation.** It scored a(x, y) = "
            f"{'' if share == 1 else f'{share:.6g} '}(r(x, y) − e(x)), and e(x) is not here. That is the same for all "
            "responses to one prompt: which of them is best is kept, and so are advantages relative to a group of "
            "responses to one prompt (GRPO, RLOO), in which e(x) cancels. Scores of different prompts are not on one "
            "scale, as they are with e(x)."
        )
    new = "a new token, " if exported.new_pad else ""
    sides = "on either side" if exported.left else "on the right only"
    points.append(f"**Padding.** `{exported.tokenizer.pad_token}`, {new}never at a response's end, {sides}.")
    points.append(f"**Chat template.** {change[0].upper()}{change[1:]}.")
    usable = exported.template in ("as it was", "cut")
    if not usable:
        points.append(
            "**Tokens.** The scorer reads those of the prompt (by the chat template, where there is one, with the "
            "beginning of an answer), of the response alone, and what ends a response."
        )
    header = _HEADER.format(version=__version__, family=type(exported.model).__name__)
    return header + "".join(f"- {point}\n" for point in points) + _USE.format(example=_EXAMPLE if usable else "")
