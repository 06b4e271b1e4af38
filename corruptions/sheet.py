"""Contact sheets: one picture of every corruption at every severity."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw
from torch import Tensor

from corruptions.api import corrupt
from corruptions.severity import ParameterSet

__all__ = ["contact_sheet", "corrupted_sheet"]

_GAP = 4
_LABEL = 130
_HEAD = 16
# Smaller pictures are enlarged by an integer factor.
_SMALLEST = 96


def contact_sheet(
    clean: np.ndarray,
    picture: Callable[[str, float], np.ndarray],
    names: Sequence[str],
    severities: Sequence[float],
) -> Image.Image:
    """Lay pictures out: a row for each corruption, a column for each severity, clean ones first.

    Args:
        clean: (H, W, 3) uint8.
        picture: Gives the (H, W, 3) uint8 picture of a corruption and severity.
        names: Corruptions, from the top.
        severities: Severities, from the left.
    """
    height, width = clean.shape[:2]
    times = max(1, _SMALLEST // min(height, width))
    across, down = width * times + _GAP, height * times + _GAP
    size = (_LABEL + across * (len(severities) + 1), _HEAD + down * len(names))
    sheet = Image.new("RGB", size, "white")
    text = ImageDraw.Draw(sheet)
    for column, severity in enumerate(["clean", *severities]):
        text.text((_LABEL + column * across, 2), str(severity), fill="black")
    for row, name in enumerate(names):
        top = _HEAD + row * down
        text.text((4, top + 4), name, fill="black")
        cells = [clean, *(picture(name, severity) for severity in severities)]
        for column, cell in enumerate(cells):
            enlarged = Image.fromarray(np.ascontiguousarray(cell)).resize(
                (width * times, height * times), Image.Resampling.NEAREST
            )
            sheet.paste(enlarged, (_LABEL + column * across, top))
    return sheet


def corrupted_sheet(
    image: Tensor,
    names: Sequence[str],
    severities: Sequence[float],
    *,
    seed: int = 0,
    parameters: ParameterSet = "auto",
    frost_pictures: str | Path | None = None,
) -> Image.Image:
    """Contact sheet of one image (3, H, W) uint8; all severities of a corruption share draws."""

    def picture(name: str, severity: float) -> np.ndarray:
        out = corrupt(
            image[None],
            name,
            severity,
            seeds=torch.tensor([seed]),
            parameters=parameters,
            frost_pictures=frost_pictures,
        )
        return out[0].movedim(0, -1).numpy()

    return contact_sheet(image.movedim(0, -1).numpy(), picture, names, severities)
