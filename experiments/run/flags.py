"""Flags that several commands share, and what they mean."""

from __future__ import annotations

import argparse
import ast
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, get_args

from corruptions.pictures import OnError
from experiments.records.config import DEMO_METHODS
from experiments.run.settings import MATCHES, read_settings
from tta.core.checks import parsed_json, shown, told

__all__ = [
    "add_imports",
    "add_settings",
    "amount",
    "number_of_images",
    "parse_value",
    "settings_flags",
]

MOST = 1_000_000  # minutes or seconds


# Arguments of `tta.streams.build` for which a run has flags of its own.
OWN_FLAGS = {
    "scenario": "--scenario",
    "dataset": "--data",
    "domains": "--corruptions",
    "severity": "--severity",
    "batch_size": "--batch-size",
    "seed": "--seed",
    "transform": "--corruptions",
    "labels": "--labels",
}


def add_settings(parser: argparse.ArgumentParser, methods: bool = True) -> None:
    """Add the flags that `experiments.run.settings` knows, those of runs and sweeps alike.

    Args:
        parser: The parser of a command.
        methods: Whether the user chooses methods.
    """
    add = parser.add_argument
    add(
        "--config",
        type=Path,
        metavar="TOML",
        help="a file of settings, see experiments.run.settings",
    )
    add(
        "--model",
        help="bundled name, timm:NAME or torchvision:NAME (default: cifar10_resnet20_bn)",
    )
    if methods:
        add(
            "--methods",
            nargs="+",
            metavar="METHOD",
            help="components of tta, joined by + to compose, such as unmix_tns+eata+lame, with "
            "fields in brackets, such as tent[lr=1e-3] (default: " + " ".join(DEMO_METHODS) + ")",
        )
        add(
            "--tuned",
            nargs="+",
            type=Path,
            default=[],
            metavar="FILE",
            help="take fields that tune has chosen; a method of that name is replaced, or added",
        )
    add("--data", help="a path, see experiments.data (default: bundled)")
    add("--clean", help="path of the clean images where those of DATA are shifted")
    add(
        "--classes",
        metavar="FILE",
        help="names of class folders in label order, a line each, where they do not say it",
    )
    add(
        "--labels",
        metavar="FILE",
        help="the label of each picture, a line each, with or without its name, where DATA is a "
        "folder of pictures without class folders",
    )
    add(
        "--on-error",
        choices=get_args(OnError),
        help="what to do about pictures that cannot be read: stop, or leave them out and count "
        "them, for which each is decoded once before the run (default: raise)",
    )
    add(
        "--match",
        choices=MATCHES,
        help="how the tensors of a checkpoint (MODEL@PATH) are paired with the model's: by name, "
        "or by their place, for ports of other frameworks (default: name)",
    )
    if methods:
        add(
            "--health",
            action="store_true",
            default=None,
            help="record figures that need no labels, an estimate of accuracy among them, also of "
            "methods without a guard; about 5 %% more forward passes",
        )
    add("--source", help="file of source artefacts (default: those that come with the model)")
    add(
        "--corruptions",
        nargs="+",
        metavar="NAME",
        help="domains in stream order, 'clean' for images as they are (default: those of "
        "the scenario, mostly the 15 in canonical order, or all of DATA's own where it lacks one)",
    )
    add(
        "--severity",
        type=int,
        choices=range(1, 6),
        help="1 to 5 (default: 5, or the highest that DATA has)",
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
    add("--batch-size", type=int, help="images per batch (default: 64)")
    add("--device", help="cpu, cuda, cuda:1 (default: CUDA if there is one)")


def add_imports(parser: argparse.ArgumentParser) -> None:
    """Add the flag of all commands that names modules with components of a user's own."""
    parser.add_argument(
        "--import",
        dest="imports",
        action="append",
        metavar="MODULE",
        help="a module that registers components of your own; may be repeated",
    )


def settings_flags(args: argparse.Namespace) -> tuple[dict[str, Any], dict[str, Any]]:
    """The settings of the file and those of the flags, as `make_run` takes them."""
    settings = {} if args.config is None else read_settings(args.config)
    names = ["model", "methods", "data", "clean", "classes", "source", "batch_size", "device"]
    names += ["severity", "scenario", "name", "imports", "labels", "on_error", "match", "health"]
    flags = {name: getattr(args, name, None) for name in names}
    flags["domains"] = args.corruptions
    flags["images"] = "all" if args.images == "all" else number_of_images(args.images, None)
    flags["options"] = parse_options(args.option)
    tuned = [*map(Path, settings.get("tuned", [])), *getattr(args, "tuned", [])]
    flags["tuned"] = [read_tuned(path) for path in tuned]
    return settings, flags


def read_tuned(path: Path) -> dict[str, Any]:
    """Read a file that `experiments.sweep.tune` wrote."""
    if not path.is_file():
        raise FileNotFoundError(f"`tuned` must be a tuned.json, but {path} is not there: run tune")
    try:
        found = parsed_json(path.read_bytes())
    except ValueError as error:
        raise ValueError(
            f"`tuned` must be a tuned.json, but {path} is no JSON: {told(error)}"
        ) from error
    names = ("method", "chosen")
    if not isinstance(found, dict) or not all(isinstance(found.get(n), str) for n in names):
        raise ValueError(f"`tuned` must be a tuned.json, got {path}, which holds no choice")
    return found


def amount(text: str) -> float:
    """Read a number of minutes or seconds, from 0 up, for ``type=`` of a flag."""
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 <= value <= MOST:  # False for NaN, after which no time is ever up
        raise argparse.ArgumentTypeError(f"must be a number from 0 to {MOST:,}, got {shown(text)}")
    return value


def number_of_images(text: str | None, default: int | None) -> int | None:
    """Read a number of images; None for "all", and `default` for None."""
    if text is None:
        return default
    if text == "all":
        return None
    if not text.isdecimal() or int(text) < 1:
        raise ValueError(f"`images` must be a number of 1 up or 'all', got {shown(text)}")
    return int(text)


def parse_options(pairs: Sequence[str]) -> dict[str, Any]:
    """Read ``KEY=VALUE`` pairs, whose values are Python literals or texts."""
    options = {}
    for pair in pairs:
        key, equals, text = pair.partition("=")
        if not key or not equals:
            raise ValueError(f"`option` must be KEY=VALUE, got {shown(pair)}: such as delta=0.1")
        if key in OWN_FLAGS:
            raise ValueError(
                f"`option` must be none of the run's own arguments, got {shown(pair)}: use "
                f"{OWN_FLAGS[key]}"
            )
        options[key] = parse_value(text)
    return options


def parse_value(text: str) -> Any:
    """A Python literal, or else the text itself."""
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return text
