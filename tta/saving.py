"""Adapters on disk: ``save(adapter, folder)`` and ``load(model, folder)``.

A folder holds ``config.json`` (the adapter's config and a description of the model) and
``adapter.safetensors`` (state and constants). Nothing is pickled, and no source data is needed to
resume.
"""

from __future__ import annotations

import json
import time
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load as from_bytes
from safetensors.torch import save as to_bytes
from torch import Tensor, nn

from tta.core.adapter import Adapter
from tta.core.build import Injected, build
from tta.core.checks import folder_like, parsed_json, shown, told
from tta.core.denoiser import Diffusion
from tta.core.files import leftovers_of, replacing_together, writing
from tta.core.head import FeatureSpec
from tta.core.outputs import LogitsSpec
from tta.core.recipe import AdapterConfig
from tta.core.state_dict import checksum

__all__ = ["load", "save"]

FORMAT = 1
TRIES, PAUSE = 20, 0.02  # to find two files that belong together, in seconds
CONFIG, TENSORS = "config.json", "adapter.safetensors"


def save(adapter: Adapter, folder: str | Path) -> None:
    """Write an adapter's config, state and constants into ``folder``.

    Both files are first written under other names and then moved into place, one after the other,
    and each names the other that it belongs to. Wherever the process dies, :func:`load` finds
    either the former pair or the new one, complete. Several processes may save to one folder; the
    files of the last one stay.

    Args:
        adapter: The adapter, frozen or not.
        folder: Made if it does not exist.

    Raises:
        TypeError: When ``adapter`` is not an Adapter, or ``folder`` no path.
        RuntimeError: When the adapter was unwrapped.
        NotADirectoryError: When ``folder`` is a file.
        OSError: When it cannot be written to; what it held stays.
    """
    if not isinstance(adapter, Adapter):
        raise TypeError(
            f"`adapter` must be a tta.Adapter, got {type(adapter).__name__}: pass what tta.wrap "
            "returned."
        )
    folder = folder_like("folder", folder)
    if "model" not in adapter._modules:
        raise RuntimeError("this adapter was unwrapped and has no state: wrap the model again.")
    with adapter.turns.lock:  # no call of another thread comes between
        tensors = {f"state:{k}": v for k, v in adapter.state().items()}
        tensors |= {f"constant:{k}": v.detach().clone() for k, v in adapter.constants().items()}
        tensors |= {f"initial:{k}": v for k, v in adapter.reset_point().items()}
    tensors = {k: v.detach().cpu().contiguous() for k, v in tensors.items()}
    about: dict[str, Any] = {
        "format": FORMAT,
        "config": adapter.config.to_dict(),
        "model": _signature(adapter.model, adapter),
    }
    names = zlib.crc32(json.dumps([about, *tensors]).encode())
    about["pair"] = f"{names:08x}{checksum(tensors.values()):08x}"
    metadata = {"pair": about["pair"], "checksum": _checksum(tensors)}
    with writing("folder", folder):
        folder.mkdir(parents=True, exist_ok=True)
        # Between the two moves, the tensors belong to the config under its other name: see `_read`.
        with replacing_together(folder / TENSORS, folder / CONFIG) as (tensors_part, config_part):
            # Not `save_file`, which makes another file of that name, without lock and umask.
            tensors_part.write_bytes(to_bytes(tensors, metadata))
            config_part.write_text(json.dumps(about, indent=2))


def load(
    model: nn.Module,
    folder: str | Path,
    *,
    source: Any = None,
    input: nn.Module | Diffusion | None = None,
    logits: LogitsSpec = None,
    features: FeatureSpec = None,
) -> Adapter:
    """Wrap ``model`` as the saved adapter was and go on from its state.

    Args:
        model: The classifier that was wrapped, unwrapped and with its source weights.
        folder: What :func:`save` wrote.
        source: As for :func:`tta.wrap`; only a method that replays source batches from a data
            loader asks for it (a list of batches is saved with the adapter).
        input: As for :func:`tta.wrap`, where that was given a module or a denoiser.
        logits: As for :func:`tta.wrap`, where that was given a function, which no file holds.
        features: As for :func:`tta.wrap`, where that was given a module or a function.

    Returns:
        The adapter, in the state in which it was saved.

    Raises:
        TypeError: When ``folder`` is no path.
        FileNotFoundError: When the folder holds no adapter.
        ValueError: When a file in it is incomplete or of another kind, or the adapter was made for
            another model or by a newer version.
    """
    folder = folder_like("folder", folder)
    about, parts = _read(folder)
    try:
        config = AdapterConfig.from_dict(about["config"])
    except (TypeError, ValueError) as error:
        raise ValueError(
            f"`folder` must hold a config of this version, but that in {told(folder / CONFIG)} is "
            "not "
            f"one: {told(error)}"
        ) from None
    injected = Injected(logits=logits, features=features, input=input)
    adapter = build(model, config, source, injected, parts["constant"])
    try:
        saved, expected = about["model"], _signature(adapter.model, adapter)
        if expected != saved:
            raise ValueError(
                f"`model` must be the one that was saved ({told(saved.get('type'), 30)}, "
                f"{told(saved.get('classes'), 20)} classes, {told(saved.get('parameters'), 20)} "
                f"parameters, source weights {told(saved.get('weights'), 20)}), got "
                f"{expected['type']}, "
                f"{expected['classes']} classes, {expected['parameters']} parameters, weights "
                f"{expected['weights']}: pass the model that {told(folder)} was made for."
            )
        missing = set(adapter.state()) - set(parts["state"]) - set(parts["initial"])
        if missing:
            raise ValueError(
                f"`folder` must hold a whole state, but {told(folder)} lacks "
                f"{shown(min(missing))}: another version may have saved it; do so again with this "
                "one."
            )
        adapter.load_state(parts["initial"], as_source=True, allow_nonfinite=True)
        adapter.load_state(parts["state"], allow_nonfinite=True)
    except BaseException:
        adapter.unwrap()
        raise
    return adapter


def _signature(model: nn.Module, adapter: Adapter) -> dict[str, Any]:
    return {
        "type": type(model).__name__,
        "classes": adapter.num_classes,
        "parameters": sum(p.numel() for p in model.parameters()),
        "weights": adapter.fingerprint["weights"],
    }


def _metadata(data: bytes) -> dict[str, str]:
    """What a safetensors file says beside its tensors; its header is JSON after its length."""
    length = int.from_bytes(data[:8], "little")
    return parsed_json(data[8 : 8 + length]).get("__metadata__", {})


def _checksum(tensors: Mapping[str, Tensor]) -> str:
    """Of names and values, in an order that a file does not change."""
    names = sorted(tensors)
    crc = zlib.crc32("\n".join(names).encode())
    return f"{crc:08x}{checksum(tensors[name] for name in names):08x}"


def _read(folder: Path) -> tuple[dict[str, Any], dict[str, dict[str, Tensor]]]:
    """What a folder says about its adapter, and the tensors by kind and name."""
    for tries_left in reversed(range(TRIES)):
        try:
            return _read_once(folder)
        except _NotTogetherError as error:  # another process may be saving
            if tries_left == 0:
                raise ValueError(str(error)) from None
            time.sleep(PAUSE)
    raise AssertionError("unreachable")


class _NotTogetherError(ValueError):
    """Two files were not saved together."""


def _read_once(folder: Path) -> tuple[dict[str, Any], dict[str, dict[str, Tensor]]]:
    # A process that died after moving the tensors left their config under its other name.
    config = folder / CONFIG
    places = [path for path in (*leftovers_of(config), config) if path.is_file()]
    if not places or not (folder / TENSORS).is_file():
        missing = folder / (TENSORS if places else CONFIG)
        raise FileNotFoundError(
            f"`folder` must hold a saved adapter, but {told(missing)} is missing: pass the folder "
            "that "
            "tta.save wrote."
        )
    parts: dict[str, dict[str, Tensor]] = {"state": {}, "constant": {}, "initial": {}}
    try:
        # In one go: what opens a file of that name twice may find another one.
        data = (folder / TENSORS).read_bytes()
        tensors, metadata = from_bytes(data), _metadata(data)
        pair = metadata.get("pair")
        for key, tensor in tensors.items():
            kind, _, name = key.partition(":")
            parts[kind][name] = tensor
    except OSError as error:
        raise _unreadable(folder / TENSORS, error) from error
    except (SafetensorError, KeyError, ValueError) as error:
        raise ValueError(
            f"`folder` must hold a saved adapter, but {told(folder / TENSORS)} is cut off or "
            "something "
            f"else ({told(error)}): save it again."
        ) from None
    if metadata.get("checksum", _checksum(tensors)) != _checksum(tensors):  # 0.1.0 wrote none
        raise ValueError(
            f"`folder` must hold a saved adapter, but values in {told(folder / TENSORS)} are not "
            "those "
            "that were saved: save it again."
        )
    failure: ValueError = _NotTogetherError(
        f"`folder` must hold two files that were saved together, but those in {told(folder)} were "
        "not: "
        "save the adapter again."
    )
    for place in places:
        try:
            about = _about(place)
        except FileNotFoundError:  # its writer has just moved it
            continue
        except ValueError as error:
            if place == config:  # a part may be one that is being written
                failure = error
        else:
            if about.get("pair") == pair:
                return about, parts
    raise failure


def _unreadable(path: Path, error: OSError) -> OSError:
    reason = error.strerror or type(error).__name__
    return type(error)(
        f"`folder` must hold files that can be read, but {told(path)} cannot ({reason}): choose "
        "another, or change its permissions."
    )


def _about(path: Path) -> dict[str, Any]:
    """What a config file holds."""
    try:
        about = parsed_json(path.read_bytes())
    except FileNotFoundError:
        raise
    except OSError as error:
        raise _unreadable(path, error) from error
    except ValueError as error:
        about, reason = None, str(error)
    else:
        reason = "it is no config of an adapter"
    if isinstance(about, dict) and about.get("format", FORMAT) != FORMAT:
        raise ValueError(
            f"`folder` must be of format {FORMAT}, got {shown(about['format'])} in {told(path)}: "
            "save it "
            "again with this version."
        )
    if not isinstance(about, dict) or any(
        not isinstance(about.get(key), dict) for key in ("config", "model")
    ):
        raise ValueError(
            f"`folder` must hold a saved adapter, but {told(path)} is cut off or something else "
            f"({reason}): save it again."
        )
    return about
