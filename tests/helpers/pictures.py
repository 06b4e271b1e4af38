"""Pictures for tests of corruptions: smooth ones that are made, and golden ones in files."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

__all__ = ["GOLDEN_32", "GOLDEN_224", "needs_224", "smooth_pictures"]

ROOT = Path(__file__).parents[2]
GOLDEN_32 = ROOT / "tests" / "golden" / "corruptions"

# Outside the repository: these files show crops of ImageNet, which may not be published with it.
# The one folder that tests read out there; without it they are skipped and say so.
GOLDEN_224 = ROOT.parent / "shared" / "golden" / "corruptions"
needs_224 = pytest.mark.skipif(
    not (GOLDEN_224 / "det224.npz").is_file(),
    reason="compares with golden files of 224x224 ImageNet crops, which are not in the repository; "
    "they are looked for beside it, in ../shared/golden/corruptions, and are not there",
)


def smooth_pictures(count: int = 4, height: int = 32, width: int = 32, seed: int = 0):
    """Smooth 8-bit pictures with flat black and white parts, (count, 3, height, width)."""
    random = torch.Generator().manual_seed(seed)
    coarse = torch.rand(count, 3, 6, 6, generator=random) * 1.4 - 0.2
    smooth = torch.nn.functional.interpolate(coarse, (height, width), mode="bilinear")
    return (smooth.clamp(0, 1) * 255).to(torch.uint8)
