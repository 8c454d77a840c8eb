"""A step's rows cut in other ways into ranks and micro-steps: the same updates, also from a snapshot of another cut."""

from __future__ import annotations

from dataclasses import replace
from itertools import chain
from pathlib import Path

import pytest

from helpers.files import metric_lines
from helpers.recipes import quiet
from stable_rlhf.data.encoding import encode, encode_prompt
from stable_rlhf.data.prompts import EncodedPrompt
from stable_rlhf.data.records import PromptRow
from stable_rlhf.engine.order import micro_steps
from stable_rlhf.models.policy import PolicyModel
from stable_rlhf.policy.ppo import PPOTrainer
from stable_rlhf.scorer import AdvantageModel, ScorerSettings
from stable_rlhf.settings.recipe import CheckpointArguments
from stable_rlhf.settings.stages import PPOArguments

pytestmark = pytest.mark.usefixtures("one_process")

TEXTS = ("Reverse the letters of abcd", "Write backwards: xyz", "Give the last letter of abc", "Count the letters of q",
         "Put into upper case: pqrs", "Repeat three times: ab", "Say q", "Reverse the letters of ef")  # fmt: skip
UNIVERSAL = CheckpointArguments(save_steps=1, universal=True)
PPO = PPOArguments(
    learning_rate=1e-3, total_steps=3, rollout_batch_size=8, num_mini_batches=2, max_new_tokens=3, rehearsal_coef=0.5,
)  # fmt: skip


@pytest.fixture
def make(tiny_model, tokenizer):
    """A trainer whose micro-steps have so many rollouts and, unless told not to, rehearsal sequences."""
    rows = [encode(tokenizer, t, r) for t, r in zip(TEXTS, ("dcba", "zyx", "c", "1", "PQRS", "ab"), strict=False)]
    made = []

    def build(per_device: int, rehearse: bool = True, **settings) -> PPOTrainer:
        settings = {"per_device_rehearsal_batch_size": per_device} | settings
        arguments = replace(PPO, per_device_train_batch_size=per_device, **settings)
        scorer = AdvantageModel(tiny_model(seed=3).base_model, tokenizer, ScorerSettings(objective="rm"))
        policy = PolicyModel(tiny_model(), value_head=True)
        recipe = quiet(ppo=arguments, checkpoint=UNIVERSAL)
        made.append(PPOTrainer(policy, tokenizer, scorer, recipe, rehearsal=rows if rehearse else (), seed=7))
        return made[-1]

    yield build
    for trainer in made:
        trainer.engine.close()


@pytest.fixture
def train(make, tokenizer, tmp_path):
    """``train(folder, per_device)`` returns the rows that were logged."""
    prompts = [EncodedPrompt(PromptRow(t), encode_prompt(tokenizer, t)) for t in TEXTS]

    def run(name: str, per_device: int, **settings) -> list[dict]:
        make(per_device, **settings).train(prompts, tmp_path / name)
        return logged(tmp_path / name)

    return run


def logged(folder: Path) -> list[dict]:
    rows = metric_lines(folder)
    return [{k: v for k, v in row.items() if k != "seconds"} for row in rows]


def test_mini_batches_follow_from_the_rows_of_the_step(make):
    """Each rank its share, no row twice; blocks in another order at every pass."""
    trainer, found = make(4, rehearse=False), []
    for per_device, ranks in ((8, 1), (4, 1), (2, 1), (4, 2), (2, 2), (1, 4)):
        trainer.arguments = replace(PPO, per_device_train_batch_size=per_device, num_ppo_epochs=2)
        trainer.accumulation = 16 // (2 * per_device * ranks)
        batches: dict[tuple[int, int], list[int]] = {}
        for rank in range(ranks):
            places = list(chain.from_iterable(micro_steps(list(range(16)), per_device, rank, ranks)))
            for step in range(8):
                for number, (groups, _) in enumerate(trainer._mini_batches(places, step)):
                    assert [len(group) for group in groups] == [per_device] * trainer.accumulation
                    batches.setdefault((step, number), []).extend(chain.from_iterable(groups))
        found.append({key: sorted(rows) for key, rows in batches.items()})
    assert all(batches == found[0] for batches in found)
    for step in range(8):
        for number in (0, 2):
            assert sorted(found[0][step, number] + found[0][step, number + 1]) == list(range(16))
    assert len({tuple(found[0][step, 0]) for step in range(8)}) == 2


@pytest.mark.slow
def test_another_cut_makes_the_same_updates(train):
    """Losses, gradients and what is sampled after them; without rehearsal, which is drawn by micro-steps."""
    one, other = (train(str(size), size, rehearse=False) for size in (4, 1))
    for ours, theirs in zip(one, other, strict=True):
        assert ours == pytest.approx(theirs, abs=1e-5, rel=1e-5)


def test_a_snapshot_goes_on_with_another_cut(train, killed_after):
    """The rehearsal sequences too are those of the cut that the stage began with, to whatever cut it came since."""
    whole = train("whole", 4)
    for step, size in ((2, 4), (3, 1)):
        with killed_after(step):
            train("cut", size)
    for ours, theirs in zip(train("cut", 2), whole, strict=True):
        assert ours == pytest.approx(theirs, abs=1e-5, rel=1e-5)


def test_other_rehearsal_rows_an_update_are_refused(train, killed_after):
    with killed_after(2):
        train("cut", 4)
    message = r"with 4 rehearsal sequences an update, this run has 8: choose per_device_rehearsal_batch_size in prop"
    with pytest.raises(ValueError, match=message):
        train("cut", 2, per_device_rehearsal_batch_size=4)
