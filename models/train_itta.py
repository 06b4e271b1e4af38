"""ITTA's stage of training: a finished network and its consistency loss, in turn.

``python -m models.train NAME --data PATH --itta`` begins with ``WORK/NAME.pt`` where a training has
left it, else with the weights of ``models/weights/NAME``, and leaves ``NAME_itta``: weights that
have seen the loss, and the loss, as ``consistency`` of the source artefacts. Its weights are not
those of NAME, so an error of `itta` on it is to be compared with its own source model.

Learning rates are the authors' (`tta.parts.itta.learn`); batches and augmentation are those of
NAME's recipe. Epochs are our choice: three are 1,170 batches of 128, where the authors took 5,001
of 96. A checkpoint is written after every epoch, as the rest of `models.train` does.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from models.bundled import BUNDLED, ITTA
from models.checkpoints import begin_with, keep
from models.training_images import accuracy, augmented, padded
from tta.core.classifier import find_classifier
from tta.parts.itta import identity, learn

__all__ = ["DEPTH", "refusal", "train"]

DEPTH = 10  # element-wise maps in the loss, as the authors have


def refusal(name: str) -> str | None:
    """Why ITTA cannot be learned on a bundled network, in a sentence; None where it can."""
    try:
        next(learn(BUNDLED[name](), identity(1, 1), []), None)
    except ValueError as error:
        return str(error)
    return None


def train(
    name: str, data: dict[str, Tensor], work: Path, epochs: int, seed: int, batch_size: int
) -> None:
    """Train ``<name>_itta``, going on from ``work/<name>_itta.pt`` if that is there.

    Args:
        name: Of the bundled network that it begins with.
        data: From `read_cifar10`.
        work: Folder of checkpoints.
        epochs: Of this stage.
        seed: Of the order of images, crops and mixed styles.
        batch_size: Images at once.
    """
    model = BUNDLED[name]().eval()
    images, labels = data["train_images"], data["train_labels"]
    checkpoint = work / f"{name}{ITTA}.pt"
    log: dict[str, Any] = {"name": name + ITTA, "seed": seed, "epochs": epochs, "seconds": 0.0}
    log["history"] = []
    head: Any = find_classifier(model)
    consistency = identity(DEPTH, head.in_features)
    optimizers: dict[str, Any] = {}
    if checkpoint.exists():
        saved = torch.load(checkpoint, weights_only=True)
        model.load_state_dict(saved["model"])
        consistency, optimizers = saved["consistency"], saved["optimizers"]
        log = json.loads(saved["log"]) | {"epochs": epochs}
    else:
        begin_with(model, name, work)
    bordered = padded(images)

    def batches(epoch: int) -> Iterator[tuple[Tensor, Tensor]]:
        generator = torch.Generator().manual_seed(seed * 1000 + epoch)
        order = torch.randperm(len(images), generator=generator)
        for index in order.split(batch_size):
            yield augmented(bordered, index, generator), labels[index]

    for epoch in range(len(log["history"]), epochs):
        started = time.perf_counter()
        figures: dict[str, list[float]] = {"loss_cla": [], "loss_reg": [], "penalty": []}
        for found in learn(
            model, consistency, batches(epoch), seed=seed * 1000 + epoch, optimizers=optimizers
        ):
            consistency = found["consistency"]
            for key, values in figures.items():
                values.append(float(found[key]))
        log["seconds"] += time.perf_counter() - started
        row: dict[str, Any] = {"epoch": epoch + 1}
        row |= {key: round(sum(v) / len(v), 4) for key, v in figures.items()}
        row["test_accuracy"] = accuracy(model, data["test_images"], data["test_labels"])
        moved = {"model": model.state_dict(), "consistency": consistency, "optimizers": optimizers}
        keep(checkpoint, log, row, **moved)
