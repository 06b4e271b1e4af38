"""What an upload budget buys: error of a device against the share of images that it sends.

    python -m experiments cloud

A bundled model is the device and another the teacher. The stream goes through a few corruptions
without a reset. Every budget is run with a prompt alone and with norm layers sent down, both
beside the device alone, the device with ``bn`` and with ``tent`` of its own, and the teacher on
everything. It writes ``experiments/results/cloud.jsonl``, a line a run, the picture
``docs/images/cloud-budget.png`` and the table in ``docs/cloud.md``; the same command goes on where
it stopped.
"""

from __future__ import annotations

import argparse
import json
import textwrap
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import corruptions
import models
import tta
from experiments.data.bundled import read_bundled
from experiments.records import markdown
from experiments.records.environment import describe_environment
from experiments.report.style import make_figure, styled, tidy, with_legend, with_title
from experiments.sweep.benchmark import bundled_models
from tta.core.checks import fraction, shown, whole_number
from tta.runtime.cloud import Cloud, Device

__all__ = ["CloudStudy", "Setting", "add_flags", "draw", "render"]

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "cloud.md"
FIGURES = ROOT / "experiments" / "results" / "cloud.jsonl"
PICTURE = ROOT / "docs" / "images" / "cloud-budget.png"
MARK = "cloud"
DOMAINS = ("gaussian_noise", "fog", "contrast", "jpeg_compression")
BUDGETS = (0.1, 0.3, 1.0)
BATCH = 50
# What comes down, and slots of the device that it needs besides the prompt.
DOWNLINKS: dict[str, dict[str, Any]] = {
    "prompt": {},
    "norms": {"update": "tent.cifar10", "norm": "source"},
}
COLOURS = {"prompt": "#56B4E9", "norms": "#D55E00"}
ALONE = {"device alone": "source", "device with bn": "bn", "device with tent": "tent.cifar10"}
TEACHER = "teacher on everything"


@dataclass(frozen=True, kw_only=True)
class Setting:
    """What is run.

    Args:
        device: A bundled model.
        teacher: Another.
        images: Of each domain.
        domains: Corruptions at severity 5.
        budgets: Shares of the images.
    """

    device: str = "cifar10_resnet20_bn"
    teacher: str = "cifar10_resnet20_gn"
    images: int = 1000
    domains: tuple[str, ...] = DOMAINS
    budgets: tuple[float, ...] = BUDGETS


def add_flags(parser: argparse.ArgumentParser) -> None:
    """Say what ``cloud`` does and takes."""
    parser.description = __doc__
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    add, default = parser.add_argument, Setting()
    for name in ("device", "teacher"):
        add(f"--{name}", choices=bundled_models(), default=getattr(default, name))
    add("--images", type=int, default=default.images, metavar="N", help="of each domain, to 2,000")
    add("--domains", nargs="+", default=DOMAINS, metavar="NAME")
    add("--budgets", nargs="+", type=float, default=BUDGETS, metavar="SHARE")
    parser.set_defaults(
        prepare=lambda args: CloudStudy(
            Setting(
                device=args.device,
                teacher=args.teacher,
                images=whole_number("images", args.images, BATCH, 2000),
                domains=tuple(args.domains),
                budgets=tuple(fraction("budgets", b) for b in args.budgets),
            )
        )
    )


class CloudStudy:
    """Runs what is not in the results yet, and writes page and picture.

    Args:
        setting: What is run.
    """

    def __init__(self, setting: Setting) -> None:
        unknown = set(setting.domains) - set(corruptions.list_corruptions(extra=True))
        if unknown:
            got = sorted(unknown)[0]
            raise ValueError(
                f"`domains` must be corruptions, got {shown(got)}: see docs/corruptions.md."
            )
        self.setting = setting
        self._data: list[tuple[Tensor, Tensor]] = []

    def execute(self) -> Path:
        """Run, and write; returns the page."""
        setting = self.setting
        told = vars(setting) | {"domains": list(setting.domains)}
        told = {key: told[key] for key in ("device", "teacher", "images", "domains")}
        found = _read()
        rows = [row for row in found if {key: row[key] for key in told} == told]
        if rows != found:  # some are of another setting
            FIGURES.unlink()
        done = {(row["run"], row["budget"]) for row in rows}
        before = torch.get_num_threads()
        torch.set_num_threads(1)  # or sums are in another order, and other images near the budget
        try:
            for run, budget, work in self._runs():
                if (run, budget) in done:
                    continue
                begun = time.perf_counter()
                row = {"run": run, "budget": budget} | work()
                row |= {"seconds": round(time.perf_counter() - begun, 1)} | told
                with FIGURES.open("a") as file:
                    file.write(json.dumps(row | describe_environment()) + "\n")
                print(f"{run}, budget {budget}: {100 * row['error']:.1f} %", flush=True)
        finally:
            torch.set_num_threads(before)
        rows = _read()
        draw(rows, PICTURE)
        markdown.write_between(PAGE, MARK, render(rows))
        print(f"{FIGURES}\n{PICTURE}\n{PAGE}")
        return PAGE

    def _runs(self) -> Iterator[tuple[str, float | None, Callable[[], dict[str, Any]]]]:
        """What is run under which name and budget."""
        setting = self.setting
        yield TEACHER, None, lambda: self._alone(models.load(setting.teacher)[0])
        for name, method in ALONE.items():
            yield name, None, lambda m=method: self._alone(self._wrapped(setting.device, m))
        for downlink in DOWNLINKS:
            for budget in sorted(setting.budgets):
                yield downlink, budget, lambda d=downlink, b=budget: self._joined(d, b)

    def _wrapped(self, name: str, recipe: str | None = None, **slots: Any) -> tta.Adapter:
        model, info = models.load(name)
        return tta.wrap(model, recipe, mean=info.mean, std=info.std, **slots)

    def _stream(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Batches of pixels and labels, the same at each run."""
        setting = self.setting
        if not self._data:
            data = read_bundled()
            order = torch.randperm(len(data), generator=torch.Generator().manual_seed(0))
            order = order[: setting.images]
            pixels = torch.from_numpy(data.images).permute(0, 3, 1, 2)[order].float() / 255
            labels = torch.from_numpy(data.labels)[order]
            for number, domain in enumerate(setting.domains):
                generator = torch.Generator().manual_seed(number)
                seen = corruptions.corrupt(pixels, domain, 5, generator=generator)
                self._data += zip(seen.split(BATCH), labels.split(BATCH), strict=True)
        yield from self._data

    @torch.no_grad()
    def _alone(self, model: Callable[[Tensor], Tensor]) -> dict[str, Any]:
        wrong = [int((model(x).argmax(1) != y).sum()) for x, y in self._stream()]
        return self._errors(wrong)

    def _errors(self, wrong: Sequence[int]) -> dict[str, Any]:
        """Of the stream, and of each domain."""
        seen, domains = sum(len(y) for _, y in self._stream()), self.setting.domains
        each = len(wrong) // len(domains)
        parts = {
            domain: sum(wrong[i * each : (i + 1) * each]) * len(domains) / seen
            for i, domain in enumerate(domains)
        }
        return {"error": sum(wrong) / seen, "errors": parts}

    @torch.no_grad()
    def _joined(self, downlink: str, budget: float) -> dict[str, Any]:
        """The device with a cloud in the same process."""
        setting = self.setting
        model, info = models.load(setting.device)
        teacher = models.load(setting.teacher)[0]
        cloud = Cloud(model, teacher, downlink=downlink, source=info.source)
        slots = DOWNLINKS[downlink]
        adapter = self._wrapped(setting.device, input="prompt", **slots)
        adapter.freeze()  # what it has of its own is set by the cloud alone
        device, wrong, taught = Device(adapter, cloud, budget), [], [0, 0]
        for x, y in self._stream():
            wrong.append(int((device(x).argmax(1) != y).sum()))
            rows = device.report.chosen
            if bool(rows.any()):
                taught[0] += int((teacher(x[rows]).argmax(1) != y[rows]).sum())
                taught[1] += int(rows.sum())
        return self._errors(wrong) | {
            "counts": device.counts,
            "up": device.bytes.up,
            "down": device.bytes.down,
            "teacher_error": taught[0] / max(1, taught[1]),
        }


def _read() -> list[dict[str, Any]]:
    """The committed rows."""
    lines = FIGURES.read_text().splitlines() if FIGURES.is_file() else []
    return [json.loads(line) for line in lines]


def _about(rows: Sequence[Mapping[str, Any]]) -> str:
    first = rows[0]
    return (
        f"{', '.join(first['domains'])} at severity 5, one after the other, {first['images']:,} "
        f"images each, batches of {BATCH}; device {first['device']}, teacher {first['teacher']}"
    )


@styled
def draw(rows: Sequence[Mapping[str, Any]], path: Path) -> None:
    """A curve for each downlink over the budget, and a line for each model alone.

    Args:
        rows: Of the results.
        path: Where the PNG goes.
    """
    figure, axes = make_figure(4.6)
    lines = {TEACHER: ":", "device alone": "-", "device with tent": "--"}
    start = next(row["error"] for row in rows if row["run"] == "device alone")
    for run, style in lines.items():
        error = next(row["error"] for row in rows if row["run"] == run)
        axes.axhline(100 * error, color="#000000", linestyle=style, linewidth=1.3, label=run)
    markers = dict(zip(DOWNLINKS, "os", strict=True))
    for downlink, colour in COLOURS.items():
        own = sorted((r["budget"], r["error"]) for r in rows if r["run"] == downlink)
        own = [(0.0, start), *own]
        axes.plot(
            [100 * budget for budget, _ in own],
            [100 * error for _, error in own],
            color=colour, marker=markers[downlink], markeredgecolor="white", markersize=8,
            linewidth=2, label=f"device and cloud, {downlink} sent down",
        )  # fmt: skip
    axes.set_xticks([0, *sorted({100 * r["budget"] for r in rows if r["budget"] is not None})])
    axes.set_xlim(0, 101)
    axes.set_ylim(0, 1.15 * max(100 * row["error"] for row in rows))
    axes.set_xlabel("budget: images that may be sent (%)")
    tidy(axes, "both")
    about = textwrap.fill(_about(rows), 120)
    with_title(figure, f"Error against upload budget\n{about}", "error (%)")
    with_legend(figure, axes)
    figure.savefig(path)


def render(rows: Sequence[Mapping[str, Any]]) -> str:
    """The table.

    Args:
        rows: Of the results.
    """
    header = (
        "run", "budget, %", "error, %", *rows[0]["domains"], "updates", "MB up", "kB down",
        "teacher's error on uploads, %",
    )  # fmt: skip
    cells = []
    for row in rows:
        errors = [f"{100 * e:.1f}" for e in (row["error"], *row["errors"].values())]
        if row["budget"] is None:
            cells.append([row["run"], "", *errors, "", "", "", ""])
            continue
        updates, up, down = row["counts"]["updates"], row["up"] / 1e6, row["down"] / 1e3
        more = [str(updates), f"{up:.1f}", f"{down:.0f}", f"{100 * row['teacher_error']:.1f}"]
        name = f"{markdown.code(row['run'])} sent down"
        cells.append([name, f"{100 * row['budget']:g}", *errors, *more])
    picture = markdown.image("Error against upload budget", f"images/{PICTURE.name}")
    table = markdown.table(header, cells, "l" + "r" * (len(header) - 1))
    return markdown.document([f"{_about(rows)}:", "", picture, "", *table])
