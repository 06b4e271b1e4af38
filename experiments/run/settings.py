"""Configurations from TOML files and flags. A flag wins over the file, the file over the default.

::

    name = "grid"                        # ends the folder's name
    model = "cifar10_resnet20_bn"
    methods = ["source", "tent", "unmix_tns+eata"]
    batch_size = 64
    seed = 0
    imports = ["my_rules"]               # modules that register components of your own
    health = true                        # figures of all methods that need no labels

    [[streams]]
    scenario = "dirichlet"
    domains = ["fog", "snow"]            # default: the scenario's
    severity = 5
    images = 1000                        # of each domain, or "all"
    options = { delta = 0.1 }

    [sweep]                              # for `sweep` only: each list takes the place of one value
    models = ["cifar10_resnet20_bn", "cifar10_resnet20_gn"]
    severities = [1, 3, 5]
    batch_sizes = [16, 64]
    seeds = [0, 1, 2]
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any, get_args

import tta.streams
from corruptions.pictures import OnError
from experiments.data import default_severity
from experiments.records.config import DEMO_METHODS, RunConfig, StreamConfig, SweepConfig
from experiments.records.file import is_file_name
from experiments.run.subject import pick_device
from tta.core.checks import (
    LARGEST,
    boolean,
    nearest,
    one_of,
    path_like,
    shown,
    string,
    told,
    whole_number,
)
from tta.core.plugins import import_modules

if sys.version_info >= (3, 11):
    import tomllib
else:  # the same under its former name
    import tomli as tomllib  # pyright: ignore[reportMissingImports]

__all__ = ["make_run", "make_sweep", "read_settings"]

RUN_KEYS = {f.name for f in fields(RunConfig)}
STREAM_KEYS = {f.name for f in fields(StreamConfig)}
SWEEP_KEYS = {"models", "severities", "batch_sizes", "seeds"}
PLACES = {
    "above the first [[streams]] or [sweep]": RUN_KEYS - {"streams"},
    "below a line [[streams]]": STREAM_KEYS,
    "below a line [sweep]": SWEEP_KEYS,
}
MOST_SEED = 2**63 - 1
MATCHES = ("name", "order")
DEFAULTS: dict[str, Any] = {
    "name": "demo",
    "model": "cifar10_resnet20_bn",
    "data": "bundled",
    "clean": None,
    "classes": None,
    "labels": None,
    "on_error": "raise",
    "match": "name",
    "source": None,
    "methods": DEMO_METHODS,
    "batch_size": 64,
    "seed": 0,
    "device": None,
    "imports": (),
    "health": False,
}
BUNDLED_IMAGES = 1000  # of 2000, so that a laptop does it in minutes


def _strings(name: str, value: Any) -> None:
    if not isinstance(value, (list, tuple)) or not all(isinstance(item, str) for item in value):
        what = "modules" if name == "imports" else "names"
        raise TypeError(
            f"`{name}` must be a list of {what}, got {shown(value)}; put it in brackets"
        )


def _numbers(low: int, high: int) -> Callable[[str, Any], None]:
    def check(name: str, value: Any) -> None:
        if not isinstance(value, list):
            raise TypeError(
                f"`{name}` must be a list of whole numbers, got {shown(value)}; put it in brackets"
            )
        for item in value:
            whole_number(name, item, low, high)

    return check


def _images(name: str, value: Any) -> None:
    if value != "all":
        whole_number(name, value, 1, LARGEST)


def _options(name: str, value: Any) -> None:
    if not isinstance(value, dict):
        raise TypeError(
            f"`{name}` must be a table, got {shown(value)}; write such as options = "
            "{ delta = 0.1 }"
        )


# The kind of each setting of a file; those that are not here are strings.
KINDS: dict[str, Callable[[str, Any], Any]] = {
    "methods": _strings,
    "imports": _strings,
    "domains": _strings,
    "models": _strings,
    "batch_size": lambda name, value: whole_number(name, value, 1, LARGEST),
    "seed": lambda name, value: whole_number(name, value, 0, MOST_SEED),
    "severity": lambda name, value: whole_number(name, value, 1, 5),
    "severities": _numbers(1, 5),
    "batch_sizes": _numbers(1, LARGEST),
    "seeds": _numbers(0, MOST_SEED),
    "images": _images,
    "options": _options,
    "streams": lambda name, value: None,  # tables, checked one by one
    "sweep": lambda name, value: None,
    "tuned": _strings,
    "health": boolean,
}


def read_settings(path: str | Path) -> dict[str, Any]:
    """Read a TOML file and check its keys and the kind of each value.

    Raises:
        FileNotFoundError: When there is no such file.
        ValueError: For a file that is no TOML, an unknown key, or a number out of range.
        TypeError: For a value of the wrong kind.
    """
    if not path_like("config", path).is_file():
        raise FileNotFoundError(
            f"`config` must be a TOML file, but {told(path)} is not there: check the path"
        )
    try:
        settings = tomllib.loads(Path(path).read_bytes().decode())
    except (ValueError, RecursionError) as error:  # a TOMLDecodeError is a ValueError
        raise ValueError(
            f"`config` must be a TOML file, but {path} is not: {told(error)}"
        ) from error
    _check(path, "", settings, RUN_KEYS | {"sweep"})
    streams = settings.get("streams", [])
    if not isinstance(streams, list) or not all(isinstance(stream, dict) for stream in streams):
        raise ValueError(
            f"`{path}` must give streams as tables of their own, got streams = "
            f"{str(streams)[:60]}: write each below a line [[streams]], in two brackets"
        )
    for number, stream in enumerate(streams):
        _check(path, f"streams[{number}].", stream, STREAM_KEYS)
        if "scenario" not in stream:
            raise ValueError(
                f"`{path}` must give each stream a scenario, streams[{number}] has none"
            )
    sweep = settings.get("sweep", {})
    if not isinstance(sweep, dict):
        raise ValueError(
            f"`{path}` must give the sweep as a table, got sweep = {str(sweep)[:60]}: write its "
            "lists below a line [sweep]"
        )
    _check(path, "sweep.", sweep, SWEEP_KEYS)
    return settings


def make_run(settings: Mapping[str, Any], flags: Mapping[str, Any]) -> RunConfig:
    """The configuration of one run, or of what the runs of a sweep have in common.

    Args:
        settings: The settings of a file, see `read_settings`.
        flags: Fields of `RunConfig`, ``tuned`` (what `experiments.sweep.tune` wrote), and fields of
            `StreamConfig` for all streams; None for flags that were not given. ``scenario`` takes
            the place of the file's streams.

    The modules of ``imports`` are imported.

    Raises:
        ValueError: For a value that cannot be, or a module that cannot be imported.
        TypeError: For ``imports`` that are no list.
    """
    given = {name: value for name, value in flags.items() if value is not None}
    values = {**DEFAULTS, **{k: v for k, v in settings.items() if k != "sweep"}}
    values |= {name: value for name, value in given.items() if name in DEFAULTS}
    if isinstance(values["imports"], str):
        raise TypeError(
            f"`imports` must be a list of modules, got {shown(values['imports'])}; put it in "
            "brackets"
        )
    import_modules(values["imports"])
    streams = [dict(stream) for stream in settings.get("streams", [])]
    if "scenario" in given or not streams:
        streams = [{"scenario": given.get("scenario", "continual")}]
    changes = {k: v for k, v in given.items() if k in STREAM_KEYS - set(DEFAULTS) - {"options"}}
    for stream in streams:
        stream |= changes
        stream["options"] = {**stream.get("options", {}), **given.get("options", {})}
    methods = [*values["methods"]]
    for record in given.get("tuned", []):
        if record["method"] in methods:
            methods[methods.index(record["method"])] = record["chosen"]
        elif record["chosen"] not in methods:
            methods.append(record["chosen"])
    defaults = {
        "images": BUNDLED_IMAGES if values["data"] == "bundled" else None,
        "severity": default_severity(values["data"], values["labels"] is not None),
    }
    config = RunConfig(
        **{
            **values,
            "methods": tuple(methods),
            "imports": tuple(values["imports"]),
            "tuned": tuple(given.get("tuned", [])),
            "streams": tuple(_stream(stream, defaults) for stream in streams),
            "device": str(pick_device(values["device"])),
        }
    )
    _check_run(config)
    return config


def make_sweep(settings: Mapping[str, Any], flags: Mapping[str, Any]) -> SweepConfig:
    """The configuration of a sweep; see `make_run`, with lists as in ``[sweep]``."""
    lists = {**settings.get("sweep", {})}
    lists |= {k: v for k, v in flags.items() if k in SWEEP_KEYS and v is not None}
    if not flags.get("name") and "name" not in settings:
        flags = {**flags, "name": "sweep"}
    run = make_run(settings, {k: v for k, v in flags.items() if k not in SWEEP_KEYS})
    values = {name: tuple(lists.get(name, ())) for name in SWEEP_KEYS}
    config = SweepConfig(run=run, **values)
    for cell in config.cells():
        _check_run(cell)
    return config


def _stream(values: dict[str, Any], defaults: Mapping[str, Any]) -> StreamConfig:
    scenario = values["scenario"]
    tta.streams.get_scenario(scenario)  # raises for an unknown name
    values = {"name": scenario, "domains": (), **defaults, **values}
    values["domains"] = tuple(values["domains"])
    values["images"] = None if values["images"] == "all" else values["images"]
    return StreamConfig(**values)


def _check_run(config: RunConfig) -> None:
    one_of("on-error", config.on_error, get_args(OnError))
    one_of("match", config.match, MATCHES)
    whole_number("batch-size", config.batch_size, 1, LARGEST)
    whole_number("seed", config.seed, 0, MOST_SEED)
    names = [stream.name for stream in config.streams]
    for name, value in (("name", config.name), *(("streams.name", name) for name in names)):
        if not is_file_name(value):
            raise ValueError(
                f"`{name}` must be usable in a folder's name, got {shown(value)}: leave out "
                "slashes, or choose another"
            )
    if len(set(names)) != len(names):
        raise ValueError(f"`streams` must have names of their own, got {told(' '.join(names))}")


def _check(path: str | Path, where: str, values: Mapping[str, Any], known: set[str]) -> None:
    """Raise for a key that is not among `known`, with the place where it belongs."""
    for key in values:
        if key in known:
            continue
        belongs = [place for place, keys in PLACES.items() if key in keys and keys is not known]
        advice = nearest(key, sorted(known))
        if key == "corruptions":
            advice = "it is called `domains` there, in each [[streams]]"
        elif belongs and f"{key}s" not in known:
            advice = f"it belongs {' or '.join(belongs)}"
        raise ValueError(f"`{told(path)}` has no setting `{where}{told(key)}`: {advice}")
    for key, value in values.items():
        KINDS.get(key, string)(key, value)
