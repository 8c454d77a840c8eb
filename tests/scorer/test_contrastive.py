"""The contrastive module against the paper's formulas in float64, row by row."""

from __future__ import annotations

import math

import pytest
import torch

from stable_rlhf.scorer.contrastive import Contrastive

WIDTH = 6


def module(**changed) -> Contrastive:
    settings = {"num_prototypes": 0, "differences": False, "temperature": 0.3, "seed": 1, **changed}
    return Contrastive(WIDTH, **settings)


def batch(responses: int = 5, p: float = 0.25) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(responses)
    features = torch.randn(responses, WIDTH, generator=generator)
    views = (torch.rand(2, responses, WIDTH, generator=generator) >= p) / (1 - p)
    pairs = torch.tensor([(i, i + 1) for i in range(responses - 1)])
    return features, views, pairs


def cosine(a: torch.Tensor, b: torch.Tensor) -> float:
    return float(a.double() @ b.double()) / math.sqrt(float(a.double() @ a.double()) * float(b.double() @ b.double()))


def rows_of(features, views, pairs, differences) -> list[list[torch.Tensor]]:
    """The rows of both views, by hand."""
    found = []
    for view in views:
        f = [features[i].double() * view[i].double() for i in range(len(features))]
        better_first = [f[b] - f[w] for b, w in pairs.tolist()]
        found.append(better_first + [-d for d in better_first] if differences else f)
    return found


@pytest.mark.parametrize("differences", [False, True])
@pytest.mark.parametrize("responses", [2, 5])
def test_simcse_row_by_row(differences, responses):
    features, views, pairs = batch(responses)
    a, b = rows_of(features, views, pairs, differences)
    wanted = 0.0
    for i, row in enumerate(a):
        logits = [cosine(row, other) / 0.3 for other in b]
        wanted -= (logits[i] - math.log(sum(map(math.exp, logits)))) / len(a)
    found = module(differences=differences)(features, views, pairs)
    assert float(found) == pytest.approx(wanted, abs=1e-5) and wanted > 1e-3


@pytest.mark.parametrize("differences", [False, True])
def test_swav_is_the_operation_on_these_rows_and_trains_its_prototypes(differences):
    from stable_rlhf import ops

    features, views, pairs = batch()
    contrastive = module(num_prototypes=4, differences=differences)
    assert contrastive.prototypes.norm(dim=1).tolist() == pytest.approx([1.0] * 4)
    features.requires_grad_()
    loss = contrastive(features, views, pairs)
    a, b = (torch.stack(rows) for rows in rows_of(features.detach(), views, pairs, differences))
    with ops.backend("torch"):
        wanted = ops.swav_loss(a, b, contrastive.prototypes.detach().double(), temperature=0.3)
    assert float(loss.detach()) == pytest.approx(float(wanted), abs=1e-5)
    loss.backward()
    assert float(contrastive.prototypes.grad.norm()) > 1e-3 and float(features.grad.norm()) > 1e-3


def test_the_length_of_a_prototype_does_not_count():
    features, views, pairs = batch()
    contrastive = module(num_prototypes=4).requires_grad_(False)
    first = contrastive(features, views, pairs)
    with torch.no_grad():
        contrastive.prototypes *= torch.tensor([[0.1], [3.0], [7.0], [1.0]])
    assert float(contrastive(features, views, pairs)) == pytest.approx(float(first), abs=1e-6)


@pytest.mark.parametrize("prototypes", [0, 20])
@pytest.mark.parametrize("differences", [False, True])
def test_one_pair_alone_and_responses_with_equal_features(prototypes, differences):
    features, views, pairs = batch(2, p=0.0)
    contrastive = module(num_prototypes=prototypes, differences=differences)
    for given in (features, features[:1].expand(2, -1).clone()):  # differences of 0
        given.requires_grad_()
        loss = contrastive(given, views, pairs)
        loss.backward()
        assert torch.isfinite(loss) and torch.isfinite(given.grad).all()


def test_features_in_half_precision_are_compared_in_float32():
    features, views, pairs = batch()
    contrastive = module(num_prototypes=4).requires_grad_(False).to(torch.bfloat16)
    loss = contrastive(features.to(torch.bfloat16), views, pairs)
    assert loss.dtype == torch.float32
    contrastive.float()
    assert float(loss) == pytest.approx(float(contrastive(features.to(torch.bfloat16).float(), views, pairs)), abs=1e-6)
