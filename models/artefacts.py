"""Source artefacts of the bundled classifiers, made from training images and nothing else.

Fisher information (EATA), class prototypes (RMT, CAFA), the covariance around them (CAFA), a
diagonal SWAG posterior (PETAL), 200 features per class (AdaNPC), moments of features by predicted
class (PeTTA) and of each block (PEA), the style of batches (ReservoirTTA): all that methods need
from the source, so that none ever gets test images.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Iterator
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save
from torch import Tensor, nn

import tta
from tta.core.files import replacing

__all__ = ["add", "collect", "save_half", "swag"]

FISHER_IMAGES = 2000  # as EATA's authors use
FEATURES_PER_CLASS = 200
# Methods that artefacts are collected for, with the size of batches. CAFA's class moments hold the
# prototypes that RMT asks for; a style is one of batches as they are adapted to.
COLLECTED = {"eata": 64, "cafa": 200, "adanpc": 200, "petta": 200, "pea": 200, "reservoir": 64}
# Those that `add` adds to the artefacts of a network that is there, with how their names begin.
ADDED = {"petta": "class_", "pea": "block_", "reservoir": "style_"}
WIDE = ("fisher", "posterior_variance")
WHOLE = ("covariance", "consistency", *ADDED.values())
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


def collect(
    model: nn.Module,
    images: Tensor,
    labels: Tensor,
    seed: int,
    methods: Collection[str] = COLLECTED,
) -> tta.SourceStatistics:
    """What methods need of a trained model in eval mode, but for the posterior.

    Args:
        model: The classifier with its final weights.
        images: (N, 3, 32, 32) uint8 training images.
        labels: (N,).
        seed: Seed of the choice of images.
        methods: Those of `COLLECTED` that it is for.
    """
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(seed))
    classes = range(int(labels.max()) + 1)
    per_class = torch.cat([order[labels[order] == c][:FEATURES_PER_CLASS] for c in classes])
    chosen = {"eata": order[:FISHER_IMAGES], "adanpc": per_class}
    found = tta.SourceStatistics()
    for method in methods:
        index = chosen.get(method, order)
        loader = batches(images, labels, COLLECTED[method], index)
        part = tta.collect_source(model, loader, [method])
        given = {name: value for name, value in vars(part).items() if value is not None}
        found = dataclasses.replace(found, **given)
    return found


def add(model: nn.Module, images: Tensor, labels: Tensor, seed: int, path: Path) -> list[str]:
    """Add to a file of artefacts what it lacks; what it has stays as it is.

    Args:
        model: The classifier as it is stored, in eval mode.
        images: (N, 3, 32, 32) uint8 training images.
        labels: (N,).
        seed: Seed of the choice of images.
        path: What `save_half` wrote.

    Returns:
        The names of the tensors that are new.
    """
    held = load_file(str(path))
    missing = [m for m, begin in ADDED.items() if not any(name.startswith(begin) for name in held)]
    if not missing:
        return []
    with TemporaryDirectory() as folder:
        file = Path(folder) / "source"
        collect(model, images, labels, seed, missing).save(file)
        new = load_file(str(file))
    save_half(held | new, path, WIDE)
    return sorted(new)


def save_half(tensors: dict[str, Tensor], path: Path, wide: tuple[str, ...] = ()) -> None:
    """Write tensors in half precision.

    Args:
        tensors: By name; integers are kept as they are.
        path: A ``.safetensors`` file.
        wide: Prefixes of names whose values are too small for float16 (variances, Fisher
            information) and go to bfloat16, which has the exponent of float32.

    The covariance keeps all its digits, since it is to be inverted, and so do ITTA's consistency
    loss, which training moves by less than float16 can tell from 1, and moments, which are small.
    """

    def stored(name: str, t: Tensor) -> Tensor:
        if not t.is_floating_point() or name.startswith(WHOLE):
            return t
        return t.to(torch.bfloat16 if name.startswith(wide) else torch.float16)

    small = {name: stored(name, t) for name, t in tensors.items()}
    with replacing(path) as part:  # `save_file` would give nobody else the right to read it
        part.write_bytes(save({n: t.detach().contiguous() for n, t in small.items()}))
