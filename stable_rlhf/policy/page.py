"""One page for a PPO run, while it runs and afterwards: curves, warnings, sample answers, settings; no other file."""

from __future__ import annotations

import math
import os
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from stable_rlhf.data.records import as_text
from stable_rlhf.engine.tracking import Tracker
from stable_rlhf.policy.guard import StabilityGuard
from stable_rlhf.show.page import Picture, render, shortened, write_html
from stable_rlhf.show.pictures import FAINT, INK, panels, png
from stable_rlhf.show.progress import is_main_process, say

PAGE = "training.html"
_SHOWN = 12  # answers shown of each prompt: the first, the last, and some between
_CHARACTERS = 600
_SPARED = 19  # times what a page takes, until the next one
# Title, unit, metrics with their names, logarithmic or not; drawn where the run has any of the metrics.
_PANELS: tuple[tuple[str, str, dict[str, str], bool], ...] = (
    ("Score", "", {"score": "scorer", "gold": "gold (the truth)"}, False),
    ("KL to the initial policy", "nats a response", {"kl": "KL"}, False),
    ("Length of responses", "tokens", {"length": "length"}, False),
    ("Entropy", "nats a token", {"entropy": "entropy"}, False),
    ("Clipped tokens", "share", {"clip_fraction": "clip fraction"}, False),
    ("Losses", "", {"policy_loss": "policy", "value_loss": "value", "rehearsal_loss": "rehearsal"}, False),
    ("Gradient norm, before clipping", "", {"gradient_norm": "norm"}, True),
    (
        "Rollout engine against trainer",
        "|Δ log-prob|, nats",
        {"logprob_gap": "mean", "logprob_gap_max": "largest"},
        True,
    ),
    (
        "Trainer / rollout engine, probability",
        "ratio, tokens",
        {"rollout_ratio_max": "largest", "rollout_ratio_min": "smallest"},
        True,
    ),
    ("Groups", "share", {"groups_without_signal": "all scores equal"}, False),
    ("Scores within a group", "standard deviation", {"group_score_std": "score"}, False),
    ("Length against score within a group", "correlation", {"group_length_correlation": "Pearson's"}, False),
    ("Share that ended by itself", "", {"finished": "finished"}, False),
    ("KL coefficient", "", {"kl_coef": "β"}, True),
    ("Rehearsal", "share of the gradient", {"rehearsal_share": "share"}, False),
    ("Rehearsal coefficient", "", {"rehearsal_coef": "γ"}, True),
)
_COLOURS = ("#0072B2", "#D55E00", "#009E73")


class Page:
    """``training.html`` of a run; takes what :func:`write_page` does."""

    def __init__(self, *given: Any, total_steps: int) -> None:
        self._given, self._total_steps = given, total_steps
        self._took, self._drawn = 0.0, -math.inf

    def write(self) -> None:
        began = time.monotonic()
        write_page(*self._given, total_steps=self._total_steps)
        self._drawn = time.monotonic()
        self._took = self._drawn - began

    def keep_up(self) -> None:
        """Write it, unless that would take more than a twentieth of the time: short steps are not there to be drawn."""
        if time.monotonic() - self._drawn >= _SPARED * self._took:
            self.write()


def write_page(
    folder: Path, name: str, settings: dict[str, Any], tracker: Tracker, guard: StabilityGuard, *, total_steps: int
) -> None:
    """Write ``training.html`` into ``folder``, whole or not at all; rank 0 only. A page that cannot be written is said
    and stops nothing."""
    if not is_main_process() or not tracker.history:
        return
    path = folder / PAGE
    working = path.with_suffix(".tmp")
    try:
        page = render_page(name, settings, tracker.history, tracker.samples, guard.warnings, total_steps)
        write_html(working, page)
        os.replace(working, path)
    except OSError as error:
        say(f"  WARNING: {path} cannot be written: {error.strerror or error}")


def render_page(
    name: str,
    settings: dict[str, Any],
    history: Sequence[dict[str, float]],
    samples: Sequence[dict[str, Any]],
    warnings: Sequence[tuple[int, str, str]],
    total_steps: int,
) -> str:
    """The page as text, every value escaped, no script, no request to anywhere."""
    last = history[-1]
    facts = [(key, f"{last[key]:.4g}") for key in ("score", "kl", "length", "entropy", "logprob_gap") if key in last]
    return render(
        "policy/page.html.j2",
        name=name,
        step=int(last["step"]),
        total=total_steps,
        facts=facts,
        warnings=[{"step": step, "name": what, "text": text} for step, what, text in reversed(warnings)],
        curves=Picture("curves", "Training curves", "", training_curves(history, [step for step, _, _ in warnings])),
        samples=_by_prompt(samples),
        settings={section: _plain(values) for section, values in settings.items()},
    )


def training_curves(history: Sequence[dict[str, float]], marked: Sequence[int] = ()) -> bytes:
    """PNG of every metric of ``_PANELS`` that ``history`` has, by step; dashed lines at the ``marked`` steps."""
    shown = [p for p in _PANELS if any(_known(row, key) for row in history for key in p[2])]
    with panels(len(shown), 2.3, fixed=True) as (figure, axes):
        for ax, (title, unit, names, logarithmic) in zip(axes, shown, strict=True):
            for colour, (key, label) in zip(_COLOURS, names.items(), strict=False):
                known = [(row["step"], row[key]) for row in history if _known(row, key)]
                if not known:
                    continue
                steps, values = zip(*known, strict=True)
                ax.plot(steps, values, color=colour, linewidth=1.3, label=label, marker="o" if len(known) < 3 else None)
                if logarithmic and min(values) > 0:
                    ax.set_yscale("log")
            for step in sorted(set(marked)):
                ax.axvline(step, color=FAINT, linestyle="--", linewidth=0.8, zorder=0)
            ax.set_title(title, loc="left", color=INK)
            ax.set(xlabel="step", ylabel=unit)
            if len(names) > 1 and ax.lines:
                ax.legend(fontsize=8)
        return png(figure)


def _known(row: dict[str, float], key: str) -> bool:
    return row.get(key) is not None and math.isfinite(row[key])


def _by_prompt(samples: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The answers to each prompt in the order of the steps, thinned out to a few."""
    groups: dict[str, list[dict[str, Any]]] = {}
    for row in samples:
        groups.setdefault(shortened(as_text(row["prompt"]), _CHARACTERS), []).append(row)
    shown = []
    for prompt, rows in groups.items():
        places = {round(i * (len(rows) - 1) / (_SHOWN - 1)) for i in range(_SHOWN)}
        answers = [
            {
                "step": row["step"], "response": shortened(row["response"], _CHARACTERS),
                "score": f"{row['score']:.2f}", "end": "" if row["finished"] else " (cut off)",
            }
            for row in (rows[i] for i in sorted(places))
        ]  # fmt: skip
        shown.append({"prompt": prompt, "task": rows[0]["task"] or "", "answers": answers})
    return shown


def _plain(values: Any) -> dict[str, str]:
    return {key: str(value) for key, value in values.items()} if isinstance(values, dict) else {"": str(values)}
