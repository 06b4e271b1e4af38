"""Reading pictures as they come: any colour mode as RGB, upright, errors that name the file."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any, Literal

import numpy as np
from PIL import Image, ImageOps
from torchvision.datasets.folder import is_image_file

__all__ = ["OnError", "UnreadablePictureError", "find_pictures", "is_picture", "read_picture",
           "to_rgb"]  # fmt: skip

OnError = Literal["raise", "skip"]
"""What to do about a picture that cannot be read: stop, or leave it out and count it."""

_BITS_PER_SAMPLE, _PHOTOMETRIC = 258, 262  # tags of TIFF
_WHITE_IS_ZERO = 0


class UnreadablePictureError(OSError, ValueError):
    """A file that is no complete picture, or must not be decoded; the message names it."""


def is_picture(path: str | Path) -> bool:
    """Whether a file is a picture by its name: a known suffix, and not hidden.

    The companions ``._name.jpg`` that macOS writes beside pictures are hidden files.
    """
    name = Path(path).name
    return not name.startswith(".") and is_image_file(name)


def find_pictures(root: str | Path) -> list[str]:
    """Pictures in a folder and its sub-folders, sorted, as paths inside it with forward slashes.

    Hidden files and folders, and the folder ``__MACOSX`` of unpacked archives, are left out.
    """
    found, seen = [], set[str]()
    for folder, inner, files in os.walk(root, followlinks=True):
        if (place := os.path.realpath(folder)) in seen:  # a link to a folder above, or twice
            inner.clear()
            continue
        seen.add(place)
        inner[:] = sorted(name for name in inner if not name.startswith((".", "__MACOSX")))
        here = Path(folder).relative_to(root)
        found += [(here / name).as_posix() for name in files if is_picture(name)]
    return sorted(path for path in found if Path(root, path).is_file())


def read_picture(path: str | Path) -> Image.Image:
    """Read a picture file as RGB, upright.

    Args:
        path: Any format that Pillow reads; of an animation the first frame is taken.

    Returns:
        A picture of mode RGB, turned and mirrored as its EXIF orientation says; see `to_rgb`.

    Raises:
        FileNotFoundError: When the file is not there.
        UnreadablePictureError: A ValueError and an OSError: when the file cannot be decoded, has
            more pixels than Pillow's limit or larger text chunks, or has values of no known range.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     Image.new("L", (5, 4), 7).save(folder + "/grey.png")
        ...     read_picture(folder + "/grey.png").getpixel((0, 0))
        (7, 7, 7)
    """
    try:
        with Image.open(path) as file:
            file.load()
            return _upright(to_rgb(file), file.info)
    except (FileNotFoundError, PermissionError, IsADirectoryError, MemoryError):
        raise
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise UnreadablePictureError(
            f"`{path}` must have fewer pixels than PIL.Image.MAX_IMAGE_PIXELS allows, got more "
            f"({_first_line(error)}): make the picture smaller, or raise that limit if you trust it"
        ) from error
    except Exception as error:  # decoders raise anything: SyntaxError, struct.error, IndexError
        raise UnreadablePictureError(
            f"`{path}` cannot be decoded as it is not a whole picture "
            f"({_first_line(error)}): fetch it again or remove it"
        ) from error


def _first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return lines[0].rstrip(".") if lines else type(error).__name__


def _upright(picture: Image.Image, info: dict[Any, Any]) -> Image.Image:
    """Turn a picture as the metadata of its file say; TIFF files are turned when they load."""
    picture.info = dict(info)  # some conversions lose it
    try:
        return ImageOps.exif_transpose(picture)
    except Exception:  # damaged EXIF data beside whole pixels
        return picture


def to_rgb(picture: Image.Image) -> Image.Image:
    """Convert a Pillow picture of any mode to RGB.

    Grey levels of 16 bits are scaled by 1/257 and rounded, other integer depths alike. Floating
    point in [0, 1] is scaled by 255, and otherwise taken for levels from 0 to 255. The rest is
    Pillow's conversion. Transparency is dropped, as common loaders do.

    Raises:
        ValueError: When integer or floating-point values have no known range.
    """
    mode = picture.mode
    if mode == "RGB":
        return picture
    if mode.startswith("I"):
        return _grey(_integer_levels(picture))
    if mode == "F":
        return _grey(_float_levels(np.asarray(picture)))
    if mode in ("P", "PA", "La", "RGBa"):
        # These convert to RGB through their version with an alpha channel only.
        picture = picture.convert("LA" if mode == "La" else "RGBA")
    return picture.convert("RGB")


def _grey(levels: np.ndarray) -> Image.Image:
    return Image.fromarray(levels.astype(np.uint8)).convert("RGB")


def _integer_levels(picture: Image.Image) -> np.ndarray:
    """Levels 0 to 255 of a grey picture of more than 8 bits, (H, W)."""
    tags: Any = getattr(picture, "tag_v2", {})
    bits = int(np.max(tags.get(_BITS_PER_SAMPLE, 16)))
    most = 2 ** (bits if 8 < bits <= 16 else 16) - 1  # 16 bits are what files of 32 mostly hold
    values = np.asarray(picture).astype(np.int64)
    low, high = int(values.min()), int(values.max())
    if low < 0 or high > most:
        raise ValueError(
            f"whole-number grey values must lie in 0..{most}, got {low}..{high}: scale them to "
            "16 bits"
        )
    if tags.get(_PHOTOMETRIC) == _WHITE_IS_ZERO:  # Pillow inverts those of 8 bits only
        values = most - values
    return (values * 255 + most // 2) // most


def _float_levels(values: np.ndarray) -> np.ndarray:
    """Levels 0 to 255 of a floating-point grey picture, (H, W)."""
    low, high = float(values.min()), float(values.max())
    if not (low >= 0 and high <= 255):
        raise ValueError(
            f"floating-point grey values must lie in [0, 1] or [0, 255], got {low:.4g} to "
            f"{high:.4g}: scale them"
        )
    return np.round(values * (255.0 if high <= 1 else 1.0))
