"""Pixel-level agreement with the published generator functions.

Deterministic corruptions are compared directly. For the others the published code's own random
numbers are drawn again from numpy's legacy generator (a frozen stream) and fed to `apply`.
Tolerances are those that the golden files' README recommends for float64, except where a comment
says otherwise.
"""

import numpy as np
import pytest

import corruptions
from experiments.studies.corruption_goldens import legacy_params, pictures, to_array, to_tensor
from tests.helpers.pictures import GOLDEN_32, GOLDEN_224, needs_224

# Largest difference in levels, and share of differing values in any one image.
DETERMINISTIC = {
    "defocus_blur": (1, 0.001),
    "zoom_blur": (1, 0.003),
    "brightness": (0, 0),
    "contrast": (0, 0),
    "pixelate": (0, 0),
    "jpeg_compression": (0, 0),
    "gaussian_blur": (1, 0.002),
    "saturate": (0, 0),
}
SEEDED = {
    "gaussian_noise": (0, 0),
    "shot_noise": (0, 0),
    "impulse_noise": (0, 0),
    "speckle_noise": (0, 0),
    "glass_blur": (0, 0),
    # Weights of 17 bits, see corruptions/filters.py.
    "motion_blur": (1, 0.002),
    "snow": (1, 0.001),
    "frost": (0, 0),
    # The scripts form the noise in another order of multiplications.
    "fog": (1, 0.001),
    "elastic_transform": (1, 0.01),
    "spatter": (1, 0.001),
}
SEEDED_224 = (
    "glass_blur", "motion_blur", "snow", "frost", "fog", "elastic_transform", "spatter",
)  # fmt: skip


def assert_close(ours, golden, largest, share):
    """Compare (N, H, W, 3) levels; the share counts within each image."""
    difference = np.abs(ours.astype(int) - golden.astype(int)).reshape(len(ours), -1)
    assert difference.max() <= largest
    assert (difference > 0).mean(1).max() <= share


@pytest.fixture(scope="module")
def clean32():
    return np.load(GOLDEN_32 / "clean.npz")["c32"]


@pytest.fixture(scope="module")
def clean224():
    return pictures(np.load(GOLDEN_224 / "clean.npz")["i224_png"], 224)


def test_tables_cover_every_corruption():
    assert set(DETERMINISTIC) | set(SEEDED) == set(corruptions.list_corruptions(extra=True))


@pytest.mark.parametrize("severity", range(1, 6))
@pytest.mark.parametrize("name", DETERMINISTIC)
def test_deterministic_32(name, severity, clean32):
    golden = np.load(GOLDEN_32 / "det32.npz")[name][severity - 1]
    ours = corruptions.corrupt(to_tensor(clean32), name, severity, seeds=range(8))
    assert_close(to_array(ours), golden, *DETERMINISTIC[name])


@needs_224
@pytest.mark.parametrize("severity", range(1, 6))
@pytest.mark.parametrize("name", DETERMINISTIC)
def test_deterministic_224(name, severity, clean224):
    golden = pictures(np.load(GOLDEN_224 / "det224.npz")[f"{name}/s{severity}"], 224)
    ours = corruptions.corrupt(to_tensor(clean224), name, severity, seeds=[0, 1])
    assert_close(to_array(ours), golden, *DETERMINISTIC[name])


@pytest.mark.parametrize("severity", range(1, 6))
@pytest.mark.parametrize("name", SEEDED)
def test_seeded_32(name, severity, clean32):
    file = np.load(GOLDEN_32 / "seeded32.npz")
    for i, position in enumerate(file["position"]):
        image = clean32[position]
        params = legacy_params(name, image, severity, int(file[f"{name}/seed"][severity - 1, i]))
        ours = corruptions.apply(to_tensor(image[None]), name, params)
        assert_close(to_array(ours), file[name][severity - 1, i][None], *SEEDED[name])


@needs_224
@pytest.mark.parametrize("name", SEEDED_224)
def test_seeded_224(name, clean224):
    file = np.load(GOLDEN_224 / "seeded224.npz")
    severities = [s for s in range(1, 6) if f"{name}/s{s}" in file.files]
    assert len(severities) == 3
    for severity in severities:
        image = clean224[0]
        params = legacy_params(name, image, severity, int(file[f"{name}/s{severity}/seed"]))
        ours = corruptions.apply(to_tensor(image[None]), name, params)[..., :128, :128]
        golden = pictures(file[f"{name}/s{severity}"], 128)
        assert_close(to_array(ours), golden, *SEEDED[name])
