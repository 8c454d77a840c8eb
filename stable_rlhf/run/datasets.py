"""From the data settings of a recipe to encoded rows, divided into training and test sets."""

from __future__ import annotations

import os
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from stable_rlhf.data.digest import file_digest, json_digest
from stable_rlhf.data.encoding import Encoded, encode, encode_prompt, encode_rows, fit, surely_longer, surely_too_long
from stable_rlhf.data.prompts import EncodedPrompt, encode_prompts
from stable_rlhf.data.readers import ReadResult, read_comparisons, read_demonstrations, read_prompts, tell_skipped
from stable_rlhf.data.records import Comparison, DataError, Demonstration, PromptRow
from stable_rlhf.data.splits import prompt_key, split_rows
from stable_rlhf.data.tables import files_of, is_hub_name
from stable_rlhf.settings.recipe import DataArguments
from stable_rlhf.show.progress import say

Row = TypeVar("Row", Comparison, Demonstration, PromptRow)


def locate(arguments: DataArguments, names: Sequence[str]) -> list[Path]:
    """File names of the settings as paths; relative ones are looked up in ``data_dir`` when it is set."""
    root = Path(arguments.data_dir) if arguments.data_dir else Path()
    if arguments.data_dir and not root.is_dir():
        raise DataError(f"data.data_dir {arguments.data_dir!r} is not a folder")
    return [Path(name) if is_hub_name(name) else root / name for name in names]


def reading(arguments: DataArguments) -> dict[str, Any]:
    """How the settings say to read files, as keywords of every reader."""
    return {"on_bad_row": arguments.on_bad_row, "columns": arguments.columns}


def read_some_prompts(arguments: DataArguments, names: Sequence[str], seed: int) -> ReadResult[PromptRow]:
    """The prompts of files, at most ``max_prompts``."""
    return read_prompts(locate(arguments, names), **reading(arguments), most=arguments.max_prompts, seed=seed)


def digests(arguments: DataArguments, names: Sequence[str]) -> dict[str, str]:
    """A digest of each of these files, so that a changed file counts as a changed setting."""
    values = {}
    for name, path in zip(names, locate(arguments, names), strict=True):
        parts = [file_digest(file, "sha256")[:16] for file in files_of(path)]
        if parts:  # what is missing, the reader reports; what a hub holds, nobody can tell
            values[name] = json_digest(parts) if os.path.isdir(path) else parts[0]
    return values


def contents(arguments: DataArguments) -> dict[str, str]:
    """A digest of each data file that the settings name."""
    names = [
        *arguments.pairs, *arguments.prompts, *arguments.demonstrations, *arguments.eval_main, *arguments.eval_forget,
        *arguments.rehearsal, *arguments.forget_prompts,
    ]  # fmt: skip
    return digests(arguments, names)


def _split(setting: str, rows: Sequence[Row], sizes: Sequence[float] | Sequence[int], seed: int) -> list[list[Row]]:
    """`split_rows`, with errors that name the setting the sizes come from."""
    try:
        return split_rows(rows, sizes, seed)
    except ValueError as error:
        raise DataError(f"{setting}: {error}") from None


@dataclass
class PreferenceSplits:
    """Comparisons by use; no prompt stands in two of them."""

    train: list[Comparison]
    test: list[Comparison]
    judge: list[Comparison] = field(default_factory=list)


def read_preferences(arguments: DataArguments, seed: int) -> list[Comparison]:
    """The comparisons of the preference files, at most ``max_pairs``, in their order."""
    if not arguments.pairs:
        raise DataError("data.pairs: name at least one preference file")
    result = read_comparisons(locate(arguments, arguments.pairs), **reading(arguments))
    tell_skipped("preferences", result)
    rows = result.rows
    if arguments.max_pairs and arguments.max_pairs < len(rows):
        # Whole prompts are drawn, so the last one may bring more rows than there is room for.
        rows = _split("data.max_pairs", rows, [arguments.max_pairs], seed)[0][: arguments.max_pairs]
    return rows


def load_preferences(arguments: DataArguments, seed: int) -> PreferenceSplits:
    """Read and divide the preference files."""
    return split_preferences(arguments, read_preferences(arguments, seed), seed)


def split_preferences(arguments: DataArguments, rows: Sequence[Comparison], seed: int) -> PreferenceSplits:
    """Divide comparisons by use, as the settings say."""
    fractions = [arguments.test_fraction, arguments.judge_fraction]
    used = [f for f in fractions if f > 0]
    rest = 1 - sum(used)
    if rest <= 0 or arguments.test_fraction <= 0:
        raise DataError("data.test_fraction must be above 0, and with data.judge_fraction below 1")
    test, *judge, train = _split("data.test_fraction, data.judge_fraction", rows, [*used, rest], seed)
    return PreferenceSplits(train, test, judge[0] if judge else [])


@dataclass
class PromptSplits:
    """Prompts to train on, the two evaluation sets, and prompts that are rehearsed at most."""

    train: list[EncodedPrompt]
    main: list[EncodedPrompt]
    forget: list[EncodedPrompt]
    rehearsal: list[EncodedPrompt] = field(default_factory=list)


def load_prompts(arguments: DataArguments, tokenizer: Any, seed: int) -> PromptSplits:
    """Read, encode and divide the prompt files."""

    def read(names: Sequence[str]) -> list[EncodedPrompt]:
        result = read_some_prompts(arguments, names, seed)
        tell_skipped("prompts", result)
        most = arguments.max_prompt_length

        def one(row: PromptRow) -> list[int] | None:
            if surely_longer(tokenizer, row.prompt, most):
                return None
            return encode_prompt(tokenizer, row.prompt, source=row.source)

        return encode_prompts(result.rows, one, most, arguments.on_bad_row)

    if not arguments.prompts:
        raise DataError("data.prompts: name at least one prompt file")
    every_prompt = read(arguments.prompts)
    check_evaluation_sets(arguments, [p.row for p in every_prompt])
    rehearsal: list[EncodedPrompt] = []
    if arguments.eval_main:
        main, forget = read(arguments.eval_main), read(arguments.eval_forget)
        train = every_prompt
    elif arguments.forget_prompts:
        trained = {prompt_key(p.row.prompt) for p in every_prompt}
        apart = [p for p in read(arguments.forget_prompts) if prompt_key(p.row.prompt) not in trained]
        forget, rehearsal = _take("data.forget_prompts", apart, arguments.eval_prompts, seed)
        main, train = _take("data.prompts", every_prompt, arguments.eval_prompts, seed)
    else:
        tasks = set(arguments.forget_tasks)
        of_tasks = [p for p in every_prompt if p.row.task in tasks]
        others = [p for p in every_prompt if p.row.task not in tasks]
        forget, of_tasks = _take(f"data.forget_tasks {sorted(tasks)}", of_tasks, arguments.eval_prompts, seed)
        main, others = _take(f"all but data.forget_tasks {sorted(tasks)}", others, arguments.eval_prompts, seed)
        train = of_tasks + others
    held = {prompt_key(p.row.prompt) for p in (*main, *forget)}
    clean = [p for p in train if prompt_key(p.row.prompt) not in held]
    if not clean:
        raise DataError("data.prompts: every prompt is in an evaluation set too, so none is left to train on")
    if len(clean) < len(train):
        say(f"  {len(train) - len(clean)} of {len(train)} training prompts are in an evaluation set too: left out")
    most = arguments.max_prompts_per_task
    return PromptSplits(_cap_tasks(clean, most, seed), main, forget, _cap_tasks(rehearsal, most, seed))


def check_evaluation_sets(arguments: DataArguments, prompts: Sequence[PromptRow]) -> None:
    """Refuse settings that give no two evaluation sets, of files of their own or out of ``prompts``.

    Raises:
        DataError: one of the two files' settings without the other, or tasks that none of the prompts has, or all have;
            a forget set in several ways.
    """
    if arguments.forget_prompts and (arguments.eval_forget or arguments.forget_tasks):
        other = "eval_forget" if arguments.eval_forget else "forget_tasks"
        raise DataError(f"data.forget_prompts and data.{other} both say what the forget set is: give one")
    if bool(arguments.eval_main) != bool(arguments.eval_forget):
        raise DataError("data.eval_main and data.eval_forget: give both, or neither")
    if arguments.eval_main or arguments.forget_prompts:
        return
    tasks = set(arguments.forget_tasks)
    if missing := tasks - {p.task for p in prompts}:
        raise DataError(f"data.forget_tasks {sorted(missing)}: no prompt that fits has such a task")
    count = sum(p.task in tasks for p in prompts)
    if not count or count == len(prompts):
        raise DataError(
            f"data.forget_tasks {sorted(tasks)}: the prompts have {count} of these tasks and {len(prompts) - count} "
            "others; both are needed for the two evaluation sets (or give data.eval_main and data.eval_forget)"
        )


def _take(
    setting: str, prompts: list[EncodedPrompt], count: int, seed: int
) -> tuple[list[EncodedPrompt], list[EncodedPrompt]]:
    """Hold out ``count`` prompts, at most half of what there is."""
    if len({prompt_key(p.row.prompt) for p in prompts}) < 2:
        raise DataError(f"{setting}: only one prompt, too few to evaluate on one and train on another")
    count = max(1, min(count, len(prompts) // 2))
    by_row = {id(p.row): p for p in prompts}
    held, rest = _split(setting, [p.row for p in prompts], [count, len(prompts) - count], seed)
    return [by_row[id(r)] for r in held], [by_row[id(r)] for r in rest]


def _cap_tasks(prompts: list[EncodedPrompt], most: int, seed: int) -> list[EncodedPrompt]:
    if not most:
        return prompts
    groups: dict[str | None, list[EncodedPrompt]] = defaultdict(list)
    for prompt in prompts:
        groups[prompt.row.task].append(prompt)
    rest: list[EncodedPrompt] = []
    for group in groups.values():
        if len(group) > most:
            group = list({prompt_key(p.row.prompt): p for p in group}.values())  # a repeated prompt counts once
        if len(group) > most:
            chosen = {id(r) for r in _split("data.max_prompts_per_task", [p.row for p in group], [most], seed)[0]}
            group = [p for p in group if id(p.row) in chosen]
        rest += group
    return rest


def encode_demonstrations(
    rows: Sequence[Demonstration], tokenizer: Any, *, on_bad_row: str = "error"
) -> list[tuple[Encoded, Demonstration]]:
    """Rows with their token ids. A response whose row says ``"finished": false`` was cut off and gets no end; one that
    is empty as well has no token to imitate, and its row is left out, and told."""

    def one(row: Demonstration) -> Encoded:
        finished = row.meta.get("finished") is not False
        return encode(tokenizer, row.prompt, row.response, finished=finished, source=row.source)

    pairs = encode_rows("demonstrations", rows, one, on_bad_row)
    examples = [(e, r) for r, e in pairs if e.response]
    if len(examples) < len(pairs):
        say(f"  {len(pairs) - len(examples)} of {len(pairs)} responses were cut off before their first token: left out")
    return examples


def load_demonstrations(
    arguments: DataArguments, names: Sequence[str], tokenizer: Any
) -> tuple[list[Encoded], list[Demonstration]]:
    """Read and encode prompt/response files; rows that are too long are left out and counted."""
    result = read_demonstrations(locate(arguments, names), **reading(arguments))
    tell_skipped("demonstrations", result)
    count, limits = len(result.rows), (arguments.max_length, arguments.max_prompt_length)
    rows = [r for r in result.rows if not surely_too_long(tokenizer, r.prompt, [r.response], *limits)]
    pairs = encode_demonstrations(rows, tokenizer, on_bad_row=arguments.on_bad_row)
    fitting = [(e, r) for e, r in pairs if fit([e], *limits)]
    if not fitting:
        raise DataError(
            f"none of {count} demonstrations fits max_length {arguments.max_length} and max_prompt_length "
            f"{arguments.max_prompt_length}"
        )
    if long := count - len(rows) + len(pairs) - len(fitting):
        say(f"  {long} of {count} demonstrations are too long: left out")
    return [e for e, _ in fitting], [r for _, r in fitting]
