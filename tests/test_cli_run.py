"""`tta run` and `tta collect`: what they write, going on after a kill, and what they refuse."""

from __future__ import annotations

import json
import os
import random
import signal
import threading
import time
from pathlib import Path

import pytest
import torch

import tta
from tests.helpers import own_models
from tests.helpers.processes import CLEAN
from tests.helpers.threads import no_thread_left
from tests.helpers.videos import SIZE, folder, picture, video
from tta import cli
from tta.runtime.resuming import JsonLines

OWN = "tests.helpers.own_models"
FLAGS = ("--device", "cpu", "--method", "tent.cifar10", "--follow", "0")


@pytest.fixture
def out(capsys):
    """Runs the command line; gives its exit status, output and errors."""

    def run(*arguments: object) -> tuple[int, str, str]:
        try:
            status = cli.main([str(a) for a in arguments])
        except SystemExit as exit:  # of argparse
            status = int(exit.code or 0)
        return status, *capsys.readouterr()

    return run


def lines(path: Path) -> list[dict]:
    """What a file says, without what a clock says."""
    found = [json.loads(line) for line in path.read_text().splitlines()]
    return [{k: v for k, v in line.items() if k not in ("latency", "time")} for line in found]


def test_predictions_of_a_folder_are_those_of_a_loop(out, tmp_path):
    place, file = folder(tmp_path / "yard", 20), tmp_path / "out.jsonl"
    status, text, errors = out("run", f"{OWN}:named", place, "--out", file, *FLAGS)
    assert (status, text) == (0, "")
    assert "20 predictions" in errors and "latency p50" in errors
    opened = own_models.net()
    own = tta.wrap(opened, "tent.cifar10", batch_size=8, mean=(0.0,), std=(1.0,))
    shots = torch.stack([own_models.to_pixels(picture(n)) for n in range(20)])
    expected = torch.cat([torch.log_softmax(own(b), 1).exp() for b in shots.split(8)])
    found = lines(file)
    for number, (line, row) in enumerate(zip(found, expected, strict=True)):
        label = int(row.argmax())
        assert line == {
            "stream": "yard",
            "index": number,
            "source": str(place / f"{number:04}.png"),
            "label": label,
            "class": f"kind {label}",
            "probability": float(row.max()),
            "learned": True,
        }
    assert all(json.loads(line)["latency"] > 0 for line in file.read_text().splitlines())
    health = lines(Path(f"{file}.state") / "events.jsonl")
    assert health[-1]["kind"] == "health" and health[-1]["entropy"] > 0


def test_several_sources_with_damaged_frames(out, tmp_path, caplog):
    place, file = folder(tmp_path / "yard", 6), tmp_path / "out.jsonl"
    (place / "0002.png").write_bytes((place / "0002.png").read_bytes()[:-30])
    clip = video(tmp_path / "door.mp4", 5)
    status, _, errors = out("run", f"{OWN}:model", place, clip, "--out", file, *FLAGS)
    assert status == 0 and "1 failed" in errors and "0002.png cannot be used (" in caplog.text
    assert caplog.text.count("0002.png") == 1
    by_stream = {name: [x["index"] for x in lines(file) if x["stream"] == name]
                 for name in ("yard", "door")}  # fmt: skip
    assert by_stream == {"yard": [0, 1, 3, 4, 5], "door": [0, 1, 2, 3, 4]}
    assert {line["class"] for line in lines(file)} == {None}


def test_a_run_that_is_whole_writes_nothing_again_and_one_that_grew_goes_on(out, tmp_path):
    place, file = folder(tmp_path / "yard", 8), tmp_path / "out.jsonl"
    command = ("run", f"{OWN}:named", place, "--out", file, *FLAGS)
    assert out(*command)[0] == 0
    before = file.read_bytes()
    assert out(*command)[0] == 0 and file.read_bytes() == before
    picture(100).save(place / "0000-new.png")  # before others by its name
    folder(place, 7, first=8)
    assert out(*command)[0] == 0
    found = lines(file)
    assert file.read_bytes().startswith(before) and len(found) == 16
    assert [line["index"] for line in found] == list(range(16))
    assert found[8]["source"].endswith("0000-new.png")
    whole = tmp_path / "whole.jsonl"
    order = Path(f"{file}.state") / "order.jsonl"
    assert [x["source"] for x in lines(order)] == [line["source"] for line in found]
    assert out("run", f"{OWN}:named", place, "--out", whole, *FLAGS, "--fresh")[0] == 0
    assert out(*command, "--fresh")[0] == 0 and lines(file) == lines(whole)


def _go(command: list[str], log: Path) -> None:
    torch.set_num_threads(1)
    with log.open("w") as file:
        os.dup2(file.fileno(), 2)
    os._exit(cli.main(command))


def killed(command: list[str], after: float, log: Path) -> bool:
    """Run the command in a process that is killed; whether it had ended before."""
    life = CLEAN.Process(target=_go, args=(command, log))
    life.start()
    life.join(after)
    ended = life.exitcode is not None
    assert not ended or life.exitcode == 0, log.read_text()
    life.kill()
    life.join()
    return ended


@pytest.mark.slow
def test_after_kills_the_file_is_that_of_a_run_without_one(out, tmp_path):
    """Killed at any instant; snapshots come now and then."""
    torch.set_num_threads(1)
    place = folder(tmp_path / "yard", 90)
    (place / "0033.png").write_bytes(b"damaged")
    clip = video(tmp_path / "door.mp4", 30, SIZE)
    file, chance = tmp_path / "out.jsonl", random.Random(0)
    command = ["run", f"{OWN}:slow", str(place), str(clip), "--out", str(file), *FLAGS]
    command += ["--interval", "0.2", "--batch-size", "4"]
    kills = 0
    while not killed(command, chance.uniform(0.2, 1.0), tmp_path / "log"):
        kills += 1
        assert kills < 100
    assert kills >= 2
    whole = tmp_path / "whole.jsonl"
    command[command.index(str(file))] = str(whole)
    assert out(*command)[0] == 0
    for stream in ("yard", "door"):
        one, other = ([x for x in lines(f) if x["stream"] == stream] for f in (file, whole))
        assert one == other and len(one) == {"yard": 89, "door": 30}[stream]


def test_a_signal_ends_it_with_all_that_was_learned(out, tmp_path):
    place, file = folder(tmp_path / "yard", 6), tmp_path / "out.jsonl"
    command = ["run", f"{OWN}:named", place, "--out", file, *FLAGS[:-1], "inf"]

    def stop() -> None:
        while not file.exists() or len(file.read_bytes().splitlines()) < 6:
            time.sleep(0.02)
        os.kill(os.getpid(), signal.SIGTERM)

    with no_thread_left():
        stopper = threading.Thread(target=stop)
        stopper.start()
        assert out(*command)[0] == 130
        stopper.join()
        pool = tta.runtime.StreamPool.open(own_models.net(), f"{file}.state")
        assert pool.stream("yard").run(lambda adapter: adapter._serving.taken) == 6
        pool.close()


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), KeyboardInterrupt()])
def test_a_batch_whose_lines_are_not_written_counts_for_nothing(out, tmp_path, monkeypatch, error):
    """The disk is full, or somebody is impatient; the next run writes what is missing."""
    place, file = folder(tmp_path / "yard", 30), tmp_path / "out.jsonl"
    command = ["run", f"{OWN}:named", place, "--out", file, *FLAGS, "--batch-size", 4]
    add, room = JsonLines.add, [3]

    def fail(self, *objects):
        if self.name == "out":
            room[0] -= 1
            if not room[0]:
                raise error
        add(self, *objects)

    with monkeypatch.context() as patch:
        patch.setattr(JsonLines, "add", fail)
        assert out(*command)[0] == (2 if isinstance(error, OSError) else 130)
    assert len(lines(file)) == 8
    assert out(*command)[0] == 0
    whole = tmp_path / "whole.jsonl"
    command[4] = whole
    assert out(*command)[0] == 0 and lines(file) == lines(whole)


def test_what_is_not_of_the_same_run_is_refused(out, tmp_path):
    place, file = folder(tmp_path / "yard", 2), tmp_path / "out.jsonl"
    command = ["run", f"{OWN}:named", place, "--out", file, *FLAGS]
    file.write_text('{"mine": 1}\n')
    status, _, errors = out(*command)
    assert status == 2 and "`out` must be a new file" in errors
    assert file.read_text() == '{"mine": 1}\n'
    file.unlink()
    assert out(*command)[0] == 0
    status, _, errors = out(*command, "--seed", 5)
    assert status == 2 and "`seed` must be that of the run in" in errors
    before = file.read_bytes()
    lock = JsonLines(file, "out")
    status, _, errors = out(*command)
    assert status == 2 and "another one has" in errors
    lock.close()
    other = tmp_path / "other"
    other.mkdir()
    (other / "precious").write_text("x")
    status, _, errors = out(*command, "--fresh", "--folder", other)
    assert status == 2 and "empty, or one that this command has made" in errors
    assert (other / "precious").exists() and file.read_bytes() == before
    status, _, errors = out(*command[:3], "--out", tmp_path / "new.jsonl", "--folder", other)
    assert status == 2 and "holds 'precious'" in errors
    assert [path.name for path in other.iterdir()] == ["precious"]
    (tmp_path / "out.jsonl.state" / "mine.txt").write_text("x")
    assert out(*command, "--fresh")[0] == 0  # takes away what it has made, and nothing else
    assert (tmp_path / "out.jsonl.state" / "mine.txt").read_text() == "x"


def test_a_command_that_is_refused_leaves_and_takes_no_file(out, tmp_path):
    place, file = folder(tmp_path / "yard", 2), tmp_path / "out.jsonl"
    command = ["run", f"{OWN}:named", place, "--out", file]
    assert out(*command, "--method", "tnet")[0] == 2
    assert {path.name for path in tmp_path.iterdir()} == {"yard"}
    assert out(*command, "--method", "neo")[0] == 0
    before = file.read_bytes()
    assert out(*command, "--fresh", "--method", "tnet")[0] == 2
    assert file.read_bytes() == before and (tmp_path / "out.jsonl.state" / "run.json").is_file()


def test_a_run_without_a_prediction_is_an_error_and_binds_no_other(out, tmp_path):
    place, file = tmp_path / "yard", tmp_path / "out.jsonl"
    place.mkdir()
    (place / "a.png").write_bytes(b"no picture")
    command = ["run", f"{OWN}:named", place, "--out", file]
    status, _, errors = out(*command, "--method", "bn")
    assert status == 2 and "gave none that could be predicted: check it." in errors
    picture(0).save(place / "b.png")
    assert out(*command, "--method", "neo")[0] == 0
    assert [line["index"] for line in lines(file)] == [1]


def test_a_run_that_a_model_ends_at_once_binds_no_other(out, tmp_path):
    place, file = folder(tmp_path / "yard", 2), tmp_path / "out.jsonl"
    status, _, errors = out("run", f"{OWN}:pair", place, "--out", file, "--method", "neo")
    assert status == 2 and "must return a tensor of logits" in errors
    assert out("run", f"{OWN}:named", place, "--out", file, *FLAGS)[0] == 0
    assert len(lines(file)) == 2


def test_an_empty_folder_and_mistakes_are_said_in_one_sentence(out, tmp_path):
    (tmp_path / "empty").mkdir()
    file = tmp_path / "out.jsonl"
    status, _, errors = out("run", f"{OWN}:named", tmp_path / "empty", "--out", file, *FLAGS)
    assert status == 2 and "error: `SOURCE` must give at least one frame" in errors
    for arguments, message in (
        (["run", f"{OWN}:named", "gone", "--out", file], "`source` must be there"),
        (["run", "nothing", tmp_path, "--out", file], "`model` must be one of those"),
        (["run", f"{OWN}:named", tmp_path], "the following arguments are required: --out"),
        (["run", f"{OWN}:named", tmp_path, "--out", file, "--follow", "x"], "number of seconds"),
        (["run", f"{OWN}:named", tmp_path, "--out", tmp_path / "no" / "x"], "`out` must be a file"),
    ):
        status, text, errors = out(*arguments)
        assert (status, text) == (2, "") and message in errors and errors.count("\n") == 1
    file = tmp_path / "new.jsonl"
    picture(0).save(tmp_path / "empty" / "a.png")
    status, _, errors = out(
        "run", f"{OWN}:named", tmp_path / "empty", "--out", file, "--method", "tnet", "--follow", 0
    )
    assert status == 2 and "got 'tnet': did you mean 'tent'?" in errors


def test_predictions_go_to_files_alone(out, tmp_path):
    """A device has no end, and a pipe no past: reading what is in them took all memory, or hung."""
    place, pipe = folder(tmp_path / "yard", 2), tmp_path / "pipe"
    os.mkfifo(pipe)
    for path in (pipe, "/dev/null", "/dev/full"):
        command = ("run", f"{OWN}:named", place, "--out", path, "--folder", tmp_path / "f", *FLAGS)
        status, _, errors = out(*command)
        assert status == 2 and "is a device or a pipe: choose a file." in errors


def test_predictions_that_are_gone_are_missed(out, tmp_path):
    place, file = folder(tmp_path / "yard", 9), tmp_path / "out.jsonl"
    command = ["run", f"{OWN}:named", place, "--out", file, *FLAGS]
    assert out(*command)[0] == 0
    whole = lines(file)
    file.unlink()
    status, _, errors = out(*command)
    assert status == 2 and "is gone or empty, after 9 frames: put it back" in errors
    assert out(*command, "--fresh")[0] == 0 and lines(file) == whole


def test_lines_are_on_the_disk_before_what_was_learned_from_them(out, tmp_path, monkeypatch):
    """Else a power cut would leave a state that knows of frames without a prediction."""
    place, file, order = folder(tmp_path / "yard", 9), tmp_path / "out.jsonl", []
    flush, snapshot = JsonLines.flush, tta.runtime.StreamPool.snapshot

    def flushed(self) -> None:
        order.append(self.path.name)
        flush(self)

    def written(self, *args) -> int:
        order.append(f"{sum(1 for _ in file.open())} lines")
        return snapshot(self, *args)

    monkeypatch.setattr(JsonLines, "flush", flushed)
    monkeypatch.setattr(tta.runtime.StreamPool, "snapshot", written)
    flags = (*FLAGS, "--batch-size", 3, "--interval", 0)
    assert out("run", f"{OWN}:named", place, "--out", file, *flags)[0] == 0
    for number in range(3):
        found = order[3 * number : 3 * number + 3]
        assert found == ["out.jsonl", "order.jsonl", f"{3 * number + 3} lines"]


def test_lines_that_a_kill_has_cut_are_cut_off(tmp_path):
    path = tmp_path / "x.jsonl"
    path.write_bytes(b'{"a": 1}\n' + b'{"b": "' + b"x" * 200_000)
    file = JsonLines(path, "out")
    assert list(file) == [{"a": 1}] and path.read_bytes() == b'{"a": 1}\n'
    file.add({"b": "é"}, {"c": 2})
    assert list(file) == [{"a": 1}, {"b": "é"}, {"c": 2}]
    file.close()
    path.write_bytes(b"[]\n")
    file = JsonLines(path, "out")
    with pytest.raises(ValueError, match=r"line 1 of .* is no object in JSON"):
        list(file)
    file.close()


# tta collect


def classes(place: Path, each: int = 3) -> Path:
    for label in range(10):
        folder(place / f"kind {label}", each, first=10 * label)
    return place


def test_artefacts_are_those_of_collect_source(out, tmp_path):
    place, file = classes(tmp_path / "train"), tmp_path / "source.safetensors"
    (place / "kind 3" / "0031.png").write_bytes(b"damaged")
    methods = ("--for", "eata", "--for", "cafa")  # as good as both behind one
    status, text, errors = out(
        "collect", f"{OWN}:named", place, *methods, "--out", file, "--device", "cpu"
    )
    assert status == 0 and "from 29 pictures" in text
    assert "warning: 1 pictures that cannot be read were left out" in errors
    found = tta.SourceStatistics.load(file)
    whole = [
        (own_models.to_pixels(picture(10 * label + n)), label)
        for label in range(10)
        for n in range(3)
        if (label, n) != (3, 1)
    ]
    loader = [(torch.stack([x for x, _ in whole]), torch.tensor([y for _, y in whole]))]
    expected = tta.collect_source(own_models.net(), loader, ["eata", "cafa"])
    assert set(found.contents) == set(expected.contents) >= {"fisher", "prototypes"}
    assert torch.allclose(found.prototypes, expected.prototypes, atol=1e-5)
    for name, value in expected.fisher.items():
        assert torch.allclose(found.fisher[name], value, rtol=1e-3, atol=1e-7)
    pictures, predictions = folder(tmp_path / "yard", 4), tmp_path / "out.jsonl"
    arguments = ("--method", "eata.cifar10", "--source", file, "--device", "cpu", "--follow", 0)
    assert out("run", f"{OWN}:named", pictures, "--out", predictions, *arguments)[0] == 0
    assert len(lines(predictions)) == 4


def test_class_folders_go_by_name_number_or_place(out, tmp_path):
    from tta.cli.collect import _labels
    from tta.cli.pictures import choose_pictures

    model, names = own_models.net(), own_models.NAMES
    some = {"kind 7": ["a"], "kind 2": ["b"]}
    assert _labels(some, model, names, ["cafa"]) == {"kind 2": 2, "kind 7": 7}
    assert _labels({"3": ["a"], "9": ["b"]}, model, None, ["cafa"]) == {"3": 3, "9": 9}
    from_one = {str(n): ["a"] for n in range(1, 11)}
    assert _labels(from_one, model, None, ["cafa"]) == {str(n): n - 1 for n in range(1, 11)}
    with pytest.raises(ValueError, match="by the names of classes, got 'kind 1x': did you mean"):
        _labels({"kind 1x": ["a"]} | some, model, names, ["cafa"], given=True)
    ten = {f"n{n:04}": [str(n)] for n in range(10)}
    assert _labels(ten, model, None, ["cafa"]) == {f"n{n:04}": n for n in range(10)}
    with pytest.raises(ValueError, match="subfolder for each of 10 classes"):
        _labels(some, model, None, ["cafa"])
    assert _labels({"": ["a"]}, model, None, ["eata", "drift"]) == {"": 0}
    with pytest.raises(ValueError, match="as cafa reads labels"):
        _labels({"": ["a"]}, model, None, ["eata", "cafa"])
    files = {str(n): [f"{n}-{i}" for i in range(5)] for n in range(10)}
    chosen = choose_pictures(files, {str(n): n for n in range(10)}, 20, 0)
    assert sorted(label for _, label in chosen) == sorted([*range(10)] * 2)
    assert chosen == choose_pictures(files, {str(n): n for n in range(10)}, 20, 0)


def test_artefacts_of_a_model_in_half_precision(out, tmp_path):
    place = folder(tmp_path / "yard", 3)
    (place / "no.png").write_bytes(b"no picture")
    file = tmp_path / "half.safetensors"
    status, text, errors = out("collect", f"{OWN}:half", place, "--for", "drift", "--out", file)
    assert status == 0, errors
    assert "from 3 pictures" in text and "1 pictures that cannot be read" in errors


def test_what_collect_refuses(out, tmp_path):
    place, file = folder(tmp_path / "flat", 3), tmp_path / "s.safetensors"
    (tmp_path / "empty").mkdir()
    model = f"{OWN}:named"
    for arguments, message in (
        ([model, place, "--for", "eatta", "--out", file], "`--for` must name methods, got 'eatta'"),
        ([model, place, "--for", "tent", "--out", file], "that need something"),
        ([model, place, "--for", "rmt", "--out", file], "as rmt reads labels"),
        ([model, "gone", "--for", "eata", "--out", file], "`FOLDER` must be a folder"),
        ([model, tmp_path / "empty", "--for", "eata", "--out", file], "`FOLDER` must hold"),
        ([model, place, "--for", "eata", "--out", tmp_path / "no" / "s"], "`out` must lie in"),
    ):
        status, text, errors = out("collect", *arguments, "--device", "cpu")
        assert (status, text) == (2, "") and message in errors, (message, errors)
        assert not file.exists()
    status, text, _ = out("collect", model, place, "--for", "eata", "--out", file)
    assert status == 0 and "fisher" in text and file.exists()
