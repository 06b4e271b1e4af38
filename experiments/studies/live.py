"""Three synthetic cameras on one server, to be looked at.

    python -m experiments live

starts the server of ``tta serve`` on a bundled model and prints the address of its page. Three
cameras send images of the bundled slice of CIFAR-10: over ``hall`` fog comes and goes, ``gate``
freezes now and then on one image, and ``yard`` sees one class for long stretches. Every ten seconds
the share of right labels is printed beside what the server estimates without labels. It ends with
Ctrl-C, or after ``--seconds``.
"""

from __future__ import annotations

import argparse
import io
import json
import math
import os
import signal
import threading
import time
import urllib.request
import uuid
from collections import deque
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from PIL import Image

import corruptions
import models
import tta
from experiments.data.bundled import read_bundled
from experiments.data.image_set import ImageSet
from tta.core.checks import LARGE, number, whole_number
from tta.runtime.model_strings import Pixels

__all__ = ["CAMERAS", "Live", "add_flags"]

MODEL = "cifar10_resnet20_bn"
BATCH, EVERY_S = 8, 0.5  # images that a camera sends at a time, and how often
TOLD_S = 10.0
LAST = 400  # images over which the share of right labels goes

Shot = tuple[torch.Tensor, np.ndarray]  # images (B, 3, H, W) in [0, 1] and labels (B,)


def _hall(seconds: float, draw: Callable[..., Shot], g: torch.Generator) -> Shot:
    """Fog comes and goes once in 80 seconds."""
    images, labels = draw(BATCH)
    severity = 2.5 - 2.5 * math.cos(2 * math.pi * seconds / 80)
    return corruptions.corrupt(images, "fog", severity, generator=g), labels


def _gate(seconds: float, draw: Callable[..., Shot], g: torch.Generator) -> Shot:
    """The first image of every minute's second half stays until the minute is over."""
    frozen = seconds % 60 > 30
    images, labels = draw(BATCH, number=int(seconds // 60)) if frozen else draw(BATCH)
    if frozen:
        images, labels = images[:1].repeat(BATCH, 1, 1, 1), labels[:1].repeat(BATCH)
    noisy = corruptions.corrupt(images, "brightness", 3.0, generator=g)
    return noisy, labels


def _yard(seconds: float, draw: Callable[..., Shot], g: torch.Generator) -> Shot:
    """One class for 45 seconds, then all for 15, by night."""
    only = int(seconds // 60) % 10 if seconds % 60 < 45 else None
    images, labels = draw(BATCH, only=only)
    return corruptions.corrupt(images, "contrast", 2.5, generator=g), labels


CAMERAS = {"hall": _hall, "gate": _gate, "yard": _yard}


def add_flags(parser: argparse.ArgumentParser) -> None:
    """Say what ``live`` does and takes."""
    parser.description = __doc__
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    add = parser.add_argument
    add("--method", default="auto", help="a recipe (default: %(default)s)")
    add("--port", type=int, default=8000, help="0 for any that is free (default: %(default)s)")
    add("--folder", help="where the streams' states are kept, to go on from")
    add("--seconds", type=float, help="when to end (default: never)")
    parser.set_defaults(prepare=lambda a: Live(a.method, a.port, a.folder, a.seconds))


class Live:
    """Runs the server and the cameras.

    Args:
        method: A recipe.
        port: 0 for any that is free.
        folder: Of the streams' states; None keeps them in memory.
        seconds: When to end; None for never.
    """

    def __init__(
        self, method: str, port: int, folder: str | Path | None, seconds: float | None
    ) -> None:
        tta.get_config(method)  # raises for an unknown name
        self.method, self.folder = method, None if folder is None else Path(folder)
        self.port = whole_number("port", port, 0, 65535)
        self.seconds = None if seconds is None else number("seconds", seconds, 0, LARGE, above=True)
        self.address = ""
        self.right: dict[str, deque[bool]] = {name: deque(maxlen=LAST) for name in CAMERAS}
        self._stopped = threading.Event()

    def execute(self) -> dict[str, float]:
        """Serve until the end; return the share of right labels of each camera's last images."""
        from tta.runtime.server import application, run

        model, info = models.load(MODEL)
        data = read_bundled()
        app = application(
            self._pool(model, info.source),
            Pixels(tuple(info.input_size[1:])),  # type: ignore[arg-type]
            info.class_names,
            shape=info.input_size,
            batch_size=BATCH,
        )
        threads = [
            threading.Thread(target=self._film, args=(name, data, seed), daemon=True)
            for seed, name in enumerate(CAMERAS)
        ] + [threading.Thread(target=self._tell, daemon=True)]

        def ready(address: str) -> None:
            self.address = address
            print(f"the page: {address}/   (Ctrl-C ends it)", flush=True)
            for thread in threads:
                thread.start()

        try:
            run(app, port=self.port, on_ready=ready)
        finally:
            self._stopped.set()
        return {name: float(np.mean(right)) for name, right in self.right.items() if right}

    def _pool(
        self, model: torch.nn.Module, source: tta.SourceStatistics | None
    ) -> tta.runtime.StreamPool:
        if self.folder is not None and (self.folder / "config.json").is_file():
            return tta.runtime.StreamPool.open(model, self.folder)
        mean, std = (0.0,) * 3, (1.0,) * 3
        adapter = tta.wrap(
            model, self.method, source=source, mean=mean, std=std, batch_size=BATCH, health=True
        )
        return tta.runtime.StreamPool(adapter, folder=self.folder)

    def _film(self, name: str, data: ImageSet, seed: int) -> None:
        """Send what a camera sees, until the end."""
        chance = np.random.default_rng(seed)
        generator = torch.Generator().manual_seed(seed)

        def draw(count: int, only: int | None = None, number: int | None = None) -> Shot:
            where = np.arange(len(data)) if only is None else np.flatnonzero(data.labels == only)
            picked = chance.choice(where, count)
            if number is not None:
                picked = where[(7919 * (number + 1) + np.arange(count)) % len(where)]
            pixels = torch.from_numpy(data.images[picked]).permute(0, 3, 1, 2).float() / 255
            return pixels, data.labels[picked]

        begun = time.monotonic()
        for turn in range(1 << 62):
            if self._stopped.wait(max(0.0, begun + turn * EVERY_S - time.monotonic())):
                return
            images, labels = CAMERAS[name](turn * EVERY_S, draw, generator)
            try:
                answers = self._post(name, images)
            except OSError:
                if self._stopped.wait(1.0):
                    return
                continue  # the server is stopping, or was restarted by hand
            pairs = zip(answers, labels.tolist(), strict=True)
            self.right[name].extend(answer["label"] == label for answer, label in pairs)

    def _post(self, name: str, images: torch.Tensor) -> list[dict[str, object]]:
        """Send images as PNG in one request."""
        mark = uuid.uuid4().hex
        parts = []
        for pixels in (255 * images).round().to(torch.uint8).permute(0, 2, 3, 1).numpy():
            file = io.BytesIO()
            Image.fromarray(pixels).save(file, "PNG")
            head = f'--{mark}\r\nContent-Disposition: form-data; name="{name}"; filename="a.png"'
            parts.append(f"{head}\r\n\r\n".encode() + file.getvalue() + b"\r\n")
        request = urllib.request.Request(
            f"{self.address}/v1/predict?create=true&probabilities=false",
            b"".join(parts) + f"--{mark}--\r\n".encode(),
            {"Content-Type": f"multipart/form-data; boundary={mark}"},
        )
        with urllib.request.urlopen(request, timeout=30) as answer:
            return json.load(answer)

    def _tell(self) -> None:
        """Print, now and then, how each camera fares; end the server when its time is over."""
        begun = time.monotonic()
        while True:
            left = TOLD_S
            if self.seconds is not None:
                left = min(left, begun + self.seconds - time.monotonic())
            if self._stopped.wait(max(0.0, left)):
                return
            if self.seconds is not None and time.monotonic() >= begun + self.seconds:
                os.kill(os.getpid(), signal.SIGTERM)
                return
            print("   ".join(map(self._line, CAMERAS)), flush=True)

    def _line(self, name: str) -> str:
        try:
            with urllib.request.urlopen(f"{self.address}/v1/streams/{name}", timeout=10) as answer:
                estimate = json.load(answer)["health"].get("estimated_accuracy_average")
        except OSError:
            estimate = None
        right = np.mean(self.right[name]) if self.right[name] else math.nan
        said = "none" if estimate is None else f"{estimate:.2f}"
        return f"{name}: {right:.2f} right, {said} estimated"
