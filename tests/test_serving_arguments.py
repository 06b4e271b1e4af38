"""Arguments of pools, servers, clouds and their commands that are none: one sentence each."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import tta
from tests.helpers.nets import tiny
from tests.helpers.refusals import refused
from tta.cli import main
from tta.runtime import StreamPool, open_source
from tta.runtime.cloud import Cloud, HttpUplink
from tta.runtime.server import application
from tta.runtime.server import run as serve

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")
MODEL = "tests.helpers.own_models:named"


def test_of_a_pool() -> None:
    x = torch.rand(2, 3, 32, 32)
    with StreamPool(tta.wrap(tiny("bn"), "tent.cifar10")) as pool:
        given: Any
        for given in (None, 3, torch.tensor(1.0)):
            refused(TypeError, "`streams` must be a list", lambda g=given: pool(x, g, create=True))
        for name in ("create", "wait"):
            more: Any = {"create": True, name: "no"}
            words = f"`{name}` must be True or False, got 'no'"
            refused(TypeError, words, lambda m=more: pool.stream("a", **m))
        no: Any = "no"
        refused(TypeError, "`create`", lambda: pool(x, ["a", "b"], create=no))
        refused(TypeError, "`save`", lambda: pool.close(save=no))
        assert pool.streams() == [] and not pool.closed
        with pytest.raises(KeyError, match=r"begin it by stream\(\.\.\., create=True\)"):
            pool.reset("a")


HOSTS = "`hosts` must be a list of names"


@pytest.mark.parametrize(
    ("words", "given"),
    [
        ("`transform` must be a function", {"transform": 3}),
        ("`class_names` must be a list", {"class_names": "abcdefghij"}),
        ("`class_names` must be a list", {"class_names": 3}),
        ("`shape` must be that of an image", {"shape": 3}),
        ("`shape` must be a whole number", {"shape": (3, "x")}),
        ("`limits` must be tta.runtime.server.Limits", {"limits": 3}),
        ("`token` must be a string", {"token": 3}),
        (HOSTS, {"hosts": 3}),
        (HOSTS, {"hosts": "localhost"}),  # of which "local" is a part, and so is ""
    ],
)
def test_of_a_server(words: str, given: dict[str, Any]) -> None:
    with StreamPool(tta.wrap(tiny("bn"), "tent.cifar10")) as pool:
        refused(TypeError, words, lambda: application(pool, **given))


def test_of_what_runs_a_server() -> None:
    run: Any = serve
    refused(TypeError, "`app` must be what application", lambda: run(None, port=0))
    with StreamPool(tta.wrap(tiny("bn"), "tent.cifar10")) as pool:
        app = application(pool)
        refused(TypeError, "`on_ready` must be a function", lambda: run(app, port=0, on_ready=3))
        refused(TypeError, "`grace` must be a whole number", lambda: run(app, port=0, grace="x"))
        refused(TypeError, "`port` must be a whole number", lambda: run(app, port="x"))
        refused(ValueError, "`host` must be a name", lambda: run(app, host="", port=0))
        assert not pool.closed  # what is refused has not begun


def test_of_a_cloud() -> None:
    cloud: Any = Cloud(tiny("bn"), tiny("bn"))
    for error, words, more in [
        (TypeError, HOSTS, {"hosts": "localhost"}),
        (TypeError, "`limits` must be", {"limits": 3}),
        (TypeError, "`token` must be a string", {"token": 3}),
        (ValueError, "`port` must be a whole number from 0 to 65535", {"port": 70_000}),
    ]:
        refused(error, words, lambda m=more: cloud.serve("127.0.0.1", **{"port": 0, **m}))
    cloud.close()
    for address in ("http://[bad/", "http://a b/", "http://a\n", "http://a/\u20ac"):
        refused(ValueError, "`address` must begin with", lambda a=address: HttpUplink(a))
    for token in ("", "\u20ac", "x\n"):
        words = "`token` must be 1 to 1000 printable ASCII"
        refused(ValueError, words, lambda t=token: HttpUplink("http://a", t))


def test_of_an_address() -> None:
    pytest.importorskip("av")
    for address, words in [
        ("http://[bad/", "`source` .* got 'http://\\[bad/', of which host"),
        ("rtsp://me:secret@host:99999/x", "`source` .* got 'rtsp://host:99999/x', of which"),
        ("rtsp://host:99999/x?token=secret", "`source` .* got 'rtsp://host:99999/x', of which"),
        ("rtsp://me:se/secret@host/x", "`source` .* got 'rtsp://host/x', of which"),
        ("rtsp://", "`source` .* got 'rtsp://': name a host"),
    ]:
        assert "secret" not in refused(ValueError, words, lambda a=address: open_source(a))


def test_of_commands(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def said(*words: str) -> str:
        assert main(list(words)) == 2
        text = capsys.readouterr().err.strip().splitlines()[-1]
        assert text.startswith("error: `"), text
        return text

    file, out = tmp_path / "file", tmp_path / "out"
    file.touch()
    run = ("run", MODEL, str(tmp_path), "--out")
    assert "`out` must be a path, got an empty one" in said(*run, "")
    assert "`folder` must be a folder, got the file" in said(*run, str(out), "--folder", str(file))
    below = str(file / "below")
    assert "`folder` must be one that can be" in said(*run, str(out), "--folder", below)
    assert "`out` must be one that can be written to" in said(*run, below)
    assert "`out` must be one that can be" in said("export", MODEL, "--out", below)
    for place in (tmp_path / "none", tmp_path):
        text = said("serve", MODEL, "--token-file", str(place))
        assert "`token-file` must be a file that can be read" in text
    assert list(tmp_path.iterdir()) == [file]
