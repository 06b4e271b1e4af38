"""Which recipes give other numbers with another number of torch's threads.

    python -m experiments threads

serves the same shifted images to every recipe with one thread and with more, compares what is
returned bit by bit, writes ``experiments/results/threads.json`` and the table in
``docs/experiments.md``. With the same number of threads, numbers are the same. With another one a
sum over many numbers may be taken in another order, which changes its last digit. Results files
say of their methods what was found here, see `experiments.records.environment.threads_matter`.

What a method needs of the source is made from clean images that are not served, and what it needs
of the caller is a denoiser with random weights: it is not asked here whether it helps.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import corruptions
import models
import tta
from experiments.data import ImageSet
from experiments.records import markdown
from experiments.records.config import BASELINE
from experiments.records.environment import THREADS, describe_environment
from experiments.run.method_strings import Method, parse_method
from experiments.run.subject import Subject, load_subject
from experiments.sweep.benchmark import without_replay
from tta.core.checks import whole_number
from tta.core.files import replacing

__all__ = ["ThreadCounts", "add_flags", "render"]

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "experiments.md"
MARK = "threads"  # of the page's generated part
CPU = torch.device("cpu")
CORRUPTION, SEVERITY = "gaussian_noise", 5
SOURCE_BATCHES = 4  # of clean images


def add_flags(parser: argparse.ArgumentParser) -> None:
    """Say what ``threads`` does and takes."""
    parser.description = __doc__
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    add = parser.add_argument
    add("--models", nargs="+", metavar="NAME", default=models.list_models(), help="default: all")
    add("--methods", nargs="+", metavar="NAME", help="default: every component alone")
    add("--threads", type=int, default=2, metavar="N", help="beside one (default: %(default)s)")
    add("--batches", type=int, default=3, metavar="N", help="default: %(default)s")
    add("--batch-size", type=int, default=64, metavar="N", help="default: %(default)s")
    parser.set_defaults(
        prepare=lambda args: ThreadCounts(
            args.models, args.methods, args.threads, args.batches, args.batch_size
        )
    )


class ThreadCounts:
    """Serves every recipe twice; what was measured before of other recipes stays.

    Args:
        names: Models, for `models.load`.
        methods: Method strings; None for every component alone.
        threads: Torch's threads, beside one.
        batches: Batches that are served.
        batch_size: Images in each.
    """

    def __init__(
        self,
        names: Sequence[str],
        methods: Sequence[str] | None,
        threads: int,
        batches: int,
        batch_size: int,
    ) -> None:
        self.threads = whole_number("threads", threads, 2, 1024)
        self.batch_size = whole_number("batch-size", batch_size, 2, 10**6)
        self.batches = whole_number("batches", batches, 1, 10**6)
        self.subjects = [load_subject(name, "bundled", CPU) for name in names]
        others = [name for name in tta.list_methods() if name != BASELINE]
        self.methods = [BASELINE, *others] if methods is None else methods
        for subject in self.subjects:
            for method in self.methods:
                self._parse(method, subject)

    def execute(self) -> Path:
        """Measure, and write figures and page; returns the page."""
        about = {
            "threads": self.threads,
            "batches": self.batches,
            "batch_size": self.batch_size,
            "shift": [CORRUPTION, SEVERITY],
        }
        old = json.loads(THREADS.read_text()) if THREADS.is_file() else {}
        same = all(old.get(key) == value for key, value in about.items())
        recipes: dict[str, dict[str, Any]] = old["recipes"] if same else {}
        for subject in self.subjects:
            batches = self._batches(subject)
            fitted = replace(subject, source=self._source(subject))
            for name in self.methods:
                method = self._parse(name, subject)
                row = recipes.setdefault(name, {})
                row[subject.name] = self._compare(fitted, method, batches)
                print(f"{subject.name}  {name:<16} {row[subject.name]}", flush=True)
                figures = {**about, **describe_environment(), "recipes": recipes}
                with replacing(THREADS) as part:  # each time: the whole takes a while
                    part.write_text(json.dumps(figures, indent=1) + "\n")
        markdown.write_between(PAGE, MARK, render(json.loads(THREADS.read_text())))
        print(f"{THREADS}\n{PAGE}")
        return PAGE

    def _parse(self, name: str, subject: Subject) -> Method:
        """The method; one that replays source images does without, which takes too long here."""
        text = without_replay(name) if name in tta.list_methods() else name
        return parse_method(text, subject.info.num_classes)

    def _clean(self, subject: Subject, skip: int, count: int) -> tuple[Tensor, Tensor]:
        """Clean images (count, 3, H, W) uint8 in a random order, and their labels."""
        clean = subject.clean
        assert isinstance(clean, ImageSet)
        order = torch.randperm(len(clean), generator=torch.Generator().manual_seed(0))
        chosen = order[skip : skip + count]
        return clean.tensor()[chosen], torch.from_numpy(clean.labels)[chosen].long()

    def _source(self, subject: Subject) -> tta.SourceStatistics:
        """The model's own artefacts, images to make others of, and a random denoiser."""
        shown, count = self.batches * self.batch_size, SOURCE_BATCHES * self.batch_size
        pixels, labels = self._clean(subject, shown, count)
        parts = (part.split(self.batch_size) for part in (pixels, labels))
        batches = [(subject.preprocess(x.float() / 255), y) for x, y in zip(*parts, strict=True)]
        own = subject.source
        found = own if isinstance(own, tta.SourceStatistics) else tta.SourceStatistics()
        denoiser = tta.Diffusion(_Denoiser(), torch.linspace(1e-4, 0.02, 1000))
        return replace(found, batches=batches, denoiser=denoiser)

    def _batches(self, subject: Subject) -> list[Tensor]:
        pixels, _ = self._clean(subject, 0, self.batches * self.batch_size)
        seeds = torch.arange(len(pixels))
        shifted = corruptions.corrupt(pixels, CORRUPTION, SEVERITY, seeds=seeds)
        return [subject.preprocess(part.float() / 255) for part in shifted.split(self.batch_size)]

    def _compare(
        self, subject: Subject, method: Method, batches: Sequence[Tensor]
    ) -> dict[str, Any] | None:
        """How far outputs are apart; None for a recipe that the model does not fit."""
        try:
            one, many = (self._serve(subject, method, batches, n) for n in (1, self.threads))
        except ValueError:
            return None
        return {
            "same": torch.equal(one, many),
            "largest": float((one - many).abs().max()),
            "decisions": int((one.argmax(1) != many.argmax(1)).sum()),
        }

    def _serve(
        self, subject: Subject, method: Method, batches: Sequence[Tensor], threads: int
    ) -> Tensor:
        """Outputs (N, C) of all batches."""
        before = torch.get_num_threads()
        torch.set_num_threads(threads)
        try:
            with method.applied(subject, self.batch_size, 0) as adapter:
                return torch.cat([adapter(images).detach().clone() for images in batches])
        finally:
            torch.set_num_threads(before)


class _Denoiser(nn.Module):
    """Two convolutions with random weights, the same each time."""

    def __init__(self) -> None:
        super().__init__()
        with torch.random.fork_rng([]):
            torch.manual_seed(0)
            self.layers = nn.Sequential(
                nn.Conv2d(3, 16, 3, padding=1), nn.SiLU(), nn.Conv2d(16, 3, 3, padding=1)
            )

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        return self.layers(x)


def render(figures: Mapping[str, Any]) -> str:
    """The recipes whose numbers depend on the number of threads, and which do not."""
    rows, same, unfit = [], [], []
    for name, found in sorted(figures["recipes"].items()):
        moved = {model: row for model, row in found.items() if row and not row["same"]}
        if not any(found.values()):
            unfit.append(markdown.code(name))
            continue
        if not moved:
            same.append(markdown.code(name))
            continue
        rows.append(
            [
                markdown.code(name),
                ", ".join(map(markdown.code, moved)),
                f"{max(row['largest'] for row in moved.values()):.0e}",
                str(sum(row["decisions"] for row in moved.values())),
            ]
        )
    images = figures["batches"] * figures["batch_size"]
    about = (
        f"One and {figures['threads']} threads, {figures['batches']} batches of "
        f"{figures['batch_size']} images on each bundled network, {figures['hardware']['cpu']}, "
        f"torch {figures['versions']['torch']}:"
    )
    header = ("recipe", "on", "largest difference", f"other decisions, of {images} on each")
    table = markdown.table(header, rows, "llrr")
    ending = ["", f"The same bit for bit: {', '.join(same)}."] if same else []
    if unfit:
        ending += ["", f"Not measured, as they fit none of these networks: {', '.join(unfit)}."]
    return markdown.document([about, "", *table, *ending])
