"""train-scorer with a contrastive term: defaults, masks, batches that are cut, what is saved, and resuming."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from helpers.files import metric_lines
from helpers.recipes import quiet
from stable_rlhf.data.encoding import encode
from stable_rlhf.data.records import Comparison
from stable_rlhf.run.bounds import check
from stable_rlhf.scorer import AdvantageModel, ScorerSettings
from stable_rlhf.scorer.comparisons import EncodedComparison
from stable_rlhf.scorer.train import contrastive_term, scorer_loss, train_scorer
from stable_rlhf.settings.recipe import CheckpointArguments, EngineArguments, Recipe
from stable_rlhf.settings.stages import ScorerArguments

METHODS = [("simcse", "responses"), ("simcse", "differences"), ("swav", "responses"), ("swav", "differences")]
TRAINING = ScorerArguments(
    learning_rate=2e-3, num_train_epochs=4, per_device_train_batch_size=2, gradient_accumulation_steps=2,
    warmup_ratio=0.0, contrastive_dropout=0.2,
)  # fmt: skip


@pytest.fixture
def rows(tokenizer) -> list[EncodedComparison]:
    comparisons = [
        Comparison("Reverse the letters of abcd", ("dcba", "abcd"), ((0, 1),)),
        Comparison("Write backwards: xyz", ("zyx", "zy", "x"), ((0, 1), (0, 2), (1, 2))),
        Comparison("Count the letters of qq", ("2", "3"), ((0, 1),)),
        Comparison("Give the last letter of ab", ("a", "b"), ((1, 0),)),
    ]
    return [EncodedComparison(c, [encode(tokenizer, c.prompt, r) for r in c.responses]) for c in comparisons]


@pytest.fixture
def make(tiny_model, tokenizer):
    def build(objective="rm"):
        return AdvantageModel(tiny_model().base_model, tokenizer, ScorerSettings(objective=objective))

    return build


@pytest.mark.parametrize(
    ("method", "on", "coefficient", "temperature", "prototypes"),
    [
        ("simcse", "responses", 1.0, 0.05, None), ("simcse", "differences", 1.0, 0.05, None),
        ("swav", "responses", 0.1, 0.1, 50), ("swav", "differences", 0.5, 0.1, 20),
    ],
)  # fmt: skip
def test_unset_settings_are_the_papers_and_given_ones_win(make, method, on, coefficient, temperature, prototypes):
    arguments = ScorerArguments(contrastive=method, contrastive_on=on)
    given = replace(arguments, contrastive_coef=0.0, contrastive_temperature=0.7, swav_prototypes=3)
    for settings, wanted in (
        (arguments, (coefficient, temperature, prototypes)), (given, (0.0, 0.7, prototypes and 3)),
    ):  # fmt: skip
        model = make()
        term = contrastive_term(model, settings, 0)
        module = model.contrastive
        assert (term.coefficient, module.temperature) == wanted[:2] and module.differences == (on == "differences")
        assert (None if module.prototypes is None else len(module.prototypes)) == wanted[2]
    model = make()
    assert contrastive_term(model, ScorerArguments(), 0) is None and model.contrastive is None


def test_masks_follow_from_seed_step_and_place(make):
    term = contrastive_term(make(), ScorerArguments(contrastive="simcse", contrastive_dropout=0.25), 5)
    _, views = term.views(3, [0, 1], [2, 3])
    assert views.shape == (2, 5, 32) and views.unique().tolist() == pytest.approx([0.0, 1 / 0.75])
    assert 0.15 < float((views == 0).float().mean()) < 0.35
    assert torch.equal(torch.cat([term.views(3, [0], [2])[1], term.views(3, [1], [3])[1]], dim=1), views)
    assert not torch.equal(views[0], views[1]) and not torch.equal(views[:, :2], views[:, 2:4])
    for other in (replace(term, seed=6).views(3, [0, 1], [2, 3])[1], term.views(4, [0, 1], [2, 3])[1]):
        assert not torch.equal(views, other)
    assert torch.equal(replace(term, dropout=0.0).views(3, [0], [2])[1], torch.ones(2, 2, 32))


@pytest.mark.parametrize(("method", "on"), METHODS)
@pytest.mark.parametrize("objective", ["rm", "am"])
def test_the_loss_is_the_ranking_loss_and_the_weighted_term(make, rows, method, on, objective):
    arguments = replace(TRAINING, contrastive=method, contrastive_on=on, contrastive_coef=0.4)
    model = make(objective).eval()
    term = contrastive_term(model, arguments, 0)
    contrast = term.views(1, range(4), [len(item.examples) for item in rows])
    plain, *_ = scorer_loss(model, model, rows, arguments, None, 4)
    loss, _, terms = scorer_loss(model, model, rows, arguments, None, 4, contrast)
    assert float(loss) == pytest.approx(float(plain) + 0.4 * float(terms["contrastive_loss"]), abs=1e-6)
    assert float(terms["contrastive_loss"]) > 0.01
    # A micro-step of half the step's comparisons has half the weight.
    half = scorer_loss(model, model, rows, arguments, None, 8, contrast)[2]
    assert float(half["contrastive_loss"]) == pytest.approx(float(terms["contrastive_loss"]) / 2, abs=1e-6)


@pytest.mark.parametrize(
    ("method", "on", "engine"),
    [
        ("simcse", "responses", {}), pytest.param("swav", "differences", {"zero_stage": 3}, marks=pytest.mark.slow),
        ("simcse", "responses", {"lora_r": 2}), ("swav", "responses", {"bf16": True, "zero_stage": 2}),
    ],
)  # fmt: skip
@pytest.mark.usefixtures("one_process")
def test_training_lowers_the_term_and_what_is_saved_needs_none_of_it(make, rows, tmp_path, method, on, engine):
    if engine.get("lora_r"):
        pytest.importorskip("peft")
    ends = []
    for coefficient in (0.0, 3.0):
        arguments = replace(
            TRAINING, contrastive=method, contrastive_on=on, contrastive_coef=coefficient, num_train_epochs=20
        )
        folder = tmp_path / str(coefficient)
        train_scorer(make("am"), rows, quiet(scorer=arguments, engine=EngineArguments(**engine)), folder, seed=0)
        ends.append(sum(row["contrastive_loss"] for row in metric_lines(folder)[-3:]))
    assert ends[1] < ends[0]
    assert not any("contrastive" in p.read_bytes().decode(errors="ignore") for p in folder.glob("*.safetensors"))
    saved = AdvantageModel.from_pretrained(folder)
    assert saved.contrastive is None and saved.score(["Write backwards: xyz"], ["zyx"]).isfinite().all()


@pytest.mark.usefixtures("one_process")
def test_a_resumed_stage_draws_the_same_masks_and_keeps_its_prototypes(make, rows, tmp_path, killed_after):
    arguments = replace(TRAINING, contrastive="swav")
    train_scorer(make(), rows, quiet(scorer=arguments), tmp_path / "whole", seed=0)

    often = CheckpointArguments(save_steps=1)
    with killed_after(3):
        train_scorer(make(), rows, quiet(scorer=arguments, checkpoint=often), tmp_path / "cut", seed=0)
    torch.rand(3)  # another place of the process's own generator: nothing may depend on it
    train_scorer(make(), rows, quiet(scorer=arguments, checkpoint=often), tmp_path / "cut", seed=0)
    assert metric_lines(tmp_path / "cut") == metric_lines(tmp_path / "whole")
    for name in ("model.safetensors", "heads.safetensors"):
        assert (tmp_path / "cut" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


@pytest.mark.parametrize("method", ["none", "simcse"])
@pytest.mark.usefixtures("one_process")
def test_a_snapshot_with_other_negatives_is_refused(make, rows, tmp_path, killed_after, method):
    """The negatives of a row are those of its micro-step. Without the term another cut may go on."""
    often = CheckpointArguments(save_steps=1, universal=True)

    def train(arguments: ScorerArguments) -> None:
        train_scorer(make(), rows, quiet(scorer=arguments, checkpoint=often), tmp_path, seed=0)

    arguments = replace(TRAINING, contrastive=method, num_train_epochs=2)
    with killed_after(2):
        train(arguments)
    cut = replace(arguments, per_device_train_batch_size=1, gradient_accumulation_steps=4)
    if method == "none":
        train(cut)
        return
    with pytest.raises(ValueError, match=r"with 2 comparisons a micro-step, each other's negatives, this run has 1: k"):
        train(cut)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"contrastive_dropout": 1.0}, r"scorer\.contrastive_dropout must be between 0 and 1, and below 1"),
        ({"contrastive_dropout": -0.1}, r"scorer\.contrastive_dropout must be between 0 and 1"),
        ({"contrastive_coef": -1.0}, r"scorer\.contrastive_coef must be at least 0"),
        ({"contrastive_temperature": 0.0}, r"scorer\.contrastive_temperature must be at least"),
        ({"swav_prototypes": 0}, r"scorer\.swav_prototypes must be at least 1"),
    ],
)
def test_settings_that_no_stage_can_use(settings, message):
    with pytest.raises(ValueError, match=message):
        check(Recipe(scorer=ScorerArguments(**settings)))
