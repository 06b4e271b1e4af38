"""Adapters on disk: ``save(adapter, folder)`` and ``load(model, folder)``.

A folder holds ``config.json`` (the adapter's config and what the model was) and
``adapter.safetensors`` (state and constants). No pickle, and no source data needed to resume.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from tta.adapter import Adapter
from tta.build import build
from tta.config import AdapterConfig

__all__ = ["load", "save"]

FORMAT = 1


def save(adapter: Adapter, folder: str | Path) -> None:
    """Write an adapter's config, state and constants into ``folder``.

    Both files are written beside their place and then moved there, so that a crash leaves the
    former pair readable.

    Raises:
        TypeError: When ``adapter`` is not an Adapter.
    """
    if not isinstance(adapter, Adapter):
        raise TypeError(
            f"`adapter` must be a tta.Adapter, got {type(adapter).__name__}: pass what tta.wrap "
            "returned."
        )
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {f"state:{k}": v for k, v in adapter.state().items()}
    tensors |= {f"constant:{k}": v.detach().clone() for k, v in adapter.constants().items()}
    tensors |= {f"initial:{k}": v.clone() for k, v in adapter.reset_point().items()}
    about = {
        "format": FORMAT,
        "config": adapter.config.to_dict(),
        "model": _signature(adapter.model, adapter),
    }
    _write(folder / "adapter.safetensors", lambda p: save_file(_contiguous(tensors), str(p)))
    _write(folder / "config.json", lambda p: p.write_text(json.dumps(about, indent=2)))


def load(model: nn.Module, folder: str | Path, *, source: Any = None) -> Adapter:
    """Wrap ``model`` as the saved adapter was and go on from its state.

    Args:
        model: The classifier that was wrapped, unwrapped and with its source weights.
        folder: What :func:`save` wrote.
        source: As for :func:`tta.wrap`; only a method that replays source batches from a data
            loader asks for it (a list of batches is saved with the adapter).

    Raises:
        FileNotFoundError: When the folder holds no adapter.
        ValueError: When the adapter was made for another model, or by a newer version.
    """
    folder = Path(folder)
    for name in ("config.json", "adapter.safetensors"):
        if not (folder / name).is_file():
            raise FileNotFoundError(
                f"`folder` must hold a saved adapter, but {folder / name} is missing: pass the "
                "folder that tta.save wrote."
            )
    about = json.loads((folder / "config.json").read_text())
    if about.get("format") != FORMAT:
        raise ValueError(
            f"`folder` must be of format {FORMAT}, got {about.get('format')!r} in {folder}: "
            "save it again with this version."
        )
    config = AdapterConfig.from_dict(about["config"])
    parts: dict[str, dict[str, Tensor]] = {"state": {}, "constant": {}, "initial": {}}
    with safe_open(str(folder / "adapter.safetensors"), "pt") as file:
        for key in file.keys():  # noqa: SIM118
            kind, _, name = key.partition(":")
            parts[kind][name] = file.get_tensor(key)
    adapter = build(model, config, source, constants=parts["constant"])
    try:
        expected = _signature(adapter.model, adapter)
        if expected != about["model"]:
            raise ValueError(
                f"`model` must be the one that was saved ({about['model']['type']}, "
                f"{about['model']['classes']} classes, {about['model']['parameters']} parameters, "
                f"source weights {about['model'].get('weights')}), got {expected['type']}, "
                f"{expected['classes']} classes, {expected['parameters']} parameters, weights "
                f"{expected['weights']}: pass the model that {folder} was made for."
            )
        missing = set(adapter.state()) - set(parts["state"]) - set(parts["initial"])
        if missing:
            raise ValueError(
                f"`folder` must hold a whole state, but {folder} lacks {min(missing)!r}: save the "
                "adapter again."
            )
        adapter.load_state(parts["initial"], as_source=True)
        adapter.load_state(parts["state"])
    except Exception:
        adapter.unwrap()
        raise
    return adapter


def _signature(model: nn.Module, adapter: Adapter) -> dict[str, Any]:
    return {
        "type": type(model).__name__,
        "classes": adapter.num_classes,
        "parameters": sum(p.numel() for p in model.parameters()),
        "weights": adapter.made_by["weights"],
    }


def _contiguous(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {k: v.detach().cpu().contiguous() for k, v in tensors.items()}


def _write(path: Path, write: Any) -> None:
    part = path.with_name(path.name + ".part")
    write(part)
    os.replace(part, path)
