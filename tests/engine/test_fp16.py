"""fp16: dynamic loss scaling, overflows that are no faults, and faults that are no overflows.

DeepSpeed refuses float16 on CPUs without its instructions; torch computes in it on any, so the tests tell it otherwise.
"""

from __future__ import annotations

import json

import pytest
import torch
from deepspeed.accelerator import get_accelerator

from helpers.forks import run_ranks
from helpers.recipes import quiet
from helpers.workers.fp16_worker import Run
from stable_rlhf.data.encoding import Encoded, encode
from stable_rlhf.engine.engine import Engine, Schedule
from stable_rlhf.engine.weights import gathered
from stable_rlhf.models.features import FeatureCache
from stable_rlhf.models.policy import PolicyModel
from stable_rlhf.policy.experience import Experience
from stable_rlhf.policy.guard import StabilityGuard
from stable_rlhf.policy.ppo import PPOTrainer
from stable_rlhf.run.bounds import check
from stable_rlhf.scorer import AdvantageModel
from stable_rlhf.scorer import metarm as meta
from stable_rlhf.scorer.metarm import MetaRM, response_difference
from stable_rlhf.settings.recipe import EngineArguments, GuardArguments, Recipe
from stable_rlhf.settings.stages import PPOArguments, ScorerArguments

pytestmark = pytest.mark.usefixtures("one_process")
STAGES = (1, 2, pytest.param(3, marks=pytest.mark.slow))  # without ZeRO it runs as ZeRO 1


@pytest.fixture
def fp16(monkeypatch):
    monkeypatch.setattr(get_accelerator(), "is_fp16_supported", lambda: True)


def test_a_device_without_float16_is_refused(tiny_model, monkeypatch):
    monkeypatch.setattr(get_accelerator(), "is_fp16_supported", lambda: None)  # what DeepSpeed says of such a CPU
    with pytest.raises(ValueError, match=r"engine\.fp16: DeepSpeed does not train in float16 on this device"):
        Engine(PolicyModel(tiny_model()), EngineArguments(fp16=True), Schedule(1e-3, 1))
    with pytest.raises(ValueError, match=r"engine\.bf16 and engine\.fp16"):
        check(Recipe(engine=EngineArguments(bf16=True, fp16=True)))


@pytest.mark.parametrize("stage", STAGES)
def test_small_gradients_train_as_in_float32(fp16, tiny_model, stage):
    """A millionth of the usual ones, which float16 alone would round to 0, the head's among them."""
    found = []
    for half in (True, False):
        run = Run(tiny_model(), stage, half=half, small=1e-6)
        before = run.weights()
        moved = [run.step() for _ in range(3)]
        assert all(moved)
        found.append(run.weights() - before)
        norm = run.engine.gradient_norm
        run.engine.close()
    assert float(found[1].abs().max()) > 0.02 and 0 < norm < 1e-3
    # Adam makes a full step of any gradient, so its sign counts where it is close to 0.
    assert float((found[0] - found[1]).norm() / found[1].norm()) < 0.1


@pytest.mark.parametrize("critic", [True, False])
@pytest.mark.parametrize("stage", STAGES)
def test_an_overflow_is_left_out_counted_and_lowers_the_scale(fp16, tiny_model, stage, critic):
    """Also where the parameter that overflowed has no gradient at all in the steps after."""
    run = Run(tiny_model(), stage, critic=critic)
    assert run.engine.scaling_metrics() == {"loss_scale": 65536.0, "overflowed_steps": 0.0}
    assert run.step() and not run.engine.overflowed
    before = run.weights()
    for count, scale in ((1, 65536.0), (2, 32768.0), (3, 16384.0)):  # DeepSpeed forgives the first
        assert not run.step("o") and run.engine.overflowed
        assert run.engine.scaling_metrics() == {"loss_scale": scale, "overflowed_steps": count}
    assert torch.equal(run.weights(), before)
    assert run.step() and not run.engine.overflowed and not torch.equal(run.weights(), before)
    run.engine.close()


@pytest.mark.parametrize("stage", STAGES)
def test_faults_are_not_taken_for_overflows(fp16, tiny_model, stage):
    run = Run(tiny_model(), stage)
    with pytest.raises(FloatingPointError, match="the loss is not finite"):
        run.step("n")
    run.engine.close()
    run = Run(tiny_model(), stage)
    run.engine.skip_nonfinite = True
    run.step()
    before, state = run.weights(), run.state()
    for kind in "nd":
        assert not run.step(kind) and not run.engine.overflowed and run.state() == state
    # At the lowest scale nothing is left to lower: the gradient is infinite by itself.
    run.set_scale(1.0)
    assert not run.step("i") and not run.engine.overflowed and run.engine.overflowed_steps == 0
    run.engine.skip_nonfinite = False
    with pytest.raises(FloatingPointError, match="gradient's norm is not finite"):
        run.step("i")
    assert torch.equal(run.weights(), before)
    run.engine.close()


@pytest.mark.parametrize("stage", STAGES)
def test_the_step_that_raises_the_scale_is_as_large_as_any(fp16, tiny_model, stage):
    found = []
    for window in (1000, 1):
        run = Run(tiny_model(), stage)
        run.set_scale(1024.0)
        run.engine._scaler.scale_window = window
        norms = [(run.step(), run.engine.gradient_norm)[1] for _ in range(4)]
        assert run.engine.loss_scale == (1024.0 if window > 1 else 8192.0)
        found.append((norms, run.weights()))
        run.engine.close()
    assert found[1][0] == pytest.approx(found[0][0], rel=1e-2)
    torch.testing.assert_close(found[1][1], found[0][1], atol=1e-4, rtol=1e-3)


@pytest.mark.parametrize("stage", STAGES)
def test_resumed_to_the_bit(fp16, tiny_model, tmp_path, stage):
    """The scale, its counters and the overflows come back: an overflow is forgiven once, before the snapshot."""
    run = Run(tiny_model(), stage)
    for kind in ".o.":
        run.step(kind)
    run.engine.save(tmp_path)
    moved = [run.step(kind) for kind in ".oo."]
    want, state = run.weights(), run.state()
    run.engine.close()
    again = Run(tiny_model(seed=1), stage)
    again.engine.load(tmp_path)
    assert again.engine.overflowed_steps == 1
    assert [again.step(kind) for kind in ".oo."] == moved == [True, False, False, True]
    assert torch.equal(again.weights(), want) and again.state() == state
    assert again.engine.scaling_metrics() == {"loss_scale": 16384.0, "overflowed_steps": 3.0}
    again.engine.close()


def test_ppo_counts_overflows_and_its_guard_is_silent(fp16, tiny_model, tokenizer, capsys):
    scorer = AdvantageModel(tiny_model().base_model, tokenizer)
    arguments = PPOArguments(
        learning_rate=1e-3, total_steps=4, rollout_batch_size=4, num_mini_batches=2, per_device_train_batch_size=2,
        max_new_tokens=4,
    )  # fmt: skip
    policy = PolicyModel(tiny_model(), value_head=True)
    trainer = PPOTrainer(policy, tokenizer, scorer, quiet(ppo=arguments, engine=EngineArguments(fp16=True)))
    known = torch.full((3,), -3.0)
    experiences = [Experience(Encoded((5, 6, 7 + i, 8, 9), 2), 0.1 * i, known, known, torch.zeros(3)) for i in range(4)]
    experiences = trainer.with_advantages(experiences)
    for scale, overflows in ((2.0**40, 2), (2.0**10, 0)):
        trainer.engine._scaler.cur_scale, trainer.engine.overflowed_steps = scale, 0
        trainer.engine._take_scale()
        metrics = trainer.update(experiences, 0) | trainer.engine.scaling_metrics()
        assert metrics["overflowed_steps"] == overflows and metrics["skipped_updates"] == 0
        assert ("gradient_norm" in metrics) == (overflows == 0)
        kept = {name: metrics[name] for name in ("skipped_updates", "overflowed_steps", "loss_scale")}
        StabilityGuard(GuardArguments()).look(1, {"kl": 0.0} | kept)
    assert "WARNING" not in capsys.readouterr().err
    trainer.engine.close()


class Ascent:
    """A scorer's engine and MetaRM on a few responses; ``factor`` scales its objective, value and gradient."""

    def __init__(self, model, tokenizer, monkeypatch, stage: int = 1, half: bool = True, factor: float = 1.0) -> None:
        right = response_difference
        monkeypatch.setattr(meta, "response_difference", lambda reward, counts: factor * right(reward, counts))
        self.model = AdvantageModel(model.base_model, tokenizer)
        self.engine = Engine(self.model, EngineArguments(fp16=half, zero_stage=stage), Schedule(1e-3, 9))  # fmt: skip
        self.engine.train()
        shifted = [[encode(tokenizer, "Say a", r) for r in ("a", "aa", "b")] for _ in range(2)]
        arguments = ScorerArguments(meta_batch_size=2, meta_learning_rate=1.0 / factor)
        self.meta = MetaRM(self.engine, self.model, shifted, arguments, FeatureCache(), steps=9, seed=0)

    def weights(self) -> torch.Tensor:
        with gathered(list(self.engine.module.parameters())):
            return torch.cat([p.detach().float().flatten() for p in self.model.parameters()]).clone()

    def step(self, number: int) -> tuple[bool, float, dict]:
        """Whether the weights moved in the end, and how far the ascent had moved them."""
        before = self.weights()
        with self.meta.ascended(number - 1) as found:
            ascent = float((self.weights() - before).norm())
            self.engine.backward(self.engine(*self.model.prepare(self.meta.rows[0]))[0].mean() * 1e-3)
        return self.engine.step(), ascent, found

    def set_scale(self, scale: float) -> None:
        self.engine._scaler.cur_scale = scale
        self.engine._take_scale()


@pytest.mark.parametrize("stage", STAGES[::2])
def test_metarm_ascends_on_small_gradients_as_in_float32(fp16, tiny_model, tokenizer, monkeypatch, stage):
    """A hundred-thousandth of the usual ones: float16 alone would round them to 0."""
    found = []
    for half in (False, True):
        with monkeypatch.context() as patched:
            run = Ascent(tiny_model(), tokenizer, patched, stage, half, factor=1e-5)
            patched.setattr(run.meta, "_norm", lambda g, right=run.meta._norm: (found.append([*g]), right(g))[1])
            moved, ascent, figures = run.step(1)
            assert moved and ascent > 0.1 and figures["meta_gradient_norm"] > 1e-7
            run.engine.close()
    plain, half = (torch.cat([g.flatten() for g in gradient]) for gradient in found)
    assert float((half - plain).norm() / plain.norm()) < 0.02


@pytest.mark.parametrize("stage", STAGES[::2])
def test_metarm_leaves_a_step_out_where_its_gradient_overflows(fp16, tiny_model, tokenizer, monkeypatch, stage):
    """As the engine does where its own does; what is infinite at the lowest scale is a fault."""
    run = Ascent(tiny_model(), tokenizer, monkeypatch, stage)
    run.set_scale(2.0**30)
    before = run.weights()
    for number, scale in ((1, 2.0**30), (2, 2.0**29)):  # DeepSpeed forgives the first
        moved, ascent, figures = run.step(number)
        assert not moved and ascent == 0 and set(figures) == {"meta_difference"} and run.engine.overflowed
        assert run.engine.scaling_metrics() == {"loss_scale": scale, "overflowed_steps": number}
    assert torch.equal(run.weights(), before)
    run.set_scale(2.0**8)
    moved, ascent, _ = run.step(3)
    assert moved and ascent > 0 and not torch.equal(run.weights(), before)
    run.set_scale(1.0)
    monkeypatch.setattr(meta, "response_difference", lambda reward, counts: 1e9 * reward.sum()[None])
    with pytest.raises(FloatingPointError, match=r"gradient of MetaRM's objective .* is not finite"):
        run.step(4)
    run.engine.close()


@pytest.mark.slow
def test_two_ranks(tmp_path):
    """An overflow on one rank leaves out the step of both; what a snapshot holds goes on to the same bits."""
    run_ranks("fp16_worker", tmp_path, ranks=2)
    found = json.loads((tmp_path / "found.json").read_text(encoding="utf-8"))
    assert set(found) == {"1", "2", "3"}
    for row in found.values():
        assert row["moved"] == [True, False, False, True, False, True] and row["scale"] == 16384.0
        assert row["same"] == 2.0  # on both ranks
        assert row["losses"] == pytest.approx(row["float32"], rel=2e-2)
        assert row["float32"][2] < row["float32"][0]
