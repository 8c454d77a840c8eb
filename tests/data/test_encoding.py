"""Packing: the tokens of a micro-batch end to end, no sequence seeing another."""

from __future__ import annotations

import pytest
import torch

from stable_rlhf.data.encoding import pad_sequences
from stable_rlhf.models.policy import PolicyModel
from stable_rlhf.models.trunk import Trunk

SEQUENCES = [[3, 4, 5, 6, 7, 8], [9], [9, 8, 7], [5, 6, 7, 8, 9, 10, 11, 12], [4]]


def packed(model, layers=None) -> Trunk:
    trunk = Trunk(model.base_model, num_trainable_layers=layers)
    trunk.pack()
    return trunk


@torch.no_grad()
@pytest.mark.parametrize("place", range(len(SEQUENCES)))
def test_a_neighbour_changes_nothing_to_the_bit(tiny_model, place):
    trunk = packed(tiny_model())
    hidden = trunk(**trunk.inputs(SEQUENCES))
    others = [s if i == place else [20 - t for t in s] for i, s in enumerate(SEQUENCES)]
    changed = trunk(**trunk.inputs(others))
    mask = trunk.inputs(SEQUENCES)["attention_mask"].bool()
    assert torch.equal(changed[place], hidden[place])
    for i in set(range(len(SEQUENCES))) - {place}:
        assert not torch.allclose(changed[i][mask[i]], hidden[i][mask[i]])


@torch.no_grad()
@pytest.mark.parametrize("layers", [None, 1])
@pytest.mark.parametrize("side", ["right", "left"])
def test_packed_hidden_states_equal_padded_ones(tiny_model, layers, side):
    model = tiny_model()
    trunk = Trunk(model.base_model, num_trainable_layers=layers)
    inputs = trunk.inputs(SEQUENCES, side=side)
    mask = inputs["attention_mask"].bool()
    padded = trunk(**inputs)
    trunk.pack()
    hidden = trunk(**inputs)
    assert hidden.shape == padded.shape and (hidden[~mask] == 0).all()
    torch.testing.assert_close(hidden[mask], padded[mask], rtol=0, atol=5e-6)


@torch.no_grad()
def test_a_pack_equals_its_sequences_alone(tiny_model):
    trunk = packed(tiny_model())
    hidden = trunk(**trunk.inputs(SEQUENCES))
    for i, sequence in enumerate(SEQUENCES):
        alone = trunk(**trunk.inputs([sequence]))[0]
        torch.testing.assert_close(hidden[i, : len(sequence)], alone, rtol=0, atol=5e-6)


def test_gradients_equal_padded_ones_and_padding_is_not_computed(tiny_model, monkeypatch):
    found, widths = [], []
    for packing in (False, True):
        policy = PolicyModel(tiny_model(), value_head=True)
        if packing:
            policy.trunk.pack()
        forward = type(policy.trunk.upper).forward

        def spy(self, *args, forward=forward, **kwargs):
            widths.append(kwargs["input_ids"].numel())
            return forward(self, *args, **kwargs)

        with monkeypatch.context() as patched:
            patched.setattr(type(policy.trunk.upper), "forward", spy)
            result = policy(policy.trunk.inputs(SEQUENCES), pad_sequences(SEQUENCES, pad_token_id=-100).input_ids)
        (result["logprob"].sum() + result["value"].square().sum()).backward()
        found.append([p.grad for p in policy.parameters() if p.grad is not None])
    assert widths == [5 * 8, 6 + 1 + 3 + 8 + 1]
    assert len(found[0]) == len(found[1]) > 10
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=2e-5)


def test_the_reference_packs_as_its_policy_does(tiny_model):
    policy = PolicyModel(tiny_model())
    policy.trunk.pack()
    assert policy.reference().trunk.packing


def test_a_model_without_positions_is_refused(tiny_model):
    with pytest.raises(ValueError, match=r"engine\.packing: a bloom model takes no positions"):
        packed(tiny_model("bloom"))
