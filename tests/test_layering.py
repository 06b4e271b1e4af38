"""The direction of every import, read from the source code: no circle, and no arrow back up.

Imports inside functions and under ``TYPE_CHECKING`` count like any other.
"""

from __future__ import annotations

import ast
import statistics
import subprocess
import sys
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
# What each package may import beside the standard library and itself; None = anything.
TTA = {"torch", "numpy", "scipy", "safetensors"}
CORRUPTIONS = {"torch", "numpy", "scipy", "torchvision", "PIL"}
PACKAGES: dict[str, set[str] | None] = {
    "tta": TTA,
    "corruptions": CORRUPTIONS,
    "models": TTA | CORRUPTIONS | {"timm", "tta"},
    "experiments": None,
}
# What a plain install lacks, and these files import when they are asked to.
OPTIONAL = {
    "tta/streams/strip.py": {"matplotlib"},
    "tta/core/pictures.py": {"PIL"},
    "tta/export/onnx_graph.py": {"onnxscript"},
    "tta/export/trial.py": {"onnxruntime"},
    "tta/export/run.py": {"onnxruntime", "PIL"},
}
# Rooms whose files may import what extras bring, but within functions alone.
SERVING = {"tta/runtime", "tta/export", "tta/cli"}
EXTRAS = {
    "PIL",
    "timm",
    "torchvision",
    "av",
    "fastapi",
    "starlette",
    "uvicorn",
    "prometheus_client",
}
EXTRAS |= {"onnx", "onnxscript", "onnxruntime", "python_multipart", "ray"}

# The rooms of a package, and which others each may import. The verbs are the files at the top.
ROOMS: dict[str, dict[str, set[str]]] = {
    "tta": {
        "core": set(),
        "parts": {"core"},
        "methods": {"core", "parts"},
        "streams": {"core"},
        "verbs": {"core"},
        "runtime": {"verbs", "core", "parts"},
        "cli": {"verbs", "core", "parts", "runtime", "export"},
        "export": {"verbs", "core", "parts"},
        "__init__": {"verbs", "core", "methods", "streams", "runtime", "export"},
        "__main__": {"cli"},
    },
    "experiments": {
        "records": set(),
        "data": set(),
        "report": {"records"},
        "run": {"records", "data", "report"},
        "sweep": {"records", "data", "report", "run"},
        "studies": {"records", "data", "report", "run", "sweep"},
        "cli": {"records", "data", "report", "run", "sweep", "studies"},
        "__init__": {"run"},
        "__main__": {"cli"},
    },
}


def _modules() -> dict[str, Path]:
    paths = (p for package in (*PACKAGES, "tests") for p in (ROOT / package).rglob("*.py"))
    return {
        ".".join(p.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): p
        for p in paths
    }


MODULES = _modules()


def _imported_names(path: Path) -> set[str]:
    """Full names of what a file imports, wherever in it."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: imports are absolute"
            names = {f"{node.module}.{alias.name}" for alias in node.names}
            found |= {name if name in MODULES else str(node.module) for name in names}
    return found


GRAPH = {name: (_imported_names(path) & MODULES.keys()) - {name} for name, path in MODULES.items()}


def _room(module: str) -> str:
    """The folder of a module in its package, or what the file at the top is."""
    package, _, rest = module.partition(".")
    if not rest:
        return "__init__"
    first, _, _ = rest.partition(".")
    is_file = (ROOT / package / f"{first}.py").is_file()
    return first if not is_file or first in ROOMS[package] else "verbs"


def test_nothing_imports_itself_in_a_circle() -> None:
    order = list(TopologicalSorter(GRAPH).static_order())  # raises and names the circle
    assert set(order) == set(MODULES)


@pytest.mark.parametrize("package", PACKAGES)
def test_packages_point_one_way(package: str) -> None:
    files = sorted((ROOT / package).rglob("*.py"))
    assert files
    for path in files:
        tops = {name.partition(".")[0] for name in _imported_names(path)}
        foreign = tops - set(sys.stdlib_module_names) - {package}
        foreign -= OPTIONAL.get(str(path.relative_to(ROOT)), set())
        if any(path.is_relative_to(ROOT / room) for room in SERVING):
            foreign -= EXTRAS
        allowed = PACKAGES[package]
        assert "tests" not in foreign, path
        if allowed is not None:
            assert foreign <= allowed, f"{path} imports {sorted(foreign - allowed)}"


def test_extras_are_imported_within_functions_alone() -> None:
    """So that every module of `tta` can be imported by a plain install."""
    for path in sorted((ROOT / "tta").rglob("*.py")):
        tree = ast.parse(path.read_text())
        functions = [
            n for n in ast.walk(tree) if isinstance(n, (ast.FunctionDef, ast.AsyncFunctionDef))
        ]
        inside = {id(n) for function in functions for n in ast.walk(function)}
        for node in ast.walk(tree):
            if isinstance(node, ast.Import):
                names = {alias.name for alias in node.names}
            elif isinstance(node, ast.ImportFrom):
                names = {str(node.module)}
            else:
                continue
            extras = {name.partition(".")[0] for name in names} & (EXTRAS | {"matplotlib"})
            typing = "if TYPE_CHECKING:" in path.read_text() and node.col_offset
            assert not extras or id(node) in inside or typing, f"{path} imports {extras}"


@pytest.mark.parametrize("package", ROOMS)
def test_rooms_point_one_way(package: str) -> None:
    rooms = ROOMS[package]
    for module in MODULES:
        if module.partition(".")[0] != package:
            continue
        room = _room(module)
        for other in GRAPH[module]:
            if other.partition(".")[0] == package and other != package:
                there = _room(other)
                assert there == room or there in rooms[room], f"{module} imports {other}"


def test_a_method_imports_no_other_method() -> None:
    """The base of a family, a file that begins with an underscore, excepted."""
    for module in MODULES:
        if module.startswith("tta.methods."):
            others = {m for m in GRAPH[module] if m.startswith("tta.methods.")}
            others = {m for m in others if not m.rpartition(".")[2].startswith("_")}
            assert not others, f"{module} imports {others}"


def test_streams_know_checks_and_pictures_alone() -> None:
    for module in MODULES:
        if module.startswith("tta.streams"):
            others = {m for m in GRAPH[module] if not m.startswith("tta.streams")}
            assert others <= {"tta.core.checks", "tta.core.pictures"}, f"{module} imports {others}"


def test_ingredients_register_nothing() -> None:
    for path in (ROOT / "tta" / "parts").glob("*.py"):
        assert "tta.core.registry" not in _imported_names(path), path


def test_tests_share_helpers_and_helpers_know_no_test() -> None:
    for module in MODULES:
        if module.startswith("tests."):
            of_tests = {m for m in GRAPH[module] if m.startswith("tests")}
            allowed = {m for m in of_tests if m.startswith(("tests.helpers", "tests.fuzz"))}
            assert of_tests == allowed, f"{module} imports {of_tests - allowed}"


def test_importing_tta_loads_nothing_heavy() -> None:
    """In a fresh interpreter, so that what pytest imported does not count."""
    code = (
        "import sys, tta; print([m for m in ('timm', 'torchvision', 'models', 'tta.runtime') "
        "if m in sys.modules])"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert run.stdout.strip() == "[]", run.stderr


def test_files_stay_readable() -> None:
    lengths = {
        path: len(path.read_text().splitlines())
        for package in PACKAGES
        for path in (ROOT / package).rglob("*.py")
    }
    assert max(lengths.values()) <= 500, max(lengths, key=lengths.__getitem__)
    assert statistics.median(lengths.values()) < 150
