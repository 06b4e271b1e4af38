"""Pictures of Pillow as they come: any colour mode as RGB, upright."""

from __future__ import annotations

import sys
from contextlib import suppress
from typing import Any

import numpy as np

__all__ = ["as_rgb", "is_picture"]

_WHITE_IS_ZERO, _BITS_PER_SAMPLE, _PHOTOMETRIC = 0, 258, 262  # tags of TIFF


def is_picture(image: Any) -> bool:
    """Whether an object is a picture of Pillow, which is imported where there is one."""
    pillow = sys.modules.get("PIL.Image")
    return pillow is not None and isinstance(image, pillow.Image)


def as_rgb(picture: Any, name: str) -> Any:
    """A picture of Pillow as RGB, upright; the file it comes from may be read just now.

    Args:
        picture: Of any mode.
        name: The argument that an error names.

    Raises:
        ValueError: When it cannot be decoded, or has values of no known range.
    """
    from PIL import Image, ImageOps

    where = getattr(picture, "filename", "") or "a picture without a file"
    try:
        picture.load()
        info = dict(picture.info)
        rgb = _to_rgb(picture, Image)
    except MemoryError:
        raise
    except Exception as error:  # decoders raise anything: SyntaxError, struct.error, IndexError
        lines = str(error).strip().splitlines() or [type(error).__name__]
        raise ValueError(
            f"`{name}` must give whole pictures, but {where} of mode {picture.mode} cannot be "
            f"converted to RGB ({lines[0].rstrip('.')}): fetch it again or leave it out"
        ) from error
    rgb.info = info  # some conversions lose it
    with suppress(Exception):  # damaged EXIF data beside whole pixels
        rgb = ImageOps.exif_transpose(rgb)
    return rgb


def _to_rgb(picture: Any, pillow: Any) -> Any:
    """A picture of any mode as RGB, by the rules of `corruptions`, of which nothing is used here.

    Grey levels of more than 8 bits are scaled to 0..255 and rounded; floating-point levels lie in
    [0, 1] or else in [0, 255]; transparency is dropped.
    """
    mode = picture.mode
    if mode.startswith("I"):
        tags = getattr(picture, "tag_v2", {})
        bits = int(np.max(tags.get(_BITS_PER_SAMPLE, 16)))
        most = 2 ** (bits if 8 < bits <= 16 else 16) - 1
        levels = np.asarray(picture).astype(np.int64)
        if not 0 <= levels.min() <= levels.max() <= most:
            raise ValueError(f"grey levels must lie in 0..{most}, got {levels.min()}.."
                             f"{levels.max()}")  # fmt: skip
        if tags.get(_PHOTOMETRIC) == _WHITE_IS_ZERO:
            levels = most - levels
        grey = (levels * 255 + most // 2) // most
    elif mode == "F":
        values = np.asarray(picture)
        if not 0 <= values.min() <= values.max() <= 255:
            raise ValueError(f"grey levels must lie in [0, 1] or [0, 255], got {values.min():.4g} "
                             f"to {values.max():.4g}")  # fmt: skip
        grey = np.round(values * (255.0 if values.max() <= 1 else 1.0))
    else:
        if mode in ("P", "PA", "La", "RGBa"):
            # These convert to RGB through their version with an alpha channel only.
            picture = picture.convert("LA" if mode == "La" else "RGBA")
        return picture.convert("RGB")
    return pillow.fromarray(grey.astype(np.uint8)).convert("RGB")
