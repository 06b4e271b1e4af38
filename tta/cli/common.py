"""Flags that commands share, and what they make: a model, and an adapter of it.

``--import`` is a flag of every command, and is dealt with before it runs.
"""

from __future__ import annotations

import argparse
import math
import re
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tta.core.files import writing

if TYPE_CHECKING:
    from tta.core.adapter import Adapter
    from tta.runtime.model_strings import OpenedModel

__all__ = [
    "adapter_from",
    "add_folder",
    "add_method",
    "add_model",
    "add_saved",
    "check_writable",
    "open_from",
    "source_from",
    "whole",
    "wrap_arguments",
    "wrap_from",
]

METHOD = "auto"
BATCH_SIZE = 8


def add_model(parser: argparse.ArgumentParser, batch_size: int = BATCH_SIZE) -> None:
    """Add MODEL and the flags that say how it is opened; see :func:`open_from`.

    Args:
        parser: Of the command.
        batch_size: Unless the user says another.
    """
    parser.add_argument(
        "model",
        metavar="MODEL",
        help="timm:NAME, torchvision:NAME, either with @FILE for weights of your own, "
        "MODULE:CALLABLE for a function that returns a model or (model, transform, class names), "
        "or the name of a bundled model",
    )
    parser.add_argument(
        "--weights",
        metavar="FILE",
        help="a .safetensors or .pt file, as behind @; 'random' for those that the model is made "
        "with",
    )
    parser.add_argument(
        "--classes", metavar="FILE", help="names of the classes, a line each, in label order"
    )
    parser.add_argument("--device", help="cpu, cuda, cuda:1 (default: CUDA if there is one)")
    parser.add_argument(
        "--batch-size",
        type=whole(1),
        default=batch_size,
        metavar="N",
        help=f"images of a batch, at most (default: {batch_size})",
    )
    parser.add_argument(
        "--seed", type=whole(0), default=0, metavar="N", help="of all random numbers (default: 0)"
    )


def add_method(parser: argparse.ArgumentParser, default: str = METHOD) -> None:
    """Add the flags that say how a model adapts; see :func:`wrap_from`.

    Args:
        parser: Of the command.
        default: The method unless the user says another.
    """
    parser.add_argument(
        "--method",
        default=default,
        help="components joined by +, such as unmix_tns+eata+lame, with fields in brackets, such "
        f"as tent[lr=1e-3] (default: {default})",
    )
    parser.add_argument(
        "--source",
        metavar="FILE",
        help="source artefacts, as tta collect makes them (default: those that come with the "
        "model)",
    )


def add_folder(parser: argparse.ArgumentParser, default: str) -> None:
    """Add the flag of commands that keep what was learned.

    Args:
        parser: Of the command.
        default: What is done without it, in words.
    """
    parser.add_argument(
        "--folder",
        metavar="FOLDER",
        help="where the states of streams are kept, to go on from after a restart (default: "
        f"{default})",
    )


def whole(low: int, high: int = 2**31 - 1) -> Any:
    """Make what reads a whole number from ``low`` to ``high``, for ``type=`` of a flag."""

    def read(text: str) -> int:
        value = int(text) if re.fullmatch(r"\s*[+-]?\d{1,19}\s*", text) else math.nan
        if not low <= value <= high:
            raise argparse.ArgumentTypeError(f"must be a whole number from {low} to {high}")
        return int(value)

    return read


def add_saved(parser: argparse.ArgumentParser, what: str) -> None:
    """Add the flag of commands that take an adapter that was saved, see :func:`adapter_from`.

    Args:
        parser: Of the command.
        what: What is done with the adapter, in words.
    """
    parser.add_argument(
        "--folder", help=f"of tta.save: the adapter in it is {what}, and --method is left out"
    )


def adapter_from(args: argparse.Namespace, opened: OpenedModel, **further: Any) -> Adapter:
    """The adapter in ``--folder``, on a model, or one as ``--method`` says.

    Args:
        args: What was parsed.
        opened: The model.
        **further: More arguments of ``tta.wrap``, where there is no folder.

    Raises:
        FileNotFoundError: When the folder has none.
        ValueError: When it is another model's, or as of :func:`wrap_from`.
    """
    from tta.saving import load

    if args.folder is None:
        return wrap_from(args, opened, **further)
    return load(opened.model, args.folder, source=source_from(args, opened))


def check_writable(name: str, place: str | Path) -> None:
    """Find out whether a file or a folder can be made, before what it is for is computed.

    Args:
        name: The argument.
        place: Of the file or folder, which need not be there, nor need the folders above it.

    Raises:
        OSError: When it cannot.
    """
    whole = Path(place).absolute()
    with writing(name, place):
        # What is there in place of a folder above it, such as a file, is no folder to write to.
        above = next((part for part in whole.parents if part.exists()), whole.parent)
        with tempfile.TemporaryFile(dir=whole if whole.is_dir() else above):
            pass


def open_from(args: argparse.Namespace) -> OpenedModel:
    """Open MODEL; random weights, if it has these, are those of the seed.

    Raises:
        As :func:`tta.runtime.model_strings.open_model`.
    """
    import torch

    from tta.runtime.model_strings import open_model, read_class_names

    torch.manual_seed(args.seed)
    names = None if args.classes is None else read_class_names(args.classes)
    return open_model(args.model, weights=args.weights, device=args.device, class_names=names)


def source_from(args: argparse.Namespace, opened: OpenedModel) -> Any:
    """Source artefacts: those of ``--source``, else those of the model, or None.

    Raises:
        FileNotFoundError: When the file is not there.
        ValueError: When it holds something else.
    """
    from tta.core.source import SourceStatistics

    if args.source is None:
        return opened.source
    if not Path(args.source).is_file():
        raise FileNotFoundError(
            f"`source` must be a file of source artefacts, but {args.source} is not there: make it "
            "with tta collect."
        )
    return SourceStatistics.load(args.source)


def wrap_arguments(args: argparse.Namespace, opened: OpenedModel) -> tuple[Any, dict[str, Any]]:
    """What ``--method`` and its kin say to ``tta.wrap``: the recipe, and arguments by name.

    Raises:
        ValueError: For an unknown method.
    """
    from tta.core.classifier import num_classes
    from tta.runtime.method_strings import SOURCE, parse_method_string

    try:
        classes = num_classes(opened.model)
    except (TypeError, ValueError):  # no linear layer says it; wrap will
        classes = 0
    slots, fields = parse_method_string(args.method, classes)
    recipe, *_ = *slots.values(), SOURCE  # the first brings what the others leave open
    return recipe, {
        "source": source_from(args, opened),
        "batch_size": args.batch_size,
        "seed": args.seed,
        "mean": opened.mean,
        "std": opened.std,
        **dict(list(slots.items())[1:]),
        **fields,
    }


def wrap_from(args: argparse.Namespace, opened: OpenedModel, **further: Any) -> Adapter:
    """Wrap a model as ``--method`` says.

    Args:
        args: What was parsed.
        opened: The model.
        **further: More arguments of ``tta.wrap``.

    Raises:
        ValueError: For an unknown method, or what the method lacks.
    """
    from tta.wrapping import wrap

    recipe, arguments = wrap_arguments(args, opened)
    return wrap(opened.model, recipe, **(arguments | further))
