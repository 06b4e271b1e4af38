"""Plots of results, as PNG files; what is compared is compared with the baseline.

All of them take results by method, and the looks of all methods of the report (`style.looks_of`).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

from experiments.report.collect import Result
from experiments.report.plots import draw_curves, draw_domains, running, seen_of, window_of
from experiments.report.statistics import over_seeds
from experiments.report.style import (
    DPI,
    LETTER,
    Look,
    label_domains,
    make_figure,
    make_panels,
    short_label,
    styled,
    tidy,
    with_title,
)

__all__ = [
    "plot_cost",
    "plot_domains",
    "plot_estimates",
    "plot_heat",
    "plot_reliability",
    "plot_stream",
    "plot_visits",
]

Methods = Mapping[str, Sequence[Result]]
Looks = Mapping[str, Look]
PANELS = 4  # small plots beside each other


def plot_stream(methods: Methods, path: Path, title: str, looks: Looks) -> None:
    """Error over the last images along the stream, means over seeds."""
    first = next(iter(methods.values()))[0]
    total = first.curve[0][-1]
    window = window_of(total)
    curves = {
        method: _mean_curve([r.curve for r in results], window)
        for method, results in methods.items()
    }
    draw_curves(curves, _stretches(methods), seen_of(window), path, title, looks)


def plot_domains(methods: Methods, path: Path, title: str, looks: Looks) -> None:
    """Error by domain; a line over a bar is the interval, or joins the values of two seeds."""
    every = [r.summary["domain_errors"] for results in methods.values() for r in results]
    names = list(dict.fromkeys(name for domains in every for name in domains))
    errors = {}
    for method, results in methods.items():
        found = [
            over_seeds(results, lambda r, n=name: r.summary["domain_errors"].get(n))
            for name in names
        ]
        means = [100 * e.mean if e else np.nan for e in found]
        ends = [(100 * e.low, 100 * e.high) if e else (np.nan, np.nan) for e in found]
        errors[method] = means, ends
    draw_domains(errors, names, path, title, looks)


@styled
def plot_heat(groups: Methods, path: Path, title: str) -> bool:
    """Error by corruption and severity, one map for each method.

    Args:
        groups: Results by method, of any severities and seeds.
        path: Where the PNG goes.
        title: What the picture shows.

    Returns:
        False, and nothing drawn, where no method has seen more than one severity.
    """
    names = list(
        dict.fromkeys(d["domain"] for rs in groups.values() for r in rs for d in r.domains)
    )
    maps: dict[str, dict[tuple[str, float], list[int]]] = {}
    for method, results in groups.items():
        counts = maps.setdefault(method, {})
        for domain in (d for result in results for d in result.domains):
            for level, (images, errors) in domain["severities"].items():
                held = counts.setdefault((domain["domain"], float(level)), [0, 0])
                held[0] += images
                held[1] += errors
    levels = sorted({level for counts in maps.values() for _, level in counts})
    if len(levels) < 2:
        return False
    figure, grid = make_panels(len(maps), PANELS, 0.55 + 0.2 * len(names))
    image = None
    for axes, (method, counts) in zip(grid, maps.items(), strict=True):
        values = np.full((len(names), len(levels)), np.nan)
        for (name, level), (images, errors) in counts.items():
            values[names.index(name), levels.index(level)] = 100 * errors / images
        image = axes.imshow(values, vmin=0, vmax=100, cmap="viridis", aspect="auto")
        if len(levels) <= 9:
            for (i, j), value in np.ndenumerate(values):
                if not np.isnan(value):
                    colour = "white" if value < 60 else "black"
                    axes.text(j, i, f"{value:.0f}", ha="center", va="center", color=colour)
        axes.set_title(short_label(method, groups))
        axes.set_xticks(range(len(levels)), [f"{level:g}" for level in levels])
        axes.set_yticks(range(len(names)), names)
    assert image is not None
    rows = math.ceil(len(maps) / PANELS)
    bar = figure.colorbar(image, ax=grid, shrink=0.8 / rows, aspect=15, anchor=(0.0, 1.0))
    bar.ax.set_title("error (%)")
    figure.supxlabel("severity", fontsize=9)
    with_title(figure, title)
    figure.savefig(path)
    return True


@styled
def plot_cost(methods: Methods, path: Path, title: str, looks: Looks) -> None:
    """Accuracy against the time an image takes, means over seeds."""
    figure, axes = make_figure(5.6)
    places = []
    for method, results in methods.items():
        cost = over_seeds(results, lambda r: 1000 / r.summary["images_per_second"])
        accuracy = over_seeds(results, lambda r: 100 * (1 - r.summary["mean_error"]))
        assert cost is not None and accuracy is not None
        axes.vlines(cost.mean, accuracy.low, accuracy.high, color=looks[method].colour, linewidth=1)
        axes.plot(
            cost.mean,
            accuracy.mean,
            marker=looks[method].marker,
            color=looks[method].colour,
            markersize=8,
            markeredgecolor="white",
            linestyle="none",
        )
        places.append((cost.mean, accuracy.mean, short_label(method, methods)))
    axes.set_xscale("log")
    axes.xaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:g}"))
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.margins(x=0.12, y=0.1)
    low, high = axes.get_ylim()
    axes.set_ylim(max(low, 0.0), min(high, 100.0))
    _name_points(figure, axes, places)
    axes.set_xlabel("milliseconds per image of the adapter alone (log scale)")
    tidy(axes, "both")
    with_title(figure, title, "accuracy, mean over domains (%)")
    figure.savefig(path)


def plot_visits(methods: Methods, path: Path, title: str, looks: Looks) -> bool:
    """Error at each showing of all domains; means over seeds.

    Args:
        methods: Results by method.
        path: Where the PNG goes.
        title: What the picture shows.
        looks: Of all methods.

    Returns:
        False, and nothing drawn, where the domains come once.
    """
    known = {m: [r for r in rs if "recurrence_errors" in r.summary] for m, rs in methods.items()}
    curves = {
        method: (
            np.arange(1, len(results[0].summary["recurrence_errors"]) + 1),
            np.mean([r.summary["recurrence_errors"] for r in results], axis=0),
        )
        for method, results in known.items()
        if results
    }
    if curves:
        draw_curves(curves, [], "visit of all domains", path, title, looks, first=1)
    return bool(curves)


@styled
def plot_reliability(methods: Methods, path: Path, title: str, looks: Looks) -> None:
    """Accuracy of each bin of confidence, one small plot for each method, seeds pooled."""
    figure, grid = make_panels(len(methods), PANELS, 2.0)
    for number, (axes, (method, results)) in enumerate(zip(grid, methods.items(), strict=True)):
        bins = np.array([r.summary["reliability"] for r in results], dtype=float)
        counts, sums = bins[..., 0].sum(0), np.nansum(bins[..., 1:] * bins[..., :1], axis=0)
        full = counts > 0
        confidence, accuracy = (sums[full] / counts[full, None]).T
        edges = np.arange(len(counts))[full] / len(counts)
        width = 1 / len(counts)
        colour = looks[method].colour
        axes.bar(edges, accuracy, width, align="edge", color=colour, alpha=0.5, edgecolor="white")
        axes.plot(confidence, accuracy, "o", color=colour, ms=3)
        axes.plot([0, 1], [0, 1], color="black", linewidth=1, linestyle="--")
        ece = over_seeds(results, lambda r: r.summary["ece"])
        label = "" if ece is None else f": ECE {100 * ece.mean:.1f} %"
        axes.set_title(f"{short_label(method, methods)}{label}")
        axes.set_xlim(0, 1)
        axes.set_ylim(0, 1)
        if number >= len(methods) - PANELS:
            axes.set_xlabel("confidence")
        tidy(axes)
    with_title(figure, title, "accuracy")
    figure.savefig(path)


@styled
def plot_estimates(methods: Methods, path: Path, title: str, looks: Looks) -> bool:
    """Accuracy over the stream, as it was and as it was estimated without labels; means over seeds.

    Args:
        methods: Results by method; those without estimates are left out.
        path: Where the PNG goes.
        title: What the picture shows.
        looks: Of all methods.

    Returns:
        False, and nothing drawn, where no method has estimates.
    """
    shown = {m: [r for r in rs if r.expected is not None] for m, rs in methods.items()}
    shown = {method: results for method, results in shown.items() if results}
    if not shown:
        return False
    figure, grid = make_panels(len(shown), PANELS, 1.7)
    first = next(iter(shown.values()))[0]
    total = first.curve[0][-1]
    window = window_of(total)
    for axes, (method, results) in zip(grid, shown.items(), strict=True):
        expected = [(r.curve[0], r.expected) for r in results if r.expected is not None]
        seen, errors = _mean_curve([r.curve for r in results], window)
        _, estimated = _mean_curve(expected, window)
        axes.plot(seen, 100 * (1 - errors), color=looks[method].colour, linewidth=1.8)
        axes.plot(seen, 100 * (1 - estimated), color="#333333", linewidth=1.1, linestyle="--")
        label_domains(axes, _stretches(shown), total, names=False)
        off = over_seeds(results, lambda r: r.estimate_error)
        label = "" if off is None else f": off by {off.text(100)}"
        axes.set_title(f"{short_label(method, methods)}{label}")
        tidy(axes)
    grid[0].set_xlim(0, total)
    grid[0].set_ylim(0, 100)
    grid[0].locator_params(axis="x", nbins=4)
    below = (
        f"images seen (accuracy over the last {window}); the dashed dark curve is the estimate\n"
        "above each plot: mean absolute error of the estimate in points, over windows of 500 images"
    )
    figure.supxlabel(below, fontsize=9)
    with_title(figure, title, "accuracy (%)")
    figure.savefig(path)
    return True


def _mean_curve(
    counts: Sequence[tuple[Sequence[float], Sequence[float]]], window: int
) -> tuple[np.ndarray, np.ndarray]:
    """Images seen and the running share of errors, the mean over seeds.

    Args:
        counts: (images seen, errors so far) of each seed. Where their lengths are drawn, the mean
            ends with the shortest one.
        window: Images to look back on.
    """
    curves = [(np.array(seen), np.array(wrong)) for seen, wrong in counts]
    errors = [running(seen, wrong, window) for seen, wrong in curves]
    first = curves[0][0]
    if all(np.array_equal(seen, first) for seen, _ in curves):
        return first, np.mean(errors, axis=0)
    end = min(seen[-1] for seen, _ in curves)
    points = np.append(first[first < end], end)
    found = [np.interp(points, seen, e) for (seen, _), e in zip(curves, errors, strict=True)]
    return points, np.mean(found, axis=0)


def _stretches(methods: Methods) -> list[tuple[int, int, str]]:
    """The stretches of the stream with one domain each; none where seeds have others."""
    found = [result.stretches for results in methods.values() for result in results]
    return found[0] if all(stretches == found[0] for stretches in found) else []


def _name_points(figure: Figure, axes: Axes, places: Sequence[tuple[float, float, str]]) -> None:
    """Write names beside points, moved up or down where they would cover each other or a point."""
    figure.draw_without_rendering()
    to_pixels = axes.transData.transform
    points = [to_pixels((x, y)) for x, y, _ in places]
    high = 9 * 1.25 * DPI / 72  # pixels that a line of text takes
    taken: list[tuple[float, float, float]] = []  # left, right, height in pixels
    for x, y, name in sorted(places, key=lambda place: -place[1]):
        left, height = to_pixels((x, y))
        width = 1.1 * LETTER * len(name) * DPI
        best = None
        # To the right, then to the left, each at the point's height and further and further off.
        for shift in (0, -1, 1, -2, 2, -3, 3, -4, 4):
            for start in (left + 12, left - 12 - width):
                h = height + shift * high
                free = all(start + width < a or start > b or abs(h - c) > high for a, b, c in taken)
                open_ = not any(
                    start - 4 < px < start + width + 4 and abs(h - py) < high / 2 + 4
                    for px, py in points
                )
                if free and open_ and start > axes.bbox.x0:
                    best = start, h
                    break
            if best is not None:
                break
        start, h = best if best is not None else (left + 12, height)
        taken.append((start, start + width, h))
        axes.annotate(
            name,
            (x, y),
            xytext=((start - left) * 72 / DPI, (h - height) * 72 / DPI),
            textcoords="offset points",
            va="center",
            arrowprops=None
            if abs(h - height) < high
            else {"arrowstyle": "-", "color": "#999999", "linewidth": 0.5, "shrinkB": 5},
        )
