"""Files of streams: one safetensors file each, whole or absent, with a checksum.

A file says in its header, as JSON, which stream it is of and what is no tensor. It holds no path
and no device, so a folder may be moved to another machine.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import stat
import zlib
from collections.abc import Iterable, Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load as from_bytes
from safetensors.torch import save as to_bytes
from torch import Tensor

from tta.core.checks import parsed_json, shown, told
from tta.core.files import NO_LINKS, replacing
from tta.core.state_dict import checksum

__all__ = ["StreamFiles"]

FORMAT = 1
HEADER = "stream"  # the key of the JSON in a file's metadata
LARGEST = 1 << 32  # bytes of a file that is read
ENDING = ".safetensors"
Content = tuple[dict[str, Tensor], dict[str, Any]]  # tensors by name, and what JSON holds


class StreamFiles:
    """The files in a pool's folder.

    Streams are in subfolders, so that none has many thousands of files.

    Args:
        folder: The pool's.
        fingerprint: Of the adapter; files of another one are refused.
    """

    def __init__(self, folder: Path, fingerprint: Mapping[str, Any]) -> None:
        self.folder = folder
        self.streams = folder / "streams"
        self.start = folder / f"start{ENDING}"  # what new streams begin with
        self.fingerprint = dict(fingerprint)

    def place(self, name: str) -> Path:
        """The file of a stream, whatever characters its name has."""
        digest = hashlib.sha256(name.encode("utf-8", "surrogatepass")).hexdigest()
        readable = re.sub(r"[^a-z0-9]+", "-", name.lower()[:40]).strip("-")
        return self.streams / digest[:2] / f"{readable}-{digest[2:18]}{ENDING}"

    def paths(self) -> Iterator[Path]:
        """What may be files of streams, in no order."""
        return self.streams.glob(f"*/*{ENDING}")

    def names(self, paths: Iterable[Path]) -> Iterator[str]:
        """The streams of files, in no order; files that are none are passed over."""
        for path in paths:
            with suppress(OSError, ValueError):
                yield _header(path, _read_bytes(path, head=True))["name"]

    def write(self, path: Path, name: str, content: Content) -> None:
        """Write a file, or leave the former one if that fails.

        Raises:
            OSError: When it cannot be written.
        """
        # Clones, as safetensors takes no two tensors of one memory.
        plain = {"memory_format": torch.contiguous_format}
        tensors = {key: t.detach().cpu().clone(**plain) for key, t in content[0].items()}
        about = {
            "format": FORMAT,
            "name": name,
            "fingerprint": self.fingerprint,
            **content[1],
        }
        text = json.dumps(about, sort_keys=True)
        metadata = {HEADER: text, "checksum": _checksum(text, tensors)}
        for folder in (self.folder, self.streams, path.parent):
            if folder.is_symlink():
                raise NotADirectoryError(
                    f"`folder` must hold no links, got the link {told(folder)}: put a folder there."
                )
            if not folder.is_dir():
                folder.mkdir(parents=True, exist_ok=True)
                _flush(folder.parent)
        with replacing(path) as part:
            part.write_bytes(to_bytes(tensors, metadata))

    def read(self, path: Path, name: str) -> Content:
        """What :meth:`write` wrote.

        Raises:
            OSError: When there is no file, or it is a link.
            ValueError: When it is cut off, has changed, or is of another stream, method or model.
        """
        try:
            data = _read_bytes(path)
        except OSError as error:
            raise type(error)(
                f"`folder` must hold files that can be read, but {told(path.name)} cannot "
                f"({told(error.strerror or error)}): put it back, or drop() the stream."
            ) from error
        about = _header(path, data)
        try:
            tensors = from_bytes(data)
            whole = _checksum(json.dumps(about, sort_keys=True), tensors)
        except (SafetensorError, ValueError) as error:
            raise _damaged(path, f"it is cut off or something else: {error}") from None
        if _metadata(data).get("checksum") != whole:
            raise _damaged(path, "its values are not those that were saved")
        if about["name"] != name:
            raise _damaged(path, f"it is of {shown(about['name'], 60)}")
        if about.get("fingerprint") != self.fingerprint:
            mine, theirs = self.fingerprint, about.get("fingerprint")
            raise _damaged(path, f"it is of {shown(theirs, 50)}, not of {shown(mine, 50)}")
        return tensors, about

    def remove(self, path: Path) -> None:
        """Remove a file, if it is there."""
        with suppress(FileNotFoundError):
            path.unlink()
            _flush(path.parent)


def _read_bytes(path: Path, head: bool = False) -> bytes:
    """The bytes of a file, or those of its header; links are not followed."""
    handle = os.open(path, os.O_RDONLY | NO_LINKS | getattr(os, "O_NONBLOCK", 0))
    with open(handle, "rb") as file:
        about = os.fstat(handle)
        if not stat.S_ISREG(about.st_mode) or about.st_size > LARGEST:
            raise _damaged(path, f"it is no file of at most {LARGEST} bytes")
        if not head:
            return file.read()
        start = file.read(8)
        length = int.from_bytes(start, "little")
        return start + (file.read(length) if length <= about.st_size else b"")


def _metadata(data: bytes) -> dict[str, str]:
    length = int.from_bytes(data[:8], "little")
    header = parsed_json(data[8 : 8 + length])
    return header["__metadata__"]


def _header(path: Path, data: bytes) -> dict[str, Any]:
    """What a file says of itself."""
    try:
        about = parsed_json(_metadata(data)[HEADER])
        name, version = about["name"], about["format"]
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        kind = type(error).__name__
        raise _damaged(path, f"it is cut off or something else ({kind})") from None
    if version != FORMAT:
        raise _damaged(path, f"it is of format {shown(version, 20)}, not {FORMAT}")
    if not isinstance(name, str):
        raise _damaged(path, "it has no name")
    return about


def _damaged(path: Path, reason: str) -> ValueError:
    return ValueError(
        f"`folder` must hold whole files of this pool's streams, but {path.name} is none, as "
        f"{told(reason, 130)}: drop() the stream, or put a good file there."
    )


def _checksum(text: str, tensors: Mapping[str, Tensor]) -> str:
    """Of what is no tensor, names and values."""
    names = sorted(tensors)
    crc = zlib.crc32("\n".join([text, *names]).encode())
    return f"{crc:08x}{checksum(tensors[name] for name in names):08x}"


def _flush(folder: Path) -> None:
    with suppress(OSError):  # not every system opens folders
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
