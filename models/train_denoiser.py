"""The training of the bundled diffusion network, ``python -m models.train cifar10_denoiser``.

Ho et al. 2020, algorithm 1: noise of a random step is added to an image, and the network learns
which noise it was. Two choices are ours. Steps with little noise are drawn more often (t = T u^1.5
with uniform u), as `dda` and `sda` use the first half of the chain on small images. The learning
rate rises to 1e-3 and falls to 0 along a cosine, since the training is short.
"""

from __future__ import annotations

import json
import math
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from models.artefacts import save_half
from models.checkpoints import keep
from models.denoiser import BETAS, DENOISER, FOLDER, UNet
from tta.core.files import replacing

__all__ = ["STEPS", "export", "train"]

STEPS = 2600
BATCH = 128
PEAK_LR, WARMUP = 1e-3, 200
AVERAGED = 0.999  # of the weights that are shipped; less in the first steps
EVERY = 100  # steps between checkpoints, and rows of the log
HELD = 1000  # test images on which the loss is reported; nothing is chosen by it


def noisy(x: Tensor, t: Tensor, noise: Tensor) -> Tensor:
    """Images x (B, C, H, W) in [-1, 1] with the noise of steps t (B,)."""
    kept = torch.cumprod(1 - BETAS, 0)[t].float()[:, None, None, None]
    return kept.sqrt() * x + (1 - kept).sqrt() * noise


def train(images: Tensor, held: Tensor, work: Path, steps: int, seed: int) -> None:
    """Train, going on from ``work/cifar10_denoiser.pt`` if that is there.

    Args:
        images: (N, 3, 32, 32) uint8 training images.
        held: Images that it is not trained on, for the log.
        work: Folder of the checkpoint.
        steps: Of the whole training, on which the learning rate depends.
        seed: Each step draws from a generator of its own, seeded by this and its number.
    """
    torch.manual_seed(seed)
    model, averaged = UNet(), UNet()
    averaged.load_state_dict(model.state_dict())
    optimizer = torch.optim.Adam(model.parameters(), lr=PEAK_LR)
    log: dict[str, Any] = {"name": DENOISER, "seed": seed, "steps": steps, "seconds": 0.0}
    log["history"] = []
    checkpoint, done = work / f"{DENOISER}.pt", 0
    if checkpoint.exists():
        saved = torch.load(checkpoint, weights_only=True)
        model.load_state_dict(saved["model"])
        averaged.load_state_dict(saved["averaged"])
        optimizer.load_state_dict(saved["optimizer"])
        log, done = json.loads(saved["log"]) | {"steps": steps}, saved["done"]
        if log["seed"] != seed or done > steps:
            raise ValueError(
                f"`work` must hold a training of seed {seed} and at most {steps} steps, but "
                f"{checkpoint} has seed {log['seed']} and {done}: choose another folder"
            )
    running, started, begun = 0.0, time.perf_counter(), done
    for step in range(done, steps):
        generator = torch.Generator().manual_seed(seed * 10**6 + step)
        index = torch.randint(0, len(images), (BATCH,), generator=generator)
        x = images[index].float() / 127.5 - 1
        mirror = torch.rand(BATCH, generator=generator) < 0.5
        x = torch.where(mirror[:, None, None, None], x.flip(3), x)
        t = (len(BETAS) * torch.rand(BATCH, generator=generator) ** 1.5).long()
        noise = torch.randn(x.shape, generator=generator)
        for group in optimizer.param_groups:
            rising = min(1.0, (step + 1) / WARMUP)
            group["lr"] = PEAK_LR * rising * 0.5 * (1 + math.cos(math.pi * step / steps))
        with torch.autocast("cpu", dtype=torch.bfloat16):
            found = model(noisy(x, t, noise), t)
        loss = (found.float() - noise).square().mean()
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        share = 1 - min(AVERAGED, (step + 1) / (step + 10))
        with torch.no_grad():
            for average, parameter in zip(averaged.parameters(), model.parameters(), strict=True):
                average.lerp_(parameter, share)
        running += float(loss.detach())
        if (step + 1) % EVERY and step + 1 < steps:
            continue
        log["seconds"] += time.perf_counter() - started
        row = {"step": step + 1, "loss": round(running / (step + 1 - begun), 5)}
        row["test_loss"] = round(_loss(averaged, held[:HELD]), 5)
        moved = {"model": model, "averaged": averaged, "optimizer": optimizer}
        states = {key: part.state_dict() for key, part in moved.items()}
        keep(checkpoint, log, row, done=step + 1, **states)
        running, started, begun = 0.0, time.perf_counter(), step + 1


@torch.no_grad()
def _loss(model: UNet, images: Tensor) -> float:
    """Mean squared error over steps drawn evenly, always the same ones."""
    generator = torch.Generator().manual_seed(0)
    total = 0.0
    for part in images.split(250):
        x = part.float() / 127.5 - 1
        t = torch.randint(0, len(BETAS), (len(x),), generator=generator)
        noise = torch.randn(x.shape, generator=generator)
        total += float((model(noisy(x, t, noise), t) - noise).square().mean()) * len(x)
    return total / len(images)


def export(work: Path, command: str) -> None:
    """Write the averaged weights in half precision, and the log."""
    saved = torch.load(work / f"{DENOISER}.pt", weights_only=True)
    folder = FOLDER / DENOISER
    folder.mkdir(parents=True, exist_ok=True)
    save_half(saved["averaged"], folder / "weights.safetensors")
    log = json.loads(saved["log"]) | {"command": command}
    with replacing(folder / "training.json") as part:
        part.write_text(json.dumps(log, indent=1) + "\n")
    print(f"wrote {folder}", flush=True)
