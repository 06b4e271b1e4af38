"""One method on one stream, from wherever it was left to its summary."""

from __future__ import annotations

import time
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tta
from experiments.records.config import StreamConfig
from experiments.records.environment import threads_matter
from experiments.records.file import Results
from experiments.records.health import summary_health, visits
from experiments.records.progress import Progress
from experiments.run import ranks
from experiments.run.method_strings import Method
from experiments.run.scoring import Images, Step, clean_error, iter_evaluate
from experiments.run.snapshot import Snapshots
from experiments.run.subject import Subject
from experiments.run.totals import Totals
from tta.streams import Stream

__all__ = ["OutOfTime", "Trial"]


class OutOfTime(Exception):
    """The time that a run was given is over; its place is saved."""


@dataclass
class Trial:
    """Runs one method on one stream, with all that it needs to do so.

    Args:
        subject: Model and data.
        clean: Clean images to test on before and after, or None.
        folder: The run's folder.
        results: The run's results file.
        snapshots: Where the place in the stream is kept.
        progress: It is told of every batch.
        seed: Seed of the adapter, and of the order of clean images.
        deadline: Time (of `time.monotonic`) after which to stop, or None.
        readers: Threads that decode images ahead.
    """

    subject: Subject
    clean: Images | None
    folder: Path
    results: Results
    snapshots: Snapshots
    progress: Progress
    seed: int
    deadline: float | None = None
    readers: int = 0

    def run(
        self, config: StreamConfig, stream: Stream, method: Method, batch_size: int, samples: bool
    ) -> tuple[dict[str, Any], list[dict[str, Any]]]:
        """Run a method on a stream, or read its results where it has been run.

        Args:
            config: The stream's configuration.
            stream: The stream.
            method: The method.
            batch_size: That of the stream; learning rates are scaled for it.
            samples: Whether to show some of the stream's images in TensorBoard.

        Returns:
            Its ``summary`` line and its ``batch`` lines.
        """
        from experiments.run.tensorboard import Events  # slow to import

        names = {"stream": config.name, "method": method.label}
        done = self._finished(names, len(stream))
        if done is not None:
            clean = 0 if self.clean is None else len(self.clean)
            self.progress.skip(method.cost * (done["images"] + 2 * clean))
        else:
            with method.applied(self.subject, batch_size, self.seed) as adapter:
                ranks.share(adapter)
                totals = self._take_up(adapter, config, method, batch_size)
                about = adapter.config.to_dict()
                threads = threads_matter(adapter.config, self.subject.device)
                self.results.write("method", **names, config=about, threads_matter=threads)
                events = Events(
                    self.folder, config.name, method.label, about, totals.batches, samples
                )
                stepper = iter_evaluate(
                    adapter,
                    stream.prefetch(self.readers),
                    self.subject.device,
                    self.subject.preprocess,
                    totals,
                    self.snapshots.every,
                )
                with closing(events), closing(stepper):
                    for steps, _ in stepper:
                        self.results.write_all("batch", [names | step.row for step in steps])
                        events.add(steps)
                        self._tell(method, config, steps, totals)
                        self._save_place(names, adapter, totals)
                    events.finish(totals.batches)
                after = self._clean_error(adapter, config, method, batch_size)
            for name, tally in totals.by_domain.items():
                self.results.write("domain", **names, domain=name, **tally.figures())
            rows = self.results.of("batch", **names)
            self.results.write_all("health", [names | line for line in visits(rows)])
            summary = totals.summary() | {"clean_error": after} | summary_health(rows)
            self.results.write("summary", **names, **summary)
            done = self.results.find("summary", **names)
            assert done is not None
        return done, self.results.of("batch", **names)

    def _finished(self, names: dict[str, str], batches: int) -> dict[str, Any] | None:
        """The summary of a method all of whose lines are there; damaged ones may have been lost."""
        find = self.results.find
        summary = find("summary", **names)
        if summary is None or find("method", **names) is None:
            return None
        domains = [find("domain", **names, domain=name) for name in summary["domain_errors"]]
        rows = self.results.of("batch", **names)
        health = [
            find("health", **names, step=line["step"], domain=line["domain"])
            for line in visits(rows)
        ]
        whole = len(rows) == batches and None not in (*domains, *health)
        return summary if whole else None

    def _take_up(
        self, adapter: tta.Adapter, config: StreamConfig, method: Method, batch_size: int
    ) -> Totals:
        """Put the adapter back to where it was left, and return the totals up to there."""
        label = f"{config.name}, {method.label}"
        try:
            totals = self.snapshots.load([config.name, method.label], adapter)
        except ValueError as error:
            self.progress.say(f"{label}: {error}")
            totals = None
        if totals is not None:
            rows = self.results.of("batch", config.name, method.label)
            held = {row["step"] for row in rows}
            if held.issuperset(range(totals.batches)):
                self.progress.say(f"{label}: continued at batch {totals.batches}")
                self.progress.skip(method.cost * totals.images)
                return totals
            # Lines that were damaged before the snapshot: only running again brings them back.
            self.progress.say(f"{label}: lines are missing in the results, so it starts again")
            adapter.reset()
        totals = Totals(adapter.num_classes)
        totals.clean_before = self._clean_error(adapter, config, method, batch_size)
        return totals

    def _save_place(self, names: dict[str, str], adapter: tta.Adapter, totals: Totals) -> None:
        late = self.deadline is not None and time.monotonic() > self.deadline
        if late or self.snapshots.due(totals.batches):
            self.snapshots.save(list(names.values()), adapter, totals)
        if late:
            raise OutOfTime

    def _clean_error(
        self, adapter: tta.Adapter, config: StreamConfig, method: Method, batch_size: int
    ) -> float | None:
        if self.clean is None:
            return None
        subject = self.subject
        error = clean_error(
            adapter,
            self.clean,
            batch_size,
            self.seed,
            subject.device,
            subject.preprocess,
            self.readers,
        )
        self.progress.advance(
            method.cost * len(self.clean),
            f"{config.name}  {method.label:<16} {'clean images':<18} {100 * error:5.1f} % error",
        )
        return error

    def _tell(
        self, method: Method, config: StreamConfig, steps: list[Step], totals: Totals
    ) -> None:
        self.progress.advance(
            method.cost * sum(step.row["images"] for step in steps),
            f"{config.name}  {method.label:<16} {steps[-1].row['domain']:<18} "
            f"{100 * totals.error:5.1f} % error  "
            f"{totals.images / totals.seconds:6.0f} img/s",
        )
