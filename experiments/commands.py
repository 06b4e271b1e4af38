"""The command line of ``python -m experiments``: arguments in, a run or a card out."""

from __future__ import annotations

import argparse
import ast
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import tta.streams
from experiments.bench import SETTINGS, Bench
from experiments.card import Card
from experiments.config import DEMO_METHODS, RunConfig, StreamConfig
from experiments.run import Run
from experiments.subject import pick_device
from experiments.zoo import Zoo
from tta.checks import nearest

__all__ = ["main"]

# The second stream of the demo: short, and so correlated that batch statistics mislead. Batches
# of 16 because 200 images have only 20 of each class: a batch of 64 would mix several of them.
CORRELATED = StreamConfig(
    name="correlated",
    scenario="dirichlet",
    domains=("gaussian_noise", "fog", "jpeg_compression"),
    images=200,
    batch_size=16,
    options={"delta": 0.01},
)

# Arguments of `tta.streams.build` that the run sets, with the flag that decides each.
OWN_FLAGS = {
    "scenario": "--scenario",
    "dataset": "--data",
    "domains": "--corruptions",
    "severity": "--severity",
    "batch_size": "--batch-size",
    "seed": "--seed",
    "transform": "--corruptions",
    "labels": "--data",
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit status."""
    about = "Test-time adaptation experiments: streams, methods, tables."
    parser = argparse.ArgumentParser(prog="python -m experiments", description=about)
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    _add_run(commands)
    _add_card(commands)
    _add_bench(commands)
    _add_zoo(commands)
    args = parser.parse_args(argv)
    try:
        work = args.prepare(args)
    except (ValueError, TypeError, OSError, RuntimeError) as error:
        # The user's mistake, found before anything ran; everything of ours says it in a sentence.
        print(f"error: {error}", file=sys.stderr)
        return 2
    try:
        work.execute()
    except KeyboardInterrupt:
        print("\ninterrupted; what was measured so far is in the results file", file=sys.stderr)
        return 130
    return 0


def _add_run(commands: Any) -> None:
    parser = commands.add_parser(
        "run",
        help="run methods over streams; without flags, the demo",
        description="Run methods over a stream of shifted images and compare them. Without flags: "
        "the bundled classifier on 15 corruptions of 1,000 bundled CIFAR-10 test images, as one "
        "continual stream, and then on a short class-correlated stream.",
    )
    add = parser.add_argument
    add(
        "--model",
        default="cifar10_resnet20_bn",
        help="bundled name, timm:NAME or torchvision:NAME (default: %(default)s)",
    )
    add(
        "--methods",
        nargs="+",
        default=list(DEMO_METHODS),
        metavar="METHOD",
        help="components of tta, joined by + to compose, such as unmix_tns+eata+lame (default: "
        + " ".join(DEMO_METHODS)
        + ")",
    )
    add("--data", default="bundled", help="a path, see experiments.data (default: %(default)s)")
    add("--clean", help="path of the clean images where DATA holds only shifted ones")
    add("--source", help="file of source artefacts (default: those that come with the model)")
    add(
        "--corruptions",
        nargs="+",
        metavar="NAME",
        help="domains in stream order (default: the 15 in canonical order, or all of DATA's own)",
    )
    add(
        "--severity", type=int, default=5, choices=range(1, 6), help="1 to 5 (default: %(default)s)"
    )
    add(
        "--scenario",
        help="a scenario of tta.streams (default: continual, then a short correlated stream)",
    )
    add(
        "--option",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help="an option of the scenario, such as delta=0.1; may be repeated",
    )
    add(
        "--images",
        metavar="N",
        help="images of each domain, as many of each class, or 'all' (default: 1000 of the bundled "
        "2000; all of other data)",
    )
    add("--batch-size", type=int, default=64, help="images per batch (default: %(default)s)")
    add("--seed", type=int, default=0, help="of everything random (default: %(default)s)")
    add("--name", default="demo", help="ends the folder's name (default: %(default)s)")
    add(
        "--output",
        type=Path,
        default=Path("runs"),
        help="where the run's folder is made (default: %(default)s)",
    )
    add("--device", help="cpu, cuda, cuda:1 (default: CUDA if there is one)")
    add("--quiet", action="store_true", help="print only the tables")
    parser.set_defaults(prepare=_prepare_run)


def _prepare_run(args: argparse.Namespace) -> Run:
    if args.batch_size < 1:
        raise ValueError(f"`batch-size` must be at least 1, got {args.batch_size}")
    if args.seed < 0:
        raise ValueError(f"`seed` must be 0 or more, got {args.seed}")
    if not args.name or set(args.name) & set("/\\"):
        raise ValueError(f"`name` must be usable in a folder's name, got {args.name!r}")
    files = [path for path in (args.output, *args.output.parents) if path.is_file()]
    if files:
        raise ValueError(f"`output` must be a folder, got the file {files[0]}: choose another")
    scenario = args.scenario or "continual"
    if scenario not in tta.streams.list_scenarios():
        raise ValueError(
            f"`scenario` must be one of tta.streams, got {scenario!r}: "
            + nearest(scenario, tta.streams.list_scenarios())
        )
    options = _options(args.option)
    main_stream = StreamConfig(
        name=scenario,
        scenario=scenario,
        domains=tuple(args.corruptions or ()),
        severity=args.severity,
        images=_number_of_images(args.images, 1000 if args.data == "bundled" else None),
        options=options,
    )
    demo = args.scenario is None and args.data == "bundled" and not options
    streams = (main_stream, CORRELATED) if demo and not args.corruptions else (main_stream,)
    config = RunConfig(
        name=args.name,
        model=args.model,
        data=args.data,
        clean=args.clean,
        source=args.source,
        methods=tuple(args.methods),
        streams=streams,
        batch_size=args.batch_size,
        seed=args.seed,
        device=str(pick_device(args.device)),
    )
    return Run(config, args.output, args.quiet)


def _add_card(commands: Any) -> None:
    parser = commands.add_parser(
        "card",
        help="measure a bundled model and write its card",
        description="Measure a bundled model without adaptation: clean accuracy and error under "
        "the 15 corruptions at severity 5. Writes card.json and card.md beside its weights.",
    )
    add = parser.add_argument
    add("model", metavar="NAME", help="a bundled model")
    add("--data", required=True, help="the CIFAR-10 test set: an .npz or torchvision's folder")
    add("--images", metavar="N", help="images per corruption, or 'all' (default: all)")
    add("--seed", type=int, default=0, help="of the corruptions (default: %(default)s)")
    add("--output", type=Path, help="folder of the card (default: beside the weights)")
    add("--device", help="cpu, cuda, cuda:1 (default: CUDA if there is one)")
    add("--quiet", action="store_true", help="print only the card")
    parser.set_defaults(prepare=_prepare_card)


def _prepare_card(args: argparse.Namespace) -> Card:
    images = _number_of_images(args.images, None)
    device = pick_device(args.device)
    return Card(args.model, args.data, device, images, args.seed, args.output, args.quiet)


def _add_bench(commands: Any) -> None:
    parser = commands.add_parser(
        "bench",
        help="what each recipe costs beside the plain forward pass",
        description="Time recipes against the plain forward pass of the same network, in turns in "
        "one process; count passes; measure the peak of memory. "
        "Settings: " + ", ".join(SETTINGS) + ".",
    )
    add = parser.add_argument
    add("setting", help="a network and what it is fed")
    add("--recipes", nargs="+", default=[], metavar="NAME", help="default: all of the setting's")
    add("--rounds", type=int, default=50, help="turns of each recipe (default: %(default)s)")
    add("--no-memory", action="store_true", help="leave the peak of memory out")
    add("--output", type=Path, help="JSON-lines file to append the result to")
    add("--device", help="cpu, cuda, cuda:1 (default: CUDA if there is one)")
    add("--quiet", action="store_true", help="print only the table")
    parser.set_defaults(prepare=_prepare_bench)


def _prepare_bench(args: argparse.Namespace) -> Bench:
    device = pick_device(args.device)
    recipes, memory = tuple(args.recipes), not args.no_memory
    return Bench(args.setting, device, args.rounds, recipes, memory, args.output, args.quiet)


def _add_zoo(commands: Any) -> None:
    parser = commands.add_parser(
        "zoo",
        help="every recipe on one network of every kind of timm and torchvision",
        description="Wrap a random network of every module of timm, every kind of norm layer and "
        "every classifier of torchvision with every recipe; resumes where its file ends.",
    )
    add = parser.add_argument
    add(
        "--output",
        type=Path,
        default=Path("experiments/results/zoo.jsonl"),
        help="results, a line for each network (default: %(default)s)",
    )
    add("--match", default="*", help="networks by name, such as 'timm:res*' (default: all)")
    add("--recipes", nargs="+", default=[], metavar="NAME", help="default: all components")
    add("--page", type=Path, help="also write the results as a Markdown page")
    add("--quiet", action="store_true", help="print only the totals")
    parser.set_defaults(prepare=_prepare_zoo)


def _prepare_zoo(args: argparse.Namespace) -> Zoo:
    return Zoo(args.output, args.match, args.recipes, args.page, args.quiet)


def _number_of_images(text: str | None, default: int | None) -> int | None:
    if text is None:
        return default
    if text == "all":
        return None
    if not text.isdecimal() or int(text) < 1:
        raise ValueError(f"`images` must be a number of 1 up or 'all', got {text!r}")
    return int(text)


def _options(pairs: Sequence[str]) -> dict[str, Any]:
    options = {}
    for pair in pairs:
        key, equals, text = pair.partition("=")
        if not key or not equals:
            raise ValueError(f"`option` must be KEY=VALUE, got {pair!r}: such as delta=0.1")
        if key in OWN_FLAGS:
            raise ValueError(
                f"`option` must be none of the run's own arguments, got {pair!r}: use "
                f"{OWN_FLAGS[key]}"
            )
        try:
            options[key] = ast.literal_eval(text)
        except (ValueError, SyntaxError):
            options[key] = text  # a bare word
    return options
