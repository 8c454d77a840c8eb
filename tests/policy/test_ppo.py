"""The trainer: scores, penalties and the moving average, mixed batches, and which prompts PPO sees."""

from __future__ import annotations

import signal
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from torch.overrides import TorchFunctionMode

from helpers.files import metric_lines
from helpers.ppo_texts import TEXTS
from helpers.recipes import quiet
from stable_rlhf import ops
from stable_rlhf.data import write_jsonl
from stable_rlhf.data.encoding import Encoded, encode
from stable_rlhf.data.prompts import encode_prompts
from stable_rlhf.data.records import DataError, PromptRow
from stable_rlhf.engine.signals import Stopped
from stable_rlhf.engine.snapshots import Snapshots
from stable_rlhf.models.policy import PolicyModel
from stable_rlhf.models.views import response_logprobs
from stable_rlhf.policy.dose import RehearsalController
from stable_rlhf.policy.ppo import PPOTrainer, check_sizes
from stable_rlhf.rollout.local import Rollout
from stable_rlhf.run import stages
from stable_rlhf.scorer import AdvantageModel, ScorerSettings
from stable_rlhf.settings.recipe import CheckpointArguments, DataArguments, Recipe
from stable_rlhf.settings.stages import PPOArguments
from stable_rlhf.settings.variants import VARIANTS

ARGUMENTS = PPOArguments(
    learning_rate=1e-3, total_steps=2, rollout_batch_size=4, per_device_train_batch_size=2, max_new_tokens=4,
    per_device_rehearsal_batch_size=3, num_ppo_epochs=2, rehearsal_coef=0.5,
)  # fmt: skip

pytestmark = pytest.mark.usefixtures("one_process")


@pytest.fixture
def make(tiny_model, tokenizer):
    made = []

    def build(
        arguments=ARGUMENTS, objective="am", layers=None, scorer_seed=3, n=2, k=1, critic=True, checkpoint=None,
        **settings,
    ) -> PPOTrainer:  # fmt: skip
        shape = {"num_policies": n, "num_alternates": k} if objective == "am" else {}
        scorer = AdvantageModel(
            tiny_model(seed=scorer_seed).base_model, tokenizer, ScorerSettings(objective=objective, **shape),
            num_trainable_layers=layers,
        )  # fmt: skip
        policy = PolicyModel(tiny_model(), value_head=critic, num_trainable_layers=layers)
        estimator = None if critic or arguments.advantage_estimator != "gae" else "score"
        recipe = quiet(ppo=arguments, checkpoint=checkpoint or CheckpointArguments())
        made.append(PPOTrainer(policy, tokenizer, scorer, recipe, estimator=estimator, seed=7, **settings))
        return made[-1]

    yield build
    for trainer in made:
        trainer.engine.close()


def weights(trainer: PPOTrainer) -> torch.Tensor:
    return torch.cat([p.detach().flatten() for p in trainer.policy.trunk.parameters()]).clone()


def as_rollouts(tokenizer) -> list[Rollout]:
    """Two that ended by themselves, two that were cut off."""
    found = []
    for text, response, finished in zip(TEXTS, ("dcba", "", "ab", "z"), (True, True, False, False), strict=False):
        whole = encode(tokenizer, text, response)
        encoded = whole if finished else Encoded(whole.ids[:-1], whole.prompt_length)
        found.append(Rollout(encoded, response, finished))
    return found


# -- whole runs ----------------------------------------------------------------------------------------------------


def test_ppo_with_rehearsal_changes_the_policy_and_neither_reference_nor_scorer(make, prompts, rehearsal, tmp_path):
    trainer = make(rehearsal=rehearsal)
    before = weights(trainer)
    frozen = [p.clone() for m in (trainer.reference, trainer.scorer) for p in m.parameters()]
    result = trainer.train(prompts, tmp_path)
    assert torch.isfinite(weights(trainer)).all() and float((weights(trainer) - before).abs().max()) > 1e-4
    after = [p for m in (trainer.reference, trainer.scorer) for p in m.parameters()]
    assert all(torch.equal(a, b) for a, b in zip(frozen, after, strict=True))
    assert result["steps"] == len(result["curve"]) == 2
    for row in result["curve"]:
        assert row["rehearsal_loss"] > 0.5 and row["value_loss"] > 0 and row["entropy"] > 0
        assert row["loss"] == pytest.approx(
            row["policy_loss"] + 0.5 * row["rehearsal_loss"] + ARGUMENTS.vf_coef * row["value_loss"], abs=1e-5
        )
        assert 1 <= row["length"] <= 4 and row["gradient_norm"] > 0 and 0.05 < row["rehearsal_share"] < 0.95
    assert result["curve"][0]["kl"] == pytest.approx(0, abs=1e-5)  # the first rollouts come from the reference itself
    assert abs(result["curve"][1]["kl"]) > 1e-4
    for name in ("config.json", "model.safetensors", "tokenizer.json", "value_head.safetensors", "metrics.jsonl"):
        assert (tmp_path / name).is_file(), name
    lines = metric_lines(tmp_path)
    assert [line["step"] for line in lines] == [1, 2] and lines == result["curve"]


@pytest.mark.parametrize("layers", [None, 1])
def test_ppo_with_a_scorer_of_fewer_embedding_rows(tiny_model, tokenizer, prompts, tmp_path, layers):
    """A policy's embedding that is padded with rows of no token may well sample one."""
    model = tiny_model()
    model.resize_token_embeddings(128, mean_resizing=False)
    with torch.no_grad():
        model.lm_head.weight[91:] = 2 * model.lm_head.weight[:37]
    scorer = AdvantageModel(
        tiny_model(seed=3).base_model, tokenizer, ScorerSettings(objective="rm"), num_trainable_layers=layers
    )
    policy = PolicyModel(model, value_head=True, num_trainable_layers=layers)
    trainer = PPOTrainer(policy, tokenizer, scorer, quiet(ppo=ARGUMENTS), seed=7)
    seen: list[int] = []
    sample = trainer.rollouts.sample

    def watched(*given, **named):
        found = sample(*given, **named)
        seen.extend(token for rollout in found for token in rollout.encoded.response)
        return found

    trainer.rollouts.sample = watched
    result = trainer.train(prompts, tmp_path)
    trainer.engine.close()
    assert max(seen) >= 91 and len(result["curve"]) == 2


def test_without_rehearsal_data_nothing_is_rehearsed(make, prompts, rehearsal, tmp_path):
    one_step = replace(ARGUMENTS, total_steps=1)
    found = {}
    for name, rows in (("with", rehearsal), ("without", [])):
        trainer = make(one_step, rehearsal=rows)
        (row,) = trainer.train(prompts, tmp_path / name)["curve"]
        found[name] = row, weights(trainer)
    assert found["without"][0]["rehearsal_loss"] == 0 < found["with"][0]["rehearsal_loss"]
    assert "rehearsal_share" not in found["without"][0]
    assert found["without"][0]["score"] == found["with"][0]["score"]
    assert not torch.equal(found["without"][1], found["with"][1])


def test_a_share_to_hold_leads_the_dose_and_survives_a_resume(make, prompts, rehearsal, tmp_path, killed_after):
    arguments = replace(ARGUMENTS, total_steps=4, rehearsal_target=0.9)
    every = CheckpointArguments(save_steps=1)

    def run(folder):
        return make(arguments, rehearsal=rehearsal, checkpoint=every).train(prompts, folder)["curve"]

    whole = run(tmp_path / "whole")
    doses = [row["rehearsal_coef"] for row in whole]
    expected = RehearsalController(0.5, 0.9)
    for row in whole:
        assert row["rehearsal_coef"] == expected.value
        assert row["loss"] == pytest.approx(
            row["policy_loss"] + expected.value * row["rehearsal_loss"] + ARGUMENTS.vf_coef * row["value_loss"],
            rel=1e-4,
        )
        expected.update(row["rehearsal_share"])
    assert doses[0] == 0.5 and doses[0] < doses[1] < doses[-1]
    with killed_after(3):
        run(tmp_path / "killed")
    again = run(tmp_path / "killed")
    assert [{**row, "seconds": 0} for row in again] == [{**row, "seconds": 0} for row in whole]


def test_a_coefficient_that_is_not_led_is_the_one_given_when_a_run_goes_on(make, rehearsal):
    before = replace(ARGUMENTS, rehearsal_coef=0.5, kl_coef=0.1)
    led = {"rehearsal_target": 0.9, "kl_target": 1e-3}

    def gone_on(first: PPOTrainer, **changes):
        """What a trainer with other settings begins with after the state of the first."""
        trainer = make(replace(before, rehearsal_coef=5.0, kl_coef=0.3, **changes), rehearsal=rehearsal)
        trainer._resume(SimpleNamespace(carried=first.state(), tracker=SimpleNamespace(history=[])))
        return trainer.dose.value, trainer.kl.value, trainer.kl.target

    plain, leading = make(before, rehearsal=rehearsal), make(replace(before, **led), rehearsal=rehearsal)
    assert gone_on(plain) == gone_on(leading) == (5.0, 0.3, None)
    leading.dose.value, leading.kl.value = 0.7, 0.2
    leading.kl.lower_target()
    assert gone_on(leading, **led) == (0.7, 0.2, 5e-4)
    assert gone_on(leading, **{**led, "kl_target": 2e-3}) == (0.7, 0.2, 2e-3)  # another target than it began with


def test_the_same_seed_gives_the_same_run(make, prompts, rehearsal, tmp_path):
    one, two = (make(rehearsal=rehearsal).train(prompts, tmp_path / name)["curve"] for name in "ab")
    for first, second in zip(one, two, strict=True):
        assert {k: v for k, v in first.items() if k != "seconds"} == {k: v for k, v in second.items() if k != "seconds"}


def test_gold_scores_are_logged_and_unseen_by_the_policy(make, prompts, tmp_path):
    one_step = replace(ARGUMENTS, total_steps=1)
    seen = []

    def gold(row, text):
        seen.append((row.prompt, text))
        return len(seen)

    trainer, other = make(one_step), make(one_step)
    (row,) = trainer.train(prompts, tmp_path / "a", gold=gold)["curve"]
    assert row["gold"] == (1 + 2 + 3 + 4) / 4 and len(set(seen)) == 4 and {p for p, _ in seen} <= set(TEXTS)
    assert "gold" not in other.train(prompts, tmp_path / "b")["curve"][0]
    assert torch.equal(weights(trainer), weights(other))


# -- scores --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("layers", [None, 1])
@pytest.mark.parametrize("objective", ["am", "rm"])
def test_rollouts_are_observed_by_the_scorer_the_policy_and_the_reference(make, tokenizer, objective, layers):
    trainer = make(replace(ARGUMENTS, temperature=0.5), objective=objective, layers=layers, scorer_seed=0)
    assert trainer.shares_features == (layers is not None)
    rollouts = as_rollouts(tokenizer)
    experiences = trainer.observe(rollouts)
    scores = trainer.scorer.score_encoded([r.encoded for r in rollouts]).tolist()
    assert [e.score for e in experiences] == pytest.approx(scores, abs=1e-5) and len(set(scores)) == 4
    logprobs = response_logprobs(trainer.reference, [r.encoded for r in rollouts], temperature=0.5)
    for experience, rollout, logprob in zip(experiences, rollouts, logprobs, strict=True):
        assert experience.encoded == rollout.encoded
        torch.testing.assert_close(experience.old_logprob, logprob, rtol=0, atol=1e-5)
        torch.testing.assert_close(experience.ref_logprob, logprob, rtol=0, atol=1e-5)
        assert experience.value.shape == logprob.shape and (experience.features is not None) == (layers is not None)


def test_the_penalty_is_subtracted_from_unfinished_rollouts_only(make, tokenizer, prompts):
    rollouts, scores = as_rollouts(tokenizer), []
    for trainer in (make(), make(replace(ARGUMENTS, missing_eos_penalty=2.5))):
        rewarded, figures = trainer.rewarded(prompts[:4], rollouts, trainer.observe(rollouts), 0)
        scores.append([e.score for e in rewarded])
        assert figures == {}  # the scorer alone is the metric `score`
    plain, punished = scores
    assert [a - b for a, b in zip(plain, punished, strict=True)] == pytest.approx([0, 0, 2.5, 2.5], abs=1e-6)


def test_the_moving_average_changes_scores_by_normalising_them_only(make, tokenizer):
    rollouts = as_rollouts(tokenizer)
    plain, moving = make(objective="rm"), make(objective="rm", moving_average=True)
    raw, seen = [e.score for e in plain.observe(rollouts)], []
    for part in (slice(0, 3), slice(3, 4), slice(0, 4)):
        seen += raw[part]
        mean = sum(seen) / len(seen)
        std = (sum((s - mean) ** 2 for s in seen) / len(seen)) ** 0.5
        ours, observed = plain.observe(rollouts[part]), moving.observe(rollouts[part])
        ours, theirs = plain.with_advantages(ours), moving.with_advantages(observed)
        # Observing does not normalise, and what was observed is left as it was.
        assert [e.score for e in observed] == pytest.approx(raw[part], abs=1e-5)
        assert all(e.advantage is None for e in observed)
        assert [e.raw_score for e in theirs] == [e.score for e in observed]
        assert [e.score for e in ours] == pytest.approx(raw[part], abs=1e-5)
        assert [e.score for e in theirs] == pytest.approx([(s - mean) / std for s in raw[part]], abs=1e-4)
        for one, other in zip(ours, theirs, strict=True):
            assert torch.equal(one.old_logprob, other.old_logprob)
            assert float(other.returns[-1]) == pytest.approx(other.score, abs=1e-5)  # what PPO learns from
    assert moving.moments.count == 8 and plain.moments is None


def test_the_curve_shows_raw_scores_with_and_without_the_moving_average(make, prompts, tmp_path):
    one_step = replace(ARGUMENTS, total_steps=1)
    curves = [
        make(one_step, objective="rm", moving_average=moving).train(prompts, tmp_path / str(moving))["curve"][0]
        for moving in (False, True)
    ]
    for name in ("score", "score_std", "length", "kl"):
        assert curves[0][name] == curves[1][name]
    assert curves[0]["value_loss"] != curves[1]["value_loss"]


@pytest.mark.parametrize("objective", ["am", "rm"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_score_that_is_not_finite_is_an_error(make, tokenizer, objective, value):
    trainer = make(objective=objective)
    with torch.no_grad():
        trainer.scorer.reward_head.bias.fill_(value)
    with pytest.raises(ValueError, match="finite"):
        trainer.observe(as_rollouts(tokenizer))


# -- several GPUs --------------------------------------------------------------------------------------------------


class OnGPU(torch.Tensor):
    """A tensor on a GPU, as far as tests without one can tell: all that is computed from it is there too."""


class PretendedGPU(TorchFunctionMode):
    """Moving tensors to ``cuda`` marks them, ``cpu()`` takes the mark away."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        if function is torch.Tensor.to and torch.device("cuda") in args:
            return args[0].as_subclass(OnGPU)
        if function is torch.Tensor.cpu:
            return args[0].as_subclass(torch.Tensor)
        return function(*args, **(kwargs or {}))


def test_ranks_exchange_advantages_where_nccl_can_sum_them(make, tokenizer, monkeypatch):
    trainer, all_gather = make(), dist.all_gather
    experiences, alone = (trainer.observe(as_rollouts(tokenizer)) for _ in range(2))
    alone = trainer.with_advantages(alone)
    asked = []

    def nccl(parts, mine, group=None):
        if not all(isinstance(tensor, OnGPU) for tensor in (*parts, mine)):
            raise RuntimeError("No backend type associated with device type cpu")
        asked.append(mine)
        all_gather(parts, mine, group=group)

    monkeypatch.setattr(dist, "all_gather", nccl)
    monkeypatch.setattr("stable_rlhf.policy.ppo.world_size", lambda: 2)
    monkeypatch.setattr(type(trainer.policy.trunk), "device", torch.device("cuda"))
    with PretendedGPU(), ops.backend("torch"):  # the C++ one takes CPU tensors alone
        experiences = trainer.with_advantages(experiences)
    assert len(asked) == 1
    for one, other in zip(experiences, alone, strict=True):
        assert type(one.advantage) is type(one.returns) is torch.Tensor
        torch.testing.assert_close(one.advantage, other.advantage, rtol=0, atol=1e-6)
        assert torch.equal(one.returns, other.returns)


# -- sizes and rehearsal -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("rollouts", "mini", "device"), [(10, 2, 3), (4, 3, 1), (2, 1, 4)])
def test_rollouts_that_do_not_divide_are_an_error_that_names_the_numbers(make, rollouts, mini, device):
    arguments = replace(
        ARGUMENTS, rollout_batch_size=rollouts, num_mini_batches=mini, per_device_train_batch_size=device
    )
    message = (
        rf"ppo\.rollout_batch_size {rollouts} must be a multiple of num_mini_batches {mini} x "
        rf"per_device_train_batch_size {device} x 1 ranks = {mini * device}"
    )
    with pytest.raises(ValueError, match=message):
        check_sizes(arguments)
    with pytest.raises(ValueError, match=message):
        make(arguments)


def test_rehearsal_is_drawn_anew_for_every_update_and_repeatably(make, rehearsal):
    trainer, again = make(rehearsal=rehearsal), make(rehearsal=rehearsal)
    draws = {
        (step, epoch, number): [rehearsal.index(e) for e in trainer._rehearsal(step, epoch, number)]
        for step in range(4) for epoch in range(2) for number in range(2)
    }  # fmt: skip
    assert all(len(draw) == 6 for draw in draws.values())  # three for each of two micro-steps
    assert {i for draw in draws.values() for i in draw} == set(range(5))
    assert len({tuple(draw) for draw in draws.values()}) > 12
    assert len({tuple(draw[at : at + 3]) for draw in draws.values() for at in (0, 3)}) > 24
    assert all([rehearsal.index(e) for e in again._rehearsal(*key)] == draw for key, draw in draws.items())
    assert make()._rehearsal(0, 0, 0) == []


@torch.no_grad()
def nll(trainer: PPOTrainer, example: Encoded) -> float:
    return -float(response_logprobs(trainer.reference, [example])[0].sum())


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_the_rehearsal_loss_is_a_mean_over_tokens_or_a_sum_over_each_sequence(make, tokenizer, rehearsal, reduction):
    arguments = replace(ARGUMENTS, num_ppo_epochs=1, rehearsal_reduction=reduction, temperature=0.5)
    trainer = make(arguments, rehearsal=rehearsal)
    drawn = trainer._rehearsal(5, 0, 0)
    total = sum(nll(trainer, e) for e in drawn)
    assert len({len(e.response) for e in drawn}) > 1
    experiences = trainer.with_advantages(trainer.observe(as_rollouts(tokenizer)))
    metrics = trainer.update(experiences, step=5)
    denominator = len(drawn) if reduction == "sum" else sum(len(e.response) for e in drawn)
    assert metrics["rehearsal_loss"] == pytest.approx(total / denominator, abs=1e-4)


def test_prompts_that_are_too_long_are_left_out_and_counted(capsys):
    rows = [PromptRow("a" * n) for n in (3, 9, 4, 12)]
    kept = encode_prompts(rows, lambda row: [5] * len(row.prompt), 4)
    assert [p.row for p in kept] == [rows[0], rows[2]] and kept[1].ids == [5] * 4
    assert "2 of 4 prompts have over 4 tokens: left out" in capsys.readouterr().err
    with pytest.raises(DataError, match="none of 4 prompts fits max_prompt_length 2"):
        encode_prompts(rows, lambda row: [5] * len(row.prompt), 2)


def test_the_clip_may_be_wider_above_than_below(make):
    for high, clip in ((None, (0.1, 0.1)), (0.3, (0.1, 0.3))):
        config = make(replace(ARGUMENTS, cliprange=0.1, cliprange_high=high)).loss_config
        assert (config.clip_low, config.clip_high) == clip


# -- which prompts PPO sees ----------------------------------------------------------------------------------------


@pytest.fixture
def run_ppo(tmp_path, tiny_model, tokenizer, monkeypatch):
    """run_ppo on saved models, up to the training itself; returns the trainer and the prompts it was given."""
    policy, scorer = tmp_path / "policy", tmp_path / "scorer"
    tiny_model().save_pretrained(policy)
    tokenizer.save_pretrained(policy)
    AdvantageModel(tiny_model(seed=3).base_model, tokenizer).save_pretrained(scorer)
    write_jsonl(tmp_path / "prompts.jsonl", [{"prompt": t, "task": "x"} for t in TEXTS])
    write_jsonl(tmp_path / "eval.jsonl", [{"prompt": "ab", "task": "x"}])
    seen = []

    def train(self, prompts, folder, **settings):
        self.engine.close()
        seen.append((self, [p.row.prompt for p in prompts]))
        return {}

    monkeypatch.setattr(PPOTrainer, "train", train)

    def run(selected, variant="am-sr", columns=(), **ppo):
        rehearsal = None
        if selected is not None:
            rehearsal = tmp_path / "rehearsal.jsonl.gz"
            write_jsonl(rehearsal, [{"prompt": t, "response": "abc", **dict(columns)} for t in selected])
        data = DataArguments(data_dir=str(tmp_path), prompts=["prompts.jsonl"], eval_main=["eval.jsonl"],
                             eval_forget=["eval.jsonl"])  # fmt: skip
        recipe = Recipe(data=data, ppo=replace(ARGUMENTS, **ppo))
        stages.run_ppo(recipe, VARIANTS[variant], str(policy), str(scorer), rehearsal, tmp_path / "out")
        return seen[-1]

    return run


def test_selected_prompts_stay_in_ppo_unless_they_are_reserved(run_ppo, tokenizer):
    selected = [TEXTS[1], TEXTS[3], "a prompt from elsewhere"]
    trainer, prompts = run_ppo(selected)
    assert prompts == list(TEXTS)
    trainer, prompts = run_ppo(selected, rehearsal_prompts_in_ppo=False)
    assert prompts == [TEXTS[0], TEXTS[2], TEXTS[4]]
    assert trainer.rehearsal == [encode(tokenizer, t, "abc") for t in selected]


@pytest.mark.parametrize("columns", [{}, {"finished": True}, {"finished": None}, {"finished": False}])
def test_an_answer_that_was_cut_off_is_rehearsed_without_an_end(run_ppo, tokenizer, columns):
    trainer, _ = run_ppo([TEXTS[1]], columns=columns)
    whole = encode(tokenizer, TEXTS[1], "abc")
    assert whole.ids[-1] == tokenizer.eos_token_id
    cut = columns.get("finished") is False
    assert trainer.rehearsal == [Encoded(whole.ids[:-1], whole.prompt_length) if cut else whole]


def test_reserving_every_prompt_is_an_error(run_ppo):
    with pytest.raises(DataError, match=r"ppo\.rehearsal_prompts_in_ppo .*nothing is left"):
        run_ppo(TEXTS, rehearsal_prompts_in_ppo=False)


def test_other_variants_reserve_and_rehearse_nothing(run_ppo):
    trainer, prompts = run_ppo([TEXTS[1]], variant="am", rehearsal_prompts_in_ppo=False)
    assert prompts == list(TEXTS) and trainer.rehearsal == [] and trainer.moments is None


def test_a_variant_without_what_it_needs_is_an_error(run_ppo):
    with pytest.raises(ValueError, match=r"'am-sr' needs rehearsal data"):
        run_ppo(None)
    with pytest.raises(ValueError, match=r"variant 'rm-ma' needs a scorer with objective 'rm'"):
        run_ppo(None, variant="rm-ma")


# -- without a critic ----------------------------------------------------------------------------------------------


def test_without_a_critic_the_score_is_every_tokens_advantage(make, tokenizer, prompts, tmp_path):
    arguments = replace(ARGUMENTS, kl_coef=0.3, gamma=0.5, lam=0.5, whiten_advantages=False)
    trainer = make(arguments, critic=False)
    experiences = trainer.with_advantages([  # as after some updates, so that there is a KL penalty
        replace(e, ref_logprob=e.ref_logprob - 0.1 * torch.arange(1, len(e.ref_logprob) + 1))
        for e in trainer.observe(as_rollouts(tokenizer))
    ])  # fmt: skip
    for experience in experiences:
        penalty = 0.3 * (experience.old_logprob - experience.ref_logprob)
        to_go = penalty.flip(0).cumsum(0).flip(0)  # γ and λ of GAE play no part
        torch.testing.assert_close(experience.advantage, experience.score - to_go)
    whitened = make(replace(arguments, whiten_advantages=True, kl_coef=0.0), critic=False)
    experiences = whitened.with_advantages(whitened.observe(as_rollouts(tokenizer)))
    every = torch.cat([e.advantage for e in experiences])
    assert float(every.mean()) == pytest.approx(0, abs=1e-5) and float(every.std()) == pytest.approx(1, abs=0.1)
    for experience in experiences:
        assert float(experience.advantage.max() - experience.advantage.min()) < 1e-6

    before = weights(trainer)
    result = trainer.train(prompts, tmp_path)
    assert float((weights(trainer) - before).abs().max()) > 1e-4
    assert all(row["value_loss"] == 0 for row in result["curve"])
    assert (tmp_path / "model.safetensors").is_file() and not (tmp_path / "value_head.safetensors").exists()


def test_the_variant_without_a_critic_takes_an_advantage_model(run_ppo):
    trainer, prompts = run_ppo(None, variant="am-critic-free")
    assert trainer.policy.value_head is None and trainer.rehearsal == [] and prompts == list(TEXTS)
    trainer, _ = run_ppo(None, variant="am")
    assert trainer.policy.value_head is not None


def test_the_page_is_drawn_where_a_signal_ends_the_stage(make, prompts, tmp_path, monkeypatch):
    def stop(self, step, state, *, last, asked):
        raise Stopped(signal.SIGTERM, "saved")

    monkeypatch.setattr(Snapshots, "save", stop)
    with pytest.raises(Stopped):
        make().train(prompts, tmp_path / "run")
    assert (tmp_path / "run" / "training.html").is_file()
