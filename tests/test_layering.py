"""The direction of every import, read from the source code."""

from __future__ import annotations

import ast
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
OURS = {"tta", "corruptions", "models", "experiments", "tests"}
TTA = {"torch", "numpy", "scipy", "safetensors"}
CORRUPTIONS = {"torch", "numpy", "scipy", "torchvision", "PIL"}
# What each package may import beside the standard library and itself; None = anything.
ALLOWED: dict[str, set[str] | None] = {
    "tta": TTA,
    "corruptions": CORRUPTIONS,
    "models": TTA | CORRUPTIONS | {"timm", "tta"},
    "experiments": None,
}
# What a plain install lacks, and only this file imports when asked to.
OPTIONAL = {"tta/streams/strip.py": {"matplotlib"}}


def _imports(path: Path) -> set[str]:
    """Full names of the modules that a file imports, inside functions too."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: imports are absolute"
            found.add(node.module or "")
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return found


@pytest.mark.parametrize("package", ALLOWED)
def test_packages_point_one_way(package: str) -> None:
    files = sorted((ROOT / package).rglob("*.py"))
    assert files
    for path in files:
        tops = {name.partition(".")[0] for name in _imports(path)}
        foreign = tops - set(sys.stdlib_module_names) - {package}
        foreign -= OPTIONAL.get(str(path.relative_to(ROOT)), set())
        allowed = ALLOWED[package]
        assert "tests" not in foreign, path
        if allowed is not None:
            assert foreign <= allowed, f"{path} imports {sorted(foreign - allowed)}"


def test_a_method_never_imports_another() -> None:
    for path in (ROOT / "tta" / "methods").glob("*.py"):
        if path.stem != "__init__":
            others = {n for n in _imports(path) if n.startswith("tta.methods")}
            assert not others, f"{path} imports {others}"


def test_streams_and_methods_do_not_know_each_other() -> None:
    for path in (ROOT / "tta" / "streams").glob("*.py"):
        assert not {n for n in _imports(path) if n.startswith("tta.methods")}, path
    for path in (ROOT / "tta" / "methods").glob("*.py"):
        assert not {n for n in _imports(path) if n.startswith("tta.streams")}, path


def test_importing_tta_loads_nothing_heavy() -> None:
    """In a fresh interpreter, so that what pytest imported does not count."""
    import subprocess

    code = (
        "import sys, tta; print([m for m in ('timm', 'torchvision', 'models') if m in sys.modules])"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert run.stdout.strip() == "[]", run.stderr


def test_files_stay_readable() -> None:
    for package in ALLOWED:
        for path in (ROOT / package).rglob("*.py"):
            assert len(path.read_text().splitlines()) <= 400, path
