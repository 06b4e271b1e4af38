"""A soak runs when it is asked for, goes on where it was cut off, and writes what it found."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from tests.helpers.soak import RESULT, Share, Soak, shares

ROOT = RESULT.parents[2]
NAMES = ["a.py::quick", "a.py::long[1]", "a.py::long[2]", "b.py::long"]
QUICK, FIRST, SECOND, OTHER = NAMES


class _Item:
    def __init__(self, name: str) -> None:
        self.nodeid = name

    def get_closest_marker(self, mark: str) -> bool:
        return mark == "soak" and "::long" in self.nodeid


class _Started:
    """A run of pytest with the plugin: which tests are left to it."""

    def __init__(self, folder, expression="soak", args=("tests",), seed=0, **more) -> None:
        deselected: list[_Item] = []
        config = SimpleNamespace(
            option=SimpleNamespace(markexpr=expression),
            cache=SimpleNamespace(mkdir=lambda name: folder),
            hook=SimpleNamespace(pytest_deselected=lambda items: deselected.extend(items)),
            getoption=lambda name: {"soak_seed": seed}[name],
            args=args,
            **more,
        )
        self.soak = Soak(config, folder / "soak.json")
        items = [_Item(name) for name in NAMES]
        self.soak.pytest_collection_modifyitems(config, items)
        self.left = [item.nodeid for item in items]
        assert sorted(self.left + [item.nodeid for item in deselected]) == sorted(NAMES)

    def report(self, name: str, outcome: str = "passed", **counts: int) -> None:
        for when in ("setup", "call", "teardown"):
            self.soak.pytest_runtest_logreport(
                SimpleNamespace(
                    nodeid=name,
                    when=when,
                    passed=when != "call" or outcome == "passed",
                    skipped=when == "call" and outcome == "skipped",
                    duration=1.5,
                    user_properties=list(counts.items()),
                )
            )

    def finish(self, status=pytest.ExitCode.OK) -> int:
        session = SimpleNamespace(exitstatus=status)
        self.soak.pytest_sessionfinish(session, status)
        return session.exitstatus


@pytest.mark.parametrize("expression", ["", "not slow"])
def test_it_does_not_run_unless_asked_for(tmp_path, expression) -> None:
    run = _Started(tmp_path, expression)
    run.report(QUICK)
    run.finish()
    assert run.left == [QUICK] and not list(tmp_path.iterdir())


def test_what_has_passed_is_left_out_until_all_of_its_file_has(tmp_path) -> None:
    run = _Started(tmp_path)
    assert run.left == NAMES  # pytest itself leaves the quick one out, by the same expression
    run.report(FIRST, kills=20)
    run.report(SECOND, "failed")
    run.finish(pytest.ExitCode.TESTS_FAILED)
    run = _Started(tmp_path)
    assert run.left == [QUICK, SECOND, OTHER] and not (tmp_path / "soak.json").exists()
    run.report(SECOND, kills=22)
    run.finish()
    found = json.loads((tmp_path / "soak.json").read_text())
    assert found.keys() == {"a.py"} and found["a.py"]["checks"] == {
        "a.py::long": {"tests": 2, "seconds": 3.0, "kills": 42}
    }
    about = found["a.py"]
    assert about["seed"] == 0 and about["versions"]["torch"] and "commit" in (about["git"] or about)
    run = _Started(tmp_path)
    assert run.left == NAMES
    run.report(OTHER)
    run.finish(pytest.ExitCode.TESTS_FAILED)  # of another file
    assert json.loads((tmp_path / "soak.json").read_text()) == found | {
        "b.py": json.loads((tmp_path / "soak.json").read_text())["b.py"]
    }
    assert _Started(tmp_path).left == NAMES


def test_a_run_of_some_tests_writes_no_result(tmp_path) -> None:
    """Chosen by -k, one is left; named one by one, all that were found may pass."""
    run = _Started(tmp_path)
    run.report(FIRST)
    run.finish()
    assert _Started(tmp_path).left == [QUICK, SECOND, OTHER]
    run = _Started(tmp_path, args=("a.py::long",))
    run.report(SECOND)
    run.finish()
    assert not (tmp_path / "soak.json").exists()


def test_a_run_that_finds_all_passed_ends_well(tmp_path) -> None:
    run = _Started(tmp_path, args=("a.py::long", "b.py::long"))
    run.report(FIRST), run.report(SECOND, "skipped"), run.report(OTHER)
    run.finish()
    assert _Started(tmp_path).finish(pytest.ExitCode.NO_TESTS_COLLECTED) == pytest.ExitCode.OK
    found = json.loads((tmp_path / "soak.json").read_text())
    assert found["a.py"]["checks"]["a.py::long"]["skipped"] == 1


def test_another_seed_begins_anew(tmp_path) -> None:
    _Started(tmp_path).report(FIRST)
    assert _Started(tmp_path, seed=1).left == NAMES
    assert _Started(tmp_path).left == [QUICK, SECOND, OTHER]


def test_shares_have_all_cases() -> None:
    values = shares(3, 50, 4).args[1]
    assert [value.values[0] for value in values] == [
        Share(0, 3),
        *(Share(n, count) for n, count in enumerate((13, 13, 13, 11), 1)),
    ]
    assert [value.marks[0].name for value in values] == ["slow"] + ["soak"] * 4


@pytest.mark.parametrize(
    "processes",
    [
        pytest.param([], marks=pytest.mark.slow, id="one"),
        pytest.param(["-n", "2"], marks=pytest.mark.soak, id="two"),
    ],
)
def test_in_pytest_itself(tmp_path, processes) -> None:
    (tmp_path / "conftest.py").write_text(
        "from pathlib import Path\n"
        "from tests.conftest import pytest_addoption, soak_seed\n"
        "from tests.helpers.soak import Soak\n"
        "def pytest_configure(config):\n"
        "    config.pluginmanager.register(Soak(config, Path('soak.json')), 'soak')\n"
    )
    (tmp_path / "pytest.ini").write_text("[pytest]\nmarkers =\n  slow\n  soak\ntestpaths = .\n")
    (tmp_path / "test_it.py").write_text(
        "from pathlib import Path\n"
        "from tests.helpers.soak import shares\n"
        "@shares(1, 4, 2)\n"
        "def test_long(share, soak_seed, record_property):\n"
        "    record_property('cases', share.count)\n"
        "    assert soak_seed == 5 and (share.number == 1 or Path('mended').exists())\n"
    )

    def run(expression: str) -> str:
        command = [sys.executable, "-m", "pytest", "-q", "-m", expression, "--soak-seed", "5"]
        done = subprocess.run(
            [*command, *processes],
            cwd=tmp_path,
            env=os.environ | {"PYTHONPATH": str(ROOT)},
            capture_output=True,
            text=True,
        )
        return done.stdout

    assert "1 failed, 1 passed" in run("soak")
    assert not Path(tmp_path / "soak.json").exists()
    (tmp_path / "mended").touch()
    assert "1 passed" in (said := run("soak")) and "failed" not in said
    found = json.loads((tmp_path / "soak.json").read_text())["test_it.py"]
    assert found["seed"] == 5
    assert found["checks"]["test_it.py::test_long"] | {"seconds": 0} == {
        "tests": 2,
        "seconds": 0,
        "cases": 4,
    }
    assert "1 passed" in run("slow")
