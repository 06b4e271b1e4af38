"""What all pictures share: width, sizes of letters, and one look for each method.

Letters have the size that is set here, and all figures the same width, so that they are equally
large wherever figures stand below each other. Matplotlib's state is not touched: pictures are made
inside of `styled`, and without pyplot.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from experiments.records.config import BASELINE

__all__ = [
    "MANY",
    "Look",
    "label_domains",
    "looks_of",
    "make_figure",
    "make_panels",
    "short_label",
    "styled",
    "tidy",
    "with_legend",
    "with_title",
]

WIDTH = 11.0  # inches
DPI = 130
MANY = 8  # more curves in one plot would cross too often: each gets a small plot of its own
LETTER = 0.066  # inches, the usual width of a letter of size 9

styled = matplotlib.rc_context(
    {
        "font.size": 9,
        "axes.titlesize": 9,
        "axes.labelsize": 9,
        "xtick.labelsize": 9,
        "ytick.labelsize": 9,
        "legend.fontsize": 9,
        "figure.titlesize": 11,
        "axes.axisbelow": True,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "grid.color": "#dddddd",
        "grid.linewidth": 0.6,
    }
)

# Okabe and Ito's colours, told apart with any colour vision; markers tell them apart in grey.
# Tol's muted ones follow for whoever compares more than eight methods. Black is the baseline's.
BLACK = "#000000"
COLOURS = (
    "#E69F00", "#56B4E9", "#009E73", "#CC79A7", "#0072B2", "#D55E00", "#7F7F7F",
    "#882255", "#999933", "#332288", "#44AA99", "#661100", "#AA4499", "#117733", "#88CCEE",
)  # fmt: skip
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "p")
LINES = ("-", "--", "-.", ":")


@dataclass(frozen=True)
class Look:
    """How one method is drawn, in every figure of a report.

    Args:
        colour: For points, lines and bars.
        marker: Of points; with the colour it is the method's alone up to 120 methods.
        line: Of curves.
    """

    colour: str
    marker: str
    line: str


def looks_of(methods: Iterable[str]) -> dict[str, Look]:
    """A look for each method, which depends on its place among all methods of a report alone.

    Args:
        methods: All of the report, not only those of one figure. The baseline is always black.
    """
    names = [name for name in dict.fromkeys(methods) if name != BASELINE]
    looks = {BASELINE: Look(BLACK, MARKERS[0], LINES[0])}
    for number, name in enumerate(names, 1):
        colour = COLOURS[(number - 1) % len(COLOURS)]
        line = LINES[(number // 2 + number // 8) % len(LINES)]
        looks[name] = Look(colour, MARKERS[number % len(MARKERS)], line)
    return looks


def short_label(method: str, methods: Iterable[str]) -> str:
    """The method without its fields, where no other one would be called the same.

    >>> short_label("rmt[lr=0.1]", ["tent", "rmt[lr=0.1]"])
    'rmt'
    """
    plain = _without_fields(method)
    others = [_without_fields(name) for name in methods if name != method]
    return method if plain in others else plain


def _without_fields(method: str) -> str:
    return re.sub(r"\[[^\]]*\]", "", method)


def make_figure(height: float) -> tuple[Figure, Axes]:
    """A figure of one plot, `height` inches high."""
    figure = Figure(figsize=(WIDTH, height), dpi=DPI, layout="constrained")
    return figure, figure.add_subplot()


def make_panels(count: int, columns: int, height: float) -> tuple[Figure, list[Axes]]:
    """A figure of `count` small plots with the same axes, which are numbered at the edge alone.

    Args:
        count: Small plots.
        columns: At most so many beside each other.
        height: Of each, in inches.
    """
    columns = min(columns, count)
    rows = math.ceil(count / columns)
    figure = Figure(figsize=(WIDTH, height * rows + 0.6), dpi=DPI, layout="constrained")
    panels: list[Axes] = []
    for i in range(count):
        first = panels[0] if panels else None
        axes = figure.add_subplot(rows, columns, i + 1, sharex=first, sharey=first)
        below = i + columns >= count  # nothing stands under it
        axes.tick_params(labelbottom=below, labelleft=i % columns == 0)
        panels.append(axes)
    return figure, panels


def with_title(figure: Figure, title: str, vertical: str = "") -> None:
    """Put the title above, at the left, and below it what the vertical axis shows."""
    text = f"{title}\nvertical axis: {vertical}" if vertical else title
    figure.suptitle(text, x=0.01, ha="left")


def with_legend(figure: Figure, axes: Axes) -> None:
    """Put the legend below, in as many columns as its words have room for."""
    handles, labels = axes.get_legend_handles_labels()
    longest = max(map(len, labels))
    columns = max(1, min(len(labels), int(WIDTH / (0.55 + LETTER * longest))))
    columns = math.ceil(len(labels) / math.ceil(len(labels) / columns))  # rows of one length
    figure.legend(handles, labels, loc="outside lower center", ncols=columns, frameon=False)


def tidy(axes: Axes, grid: str = "y") -> None:
    """Grid lines across one axis, or "both"."""
    axes.grid(axis=grid)  # type: ignore[arg-type]


def label_domains(
    axes: Axes, stretches: Sequence[tuple[int, int, str]], total: int, names: bool = True
) -> None:
    """Draw where the domain changes, and name the domains above where there is room.

    Args:
        axes: Of a plot over the images of a stream.
        stretches: (first image, one past the last, domain) of each stretch of one domain.
        total: Images of the stream.
        names: Whether to name them.
    """
    if len(stretches) > 60:  # lines would be all one sees
        return
    for start, _, _ in stretches[1:]:
        axes.axvline(start, color="#999999", linewidth=0.7, zorder=0)
    if not names:
        return
    taken = [-1.0, -1.0]  # the right end of the last name in either row, in inches
    for start, stop, name in stretches:
        middle = (start + stop) / 2 / total * (WIDTH - 0.7)
        text = name.replace("_", "\n")
        half = LETTER * (max(map(len, text.split("\n"))) + 0.5) / 2
        row = next((i for i, end in enumerate(taken) if middle - half >= end), None)
        if row is None:
            continue
        taken[row] = middle + half
        axes.annotate(
            text,
            ((start + stop) / 2, 1.0),
            xycoords=axes.get_xaxis_transform(),
            xytext=(0, 3 + 26 * row),
            textcoords="offset points",
            ha="center",
            va="bottom",
        )
