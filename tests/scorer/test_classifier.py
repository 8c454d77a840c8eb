"""Scorers as plain transformers loads them, and sequence-classification models as scorers."""

from __future__ import annotations

import copy
import json

import pytest
import torch

from helpers.tiny_model import redraw
from stable_rlhf.data.encoding import Encoded, encode, pad_sequences
from stable_rlhf.run.export import export_scorer
from stable_rlhf.scorer import AdvantageModel, ScorerSettings
from stable_rlhf.scorer.classifier import NoClassifier, export_classifier

PROMPTS = ["Reverse the letters of abcd", "Sort the letters of dcb", "Sort the letters of ba"]
RESPONSES = ["dcba", "", "abababab"]
SIZES = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "max_position_embeddings": 64}
FAMILIES = {
    "llama": {**SIZES, "intermediate_size": 32},
    "mistral": {**SIZES, "intermediate_size": 32, "num_key_value_heads": 1, "head_dim": 16},
    "qwen2": {**SIZES, "intermediate_size": 32, "num_key_value_heads": 1},
    "qwen3": {**SIZES, "intermediate_size": 32, "num_key_value_heads": 1, "head_dim": 16},
    "gemma2": {**SIZES, "intermediate_size": 32, "num_key_value_heads": 1, "head_dim": 16},
    "gemma3_text": {**SIZES, "intermediate_size": 32, "num_key_value_heads": 1, "head_dim": 16},
    "phi3": {**SIZES, "intermediate_size": 32, "num_key_value_heads": 1},
    "bloom": {"hidden_size": 32, "n_layer": 2, "n_head": 2},
    "opt": {**SIZES, "word_embed_proj_dim": 16, "ffn_dim": 32, "dropout": 0.0},
    "gpt2": {"n_embd": 32, "n_layer": 2, "n_head": 2, "n_positions": 64},
    "gpt_neox": {**SIZES, "intermediate_size": 32},
}
ABSOLUTE = {"gpt2"}  # positions from a row's first column, whatever the mask


def close(found: torch.Tensor, wanted: torch.Tensor) -> None:
    """Within 1e-6 of the largest: the small ones are differences of numbers as large, and each processor rounds its own
    way."""
    torch.testing.assert_close(found, wanted, rtol=0, atol=1e-6 * max(1.0, float(wanted.abs().max())))


@pytest.fixture
def make(tokenizer):
    def build(family: str, objective: str = "am", tokenizer=tokenizer, bias: float = 0.7, **settings) -> AdvantageModel:
        from transformers import AutoConfig, AutoModelForCausalLM

        config = AutoConfig.for_model(
            family, **FAMILIES.get(family, FAMILIES["llama"]), vocab_size=len(tokenizer), pad_token_id=0,
            bos_token_id=1, eos_token_id=2,
        )  # fmt: skip
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            model = redraw(AutoModelForCausalLM.from_config(config), 0.2, torch.Generator().manual_seed(0)).eval()
        scorer = AdvantageModel(model.base_model, tokenizer, ScorerSettings(objective=objective, **settings)).eval()
        torch.nn.init.constant_(scorer.reward_head.bias, bias)
        return scorer

    return build


@torch.no_grad()
def rewards(scorer: AdvantageModel, examples: list[Encoded]) -> torch.Tensor:
    return scorer(*scorer.prepare(examples))[0]


def examples_of(tokenizer) -> list[Encoded]:
    """Finished ones, and one that was cut off before its end."""
    made = [encode(tokenizer, p, r) for p, r in zip(PROMPTS, RESPONSES, strict=True)]
    return [*made, Encoded(made[0].ids[:-1], made[0].prompt_length)]


@torch.no_grad()
def read_back(folder, examples: list[Encoded], side: str, **options) -> torch.Tensor:
    """Logits of plain transformers, in the words of its own documentation."""
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    model = AutoModelForSequenceClassification.from_pretrained(folder, **options).eval()
    pad = AutoTokenizer.from_pretrained(folder).pad_token_id
    assert model.config.num_labels == 1
    batch = pad_sequences([e.ids for e in examples], side=side, pad_token_id=pad)
    return model(input_ids=batch.input_ids, attention_mask=batch.attention_mask).logits.squeeze(-1).float()


@pytest.mark.parametrize("family", FAMILIES)
def test_plain_transformers_gives_the_scorers_rewards(make, tokenizer, family, tmp_path):
    scorer, examples = make(family), examples_of(tokenizer)
    scorer.save_pretrained(tmp_path / "scorer")
    told = export_scorer(str(tmp_path / "scorer"), str(tmp_path / "out"))
    wanted = rewards(scorer, examples)
    assert told["bias"] == pytest.approx(0.7) and told["left_padding"] == (family not in ABSOLUTE)
    assert wanted.std() > 1e-3  # the checks below could not fail on constant rewards
    right = read_back(tmp_path / "out", examples, "right") + told["bias"]
    close(right, wanted)
    left = read_back(tmp_path / "out", examples, "left") + told["bias"]
    if told["left_padding"]:
        close(left, wanted)
    else:
        assert (left - wanted).abs().max() > 1e-3
    # A control: a padding token that ends the responses, as a plain copy of the weights would have it.
    config = json.loads((tmp_path / "out" / "config.json").read_text(encoding="utf-8"))
    (tmp_path / "out" / "config.json").write_text(json.dumps({**config, "pad_token_id": 2}), encoding="utf-8")
    late = read_back(tmp_path / "out", examples, "right") + told["bias"]
    assert (late - wanted).abs()[:-1].min() > 1e-3
    card = (tmp_path / "out" / "README.md").read_text(encoding="utf-8")
    assert "group" in card and "reward_bias" in card and ("right only" in card) == (family in ABSOLUTE)


def test_a_padding_token_that_ends_responses_is_replaced(make, tokenizer, tmp_path):
    same = copy.deepcopy(tokenizer)
    same.pad_token = same.eos_token
    scorer, examples = make("llama", tokenizer=same), examples_of(tokenizer)
    scorer.save_pretrained(tmp_path / "scorer")
    told = export_scorer(str(tmp_path / "scorer"), str(tmp_path / "out"))
    assert told["pad_token"] == "<|pad|>"
    for side in ("left", "right"):
        found = read_back(tmp_path / "out", examples, side) + told["bias"]
        close(found, rewards(scorer, examples))
    again = AdvantageModel.from_pretrained(tmp_path / "out").score(PROMPTS, RESPONSES)
    close(again, rewards(scorer, examples[:3]))


TEMPLATES = {
    "as it was": None,
    "cut": "{% for m in messages %}{{ bos_token if m['role'] == 'user' else sep_token }}{{ m['content'] }}"
    "{{ eos_token + '+' if m['role'] == 'assistant' else '' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ sep_token }}{% endif %}",
    "other": "{% for m in messages %}{{ bos_token if m['role'] == 'user' else sep_token }}"
    "{{ m['content'][:1] }}{{ eos_token if m['role'] == 'assistant' else '' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ sep_token }}{% endif %}",
    "none": None,
}  # fmt: skip


@pytest.mark.parametrize("kind", TEMPLATES)
def test_chats_as_the_exported_template_writes_them(make, tokenizer, kind, tmp_path):
    """What TRL and rewardbench do: text by the chat template, tokens of it, the last one's logit."""
    from transformers import AutoTokenizer

    own = copy.deepcopy(tokenizer)
    if kind != "as it was":
        own.chat_template = TEMPLATES[kind]
    scorer = make("llama", tokenizer=own)
    scorer.save_pretrained(tmp_path / "scorer")
    told = export_scorer(str(tmp_path / "scorer"), str(tmp_path / "out"))
    assert told["chat_template"] == kind
    card = (tmp_path / "out" / "README.md").read_text(encoding="utf-8")
    if kind in ("other", "none"):
        assert "apply_chat_template" not in card and "of the response alone" in card
        return
    reader = AutoTokenizer.from_pretrained(tmp_path / "out")
    chats = [
        [{"role": "user", "content": p}, {"role": "assistant", "content": r}]
        for p, r in zip(PROMPTS, RESPONSES, strict=True)
    ]
    encoded = [encode(own, p, r) for p, r in zip(PROMPTS, RESPONSES, strict=True)]
    texts = reader.apply_chat_template(chats, tokenize=False)
    assert reader(texts, add_special_tokens=False)["input_ids"] == [list(e.ids) for e in encoded]
    plain = own.apply_chat_template(chats, tokenize=False)  # a control: without the cut it would be another text
    assert (plain == texts) == (kind == "as it was")


def test_a_16_bit_scorer_keeps_its_type_and_its_whole_head(make, tokenizer, tmp_path):
    scorer, examples = make("llama", objective="rm"), examples_of(tokenizer)
    scorer.trunk.backbone.to(torch.bfloat16)
    scorer.save_pretrained(tmp_path / "scorer")
    told = export_scorer(str(tmp_path / "scorer"), str(tmp_path / "out"))
    wide = AdvantageModel.from_pretrained(tmp_path / "scorer")  # float32 out of 16-bit weights
    found = read_back(tmp_path / "out", examples, "right", dtype=torch.float32) + told["bias"]
    close(found, rewards(wide, examples))
    assert json.loads((tmp_path / "out" / "config.json").read_text(encoding="utf-8"))["dtype"] == "bfloat16"
    assert "e(x)" not in (tmp_path / "out" / "README.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("family", ["granite", "cohere"])
def test_a_family_without_such_a_class_is_refused(make, family):
    with pytest.raises(NoClassifier, match=f"no ForSequenceClassification for {family} models"):
        export_classifier(make(family))


def test_a_class_that_reads_elsewhere_is_refused(make, monkeypatch):
    from transformers import LlamaForSequenceClassification

    forward = LlamaForSequenceClassification.forward

    def late(self, input_ids, attention_mask):
        return forward(self, input_ids=input_ids[:, :-1], attention_mask=attention_mask[:, :-1])

    monkeypatch.setattr(LlamaForSequenceClassification, "forward", late)
    with pytest.raises(NoClassifier, match="gives other rewards than this scorer"):
        export_classifier(make("llama"))


def test_a_scorers_own_folder_is_no_classifier(make, tmp_path):
    """It used to get a head of random numbers. Its backbone loads as ever, also where another class asks."""
    from transformers import AutoModel, AutoModelForCausalLM, AutoModelForSequenceClassification

    from stable_rlhf.models.loading import load_backbone

    make("llama").save_pretrained(tmp_path)
    for labels in (1, 2):
        with pytest.raises(RuntimeError, match="ignore_mismatched_sizes"):
            AutoModelForSequenceClassification.from_pretrained(tmp_path, num_labels=labels)
    AutoModel.from_pretrained(tmp_path)
    AutoModelForCausalLM.from_pretrained(tmp_path)
    load_backbone(str(tmp_path))


def test_folders_of_before_are_scorers_still(make, tmp_path):
    scorer = make("llama")
    scorer.save_pretrained(tmp_path)
    scorer.trunk.backbone.save_pretrained(tmp_path)  # without the tensor that refuses
    assert torch.equal(
        AdvantageModel.from_pretrained(tmp_path).score(PROMPTS, RESPONSES), scorer.score(PROMPTS, RESPONSES)
    )


# -- the other way round -----------------------------------------------------------------------------------------------


@pytest.fixture
def others(make, tokenizer, tmp_path):
    """A folder as somebody's reward trainer leaves it."""

    def save(labels: int = 1):
        from transformers import LlamaConfig, LlamaForSequenceClassification

        config = LlamaConfig(
            **FAMILIES["llama"], vocab_size=len(tokenizer), pad_token_id=0, num_labels=labels, eos_token_id=2
        )
        model = redraw(LlamaForSequenceClassification(config), 0.2, torch.Generator().manual_seed(1)).eval()
        model.save_pretrained(tmp_path / "theirs")
        tokenizer.save_pretrained(tmp_path / "theirs")
        return model

    return save


def test_somebodys_classifier_is_a_reward_model(others, tokenizer, tmp_path):
    model, examples = others(), examples_of(tokenizer)
    scorer = AdvantageModel.from_pretrained(tmp_path / "theirs")
    assert scorer.settings.objective == "rm" and scorer.expected_head is None
    batch = pad_sequences([e.ids for e in examples])
    with torch.no_grad():
        wanted = model(input_ids=batch.input_ids, attention_mask=batch.attention_mask).logits.squeeze(-1)
    close(rewards(scorer, examples), wanted)
    assert wanted.std() > 1e-3
    split = AdvantageModel.from_pretrained(tmp_path / "theirs", num_trainable_layers=1)
    torch.testing.assert_close(rewards(split, examples), wanted, rtol=0, atol=1e-5)


def test_what_is_exported_comes_back_with_its_bias(make, tmp_path):
    scorer = make("llama", objective="rm")
    scorer.save_pretrained(tmp_path / "scorer")
    export_scorer(str(tmp_path / "scorer"), str(tmp_path / "out"))
    again = AdvantageModel.from_pretrained(tmp_path / "out")
    close(again.score(PROMPTS, RESPONSES), scorer.score(PROMPTS, RESPONSES))
    export_scorer(str(tmp_path / "out"), str(tmp_path / "twice"))
    names = {p.name for p in (tmp_path / "twice").iterdir()}
    assert {
        "README.md",
        "config.json",
        "model.safetensors",
        "tokenizer.json",
    } <= names and "heads.safetensors" not in names


def test_classifiers_that_are_no_reward_model_are_refused(others, tmp_path):
    others(labels=3)
    with pytest.raises(ValueError, match=r"theirs.*one label, this sequence-classification model has 3"):
        AdvantageModel.from_pretrained(tmp_path / "theirs")
