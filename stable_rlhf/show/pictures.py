"""What every picture of the package shares: one style, PNG bytes, labels that are safe to draw.

matplotlib is imported when a picture is drawn, with the Agg canvas, and no global state of it is touched.
"""

from __future__ import annotations

import io
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from stable_rlhf.show.page import shortened

INK, FAINT = "#222222", "#B8B8B8"
KEPT = "#009E73"
DPI = 150  # 9 inches wide: 1350 px, shown at 900
_STYLE: Any = {
    "font.family": "DejaVu Sans",
    "font.size": 10,
    "axes.titlesize": 11,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": INK,
    "axes.axisbelow": True,
    "axes.grid": True,
    "grid.color": "#E8E8E8",
    "legend.frameon": False,
    "figure.facecolor": "white",
    "axes.facecolor": "white",
}


@contextmanager
def picture(
    columns: int, rows: int = 1, size: tuple[float, float] = (9, 4), layout: Any = "constrained", **kwargs: Any
) -> Iterator[tuple[Any, Any]]:
    """A figure and its axes [rows, columns] in the style of the package."""
    import matplotlib
    from matplotlib.figure import Figure

    with matplotlib.rc_context(_STYLE):
        figure = Figure(figsize=size, layout=layout)
        yield figure, figure.subplots(rows, columns, squeeze=False, **kwargs)


@contextmanager
def panels(
    count: int, height: float, margin: float = 0.0, *, columns: int = 2, fixed: bool = False, **kwargs: Any
) -> Iterator[tuple[Any, list[Any]]]:
    """A figure with ``count`` panels, ``columns`` in a row of ``height`` inches, and ``margin`` inches besides.

    ``fixed``: room for labels is set beforehand, not measured, which takes longer than all of the drawing. For pictures
    that are drawn again and again, whose ticks are plain numbers."""
    rows = -(-count // columns)
    size, layout = (9, margin + height * rows), None if fixed else "constrained"
    with picture(columns, rows=rows, size=size, layout=layout, **kwargs) as (figure, axes):
        if fixed:
            figure.subplots_adjust(
                **_room(size[0], columns, ("left", "right", "wspace")),
                **_room(size[1], rows, ("bottom", "top", "hspace")),
            )
        for ax in axes.ravel()[count:]:
            ax.set_visible(False)
        yield figure, list(axes.ravel()[:count])


def _room(inches: float, panels: int, names: tuple[str, str, str]) -> dict[str, float]:
    """matplotlib's words for labels beside ``panels`` panels along one side of a figure of ``inches``."""
    before, after, between = (0.9, 0.15, 1.05) if names[0] == "left" else (0.5, 0.35, 0.9)
    panel = (inches - before - after - between * (panels - 1)) / panels
    return dict(zip(names, (before / inches, 1 - after / inches, between / panel), strict=True))


def png(figure: Any, dpi: int = DPI) -> bytes:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=dpi, metadata={"Software": None})
    return buffer.getvalue()


def plain(text: str, limit: int = 22) -> str:
    """A label from the data: one line, shortened, and never read as TeX."""
    line = " ".join(str(text).split())
    return shortened(line, limit).replace("$", r"\$")


def legend_below(figure: Any, axes: Any, columns: int) -> None:
    handles, labels = axes.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=columns)
