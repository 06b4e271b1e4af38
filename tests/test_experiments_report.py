"""Reports: what is collected, the statistics, the tables, the plots, the page."""

from __future__ import annotations

import csv
import io
import json
import re
import shutil
from dataclasses import replace

import numpy as np
import pytest
from matplotlib.figure import Figure
from matplotlib.text import Text
from PIL import Image
from scipy import stats

import tta
from experiments import cli
from experiments.records.config import DEMO_METHODS
from experiments.records.lines import encode
from experiments.report import collect, run_table, write_compact
from experiments.report.collect import by_setting
from experiments.report.plots import draw_domains, plot_errors, plot_running
from experiments.report.report import Report, describe
from experiments.report.statistics import difference, estimate, verdict
from experiments.report.style import looks_of
from experiments.report.tables import Table, csv_rows, overview, setting_table
from experiments.run.run import Cache
from experiments.run.settings import make_sweep
from experiments.sweep.sweep import Sweep
from tests.helpers.tiny_models import use_tiny_models


def _swept(folder, flags):
    """A folder of runs of tiny networks."""
    with pytest.MonkeyPatch.context() as patch:
        use_tiny_models(patch)
        patch.setattr("experiments.sweep.workers._CACHE", Cache())
        Sweep(make_sweep({}, {**flags, "device": "cpu"}), folder, quiet=True).execute()
    return folder


def test_runs_with_other_artefacts_of_the_source_are_told_apart(runs, tmp_path):
    """They are other results of one method, stream and seed; what is as usual is not said."""
    for name, special in (("a", {}), ("b", {"source": "mine.safetensors", "on_error": "raise"})):
        shutil.copytree(runs, tmp_path / name)
        for path in (tmp_path / name).rglob("results.jsonl"):
            first, *others = path.read_bytes().splitlines(keepends=True)
            header = json.loads(first)
            number = header.pop("check").split("-")[0]
            header["config"] |= special
            path.write_bytes(encode([header], int(number)) + b"".join(others))
    options = {r.setting.options for r in collect([tmp_path])}
    assert options == {"no source", "source=mine.safetensors"}


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Two severities, two seeds, three methods, of a tiny network."""
    flags = {"methods": ("tent", "source", "eata+lame"), "domains": ["fog", "snow"]}
    flags |= {"images": 20, "batch_size": 10, "seeds": (0, 1), "severities": (3, 5)}
    return _swept(tmp_path_factory.mktemp("runs"), flags)


def error(result):
    return result.summary["mean_error"]


def test_everything_finished_is_collected(runs, tmp_path):
    results = collect([runs])
    assert len(results) == 2 * 2 * 3
    settings = by_setting(results)
    assert [s.severity for s in settings] == [3, 5]
    for setting, methods in settings.items():
        assert next(iter(methods)) == "source" and len(methods) == 3
        assert (setting.images, setting.batch_size, setting.domains) == (40, 10, 2)
        for found in methods.values():
            assert [result.seed for result in found] == [0, 1]
            assert found[0].stretches == [(0, 20, "fog"), (20, 40, "snow")]
            assert found[0].curve[0] == [10, 20, 30, 40]
            assert found[0].curve[1][-1] == round(40 * found[0].summary["error"])
    with pytest.raises(FileNotFoundError, match="is missing"):
        collect([tmp_path / "nowhere"])
    with pytest.raises(ValueError, match="found none"):
        collect([tmp_path])


def test_a_compact_file_holds_the_same(runs, tmp_path):
    results = collect([runs])
    write_compact(results, tmp_path / "record.jsonl")
    again = collect([tmp_path])
    assert len(again) == len(results)
    for a, b in zip(results, again, strict=True):
        assert (a.setting, a.method, a.seed, a.curve) == (b.setting, b.method, b.seed, b.curve)
        assert error(a) == error(b)
        for one, other in zip(a.domains, b.domains, strict=True):
            assert one["severities"] == other["severities"] and one["errors"] == other["errors"]
    assert setting_table(by_setting(results)[results[0].setting]).rows == (
        setting_table(by_setting(again)[again[0].setting]).rows
    )
    assert csv_rows(results) == csv_rows(again)  # every figure with all its digits
    size = (tmp_path / "record.jsonl").stat().st_size
    assert size < sum(path.stat().st_size for path in runs.rglob("results.jsonl"))


def test_streams_of_one_name_that_differ_are_told_apart(runs, tmp_path):
    """Else the results of the one would replace those of the other, or be averaged with them."""
    results = [r for r in collect([runs]) if r.setting.severity == 5 and r.seed == 0]
    write_compact(results, tmp_path / "a.jsonl")
    stream = results[0].about["stream"]
    assert stream["domains"] == "fog snow" and {r.setting.options for r in results} == {""}

    def other(changes, seed, **setting):
        about = {**results[0].about, "stream": {**stream, **changes}}
        settings = replace(results[0].setting, **setting)
        return [replace(r, about=about, seed=seed, setting=settings) for r in results]

    write_compact(other({"domains": "fog frost", "delta": "0.1"}, 0), tmp_path / "b.jsonl")
    write_compact(other({}, 1), tmp_path / "c.jsonl")  # another seed of the first
    found = by_setting(collect([tmp_path]))
    assert {s.options: [r.seed for r in found[s]["tent"]] for s in found} == {
        "domains=fog snow": [0, 1],
        "domains=fog frost, delta=0.1": [0],
    }
    write_compact(other({}, 0, data="other images"), tmp_path / "d.jsonl")
    report = Report(collect([tmp_path]), tmp_path / "report", "title")
    assert len(report.settings) == len({s.slug for s in report.settings}) == 3
    page = report.execute().read_text()
    assert all(f"{s.title}</h2>" in page for s in report.settings)
    assert "data=other images" in page
    write_compact(collect([tmp_path / "a.jsonl"]), tmp_path / "again.jsonl")
    assert {r.setting.options for r in collect([tmp_path / "again.jsonl"])} == {""}


@pytest.fixture(scope="module")
def drawn(tmp_path_factory):
    """Three seeds of a stream whose length is drawn."""
    flags = {"methods": ("tent", "source"), "domains": ["fog", "snow"], "seeds": (0, 1, 2)}
    flags |= {"images": 20, "batch_size": 5, "scenario": "markov"}
    return _swept(tmp_path_factory.mktemp("drawn"), flags)


def test_seeds_of_a_stream_whose_length_is_drawn_are_one_setting(drawn, tmp_path):
    results = collect([drawn])
    lengths = {r.seed: r.summary["images"] for r in results}
    assert len(set(lengths.values())) == 3
    (setting,) = found = by_setting(results)
    assert setting.images == round(np.mean(list(lengths.values())))
    gap = difference(found[setting]["tent"], found[setting]["source"], error)
    assert gap is not None and gap.count == 3
    page = Report(results, tmp_path / "report", "title").execute().read_text()
    low, *_, high = sorted(lengths.values())
    assert f"{low} to {high} images of 2 domains" in page
    write_compact(results, tmp_path / "compact.jsonl")
    assert by_setting(collect([tmp_path / "compact.jsonl"])).keys() == found.keys()


def test_streams_of_drawn_length_on_other_images_are_not_joined(drawn, tmp_path):
    results = collect([drawn])
    about = {**results[0].about, "stream": {**results[0].about["stream"], "images": "30"}}
    write_compact(results, tmp_path / "a.jsonl")
    write_compact([replace(r, about=about, seed=r.seed + 3) for r in results], tmp_path / "b.jsonl")
    assert {s.options for s in by_setting(collect([tmp_path]))} == {"images=20", "images=30"}


def test_results_without_words_on_their_stream_are_read(runs, tmp_path):
    """Those of version 0.2 are, and what was measured since joins them."""
    results = [r for r in collect([runs]) if r.setting.severity == 5 and r.seed == 0]
    about = {key: value for key, value in results[0].about.items() if key != "stream"}
    old = [replace(r, about=about, method=f"old {r.method}") for r in results]
    write_compact([*results, *old], tmp_path / "record.jsonl")
    (setting,) = by_setting(collect([tmp_path]))
    assert setting.options == ""


def test_a_run_that_was_cut_off_gives_what_it_finished(runs, tmp_path):
    source = next(iter(runs.rglob("source/seed0/results.jsonl")))
    text = source.read_bytes()
    results = tmp_path / "results.jsonl"
    results.write_bytes(text[: text.index(b'"kind": "end"') + 5])
    assert len(collect([tmp_path])) == 1
    results.write_bytes(text[: text.index(b'"kind": "summary"') + 5])
    with pytest.raises(ValueError, match="found none"):
        collect([tmp_path])
    results.write_bytes(text.replace(b'"mean_error": 0.', b'"mean_error": 1.'))
    with pytest.warns(UserWarning, match="1 are changed or copies"), pytest.raises(ValueError):
        collect([tmp_path])


@pytest.mark.parametrize("kind", ["stream", "batch", "domain"])
@pytest.mark.parametrize("damaged", [True, False])
def test_methods_that_lack_a_line_are_left_out(runs, tmp_path, kind, damaged):
    first, other = sorted(runs.rglob("results.jsonl"))[:2]
    lines = first.read_bytes().splitlines(keepends=True)
    at = next(n for n, line in enumerate(lines) if b'"kind": "%s"' % kind.encode() in line)
    lines[at : at + 1] = [b"junk\n"] if damaged else []
    for name, content in (("a", b"".join(lines)), ("b", other.read_bytes())):
        (tmp_path / name).mkdir()
        (tmp_path / name / "results.jsonl").write_bytes(content)
    with pytest.warns(UserWarning, match="of which some are missing"):
        (result,) = collect([tmp_path])
    assert len(result.curve[0]) and result.summary["images"] == result.curve[0][-1]


def test_intervals_are_students():
    values = [0.31, 0.35, 0.30]
    found = estimate(values)
    low, high = stats.t.interval(0.95, 2, loc=np.mean(values), scale=stats.sem(values))
    assert found.mean == pytest.approx(np.mean(values))
    assert found.half == pytest.approx((high - low) / 2)
    assert (found.low, found.high) == (pytest.approx(low), pytest.approx(high))
    assert estimate([0.3]).half is None and estimate([]) is None and estimate([0.3, None]) is None
    assert found.text(100) == "32.0 ± 6.6" and estimate([0.3]).text(100, sign=True) == "+30.0"


def test_two_seeds_are_shown_as_two_values():
    two = estimate([0.31, 0.35])
    assert two.half is None and (two.low, two.high) == (0.31, 0.35)
    assert two.text(100) == "31.0, 35.0" and estimate([0.02, -0.01]).text(100, 1, True) == (
        "+2.0, -1.0"
    )
    # What they agree on is the sign.
    assert two.clear and estimate([-0.1, -0.2]).clear
    assert not estimate([0.02, -0.01]).clear and not estimate([0.3]).clear


def test_differences_are_paired_by_seed(runs):
    results = by_setting(collect([runs]))
    methods = next(iter(results.values()))
    found = difference(methods["tent"], methods["source"], error)
    gaps = [error(methods["tent"][i]) - error(methods["source"][i]) for i in (0, 1)]
    assert found.mean == pytest.approx(np.mean(gaps)) and found.count == 2
    backwards = difference(methods["tent"][::-1], methods["source"], error)
    assert backwards.values == found.values[::-1]
    assert difference(methods["tent"], methods["source"][:1], error) is None  # a seed is missing
    zero = difference(methods["source"], methods["source"], error)
    assert zero.values == (0, 0) and not zero.clear


def test_tables(runs):
    results = collect([runs])
    (table,) = overview(results).values()
    assert table.header == ["method", "continual, s3", "continual, s5"]
    full = setting_table(next(iter(by_setting(results).values())))
    assert full.header[:3] == ["method", "error", "vs source"] and full.rows[0][0] == "source"
    assert "late" not in full.header and full.rows[0][2] == "-"
    markdown = full.markdown().splitlines()
    assert len({line.count("|") for line in markdown}) == 1
    assert sum("**" in line for line in markdown) >= 1
    latex = full.latex()
    assert latex.count(r"\\") == 4 and r"$\to$" in latex and latex.count("{tabular}") == 2
    assert Table(["a"], [["50 % & x_1"]]).latex().splitlines()[4] == r"50 \% \& x\_1 \\"
    assert "<b>" in full.html() and "&lt;" in Table(["a"], [["<"]]).html()


def test_columns_that_say_nothing_are_left_out(runs):
    table = Table(["a", "b", "c"], [["x", "-", "1"], ["", "", "-"]], {(0, 2), (0, 1)})
    kept = table.without_empty_columns()
    assert kept.header == ["a", "c"] and kept.rows == [["x", "1"], ["", "-"]]
    assert kept.best == {(0, 1)}
    methods = next(iter(by_setting(collect([runs])).values()))
    for shown in (methods, {"source": methods["source"]}, {"tent": methods["tent"]}):
        table = setting_table(shown)
        for column in zip(*table.rows, strict=True):
            assert set(column) - {"-", ""}, table.header


def test_wide_tables_are_split_and_keep_their_names():
    table = Table(["m", *"abcdef"], [["x", *6 * ["1" * 17]], ["y" * 99, *6 * ["2"]]], {(0, 5)})
    parts = table.blocks(100)
    assert [part.header for part in parts] == [["m", *"abc"], ["m", *"def"]]
    assert parts[1].best == {(0, 2)} and parts[1].rows[0][0] == "x"
    assert [part.header for part in table.blocks(1)] == [["m", name] for name in "abcdef"]
    wide = Table(["m", *"abcdefghij"], [["tent[lr=1,steps=2]+lame", *10 * ["1" * 17]]])
    assert wide.html().count("<table>") == 2
    assert "tent[<wbr>lr=1,<wbr>steps=2]+<wbr>lame" in wide.html()


def test_a_method_looks_the_same_in_all_figures(runs, monkeypatch, tmp_path):
    names = ["bn", "source", *(f"m{i}" for i in range(100))]
    looks = looks_of(names)
    assert looks["source"] == looks_of([])["source"]
    assert looks == looks_of(names[::-1])
    pairs = [(look.colour, look.marker) for look in looks.values()]
    assert len(set(pairs)) == len(pairs) == 102
    drawn = []

    def savefig(figure, path, **_):
        drawn.append(figure)
        Image.new("RGB", (8, 8)).save(path)

    monkeypatch.setattr(Figure, "savefig", savefig)
    results = collect([runs])
    report = Report(results, tmp_path, "all")
    report.execute()
    sizes, widths, colours = set(), set(), {}
    for figure in drawn:
        widths.add(figure.get_figwidth())
        figure.draw_without_rendering()
        for text in figure.findobj(Text):
            if text.get_visible() and text.get_text():
                sizes.add(text.get_fontsize())
                assert text.get_rotation() == 0, text.get_text()
        for axes in figure.axes:
            for line in axes.get_lines():
                if line.get_label() in ("source", "tent", "eata+lame"):
                    colours.setdefault(line.get_label(), set()).add(line.get_color())
    assert widths == {11.0} and sizes == {9.0, 11.0}
    assert {name: len(found) for name, found in colours.items()} == {
        "source": 1, "tent": 1, "eata+lame": 1,
    }  # fmt: skip


def test_a_method_looks_the_same_in_the_figures_of_any_report():
    bundled = tta.list_methods()
    everywhere = looks_of([*bundled, "eata+lame"])
    assert len({(look.colour, look.marker) for look in everywhere.values()}) == len(everywhere)
    for name in [*bundled, "eata+lame"]:
        assert looks_of([name])[name] == looks_of(["lame+rmt", name, "x"])[name]
        assert looks_of([name])[name] == everywhere[name]
    # With fields it is the same method, unless both are there.
    assert looks_of(["tent.cifar10[lr=1]"])["tent.cifar10[lr=1]"] == everywhere["tent"]
    both = looks_of(["tent[lr=1]", "tent"])
    assert both["tent"] == everywhere["tent"] != both["tent[lr=1]"]
    # The eight of the demo have a colour each, as have those of the README's picture.
    assert len({look.colour for look in looks_of(DEMO_METHODS).values()}) == len(DEMO_METHODS)


def test_names_of_two_domains_do_not_cover_each_other(tmp_path, monkeypatch):
    kept = []
    monkeypatch.setattr(Figure, "savefig", lambda figure, path: kept.append(figure))
    errors = {name: ([50.0, 60.0], None) for name in ("source", "tent")}
    draw_domains(errors, ["fog", "snow"], tmp_path / "x.png", "title", looks_of(errors))
    kept[0].draw_without_rendering()
    fog, snow = (label.get_window_extent() for label in kept[0].axes[0].get_yticklabels())
    assert not fog.overlaps(snow)
    for axes in kept[0].axes:
        assert axes.get_window_extent().height > 2.5 * fog.height


def test_many_curves_get_small_plots(tmp_path, monkeypatch):
    kept = []
    monkeypatch.setattr(Figure, "savefig", lambda figure, path: kept.append(figure))
    rows = [{"images": 50, "errors": i, "domain": f"d{i // 2}"} for i in range(8)]
    for count, panels in ((8, 1), (9, 8)):
        methods = ["source", *(f"m{i}" for i in range(count - 1))]
        plot_running(dict.fromkeys(methods, rows), tmp_path / "x.png", "title")
        assert len(kept[-1].axes) == panels
        summaries = [
            {"method": name, "domain_errors": {"fog": 0.5, "snow": 0.1}, "mean_error": 0.3}
            for name in methods
        ]
        plot_errors(summaries, tmp_path / "x.png", "title")
        assert len(kept[-1].axes) == panels


def test_the_command_writes_one_page_with_everything(runs, tmp_path, capsys):
    out = tmp_path / "out"
    assert cli.main(["report", str(runs), "--output", str(out), "--title", "A & B"]) == 0
    assert "12 results in 2 settings" in capsys.readouterr().out
    page = (out / "index.html").read_text()
    text, pictures = re.subn(r'src="data:image/png;base64,[^"]*"', "", page)
    assert pictures == 2 * 4 + 1
    assert "<h1>A &amp; B</h1>" in text and "http" not in text  # nothing is loaded from elsewhere
    for name in ("stream", "domains", "cost", "reliability", "heat"):
        for path in out.glob(f"*-{name}.png"):
            with Image.open(path) as picture:
                assert picture.width > 600 and len(np.unique(picture)) > 10
    rows = list(csv.DictReader(io.StringIO((out / "results.csv").read_text())))
    assert len(rows) == 12 and 0 <= float(rows[0]["error:fog"]) <= 1
    assert {row["method"] for row in rows} == {"source", "tent", "eata+lame"}
    assert len(list(out.glob("*.tex"))) == len(list(out.glob("*.md"))) == 3


def test_a_model_called_like_a_tag_is_text(runs, tmp_path):
    results = collect([runs])
    named = [replace(r, setting=replace(r.setting, model="<i>net</i>")) for r in results[:1]]
    path = Report(named, tmp_path, "<b>").execute()
    assert "<i>" not in path.read_text() and "<h3>&lt;i&gt;net" in path.read_text()


def test_one_is_not_many(runs, tmp_path, capsys):
    Report(collect([runs])[:1], tmp_path, "all").execute()
    assert "1 result in 1 setting:" in capsys.readouterr().out


def test_page_and_terminal_agree_on_what_makes_no_difference(runs):
    methods = next(iter(by_setting(collect([runs])).values()))
    source = methods["source"][0]

    def moved(gap):
        return replace(source, summary=source.summary | {"mean_error": error(source) + gap})

    gaps = {"source": 0.0, "a": 0.0004, "b": -0.0004, "c": 0.1, "d": -0.1}
    single = {name: [replace(moved(gap), method=name)] for name, gap in gaps.items()}
    page = describe(single)
    assert "Better than source: d (-10.0). Worse: c (+10.0)." in page
    assert "No difference: b (0.0), a (0.0)." in page
    rows = [found[0].summary | {"method": name} for name, found in single.items()]
    terminal = run_table.describe(rows)
    assert "a and b make no difference." in terminal
    assert f"c ({100 * error(source) + 10:.1f}%) does worse than doing nothing." in terminal


def test_a_difference_of_seeds_has_one_verdict():
    for values, expected in (
        ([0.0004], "same"), ([0.0006], "worse"), ([-0.1], "better"), ([0.0, 0.0], "same"),
        ([0.1, -0.1], "open"), ([0.0004, -0.0004], "same"), ([-0.1, -0.2], "better"),
        ([0.1, 0.1, 0.12], "worse"), ([0.1, 0.0, -0.1], "open"),
    ):  # fmt: skip
        assert verdict(estimate(values)) == expected, values
    assert estimate([-0.0001]).text(1, 2) == "0.00"
    assert estimate([-0.0001]).text(100, 1, sign=True) == "0.0"


def test_the_words_come_from_the_intervals(runs):
    methods = next(iter(by_setting(collect([runs])).values()))
    text = describe(methods)
    for name in ("tent", "eata+lame"):
        assert text.count(name) == 1
    single = {name: found[:1] for name, found in methods.items()}
    assert "One seed: no interval" in describe(single)
    assert describe({"source": methods["source"]}) == ""


def test_errors_by_visit_are_drawn_where_domains_come_again(runs, tmp_path):
    flags = {"methods": ("tent", "source"), "domains": ["fog", "snow"], "seeds": (0, 1)}
    flags |= {"images": 10, "batch_size": 5, "scenario": "recurring", "options": {"visits": 3}}
    found = collect([_swept(tmp_path / "swept", flags)])
    for result in found:
        errors = result.summary["recurrence_errors"]
        assert len(errors) == 3 and np.mean(errors) == pytest.approx(result.summary["error"])
    Report(found, tmp_path / "again", "test").execute()
    (path,) = (tmp_path / "again").glob("*-visits.png")
    with Image.open(path) as picture:
        assert len(np.unique(picture)) > 10
    Report(collect([runs]), tmp_path / "once", "test").execute()
    assert not list((tmp_path / "once").glob("*-visits.png"))
