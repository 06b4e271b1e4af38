"""Which component for which situation: the tables of ``docs/which_method.md``.

What a component needs is asked of the component itself: networks are offered to it and it is
wrapped without source data. For which streams it is and is not says the first line of its note,

    <!-- for: correlated, single; not for: shuffled -->

with words of `SITUATIONS`, from what the note says below; figures are those of the record.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import timm
from torch import nn

import tta
from models.bundled import BUNDLED
from tta.core.registry import component
from tta.core.update import ForwardUpdate, Update

__all__ = ["SITUATIONS", "Needs", "needs", "needs_rows", "split_note", "stream_rows"]

NOTES = Path(__file__).parent / "notes" / "methods"
# What a stream is like, and the stream of the record that is so.
SITUATIONS = {
    "unknown": ("you know nothing of it", None),
    "shuffled": ("shuffled classes, one domain for a while", "continual"),
    "mixed": ("several domains in a batch", "mixed"),
    "correlated": ("neighbours share a class", "dirichlet"),
    "skewed": ("a few classes dominate at a time", "imbalance"),
    "single": ("single images, batches of a few", "single"),
    "long": ("very long, or domains come back", "recurring"),
}
NETWORKS: dict[str, Callable[[], nn.Module]] = {
    "BatchNorm": BUNDLED["cifar10_resnet20_bn"],
    "GroupNorm": BUNDLED["cifar10_resnet20_gn"],
    "LayerNorm": BUNDLED["cifar10_convvit_ln"],
    "a class token": lambda: timm.create_model("test_vit", num_classes=10),
}
ONLY = {
    ("BatchNorm",): "networks with BatchNorm alone",
    ("BatchNorm", "GroupNorm"): "networks with stages of convolutions alone",
    ("a class token",): "vision transformers with a class token alone",
}
MARK = re.compile(r"\A<!-- for: ?(.*?); not for: ?(.*?) -->\n+")

Record = Mapping[tuple[str, str, str], float]


@dataclass(frozen=True)
class Needs:
    """What a component must have.

    Args:
        networks: Those of `NETWORKS` that it takes.
        source: Whether it is refused without source data or artefacts.
        given: Whether it needs a module that the caller alone has.
        gradient: Whether it back-propagates through the model.
    """

    networks: tuple[str, ...]
    source: bool
    given: bool
    gradient: bool


@cache
def needs() -> dict[str, Needs]:
    """What every component must have, by name."""
    nets = {name: make().eval() for name, make in NETWORKS.items()}
    found = {}
    for name in tta.list_methods():
        cls = component(name)
        suited = [key for key, net in nets.items() if cls.suits(net)]
        tried = suited[:1] if len(suited) == len(nets) else suited
        refusals = {key: _refusal(nets[key], name) for key in tried}
        source = any(text.startswith("`source`") for text in refusals.values())
        refused = {key for key, text in refusals.items() if text.startswith("`model`")}
        learns = issubclass(cls, Update) and not issubclass(cls, ForwardUpdate)
        found[name] = Needs(
            tuple(key for key in suited if key not in refused),
            source and not cls.needs_given,
            cls.needs_given,
            learns or cls.takes_gradient,
        )
    return found


def _refusal(net: nn.Module, name: str) -> str:
    """Why a network cannot be wrapped with a component and nothing else; empty where it can."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            tta.wrap(net, name, mean=(0.0,), std=(1.0,)).unwrap()
        except ValueError as error:
            return str(error)
    return ""


def split_note(text: str) -> tuple[str, list[str], list[str]]:
    """A note without its first line, and the situations that it is and is not for.

    Raises:
        ValueError: Where the line names what `SITUATIONS` does not have, or something twice.
    """
    mark = MARK.match(text)
    if mark is None:
        return text, [], []
    lists = [[word for word in group.split(", ") if word] for group in mark.groups()]
    unknown = {word for words in lists for word in words} - set(SITUATIONS)
    if unknown or set(lists[0]) & set(lists[1]):
        raise ValueError(f"a note must name situations, each once, got {mark[0].strip()}")
    return text[mark.end() :], lists[0], lists[1]


def needs_rows() -> list[tuple[str, str]]:
    """(what you have or have not, components) for each need."""
    found = needs()

    def those(chosen: Callable[[Needs], bool]) -> str:
        return _links(name for name, need in found.items() if chosen(need))

    every = tuple(NETWORKS)
    rows = [
        ("no gradient of the model", those(lambda n: not n.gradient)),
        ("gradients", those(lambda n: n.gradient)),
        ("nothing of the source", those(lambda n: not n.source and not n.given)),
        ("source images, or artefacts of them", those(lambda n: n.source)),
        ("what you alone have: a denoiser, a prompt", those(lambda n: n.given)),
        ("any network", those(lambda n: n.networks == every)),
    ]
    kinds = dict.fromkeys(n.networks for n in found.values() if n.networks != every)
    for kind in sorted(kinds):
        words = ONLY.get(kind, f"networks with {' or '.join(kind)} alone")
        rows.append((words, those(lambda n, kind=kind: n.networks == kind)))
    return [row for row in rows if row[1]]


def stream_rows(record: Record, models: Mapping[str, str]) -> list[tuple[str, str, str]]:
    """(stream, components for it, components not for it) for each situation.

    Args:
        record: Mean error in % by model, stream and method.
        models: Names of the models, in the order of the figures.
    """
    notes = {name: split_note((NOTES / f"{name}.md").read_text()) for name in tta.list_methods()}
    rows = []
    for key, (words, stream) in SITUATIONS.items():
        cells = [
            ", ".join(_link(name) + _gains(name, stream, record, models) for name in names)
            for names in (
                [name for name, note in notes.items() if key in note[1]],
                [name for name, note in notes.items() if key in note[2]],
            )
        ]
        rows.append((words, *cells))
    return rows


def _gains(name: str, stream: str | None, record: Record, models: Mapping[str, str]) -> str:
    """Differences to source on each network, in points; empty without figures."""
    gains: list[float | None] = [None] * len(models)
    for i, model in enumerate(models):
        with suppress(KeyError):
            gains[i] = record[model, str(stream), name] - record[model, str(stream), "source"]
    if name == "source" or all(gain is None for gain in gains):
        return ""
    shown = ("-" if gain is None else f"{round(gain, 1) + 0.0:+.1f}" for gain in gains)
    return f" ({', '.join(shown)})"


def _link(name: str) -> str:
    return f"[`{name}`](methods/{name}.md)"


def _links(names: Iterator[Any]) -> str:
    return ", ".join(map(_link, names))
