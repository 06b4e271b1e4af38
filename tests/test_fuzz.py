"""Hostile input ends in a result or in one sentence, and changes nothing: see `tests.fuzz`.

Each test is a range of numbers of cases. `python -m tests.fuzz NUMBER` shows one of them.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.fuzz import cases
from tests.fuzz.cases import SURFACES, look_at, make
from tests.fuzz.oracle import Case

QUICK, SLOW, SOAK = 500, 5_000, 100_000
PART = 250  # cases of one test: a soak that was cut off goes on behind the last whole one


def _look_at(first: int, count: int) -> None:
    problems = [found for n in range(first, first + count) if (found := look_at(n)) is not None]
    assert not problems, f"{len(problems)} of {count}:\n\n" + "\n\n".join(problems[:5])


@pytest.mark.parametrize("first", range(0, QUICK, PART))
def test_some_cases(first: int) -> None:
    _look_at(first, PART)


@pytest.mark.slow
@pytest.mark.parametrize("first", range(QUICK, SLOW, PART))
def test_more_cases(first: int) -> None:
    _look_at(first, PART)


@pytest.mark.soak
@pytest.mark.parametrize("first", range(SLOW, SOAK, PART))
def test_all_cases(first: int) -> None:
    _look_at(first, PART)


def test_a_case_depends_on_its_number_alone() -> None:
    told = {number: make(number).words for number in range(40)}
    kinds = {words.split(":")[0].split()[1] for words in told.values()}
    assert len(kinds) > len(SURFACES) // 2
    for number in (39, 3, 17):
        assert _without_places(make(number).words) == _without_places(told[number])


def test_what_a_case_writes_to_a_relative_path_goes_with_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(cases, "make", lambda _: Case("save", lambda: Path("-").write_text("x")))
    assert look_at(0) is None
    assert Path.cwd() == tmp_path and not list(tmp_path.iterdir())


def _without_places(words: str) -> str:
    """The words of a case without addresses of objects and names of temporary folders."""
    return "".join(part for part in words.split() if "0x" not in part and "/fuzz-" not in part)
