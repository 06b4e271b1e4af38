"""Severity tables of CIFAR-10-C and ImageNet-C, and what lies between their published points.

Source: Hendrycks & Dietterich, "Benchmarking Neural Network Robustness to Common Corruptions and
Perturbations", ICLR 2019, arXiv 1903.12261, and the public generator scripts of that paper.

The scripts publish two sets of constants: one for 32x32 (CIFAR-10-C) and one for 224x224 images
(ImageNet-C), each for severities 1 to 5. In between, every constant moves linearly: over severity
from one level to the next (level 0 is the clean image), and over the short side of the image, on
a log2 scale, from the 32 set to the 224 set. At 32 and below, and at 224 and above, a set holds
as published. Constants that count something are rounded to the nearest integer at the end. The disc
of defocus_blur and the factors of zoom_blur are sets of pixels and of pictures, between which there
is nothing: there the filters of the surrounding published points are averaged (`mixture`).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

__all__ = ["BENCHMARK", "EXTRA", "TABLES", "Constant", "ParameterSet", "constants", "mixture"]

ParameterSet = Literal["auto", "cifar", "imagenet"]

BENCHMARK = (
    "gaussian_noise", "shot_noise", "impulse_noise", "defocus_blur", "glass_blur",
    "motion_blur", "zoom_blur", "snow", "frost", "fog", "brightness", "contrast",
    "elastic_transform", "pixelate", "jpeg_compression",
)  # fmt: skip
EXTRA = ("speckle_noise", "gaussian_blur", "spatter", "saturate")

Row = tuple[float, float, float, float, float]


@dataclass(frozen=True)
class Constant:
    """One constant of a recipe over severities 1..5.

    Attributes:
        cifar: Values for 32x32 images.
        imagenet: Values for 224x224 images.
        clean: Value at severity 0, where the recipe leaves the image alone; None repeats level 1,
            for constants that do not matter there.
        integer: Round the interpolated value to the nearest integer.
        reciprocal: Interpolate 1/value, for counts whose clean value is infinite.
    """

    cifar: Row
    imagenet: Row
    clean: float | None = None
    integer: bool = False
    reciprocal: bool = False

    def level(self, which: str, level: int) -> float:
        """Value of set `which` at an integer level 0..5."""
        row = self.cifar if which == "cifar" else self.imagenet
        if level > 0:
            return row[level - 1]
        return row[0] if self.clean is None else self.clean


def _columns(rows: str) -> Row:
    first, second, third, fourth, fifth = (float(value) for value in rows.split())
    return first, second, third, fourth, fifth


def _constant(
    cifar: str,
    imagenet: str,
    clean: float | None = None,
    integer: bool = False,
    reciprocal: bool = False,
) -> Constant:
    return Constant(_columns(cifar), _columns(imagenet), clean, integer, reciprocal)


# Lengths are in pixels unless the name ends in `fraction` (of the short side).
TABLES: dict[str, dict[str, Constant]] = {
    "gaussian_noise": {"scale": _constant(".04 .06 .08 .09 .10", ".08 .12 .18 .26 .38", 0)},
    "shot_noise": {
        "photons": _constant("500 250 100 75 50", "60 25 12 5 3", math.inf, reciprocal=True)
    },
    "impulse_noise": {"amount": _constant(".01 .02 .03 .05 .07", ".03 .06 .09 .17 .27", 0)},
    "speckle_noise": {"scale": _constant(".06 .10 .12 .16 .20", ".15 .20 .35 .45 .60", 0)},
    "gaussian_blur": {"sigma": _constant(".4 .6 .7 .8 1", "1 2 3 4 6", 0)},
    "glass_blur": {
        "sigma": _constant(".05 .25 .4 .25 .4", ".7 .9 1 1.1 1.5", 0),
        "reach": _constant("1 1 1 1 1", "1 2 2 3 4", integer=True),
        "passes": _constant("1 1 1 2 2", "2 1 3 2 2", 0, integer=True),
    },
    "defocus_blur": {
        "radius": _constant(".3 .4 .5 1 1.5", "3 4 6 8 10"),
        "alias_sigma": _constant(".4 .5 .6 .2 .1", ".1 .5 .5 .5 .5"),
    },
    "motion_blur": {
        "radius": _constant("6 6 6 8 9", "10 15 15 15 20"),
        "sigma": _constant("1 1.5 2 2 2.5", "3 5 8 12 15", 0),
    },
    "zoom_blur": {
        "step": _constant(".01 .01 .01 .01 .01", ".01 .01 .02 .02 .03"),
        "count": _constant("7 12 16 21 26", "12 16 11 13 11", integer=True),
    },
    "snow": {
        "mean": _constant(".1 .1 .15 .25 .3", ".1 .2 .55 .55 .55", 0),
        "scale": _constant(".2 .2 .3 .3 .3", ".3 .3 .3 .3 .3", 0),
        "zoom": _constant("1 1 1.75 2.25 1.25", "3 2 4 4.5 2.5"),
        "threshold": _constant(".6 .5 .55 .6 .65", ".5 .5 .9 .85 .85"),
        "radius": _constant("8 10 10 12 14", "10 12 12 12 12"),
        "sigma": _constant("3 4 4 6 12", "4 4 8 8 12"),
        "keep": _constant(".95 .9 .9 .85 .8", ".8 .7 .7 .65 .55", 1),
    },
    "frost": {
        "image_weight": _constant("1 1 .9 .85 .75", "1 .8 .7 .65 .6", 1),
        "frost_weight": _constant(".2 .3 .4 .4 .45", ".4 .6 .7 .7 .75", 0),
        # The 32x32 script shrinks the picture by 5 before it crops; the 224x224 script does not.
        "shrink": _constant("5 5 5 5 5", "1 1 1 1 1", integer=True),
    },
    "fog": {
        "amount": _constant(".2 .5 .75 1 1.5", "1.5 2 2.5 2.5 3", 0),
        "decay": _constant("3 3 2.5 2 1.75", "2 2 1.7 1.5 1.4"),
    },
    "brightness": {"shift": _constant(".05 .1 .15 .2 .3", ".1 .2 .3 .4 .5", 0)},
    "contrast": {"factor": _constant(".75 .5 .4 .3 .15", ".4 .3 .2 .1 .05", 1)},
    "saturate": {
        "factor": _constant(".3 .1 1.5 2 2.5", ".3 .1 2 5 20", 1),
        "shift": _constant("0 0 0 .1 .2", "0 0 0 .1 .2", 0),
    },
    "jpeg_compression": {
        "quality": _constant("80 65 58 50 40", "25 18 15 10 7", 100, integer=True)
    },
    "pixelate": {"factor": _constant(".95 .9 .85 .75 .65", ".6 .5 .4 .3 .25", 1)},
    # The 224x224 script multiplies its fractions by 244, an authors' typo that ImageNet-C keeps.
    "elastic_transform": {
        "strength_fraction": Constant(
            (0, 0.05, 0.08, 0.1, 0.1),
            (488 / 224, 488 / 224, 12.2 / 224, 17.08 / 224, 29.28 / 224),
            0,
        ),
        "sigma_fraction": Constant(
            (0, 0.2, 0.06, 0.04, 0.03),
            (170.8 / 224, 19.52 / 224, 2.44 / 224, 2.44 / 224, 2.44 / 224),
        ),
        "affine_fraction": Constant(
            (0.08, 0.07, 0.06, 0.05, 0.03),
            (24.4 / 224, 48.8 / 224, 4.88 / 224, 4.88 / 224, 4.88 / 224),
            0,
        ),
    },
    "spatter": {
        "mean": _constant(".62 .65 .65 .65 .65", ".65 .65 .65 .65 .67"),
        "scale": _constant(".1 .1 .3 .1 .1", ".3 .3 .3 .3 .4", 0),
        "sigma": _constant(".7 .8 1 .7 .5", "4 3 2 1 1"),
        "threshold": _constant(".7 .7 .69 .69 .68", ".69 .68 .68 .65 .65"),
        # Levels 1-3 are water, 4-5 mud. The constants of each kind are held constant at the other's
        # levels.
        "strength": _constant(".5 .5 .5 .5 .5", ".6 .6 .5 .5 .5"),
        "mud_sigma": _constant(".6 .6 .6 .6 .6", "1.5 1.5 1.5 1.5 1.5"),
        "mud": _constant("0 0 0 1 1", "0 0 0 1 1", integer=True),
    },
}  # fmt: skip


def mixture(
    severity: float, side: int, parameters: ParameterSet = "auto"
) -> list[tuple[float, str, int]]:
    """Weights of the published points that surround a severity and an image size.

    Args:
        severity: 0 to 5; 0 is the clean image.
        side: Short side of the image in pixels.
        parameters: "auto" goes from the 32 set to the 224 set by `side`; a name forces one set.

    Returns:
        Up to four (weight, set, level) with positive weights that sum to one.
    """
    low = min(int(severity), 4)
    over_levels = [(1 - (severity - low), low), (severity - low, low + 1)]
    if parameters == "auto":
        share = math.log2(min(max(side, 32), 224) / 32) / math.log2(224 / 32)
    else:
        share = float(parameters == "imagenet")
    over_sets = [(1 - share, "cifar"), (share, "imagenet")]
    return [
        (of_set * of_level, name, level)
        for of_set, name in over_sets
        for of_level, level in over_levels
        if of_set * of_level > 0
    ]


def constants(
    name: str, severity: float, side: int, parameters: ParameterSet = "auto"
) -> dict[str, float]:
    """Constants of one corruption at any severity and size, by name.

    Args:
        name: A corruption.
        severity: 0 to 5.
        side: Short side of the image in pixels.
        parameters: See `mixture`.

    Returns:
        Constant name to value; the published value exactly at a published point.
    """
    points = mixture(severity, side, parameters)
    values = {}
    for key, constant in TABLES[name].items():
        if len(points) == 1:
            ((_, which, level),) = points
            value = constant.level(which, level)
        elif constant.reciprocal:
            rate = sum(weight / constant.level(which, level) for weight, which, level in points)
            value = 1 / rate
        else:
            value = sum(weight * constant.level(which, level) for weight, which, level in points)
        values[key] = math.floor(value + 0.5) if constant.integer else value
    return values
