"""Lines of results as a table for the terminal, and as Markdown between the markers of the pages."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from rich.table import Table

from bench import pages
from bench.case import OURS, Line
from bench.common import ROOT
from bench.compare import FASTER, NOISE, SAME, SLOWER, Change

# The pages with marked parts: a short table there, all of them here.
PAGES = (ROOT / "README.md", ROOT / "docs" / "benchmarks.md")
COMMAND = "make bench-readme"
# What takes long on a CPU is a preset of its own, kept in the same file.
NATIVE = ("policy-loss-native", "large-vocabulary-native")
LONG = {
    "cpu": "--peers none",
    "large-vocabulary": "--peers plain,compile,cut-,Liger --active-only --rounds 3 --limit 60 --budget 1",
}

# The README's rows: study, operation, and what of the shape tells the case from the study's others.
SPEED: dict[str, tuple[str, str, dict[str, Any]]] = {
    "PPO and rehearsal loss, V 49,152, half of 1,024 rows active": ("policy-loss", "policy", {"active": 0.5}),
    "the same, V 250,880, width 1,024": ("large-vocabulary", "policy", {}),
    "Advantage-Model loss, 512 pairs, four alternates": ("advantage-loss", "advantage", {"alternates": 4}),
    "InfoNCE, 8,192 pairs of rows": ("contrastive", "info-nce", {}),
    "SwAV, 8,192 pairs of rows": ("contrastive", "swav", {}),
    "GAE, 4,096 sequences of 512": ("small-operations", "gae", {}),
    "the best 100 of each of 1,000 clusters, 10 million rows": ("small-operations", "topk", {}),
    "a whole PPO update, four-layer Llama": ("updates", "ppo-update", {"model": "llama"}),
}


def in_units(seconds: float) -> str:
    for factor, unit in ((1.0, "s"), (1e3, "ms")):
        if seconds * factor >= 1.0:
            return f"{seconds * factor:.3g} {unit}"
    return f"{seconds * 1e6:.3g} µs"


def count(value: float) -> str:
    return f"{value:,}" if isinstance(value, int) else f"{value:g}"


def title(line: Line) -> str:
    shape = ", ".join(
        f"{name} {value if isinstance(value, str) else count(value)}" for name, value in line["shape"].items()
    )
    return f"{line['op']}, {line['dtype']}, {shape}"


def ratio(line: Line) -> str:
    """Times of the floor; where the rounds disagree no figure, only where it may lie."""
    if line.get("times_floor") is None:
        return "–"
    if line["noisy"]:
        return f"{line['times_floor_p20']:.2f}–{line['times_floor_p80']:.2f}"
    return f"{line['times_floor']:.2f}"


def rate(line: Line) -> str:
    if line.get("flops_per_s") and line["op"] in ("policy", "logprob", "logprob-grad", "info-nce"):
        return f"{line['flops_per_s'] / 1e9:,.0f} GFLOP/s"
    return f"{line['bytes_per_s'] / 1e9:,.1f} GB/s" if line.get("bytes_per_s") else ""


def cases(lines: Iterable[Line]) -> dict[str, list[Line]]:
    """Lines by case, the fastest first, those without a time last."""
    groups: dict[str, list[Line]] = {}
    for line in lines:
        groups.setdefault(line["case"], []).append(line)
    return {case: sorted(group, key=lambda x: x["median_s"] or float("inf")) for case, group in groups.items()}


def worst_error(line: Line) -> str:
    return f"{max(line['errors'].values()):.0e}" if line.get("errors") else ""


def remark(line: Line) -> str:
    verdict = line.get("verdict")
    parts = [
        "too noisy for a verdict" if line.get("noisy") else None,
        f"{line['status']}: {line.get('failure')}" if line["status"] != "ok" else None,
        verdict if verdict not in (None, "right") and line["status"] == "ok" else None,
        line.get("note"),
    ]
    return "; ".join(part for part in parts if part)


def table(lines: Sequence[Line]) -> Table:
    """Every contender of every case."""
    listing = Table(title="time beside the floor of the same rounds")
    listing.add_column("case, contender", overflow="fold")
    for name in ("median", "p20", "p80", "× floor", "share", "peak MiB", "page faults", "rate", "error"):
        listing.add_column(name, justify="right", no_wrap=True)
    listing.add_column("remarks", overflow="fold")
    for group in cases(lines).values():
        listing.add_section()
        listing.add_row(f"[bold]{title(group[0])}[/]", *[""] * 10)
        for line in group:
            style = {"ours": "green", "floor": "cyan"}.get(line["role"])
            times = [in_units(line[k]) if line.get(k) else "–" for k in ("median_s", "p20_s", "p80_s")]
            share = f"{line['floor_share']:.0%}" if line["floor_share"] and not line["noisy"] else "–"
            peak = f"{line['peak_mib']:,.0f}" if line.get("peak_mib") is not None else ""
            faults = f"{line['page_faults']:,}" if line.get("page_faults") is not None else ""
            cells = (*times, ratio(line), share, peak, faults, rate(line), worst_error(line), remark(line))
            listing.add_row("  " + line["peer"], *cells, style=style)
    return listing


def summary(lines: Sequence[Line]) -> Table:
    """One line a case: ours, and the fastest other that is right."""
    listing = Table(title="ours and the fastest peer")
    listing.add_column("case", overflow="fold")
    for name in ("ours", "× floor", "peak MiB", "fastest peer", "its time", "× floor", "peak MiB"):
        listing.add_column(name, justify="right", overflow="fold")
    for group in cases(lines).values():
        own = next((x for x in group if x["peer"] == OURS), None)
        peer = next((x for x in group if x["role"] == "peer" and x["status"] == "ok"), None)
        listing.add_row(title(group[0]), *_brief(own), peer["peer"] if peer else "–", *_brief(peer))
    return listing


def _brief(line: Line | None) -> tuple[str, str, str]:
    if line is None or line["median_s"] is None:
        return (line or {}).get("failure") or "–", "–", "–"
    peak = f"{line['peak_mib']:,.0f}" if line.get("peak_mib") is not None else "–"
    return in_units(line["median_s"]), ratio(line), peak


def changes(all_changes: Sequence[Change], everything: bool = False) -> Table:
    listing = Table(title="after against before, times of the floor")
    for name in ("case", "contender"):
        listing.add_column(name, overflow="fold")
    for name in ("before", "after", "change"):
        listing.add_column(name, justify="right")
    listing.add_column("verdict")
    for change in all_changes:
        if change.verdict == SAME and not everything:
            continue
        style = {SLOWER: "red", FASTER: "green", NOISE: "yellow"}.get(change.verdict)
        numbers = [f"{value:.3g}" if value else "–" for value in (change.before, change.after)]
        moved = f"{change.share:+.0%}" if change.share is not None else "–"
        listing.add_row(change.case, change.peer, *numbers, moved, change.verdict, style=style)
    return listing


# -- the pages ---------------------------------------------------------------------------------------------------------


def origin(lines: Sequence[Line], study: str) -> str:
    """One sentence on device, versions, commit, date and command."""
    told = []
    for run in {line["environment"]["time"]: line["environment"] for line in lines}.values():
        device = run.get("gpu") or f"{run['cpu']} ({run['threads']} threads, {', '.join(run['cpu_features'])})"
        changed = " with changes" if run.get("tree_is_dirty") else ""
        told.append((device, run["versions"]["torch"], (run["commit"] or "unknown")[:8] + changed, run["time"][:10]))
    sources = dict.fromkeys(f"{device}, torch {torch}, commit {commit}, {day}" for device, torch, commit, day in told)
    again = f"`{COMMAND}` or `python -m bench --preset readme --study {study}`"
    if study in NATIVE:
        again = f"`python -m bench --preset native --study {study} --text pairs.jsonl`"
    if study in LONG:
        again = f"`python -m bench --preset cpu --study {study} {LONG[study]} --output bench/results/readme.jsonl`"
    return f"{'; '.join(sources)}. Again: {again}.\n"


def policy_loss(lines: Sequence[Line]) -> str:
    """Times of the floor: half active (active rows only, then as called), all active, real hidden states."""
    policy = [line for line in lines if line["op"] == "policy"]
    half = {x["peer"]: x for x in policy if x["shape"].get("active", 1) < 1}
    whole = {x["peer"]: x for x in policy if x["shape"].get("active", 1) == 1 and not x["shape"].get("states")}
    real = {x["peer"]: x for x in policy if x["shape"].get("states")}
    given = {**half, **whole, **real}
    names = list(dict.fromkeys(n.removesuffix(", all rows") for n in given if "floor" not in n))
    names.sort(key=lambda n: (not n.startswith(OURS), (half.get(n) or real.get(n) or {}).get("times_floor") or 99.0, n))

    def cell(by_peer: dict[str, Line], name: str) -> str:
        line = by_peer.get(name)
        if line is None:
            return ""
        return ratio(line) if line["status"] == "ok" else line["status"]

    rows = []
    for name in names:
        label = f"**{OURS}**" + name.removeprefix(OURS) if name.startswith(OURS) else name
        called = cell(half, name if name == OURS else f"{name}, all rows")
        errors = (real.get(name) or {}).get("errors") or {}
        error = f"{errors['hidden']:.0e}" if errors else ""
        weighed = (whole.get(name) or {}).get("peak_mib")
        peak = f"{weighed:,.0f}" if weighed is not None else ""
        rows.append([label, cell(half, name), called, cell(whole, name), peak, cell(real, name), error])
    head = [
        "",
        "half active",
        "half active, as called",
        "all active",
        "peak MiB",
        "SmolLM2's hidden states",
        "error there",
    ]
    text = pages.markdown(head, rows) + "\n"
    told = {
        "logprob": "`linear_logprob` without gradient",
        "logprob-grad": "with gradient (floor: four products, for logits that are not kept)",
        "logits": "`policy_loss` from logits (floor: a copy)",
    }
    own = [(said, x) for op, said in told.items() for x in lines if x["op"] == op and x["peer"] == OURS]

    def kept(ours: Line) -> str:
        """The peers of `logprob-grad` that keep the logits, and so need three products."""
        if ours["op"] != "logprob-grad":
            return ""
        peers = {x["peer"]: x for x in lines if x["op"] == ours["op"] and x["status"] == "ok"}
        ratios = [f"{name} {ratio(peers[name])}" for name in ("plain PyTorch", "torch.compile") if name in peers]
        return f" ({', '.join(ratios)}, which keep them)" if ratios else ""

    if own:
        text += "\n" + ", ".join(f"{said} {ratio(x)}{kept(x)}" for said, x in own) + ".\n"
    return text


def speed(lines: Sequence[Line]) -> str:
    """A row an operation, times of the floor: ours, the fastest other (given the active rows only), plain PyTorch."""
    rows = []
    for name, (study, op, shape) in SPEED.items():
        case = [x for x in lines if x["study"] == study and x["op"] == op and shape.items() <= x["shape"].items()]
        timed = {x["peer"]: x for x in case if x["status"] == "ok" and not x["peer"].endswith(", all rows")}
        peers = sorted((x for x in timed.values() if x["role"] == "peer"), key=lambda x: x["median_s"])
        fastest = f"{ratio(peers[0])} {peers[0]['peer']}" if peers else "–"
        own, plain = (ratio(timed[peer]) if peer in timed else "–" for peer in (OURS, "plain PyTorch"))
        rows.append([name, own, fastest, plain])
    return pages.markdown(["× floor", f"**{OURS}**", "fastest other", "plain PyTorch"], rows) + "\n"


def plain_table(lines: Sequence[Line]) -> str:
    """A row for each contender that has a time or a reason for having none, with memory where it was measured."""
    weighed = any(line.get("peak_mib") is not None for line in lines)
    fitting = any(line.get("largest_batch") is not None for line in lines)
    head = ["", "time", "× floor", *(["peak MiB"] if weighed else []), *(["largest batch"] if fitting else [])]
    rows: list[list[str]] = []
    for group in cases(lines).values():
        rows.append([f"*{title(group[0])}*", *[""] * (len(head) - 1)])
        for line in group:
            if line["role"] == "floor":
                continue
            name = f"**{line['peer']}**" if line["role"] == "ours" else line["peer"]
            shown = in_units(line["median_s"]) if line["median_s"] else line["status"]
            row = [name, shown, ratio(line)]
            if weighed:
                row.append(f"{line['peak_mib']:,.0f}" if line.get("peak_mib") is not None else "")
            if fitting:
                row.append(str(line.get("largest_batch") or ""))
            rows.append(row)
    return pages.markdown(head, rows) + "\n"


def block(name: str, lines: Sequence[Line]) -> str:
    """What stands between the markers of that name."""
    if name == "speed":
        return speed(lines)
    chosen = [line for line in lines if line["study"] == name]
    if not chosen:
        return f"Not measured yet: `{COMMAND}`.\n"
    text = policy_loss(chosen) if name.startswith("policy-loss") else plain_table(chosen)
    return text + "\n" + origin(chosen, name)


def rendered(page: str, lines: Sequence[Line]) -> str:
    """The page with every marked part made anew."""
    return pages.rendered(page, "bench", lambda name: block(name, lines))


def rewrite(path: Path, lines: Sequence[Line]) -> bool:
    """Writes the marked parts of the page; whether anything changed."""
    before = path.read_text(encoding="utf-8")
    after = rendered(before, lines)
    if after != before:
        path.write_text(after, encoding="utf-8")
    return after != before
