"""``tta export``: a model that adapts, as a folder that runs on a device without torch."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from tta.cli.common import (
    METHOD,
    adapter_from,
    add_method,
    add_model,
    add_saved,
    check_writable,
    open_from,
)
from tta.cli.pictures import PictureLoader, choose_pictures, picture_files
from tta.core.warn import warn

__all__ = ["add_arguments", "run"]

LARGEST = 1024  # pixels on a side
SIZE = 224  # of images, where the model does not say
IMAGES = 128  # that ranges for 8 bits are taken from


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the flags of the command."""
    add_model(parser)
    add_method(parser)
    add_saved(parser, "exported as it is by now")
    parser.add_argument("--out", required=True, metavar="FOLDER", help="where the graph goes")
    parser.add_argument(
        "--int8",
        metavar="FOLDER",
        help=f"run the network in 8 bits, by its ranges on up to {IMAGES} pictures of this folder, "
        "such as some of the training data; what adapts stays in float32",
    )


def run(args: argparse.Namespace) -> int:
    """Write the folder, and print what is in it.

    Raises:
        ValueError: When something in the model or the method has no graph.
        ImportError: When the extra "edge" is not installed.
        OSError: When the folder cannot be written to.
    """
    from PIL import Image

    from tta.export import to_onnx

    check_writable("out", args.out)
    opened = open_from(args)
    bare = args.folder is None and args.method.partition("[")[0].strip() == METHOD
    adapter = adapter_from(args, opened, **({"guard": False} if bare else {}))
    if bare:
        warn(f"{METHOD} is exported without its guard, which looks at figures of each batch.")
    picture = Image.effect_noise((LARGEST, LARGEST), 64).convert("RGB")
    device = next(adapter.model.parameters()).device
    transform: Any = opened.transform
    example = transform(picture)[None]
    if example.shape[-1] == LARGEST:  # a transform that leaves pictures as large as they are
        transform = _fitted(transform)
        example = transform(picture)[None]
    calibration = None if args.int8 is None else _calibration(args, transform, adapter.model)
    folder = to_onnx(adapter, args.out, example.to(device), calibration=calibration)
    if calibration is not None:
        calibration.end()
    for file in sorted(folder.iterdir()):
        print(f"{file}  {file.stat().st_size / 1e6:.2f} MB")
    return 0


def _fitted(transform: Any) -> Any:
    from PIL import ImageOps

    return lambda picture: transform(ImageOps.fit(picture, (SIZE, SIZE)))


def _calibration(args: argparse.Namespace, transform: Any, model: Any) -> PictureLoader:
    files = picture_files(Path(args.int8))
    chosen = choose_pictures(files, dict.fromkeys(files, 0), IMAGES, args.seed)
    return PictureLoader(chosen, transform, args.batch_size, model)
