"""Measuring strength as stages: who trains on what, who judges what, what is written, and what a kill costs."""

from __future__ import annotations

import gzip
import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from stable_rlhf.data import read_comparisons, write_jsonl
from stable_rlhf.engine.run_folder import RunDirectory, RunError
from stable_rlhf.models.features import FeatureCache
from stable_rlhf.models.loading import load_causal_lm
from stable_rlhf.models.trunk import Trunk
from stable_rlhf.run import strength
from stable_rlhf.run.datasets import load_preferences
from stable_rlhf.run.stages import run_scorer
from stable_rlhf.run.strength import check_against, measure_strength, train_head
from stable_rlhf.scorer.train import train_scorer
from stable_rlhf.settings.recipe import EngineArguments, Recipe
from stable_rlhf.settings.stages import ScorerArguments

pytestmark = pytest.mark.usefixtures("one_process")


@pytest.fixture
def backbone(tiny_model, tokenizer, tmp_path) -> str:
    folder = tmp_path / "model"
    tiny_model(layers=2).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


def letters(i: int) -> str:
    return "abcdefghijklmnop"[i % 16] + "abcdefghijklmnop"[i // 16] + "op"


@pytest.fixture
def recipe(tmp_path) -> Recipe:
    rows = [
        {"prompt": f"Reverse the letters of {letters(i)}", "chosen": letters(i)[::-1], "rejected": letters(i),
         "task": "reverse", "agreement": 1.0 if i % 2 else 0.5}
        for i in range(30)
    ]  # fmt: skip
    rows.append({"prompt": "Write backwards: xyz", "responses": ["zyx", "zy", "x"], "ranks": [1, 2, 3]})
    rows.append({"prompt": "Write backwards: " + "abcdefgh" * 6, "chosen": "h", "rejected": "a"})  # too long
    write_jsonl(tmp_path / "pairs.jsonl", rows)
    found = Recipe(output_dir=str(tmp_path / "o"), report_to=[])
    found.data.pairs = [str(tmp_path / "pairs.jsonl")]
    found.data.max_prompt_length, found.data.max_length, found.data.test_fraction = 30, 40, 0.2
    found.scorer = ScorerArguments(learning_rate=1e-3, per_device_train_batch_size=8)
    found.strength.num_scorers = 2
    return found


def measure(recipe: Recipe, backbone: str) -> Path:
    settings = {"scorer": recipe.as_dict()["scorer"], "data": recipe.as_dict()["data"]}
    return measure_strength(recipe, RunDirectory(recipe.output_dir), backbone, settings).folder


def votes(folder: Path) -> dict[str, list[float | None]]:
    return {
        path.parent.name: json.loads(path.read_text(encoding="utf-8"))
        for path in sorted(folder.parent.glob("*/differences.json"))
    }


@pytest.mark.parametrize("heads_only", [False, True])
def test_every_pair_that_fits_gets_its_strength_and_rows_stay_as_they_were(recipe, backbone, heads_only):
    recipe.strength.heads_only = heads_only
    folder = measure(recipe, backbone)
    before, after = (read_comparisons(path).rows for path in (recipe.data.pairs, folder / "pairs.jsonl.gz"))
    cast = np.array(list(votes(folder).values()), dtype=float)
    assert cast.shape == (2, 33) and np.isfinite(cast).all()
    assert np.abs(cast[0] - cast[1]).max() > 1e-3  # another order and another head
    places = iter(range(33))
    for old, new in zip(before, after, strict=True):
        assert replace(new, strength=None, source="") == replace(old, source="")
        if len(old.prompt) > 60:
            assert new.strength is None
            continue
        for given in new.strength:
            place = next(places)
            assert given.mean == pytest.approx(cast[:, place].mean(), abs=1e-9)
            assert given.std == pytest.approx(cast[:, place].std(), abs=1e-9)
    assert sorted(p.name for p in folder.iterdir()) == [
        "pairs.jsonl.gz", "report.html", "stage.json", "strength.json", "strength.png",
    ]  # fmt: skip
    assert not list(folder.parent.glob("strength-scorer-*/*.safetensors"))  # votes are kept, backbones are not


def test_the_split_of_the_enriched_file_is_that_of_the_plain_one(recipe, backbone):
    recipe.strength.heads_only = True
    before = load_preferences(recipe.data, recipe.seed)
    recipe.data.pairs = [str(measure(recipe, backbone) / "pairs.jsonl.gz")]
    after = load_preferences(recipe.data, recipe.seed)
    for part in ("train", "test"):
        assert [r.prompt for r in getattr(before, part)] == [r.prompt for r in getattr(after, part)]


@pytest.mark.parametrize("folds", [1, 3])
def test_nobody_trains_on_held_out_pairs_nor_with_folds_on_what_it_judges(recipe, backbone, folds, monkeypatch):
    recipe.strength.folds, recipe.strength.heads_only = folds, True
    trained: list[set[int]] = []

    def spy(hidden, pairs, *rest):
        trained.append({row for comparison in pairs for pair in comparison for row in pair})
        return train_head(hidden, pairs, *rest)

    monkeypatch.setattr(strength, "train_head", spy)
    folder = measure(recipe, backbone)
    rows = [r for r in read_comparisons(recipe.data.pairs).rows if len(r.prompt) <= 60]
    test = {r.prompt for r in load_preferences(recipe.data, recipe.seed).test}
    first, pair, responses = {}, 0, 0
    owner = {}  # pair -> its row's first response
    for row in rows:
        first[row.prompt] = responses
        for _ in row.pairs:
            owner[pair] = responses
            pair += 1
        responses += len(row.responses)
    held = {first[p] for p in test if p in first}
    cast = np.array(list(votes(folder).values()), dtype=float)
    assert len(trained) == len(cast) == 2 * folds
    for seen in trained:
        assert not seen & held
    judged_by = np.isfinite(cast).sum(axis=0)
    for place, start in owner.items():
        assert judged_by[place] == (2 * folds if start in held else 2)
    if folds > 1:
        names = list(votes(folder))
        order = [f"strength-scorer-{m}-fold-{f}" for f in range(1, folds + 1) for m in (1, 2)]
        assert sorted(names) == sorted(order)
        for name, seen in zip(order, trained, strict=True):
            row = cast[names.index(name)]
            for place, start in owner.items():
                assert np.isnan(row[place]) == (start in seen)


def test_a_finished_scorer_is_not_trained_again(recipe, backbone, monkeypatch):
    calls, stop_at = [], 2

    def spy(*arguments, **keywords):
        calls.append(arguments[3].name)
        if len(calls) == stop_at:
            raise KeyboardInterrupt
        return train_scorer(*arguments, **keywords)

    monkeypatch.setattr(strength, "train_scorer", spy)
    with pytest.raises(KeyboardInterrupt):
        measure(recipe, backbone)
    assert calls == ["strength-scorer-1.tmp", "strength-scorer-2.tmp"]
    stop_at = 99
    folder = measure(recipe, backbone)
    assert calls[2:] == ["strength-scorer-2.tmp"] and len(votes(folder)) == 2
    recipe.strength.num_scorers = 3
    with pytest.raises(
        RunError, match=r"strength was made with other settings \(strength\.num_scorers: 2 -> 3\); delete"
    ):
        measure(recipe, backbone)
    assert len(calls) == 3  # told before anything is trained
    shutil.rmtree(folder)
    measure(recipe, backbone)  # the first two stay
    assert calls[3:] == ["strength-scorer-3.tmp"]


def test_scorers_read_the_backbone_in_the_engines_type(recipe, backbone, monkeypatch):
    recipe.engine.bf16, recipe.scorer.num_trainable_layers, recipe.strength.num_scorers = True, 1, 1
    cache, settings = FeatureCache(), {"scorer": recipe.as_dict()["scorer"]}
    monkeypatch.setattr(strength, "FeatureCache", lambda: cache)
    measure_strength(recipe, RunDirectory(recipe.output_dir), backbone, settings)
    trunk = Trunk(load_causal_lm(backbone, dtype=torch.bfloat16).base_model, 1)
    found = {sequence: h for batch, hidden in cache._batches.items() for sequence, h in zip(batch, hidden, strict=True)}
    assert len(found) > 60
    for sequence, hidden in found.items():
        assert hidden.dtype == torch.bfloat16
        torch.testing.assert_close(hidden, trunk.features([sequence])[0], rtol=0.02, atol=0.02)


def test_the_same_seed_gives_the_same_strengths_and_another_seed_others(recipe, backbone, tmp_path):
    recipe.strength.heads_only = True
    found = []
    for seed, name in ((0, "a"), (0, "b"), (1, "c")):
        recipe.seed, recipe.output_dir = seed, str(tmp_path / name)
        found.append((measure(recipe, backbone) / "pairs.jsonl.gz").read_bytes())
    assert found[0] == found[1] != found[2]


def test_heads_read_what_the_backbone_says_at_the_last_token(recipe, backbone):
    from safetensors.torch import load_file

    from stable_rlhf.data.encoding import encode
    from stable_rlhf.models.loading import load_causal_lm, load_tokenizer

    recipe.strength.heads_only = True
    measure(recipe, backbone)
    (path,) = Path(recipe.output_dir, "strength-hidden").glob("*.safetensors")
    hidden = load_file(path)["hidden"]
    row = read_comparisons(recipe.data.pairs).rows[3]
    example = encode(load_tokenizer(backbone), row.prompt, row.responses[1])
    with torch.no_grad():
        wanted = load_causal_lm(backbone).base_model(torch.tensor([example.ids])).last_hidden_state[0, -1]
    torch.testing.assert_close(hidden[7], wanted, rtol=1e-4, atol=1e-5)


def test_a_head_learns_what_a_linear_head_can():
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(200, 8, generator=generator) * torch.tensor([1.0, 100.0, *[1.0] * 6]) + 5  # ill-conditioned
    truth = hidden @ torch.tensor([1.0, 0.02, -1.0, 0, 0, 0, 0, 0])
    pairs = [
        [(i, j) if truth[i] > truth[j] else (j, i)] for i, j in zip(range(0, 200, 2), range(1, 200, 2), strict=True)
    ]
    arguments = ScorerArguments(learning_rate=1e-9, head_learning_rate=0.05, num_train_epochs=20)
    score = train_head(hidden, pairs[:80], arguments, EngineArguments(), seed=0)
    right = [bool(score[b] > score[w]) for ((b, w),) in pairs]
    assert sum(right[:80]) >= 78 and sum(right[80:]) >= 17
    still = replace(arguments, head_learning_rate=None)
    untrained = train_head(hidden, pairs[:80], still, EngineArguments(), seed=0)
    wrong = [not untrained[b] > untrained[w] for ((b, w),) in pairs]
    assert sum(wrong) > 20  # so the learning rate that counts was the head's
    none = [replace(arguments, learning_rate=lr, head_learning_rate=head) for lr, head in ((0.0, None), (0.05, 0.0))]
    assert torch.equal(*(train_head(hidden, pairs[:80], a, EngineArguments(), seed=0) for a in none))


def test_scorers_train_on_the_denoised_labels(recipe, backbone, tmp_path):
    """Flip everything: the scorer prefers what was rejected; the file tells what became of every pair."""
    rows = [json.loads(line) for line in Path(recipe.data.pairs[0]).read_text(encoding="utf-8").splitlines()[:30]]
    rows = [row | {"strength": {"mean": -1.0 - i, "std": 0.5}} for i, row in enumerate(rows)]
    write_jsonl(tmp_path / "given.jsonl", rows)
    recipe.data.pairs = [str(tmp_path / "given.jsonl")]
    recipe.scorer.num_train_epochs = 12
    accuracy = {}
    for name, bands in (("plain", []), ("flipped", [{"below": 0, "flip": True}])):
        recipe.scorer.denoise = bands
        folder = tmp_path / name
        folder.mkdir()
        result = run_scorer(recipe, "am", backbone, None, folder)
        accuracy[name] = result["accuracy"]
        assert (folder / "denoise.jsonl.gz").exists() == bool(bands) == ("denoise" in result)
    assert accuracy["plain"] > 0.5 > accuracy["flipped"]
    assert result["denoise"] == {"pairs": result["train"], "flip": result["train"]}
    told = [json.loads(line) for line in gzip.decompress((folder / "denoise.jsonl.gz").read_bytes()).splitlines()]
    assert len(told) == result["train"] and all(t["denoise"]["flip"] for t in told)
    assert {t["source"].split(":")[0] for t in told} == {str(tmp_path / "given.jsonl")}


def test_denoise_without_strength_names_the_row(recipe, backbone, tmp_path):
    recipe.scorer.denoise = [{"below": 0, "flip": True}]
    with pytest.raises(ValueError, match=r"pairs\.jsonl:\d+: no 'strength'"):
        run_scorer(recipe, "rm", backbone, None, tmp_path)


def test_check_column(recipe, backbone):
    recipe.strength.heads_only, recipe.strength.check = True, "agreement"
    found = json.loads((measure(recipe, backbone) / "strength.json").read_text(encoding="utf-8"))["check"]
    assert found["pairs"] == 30 and [v["value"] for v in found["by_value"]] == [0.5, 1.0]
    recipe.strength.check, recipe.output_dir = "agreemant", recipe.output_dir + "2"
    with pytest.raises(ValueError, match=r"strength\.check 'agreemant': no pair has a number"):
        measure(recipe, backbone)


def test_strength_against_a_column():
    from scipy.stats import mannwhitneyu, spearmanr

    rng = np.random.default_rng(1)
    mu = np.round(rng.normal(size=120), 1)  # with ties
    prompts = [f"prompt {i // 2}" for i in range(120)]
    value = np.round(mu + rng.normal(size=120))
    given = [None if i % 7 == 0 else float(v) for i, v in enumerate(value)]
    known = [i for i in range(120) if i % 7]
    found = check_against(mu, given, prompts)
    assert (found["pairs"], found["prompts"]) == (len(known), 60) and "auc" not in found
    assert found["spearman"]["value"] == pytest.approx(spearmanr(mu[known], value[known]).statistic, abs=1e-12)
    assert found["spearman"]["low"] < found["spearman"]["value"] < found["spearman"]["high"]
    two = value > 0
    found = check_against(mu, two.astype(float).tolist(), prompts)
    assert found["auc"]["value"] == pytest.approx(
        mannwhitneyu(mu[two], mu[~two]).statistic / (two.sum() * (~two).sum()), abs=1e-12
    )
    assert 0.5 < found["auc"]["low"] < found["auc"]["value"] < found["auc"]["high"] < 1
    assert check_against(mu, [1.0] * 120, prompts)["spearman"] is None  # a constant has no ranks
    assert check_against(mu, two.astype(float).tolist(), ["one"] * 120)["auc"] is None  # nothing to draw from
    assert check_against(mu * 0, two.astype(float).tolist(), prompts)["auc"] is None
    sure = check_against(np.arange(9.0), list(np.arange(9.0)), list("abcdefghi"))["spearman"]
    assert all(end == pytest.approx(1.0) for end in sure.values())


@pytest.mark.slow
def test_pairs_of_one_prompt_do_not_count_as_independent():
    rng = np.random.default_rng(0)
    mu, value = rng.normal(size=80), rng.normal(size=80) > 0
    mu = mu + value
    copies = check_against(np.tile(mu, 9), np.tile(value, 9).astype(float).tolist(), [str(i) for i in range(80)] * 9)
    once = check_against(mu, value.astype(float).tolist(), [str(i) for i in range(80)])
    for name in ("spearman", "auc"):
        width = {key: found[name]["high"] - found[name]["low"] for key, found in (("9", copies), ("1", once))}
        assert copies[name]["value"] == pytest.approx(once[name]["value"]) and width["9"] == pytest.approx(width["1"])
