"""Source artefacts of the bundled classifiers, made from training images and nothing else.

Fisher information (EATA), class prototypes (RMT, CAFA), the covariance around them (CAFA), a
diagonal SWAG posterior (PETAL), 200 features per class (AdaNPC): all that methods need from the
source, so that none ever gets test images.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor, nn

import tta
from tta.core.files import replacing

__all__ = ["collect", "save_half", "swag"]

FISHER_IMAGES = 2000  # as EATA's authors use
FEATURES_PER_CLASS = 200
SWAG_EPOCHS = 5
# PETAL's schedule for CIFAR: 8e-4 in the first epoch, then linearly to 0.01 over three epochs.
SWAG_LR = (8e-4, 0.01, 3)


def batches(
    images: Tensor, labels: Tensor, size: int, order: Tensor
) -> Iterator[tuple[Tensor, Tensor]]:
    """Float batches in [0, 1] of uint8 images (N, 3, H, W), in the given order."""
    for index in order.split(size):
        yield images[index].float() / 255, labels[index]


def swag(
    model: nn.Module, images: Tensor, labels: Tensor, work: Path, seed: int, bfloat16: bool
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Mean and variance of weights over a short SGD run on the source (diagonal SWAG).

    The network stays in eval mode, as in PETAL's code, so BatchNorm uses its running statistics.
    ``work/swag.pt`` keeps the state after every epoch, and the run goes on from there.

    Returns:
        Mean and variance by parameter name.
    """
    model.eval()
    first, last, ramp = SWAG_LR
    optimizer = torch.optim.SGD(model.parameters(), lr=first, momentum=0.9, weight_decay=5e-4)
    mean = {n: torch.zeros_like(p, dtype=torch.float64) for n, p in model.named_parameters()}
    second = {n: torch.zeros_like(m) for n, m in mean.items()}
    done, kept, file = 0, 0, work / "swag.pt"
    if file.exists():
        saved = torch.load(file, weights_only=True)
        model.load_state_dict(saved["model"])
        optimizer.load_state_dict(saved["optimizer"])
        mean, second, done, kept = saved["mean"], saved["second"], saved["done"], saved["kept"]
    for epoch in range(done, SWAG_EPOCHS):
        share = min(1.0, epoch / ramp)
        optimizer.param_groups[0]["lr"] = first + (last - first) * share
        order = torch.randperm(len(images), generator=torch.Generator().manual_seed(seed + epoch))
        for x, y in batches(images, labels, 200, order):
            with torch.autocast("cpu", dtype=torch.bfloat16, enabled=bfloat16):
                loss = F.cross_entropy(model(x), y)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        if epoch > 0:  # snapshots at the end of epochs 2 to 5
            for n, p in model.named_parameters():
                value = p.detach().double()
                mean[n] += (value - mean[n]) / (kept + 1)
                second[n] += (value.square() - second[n]) / (kept + 1)
            kept += 1
        print(f"swag epoch {epoch + 1} of {SWAG_EPOCHS}", flush=True)
        state = {
            "model": model.state_dict(),
            "optimizer": optimizer.state_dict(),
            "mean": mean,
            "second": second,
            "done": epoch + 1,
            "kept": kept,
        }
        with replacing(file) as part:
            torch.save(state, part)
    variance = {n: (second[n] - mean[n].square()).clamp_min(0).float() for n in mean}
    return {n: m.float() for n, m in mean.items()}, variance


def collect(model: nn.Module, images: Tensor, labels: Tensor, seed: int) -> tta.SourceStatistics:
    """Fisher information, prototypes, covariance and features of a trained model in eval mode.

    Args:
        model: The classifier with its final weights.
        images: (N, 3, 32, 32) uint8 training images.
        labels: (N,).
        seed: Seed of the choice of images.
    """
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(seed))
    classes = range(int(labels.max()) + 1)
    per_class = torch.cat([order[labels[order] == c][:FEATURES_PER_CLASS] for c in classes])
    found = tta.SourceStatistics()
    for method, size, chosen in (
        ("eata", 64, order[:FISHER_IMAGES]),
        ("cafa", 200, order),  # class moments, also the prototypes that RMT asks for
        ("adanpc", 200, per_class),
    ):
        part = tta.collect_source(model, batches(images, labels, size, chosen), [method])
        given = {name: value for name, value in vars(part).items() if value is not None}
        found = dataclasses.replace(found, **given)
    return found


def save_half(tensors: dict[str, Tensor], path: Path, wide: tuple[str, ...] = ()) -> None:
    """Write tensors in half precision.

    Args:
        tensors: By name; integers are kept as they are.
        path: A ``.safetensors`` file.
        wide: Prefixes of names whose values are too small for float16 (variances, Fisher
            information) and go to bfloat16, which has the exponent of float32.

    The covariance keeps all its digits, since it is to be inverted, and so does ITTA's consistency
    loss, which training moves by less than float16 can tell from 1.
    """

    def stored(name: str, t: Tensor) -> Tensor:
        if not t.is_floating_point() or name in ("covariance", "consistency"):
            return t
        return t.to(torch.bfloat16 if name.startswith(wide) else torch.float16)

    small = {name: stored(name, t) for name, t in tensors.items()}
    save_file({n: t.detach().contiguous() for n, t in small.items()}, str(path))
