"""``python -m experiments surface``: the accuracies that a walk's difficulty is made of.

A walk (CCC, Press et al. 2023) goes along pairs of corruptions at severities where a model keeps a
target accuracy. That needs the accuracy under every ordered pair, the first corruption applied
before the second, at severities 0, 0.25, ..., 5 of each: `(21, 21)` numbers a pair. The file that
this writes is given to a stream with ``--option surface=FILE``.
"""

from __future__ import annotations

import argparse
import itertools
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from scipy.interpolate import RegularGridInterpolator

import corruptions
from experiments.data import ImageSet
from experiments.records.file import JsonLines, read_lines
from experiments.records.progress import Progress
from experiments.run.domains import corrupt_set, image_seeds
from experiments.run.flags import number_of_images
from experiments.run.subject import load_subject, pick_device
from tta.core.checks import nearest, shown
from tta.core.files import replacing
from tta.streams.walk import LEVELS, walk_domains

__all__ = ["Surface", "add_flags", "fill_in"]

BATCH = 250


def add_flags(parser: argparse.ArgumentParser) -> None:
    """Say what ``surface`` does and takes."""
    parser.description = (
        "Measure a model's accuracy under every ordered pair of corruptions at "
        "severities from 0 to 5 of each; the same command goes on after an interruption. Pass the "
        "file to a walk: run --scenario walk --option surface=FILE."
    )
    add = parser.add_argument
    add("--model", default="cifar10_resnet20_bn", help="default: %(default)s")
    add("--data", default="bundled", help="clean images (default: %(default)s)")
    add("--corruptions", nargs="+", metavar="NAME", help="default: those of --difficulty")
    add("--difficulty", default="medium", choices=("hard", "medium", "easy"))
    add("--images", default="200", metavar="N", help="or 'all' (default: %(default)s)")
    add(
        "--step",
        type=float,
        default=1.0,
        choices=(0.25, 0.5, 1.0, 2.5),
        help="between measured severities; those in between are interpolated (default: 1)",
    )
    add("--seed", type=int, default=0, help="of the corruptions (default: %(default)s)")
    add("--output", type=Path, default=Path("runs/surface.json"), help="default: %(default)s")
    add("--device", help="cpu, cuda, cuda:1 (default: CUDA if there is one)")
    add("--quiet", action="store_true", help="print nothing")
    parser.set_defaults(prepare=_prepare)


def _prepare(args: argparse.Namespace) -> Surface:
    names = args.corruptions or walk_domains(args.difficulty)
    images = number_of_images(args.images, None)
    return Surface(
        args.model, args.data, names, images, args.step, args.seed, args.output,
        pick_device(args.device), args.quiet,
    )  # fmt: skip


class Surface:
    """Accuracies of one model under pairs of corruptions.

    Args:
        model: Name for `models.load`.
        data: Of clean images.
        names: Corruptions, at least two.
        images: How many, as many of each class; None for all.
        step: Between measured severities.
        seed: Of the corruptions.
        path: Of the JSON file; measurements are kept beside it until all are there.
        device: Where to measure.
        quiet: Print nothing.
    """

    def __init__(
        self,
        model: str,
        data: str,
        names: Sequence[str],
        images: int | None,
        step: float,
        seed: int,
        path: Path,
        device: torch.device,
        quiet: bool = False,
    ) -> None:
        known = corruptions.list_corruptions(extra=True)
        for name in names:
            if name not in known:
                raise ValueError(
                    f"`corruptions` must be known, got {shown(name)}: {nearest(name, known)}"
                )
        if len(set(names)) < 2:
            raise ValueError(f"`corruptions` must be at least two, got {' '.join(names)}")
        self.subject = load_subject(model, data, device)
        clean = self.subject.clean
        if not isinstance(clean, ImageSet):
            raise ValueError(f"`data` must be clean images in memory, got {shown(data)}")
        self.clean = clean if images is None else clean.balanced(images)
        self.labels = torch.from_numpy(self.clean.labels)
        self.about = {"model": model, "data": data, "images": len(self.clean), "seed": seed}
        self.about |= {"names": list(names), "step": step}
        self.levels = [float(level) for level in np.arange(0, 5 + step / 2, step)]
        self.path = path
        points = len(names) * (len(names) - 1) * len(self.levels) ** 2
        self.progress = Progress(points, quiet)

    def execute(self) -> Path:
        """Measure what is not measured, and write the file."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        kept = self.path.with_name(f"{self.path.name}.jsonl")
        with JsonLines(kept) as lines:
            begun = next(iter(read_lines(kept, "surface")), None)
            if begun is None:
                lines.write("surface", **self.about)
            elif {key: begun.get(key) for key in self.about} != self.about:
                raise FileExistsError(
                    f"`{kept}` holds measurements of something else: choose another --output"
                )
            held = {
                (row["first"], row["severity"], row["second"]): row["accuracies"]
                for row in read_lines(kept, "row")
            }
            for first in self.about["names"]:
                for s1 in self.levels:
                    self._measure(first, s1, held, lines)
        text = json.dumps({**self.about, "surface": self._surfaces(held)}) + "\n"
        with replacing(self.path) as part:
            part.write_text(text)
        kept.unlink()
        self.progress.say(
            f"{self.path}\npython -m experiments run --scenario walk --option surface={self.path} "
            f"--corruptions {' '.join(self.about['names'])}"
        )
        return self.path

    def _measure(
        self, first: str, s1: float, held: dict[tuple[str, float, str], Any], lines: JsonLines
    ) -> None:
        """Measure all points with the first corruption at one severity."""
        missing = [n for n in self.about["names"] if n != first and (first, s1, n) not in held]
        if not missing:
            self.progress.skip(len(self.levels) * (len(self.about["names"]) - 1))
            return
        seed, device = self.about["seed"], self.subject.device
        once = self.clean.tensor().to(device)
        if s1 > 0:
            once = corrupt_set(self.clean, first, s1, seed, device)
        for second in missing:
            accuracies = []
            for s2 in self.levels:
                twice = once
                if s2 > 0:
                    seeds = image_seeds(seed, f"{first}+{second}", self.clean.index)
                    twice = corruptions.corrupt(once, second, s2, seeds=seeds)
                accuracies.append(100 * self._accuracy(twice))
                self.progress.advance(
                    1, f"{first} {s1:g} + {second} {s2:g}: {accuracies[-1]:.1f} %"
                )
            lines.write("row", first=first, severity=s1, second=second, accuracies=accuracies)
            held[first, s1, second] = accuracies

    @torch.no_grad()
    def _accuracy(self, pixels: torch.Tensor) -> float:
        right = 0
        for start in range(0, len(pixels), BATCH):
            part = slice(start, start + BATCH)
            logits = self.subject.model(self.subject.preprocess(pixels[part].float() / 255))
            right += int((logits.argmax(1).cpu() == self.labels[part]).sum())
        return right / len(pixels)

    def _surfaces(self, held: dict[tuple[str, float, str], Any]) -> dict[str, dict[str, Any]]:
        names = self.about["names"]
        found: dict[str, dict[str, Any]] = {}
        for first, second in itertools.permutations(names, 2):
            measured = np.array([held[first, s1, second] for s1 in self.levels])
            filled = fill_in(measured, self.levels)
            found.setdefault(first, {})[second] = filled.round(2).tolist()
        return found


def fill_in(measured: np.ndarray, levels: Sequence[float]) -> np.ndarray:
    """Interpolate a surface linearly to all levels of a walk.

    Args:
        measured: (n, n) at severities `levels`.
        levels: From 0 to 5.

    Returns:
        (21, 21).
    """
    points = np.stack(np.meshgrid(LEVELS, LEVELS, indexing="ij"), axis=-1)
    return RegularGridInterpolator((np.array(levels), np.array(levels)), measured)(points)
