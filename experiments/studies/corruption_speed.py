"""Speed of `corruptions` against the published generator scripts, in one table.

``python -m experiments corruption-speed`` measures images per second at severity 3, on two
processor cores or on a GPU, and divides by the rate of the published per-image code in two
processes. That code is not run here and no part of it is here: its rates were measured once, on
another machine. They are carried over to this machine by a unit of per-image work of numpy and
scipy (`edge_map`), whose rate on that other machine is known: every published rate is multiplied by
the unit's rate here over its rate there. Every round times the unit again, so that other work on
the machine slows both sides of a ratio.

Source of the published rates: the scripts of Hendrycks & Dietterich, ICLR 2019, arXiv 1903.12261.
"""

from __future__ import annotations

import argparse
import math
import multiprocessing
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from datetime import date
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL.Image import Image, fromarray
from scipy import ndimage
from torch import Tensor

import corruptions
from experiments.data import read_bundled
from experiments.records import markdown
from experiments.records.environment import describe_environment
from experiments.records.progress import Progress
from experiments.run.flags import amount
from experiments.run.subject import pick_device

__all__ = ["PUBLISHED", "CorruptionSpeed", "add_flags", "edge_map", "render"]

CORES = 2
SEVERITY = 3
BATCH = {32: 512, 224: 32}
BATCH_GPU = {32: 8192, 224: 160}
# Images per second of the published scripts in two processes at severity 3, at 32 and at 224.
PUBLISHED = {
    "gaussian_noise": (15746, 485),
    "shot_noise": (5828, 149),
    "impulse_noise": (12396, 633),
    "defocus_blur": (7180, 618),
    "glass_blur": (172, 1.20),
    "motion_blur": (1045, 23.6),
    "zoom_blur": (429, 18.2),
    "snow": (763, 36),
    "frost": (223, 202),
    "fog": (3178, 535),
    "brightness": (2886, 75),
    "contrast": (21196, 842),
    "elastic_transform": (2121, 91),
    "pixelate": (38949, 2761),
    "jpeg_compression": (13981, 3004),
    "speckle_noise": (15570, 406),
    "gaussian_blur": (12327, 343),
    "spatter": (5654, 275),
    "saturate": (3411, 78),
}


# Images per second of `edge_map` in two processes on the machine of these rates, at 32 and at 224.
# It was found on another machine from the ratios of three corruptions' rates on both.
UNIT = (9510.0, 273.0)


def edge_map(image: Image) -> np.ndarray:
    """A unit of work like that of a corruption, and none: where an image has edges, equalised.

    Like the published functions it takes a Pillow image, works on one image at a time in float64
    with numpy and scipy (arithmetic, filters, a sort), and gives grey levels.

    Returns:
        (H, W, 3) float64 in [0, 255].
    """
    grey = np.asarray(image).mean(axis=2) / 255
    slope = np.hypot(ndimage.sobel(grey, 0), ndimage.sobel(grey, 1))
    order = np.argsort(slope, axis=None)
    ranks = np.empty(slope.size)
    ranks[order] = np.linspace(0, 255, slope.size)
    return np.repeat(ranks.reshape(*slope.shape, 1), 3, axis=2)


def pictures(side: int, count: int) -> Tensor:
    """A batch from the bundled CIFAR-10 images; those of 224 pixels are mosaics of 49, so busy.

    Returns:
        (count, 3, side, side) uint8.
    """
    tiles = read_bundled().tensor()
    across = side // 32
    need = count * across**2
    tiles = tiles.repeat(-(-need // len(tiles)), 1, 1, 1)[:need]
    grid = tiles.view(count, across, across, 3, 32, 32).permute(0, 3, 1, 4, 2, 5)
    return grid.reshape(count, 3, side, side).contiguous()


def _rate(work: Callable[[], int], seconds: float) -> float:
    """Images per second of a function that returns how many it made."""
    made, start = 0, time.perf_counter()
    while True:
        made += work()
        passed = time.perf_counter() - start
        if passed >= seconds:
            return made / passed


def _serve(pipe: Connection, barrier: Any) -> None:
    """A process of its own for the unit of work: asked for a rate, it answers with one."""
    images = {}
    while True:
        task = pipe.recv()
        if task is None:
            return
        side, seconds = task
        if side not in images:
            images[side] = fromarray(pictures(side, 1)[0].movedim(0, -1).contiguous().numpy())

        def once(side: int = side) -> int:
            edge_map(images[side]).astype(np.uint8)
            return 1

        once()
        barrier.wait()
        pipe.send(_rate(once, seconds))


class _Baseline:
    """The unit of work in `CORES` processes that start each task together."""

    def __init__(self) -> None:
        context = multiprocessing.get_context("spawn")
        self._barrier = context.Barrier(CORES)  # kept: it goes with the last reference here
        self._pipes, self._processes = [], []
        for _ in range(CORES):
            here, there = context.Pipe()
            process = context.Process(target=_serve, args=(there, self._barrier), daemon=True)
            process.start()
            self._pipes.append(here)
            self._processes.append(process)

    def scale(self, side: int, seconds: float) -> float:
        """How many times as fast this machine is as that of the published rates."""
        for pipe in self._pipes:
            pipe.send((side, seconds))
        return sum(pipe.recv() for pipe in self._pipes) / UNIT[side == 224]

    def close(self) -> None:
        for pipe in self._pipes:
            pipe.send(None)
        for process in self._processes:
            process.join()


def _our_rate(images: Tensor, name: str, seconds: float) -> float:
    seeds = torch.arange(len(images))

    def once() -> int:
        corruptions.corrupt(images, name, SEVERITY, seeds=seeds)
        if images.is_cuda:
            torch.cuda.synchronize()
        return len(images)

    once()
    return _rate(once, seconds)


def measure(
    names: Sequence[str],
    sides: Sequence[int],
    rounds: int,
    seconds: float,
    device: torch.device,
    quiet: bool = False,
) -> list[dict[str, Any]]:
    """Time everything in turn, `rounds` times over.

    Returns:
        For each corruption and side `name`, `side`, and medians over the rounds of `baseline`
        (published rate carried over), `rate` (ours) and `ratio`.
    """
    progress = Progress(rounds * len(sides) * (len(names) + 1), quiet, sys.stderr)
    batch = BATCH_GPU if device.type == "cuda" else BATCH
    batches = {side: pictures(side, batch[side]).to(device) for side in sides}
    found: dict[tuple[str, int], list[tuple[float, float]]] = {}
    threads = torch.get_num_threads()
    torch.set_num_threads(CORES)
    baseline = _Baseline()
    try:
        for _ in range(rounds):
            for side in sides:
                scale = baseline.scale(side, seconds)
                progress.advance(1, "unit of work")
                for name in names:
                    rate = _our_rate(batches[side], name, seconds)
                    pair = PUBLISHED[name][side == 224] * scale, rate
                    found.setdefault((name, side), []).append(pair)
                    progress.advance(1, f"{name} {side}")
    finally:
        torch.set_num_threads(threads)
        baseline.close()
    progress.clear()
    return [
        {
            "name": name,
            "side": side,
            "baseline": statistics.median(base for base, _ in pairs),
            "rate": statistics.median(rate for _, rate in pairs),
            "ratio": statistics.median(rate / base for base, rate in pairs),
        }
        for (name, side), pairs in found.items()
    ]


# Geometric mean over the fifteen, and the least for each corruption.
TARGETS = {32: 10.0, 224: 5.0}
LEAST = {"jpeg_compression": 0.7, "pixelate": 0.7}
TARGET_GPU = 100.0  # median over the fifteen, at either size


def render(rows: Sequence[dict[str, Any]], gpu: bool = False) -> str:
    """The table as Markdown, and what fell short of the targets in words."""
    sides = sorted({row["side"] for row in rows})
    cells = {(row["name"], row["side"]): row for row in rows}
    names = list(dict.fromkeys(row["name"] for row in rows))
    head = [text for s in sides for text in (f"published, {s}x{s}", "ours", "ratio")]
    shown = [
        [name]
        + [
            _three_digits(cells[name, side][key])
            for side in sides
            for key in ("baseline", "rate", "ratio")
        ]
        for name in names
    ]
    lines = markdown.table(["corruption", *head], shown)
    short = []
    benchmark = [name for name in names if name in corruptions.list_corruptions()]
    for side in sides:
        ratios = [cells[name, side]["ratio"] for name in benchmark]
        if gpu:
            middle = statistics.median(ratios) if ratios else math.nan
            lines.append(f"\nMedian over {len(benchmark)} at {side}x{side}: {middle:.0f}.")
            if middle < TARGET_GPU:
                short.append(f"the median at {side} ({middle:.0f}, wanted {TARGET_GPU:.0f})")
            continue
        mean = statistics.geometric_mean(ratios) if ratios else math.nan
        lines.append(f"\nGeometric mean over {len(benchmark)} at {side}x{side}: {mean:.1f}.")
        if mean < TARGETS[side]:
            short.append(f"the mean at {side} ({mean:.1f}, wanted {TARGETS[side]:.0f})")
        for name in names:
            ratio, least = cells[name, side]["ratio"], LEAST.get(name, 1.0)
            if ratio < least:
                short.append(f"{name} at {side} ({ratio:.2f}, wanted {least:g})")
    lines.append("\nFell short: " + ("; ".join(short) if short else "nothing") + ".")
    return markdown.document(lines)


def _three_digits(value: float) -> str:
    return f"{float(f'{value:.3g}'):,.0f}" if value >= 100 else f"{value:.3g}"


def add_flags(parser: argparse.ArgumentParser) -> None:
    """Say what ``corruption-speed`` does and takes."""
    parser.description = __doc__
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    add = parser.add_argument
    add("--corruptions", nargs="+", choices=PUBLISHED, default=list(PUBLISHED), metavar="NAME")
    add("--sides", nargs="+", type=int, choices=sorted(BATCH), default=sorted(BATCH))
    add("--rounds", type=int, default=5, help="medians are over these (default: %(default)s)")
    add("--seconds", type=amount, default=0.3, help="of each timing (default: %(default)s)")
    add("--device", help="cpu, cuda, ... (default: cpu); the unit of work is the CPU's always")
    add("--page", type=Path, help="put the table on this page, between its `speed` marks")
    parser.set_defaults(prepare=_prepare)


def _prepare(args: argparse.Namespace) -> CorruptionSpeed:
    if args.rounds < 1:
        raise ValueError(f"`rounds` must be at least 1, got {args.rounds}: pass 5 or more")
    device = pick_device(args.device or "cpu")
    if args.page is not None:
        markdown.check_marks(args.page, _mark(device))
    return CorruptionSpeed(
        args.corruptions, args.sides, args.rounds, args.seconds, device, args.page
    )


def _mark(device: torch.device) -> str:
    """The name of the page's generated part."""
    return "gpu speed" if device.type == "cuda" else "speed"


class CorruptionSpeed:
    """The measurement.

    Args:
        names: Corruptions.
        sides: Of the images, in pixels.
        rounds: How often everything is timed.
        seconds: Of each timing.
        device: Where our corruptions run.
        page: A Markdown page that gets the table, or None.
    """

    def __init__(
        self,
        names: Sequence[str],
        sides: Sequence[int],
        rounds: int,
        seconds: float,
        device: torch.device,
        page: Path | None,
    ) -> None:
        self.names, self.sides, self.rounds, self.seconds = names, sides, rounds, seconds
        self.device, self.page = device, page

    def execute(self) -> list[dict[str, Any]]:
        """Measure, print the table and put it on the page; returns the rows of `measure`."""
        rows = measure(self.names, self.sides, self.rounds, self.seconds, self.device)
        gpu = self.device.type == "cuda"
        text = render(rows, gpu)
        print(text)
        if self.page is not None:
            hardware = describe_environment()["hardware"]
            where = f"{CORES} threads, {hardware['cpu']}"
            if gpu:
                sizes = ", ".join(f"{BATCH_GPU[s]} images of {s}x{s}" for s in self.sides)
                where = f"{hardware['gpus'][self.device.index or 0]}, {sizes} at once"
            about = f"Measured on {date.today()}, {where}.\n\n"
            markdown.write_between(self.page, _mark(self.device), about + text)
        return rows
