"""Small folders and videos, made when a test needs them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image

__all__ = ["SIZE", "folder", "picture", "video"]

SIZE = 16  # pixels; what the tiny networks take


def picture(number: int, size: int = SIZE) -> Image.Image:
    """A picture whose pixels follow from a number."""
    chance = np.random.default_rng(number)
    return Image.fromarray(chance.integers(0, 256, (size, size, 3), dtype=np.uint8))


def folder(place: Path, count: int, first: int = 0, old: bool = True) -> Path:
    """PNG files ``0000.png`` and so on; old ones have not been written to for an hour."""
    import os
    import time

    place.mkdir(parents=True, exist_ok=True)
    for number in range(first, first + count):
        path = place / f"{number:04}.png"
        picture(number).save(path)
        if old:
            os.utime(path, (time.time() - 3600,) * 2)
    return place


def video(path: Path, count: int, size: int = 32, codec: str = "mpeg4") -> Path:
    """A video whose frames are ever brighter."""
    import av

    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=25)
        stream.width = stream.height = size
        stream.pix_fmt = "yuv420p"
        for number in range(count):
            levels = np.full((size, size, 3), 20 + 5 * number % 230, dtype=np.uint8)
            for packet in stream.encode(av.VideoFrame.from_ndarray(levels, "rgb24")):
                container.mux(packet)
        for packet in stream.encode():
            container.mux(packet)
    return path
