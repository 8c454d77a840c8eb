"""Reward models as others load them: transformers' sequence classification with one label, whose logit is r(x, y).

The two differ in where r is read. A scorer reads it at the last token of a response, by lengths. Such a classifier has
no lengths and reads it at the last token that is not padding; so its padding must be a token that no response ends
with, and a chat template must end its text where a response ends.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from stable_rlhf.data.encoding import Encoded, encode, pad_sequences
from stable_rlhf.data.jsonl import is_finite, read_json
from stable_rlhf.data.records import DataError
from stable_rlhf.data.turns import end_of_turn, ends_of_turn
from stable_rlhf.models.checked import load_whole
from stable_rlhf.models.loading import text_config

# In config.json, of a head whose bias transformers' own class has no place for: r = logit + reward_bias.
BIAS_FIELD = "reward_bias"
_CLASSIFIER = "ForSequenceClassification"
_PAD = "<|pad|>"
_PROBES = (
    ("Hello", "Hi there."),
    ("What is 2 + 3?", "It is 5."),
    ("Name a colour, any colour at all.", "Blue, of course."),
)


class NoClassifier(ValueError):
    """A scorer's model family has no class of transformers that gives the same reward."""


@dataclass(frozen=True)
class Exported:
    """A classifier, its tokenizer, and what whoever uses it has to know.

    Attributes:
        bias: of the reward head, where the class has no place for one, else 0: r = logit + bias.
        new_pad: the padding token is new, since the scorer's own is what ends a response.
        template: whether the chat template's text is what the scorer reads: ``"as it was"``, ``"cut"`` (it is now,
            what came after the response's end is cut off), ``"other"`` (it is not) or ``"none"``.
        left: whether rows may be padded on the left as well.
    """

    model: Any
    tokenizer: Any
    bias: float
    new_pad: bool
    template: str
    left: bool


def export_classifier(scorer: Any) -> Exported:
    """The reward model of an :class:`.AdvantageModel` as a sequence-classification model that shares its weights, tried
    on a few rows against the scorer itself. What the scorer is to be used for afterwards is another copy: padding may
    be added to it.

    Raises:
        NoClassifier: the family has no such class, or one that computes something else.
    """
    backbone, tokenizer = scorer.trunk.backbone, copy.deepcopy(scorer.tokenizer)
    new_pad = _own_padding(backbone, tokenizer)
    tokenizer.padding_side = "right"
    classifier, bias = _classifier(backbone, scorer.reward_head, tokenizer.pad_token_id)
    template = _fit_template(tokenizer)
    examples = _probes(scorer.tokenizer)
    wanted, bound = _rewards(scorer, examples)
    found = {side: _logits(classifier, examples, side, tokenizer.pad_token_id) + bias for side in ("right", "left")}
    off = {side: bool(((values - wanted).abs() > bound).any()) for side, values in found.items()}
    if off["right"]:
        raise NoClassifier(
            f"{type(classifier).__name__} of transformers gives other rewards than this scorer (up to "
            f"{float((found['right'] - wanted).abs().max()):.3g} off), so it cannot be exported; use it from Python"
        )
    return Exported(classifier, tokenizer, bias, new_pad, template, not off["left"])


def _classifier(backbone: Any, head: nn.Linear, pad: int) -> tuple[Any, float]:
    """The family's class around ``backbone`` and ``head``, and the bias that it has no place for."""
    from transformers import MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING as CLASSES

    family = backbone.config.model_type
    if type(backbone.config) not in CLASSES:
        raise NoClassifier(f"transformers has no {_CLASSIFIER} for {family} models, so this scorer cannot be exported")
    config = copy.deepcopy(backbone.config)
    config.id2label, config.label2id = {0: "reward"}, {"reward": 0}  # which makes num_labels 1
    config.use_cache = False
    with torch.device("meta"):  # its own weights are never used
        made: Any = CLASSES[type(config)]
        classifier = made(config)
    prefix = classifier.base_model_prefix
    score, inner = getattr(classifier, "score", None), getattr(classifier, prefix, None)
    parts = {name for name, child in classifier.named_children() if any(True for _ in child.parameters())}
    if parts != {prefix, "score"} or type(inner) is not type(backbone) or not isinstance(score, nn.Linear):
        raise NoClassifier(
            f"{type(classifier).__name__} of transformers is not this scorer's backbone with one linear head "
            f"({', '.join(sorted(parts))}), so it cannot be exported"
        )
    holds = score.bias is not None
    own = nn.Linear(head.in_features, 1, bias=holds, dtype=head.weight.dtype, device="meta")
    own.weight = nn.Parameter(head.weight.detach().clone(), requires_grad=False)
    bias = float(head.bias.detach())
    if holds:
        own.bias = nn.Parameter(head.bias.detach().clone(), requires_grad=False)
        bias = 0.0
    setattr(classifier, prefix, backbone)
    classifier.score = own
    for part in (classifier.config, text_config(classifier.config)):
        part.pad_token_id = pad
    if bias:
        setattr(classifier.config, BIAS_FIELD, bias)
    return classifier.eval(), bias


def _own_padding(backbone: Any, tokenizer: Any) -> bool:
    """Make the padding token one that no response ends with. True where it had to be a new one, a row more of the
    embedding where that has none to spare."""
    rows, pad = int(backbone.get_input_embeddings().num_embeddings), tokenizer.pad_token_id
    if pad is not None and pad < rows and pad not in ends_of_turn(tokenizer):
        return False
    name = _PAD
    while name in tokenizer.get_vocab():
        name = f"<{name}>"
    tokenizer.add_special_tokens({"pad_token": name})
    if tokenizer.pad_token_id >= rows:
        backbone.resize_token_embeddings(tokenizer.pad_token_id + 1, mean_resizing=False)
        with torch.no_grad():
            backbone.get_input_embeddings().weight[rows:] = 0
    return True


def _fit_template(tokenizer: Any) -> str:
    """Let a chat template's text end with the response's end, where it writes more behind it or less; see
    :attr:`Exported.template`."""
    template = tokenizer.chat_template
    if not template:
        return "none"
    if _template_fits(tokenizer):
        return "as it was"
    if isinstance(template, str):
        end = tokenizer.convert_ids_to_tokens(end_of_turn(tokenizer)).replace("\\", "\\\\").replace("'", "\\'")
        closed = "not add_generation_prompt and messages and messages[-1]['role'] == 'assistant'"
        tokenizer.chat_template = (
            f"{{% set rendered %}}{template}{{% endset %}}{{{{ rendered.rsplit('{end}', 1)[0] ~ '{end}' "
            f"if {closed} else rendered }}}}"
        )
        if _template_fits(tokenizer):
            return "cut"
    tokenizer.chat_template = template
    return "other"


def _template_fits(tokenizer: Any) -> bool:
    """Whether the template's text of a chat is, in tokens, what the scorer reads."""
    first, second = _PROBES[:2]
    earlier = [{"role": "user", "content": first[0]}, {"role": "assistant", "content": first[1]}]
    for before in ([], earlier):
        prompt = [*before, {"role": "user", "content": second[0]}]
        answered = [*prompt, {"role": "assistant", "content": second[1]}]
        try:
            text = tokenizer.apply_chat_template(answered, tokenize=False)
            wanted = encode(tokenizer, prompt, second[1]).ids
        except Exception:  # any: it is the template's own code
            return False
        if tuple(tokenizer(text, add_special_tokens=False)["input_ids"]) != wanted:
            return False
    return True


def _probes(tokenizer: Any) -> list[Encoded]:
    """Rows of several lengths, one of them cut off before its end."""
    examples = [encode(tokenizer, prompt, response) for prompt, response in _PROBES]
    first = examples[-1]
    return [*examples, Encoded(first.ids[:-1], first.prompt_length)]


@torch.no_grad()
def _rewards(scorer: Any, examples: Sequence[Encoded]) -> tuple[Tensor, Tensor]:
    """What the scorer gives, and how far rounding in its type may be off; [n] each."""
    inputs, last, _ = scorer.eval().prepare(examples)
    features = scorer.trunk(**inputs)[torch.arange(len(examples), dtype=torch.int64, device=last.device), last]
    head = scorer.reward_head
    rewards = head(features.to(head.weight.dtype)).squeeze(-1).float().cpu()
    size = (features.float().abs() @ head.weight.float().abs().squeeze(0)).cpu()
    return rewards, size * max(1e-6, 2 * torch.finfo(features.dtype).eps) + 1e-6


@torch.no_grad()
def _logits(classifier: Any, examples: Sequence[Encoded], side: str, pad: int) -> Tensor:
    """What a plain call gives, as a pipeline makes it: without positions."""
    batch = pad_sequences([e.ids for e in examples], side=side, pad_token_id=pad)
    head, dtype = classifier.score, getattr(classifier, classifier.base_model_prefix).dtype
    device = head.weight.device
    classifier.score = copy.deepcopy(head).to(dtype)  # as it will be loaded
    try:
        logits = classifier(input_ids=batch.input_ids.to(device), attention_mask=batch.attention_mask.to(device)).logits
    finally:
        classifier.score = head
    return logits.squeeze(-1).float().cpu()


def is_classifier(folder: Path) -> bool:
    """Whether a folder holds a sequence-classification model."""
    try:
        names = read_json(folder / "config.json").get("architectures")
    except DataError:
        return False
    return isinstance(names, list) and any(str(name).endswith(_CLASSIFIER) for name in names)


def load_classifier(folder: str, what: str, dtype: torch.dtype) -> tuple[Any, Tensor, Tensor]:
    """Backbone, weight [1, H] and bias [1] (float32) of somebody's sequence-classification model.

    Raises:
        ValueError: it is not whole, has another number of labels than one, or is no decoder with one linear head.
    """
    from transformers import AutoModelForSequenceClassification

    config = read_json(Path(folder) / "config.json")
    labels = config.get("num_labels", len(config.get("id2label") or (0, 1)))
    if labels != 1:
        raise ValueError(f"{what}: a reward model has one label, this sequence-classification model has {labels}")
    model = load_whole(AutoModelForSequenceClassification, folder, what, dtype=dtype)
    parts = {name for name, child in model.named_children() if any(True for _ in child.parameters())}
    if parts != {model.base_model_prefix, "score"} or not isinstance(model.score, nn.Linear):
        raise ValueError(
            f"{what}: {type(model).__name__} is not a decoder with one linear head named score, which is what can be "
            f"read as a scorer; it has {', '.join(sorted(parts))}"
        )
    bias = config.get(BIAS_FIELD, 0.0)
    if not is_finite(bias):
        raise ValueError(f"{what}: config.json: {BIAS_FIELD} must be a finite number, got {bias!r}")
    kept = torch.full((1,), float(bias), dtype=torch.float32, device="cpu")
    if model.score.bias is not None:
        kept += model.score.bias.detach().float().cpu()
    return getattr(model, model.base_model_prefix), model.score.weight.detach().float().cpu(), kept
