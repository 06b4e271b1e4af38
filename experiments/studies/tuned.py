"""What `tta.tune` gains on this machine, and whether decisions stay as they were.

    python -m experiments tuned

looks for the fastest setting of each recipe, once with float32 kept and once with bfloat16 allowed,
and then serves a stream of corrupted images with the plain setting and with the one that was found,
in turns, in one process. It writes ``experiments/results/tuned.jsonl`` and the table in
``docs/budgets.md``. The same command goes on where it stopped; ``--again`` measures all anew.

A bundled network sees the images that it can classify. One of timm has random weights and sees the
same images, enlarged: it is there for the time that such passes take.
"""

from __future__ import annotations

import argparse
import math
import os
import statistics
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import timm
import torch
import torch.nn.functional as F
from torch import Tensor

import corruptions
import models
import tta
from experiments.data import ImageSet
from experiments.records import markdown
from experiments.records.environment import describe_environment
from experiments.records.rows import Rows
from experiments.run.method_strings import Method, parse_method
from experiments.run.subject import Subject, load_subject
from experiments.studies.device_cost import check_timm
from tta.core.allocator import as_before
from tta.core.checks import number, whole_number

__all__ = ["METHODS", "NETWORKS", "Tuned", "add_flags", "render"]

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "budgets.md"
RESULTS = ROOT / "experiments" / "results" / "tuned.jsonl"
MARK = "tuned"  # of the page's generated part
CPU = torch.device("cpu")
NETWORKS = ("cifar10_resnet20_bn", "resnet18")
METHODS = ("neo", "bn", "alpha_bn", "robust_bn", "unmix_tns", "lame", "tent", "unmix_tns+tent",
           "eata", "sar", "deyo", "roid", "rotta", "cotta")  # fmt: skip
PRECISIONS = {"float32": ("float32",), "bfloat16": ("float32", "bfloat16")}
BATCH, LARGE_BATCH = 64, 8  # images, of a bundled network and of one of timm
TURNS = 2  # of both settings
SEVERITY = 5
KEYS = ("network", "method", "allowed")


def add_flags(parser: argparse.ArgumentParser) -> None:
    """Say what ``tuned`` does and takes."""
    parser.description = __doc__
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    add = parser.add_argument
    add("--networks", nargs="+", metavar="NAME", default=NETWORKS,
        help="bundled ones, or of timm (default: %(default)s)")  # fmt: skip
    add("--methods", nargs="+", metavar="METHOD", default=METHODS, help="default: %(default)s")
    add("--seconds", type=float, default=60.0, metavar="S",
        help="that tune may take (default: %(default)s)")  # fmt: skip
    add("--images", type=int, default=512, metavar="N",
        help="of the stream, on a bundled network (default: %(default)s)")  # fmt: skip
    add("--compile", action="store_true", help="let tune try torch.compile, for minutes each")
    add("--again", action="store_true", help="measure rows again that are there")
    parser.set_defaults(
        prepare=lambda args: Tuned(
            args.networks, args.methods, args.seconds, args.images, args.compile, args.again
        )
    )


class Tuned:
    """Measures recipes with and without what `tta.tune` finds.

    Args:
        networks: Bundled ones, or of timm.
        methods: Method strings.
        seconds: That each search may take.
        images: Of the stream on a bundled network; a network of timm sees a tenth.
        compile: Whether `torch.compile` is tried.
        again: Whether rows that are there are measured again.
        results: Where rows are kept.
        page: With the table.
    """

    def __init__(
        self,
        networks: Sequence[str],
        methods: Sequence[str],
        seconds: float,
        images: int,
        compile: bool = False,
        again: bool = False,
        results: Path = RESULTS,
        page: Path = PAGE,
    ) -> None:
        self.seconds = number("seconds", seconds, 0, 86400)
        self.images = whole_number("images", images, 4 * BATCH, 10**6)
        for method in methods:
            parse_method(method, 10)
        for network in networks:
            if network not in models.list_models():
                check_timm("networks", network)
        self.keys: list[dict[str, Any]] = [
            dict(zip(KEYS, (network, method, allowed), strict=True))
            for network in networks
            for allowed in PRECISIONS
            for method in methods
        ]
        self.compile, self.again, self.page = compile, again, page
        self.rows = Rows(results, KEYS)

    def execute(self) -> Path:
        """Measure what is left, and write the page; returns it."""
        about = {"seconds": self.seconds, "images": self.images, "compile": self.compile}
        with self.rows.shown_on(self.page, MARK, render):
            self.rows.fill(self.keys, about, self._measure, self.again)
        return self.page

    def _measure(self, key: Mapping[str, Any]) -> dict[str, Any]:
        subject, batches, labels = self._shown(key["network"])
        count = len(batches[0])
        method = parse_method(key["method"], subject.info.num_classes)
        start = method.wrap_subject(subject, count, 0)
        recipe = start.config
        start.unwrap()
        setting = tta.tune(
            subject.model, batches[0], self.seconds, recipe=recipe, source=subject.source,
            precisions=PRECISIONS[key["allowed"]], compile=self.compile,
        )  # fmt: skip
        seconds: dict[bool, list[float]] = {False: [], True: []}
        answers: dict[bool, Tensor] = {}
        for _ in range(TURNS):
            for tuned in seconds:
                with as_before():
                    chosen = method if not tuned else _with(method, setting)
                    found, took = _serve(chosen, subject, batches)
                answers[tuned] = found.argmax(1)
                seconds[tuned] += took
        plain, ours = (statistics.median(seconds[tuned]) for tuned in (False, True))
        errors = {tuned: float((answers[tuned] != labels).float().mean()) for tuned in answers}
        return {
            "batch": count,
            "setting": setting.to_dict() | {"speedup": None},
            "plain ms": round(plain * 1e3, 2),
            "speedup": round(plain / ours, 3),
            "equal": round(float((answers[True] == answers[False]).float().mean()), 4),
            "error": [round(100 * errors[tuned], 2) for tuned in (False, True)],
            "threads": torch.get_num_threads(),
            "load": round(os.getloadavg()[0], 1),
            "cpu": describe_environment()["hardware"]["cpu"],
        }

    def _shown(self, name: str) -> tuple[Subject, list[Tensor], Tensor]:
        """A network, batches (B, 3, H, W) as it takes them, and labels (N,)."""
        bundled = name in models.list_models()
        subject = load_subject(name if bundled else NETWORKS[0], "bundled", CPU)
        clean, count = subject.clean, self.images if bundled else max(self.images // 10, 48)
        assert isinstance(clean, ImageSet)
        pixels, labels = clean.tensor()[:count], torch.from_numpy(clean.labels)[:count].long()
        size = BATCH if bundled else LARGE_BATCH
        kinds = corruptions.list_corruptions()
        batches = [
            subject.preprocess(_corrupted(part, kinds[t % len(kinds)]).float() / 255)
            for t, part in enumerate(pixels.split(size))
            if len(part) == size
        ]
        if not bundled:
            torch.manual_seed(0)
            model = timm.create_model(name, num_classes=subject.info.num_classes).eval()
            batches = [F.interpolate(x, (224, 224)) for x in batches]
            shown = [(batches[0], labels[:size])]  # for what methods are made of beforehand
            source = tta.collect_source(model, shown, for_methods=["eata", "neo"])
            subject = replace(subject, name=name, model=model, source=source)
        return subject, batches, labels[: size * len(batches)]


def _corrupted(pixels: Tensor, kind: str) -> Tensor:
    return corruptions.corrupt(pixels, kind, SEVERITY, seeds=torch.arange(len(pixels)))


def _with(method: Method, setting: tta.Setting) -> Method:
    return replace(method, further=method.further | {"setting": setting})


def _serve(
    method: Method, subject: Subject, batches: Sequence[Tensor]
) -> tuple[Tensor, list[float]]:
    """Logits (N, C) of a stream, and the seconds of its calls but the first."""
    with method.applied(subject, len(batches[0]), 0) as adapter:
        adapter(batches[0])  # compiles, and warms up
        adapter.reset()
        found, seconds = [], []
        for x in batches:
            started = time.perf_counter()
            found.append(adapter(x).detach().float())
            seconds.append(time.perf_counter() - started)
    return torch.cat(found), seconds[1:]


def render(rows: Iterable[Mapping[str, Any]]) -> str:
    """A row for each recipe: what is gained, and what changes."""
    rows = list(rows)
    if not rows:
        return ""
    lines = [
        f"On {', '.join(sorted({row['cpu'] for row in rows}))}, two turns after the other in one "
        "process: the median call over that with the setting found, share of equal decisions, and "
        "points by which the error moves. Last row: geometric mean of gains, least share, largest "
        "move.",
        "",
    ]
    for network in dict.fromkeys(row["network"] for row in rows):
        own = [row for row in rows if row["network"] == network]
        first = own[0]
        lines += [f"`{network}`, batches of {first['batch']}, {first['threads']} threads:", ""]
        table = []
        for method in dict.fromkeys(row["method"] for row in own):
            found = {row["allowed"]: row for row in own if row["method"] == method}
            cells = [_cell([found[a]] if a in found else []) for a in PRECISIONS]
            chosen = [_words(found[a]["setting"]) if a in found else "" for a in PRECISIONS]
            plain = next(iter(found.values()))["plain ms"]
            pairs = [part for pair in zip(cells, chosen, strict=True) for part in pair]
            table.append([markdown.code(method), f"{plain:g}", *pairs])
        means = [_cell([row for row in own if row["allowed"] == a]) for a in PRECISIONS]
        table.append(["all", "", *(part for mean in means for part in (mean, ""))])
        header = ("recipe", "plain, ms", "float32", "by", "bfloat16 allowed", "by")
        lines += [*markdown.table(header, table, "lrrlrl"), ""]
    return markdown.document(lines[:-1])


def _cell(rows: Sequence[Mapping[str, Any]]) -> str:
    if not rows:
        return ""
    gain = math.exp(statistics.mean(math.log(row["speedup"]) for row in rows))
    moved = max((row["error"][1] - row["error"][0] for row in rows), key=abs)
    return f"{gain:.2f}, {100 * min(row['equal'] for row in rows):.1f} %, {moved:+.1f}"


def _words(setting: Mapping[str, Any]) -> str:
    """What a setting changes."""
    plain, words = tta.Setting().to_dict(), []
    for name, value in setting.items():
        if name in ("speedup", "difference", "agreement") or value == plain[name]:
            continue
        words.append(
            {"keep_memory": "kept memory", "threads": f"{value} thread"}.get(name, f"{value}")
        )
    return ", ".join(words) or "plain"
