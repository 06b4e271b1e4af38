"""Cases of the command lines and of TOML files."""

from __future__ import annotations

import contextlib
import io
import os
from pathlib import Path
from random import Random
from typing import Any
from unittest import mock

import numpy as np
from PIL import Image

import corruptions.commands
import experiments.cli
import tta.cli
from experiments.run.run import Run
from experiments.run.settings import make_run, make_sweep, read_settings
from tests.fuzz.data import folder_of, json_of
from tests.fuzz.junk import NUMBERS, words
from tests.fuzz.oracle import Case, files_of

__all__ = ["commands", "settings"]


def _printed(main: Any, argv: list[str]) -> tuple[int, str]:
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        status = main(argv)
    return status, err.getvalue()


def _text(rng: Random) -> str:
    text = rng.choice([words(rng), str(rng.choice(NUMBERS[:-4])), "1", "fog", "tent", "all"])
    return text.replace("\0", "0")


METHODS = (
    "tent",
    "tent[lr=1e-3]",
    "unmix_tns+eata",
    "tent[",
    "tent[lr=",
    "tent]",
    "[",
    "+",
    "tent+",
    "tent[lr=x]",
    "tent[lrr=1]",
    "tent[steps=0]",
    "a+b+c",
    "tent[lr=1e400]",
    "tent+tent",
    "bn[official=1]",
    "tent[betas=(1,2,3)]",
    "tent[lr=__import__('os')]",
    "source+tent",
    "tent[lr=" + "(" * 300 + "]",
)


def commands(rng: Random) -> Case:
    """A command line."""
    which = rng.randrange(3)
    folder = folder_of(0)
    Image.fromarray(np.zeros((16, 16, 3), np.uint8)).save(folder / "a.png")
    (folder / "bad.png").write_bytes(b"\x89PNG\r\n\x1a\njunk")
    (folder / "lines.txt").write_text("a\nb\n")
    np.savez(folder / "a.npz", test_images=np.zeros((2, 8, 8, 3), np.uint8), test_labels=[0, 1])
    paths = [str(folder / n) for n in ("a.png", "bad.png", "lines.txt", "a.npz", "none", "")]
    paths += ["/dev/null", "/proc/1/none", "a" * 300]

    def value() -> str:
        return rng.choice([_text(rng), rng.choice(paths), rng.choice(METHODS)])

    if which == 0:
        argv = ["methods", *[value() for _ in range(rng.choice([0, 1, 1, 2]))]]
        if rng.random() < 0.4:
            argv += [rng.choice(["--slot", "--import", "--slo"]), value()]
        main: Any = tta.cli.main
    elif which == 1:
        argv = [rng.choice(["write", "verify", "show", "show", _text(rng)])]
        if argv[0] == "write":
            argv += [
                rng.choice(["cifar10", "imagenet", "folder", _text(rng)]),
                rng.choice(paths[:5]),
            ]
            argv += [str(folder / "out"), "--processes", "1", "--images", "1", "--quiet"]
            argv += ["--corruptions", "fog", "--severities", "1"]
        else:
            argv += [rng.choice(paths), *([str(folder / "out.png")] if argv[0] == "show" else [])]
            argv += ["--corruptions", "fog"] if argv[0] == "show" else []
        for _ in range(rng.choice([0, 1, 2])):
            flag = rng.choice(
                [
                    "--severities",
                    "--seed",
                    "--parameters",
                    "--frost-pictures",
                    "--images",
                    "--processes",
                    "--corruptions",
                    "--on-error",
                    "--xx",
                ]
            )
            given = rng.choice(["0", "-1", "x", "1.5", "9" * 30, value()])
            argv += [flag, given] if flag != "--processes" else [flag, rng.choice(["0", "x", "-1"])]
        main = corruptions.commands.main
    else:
        argv = [rng.choice(["run", "run", "preview", "report", _text(rng)])]
        flags = [
            "--config",
            "--model",
            "--methods",
            "--data",
            "--clean",
            "--classes",
            "--labels",
            "--on-error",
            "--match",
            "--source",
            "--corruptions",
            "--severity",
            "--scenario",
            "--option",
            "--images",
            "--batch-size",
            "--device",
            "--seed",
            "--name",
            "--resume",
            "--readers",
            "--tuned",
            "--import",
            "--xx",
        ]
        for _ in range(rng.choice([1, 1, 2, 3])):
            argv += [rng.choice(flags), value()]
        if argv[0] in ("run", "sweep", "tune"):
            argv += ["--output", str(folder / "runs")]
        elif argv[0] == "report":
            argv.insert(1, rng.choice(paths))
        main = experiments.cli.main

    def call() -> tuple[int, str]:
        before = os.getcwd()
        os.chdir(folder)
        try:
            # What a right command line would do is for other tests.
            with mock.patch.object(Run, "execute", lambda run: None):
                return _printed(main, argv)
        finally:
            os.chdir(before)

    shown = " ".join(text[:60] for text in argv)
    watched = {"the folder": lambda: files_of(folder)}
    return Case(f"{main.__module__} {shown}", call, watched=watched, status=True)


TOML: dict[str, Any] = {
    "name": "grid",
    "model": "cifar10_resnet20_bn",
    "methods": ["source", "tent"],
    "batch_size": 64,
    "seed": 0,
    "imports": [],
    "data": "bundled",
    "on_error": "raise",
    "match": "name",
    "device": "cpu",
}
STREAM: dict[str, Any] = {
    "scenario": "dirichlet",
    "domains": ["fog", "snow"],
    "severity": 5,
    "images": 1000,
    "options": {"delta": 0.1},
    "name": "s",
    "batch_size": 16,
}
SWEEP: dict[str, Any] = {
    "models": ["cifar10_resnet20_bn"],
    "severities": [1, 3],
    "batch_sizes": [16],
    "seeds": [0, 1],
}
ODD = (
    "",
    "0",
    "-1",
    "1.5",
    "nan",
    "inf",
    "true",
    "[]",
    "{}",
    "[[]]",
    '"x"',
    '"' + "x" * 5000 + '"',
    "1979-05-27",
    "07:32:00",
    "[1, 'a']",
    "{a = 1}",
    "[" * 3000,
    "9" * 400,
    "'''\n'''",
    '"\\u0000"',
    '["tent[lr="]',
    '"tent"',
    "[3]",
    "99999999999999999999",
    "[nan]",
    "[-1]",
    "[0.5]",
    "[true]",
)


def _toml(value: Any) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, str):
        return f'"{value}"'
    if isinstance(value, list):
        return f"[{', '.join(map(_toml, value))}]"
    if isinstance(value, dict):
        return "{ " + ", ".join(f"{k} = {_toml(v)}" for k, v in value.items()) + " }"
    return str(value)


def settings(rng: Random) -> Case:
    """A TOML file of a run or a sweep."""
    path: Path = folder_of(0) / "a.toml"
    parts = []
    for head, table in (("", TOML), ("[[streams]]", STREAM), ("[sweep]", SWEEP)):
        kept = {k: _toml(v) for k, v in table.items() if rng.random() < 0.6}
        if rng.random() < 0.5:
            key = rng.choice([*table, "other", "a.b", '""', '"x y"', "streams", "sweep"])
            kept[key] = rng.choice(ODD)
        if head == "[sweep]" and rng.random() < 0.5:
            continue
        head = rng.choice([head, head, head, "[streams]", "[[sweep]]", "[[a]]"]) if head else head
        parts += [head, *(f"{key} = {value}" for key, value in kept.items())]
    data = "\n".join(parts).encode("utf-8", "replace")
    if rng.random() < 0.1:
        data = rng.choice(
            [
                data[: len(data) // 2],
                b"\xff\xfe" + data,
                b"\0",
                b"",
                json_of(rng, TOML).encode("utf-8", "replace"),
            ]
        )
    path.write_bytes(data)
    sweep = rng.random() < 0.3

    def call() -> None:
        found = read_settings(path)
        (make_sweep if sweep else make_run)(found, {})

    return Case(f"make_{'sweep' if sweep else 'run'} of {data[:400]!r}", call)
