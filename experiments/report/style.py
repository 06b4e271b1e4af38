"""What all pictures share: width, sizes of letters, and one look for each method.

Letters have the size that is set here, and all figures the same width, so that they are equally
large wherever figures stand below each other. Matplotlib's state is not touched: pictures are made
inside of `styled`, and without pyplot.
"""

from __future__ import annotations

import math
import re
import zlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure

import tta
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
LEAST = 1.3  # inches, the height of a small plot with its title and its axis' numbers
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
    "#DDCC77", "#CC6677",
)  # fmt: skip
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "p", "h", "<", ">", "*")
LINES = ("-", "--", "-.", ":")
LOOKS = len(COLOURS) * len(MARKERS)  # all are different, as the two numbers have no common divisor

# The place of a method here is its look for good, in figures of any time. The other components have
# theirs from the letters of their names, as has whatever else there is, such as a composition.
ORDER = (
    "bn", "alpha_bn", "tent", "eata", "unmix_tns", "lame", "unmix_tns+eata",  # those of the demo
    "sar", "rotta", "cotta", "roid",
    "rdumb", "deyo", "eta", "rmt", "petal", "robust_bn", "core", "cafa", "adanpc", "adanpc_bn",
    "prior_correction", "neo", "foa_shift", "bn_ema", "t3a", "rpl", "shot_im", "zerosiam",
    "cmf", "petta", "iabn", "note", "reservoir", "lsa", "nhl", "dda", "sda", "santa", "ttaug",
    "foa", "dpcore", "pea", "memo", "adacontrast", "gtta", "spa", "itta",
)  # fmt: skip


@dataclass(frozen=True)
class Look:
    """How one method is drawn, in every figure.

    Args:
        colour: For points, lines and bars.
        marker: Of points; with the colour it is the method's alone among up to `LOOKS` methods.
        line: Of curves.
    """

    colour: str
    marker: str
    line: str


def looks_of(methods: Iterable[str]) -> dict[str, Look]:
    """A look for each method, which depends on its name, whatever other methods there are.

    Two labels that are no components may ask for the same look; then one of them has the next one
    that is free.

    Args:
        methods: All of the report, not only those of one figure. The baseline is always black.

    >>> looks_of(["tent", "bn"])["bn"] == looks_of(["bn"])["bn"]
    True
    """
    names = [name for name in dict.fromkeys(methods) if name != BASELINE]
    fixed = {name: place for place, name in enumerate(ORDER)}
    for name in tta.list_methods():
        if name not in fixed and name != BASELINE:
            fixed[name] = _free_place(name, set(fixed.values()))
    places = {name: fixed[name] for name in names if name in fixed}
    for name in names:  # a method alone with other fields looks as without them
        place = fixed.get(_without_fields(name).partition(".")[0])
        if place is not None and place not in places.values():
            places.setdefault(name, place)
    taken = set(fixed.values())
    for name in sorted(set(names) - set(places)):
        places[name] = _free_place(name, taken)
        taken.add(places[name])
    looks = {name: _look(places[name]) for name in names}
    return {BASELINE: Look(BLACK, MARKERS[0], LINES[0])} | looks


def _free_place(name: str, taken: set[int]) -> int:
    """The place that the letters of a name ask for, or the next one that is free."""
    free = LOOKS - len(ORDER)
    wanted = zlib.crc32(name.encode())
    asked = [len(ORDER) + (wanted + step) % free for step in range(free)]
    return next((place for place in asked if place not in taken), asked[0])


def _look(place: int) -> Look:
    return Look(
        COLOURS[place % len(COLOURS)],
        MARKERS[(place + 1) % len(MARKERS)],
        LINES[((place + 1) // 2 + (place + 1) // 8) % len(LINES)],
    )


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
        height: Of each, in inches; no less than `LEAST`.
    """
    columns = min(columns, count)
    rows = math.ceil(count / columns)
    height = max(height, LEAST)
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
