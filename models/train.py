"""Train a bundled CIFAR-10 classifier: ``python -m models.train NAME --data PATH``.

``PATH`` is an ``.npz`` with ``train_images`` (N, 32, 32, 3) uint8, ``train_labels`` (N,), and the
same two for ``test``, or a folder that torchvision's ``CIFAR10`` reads. A checkpoint is written
after every epoch into ``--work``; the same command goes on from it, and since every epoch draws
from a generator seeded by (seed, epoch), an interrupted training ends where an uninterrupted one
would. At the end the weights, the source artefacts and the training log go to
``models/weights/NAME``. The test images are used to report accuracy only; no epoch is chosen by
them.

Some networks are made for one method, and keep the artefacts of that one alone:

* ``cifar10_resnet20_iabn`` begins with the weights of ``cifar10_resnet20_bn``, whose layers become
  instance-aware (NOTE).
* ``NAME --long-tailed 100`` gives ``NAME_lt100``, which sees 5000 * 100^(-k / 9) images of class k
  (LSA).
* ``NAME --itta`` trains a finished network further together with ITTA's consistency loss, see
  `models.train_itta`. That gives ``NAME_itta``.
* ``NAME --sda`` trains a finished network further on what the diffusion model makes of training
  images, see `models.train_sda`. That gives ``NAME_sda``.
* ``NAME --artefacts`` trains nothing: it adds to the artefacts of a network that is there what
  methods need that came later.
* ``cifar10_denoiser`` is no classifier, see `models.train_denoiser` (DDA, SDA).
"""

from __future__ import annotations

import argparse
import json
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor, nn

import tta
from models import train_denoiser, train_itta, train_sda
from models.artefacts import WIDE, add, batches, collect, save_half, swag
from models.bundled import (
    BUNDLED,
    FOLDER,
    IABN,
    ITTA,
    LONG_TAILED,
    SDA,
    VARIANTS,
    base,
    builder,
    give_weights,
)
from models.checkpoints import keep
from models.denoiser import DENOISER
from models.load import load
from models.training_images import accuracy, augmented, padded, read_cifar10
from tta.core.files import replacing

__all__ = ["main", "train"]


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """How one architecture is trained; the learning rate rises for a share, then falls to 0."""

    optimizer: str
    lr: float
    weight_decay: float
    epochs: int
    batch_size: int = 128
    warmup: float = 0.2  # share of all steps
    restart: tuple[int, float] | None = None  # a second cycle: its epochs and peak lr
    average: bool = False  # ship the mean of the SWAG snapshots (stochastic weight averaging)
    channels_last: bool = False
    begin: str | None = None  # with the weights of this bundled network
    bfloat16: bool = True  # autocast; on processors with bf16 units this more than doubles speed


MOST_TAILED = 5000  # CIFAR-10's training images of a class
RECIPES = {
    "cifar10_resnet20_bn": Recipe(
        optimizer="sgd", lr=0.2, weight_decay=5e-4, epochs=40, channels_last=True
    ),
    "cifar10_resnet20_gn": Recipe(optimizer="sgd", lr=0.1, weight_decay=5e-4, epochs=32),
    "cifar10_convvit_ln": Recipe(
        optimizer="adamw",
        lr=1.5e-3,
        weight_decay=0.05,
        epochs=22,
        # Both were added when the first cycle ended at 79 % on the test images; with them, 80.
        restart=(6, 7e-4),
        average=True,
        bfloat16=False,
    ),
    IABN: Recipe(
        optimizer="sgd", lr=0.02, weight_decay=5e-4, epochs=4, begin="cifar10_resnet20_bn"
    ),
}


def train(name: str, data: dict[str, Tensor], work: Path, epochs: int | None, seed: int) -> None:
    """Train ``name`` with its recipe, going on from ``work/<name>.pt`` if that is there."""
    recipe = RECIPES[str(base(name))]
    cycles = [(epochs or recipe.epochs, recipe.lr)]
    if epochs is None and recipe.restart is not None:
        cycles.append(recipe.restart)
    epochs = sum(length for length, _ in cycles)
    torch.manual_seed(seed)
    model = builder(name)()
    if recipe.begin is not None:
        give_weights(model, recipe.begin)
    if recipe.channels_last:
        model = model.to(memory_format=torch.channels_last)
    if recipe.optimizer == "sgd":
        optimizer: torch.optim.Optimizer = torch.optim.SGD(
            model.parameters(),
            lr=recipe.lr,
            momentum=0.9,
            nesterov=True,
            weight_decay=recipe.weight_decay,
        )
    else:
        decayed = [p for p in model.parameters() if p.ndim > 1]
        others = [p for p in model.parameters() if p.ndim <= 1]
        groups = [{"params": decayed}, {"params": others, "weight_decay": 0.0}]
        optimizer = torch.optim.AdamW(groups, lr=recipe.lr, weight_decay=recipe.weight_decay)
    images, labels = data["train_images"], data["train_labels"]
    bordered = padded(images)
    steps_per_epoch = len(images) // recipe.batch_size
    starts = {0: cycles[0], cycles[0][0]: cycles[-1]}  # first epoch of each cycle
    scheduler = _one_cycle(optimizer, recipe, cycles[0], steps_per_epoch)
    checkpoint = work / f"{name}.pt"
    log = {"name": name, "seed": seed, "epochs": epochs, "seconds": 0.0, "history": []}
    if checkpoint.exists():
        saved = torch.load(checkpoint, weights_only=True)
        model.load_state_dict(saved["model"])
        log = json.loads(saved["log"]) | {"epochs": epochs}
        if len(log["history"]) > cycles[0][0]:
            scheduler = _one_cycle(optimizer, recipe, cycles[-1], steps_per_epoch)
        optimizer.load_state_dict(saved["optimizer"])  # after the schedule, which sets the lr
        scheduler.load_state_dict(saved["scheduler"])

    for epoch in range(len(log["history"]), epochs):
        started = time.perf_counter()
        if epoch > 0 and epoch in starts:
            scheduler = _one_cycle(optimizer, recipe, starts[epoch], steps_per_epoch)
        generator = torch.Generator().manual_seed(seed * 1000 + epoch)
        order = torch.randperm(len(images), generator=generator)
        model.train()
        running = 0.0
        for step in range(steps_per_epoch):
            index = order[step * recipe.batch_size : (step + 1) * recipe.batch_size]
            x = augmented(bordered, index, generator)
            if not recipe.channels_last:
                x = x.contiguous()
            with torch.autocast("cpu", dtype=torch.bfloat16, enabled=recipe.bfloat16):
                loss = F.cross_entropy(model(x), labels[index])
            optimizer.zero_grad()
            loss.backward()
            if recipe.optimizer == "adamw":
                nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            scheduler.step()
            running += float(loss.detach())
        log["seconds"] += time.perf_counter() - started
        model.eval()
        row = {
            "epoch": epoch + 1,
            "loss": round(running / steps_per_epoch, 4),
            "test_accuracy": accuracy(model, data["test_images"], data["test_labels"]),
        }
        moved = {"model": model, "optimizer": optimizer, "scheduler": scheduler}
        keep(checkpoint, log, row, **{key: part.state_dict() for key, part in moved.items()})


def _one_cycle(
    optimizer: torch.optim.Optimizer, recipe: Recipe, cycle: tuple[int, float], steps: int
) -> torch.optim.lr_scheduler.OneCycleLR:
    """Schedule the learning rate over one cycle of (epochs, peak): up, then down to almost 0."""
    return torch.optim.lr_scheduler.OneCycleLR(
        optimizer,
        cycle[1],
        total_steps=cycle[0] * steps,
        pct_start=recipe.warmup,
        cycle_momentum=False,
        anneal_strategy="linear" if recipe.optimizer == "sgd" else "cos",
    )


def long_tailed(data: dict[str, Tensor], ratio: int) -> dict[str, Tensor]:
    """The data with the first 5000 * ratio^(-k / 9) training images of class k, in their order."""
    images, labels = data["train_images"], data["train_labels"]
    places = [torch.nonzero(labels == k).flatten() for k in range(int(labels.max()) + 1)]
    last = len(places) - 1
    kept = [p[: round(len(p) * ratio ** (-k / last))] for k, p in enumerate(places)]
    index = torch.cat(kept).sort().values
    return data | {"train_images": images[index], "train_labels": labels[index]}


def export(name: str, data: dict[str, Tensor], work: Path, command: str) -> None:
    """Write weights in half precision, source artefacts and the training log of a finished run."""
    saved = torch.load(work / f"{name}.pt", weights_only=True)
    recipe = RECIPES[str(base(name))]
    log = json.loads(saved["log"]) | {"command": command, "averaged": recipe.average}
    folder = FOLDER / name
    folder.mkdir(parents=True, exist_ok=True)
    if name in BUNDLED:
        _export_whole(name, saved["model"], data, work, log)
    else:
        source = tta.SourceStatistics(consistency=saved.get("consistency"))
        if LONG_TAILED in name:
            images, labels = data["train_images"], data["train_labels"]
            loader = batches(images, labels, 200, torch.arange(len(images)))
            source = tta.collect_source(_rounded(name, saved["model"]), loader, ["lsa"])
        source.save(folder / "source.safetensors")
        save_half(saved["model"], folder / "weights.safetensors")  # last: it can be loaded now
    with replacing(folder / "training.json") as part:
        part.write_text(json.dumps(log, indent=1) + "\n")
    print(f"wrote {folder}", flush=True)


def _export_whole(
    name: str, weights: dict[str, Tensor], data: dict[str, Tensor], work: Path, log: dict[str, Any]
) -> None:
    """Write weights, and artefacts for all methods."""
    recipe = RECIPES[name]
    folder, scratch = FOLDER / name, work / f"{name}-swag"
    scratch.mkdir(exist_ok=True)
    images, labels = data["train_images"], data["train_labels"]
    posterior = swag(_rounded(name, weights), images, labels, scratch, log["seed"], recipe.bfloat16)
    weights = weights | (posterior[0] if recipe.average else {})
    save_half(weights, folder / "weights.safetensors")
    # Artefacts are those of the weights as stored, which half precision has rounded.
    source = collect(_rounded(name, weights), images, labels, log["seed"])
    source.posterior_mean, source.posterior_variance = posterior
    source.save(folder / "source.safetensors")
    tensors = load_file(str(folder / "source.safetensors"))
    save_half(tensors, folder / "source.safetensors", WIDE)


def _rounded(name: str, weights: dict[str, Tensor]) -> nn.Module:
    """The model in eval mode with weights as half precision stores them."""
    model = builder(name)()
    model.load_state_dict(
        {k: v.half().float() if v.is_floating_point() else v for k, v in weights.items()}
    )
    return model.eval()


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m models.train",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("name", choices=[*sorted(BUNDLED | VARIANTS), DENOISER])
    parser.add_argument("--data", required=True, help=".npz file or torchvision CIFAR-10 folder")
    parser.add_argument("--work", type=Path, default=Path("runs/train"), help="checkpoints go here")
    parser.add_argument("--epochs", type=int, help="default: the recipe's")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, help="torch threads (default: all cores)")
    parser.add_argument("--itta", action="store_true", help="train NAME_itta from what NAME is")
    parser.add_argument("--itta-epochs", type=int, default=3, help="of it (default: %(default)s)")
    parser.add_argument("--sda", action="store_true", help="train NAME_sda from what NAME is")
    parser.add_argument(
        "--sda-epochs", type=int, default=train_sda.EPOCHS, help="of it (default: %(default)s)"
    )
    parser.add_argument(
        "--long-tailed", type=int, metavar="RATIO", help="train NAME_ltRATIO on such classes"
    )
    parser.add_argument(
        "--steps", type=int, default=train_denoiser.STEPS, help="of the denoiser (%(default)s)"
    )
    parser.add_argument(
        "--artefacts", action="store_true", help="train nothing; add what the artefacts lack"
    )
    args = parser.parse_args(argv)
    if args.threads:
        torch.set_num_threads(args.threads)
    for flag in ("itta_epochs", "sda_epochs", "long_tailed", "steps"):
        value = getattr(args, flag)
        if value is not None and value < 1:
            parser.error(f"`--{flag.replace('_', '-')}` must be 1 or more, got {value}: raise it")
    if (args.long_tailed or 1) > MOST_TAILED:
        parser.error(
            f"`--long-tailed` must be at most {MOST_TAILED}, got {args.long_tailed}: with more, a "
            "class has no image"
        )
    stages = [args.itta, args.sda, bool(args.long_tailed), args.artefacts]
    if args.name not in BUNDLED and any(stages):
        parser.error(
            f"`name` must be one of {', '.join(BUNDLED)} with --itta, --sda, --long-tailed or "
            f"--artefacts, got {args.name}: leave the flag out"
        )
    if sum(stages) > 1:
        parser.error(
            "`--itta` must be without --sda, --long-tailed and --artefacts, and each of them "
            "without the others, got several: leave all but one out"
        )
    if args.itta and (refused := train_itta.refusal(args.name)):
        parser.error(refused)
    args.work.mkdir(parents=True, exist_ok=True)
    data, command = read_cifar10(args.data), f"python -m models.train {args.name}"
    images = data["train_images"]
    if args.name == DENOISER:
        command += f" --steps {args.steps} --seed {args.seed}"
        train_denoiser.train(images, data["test_images"], args.work, args.steps, args.seed)
        train_denoiser.export(args.work, command)
        return
    name = args.name
    if args.artefacts:
        path = FOLDER / name / "source.safetensors"
        new = add(load(name)[0], images, data["train_labels"], args.seed, path)
        print(f"{path}: {', '.join(new) or 'nothing'} added", flush=True)
        return
    if args.long_tailed:
        name += f"{LONG_TAILED}{args.long_tailed}"
        data = long_tailed(data, args.long_tailed)
        command += f" --long-tailed {args.long_tailed}"
    if not (args.itta or args.sda):
        train(name, data, args.work, args.epochs, args.seed)
        export(name, data, args.work, f"{command} --seed {args.seed}")
        return
    if (args.work / f"{name}.pt").exists():  # perhaps of a training that was cut off
        train(name, data, args.work, args.epochs, args.seed)
    stage, epochs, ending = train_itta.train, args.itta_epochs, ITTA
    if args.sda:
        stage, epochs, ending = train_sda.train, args.sda_epochs, SDA
    stage(name, data, args.work, epochs, args.seed, RECIPES[name].batch_size)
    command += f" --{ending[1:]} --{ending[1:]}-epochs {epochs} --seed {args.seed}"
    export(f"{name}{ending}", data, args.work, command)


if __name__ == "__main__":
    main()
