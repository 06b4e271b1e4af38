"""``python -m experiments run``: the flags of one run, and the run that they describe."""

from __future__ import annotations

import argparse
from dataclasses import replace
from pathlib import Path

from experiments.records.config import RunConfig, StreamConfig
from experiments.records.file import RESULTS, read_header
from experiments.run import ranks
from experiments.run.flags import add_settings, settings_flags
from experiments.run.run import Run, load_setup
from experiments.run.settings import make_run

__all__ = ["add_flags"]

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


def add_flags(parser: argparse.ArgumentParser) -> None:
    """Say what ``run`` does and takes."""
    parser.description = (
        "Run methods over a stream of shifted images and compare them. Without flags: "
        "the bundled classifier on 15 corruptions of 1,000 bundled CIFAR-10 test images, as one "
        "continual stream, and then on a short class-correlated stream."
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
    parser.set_defaults(prepare=_prepare)


def _prepare(args: argparse.Namespace) -> Run:
    files = [path for path in (args.output, *args.output.parents) if path.is_file()]
    if files:
        raise ValueError(f"`output` must be a folder, got the file {files[0]}: choose another")
    if args.resume is not None:
        header = read_header(args.resume)
        if header is None:
            raise ValueError(
                f"`resume` must be the folder of a run, with the {RESULTS} that it began, got "
                f"{args.resume}: pass a folder that a run said it wrote to, or leave --resume out "
                "to go on with an unfinished run of the same configuration"
            )
        config = RunConfig.from_dict(header.get("config", {}))
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
