"""What methods do on networks that were made for them, beside what others do there.

    python -m experiments own-networks

Some methods ask for a network that was trained in their way (``models.train``): instance-aware
layers for `note`, long-tailed classes for `lsa`, a loss for `itta`, a denoiser for `dda`, and a
network tuned on what that makes for `sda`. Each case is one network on one stream, the clean images
first and then the 15 corruptions at severity 5, without a reset. It writes
``experiments/results/own_networks.jsonl`` and the tables in ``docs/experiments.md``. The same
command goes on where it stopped; ``--again`` measures all anew.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

import corruptions
from experiments.data import ImageSet
from experiments.records import markdown
from experiments.records.rows import Rows
from experiments.run.method_strings import parse_method
from experiments.run.subject import Subject, load_subject
from tta.core.checks import LARGEST, whole_number

__all__ = ["CASES", "ORDERS", "Case", "OwnNetworks", "add_flags", "render"]

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "experiments.md"
RESULTS = ROOT / "experiments" / "results" / "own_networks.jsonl"
MARK = "own networks"  # of the page's generated part
CLEAN, SEVERITY, BATCH_SIZE = "clean", 5, 50
RUN = 10  # images of one class in a row, in the order "runs"
RATIO = 100  # of the most frequent class to the rarest, where shares are not equal


@dataclass(frozen=True)
class Case:
    """Methods on networks and streams.

    Args:
        models: Names for `models.load`.
        orders: Keys of `ORDERS`.
        methods: Method strings.
    """

    models: tuple[str, ...]
    orders: tuple[str, ...]
    methods: tuple[str, ...]


# Chosen of ten settings on the four corruptions that are held out, 200 images of each.
DDA = "dda[steps=3,respacing=100,scale=2,join='entropy_sum']"
SDA = "sda[steps=3,respacing=100,scale=2]"
CASES = {
    "instance-aware layers": Case(
        ("cifar10_resnet20_bn", "cifar10_resnet20_iabn"),
        ("shuffled", "runs"),
        ("source", "bn", "iabn", "note"),
    ),
    "long-tailed classes": Case(
        ("cifar10_resnet20_bn_lt100",),
        ("source shares", "equal shares", "inverted shares"),
        ("source", "lsa", "prior_correction", "tent", "tent+lsa"),
    ),
    "a consistency loss": Case(
        ("cifar10_resnet20_bn_itta",), ("shuffled", "runs"), ("source", "bn", "tent", "itta")
    ),
    "a denoiser": Case(
        ("cifar10_resnet20_bn",),
        ("shuffled",),
        ("source", DDA, DDA.replace("'entropy_sum'", "None")),
    ),
    "a network for the denoiser": Case(
        ("cifar10_resnet20_bn_sda",),
        ("shuffled",),
        ("source", SDA, SDA.replace("]", ",join='entropy_sum']")),
    ),
}  # fmt: skip


def _shuffled(labels: Tensor, count: int, generator: torch.Generator) -> Tensor:
    return torch.randperm(len(labels), generator=generator)[:count]


def _runs(labels: Tensor, count: int, generator: torch.Generator) -> Tensor:
    order = _shuffled(labels, count, generator)
    classes = labels.unique().tolist()
    runs = [run for c in classes for run in order[labels[order] == c].split(RUN)]
    return torch.cat([runs[i] for i in torch.randperm(len(runs), generator=generator)])


def _with_shares(sign: int) -> Callable[[Tensor, int, torch.Generator], Tensor]:
    """Images in random order, of class k ratio^(-k / (C - 1)) as many as of the most frequent."""

    def choose(labels: Tensor, count: int, generator: torch.Generator) -> Tensor:
        order = torch.randperm(len(labels), generator=generator)
        classes = int(labels.max()) + 1
        shares = torch.tensor([float(RATIO) ** (-sign * k / (classes - 1)) for k in range(classes)])
        most = int(torch.bincount(labels).min())
        numbers = min(most, count / float((shares / shares.max()).sum())) * shares / shares.max()
        found = [
            order[labels[order] == k][: max(1, round(float(n)))] for k, n in enumerate(numbers)
        ]
        chosen = torch.cat(found)
        return chosen[torch.randperm(len(chosen), generator=generator)]

    return choose


ORDERS: dict[str, Callable[[Tensor, int, torch.Generator], Tensor]] = {
    "shuffled": _shuffled,
    "runs": _runs,
    "source shares": _with_shares(1),
    "equal shares": _with_shares(0),
    "inverted shares": _with_shares(-1),
}


def add_flags(parser: argparse.ArgumentParser) -> None:
    """Say what ``own-networks`` does and takes."""
    parser.description = __doc__
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    add = parser.add_argument
    add("--cases", nargs="+", choices=list(CASES), default=list(CASES), help="default: all")
    add("--images", type=int, default=500, metavar="N", help="of a domain (default: %(default)s)")
    add("--again", action="store_true", help="measure rows again that are there")
    parser.set_defaults(prepare=lambda args: OwnNetworks(args.cases, args.images, args.again))


class OwnNetworks:
    """Runs the cases.

    Args:
        cases: Keys of `CASES`.
        images: Most of each domain.
        again: Whether rows that are there are measured again.
        results: Where rows are kept.
        page: With the tables.
    """

    def __init__(
        self,
        cases: Sequence[str],
        images: int,
        again: bool = False,
        results: Path = RESULTS,
        page: Path = PAGE,
    ) -> None:
        self.images = whole_number("images", images, 1, LARGEST)
        self.cases, self.again = cases, again
        self.rows, self.page = Rows(results, ("case", "model", "order", "method")), page

    def execute(self) -> Path:
        """Measure what is left, and write the page; returns it."""
        about = {"images": self.images}
        with self.rows.shown_on(self.page, MARK, render):
            self.rows.fill(self._keys(), about, self._measure, self.again)
        return self.page

    def _keys(self) -> Iterator[dict[str, str]]:
        for case in self.cases:
            for model in CASES[case].models:
                for order in CASES[case].orders:
                    for method in CASES[case].methods:
                        yield {"case": case, "model": model, "order": order, "method": method}

    def _measure(self, key: Mapping[str, Any]) -> dict[str, Any]:
        """Percent of wrong predictions by domain."""
        subject, order, text = _subject(key["model"]), key["order"], key["method"]
        clean = subject.clean
        assert isinstance(clean, ImageSet)
        pixels, labels = clean.tensor().float() / 255, torch.as_tensor(np.array(clean.labels))
        found: dict[str, float] = {}
        method = parse_method(text, subject.info.num_classes)
        with method.applied(subject, BATCH_SIZE, 0) as adapter:
            for place, domain in enumerate([CLEAN, *corruptions.list_corruptions()]):
                generator = torch.Generator().manual_seed(place)
                chosen = ORDERS[order](labels, self.images, generator)
                images, truth = pixels[chosen], labels[chosen]
                if domain != CLEAN:
                    images = corruptions.corrupt(images, domain, SEVERITY, seeds=chosen)
                wrong = sum(
                    int((adapter(subject.preprocess(x)).argmax(1) != y).sum())
                    for x, y in zip(images.split(BATCH_SIZE), truth.split(BATCH_SIZE), strict=True)
                )
                found[domain] = round(100 * wrong / len(truth), 2)
        return {"errors": found}


@cache
def _subject(model: str) -> Subject:
    return load_subject(model, "bundled", torch.device("cpu"))


def render(rows: Iterable[Mapping[str, Any]]) -> str:
    """A table for each case."""
    lines: list[str] = []
    rows = list(rows)
    for name, case in CASES.items():
        mine = [row for row in rows if row["case"] == name]
        if not mine:
            continue
        orders = [order for order in case.orders if any(row["order"] == order for row in mine)]
        shown = []
        for model in case.models:
            for method in case.methods:
                cells = [_cell(mine, model, order, method) for order in orders]
                if any(cells):
                    shown.append([markdown.code(model), markdown.code(method), *cells])
        header = ("network", "method", *orders)
        images = " or ".join(f"{n:,}" for n in sorted({row["images"] for row in mine}))
        lines += [
            f"**{name[0].upper()}{name[1:]}**, {images} images of each domain, or as many as "
            "shares leave: error in percent on clean images / mean of the 15 corruptions after "
            "them.",
            "",
            *markdown.table(header, shown, "ll" + "r" * len(orders)),
            "",
        ]
    return markdown.document(lines[:-1]) if lines else ""


def _cell(rows: Sequence[Mapping[str, Any]], model: str, order: str, method: str) -> str:
    for row in rows:
        if (row["model"], row["order"], row["method"]) == (model, order, method):
            shifted = [error for domain, error in row["errors"].items() if domain != CLEAN]
            return f"{row['errors'][CLEAN]:.1f} / {np.mean(shifted):.1f}"
    return ""
