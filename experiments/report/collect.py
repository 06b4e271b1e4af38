"""Results of one method on one stream with one seed, read from runs or from a compact file."""

from __future__ import annotations

import json
import warnings
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from experiments.records.config import BASELINE, RunConfig, StreamConfig
from experiments.records.errors import CannotGoOn
from experiments.records.file import RESULTS, plain, stretches
from experiments.records.health import errors_expected
from experiments.records.lines import encode, split
from tta.core.files import replacing
from tta.streams.building_blocks import ARRANGEMENTS, SELECTIONS
from tta.streams.scenarios import Scenario, get_scenario

__all__ = [
    "NoRunsError",
    "Result",
    "Setting",
    "by_setting",
    "collect",
    "file_name",
    "short_hash",
    "write_compact",
]

POINTS = 120  # of a curve in a compact file
STRETCHES = 60  # more of them are not drawn
_OF_SETTING = ("scenario", "severity", "batch_size", "seed")  # or of a run
_WORDS = 200  # letters of a value that is told as it is


def file_name(text: str) -> str:
    """Text with "_" in place of whatever file names should not have.

    >>> file_name("my/net, batches of 8")
    'my_net__batches_of_8'
    """
    return "".join(c if c.isalnum() or c in "._-" else "_" for c in text)


def short_hash(text: str) -> str:
    """Eight letters that stand for a text which is too long to be told."""
    return f"{zlib.crc32(text.encode()):08x}"


@dataclass(frozen=True, order=True)
class Setting:
    """What results must share to be compared with each other.

    Args:
        model: Name.
        stream: Name.
        scenario: Of the stream.
        severity: Of its domains, where the scenario has not its own.
        batch_size: Of the stream.
        data: What was shifted.
        images: Of the whole stream; the mean over seeds where its length is drawn.
        domains: Number of domains.
        options: What tells it from others among the results that have the same model, name of the
            stream, severity, batch size and number of images: data, domains, and arguments of
            `tta.streams.build` that differ. Empty where nothing does.
    """

    model: str
    stream: str
    scenario: str
    severity: float
    batch_size: int
    data: str
    images: int
    domains: int
    options: str = ""

    @property
    def title(self) -> str:
        """The stream in words."""
        name = self.stream if self.stream == self.scenario else f"{self.stream} ({self.scenario})"
        title = f"{name}, severity {self.severity:g}, batches of {self.batch_size}"
        return f"{title}, {self.options}" if self.options else title

    @property
    def slug(self) -> str:
        """For file names."""
        text = f"{self.model}-{self.stream}-s{self.severity:g}-b{self.batch_size}-n{self.images}"
        if self.options:  # they may be long
            text += f"-{short_hash(self.options)}"
        return file_name(text)


@dataclass(frozen=True)
class Result:
    """One method on one stream with one seed.

    Args:
        setting: Where.
        method: Its label.
        seed: Of the run.
        summary: The ``summary`` line of the results file.
        domains: ``domain`` lines.
        curve: Images seen and errors so far, after each batch or fewer.
        stretches: (first image, one past the last, domain) of each stretch of one domain.
        about: Versions, hardware, commit and date of the run, and under ``stream`` the domains and
            options of the stream.
        expected: Errors so far at the points of `curve`, if estimates of accuracy were true; None
            without estimates.
    """

    setting: Setting
    method: str
    seed: int
    summary: dict[str, Any]
    domains: list[dict[str, Any]]
    curve: tuple[list[int], list[int]]
    stretches: list[tuple[int, int, str]]
    about: dict[str, Any]
    expected: list[float] | None = None

    @property
    def estimate_error(self) -> float | None:
        """Mean absolute error of the estimates of accuracy, a share; None without estimates."""
        found = self.summary.get("health", {}).get("estimates", {})
        return next((entry["mae"] for entry in found.values()), None)

    @property
    def machine(self) -> str:
        """What times may be compared on: its GPUs, or its processor where it has none."""
        hardware = self.about.get("hardware") or {}
        return ", ".join(hardware.get("gpus") or [hardware.get("cpu", "unknown")])


class NoRunsError(CannotGoOn, ValueError):
    """No run came to its end, so that there is nothing to report."""


def collect(paths: Iterable[str | Path]) -> list[Result]:
    """Read all results under some paths.

    Args:
        paths: Folders, searched for runs and compact files, or such files.

    Returns:
        Results of methods that came to their end, in order of settings; of runs of the same thing
        the last one.

    Raises:
        FileNotFoundError: For a path that is not there.
        NoRunsError: Where nothing was found; a ValueError.
    """
    read: list[Result] = []
    paths = [Path(path) for path in paths]
    for path in paths:
        if not path.exists():
            raise FileNotFoundError(f"`{path}` is missing: pass folders of runs")
        files = sorted(path.rglob("*.jsonl")) if path.is_dir() else [path]
        for file in files:
            read += _read(file)
    if not read:
        names = " ".join(str(path) for path in paths)
        raise NoRunsError(
            f"`runs` must hold finished runs, found none in {names}: run some to their end first"
        )
    found = {(r.setting, r.method, r.seed): r for r in _told_apart(_of_one_length(read))}
    return list(found.values())


def by_setting(results: Sequence[Result]) -> dict[Setting, dict[str, list[Result]]]:
    """Results by setting and method, each list in order of seeds; source comes first."""
    groups: dict[Setting, dict[str, list[Result]]] = {}
    for result in sorted(results, key=lambda r: r.seed):
        groups.setdefault(result.setting, {}).setdefault(result.method, []).append(result)
    order = list(dict.fromkeys(result.method for result in results))
    order.sort(key=lambda method: method != BASELINE)
    return {
        setting: {method: groups[setting][method] for method in order if method in groups[setting]}
        for setting in dict.fromkeys(result.setting for result in results)
    }


def write_compact(results: Sequence[Result], path: str | Path) -> None:
    """Write results to one small file, without their batches, replacing what is there."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = []
    for result in results:
        seen, wrong = result.curve
        keep = np.unique(np.linspace(0, len(seen) - 1, min(POINTS, len(seen))).round().astype(int))
        row: dict[str, Any] = asdict(result) | {
            "curve": [[seen[i] for i in keep], [wrong[i] for i in keep]]
        }
        if result.expected is None:
            del row["expected"]
        else:
            row["expected"] = _rounded([result.expected[i] for i in keep])
        for part in [row["summary"], *row["domains"]]:
            for name in ("kind", "stream", "method"):
                part.pop(name, None)  # absent where it comes from such a file
        # A table rounds the summary's figures itself: rounded here too, the last digit it shows
        # could differ from the one that the run's own file gives.
        row["domains"] = _rounded(row["domains"])
        row["summary"]["reliability"] = _rounded(row["summary"]["reliability"])
        if len(result.stretches) > STRETCHES:
            row["stretches"] = []
        lines.append(plain({"kind": "result", **row}))
    with replacing(path) as part:
        part.write_bytes(encode(lines, 0))


def _of_one_length(results: Sequence[Result]) -> list[Result]:
    """The results, with one number of images for all seeds of a stream whose length is drawn."""
    groups: dict[Any, dict[int, set[int]]] = {}  # images by seed
    keys = []
    for result in results:
        stream = result.about.get("stream") or {}
        key = (replace(result.setting, images=0), *sorted(stream.items()))
        keys.append(key if _length_is_drawn(stream) else None)
        if keys[-1] is not None:
            by_seed = groups.setdefault(key, {})
            by_seed.setdefault(result.seed, set()).add(result.setting.images)
    lengths = {
        key: round(float(np.mean([min(images) for images in by_seed.values()])))
        for key, by_seed in groups.items()
        if all(len(images) == 1 for images in by_seed.values())  # else of other images
    }
    return [
        replace(result, setting=replace(result.setting, images=lengths[key]))
        if key in lengths
        else result
        for result, key in zip(results, keys, strict=True)
    ]


def _length_is_drawn(stream: Mapping[str, str]) -> bool:
    blocks = SELECTIONS.get(stream.get("select", "")), ARRANGEMENTS.get(stream.get("arrange", ""))
    return any(block is not None and not block.same_size for block in blocks)


def _told_apart(results: Sequence[Result]) -> list[Result]:
    """The results, with `Setting.options` of those that would share files, but not a stream."""
    groups: dict[str, list[_Said]] = {}
    for result in results:
        held = groups.setdefault(result.setting.slug, [])
        if (said := _Said.of(result)) not in held:
            held.append(said)

    def setting(result: Result) -> Setting:
        others, mine = groups[result.setting.slug], _Said.of(result)
        whole = [other.stream for other in others if other.stream is not None]
        differ = [n for n in mine.known if len({other.known[n] for other in others}) > 1]
        names = dict.fromkeys(name for stream in whole for name in stream)
        differ += [n for n in names if len({stream.get(n) for stream in whole}) > 1]
        values = mine.known | (mine.stream or {})
        words = [f"{name}={values[name]}" for name in differ if name in values]
        # What an earlier version has not said may be either.
        default = f"no {', '.join(differ)}" if differ and mine.stream is not None else ""
        return replace(result.setting, options=", ".join(words) or default)

    return [replace(result, setting=setting(result)) for result in results]


@dataclass(frozen=True)
class _Said:
    """What tells a result's stream from others.

    Args:
        known: What every result says, by name.
        stream: What else the stream is, see `_about_stream`; None in results of version 0.2.
    """

    known: dict[str, str]
    stream: dict[str, str] | None

    @classmethod
    def of(cls, result: Result) -> _Said:
        setting = result.setting
        known = {"data": setting.data, "scenario": setting.scenario}
        return cls(known, result.about.get("stream"))


def _about_stream(build: Mapping[str, Any]) -> dict[str, str]:
    """What a stream is besides the figures of a `Setting`, in words by name.

    Args:
        build: The configuration of the stream, see `tta.streams.Stream.config`, and more of it.
    """
    found: dict[str, str] = {}
    for name, value in build.items():
        if name in _OF_SETTING or value is None or value is False:
            continue
        inner = value if isinstance(value, Mapping) and len(value) < 10 else None
        parts = {name: value} if inner is None else {f"{name}.{k}": v for k, v in inner.items()}
        for key, part in parts.items():
            listed = isinstance(part, list) and all(isinstance(item, str) for item in part)
            text = " ".join(part) if listed else json.dumps(part).strip('"')
            long = len(text) > _WORDS  # a surface, or the group of every image
            found[key] = f"#{short_hash(text)}" if long else text
    return found


def _rounded(value: Any) -> Any:
    """Six digits are more than any of these figures has meaning for."""
    if isinstance(value, float):
        return float(f"{value:.6g}")
    if isinstance(value, dict):
        return {key: _rounded(item) for key, item in value.items()}
    return [_rounded(item) for item in value] if isinstance(value, (list, tuple)) else value


def _read(path: Path) -> Iterator[Result]:
    # Runs that were cut off are read as they are, and mended by whoever goes on with them.
    data = path.read_bytes()
    found = [row for _, row in split(data)]
    rows = [row for row in found if row is not None]
    damaged = found.count(None) - (not data.endswith(b"\n"))
    if damaged > 0:
        advice = "go on with the run by --resume" if path.name == RESULTS else "restore the file"
        warnings.warn(
            f"`{path}` must hold whole lines, each once, but {damaged} are changed or copies, and "
            f"are left out: {advice}",
            stacklevel=3,
        )
    for row in rows:
        if row["kind"] == "result":
            yield Result(
                # Both depend on what is compared.
                Setting(
                    **row["setting"] | {"options": "", "images": row["summary"]["images"]},
                ),
                summary=_as_now(row["summary"], get_scenario(row["setting"]["scenario"])),
                **{key: row[key] for key in ("method", "seed", "domains", "stretches", "about")},
                curve=(row["curve"][0], row["curve"][1]),
                expected=row.get("expected"),
            )
    if path.name == RESULTS:
        yield from _read_run(path, rows)


def _as_now(summary: dict[str, Any], scenario: Scenario) -> dict[str, Any]:
    """A summary whose mean is over images on a walk, where it was over pairs once."""
    return summary | {"mean_error": summary["error"]} if scenario.smooth else summary


def _read_run(path: Path, rows: Sequence[Mapping[str, Any]]) -> Iterator[Result]:
    header = next((row for row in rows if row["kind"] == "run"), None)
    if header is None:
        return
    config = header["config"]
    streams = {stream["name"]: StreamConfig.from_dict(stream) for stream in config["streams"]}
    builds = {row["stream"]: row["build"] for row in rows if row["kind"] == "stream"}
    about = {key: header.get(key) for key in ("started", "versions", "hardware", "git")}
    special = RunConfig.told_of(config)
    about["tuned"] = [r["chosen"] for r in config.get("tuned", [])]
    about["card"] = header["model"].get("card")
    about["origin"] = header["data"]["origin"]
    own: dict[tuple[str, str], dict[str, list[Any]]] = {}
    for row in rows:
        if row["kind"] in ("batch", "domain", "summary"):
            key = row["stream"], row["method"]
            own.setdefault(key, {"batch": [], "domain": [], "summary": []})[row["kind"]].append(row)
    for (name, method), lines in own.items():
        if not lines["summary"]:
            continue
        summary = lines["summary"][-1]
        counts = {sum(row["images"] for row in lines[kind]) for kind in ("batch", "domain")}
        if name not in builds or counts != {summary["images"]}:
            warnings.warn(
                f"`{path}` must hold all lines of {method} on {name}, of which some are missing, "
                "and is read without it: go on with the run by --resume",
                stacklevel=4,
            )
            continue
        stream, build = streams[name], builds[name]
        setting = Setting(
            config["model"],
            name,
            stream.scenario,
            stream.severity,
            build["batch_size"],
            header["data"]["name"],
            summary["images"],
            len(stream.domains),
        )
        batches = lines["batch"]
        seen = np.cumsum([row["images"] for row in batches]).tolist()
        wrong = np.cumsum([row["errors"] for row in batches]).tolist()
        yield Result(
            setting,
            method,
            header["seed"],
            _as_now(summary, stream.spec),
            lines["domain"],
            (seen, wrong),
            stretches(batches),
            about | {"stream": _about_stream({**build, "images": stream.images, **special})},
            errors_expected(batches),
        )
