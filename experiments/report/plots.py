"""The two pictures of a stream: error by domain, and running error over the stream."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from experiments.records.config import BASELINE
from experiments.records.file import stretches
from experiments.report.style import (
    MANY,
    Look,
    label_domains,
    looks_of,
    make_figure,
    make_panels,
    short_label,
    styled,
    tidy,
    with_legend,
    with_title,
)

__all__ = [
    "draw_curves",
    "draw_domains",
    "plot_errors",
    "plot_running",
    "running",
    "seen_of",
    "window_of",
]

Values = Sequence[float]  # one for each domain, in %
PANELS = 4  # small plots beside each other
SLOTS = 17  # domains whose names have room beside each other


def plot_errors(
    summaries: Sequence[Mapping[str, Any]],
    path: str | Path,
    title: str,
    methods: Sequence[str] = (),
) -> None:
    """Draw each method's error in each domain, and the mean.

    Args:
        summaries: One ``summary`` object per method.
        path: Where the PNG goes.
        title: What the picture shows.
        methods: All methods of the run, so that each looks the same in all its pictures; by default
            those of `summaries`.
    """
    names = [*summaries[0]["domain_errors"], "mean"]
    looks = looks_of(methods or [summary["method"] for summary in summaries])
    errors: dict[str, list[float]] = {}
    for summary in summaries:
        own = [summary["domain_errors"].get(name) for name in names[:-1]] + [summary["mean_error"]]
        errors[summary["method"]] = [np.nan if e is None else 100 * e for e in own]
    if len(errors) > MANY or len(names) > SLOTS:
        draw_domains({m: (e, None) for m, e in errors.items()}, names, path, title, looks)
    else:
        _draw_dots(errors, names, path, title, looks)


@styled
def _draw_dots(
    errors: Mapping[str, Values],
    names: Sequence[str],
    path: str | Path,
    title: str,
    looks: Mapping[str, Look],
) -> None:
    """All methods in one plot, with a dot for each in every domain."""
    figure, axes = make_figure(4.6)
    offsets = np.linspace(-0.36, 0.36, len(errors)) if len(errors) > 1 else np.zeros(1)
    for i in range(0, len(names), 2):
        axes.axvspan(i - 0.5, i + 0.5, color="#f0f0f0", zorder=0)
    for offset, (method, values) in zip(offsets, errors.items(), strict=True):
        axes.plot(
            np.arange(len(names)) + offset,
            values,
            linestyle="none",
            marker=looks[method].marker,
            color=looks[method].colour,
            markersize=8,
            markeredgecolor="white",
            markeredgewidth=0.6,
            label=short_label(method, errors),
        )
    axes.axvline(len(names) - 1.5, color="#666666", linewidth=1)
    axes.set_xticks(range(len(names)), [_in_lines(name) for name in names])
    axes.set_xlim(-0.5, len(names) - 0.5)
    axes.set_ylim(0, min(100.0, axes.get_ylim()[1] * 1.03))
    tidy(axes)
    with_title(figure, title, "error (%)")
    with_legend(figure, axes)
    figure.savefig(path)


def _in_lines(name: str) -> str:
    """A domain's name in lines that are no wider than a slot."""
    return "\n".join(line for word in name.split("_") for line in textwrap.wrap(word, 8))


@styled
def draw_domains(
    errors: Mapping[str, tuple[Values, Sequence[Values] | None]],
    names: Sequence[str],
    path: str | Path,
    title: str,
    looks: Mapping[str, Look],
) -> None:
    """A bar for each domain in one small plot for each method, with the baseline as a mark.

    Args:
        errors: For each method a value for each domain, and for each domain the values at both ends
            of a line over its bar, or None.
        names: Of the domains.
        path: Where the PNG goes.
        title: What the picture shows.
        looks: Of all methods.
    """
    panels = {m: found for m, found in errors.items() if m != BASELINE} or dict(errors)
    baseline = errors.get(BASELINE) if BASELINE not in panels else None
    figure, grid = make_panels(len(panels), PANELS, 0.45 + 0.17 * len(names))
    where = np.arange(len(names))
    for number, (axes, (method, (values, ends))) in enumerate(
        zip(grid, panels.items(), strict=True)
    ):
        axes.barh(where, values, color=looks[method].colour, height=0.8)
        if ends is not None:
            low, high = np.array(ends, dtype=float).T
            axes.hlines(where, low, high, color="#333333", linewidth=1)
        if baseline is not None:
            label = BASELINE if number == 0 else None
            axes.plot(
                baseline[0], where, "|", color=looks[BASELINE].colour, ms=8, mew=2, label=label
            )
        axes.set_title(short_label(method, errors))
        axes.set_xlim(0, 100)
        axes.set_ylim(len(names) - 0.4, -0.6)  # the first domain above
        axes.set_yticks(where, names)
        if number >= len(panels) - PANELS:
            axes.set_xlabel("error (%)")
        tidy(axes, "x")
    with_title(figure, title)
    if baseline is not None:
        with_legend(figure, grid[0])
    figure.savefig(path)


def plot_running(
    batches: Mapping[str, Sequence[Mapping[str, Any]]],
    path: str | Path,
    title: str,
    window: int = 500,
    methods: Sequence[str] = (),
) -> None:
    """Draw the error over the last `window` images along the stream, domains marked above.

    Args:
        batches: ``batch`` objects in stream order, by method.
        path: Where the PNG goes.
        title: What the picture shows.
        window: Images that the running error looks back on; at a boundary it still holds images
            of the domain before.
        methods: As for `plot_errors`.
    """
    curves: dict[str, tuple[np.ndarray, np.ndarray]] = {}
    for method, rows in batches.items():
        seen = np.cumsum([row["images"] for row in rows])
        wrong = np.cumsum([row["errors"] for row in rows])
        curves[method] = seen, running(seen, wrong, window)
    parts = stretches(next(iter(batches.values())))
    draw_curves(curves, parts, seen_of(window), path, title, looks_of(methods or batches))


@styled
def draw_curves(
    curves: Mapping[str, tuple[np.ndarray, np.ndarray]],
    parts: Sequence[tuple[int, int, str]],
    below: str,
    path: str | Path,
    title: str,
    looks: Mapping[str, Look],
    first: int = 0,
) -> None:
    """Errors of methods in one plot, or in small ones beside the baseline's if many.

    Args:
        curves: Images or visits seen, and share of errors, by method.
        parts: Stretches of the stream with one domain each, see `label_domains`.
        below: What stands below the plot.
        path: Where the PNG goes.
        title: What the picture shows.
        looks: Of all methods.
        first: Where the horizontal axis begins.
    """
    total = int(next(iter(curves.values()))[0][-1])
    top = 100 * max(float(np.nanmax(errors)) for _, errors in curves.values())
    if len(curves) <= MANY:
        figure, axes = make_figure(4.8)
        for method, (seen, errors) in curves.items():
            axes.plot(
                seen,
                100 * errors,
                color=looks[method].colour,
                linestyle=looks[method].line,
                marker=looks[method].marker,
                markevery=0.1,  # of the plot's width
                markeredgecolor="white",
                linewidth=2.0 if method == BASELINE else 1.5,
                label=short_label(method, curves),
            )
        label_domains(axes, parts, total)
        axes.set_xlabel(below)
        tidy(axes)
        with_legend(figure, axes)
        grid = [axes]
    else:
        panels = [method for method in curves if method != BASELINE]
        baseline = curves.get(BASELINE)
        figure, grid = make_panels(len(panels), PANELS, 1.7)
        for axes, method in zip(grid, panels, strict=True):
            if baseline is not None:
                colour = looks[BASELINE].colour
                axes.plot(baseline[0], 100 * baseline[1], color=colour, linewidth=0.9)
            seen, errors = curves[method]
            axes.plot(seen, 100 * errors, color=looks[method].colour, linewidth=1.8)
            label_domains(axes, parts, total, names=False)
            axes.set_title(short_label(method, curves))
            tidy(axes)
        if baseline is not None:
            below += f"; the thin black curve is {BASELINE}"
        if 1 < len(parts) <= 20:
            order = ", ".join(name for _, _, name in parts)
            below += "\n" + textwrap.fill(f"domains between the lines: {order}", 150)
        figure.supxlabel(below, fontsize=9)
    grid[0].set_xlim(first, total)
    grid[0].set_ylim(0, min(100.0, max(1.05 * top, 1.0)))  # a method may make no errors
    grid[0].locator_params(axis="x", nbins=4 if len(grid) > 1 else 10, integer=True)
    with_title(figure, title, "error (%)")
    figure.savefig(path)


def window_of(total: int) -> int:
    """Images that a running figure of a stream of so many looks back on."""
    return min(max(total // 24, 50), 2000)


def seen_of(window: int) -> str:
    """What stands below errors over so many images."""
    return f"images seen (error over the last {window})"


def running(seen: np.ndarray, wrong: np.ndarray, window: int) -> np.ndarray:
    """Share of errors in the last `window` images.

    Args:
        seen: (N,) images seen so far, at some points of a stream.
        wrong: (N,) errors among them.
        window: Images to look back on; at the start, as many as there are.
    """
    before = np.searchsorted(seen, seen - window, side="right") - 1  # last point outside
    old_seen = np.where(before >= 0, seen[before], 0)
    old_wrong = np.where(before >= 0, wrong[before], 0)
    return (wrong - old_wrong) / (seen - old_seen)
