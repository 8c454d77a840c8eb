"""flash-attn where it is installed, else SDPA; the package is stood in for by the same functions in plain PyTorch."""

from __future__ import annotations

import sys
from itertools import pairwise
from types import ModuleType

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention

from stable_rlhf.models.loading import load_causal_lm
from stable_rlhf.models.policy import PolicyModel
from stable_rlhf.models.trunk import Trunk
from stable_rlhf.scorer import AdvantageModel

SEQUENCES = [[3, 4, 5, 6, 7, 8], [9], [9, 8, 7], [5, 6, 7, 8, 9, 10, 11, 12]]


def attend(query, key, value, scale):
    """[1, T, heads, width], causal."""
    q, k, v = (t.transpose(1, 2) for t in (query, key, value))
    causal = torch.ones(q.shape[2], k.shape[2], dtype=torch.bool).tril(k.shape[2] - q.shape[2])
    return scaled_dot_product_attention(q, k, v, attn_mask=causal, scale=scale, enable_gqa=True).transpose(1, 2)


@pytest.fixture
def flash_attn(monkeypatch) -> list[list[int]]:
    """Stands in for flash-attn and its GPU; gives the lengths that its kernel for unequal lengths was called with."""
    from transformers import modeling_flash_attention_utils as attention
    from transformers import utils

    lengths = []

    def varlen(q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, softmax_scale=None, causal=False):
        assert causal and torch.equal(cu_seqlens_q, cu_seqlens_k)
        lengths.append(cu_seqlens_q.diff().tolist())
        parts = [attend(*(t[None, a:b] for t in (q, k, v)), softmax_scale) for a, b in pairwise(cu_seqlens_q.tolist())]
        return torch.cat(parts, dim=1)[0]

    def equal(q, k, v, softmax_scale=None, causal=False):
        return attend(q, k, v, softmax_scale)

    package, padding = ModuleType("flash_attn"), ModuleType("flash_attn.bert_padding")
    package.flash_attn_func, package.flash_attn_varlen_func, package.flash_attn_with_kvcache = equal, varlen, equal
    padding.pad_input, padding.unpad_input = attention._pad_input, attention._unpad_input
    monkeypatch.setitem(sys.modules, "flash_attn", package)
    monkeypatch.setitem(sys.modules, "flash_attn.bert_padding", padding)
    for module in (utils, attention):
        monkeypatch.setattr(module, "is_flash_attn_2_available", lambda: True)
    known = attention.FLASH_ATTENTION_COMPATIBILITY_MATRIX[2]
    monkeypatch.setitem(known, "general_availability_check", lambda: True)
    monkeypatch.setitem(known, "supported_devices", ((lambda: True, "stand-in"),))
    monkeypatch.setattr(attention, "_loaded_implementation", None)
    return lengths


@pytest.fixture
def folder(tiny_model, tokenizer, tmp_path):
    tiny_model().save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    return tmp_path


def implementation(model) -> str:
    return model.config._attn_implementation


@torch.no_grad()
@pytest.mark.parametrize("packing", [False, True])
def test_it_attends_where_it_is_installed_and_packs_reach_it_as_lengths(folder, flash_attn, packing):
    model = load_causal_lm(str(folder), dtype=torch.bfloat16)
    assert implementation(model) == "flash_attention_2"
    trunk = Trunk(model.base_model, num_trainable_layers=2)
    if packing:
        trunk.pack()
    features = trunk.features(SEQUENCES)
    flash_attn.clear()
    hidden = trunk(**trunk.inputs(SEQUENCES, features=features))
    assert flash_attn == [[len(s) for s in SEQUENCES]] * 2  # once a block
    plain = load_causal_lm(str(folder))
    whole = Trunk(plain.base_model)
    mask = whole.inputs(SEQUENCES)["attention_mask"].bool()
    expected = whole(**whole.inputs(SEQUENCES))[mask]
    torch.testing.assert_close(hidden[mask].float(), expected, rtol=0.05, atol=0.1)


@torch.no_grad()
def test_a_neighbour_in_the_pack_changes_nothing(folder, flash_attn):
    trunk = Trunk(load_causal_lm(str(folder), dtype=torch.bfloat16).base_model)
    trunk.pack()
    hidden = trunk(**trunk.inputs(SEQUENCES))
    changed = trunk(**trunk.inputs([[20 - t for t in SEQUENCES[0]], *SEQUENCES[1:]]))
    assert torch.equal(changed[1:], hidden[1:]) and not torch.equal(changed[0], hidden[0])


def test_scorers_and_references_use_it_too(folder, tokenizer, tiny_model, flash_attn, tmp_path):
    AdvantageModel(tiny_model().base_model, tokenizer).save_pretrained(tmp_path / "scorer")
    scorer = AdvantageModel.from_pretrained(tmp_path / "scorer", dtype=torch.bfloat16)
    assert implementation(scorer.trunk.upper) == "flash_attention_2"
    policy = PolicyModel(load_causal_lm(str(folder), dtype=torch.bfloat16))
    assert implementation(policy.reference().trunk.upper) == "flash_attention_2"


def test_float32_and_models_that_cannot_keep_what_they_have(folder, tiny_model, flash_attn, tmp_path):
    assert implementation(load_causal_lm(str(folder))) == "sdpa"
    tiny_model("bloom").save_pretrained(tmp_path / "bloom")
    assert implementation(load_causal_lm(str(tmp_path / "bloom"), dtype=torch.bfloat16)) == "eager"


def test_without_the_package_it_is_sdpa(folder):
    assert implementation(load_causal_lm(str(folder), dtype=torch.bfloat16)) == "sdpa"
