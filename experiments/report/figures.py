"""Plots of results, as PNG files.

Methods are drawn in the order given, source first; everything else is compared with it.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

from experiments.records.config import BASELINE
from experiments.report.collect import Result
from experiments.report.plots import finish, mark_domains, running, style, tidy
from experiments.report.statistics import over_seeds

__all__ = ["plot_cost", "plot_domains", "plot_heat", "plot_reliability", "plot_stream"]

Methods = Mapping[str, Sequence[Result]]
DPI = 130
PANELS = 3  # in a row of small plots


def short(method: str, methods: Methods) -> str:
    """The method without its fields, where no other one would be called the same."""
    plain = re.sub(r"\[[^\]]*\]", "", method)
    others = [re.sub(r"\[[^\]]*\]", "", name) for name in methods if name != method]
    return method if plain in others else plain


def plot_stream(methods: Methods, path: Path, title: str) -> None:
    """Error over the last images along the stream, means over seeds."""
    figure = Figure(figsize=(12, 5.8), dpi=DPI, layout="constrained")
    axes = figure.add_subplot()
    first = next(iter(methods.values()))[0]
    total = first.curve[0][-1]
    window = min(max(total // 24, 50), 2000)
    for number, (method, results) in enumerate(methods.items()):
        curves = []
        for result in results:
            seen, wrong = (np.array(values) for values in result.curve)
            curves.append(running(seen, wrong, window))
        look = style(number)
        axes.plot(
            first.curve[0] if len(curves[0]) == len(first.curve[0]) else results[0].curve[0],
            100 * np.mean(curves, axis=0),
            color=look["color"],
            linestyle=look["linestyle"],
            linewidth=2.0 if method == BASELINE else 1.4,
            label=short(method, methods),
        )
    mark_domains(axes, first.stretches, total)
    axes.set_xlim(0, total)
    axes.set_ylim(0, min(100.0, axes.get_ylim()[1]))
    axes.set_xlabel(f"images seen (error over the last {window})")
    finish(figure, axes, title, len(methods))
    figure.savefig(path)


def plot_domains(methods: Methods, path: Path, title: str) -> None:
    """A bar for each domain in one small plot for each method, with source's error as a mark."""
    shown = {method: results for method, results in methods.items() if method != BASELINE}
    source = methods.get(BASELINE)
    names = list(next(iter(methods.values()))[0].summary["domain_errors"])

    def errors(results: Sequence[Result]) -> tuple[np.ndarray, np.ndarray]:
        found = [over_seeds(results, lambda r, n=n: r.summary["domain_errors"][n]) for n in names]
        means = np.array([100 * e.mean if e else np.nan for e in found])
        halves = np.array([100 * (e.half or 0.0) if e else 0.0 for e in found])
        return means, halves

    panels = shown or dict(methods)
    figure, grid = _panels(len(panels), 4.6, 2.3 + 0.02 * len(names))
    for number, (axes, (method, results)) in enumerate(zip(grid, panels.items(), strict=True)):
        means, halves = errors(results)
        where = np.arange(len(names))
        axes.bar(where, means, color="#56B4E9", width=0.8, label="method")
        if halves.any():
            axes.errorbar(where, means, halves, fmt="none", ecolor="#333333", elinewidth=1)
        if source is not None and shown:
            axes.plot(where, errors(source)[0], "_", color="black", ms=9, mew=2, label=BASELINE)
        axes.set_title(short(method, methods), fontsize=10)
        axes.set_ylim(0, 100)
        axes.set_xlim(-0.6, len(names) - 0.4)
        axes.set_xticks(where, names, rotation=90, fontsize=7)
        axes.tick_params(axis="y", labelsize=8)
        if number % PANELS == 0:
            axes.set_ylabel("error (%)", fontsize=9)
        tidy(axes)
    _end(figure, title, grid[0] if source is not None and shown else None)
    figure.savefig(path)


def plot_heat(groups: Mapping[str, Sequence[Result]], path: Path, title: str) -> bool:
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
    figure, grid = _panels(len(maps), 2.2 + 0.45 * len(levels), 0.9 + 0.22 * len(names))
    image = None
    for number, (axes, (method, counts)) in enumerate(zip(grid, maps.items(), strict=True)):
        values = np.full((len(names), len(levels)), np.nan)
        for (name, level), (images, errors) in counts.items():
            values[names.index(name), levels.index(level)] = 100 * errors / images
        image = axes.imshow(values, vmin=0, vmax=100, cmap="viridis", aspect="auto")
        for (i, j), value in np.ndenumerate(values):
            if not np.isnan(value):
                colour = "white" if value < 60 else "black"
                axes.text(j, i, f"{value:.0f}", ha="center", va="center", color=colour, fontsize=7)
        axes.set_title(short(method, groups), fontsize=10)
        axes.set_xticks(range(len(levels)), [f"{level:g}" for level in levels], fontsize=8)
        axes.set_xlabel("severity", fontsize=8)
        left = number % PANELS == 0
        axes.set_yticks(range(len(names)), names if left else [""] * len(names), fontsize=8)
    assert image is not None
    rows = math.ceil(len(maps) / PANELS)
    figure.colorbar(
        image, ax=grid, label="error (%)", shrink=0.8 / rows, aspect=15, anchor=(0.0, 1.0)
    )
    _end(figure, title)
    figure.savefig(path)
    return True


def plot_cost(methods: Methods, path: Path, title: str) -> None:
    """Accuracy against the time an image takes, means over seeds."""
    figure = Figure(figsize=(8, 5.2), dpi=DPI, layout="constrained")
    axes = figure.add_subplot()
    places = []
    for number, (method, results) in enumerate(methods.items()):
        cost = over_seeds(results, lambda r: 1000 / r.summary["images_per_second"])
        accuracy = over_seeds(results, lambda r: 100 * (1 - r.summary["mean_error"]))
        assert cost is not None and accuracy is not None
        look = style(number)
        axes.errorbar(
            cost.mean,
            accuracy.mean,
            accuracy.half,
            marker=look["marker"],
            color=look["color"],
            markersize=8,
            markeredgecolor="white",
            capsize=2,
            linestyle="none",
        )
        places.append((cost.mean, accuracy.mean, short(method, methods)))
    axes.set_xscale("log")
    axes.xaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:g}"))
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.margins(x=0.22, y=0.12)
    low, high = axes.get_ylim()
    axes.set_ylim(max(low, 0.0), min(high, 100.0))  # an interval of two seeds may say more
    _name_points(axes, places)
    axes.set_xlabel("milliseconds per image of the adapter alone (log scale)")
    axes.set_ylabel("accuracy, mean over domains (%)")
    axes.grid(color="#dddddd", linewidth=0.6)
    tidy(axes)
    _end(figure, title)
    figure.savefig(path)


def plot_reliability(methods: Methods, path: Path, title: str) -> None:
    """Accuracy of each bin of confidence, one small plot for each method, seeds pooled."""
    figure, grid = _panels(len(methods), 3.4, 2.9)
    for number, (axes, (method, results)) in enumerate(zip(grid, methods.items(), strict=True)):
        bins = np.array([r.summary["reliability"] for r in results], dtype=float)
        counts, sums = bins[..., 0].sum(0), np.nansum(bins[..., 1:] * bins[..., :1], axis=0)
        full = counts > 0
        confidence, accuracy = (sums[full] / counts[full, None]).T
        edges = np.arange(len(counts))[full] / len(counts)
        width = 1 / len(counts)
        axes.bar(edges, accuracy, width, align="edge", color="#56B4E9", edgecolor="white")
        axes.plot(confidence, accuracy, "o", color="#0072B2", ms=3)
        axes.plot([0, 1], [0, 1], color="black", linewidth=1, linestyle="--")
        ece = over_seeds(results, lambda r: r.summary["ece"])
        label = "" if ece is None else f": ECE {ece.text(100)} %"
        axes.set_title(f"{short(method, methods)}{label}", fontsize=9)
        axes.set_xlim(0, 1)
        axes.set_ylim(0, 1)
        axes.tick_params(labelsize=8)
        if number >= len(methods) - PANELS:
            axes.set_xlabel("confidence", fontsize=9)
        if number % PANELS == 0:
            axes.set_ylabel("accuracy", fontsize=9)
        tidy(axes)
    _end(figure, title)
    figure.savefig(path)


def _panels(count: int, width: float, height: float) -> tuple[Figure, list[Axes]]:
    """A figure of `count` small plots."""
    columns = min(PANELS, count)
    rows = math.ceil(count / columns)
    size = (max(width * columns, 6.0), height * rows + 0.5)
    figure = Figure(figsize=size, dpi=DPI, layout="constrained")
    return figure, [figure.add_subplot(rows, columns, i + 1) for i in range(count)]


def _end(figure: Figure, title: str, legend: Axes | None = None) -> None:
    figure.suptitle(title, fontsize=11, x=0.01, ha="left")
    if legend is not None:
        handles, labels = legend.get_legend_handles_labels()
        figure.legend(
            handles, labels, loc="outside lower center", ncols=3, frameon=False, fontsize=9
        )


def _name_points(axes: Axes, places: Sequence[tuple[float, float, str]]) -> None:
    """Write names beside points, moved up or down where they would cover each other."""
    axes.figure.draw_without_rendering()
    to_pixels = axes.transData.transform
    taken: list[tuple[float, float, float]] = []  # left, right, height in pixels
    for x, y, name in sorted(places, key=lambda place: -place[1]):
        left, height = to_pixels((x, y))
        left += 12
        right = left + 8.2 * len(name) * DPI / 100
        for shift in (0, -16, 16, -32, 32, -48, 48):
            h = height + shift
            if all(right < a or left > b or abs(h - c) > 15 for a, b, c in taken):
                break
        taken.append((left, right, h))
        axes.annotate(
            name,
            (x, y),
            xytext=(7, (h - height) * 72 / DPI),
            textcoords="offset points",
            fontsize=9,
            va="center",
        )
