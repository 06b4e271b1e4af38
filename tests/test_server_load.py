"""The study of the server under load, with a small load generator in place of `hey`."""

from __future__ import annotations

import sys

import pytest

from experiments.studies.server_load import ServerLoad, percentiles, render

HEY = """#!{python}
import sys, time, urllib.request
given = dict(zip(sys.argv[1:-1:2], sys.argv[2::2]))
body = open(given["-D"], "rb").read()
end = time.monotonic() + float(given["-z"].removesuffix("s"))
print("response-time,status-code,offset")
while time.monotonic() < end:
    begun = time.monotonic()
    status = urllib.request.urlopen(urllib.request.Request(sys.argv[-1], body)).status
    print(f"{{time.monotonic() - begun}},{{status}},0")
    if float(given["-q"]):
        time.sleep(1 / float(given["-q"]))
"""


def test_percentiles_are_in_milliseconds() -> None:
    found = percentiles([0.001 * n for n in range(101)])
    assert found == {"p50": 50.0, "p95": 95.0, "p99": 99.0, "largest": 100.0}


def test_without_the_load_generator_it_is_refused(monkeypatch, tmp_path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(FileNotFoundError, match="`hey` must be installed"):
        ServerLoad("cifar10_resnet20_bn", ["source"], 1, 0.8, 2)


@pytest.mark.slow
def test_rows_under_load_are_those_without(monkeypatch, tmp_path, capsys) -> None:
    hey, page = tmp_path / "hey", tmp_path / "serving.md"
    hey.write_text(HEY.format(python=sys.executable))
    hey.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    page.write_text("<!-- load -->\n<!-- /load -->\n")

    def study() -> None:
        more = {"hurry": 1.0, "results": tmp_path / "load.jsonl", "page": page}
        ServerLoad("cifar10_resnet20_bn", ["auto, frozen"], 0.03, 0.5, 2, **more).execute()

    study()
    said = capsys.readouterr().out
    assert "'errors': 0" in said and "'wrong': 0" in said and "'checked': 0" not in said
    assert page.read_text().count("| `auto, frozen` |") == 1
    study()
    assert "capacity" not in capsys.readouterr().out  # nothing was measured again


def test_without_rows_there_is_no_table() -> None:
    assert render([]) == ""
