"""The report of a run, all from ``summary``: a self-contained HTML page, and a table for a terminal."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from stable_rlhf.data.records import as_text
from stable_rlhf.evaluate import figures
from stable_rlhf.evaluate.findings import SCORER_NAMES, VARIANT_NAMES, findings, scorer_names, variant_names, verdict
from stable_rlhf.evaluate.paper import SOURCE, TABLE_1, TABLE_2
from stable_rlhf.evaluate.rewardbench import TITLES
from stable_rlhf.rehearsal import figures as selection_figures
from stable_rlhf.show.page import Picture, drawn, render, shortened

if TYPE_CHECKING:
    from rich.console import Group

NONE = "–"
EXAMPLES = 12  # clusters whose example prompt the report shows
EXAMPLE_CHARACTERS = 300
_SETS = {"main": "main set", "forget": "forget set"}


def _number(value: float | None, digits: int = 2) -> str:
    return NONE if value is None else f"{value:.{digits}f}"


def _percent(value: float | None) -> str:
    return NONE if value is None else f"{100 * value:.1f}"


def _bounds(low: float, high: float) -> str:
    return f"[{100 * low:.1f}, {100 * high:.1f}]"


def _dash(bounds: str) -> str:
    """ "[1.0, 2.0]" as "1.0–2.0", narrow enough for a terminal."""
    return bounds.strip("[]").replace(", ", "–")


def _interval(interval: dict[str, float]) -> tuple[str, str]:
    return _percent(interval["value"]), _bounds(interval["low"], interval["high"])


def _share(part: dict[str, Any] | None, which: str) -> tuple[str, str]:
    """A share in percent and its interval; a tie has no interval of its own."""
    if not part:
        return NONE, ""
    ci = part.get(f"{which}_ci")
    return _percent(part[which]), _bounds(*ci) if ci else ""


def _relative_spread(part: dict[str, Any]) -> float | None:
    return part["task_mean_spread"] / part["task_std_mean"] if part.get("task_std_mean") else None


Cell = tuple[str, str]  # figure, interval
Rows = list[tuple[str, list[Cell]]]

# The terminal shows the first TERMINAL_COLUMNS of each, so that the table fits 80 characters.
SCORER_COLUMNS = ["accuracy %", "ECE %", "ECE % after T", "T", "spread of task means", "same / spread within", "Brier",
                  "ECE % equal mass"]  # fmt: skip
POLICY_COLUMNS = ["main: wins %", "main: loses %", "forget: wins %", "forget: loses %", "gold − SFT", "KL", "length"]
REWARD_COLUMNS = ["mean", "SFT", "difference", "prompts"]
TERMINAL_COLUMNS = 6


def _scorer_rows(scorers: dict[str, Any]) -> Rows:
    rows: Rows = []
    for key, name in scorer_names(scorers).items():
        part = scorers[key]
        cells = [
            _interval(part["accuracy"]),
            _interval(part["ece"]),
            _interval(part["ece_after_temperature"]),
            (_number(part["temperature"]), ""),
            (_number(part["task_mean_spread"]), ""),
            (_number(_relative_spread(part)), ""),
            (_number(part["brier"], 3), ""),
            _interval(part["ece_equal_mass"]),
        ]
        rows.append((name, cells))
    return rows


def _benchmark_rows(benchmark: dict[str, Any] | None) -> tuple[list[str], Rows]:
    """Scorers, and a row for the benchmark's score, each section and each subset."""
    if not benchmark:
        return [], []
    parts = benchmark["scorers"]
    first = next(iter(parts.values()))
    rows: Rows = [("score", [(_percent(part["score"]), "") for part in parts.values()])]
    for name in first.get("sections") or ():
        rows.append((name, [(_percent(part["sections"][name]), "") for part in parts.values()]))
    for name, subset in first["subsets"].items():
        cells = [part["subsets"][name] for part in parts.values()]
        rows.append(
            (f"{name} ({subset['n']})", [_interval(c) if "low" in c else (_percent(c["value"]), "") for c in cells])
        )
    return list(parts), rows


def _benchmark_words(benchmark: dict[str, Any] | None) -> dict[str, Any] | None:
    """What the page has of a benchmark."""
    if not benchmark:
        return None
    names, rows = _benchmark_rows(benchmark)
    known = scorer_names(benchmark["scorers"])
    return {
        "title": TITLES[benchmark["name"]], "columns": [f"{known[name]} %" for name in names], "rows": rows,
        "source": benchmark["source"], "items": benchmark["items"], "two": benchmark["name"] == "rewardbench2",
    }  # fmt: skip


def _gold(entry: dict[str, Any]) -> str:
    """Gain in mean gold score over SFT, main then forget set."""
    parts = [entry.get(on) or {} for on in _SETS]
    gains = [
        f"{part['gold'] - part['sft_gold']:+.3f}"
        if part.get("gold") is not None and part.get("sft_gold") is not None
        else NONE
        for part in parts
    ]
    return NONE if set(gains) == {NONE} else " / ".join(gains)


def _policy_rows(policies: dict[str, Any]) -> Rows:
    rows: Rows = []
    for key, name in variant_names(policies).items():
        entry = policies[key]
        main, forget = entry.get("main"), entry.get("forget")
        about = main or forget or {}
        cells = [
            _share(main, "win"),
            _share(main, "lose"),
            _share(forget, "win"),
            _share(forget, "lose"),
            (_gold(entry), ""),
            (_number(about.get("kl")), ""),
            (_number(about.get("length"), 1), ""),
        ]
        rows.append((name, cells))
    return rows


def _reward_rows(policies: dict[str, Any]) -> Rows:
    """A row for each policy, set and reward function of the settings."""
    rows: Rows = []
    for key, name in variant_names(policies).items():
        for on, words in _SETS.items():
            for reward, part in ((policies[key].get(on) or {}).get("rewards") or {}).items():
                gap = part["difference"]
                ends = "" if gap["low"] is None else f"[{gap['low']:+.3f}, {gap['high']:+.3f}]"
                cells = [(_number(part["value"], 3), ""), (_number(part["sft"], 3), "")]
                cells += [(f"{gap['value']:+.3f}", ends), (str(part["n"]), "")]
                rows.append((f"{name}, {words}: {reward}", cells))
    return rows


def _paper_scorer_rows() -> Rows:
    rows: Rows = []
    for data, table in TABLE_1.items():
        for key, row in table.items():
            cells = [(f"{row['accuracy']:.2f}", ""), (f"{row['ece']:.2f}", "")]
            rows.append((f"{key.upper()}, {data}", cells + [(NONE, "")] * (len(SCORER_COLUMNS) - 2)))
    return rows


def _paper_policy_rows() -> Rows:
    rows: Rows = []
    for key, row in TABLE_2.items():
        cells = [(f"{row[on][which]:.2f}", "") for on in _SETS for which in ("win", "lose")]
        rows.append((VARIANT_NAMES[key], cells + [(NONE, "")] * (len(POLICY_COLUMNS) - 4)))
    return rows


def _tokens(scorers: dict[str, Any], policies: dict[str, Any]) -> str:
    """Training tokens of every scorer and policy that says so, a scorer under ``training``."""
    counts = []
    for names, group in ((scorer_names(scorers), scorers), (variant_names(policies), policies)):
        for key, name in names.items():
            part = group[key]
            count = part.get("tokens_seen", (part.get("training") or {}).get("tokens_seen"))
            if count is not None:
                counts.append(f"{name} {int(count):,}")
    return ", ".join(counts)


def _judges(policies: dict[str, Any]) -> list[str]:
    return sorted({entry[on]["judge"] for entry in policies.values() for on in _SETS if entry and entry.get(on)})


def _agreement(policies: dict[str, Any]) -> list[tuple[str, str, str, str, str, int]]:
    """How far a judge that compares two answers agrees with itself, one row a policy and set."""
    rows = []
    for key, name in variant_names(policies).items():
        for on, words in _SETS.items():
            part = policies[key].get(on) or {}
            if part.get("order_agreement") is not None:
                kappa, first = _number(part["order_kappa"]), _percent(part["first_position"])
                agreement = _percent(part["order_agreement"])
                rows.append((f"{name}, {words}", str(part["asked"]), agreement, kappa, first, part["unreadable"]))
    return rows


def _findings(summary: dict[str, Any]) -> list[dict[str, Any]]:
    known = summary.get("findings")
    return findings(summary) if known is None else list(known)


def summary_table(summary: dict[str, Any]) -> Group:
    """The run's figures as one table for a terminal (rich), sections for scorers and policies, then the findings.

    A figure's 95 % interval stands below it; the paper's figures are dimmed. Missing parts leave out their section.
    """
    from rich.console import Group
    from rich.table import Table
    from rich.text import Text

    scorers, policies = summary.get("scorers") or {}, summary.get("policies") or {}
    title = Text(str(summary.get("title", "stable_rlhf")))
    table = Table(title=title, show_header=False, box=None, padding=(0, 1, 0, 0), pad_edge=False)
    table.add_column(no_wrap=True)
    for _ in range(TERMINAL_COLUMNS):
        table.add_column(justify="right", overflow="fold")

    def section(title: str, columns: list[str], rows: Rows, published: Rows) -> None:
        table.add_row()
        table.add_row(Text(title), *map(Text, columns[:TERMINAL_COLUMNS]), style="bold")
        for name, cells in rows:
            texts = ["\n".join(filter(None, (value, _dash(ci)))) for value, ci in cells[:TERMINAL_COLUMNS]]
            table.add_row(Text(name), *map(Text, texts))
        for name, cells in published:
            table.add_row(Text(f"paper: {name}"), *(Text(value) for value, _ in cells[:TERMINAL_COLUMNS]), style="dim")

    if _scorer_rows(scorers):
        section("Scorer", SCORER_COLUMNS, _scorer_rows(scorers), _paper_scorer_rows()[:2])
    if _policy_rows(policies):
        section("Policy against SFT", POLICY_COLUMNS, _policy_rows(policies), _paper_policy_rows())
    if rewards := _reward_rows(policies):
        section("Reward on the same answers", REWARD_COLUMNS, rewards, [])
    claims = Table.grid(padding=(0, 2))
    claims.add_row()
    colours = {True: "green", False: "red", None: "yellow"}
    for item in _findings(summary):
        claims.add_row(Text(verdict(item["held"]), style=colours[item["held"]], no_wrap=True), Text(item["claim"]))
    return Group(table, claims)


def _lead(summary: dict[str, Any]) -> list[str]:
    """What the run is, in two sentences."""
    scorers, policies = summary.get("scorers") or {}, summary.get("policies") or {}
    names = [name.replace("Reward", "reward") for name in scorer_names(scorers).values()]
    articled = [("a " if name[0].islower() else "an ") + name for name in names]
    variants = list(variant_names(policies).values())
    asks = (
        f"It asks which claims of the paper on the Advantage Model and Selective Rehearsal ({SOURCE}) hold here; "
        "one training seed, with 95 % intervals over the test items."
    )
    if summary.get("kind") == "evaluation":
        return [
            "This page measures models that were trained before: "
            f"{', '.join([*scorer_names(scorers).values(), *variants])}.",
            asks,
        ]
    where = {
        "world": "a small world of text skills that the package generates itself, where the true quality of any "
        "response is known exactly",
        "real": "real preference pairs and prompts",
    }.get(str(summary.get("kind")), "the given data")
    deed = f"trained {' and '.join(articled)}" if names else "ran"
    tuned = f", and tuned a language model as {', '.join(variants)}," if variants else ""
    return [f"This run {deed}{tuned} on {where}.", asks]


def _scorer_pictures(scorers: dict[str, Any]) -> list[Picture]:
    tasks = figures.has_tasks(scorers)
    return drawn(
        (True, "reliability", "Confidence and accuracy",
         "A scorer that says 80 % should be right 80 % of the time: bars below the dashed line are overconfident, bars "
         "above it underconfident. Below, scores are divided by the temperature T that fits other pairs best: what is "
         "left there is not a matter of scale.", lambda: figures.reliability(scorers)),
        (True, "difference", "Accuracy against score difference",
         "The further apart two scores are, the more often the ranking should be right; a calibrated scorer follows "
         "the dashed curve.", lambda: figures.difference(scorers)),
        (True, "densities", "Scores of chosen and rejected responses",
         "The more the two shapes part, the better the scorer tells good from bad; each scorer has its own scale.",
         lambda: figures.densities(scorers)),
        (tasks, "task-densities", "Scores task by task",
         "A policy tuned on scores that sit higher for one task than for another may drift toward the style of that "
         "task; ridges that line up are safer (at most the 12 largest tasks are shown).",
         lambda: figures.task_densities(scorers)),
        (tasks, "tasks", "Level and spread of scores per task",
         "Equal bars mean that all tasks are scored on one scale; the lowest panel compares the scorers whatever their "
         "scales.", lambda: figures.per_task(scorers)),
    )  # fmt: skip


def _policy_pictures(policies: dict[str, Any]) -> list[Picture]:
    entries = [entry or {} for entry in policies.values()]
    return drawn(
        (any(entry.get(on) for entry in entries for on in _SETS), "outcomes", "Who wins against the SFT policy",
         "Each prompt is answered by the tuned policy and by the SFT policy it started from; the forget set holds what "
         "SFT was already good at, so losses there are forgetting.", lambda: figures.outcomes(policies)),
        (any(entry.get("curve") for entry in entries), "ppo", "During PPO",
         "A score that rises while the gold score does not is reward hacking; KL says how far the policy has moved "
         "from SFT (thick lines are moving averages; scores of different scorers have different scales; where rounds "
         "follow each other, a dotted line parts them).", lambda: figures.ppo_curves(policies)),
    )  # fmt: skip


def _selections(summary: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """What the page says of each selection, by its stage: ``selection`` (Advantage Model) and ``selection-rm``."""
    selections = {}
    for key in ("selection", *(f"selection-{scorer}" for scorer in SCORER_NAMES)):
        if selection := summary.get(key):
            scorer = key.partition("-")[2]
            selections[key] = {
                **selection,
                "by": f", scored by: {SCORER_NAMES[scorer]}" if scorer else "",
                "pictures": _selection_pictures(selection, scorer),
                "tasks": sorted((selection.get("tasks") or {}).items()),
                "examples": _examples(selection),
            }
    return selections


def _selection_pictures(selection: dict[str, Any], scorer: str) -> list[Picture]:
    end = f"-{scorer}" if scorer else ""
    return drawn(
        (selection.get("map"), f"selection-map{end}", "What is kept for rehearsal",
         "Each point is a response of the SFT policy placed by its meaning; the best-scored of every cluster are "
         "rehearsed during PPO.", lambda: selection_figures.selection_map(selection)),
        (selection.get("clusters"), f"cluster-sizes{end}", "Cluster sizes",
         "Keeping the same number from every cluster gives rare kinds of prompts a place.",
         lambda: selection_figures.cluster_sizes(selection)),
        (selection.get("sweep"), f"cluster-sweep{end}", "Number of clusters",
         "The same selection with other numbers of clusters; the dashed line is the number used.",
         lambda: selection_figures.sweep(selection["sweep"], selection["num_clusters"])),
    )  # fmt: skip


def _examples(selection: dict[str, Any]) -> list[dict[str, Any]]:
    clusters = [row for row in selection.get("clusters") or [] if row.get("example") and row.get("size")]
    rows = []
    for row in sorted(clusters, key=lambda row: -row["size"])[:EXAMPLES]:
        tasks = sorted((row.get("tasks") or {}).items(), key=lambda item: -item[1])[:3]
        score = row.get("mean_score")
        rows.append(
            {
                "size": row["size"],
                "kept": row["kept"],
                "score": _number(score),
                "tasks": ", ".join(f"{name} ({count})" for name, count in tasks) or NONE,
                "example": shortened(as_text(row["example"]), EXAMPLE_CHARACTERS),
            }
        )
    return rows


def make_report(summary: dict[str, Any]) -> tuple[str, list[Picture]]:
    """The HTML report of ``summary`` and the pictures in it, each drawn once: pictures embedded, no script, no request
    to anywhere, every value escaped. Parts that the summary lacks (a scorer, policies, …) leave out their sections.
    """
    scorers, policies = summary.get("scorers") or {}, summary.get("policies") or {}
    selections, stages = _selections(summary), summary.get("stages") or []
    scorer_rows, policy_rows = _scorer_rows(scorers), _policy_rows(policies)
    sections = {
        "scorer_pictures": _scorer_pictures(scorers) if scorer_rows else [],
        "policy_pictures": _policy_pictures(policies),
        "selection_pictures": [picture for part in selections.values() for picture in part["pictures"]],
        "stage_pictures": drawn(
            (
                stages,
                "stages",
                "Time",
                "Seconds that each stage of the run took.",
                lambda: figures.stage_seconds(stages),
            )
        ),
    }
    page = render(
        "evaluate/report.html.j2",
        **sections,
        title=summary.get("title", "stable_rlhf"),
        lead=_lead(summary),
        findings=[{**item, "verdict": verdict(item["held"])} for item in _findings(summary)],
        scorer_columns=SCORER_COLUMNS,
        scorer_rows=scorer_rows,
        paper_scorer_rows=_paper_scorer_rows(),
        scorer_pairs=[(name, scorers[key]["pairs"]) for key, name in scorer_names(scorers).items()],
        bins=sorted({part["bins"] for part in scorers.values() if part}),
        ece_chance=[_percent(p["ece_if_calibrated"]) for p in scorers.values() if p and "ece_if_calibrated" in p],
        temperature_fits=sorted({part.get("temperature_fit", "fitted") for part in scorers.values() if part}),
        benchmark=_benchmark_words(summary.get("benchmark")),
        policy_columns=POLICY_COLUMNS,
        policy_rows=policy_rows,
        paper_policy_rows=_paper_policy_rows(),
        reward_columns=REWARD_COLUMNS,
        reward_rows=_reward_rows(policies),
        judges=_judges(policies),
        agreement=_agreement(policies),
        tokens=_tokens(scorers, policies),
        selections=selections,
        settings=summary.get("settings") or {},
        versions=summary.get("versions") or {},
        facts=[
            (name, summary[key])
            for name, key in (("Command", "command"), ("Seed", "seed"), ("Device", "device"))
            if summary.get(key) is not None
        ],
    )
    return page, [picture for pictures in sections.values() for picture in pictures]
