"""``python -m experiments card``: measure a bundled model and write its card.

The model as it is, without adaptation: accuracy on all clean test images, and its error under each
of the 15 corruptions at severity 5. ``training.json`` beside the weights, which training wrote,
tells the rest.
"""

from __future__ import annotations

import argparse
import json
import time
from datetime import date
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import corruptions
from experiments.data import ImageSet
from experiments.records import markdown
from experiments.records.environment import describe_environment
from experiments.records.progress import Progress
from experiments.run.domains import corrupt_set
from experiments.run.flags import number_of_images
from experiments.run.subject import load_subject, pick_device
from models.bundled import FOLDER, known
from tta.core.checks import nearest, shown
from tta.core.files import replacing

__all__ = ["Card", "add_flags", "render_card"]

BATCH = 250
SEVERITY = 5


def add_flags(parser: argparse.ArgumentParser) -> None:
    """Say what ``card`` does and takes."""
    parser.description = (
        "Measure a bundled model without adaptation: clean accuracy and error under the 15 "
        "corruptions at severity 5. Writes card.json and card.md beside its weights."
    )
    add = parser.add_argument
    add("model", metavar="NAME", help="a bundled model")
    add("--data", required=True, help="the CIFAR-10 test set: an .npz or torchvision's folder")
    add("--images", metavar="N", help="images per corruption, or 'all' (default: all)")
    add("--seed", type=int, default=0, help="of the corruptions (default: %(default)s)")
    add("--output", type=Path, help="folder of the card (default: beside the weights)")
    add("--device", help="cpu, cuda, cuda:1 (default: CUDA if there is one)")
    add("--quiet", action="store_true", help="print only the card")
    parser.set_defaults(prepare=_prepare)


def _prepare(args: argparse.Namespace) -> Card:
    images = number_of_images(args.images, None)
    device = pick_device(args.device)
    return Card(args.model, args.data, device, images, args.seed, args.output, args.quiet)


class Card:
    """Measures one bundled model; checked when it is made, done by `execute`.

    Args:
        name: A bundled model's name.
        data: Path of the whole CIFAR-10 test set, see `experiments.data.open_data`.
        device: Where to measure.
        images: Images per corruption, as many of each class; None for all.
        seed: Of the corruptions.
        folder: Where the card goes; default beside the weights.
        quiet: Print nothing but the card.
    """

    def __init__(
        self,
        name: str,
        data: str,
        device: torch.device,
        images: int | None = None,
        seed: int = 0,
        folder: str | Path | None = None,
        quiet: bool = False,
    ) -> None:
        if name not in known():
            advice = nearest(name, known())
            raise ValueError(f"`name` must be a bundled model, got {shown(name)}: {advice}")
        self.folder = FOLDER / name if folder is None else Path(folder)
        self.subject = load_subject(name, data, device)
        clean = self.subject.clean
        if not isinstance(clean, ImageSet):
            raise ValueError(
                f"`data` must be the CIFAR-10 test set, got {shown(data)}: pass the .npz or the "
                "folder "
                "with cifar-10-batches-py"
            )
        self.clean = clean
        self.shifted = clean if images is None else clean.balanced(images)
        self.seed = seed
        self.progress = Progress(len(clean) + 15 * len(self.shifted), quiet)

    def execute(self) -> Path:
        """Measure and write ``card.json`` and ``card.md``; returns the folder."""
        started = time.monotonic()
        clean = self._error(self.clean.tensor(), self.clean, "clean images")
        errors = {}
        for name in corruptions.list_corruptions():
            self.progress.note(f"corrupting {name}")
            pixels = corrupt_set(self.shifted, name, SEVERITY, self.seed, self.subject.device)
            errors[name] = self._error(pixels, self.shifted, name)
        card = self._card(clean, errors, time.monotonic() - started)
        self.folder.mkdir(parents=True, exist_ok=True)
        for name, text in (
            ("card.json", json.dumps(card, indent=2) + "\n"),
            ("card.md", render_card(card)),
        ):
            with replacing(self.folder / name) as part:
                part.write_text(text)
        self.progress.clear()
        print(render_card(card))
        print(f"wrote {self.folder / 'card.json'} and card.md", flush=True)
        return self.folder

    @torch.no_grad()
    def _error(self, pixels: Tensor, images: ImageSet, what: str) -> float:
        labels = torch.from_numpy(images.labels)
        wrong = 0
        for start in range(0, len(labels), BATCH):
            part = slice(start, start + BATCH)
            batch = pixels[part].to(self.subject.device).float() / 255
            logits = self.subject.model(self.subject.preprocess(batch))
            wrong += int((logits.argmax(1).cpu() != labels[part]).sum())
            done = start + len(batch)
            self.progress.advance(len(batch), f"{what:<18} {100 * wrong / done:5.1f} % error")
        return wrong / len(labels)

    def _card(self, clean: float, errors: dict[str, float], seconds: float) -> dict[str, Any]:
        training = self.folder / "training.json"
        return {
            "name": self.subject.name,
            "date": date.today().isoformat(),
            "model": self.subject.describe(),
            "training": json.loads(training.read_text()) if training.is_file() else None,
            "clean_accuracy": 1 - clean,
            "clean_images": len(self.clean),
            "corruption_errors": errors,
            "mean_corruption_error": sum(errors.values()) / len(errors),
            "corruption_images": len(self.shifted),
            "severity": SEVERITY,
            "seed": self.seed,
            "data": self.clean.origin,
            "seconds": round(seconds, 1),
            **describe_environment(),
        }


def render_card(card: dict[str, Any]) -> str:
    """The card as Markdown, from the object in ``card.json``."""
    model, training = card["model"], card["training"]
    norms = ", ".join(f"{count} {kind}" for kind, count in model["norm_layers"].items())
    rows = {
        "architecture": f"{model['architecture']}, {model['parameters']:,} parameters",
        "norm layers": norms,
        "input": "pixels in [0, 1], (B, 3, 32, 32); the model normalises them itself",
        "training data": "CIFAR-10, the 50,000 training images (Krizhevsky 2009)",
    }
    if training is not None:
        minutes = training["seconds"] / 60
        rows["training"] = f"`{training['command']}`"
        rows["training time"] = (
            f"{training['epochs']} epochs, {minutes:.0f} minutes, seed {training['seed']}"
        )
    rows |= {
        "source artefacts": ", ".join(model["source_artefacts"]) or "none",
        "clean accuracy": f"{100 * card['clean_accuracy']:.2f} % of {card['clean_images']:,} "
        "test images",
        f"error at severity {card['severity']}": f"{100 * card['mean_corruption_error']:.1f} %, "
        f"mean over 15 corruptions of {card['corruption_images']:,} test images",
    }
    hardware, versions = card["hardware"], card["versions"]
    rows["measured"] = (
        f"{card['date']}, {hardware['cpu']}, "
        + (", ".join(hardware["gpus"]) or f"{hardware['cores']} cores")
        + f"; Python {versions['python']}, torch {versions['torch']}, timm {versions['timm']}"
    )
    errors = [[name, f"{100 * error:.1f}"] for name, error in card["corruption_errors"].items()]
    lines = [markdown.heading(card["name"]), ""]
    lines += markdown.table(["", ""], list(rows.items()), "ll")
    lines += ["", f"Error by corruption at severity {card['severity']}, without adaptation:", ""]
    lines += markdown.table(["corruption", "error (%)"], errors)
    lines += [
        "",
        "A small model for demonstrations and tests. Made by this repository from CIFAR-10 alone;",
        "`card.json` beside this page has every figure, and `training.json` the training log.",
    ]
    return markdown.document(lines)
