"""Speed of `corruptions` against the published generator scripts, in one table.

``python -m experiments.studies.corruption_speed`` measures images per second at severity 3, on two
processor cores or on a GPU, and divides by the rate of the published per-image code in two
processes. That code is not run here: its rates were measured once, on another machine, and are
carried over by timing three of its functions again, written plainly below, and scaling by the
median ratio. Every round times these again, so that other work on the machine slows both sides of a
ratio.

Source of the functions: Hendrycks & Dietterich, ICLR 2019, arXiv 1903.12261.
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
from experiments.records.environment import describe_environment
from experiments.records.progress import Progress
from experiments.run.subject import pick_device

__all__ = ["PLAIN", "PUBLISHED", "main", "render"]

CORES = 2
SEVERITY = 3
BATCH = {32: 512, 224: 32}
BATCH_GPU = {32: 8192, 224: 160}
MARKS = ("<!-- speed -->", "<!-- /speed -->")
MARKS_GPU = ("<!-- gpu speed -->", "<!-- /gpu speed -->")
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


def _plain_gaussian_noise(image: Image) -> np.ndarray:
    scale = 0.08 if image.height == 32 else 0.18
    pixels = np.array(image) / 255.0
    return np.clip(pixels + np.random.normal(size=pixels.shape, scale=scale), 0, 1) * 255


def _plain_contrast(image: Image) -> np.ndarray:
    factor = 0.4 if image.height == 32 else 0.2
    pixels = np.array(image) / 255.0
    mean = np.mean(pixels, axis=(0, 1), keepdims=True)
    return np.clip((pixels - mean) * factor + mean, 0, 1) * 255


def _plain_zoom_blur(image: Image) -> np.ndarray:
    size = image.height
    factors = np.arange(1, 1.16, 0.01) if size == 32 else np.arange(1, 1.21, 0.02)
    pixels = (np.array(image) / 255.0).astype(np.float32)
    total = np.zeros_like(pixels)
    for factor in factors:
        crop = math.ceil(size / factor)
        top = (size - crop) // 2
        part = pixels[top : top + crop, top : top + crop]
        part = ndimage.zoom(part, (factor, factor, 1), order=1)
        rest = (len(part) - size) // 2
        total += part[rest : rest + size, rest : rest + size]
    return np.clip((pixels + total) / (len(factors) + 1), 0, 1) * 255


PLAIN: dict[str, Callable[[Image], np.ndarray]] = {
    "gaussian_noise": _plain_gaussian_noise,
    "contrast": _plain_contrast,
    "zoom_blur": _plain_zoom_blur,
}


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
    """A process of its own for the plain functions: asked for a rate, it answers with one."""
    images = {}
    while True:
        task = pipe.recv()
        if task is None:
            return
        name, side, seconds = task
        if side not in images:
            # Pillow's, as the published functions were given when they were timed.
            images[side] = fromarray(pictures(side, 1)[0].movedim(0, -1).contiguous().numpy())

        def once(name: str = name, side: int = side) -> int:
            PLAIN[name](images[side]).astype(np.uint8)
            return 1

        once()
        barrier.wait()
        pipe.send(_rate(once, seconds))


class _Baseline:
    """The plain functions in `CORES` processes that start each task together."""

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
        """Median over the three functions of rate here over published rate."""
        ratios = []
        for name in PLAIN:
            for pipe in self._pipes:
                pipe.send((name, side, seconds))
            rate = sum(pipe.recv() for pipe in self._pipes)
            ratios.append(rate / PUBLISHED[name][side == 224])
        return statistics.median(ratios)

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
    progress = Progress(rounds * len(sides) * (len(names) + len(PLAIN)), quiet, sys.stderr)
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
                progress.advance(len(PLAIN), "published functions")
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
    head = [f"published, {s}x{s} | ours | ratio" for s in sides]
    lines = ["| corruption | " + " | ".join(head) + " |", "|---|" + "---:|" * (3 * len(sides))]
    for name in names:
        parts = [f"| {name} |"]
        for side in sides:
            row = cells[name, side]
            rates = " | ".join(_three_digits(row[key]) for key in ("baseline", "rate", "ratio"))
            parts.append(f" {rates} |")
        lines.append("".join(parts))
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
    return "\n".join(lines) + "\n"


def _three_digits(value: float) -> str:
    return f"{float(f'{value:.3g}'):,.0f}" if value >= 100 else f"{value:.3g}"


def main(argv: Sequence[str] | None = None) -> int:
    """Measure and print the table; returns the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m experiments.studies.corruption_speed",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--corruptions", nargs="+", choices=PUBLISHED, default=list(PUBLISHED), metavar="NAME")
    add("--sides", nargs="+", type=int, choices=sorted(BATCH), default=sorted(BATCH))
    add("--rounds", type=int, default=5, help="medians are over these (default: %(default)s)")
    add("--seconds", type=float, default=0.3, help="of each timing (default: %(default)s)")
    add("--device", help="cpu, cuda, ... (default: cpu); published code runs on the CPU always")
    add("--page", type=Path, help="put the table on this page, between its `speed` marks")
    args = parser.parse_args(argv)
    if args.rounds < 1:
        parser.error(f"`rounds` must be at least 1, got {args.rounds}")
    device = pick_device(args.device or "cpu")
    marks = MARKS_GPU if device.type == "cuda" else MARKS
    if args.page is not None and not all(mark in args.page.read_text() for mark in marks):
        parser.error(f"`page` must have {' and '.join(marks)}, got {args.page} without")
    rows = measure(args.corruptions, args.sides, args.rounds, args.seconds, device)
    text = render(rows, device.type == "cuda")
    print(text)
    if args.page is not None:
        before, _, rest = args.page.read_text().partition(marks[0])
        after = rest.partition(marks[1])[2]
        hardware = describe_environment()["hardware"]
        where = f"{CORES} threads, {hardware['cpu']}"
        if device.type == "cuda":
            sizes = ", ".join(f"{BATCH_GPU[s]} images of {s}x{s}" for s in args.sides)
            where = f"{hardware['gpus'][device.index or 0]}, {sizes} at once"
        block = f"{marks[0]}\nMeasured on {date.today()}, {where}.\n\n{text}{marks[1]}"
        args.page.write_text(before + block + after)
    return 0


if __name__ == "__main__":
    sys.exit(main())
