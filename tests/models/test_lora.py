"""LoRA: only adapters and heads train, the policy without them is its reference, saved models need no peft."""

from __future__ import annotations

import sys
from dataclasses import replace

import pytest
import torch
from transformers import AutoModelForCausalLM

from helpers.files import metric_lines
from helpers.recipes import quiet
from stable_rlhf.data.encoding import encode, encode_prompt
from stable_rlhf.data.prompts import EncodedPrompt
from stable_rlhf.data.records import Comparison, PromptRow
from stable_rlhf.engine.engine import Engine, Schedule
from stable_rlhf.models.lora import adapted_layers
from stable_rlhf.models.policy import PolicyModel
from stable_rlhf.models.views import response_logprobs
from stable_rlhf.policy.ppo import PPOTrainer
from stable_rlhf.policy.rejection import train_rejection
from stable_rlhf.policy.sft import train_sft
from stable_rlhf.run.bounds import check
from stable_rlhf.scorer import AdvantageModel
from stable_rlhf.scorer.comparisons import EncodedComparison
from stable_rlhf.scorer.train import train_scorer
from stable_rlhf.settings.recipe import EngineArguments, Recipe
from stable_rlhf.settings.stages import PPOArguments, ScorerArguments, SFTArguments

TEXTS = (("Reverse the letters of abcd", "dcba"), ("Write backwards: xyz", "zyx"), ("Count the letters of q", "1"),
         ("Give the last letter of abc", "c"))  # fmt: skip
LORA = EngineArguments(lora_r=4, lora_alpha=8)
PPO = PPOArguments(
    learning_rate=1e-2, total_steps=2, rollout_batch_size=4, per_device_train_batch_size=2, max_new_tokens=4,
    per_device_rehearsal_batch_size=2, rehearsal_coef=0.5,
)  # fmt: skip

pytestmark = pytest.mark.usefixtures("one_process")
pytest.importorskip("peft")


@pytest.fixture
def examples(tokenizer):
    return [encode(tokenizer, *pair) for pair in TEXTS]


@pytest.fixture
def prompts(tokenizer):
    return [EncodedPrompt(PromptRow(p), encode_prompt(tokenizer, p)) for p, _ in TEXTS]


def saved(folder) -> dict[str, torch.Tensor]:
    return AutoModelForCausalLM.from_pretrained(folder).state_dict()


def with_adapter(model, folder):
    from peft import PeftModel

    return PeftModel.from_pretrained(model, folder).eval()


def fine_tune(model, tokenizer, examples, engine, folder, layers=None):
    policy = PolicyModel(model, num_trainable_layers=layers)
    sizes = SFTArguments(learning_rate=1e-2, per_device_train_batch_size=2)
    result = train_sft(policy, tokenizer, examples, quiet(sft=sizes, engine=engine), folder, seed=0)
    return policy, result["loss"]


@pytest.mark.parametrize("layers", [None, 1])
def test_only_adapters_train_and_both_saved_forms_are_the_trained_policy(
    tiny_model, architecture, tokenizer, examples, tmp_path, layers
):
    before = tiny_model(architecture).state_dict()
    policy, _ = fine_tune(tiny_model(architecture), tokenizer, examples, LORA, tmp_path, layers)
    names = {n for n, p in policy.named_parameters() if p.requires_grad}
    assert names and all(".lora_" in n for n in names)
    assert len(adapted_layers(policy)) == (4 if architecture == "bloom" else 7) * (layers or 3)
    for name, tensor in policy.causal_lm.state_dict().items():
        if ".lora_" not in name:
            assert torch.equal(tensor, before[name.replace(".base_layer.", ".")]), name
    # The folder is a plain model, and so is the model that training began with under the adapter.
    ids = torch.tensor([examples[0].ids])
    with torch.no_grad():
        live = policy.causal_lm(ids).logits
        plain = AutoModelForCausalLM.from_pretrained(tmp_path)
        assert not adapted_layers(plain)
        torch.testing.assert_close(plain(ids).logits, live, rtol=0, atol=2e-5)
        adapted = with_adapter(tiny_model(architecture), tmp_path / "adapter")
        torch.testing.assert_close(adapted(ids).logits, live, rtol=0, atol=2e-5)
        assert not torch.allclose(tiny_model(architecture)(ids).logits, live, atol=1e-2)
    assert sorted(f.name for f in (tmp_path / "adapter").iterdir()) == [
        "adapter_config.json", "adapter_model.safetensors"
    ]  # fmt: skip


def test_every_stage_of_zero_trains_the_same_adapters(tiny_model, tokenizer, examples, tmp_path):
    wanted, loss = None, None
    for stage in (0, 1, 2, 3):
        folder = tmp_path / str(stage)
        _, found = fine_tune(tiny_model(), tokenizer, examples, replace(LORA, zero_stage=stage), folder)
        weights = saved(folder)
        wanted, loss = wanted or weights, loss or found
        assert found == pytest.approx(loss, abs=1e-5)
        for name, tensor in weights.items():
            torch.testing.assert_close(tensor, wanted[name], rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("stage", "layers"), [(0, None), *(pytest.param(3, layers, marks=pytest.mark.slow) for layers in (None, 1))]
)
def test_ppo_with_rehearsal_refers_to_the_policy_without_its_adapters(
    tiny_model, tokenizer, examples, prompts, tmp_path, stage, layers
):
    policy = PolicyModel(tiny_model(), num_trainable_layers=layers, value_head=True)
    before = response_logprobs(policy, examples)
    scorer = AdvantageModel(tiny_model(seed=3).base_model, tokenizer, num_trainable_layers=layers)
    engine = replace(LORA, zero_stage=stage)
    trainer = PPOTrainer(policy, tokenizer, scorer, quiet(ppo=PPO, engine=engine), rehearsal=examples)
    trained = {n for n, p in policy.named_parameters() if p.requires_grad}
    assert {n.split(".")[0] for n in trained} == {"trunk", "value_head"}
    seen = []
    observe = trainer.observe
    trainer.observe = lambda rollouts: seen.append((rollouts, observe(rollouts))) or seen[-1][1]
    curve = trainer.train(prompts, tmp_path)["curve"]
    assert curve[0]["kl"] == pytest.approx(0, abs=1e-5) and abs(curve[1]["kl"]) > 1e-4
    assert curve[0]["rehearsal_loss"] > 0.5 and curve[0]["gradient_norm"] > 0
    # The reference is the initial policy after the updates too, and the adapters are on again after it was asked.
    whole = PolicyModel(tiny_model())
    for example, expected in zip(examples, before, strict=True):
        torch.testing.assert_close(response_logprobs(whole, [example])[0], expected, rtol=0, atol=1e-5)
    rollouts, experiences = seen[1]
    for rollout, experience in zip(rollouts, experiences, strict=True):
        expected = response_logprobs(whole, [rollout.encoded])[0]
        torch.testing.assert_close(experience.ref_logprob, expected, rtol=0, atol=1e-5)
    after = PolicyModel(AutoModelForCausalLM.from_pretrained(tmp_path))
    moved = [(a - b).abs().max() for a, b in zip(response_logprobs(after, examples), before, strict=True)]
    assert max(map(float, moved)) > 1e-2
    assert (tmp_path / "value_head.safetensors").is_file()


@pytest.mark.slow
def test_ppo_is_the_same_under_zero_0_and_3(tiny_model, tokenizer, examples, prompts, tmp_path):
    curves = []
    for stage in (0, 3):
        policy, scorer = PolicyModel(tiny_model(), value_head=True), AdvantageModel(tiny_model().base_model, tokenizer)
        trainer = PPOTrainer(
            policy, tokenizer, scorer, quiet(ppo=PPO, engine=replace(LORA, zero_stage=stage)), rehearsal=examples
        )
        curves.append(trainer.train(prompts, tmp_path / str(stage))["curve"])
    for one, other in zip(*curves, strict=True):
        for name in ("loss", "kl", "score", "gradient_norm", "value_loss"):
            assert one[name] == pytest.approx(other[name], abs=1e-4), name


@pytest.mark.parametrize("stage", [0, pytest.param(3, marks=pytest.mark.slow)])
def test_a_scorer_trained_with_lora_scores_without_peft(tiny_model, tokenizer, tmp_path, monkeypatch, stage):
    rows = []
    for prompt, answer in TEXTS:
        row = Comparison(prompt, (answer, "no"), ((0, 1),))
        rows.append(EncodedComparison(row, [encode(tokenizer, prompt, r) for r in row.responses]))
    scorer = AdvantageModel(tiny_model().base_model, tokenizer)
    first = scorer.score(["Write backwards: xyz"], ["zyx"])
    arguments = ScorerArguments(learning_rate=1e-2, num_train_epochs=6, per_device_train_batch_size=2)
    train_scorer(scorer, rows, quiet(scorer=arguments, engine=replace(LORA, zero_stage=stage)), tmp_path, seed=0)
    lines = metric_lines(tmp_path)
    assert lines[-1]["loss"] < lines[0]["loss"]
    monkeypatch.setitem(sys.modules, "peft", None)
    again = AdvantageModel.from_pretrained(tmp_path)
    assert not adapted_layers(again)
    assert abs(float(again.score(["Write backwards: xyz"], ["zyx"]) - first)) > 1e-3
    if stage == 0:
        torch.testing.assert_close(
            again.score_encoded([e for r in rows for e in r.examples]),
            scorer.score_encoded([e for r in rows for e in r.examples]), rtol=0, atol=1e-5,
        )  # fmt: skip


def test_rejection_sampling_refers_to_the_policy_without_its_adapters(tiny_model, tokenizer, prompts, tmp_path):
    recipe = quiet(ppo=replace(PPO, rejection_samples=2), engine=LORA)
    scorer = AdvantageModel(tiny_model(seed=3).base_model, tokenizer)
    policy = PolicyModel(tiny_model())
    curve = train_rejection(policy, tokenizer, scorer, prompts, recipe, tmp_path, seed=0)["curve"]
    assert curve[0]["kl"] == pytest.approx(0, abs=1e-5) and abs(curve[1]["kl"]) > 1e-4


def test_a_snapshot_holds_the_adapters_alone_and_goes_on_to_the_same_bits(tiny_model, tmp_path):
    arguments = replace(LORA, lora_dropout=0.3)

    def begin():
        policy = PolicyModel(tiny_model())
        engine = Engine(policy, arguments, Schedule(1e-2, 4))
        engine.train()
        return policy, engine

    def step(policy, engine):
        torch.manual_seed(7)  # of the dropout
        engine.backward(-engine(policy.trunk.inputs([[5, 6, 7, 8]]), torch.full((1, 4), 7))["logprob"].mean())
        engine.step()

    policy, engine = begin()
    step(policy, engine)
    engine.save(tmp_path)
    step(policy, engine)
    wanted = policy.causal_lm.state_dict()
    engine.close()
    other, engine = begin()
    step(other, engine)
    step(other, engine)
    engine.load(tmp_path)
    step(other, engine)
    assert all(torch.equal(tensor, wanted[name]) for name, tensor in other.causal_lm.state_dict().items())
    engine.close()
    size = sum(f.stat().st_size for f in tmp_path.rglob("*") if f.is_file())
    assert size < 0.7 * sum(t.nbytes for t in tiny_model().state_dict().values()) + 100_000


def test_chosen_layers_and_a_seed_of_their_own(tiny_model):
    def adapters(seed, **settings):
        torch.manual_seed(seed)
        torch.rand(seed + 3)  # what was drawn before does not matter
        policy = PolicyModel(tiny_model())
        Engine(policy, replace(LORA, **settings), Schedule(1e-2, 4)).close()
        return {n: p.detach().clone() for n, p in policy.named_parameters() if ".lora_" in n}

    found = adapters(0, lora_target_modules=["q_proj", "v_proj"])
    assert len(found) == 2 * 2 * 3 and all("q_proj" in n or "v_proj" in n for n in found)
    assert all((p == 0).all() == (".lora_B." in n) for n, p in found.items())
    again, other = (adapters(s, lora_target_modules=["q_proj", "v_proj"]) for s in (0, 1))
    assert all(torch.equal(p, again[n]) for n, p in found.items())
    assert not all(torch.equal(p, other[n]) for n, p in found.items())


def test_bad_settings(tiny_model, monkeypatch):
    def engine(**settings):
        return Engine(PolicyModel(tiny_model()), replace(LORA, **settings), Schedule(1e-2, 4))

    with pytest.raises(ValueError, match=r"engine\.lora_target_modules \['lm_head', 'q'\]: the linear layers .*q_proj"):
        engine(lora_target_modules=["q", "lm_head", "q_proj"])
    for name, value in (("lora_r", -1), ("lora_alpha", 0), ("lora_dropout", 1.0), ("lora_dropout", 1.5)):
        with pytest.raises(ValueError, match=rf"engine\.{name}"):
            check(Recipe(engine=replace(LORA, **{name: value})))
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(ValueError, match=r"engine\.lora_r needs peft: pip install 'stable-rlhf\[lora\]'"):
        engine()
