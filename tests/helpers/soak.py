"""A long run of tests that goes on where it was cut off: ``make soak``."""

from __future__ import annotations

import hashlib
from pathlib import Path

import pytest

__all__ = ["Soak"]

ROOT = Path(__file__).parents[2]
PACKAGES = ("tta", "corruptions", "models", "experiments", "tests")


class Soak:
    """A pytest plugin: tests that are marked ``soak`` run only where ``-m`` names that mark.

    Each test that passes is noted in pytest's cache and left out when the run is started again,
    until the source code changes or all of them have passed. Failed ones run again.
    """

    def __init__(self, config: pytest.Config) -> None:
        self.notes: Path | None = None  # one passed test a line
        if "soak" in config.option.markexpr:
            self.notes = Path(config.cache.mkdir("soak")) / f"{_fingerprint()}.txt"
        self.writes = not hasattr(config, "workerinput")  # processes of xdist report to the first

    def pytest_collection_modifyitems(
        self, config: pytest.Config, items: list[pytest.Item]
    ) -> None:
        marked = [item for item in items if item.get_closest_marker("soak")]
        if self.notes is None:
            left_out = set(marked)
        else:
            passed = set(self.notes.read_text().splitlines() if self.notes.exists() else [])
            left_out = {item for item in marked if item.nodeid in passed}
        if left_out:
            config.hook.pytest_deselected(items=list(left_out))
            items[:] = [item for item in items if item not in left_out]

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if self.notes and self.writes and report.when == "call" and report.passed:
            with self.notes.open("a") as file:
                file.write(report.nodeid + "\n")

    def pytest_sessionfinish(self, exitstatus: int) -> None:
        if self.notes and self.writes and exitstatus == pytest.ExitCode.OK:
            self.notes.unlink(missing_ok=True)  # all have passed: the next run begins anew


def _fingerprint() -> str:
    """Changes whenever a line of Python in the repository does."""
    digest = hashlib.sha256()
    for path in sorted(p for package in PACKAGES for p in (ROOT / package).rglob("*.py")):
        digest.update(f"{path.relative_to(ROOT)}\0".encode() + path.read_bytes())
    return digest.hexdigest()[:16]
