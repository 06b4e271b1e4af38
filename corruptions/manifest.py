"""Finished files of a data set: which they are, and what is in them.

``SHA256SUMS`` has one line for each file, in the format of the usual tool (``sha256sum -c``). A
file is written under another name, its line is appended, and then it gets its own name. So a file
in its place is complete and listed, whenever the writing was killed; a line without its file is
work to do again.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from corruptions.messages import shown

__all__ = ["SETTINGS", "SUMS", "finished", "open_folder", "put", "put_bytes", "sha256", "verify"]

SUMS = "SHA256SUMS"
SETTINGS = "settings.json"
_PART = ".part"
_LINE = re.compile(r"([0-9a-f]{64})  (.+)")


def open_folder(folder: Path, settings: dict[str, Any]) -> None:
    """Make the folder of a data set, or go on with it.

    Args:
        folder: Empty, missing, or begun with the same settings.
        settings: What decides the files' content, as JSON can say it.

    Raises:
        ValueError: When the folder holds other things, or files of other settings.
        OSError: When it cannot be written to.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise type(error)(
            f"`output` must be a folder that can be made, but {folder} is not ({error.strerror}): "
            "choose another"
        ) from error
    path = folder / SETTINGS
    if not path.exists():
        others = sorted(entry.name for entry in folder.iterdir() if entry.suffix != _PART)
        if others:
            raise ValueError(
                f"`output` must be an empty folder or one begun by this command, got {folder} "
                f"with {shown(others[0])} and no {SETTINGS}: choose another folder"
            )
        put_bytes(folder, SETTINGS, (json.dumps(settings, indent=2) + "\n").encode(), listed=False)
    try:
        before = json.loads(path.read_bytes())
        if not isinstance(before, dict):
            raise ValueError("it is no object")
    except ValueError as error:
        raise ValueError(
            f"`output` must be a folder begun by this command, got {folder} whose {SETTINGS} "
            f"cannot be read ({error}): choose another folder"
        ) from error
    for key in [*settings, *before]:
        if before.get(key) != settings.get(key):
            raise ValueError(
                f"`output` must be a folder begun with the same settings, got {folder} with "
                f"{key} = {_short(before.get(key))} in place of {_short(settings.get(key))}: "
                "choose another folder, or repeat the first command"
            )
    for part in folder.rglob(f"*{_PART}"):
        part.unlink(missing_ok=True)


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 60 else text[:57] + "..."


def put(folder: Path, name: str, write: Callable[[Path], None], *, listed: bool = True) -> None:
    """Write a file so that it is either complete and listed, or absent.

    Args:
        folder: The data set's folder.
        name: Path of the file inside it, with forward slashes.
        write: Writes to the path it is given.
        listed: Append the file's line; processes may do so at the same time.
    """
    target = folder / name
    target.parent.mkdir(parents=True, exist_ok=True)
    part = target.with_name(f"{target.name}.{os.getpid()}{_PART}")
    write(part)
    if listed:
        _append(folder, f"{sha256(part)}  {name}\n")
    os.replace(part, target)


def put_bytes(folder: Path, name: str, content: bytes, *, listed: bool = True) -> None:
    """Write a file as `put` does, from content in memory."""

    def write(part: Path) -> None:
        part.write_bytes(content)

    put(folder, name, write, listed=listed)


def _append(folder: Path, line: str) -> None:
    # One short write at the end of a file is done in one piece.
    file = os.open(folder / SUMS, os.O_RDWR | os.O_APPEND | os.O_CREAT, 0o644)
    try:
        os.write(file, line.encode())
    finally:
        os.close(file)


def sha256(path: Path) -> str:
    """Checksum of a file's content."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def _listed(folder: Path) -> dict[str, str]:
    path = folder / SUMS
    if not path.exists():
        return {}
    matches = (_LINE.fullmatch(line) for line in path.read_text().splitlines())
    return {match[2]: match[1] for match in matches if match}


def finished(folder: Path) -> set[str]:
    """Names of the files that are complete and in their place."""
    return {name for name in _listed(folder) if (folder / name).is_file()}


def verify(folder: Path) -> list[str]:
    """List what is wrong with a data set, one sentence each; nothing if all is as written."""
    if not (folder / SUMS).is_file():
        raise ValueError(f"`folder` must hold {SUMS}, got {folder}: pass the output of write")
    problems = []
    for name, expected in sorted(_listed(folder).items()):
        path = folder / name
        if not path.is_file():
            problems.append(f"{name} is missing: run the same write command again")
        elif sha256(path) != expected:
            problems.append(f"{name} has changed: delete it and run the same write command again")
    return problems
