"""The scorer's data and loss: log-probs of the right policy, every comparison weighed alike, Eq. 6 to 8 by hand."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch

from helpers.files import metric_lines
from helpers.recipes import quiet
from stable_rlhf.data import write_jsonl
from stable_rlhf.data.encoding import encode
from stable_rlhf.data.records import Comparison, DataError
from stable_rlhf.models.features import FeatureCache
from stable_rlhf.models.policy import PolicyModel
from stable_rlhf.models.trunk import Trunk
from stable_rlhf.models.views import response_logprobs
from stable_rlhf.run.stages import run_scorer
from stable_rlhf.scorer import AdvantageModel, ScorerSettings
from stable_rlhf.scorer.comparisons import (
    EncodedComparison,
    encode_comparisons,
    score_pairs,
    with_logprobs,
)
from stable_rlhf.scorer.train import scorer_loss, train_scorer
from stable_rlhf.settings.recipe import Recipe
from stable_rlhf.settings.stages import ScorerArguments

ARGUMENTS = ScorerArguments(margin=1.5)
ALL_PAIRS = ((0, 1), (0, 2), (0, 3), (1, 2), (1, 3), (2, 3))


@pytest.fixture
def make(tiny_model, tokenizer):
    def build(objective="am", seed=0, **settings):
        settings = ScorerSettings(objective=objective, **settings)
        return AdvantageModel(tiny_model(seed=seed).base_model, tokenizer, settings).eval()

    return build


@pytest.fixture
def rows(tokenizer):
    comparisons = [
        Comparison("Reverse the letters of abcd", ("dcba", "abcd"), ((0, 1),), task="reverse"),
        Comparison("Write backwards: xyz", ("zyx", "zy", "x", ""), ALL_PAIRS, task="reverse"),
        Comparison("Count the letters of qq", ("2", "3", "two"), ((0, 1), (0, 2)), margin=0.5),
        Comparison("Give the last letter of ab", ("a", "b"), ((1, 0),)),
    ]
    return [EncodedComparison(c, [encode(tokenizer, c.prompt, r) for r in c.responses]) for c in comparisons]


def log_sigmoid(x: float) -> float:
    return -math.log1p(math.exp(-x))


@torch.no_grad()
def heads(model, examples) -> tuple[list[float], list[float]]:
    """r and e of each example on its own."""
    found = [model(*model.prepare([e])) for e in examples]
    return [float(r) for r, _ in found], [float(e) if e is not None else 0.0 for _, e in found]


def comparison_by_hand(model, item, margin=1.5, weights=None, smoothing=0.0) -> float:
    """Eq. 6 over one prompt's pairs, each with the same share; ``weights``: sum_k w_k of every response."""
    settings = model.settings
    n, k = settings.num_policies, settings.num_alternates
    reward, expected = heads(model, item.examples)
    if settings.objective == "rm":
        score = reward
    else:
        share = [1 - (sum(w) / n) for w in weights] if weights else [1.0] * len(reward)
        score = [s * r - (n - k) / n * expected[0] for s, r in zip(share, reward, strict=True)]
    m = item.row.margin or margin
    total = 0.0
    for better, worse in item.row.pairs:
        gap = score[better] - score[worse]
        total -= (1 - smoothing) * log_sigmoid(gap) + smoothing * log_sigmoid(-gap)
        if settings.objective == "am":
            total -= log_sigmoid(m - score[better]) + log_sigmoid(m + score[worse])
    return total / len(item.row.pairs)


def loss_of(model, batch, arguments=ARGUMENTS, comparisons=None):
    return scorer_loss(model, model, batch, arguments, None, comparisons or len(batch))


# -- rows ----------------------------------------------------------------------------------------------------------


def test_comparisons_that_are_too_long_are_left_out_and_counted(tokenizer):
    good = Comparison("ab", ("ba", "b"), ((0, 1),))
    long_prompt = Comparison("abcdefgh", ("b", "a"), ((0, 1),))
    long_response = Comparison("ab", ("b", "abcdefghij"), ((0, 1),))
    found, left_out = encode_comparisons([good, long_prompt, good, long_response], tokenizer, 10, 6)
    assert [item.row for item in found] == [good, good] and left_out == 2
    assert found[0].examples == [encode(tokenizer, "ab", "ba"), encode(tokenizer, "ab", "b")]
    lengths = max(map(len, found[0].examples)), found[0].examples[0].prompt_length
    assert encode_comparisons([good], tokenizer, *lengths)[1] == 0  # the limits themselves still fit
    for short in [(lengths[0] - 1, 99), (99, lengths[1] - 1)]:
        message = f"none of 1 comparisons fits max_length {short[0]} and max_prompt_length {short[1]}"
        with pytest.raises(DataError, match=message):
            encode_comparisons([good], tokenizer, *short)


def test_responses_that_differ_as_text_but_not_as_tokens_are_no_preference(tokenizer, capsys):
    """They trained at ln 2. Both of these characters are unknown to the tokenizer."""
    good = Comparison("ab", ("ba", "b"), ((0, 1),), source="f:1")
    same = Comparison("ab", ("Ω", "Ψ"), ((0, 1),), source="f:2")
    tied = Comparison("ab", ("Ω", "Ψ", "b"), ((0, 2), (1, 2)), source="f:3")
    ranked = Comparison("ab", ("Ω", "b", "Ψ"), ((0, 1), (0, 2), (1, 2)), source="f:4")
    found, long = encode_comparisons([good, same, tied, ranked], tokenizer, 10, 6)
    assert [item.row for item in found] == [good, tied] and long == 0
    assert "2 of 4 comparisons" in (told := capsys.readouterr().err) and "the first is f:2" in told
    with pytest.raises(DataError, match=r"^f:2: responses with different ranks have the same tokens"):
        encode_comparisons([same], tokenizer, 10, 6)


def with_alternates(tokens: tuple[int, int], k: int = 2, logprobs: tuple[int, int] | None = None) -> Comparison:
    """A row with log-probs of the given numbers of tokens for its responses "ba" and "b"."""
    alternates = tuple(tuple(tuple(-0.7 - 0.1 * t - i for t in range(n)) for i in range(k)) for n in tokens)
    ours = tuple(tuple(-0.5 * (t + 1) for t in range(n)) for n in logprobs) if logprobs else None
    return Comparison("ab", ("ba", "b"), ((0, 1),), alt_logprobs=alternates, logprobs=ours, source="pairs.jsonl:17")


@pytest.mark.parametrize("tokens", [(2, 2), (3, 1), (4, 2)])
def test_alternates_of_a_wrong_length_are_an_error_that_names_the_row(tokenizer, tokens):
    assert encode_comparisons([with_alternates((3, 2))], tokenizer, 64, 64)[1] == 0  # with EOS: 3 and 2 tokens
    with pytest.raises(DataError, match=r"pairs\.jsonl:17: alt_logprobs of response [01] .*tokens with its end"):
        encode_comparisons([with_alternates(tokens)], tokenizer, 64, 64)


def test_log_probs_of_the_file_are_taken_where_it_has_them(tokenizer):
    found, _ = encode_comparisons([with_alternates((3, 2), logprobs=(3, 2))], tokenizer, 64, 64)
    found = with_logprobs(found, None)
    assert [lp.tolist() for lp in found[0].logprobs] == [[-0.5, -1.0, -1.5], [-0.5, -1.0]]


def test_log_probs_of_a_wrong_length_are_an_error_that_names_the_row(tokenizer):
    found, _ = encode_comparisons([with_alternates((3, 2), logprobs=(3, 3))], tokenizer, 64, 64)
    with pytest.raises(DataError, match=r"pairs\.jsonl:17: logprobs have 3 values for 2 tokens"):
        with_logprobs(found, None)


@torch.no_grad()
def test_without_log_probs_in_the_file_they_are_the_policys(tokenizer, tiny_model, architecture):
    causal_lm = tiny_model(architecture)
    comparisons = [with_alternates((3, 2)), with_alternates((3, 2), logprobs=(3, 2)), with_alternates((3, 2))]
    found, _ = encode_comparisons([replace(c, prompt="a" * (i + 1)) for i, c in enumerate(comparisons)],
                                  tokenizer, 64, 64)  # fmt: skip
    found = with_logprobs(found, PolicyModel(causal_lm), per_batch=1)
    assert found[1].logprobs[0].tolist() == [-0.5, -1.0, -1.5]
    for item in (found[0], found[2]):
        for example, logprob in zip(item.examples, item.logprobs, strict=True):
            log_p = causal_lm(torch.tensor([example.ids])).logits[0].double().log_softmax(-1)
            wanted = [float(log_p[t - 1, example.ids[t]]) for t in range(example.prompt_length, len(example))]
            assert logprob.tolist() == pytest.approx(wanted, abs=1e-5)


def test_rows_with_alternates_and_no_policy_to_ask_are_an_error(tokenizer):
    found, _ = encode_comparisons([with_alternates((3, 2))], tokenizer, 64, 64)
    with pytest.raises(DataError, match=r"pairs\.jsonl:17: .*model_name_or_path"):
        with_logprobs(found, None)


def test_rows_without_alternates_need_no_log_probs(rows):
    rows = with_logprobs(rows, None)
    assert all(item.logprobs is None for item in rows)


def test_temperature_of_log_probs(tokenizer, tiny_model):
    policy, example = PolicyModel(tiny_model()), encode(tokenizer, "ab", "ba")
    logits = policy.causal_lm(torch.tensor([example.ids])).logits[0].detach() / 0.5
    wanted = [float(logits[t - 1].log_softmax(-1)[example.ids[t]]) for t in range(example.prompt_length, len(example))]
    assert response_logprobs(policy, [example], temperature=0.5)[0].tolist() == pytest.approx(wanted, abs=1e-5)


# -- loss ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("objective", ["am", "rm"])
@pytest.mark.parametrize("smoothing", [0.0, 0.2])
def test_every_comparison_weighs_the_same_however_many_pairs_it_has(make, rows, objective, smoothing):
    model = make(objective)
    loss, output, terms = loss_of(model, rows, replace(ARGUMENTS, label_smoothing=smoothing))
    parts = [comparison_by_hand(model, item, smoothing=smoothing) for item in rows]
    assert float(loss.detach()) == pytest.approx(sum(parts) / 4, abs=1e-5)
    assert len({round(part, 3) for part in parts}) == 4 and not terms
    assert output.score.numel() == sum(len(item.examples) for item in rows)


def test_the_rows_own_margin_wins_over_the_setting(make, rows):
    model = make()
    with_own, default = rows[2], rows[0]
    for margin in (0.5, 1.5, 4.0):
        arguments = replace(ARGUMENTS, margin=margin)
        loss = float(loss_of(model, [with_own], arguments)[0].detach())
        assert loss == pytest.approx(comparison_by_hand(model, with_own, margin=99.0), abs=1e-5)
        loss = float(loss_of(model, [default], arguments)[0].detach())
        assert loss == pytest.approx(comparison_by_hand(model, default, margin=margin), abs=1e-5)
    bare = EncodedComparison(replace(with_own.row, margin=None), with_own.examples)
    found, own = (float(loss_of(model, [item])[0].detach()) for item in (bare, with_own))
    assert abs(found - own) > 1e-3


@pytest.mark.parametrize(("mode", "most"), [("length_normalized", 1.0), ("sequence", None), ("sequence", 0.9)])
def test_importance_weights_follow_equation_8(make, tokenizer, mode, most):
    model = make(num_policies=4, num_alternates=2)
    comparison = with_alternates((3, 2), logprobs=(3, 2))
    (item,), _ = encode_comparisons([comparison], tokenizer, 64, 64)
    (item,) = with_logprobs([item], None)
    weights = []
    for ours, alternates in zip(comparison.logprobs, comparison.alt_logprobs, strict=True):
        ratios = [sum(ours) - sum(theirs) for theirs in alternates]
        if mode == "length_normalized":
            ratios = [r / len(ours) for r in ratios]
        weights.append([min(math.exp(r), most if most is not None else math.inf) for r in ratios])
    assert len({w for each in weights for w in each}) > 1
    arguments = replace(ARGUMENTS, weight_mode=mode, max_weight=most)
    loss, output, _ = loss_of(model, [item], arguments)
    assert float(loss.detach()) == pytest.approx(comparison_by_hand(model, item, weights=weights), rel=1e-5)
    assert float(output.sign_flip_share) == sum(sum(w) > 4 for w in weights) / 2


@pytest.mark.parametrize("cut", [1, 2, 3])
def test_shares_of_a_batch_with_the_global_count_sum_to_the_whole(make, rows, tokenizer, cut):
    model, arguments = make(), replace(ARGUMENTS, expected_coef=0.3)
    samples = [[encode(tokenizer, item.row.prompt, text) for text in ("ab", "c")] for item in rows[:3]]
    rows = [*(replace(item, samples=tuple(samples[i][: i % 2 + 1])) for i, item in enumerate(rows[:3])), *rows[3:]]
    whole, _, terms = loss_of(model, rows, arguments)
    shares = [loss_of(model, part, arguments, comparisons=4) for part in (rows[:cut], rows[cut:])]
    assert sum(float(loss.detach()) for loss, _, _ in shares) == pytest.approx(float(whole.detach()), abs=1e-5)
    errors = [float(part["expected_error"].detach()) for _, _, part in shares if part]
    assert sum(errors) == pytest.approx(float(terms["expected_error"].detach()), abs=1e-5)
    summed = torch.autograd.grad(shares[0][0] + shares[1][0], list(model.parameters()), allow_unused=True)
    wanted = torch.autograd.grad(whole, list(model.parameters()), allow_unused=True)
    for one, other in zip(summed, wanted, strict=True):
        assert (one is None) == (other is None)
        if one is not None:
            torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


# -- e(x) regressed on the policy's own samples (Eq. 7) ------------------------------------------------------------


def sampled(rows, tokenizer):
    texts = [("ab",), ("c", "zyx", ""), (), ("b", "q")]
    return [
        replace(item, samples=tuple(encode(tokenizer, item.row.prompt, t) for t in own))
        for item, own in zip(rows, texts, strict=True)
    ]


def test_the_regression_adds_its_coefficient_times_the_mean_square_error(make, rows, tokenizer):
    model, batch = make(), sampled(rows, tokenizer)
    wanted = 0.0
    for item in batch:
        if item.samples:
            mean = sum(heads(model, item.samples)[0]) / len(item.samples)
            wanted += (heads(model, item.examples[:1])[1][0] - mean) ** 2 / 4
    plain = float(loss_of(model, batch)[0].detach())
    for coefficient in (0.25, 2.0):
        loss, _, terms = loss_of(model, batch, replace(ARGUMENTS, expected_coef=coefficient))
        assert float(terms["expected_error"].detach()) == pytest.approx(wanted, abs=1e-5) and wanted > 1e-3
        assert float(loss.detach()) == pytest.approx(plain + coefficient * wanted, abs=1e-5)


def test_the_regression_does_not_train_the_reward(make, rows, tokenizer):
    model, batch = make(), sampled(rows, tokenizer)
    error = loss_of(model, batch, replace(ARGUMENTS, expected_coef=1.0))[2]["expected_error"]
    heads_of = [model.reward_head.weight, model.reward_head.bias, model.expected_head.weight, model.expected_head.bias]
    reward_weight, reward_bias, weight, bias = torch.autograd.grad(error, heads_of, allow_unused=True)
    assert reward_weight is None or not reward_weight.any()
    assert reward_bias is None or not reward_bias.any()
    assert float(weight.abs().max()) > 1e-3 and float(bias.abs().max()) > 1e-3


def test_a_reward_model_ignores_the_samples(make, rows, tokenizer):
    model = make("rm")
    with_samples, _, terms = loss_of(model, sampled(rows, tokenizer), replace(ARGUMENTS, expected_coef=5.0))
    assert not terms
    assert float(with_samples.detach()) == pytest.approx(float(loss_of(model, rows)[0].detach()), abs=1e-6)


def expectation_error(model, batch) -> float:
    """Mean square distance of e(x) from the mean reward of the prompt's samples."""
    errors = []
    for item in batch:
        if item.samples:
            mean = sum(heads(model, item.samples)[0]) / len(item.samples)
            errors.append((heads(model, item.examples[:1])[1][0] - mean) ** 2)
    return sum(errors) / len(errors)


def test_training_with_the_regression_brings_e_to_the_mean_reward(make, rows, tokenizer, one_process, tmp_path):
    batch = sampled(rows, tokenizer)
    arguments = ScorerArguments(
        learning_rate=2e-3, num_train_epochs=60, per_device_train_batch_size=2, gradient_accumulation_steps=2,
        warmup_ratio=0.0,
    )  # fmt: skip
    before = expectation_error(make(), batch)
    after = {}
    for coefficient in (0.0, 4.0):
        model, folder = make(), tmp_path / str(coefficient)
        settings = replace(arguments, expected_coef=coefficient)
        result = train_scorer(model, batch, quiet(scorer=settings), folder, seed=0)
        after[coefficient] = expectation_error(model.eval(), batch)
        curve = metric_lines(folder)
        assert len(curve) == result["steps"] == 60
        assert ("expected_error" in curve[0]) == (coefficient > 0)
        assert curve[-1]["loss"] == result["loss"] and curve[0]["loss"] > curve[-1]["loss"]
        assert curve[-1]["accuracy"] == 1.0
        saved = AdvantageModel.from_pretrained(folder)
        assert score_pairs(saved, batch) == score_pairs(model, batch)
    assert after[4.0] < 0.02 * before
    assert after[4.0] < 0.1 * after[0.0]


def test_pairs_are_scored_as_ppo_would(make, rows):
    model = make(num_policies=3, num_alternates=1)
    scores = score_pairs(model, rows)
    assert len(scores["chosen"]) == len(scores["rejected"]) == sum(len(item.row.pairs) for item in rows)
    assert scores["tasks"] == ["reverse"] * 7 + ["all"] * 3
    prompts = [item.row.prompt for item in rows for _ in item.row.pairs]
    assert len(set(prompts)) < len(prompts) == len(scores["prompts"])
    assert [prompts.index(p) for p in prompts] == [scores["prompts"].index(n) for n in scores["prompts"]]
    reward, expected = heads(model, rows[3].examples)
    wanted = [2 / 3 * (r - expected[0]) for r in reward]
    assert (scores["chosen"][-1], scores["rejected"][-1]) == pytest.approx((wanted[1], wanted[0]), abs=1e-5)


def test_a_scorer_stage_is_the_same_alone_and_after_others(tiny_model, tokenizer, one_process, tmp_path, monkeypatch):
    """The rounding of hidden states depends on their batch: here by much more than rounding."""
    right = Trunk.features
    monkeypatch.setattr(Trunk, "features", lambda self, batch: [f * (1 + 0.1 * len(batch)) for f in right(self, batch)])
    tiny_model(layers=2).save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    write_jsonl(tmp_path / "pairs.jsonl", [{"prompt": f"Say {a}", "chosen": a, "rejected": a + a} for a in "abcdefghi"])
    recipe = Recipe(report_to=[], scorer=ScorerArguments(num_trainable_layers=1, num_train_epochs=1))
    recipe.data.data_dir, recipe.data.pairs = str(tmp_path), ["pairs.jsonl"]
    recipe.data.test_fraction = recipe.data.judge_fraction = 0.3
    shared = FeatureCache()
    for split, name, cache in (("train", "rm", shared), ("judge", "after", shared), ("judge", "alone", FeatureCache())):
        run_scorer(recipe, "rm", str(tmp_path / "model"), None, tmp_path / name, cache=cache, split=split)
    for name in ("model.safetensors", "heads.safetensors", "scores.json"):
        assert (tmp_path / "after" / name).read_bytes() == (tmp_path / "alone" / name).read_bytes()
