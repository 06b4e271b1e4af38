"""Runs the cells of ``python -m experiments reliability`` one after the other."""

from __future__ import annotations

import hashlib
import itertools
import json
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from datetime import date
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

import tta
from experiments.records.config import BASELINE, RunConfig, StreamConfig
from experiments.records.environment import describe_environment
from experiments.records.file import Busy, JsonLines, mend
from experiments.run.build_streams import build_stream
from experiments.run.cache import Cache
from experiments.run.domains import Shifts, resolve_domains
from experiments.run.method_strings import parse_method
from experiments.run.setup import load_setup
from experiments.run.subject import Subject
from experiments.studies import reliability_episodes as episodes
from experiments.studies.reliability_cost import measure
from experiments.studies.reliability_grid import EPISODES, PHOTOS, Cell, stream_of
from experiments.studies.reliability_paired import Played, estimates, paired, play, recovery
from experiments.studies.reliability_photos import load_photos
from tta.core.files import replacing
from tta.streams import Stream

__all__ = ["Runner", "read_results"]

Wrong = NDArray[np.bool_]
# What is said where a method cannot work on a model at all.
OTHER_MODEL = ("must find BatchNorm", "must be a vision transformer", "must have blocks")
WAIT = 0.2  # seconds, while another process appends to the results


def read_results(path: Path) -> dict[tuple[Any, ...], dict[str, Any]]:
    """The lines of results by the keys of their cells; of several for one cell the last."""
    if not path.is_file():
        return {}
    lines, _ = mend(path.read_bytes())  # one that was cut off counts for nothing
    rows = [row for row in map(json.loads, lines.splitlines()) if row["kind"] == "cell"]
    return {Cell.from_dict(row).key: row for row in rows}


@dataclass
class Runner:
    """Runs cells, each once, and appends what came out to a file.

    Args:
        results: JSON lines. Several processes may append to one file.
        folder: Where it is kept which predictions were wrong, for pairs that are run later.
        device: Where.
        photos: Folder of photographs.
        weights: Of the network that is shown them.
    """

    results: Path
    folder: Path
    device: torch.device
    photos: Path | None = None
    weights: Path | None = None

    def __post_init__(self) -> None:
        self.cache = Cache()

    def done(self, cell: Cell) -> dict[str, Any] | None:
        """The line of a cell, if there is one."""
        return read_results(self.results).get(cell.key)

    def run(self, cell: Cell) -> dict[str, Any]:
        """Run a cell and append its line, which is returned.

        A composition that is refused at wrap has a line that says why.
        """
        start = time.perf_counter()
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # of settings that the grid has on purpose
                found = self._find(cell)
        except ValueError as refusal:
            if not any(words in str(refusal) for words in OTHER_MODEL):
                raise
            found = {"refused": str(refusal)}
        seconds = round(time.perf_counter() - start, 2)
        row = asdict(cell) | found | {"seconds": seconds, "date": date.today().isoformat()}
        row |= {"about": describe_environment()}
        self.results.parent.mkdir(parents=True, exist_ok=True)
        with self._appending() as lines:
            lines.write("cell", **row)
        return row

    @contextmanager
    def _appending(self) -> Iterator[JsonLines]:
        """The results file, once no other process has it."""
        while True:
            try:
                lines = JsonLines(self.results)
            except Busy:
                time.sleep(WAIT)
            else:
                break
        with lines:
            yield lines

    def _find(self, cell: Cell) -> dict[str, Any]:
        if cell.part in _SPECIAL:
            return _SPECIAL[cell.part](self, cell)
        subject, stream = self._shown(cell)
        with _wrapped(cell, subject) as adapter:
            played = play(adapter, stream, subject)
        self._keep(cell, played)
        source = self._wrong(cell.of(BASELINE))
        partner = None if cell.partner is None else self._wrong(cell.of(cell.partner))
        total = len(played.all_wrong)
        places = np.arange(total) * cell.visits // total  # all visits have as many images
        return {
            "mean_error": played.mean_error(),
            "visits_found": paired(played.all_wrong, source, partner, places),
            **_seen(played),
        }

    def _find_after(self, cell: Cell) -> dict[str, Any]:
        """What a method does in an episode and after it, beside its twin and the source."""
        subject, episode = self._episode(cell)
        with _wrapped(cell, subject) as adapter:
            play(adapter, episode.before, subject)
            state = adapter.state()
            during = play(adapter, episode.during, subject)
            after = play(adapter, episode.after, subject)
            adapter.load_state(state)
            twin = play(adapter, episode.after, subject)
        with _wrapped(cell.of(BASELINE), subject) as adapter:
            plain = [play(adapter, part, subject) for part in (episode.during, episode.after)]
        mine, source = (
            np.concatenate([played.all_wrong for played in pair])
            for pair in ((during, after), plain)
        )
        calm = np.concatenate([source[: len(during.all_wrong)], twin.all_wrong])
        places = np.repeat([0, 1], [len(during.all_wrong), len(after.all_wrong)])
        return {
            "visits_found": paired(mine, source, calm, places),
            "recovery": recovery(after.wrong, twin.wrong),
            "batches_after": len(after.wrong),
            **_seen(during),
        }

    def _find_cost(self, cell: Cell) -> dict[str, Any]:
        assert cell.partner is not None
        of_batches = replace(cell, images=cell.batch_size * 10)  # as many of each class
        subject, stream = self._built(of_batches, stream_of(of_batches))
        batches = [b for b in itertools.islice(stream, 8) if len(b) == cell.batch_size]
        return measure(subject, cell.method, cell.partner, batches, cell.images, cell.seed)

    def _episode(self, cell: Cell) -> tuple[Subject, episodes.Episode]:
        def calm(names: tuple[str, ...]) -> StreamConfig:
            return StreamConfig(
                name="calm", scenario="continual", domains=names, images=cell.images
            )

        subject, during = self._built(cell, stream_of(cell))
        before, after = (
            self._built(cell, calm(names))[1] for names in (episodes.BEFORE, episodes.AFTER)
        )
        share = cell.images / (EPISODES[cell.stream].images or cell.images)
        made = episodes.make_episode(cell.stream, before, during, after, cell.seed, share)
        return subject, made

    def _shown(self, cell: Cell) -> tuple[Subject, Stream]:
        """The model of a cell and its stream."""
        config = stream_of(cell)
        if cell.stream in PHOTOS:
            return self._photographs(cell, config)
        return self._built(cell, config)

    def _built(self, cell: Cell, config: StreamConfig) -> tuple[Subject, Stream]:
        setup = load_setup(self._run_config(cell, config), cache=self.cache)
        return setup.subject, setup.streams[0]

    def _photographs(self, cell: Cell, config: StreamConfig) -> tuple[Subject, Stream]:
        assert self.photos is not None and self.weights is not None
        wanted = cell.model, self.photos, self.weights, cell.images, self.device
        subject: Subject = self.cache.get("photos", wanted, lambda: load_photos(*wanted))
        shifts: Shifts = self.cache.get(
            "photo shifts",
            (wanted, cell.seed),
            lambda: Shifts(subject.data, subject.clean, cell.seed, self.device),
        )
        config = replace(config, domains=resolve_domains(config.domains, subject.data))
        size = subject.info.input_size[-1]
        return subject, build_stream(config, self._run_config(cell, config), shifts, size)

    def _run_config(self, cell: Cell, config: StreamConfig) -> RunConfig:
        return RunConfig(
            name="reliability",
            model=cell.model,
            data="bundled",
            clean=None,
            source=None,
            methods=(BASELINE,),
            streams=(config,),
            batch_size=cell.batch_size,
            seed=cell.seed,
            device=str(self.device),
        )

    def _wrong(self, cell: Cell) -> Wrong:
        """Which predictions of an unguarded method are wrong; it is run where nobody knows."""
        path = self._path(cell)
        if not path.is_file():
            if cell.method == BASELINE:  # is shown in every line, and has none of its own
                subject, stream = self._shown(cell)
                with _wrapped(cell, subject) as adapter:
                    self._keep(cell, play(adapter, stream, subject))
            else:
                self.run(cell)
        return np.load(path)

    def _keep(self, cell: Cell, played: Played) -> None:
        path = self._path(cell)
        path.parent.mkdir(parents=True, exist_ok=True)
        with replacing(path) as part, part.open("wb") as file:
            np.save(file, played.all_wrong)

    def _path(self, cell: Cell) -> Path:
        key = json.dumps([*cell.stream_key, cell.method])
        return self.folder / f"{hashlib.sha256(key.encode()).hexdigest()[:24]}.npy"


_SPECIAL: dict[int, Callable[[Runner, Cell], dict[str, Any]]] = {
    4: Runner._find_after,
    6: Runner._find_cost,
}


@contextmanager
def _wrapped(cell: Cell, subject: Subject) -> Iterator[tta.Adapter]:
    """The model wrapped with a cell's method; an update without a guard has health figures too."""
    arguments: dict[str, Any] = {
        "source": subject.source,
        "batch_size": cell.batch_size,
        "seed": cell.seed,
        "mean": subject.info.mean or None,
        "std": subject.info.std or None,
    }
    if cell.recipe:
        adapter = tta.wrap(subject.model, cell.method, **arguments)
    else:
        method = parse_method(cell.method, subject.info.num_classes)
        health = cell.method != BASELINE and cell.guard is None
        adapter = method.wrap(subject.model, health=health, **arguments)
    try:
        yield adapter
    finally:
        adapter.unwrap()


def _seen(played: Played) -> dict[str, Any]:
    return {"actions": dict(played.actions), "estimates": estimates(played.estimated)}
