"""``python -m experiments overhead``: what the runner costs on top of the model.

A run of the source model on the demo's stream, interleaved with the same forward passes in a bare
loop over images in memory: no stream, no metric, no file. Reported are medians and their ratio.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from experiments.config import RunConfig
from experiments.run import Run
from experiments.settings import make_run

__all__ = ["Overhead", "add_command"]


def add_command(commands: Any) -> None:
    """Add ``overhead`` to the command line."""
    parser = commands.add_parser(
        "overhead",
        help="measure what the runner adds to the model's own time",
        description="Time a source run against the bare forward passes of the same images, "
        "interleaved, and print the ratio.",
    )
    add = parser.add_argument
    add("--model", default="cifar10_resnet20_bn", help="default: %(default)s")
    add("--images", type=int, default=1000, help="of each of 15 domains (default: %(default)s)")
    add("--batch-size", type=int, default=64, help="default: %(default)s")
    add("--rounds", type=int, default=5, help="default: %(default)s")
    add("--device", help="cpu, cuda, cuda:1 (default: CUDA if there is one)")
    parser.set_defaults(prepare=_prepare)


def _prepare(args: argparse.Namespace) -> Overhead:
    flags = {
        "model": args.model,
        "methods": ["source"],
        "scenario": "continual",
        "images": args.images,
        "batch_size": args.batch_size,
        "device": args.device,
    }
    return Overhead(make_run({}, flags), args.rounds)


class Overhead:
    """The runner's own time.

    Args:
        config: Of a run of source on one stream.
        rounds: How often each side is timed.
    """

    def __init__(self, config: RunConfig, rounds: int) -> None:
        self.config = config
        self.rounds = rounds

    def execute(self) -> float:
        """Time both and print the ratio; returns it."""
        run = Run(self.config, silent=True)
        run.clean = None  # the bare loop has no clean images either
        (stream,) = run.streams
        batches = [batch.images for batch in stream]  # and so all corruptions are made

        @torch.no_grad()
        def bare() -> None:
            for images in batches:
                output = run.subject.model(run.subject.preprocess(images.to(run.device)))
                output.argmax(1).cpu()

        def runner() -> None:
            with tempfile.TemporaryDirectory() as folder:
                run.folder = Path(folder)
                run.execute()

        bare()
        runner()
        times: dict[Callable[[], None], list[float]] = {bare: [], runner: []}
        for _ in range(self.rounds):
            for side, found in times.items():
                start = time.perf_counter()
                side()
                found.append(time.perf_counter() - start)
        ratio = statistics.median(times[runner]) / statistics.median(times[bare])
        count = sum(len(images) for images in batches)
        print(
            f"{count} images, medians of {self.rounds}: {statistics.median(times[bare]):.2f} s "
            f"bare, {statistics.median(times[runner]):.2f} s in a run: {100 * (ratio - 1):+.1f} %"
        )
        return ratio
