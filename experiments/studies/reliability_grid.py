"""Which cells ``python -m experiments reliability`` runs: parts, streams, methods, sizes, seeds.

A cell is one method on one stream with one model, batch size and seed. The model without adaptation
sees the same images in the same order, and so does, for a guarded method, the same one without its
guard.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import tta
from experiments.records.config import StreamConfig
from experiments.sweep.benchmark import DOMAINS, EXPENSIVE, STREAMS, all_methods, bundled_models
from tta.core.registry import component
from tta.core.update import Update
from tta.runtime.method_strings import PLUS

__all__ = [
    "GRIDS",
    "NETWORK",
    "PARTS",
    "TUNED",
    "Cell",
    "Choice",
    "Grid",
    "base",
    "cells",
    "stream_of",
]

# What guards and recipes were designed on. All other streams and models were kept out of it.
TUNED: dict[str, tuple[str, ...]] = {
    "streams": (
        "continual",
        "dirichlet",
        "single",
        "mixed",
        "recurring",
        "recurring_iid",
        "recurring_correlated",
        "class_sorted",
        "clean",
        "frozen_camera",
    ),
    "models": tuple(bundled_models()),
}

PARTS = {
    1: "every update on domains that come back, with and without its guard",
    2: "every update with its guard on the streams of the record",
    3: "the recipe without knowledge of the stream",
    4: "after bad frames, a frozen camera, day and night, one class for an hour",
    5: "a network and photographs of ImageNet",
    6: "cost of a guard that does nothing",
}
RECIPE = "auto"  # brings its own guard
SEEDS = {RECIPE: 3, "tent": 3, "eta": 3, "sar": 3, "roid": 3, "rotta": 3}  # others have one
PHOTO_METHODS = ("tent", "eata", "rotta")
COSTED = ("tent", "eata")
NETWORK = "tf_efficientnet_lite0"  # of part 5
SMALL_BATCHES = {1: 100, 4: 200}  # images of each domain where batches are that small
SEVERITIES = (3, 5)
FEW = 200  # images of a domain, of ten classes; of fewer, shorter chunks of a class are made
PHOTO_DOMAINS = ("gaussian_noise", "defocus_blur", "fog", "contrast", "jpeg_compression")


def _stream(name: str, scenario: str, **fields: Any) -> StreamConfig:
    return StreamConfig(
        **{"name": name, "scenario": scenario, "domains": DOMAINS, "images": 500} | fields
    )


def _visits(name: str, **options: Any) -> StreamConfig:
    return _stream(name, "recurring", images=50, options={"visits": 20, **options})


RECURRING = {
    s.name: s
    for s in (_visits("recurring_iid", arrange="shuffled"), _visits("recurring_correlated"))
}
RECORDED = {name: entry.stream for name, entry in STREAMS.items()}
FURTHER = {
    s.name: s
    for s in (
        _stream("class_sorted", "sorted"),
        _stream("markov", "markov"),
        _stream("long_tailed", "long_tailed"),
        _stream("label_shift", "label_shift"),
        _stream("clean", "continual", domains=("clean",), images=2000),
    )
}
# What happens between a calm stream before and one after; `reliability_episodes` makes them.
EPISODES = {
    s.name: s
    for s in (
        _stream("bad_frames", "continual", domains=("snow",)),
        _stream("frozen_camera", "continual", domains=("snow",)),
        _stream(
            "day_and_night",
            "recurring",
            domains=("brightness", "contrast"),
            options={"visits": 5, "arrange": "shuffled"},
        ),
        _stream("one_class", "continual", domains=("snow",)),
    )
}
PHOTOS = {
    f"{name}_severity_{severity}": _stream(
        f"{name}_severity_{severity}", scenario, severity=severity, images=None, options=options
    )
    for severity in SEVERITIES
    for name, scenario, options in (
        ("photos_iid", "continual", {}),
        # One photograph of each class: those of all domains are pooled before they are sorted.
        ("photos_sorted", "sorted", {"schedule": "pooled"}),
    )
}
COST = {"calm": _stream("calm", "continual", domains=("clean",))}
BY_NAME = RECURRING | RECORDED | FURTHER | EPISODES | PHOTOS | COST


@dataclass(frozen=True, kw_only=True)
class Grid:
    """How much is run.

    Args:
        visits: Of all domains, in part 1.
        images: Of each domain and visit in part 1.
        few: The same for methods of many forward passes, or that replay source images.
        share: Of the images that each stream of parts 2 to 4 has of a domain, at least 10.
        few_images: Most images of a domain in part 2 for methods of many passes; ``few`` where
            domains come again and again.
        seeds: Most seeds of a method.
        all_seeded: Give every method all seeds.
        photos: Most photographs in part 5.
        photo_domains: Its corruptions; empty for all.
        rounds: Of part 6.
    """

    visits: int = 20
    images: int = 50
    few: int = 20
    share: float = 1.0
    few_images: int = 100
    seeds: int = 3
    all_seeded: bool = False
    photos: int = 60
    photo_domains: tuple[str, ...] = PHOTO_DOMAINS
    rounds: int = 50


GRIDS = {
    "quick": Grid(
        visits=4, images=20, few=10, share=0.1, few_images=10, seeds=1, photos=16, rounds=10,
        photo_domains=PHOTO_DOMAINS[:2],
    ),
    "page": Grid(),
    "full": Grid(few=50, few_images=500, all_seeded=True, photos=200, photo_domains=(), rounds=100),
}  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Cell:
    """One method on one stream.

    Args:
        part: Of `PARTS`.
        model: A name for `models.load`, or `NETWORK`.
        stream: A key of `BY_NAME`.
        method: A method string, or the name of a recipe.
        batch_size: Of the stream, unless it has its own.
        images: Of each domain, and of each visit where domains come back.
        visits: Of all domains, or 1.
        domains: In place of the stream's own; empty for these.
        seed: Of corruptions, stream and adapter.
        guard: The guard in ``method``; None for none, or for a recipe's own.
        partner: The same method without a guard.
        recipe: Whether ``method`` is a recipe with a guard of its own, and no method string.
    """

    part: int
    model: str
    stream: str
    method: str
    batch_size: int
    images: int
    seed: int
    visits: int = 1
    domains: tuple[str, ...] = ()
    guard: str | None = None
    partner: str | None = None
    recipe: bool = False

    def of(self, method: str) -> Cell:
        """The cell of another method, without a guard, on the same stream."""
        return dataclasses.replace(self, method=method, guard=None, partner=None, recipe=False)

    @property
    def stream_key(self) -> tuple[Any, ...]:
        """What decides the images and their order."""
        return (
            self.model, self.stream, self.batch_size, self.images, self.visits, self.domains,
            self.seed,
        )  # fmt: skip

    @property
    def key(self) -> tuple[Any, ...]:
        """What decides the result, and in which part it is shown."""
        return (self.part, *self.stream_key, self.method)

    @staticmethod
    def from_dict(row: Mapping[str, Any]) -> Cell:
        """The cell of a line of results."""
        names = [field.name for field in dataclasses.fields(Cell)]
        values: dict[str, Any] = {name: row[name] for name in names}
        return Cell(**{**values, "domains": tuple(row["domains"])})


@dataclass(frozen=True, kw_only=True)
class Choice:
    """What of a grid is wanted.

    Args:
        parts: Of `PARTS`.
        models: Names of bundled models; part 5 has its own.
        methods: Names of updates and recipes; empty for all.
        guard: In place of each update's own.
    """

    parts: Sequence[int] = tuple(PARTS)
    models: Sequence[str] = ()
    methods: Sequence[str] = ()
    guard: str | None = None


def stream_of(cell: Cell) -> StreamConfig:
    """The stream of a cell; lengths in its options go with its images."""
    entry = BY_NAME[cell.stream]
    options = dict(entry.options)
    if "visits" in options:
        options["visits"] = cell.visits
    if "total" in options and entry.images:
        options["total"] = max(1, round(options["total"] * cell.images / entry.images))
    if "delta" in options and cell.images < FEW:  # NOTE's smallest chunk is made for more images
        options["min_chunk"] = max(1, cell.images // 20)
    if "speed" in options:  # of a walk: a point shows each image once at most
        options["speed"] = min(options["speed"], cell.images)
    return dataclasses.replace(
        entry,
        domains=cell.domains or entry.domains,
        images=None if entry.images is None else cell.images,
        options=options,
    )


def base(method: str) -> str:
    """The name of a method's first component."""
    return re.split(r"[.\[]", PLUS.split(method)[0].strip())[0]


def cells(grid: Grid, choice: Choice) -> tuple[list[Cell], list[str]]:
    """All cells, those that share a stream one after the other, and what had to be left out."""
    found: dict[tuple[Any, ...], Cell] = {}
    missing: list[str] = []
    for part in choice.parts:
        for seed in range(grid.seeds):
            for cell in _PARTS[part](grid, choice, seed, missing):
                found.setdefault(cell.key, cell)
    return list(found.values()), list(dict.fromkeys(missing))


def updates(choice: Choice) -> list[str]:
    """Method strings of the updates that are wanted."""
    known = tta.list_methods(slot="update")
    named = {base(method): method for method in all_methods() if not PLUS.search(method)}
    return [named[name] for name in known if not choice.methods or name in choice.methods]


def _few(method: str) -> bool:
    """Whether a method runs the model so often, or so much besides, that it gets fewer images."""
    found = component(base(method))
    return found.cost >= EXPENSIVE or (issubclass(found, Update) and found.replays_source)


def _seeded(grid: Grid, method: str, seed: int) -> bool:
    return seed < (grid.seeds if grid.all_seeded else SEEDS.get(base(method), 1))


def _with_guard(cell: Cell, choice: Choice, missing: list[str]) -> Iterator[Cell]:
    """The cell with its update's guard, if that is there."""
    found = component(base(cell.method))
    guard = choice.guard or getattr(found, "default_guard", None)
    if guard not in tta.list_methods(slot="guard"):
        missing.append(f"{base(cell.method)} with a guard: there is no guard called {guard}")
        return
    yield dataclasses.replace(
        cell, method=f"{cell.method}+{guard}", guard=guard, partner=cell.method
    )


def _recipe(choice: Choice, missing: list[str]) -> list[str]:
    wanted = {RECIPE} & set(choice.methods or [RECIPE])
    there = wanted & set(tta.list_methods())
    missing += [f"{name}: there is no recipe of that name" for name in wanted - there]
    return list(there)


def _recurring(grid: Grid, choice: Choice, seed: int, missing: list[str]) -> Iterator[Cell]:
    for model in choice.models:
        for name, stream in RECURRING.items():
            for size in (64, 10):
                for method in updates(choice):
                    if not _seeded(grid, method, seed):
                        continue
                    images = grid.few if _few(method) else grid.images
                    # A batch would hold all images of a domain, whatever their order; part 2 has
                    # a class-correlated stream of longer visits.
                    if size >= images and "arrange" not in stream.options:
                        continue
                    cell = Cell(
                        part=1, model=model, stream=name, method=method, batch_size=size,
                        images=images, seed=seed, visits=grid.visits,
                    )  # fmt: skip
                    yield cell
                    yield from _with_guard(cell, choice, missing)


def _recorded(grid: Grid, choice: Choice, seed: int, missing: list[str]) -> Iterator[Cell]:
    for model in choice.models:
        for stream in RECORDED.values():
            for method in updates(choice):
                if not _seeded(grid, method, seed):
                    continue
                cell = _sized(2, grid, model, stream, method, 64, seed)
                if _few(method) and grid.few_images < cell.images:
                    again = stream.spec.own_severities or "visits" in stream.options
                    images = grid.few if again else grid.few_images
                    cell = dataclasses.replace(cell, images=images)
                recorded = cell.images == stream.images and not _few(method)
                if not recorded:  # what the record holds is not run again
                    yield cell
                for guarded in _with_guard(cell, choice, missing):
                    yield dataclasses.replace(guarded, partner=None) if recorded else guarded


def _sized(
    part: int, grid: Grid, model: str, stream: StreamConfig, method: str, size: int, seed: int
) -> Cell:
    """A cell with the grid's share of the stream's images, a multiple of ten."""
    own = stream.images or 0
    images = min(own, max(10, 10 * round(own * grid.share / 10)))
    visits = stream.options.get("visits", 1)
    return Cell(
        part=part, model=model, stream=stream.name, method=method, batch_size=stream.size(size),
        images=images, seed=seed, visits=min(visits, grid.visits),
    )  # fmt: skip


def _recipe_cell(*arguments: Any) -> Cell:
    """A cell of a recipe, see `_sized`."""
    return dataclasses.replace(_sized(*arguments), recipe=True)


def _unknown_streams(grid: Grid, choice: Choice, seed: int, missing: list[str]) -> Iterator[Cell]:
    for method in _recipe(choice, missing):
        for model in choice.models:
            for stream in (RECORDED | FURTHER).values():
                yield _recipe_cell(3, grid, model, stream, method, 64, seed)
            yield _recipe_cell(3, grid, model, FURTHER["class_sorted"], method, 10, seed)
            for size in (1, 4, 16, 64):
                cell = _recipe_cell(3, grid, model, RECORDED["continual"], method, size, seed)
                images = min(cell.images, SMALL_BATCHES.get(size, cell.images))
                yield dataclasses.replace(cell, images=images)


def _episodes(grid: Grid, choice: Choice, seed: int, missing: list[str]) -> Iterator[Cell]:
    for method in _recipe(choice, missing):
        for model in choice.models:
            for stream in EPISODES.values():
                yield _recipe_cell(4, grid, model, stream, method, 64, seed)


def _photos(grid: Grid, choice: Choice, seed: int, missing: list[str]) -> Iterator[Cell]:
    if seed:
        return
    own = [m for m in PHOTO_METHODS if not choice.methods or m in choice.methods]
    for name in PHOTOS:
        for size in (1, 16, 64):
            cell = Cell(
                part=5, model=NETWORK, stream=name, method="", batch_size=size,
                images=grid.photos, seed=seed, domains=grid.photo_domains,
            )  # fmt: skip
            for method in _recipe(choice, missing):
                yield dataclasses.replace(cell, method=method, recipe=True)
            for method in own:
                yield cell.of(method)
                yield from _with_guard(cell.of(method), choice, missing)


def _cost(grid: Grid, choice: Choice, seed: int, missing: list[str]) -> Iterator[Cell]:
    if seed:
        return
    for model in choice.models:
        for method in [m for m in COSTED if not choice.methods or m in choice.methods]:
            cell = Cell(
                part=6, model=model, stream="calm", method=method, batch_size=64,
                images=grid.rounds, seed=seed,
            )  # fmt: skip
            yield from _with_guard(cell, choice, missing)


_PARTS = {
    1: _recurring,
    2: _recorded,
    3: _unknown_streams,
    4: _episodes,
    5: _photos,
    6: _cost,
}
