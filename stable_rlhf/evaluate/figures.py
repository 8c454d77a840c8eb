"""Pictures of a run, each a function of figures in ``summary`` that returns PNG bytes.

One palette (Okabe and Ito's, safe for colour-blind readers) throughout: a scorer or variant has one colour everywhere.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from contextlib import AbstractContextManager
from itertools import cycle
from typing import Any

import numpy as np

from stable_rlhf.evaluate.findings import round_of, scorer_names, variant_names
from stable_rlhf.metrics import NO_TASK, sigmoid, wilson
from stable_rlhf.settings.variants import VARIANTS
from stable_rlhf.show.pictures import FAINT, INK, legend_below, panels, picture, plain, png

COLOURS = {name: row.colour for name, row in VARIANTS.items()}  # a scorer's is that of the variant of its name
_OTHERS = ("#CC79A7", "#8C6D31", "#4B4B9B", "#222222")  # of scorers and policies with names of their own
WIN, TIE, LOSE = "#1B7837", "#D9D9D9", "#762A83"
CHOSEN, REJECTED = "#009E73", "#CC79A7"
IDEAL = {"color": INK, "linestyle": "--", "linewidth": 1.2, "label": "ideal"}
MAX_RIDGES = 12
MAX_TASK_LABELS = 24
MAX_COLUMNS = 3  # panels side by side; more go to further rows


def colours(names: Iterable[str]) -> dict[str, str]:
    """A colour for each scorer or variant: its own where it has one, darker from round to round, else the next of the
    spare ones."""
    spare, chosen = cycle(_OTHERS), {}
    for name in names:
        first, number = round_of(name)
        chosen[name] = _darker(COLOURS[first], 0.6 ** (number - 1)) if first in COLOURS else next(spare)
    return chosen


def _darker(colour: str, share: float) -> str:
    """``share`` of the colour, the rest black."""
    return "#" + "".join(f"{round(share * int(colour[i : i + 2], 16)):02X}" for i in (1, 3, 5))


def _label(name: str) -> str:
    return plain(name, 26)  # "Advantage Model, round 2" whole


def _panels(count: int, height: float, **kwargs: Any) -> AbstractContextManager[tuple[Any, list[Any]]]:
    return panels(count, height, columns=min(count, MAX_COLUMNS), **kwargs)


def _draw_reliability(axes: Any, name: str, colour: str, rows: list[dict[str, Any]], ece: dict[str, float]) -> None:
    for row in rows:
        ci = wilson(row["accuracy"] * row["count"], row["count"])
        width = max(row["high"] - row["low"], 0.004)
        axes.bar(row["low"], row["accuracy"], width=width, align="edge", color=colour, alpha=0.75, edgecolor="white")
        middle = row["low"] + width / 2
        axes.plot([middle, middle], [ci["low"], ci["high"]], color=INK, linewidth=1)
    axes.plot([0.5, 1], [0.5, 1], **IDEAL)
    axes.set(xlim=(0.5, 1), ylim=(0, 1.02), xlabel="confidence σ(|Δ|)", ylabel="share ranked right")
    axes.set_title(f"{name}\nECE {100 * ece['value']:.1f} %")
    axes.legend(loc="upper left")


def reliability(scorers: dict[str, Any]) -> bytes:
    """Reliability diagrams side by side, as trained above and divided by a temperature fitted on other pairs below.

    Bars are accuracy per confidence bin, whiskers 95 % Wilson intervals.
    """
    names = scorer_names(scorers)
    paint, keys = colours(names), list(names)
    groups = [keys[start : start + MAX_COLUMNS] for start in range(0, len(keys), MAX_COLUMNS)]
    columns = len(groups[0])
    with picture(columns, rows=2 * len(groups), size=(9, 7 * len(groups)), sharey=True) as (figure, axes):
        for ax in axes.ravel():
            ax.set_visible(False)
        for place, group in enumerate(groups):
            for column, key in enumerate(group):
                part, name = scorers[key], _label(names[key])
                above, below = axes[2 * place : 2 * place + 2, column]
                _draw_reliability(above, name, paint[key], part["reliability"], part["ece"])
                _draw_reliability(
                    below, f"{name} / T", paint[key], part["reliability_after_temperature"],
                    part["ece_after_temperature"],
                )  # fmt: skip
                for ax in (above, below):
                    ax.set_visible(True)
                    if column:
                        ax.set_ylabel("")
        return png(figure)


def difference(scorers: dict[str, Any]) -> bytes:
    """Accuracy against score difference beside 1/(1 + e^−Δ), one panel per scorer as their scales differ (Fig. 2)."""
    names = scorer_names(scorers)
    keys, paint = list(names), colours(names)
    with _panels(len(keys), 3.8, sharey=True) as (figure, axes):
        for ax, key in zip(axes, keys, strict=True):
            rows = scorers[key]["difference_curve"]
            x = np.array([row["difference"] for row in rows])
            y = np.array([row["accuracy"] for row in rows])
            ci = [wilson(row["accuracy"] * row["count"], row["count"]) for row in rows]
            bars = np.array(
                [
                    [v - c["low"] for v, c in zip(y, ci, strict=True)],
                    [c["high"] - v for v, c in zip(y, ci, strict=True)],
                ]
            )
            ax.errorbar(
                x, y, yerr=bars, color=paint[key], marker="o", markersize=5, linewidth=1.6, capsize=2, label="measured"
            )
            end = max(float(x.max()) * 1.05, 1e-3)
            line = np.linspace(0, end, 200)
            ax.plot(line, sigmoid(line), **{**IDEAL, "label": "1/(1 + e$^{-Δ}$)"})
            ax.set(xlim=(0, end), ylim=(min(0.4, float(y.min()) - 0.05), 1.02), xlabel="score difference |Δ|")
            ax.set_title(_label(names[key]))
            ax.legend(loc="lower right")
        for ax in axes[::MAX_COLUMNS]:
            ax.set_ylabel("share ranked right")
        return png(figure)


def _edges(values: np.ndarray, bins: int = 40) -> np.ndarray:
    """Histogram edges around the central 99 % of the values, so that one outlier does not flatten the picture."""
    low, high = np.quantile(values, [0.005, 0.995])
    margin = 0.1 * (high - low) if high > low else 0.5
    return np.linspace(low - margin, high + margin, bins + 1)


def densities(scorers: dict[str, Any]) -> bytes:
    """Score densities of chosen and rejected responses per scorer (Fig. 3)."""
    names = scorer_names(scorers)
    with _panels(len(names), 3.6) as (figure, axes):
        for ax, key in zip(axes, names, strict=True):
            chosen, rejected = np.asarray(scorers[key]["chosen"]), np.asarray(scorers[key]["rejected"])
            edges = _edges(np.concatenate([chosen, rejected]))
            for values, colour, name in ((rejected, REJECTED, "rejected"), (chosen, CHOSEN, "chosen")):
                ax.hist(values, edges, density=True, histtype="stepfilled", alpha=0.45, color=colour, label=name)
                ax.axvline(values.mean(), color=colour, linewidth=1.6)
            ax.set(xlabel="score", title=_label(names[key]), yticks=[])
        for ax in axes[::MAX_COLUMNS]:
            ax.set_ylabel("density (lines: means)")
        legend_below(figure, axes[0], 2)
        return png(figure)


def _shared_tasks(scorers: dict[str, Any]) -> list[str]:
    """Tasks that every scorer was measured on, by the first one's mean score."""
    first, *others = [scorers[key]["tasks"] for key in scorer_names(scorers)]
    shared = [name for name in first if all(name in tasks for tasks in others)]
    return sorted(shared, key=lambda name: (first[name]["mean"], name))


def _largest_tasks(scorers: dict[str, Any], limit: int) -> list[str]:
    tasks = scorers[next(iter(scorer_names(scorers)))]["tasks"]
    kept = sorted(_shared_tasks(scorers), key=lambda name: (-tasks[name]["count"], name))[:limit]
    return sorted(kept, key=lambda name: (tasks[name]["mean"], name))


def task_densities(scorers: dict[str, Any]) -> bytes:
    """Score densities of the 12 largest tasks, one ridge each, ordered by the first scorer's mean (Fig. 1a)."""
    names = scorer_names(scorers)
    paint, tasks = colours(names), _largest_tasks(scorers, MAX_RIDGES)
    with _panels(len(names), 1.3 + 0.42 * len(tasks), sharey=True) as (figure, axes):
        for ax, key in zip(axes, names, strict=True):
            part = scorers[key]
            label = np.asarray(part["pair_tasks"], dtype=object)
            both = np.stack([np.asarray(part["chosen"]), np.asarray(part["rejected"])])
            edges = _edges(both.ravel(), 48)
            kernel = np.exp(-0.5 * (np.arange(-6, 7) / 2.0) ** 2)
            middle = (edges[1:] + edges[:-1]) / 2
            for height, task in enumerate(tasks):
                values = both[:, label == task].ravel()
                counts, _ = np.histogram(values, edges)
                curve = np.convolve(counts, kernel, mode="same")
                curve = 0.9 * curve / max(float(curve.max()), 1.0)
                ax.fill_between(middle, height, height + curve, color=paint[key], alpha=0.55, linewidth=0)
                ax.plot([values.mean()] * 2, [height, height + 0.9], color=INK, linewidth=1.4)
            ax.set(xlabel="score (black: task's mean)", title=_label(names[key]), ylim=(-0.1, len(tasks) + 0.05))
            ax.set_yticks(range(len(tasks)), [plain(task) for task in tasks])
        return png(figure)


def per_task(scorers: dict[str, Any]) -> bytes:
    """Mean and deviation of the score for each task, and the mean in units of the scorer's own deviation (Fig. 4)."""
    names, labels = scorer_names(scorers), _shared_tasks(scorers)
    paint = colours(names)
    place, width = np.arange(len(labels)), 0.8 / len(names)
    with picture(1, rows=3, size=(9, 7), sharex=True) as (figure, axes):
        for k, key in enumerate(names):
            tasks = scorers[key]["tasks"]
            means = np.array([tasks[name]["mean"] for name in labels])
            stds = np.array([tasks[name]["std"] for name in labels])
            relative = (means - means.mean()) / max(float(stds.mean()), 1e-12)
            for ax, heights in zip(axes[:, 0], (means, stds, relative), strict=True):
                at = place + (k - (len(names) - 1) / 2) * width
                ax.bar(at, heights, width, color=paint[key], label=_label(names[key]))
        titles = (
            "Mean score of each task",
            "Standard deviation of the score within each task",
            "Mean score, centred, in units of the scorer's own average deviation",
        )
        for ax, title, unit in zip(axes[:, 0], titles, ("mean", "deviation", "mean / deviation"), strict=True):
            ax.set_title(title, loc="left")
            ax.set_ylabel(unit)
            ax.axhline(0, color=INK, linewidth=0.8)
            ax.grid(axis="x", visible=False)
        last = axes[-1, 0]
        if len(labels) <= MAX_TASK_LABELS:
            last.set_xticks(
                place, [plain(name, 16) for name in labels], rotation=35, ha="right", rotation_mode="anchor"
            )
        else:
            last.set_xticks([])
            last.set_xlabel(f"{len(labels)} tasks, ordered by the mean of the first scorer")
        legend_below(figure, axes[0, 0], min(len(names), MAX_COLUMNS))
        return png(figure)


def _smooth(values: np.ndarray) -> np.ndarray:
    """Centred moving average over about a tenth of the curve, its window cut at the ends."""
    reach = max(len(values) // 20, 0)
    padded = np.concatenate([[0.0], np.cumsum(values)])
    low = np.maximum(np.arange(len(values)) - reach, 0)
    high = np.minimum(np.arange(len(values)) + reach + 1, len(values))
    return (padded[high] - padded[low]) / (high - low)


def ppo_curves(policies: dict[str, Any]) -> bytes:
    """Score gained, gold score where known, KL and length over the steps of each variant (Fig. 5a); a later round goes
    on where the one before it ended."""
    names = {key: name for key, name in variant_names(policies).items() if policies[key].get("curve")}
    paint, before = colours(names), _steps_before(policies, names)
    rounds = any(before.values())
    curves = [
        ("score", f"Score gained {'within each round' if rounds else 'since the first step'}", "score − first"),
        ("gold", "Gold score (the truth)", "gold score"),
        ("kl", "KL from the SFT policy", "nats"),
        ("length", "Length of responses", "tokens"),
    ]
    curves = [c for c in curves if any(row.get(c[0]) is not None for v in names for row in policies[v]["curve"])]
    with panels(len(curves), 2.7, 0.7) as (figure, axes):
        for ax, (key, title, unit) in zip(axes, curves, strict=True):
            for variant in names:
                rows = [row for row in policies[variant]["curve"] if row.get(key) is not None]
                if not rows:
                    continue
                steps = before[variant] + np.array([r["step"] for r in rows])
                values = np.array([r[key] for r in rows], dtype=float)
                smooth = _smooth(values)
                if key == "score":
                    values, smooth = values - smooth[0], smooth - smooth[0]
                ax.plot(steps, values, color=paint[variant], alpha=0.25, linewidth=0.8)
                ax.plot(
                    steps,
                    smooth,
                    color=paint[variant],
                    linewidth=1.8,
                    label=plain(names[variant]),
                    marker="o" if len(rows) < 3 else None,
                )
            for start in {*before.values()} - {0}:
                ax.axvline(start, color=INK, linewidth=0.8, linestyle=":")
            ax.set_title(title, loc="left")
            ax.set(xlabel="PPO step", ylabel=unit)
        legend_below(figure, axes[0], len({round_of(name)[0] for name in names}) if rounds else 5)
        return png(figure)


def _steps_before(policies: dict[str, Any], names: Iterable[str]) -> dict[str, int]:
    """Steps of the rounds before each variant's."""
    last = {name: max(row["step"] for row in policies[name]["curve"]) for name in names}
    rounds = {name: round_of(name) for name in last}
    return {
        name: sum(last[other] for other in last if rounds[other][0] == first and rounds[other][1] < number)
        for name, (first, number) in rounds.items()
    }


def _draw_outcomes(axes: Any, policies: dict[str, Any], on: str) -> None:
    names = variant_names(policies)
    variants = list(names)
    for place, variant in enumerate(variants):
        part, left = policies[variant].get(on), 0.0
        if not part:
            axes.text(50, place, "not measured", ha="center", va="center", color=FAINT)
            continue
        for key, colour, ink in (("win", WIN, "white"), ("tie", TIE, INK), ("lose", LOSE, "white")):
            share = 100 * part[key]
            axes.barh(place, share, left=left, color=colour, height=0.72, label=key if place == 0 else None)
            if share >= 4:
                axes.text(left + share / 2, place, f"{share:.0f}", ha="center", va="center", color=ink, fontsize=9)
            left += share
    counts = {policies[variant][on]["n"] for variant in variants if policies[variant].get(on)}
    size = f", {counts.pop()} prompts" if len(counts) == 1 else ""
    axes.set(xlim=(0, 100), xlabel="share of prompts, %", title=f"{on.capitalize()} set{size}")
    axes.set_yticks(range(len(variants)), [plain(names[variant]) for variant in variants])
    axes.set_ylim(len(variants) - 0.5, -0.5)
    axes.grid(visible=False)
    axes.spines["left"].set_visible(False)
    axes.tick_params(axis="y", length=0)


def outcomes(policies: dict[str, Any]) -> bytes:
    """Win, tie and lose shares against SFT of each variant, main and forget set side by side (Table 2)."""
    variants = list(variant_names(policies))
    sets = [on for on in ("main", "forget") if any(policies[variant].get(on) for variant in variants)]
    with picture(len(sets), size=(9, 1.6 + 0.45 * len(variants)), sharey=True) as (figure, axes):
        for ax, on in zip(axes[0], sets, strict=True):
            _draw_outcomes(ax, policies, on)
        _outcome_legend(figure)
        return png(figure)


def _outcome_legend(figure: Any, **where: Any) -> None:
    from matplotlib.patches import Patch

    patches = [Patch(color=c, label=n) for n, c in (("wins", WIN), ("ties", TIE), ("loses", LOSE))]
    figure.legend(handles=patches, **({"loc": "outside lower center", "ncols": 3} | where))


def stage_seconds(stages: Sequence[dict[str, Any]]) -> bytes:
    """Seconds of each stage, in the order they ran."""
    seconds = [float(stage["seconds"]) for stage in stages]
    longest = max([*seconds, 1e-9])
    with picture(1, size=(9, 1 + 0.32 * len(stages))) as (figure, axes):
        ax = axes[0, 0]
        ax.barh(range(len(stages)), seconds, color="#6C8EBF", height=0.7)
        for place, (stage, value) in enumerate(zip(stages, seconds, strict=True)):
            note = "done before" if stage.get("skipped") else f"{value:.1f} s"
            ax.text(value + longest * 0.01, place, note, va="center", fontsize=9)
        ax.set_yticks(range(len(stages)), [plain(stage["name"], 28) for stage in stages])
        ax.set_ylim(len(stages) - 0.4, -0.6)
        ax.set(xlim=(0, longest * 1.12), xlabel="seconds", title=f"{sum(seconds):.0f} seconds in all")
        ax.grid(axis="y", visible=False)
        return png(figure)


def overview(summary: dict[str, Any]) -> bytes:
    """One 1200 × 500 picture of a run: reliability of the scorers (those of the first round, where there are more),
    and outcomes on the forget set.

    Raises ValueError when the summary has neither scorers nor a forget (else main) set.
    """
    scorers, policies = summary.get("scorers") or {}, summary.get("policies") or {}
    names = scorer_names(scorers)
    names = {key: name for key, name in names.items() if round_of(key)[1] == 1} or names
    paint = colours(names)
    on = next((s for s in ("forget", "main") if any(policies[v].get(s) for v in variant_names(policies))), None)
    panels = [*names, *([on] if on else [])]
    if not panels:
        raise ValueError("summary has neither scorers nor policies: nothing to draw")
    ratios = [1.0] * len(names) + ([1.55] if on else [])
    with picture(len(panels), size=(12, 5), gridspec_kw={"width_ratios": ratios}) as (figure, axes):
        for ax, key in zip(axes[0], names, strict=False):
            part = scorers[key]
            _draw_reliability(ax, _label(names[key]), paint[key], part["reliability"], part["ece"])
        for ax in axes[0][1 : len(names)]:
            ax.set_ylabel("")
        if on:
            _draw_outcomes(axes[0][-1], policies, on)
            axes[0][-1].set_title("Against SFT: " + axes[0][-1].get_title().lower())
            _outcome_legend(figure, loc="outside lower right")
        return png(figure, dpi=100)


def has_tasks(scorers: dict[str, Any]) -> bool:
    """Whether per-task pictures would show anything: at least two tasks that all scorers share."""
    return bool(scorer_names(scorers)) and len(set(_shared_tasks(scorers)) - {NO_TASK}) > 1
