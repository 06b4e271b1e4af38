"""What a result depends on besides its configuration: versions, hardware, commit."""

from __future__ import annotations

import json
import os
import platform
import subprocess
from functools import lru_cache
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

import tta
from corruptions.chunks import usable_cores
from experiments.records.config import BASELINE
from tta.core.config import SLOTS

__all__ = ["THREADS", "describe_environment", "threads_matter"]

THREADS = Path(__file__).parents[1] / "results" / "threads.json"  # of `experiments threads`
PACKAGES = ("torch", "torchvision", "timm", "numpy", "scipy", "pillow")


def describe_environment() -> dict[str, Any]:
    """Versions, hardware and git commit, as JSON types."""
    return {"versions": dict(_versions()), "hardware": _hardware(), "git": _commit()}


def threads_matter(config: tta.AdapterConfig, device: torch.device) -> bool | None:
    """Whether numbers of an adapter on a CPU depend on how many threads torch has.

    Returns:
        Whether a component's did in the study that `THREADS` holds. None where that does not say:
        on a GPU, and for a component that was not measured unless another one's did.
    """
    if device.type != "cpu":
        return None
    parts = config.to_dict()
    filled = [parts[slot] for slot in SLOTS if parts.get(slot)]
    names = [p if isinstance(p, str) else p["name"] for p in filled] or [BASELINE]
    found = [_depending().get(name) for name in names]
    return True if True in found else None if None in found else False


@lru_cache(maxsize=1)
def _depending() -> dict[str, bool]:
    """Whether each recipe's numbers depended on the threads, on any network."""
    recipes = json.loads(THREADS.read_text())["recipes"] if THREADS.is_file() else {}
    return {
        name: not all(row["same"] for row in found.values() if row)
        for name, found in recipes.items()
        if any(found.values())  # of networks that it fits
    }


@lru_cache(maxsize=1)
def _versions() -> dict[str, str]:
    found = {"python": platform.python_version(), "tta": tta.__version__}
    for name in PACKAGES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            found[name] = "not installed"
    return found


def _hardware() -> dict[str, Any]:
    gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    return {
        "cpu": _cpu_name(),
        "cores": usable_cores(),
        "torch_threads": torch.get_num_threads(),
        "memory_gb": _memory_gb(),
        "gpus": gpus,
        "system": platform.platform(),
    }


def _cpu_name() -> str:
    cpuinfo = Path("/proc/cpuinfo")  # platform.processor() is empty or "x86_64" on Linux
    if cpuinfo.exists():
        for line in cpuinfo.read_text().splitlines():
            if line.lower().startswith(("model name", "cpu model")):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def _memory_gb() -> float | None:
    try:
        size = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, ValueError, OSError):
        return None
    return round(size / 2**30, 1)


def _commit() -> dict[str, Any] | None:
    """Commit and whether the tree has changes; None outside a repository or before a commit."""
    root = Path(__file__).parents[1]
    head = _git(root, "rev-parse", "HEAD")
    if head is None:
        return None
    return {"commit": head, "changed": bool(_git(root, "status", "--porcelain"))}


def _git(root: Path, *arguments: str) -> str | None:
    try:
        done = subprocess.run(
            ["git", "--no-optional-locks", "-C", str(root), *arguments],
            capture_output=True,
            text=True,
            timeout=10,
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None
