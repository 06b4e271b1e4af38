"""``python -m experiments run``: every method on every stream, then tables and plots."""

from __future__ import annotations

import shutil
import sys
import textwrap
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

import tta.streams
from experiments.config import RunConfig, StreamConfig
from experiments.data import LabelledSet
from experiments.domains import Shifts, resolve_domains
from experiments.environment import describe_environment
from experiments.evaluate import clean_error, iter_evaluate
from experiments.methods import Method, parse_methods
from experiments.progress import Progress
from experiments.record import JsonLines, make_run_folder
from experiments.subject import Subject, load_subject
from experiments.table import describe, render_markdown, render_text
from tta.streams import Stream

__all__ = ["Run"]


class Run:
    """One run: checked when it is made, done by `execute`.

    Args:
        config: What to do.
        root: Where the run's folder is made.
        quiet: Print only the tables.

    Raises:
        ValueError: For names that are not known and figures that cannot be.
        FileNotFoundError: For missing data.
    """

    def __init__(self, config: RunConfig, root: str | Path = "runs", quiet: bool = False) -> None:
        self.root = Path(root)
        self.device = torch.device(config.device)
        self.subject: Subject = load_subject(
            config.model, config.data, self.device, config.clean, config.source
        )
        self.methods = parse_methods(config.methods, self.subject.info.num_classes)
        streams = [
            replace(stream, domains=resolve_domains(stream.domains, self.subject.data))
            for stream in config.streams
        ]
        self.config = config = replace(config, streams=tuple(streams))
        self.progress = Progress(0, quiet)
        self.shifts = Shifts(
            self.subject.data,
            self._clean_images(),
            config.seed,
            self.device,
            lambda name, severity: self.progress.note(f"corrupting {name} at severity {severity}"),
        )
        self.streams = [self._build(stream) for stream in config.streams]
        self._check_methods()

    def execute(self) -> Path:
        """Run everything; returns the run's folder."""
        folder = make_run_folder(self.root, self.config.name)
        clean = self._clean_images()
        images = [stream.preview().samples for stream in self.streams]
        work = sum(images) + len(images) * (0 if clean is None else len(clean))
        self.progress.total = work * sum(method.cost for method in self.methods)
        with JsonLines(folder / "results.jsonl") as results:
            results.write("run", **self._header())
            self._greet(folder)
            for config, stream in zip(self.config.streams, self.streams, strict=True):
                self._run_stream(config, stream, folder, results)
        self.progress.say(f"\nResults, TensorBoard events and plots are in {folder}:")
        for path in sorted(p for p in folder.iterdir() if p.is_file()):
            self.progress.say(f"  {path}")
        self.progress.say(f"  tensorboard --logdir {self.root}")
        return folder

    def _build(self, config: StreamConfig) -> Stream:
        def choose(images: Any) -> Any:
            return images if config.images is None else images.balanced(config.images)

        smooth = config.scenario == "walk"
        arguments = self.shifts.build_arguments(config.domains, config.severities, choose, smooth)
        _check_num_samples(config.options.get("num_samples"), arguments)
        return tta.streams.build(
            config.scenario,
            severity=config.severity,
            batch_size=self._batch_size(config),
            seed=self.config.seed,
            **arguments,
            **config.options,
        )

    def _run_stream(
        self, config: StreamConfig, stream: Stream, folder: Path, results: JsonLines
    ) -> None:
        from experiments.plots import plot_errors, plot_running  # slow to import

        preview = stream.preview()
        self.progress.say(
            f"\nStream {config.name}: {config.scenario}, {len(config.domains)} domains at severity "
            f"{config.severity}, {preview.samples} images in {preview.batches} batches of "
            f"{self._batch_size(config)} with {preview.distinct_labels:.1f} classes on average\n"
        )
        self._warm_up(stream)
        results.write("stream", stream=config.name, build=stream.config, images=preview.samples)
        summaries: list[dict[str, Any]] = []
        batches: dict[str, list[dict[str, Any]]] = {}
        for method in self.methods:
            summary, rows = self._run_method(config, stream, method, folder, results)
            summaries.append(summary)
            batches[method.label] = rows
        self.progress.clear()
        width = shutil.get_terminal_size((140, 24)).columns
        print(render_text(summaries, width), end="\n\n")
        print(textwrap.fill(describe(summaries), width), flush=True)
        title = f"{self.config.model}, {config.name} stream"
        plot_errors(summaries, folder / f"{config.name}-errors.png", f"Error by domain: {title}")
        window = min(500, max(preview.samples // len(preview.stays) // 2, 100))
        path = folder / f"{config.name}-running.png"
        plot_running(batches, path, f"Running error: {title}", window)
        text = f"{render_markdown(summaries)}\n{describe(summaries)}\n"
        (folder / f"{config.name}.md").write_text(text)

    def _run_method(
        self,
        config: StreamConfig,
        stream: Stream,
        method: Method,
        folder: Path,
        results: JsonLines,
    ) -> tuple[dict[str, Any], list[dict[str, Any]]]:
        from experiments.events import Events  # slow to import

        subject, label = self.subject, method.label
        names = {"stream": config.name, "method": label}
        adapter = self._wrap(method, config)
        results.write("method", **names, config=adapter.config.to_dict())
        events = Events(folder, config.name, label, adapter.config.to_dict())
        rows, totals = [], None
        for row, totals in iter_evaluate(adapter, stream, self.device, subject.preprocess):
            results.write("batch", **names, **row)
            running = totals.errors / totals.images
            events.add(row, running)
            rows.append(row)
            self.progress.advance(
                method.cost * row["images"],
                f"{config.name}  {label:<16} {row['domain']:<18} {100 * running:5.1f} % error  "
                f"{totals.images / totals.seconds:6.0f} img/s",
            )
        assert totals is not None  # a stream has at least one batch
        events.close()
        clean, images = None, self._clean_images()
        if images is not None:
            size, seed = self._batch_size(config), self.config.seed
            clean = clean_error(adapter, images, size, seed, self.device, subject.preprocess)
            self.progress.advance(
                method.cost * len(images),
                f"{config.name}  {label:<16} {'clean images':<18} {100 * clean:5.1f} % error",
            )
        adapter.unwrap()
        for name, (images_seen, errors) in totals.by_domain.items():
            results.write("domain", **names, domain=name, images=images_seen, errors=errors)
        summary = {**names, **totals.summary(), "clean_error": clean}
        results.write("summary", **summary)
        return summary, rows

    def _wrap(self, method: Method, config: StreamConfig) -> tta.Adapter:
        info = self.subject.info
        return method.wrap(
            self.subject.model,
            source=self.subject.source,
            batch_size=self._batch_size(config),
            seed=self.config.seed,
            mean=info.mean,
            std=info.std,
        )

    def _check_methods(self) -> None:
        """Wrap once with every method, so that what cannot work fails before the first batch."""
        for method in self.methods:
            self._wrap(method, self.config.streams[0]).unwrap()

    def _warm_up(self, stream: Stream) -> None:
        """One plain forward, so that no method pays for what torch sets up the first time."""
        images = next(iter(stream)).images.to(self.device)
        with torch.no_grad():
            self.subject.model(self.subject.preprocess(images))

    def _batch_size(self, config: StreamConfig) -> int:
        return self.config.batch_size if config.batch_size is None else config.batch_size

    def _clean_images(self) -> LabelledSet | None:
        """The clean images behind all streams: as many as the stream that has most."""
        clean, counts = self.subject.clean, [stream.images for stream in self.config.streams]
        numbers = [count for count in counts if count is not None]
        if clean is None or len(numbers) < len(counts):
            return clean
        return clean.balanced(max(numbers))

    def _header(self) -> dict[str, Any]:
        data = self.subject.data
        origin = data.clean.origin if data.clean is not None else data.name
        return {
            "name": self.config.name,
            "started": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
            "command": sys.argv,
            "config": self.config.to_dict(),
            "seed": self.config.seed,
            "model": self.subject.describe(),
            "data": {"name": data.name, "origin": origin, "domains_on_disk": bool(data.stored)},
            **describe_environment(),
        }

    def _greet(self, folder: Path) -> None:
        model = self.subject.describe()
        layers = ", ".join(f"{n} {kind}" for kind, n in model["norm_layers"].items())
        self.progress.say(
            f"model    {model['name']}: {model['parameters']:,} parameters, {layers}\n"
            f"data     {self._header()['data']['origin']}\n"
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
