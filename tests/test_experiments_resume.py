"""A run killed anywhere goes on with the numbers of one that was not; files are mended."""

from __future__ import annotations

import dataclasses
import json
import math
import multiprocessing
import os
import random
import re
import signal

import pytest
import torch

import tta
from experiments import cli
from experiments.data import read_bundled
from experiments.records.config import RunConfig, StreamConfig
from experiments.records.file import Busy, Conflict, JsonLines, Results, read_lines
from experiments.records.lines import decode, encode, mend, split
from experiments.run.run import Run, is_finished, load_setup
from experiments.run.snapshot import FILE
from experiments.run.trial import OutOfTime
from tests.helpers.results import figures
from tests.helpers.tiny_models import fake_load, use_tiny_models


@pytest.fixture(autouse=True)
def tiny_models(monkeypatch):
    """Let the runner load tiny networks; how often it writes does not depend on its speed."""
    use_tiny_models(monkeypatch)
    monkeypatch.setattr("experiments.run.scoring.BLOCK_SECONDS", math.inf)


def configuration(*methods, scenario="reset_each_shift", **options):
    stream = StreamConfig(
        name="s", scenario=scenario, domains=("fog", "contrast"), images=40, options=options
    )
    return RunConfig(
        name="killed",
        model="cifar10_resnet20_bn",
        data="bundled",
        clean=None,
        source=None,
        methods=methods,
        streams=(stream,),
        batch_size=8,
        seed=3,
        device="cpu",
    )


def execute(config, folder, every=3, **arguments):
    setup = load_setup(config, **{k: arguments.pop(k) for k in ("readers",) if k in arguments})
    return Run(setup, folder=folder, show="nothing", snapshot_every=every, **arguments).execute()


class Writes:
    """Counts what is written to files from here on; at the n-th kills the process.

    Args:
        last: The n-th, or None to count only.
        share: Of what is written then, how much still is.
    """

    def __init__(self, last=None, share=1.0):
        self.count, self.last, self.share = 0, last, share
        self._write, self._replace = os.write, os.replace

    def __enter__(self):
        os.write, os.replace = self._count_write, self._count_replace
        return self

    def __exit__(self, *_):
        os.write, os.replace = self._write, self._replace

    def _step(self, left):
        self.count += 1
        if self.count == self.last:
            left()
            os.kill(os.getpid(), signal.SIGKILL)

    def _count_write(self, file, data):
        self._step(lambda: self._write(file, data[: int(self.share * len(data))]))
        return self._write(file, data)

    def _count_replace(self, source, target):
        self._step(lambda: self.share > 0.5 and self._replace(source, target))
        return self._replace(source, target)


def killed(config, folder, writes, share):
    """Run in a child that kills itself at its n-th write, that share of which is still done.

    Returns whether it came so far.
    """

    def child():
        with Writes(writes, share):
            execute(config, folder)

    process = multiprocessing.get_context("fork").Process(target=child)
    process.start()
    process.join()
    assert process.exitcode in (0, -signal.SIGKILL)
    return process.exitcode != 0


def check_points(config, tmp_path, points):
    """Kill a run at so many points, go on, and compare with one that was never killed."""
    with Writes() as writes:
        whole = figures(execute(config, tmp_path / "whole"))
    chance = random.Random(repr(config.methods))  # other points for every method
    for number in range(points):
        folder = tmp_path / str(number)
        at, share = chance.randint(1, writes.count), chance.choice([0.0, 0.4, 1.0])
        assert killed(config, folder, at, share)
        # Killed a second time on the way, and then left alone.
        killed(config, folder, 1 + at // 2, 1 - share)
        assert figures(execute(config, folder)) == whole
        assert is_finished(folder) and not (folder / FILE).exists()


def test_a_killed_run_goes_on_with_the_same_numbers(tmp_path):
    check_points(configuration("unmix_tns+eata+lame", "sar"), tmp_path, 4)


@pytest.mark.parametrize("scenario", ["continual", "mixed"])
def test_figures_do_not_depend_on_how_many_batches_are_scored_at_once(tmp_path, scenario):
    config = configuration("unmix_tns", "eata", scenario=scenario)
    whole = figures(execute(config, tmp_path / "whole", every=None))
    for every in (1, 3):
        assert figures(execute(config, tmp_path / str(every), every)) == whole


@pytest.mark.slow
@pytest.mark.parametrize(
    "method",
    [
        "bn",
        "eata",
        "rdumb",
        "cotta",
        "adanpc",
        "unmix_tns+lame",
        *(
            pytest.param(method, marks=pytest.mark.soak)
            for method in (
                "tent",
                "sar",
                "petal",
                "rmt[warmup_samples=40]",
                "adanpc_bn",
                "alpha_bn+tent",
            )
        ),
    ],
)
def test_killed_at_many_points_with_any_method(tmp_path, monkeypatch, method):
    net, info = fake_load("cifar10_resnet20_bn")
    images = read_bundled().balanced(40)
    loader = [(images.tensor().float() / 255, torch.from_numpy(images.labels))] * 2
    artefacts = tta.collect_source(net, loader, for_methods=["eata", "adanpc", "petal", "rmt"])
    info = dataclasses.replace(info, source=dataclasses.replace(artefacts, batches=loader))
    monkeypatch.setattr("experiments.run.subject.models.load", lambda name: (net, info))
    scenario = random.Random(method).choice(["reset_each_shift", "mixed", "dirichlet_slots"])
    config = configuration(method, scenario=scenario)
    check_points(config, tmp_path, 8)


@pytest.mark.slow
def test_killed_by_the_clock(tmp_path):
    config = configuration("cotta", "eata")
    whole = figures(execute(config, tmp_path / "whole"))
    context = multiprocessing.get_context("fork")
    for number in range(12):
        folder = tmp_path / str(number)
        process = context.Process(target=execute, args=(config, folder))
        process.start()
        process.join(random.uniform(0.05, 2.0))
        process.kill()
        process.join()
        assert figures(execute(config, folder)) == whole


def test_late_batches_windows_and_clocks_go_on(tmp_path):
    for options in ({"clock": {"ratio": 2.5}}, {"window": 4}):
        scenario = "single" if "window" in options else "continual"
        config = configuration("tent", scenario=scenario, **options)
        name = scenario
        whole = figures(execute(config, tmp_path / name))
        assert killed(config, tmp_path / f"{name}-killed", 11, 0.5)
        assert figures(execute(config, tmp_path / f"{name}-killed")) == whole


def test_a_run_of_a_version_with_fewer_fields_goes_on(tmp_path):
    config = configuration("eata")
    whole = figures(execute(config, tmp_path / "whole"))
    assert killed(config, tmp_path / "cut", 6, 1.0)
    path = tmp_path / "cut" / "results.jsonl"
    rows = [row for _, row in split(path.read_bytes()) if row is not None]
    rows[0]["config"] = {
        k: v for k, v in rows[0]["config"].items() if k not in ("classes", "match")
    }
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))  # without checks, too
    assert figures(execute(config, tmp_path / "cut")) == whole


def test_a_deadline_saves_the_place(tmp_path):
    config = configuration("eata")
    whole = figures(execute(config, tmp_path / "whole"))
    stops = 0
    while not is_finished(tmp_path / "cut"):
        try:
            execute(config, tmp_path / "cut", deadline=0.0)  # over before it begins
        except OutOfTime:
            stops += 1
    assert figures(tmp_path / "cut") == whole
    assert stops == 4  # after batches 3, 6, 9 and 10


def test_damaged_files_are_mended_and_said(tmp_path, capsys):
    config = configuration("tent")
    folder = tmp_path / "run"
    whole = figures(execute(config, tmp_path / "whole"))
    assert killed(config, folder, 11, 1.0)
    snapshot = folder / FILE
    data = bytearray(snapshot.read_bytes())
    data[-3] ^= 1  # inside a tensor: only the checksum can tell
    snapshot.write_bytes(data)
    lines = (folder / "results.jsonl").read_bytes().splitlines(keepends=True)
    lines[4] = lines[4][:9] + b"\0\0\0\n"
    (folder / "results.jsonl").write_bytes(b"".join(lines)[:-5])
    Run(load_setup(config), folder=folder, snapshot_every=3).execute()
    said = capsys.readouterr().out
    assert "repaired 2 lines" in said and "its checksum is another" in said
    assert figures(folder) == whole
    quoted = [row["text"] for row in read_lines(folder / "results.jsonl", "repaired")]
    assert len(quoted) == 2 and quoted[0].startswith('{"check":')


def test_lines_lost_before_the_snapshot_are_run_again(tmp_path, capsys):
    config = configuration("eata")
    folder = tmp_path / "run"
    whole = figures(execute(config, tmp_path / "whole"))
    assert killed(config, folder, 13, 1.0) and (folder / FILE).exists()
    lines = (folder / "results.jsonl").read_bytes().splitlines(keepends=True)
    lines[4] = b"garbage\n"
    (folder / "results.jsonl").write_bytes(b"".join(lines))
    Run(load_setup(config), folder=folder, snapshot_every=3).execute()
    assert "lines are missing" in capsys.readouterr().out
    assert figures(folder) == whole


@pytest.mark.parametrize("lost", ["run", "method", "batch", "domain", "summary", "stream", "end"])
@pytest.mark.parametrize("damage", ["junk", "digit", "copy"])
def test_what_is_damaged_in_a_finished_run_is_made_again(finished, tmp_path, lost, damage):
    """Junk, a digit that is changed, another line in its place: all alike to whoever goes on."""
    config, data, whole = finished
    path = tmp_path / "results.jsonl"
    lines = data.splitlines(keepends=True)
    at = next(n for n, line in enumerate(lines) if decode(line[:-1])["kind"] == lost)
    changed = re.sub(rb"(.*)(\d)", lambda m: m[1] + b"%d" % ((int(m[2]) + 1) % 10), lines[at])
    before = lines[at - 1] if at else b"{}\n"
    lines[at] = {"junk": b"junk\n", "digit": changed, "copy": before}[damage]
    path.write_bytes(b"".join(lines))
    assert not is_finished(tmp_path)
    with pytest.raises(ValueError, match=f"line {at + 1} is cut off, changed or a copy"):
        list(read_lines(path))
    results = Results(path)
    assert results.repaired == 1 and not results.ended
    results.close()
    assert not is_finished(tmp_path)  # killed here, it is still gone on with
    assert figures(execute(config, tmp_path)) == whole
    assert is_finished(tmp_path)
    (quoted,) = read_lines(path, "repaired")
    assert quoted["step"] == at and quoted["text"] == lines[at][:-1].decode()


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        use_tiny_models(patch)
        config = configuration("tent")
        folder = execute(config, tmp_path_factory.mktemp("finished"))
        return config, (folder / "results.jsonl").read_bytes(), figures(folder)


def test_a_line_that_is_there_twice_is_noticed(finished, tmp_path):
    config, data, whole = finished
    path = tmp_path / "results.jsonl"
    lines = data.splitlines(keepends=True)
    path.write_bytes(b"".join([*lines[:5], lines[3], *lines[5:]]))
    assert not is_finished(tmp_path)
    assert figures(execute(config, tmp_path)) == whole
    assert [row["step"] for row in read_lines(path, "repaired")] == [5]


def test_every_flipped_bit_of_a_line_is_noticed():
    rows = [{"kind": "batch", "step": step, "nll": 0.25, "domain": "fog"} for step in range(3)]
    good = encode(rows, 0)
    assert [row for _, row in split(good)] == rows
    for place in range(len(good)):
        for bit in range(8):
            bad = bytearray(good)
            bad[place] ^= 1 << bit
            assert None in [row for _, row in split(bytes(bad))], (place, bit)


def test_files_of_the_first_version_are_read_and_gone_on_with(finished, tmp_path):
    config, data, whole = finished
    path = tmp_path / "results.jsonl"
    old = [json.dumps(row) for _, row in split(data) if row is not None]
    path.write_text("\n".join(old) + "\n")
    assert is_finished(tmp_path) and figures(tmp_path) == whole
    path.write_text("\n".join(old[:9]) + "\n")
    assert figures(execute(config, tmp_path)) == whole
    assert is_finished(tmp_path)
    lines = path.read_bytes().splitlines()
    assert [line.startswith(b'{"check": ') for line in lines] == [False] * 9 + [True] * (
        len(lines) - 9
    )


def test_a_write_that_takes_a_part_is_gone_on_with(tmp_path, monkeypatch):
    write = os.write
    monkeypatch.setattr("os.write", lambda file, data: write(file, data[:7]))
    with JsonLines(tmp_path / "x.jsonl") as lines:
        lines.write("a", text="longer than seven")
    assert list(read_lines(tmp_path / "x.jsonl")) == [{"kind": "a", "text": "longer than seven"}]


def test_mending_keeps_every_byte():
    assert mend(b"") == (b"", 0)
    for whole in (b'{"kind": "a"}\n{"kind": "b"}\n', encode([{"kind": "a"}, {"kind": "b"}], 0)):
        assert mend(whole) == (whole, 0)
        first = whole.index(b"\n") + 1
        for cut in range(first + 1, len(whole)):
            mended, count = mend(whole[:cut])
            assert count == 1 and mended.startswith(whole[:first]) and mended.endswith(b"\n")
            (quote,) = [row for _, row in split(mended) if row and row["kind"] == "repaired"]
            assert quote["text"] == whole[first:cut].decode()
            assert mend(mended) == (mended, 0)


def test_one_process_writes_a_file(tmp_path):
    with JsonLines(tmp_path / "x.jsonl"), pytest.raises(Busy, match="another process"):
        JsonLines(tmp_path / "x.jsonl")


def test_other_numbers_than_before_are_refused(tmp_path):
    with Results(tmp_path / "x.jsonl") as results:
        results.write("batch", stream="s", method="m", step=1, errors=3, seconds=1.0)
        results.write("batch", stream="s", method="m", step=1, errors=3, seconds=2.0)
        with pytest.raises(Conflict, match="3 errors then, 4 now"):
            results.write("batch", stream="s", method="m", step=1, errors=4)
    assert len(list(read_lines(tmp_path / "x.jsonl"))) == 1
    execute(configuration("bn"), tmp_path / "run")
    with pytest.raises(Conflict, match="another configuration"):
        execute(configuration("tent"), tmp_path / "run")


def test_the_command_goes_on_by_itself_or_when_told(tmp_path, capsys):
    arguments = ["run", "--output", str(tmp_path), "--device", "cpu", "--images", "20"]
    arguments += ["--methods", "bn", "tent", "--corruptions", "fog", "--batch-size", "4"]
    assert cli.main(arguments) == 0
    (first,) = tmp_path.iterdir()
    whole = figures(first)
    results = first / "results.jsonl"
    lines = results.read_bytes().splitlines(keepends=True)

    results.write_bytes(b"".join(lines[:8]) + lines[8][:10])
    assert cli.main([*arguments, "--fresh"]) == 0
    assert len(list(tmp_path.iterdir())) == 2 and not is_finished(first)
    capsys.readouterr()
    assert cli.main(arguments) == 0
    assert f"continuing {first}" in capsys.readouterr().out
    assert len(list(tmp_path.iterdir())) == 2 and figures(first) == whole

    results.write_bytes(b"".join(lines[:9]))
    assert cli.main(["run", "--resume", str(first)]) == 0
    assert figures(first) == whole
    assert cli.main(["run", "--resume", str(tmp_path)]) == 2
    said = capsys.readouterr().err
    assert "must be the folder of a run" in said and "leave --resume out" in said


def test_a_name_is_no_pattern(tmp_path):
    arguments = ["run", "--output", str(tmp_path), "--device", "cpu", "--images", "10"]
    arguments += ["--methods", "source", "--corruptions", "fog", "--name", "x[1]*", "--quiet"]
    assert cli.main(arguments) == 0
    (first,) = tmp_path.iterdir()
    results = first / "results.jsonl"
    results.write_bytes(b"".join(results.read_bytes().splitlines(keepends=True)[:-1]))
    assert cli.main(arguments) == 0
    assert list(tmp_path.iterdir()) == [first] and is_finished(first)


@pytest.mark.parametrize("place", ["config", "stream"])
def test_a_run_of_a_version_with_more_settings_is_refused(finished, tmp_path, capsys, place):
    _, data, _ = finished
    header, *rows = [row for _, row in split(data) if row is not None]
    config = header["config"]
    (config if place == "config" else config["streams"][0])["colour"] = "red"
    (tmp_path / "results.jsonl").write_bytes(encode([header, *rows], 0))
    assert cli.main(["run", "--resume", str(tmp_path)]) == 2
    error = capsys.readouterr().err
    assert "the settings of this version, which differ in colour: use" in error


def test_torchs_generator_goes_on(tmp_path, monkeypatch):
    """Some models draw from it, such as those with noise in eval mode."""

    def noisy(name):
        net, info = fake_load(name)
        net.register_forward_pre_hook(lambda m, a: (a[0] + 0.1 * torch.rand_like(a[0]),))
        return net, info

    monkeypatch.setattr("experiments.run.subject.models.load", noisy)
    config = configuration("tent")
    torch.manual_seed(0)
    whole = figures(execute(config, tmp_path / "whole"))
    torch.manual_seed(0)
    with pytest.raises(OutOfTime):
        execute(config, tmp_path / "cut", deadline=0.0)
    torch.manual_seed(99)
    assert figures(execute(config, tmp_path / "cut")) == whole
