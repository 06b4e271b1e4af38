"""``python -m experiments run``: every method on every stream, then tables and plots."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from experiments.records.environment import describe_environment
from experiments.records.file import END, RESULTS, Results
from experiments.records.progress import Progress
from experiments.run import ranks
from experiments.run.cache import Cache
from experiments.run.folder import begin, is_finished, now, open_results
from experiments.run.method_strings import Method
from experiments.run.setup import Setup, load_setup
from experiments.run.show import SHOW, show_stream
from experiments.run.snapshot import Snapshots
from experiments.run.trial import Trial
from tta.core.checks import one_of

__all__ = ["Cache", "Run", "is_finished", "load_setup"]

WARM_UPS = 3  # passes of the first batch before anything is timed: the first two are slower


class Run:
    """One run: checked when it is made, done by `execute`.

    Args:
        setup: What to run, from `load_setup`.
        root: Where the run's folder is made. An unfinished run of the same configuration that is
            there is continued instead.
        folder: The run's folder itself, which is made or continued.
        fresh: Do not continue an unfinished run under `root`.
        show: What is printed: "all", "tables" (no progress) or "nothing" (and no plots are drawn).
        snapshot_every: Batches between snapshots; None for as many as take some seconds.
        deadline: Time (of `time.monotonic`) after which to stop with `OutOfTime`.

    Raises:
        ValueError: For a method that the model does not fit, or a stream that cannot be run.
    """

    def __init__(
        self,
        setup: Setup,
        root: str | Path = "runs",
        *,
        folder: str | Path | None = None,
        fresh: bool = False,
        show: str = "all",
        snapshot_every: int | None = None,
        deadline: float | None = None,
    ) -> None:
        self.setup, self.config = setup, setup.config
        self.root = Path(root)
        self.folder = None if folder is None else Path(folder)
        self.fresh = fresh
        self.show = one_of("show", show, SHOW)
        self.snapshot_every, self.deadline = snapshot_every, deadline
        self.progress = Progress(0, quiet=show != "all")
        setup.on_corrupt(
            lambda name, severity: self.progress.note(f"corrupting {name} at severity {severity}")
        )
        if ranks.many() and any(stream.stopwatch is not None for stream in setup.streams):
            raise ValueError(
                "`clock` must have a declared ratio under torchrun, got a measured one, by which "
                "ranks would come to different decisions"
            )
        self.previews = [stream.preview() for stream in setup.streams]  # raises if none can be
        self._check_methods()

    def execute(self) -> Path:
        """Run everything that is not done; returns the run's folder.

        Raises:
            OutOfTime: After the deadline; the next `execute` goes on from there.
        """
        if not ranks.first():
            with ranks.following() as folder:
                self._execute(Results(folder / RESULTS))
            return folder
        results = open_results(self.config, self.root, self.folder, self.fresh)
        folder = results.path.parent
        ranks.lead(folder)
        self._execute(results)
        self.progress.say(f"\nResults, TensorBoard events and plots are in {folder}:")
        for path in sorted(p for p in folder.iterdir() if p.is_file()):
            self.progress.say(f"  {path}")
        self.progress.say(f"  tensorboard --logdir {self.root}")
        return folder

    def _execute(self, results: Results) -> None:
        """Run everything that is not in the results file."""
        setup, folder = self.setup, results.path.parent
        images = [preview.samples for preview in self.previews]
        clean = 0 if setup.clean is None else len(setup.clean)
        work = sum(images) + 2 * len(images) * clean
        self.progress.total = work * sum(method.cost for method in setup.methods)
        with results:
            header = self._header()
            for note in begin(results, self.config, header):
                self.progress.say(note)
            self._greet(folder, header)
            trial = Trial(
                setup.subject,
                setup.clean,
                folder,
                results,
                Snapshots(folder, self.snapshot_every),
                self.progress,
                self.config.seed,
                self.deadline,
                setup.readers,
            )
            for number in range(len(setup.streams)):
                self._run_stream(number, trial)
            trial.snapshots.remove()
            if not results.ended:
                results.add(END, finished=now())

    def _run_stream(self, number: int, trial: Trial) -> None:
        config, stream = self.config.streams[number], self.setup.streams[number]
        preview, methods = self.previews[number], self.setup.methods
        size = config.size(self.config.batch_size)
        self.progress.say(
            f"\nStream {config.name}: {config.scenario}, {len(config.domains)} domains at severity "
            f"{config.severity}, {preview.samples} images in {preview.batches} batches of "
            f"{size} with {preview.distinct_labels:.1f} classes on average\n"
        )
        self._warm_up(methods[0], next(iter(stream)).images)
        trial.results.write(
            "stream",
            stream=config.name,
            build=stream.config,
            ccc=bool(config.options.get("ccc")),
            images=preview.samples,
        )
        summaries: list[dict[str, Any]] = []
        batches: dict[str, list[dict[str, Any]]] = {}
        for method in methods:
            summary, rows = trial.run(config, stream, method, size, method is methods[0])
            summaries.append(summary)
            batches[method.label] = rows
        self.progress.clear()
        if self.show != "nothing":
            labels = [method.label for method in self.setup.methods]
            model, folder = self.config.model, trial.folder
            card = self.setup.subject.describe()["card"]
            show_stream(config.name, model, preview, summaries, batches, folder, labels, card)

    def _warm_up(self, method: Method, images: Tensor) -> None:
        """Pass the first batch through the model; models that draw numbers draw those of one pass.

        Args:
            method: It knows how to do so.
            images: (B, 3, H, W) in [0, 1].
        """
        subject = self.setup.subject
        method.warm_up(subject, images)
        with torch.random.fork_rng([subject.device] if subject.device.type == "cuda" else []):
            for _ in range(WARM_UPS - 1):
                method.warm_up(subject, images)

    def _check_methods(self) -> None:
        """Wrap once with every method, so that what cannot work fails before the first batch."""
        size = self.config.streams[0].size(self.config.batch_size)
        for method in self.setup.methods:
            with method.applied(self.setup.subject, size, self.config.seed) as adapter:
                ranks.share(adapter)

    def _header(self) -> dict[str, Any]:
        return {
            "name": self.config.name,
            "started": now(),
            "command": sys.argv,
            "config": self.config.to_dict(),
            "seed": self.config.seed,
            "model": self.setup.subject.describe(),
            "data": self.setup.origin,
            **describe_environment(),
        }

    def _greet(self, folder: Path, header: dict[str, Any]) -> None:
        """Say what is run, on what and where."""
        model = header["model"]
        layers = ", ".join(f"{n} {kind}" for kind, n in model["norm_layers"].items())
        card = "" if model["card"] is None else f"source   {model['card']}\n"
        self.progress.say(
            f"model    {model['name']}: {model['parameters']:,} parameters, {layers}\n"
            f"{card}data     {header['data']['origin']}\n"
            f"device   {self.setup.subject.device}, {torch.get_num_threads()} threads\n"
            f"methods  {', '.join(self.config.methods)}\n"
            f"folder   {folder}"
        )
