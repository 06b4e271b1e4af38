"""``tta export``: a model that adapts, as a folder that runs on a device without torch."""

from __future__ import annotations

import argparse

from tta.cli.common import METHOD, add_method, add_model, open_from, wrap_from
from tta.core.warn import warn

__all__ = ["add_arguments", "run"]

LARGEST = 1024  # pixels on a side
SIZE = 224  # of images, where the model does not say


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the flags of the command."""
    add_model(parser)
    add_method(parser)
    parser.add_argument("--out", required=True, metavar="FOLDER", help="where the graph goes")


def run(args: argparse.Namespace) -> int:
    """Write the folder, and print what is in it.

    Raises:
        ValueError: When something in the model or the method has no graph.
        ImportError: When the extra "edge" is not installed.
        OSError: When the folder cannot be written to.
    """
    from PIL import Image

    from tta.export import to_onnx

    opened = open_from(args)
    bare = args.method.partition("[")[0].strip() == METHOD
    adapter = wrap_from(args, opened, **({"guard": False} if bare else {}))
    if bare:
        warn(f"{METHOD} is exported without its guard, which looks at figures of each batch.")
    picture = Image.effect_noise((LARGEST, LARGEST), 64).convert("RGB")
    example = opened.transform(picture)[None]
    device = next(adapter.model.parameters()).device
    if example.shape[-1] == LARGEST:  # a transform that leaves pictures as large as they are
        example = opened.transform(picture.resize((SIZE, SIZE)))[None]
    folder = to_onnx(adapter, args.out, example.to(device))
    for file in sorted(folder.iterdir()):
        print(f"{file}  {file.stat().st_size / 1e6:.2f} MB")
    return 0
