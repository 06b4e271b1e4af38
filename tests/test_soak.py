"""A soak runs when it is asked for, and goes on where it was cut off."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from tests.helpers.soak import Soak

NAMES = ["quick", "long-1", "long-2"]


def _config(folder, expression, deselected, **more):
    return SimpleNamespace(
        option=SimpleNamespace(markexpr=expression),
        cache=SimpleNamespace(mkdir=lambda name: folder),
        hook=SimpleNamespace(pytest_deselected=lambda items: deselected.extend(items)),
        **more,
    )


class _Item:
    def __init__(self, name: str) -> None:
        self.nodeid = name

    def get_closest_marker(self, mark: str) -> bool:
        return mark == "soak" and self.nodeid.startswith("long")


def _kept(folder, expression, **more) -> tuple[list[str], Soak]:
    deselected: list[_Item] = []
    config = _config(folder, expression, deselected, **more)
    soak, items = Soak(config), [_Item(name) for name in NAMES]
    soak.pytest_collection_modifyitems(config, items)
    kept = [item.nodeid for item in items]
    assert sorted(kept + [item.nodeid for item in deselected]) == sorted(NAMES)
    return kept, soak


def _passed(name: str) -> SimpleNamespace:
    return SimpleNamespace(nodeid=name, when="call", passed=True)


@pytest.mark.parametrize("expression", ["", "not slow"])
def test_it_does_not_run_unless_asked_for(tmp_path, expression) -> None:
    kept, soak = _kept(tmp_path, expression)
    soak.pytest_runtest_logreport(_passed("quick"))
    assert kept == ["quick"] and not list(tmp_path.iterdir())


def test_what_has_passed_is_left_out_until_all_has(tmp_path) -> None:
    kept, soak = _kept(tmp_path, "soak")
    assert kept == NAMES  # pytest itself leaves the quick one out, by the same expression
    soak.pytest_runtest_logreport(_passed("long-1"))
    soak.pytest_runtest_logreport(SimpleNamespace(nodeid="long-2", when="call", passed=False))
    soak.pytest_sessionfinish(pytest.ExitCode.TESTS_FAILED)
    kept, soak = _kept(tmp_path, "soak")
    assert kept == ["quick", "long-2"]
    soak.pytest_runtest_logreport(_passed("long-2"))
    soak.pytest_sessionfinish(pytest.ExitCode.OK)
    assert _kept(tmp_path, "soak")[0] == NAMES


def test_only_the_first_of_several_processes_takes_notes(tmp_path) -> None:
    _, soak = _kept(tmp_path, "soak", workerinput={})
    soak.pytest_runtest_logreport(_passed("long-1"))
    soak.pytest_sessionfinish(pytest.ExitCode.OK)
    assert not list(tmp_path.iterdir())
