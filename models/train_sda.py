"""SDA's stage of training: a finished network, tuned on what the diffusion model makes of images.

``python -m models.train NAME --data PATH --sda`` begins with ``WORK/NAME.pt`` where a training has
left it, else with the weights of ``models/weights/NAME``, and leaves ``NAME_sda``: weights for
projected images. `models.load` gives it the bundled denoiser together with NAME, which classifies
the images as they came, so that ``run --model NAME_sda --methods sda`` is the whole method.

Rates, epochs and weight decay are the authors' (sheet of SDA, stage 1). They draw labelled images
from a conditional generator, 50 for each class of ImageNet; here they are training images, each
projected once, 1,000 for each class (our choice). Projections and the network are written as they
come, and the same command goes on from there.
"""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import tta
from models.bundled import BUNDLED, SDA
from models.checkpoints import begin_with, keep
from models.denoiser import load_diffusion
from models.training_images import accuracy, augmented, padded
from tta.core.files import replacing
from tta.parts.diffusion import project, shorten

__all__ = ["EPOCHS", "IMAGES", "PROJECTION", "projected", "train"]

IMAGES = 1000  # of each class
CHUNK = 500  # images that are projected between two writes
SHOWN = 500  # test images whose projections accuracy is told on
# What `python -m experiments own-networks` had chosen for `dda` on held-out corruptions.
PROJECTION: Any = tta.get_config("sda", steps=3, respacing=100, scale=2.0)
RATE, MOMENTUM, DECAY, EPOCHS, FALLS = 5e-4, 0.9, 1e-4, 30, (10, 20, 25)


def projected(images: Tensor, work: Path, seed: int) -> Tensor:
    """What the bundled diffusion model makes of images, going on where ``work`` ends.

    Args:
        images: (N, 3, 32, 32) uint8.
        work: Folder of what is done, a file for each part.
        seed: Of the noise.

    Returns:
        (N, 3, 32, 32) uint8, as an adapter projects images of 8 bits.

    Raises:
        ValueError: When ``work`` holds projections of other images.
    """
    work.mkdir(parents=True, exist_ok=True)
    diffusion, parts = load_diffusion(), []
    for number, part in enumerate(images.split(CHUNK)):
        path = work / f"{number}.pt"
        if not path.exists():
            started = time.perf_counter()
            generator = torch.Generator().manual_seed(seed * 1000 + number)
            found = torch.cat([_projected(diffusion, some, generator) for some in part.split(100)])
            with replacing(path) as unfinished:
                torch.save({"of": part.clone(), "images": found}, unfinished)
            print(f"{path}: {time.perf_counter() - started:.0f}s", flush=True)
        saved = torch.load(path, weights_only=True)
        if not torch.equal(saved["of"], part):
            raise ValueError(
                f"`work` must hold projections of these images, but {path} is of others: take "
                "another folder, or delete it."
            )
        parts.append(saved["images"])
    return torch.cat(parts)


def _projected(diffusion: tta.Diffusion, images: Tensor, generator: torch.Generator) -> Tensor:
    """Images (B, 3, 32, 32) uint8, all at once."""
    found = project(
        diffusion.denoiser,
        images.float() / 255 * 2 - 1,
        shorten(diffusion.betas, PROJECTION.respacing),
        steps=PROJECTION.steps,
        scale=PROJECTION.scale,
        guidance=PROJECTION.guidance,
        per_image=PROJECTION.per_image,
        noise=lambda _: torch.randn(images.shape, generator=generator),
    )
    return ((found + 1) / 2 * 255).round().clamp(0, 255).to(torch.uint8)


def train(
    name: str, data: dict[str, Tensor], work: Path, epochs: int, seed: int, batch_size: int
) -> None:
    """Train ``<name>_sda``, going on from ``work/<name>_sda.pt`` if that is there.

    Args:
        name: Of the bundled network that it begins with.
        data: From `read_cifar10`.
        work: Folder of checkpoints and projections.
        epochs: Of this stage.
        seed: Of the noise of projections, the order of images and crops.
        batch_size: Images at once.
    """
    labels = data["train_labels"]
    chosen = torch.cat([torch.nonzero(labels == k).flatten()[:IMAGES] for k in labels.unique()])
    # Noise of chunks would go by class if their images did.
    chosen, folder = chosen.sort().values, work / "projected"
    images = projected(data["train_images"][chosen], folder / f"train-{seed}", seed)
    tests = projected(data["test_images"][:SHOWN], folder / f"test-{seed}", seed + 1)
    bordered, labels = padded(images), labels[chosen]
    model = BUNDLED[name]()
    optimizer = torch.optim.SGD(model.parameters(), RATE, MOMENTUM, weight_decay=DECAY)
    schedule = torch.optim.lr_scheduler.MultiStepLR(optimizer, FALLS)
    checkpoint = work / f"{name}{SDA}.pt"
    log: dict[str, Any] = {"name": name + SDA, "seed": seed, "epochs": epochs, "seconds": 0.0}
    log["history"] = []
    if checkpoint.exists():
        saved = torch.load(checkpoint, weights_only=True)
        model.load_state_dict(saved["model"])
        optimizer.load_state_dict(saved["optimizer"])
        schedule.load_state_dict(saved["schedule"])
        log = json.loads(saved["log"]) | {"epochs": epochs}
    else:
        begin_with(model, name, work)
    for epoch in range(len(log["history"]), epochs):
        started = time.perf_counter()
        generator = torch.Generator().manual_seed(seed * 1000 + epoch)
        model.train()
        losses = []
        for index in torch.randperm(len(images), generator=generator).split(batch_size):
            loss = F.cross_entropy(model(augmented(bordered, index, generator)), labels[index])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(float(loss.detach()))
        schedule.step()
        model.eval()
        log["seconds"] += time.perf_counter() - started
        row = {
            "epoch": epoch + 1,
            "loss": round(sum(losses) / len(losses), 4),
            "test_accuracy": accuracy(model, data["test_images"], data["test_labels"]),
            "projected_test_accuracy": accuracy(model, tests, data["test_labels"][: len(tests)]),
        }
        moved = {"model": model, "optimizer": optimizer, "schedule": schedule}
        keep(checkpoint, log, row, **{key: part.state_dict() for key, part in moved.items()})
