"""The wheel, built from this tree and installed into an environment that has nothing else.

Downloading torch takes minutes, so the environment gets links to the packages that are installed
here, but to those alone that the wheel asks for. With ``TTA_WHEEL_FULL=1`` pip installs everything
from the package index instead.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Iterable, Sequence
from importlib import metadata
from pathlib import Path

__all__ = ["build_wheel", "empty_environment", "run_in"]

ROOT = Path(__file__).parents[2]
REQUIRED = ("torch", "numpy", "scipy", "safetensors")
IN_A_BUILD = (
    "pyproject.toml", "MANIFEST.in", "README.md", "LICENSE", "tta", "corruptions", "tools",
)  # fmt: skip
FULL = os.environ.get("TTA_WHEEL_FULL", "") not in ("", "0")


def build_wheel(folder: Path) -> Path:
    """Build the wheel of this tree in `folder`, with the setuptools that is installed here.

    Args:
        folder: Empty; the tree is copied into it, so that nothing in it changes.

    Returns:
        The wheel.
    """
    tree, dist = folder / "tree", folder / "dist"
    tree.mkdir()
    for name in IN_A_BUILD:
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, tree / name, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(ROOT / name, tree / name)
    _pip(sys.executable, "wheel", "--no-deps", "--no-build-isolation", "--wheel-dir", dist, tree)
    (wheel,) = dist.glob("*.whl")
    return wheel


def empty_environment(folder: Path, wheel: Path, required: Sequence[str] = REQUIRED) -> Path:
    """Make a virtual environment that holds pip, the wheel and what it requires, nothing else.

    Args:
        folder: Where; it must not exist.
        wheel: To be installed.
        required: Names of packages that are linked, together with all that they require.

    Returns:
        The environment's interpreter.
    """
    subprocess.run([sys.executable, "-m", "venv", folder], check=True)
    python = folder / "bin" / "python"
    if FULL:
        _pip(python, "install", wheel)
    else:
        _link_packages(required, folder)
        _pip(python, "install", "--no-deps", "--no-index", wheel)
    return python


def run_in(python: Path, *arguments: str, folder: Path) -> subprocess.CompletedProcess[str]:
    """Run an environment's interpreter in `folder`, without this repository on its path."""
    own = {name: text for name, text in os.environ.items() if not name.startswith("PYTHON")}
    return subprocess.run(
        [python, *arguments],
        capture_output=True,
        text=True,
        cwd=folder,
        env={**own, "OMP_NUM_THREADS": "1"},
    )


def _link_packages(names: Iterable[str], environment: Path) -> None:
    """Link packages that are installed here, and what they require, into an environment."""
    variables = {"base": str(environment), "platbase": str(environment)}
    target = Path(sysconfig.get_path("purelib", "venv", variables))
    for distribution in _with_requirements(names).values():
        for file in distribution.files or ():
            top = file.parts[0]
            if top in ("..", "__pycache__") or (target / top).exists():
                continue
            (target / top).symlink_to(Path(str(distribution.locate_file(top))).resolve())


def _with_requirements(names: Iterable[str]) -> dict[str, metadata.Distribution]:
    """Installed packages by name, and all that they require without extras."""
    found: dict[str, metadata.Distribution] = {}
    left = list(names)
    while left:
        name = re.sub(r"[-_.]+", "-", left.pop()).lower()
        if name in found:
            continue
        try:
            found[name] = metadata.distribution(name)
        except metadata.PackageNotFoundError:  # of another system or Python
            continue
        for requirement in found[name].requires or ():
            if "extra ==" not in requirement:
                left.append(re.match(r"[\w.-]+", requirement)[0])  # type: ignore[index]
    return found


def _pip(python: str | Path, *arguments: str | Path) -> None:
    """Run the pip of an environment."""
    done = subprocess.run(
        [python, "-m", "pip", "--disable-pip-version-check", "-q", *arguments],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
