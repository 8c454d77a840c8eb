"""Every trainer's loss is the same packed and padded."""

from __future__ import annotations

import pytest
import torch

from helpers.files import metric_lines
from helpers.recipes import quiet
from stable_rlhf.data.encoding import Encoded, encode
from stable_rlhf.data.records import Comparison
from stable_rlhf.models.policy import PolicyModel
from stable_rlhf.policy.experience import Experience
from stable_rlhf.policy.ppo import PPOTrainer
from stable_rlhf.policy.sft import train_sft
from stable_rlhf.scorer import AdvantageModel
from stable_rlhf.scorer.comparisons import EncodedComparison
from stable_rlhf.scorer.train import train_scorer
from stable_rlhf.settings.recipe import EngineArguments
from stable_rlhf.settings.stages import PPOArguments, ScorerArguments, SFTArguments

TEXTS = (("Reverse the letters of abcd", "dcba"), ("Write backwards: xyz", "zyx"), ("Count the letters of q", "1"),
         ("Say c", "c"))  # fmt: skip

pytestmark = pytest.mark.usefixtures("one_process")


def both(run) -> list:
    return [run(EngineArguments(packing=packing)) for packing in (False, True)]


def same(packed: list[float], padded: list[float], first: int = 1) -> None:
    """The first ones to float32's rounding; what Adam makes of that rounding grows from step to step."""
    assert packed[:first] == pytest.approx(padded[:first], rel=2e-6, abs=2e-6)
    assert packed == pytest.approx(padded, rel=1e-4, abs=1e-5)
    assert len(set(padded)) == len(padded)


def losses(folder) -> list[float]:
    return [row["loss"] for row in metric_lines(folder)]


def test_sft(tiny_model, tokenizer, tmp_path):
    examples = [encode(tokenizer, *pair) for pair in TEXTS]
    sizes = SFTArguments(learning_rate=1e-3, num_train_epochs=3, per_device_train_batch_size=4)

    def run(engine):
        folder = tmp_path / str(engine.packing)
        policy = PolicyModel(tiny_model())
        train_sft(policy, tokenizer, examples, quiet(sft=sizes, engine=engine), folder, seed=0)
        assert policy.trunk.packing == engine.packing
        return losses(folder)

    padded, packed = both(run)
    same(packed, padded)


@pytest.mark.parametrize("layers", [None, 1])
def test_scorer(tiny_model, tokenizer, tmp_path, layers):
    rows = []
    for prompt, answer in TEXTS:
        row = Comparison(prompt, (answer, "no", ""), ((0, 1), (0, 2)))
        rows.append(EncodedComparison(row, [encode(tokenizer, prompt, r) for r in row.responses]))
    sizes = ScorerArguments(learning_rate=1e-3, num_train_epochs=3, per_device_train_batch_size=4)

    def run(engine):
        folder = tmp_path / str(engine.packing)
        scorer = AdvantageModel(tiny_model().base_model, tokenizer, num_trainable_layers=layers)
        train_scorer(scorer, rows, quiet(scorer=sizes, engine=engine), folder, seed=0)
        return losses(folder)

    padded, packed = both(run)
    same(packed, padded)


def test_ppo_with_rehearsal(tiny_model, tokenizer):
    generator = torch.Generator().manual_seed(0)
    sizes = PPOArguments(
        learning_rate=1e-3, rollout_batch_size=4, per_device_train_batch_size=4, per_device_rehearsal_batch_size=2,
        rehearsal_coef=0.5, vf_coef=0.3, entropy_coef=0.01,
    )  # fmt: skip
    recorded = []
    for length in (3, 1, 6, 2):
        columns = torch.randn(3, length, generator=generator)
        ids = tuple(torch.randint(4, 20, (4 + length,), generator=generator).tolist())
        recorded.append((Encoded(ids, 4), float(length), -3 + columns[0] / 9, -3 + columns[1] / 9, columns[2] / 9))

    def run(engine):
        scorer = AdvantageModel(tiny_model(seed=1).base_model, tokenizer)
        policy = PolicyModel(tiny_model(), value_head=True)
        rehearsal = [encode(tokenizer, *pair) for pair in TEXTS]
        trainer = PPOTrainer(policy, tokenizer, scorer, quiet(ppo=sizes, engine=engine), rehearsal=rehearsal)
        assert trainer.reference.trunk.packing == trainer.scorer.trunk.packing == engine.packing
        found = []
        for step in range(3):
            experiences = [
                Experience(e, s, old_logprob=a, ref_logprob=b, value=v) for e, s, a, b, v in recorded
            ]  # fmt: skip
            metrics = trainer.update(trainer.with_advantages(experiences), step)
            found += [metrics[n] for n in ("loss", "value_loss", "rehearsal_loss", "gradient_norm", "entropy")]
        trainer.engine.close()
        return found

    padded, packed = both(run)
    same(packed, padded, first=5)
