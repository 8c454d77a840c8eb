"""The measuring at the end of a run: scorers on held-out pairs, policies against SFT."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from stable_rlhf.data.digest import json_digest
from stable_rlhf.data.encoding import Encoded, encode, encode_prompt, encode_rows
from stable_rlhf.data.jsonl import is_finite, read_json, write_jsonl
from stable_rlhf.data.prompts import EncodedPrompt
from stable_rlhf.data.readers import read_comparisons, tell_skipped
from stable_rlhf.data.records import Comparison, DataError
from stable_rlhf.engine.frozen import release
from stable_rlhf.engine.tracking import read_metrics
from stable_rlhf.evaluate.chat import ChatJudge
from stable_rlhf.evaluate.judge import GoldJudge, Judge, PairJudge, ScorerJudge, compare, compare_rewards
from stable_rlhf.evaluate.policies import mean_kl
from stable_rlhf.evaluate.rewardbench import HUB, Item, benchmark_figures, pairs_of, read_benchmark
from stable_rlhf.metrics import scorer_evaluation
from stable_rlhf.models.loading import load_tokenizer
from stable_rlhf.policy.reward_functions import Rewards
from stable_rlhf.ranks import barrier, device, on_first_rank
from stable_rlhf.rollout.local import Rollout
from stable_rlhf.run.datasets import PromptSplits, load_prompts, locate, reading
from stable_rlhf.run.stages import Result, answer, check_gold, load_reader, sampling_settings
from stable_rlhf.scorer.comparisons import encode_comparisons, pairs_digest, score_pairs
from stable_rlhf.scorer.model import AdvantageModel
from stable_rlhf.settings.recipe import EvaluateArguments, Recipe
from stable_rlhf.show.progress import is_main_process, say
from stable_rlhf.system.http import read_key

_HELD_OUT, _SEPARATE = "held-out reward model", "reward model of another training"
_LARGEST = 1e30  # of a score: differences and squares of such are finite
_TRAINER = "the very scorer that the policy was trained with"


def judge_of(scorer: str, policy: str) -> str:
    """What a scorer is to a policy that it judges, by what their stages recorded."""
    itself = _identity(Path(scorer))
    if itself is not None and itself in _made_from(Path(policy)):
        return _TRAINER
    return _HELD_OUT if itself is not None and itself[0] == "scorer-judge" else _SEPARATE


def _stage_record(folder: Path) -> dict[str, Any]:
    """What the stage that wrote a folder (or a file in it) recorded; nothing where there is no such record."""
    try:
        return read_json((folder if folder.is_dir() else folder.parent) / "stage.json")
    except DataError:
        return {}


def _identity(folder: Path) -> tuple[Any, Any] | None:
    """Scorers of one run have one fingerprint and several names."""
    record = _stage_record(folder)
    return (record["name"], record["fingerprint"]) if record.keys() >= {"name", "fingerprint"} else None


def _made_from(folder: Path) -> set[tuple[Any, Any]]:
    """The stages that went into a folder, and into those."""
    stages_before: set[tuple[Any, Any]] = set()
    waiting = [folder]
    while waiting:
        here = waiting.pop()
        record = _stage_record(here)
        try:
            beside = [
                (here.parent / name, (name, fingerprint)) for name, fingerprint in record.get("inputs", {}).items()
            ]
            settings = record.get("settings", {})
            named = [
                (Path(settings[name]), fingerprint)
                for name, fingerprint in settings.get("made_from", {}).items()
                if fingerprint
            ]
        except (AttributeError, KeyError, TypeError):
            continue
        for path, identity in beside + [
            (path, (_stage_record(path).get("name"), fingerprint)) for path, fingerprint in named
        ]:
            if identity not in stages_before:
                stages_before.add(identity)
                waiting.append(path)
    return stages_before


def make_judge(recipe: Recipe, scorer: str | None) -> Judge | PairJudge:
    """The judge of the settings: the world's gold score, a scorer's folder, or a chat endpoint."""
    e = recipe.evaluate
    if e.judge == "gold":
        from stable_rlhf.world import gold_score

        return GoldJudge(lambda prompt, response, task: gold_score(prompt, response))
    if e.judge == "chat":
        assert e.judge_base_url and e.judge_model  # `check` asks for them
        key = read_key(
            "evaluate.judge_api_key_env", e.judge_api_key_env, default=EvaluateArguments.judge_api_key_env
        )  # fmt: skip
        return ChatJudge(
            e.judge_base_url, e.judge_model, api_key=key, request=e.judge_request, workers=e.judge_workers,
            timeout=e.judge_timeout,
        )  # fmt: skip
    if scorer is None:
        raise ValueError("evaluate.judge 'scorer' needs a scorer that judges (--judge-scorer)")
    model = AdvantageModel.from_pretrained(scorer, dtype=recipe.engine.dtype).to(device())
    return ScorerJudge(lambda prompts, responses: model.score(prompts, responses).tolist(), name=_SEPARATE)


def evaluate_scorers(recipe: Recipe, scorers: Mapping[str, str], test_pairs: list[str]) -> Result:
    """Accuracy, calibration and per-task figures of each scorer folder: on every pair of the files ``test_pairs``, or
    on the scores of held-out pairs that train-scorer kept in the folder."""
    rows: list[Comparison] = []
    if test_pairs:
        pairs = read_comparisons(locate(recipe.data, test_pairs), **reading(recipe.data))
        tell_skipped("test pairs", pairs)
        rows = pairs.rows
    figures: Result = {}
    for name, folder in scorers.items():
        say(f"  scorer {name}")
        scores = _test_scores(recipe, name, folder, rows) if rows else _kept_scores(name, folder)
        figures[name] = scorer_figures(recipe, scores)
    return figures


def scorer_figures(recipe: Recipe, scores: Mapping[str, Any]) -> Result:
    """Everything that the report says of one scorer, from the scores of its pairs."""
    lists = scores["chosen"], scores["rejected"], scores["tasks"]
    evaluation = scorer_evaluation(*lists, bins=recipe.scorer.bins, seed=recipe.seed, prompts=scores.get("prompts"))
    return evaluation | {"rows": scores.get("rows")}


def _test_scores(recipe: Recipe, name: str, folder: str, rows: list[Comparison]) -> dict[str, Any]:
    model = AdvantageModel.from_pretrained(folder, dtype=recipe.engine.dtype).to(device())
    longest = min(recipe.data.max_length, model.max_length)
    test, long = encode_comparisons(
        rows, model.tokenizer, longest, recipe.data.max_prompt_length, on_bad_row=recipe.data.on_bad_row
    )
    if long:
        say(f"  {long} of {len(rows)} comparisons are too long for scorer {name}: left out")
    return {**score_pairs(model, test), "rows": pairs_digest(test)}


def evaluate_benchmark(
    recipe: Recipe, scorers: Mapping[str, str], benchmark: str, source: str | None
) -> tuple[Result, Result]:
    """What :func:`scorer_figures` says of each scorer on a benchmark's pairs, and the benchmark's own figures."""
    items = read_benchmark(benchmark, source)
    digest = json_digest([[i.prompt, i.responses, i.right] for i in items], sort_keys=False)
    figures: Result = {}
    own: Result = {"name": benchmark, "source": source or HUB[benchmark][0], "items": len(items), "scorers": {}}
    for name, folder in scorers.items():
        say(f"  scorer {name}")
        model = AdvantageModel.from_pretrained(folder, dtype=recipe.engine.dtype).to(device())
        scores, cut = _benchmark_scores(model, items)
        if cut:
            say(
                f"  {cut} responses were longer than the {model.max_length} tokens of scorer {name}, and were cut there"
            )
        own["scorers"][name] = {**benchmark_figures(benchmark, items, scores), "cut": cut}
        figures[name] = scorer_figures(recipe, {**pairs_of(items, scores), "rows": digest})
    return figures, own


def _benchmark_scores(model: AdvantageModel, items: Sequence[Item]) -> tuple[list[list[float]], int]:
    """Scores of each item's responses; how many responses had to be cut at the scorer's context."""
    encoded = [
        encode(model.tokenizer, item.prompt, response, source=item.source)
        for item in items
        for response in item.responses
    ]
    most = model.max_length
    fitting = [e if len(e) <= most else Encoded(e.ids[:most], min(e.prompt_length, most)) for e in encoded]
    scores = iter(model.score_encoded(fitting, description="benchmark").tolist())
    return [[next(scores) for _ in item.responses] for item in items], sum(len(e) > most for e in encoded)


def _kept_scores(name: str, folder: str) -> dict[str, Any]:
    path = Path(folder) / "scores.json"
    if not path.is_file():
        raise ValueError(f"scorer {name!r}: {path} does not exist; give preference files to score (--test-pairs FILE)")
    content = read_json(path, "chosen", "rejected", "tasks")
    scores = content["chosen"], content["rejected"]
    if any(not isinstance(part, list) or not all(map(is_finite, part)) for part in scores):
        raise DataError(f"{path}: 'chosen' and 'rejected' must be lists of finite numbers")
    if not isinstance(content["tasks"], list) or {len(content["tasks"])} != set(map(len, scores)):
        raise DataError(f"{path}: 'chosen', 'rejected' and 'tasks' must be lists of one length")
    if not scores[0]:
        raise DataError(f"{path}: holds no scores")
    if any(abs(score) > _LARGEST for part in scores for score in part):
        raise DataError(f"{path}: holds a score beyond {_LARGEST:g}, which no scorer gives")
    if not all(task is None or isinstance(task, str) for task in content["tasks"]):
        raise DataError(f"{path}: 'tasks' must be a list of texts and nulls")
    prompts = content.get("prompts")  # not of a scorer of an earlier version
    if prompts is not None and not (isinstance(prompts, list) and len(prompts) == len(scores[0])):
        raise DataError(f"{path}: 'prompts' must be a list as long as 'chosen'")
    if not all(type(number) is int for number in prompts or ()):
        raise DataError(f"{path}: 'prompts' must be a list of whole numbers")
    return content


def read_curve(folder: str) -> list[dict[str, float]]:
    """What a policy's training logged at each step (score, KL, length, gold where known), where it was trained here."""
    path = Path(folder) / "metrics.jsonl"
    if not (path.is_file() and (path.parent / "stage.json").is_file()):
        return []
    return [row for row in read_metrics(path) if "score" in row]


def that_judge_reads(scorer: str, prompts: list[EncodedPrompt], on_bad_row: str = "error") -> list[EncodedPrompt]:
    """Prompts that a scorer that judges takes as well: its chat template may be another than the policies'.

    Raises:
        RowError: it refuses one; found out before hours of sampling, and with its file and line.
    """
    tokenizer = load_tokenizer(scorer)

    def one(prompt: EncodedPrompt) -> list[int]:
        return encode_prompt(tokenizer, prompt.row.prompt, source=f"{prompt.row.source}: scorer {scorer!r}")

    return [prompt for prompt, _ in encode_rows("prompts", prompts, one, on_bad_row)]


def run_evaluate(
    recipe: Recipe, baseline: str, policies: Mapping[str, str], judge_scorer: str | None, folder: Path
) -> Result:
    """Answer both evaluation sets with SFT and every policy, and judge: win, lose, tie with intervals. Where the
    settings have reward functions beside the scorer, ``rewards`` holds the mean of each (:func:`compare_rewards`)."""
    judge = make_judge(recipe, judge_scorer)
    tokenizer = load_tokenizer(baseline)
    splits: PromptSplits = load_prompts(recipe.data, tokenizer, recipe.seed)
    sets: dict[str, list[EncodedPrompt]] = {"main": splits.main, "forget": splits.forget}
    if judge_scorer is not None and recipe.evaluate.judge == "scorer":
        sets = {on: that_judge_reads(judge_scorer, part, recipe.data.on_bad_row) for on, part in sets.items()}
    check_gold(recipe.evaluate, [p.row for part in sets.values() for p in part])
    own = Rewards(recipe.rewards, recipe.ppo.max_new_tokens)
    if own.own:
        on_first_rank(lambda: own.check([p.row for part in sets.values() for p in part]), ValueError)
    settings = sampling_settings(recipe, recipe.evaluate.temperature)
    layers = recipe.ppo.num_trainable_layers  # policies that share frozen blocks share their hidden states too
    reference = load_reader(baseline, recipe.engine, num_trainable_layers=layers)

    def respond(policy: Any, part: list[EncodedPrompt]) -> list[Rollout]:  # every policy meets the same random numbers
        seeds = [recipe.seed * 1_000_003 + i for i in range(len(part))]
        return answer(policy, tokenizer, part, settings, seeds, "evaluation responses")

    def rewarded(part: list[EncodedPrompt], rollouts: list[Rollout]) -> dict[str, list[float | None]]:
        return on_first_rank(lambda: own.each([p.row for p in part], rollouts), ValueError) if own.own else {}

    answers = {on: respond(reference, part) for on, part in sets.items()}
    initial = {on: rewarded(part, answers[on]) for on, part in sets.items()}
    result: Result = {"policies": {}}
    records: list[dict[str, Any]] = []
    for name, path in policies.items():
        policy = load_reader(path, recipe.engine, num_trainable_layers=layers)
        result["policies"][name] = {}
        for on, part in sets.items():
            say(f"  {name} on the {on} set")
            rollouts = respond(policy, part)
            kl = mean_kl(policy, reference, rollouts)
            rows = [p.row for p in part]
            compared = partial(
                compare, judge, rows, [r.text for r in rollouts], [r.text for r in answers[on]],
                recipe.evaluate.tie_margin, kl=kl, lengths=[len(r.encoded.response) for r in rollouts],
            )  # fmt: skip
            figures = on_first_rank(compared, ValueError)  # a judge that costs money is asked once
            if judge_scorer is not None and recipe.evaluate.judge == "scorer":
                figures["judge"] = judge_of(judge_scorer, path)
            if rewards := compare_rewards(rewarded(part, rollouts), initial[on], recipe.seed):
                figures["rewards"] = rewards
            verdicts = figures.pop("verdicts")
            result["policies"][name][on] = figures
            records += [
                {
                    "policy": name, "set": on, "prompt": row.prompt, "task": row.task, "response": r.text,
                    "sft": s.text, "verdict": {1: "win", -1: "lose", 0: "tie"}[verdict],
                }
                for row, r, s, verdict in zip(rows, rollouts, answers[on], verdicts, strict=True)
            ]  # fmt: skip
        release(policy)  # before the next one is loaded: large models do not fit twice
        del policy
    release(reference)
    if is_main_process():
        write_jsonl(folder / "responses.jsonl.gz", records)
    barrier()
    return result
