"""Checkpoints of other people: what does not fit its configuration, is broken or attacks ends in one line."""

from __future__ import annotations

import ast
import copy
import json
import logging
import os
import re
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from stable_rlhf import models
from stable_rlhf.data import templates
from stable_rlhf.data.encoding import Encoded, encode
from stable_rlhf.data.prompts import EncodedPrompt
from stable_rlhf.data.records import PromptRow
from stable_rlhf.models.checked import first_not_finite
from stable_rlhf.models.loading import context_length, load_backbone, load_causal_lm, load_config, load_tokenizer
from stable_rlhf.rollout.local import GenerationSettings, generate
from stable_rlhf.run.stages import check_same_tokenizer, check_scorer_context
from stable_rlhf.scorer import AdvantageModel, ScorerSettings
from stable_rlhf.settings.recipe import Recipe
from stable_rlhf.settings.stages import PPOArguments


@pytest.fixture
def policy(tiny_model, tokenizer, tmp_path) -> Path:
    tiny_model().save_pretrained(tmp_path / "policy")
    tokenizer.save_pretrained(tmp_path / "policy")
    return tmp_path / "policy"


@pytest.fixture
def scorer(tiny_model, tokenizer, tmp_path) -> Path:
    AdvantageModel(tiny_model().base_model, tokenizer, ScorerSettings(num_policies=2)).save_pretrained(
        tmp_path / "scorer"
    )
    return tmp_path / "scorer"


def change(path: Path, **values: object) -> None:
    path.write_text(json.dumps(json.loads(path.read_text(encoding="utf-8")) | values), encoding="utf-8")


@pytest.mark.parametrize(
    ("values", "problem"),
    [
        ({"num_hidden_layers": 2}, r"9 left over \((model\.)?layers\.2\.input_layernorm\.weight, …\)"),
        ({"num_hidden_layers": 4}, r"9 missing \((model\.)?layers\.3\.input_layernorm\.weight, …\)"),
        ({"vocab_size": 90}, r"of another size \((lm_head|embed_tokens)\.weight \[91, 32\], not \[90, 32\]"),
        ({"intermediate_size": 64}, r"9 of another size \((model\.)?layers\.0\.mlp\.down_proj\.weight \[32, 96\], not"),
    ],
)
@pytest.mark.parametrize("kind", ["policy", "scorer"])
def test_weights_that_do_not_fit_their_configuration_are_refused(kind, values, problem, request):
    folder = request.getfixturevalue(kind)
    change(folder / "config.json", **values)
    load = load_causal_lm if kind == "policy" else AdvantageModel.from_pretrained
    with pytest.raises(
        ValueError, match=rf"^{kind.replace('policy', 'model')} .*do not fit its config\.json: .*{problem}"
    ):
        load(str(folder))
    with pytest.raises(ValueError, match="do not fit"):
        load_backbone(str(folder))


def test_layers_beyond_number_are_refused_before_they_are_built(policy, scorer):
    for folder, load in ((policy, load_causal_lm), (scorer, AdvantageModel.from_pretrained), (policy, load_backbone)):
        change(folder / "config.json", num_hidden_layers=10**7)
        with pytest.raises(ValueError, match=r"config\.json: num_hidden_layers 10000000 is more than 10000"):
            load(str(folder))


def test_tied_weights_and_heads_that_are_not_asked_for_are_no_loss(tiny_model, policy, scorer, tokenizer, tmp_path):
    bloom = tiny_model("bloom")
    bloom.save_pretrained(tmp_path / "bloom")  # whose head is its embedding
    ids = torch.tensor([[5, 6, 7]])
    again = load_causal_lm(str(tmp_path / "bloom"))
    assert torch.equal(again(ids).logits, bloom(ids).logits)
    with pytest.raises(ValueError, match=r"1 missing \(lm_head\.weight\)"):
        load_causal_lm(str(scorer))  # a decoder alone is no policy
    for folder in (scorer, policy):  # a scorer may begin with either
        assert torch.equal(load_backbone(str(folder))(ids)[0], tiny_model().base_model(ids)[0])


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("model.safetensors", b"garbage" * 99, r"model\.safetensors: .*header"),
        ("model.safetensors", b"\xff" * 7, r"model\.safetensors: .*header"),
        ("config.json", b"[]", "cannot be loaded: config.json: expected a JSON object, found an array"),
        ("config.json", b"{", "cannot be loaded: config.json: cannot be read as JSON"),
        ("config.json", b'{"model_type": "llama", "num_hidden_layers": "three"}', "cannot be loaded"),
        ("tokenizer.json", b"[]", "cannot be loaded: tokenizer.json: expected a JSON object"),
        ("tokenizer_config.json", b"[]", "cannot be loaded: tokenizer_config.json: expected a JSON object"),
        ("generation_config.json", b"[]", "cannot be loaded: generation_config.json: expected a JSON object"),
    ],
)
def test_a_broken_file_is_one_line(policy, name, content, said):
    (policy / name).write_bytes(content)
    with pytest.raises(ValueError, match=said) as error:
        load_tokenizer(str(policy))
        load_causal_lm(str(policy))
    assert str(policy) in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"eos_token_id": "abc"}, r"eos_token_id must be a token id or a list of them, got \['abc'\]"),
        ({"eos_token_id": [[2]]}, "eos_token_id must be"),
        ({"eos_token_id": [2, True]}, "eos_token_id must be"),
        ({"eos_token_id": 2.0}, "eos_token_id must be"),
        ({"stop_strings": 5}, "stop_strings must be"),
        ({"stop_strings": ["a", ""]}, r"stop_strings must be a text or a list of texts, none empty, got \['a', ''\]"),
    ],
)
def test_ends_of_turns_that_are_none(policy, values, said):
    change(policy / "generation_config.json", **values)
    with pytest.raises(ValueError, match=rf"^model '{policy}': generation_config\.json: {said}"):
        load_causal_lm(str(policy))


@pytest.mark.parametrize("values", [{"eos_token_id": [2, 5]}, {"eos_token_id": None}, {"stop_strings": "a"}])
def test_ends_of_turns_in_every_form(policy, values):
    change(policy / "generation_config.json", **values)
    load_causal_lm(str(policy))


@pytest.mark.parametrize("value", [float("nan"), float("-inf")])
def test_weights_that_are_not_finite_are_refused(policy, scorer, value):
    from safetensors.torch import load_file, save_file

    def spoil(path: Path, name: str) -> None:
        tensors = load_file(path)
        tensors[name].view(-1)[1 % tensors[name].numel()] = value
        save_file(tensors, path, metadata={"format": "pt"})

    spoil(policy / "model.safetensors", "model.norm.weight")
    with pytest.raises(
        ValueError, match=rf"^model '{policy}': its weights are not finite: model\.norm\.weight holds NaN"
    ):
        load_causal_lm(str(policy))
    spoil(scorer / "heads.safetensors", "expected_head.bias")
    with pytest.raises(ValueError, match=rf"^{scorer}/heads\.safetensors: expected_head\.bias holds NaN or infinity"):
        AdvantageModel.from_pretrained(scorer)


@pytest.mark.parametrize("dtype", [torch.int64, torch.bool, torch.uint8])
def test_heads_of_another_kind_than_floating_point_are_refused(scorer, dtype):
    from safetensors.torch import load_file, save_file

    heads = load_file(path := scorer / "heads.safetensors")
    save_file({**heads, "reward_head.weight": heads["reward_head.weight"].to(dtype)}, path)
    with pytest.raises(ValueError, match=rf"heads\.safetensors: reward_head\.weight holds {str(dtype)[6:]}, not float"):
        AdvantageModel.from_pretrained(scorer)


@pytest.mark.parametrize("name", ["max_position_embeddings", "n_positions", "seq_length"])
@pytest.mark.parametrize("value", [-1, 2.5, True, "2048"])
def test_a_context_that_is_no_number_of_tokens_is_refused(name, value):
    config = SimpleNamespace(**{name: value}, name_or_path="runs/sft")
    with pytest.raises(ValueError, match=rf"^runs/sft/config\.json: {name} is {value!r}, not a number of tokens"):
        context_length(config)
    assert context_length(SimpleNamespace(**{name: 7})) == 7


def test_large_weights_are_finite():
    assert first_not_finite({"a": torch.full((4,), 3e38), "b": torch.tensor([1])}.items()) is None
    assert first_not_finite({"a": torch.ones(2), "b": torch.tensor([3e38, float("inf")])}.items()) == "b"


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("advantage_model.json", b"[]", "must be an object, not list"),
        ("advantage_model.json", b"{", "cannot be read"),
        ("advantage_model.json", b"\xff", "cannot be read"),
        ("advantage_model.json", b'{"objective": 5}', "objective: expected text, got 5"),
        ("advantage_model.json", b'{"num_policies": "2"}', "num_policies: expected a whole number, got '2'"),
        ("advantage_model.json", b'{"num_policies": true}', "num_policies: expected a whole number, got True"),
        ("advantage_model.json", b'{"margin": NaN}', "margin must be a finite number"),
        ("advantage_model.json", b'{"objective": "dpo"}', "objective must be 'am' or 'rm'"),
        ("advantage_model.json", b'{"clusters": 1}', r"unknown \['clusters'\]"),
        ("heads.safetensors", b"\xff" * 99, "cannot be read: .*header"),
        ("heads.safetensors", {"reward_head.weight": (1, 8), "reward_head.bias": (1,)}, r"has \{.*want \{'reward_head"),
    ],
)
def test_a_scorers_own_files_are_checked(scorer, name, content, said):
    if isinstance(content, dict):
        from safetensors.torch import save_file

        save_file({k: torch.zeros(shape) for k, shape in content.items()}, scorer / name)
    else:
        (scorer / name).write_bytes(content)
    with pytest.raises(ValueError, match=rf"^{re.escape(str(scorer / name))}: .*{said}"):
        AdvantageModel.from_pretrained(scorer)


def test_what_fits_is_loaded_without_a_word(policy, scorer, caplog):
    for name in ("transformers", "accelerate"):
        logging.getLogger(name).addHandler(caplog.handler)
    try:
        load_causal_lm(str(policy))
        AdvantageModel.from_pretrained(scorer)
    finally:
        for name in ("transformers", "accelerate"):
            logging.getLogger(name).removeHandler(caplog.handler)
    assert not caplog.records


# -- chat templates ----------------------------------------------------------------------------------------------------

_NESTED = "{% for i in range(99999) %}{% for j in range(99999) %}{% for k in range(99999) %}{% endfor %}"


@pytest.mark.parametrize(
    ("template", "said"),
    [
        ("{% for m in messages %}{{ m.content }}", "TemplateSyntaxError: .*endfor.*its line 1"),
        ("{{ messages | no_such_filter }}", "TemplateAssertionError: No filter named 'no_such_filter'"),
        ("{{ ''.__class__.__mro__ }}", "SecurityError: .*unsafe"),
        ("{{ messages.append(1) }}", "SecurityError: .*'append'.*unsafe"),
        ("{{ no_such_function() }}", "UndefinedError: 'no_such_function' is undefined"),
        ("{% for i in range(10**9) %}{% endfor %}", "OverflowError: Range too big"),
        ("{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}", "RecursionError"),
        (_NESTED + "{% endfor %}{% endfor %}", "it did not end within 1 seconds"),
        ("{{ 9 ** (9 ** 9) }}", "it did not end within 1 seconds"),  # one instruction, which no signal handler stops
        ("{{ 'x' * 2 ** 34 }}", "more than a gigabyte"),
    ],
)
def test_a_template_that_is_broken_attacks_or_does_not_end_is_one_line(policy, monkeypatch, template, said):
    monkeypatch.setattr(templates, "_CPU_SECONDS", 1)
    stored = "chat_template.jinja"
    (policy / stored).write_text(template, encoding="utf-8")
    began = time.process_time()
    with pytest.raises(
        ValueError, match=rf"^model '{policy}': {stored}: the chat template cannot be used: .*{said}"
    ) as e:
        load_tokenizer(str(policy))
    assert "\n" not in str(e.value) and time.process_time() - began < 60


def test_a_template_that_refuses_some_chats_is_none_of_these(policy):
    only = "{% if messages | length != 3 %}{{ raise_exception('three turns!') }}{% endif %}{{ messages[2].content }}"
    (policy / "chat_template.jinja").write_text(only, encoding="utf-8")
    assert load_tokenizer(str(policy)).chat_template == only


def test_what_is_tried_leaves_this_process_as_it_was(policy, monkeypatch):
    monkeypatch.setattr(templates, "_tried", set())
    monkeypatch.delenv("TOKENIZERS_PARALLELISM")
    load_tokenizer(str(policy))
    assert len(templates._tried) == 1 and "TOKENIZERS_PARALLELISM" not in os.environ


# -- tokens beyond the embedding ---------------------------------------------------------------------------------------


def test_template_tokens_beyond_the_embedding_are_told_at_loading(policy, tokenizer):
    mine = copy.deepcopy(tokenizer)
    mine.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]})
    mine.save_pretrained(policy)
    mine = load_tokenizer(str(policy))  # nothing uses them
    with pytest.raises(ValueError, match=r"^a\.jsonl:3: the token '<\|im_start\|>' \(id 91\) is beyond the 91 rows"):
        encode(mine, "Write a", "b<|im_start|>", source="a.jsonl:3")
    for text in ("<|im_start|>{{ m.role }}{{ m.content }}<eos>", "{{ m.content }}<|im_end|>"):
        mine.chat_template = "{% for m in messages %}" + text + "{% endfor %}"
        mine.save_pretrained(policy)
        with pytest.raises(
            ValueError, match=rf"^model '{policy}': the token '<\|im_.*beyond the 91 rows of its embedding"
        ):
            load_tokenizer(str(policy))


def test_a_padding_token_added_after_training_is_padding_all_the_same(tiny_model, tokenizer):
    model, prompts = tiny_model(), [[1, 10, 11], [1, 10], [1, 10, 11, 12, 13]]
    late = copy.deepcopy(tokenizer)
    late.pad_token = None
    late.add_special_tokens({"pad_token": "[PAD]"})
    assert late.pad_token_id == 91 == model.get_input_embeddings().num_embeddings
    settings, seeds = GenerationSettings(12), [3, 4, 5]
    assert generate(model, late, prompts, settings, seeds=seeds) == generate(
        model, tokenizer, prompts, settings, seeds=seeds
    )
    texts = (["Write a", "Write abc"], ["a", "cba"])
    assert torch.equal(*(AdvantageModel(model.base_model, t, seed=1).eval().score(*texts) for t in (late, tokenizer)))
    with pytest.raises(ValueError, match="prompt 1 has the token id 91, and the model's embedding 91 rows"):
        generate(model, late, [[1], [1, 91]], settings, seeds=[1, 2])


def test_a_scorer_reads_tokens_of_a_longer_padded_embedding(tiny_model, tokenizer):
    """A policy may sample a row that pads its embedding: it is no token, and the scorer reads it as unknown."""
    scorer = AdvantageModel(tiny_model().base_model, tokenizer).eval()
    padded = [Encoded((1, 10, 11, 95, 12), 2), Encoded((1, 10, 127), 2), Encoded((1, 10, 11), 2)]
    known = [Encoded(tuple(i if i < 91 else tokenizer.unk_token_id for i in e.ids), 2) for e in padded]
    assert torch.equal(scorer.score_encoded(padded), scorer.score_encoded(known))
    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.unk_token = None
    other = AdvantageModel(tiny_model().base_model, tokenizer).eval()
    assert torch.isfinite(other.score_encoded(padded)).all()


def test_padding_and_tokens_of_no_row_make_no_other_tokenizer(tiny_model, policy, tokenizer):
    late, other = copy.deepcopy(tokenizer), copy.deepcopy(tokenizer)
    late.pad_token = None
    late.add_special_tokens({"pad_token": "[PAD]"})
    for one, two in ((late, tokenizer), (tokenizer, late)):
        check_same_tokenizer(one, two, "scorer")
    other.add_tokens(["<tool>"])
    for tokens in (other, late):
        with pytest.raises(ValueError, match="scorer 'scorer' has another tokenizer"):
            check_same_tokenizer(other, late if tokens is other else tokenizer, "scorer")
    other.save_pretrained(policy)
    check_same_tokenizer(load_tokenizer(str(policy)), tokenizer, "scorer")  # the model has no row for <tool>


def test_answers_longer_than_the_scorers_context_are_told_before_they_are_drawn(scorer, tmp_path):
    change(scorer / "config.json", max_position_embeddings=8)
    recipe = Recipe(ppo=PPOArguments(max_new_tokens=4))
    prompts = [EncodedPrompt(PromptRow("p"), list(range(1, n + 1))) for n in (2, 4)]
    check_scorer_context(recipe, prompts, str(scorer))
    prompts.append(EncodedPrompt(PromptRow("p"), [1, 2, 3, 4, 5]))
    with pytest.raises(ValueError, match=rf"^scorer '{scorer}': a prompt of 5 tokens and ppo\.max_new_tokens 4 do not"):
        check_scorer_context(recipe, prompts, str(scorer))
    with pytest.raises(ValueError, match=rf"^scorer '{tmp_path}/x': no advantage_model\.json there"):
        check_scorer_context(recipe, prompts, f"{tmp_path}/x")


CONFIG_CODE = """
from pathlib import Path
from transformers import LlamaConfig

Path(__file__).with_name("ran").touch()


class Odd(LlamaConfig):
    model_type = "odd"
"""


@pytest.mark.parametrize("part", ["config", "tokenizer"])
def test_a_repositorys_own_code_never_runs(policy, monkeypatch, tmp_path, part):
    """Nor is anybody asked: transformers would, where nothing was said, and wait for an answer."""
    monkeypatch.setenv("HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("somebody was asked"))
    (policy / "code.py").write_text(CONFIG_CODE, encoding="utf-8")
    if part == "config":
        change(policy / "config.json", model_type="odd", auto_map={"AutoConfig": "code.Odd"})
    else:
        change(policy / "tokenizer_config.json", tokenizer_class="Odd", auto_map={"AutoTokenizer": ["code.Odd", None]})
    loaders = [load_tokenizer] if part == "tokenizer" else [load_tokenizer, load_causal_lm, load_backbone, load_config]
    for load in loaders:
        with pytest.raises(ValueError, match=r"trust_remote_code|custom code"):
            load(str(policy))
    assert not list(tmp_path.rglob("ran"))


def test_no_loader_leaves_that_open():
    """Every `from_pretrained` of transformers' Auto classes says that a repository's own code is not to run."""
    package = Path(models.__file__).parents[1]
    calls = [
        (file.name, node.lineno, ast.unparse(node))
        for file in package.rglob("*.py")
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8")))
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr == "from_pretrained"
        and ast.unparse(node.func.value).lower().startswith("auto")
    ]  # fmt: skip
    bare = [call for call in calls if "OWN_CODE_ALONE" not in call[2] and call[0] != "checked.py"]  # its options do
    assert len(calls) >= 5 and not bare
