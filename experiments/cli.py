"""The command line of ``python -m experiments``: arguments in, a run or a card out."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from experiments import report
from experiments.records.config import RunConfig, StreamConfig
from experiments.records.file import Busy, Conflict, read_header
from experiments.run import preview, ranks
from experiments.run.flags import add_settings, number_of_images, settings_flags
from experiments.run.run import Run, load_setup
from experiments.run.settings import make_run
from experiments.run.subject import pick_device
from experiments.studies import method_cost, overhead, surface, zoo
from experiments.studies.card import Card
from experiments.sweep import benchmark, sweep, tune
from experiments.sweep.workers import NoClusterError

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


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit status."""
    about = "Test-time adaptation experiments: streams, methods, tables."
    parser = argparse.ArgumentParser(prog="python -m experiments", description=about)
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    _add_run(commands)
    sweep.add_command(commands)
    tune.add_command(commands)
    report.add_command(commands)
    preview.add_command(commands)
    benchmark.add_command(commands)
    overhead.add_command(commands)
    surface.add_command(commands)
    _add_card(commands)
    method_cost.add_command(commands)
    zoo.add_command(commands)
    args = parser.parse_args(argv)
    try:
        if ranks.many():
            _check_ranks(args)
        work = args.prepare(args)
    except (ValueError, TypeError, OSError, RuntimeError) as error:
        # The user's mistake, found before anything ran; everything of ours says it in a sentence.
        print(f"error: {error}", file=sys.stderr)
        return 2
    try:
        left = work.execute()
    except (Busy, Conflict, FileExistsError, NoClusterError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("\ninterrupted; the same command goes on from here", file=sys.stderr)
        return 130
    finally:
        ranks.leave()
    # Runs of a sweep that were refused or ran out of time are said, but are no accident.
    failed = isinstance(left, list) and any(
        getattr(outcome, "status", None) == "failed" for outcome in left
    )
    return 1 if failed else 0


def _check_ranks(args: argparse.Namespace) -> None:
    """Refuse torchrun for all commands but the one that is made for it."""
    if args.command != "run":
        raise ValueError(
            f"`{args.command}` must be started as one process, got torchrun: several share the "
            "batches of a `run`; a sweep has --workers and --ray"
        )


def _add_run(commands: Any) -> None:
    parser = commands.add_parser(
        "run",
        help="run methods over streams; without flags, the demo",
        description="Run methods over a stream of shifted images and compare them. Without flags: "
        "the bundled classifier on 15 corruptions of 1,000 bundled CIFAR-10 test images, as one "
        "continual stream, and then on a short class-correlated stream.",
    )
    add = parser.add_argument
    add_settings(parser)
    add("--seed", type=int, help="of everything random (default: 0)")
    add("--name", help="ends the folder's name (default: demo)")
    add(
        "--output",
        type=Path,
        default=Path("runs"),
        help="where the run's folder is made (default: %(default)s)",
    )
    add("--quiet", action="store_true", help="print only the tables")
    add(
        "--resume",
        type=Path,
        metavar="FOLDER",
        help="go on with the run in FOLDER, with its configuration (without this, an unfinished "
        "run of the same configuration under OUTPUT is continued)",
    )
    add(
        "--readers",
        type=int,
        metavar="N",
        help="threads that decode image files ahead of the model (default: as many as torch has, "
        "at most 8, with a model on a GPU; none on a CPU)",
    )
    add("--fresh", action="store_true", help="begin a new run where one could be continued")
    parser.set_defaults(prepare=_prepare_run)


def _prepare_run(args: argparse.Namespace) -> Run:
    files = [path for path in (args.output, *args.output.parents) if path.is_file()]
    if files:
        raise ValueError(f"`output` must be a folder, got the file {files[0]}: choose another")
    if args.resume is not None:
        header = read_header(args.resume)
        if header is None:
            raise ValueError(f"`resume` must be the folder of a run, got {args.resume}")
        config = RunConfig.from_dict(header["config"])
        ranks.join(config.device)
        setup = load_setup(config, readers=args.readers)
        return Run(setup, args.resume.parent, folder=args.resume, show=_show(args))
    settings, flags = settings_flags(args)
    if "sweep" in settings:
        raise ValueError(f"`{args.config}` describes a sweep: python -m experiments sweep")
    config = make_run(settings, {**flags, "seed": args.seed})
    demo = not settings and not flags["options"] and config.data == "bundled"
    if demo and args.scenario is None and args.corruptions is None:
        config = replace(config, streams=(*config.streams, CORRELATED))
    ranks.join(config.device)
    setup = load_setup(config, readers=args.readers)
    return Run(setup, args.output, fresh=args.fresh, show=_show(args))


def _show(args: argparse.Namespace) -> str:
    """What this process prints; of several the first one speaks."""
    if not ranks.first():
        return "nothing"
    return "tables" if args.quiet else "all"


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
    images = number_of_images(args.images, None)
    device = pick_device(args.device)
    return Card(args.model, args.data, device, images, args.seed, args.output, args.quiet)
