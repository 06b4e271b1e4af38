"""``python -m experiments run``: every method on every stream, then tables and plots."""

from __future__ import annotations

import json
import shutil
import sys
import textwrap
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch

import corruptions
import tta.streams
from experiments.data import FolderSet, LabelledSet
from experiments.data.surfaces import read_surface
from experiments.records.config import RunConfig, StreamConfig
from experiments.records.environment import describe_environment
from experiments.records.file import RESULTS, Busy, Conflict, Results, make_run_folder, read_header
from experiments.records.progress import Progress
from experiments.report.run_table import describe, render_markdown, render_text
from experiments.run import ranks
from experiments.run.domains import Shifts, resolve_domains
from experiments.run.method_strings import parse_methods
from experiments.run.snapshot import Snapshots
from experiments.run.subject import Subject, load_subject
from experiments.run.trial import Trial
from tta.core.checks import whole
from tta.core.plugins import import_modules
from tta.streams import Stream

__all__ = ["Cache", "Run", "is_finished"]

Made = TypeVar("Made")
MOST_READERS = 8


class Cache:
    """The last of each kind of thing, for runs that follow each other with the same one."""

    def __init__(self) -> None:
        self._held: dict[str, tuple[Any, Any]] = {}

    def get(self, kind: str, key: Any, make: Callable[[], Made]) -> Made:
        """What `make` returned for `key`, if that was the last key asked for, else a new one."""
        if kind not in self._held or self._held[kind][0] != key:
            self._held.pop(kind, None)  # before the next is made: both may be large
            self._held[kind] = key, make()
        return self._held[kind][1]


class Run:
    """One run: checked when it is made, done by `execute`.

    Args:
        config: What to do.
        root: Where the run's folder is made; an unfinished run there of the same configuration is
            continued instead.
        quiet: Print only the tables.
        folder: The run's folder itself, made or continued.
        fresh: Do not continue an unfinished run under `root`.
        silent: Print nothing and draw no plots.
        snapshot_every: Batches between snapshots; None for as many as take some seconds.
        deadline: Time (of `time.monotonic`) after which to stop with `OutOfTime`.
        readers: Threads that decode image files ahead of the model; None for as many as torch
            has, at most `MOST_READERS`, where the model is on a GPU, and none on a CPU, which has
            nothing better to do than to run the model.
        cache: Shared by runs that follow each other.

    Raises:
        ValueError: For names that are not known and figures that cannot be.
        FileNotFoundError: For missing data.
    """

    def __init__(
        self,
        config: RunConfig,
        root: str | Path = "runs",
        quiet: bool = False,
        *,
        folder: str | Path | None = None,
        fresh: bool = False,
        silent: bool = False,
        snapshot_every: int | None = None,
        deadline: float | None = None,
        readers: int | None = None,
        cache: Cache | None = None,
    ) -> None:
        if readers is not None:
            whole("readers", readers, 0)
        self.root = Path(root)
        self.folder = None if folder is None else Path(folder)
        self.fresh, self.silent = fresh, silent
        self.snapshot_every, self.deadline = snapshot_every, deadline
        self.device = torch.device(config.device)
        import_modules(config.imports)  # also in a worker, or where the run is resumed
        cache = Cache() if cache is None else cache
        files = (config.clean, config.source, config.classes)
        wanted = (config.model, config.data, self.device, *files)
        self.subject: Subject = cache.get("subject", wanted, lambda: load_subject(*wanted))
        self.methods = parse_methods(config.methods, self.subject.info.num_classes)
        streams = [
            replace(stream, domains=resolve_domains(stream.domains, self.subject.data))
            for stream in config.streams
        ]
        self.config = config = replace(config, streams=tuple(streams))
        self.progress = Progress(0, quiet or silent)
        self.clean = self._clean_images()
        self.readers = self._pick_readers(readers)
        self.shifts = cache.get(
            "shifts",
            (wanted, None if self.clean is None else len(self.clean), config.seed),
            lambda: Shifts(self.subject.data, self.clean, config.seed, self.device),
        )
        self.shifts.on_corrupt = lambda name, severity: self.progress.note(
            f"corrupting {name} at severity {severity}"
        )
        self.streams = [self._build(stream) for stream in config.streams]
        if ranks.many() and any(stream.stopwatch is not None for stream in self.streams):
            raise ValueError(
                "`clock` must have a declared ratio under torchrun, got a measured one, by which "
                "ranks would come to different decisions"
            )
        self.previews = [stream.preview() for stream in self.streams]  # raises if none can be drawn
        self._check_methods()

    def execute(self) -> Path:
        """Run everything that is not done; returns the run's folder.

        Raises:
            OutOfTime: After the deadline; the next `execute` goes on from there.
        """
        if not ranks.first():
            with ranks.following() as folder:
                self._execute(folder, Results(folder / RESULTS))
            return folder
        folder, results = self._open()
        ranks.lead(folder)
        self._execute(folder, results)
        self.progress.say(f"\nResults, TensorBoard events and plots are in {folder}:")
        for path in sorted(p for p in folder.iterdir() if p.is_file()):
            self.progress.say(f"  {path}")
        self.progress.say(f"  tensorboard --logdir {self.root}")
        return folder

    def _execute(self, folder: Path, results: Results) -> None:
        """Run everything that is not done in `folder`."""
        images = [preview.samples for preview in self.previews]
        work = sum(images) + 2 * len(images) * (0 if self.clean is None else len(self.clean))
        self.progress.total = work * sum(method.cost for method in self.methods)
        with results:
            self._begin(folder, results)
            trial = Trial(
                self.subject,
                self.clean,
                folder,
                results,
                Snapshots(folder, self.snapshot_every),
                self.progress,
                self.config.seed,
                self.deadline,
                self.readers,
            )
            for number in range(len(self.streams)):
                self._run_stream(number, trial)
            if results.find("end") is None:
                results.write("end", finished=_now())
            trial.snapshots.remove()

    def _open(self) -> tuple[Path, Results]:
        """The run's folder and results file, of a run that was cut off if there is one."""
        if self.folder is not None:
            self.folder.mkdir(parents=True, exist_ok=True)
            return self.folder, Results(self.folder / RESULTS)
        found = sorted(self.root.glob(f"*-{self.config.name}*")) if not self.fresh else []
        for folder in reversed(found):
            header = read_header(folder)
            same = header is not None and self.config.is_that_of(header)
            if same and not is_finished(folder):
                try:
                    return folder, Results(folder / RESULTS)
                except Busy:  # not cut off at all
                    continue
        folder = make_run_folder(self.root, self.config.name)
        return folder, Results(folder / RESULTS)

    def _begin(self, folder: Path, results: Results) -> None:
        """Write who runs here, or check that it is the same."""
        header, begun = self._header(), results.find("run")
        if results.repaired:
            self.progress.say(
                f"repaired {results.repaired} lines of {results.path} that were cut off; what is "
                "missing is run again"
            )
        if begun is None:
            results.write("run", **header)
        elif not self.config.is_that_of(begun):
            raise Conflict(
                f"`{folder}` holds a run of another configuration: choose another folder"
            )
        elif results.find("end") is None:
            before = {name: begun.get(name) for name in ("git", "versions")}
            now = {name: header[name] for name in before}
            results.add("continued", at=_now(), **now)
            self.progress.say(f"continuing {folder}, begun {begun['started']}")
            if json.dumps(before, sort_keys=True) != json.dumps(now, sort_keys=True):
                self.progress.say("code or versions have changed since; --fresh starts anew")
        self._greet(folder, header)

    def _build(self, config: StreamConfig) -> Stream:
        def choose(images: Any) -> Any:
            return images if config.images is None else images.balanced(config.images)

        smooth = config.scenario == "walk"
        options = dict(config.options)
        if options.pop("ccc", False):  # functions, which no file of settings can hold
            if not smooth:
                raise ValueError(
                    f"`ccc` must go with the scenario walk, got {config.scenario}: elsewhere "
                    "images are corrupted before they are cropped; leave it out"
                )
            size = self.subject.info.input_size[-1]
            options |= {"before": corruptions.CropAndFlip(size), "after": corruptions.Jpeg()}
        if isinstance(options.get("surface"), str):
            options["surface"] = read_surface(options["surface"])
        arguments = self.shifts.build_arguments(config.domains, config.severities, choose, smooth)
        _check_num_samples(config.options.get("num_samples"), arguments)
        return tta.streams.build(
            config.scenario,
            severity=config.severity,
            batch_size=1 if config.scenario == "single" else self._batch_size(config),
            seed=self.config.seed,
            **arguments,
            **options,
        )

    def _run_stream(self, number: int, trial: Trial) -> None:
        config, stream = self.config.streams[number], self.streams[number]
        preview = self.previews[number]
        size = self._batch_size(config)
        self.progress.say(
            f"\nStream {config.name}: {config.scenario}, {len(config.domains)} domains at severity "
            f"{config.severity}, {preview.samples} images in {preview.batches} batches of "
            f"{size} with {preview.distinct_labels:.1f} classes on average\n"
        )
        self._warm_up(stream)
        trial.results.write(
            "stream",
            stream=config.name,
            build=stream.config,
            ccc=bool(config.options.get("ccc")),
            images=preview.samples,
        )
        summaries: list[dict[str, Any]] = []
        batches: dict[str, list[dict[str, Any]]] = {}
        for method in self.methods:
            samples = method is self.methods[0]
            summary, rows = trial.run(config, stream, method, size, samples)
            summaries.append(summary)
            batches[method.label] = rows
        self.progress.clear()
        if not self.silent:
            window = min(500, max(preview.samples // len(preview.stays) // 2, 100))
            self._show(config, summaries, batches, trial.folder, window)

    def _show(
        self,
        config: StreamConfig,
        summaries: list[dict[str, Any]],
        batches: dict[str, list[dict[str, Any]]],
        folder: Path,
        window: int,
    ) -> None:
        """Print a stream's table and draw its plots."""
        from experiments.report.plots import plot_errors, plot_running  # slow to import

        width = shutil.get_terminal_size((140, 24)).columns
        print(render_text(summaries, width), end="\n\n")
        print(textwrap.fill(describe(summaries), width), flush=True)
        title = f"{self.config.model}, {config.name} stream"
        plot_errors(summaries, folder / f"{config.name}-errors.png", f"Error by domain: {title}")
        path = folder / f"{config.name}-running.png"
        plot_running(batches, path, f"Running error: {title}", window)
        text = f"{render_markdown(summaries)}\n{describe(summaries)}\n"
        (folder / f"{config.name}.md").write_text(text)

    def _check_methods(self) -> None:
        """Wrap once with every method, so that what cannot work fails before the first batch."""
        for method in self.methods:
            size = self._batch_size(self.config.streams[0])
            adapter = method.wrap_subject(self.subject, size, self.config.seed)
            try:
                ranks.share(adapter)
            finally:
                adapter.unwrap()

    def _warm_up(self, stream: Stream) -> None:
        """One plain forward, so that no method pays for what torch sets up the first time."""
        images = next(iter(stream)).images.to(self.device)
        with torch.no_grad():
            self.subject.model(self.subject.preprocess(images))

    def _pick_readers(self, wanted: int | None) -> int:
        """Threads that decode files ahead: none for images in memory, else those wanted."""
        if not (self.subject.data.files or isinstance(self.clean, FolderSet)):
            return 0
        threads = torch.get_num_threads() if self.device.type == "cuda" else 0
        return min(MOST_READERS, threads) if wanted is None else wanted

    def _batch_size(self, config: StreamConfig) -> int:
        return config.size(self.config.batch_size)

    def _clean_images(self) -> LabelledSet | None:
        """The clean images behind all streams: as many as the stream that has most."""
        clean, counts = self.subject.clean, [stream.images for stream in self.config.streams]
        numbers = [count for count in counts if count is not None]
        if clean is None or len(numbers) < len(counts):
            return clean
        if self.subject.data.stored:  # other images, perhaps of more classes than the domains'
            classes = len(np.unique(clean.labels))
            each = max(1, round(max(numbers) / classes))
            return clean.balanced(min(each * classes, len(clean) // classes * classes))
        return clean.balanced(max(numbers))

    def _header(self) -> dict[str, Any]:
        data = self.subject.data
        origin = data.clean.origin if data.clean is not None else data.name
        return {
            "name": self.config.name,
            "started": _now(),
            "command": sys.argv,
            "config": self.config.to_dict(),
            "seed": self.config.seed,
            "model": self.subject.describe(),
            "data": {"name": data.name, "origin": origin, "domains_on_disk": bool(data.stored)},
            **describe_environment(),
        }

    def _greet(self, folder: Path, header: dict[str, Any]) -> None:
        model = header["model"]
        layers = ", ".join(f"{n} {kind}" for kind, n in model["norm_layers"].items())
        self.progress.say(
            f"model    {model['name']}: {model['parameters']:,} parameters, {layers}\n"
            f"data     {header['data']['origin']}\n"
            f"device   {self.device}, {torch.get_num_threads()} threads\n"
            f"methods  {', '.join(self.config.methods)}\n"
            f"folder   {folder}"
        )


def _check_num_samples(wanted: Any, arguments: dict[str, Any]) -> None:
    """A stream takes at most so many of what there is; a command line that asks for more errs."""
    sets = [arguments["dataset"]]
    if arguments["transform"] is None:
        sets = [entry for levels in arguments["domains"].values() for entry in levels.values()]
    have = min(len(entry[1]) if isinstance(entry, tuple) else len(entry) for entry in sets)
    if isinstance(wanted, int) and wanted > have:
        raise ValueError(
            f"`num_samples` must be at most the {have} images of each domain, got {wanted}: ask "
            "for fewer, or for more by --images"
        )


def is_finished(folder: str | Path) -> bool:
    """Tell whether a run's folder holds a whole run."""
    path = Path(folder) / RESULTS
    return path.is_file() and b'{"kind": "end"' in path.read_bytes()[-300:]


def _now() -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%S%z")
