"""ZeRO-3 beyond training: loading, reading and saving in shards; and frozen models in host memory."""

from __future__ import annotations

import functools
import gc
import weakref
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from transformers import AutoModelForCausalLM
from transformers.integrations.deepspeed import is_deepspeed_zero3_enabled

from helpers.forks import run_ranks
from helpers.recipes import quiet
from stable_rlhf.data.encoding import encode, encode_prompt
from stable_rlhf.data.prompts import EncodedPrompt
from stable_rlhf.data.records import PromptRow
from stable_rlhf.engine.engine import Engine, Schedule
from stable_rlhf.engine.frozen import loading_in_shards, read_only, release
from stable_rlhf.engine.weights import gathered_once, plain_weights
from stable_rlhf.models import checked
from stable_rlhf.models.checked import first_not_finite
from stable_rlhf.models.policy import PolicyModel
from stable_rlhf.policy.ppo import PPOTrainer
from stable_rlhf.policy.rejection import train_rejection
from stable_rlhf.rollout.local import GenerationSettings, generate
from stable_rlhf.run import evaluation
from stable_rlhf.run.stages import in_shards, load_policy, load_reader, run_materialise
from stable_rlhf.scorer import AdvantageModel
from stable_rlhf.settings.recipe import EngineArguments, Recipe
from stable_rlhf.settings.stages import PPOArguments

SHARDS = EngineArguments(zero_stage=3)
SLOW_SAMPLING = EngineArguments(zero_stage=3, ds3_gather_for_generation=False)

pytestmark = pytest.mark.usefixtures("one_process")


@pytest.fixture
def folder(tiny_model, architecture, tokenizer, tmp_path) -> Path:
    tiny_model(architecture).save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    return tmp_path / "model"


@torch.no_grad()
def test_a_model_loaded_in_shards_reads_trains_and_is_saved_like_a_whole_one(folder, tokenizer, tmp_path):
    sequences, target = [[5, 6, 7, 8], [9, 10, 11]], torch.full((2, 4), 7)
    whole = AutoModelForCausalLM.from_pretrained(folder)
    wanted = PolicyModel(whole)
    policy = load_policy(str(folder), SHARDS, value_head=True)
    assert not is_deepspeed_zero3_enabled()  # or generate would wait for other ranks
    assert all(hasattr(p, "ds_tensor") and p.numel() == 0 for p in policy.causal_lm.parameters())
    weights = plain_weights(policy.causal_lm)
    assert all(torch.equal(tensor, weights[name]) for name, tensor in whole.state_dict().items())
    engine = Engine(policy, SHARDS, Schedule(1e-2, 3))
    engine.eval()
    expected = wanted(wanted.trunk.inputs(sequences), target)["logprob"]
    torch.testing.assert_close(engine(policy.trunk.inputs(sequences), target)["logprob"], expected, rtol=0, atol=1e-5)
    reference = read_only(load_policy(str(folder), SHARDS, frozen=True), SHARDS)
    for step in range(2):
        with torch.enable_grad():
            engine.train()
            engine.backward(-engine(policy.trunk.inputs(sequences), target)["logprob"].mean())
            engine.step()
        engine.eval()
        moved = engine(policy.trunk.inputs(sequences), target)["logprob"]
        assert float((moved - expected).abs().max()) > 1e-2, step
        kept = reference(reference.trunk.inputs(sequences), target)["logprob"]
        torch.testing.assert_close(kept, expected, rtol=0, atol=1e-5)
    engine.save_model(tmp_path / "saved")
    again = PolicyModel(AutoModelForCausalLM.from_pretrained(tmp_path / "saved"))
    logprob = again(again.trunk.inputs(sequences), target)["logprob"]
    torch.testing.assert_close(logprob, moved, rtol=0, atol=1e-5)
    engine.close()
    release(reference)


@pytest.mark.parametrize("name", ["model.norm.weight", "model.layers.2.mlp.down_proj.weight"])
def test_weights_that_are_not_finite_are_named_in_shards_too(tiny_model, tokenizer, tmp_path, name):
    model = tiny_model("llama")
    model.state_dict()[name].view(-1)[-1] = torch.nan
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=rf"^model '{tmp_path}': its weights are not finite: {name} holds NaN"):
        load_policy(str(tmp_path), SHARDS)


@pytest.mark.parametrize(("ranks", "at"), [(2, 0), (2, 2), (2, 4), (3, 4)])
def test_each_rank_looks_at_its_own_part(monkeypatch, ranks, at):
    """Of five numbers: what fills the last rank's part up, here infinity, is nobody's."""
    size = -(-5 // ranks)
    whole = torch.full((size * ranks,), torch.inf)
    whole[:5] = 0.0
    found = []
    for rank in range(ranks):
        monkeypatch.setattr(checked, "rank", lambda rank=rank: rank)
        part = SimpleNamespace(ds_tensor=whole[rank * size : (rank + 1) * size], ds_numel=5)
        assert first_not_finite([("w", checked._shard(part))]) is None
        part.ds_tensor = part.ds_tensor.clone()
        if rank == at // size:
            part.ds_tensor[at % size] = torch.nan
        found.append(first_not_finite([("w", checked._shard(part))]))
    assert found == [("w" if rank == at // size else None) for rank in range(ranks)]


@pytest.mark.parametrize(
    "arguments", [SHARDS, EngineArguments(offload_frozen=True), EngineArguments(zero_stage=3, offload_frozen=True)]
)
def test_frozen_models_in_shards_or_in_host_memory_read_as_whole_ones(folder, tokenizer, arguments, tmp_path):
    base = AutoModelForCausalLM.from_pretrained(folder).base_model
    scorer = AdvantageModel(base, tokenizer)
    scorer.save_pretrained(tmp_path / "scorer")
    pairs = ["Reverse abc", "Count the letters of q"], ["cba", "1"]
    wanted = scorer.score(*pairs)
    with loading_in_shards(arguments, frozen=True):
        frozen = AdvantageModel.from_pretrained(tmp_path / "scorer")
    engine = read_only(frozen, arguments)
    torch.testing.assert_close(engine.score(*pairs), wanted, rtol=0, atol=1e-5)
    examples = [encode(tokenizer, *pair) for pair in zip(*pairs, strict=True)]
    with torch.no_grad():
        scores = engine.advantage(*engine(*engine.prepare(examples)))
    torch.testing.assert_close(scores, wanted, rtol=0, atol=1e-5)
    assert all(p.ds_tensor.device.type == "cpu" for p in frozen.parameters())
    assert not any(p.requires_grad for p in frozen.parameters())
    release(engine)


def test_frozen_models_keep_their_types_in_shards(folder, tokenizer, tmp_path):
    AdvantageModel(AutoModelForCausalLM.from_pretrained(folder).base_model, tokenizer).save_pretrained(tmp_path / "s")
    arguments = EngineArguments(zero_stage=3, bf16=True)
    with loading_in_shards(arguments, frozen=True):
        scorer = AdvantageModel.from_pretrained(tmp_path / "s", dtype=torch.bfloat16)
    engine = read_only(scorer, arguments)
    assert {p.ds_tensor.dtype for p in scorer.trunk.parameters()} == {torch.bfloat16}
    assert scorer.reward_head.weight.ds_tensor.dtype == torch.float32
    whole = AdvantageModel.from_pretrained(tmp_path / "s")
    pairs = ["Reverse abc"] * 2, ["cba", "abc"]
    torch.testing.assert_close(engine.score(*pairs), whole.score(*pairs), rtol=0.05, atol=0.05)
    release(engine)


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_sampling_layer_by_layer_draws_the_same_tokens(folder, tokenizer, temperature):
    prompts, settings = [[5, 6, 7], [9, 10], [4] * 9], GenerationSettings(6, temperature)
    whole = AutoModelForCausalLM.from_pretrained(folder)
    wanted = generate(whole, tokenizer, prompts, settings, seeds=[1, 2, 3])
    reader = load_reader(str(folder), SLOW_SAMPLING)
    found = generate(reader.causal_lm, tokenizer, prompts, settings, seeds=[1, 2, 3], max_tokens=24)
    assert [r.encoded for r in found] == [r.encoded for r in wanted]
    assert all(p.numel() == 0 for p in reader.causal_lm.parameters() if p.ds_numel > 10**5)
    gather = functools.partial(gathered_once, reader.causal_lm, reader)
    gathered = generate(reader.causal_lm, tokenizer, prompts, settings, seeds=[1, 2, 3], gather=gather)
    assert [r.encoded for r in gathered] == [r.encoded for r in wanted]
    release(reader)


@pytest.mark.parametrize("train", [PPOTrainer, train_rejection])
@pytest.mark.parametrize("arguments", [SHARDS, EngineArguments(offload_frozen=True)], ids=["shards", "offloaded"])
def test_nothing_of_a_finished_stage_stays_in_memory(tiny_model, tokenizer, tmp_path, train, arguments):
    """DeepSpeed keeps engines in lists and caches of its own: the next stage needs their room."""
    settings = PPOArguments(
        total_steps=2, rollout_batch_size=4, rejection_samples=2, per_device_train_batch_size=2, max_new_tokens=3
    )
    policy, reference = PolicyModel(tiny_model(), value_head=train is PPOTrainer), PolicyModel(tiny_model())
    scorer = AdvantageModel(tiny_model(seed=1).base_model, tokenizer)
    alive = {name: weakref.ref(m) for name, m in (("policy", policy), ("reference", reference), ("scorer", scorer))}
    prompts = [EncodedPrompt(PromptRow(t), encode_prompt(tokenizer, t)) for t in ("Reverse abc", "Count: q")]
    if train is PPOTrainer:
        trainer = PPOTrainer(policy, tokenizer, scorer, quiet(ppo=settings, engine=arguments), reference=reference)
        trainer.train(prompts, tmp_path)
        del trainer
    else:
        recipe = quiet(ppo=settings, engine=arguments)
        train_rejection(policy, tokenizer, scorer, prompts, recipe, tmp_path, seed=0, reference=reference)
    del policy, reference, scorer
    gc.collect()
    assert [name for name, model in alive.items() if model() is not None] == []


def test_engines_are_released_where_deepspeed_has_no_such_cache(monkeypatch):
    from deepspeed.runtime.zero.partitioned_param_coordinator import PartitionedParameterCoordinator

    monkeypatch.delattr(PartitionedParameterCoordinator, "_PartitionedParameterCoordinator__params_to_release")
    destroyed = []
    release(SimpleNamespace(destroy=lambda: destroyed.append(True), module=None))
    assert destroyed


def test_the_policy_that_others_are_compared_with_is_released(monkeypatch, tmp_path):
    reader, released = object(), []
    prompts = SimpleNamespace(main=[], forget=[])
    parts = {"make_judge": None, "load_tokenizer": None, "load_prompts": prompts, "load_reader": reader, "answer": []}
    for name, part in parts.items():
        monkeypatch.setattr(evaluation, name, lambda *_, part=part, **__: part)
    monkeypatch.setattr(evaluation, "release", released.append)
    evaluation.run_evaluate(Recipe(), "sft", {}, None, tmp_path)
    assert released == [reader]


def test_readers_are_whole_unless_a_device_cannot_hold_them(folder):
    assert isinstance(load_reader(str(folder), SHARDS), PolicyModel)
    assert not any(hasattr(p, "ds_id") for p in load_reader(str(folder), SHARDS).parameters())
    assert in_shards(SHARDS, str(folder), None)
    assert not in_shards(SHARDS, str(folder), 1) and not in_shards(EngineArguments(zero_stage=2), str(folder), None)


def test_the_initial_policy_is_kept_in_the_type_that_is_trained(folder, tmp_path):
    recipe = Recipe(model_name_or_path=str(folder), engine=EngineArguments(bf16=True))
    run_materialise(recipe, tmp_path / "kept")
    kept = AutoModelForCausalLM.from_pretrained(tmp_path / "kept", dtype="auto")
    assert kept.dtype == torch.bfloat16


@pytest.mark.slow
def test_two_ranks_hold_halves_and_train_what_one_trains(tiny_model, tokenizer, tmp_path):
    tiny_model().save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    for ranks in (1, 2):
        run_ranks("shards_worker", tmp_path / "model", tmp_path / f"out-{ranks}", ranks=ranks)
    for name in ("gathered", "layered", "lora"):
        one, two = (
            AutoModelForCausalLM.from_pretrained(tmp_path / f"out-{ranks}" / name).state_dict() for ranks in (1, 2)
        )
        assert any(not torch.equal(one[k], v) for k, v in tiny_model().state_dict().items())
        for key, tensor in one.items():
            torch.testing.assert_close(two[key], tensor, rtol=0, atol=2e-5)
