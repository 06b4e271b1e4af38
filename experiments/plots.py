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

__all__ = ["plot_errors", "plot_running"]

# Okabe and Ito's colours, told apart with any colour vision; markers tell them apart in grey.
COLOURS = ("#000000", "#E69F00", "#56B4E9", "#009E73", "#CC79A7", "#0072B2", "#D55E00", "#7F7F7F")
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
    _finish(figure, axes, title, len(summaries))
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
        images, errors = _running(rows, window)
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
    stretches = _stretches(rows)
    roomy = len(stretches) <= 6
    for start, stop, name in stretches:
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
    axes.set_xlim(0, total)
    axes.set_ylim(0, min(100.0, axes.get_ylim()[1]))
    axes.set_xlabel(f"images seen (error over the last {window})")
    _finish(figure, axes, title, len(batches))
    figure.savefig(path)


def _finish(figure: Figure, axes: Axes, title: str, entries: int) -> None:
    axes.set_ylabel("error (%)")
    axes.grid(axis="y", color="#dddddd", linewidth=0.6)
    axes.set_axisbelow(True)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
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


def _running(rows: Sequence[Mapping[str, Any]], window: int) -> tuple[np.ndarray, np.ndarray]:
    """Images seen after each batch, and the share of errors in the last `window` of them."""
    seen = np.cumsum([row["images"] for row in rows])
    wrong = np.cumsum([row["errors"] for row in rows])
    before = np.searchsorted(seen, seen - window, side="right") - 1  # last batch outside
    old_seen = np.where(before >= 0, seen[before], 0)
    old_wrong = np.where(before >= 0, wrong[before], 0)
    return seen, (wrong - old_wrong) / (seen - old_seen)


def _stretches(rows: Sequence[Mapping[str, Any]]) -> list[tuple[int, int, str]]:
    """(first image, one past the last, domain) of each stretch of one domain."""
    stretches: list[tuple[int, int, str]] = []
    start = 0
    for row in rows:
        stop = start + row["images"]
        if stretches and stretches[-1][2] == row["domain"]:
            stretches[-1] = (stretches[-1][0], stop, row["domain"])
        else:
            stretches.append((start, stop, row["domain"]))
        start = stop
    return stretches
