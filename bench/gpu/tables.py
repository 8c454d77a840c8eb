"""The records of a run as short tables, the last thing that is printed: the end of a long output is what survives."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from bench.gpu.plan import Row

Column = tuple[str, Callable[[Row], object]]


def number(value: object) -> str:
    if value is None:
        return "-"
    if isinstance(value, bool):
        return "yes" if value else "NO"
    if isinstance(value, float):
        return f"{value:.3g}" if abs(value) < 1000 else f"{value:,.0f}"
    return str(value)


def grid(title: str, columns: Sequence[Column], rows: Sequence[Row]) -> str:
    if not rows:
        return ""
    cells = [[name for name, _ in columns], *([number(take(row)) for _, take in columns] for row in rows)]
    widths = [max(len(line[i]) for line in cells) for i in range(len(columns))]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip() for line in cells]
    return "\n".join([f"-- {title}", *lines])


def shape(row: Row) -> str:
    return f"{row['rows']} x {row['width']} x {row['vocabulary']}" if "width" in row else ""


def field(name: str) -> Callable[[Row], object]:
    return lambda row: row.get(name)


def own(row: Row) -> Row:
    """A line of the benchmark suite in the words of these tables."""
    told = ", ".join(f"{k} {v}" for k, v in row["shape"].items())
    seconds, peak = row.get("median_s"), row.get("peak_mib")
    return row | {"case": f"{row['op']}: {told}", "ms": None if seconds is None else 1e3 * seconds,
                  "peak": None if peak is None else peak / 1024}  # fmt: skip


LINE: tuple[Column, ...] = (
    ("case", field("case")), ("who", field("peer")), ("ms", field("ms")), ("x floor", field("times_floor")),
    ("peak GiB", field("peak")), ("verdict", lambda r: r.get("verdict") or r.get("failure")),
)  # fmt: skip
LOSS: tuple[Column, ...] = (
    ("T x H x V", shape), ("active", field("active")), ("workspace", field("workspace")), ("ms", field("ms")),
    ("by count ms", field("by_count_ms")),
    ("share of floor", field("share")), ("adds GiB", field("added_gib")), ("", field("failure")),
)  # fmt: skip
TABLES: dict[str, tuple[str, tuple[Column, ...]]] = {
    "addmm": ("torch.addmm(out_dtype=float32)", (("works", field("works")), ("why not", field("obstacle")))),
    "ceilings": (
        "ceilings",
        (("T x H x V", shape), ("rows", field("chunk")), ("what", field("product")), ("ms", field("ms")),
         ("TFLOP/s", field("tflop_per_s")), ("TB/s", field("tb_per_s"))),
    ),
    "ours": ("linear_policy_loss by workspace, beside its three bare products", LOSS),
    "tuned": ("linear_policy_loss as tuned, beside its three bare products", LOSS),
    "statistics": (
        "linear_logprob without gradient, both ways",
        (("T x H x V", shape), ("way", field("way")), ("ms", field("ms")), ("by count ms", field("by_count_ms")),
         ("share of product", field("share")), ("", field("failure"))),
    ),
    "rows": (
        "the row kernel alone",
        (("V", field("vocabulary")), ("call", field("call")), ("block", field("block")), ("warps", field("warps")),
         ("residency", field("residency")), ("ms", field("ms")), ("TB/s", field("tb_per_s")), ("", field("failure"))),
    ),
    "propose": (
        "proposed",
        (("device", field("device")), ("chunk rows", field("chunk_rows")), ("launches", field("row_launches")),
         ("product width", field("product_width"))),
    ),
    "profile": (
        "one call at the first shape", (("kernel", field("kernel")), ("ms", field("ms")), ("calls", field("calls")),
                                        ("whole ms", field("whole_ms"))),
    ),
    "correctness": (
        "against float64",
        (("case", field("case")), ("error", field("error")), ("allowed", field("allowed")), ("right", field("right"))),
    ),
    "sanitizer": (
        "compute-sanitizer on tiny inputs",
        (("tool", field("tool")), ("status", field("status")), ("told", field("told"))),
    ),
    "peers": ("peers", LINE),
    "compiled": ("torch.compile", LINE),
    "small": ("the other operations", LINE),
    "kmeans": ("k-means", LINE),
    "update": ("one update of PPO with rehearsal", LINE),
    "tests": ("tests marked gpu", (("status", field("status")), ("told", field("told")))),
}  # fmt: skip
STEPS: tuple[Column, ...] = (
    ("step", field("step")), ("status", field("status")), ("s", field("seconds")), ("", field("failure")),
)  # fmt: skip


def told(records: Sequence[Row]) -> str:
    """Every table, the steps' ends last; a dry run says that it is one at both ends."""
    note = records[0].get("note")
    parts = [note or ""]
    for step, (title, columns) in TABLES.items():
        rows = [own(r) if "op" in r else r for r in records if r["event"] == "row" and r["step"] == step]
        parts.append(grid(title, columns, rows))
    facts: Row = next((r["environment"] for r in records if r["event"] == "row" and r["step"] == "facts"), {})
    where = facts.get("gpu") or facts.get("cpu") or "?"
    parts.append(grid(f"steps, on {where}", STEPS, [r for r in records if r["event"] == "end"]))
    return "\n\n".join(part for part in [*parts, note or ""] if part)
