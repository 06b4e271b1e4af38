"""Outputs of the published corruption code that are kept as files, and its random numbers.

For random corruptions the published code's own draws are made again from numpy's legacy generator,
a frozen stream, so that `corruptions.apply` can be given the same ones.
"""

from __future__ import annotations

import io

import numpy as np
import torch
from PIL import Image
from torch import Tensor

import corruptions
from corruptions.severity import constants

__all__ = ["legacy_params", "pictures", "to_array", "to_tensor"]


def pictures(entry: np.ndarray, height: int) -> np.ndarray:
    """Decode a PNG entry of stacked pictures, (N, height, width, 3)."""
    pixels = np.array(Image.open(io.BytesIO(entry.tobytes())))
    return pixels.reshape(-1, height, pixels.shape[1], 3)


def to_tensor(images: np.ndarray) -> Tensor:
    """(N, H, W, 3) array to (N, 3, H, W) tensor."""
    return torch.from_numpy(np.ascontiguousarray(np.moveaxis(images, -1, 1)))


def to_array(images: Tensor) -> np.ndarray:
    """(N, 3, H, W) tensor to (N, H, W, 3) array."""
    return images.movedim(1, -1).numpy()


def legacy_params(name: str, image: np.ndarray, severity: int, seed: int) -> dict[str, Tensor]:
    """`params` with the draws that the published code makes after numpy.random.seed(seed).

    `image` is (H, W, 3) uint8.
    """
    size = len(image)
    random = np.random.RandomState(seed)
    params = corruptions.sample(name, (1, 3, size, size), severity, [0])

    def channels_first(array: np.ndarray) -> Tensor:
        return to_tensor(np.asarray(array)[None])

    if name in ("gaussian_noise", "speckle_noise"):
        params["normal"] = channels_first(random.normal(size=(size, size, 3)))
    elif name == "shot_noise":
        del params["uniform"]
        counts = random.poisson(image / 255 * float(params["photons"]))
        params["counts"] = channels_first(counts)
    elif name == "impulse_noise":
        fresh = np.random.default_rng(random.randint(0, 2**31 - 1))
        amount = constants(name, severity, size)["amount"]
        params["replace"] = channels_first(fresh.random((size, size, 3)) <= amount)
        params["salt"] = channels_first(fresh.random((size, size, 3)) <= 0.5)
    elif name == "glass_blur":
        reach, shape = int(params["reach"]), params["offsets"].shape
        moves = random.randint(-reach, reach, size=(np.prod(shape[1:4]), 2))
        params["offsets"] = torch.from_numpy(moves.reshape(shape).astype(np.int8))
    elif name == "motion_blur":
        params["angle"] = torch.tensor([random.uniform(-45, 45)], dtype=torch.float64)
    elif name == "snow":
        params["normal"] = torch.from_numpy(random.normal(size=(1, size, size)))
        params["angle"] = torch.tensor([random.uniform(-135, -45)], dtype=torch.float64)
    elif name == "fog":
        width, draws = 100.0, []
        step = grid = {32: 32, 224: 256}[size]
        while step >= 2:
            draws.append(random.uniform(-width, width, 3 * (grid // step) ** 2) / width)
            step, width = step // 2, width / float(params["decay"])
        params["noise"] = torch.from_numpy(np.concatenate(draws)[None])
    elif name == "elastic_transform":
        affine = float(params["affine"])
        params["points"] = torch.from_numpy(random.uniform(-affine, affine, (1, 3, 2)) / affine)
        params["field"] = torch.from_numpy(random.uniform(-1, 1, (1, 2, size, size)))
    elif name == "spatter":
        params["normal"] = torch.from_numpy(random.normal(size=(1, size, size)))
    elif name == "frost":
        picture = _formula_picture()
        picture = picture[2::5, 2::5] if size == 32 else picture
        random.randint(5)
        top = random.randint(0, picture.shape[0] - size)
        left = random.randint(0, picture.shape[1] - size)
        params["crop"] = channels_first(picture[top : top + size, left : left + size])
    return params


def _formula_picture() -> np.ndarray:
    """The picture behind the seeded frost goldens, (600, 900, 3) RGB."""
    y, x, b = np.ogrid[:600, :900, 2:-1:-1]
    return ((3 * y + 5 * x + 40 * b + x * y % 17) % 256).astype(np.uint8)
