"""The page of a study, all from its results: tables with intervals over seeds, pictures, the claims' verdicts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from stable_rlhf.evaluate.figures import colours
from stable_rlhf.evaluate.findings import SCORER_NAMES, verdict
from stable_rlhf.evaluate.over_seeds import COMPARED
from stable_rlhf.evaluate.over_seeds import names as policy_names
from stable_rlhf.evaluate.paper import SOURCE, TABLE_1, TABLE_2
from stable_rlhf.show.page import Picture, drawn, render
from stable_rlhf.show.pictures import FAINT, INK, legend_below, panels, plain, png

Results = Mapping[str, Any]
NONE = "–"

# figure: heading, factor, digits
POLICY_FIGURES = {
    "main_win": ("main: wins %", 100, 1),
    "main_lose": ("main: loses %", 100, 1),
    "main_gold_gain": ("main: gold − SFT", 1, 3),
    "forget_win": ("forget: wins %", 100, 1),
    "forget_lose": ("forget: loses %", 100, 1),
    "forget_gold_gain": ("forget: gold − SFT", 1, 3),
    "main_kl": ("KL", 1, 2),
    "main_length": ("length", 1, 1),
    "train_score_late": ("late change of score", 1, 3),
    "train_gold_late": ("late change of gold", 1, 3),
    "rehearsal_share": ("rehearsal's share", 1, 2),
}
SCORER_FIGURES = {
    "accuracy": ("accuracy %", 100, 1),
    "ece": ("ECE %", 100, 1),
    "ece_equal_mass": ("ECE % equal mass", 100, 1),
    "ece_after_temperature": ("ECE % after T", 100, 1),
    "brier": ("Brier", 1, 3),
    "temperature": ("T", 1, 2),
    "task_mean_spread": ("spread of task means", 1, 3),
    "task_relative_spread": ("same / spread within", 1, 3),
}
Cell = tuple[str, str]
Table = tuple[str, list[str], list[tuple[str, list[Cell]]]]  # what the rows are, columns, rows of figure and interval


def _cell(interval: Mapping[str, float | None] | None, factor: float, digits: int, *, sign: bool = False) -> Cell:
    if interval is None or interval["value"] is None:
        return NONE, ""
    form = f"{'+' if sign else ''}.{digits}f"
    value, low, high = (None if end is None else format(factor * end, form) for end in
                        (interval["value"], interval["low"], interval["high"]))  # fmt: skip
    return str(value), "" if low is None or high is None else f"[{low}, {high}]"


def tables(results: Results) -> list[Table]:
    """Policies, policies minus RM-PPO, scorers, and what the paper has of both; each figure is a mean over seeds with
    its 95 % interval."""
    sections: list[Table] = []
    called = policy_names(results)

    def of(title: str, group: Mapping[str, Any], names: Mapping[str, str], figures: Mapping[str, Any]) -> None:
        columns = {key: figure for key, figure in figures.items() if any(key in part for part in group.values())}
        rows = [
            (
                names.get(name, name),
                [_cell(part.get(key), factor, digits) for key, (_, factor, digits) in columns.items()],
            )
            for name, part in group.items()
        ]
        sections.append((title, [heading for heading, _, _ in columns.values()], rows))

    of("Policy against SFT", results["means"]["policies"], called, POLICY_FIGURES)
    differences: dict[tuple[str, str], dict[str, Any]] = {}
    for row in results["comparisons"]:
        pair = called.get(row["variant"], row["variant"]), called.get(row["minus"], row["minus"])
        differences.setdefault(pair, {})[row["figure"]] = row
    if differences:
        alike = len({minus for _, minus in differences}) == 1
        title = f"Minus {next(iter(differences))[1]}, seed by seed" if alike else "Difference, seed by seed"
        keys = [key for key in COMPARED if any(key in part for part in differences.values())]
        rows = [
            (
                name if alike else f"{name} minus {minus}",
                [_cell(part.get(key), *POLICY_FIGURES[key][1:], sign=True) for key in keys],
            )
            for (name, minus), part in differences.items()
        ]
        sections.append((title, [POLICY_FIGURES[key][0] for key in keys], rows))
    of("Scorer", results["means"]["scorers"], SCORER_NAMES, SCORER_FIGURES)
    return sections + _beside_the_paper(results)


def _beside_the_paper(results: Results) -> list[Table]:
    """Its tables 1 and 2 beside the same figures of these runs, in percent."""
    sections: list[Table] = []
    policies, scorers = results["means"]["policies"], results["means"]["scorers"]
    labels = results.get("labels", {})
    known = {name: row for name, row in TABLE_2.items() if name in policies and name not in labels}
    keys = [(on, what) for on in ("main", "forget") for what in ("win", "lose")]
    if known:
        columns = [part for on, what in keys for part in (f"{on}: {what}s %", "paper")]
        rows = []
        for name, row in known.items():
            cells: list[Cell] = []
            for on, what in keys:
                cells += [_cell(policies[name].get(f"{on}_{what}"), 100, 1), (f"{row[on][what]:.2f}", "")]
            rows.append((policy_names(results)[name], cells))
        sections.append(("Beside the paper's Table 2", columns, rows))
    if {"rm", "am"} <= set(scorers):
        columns = ["accuracy %", *(f"{data}" for data in TABLE_1), "ECE %", *(f"{data}" for data in TABLE_1)]
        rows = []
        for name in ("rm", "am"):
            cells = []
            for key in ("accuracy", "ece"):
                cells.append(_cell(scorers[name].get(key), 100, 1))
                cells += [(f"{table[name][key]:.2f}", "") for table in TABLE_1.values()]
            rows.append((SCORER_NAMES[name], cells))
        sections.append(("Beside the paper's Table 1", columns, rows))
    return sections


def markdown(results: Results) -> str:
    """The tables and claims as Markdown."""
    out = [f"## {results['title']}", "", *_lead(results), ""]
    for title, columns, rows in tables(results):
        out += [f"| {' | '.join([title, *columns])} |", "|---|" + "---:|" * len(columns)]
        out += [f"| {name} | {' | '.join(' '.join(filter(None, cell)) for cell in cells)} |" for name, cells in rows]
        out.append("")
    for item in results["claims"]:
        out.append(f"- **{verdict(item['held'])}**: {item['claim']} {item['detail']}")
    return "\n".join(out) + "\n"


def _lead(results: Results) -> list[str]:
    called = policy_names(results)
    seeds, variants = results["seeds"], [called.get(name, name) for name in results["means"]["policies"]]
    judges = ", ".join(results["judges"])
    lines = [
        f"{len(variants)} variants ({', '.join(variants)}) on {len(seeds)} seeds ({', '.join(map(str, seeds))}); "
        f"judge: {judges}. Within a seed all variants share data, SFT, pairs and scorers; brackets are 95 % intervals "
        "over the seeds (Student's t), differences and ratios taken seed by seed."
    ]
    validation = results["validation"]
    if results["kind"] == "validation":
        lines.append("These are validation seeds, run to choose the settings: they prove nothing by themselves.")
    elif not validation:
        lines.append("No run of validation seeds is known, so it cannot be told what the settings were chosen on.")
    else:
        same = "the very settings" if validation["same_settings"] else "OTHER SETTINGS than those"
        tried = ", ".join(called.get(name, name) for name in validation["variants"])
        ran = f"{', '.join(map(str, validation['seeds']))} ({tried})"
        lines.append(f"Validation seeds {ran} ran before, with {same} reported here.")
    return lines


# -- pictures ----------------------------------------------------------------------------------------------------------


def _by_variant(results: Results) -> dict[str, list[dict[str, Any]]]:
    points: dict[str, list[dict[str, Any]]] = {}
    for row in results["curves"]:
        points.setdefault(row["variant"], []).append(row)
    return points


def _gained(row: Mapping[str, Any], key: str) -> np.ndarray:
    """A curve; scores from their first value on, as scorers have different zeros."""
    values = np.asarray(row[key], dtype=float)
    return values - values[0] if key == "score" else values


def training_curves(results: Results) -> bytes:
    """Score gained, gold score, KL and length over the steps: a thin line a seed, a thick one for their mean."""
    shown = [
        ("score", "Score gained (the scorer's own view)", "score − first"),
        ("gold", "Gold score (the truth)", "gold score"),
        ("kl", "KL from the SFT policy", "nats"),
        ("length", "Length of responses", "tokens"),
    ]
    groups, called = _by_variant(results), policy_names(results)
    paint = colours(groups)
    shown = [p for p in shown if any(p[0] in row for rows in groups.values() for row in rows)]
    with panels(len(shown), 2.9, 0.8) as (figure, axes):
        for ax, (key, title, unit) in zip(axes, shown, strict=True):
            for variant, rows in groups.items():
                known = [row for row in rows if key in row]
                for row in known:
                    ax.plot(row["step"], _gained(row, key), color=paint[variant], alpha=0.25, linewidth=0.8)
                if known:
                    mean = np.mean([_gained(row, key) for row in known], axis=0)
                    ax.plot(
                        known[0]["step"], mean, color=paint[variant], linewidth=2, label=called.get(variant, variant)
                    )
            ax.set_title(title, loc="left")
            ax.set(xlabel="step", ylabel=unit)
        legend_below(figure, axes[0], 3)
        return png(figure)


def frontier(results: Results) -> bytes:
    """Score gained and gold score against KL, mean over seeds: what a policy buys with the distance it moves."""
    groups, called = _by_variant(results), policy_names(results)
    paint = colours(groups)
    shown = [("score", "score − first"), ("gold", "gold score")]
    shown = [p for p in shown if any(p[0] in row for rows in groups.values() for row in rows)]
    with panels(len(shown), 4.2, columns=len(shown)) as (figure, axes):
        for ax, (key, unit) in zip(axes, shown, strict=True):
            for variant, rows in groups.items():
                known = [row for row in rows if key in row]
                if known:
                    x = np.mean([row["kl"] for row in known], axis=0)
                    y = np.mean([_gained(row, key) for row in known], axis=0)
                    ax.plot(x, y, color=paint[variant], linewidth=1.8, label=called.get(variant, variant))
                    ax.plot(x[-1:], y[-1:], "o", color=paint[variant], markersize=6)
            ax.set(xlabel="KL from the SFT policy, nats (dot: the end)", ylabel=unit)
        legend_below(figure, axes[0], 3)
        return png(figure)


def outcomes(results: Results) -> bytes:
    """Every seed's figure of each variant, their mean and its interval, for what the claims speak of."""
    keys = ["main_win", "main_gold_gain", "forget_lose", "forget_gold_gain"]
    group = results["means"]["policies"]
    keys = [key for key in keys if any(key in part for part in group.values())]
    return _dots(results, "policies", "variant", policy_names(results), keys, POLICY_FIGURES)


def scorers(results: Results) -> bytes:
    """The same of the scorers, the seeds' pairs joined by lines."""
    keys = ["accuracy", "ece", "ece_after_temperature", "task_mean_spread"]
    return _dots(results, "scorers", "scorer", SCORER_NAMES, keys, SCORER_FIGURES, joined=True)


def _dots(
    results: Results, group: str, who: str, names: Mapping[str, str], keys: Sequence[str], headings: Mapping[str, Any],
    *, joined: bool = False,
) -> bytes:  # fmt: skip
    means = results["means"][group]
    paint = {**colours(means), "sft": INK}
    places = {name: place for place, name in enumerate(means)}
    with panels(len(keys), 1.1 + 0.28 * len(means), 1, sharey=True) as (figure, axes):
        for ax, key in zip(axes, keys, strict=True):
            heading, factor, _ = headings[key]
            seeds: dict[int, list[tuple[float, int]]] = {}
            for row in results[group]:
                if row[key] is not None:
                    seeds.setdefault(row["seed"], []).append((factor * row[key], places[row[who]]))
            for points in seeds.values():
                x, y = zip(*points, strict=True)
                style = "-" if joined else "none"
                ax.plot(x, y, linestyle=style, color=FAINT, linewidth=0.8, marker="o", markersize=3.5, zorder=1)
            for name, part in means.items():
                if key not in part:
                    continue
                value, low, high = (part[key][end] for end in ("value", "low", "high"))
                if low is not None:
                    ax.plot([factor * low, factor * high], [places[name]] * 2, color=paint[name], linewidth=2.2)
                ax.plot([factor * value], [places[name]], "D", color=paint[name], markersize=6)
            ax.set_title(heading, loc="left")
            ax.grid(axis="y", visible=False)
        axes[0].set_yticks(list(places.values()), [plain(names.get(name, name)) for name in places])
        axes[0].set_ylim(len(places) - 0.5, -0.5)
        return png(figure)


def make_page(results: Results) -> tuple[str, list[Picture]]:
    """The self-contained page, and the pictures in it."""
    pictures = drawn(
        (True, "curves", "While the policies are tuned",
         "Each thin line is a seed, each thick one their mean. A score that rises while the gold score falls is "
         "over-optimisation: the policy has learnt to please the scorer rather than to do well.",
         lambda: training_curves(results)),
        (True, "frontier", "What is bought with the distance from SFT",
         "The same curves against KL instead of steps, so that fast and slow policies compare; mean over seeds.",
         lambda: frontier(results)),
        (True, "outcomes", "The tuned policies against SFT",
         "Grey dots are seeds, diamonds their means, bars 95 % intervals over seeds. The forget set holds what SFT was "
         "already good at, so losses there are forgetting.", lambda: outcomes(results)),
        (True, "scorers", "The scorers",
         "Grey lines join the two scorers of a seed, which learnt from the same pairs. ECE, the calibration error, is "
         "better when lower; after T: scores divided by one temperature, fitted on other pairs.",
         lambda: scorers(results)),
    )  # fmt: skip
    page = render(
        "evaluate/study.html.j2",
        title=results["title"],
        lead=_lead(results),
        claims=[{**item, "verdict": verdict(item["held"])} for item in results["claims"]],
        tables=tables(results),
        pictures=pictures,
        facts=[
            (name, results[key])
            for name, key in (
                ("Command", "command"), ("Device", "device"), ("Seeds", "seeds"), ("Settings", "fingerprint"),
                ("Hours of all stages", "hours"),
            )
        ],
        settings=results["settings"],
        versions=results["versions"],
        source=SOURCE,
    )  # fmt: skip
    return page, pictures
