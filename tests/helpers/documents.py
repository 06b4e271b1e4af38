"""The Python blocks of README and docs, and running them in the environment that they claim.

A block says what it needs in a comment before it: ``<!-- needs: tta -->`` stands for the wheel
alone, the other words for an extra or a part of the repository.
"""

from __future__ import annotations

import os
import re
import socket
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]

# What can be imported beside `tta` and what that depends on.
NEEDS: dict[str, tuple[str, ...]] = {
    "tta": (),
    "corruptions": ("torchvision", "PIL", "corruptions"),
    "plots": ("matplotlib", "PIL"),
    "models": ("torchvision", "PIL", "timm", "models"),
    "serve": ("torchvision", "PIL", "timm", "fastapi", "uvicorn", "prometheus_client"),
}
SERVING = ("fastapi", "uvicorn", "prometheus_client")
OPTIONAL = ("torchvision", "PIL", "corruptions", "matplotlib", "timm", "models", "experiments")
OPTIONAL += SERVING
NEEDS["experiments"] = OPTIONAL


@dataclass(frozen=True)
class Block:
    """A Python block.

    Args:
        page: Its file.
        line: The number of its first line there.
        needs: A key of ``NEEDS``, or None where the page claims nothing.
        code: The text.
    """

    page: Path
    line: int
    needs: str | None
    code: str


def python_blocks(page: Path) -> list[Block]:
    """The Python blocks of a page, in order."""
    text = page.read_text()
    blocks = []
    pattern = r"(?:<!-- needs: (\w+) -->\n)?```python\n(.*?)^```"
    for found in re.finditer(pattern, text, flags=re.M | re.S):
        line = text.count("\n", 0, found.start(2)) + 1
        blocks.append(Block(page, line, found[1], found[2]))
    return blocks


def program(needs: str) -> str:
    """A program that runs the blocks of all pages for one environment.

    The blocks of a page share their names. Those that need less than the environment has run too,
    since those after them go on with what they made.

    Args:
        needs: A key of ``NEEDS``.
    """
    pages = []
    for page in PAGES:
        wanted = [block for block in python_blocks(page) if _enough(block.needs, needs)]
        if any(block.needs == needs for block in wanted):
            name = page.relative_to(ROOT).as_posix()
            # Lines count as in the page, so that a traceback says where the mistake is.
            pages.append((name, ["\n" * (b.line - 1) + b.code for b in wanted]))
    return f"""
for page, blocks in {pages!r}:
    names = {{"__name__": "page"}}
    for block in blocks:
        exec(compile(block, page, "exec", dont_inherit=True), names)
"""


def _enough(wanted: str | None, needs: str) -> bool:
    """Whether a block can run in an environment."""
    return wanted in NEEDS and set(NEEDS[wanted]) <= set(NEEDS[needs])


def run_blocks(needs: str, folder: Path) -> subprocess.CompletedProcess[str]:
    """Run the blocks that need something in a process of their own that has only that.

    Args:
        needs: A key of ``NEEDS``.
        folder: Where they run and may write.
    """
    blocked = [name for name in OPTIONAL if name not in NEEDS[needs]]
    head = f"""
import sys
sys.path.insert(0, {str(ROOT)!r})
for name in {blocked!r}:
    sys.modules[name] = None  # importing it is an ImportError
import torch
torch.set_num_threads(1)
"""
    file = folder / "blocks.py"
    file.write_text(head + program(needs))
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    # One rank of one, for the example with several.
    ranks = {"MASTER_ADDR": "127.0.0.1", "RANK": "0", "WORLD_SIZE": "1", "MASTER_PORT": str(port)}
    return subprocess.run(
        [sys.executable, str(file)],
        cwd=folder,
        env={**os.environ, **ranks},
        capture_output=True,
        text=True,
        check=False,
    )
