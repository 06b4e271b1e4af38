"""The build backend: that of setuptools, once it has the long description and a clean start."""

from __future__ import annotations

import shutil
from pathlib import Path

from setuptools.build_meta import *  # noqa: F403 (the hooks of a backend)

from tools.long_description import long_description, read_repository, read_version

ROOT = Path(__file__).parents[1]
BUILD = ROOT / "build"

# Setuptools puts into a wheel whatever an earlier build left: modules that have moved since.
shutil.rmtree(BUILD / "lib", ignore_errors=True)
BUILD.mkdir(exist_ok=True)
readme = (ROOT / "README.md").read_text()
text = long_description(readme, read_repository(ROOT), read_version(ROOT))
(BUILD / "long_description.md").write_text(text)  # pyproject.toml reads it
