"""The errors of compositions in ``docs/composition.md``, from a run of their configuration.

    python -m experiments run --config experiments/configs/compositions.toml --output runs
    python -m experiments compositions runs/<date>-compositions

writes a row for each update and a column for each rule that is joined to it, and keeps the figures
in ``experiments/results/compositions.json``. Runs of some of the methods add to what is there.
"""

from __future__ import annotations

import argparse
import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import tta
from experiments.records import markdown
from experiments.records.config import BASELINE
from experiments.report.collect import Result, collect
from tta.core.files import replacing

__all__ = ["Compositions", "add_flags", "render"]

ROOT = Path(__file__).parents[2]
PAGE, RESULTS = ROOT / "docs" / "composition.md", ROOT / "experiments/results/compositions.json"
MARK = "errors"  # of the page's generated part
SAME = ("images", "domains", "batch_size", "severity", "model")
JOINED = ("unmix_tns", "lame", "adanpc")  # in the order of the columns


def add_flags(parser: argparse.ArgumentParser) -> None:
    """Say what ``compositions`` does and takes."""
    parser.description = __doc__
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("runs", nargs="+", type=Path, help="folders of runs")
    parser.set_defaults(prepare=lambda args: Compositions(collect(args.runs)))


class Compositions:
    """Adds results to the figures and the page.

    Args:
        results: From `collect`.
    """

    def __init__(self, results: Sequence[Result]) -> None:
        self.results = results

    def execute(self) -> Path:
        """Write figures and page; returns the page."""
        streams: dict[str, list[Result]] = {}
        for result in self.results:
            streams.setdefault(result.setting.stream, []).append(result)
        figures = json.loads(RESULTS.read_text()) if RESULTS.is_file() else {}
        for name, results in streams.items():
            figures[name] = _joined(figures.get(name), _figures(results))
        with replacing(RESULTS) as part:
            part.write_text(json.dumps(figures, indent=1) + "\n")
        markdown.write_between(PAGE, MARK, render(figures))
        print(f"{RESULTS}\n{PAGE}")
        return PAGE


def _joined(old: dict[str, Any] | None, new: dict[str, Any]) -> dict[str, Any]:
    """New figures, with the errors of other methods where the stream is the same."""
    if old is None or any(old[key] != new[key] for key in SAME):
        return new
    return {**new, "errors": old["errors"] | new["errors"]}


def _figures(results: Sequence[Result]) -> dict[str, Any]:
    first = results[0]
    errors = {_plain(r.method): round(100 * r.summary["mean_error"], 1) for r in results}
    return {
        **{key: getattr(first.setting, key) for key in SAME},
        "about": first.about,
        "errors": errors,
    }


def _plain(method: str) -> str:
    """A method's label without fields in brackets."""
    return re.sub(r"\[[^\]]*\]", "", method)


def render(figures: Mapping[str, Mapping[str, Any]]) -> str:
    """Markdown tables of mean errors in %, one for each stream."""
    return "\n".join(_table(stream, found) for stream, found in figures.items())


def _table(stream: str, found: Mapping[str, Any]) -> str:
    updates = (BASELINE, *tta.list_methods(slot="update"))
    header = ["update", "alone", *(f"+ {markdown.code(joined)}" for joined in JOINED)]
    rows = [
        [markdown.code(update), *(_error(found["errors"], update, j) for j in ("", *JOINED))]
        for update in updates
    ]
    about = (
        f"Stream `{stream}`: {found['images']:,} images of {found['domains']} domains, severity "
        f"{found['severity']:g}, batches of {found['batch_size']}, `{found['model']}`; mean error "
        "over the domains in %, one seed."
    )
    return markdown.document([about, "", *markdown.table(header, rows)])


def _error(errors: Mapping[str, float], update: str, joined: str) -> str:
    """The error of a composition, written in either order; source means nothing."""
    parts = [part for part in (update, joined) if part not in ("", BASELINE)]
    for order in (parts, parts[::-1]):
        if (label := "+".join(order) or BASELINE) in errors:
            return f"{errors[label]:.1f}"
    return "-"
