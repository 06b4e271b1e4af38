"""``python -m experiments overhead``: what the runner costs on top of the model.

A run of the source model on the demo's stream, and within it the time that is spent inside of the
model. What is left is the runner's: stream, adapter, metrics, results, TensorBoard, snapshots. Both
are taken of the same run, since two runs on a shared machine differ by more. On a CPU it is the
processor's time, which waiting for other programs does not change, on a GPU the clock's.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from typing import Any

import torch

from experiments.records.config import BASELINE, RunConfig
from experiments.run.run import Run, load_setup
from experiments.run.settings import make_run
from tta.core.checks import LARGEST, whole_number

__all__ = ["Overhead", "add_flags"]


def add_flags(parser: argparse.ArgumentParser) -> None:
    """Say what ``overhead`` does and takes."""
    parser.description = "Run the source model, and print how much time is spent outside of it."
    add = parser.add_argument
    add("--model", default="cifar10_resnet20_bn", help="default: %(default)s")
    add(
        "--images",
        type=int,
        default=1000,
        metavar="N",
        help="of each of 15 domains (default: %(default)s)",
    )
    add("--batch-size", type=int, default=64, help="default: %(default)s")
    add("--rounds", type=int, default=5, help="default: %(default)s")
    add("--device", help="cpu, cuda, cuda:1 (default: CUDA if there is one)")
    parser.set_defaults(prepare=_prepare)


def _prepare(args: argparse.Namespace) -> Overhead:
    flags = {
        "model": args.model,
        "methods": [BASELINE],
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

    Raises:
        ValueError: For a model, images or rounds that cannot be.
    """

    def __init__(self, config: RunConfig, rounds: int) -> None:
        self.setup = load_setup(config)
        self.config = config
        self.rounds = whole_number("rounds", rounds, 1, LARGEST)

    def execute(self) -> float:
        """Time runs and print the runner's share; returns it, as a part of the model's time."""
        setup = self.setup
        setup.clean = None  # more forward passes of the same kind
        (stream,), device = setup.streams, setup.subject.device
        count = sum(len(batch) for batch in stream)  # and so all corruptions are made
        gpu = device.type == "cuda"

        def now() -> float:
            if gpu:
                torch.cuda.synchronize(device)
                return time.perf_counter()
            return time.process_time()

        inside = 0.0

        def enter(*_: Any) -> None:
            nonlocal inside
            inside -= now()

        def leave(*_: Any) -> None:
            nonlocal inside
            inside += now()

        setup.subject.model.register_forward_pre_hook(enter)
        setup.subject.model.register_forward_hook(leave)
        shares = []
        for number in range(1 + self.rounds):
            with tempfile.TemporaryDirectory() as folder:
                run = Run(setup, folder=folder, show="nothing")
                inside, start = 0.0, now()
                run.execute()
                whole = now() - start
            if number:  # the first warms up
                shares.append((whole - inside) / inside)
        share = statistics.median(shares)
        spread = ", ".join(f"{100 * value:.1f}" for value in sorted(shares))
        print(
            f"{count} images in batches of {self.config.batch_size}: the runner takes "
            f"{100 * share:.1f} % of the model's time (median of {spread})"
        )
        return share
