"""What a run prints and draws of a stream that all methods have gone through."""

from __future__ import annotations

import shutil
import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from experiments.report.run_table import describe, render_markdown, render_text
from tta.core.files import replacing
from tta.streams import Preview

__all__ = ["SHOW", "show_stream"]

SHOW = ("all", "tables", "nothing")  # what a run prints; "nothing" also draws no plots


def show_stream(
    name: str,
    model: str,
    preview: Preview,
    summaries: Sequence[dict[str, Any]],
    batches: Mapping[str, list[dict[str, Any]]],
    folder: Path,
    methods: Sequence[str],
    card: str | None = None,
) -> None:
    """Print a stream's table, write it as Markdown and draw its plots.

    Args:
        name: Name of the stream, which begins the files' names.
        model: Name of the model.
        preview: Figures of the stream.
        summaries: The ``summary`` line of each method.
        batches: The ``batch`` lines of each method, by its label.
        folder: Where the files go.
        methods: Labels of all methods of the run, so that each looks the same in all its pictures.
        card: What the row of source depends on, in words.
    """
    from experiments.report.plots import plot_errors, plot_running  # slow to import

    width = shutil.get_terminal_size((140, 24)).columns
    print(render_text(summaries, width), end="\n\n")
    print(textwrap.fill(describe(summaries), width), flush=True)
    title = f"{model}, {name} stream"
    plot_errors(summaries, folder / f"{name}-errors.png", f"Error by domain: {title}", methods)
    window = min(500, max(preview.samples // len(preview.visits) // 2, 100))
    path = folder / f"{name}-running.png"
    plot_running(dict(batches), path, f"Running error: {title}", window, methods)
    text = f"{render_markdown(summaries)}\n{describe(summaries)}\n"
    if card is not None:
        text += f"\nSource: {card}.\n"
    with replacing(folder / f"{name}.md") as part:
        part.write_text(text)
