"""Names of modules of version 0.1 work, and say where the modules are now."""

from __future__ import annotations

import importlib
import subprocess
import sys
from pathlib import Path

import pytest

import tta
from tta import _moved

ROOT = Path(__file__).parents[1]


@pytest.mark.parametrize("name", sorted({*_moved.MOVED, *_moved.FORMER}))
def test_an_old_name_warns_and_gives_what_is_there_now(name: str, monkeypatch) -> None:
    monkeypatch.delitem(sys.modules, name, raising=False)
    with pytest.warns(DeprecationWarning, match=f"{name} has moved to .* goes after version 0.2"):
        old = importlib.import_module(name)
    if name in _moved.MOVED:
        now = importlib.import_module(_moved.MOVED[name])
        for key in getattr(now, "__all__", ()):
            assert getattr(old, key) is getattr(now, key)
    for key, place in _moved.FORMER.get(name, {}).items():
        assert getattr(old, key) is getattr(importlib.import_module(place), key)
    with pytest.raises(AttributeError):
        old.nothing_of_that_name  # noqa: B018


def test_the_warning_points_at_the_line_that_imports(tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text(
        "import tta\nfrom tta.losses import entropy\n"
        "assert tta.parallel.split_batches is tta.runtime.split_batches\n"
        "from tta.checks import whole\n"
    )
    run = subprocess.run(
        [sys.executable, "-W", "always::DeprecationWarning", str(script)],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env={"PYTHONPATH": str(ROOT), "PATH": ""},
    )
    assert run.returncode == 0, run.stderr
    assert f"{script}:2: DeprecationWarning: tta.losses has moved to tta.parts.losses" in run.stderr


def test_what_has_moved_is_no_name_of_the_package() -> None:
    assert not {name.partition(".")[2] for name in _moved.MOVED} & set(tta.__all__)
    assert tta.runtime.split_batches.__module__ == "tta.runtime.parallel"
