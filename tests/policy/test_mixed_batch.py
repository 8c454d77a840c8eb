"""One mixed batch has the loss and the gradient of its parts computed one by one."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from stable_rlhf.data.encoding import Encoded
from stable_rlhf.models.features import FeatureCache
from stable_rlhf.models.policy import PolicyModel
from stable_rlhf.ops import PolicyLossConfig
from stable_rlhf.policy.experience import Experience
from stable_rlhf.policy.mixed_batch import IGNORED, POLICY, REHEARSAL, clipped_value_loss, mix, mixed_loss

CONFIG = PolicyLossConfig(clip_low=0.1, clip_high=0.3, entropy_coef=0.05, rehearsal_coef=0.7)
SETTINGS = {"temperature": 0.75, "cliprange_value": 0.25, "vf_coef": 0.4}
REHEARSED = [Encoded((9, 8, 7, 6, 5, 4, 11), 2), Encoded((12, 13, 2), 2)]


@pytest.fixture
def make(tiny_model):
    def build(architecture="llama", **settings):
        policy = PolicyModel(tiny_model(architecture).double(), value_head=True, **settings).double()
        generator = torch.Generator().manual_seed(5)
        with torch.no_grad():
            policy.value_head.weight.copy_(0.3 * torch.randn(policy.value_head.weight.shape, generator=generator))
        return policy

    return build


def rollouts(policy: PolicyModel) -> list[Experience]:
    """Rollouts whose old log-probs lie around the policy's, so that some ratios are clipped and some are not."""
    generator = torch.Generator().manual_seed(1)
    found = []
    for prompt, response in [((5, 6, 7), (8, 9, 10, 11, 2)), ((14,), (2,)), ((20, 21, 22, 23), (24, 25, 2))]:
        encoded = Encoded((*prompt, *response), len(prompt))
        with torch.no_grad():
            logprob, _, value = by_hand(policy, encoded, SETTINGS["temperature"])
        n = len(response)
        noise, advantage, shift, returns = torch.randn(4, n, generator=generator)
        features = None
        if policy.trunk.lower is not None:
            (features,) = policy.trunk.features([encoded.ids])
        found.append(
            Experience(
                encoded, 0.0, old_logprob=(logprob + 0.5 * noise).float(), ref_logprob=torch.zeros(n),
                value=(value + 0.5 * shift).float(), features=features, advantage=advantage, returns=returns,
            )
        )  # fmt: skip
    return found


def by_hand(policy: PolicyModel, example: Encoded, temperature: float):
    """(log-probs, entropies, values) of one sequence's response tokens, without padding and without the ops."""
    hidden = policy.trunk.backbone(torch.tensor([example.ids])).last_hidden_state[0]
    hidden = hidden[example.prompt_length - 1 : -1]
    log_p = (policy.head(hidden) / temperature).log_softmax(-1)
    taken = log_p.gather(1, torch.tensor(example.response)[:, None])[:, 0]
    return taken, -(log_p.exp() * log_p).sum(1), policy.value_head(hidden)[:, 0]


def parts_by_hand(policy: PolicyModel, experiences, rehearsal, config=CONFIG, temperature=0.75, cliprange_value=0.25):
    """Sums, not means: (PPO, rehearsal NLL, value loss), the number of policy tokens, and of clipped ones."""
    ppo = nll = critic = torch.zeros((), dtype=torch.float64)
    clipped = 0
    for e in experiences:
        logprob, entropy, value = by_hand(policy, e.encoded, temperature)
        for t in range(len(logprob)):
            ratio, a = (logprob[t] - e.old_logprob[t].double()).exp(), e.advantage[t].double()
            bounded = ratio.clamp(1 - config.clip_low, 1 + config.clip_high)
            clipped += int(bounded * a < ratio * a)
            ppo = ppo - torch.minimum(ratio * a, bounded * a) - config.entropy_coef * entropy[t]
            old, returns = e.value[t].double(), e.returns[t].double()
            near = old + (value[t] - old).clamp(-cliprange_value, cliprange_value)
            critic = critic + 0.5 * torch.maximum((value[t] - returns) ** 2, (near - returns) ** 2)
    for example in rehearsal:
        nll = nll - by_hand(policy, example, 1.0)[0].sum()
    return (ppo, nll, critic), sum(len(e.encoded.response) for e in experiences), clipped


def gradients(policy: PolicyModel, loss: torch.Tensor) -> dict[str, torch.Tensor]:
    policy.zero_grad(set_to_none=True)
    loss.backward()
    return {n: p.grad.clone() for n, p in policy.named_parameters() if p.grad is not None}


def run(policy, experiences, rehearsal, config=CONFIG, tokens=9, rehearsed=6, **changes):
    batch = mix(policy, experiences, rehearsal, FeatureCache())
    return mixed_loss(
        lambda *a, **k: policy(*a, **k), batch, config, policy_denominator=tokens, rehearsal_denominator=rehearsed,
        **{**SETTINGS, **changes},
    )  # fmt: skip


def assert_same_gradients(ours, wanted, atol=1e-6):
    assert ours.keys() == wanted.keys() and ours
    for name in ours:
        torch.testing.assert_close(ours[name], wanted[name], rtol=0, atol=atol, msg=name)


def test_a_mixed_batch_has_the_loss_and_gradient_of_its_parts(make, architecture):
    policy = make(architecture)
    experiences = rollouts(policy)
    (ppo, nll, critic), tokens, clipped = parts_by_hand(policy, experiences, REHEARSED)
    assert 0 < clipped < tokens == 9
    wanted = ppo / 9 + CONFIG.rehearsal_coef * nll / 6 + SETTINGS["vf_coef"] * critic / 9
    loss, metrics = run(policy, experiences, REHEARSED)
    assert float(loss.detach()) == pytest.approx(float(wanted.detach()), abs=1e-6)
    assert float(metrics["loss"]) == float(loss.detach())
    assert float(metrics["policy_loss"]) == pytest.approx(float(ppo.detach()) / 9, abs=1e-6)
    assert float(metrics["rehearsal_loss"]) == pytest.approx(float(nll.detach()) / 6, abs=1e-6)
    assert float(metrics["value_loss"]) == pytest.approx(float(critic.detach()) / 9, abs=1e-6)
    assert float(metrics["clip_fraction"]) == pytest.approx(clipped / 9)
    assert_same_gradients(gradients(policy, loss), gradients(policy, wanted))


def test_a_split_backbone_has_the_same_loss(make, architecture):
    whole, split = make(architecture), make(architecture, num_trainable_layers=1)
    loss, _ = run(whole, rollouts(whole), REHEARSED)
    again, _ = run(split, rollouts(split), REHEARSED)
    assert float(again.detach()) == pytest.approx(float(loss.detach()), abs=1e-6)
    found, full = gradients(split, again), gradients(whole, loss)
    assert {n.split(".")[1] for n in found if n.startswith("trunk.")} == {"upper"}
    blocks = {p for n in found for p in n.split(".") if p.isdigit()}
    assert blocks == {"0"} and not any(n.startswith("head.") for n in found)  # one block left, the head is frozen
    torch.testing.assert_close(found["value_head.weight"], full["value_head.weight"], rtol=0, atol=1e-6)


def test_rollouts_stand_first_and_every_number_beside_the_token_it_speaks_of(make):
    policy = make()
    experiences = rollouts(policy)
    batch = mix(policy, experiences, REHEARSED, FeatureCache())
    assert batch.kind.shape == batch.target.shape == batch.inputs["input_ids"].shape == (5, 8)
    examples = [*(e.encoded for e in experiences), *REHEARSED]
    for i, example in enumerate(examples):
        ours = POLICY if i < 3 else REHEARSAL
        for t in range(8):
            predicts = example.prompt_length <= t + 1 < len(example)
            assert batch.kind[i, t] == (ours if predicts else IGNORED)
            assert batch.target[i, t] == (example.ids[t + 1] if predicts else -100)
            for name in ("old_logprob", "advantage", "value", "returns"):
                wanted = 0.0
                if predicts and i < 3:
                    wanted = float(getattr(experiences[i], name)[t + 1 - example.prompt_length])
                assert float(getattr(batch, name)[i, t]) == wanted, (name, i, t)
        assert batch.inputs["input_ids"][i, : len(example)].tolist() == list(example.ids)
        assert int(batch.inputs["attention_mask"][i].sum()) == len(example)


def test_without_rehearsal_the_loss_is_ppo_and_critic(make):
    policy = make()
    experiences = rollouts(policy)
    (ppo, _, critic), _, _ = parts_by_hand(policy, experiences, [])
    batch = mix(policy, experiences, [], FeatureCache())
    assert REHEARSAL not in batch.kind
    loss, metrics = run(policy, experiences, [], rehearsed=1)
    assert float(loss.detach()) == pytest.approx(float((ppo / 9 + SETTINGS["vf_coef"] * critic / 9).detach()), abs=1e-6)
    assert float(metrics["rehearsal_loss"]) == 0


def test_rehearsal_rows_do_not_reach_the_critic(make):
    policy = make()
    loss, _ = run(policy, rollouts(policy), [], rehearsed=1)
    alone = gradients(policy, loss)["value_head.weight"]
    loss, _ = run(policy, rollouts(policy), REHEARSED)
    torch.testing.assert_close(gradients(policy, loss)["value_head.weight"], alone, rtol=0, atol=1e-12)


def test_temperature_applies_to_policy_rows_only(make):
    policy = make()
    experiences = rollouts(policy)
    found = {}
    for temperature in (0.5, 1.0, 2.0):
        _, metrics = run(policy, experiences, REHEARSED, temperature=temperature)
        (ppo, nll, _), _, _ = parts_by_hand(policy, experiences, REHEARSED, temperature=temperature)
        assert float(metrics["policy_loss"]) == pytest.approx(float(ppo.detach()) / 9, abs=1e-6)
        assert float(metrics["rehearsal_loss"]) == pytest.approx(float(nll.detach()) / 6, abs=1e-6)
        found[temperature] = (float(metrics["policy_loss"]), float(metrics["rehearsal_loss"]))
    assert len({policy for policy, _ in found.values()}) == 3
    assert len({rehearsal for _, rehearsal in found.values()}) == 1


def test_halves_with_the_global_denominators_sum_to_the_whole(make, architecture):
    policy = make(architecture)
    experiences = rollouts(policy)
    whole, metrics = run(policy, experiences, REHEARSED)
    halves = [
        run(policy, experiences[:2], REHEARSED[:1]),
        run(policy, experiences[2:], REHEARSED[1:]),
    ]
    assert sum(float(loss.detach()) for loss, _ in halves) == pytest.approx(float(whole.detach()), abs=1e-6)
    for name, value in metrics.items():
        together = max if name == "max_log_ratio" else sum
        assert together(float(m[name]) for _, m in halves) == pytest.approx(float(value), abs=1e-6), name
    summed = gradients(policy, halves[0][0] + halves[1][0])
    assert_same_gradients(summed, gradients(policy, whole))


def test_the_coefficient_scales_the_rehearsal_gradient_alone(make):
    policy = make()
    experiences = rollouts(policy)
    by_coefficient = []
    for coefficient in (0.0, 1.0, 2.0):
        loss, _ = run(policy, experiences, REHEARSED, config=replace(CONFIG, rehearsal_coef=coefficient))
        by_coefficient.append(gradients(policy, loss)["head.weight"])
    zero, one, two = by_coefficient
    assert float((one - zero).abs().max()) > 1e-3
    torch.testing.assert_close(two - zero, 2 * (one - zero), rtol=0, atol=1e-9)


@pytest.mark.parametrize(
    ("value", "old", "returns", "loss", "slope"),
    [
        (1.1, 1.0, 2.0, 0.5 * 0.9**2, -0.9),  # inside the clip: the plain square
        (1.5, 1.0, 2.0, 0.5 * 0.8**2, 0.0),  # past the clip on the way to the return: the clipped value counts
        (0.5, 1.0, 2.0, 0.5 * 1.5**2, -1.5),  # past it on the way away: the square pulls back
        (0.5, 1.0, 0.0, 0.5 * 0.8**2, 0.0),  # and the same below
        (1.5, 1.0, 0.0, 0.5 * 1.5**2, 1.5),
    ],
)
def test_the_value_loss_is_clipped_on_both_sides(value, old, returns, loss, slope):
    v = torch.tensor(value, dtype=torch.float64, requires_grad=True)
    found = clipped_value_loss(v, torch.tensor(old, dtype=torch.float64), torch.tensor(returns).double(), 0.2)
    found.backward()
    assert float(found.detach()) == pytest.approx(loss, abs=1e-12)
    assert float(v.grad) == pytest.approx(slope, abs=1e-12)


def test_each_terms_gradient_is_measured_in_the_one_backward_pass(make, architecture):
    """By the hidden states, without the critic's part: those of the two terms by hand, a backward pass each."""
    policy = make(architecture)
    experiences = rollouts(policy)
    batch = mix(policy, experiences, REHEARSED, FeatureCache())
    loss, _ = mixed_loss(policy, batch, CONFIG, policy_denominator=9, rehearsal_denominator=6, **SETTINGS)
    assert batch.squares is None
    loss.backward()
    states = []
    hook = policy.trunk.backbone.register_forward_hook(lambda _, __, output: states.append(output.last_hidden_state))
    (ppo, nll, _), tokens, _ = parts_by_hand(policy, experiences, REHEARSED)
    hook.remove()
    assert tokens == 9
    for measured, term, first in ((0, ppo / 9, 0), (1, CONFIG.rehearsal_coef * nll / 6, len(experiences))):
        own = states[first : first + (len(REHEARSED) if measured else len(experiences))]
        pulls = torch.autograd.grad(term, own, retain_graph=True)
        wanted = sum(float(pull.square().sum()) for pull in pulls)
        assert float(batch.squares[measured]) == pytest.approx(wanted, rel=1e-5) and wanted > 1e-8
