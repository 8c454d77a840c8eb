"""advantage_loss and advantage_score against a float64 loop over pairs and tokens."""

from __future__ import annotations

import math

import pytest
import torch

import stable_rlhf.ops as ops
from stable_rlhf.ops.backends import extension


def log_sigmoid(x: float) -> float:
    return -math.log1p(math.exp(-x)) if x > 0 else x - math.log1p(math.exp(x))


def naive_log_weights(logprob, alt_logprob, lengths, mode, max_weight):
    """[R][K] log weights from lists of token log-probabilities."""
    rows, start = [], 0
    for length in lengths:
        row = []
        for alternate in alt_logprob:
            total = math.fsum(logprob[t] - alternate[t] for t in range(start, start + length))
            if mode == "length_normalized" and length:
                total /= length
            row.append(total if max_weight is None else min(total, math.log(max_weight)))
        rows.append(row)
        start += length
    return rows


def naive_scores(reward, e, log_weights, n, k):
    """Eq. 8, response by response."""
    scores = []
    for i, r in enumerate(reward):
        a = r - (n - k) / n * e[i]
        for j in range(k):
            a -= math.exp(log_weights[i][j]) * r / n if log_weights is not None else r / n
        scores.append(a)
    return scores


def make_alternates(responses, k, seed=0, deviation=0.3):
    g = torch.Generator().manual_seed(seed)
    lengths = torch.randint(1, 9, (responses,), generator=g)
    tokens = int(lengths.sum())
    logprob = -2.0 * torch.rand(tokens, generator=g)
    alternates = logprob + deviation * torch.randn(k, tokens, generator=g)
    return logprob, alternates, torch.cat([torch.zeros(1, dtype=torch.int64), lengths.cumsum(0)]), lengths.tolist()


@pytest.mark.parametrize("mode", ["length_normalized", "sequence"])
@pytest.mark.parametrize("max_weight", [1.0, 3.0, None])
@pytest.mark.parametrize(("k", "n"), [(1, 2), (3, 4), (2, 2), (2, 7)])
def test_everything_against_naive(mode, max_weight, k, n):
    g = torch.Generator().manual_seed(k * 10 + n)
    pairs = torch.tensor([[0, 1], [2, 1], [0, 2], [3, 4]])
    prompt = torch.tensor([0, 0, 0, 1, 1])
    reward, expected = 3 * torch.randn(5, generator=g), torch.randn(2, generator=g)
    margin = torch.tensor([2.0, 2.0, 2.0, 0.7, 0.7])
    rank_margin, smoothing = torch.tensor([0.1, 0.4, 0.0, 1.0]), torch.tensor([0.0, 0.2, 0.5, 1.0])
    weight = torch.tensor([1 / 3, 1 / 3, 1 / 3, 1.0])
    logprob, alternates, cu_seqlens, lengths = make_alternates(5, k)

    log_w = naive_log_weights(logprob.tolist(), alternates.tolist(), lengths, mode, max_weight)
    e = [float(expected[p]) for p in prompt]
    a = naive_scores(reward.tolist(), e, log_w, n, k)
    terms = [0.0, 0.0, 0.0]
    violations = right = 0.0
    for i, (c, r) in enumerate(pairs.tolist()):
        delta = a[c] - a[r]
        shifted, alpha, w = delta - float(rank_margin[i]), float(smoothing[i]), float(weight[i])
        terms[0] -= w * ((1 - alpha) * log_sigmoid(shifted) + alpha * log_sigmoid(-shifted)) / 4
        terms[1] -= w * log_sigmoid(float(margin[c]) - a[c]) / 4
        terms[2] -= w * log_sigmoid(float(margin[r]) + a[r]) / 4
        violations += ((a[c] > float(margin[c])) + (a[r] < -float(margin[r]))) / 8
        right += (1.0 if delta > 0 else 0.5 if delta == 0 else 0.0) / 4
    sizes = []
    for j in range(k):
        w = [math.exp(row[j]) for row in log_w]
        sizes.append(sum(w) ** 2 / sum(x * x for x in w))

    out = ops.advantage_loss(
        reward, expected, pairs=pairs, prompt=prompt, margin=margin, rank_margin=rank_margin,
        label_smoothing=smoothing, num_policies=n, logprob=logprob, alt_logprob=alternates, cu_seqlens=cu_seqlens,
        weight_mode=mode, max_weight=max_weight, pair_weight=weight,
    )  # fmt: skip
    assert out.score.tolist() == pytest.approx(a, rel=1e-5, abs=1e-6)
    assert [float(t) for t in (out.ranking_loss, out.upper_bound_loss, out.lower_bound_loss)] == pytest.approx(
        terms, rel=1e-5
    )
    assert float(out.loss) == pytest.approx(sum(terms), rel=1e-5)
    assert float(out.accuracy) == pytest.approx(right)
    assert float(out.bound_violation_share) == pytest.approx(violations)
    assert float(out.effective_sample_size) == pytest.approx(sum(sizes) / k, rel=1e-5)
    flips = sum(sum(math.exp(x) for x in row) > n for row in log_w) / 5
    assert float(out.sign_flip_share) == pytest.approx(flips)


def test_gradients_with_weights_held_fixed():
    g = torch.Generator().manual_seed(4)
    reward = torch.randn(6, generator=g, dtype=torch.float64).requires_grad_()
    expected = torch.randn(3, generator=g, dtype=torch.float64).requires_grad_()
    logprob, alternates, cu_seqlens, _ = make_alternates(6, 2)
    logprob.requires_grad_()

    def loss(r, e):
        return ops.advantage_loss(
            r, e, logprob=logprob, alt_logprob=alternates, cu_seqlens=cu_seqlens, label_smoothing=0.1, rank_margin=0.3
        ).loss

    assert torch.autograd.gradcheck(loss, (reward, expected))
    loss(reward, expected).backward()
    assert logprob.grad is None
    assert not ops.advantage_loss(reward, expected).score.requires_grad


def test_defaults_first_half_against_second_and_pair_i_has_prompt_i():
    reward, expected = torch.tensor([1.0, 2.0, 0.5, 3.0]), torch.tensor([0.2, -0.4])
    out = ops.advantage_loss(reward, expected)
    assert out.score.tolist() == pytest.approx([0.8, 2.4, 0.3, 3.4])
    assert float(out.accuracy) == 0.5
    a = [0.8, 2.4, 0.3, 3.4]
    want = -sum(log_sigmoid(a[i] - a[i + 2]) + log_sigmoid(2.5 - a[i]) + log_sigmoid(2.5 + a[i + 2]) for i in range(2))
    assert float(out.loss) == pytest.approx(want / 2)
    assert float(out.effective_sample_size) == 4.0 and float(out.sign_flip_share) == 0.0
    swapped = ops.advantage_loss(reward, expected, pairs=torch.tensor([[2, 0], [1, 3]]))
    assert float(swapped.accuracy) == 0.0


def test_plain_reward_model():
    reward = torch.tensor([1.0, 2.0, 0.5, 3.0], dtype=torch.float64, requires_grad=True)
    out = ops.advantage_loss(reward, margin=None)
    out.loss.backward()
    assert float(out.loss.detach()) == pytest.approx(-(log_sigmoid(0.5) + log_sigmoid(-1.0)) / 2, rel=1e-14)
    slope = [-(1 - 1 / (1 + math.exp(-0.5))) / 2, -(1 - 1 / (1 + math.exp(1.0))) / 2]
    assert reward.grad.tolist() == pytest.approx([*slope, -slope[0], -slope[1]], rel=1e-12)
    assert float(out.upper_bound_loss) == float(out.lower_bound_loss) == float(out.bound_violation_share) == 0.0
    assert torch.equal(out.score, reward.detach())


@pytest.mark.parametrize("margin", [2.5, 1.0])
def test_free_scores_settle_at_a_third_of_the_margin(margin):
    """The closed form: with a_c = -a_r = a free, the loss is least at a = m / 3 (0.8333 for m = 2.5)."""
    a = torch.zeros(1, dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.LBFGS([a], max_iter=100, tolerance_grad=1e-12, tolerance_change=1e-14)

    def closure():
        optimizer.zero_grad()
        loss = ops.advantage_loss(torch.cat([a, -a]), margin=margin).loss
        loss.backward()
        return loss

    optimizer.step(closure)
    assert float(a.detach()) == pytest.approx(margin / 3, abs=1e-6)


def test_ranking_expected_cancels_in_the_ranking_term():
    reward = torch.randn(4, dtype=torch.float64)
    expected = torch.tensor([0.3, -2.0], dtype=torch.float64, requires_grad=True)
    out = ops.advantage_loss(reward, expected, margin=None)
    out.loss.backward()
    assert expected.grad.tolist() == pytest.approx([0.0, 0.0], abs=1e-15)


@pytest.mark.parametrize("n_responses", [2, 4, 5])
def test_pairs_of_a_ranking_weighted_by_their_number(n_responses):
    """All n (n - 1) / 2 pairs, each response scored once; a weight of 1 / (n choose 2) divides the loss by it."""
    reward = torch.randn(n_responses, dtype=torch.float64)
    pairs = torch.combinations(torch.arange(n_responses))
    m = pairs.shape[0]
    weighted = ops.advantage_loss(reward, pairs=pairs, pair_weight=torch.full((m,), 1.0 / m, dtype=torch.float64))
    plain = ops.advantage_loss(reward, pairs=pairs)
    assert float(weighted.loss) == pytest.approx(float(plain.loss) / m, rel=1e-12)


def test_two_thousand_tokens_at_minus_eight_keep_their_weights():
    """exp(-16000) underflows in any float; the weights must not."""
    tokens = 2000
    logprob = torch.full((2 * tokens,), -8.0)
    alternates = torch.stack([logprob + 0.25 / tokens, logprob - 0.5])
    cu_seqlens = torch.tensor([0, tokens, 2 * tokens])
    reward = torch.tensor([1.0, 1.0])
    given = {"logprob": logprob, "alt_logprob": alternates, "cu_seqlens": cu_seqlens}
    clamped = ops.advantage_score(reward, **given)
    w1 = float((logprob - alternates[0]).double().mean().exp())
    assert clamped.tolist() == pytest.approx([1 - (w1 + 1.0) / 3] * 2, rel=1e-6)
    sequence = ops.advantage_score(reward, weight_mode="sequence", **given)
    w1 = float((logprob - alternates[0]).double()[:tokens].sum().exp())
    assert 0.7 < w1 < 0.9 and sequence.tolist() == pytest.approx([1 - (w1 + 1.0) / 3] * 2, rel=1e-6)
    with pytest.raises(ValueError, match=r"logprob: response 0 .* overflows; set max_weight"):
        ops.advantage_score(reward, weight_mode="sequence", max_weight=None, **given)


def test_default_weights_cannot_flip_a_sign_and_the_paper_s_can():
    logprob, alternates, cu_seqlens, _ = make_alternates(40, 4, deviation=1.5)
    given = {"logprob": logprob, "alt_logprob": alternates, "cu_seqlens": cu_seqlens}
    reward = torch.ones(40)
    safe = ops.advantage_loss(reward, **given)
    assert float(safe.sign_flip_share) == 0.0 and bool((safe.score > 0).all())
    paper = ops.advantage_loss(reward, weight_mode="sequence", max_weight=None, **given)
    assert float(paper.sign_flip_share) == pytest.approx(float((paper.score < 0).float().mean())) and (
        float(paper.sign_flip_share) > 0.2
    )
    assert float(paper.effective_sample_size) < float(safe.effective_sample_size)


def test_an_empty_response_has_weight_one():
    score = ops.advantage_score(
        torch.tensor([2.0, 2.0]),
        logprob=torch.tensor([-1.0]),
        alt_logprob=torch.tensor([[-0.5]]),
        cu_seqlens=torch.tensor([0, 0, 1]),
    )
    assert score.tolist() == pytest.approx([2.0 * (1 - 1 / 2), 2.0 * (1 - math.exp(-0.5) / 2)])


def test_score_without_alternates_is_scaled_by_n_and_k():
    reward, expected = torch.tensor([1.0, 3.0, -1.0]), torch.tensor([0.5, 1.0])
    prompt = torch.tensor([1, 0, 1])
    score = ops.advantage_score(reward, expected, prompt=prompt, num_policies=5, num_alternates=4)
    assert score.tolist() == pytest.approx([0.0, 0.5, -0.4])
    assert ops.advantage_score(reward, expected, prompt=prompt).tolist() == pytest.approx([0.0, 2.5, -2.0])
    assert torch.equal(ops.advantage_score(reward), reward)
    same = torch.zeros(4)  # alternates equal to the policy: all weights are 1
    exact = ops.advantage_score(
        reward, expected, prompt=prompt, num_policies=3, logprob=same, alt_logprob=torch.zeros(2, 4),
        cu_seqlens=torch.tensor([0, 1, 2, 4]),
    )  # fmt: skip
    by_count = ops.advantage_score(reward, expected, prompt=prompt, num_policies=3, num_alternates=2)
    torch.testing.assert_close(exact, by_count)


def test_score_is_differentiable():
    reward = torch.randn(3, dtype=torch.float64, requires_grad=True)
    expected = torch.randn(3, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda r, e: ops.advantage_score(r, e, num_policies=3, num_alternates=1),
                                    (reward, expected))  # fmt: skip


def test_extreme_scores_keep_the_loss_finite():
    reward = torch.tensor([1e4, -1e4, -1e4, 1e4], requires_grad=True)
    out = ops.advantage_loss(reward)
    out.loss.backward()
    # The right pair (1e4, -1e4): 0 + (1e4 - 2.5) twice. The wrong one: 2e4, and nothing from its bounds.
    assert float(out.loss.detach()) == pytest.approx((2 * (1e4 - 2.5) + 2e4) / 2, rel=1e-6)
    assert torch.isfinite(reward.grad).all()


def test_low_precision_rewards_are_computed_in_float32():
    reward = torch.tensor([1.0, 0.5], dtype=torch.bfloat16, requires_grad=True)
    out = ops.advantage_loss(reward, torch.tensor([0.25], dtype=torch.bfloat16))
    out.loss.backward()
    want = -(log_sigmoid(0.5) + log_sigmoid(2.5 - 0.75) + log_sigmoid(2.5 + 0.25))
    assert out.loss.dtype == torch.float32 and float(out.loss.detach()) == pytest.approx(want, rel=1e-6)
    assert reward.grad.dtype == torch.bfloat16


def test_ties_count_half():
    assert float(ops.advantage_loss(torch.tensor([1.0, 2.0, 1.0, 1.0])).accuracy) == 0.75


def test_no_pairs():
    reward = torch.zeros(0, requires_grad=True)
    out = ops.advantage_loss(reward, torch.zeros(0))
    out.loss.backward()
    assert float(out.loss) == 0.0


ALT = {"logprob": torch.zeros(4), "alt_logprob": torch.zeros(2, 4), "cu_seqlens": torch.tensor([0, 1, 2, 3, 4])}
BAD = [
    ({"reward": torch.zeros(2, 2)}, "reward: shape"),
    ({"reward": torch.tensor([0.0, math.nan, 0.0, 0.0])}, "reward: non-finite value nan at position 1"),
    ({"reward": torch.zeros(4, dtype=torch.int64)}, "reward: type int64"),
    ({"reward": torch.zeros(3)}, "pairs: required for an odd"),
    ({"expected": torch.zeros(3)}, "expected: 3 values for 2 pairs"),
    ({"expected": torch.full((2,), math.inf)}, "expected: non-finite"),
    ({"expected": torch.zeros(2, device="meta")}, "expected: on device meta"),
    ({"pairs": torch.tensor([0, 1])}, "pairs: shape"),
    ({"pairs": torch.tensor([[0, 4]])}, r"pairs: 4 is outside \[0, 4\)"),
    ({"pairs": torch.tensor([[0.0, 1.0]])}, "pairs: type float32"),
    ({"pairs": torch.tensor([[0, 1], [0, 2]]), "expected": torch.zeros(2)}, "prompt: required unless"),
    ({"prompt": torch.tensor([0, 1, 2, 0]), "expected": torch.zeros(2)}, r"prompt: 2 is outside \[0, 2\)"),
    ({"prompt": torch.tensor([0, 1]), "expected": torch.zeros(2)}, "prompt: shape"),
    ({"prompt": torch.tensor([0, 1, 0, 1])}, "prompt: given without expected"),
    ({"margin": torch.zeros(2)}, "margin: shape"),
    ({"rank_margin": torch.zeros(3)}, "rank_margin: shape"),
    ({"label_smoothing": 1.5}, r"label_smoothing: has values outside \[0, 1\]"),
    ({"pair_weight": math.nan}, "pair_weight: non-finite"),
    ({"num_policies": 0}, "num_policies: N = 0"),
    ({**ALT, "num_policies": 1}, "num_policies: N = 1"),
    ({**ALT, "logprob": None}, "logprob: required with alt_logprob"),
    ({**ALT, "cu_seqlens": None}, "cu_seqlens: required with alt_logprob"),
    ({"logprob": torch.zeros(4)}, "logprob: given without alt_logprob"),
    ({**ALT, "alt_logprob": torch.zeros(2, 3)}, "alt_logprob: shape"),
    ({**ALT, "alt_logprob": torch.full((2, 4), math.nan)}, "alt_logprob: non-finite"),
    ({**ALT, "cu_seqlens": torch.tensor([0, 1, 2, 4])}, "cu_seqlens: 4 entries instead of 5"),
    ({**ALT, "cu_seqlens": torch.tensor([0, 1, 2, 3, 5])}, "cu_seqlens: runs from 0 to 5"),
    ({**ALT, "cu_seqlens": torch.tensor([0, 2, 1, 3, 4])}, "cu_seqlens: decreases after entry 1"),
    ({**ALT, "weight_mode": "token"}, "weight_mode: 'token'"),
    ({**ALT, "max_weight": 0.0}, "max_weight: 0.0"),
    ({**ALT, "logprob": torch.tensor([0.0, 0.0, math.inf, 0.0])}, "logprob: non-finite value inf at position 2"),
    ({"label_smoothing": torch.tensor([0.0, -0.1])}, r"label_smoothing: has values outside"),
    ({"margin": torch.tensor([1.0, math.inf, 1.0, 1.0])}, "margin: non-finite value inf at position 1"),
    ({"rank_margin": torch.tensor([math.nan, 0.0])}, "rank_margin: non-finite"),
    ({"prompt": torch.tensor([0, 1, 0, 1]), "expected": torch.zeros(2), "pairs": torch.tensor([[0, -1]])}, "pairs: -1"),
]


@pytest.mark.parametrize("backend", ["cpu", "torch"])
@pytest.mark.parametrize(("changes", "message"), BAD, ids=[b[1] for b in BAD])
def test_bad_arguments(changes, message, backend):
    if backend == "cpu" and extension() is None:
        pytest.skip("installed without the C++ module")
    with pytest.raises(ValueError, match=message), ops.backend(backend):
        ops.advantage_loss(**{"reward": torch.arange(4.0), **changes})


def test_bad_arguments_of_the_score():
    with pytest.raises(ValueError, match="expected: 2 values for 3 responses"):
        ops.advantage_score(torch.zeros(3), torch.zeros(2))
    with pytest.raises(ValueError, match="num_alternates: 3, but alt_logprob holds 2"):
        ops.advantage_score(torch.zeros(4), num_alternates=3, **ALT)
    with pytest.raises(ValueError, match="num_alternates: -1"):
        ops.advantage_score(torch.zeros(4), num_alternates=-1)
