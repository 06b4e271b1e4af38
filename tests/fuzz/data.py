"""Cases of source artefacts and files."""

from __future__ import annotations

import json
import math
import os
import shutil
import tempfile
from functools import cache
from pathlib import Path
from random import Random
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

import tta
from tests.fuzz.adapters import adapter_of, batches, needed, recipes, source_of
from tests.fuzz.junk import bent, junk, nested, tensor, words
from tests.fuzz.nets import CLASSES, IMAGE, good
from tests.fuzz.oracle import Case, files_of, model_of, unchanged
from tta.core.checks import shown

__all__ = ["bent_json", "files", "folder_of", "json_of", "sources"]


@cache
def _root() -> Path:
    import atexit

    root = Path(tempfile.mkdtemp(prefix="fuzz-"))
    atexit.register(shutil.rmtree, root, ignore_errors=True)
    return root


def folder_of(number: int) -> Path:
    """An empty folder for a case."""
    folder = _root() / "case"
    for path in sorted(folder.rglob("*")) if folder.is_dir() else []:
        if path.is_dir() and not path.is_symlink():
            path.chmod(0o755)
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    return folder


# Source artefacts --------------------------------------------------------------------------------


def _artefacts(rng: Random) -> dict[str, Any]:
    names = {n: p.detach() for n, p in good().named_parameters()}
    every: dict[str, Any] = {
        "fisher": {n: tensor(rng, p.shape) for n, p in names.items()},
        "posterior_mean": {n: p.clone() for n, p in names.items()},
        "posterior_variance": {n: tensor(rng, p.shape) for n, p in names.items()},
        "prototypes": tensor(rng, (CLASSES, 4)),
        "features": tensor(rng, (6, 4)),
        "feature_labels": torch.arange(6) % CLASSES,
        "memory_init": tensor(rng, (4,)),
        "covariance": torch.eye(4),
        "batches": batches(rng),
    }
    kept = rng.sample(list(every), rng.randrange(1, len(every) + 1))
    return {name: every[name] for name in kept}


def sources(rng: Random) -> Case:
    """Source artefacts, and what is made of them."""
    model = good(rng.choice(["bn", "gn"]))
    how = rng.randrange(3)
    name = rng.choice(recipes())
    if how == 0:
        loader, methods = source_of(rng), rng.choice([[name], name, bent(rng, [name]), junk(rng)])
        more = {k: v for k, v in needed(name, rng).items() if k not in ("source", "mean", "std")}
        if rng.random() < 0.2:
            more[words(rng)] = junk(rng)
        told = f"collect_source(net, {shown(loader)}, {shown(methods)}, {shown(more)})"

        def collect() -> None:
            tta.collect_source(model, loader, methods, **more)

        return Case(told, collect, always={"the model": lambda: model_of(model)})
    fields = _artefacts(rng)
    for _ in range(rng.choice([0, 1, 1, 2])):
        key = rng.choice(list(fields))
        fields[key] = bent(rng, fields[key])
    arguments = needed(name, rng)
    told = f"SourceStatistics({shown(fields)})"
    if how == 1:
        folder = folder_of(0)
        path: Any = folder / "source.safetensors"
        if rng.random() < 0.3:
            path = rng.choice([junk(rng), folder, folder / "a" / "b", str(path), "/dev/full"])

        def save() -> None:
            tta.SourceStatistics(**fields).save(path)
            tta.SourceStatistics.load(path)

        watched = {"the folder": lambda: files_of(folder)} if folder.is_dir() else {}
        return Case(f"{told}.save({shown(path)}) and load", save, watched=watched)

    def wrap() -> None:
        arguments["source"] = tta.SourceStatistics(**fields)
        adapter = tta.wrap(model, name, **arguments)
        adapter(tensor(rng, (4, *IMAGE)))
        adapter.unwrap()

    watched = {"the model": lambda: model_of(model)}
    return Case(f"wrap(net, {name!r}, source={told})", wrap, watched=watched)


# Files -------------------------------------------------------------------------------------------


def json_of(rng: Random, value: Any) -> str:
    """A JSON text with something wrong, or none at all."""
    change = rng.randrange(12)
    text = json.dumps(value)
    if change == 0:
        return "[" * rng.choice([10, 1000, 100_000])
    if change == 1:
        return '{"a":' * rng.choice([10, 1000, 100_000])
    if change == 2:
        return text[: rng.randrange(len(text))]
    if change == 3:
        return rng.choice(["", "null", "3", "NaN", "[]", "{}", '"a"', "1" * 5000, "1e400", "\0",
                           text + text, "{" + text[1:-1] + "," + text[1:-1] + "}"])  # fmt: skip
    if change == 4:
        place = rng.randrange(len(text))
        return text[:place] + rng.choice('0"{}[],:x-\\\ud83d') + text[place + 1 :]
    for _ in range(rng.choice([1, 1, 3])):
        value = bent_json(rng, value)
    return json.dumps(value, default=lambda _: None, skipkeys=True)


JSON_VALUES = (None, True, False, 0, 1, -1, 2**70, 10**400, 1.5, math.nan, math.inf, "", "x" * 5000,
               [], {}, [[]], {"a": 1}, [None], "tent", "\0", "a\nb")  # fmt: skip


def bent_json(rng: Random, value: Any) -> Any:
    """One place of a structure changed."""
    if isinstance(value, dict) and value and rng.random() < 0.9:
        items = dict(value)
        key = rng.choice(list(items))
        change = rng.randrange(8)
        if change == 0:
            del items[key]
        elif change == 1:
            items[rng.choice([key + "x", "", "name", "x" * 5000])] = items.pop(key)
        elif change == 2:
            items[rng.choice(["more", "", "a\nb"])] = rng.choice(JSON_VALUES)
        else:
            items[key] = bent_json(rng, items[key])
        return items
    if isinstance(value, list) and value and rng.random() < 0.7:
        items = list(value)
        place = rng.randrange(len(items))
        items[place] = bent_json(rng, items[place])
        return items
    return nested(rng.choice([3, 100])) if rng.random() < 0.05 else rng.choice(JSON_VALUES)


def _damaged(rng: Random, data: bytes) -> bytes:
    change = rng.randrange(8)
    if not data or change == 0:
        return b""
    place = rng.randrange(len(data))
    if change == 1:
        return data[:place]
    if change == 2:
        return data + bytes(rng.randrange(256) for _ in range(10))
    if change == 3:
        return rng.choice([b"\xff" * 8, b"\0" * 100, b"PK\x03\x04", b"\x80\x04.", b"{}"]) + data
    if change == 4:  # the length of a safetensors header
        return rng.choice([b"\xff" * 8, b"\0" * 8, (2**40).to_bytes(8, "little")]) + data[8:]
    if change == 5 and len(data) > 64:
        return data[:64] + b"[" * 100_000 + data[64:]
    bit = 1 << rng.randrange(8)
    limit = rng.choice([200, len(data)])  # header or anywhere
    place %= min(limit, len(data))
    return data[:place] + bytes([data[place] ^ bit]) + data[place + 1 :]


def files(rng: Random) -> Case:
    """A saved adapter that is damaged, and paths that are none."""
    how = rng.randrange(8)
    folder = folder_of(0) / "saved"
    if how == 0:
        data = tta.wrap(good(), "unmix_tns.cifar10", update="eata", source=batches(rng)).config
        text: Any = json_of(rng, data.to_dict()) if rng.random() < 0.9 else junk(rng)
        return Case(f"AdapterConfig.from_json({shown(text)})",
                    lambda: tta.AdapterConfig.from_json(text))  # fmt: skip
    if how == 1:
        whole = tta.wrap(good(), rng.choice(["sar", "bn", "lame"])).config.to_dict()
        value = bent(rng, whole) if rng.random() < 0.5 else bent_json(rng, whole)
        return Case(f"AdapterConfig.from_dict({shown(value)})",
                    lambda: tta.AdapterConfig.from_dict(value))  # fmt: skip
    if how == 2:
        return _save(rng, folder)
    adapter, made = adapter_of(rng)
    adapter(tensor(rng, (4, *IMAGE)))
    tta.save(adapter, folder)
    model = adapter.unwrap()
    path = rng.choice(sorted(folder.iterdir()))
    told = []
    for _ in range(rng.choice([1, 1, 2])):
        path = rng.choice(sorted(folder.iterdir()))
        told.append(path.name)
        change = rng.randrange(8)
        if change == 0 and not path.is_dir():
            path.unlink()
            if rng.random() < 0.5:
                path.mkdir()
        elif path.is_symlink() or not path.is_file():
            continue
        elif change == 1:
            path.unlink()
            path.symlink_to(rng.choice(["/dev/null", "/proc/self/mem", path.name, "/nowhere", "."]))
        elif path.is_symlink() or not path.is_file():
            continue
        elif path.suffix == ".json" and change < 6:
            try:
                about = json.loads(path.read_bytes())
            except (ValueError, RecursionError):
                continue
            path.write_bytes(json_of(rng, about).encode("utf-8", "replace"))
        elif change == 6 and path.suffix != ".json":
            save_file(_other_tensors(rng), str(path))
        else:
            path.write_bytes(_damaged(rng, path.read_bytes()))
        if not list(folder.iterdir()):
            break
    given: Any = folder if rng.random() < 0.9 else _no_path(rng, folder)
    source: Any = rng.choice([None, None, batches(rng), source_of(rng)])
    other: Any = rng.choice([model, model, model, good("gn"), junk(rng)])

    watched = {"the model": lambda: model_of(other), "the folder": lambda: _entries(folder)}

    def load() -> None:
        adapter = tta.load(other, given, source=source)
        del watched["the model"]  # a call that fails leaves it as loaded
        adapter(tensor(rng, (4, *IMAGE)))

    return Case(f"{made}, saved, with other {told}; load({shown(given)})", load, watched=watched)


def _entries(folder: Path) -> Any:
    return sorted(p.name for p in folder.iterdir()) if folder.is_dir() else None


def _other_tensors(rng: Random) -> dict[str, Tensor]:
    keys = ["a", "state:param/x", "constant:", ":", "initial:rng", "x" * 400]
    return {rng.choice(keys): torch.zeros(3)}


def _no_path(rng: Random, folder: Path) -> Any:
    return rng.choice([junk(rng), words(rng), "/proc/self/nothing", "/dev/null", "/dev/null/a",
                       folder / "config.json", folder / ("a" * 300), f"{folder}/" + "a/" * 3000,
                       "\0", folder / "adapter.safetensors" / "a", b"a", "/proc/1"])  # fmt: skip


def _save(rng: Random, folder: Path) -> Case:
    adapter, made = adapter_of(rng)
    target: Any = _no_path(rng, folder)
    given: Any = adapter if rng.random() < 0.8 else junk(rng)
    if isinstance(target, (str, Path)):
        text = os.fspath(target)
        safe = str(folder.parent) in text or text.startswith(("/dev/null", "/proc"))
        target = target if safe else folder.parent / text.replace("\0", "").strip("/.")
    gone = rng.random() < 0.2
    if gone:
        adapter.unwrap()
    watched = {"the folder": lambda: files_of(folder.parent)}
    if not gone:
        watched["the state"] = lambda: unchanged(adapter.state())
    return Case(f"save({made}, {shown(target)})", lambda: tta.save(given, target),
                watched=watched, unwrapped=gone)  # fmt: skip
