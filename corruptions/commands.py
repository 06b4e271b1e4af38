"""The command line of ``python -m corruptions``."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, get_args

import torch

from corruptions import check
from corruptions.api import list_corruptions
from corruptions.chunks import usable_cores
from corruptions.layouts import Cifar, Folder, Layout, Options, load_picture
from corruptions.manifest import SUMS, verify
from corruptions.messages import sentence
from corruptions.pictures import OnError
from corruptions.severity import ParameterSet
from corruptions.sheet import corrupted_sheet
from corruptions.write import SHEET, write

__all__ = ["main"]

FROST = "CORRUPTIONS_FROST_PICTURES"
_SHOWN = 5  # pictures left out whose names are printed


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m corruptions",
        description="The corruptions of CIFAR-10-C and ImageNet-C: write whole data sets, look at "
        "one image.",
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    _add_write(commands)
    _add_verify(commands)
    _add_show(commands)
    args = parser.parse_args(argv)
    try:
        return args.execute(args)
    except (ValueError, TypeError, OSError) as error:
        print(f"error: {sentence(error)}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("\ninterrupted; the same command goes on from here", file=sys.stderr)
        return 130


def _add_choices(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--corruptions", nargs="+", metavar="NAME", help="default: the 15 of the benchmark")
    add("--extra", action="store_true", help="add the four that it holds out for validation")
    add(
        "--severities",
        nargs="+",
        type=int,
        choices=range(1, 6),
        default=[1, 2, 3, 4, 5],
        metavar="N",
        help="default: 1 2 3 4 5",
    )
    add("--seed", type=int, default=0, help="of all draws (default: %(default)s)")
    add(
        "--parameters",
        choices=get_args(ParameterSet),
        default="auto",
        help="published constants to use: by image size, or one set (default: %(default)s)",
    )
    add(
        "--frost-pictures",
        metavar="FOLDER",
        default=os.environ.get(FROST),
        help=f"the original frost pictures (default: ${FROST}, or synthetic frost)",
    )


def _names(args: argparse.Namespace) -> tuple[str, ...]:
    known = list_corruptions(extra=True)
    names = args.corruptions or list_corruptions()
    for name in names:
        check.name(name, known)
    more = known[len(list_corruptions()) :] if args.extra else []
    return tuple(dict.fromkeys([*names, *more]))


def _add_write(commands: Any) -> None:
    parser = commands.add_parser(
        "write",
        help="write a corrupted data set in its published layout",
        description="Write a corrupted data set. A killed run goes on where it was when the same "
        f"command is given again. Beside the files come {SUMS} and {SHEET}.",
        epilog="cifar10: CORRUPTION.npy of 5 x 10,000 rows, severity 1 first, and labels.npy. "
        "imagenet: CORRUPTION/SEVERITY/CLASS/IMAGE.JPEG of quality 85, after resizing to 256 and "
        "cropping to 224. folder: the same at each picture's own size.",
    )
    add = parser.add_argument
    add("layout", choices=["cifar10", "imagenet", "folder"])
    add(
        "data",
        type=Path,
        help="cifar10: torchvision's folder or an .npz with test_images and test_labels; "
        "otherwise a folder with a folder of pictures for each class",
    )
    add("output", type=Path, help="folder to write")
    _add_choices(parser)
    add("--images", type=int, metavar="N", help="only the first N images")
    add(
        "--processes",
        type=int,
        default=usable_cores(),
        help="default: one for each processor, here %(default)s",
    )
    add(
        "--on-error",
        choices=get_args(OnError),
        default="raise",
        help="what to do about a picture that cannot be read: stop, or leave it out and count it "
        "(default: %(default)s)",
    )
    add("--quiet", action="store_true", help="print nothing but errors")
    parser.set_defaults(execute=_write)


def _write(args: argparse.Namespace) -> int:
    for name in ("images", "processes"):
        value = getattr(args, name)
        if value is not None and value < 1:
            raise ValueError(f"`{name}` must be at least 1, got {value}")
    check.folder(args.frost_pictures)
    options = Options(
        _names(args),
        tuple(sorted(set(args.severities))),
        args.seed,
        args.parameters,
        args.frost_pictures,
        args.images,
    )
    layout: Layout
    if args.layout == "cifar10":
        if not args.data.exists():
            raise ValueError(f"`data` must exist, got {args.data}: check the path")
        layout = Cifar(args.data, options)
    elif args.layout == "imagenet":
        layout = Folder.open(args.data, options, 256, 224, args.on_error)
    else:
        layout = Folder.open(args.data, options, on_error=args.on_error)
    skipped = write(layout, args.output, args.processes, quiet=args.quiet)
    if skipped:
        more = f"; and {len(skipped) - _SHOWN} more" if len(skipped) > _SHOWN else ""
        print(
            f"left out {len(skipped)} of {layout.count} pictures, which cannot be read: "
            f"{'; '.join(skipped[:_SHOWN])}{more}",
            file=sys.stderr,
        )
    if not args.quiet:
        print(f"wrote {args.output}; look at {args.output / SHEET}")
    return 0


def _add_verify(commands: Any) -> None:
    parser = commands.add_parser(
        "verify",
        help="compare a written data set with its checksums",
        description=f"Compare every file that {SUMS} lists with its checksum; the exit status "
        "is 1 if one is missing or has changed.",
    )
    parser.add_argument("folder", type=Path, help="output of write")
    parser.set_defaults(execute=_verify)


def _verify(args: argparse.Namespace) -> int:
    problems = verify(args.folder)
    for problem in problems:
        print(problem)
    print(f"{len(problems)} problems" if problems else "all files are as they were written")
    return 1 if problems else 0


def _add_show(commands: Any) -> None:
    parser = commands.add_parser(
        "show",
        help="a contact sheet of one image in every corruption and severity",
        description="Write a PNG of one image in every corruption and severity.",
    )
    add = parser.add_argument
    add("image", type=Path, help="any picture; larger than 224 pixels it is brought to 224 x 224")
    add("output", type=Path, nargs="?", help="default: IMAGE-corruptions.png here")
    _add_choices(parser)
    parser.set_defaults(execute=_show)


def _show(args: argparse.Namespace) -> int:
    if not args.image.is_file():
        raise ValueError(f"`image` must be a picture, got {args.image}: check the path")
    pixels = load_picture(args.image, None, None)
    if min(pixels.shape[:2]) > 224:
        pixels = load_picture(args.image, 256, 224)
    sheet = corrupted_sheet(
        torch.from_numpy(pixels.copy()).movedim(-1, 0).contiguous(),
        _names(args),
        sorted(set(args.severities)),
        seed=args.seed,
        parameters=args.parameters,
        frost_pictures=args.frost_pictures,
    )
    output = args.output or Path(f"{args.image.stem}-corruptions.png")
    sheet.save(output, "png")
    print(f"wrote {output}")
    return 0
