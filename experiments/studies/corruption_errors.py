"""What the deviations of `corruptions` from the published code do, to pixels and to classifiers.

``python -m experiments corruption-errors`` prints two tables. The first compares with the
outputs of the published code that are kept in ``tests/golden/corruptions``, with the same draws:
the largest difference in grey levels, the worst share of differing values in an image, and the
error of the bundled classifiers under either. Few images are kept, so errors are coarse; how many
predictions differ is the sharper figure. The second is about frost, whose photographs cannot be
shipped: the classifiers' error under the synthetic texture, under the same texture with its pixels
shuffled, and under its mean colour alone. If these are close, the ice's geometry, which is what the
texture lacks, cannot matter much.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

import corruptions
import models
from experiments.data import read_bundled
from experiments.records import markdown
from experiments.studies.corruption_goldens import legacy_params, pictures, to_array, to_tensor

__all__ = ["CorruptionErrors", "add_flags", "compare", "frost_errors"]

ROOT = Path(__file__).parents[2]
GOLDEN_32 = ROOT / "tests" / "golden" / "corruptions"
GOLDEN_224 = ROOT.parent / "shared" / "golden" / "corruptions"
BATCH = 250


def _kept_32(name: str) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """Published images, ours with the same draws, and labels, for each severity; (N, H, W, 3)."""
    clean = np.load(GOLDEN_32 / "clean.npz")
    images, labels = clean["c32"], clean["c32_label"]
    fixed, drawn = np.load(GOLDEN_32 / "det32.npz"), np.load(GOLDEN_32 / "seeded32.npz")
    for severity in range(1, 6):
        if name in fixed.files:
            ours = corruptions.corrupt(to_tensor(images), name, severity, seeds=range(len(images)))
            yield fixed[name][severity - 1], to_array(ours), labels
            continue
        position = drawn["position"]
        parts = []
        for i, image in enumerate(images[position]):
            seed = int(drawn[f"{name}/seed"][severity - 1, i])
            params = legacy_params(name, image, severity, seed)
            parts.append(to_array(corruptions.apply(to_tensor(image[None]), name, params)))
        yield drawn[name][severity - 1], np.concatenate(parts), labels[position]


def _kept_224(name: str) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """The same at 224x224, without labels; of random ones a window of some severities is kept."""
    images = pictures(np.load(GOLDEN_224 / "clean.npz")["i224_png"], 224)
    fixed, drawn = np.load(GOLDEN_224 / "det224.npz"), np.load(GOLDEN_224 / "seeded224.npz")
    for severity in range(1, 6):
        key = f"{name}/s{severity}"
        if key in fixed.files:
            ours = corruptions.corrupt(to_tensor(images), name, severity, seeds=range(len(images)))
            yield pictures(fixed[key], 224), to_array(ours)
        elif key in drawn.files:
            params = legacy_params(name, images[0], severity, int(drawn[f"{key}/seed"]))
            ours = corruptions.apply(to_tensor(images[:1]), name, params)[..., :128, :128]
            yield pictures(drawn[key], 128), to_array(ours)


def _difference(pairs: Sequence[tuple[np.ndarray, np.ndarray]]) -> str:
    if not pairs:
        return "-"
    gaps = [np.abs(a.astype(int) - b.astype(int)).reshape(len(a), -1) for a, b in pairs]
    largest = max(int(gap.max()) for gap in gaps)
    share = max(float((gap > 0).mean(1).max()) for gap in gaps)
    return f"{largest} ({100 * share:.2f}%)" if largest else "0"


@torch.no_grad()
def _predictions(model: nn.Module, images: Tensor) -> Tensor:
    parts = [model(part.float() / 255).argmax(1) for part in images.split(BATCH)]
    return torch.cat(parts)


def compare(names: Sequence[str], model_names: Sequence[str]) -> list[dict[str, Any]]:
    """Rows of the first table.

    Returns:
        For each corruption `name`, `pixels_32`, `pixels_224` (largest difference and worst share,
        in words), `images`, and for each model (wrong under the published images, wrong under
        ours, differing predictions).
    """
    classifiers = {name: models.load(name)[0].eval() for name in model_names}
    rows = []
    for name in names:
        kept = list(_kept_32(name))
        theirs, ours = (to_tensor(np.concatenate([k[i] for k in kept])) for i in (0, 1))
        labels = torch.from_numpy(np.concatenate([k[2] for k in kept]).astype(np.int64))
        large = list(_kept_224(name)) if (GOLDEN_224 / "det224.npz").exists() else []
        row = {
            "name": name,
            "pixels_32": _difference([k[:2] for k in kept]),
            "pixels_224": _difference(large),
            "images": len(labels),
        }
        for key, model in classifiers.items():
            published, own = (_predictions(model, images) for images in (theirs, ours))
            wrong = int((published != labels).sum()), int((own != labels).sum())
            row[key] = (*wrong, int((published != own).sum()))
        rows.append(row)
    return rows


def frost_errors(
    model_names: Sequence[str], severities: Sequence[int], count: int
) -> list[tuple[str, int, dict[str, float]]]:
    """Rows of the second table: (model, severity, error under each variant of the texture)."""
    data = read_bundled().balanced(count)
    images, labels = data.tensor(), torch.from_numpy(data.labels)
    rows = []
    for name in model_names:
        model = models.load(name)[0].eval()
        for severity in severities:
            params = corruptions.sample("frost", images.shape, severity, range(len(images)))
            crop = params["crop"]
            order = torch.randperm(crop[0, 0].numel(), generator=torch.Generator().manual_seed(0))
            mean = crop.float().mean((2, 3), keepdim=True).to(torch.uint8)
            variants = {
                "texture": crop,
                "shuffled": crop.flatten(2)[..., order].view(crop.shape),
                "mean colour": mean.expand_as(crop).contiguous(),
            }
            errors = {"clean": float((_predictions(model, images) != labels).float().mean())}
            for variant, other in variants.items():
                out = corruptions.apply(images, "frost", params | {"crop": other})
                errors[variant] = float((_predictions(model, out) != labels).float().mean())
            rows.append((name, severity, errors))
    return rows


def _render(rows: Sequence[dict[str, Any]], model_names: Sequence[str]) -> str:
    header = ["corruption", "32x32: largest (share)", "224x224", "images"]
    header += [f"{name}: published, ours, differing" for name in model_names]
    shown = []
    for row in rows:
        cells = [row["name"], row["pixels_32"], row["pixels_224"], str(row["images"])]
        for name in model_names:
            theirs, ours, differing = row[name]
            share = 100 / row["images"]
            cells.append(f"{theirs * share:.1f}%, {ours * share:.1f}%, {differing}")
        shown.append(cells)
    return markdown.document(markdown.table(header, shown, "lllr" + "r" * len(model_names)))


def _render_frost(rows: Sequence[tuple[str, int, dict[str, float]]]) -> str:
    variants = list(rows[0][2])
    shown = [
        [name, str(severity), *(f"{100 * errors[variant]:.1f}%" for variant in variants)]
        for name, severity, errors in rows
    ]
    return markdown.document(markdown.table(["model", "severity", *variants], shown))


def add_flags(parser: argparse.ArgumentParser) -> None:
    """Say what ``corruption-errors`` does and takes."""
    parser.description = __doc__
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    add = parser.add_argument
    known = models.list_models()
    add("--models", nargs="+", choices=known, default=known, metavar="NAME", help="bundled ones")
    add("--images", type=int, default=2000, help="for frost (default: all 2000 bundled)")
    parser.set_defaults(prepare=lambda args: CorruptionErrors(args.models, args.images))


class CorruptionErrors:
    """Both comparisons.

    Args:
        models: Names of bundled models.
        images: How many for the comparison of frost's textures.
    """

    def __init__(self, models: Sequence[str], images: int) -> None:
        read_bundled().balanced(images)  # raises for a number that cannot be
        self.models = models
        self.images = images

    def execute(self) -> None:
        """Measure, and print both tables."""
        names = corruptions.list_corruptions(extra=True)
        print(_render(compare(names, self.models), self.models))
        print(_render_frost(frost_errors(self.models, (1, 3, 5), self.images)), end="")
