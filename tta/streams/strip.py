"""The picture of a stream: domain, label and severity of each sample over time."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from tta.core.checks import path_like, shown
from tta.streams.plan import Rows
from tta.streams.pool import Ints

__all__ = ["draw_strip"]

LETTERS = 9  # points, of all but the title
# Okabe and Ito's colours, told apart with any colour vision.
BLUE, VERMILION, GREEN = "#0072B2", "#D55E00", "#009E73"


def draw_strip(batches: Iterable[tuple[Rows, Ints]], config: Mapping[str, Any], path: Any) -> None:
    """Draw a stream as a PNG, from indices and labels alone.

    Args:
        batches: The rows of each batch and their labels, as `Stream.rows` gives them.
        config: The definition of the stream.
        path: File of the picture.

    Raises:
        TypeError: When `path` is no path.
        ValueError: When `path` is not the name of a PNG file, or the stream has no images.
        FileNotFoundError: When its folder is not there.
        ImportError: Without matplotlib.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError(
            "`draw` must be left out where matplotlib is not installed: pip install matplotlib"
        ) from error
    path = path_like("draw", path)
    if path.is_dir() or path.suffix.lower() not in ("", ".png"):
        raise ValueError(f"`draw` must be the name of a PNG file, got {shown(str(path))}")
    if not path.parent.is_dir():
        raise FileNotFoundError(
            f"`draw` must lie in a folder that is there, but {path.parent} is not: make it first"
        )
    domains: list[str] = []
    severities: list[float] = []
    labels = []
    for rows, batch_labels in batches:
        visible = [rows.conditions[i] for i in rows.which]
        domains += [condition.domain for condition in visible]
        severities += [
            sum(s) if isinstance(s := condition.severity, tuple) else s for condition in visible
        ]
        labels.append(batch_labels)
    title = (
        f"{config['scenario']}: {len(domains)} images in {len(labels)} batches of "
        f"{config['batch_size']}, seed {config['seed']}"
    )
    order = [name for name in dict.fromkeys([*config["domains"], *domains]) if name in set(domains)]
    levels = np.array(severities, dtype=float)
    if not domains:
        raise ValueError("`draw` must be left out for a stream without images, got one at its end")
    figure = Figure(dpi=130, layout="constrained")
    _plot(figure, domains, np.concatenate(labels), levels, order, title)
    figure.savefig(path, format="png")


def _plot(
    figure: Any,
    domains: Sequence[str],
    labels: Any,
    severities: Any,
    names: Sequence[str],
    title: str,
) -> None:
    codes = {name: i for i, name in enumerate(names)}
    rows = np.array([codes[name] for name in domains])
    where = np.arange(len(rows))
    graded = len(np.unique(severities[~np.isnan(severities)])) > 1
    heights = [min(1 + 0.16 * len(names), 6.0), 2.6, *([1.3] if graded else [])]
    figure.set_size_inches(12, sum(heights) + 1.2)
    grid = figure.subplots(
        len(heights), 1, sharex=True, squeeze=False, gridspec_kw={"height_ratios": heights}
    )[:, 0]
    size = max(0.4, min(6.0, 4000 / len(rows)))
    dots: dict[str, Any] = {"linestyle": "none", "marker": "|", "markeredgewidth": size / 4}
    grid[0].plot(where, rows, color=BLUE, markersize=4, **dots)
    many = len(names) > 40  # pairs of a walk
    shown = [] if many else [name.replace("$", r"\$") for name in names]
    grid[0].set_yticks(range(len(shown)), shown)
    grid[0].set_ylim(len(names) - 0.5, -0.5)
    shows = [f"domain ({len(names)})" if many else "domain", "label"]
    height = max(1.0, min(6.0, 160 / (int(labels.max()) + 1)))
    grid[1].plot(where, labels, color=VERMILION, markersize=height, **dots)
    if graded:
        grid[2].plot(where, severities, color=GREEN, linewidth=1)
        pairs = any("+" in name for name in names)
        shows.append("sum of severities" if pairs else "severity")
        grid[2].set_ylim(0, max(5.2, 1.04 * np.nanmax(severities)))
    for axes, text in zip(grid, shows, strict=True):
        axes.set_title(text, loc="left", fontsize=LETTERS)
        axes.tick_params(labelsize=LETTERS)
        axes.grid(axis="y", color="#dddddd", linewidth=0.6)
        axes.set_axisbelow(True)
        for side in ("top", "right"):
            axes.spines[side].set_visible(False)
    grid[-1].set_xlabel("images seen", fontsize=LETTERS)
    grid[-1].set_xlim(0, len(rows))
    figure.suptitle(title, fontsize=11, x=0.01, ha="left")
