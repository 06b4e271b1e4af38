"""What 8 bits cost an exported graph in error, beside the graph in float32.

    python -m experiments edge-int8

exports every recipe on every bundled model twice, in float32 and quantised on clean images, and
runs both on one stream of other images: clean ones first, then corrupted ones, without a reset. It
writes ``experiments/results/edge_int8.jsonl`` and the table in ``docs/edge.md``. The same command
goes on where it stopped; ``--again`` measures all anew.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

import corruptions
import models
import tta
from experiments.data import ImageSet
from experiments.records import markdown
from experiments.records.rows import Rows
from experiments.run.method_strings import parse_method
from experiments.run.subject import Subject, load_subject
from tta.core.checks import LARGEST, whole_number

__all__ = ["RECIPES", "EdgeInt8", "add_flags", "render"]

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "edge.md"
RESULTS = ROOT / "experiments" / "results" / "edge_int8.jsonl"
MARK = "int8"  # of the page's generated part
RECIPES = ("source", "bn", "alpha_bn", "unmix_tns", "robust_bn", "adaptive_bn+drift", "neo",
           "robust_bn+neo")  # fmt: skip
CLEAN = "clean"
DOMAINS = (CLEAN, "gaussian_noise", "fog", "contrast", "jpeg_compression")
SEVERITY, BATCH_SIZE = 5, 50
CALIBRATION = 100  # clean images, none of which are in the stream
PRECISIONS = ("float32", "int8")


def add_flags(parser: argparse.ArgumentParser) -> None:
    """Say what ``edge-int8`` does and takes."""
    parser.description = __doc__
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    add = parser.add_argument
    add("--models", nargs="+", metavar="NAME", default=models.list_models(), help="default: all")
    add("--methods", nargs="+", metavar="METHOD", default=RECIPES, help="default: %(default)s")
    add("--images", type=int, default=1000, metavar="N", help="of a domain (default: %(default)s)")
    add("--again", action="store_true", help="measure rows again that are there")
    parser.set_defaults(
        prepare=lambda args: EdgeInt8(args.models, args.methods, args.images, args.again)
    )


class EdgeInt8:
    """Runs graphs in both precisions.

    Args:
        names: Bundled models.
        methods: Method strings, without an update.
        images: Of each domain.
        again: Whether rows that are there are measured again.
        results: Where rows are kept.
        page: With the table.
    """

    def __init__(
        self,
        names: Sequence[str],
        methods: Sequence[str],
        images: int,
        again: bool = False,
        results: Path = RESULTS,
        page: Path = PAGE,
    ) -> None:
        opened = [load_subject(name, "bundled", torch.device("cpu")) for name in names]
        self.subjects = {subject.name: subject for subject in opened}
        for method in methods:
            parse_method(method, 10)
        self.images = whole_number("images", images, 1, LARGEST)
        self.methods, self.again = methods, again
        self.rows, self.page = Rows(results, ("model", "method")), page

    def execute(self) -> Path:
        """Measure what is left, and write the page; returns it."""
        about = {"images": self.images}
        with self.rows.shown_on(self.page, MARK, render):
            keys = [{"model": m, "method": r} for m in self.subjects for r in self.methods]
            self.rows.fill(keys, about, self._measure, self.again)
        return self.page

    def _measure(self, key: Mapping[str, Any]) -> dict[str, Any]:
        """Percent of wrong predictions by precision and domain, and sizes of the files."""
        subject, text = self.subjects[key["model"]], key["method"]
        method = parse_method(text, subject.info.num_classes)
        pixels, labels = _shuffled(subject)
        calibration = [
            subject.preprocess(part) for part in pixels[:CALIBRATION].split(BATCH_SIZE // 2)
        ]
        rest, truth = pixels[CALIBRATION:], labels[CALIBRATION:]
        rest, truth = rest[: self.images], truth[: self.images]
        found: dict[str, Any] = {}
        with tempfile.TemporaryDirectory() as place:
            try:
                with method.applied(subject, BATCH_SIZE, 0) as adapter:
                    for precision in PRECISIONS:
                        given = None if precision == PRECISIONS[0] else calibration
                        folder = Path(place) / precision
                        tta.export.to_onnx(adapter, folder, calibration[0][:2], calibration=given)
            except ValueError as error:  # of a model that the recipe does not fit
                return {"left_out": str(error)}
            for precision in PRECISIONS:
                folder = Path(place) / precision
                found[f"{precision}_bytes"] = (folder / "model.onnx").stat().st_size
                found[precision] = _errors(folder, subject, rest, truth)
        return found


def _shuffled(subject: Subject) -> tuple[Tensor, Tensor]:
    """Clean images in [0, 1] and their labels, in a random order."""
    clean = subject.clean
    assert isinstance(clean, ImageSet)
    order = torch.randperm(len(clean), generator=torch.Generator().manual_seed(0))
    return clean.tensor()[order].float() / 255, torch.as_tensor(np.array(clean.labels))[order]


def _errors(folder: Path, subject: Subject, pixels: Tensor, truth: Tensor) -> dict[str, float]:
    """Percent of wrong predictions of a graph, domain after domain."""
    found, graph = {}, _Graph(folder)
    for domain in DOMAINS:
        shifted = pixels
        if domain != CLEAN:
            seeds = torch.arange(len(pixels))
            shifted = corruptions.corrupt(pixels, domain, SEVERITY, seeds=seeds)
        wrong = 0
        for images, labels in zip(shifted.split(BATCH_SIZE), truth.split(BATCH_SIZE), strict=True):
            logits = graph(subject.preprocess(images))
            wrong += int((logits.argmax(1) != labels.numpy()).sum())
        found[domain] = round(100 * wrong / len(truth), 2)
    return found


class _Graph:
    """A graph that serves one stream."""

    def __init__(self, folder: Path) -> None:
        import onnxruntime

        self.session: Any = onnxruntime.InferenceSession(str(folder / "model.onnx"))
        self.state: dict[str, Any] = dict(np.load(folder / "state.npz"))

    def __call__(self, images: Tensor) -> Any:
        """Logits (B, C); the state to start with is that of the file."""
        feeds = {"images": images.numpy(), "reset": np.array([False]), **self.state}
        logits, *after = self.session.run(None, feeds)
        self.state = {f"state_in_{i}": value for i, value in enumerate(after)}
        return logits


def render(rows: Iterable[Mapping[str, Any]]) -> str:
    """The table."""
    rows = list(rows)
    if not rows:
        return ""
    header = ("model", "recipe", *(f"{d.replace('_', ' ')}" for d in DOMAINS), "file, MB")
    shown = []
    for row in rows:
        if "left_out" in row:
            continue
        pairs = [f"{row['float32'][d]:.1f} → {row['int8'][d]:.1f}" for d in DOMAINS]
        size = f"{row['float32_bytes'] / 1e6:.2f} → {row['int8_bytes'] / 1e6:.2f}"
        shown.append([markdown.code(row["model"]), markdown.code(row["method"]), *pairs, size])
    images = " or ".join(f"{n:,}" for n in sorted({row["images"] for row in rows}))
    about = (
        f"Errors in percent, float32 → int8, on one stream of the domains from left to right "
        f"without a reset, {images} images of each at severity {SEVERITY} in batches of "
        f"{BATCH_SIZE}; ranges from {CALIBRATION} clean images that are not in it:"
    )
    worst = max(
        (row["int8"][d] - row["float32"][d] for row in rows if "int8" in row for d in DOMAINS),
        default=0.0,
    )
    mean = np.mean(
        [row["int8"][d] - row["float32"][d] for row in rows if "int8" in row for d in DOMAINS]
    )
    after = f"The mean difference is {mean:+.2f} points, the largest {worst:+.1f}."
    return markdown.document(
        [about, "", *markdown.table(header, shown, "ll" + "r" * (len(DOMAINS) + 1)), "", after]
    )
