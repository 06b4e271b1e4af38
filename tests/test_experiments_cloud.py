"""Error against budget is measured, and stands in the page, the picture and the figures."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from PIL import Image

from experiments import cli
from experiments.studies import cloud


@pytest.fixture
def places(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(cloud, "FIGURES", tmp_path / "cloud.jsonl")
    monkeypatch.setattr(cloud, "PAGE", tmp_path / "page.md")
    monkeypatch.setattr(cloud, "PICTURE", tmp_path / "cloud-budget.png")
    (tmp_path / "page.md").write_text("a\n<!-- cloud -->\n<!-- /cloud -->\nb\n")
    return tmp_path


@pytest.mark.slow
def test_a_short_study_goes_on_where_it_stopped(
    places: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    setting = cloud.Setting(images=100, domains=("fog",), budgets=(0.5, 1.0))
    study = cloud.CloudStudy(setting)
    study.execute()
    file = places / "cloud.jsonl"
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    runs = [(row["run"], row["budget"]) for row in rows]
    joined = [(name, budget) for name in cloud.DOWNLINKS for budget in (0.5, 1.0)]
    assert runs == [(cloud.TEACHER, None), *((name, None) for name in cloud.ALONE), *joined]
    for row in rows:
        assert 0 < row["error"] < 1 and row["errors"] == {"fog": row["error"]}
        if row["budget"] is not None:
            assert row["counts"]["uploaded"] <= 100 * row["budget"]
            assert row["up"] > 3072 * row["counts"]["uploaded"]
    full = {row["run"]: row for row in rows if row["budget"] == 1.0}
    assert all(row["counts"]["updates"] == 0 for row in full.values())  # came with the last batch
    assert all(row["down"] > 6144 for row in full.values())
    assert full["prompt"]["error"] == next(r["error"] for r in rows if r["run"] == "device alone")
    teacher = next(row["error"] for row in rows if row["run"] == cloud.TEACHER)
    assert full["prompt"]["teacher_error"] == teacher
    assert Image.open(places / "cloud-budget.png").width > 1000
    page = (places / "page.md").read_text()
    assert "| `norms` sent down | 100 |" in page

    file.write_text("".join(line + "\n" for line in file.read_text().splitlines()[:-1]))
    capsys.readouterr()
    study.execute()
    said = capsys.readouterr().out
    assert "norms, budget 1.0" in said and "prompt, budget" not in said
    again = [json.loads(line) for line in file.read_text().splitlines()]
    timeless = [{k: v for k, v in row.items() if k != "seconds"} for row in (again[-1], rows[-1])]
    assert timeless[0] == timeless[1]
    assert (places / "page.md").read_text() == page


def test_the_command_checks_its_arguments(capsys: pytest.CaptureFixture[str]) -> None:
    for flags, words in (
        (["--images", "10"], "`images` must be"),
        (["--budgets", "2"], "`budgets` must be"),
        (["--domains", "rain"], "`domains` must be corruptions"),
    ):
        assert cli.main(["cloud", *flags]) == 2
        assert words in capsys.readouterr().err


def test_the_page_shows_the_committed_figures() -> None:
    rows = [json.loads(line) for line in cloud.FIGURES.read_text().splitlines()]
    assert cloud.render(rows) in cloud.PAGE.read_text()
    assert cloud.PICTURE.is_file()
    told = {key: rows[0][key] for key in ("device", "teacher", "images")}
    setting = cloud.Setting()
    assert told == {key: getattr(setting, key) for key in told}
    wanted = {(name, budget) for name in cloud.DOWNLINKS for budget in setting.budgets}
    assert wanted <= {(row["run"], row["budget"]) for row in rows}
