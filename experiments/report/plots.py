"""The two pictures of a stream: error by domain, and running error over the stream."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")  # pictures go to files, also where there is no display

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from experiments.records.file import stretches

__all__ = [
    "finish",
    "mark_domains",
    "plot_errors",
    "plot_running",
    "running",
    "style",
    "tidy",
]

# Okabe and Ito's colours, told apart with any colour vision; markers tell them apart in grey.
# Tol's muted ones follow for whoever compares more than eight methods.
COLOURS = (
    "#000000", "#E69F00", "#56B4E9", "#009E73", "#CC79A7", "#0072B2", "#D55E00", "#7F7F7F",
    "#882255", "#999933", "#332288", "#44AA99", "#661100", "#AA4499", "#117733", "#88CCEE",
)  # fmt: skip
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "p")
LINES = ("-", "--", "-.", ":")


def plot_errors(summaries: Sequence[Mapping[str, Any]], path: str | Path, title: str) -> None:
    """Draw each method's error in each domain, and the mean, as a dot plot.

    Args:
        summaries: One ``summary`` object per method.
        path: Where the PNG goes.
        title: What the picture shows.
    """
    names = [*summaries[0]["domain_errors"], "mean"]
    figure = Figure(figsize=(max(7.5, 0.78 * len(names)), 5), dpi=130, layout="constrained")
    axes = figure.add_subplot()
    offsets = np.linspace(-0.36, 0.36, len(summaries)) if len(summaries) > 1 else np.zeros(1)
    for i in range(0, len(names), 2):
        axes.axvspan(i - 0.5, i + 0.5, color="#f0f0f0", zorder=0)
    for number, summary in enumerate(summaries):
        errors = [summary["domain_errors"].get(n, np.nan) for n in names[:-1]]
        errors.append(summary["mean_error"])
        axes.plot(
            np.arange(len(names)) + offsets[number],
            100 * np.array(errors, dtype=float),
            linestyle="none",
            marker=MARKERS[number % len(MARKERS)],
            color=COLOURS[number % len(COLOURS)],
            markersize=8,
            markeredgecolor="white",
            markeredgewidth=0.6,
            label=summary["method"],
        )
    axes.axvline(len(names) - 1.5, color="#666666", linewidth=1)
    axes.set_xticks(range(len(names)), [n.replace("_", "\n") for n in names], fontsize=8)
    axes.set_xlim(-0.5, len(names) - 0.5)
    axes.set_ylim(0, min(100.0, axes.get_ylim()[1] * 1.03))
    finish(figure, axes, title, len(summaries))
    figure.savefig(path)


def plot_running(
    batches: Mapping[str, Sequence[Mapping[str, Any]]],
    path: str | Path,
    title: str,
    window: int = 500,
) -> None:
    """Draw the error over the last `window` images along the stream, domains marked above.

    Args:
        batches: ``batch`` objects in stream order, by method.
        path: Where the PNG goes.
        title: What the picture shows.
        window: Images that the running error looks back on; at a boundary it still holds images
            of the domain before.
    """
    figure = Figure(figsize=(12, 5.4), dpi=130, layout="constrained")
    axes = figure.add_subplot()
    for number, (method, rows) in enumerate(batches.items()):
        seen = np.cumsum([row["images"] for row in rows])
        wrong = np.cumsum([row["errors"] for row in rows])
        images, errors = seen, running(seen, wrong, window)
        axes.plot(
            images,
            100 * errors,
            color=COLOURS[number % len(COLOURS)],
            linestyle=LINES[number // 2 % len(LINES)],
            linewidth=1.6,
            label=method,
        )
    rows = next(iter(batches.values()))
    total = sum(row["images"] for row in rows)
    mark_domains(axes, stretches(rows), total)
    axes.set_xlim(0, total)
    axes.set_ylim(0, min(100.0, axes.get_ylim()[1]))
    axes.set_xlabel(f"images seen (error over the last {window})")
    finish(figure, axes, title, len(batches))
    figure.savefig(path)


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


def mark_domains(axes: Axes, stays: Sequence[tuple[int, int, str]], total: int) -> None:
    """Draw where the domain changes, and name the domains above where there is room."""
    roomy = len(stays) <= 6
    if len(stays) > 60:  # lines would be all one sees
        return
    for start, stop, name in stays:
        if start:
            axes.axvline(start, color="#999999", linewidth=0.7, zorder=0)
        if (stop - start) / total > 0.02:  # narrower, the labels would touch
            axes.text(
                (start + stop) / 2,
                1.01,
                name,
                rotation=0 if roomy else 45,
                rotation_mode="anchor",
                fontsize=8,
                ha="center" if roomy else "left",
                va="bottom",
                transform=axes.get_xaxis_transform(),
            )


def style(number: int) -> dict[str, Any]:
    """Colour, line and marker of the method of that number, told apart also in grey."""
    return {
        "color": COLOURS[number % len(COLOURS)],
        "linestyle": LINES[(number // 2 + number // 8) % len(LINES)],
        "marker": MARKERS[number % len(MARKERS)],
    }


def finish(figure: Figure, axes: Axes, title: str, entries: int) -> None:
    """Label the axis of errors, and put title and legend outside of the plot."""
    axes.set_ylabel("error (%)")
    tidy(axes)
    figure.suptitle(title, fontsize=11, x=0.01, ha="left")
    rows = -(-entries // int(figure.get_figwidth() / 1.45))  # as many as make the entries fit
    handles, labels = axes.get_legend_handles_labels()
    figure.legend(
        handles,
        labels,
        loc="outside lower center",
        ncols=-(-entries // rows),
        frameon=False,
        fontsize=9,
    )


def tidy(axes: Axes) -> None:
    """Horizontal grid lines behind, no frame above and at the right."""
    axes.grid(axis="y", color="#dddddd", linewidth=0.6)
    axes.set_axisbelow(True)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
