"""The memory estimate against what a real engine holds and what autograd keeps, and by hand for a 7B model."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch

from helpers.launch import run_worker
from helpers.workers.memory_worker import measure
from stable_rlhf.launch.memory import (
    GIB,
    Lora,
    activation_bytes,
    block_bytes,
    engine_bytes,
    estimate,
    loss_bytes,
    model_sizes,
    read_config,
    remedies,
)
from stable_rlhf.settings.recipe import EngineArguments, Recipe
from stable_rlhf.world import build_model

LLAMA_7B = {
    "model_type": "llama", "hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32,
    "num_attention_heads": 32, "vocab_size": 32000,
}  # fmt: skip


@pytest.mark.parametrize(
    ("stage", "bf16", "layers"),
    [(0, False, None), (2, True, 1)]
    + [pytest.param(*case, marks=pytest.mark.slow) for case in [(0, True, 1), (2, False, 1), (2, True, None)]],
)
def test_weights_gradients_and_optimiser_are_what_an_engine_holds(one_process, tokenizer, stage, bf16, layers):
    measured, wanted, trained = measure(tokenizer, EngineArguments(zero_stage=stage, bf16=bf16), layers)
    assert measured == pytest.approx(sum(wanted.values()), rel=0.02)
    assert wanted["optimiser"] == (12 if stage or bf16 else 8) * trained


@pytest.mark.slow
def test_two_processes_share_as_estimated(tmp_path):
    found = tmp_path / "found.json"
    run_worker("memory_worker", found, ranks=2)
    rows = json.loads(found.read_text(encoding="utf-8"))
    assert len(rows) == 6
    for row in rows:
        # ZeRO 1 has let go of the other ranks' gradients by then; in the backward pass it holds them.
        gone = row["gradients"] // 2 if row["stage"] == 1 else 0
        assert row["measured"] == pytest.approx(row["estimated"] - gone, rel=0.02), row


@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_activations_are_what_autograd_keeps(architecture, tokenizer, dtype, rows):
    """Of the blocks between a model of two blocks and one of three: 64 tokens a row, width 64."""
    kept = []
    for layers in (2, 3):
        built = build_model(
            tokenizer, hidden_size=64, num_hidden_layers=layers, num_attention_heads=4, architecture=architecture
        ).to(dtype)
        weights = {p.untyped_storage().data_ptr() for p in built.parameters()}
        saved: dict[int, int] = {}
        alive = []

        def keep(tensor, weights=weights, saved=saved, alive=alive):
            if tensor.untyped_storage().data_ptr() not in weights:
                saved[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
                alive.append(tensor)
            return tensor

        ids = torch.randint(5, 20, (rows, 64))
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            hidden = built.base_model(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False)
        kept.append(sum(saved.values()))
        del hidden
    sizes = model_sizes(built.config, "", None)
    assert sizes.eager == (architecture == "bloom") and sizes.gated == (architecture == "llama")
    assert block_bytes(sizes, rows, 64, dtype.itemsize) == pytest.approx(kept[1] - kept[0], rel=0.1)


def test_a_7b_model_by_hand():
    config, source = read_config("nobody/nothing", LLAMA_7B)
    sizes = model_sizes(config, source, None)
    count = 2 * 32000 * 4096 + 32 * (4 * 4096**2 + 3 * 4096 * 11008 + 2 * 4096) + 4096 + 4097
    assert sizes.parameters == sizes.trained == sizes.in_engine == count
    assert "model_shape" in sizes.source
    state, host = engine_bytes(sizes, EngineArguments(zero_stage=3, bf16=True), 8)
    assert sum(state.values()) == pytest.approx(16 * count / 8 + 2 * sizes.small, abs=8) and host == 0
    state, host = engine_bytes(sizes, EngineArguments(zero_stage=2, bf16=True, offload_optimizer=True), 8)
    assert state == {"weights": 2 * count, "gradients": -(-2 * count // 8), "optimiser": 0}
    assert host == pytest.approx(16 * count / 8, abs=8)
    # One block of 2,048 tokens in bf16: 2·(6·4096 + 2·4096 + 4·11008) + 8·4096 bytes a token.
    assert block_bytes(sizes, 1, 2048, 2) == 2048 * (2 * (8 * 4096 + 4 * 11008) + 8 * 4096)
    thin = activation_bytes(sizes, 1, 2048, 2, True)
    assert thin < activation_bytes(sizes, 1, 2048, 2, False) / 10
    # The loss: 256 MiB of logits, and the head's gradient with its float32 sum once the rows need two chunks.
    assert loss_bytes(sizes, 100, 2, 256 << 20) == 100 * 32000 * 2 + 100 * 4096 * 2 + 32000 * 4096 * 2
    assert loss_bytes(sizes, 8192, 2, 256 << 20) == (256 << 20) + 8192 * 4096 * 2 + 32000 * 4096 * 6


def test_frozen_blocks_cost_weights_alone():
    config, source = read_config("nobody/nothing", LLAMA_7B)
    sizes = model_sizes(config, source, 2)
    block = 4 * 4096**2 + 3 * 4096 * 11008 + 2 * 4096
    assert sizes.trained == 2 * block + 4096 + 4097 and sizes.trained_blocks == 2
    state, _ = engine_bytes(sizes, EngineArguments(zero_stage=3, bf16=True), 1000)
    assert state["weights"] > 2 * 30 * block  # no stage shards them
    assert not sizes.trains_head


def test_every_setting_moves_the_estimate_its_way():
    recipe = Recipe(model_name_or_path="nobody/nothing", model_shape=LLAMA_7B)

    def peak(world_size: int = 8, **settings: object) -> int:
        changed = replace(recipe, engine=replace(recipe.engine, **settings))
        return estimate(changed, world_size=world_size, devices_per_node=8).peak.total

    plain = peak()
    assert peak(bf16=True) < plain
    assert peak(zero_stage=1) < plain and peak(zero_stage=2) < peak(zero_stage=1)
    assert peak(gradient_checkpointing=True) < plain
    assert peak(zero_stage=1, offload_optimizer=True, world_size=1) < peak(zero_stage=1, world_size=1)
    assert peak(zero_stage=2, world_size=64) < peak(zero_stage=2)
    lines = remedies(recipe, world_size=8, devices_per_node=8, limit=80 * GIB)
    assert any(line.startswith("engine.bf16 true: ") for line in lines)
    assert lines[-1].startswith("all of these") and lines[-1].endswith("which fits")


def changed(**settings: object) -> Recipe:
    recipe = Recipe(model_name_or_path="nobody/nothing", model_shape=LLAMA_7B)
    return replace(recipe, engine=replace(recipe.engine, bf16=True, gradient_checkpointing=True, **settings))


def items(recipe: Recipe, stage: str, moment: str, world_size: int = 8) -> dict[str, int]:
    found = estimate(recipe, world_size=world_size, devices_per_node=8)
    return next(m.items for m in found.moments if (m.stage, m.name) == (stage, moment))


def test_lora_by_hand():
    sizes = model_sizes(read_config("nobody/nothing", LLAMA_7B)[0], "", None, lora=Lora(8, 0.1, ()))
    adapters = 32 * 8 * (4 * 2 * 4096 + 3 * (4096 + 11008))
    assert sizes.trained == adapters + 4097
    assert sizes.adapter_ranks == 7 * 8 and sizes.adapter_inputs == 6 * 4096 + 11008
    assert not sizes.trains_head
    chosen = model_sizes(read_config("nobody/nothing", LLAMA_7B)[0], "", 2, lora=Lora(8, 0.0, ("q_proj", "v_proj")))
    assert chosen.trained == 2 * 8 * 2 * 2 * 4096 + 4097 and chosen.adapter_inputs == 0
    # The reference costs nothing: it is the policy.
    frozen, alone = (items(changed(lora_r=r), "ppo", "update")["frozen"] for r in (0, 8))
    assert frozen - alone == pytest.approx(2 * sizes.parameters, rel=0.01)


@pytest.mark.parametrize(("stage", "shares"), [(2, 1), (3, 8)])
def test_metarm_by_hand(stage, shares):
    plain, meta, rounds = (changed(zero_stage=stage) for _ in range(3))
    meta.scorer.meta_responses, rounds.iterate.rounds = "shifted.jsonl", 2
    trained = estimate(plain, world_size=8, devices_per_node=8).models["scorer"].trained
    for recipe in (meta, rounds):
        update, ascent = items(recipe, "scorer", "update"), items(recipe, "scorer", "ascent")
        assert update.pop("metarm") == pytest.approx(2 * trained / shares, rel=1e-6)
        assert update == items(plain, "scorer", "update")
        assert ascent["metarm"] == pytest.approx(4 * trained / shares, rel=1e-6)
        assert ascent["activations"] > update["activations"]  # four responses of a prompt instead of two
    with pytest.raises(StopIteration):
        items(plain, "scorer", "ascent")


@pytest.mark.parametrize("layers", [None, pytest.param(1, marks=pytest.mark.slow)])
@pytest.mark.parametrize(("stage", "bf16"), [pytest.param(0, False, marks=pytest.mark.slow), (2, True)])
def test_an_engine_with_lora_and_an_average_holds_what_is_estimated(one_process, tokenizer, stage, bf16, layers):
    arguments = EngineArguments(zero_stage=stage, bf16=bf16, lora_r=8, ema_decay=0.9)
    measured, wanted, trained = measure(tokenizer, arguments, layers)
    assert wanted["average"] == 4 * trained and trained < 100_000
    assert measured == pytest.approx(sum(wanted.values()), rel=0.02)


def test_policies_alone_are_averaged():
    plain, averaged = changed(), changed(ema_decay=0.9)
    plain.iterate.rounds = averaged.iterate.rounds = 2
    assert items(averaged, "ppo", "update")["average"] > 0
    for moment in ("update", "ascent"):
        assert items(averaged, "scorer", moment) == items(plain, "scorer", moment)


def test_zero_3_shares_reference_scorer_loading_and_saving():
    whole = read_config("nobody/nothing", LLAMA_7B)[0]
    sizes, scorer = model_sizes(whole, "", None), model_sizes(whole, "", None, scorer=True)
    largest = 2 * 32000 * 4096
    plain, sharded = changed(zero_stage=2), changed(zero_stage=3)
    both = 2 * (sizes.parameters + scorer.parameters)
    assert items(plain, "ppo", "update")["frozen"] == both
    assert items(sharded, "ppo", "update")["frozen"] == pytest.approx(both / 8, rel=0.01)
    assert items(plain, "ppo", "loading")["loading"] == 2 * 2 * sizes.parameters
    loading = (both + 2 * sizes.parameters) / 8 + largest
    assert items(sharded, "ppo", "loading")["loading"] == pytest.approx(loading, rel=0.01)
    assert items(sharded, "ppo", "saving")["gathered"] == largest
    assert items(sharded, "ppo", "rollouts")["gathered"] == 2 * sizes.parameters
    slow = changed(zero_stage=3, ds3_gather_for_generation=False)
    assert "gathered" not in items(slow, "ppo", "rollouts")
    assert items(slow, "selection", "rollouts")["weights"] == pytest.approx(2 * sizes.parameters / 8, rel=0.01)
    assert items(sharded, "selection", "rollouts")["weights"] == 2 * sizes.parameters
    offloaded = changed(zero_stage=2, offload_frozen=True)
    assert items(offloaded, "ppo", "update")["frozen"] == 2 * 10**9
    hosts = [estimate(r, world_size=8, devices_per_node=8).host_bytes for r in (plain, sharded, offloaded)]
    assert hosts[0] == 8 * both and hosts[1] == both and hosts[2] == 8 * both


def test_sizes_that_nobody_knows():
    with pytest.raises(ValueError, match=r"'nobody/nothing': its config is neither .* model_shape"):
        read_config("nobody/nothing", {})
    with pytest.raises(ValueError, match=r"model_shape\.model_type 'llamma'"):
        read_config("nobody/nothing", LLAMA_7B | {"model_type": "llamma"})
    for size in ({"hidden_size": "abc"}, {"num_attention_heads": 0}):
        with pytest.raises(ValueError, match=r"^model_shape: \w+"):
            read_config("nobody/nothing", LLAMA_7B | size)


def test_a_folder_wins_over_the_recipe(tmp_path, tiny_model):
    tiny_model().save_pretrained(tmp_path)
    config, source = read_config(str(tmp_path), LLAMA_7B)
    assert config.hidden_size == 32 and str(tmp_path) in source


@pytest.mark.slow
def test_a_whole_update_with_blooms_vocabulary():
    """H 1,024, V 250,880, two layers, 1,024 tokens: what is resident above weights, gradients and optimiser is at most
    an eighth of what it is with the plain loss. Each in a process of its own, of 5 to 7 GiB; minutes."""
    # What is freed goes back at once: glibc keeps tensors below a bound that grows up to 32 MiB, which would count.
    found = {}
    for which in ("fused", "plain"):
        said = run_worker("update_memory_worker", which, 0, MALLOC_MMAP_THRESHOLD_=str(256 << 10))
        found[which] = float(said.split()[-1])
    assert 0 < found["fused"] <= found["plain"] / 8, found
