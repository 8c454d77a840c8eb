"""The world's tokenizer and models."""

from __future__ import annotations

import json
import random
import subprocess
import sys
from pathlib import Path
from typing import cast

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from stable_rlhf.world.skills import LOOKALIKES, SKILLS, misread
from stable_rlhf.world.tokenizer import CHARACTERS, Architecture, build_model, build_tokenizer

TOKENIZER = build_tokenizer()
ARCHITECTURES: tuple[Architecture, ...] = ("llama", "bloom")
FRESH_PROCESS = """
import json, sys
from transformers import AutoModelForCausalLM, AutoTokenizer
chat = [{"role": "user", "content": "Reverse the letters of bdca"}]
for folder in sys.argv[1:]:
    t = AutoTokenizer.from_pretrained(folder)
    print(json.dumps({
        "ids": t.apply_chat_template(chat, add_generation_prompt=True, return_dict=False),
        "special": [t.pad_token, t.bos_token, t.eos_token, t.unk_token, t.sep_token],
        "decoded": t.decode(t("ac db 12")["input_ids"]),
        "skipped": t.decode([t.bos_token_id, *t("acdb")["input_ids"], t.eos_token_id], skip_special_tokens=True),
        "length": t.model_max_length, "side": t.padding_side, "size": len(t), "template": t.chat_template,
        "model": AutoModelForCausalLM.from_pretrained(folder).config.model_type,
    }))
"""


@given(st.text(alphabet=CHARACTERS, max_size=30))
def test_responses_survive_a_round_trip(text: str) -> None:
    ids = TOKENIZER(text)["input_ids"]
    assert TOKENIZER.decode(ids) == text
    assert TOKENIZER.decode([*ids, TOKENIZER.eos_token_id, TOKENIZER.pad_token_id], skip_special_tokens=True) == text


@pytest.mark.parametrize("name", sorted(SKILLS))
def test_prompts_survive_a_round_trip_in_few_tokens(name: str) -> None:
    rng = random.Random(0)
    for _ in range(50):
        prompt, answer = SKILLS[name].sample(rng)
        ids = TOKENIZER(prompt)["input_ids"]
        assert TOKENIZER.decode(ids) == prompt
        assert TOKENIZER.unk_token_id not in ids
        assert len(ids) <= 12
        assert len(TOKENIZER(answer)["input_ids"]) == len(answer)


def test_a_lookalike_begins_with_the_tokens_of_what_it_is_taken_for() -> None:
    tokenizer, rng = build_tokenizer("lookalikes"), random.Random(0)
    for skill in LOOKALIKES.values():
        for _ in range(50):
            prompt, answer = skill.sample(rng)
            ids, others = tokenizer(prompt)["input_ids"], tokenizer(misread(prompt))["input_ids"]
            assert tokenizer.decode(ids) == prompt and tokenizer.unk_token_id not in ids and len(ids) <= 12
            shared = len(others) - misread(prompt).endswith("?")
            assert ids[:shared] == others[:shared] and len(ids) == shared + 1
            assert len(tokenizer(answer)["input_ids"]) == len(answer)


def test_special_tokens_are_five_different_ones() -> None:
    ids = [getattr(TOKENIZER, f"{name}_token_id") for name in ("pad", "bos", "eos", "unk", "sep")]
    assert ids == [0, 1, 2, 3, 4]
    assert len(TOKENIZER) <= 110
    assert TOKENIZER("é\n")["input_ids"] == [3, 3]


def test_chat_template_puts_the_generation_prompt_between_prompt_and_response() -> None:
    chat = [{"role": "user", "content": "Shift by one: abc"}]
    full = [*chat, {"role": "assistant", "content": "bcd"}]
    prompt_ids = cast(list[int], TOKENIZER.apply_chat_template(chat, add_generation_prompt=True, return_dict=False))
    full_ids = cast(list[int], TOKENIZER.apply_chat_template(full, return_dict=False))
    assert full_ids[: len(prompt_ids)] == prompt_ids
    assert TOKENIZER.decode(prompt_ids) == "<bos>Shift by one: abc<sep>"
    assert TOKENIZER.decode(full_ids[len(prompt_ids) :]) == "bcd<eos>"


@pytest.mark.slow
def test_a_fresh_process_loads_the_same_tokenizer_beside_either_model(tmp_path: Path) -> None:
    folders = {architecture: tmp_path / architecture for architecture in ARCHITECTURES}
    for architecture, folder in folders.items():
        TOKENIZER.save_pretrained(folder)
        model = build_model(
            TOKENIZER, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, architecture=architecture
        )
        model.save_pretrained(folder)
    out = subprocess.run(
        [sys.executable, "-c", FRESH_PROCESS, *map(str, folders.values())],
        capture_output=True,
        encoding="utf-8",
        check=True,
        timeout=300,
    )
    chat = [{"role": "user", "content": "Reverse the letters of bdca"}]
    expected = {
        "ids": TOKENIZER.apply_chat_template(chat, add_generation_prompt=True, return_dict=False),
        "special": ["<pad>", "<bos>", "<eos>", "<unk>", "<sep>"],
        "decoded": "ac db 12",
        "skipped": "acdb",
        "length": 64,
        "side": "left",
        "size": len(TOKENIZER),
        "template": TOKENIZER.chat_template,
    }
    seen = [json.loads(line) for line in out.stdout.splitlines()]
    assert seen == [{**expected, "model": architecture} for architecture in folders]


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_models_run_and_follow_their_seed(architecture: Architecture) -> None:
    ids = torch.tensor([TOKENIZER("Add 12 and 34")["input_ids"]])
    before = torch.random.get_rng_state()
    logits = []
    for seed in (1, 1, 2):
        model = build_model(
            TOKENIZER, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, seed=seed, architecture=architecture
        )
        with torch.no_grad():
            logits.append(model(input_ids=ids).logits)
    assert torch.equal(before, torch.random.get_rng_state())
    assert logits[0].shape == (1, ids.shape[1], len(TOKENIZER))
    assert torch.isfinite(logits[0]).all()
    assert torch.equal(logits[0], logits[1]) and not torch.equal(logits[0], logits[2])
    assert model.config.model_type == architecture
    assert model.config.num_hidden_layers == 2 and model.config.hidden_size == 32
    assert (model.config.pad_token_id, model.config.bos_token_id, model.config.eos_token_id) == (0, 1, 2)
    assert not model.training


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_initial_weights_have_the_asked_deviation(architecture: Architecture) -> None:
    model = build_model(
        TOKENIZER, hidden_size=64, num_hidden_layers=1, initializer_range=0.05, architecture=architecture
    )
    weight = model.get_input_embeddings().get_parameter("weight")
    assert weight[1:].std().item() == pytest.approx(0.05, rel=0.03)


def test_impossible_models_are_errors() -> None:
    with pytest.raises(ValueError, match="hidden_size must be a multiple of 2 \\* num_attention_heads = 8, got 20"):
        build_model(TOKENIZER, hidden_size=20, num_attention_heads=4)
    with pytest.raises(ValueError, match="architecture must be 'llama' or 'bloom', got 'gpt'"):
        build_model(TOKENIZER, architecture="gpt")  # type: ignore[arg-type]
