"""A long run of tests that goes on where it was cut off: ``make soak``.

``make soak ARGS=tests/test_fuzz.py`` is one file's share of it; each file has a result of its own.

Besides what is marked ``soak``, a check of many cases has a share of them among the slow tests, see
`shares`. A test that counts its cases says so by ``record_property("kills", 20)``; one that draws
takes the fixture ``soak_seed``.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from experiments.records.environment import describe_environment
from tta.core.files import replacing

__all__ = ["RESULT", "Share", "Soak", "shares"]

ROOT = Path(__file__).parents[2]
PACKAGES = ("tta", "corruptions", "models", "experiments", "tests")
RESULT = ROOT / "experiments" / "results" / "soak.json"


@dataclass(frozen=True)
class Share:
    """Some of the cases of a check.

    Args:
        number: Which share; 0 is the sample among the slow tests, which is none of the soak's.
        count: Cases in it.
    """

    number: int
    count: int


def shares(sample: int, total: int, parts: int) -> Any:
    """Parametrise a test by ``share``: a sample in the slow tests, all cases in ``make soak``.

    Args:
        sample: Cases among the slow tests.
        total: Cases in a soak.
        parts: Tests that these are split into; a soak that was cut off begins none again that
            has passed.
    """
    each = -(-total // parts)
    values = [pytest.param(Share(0, sample), id="sample", marks=pytest.mark.slow)]
    for part in range(parts):
        share = Share(part + 1, min(each, total - part * each))
        values.append(pytest.param(share, id=f"{part + 1}-of-{parts}", marks=pytest.mark.soak))
    return pytest.mark.parametrize("share", values)


class Soak:
    """A pytest plugin: tests that are marked ``soak`` run only where ``-m`` names that mark.

    Each test that passes is noted in pytest's cache, with its counts, and left out when the run is
    started again, until the source code changes or all of its file have passed. Failed ones run
    again. When all of a file have passed, the counts of each check are written to `RESULT`, beside
    those of other files, with the code that was tested.
    """

    def __init__(self, config: pytest.Config, result: Path = RESULT) -> None:
        self.config, self.result = config, result
        self.seed: int = config.getoption("soak_seed")
        self.marked: set[str] = set()  # all soak tests of the folders and files that it was given
        self.called: dict[str, pytest.TestReport] = {}  # passed, before their teardown
        self.notes: Path | None = None  # one passed test a line
        if "soak" in config.option.markexpr:
            self.code = _fingerprint()
            folder = Path(config.cache.mkdir("soak"))  # type: ignore[union-attr]
            self.notes = folder / f"{self.code}-seed{self.seed}.jsonl"
        self.writes = not hasattr(config, "workerinput")  # processes of xdist report to the first

    def pytest_collection_modifyitems(
        self, config: pytest.Config, items: list[pytest.Item]
    ) -> None:
        marked = [item for item in items if item.get_closest_marker("soak")]
        self.marked = {item.nodeid for item in marked}
        if self.notes is None:
            left_out = set(marked)
        else:
            passed = {note["test"] for note in self._read()}
            left_out = {item for item in marked if item.nodeid in passed}
        if left_out:
            config.hook.pytest_deselected(items=list(left_out))
            items[:] = [item for item in items if item not in left_out]

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if self.notes is None or not self.writes:
            return
        if report.when == "call" and report.passed:
            self.called[report.nodeid] = report
        ended = report.when == "teardown" and report.passed and report.nodeid in self.called
        if report.skipped or ended:  # a teardown that fails leaves the test to be run again
            report = self.called.pop(report.nodeid, report)
            counts = {"skipped": 1} if report.skipped else dict(report.user_properties)
            note = {"test": report.nodeid, "seconds": report.duration, "counts": counts}
            with self.notes.open("a") as file:
                file.write(json.dumps(note) + "\n")

    @pytest.hookimpl(optionalhook=True)
    def pytest_testnodedown(self, node: Any) -> None:
        """A process of xdist has ended: it has said which tests it found."""
        self.marked |= set(getattr(node, "workeroutput", {}).get("soak", ()))

    def pytest_sessionfinish(self, session: pytest.Session, exitstatus: int) -> None:
        if self.notes is None:
            return
        if not self.writes:
            self.config.workeroutput["soak"] = sorted(self.marked)  # type: ignore[attr-defined]
            return
        notes = self._read()
        passed = {note["test"] for note in notes}
        whole = not any("::" in str(argument) for argument in self.config.args)
        tests: dict[str, set[str]] = {}
        for test in self.marked:
            tests.setdefault(_file(test), set()).add(test)
        done = {file for file, its in tests.items() if whole and its <= passed}
        if done:
            self._write({f: self._summary(n for n in notes if _file(n["test"]) == f) for f in done})
            left = [json.dumps(note) + "\n" for note in notes if _file(note["test"]) not in done]
            self.notes.write_text("".join(left))  # the next run of these files begins anew
        if exitstatus == pytest.ExitCode.NO_TESTS_COLLECTED and self.marked <= passed:
            session.exitstatus = pytest.ExitCode.OK  # none was left to run

    def _write(self, found: dict[str, dict[str, Any]]) -> None:
        """Put the results of files beside those that are there."""
        old = json.loads(self.result.read_text()) if self.result.exists() else {}
        with replacing(self.result) as part:
            part.write_text(json.dumps(dict(sorted((old | found).items())), indent=1) + "\n")

    def _read(self) -> list[dict[str, Any]]:
        """The notes; a test that was noted twice counts once."""
        assert self.notes is not None
        lines = self.notes.read_text().splitlines() if self.notes.exists() else []
        return list({note["test"]: note for note in map(json.loads, lines)}.values())

    def _summary(self, notes: Iterable[dict[str, Any]]) -> dict[str, Any]:
        """What is committed: seed, versions and commit, and the counts of each check."""
        checks: dict[str, dict[str, Any]] = {}
        for note in sorted(notes, key=lambda note: note["test"]):
            check = checks.setdefault(note["test"].partition("[")[0], {"tests": 0, "seconds": 0})
            check["tests"] += 1
            check["seconds"] = round(check["seconds"] + note["seconds"], 1)
            for name, count in note["counts"].items():
                check[name] = check.get(name, 0) + count
        about = {"finished": time.strftime("%Y-%m-%dT%H:%M:%S%z"), "seed": self.seed}
        return {**about, "code": self.code, **describe_environment(), "checks": checks}


def _file(test: str) -> str:
    return test.partition("::")[0]


def _fingerprint() -> str:
    """Changes whenever a line of Python in the repository does."""
    digest = hashlib.sha256()
    for path in sorted(p for package in PACKAGES for p in (ROOT / package).rglob("*.py")):
        digest.update(f"{path.relative_to(ROOT)}\0".encode() + path.read_bytes())
    return digest.hexdigest()[:16]
