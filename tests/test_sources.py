"""Where frames come from: folders, videos, cameras and addresses, whole and damaged."""

from __future__ import annotations

import functools
import http.server
import math
import socket
import threading
import time
from contextlib import contextmanager
from pathlib import Path

import av
import pytest
from PIL import Image

import tta
from tests.helpers.videos import folder, picture, video
from tta.runtime import open_source
from tta.runtime.frames import Failure, FolderSource, Frame, read_picture
from tta.runtime.video import LiveSource, camera


def names(source) -> list[str]:
    return [Path(frame.source).name for frame in source if isinstance(frame, Frame)]


def test_a_folder_gives_its_pictures_by_name(tmp_path):
    place = folder(tmp_path / "yard", 3)
    folder(place / "b", 1, first=7)
    (place / "notes.txt").write_text("none")
    picture(0).save(place / "._0000.png")
    frames = list(open_source(place, follow=0))
    assert [Path(frame.source).name for frame in frames] == [
        "0000.png", "0001.png", "0002.png", "0007.png"
    ]  # fmt: skip
    assert {frame.stream for frame in frames} == {"yard"}
    assert frames[1].image().tobytes() == picture(1).tobytes()
    (frame,) = open_source(place / "0002.png")
    assert frame.stream == "0002" and frame.image().tobytes() == picture(2).tobytes()


def test_a_folder_that_is_written_to_gives_what_comes(tmp_path):
    """In the order in which it comes, and each file when it is whole."""
    place = folder(tmp_path, 2, first=5)
    data = (place / "0005.png").read_bytes()

    def write() -> None:
        time.sleep(0.1)
        with (place / "0001.png").open("wb") as file:
            for start in range(0, len(data), 200):
                file.write(data[start : start + 200])
                file.flush()
                time.sleep(0.05)
        picture(9).save(place / "0009.png")

    writer = threading.Thread(target=write)
    writer.start()
    frames = list(open_source(place, follow=1.0))
    writer.join()
    found = [Path(frame.source).name for frame in frames]
    assert found == ["0005.png", "0006.png", "0001.png", "0009.png"]
    assert frames[2].image().size == (16, 16)


def test_a_folder_without_an_end_ends_when_it_is_closed(tmp_path):
    source = open_source(folder(tmp_path, 1), follow=math.inf)
    threading.Timer(0.2, source.close).start()
    assert names(source) == ["0000.png"]


def test_pictures_that_are_known_come_first(tmp_path):
    place = folder(tmp_path, 4)
    known = [str(place / "0003.png"), str(place / "0001.png")]
    found = names(FolderSource(place, "x", 0.0, known))
    assert found == ["0003.png", "0001.png", "0000.png", "0002.png"]


def test_pictures_of_all_modes_are_rgb_and_upright(tmp_path):
    for mode in ("L", "LA", "RGBA", "P", "CMYK", "1", "I;16"):
        path = tmp_path / f"x.{'tif' if mode in ('CMYK', 'I;16') else 'png'}"
        Image.new(mode, (4, 6)).save(path)
        assert read_picture(path).mode == "RGB"
    exif = Image.Exif()
    exif[0x112] = 6  # turned by a quarter
    Image.new("RGB", (4, 6)).save(tmp_path / "x.jpg", exif=exif)
    assert read_picture(tmp_path / "x.jpg").size == (6, 4)


def test_no_picture_and_bombs_are_refused(tmp_path, monkeypatch):
    (tmp_path / "x.png").write_bytes(b"none")
    with pytest.raises(ValueError, match=r"`image` must be a whole picture, but .* is none \("):
        read_picture(tmp_path / "x.png")
    picture(0, 64).save(tmp_path / "x.png")
    cut = (tmp_path / "x.png").read_bytes()[:2000]
    (tmp_path / "y.png").write_bytes(cut)
    with pytest.raises(ValueError, match=r"a whole picture, but .* is none \(.*truncated"):
        read_picture(tmp_path / "y.png")
    Image.new("F", (4, 4), 60_000).save(tmp_path / "z.tif")
    with pytest.raises(ValueError, match=r"is none \(grey levels must lie in \[0, 1\] or"):
        read_picture(tmp_path / "z.tif")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 64 * 64 // 2 - 1)
    with pytest.raises(ValueError, match="exceeds limit"):
        read_picture(tmp_path / "x.png")
    with pytest.raises(FileNotFoundError):
        read_picture(tmp_path / "gone.png")


def test_a_video_gives_its_frames_in_order(tmp_path):
    path = video(tmp_path / "gate.mp4", 12)
    frames = list(open_source(str(path)))
    assert [frame.source for frame in frames] == [f"{path}#{n}" for n in range(12)]
    levels = [frame.image().getpixel((3, 3))[0] for frame in frames]
    assert levels == sorted(levels) and levels[-1] - levels[0] > 40
    assert {frame.stream for frame in frames} == {"gate"}


def test_a_video_that_is_cut_off_or_damaged_gives_what_it_has(tmp_path):
    data = bytearray(video(tmp_path / "a.mkv", 40, 64).read_bytes())
    data[len(data) // 2 : len(data) // 2 + 60] = b"\x00" * 60
    (tmp_path / "b.mkv").write_bytes(data[: int(len(data) * 0.9)])
    found = list(open_source(tmp_path / "b.mkv"))
    frames = [item for item in found if isinstance(item, Frame)]
    assert 5 <= len(frames) < 40
    assert all(isinstance(item, (Frame, Failure)) for item in found)


@pytest.mark.parametrize(
    ("spec", "error", "message"),
    [
        ("gone", FileNotFoundError, "`source` must be there, but 'gone' is not"),
        ("gone.png", FileNotFoundError, "must be there"),
        ("no_video.mp4", ValueError, "`source` must be a folder of pictures, a picture or a video"),
        ("sound.wav", ValueError, "it has no pictures"),
        ("file:///etc/passwd", ValueError, "`source` must be an address of rtsp"),
        ("", ValueError, "`source` must be a path"),
        (None, TypeError, "got None"),
        (True, TypeError, "got True"),
        (1.5, TypeError, "got 1.5"),
        (-1, ValueError, "`source` must be a whole number"),
        ([], ValueError, "at least one source"),
        ("a\0b", ValueError, "no file can be called"),
        pytest.param("9" * 5000, OSError, "must be a path that can be reached", id="long"),
    ],
)
def test_what_is_no_source_is_refused(spec, error, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("no_video.mp4").write_bytes(b"none" * 100)
    with av.open("sound.wav", "w") as container:
        stream = container.add_stream("pcm_s16le", rate=8000)
        frame = av.AudioFrame(format="s16", layout="mono", samples=800)
        frame.sample_rate = 8000
        for packet in stream.encode(frame):
            container.mux(packet)
    with pytest.raises(error, match=message) as caught:
        open_source(spec)
    assert len(str(caught.value)) <= 300


def test_several_sources_have_names_of_their_own(tmp_path):
    place = folder(tmp_path / "door", 1)
    video(tmp_path / "door.mp4", 1)
    address = "rtsp://user:secret@10.0.0.5:554/live?token=secret"
    source = open_source([place, tmp_path / "door.mp4", 3, address])
    found = [part.name for part in source.parts()]
    assert found == ["door", "door-2", "camera-3", "10.0.0.5:554/live"]
    last = source.parts()[-1]
    assert last.shown_as == "rtsp://10.0.0.5:554/live" and last.address == address
    named = open_source({"front": place, "back": [place, place]}).parts()
    assert [part.name for part in named] == ["front", "back", "back-2"]


@contextmanager
def served(place: Path):
    """The address of a folder, over HTTP on loopback."""
    handler = functools.partial(http.server.SimpleHTTPRequestHandler, directory=str(place))
    handler.func.log_message = lambda *_: None
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


def test_a_stream_that_breaks_off_is_opened_again(tmp_path):
    video(tmp_path / "x.mkv", 6)
    with served(tmp_path) as address:
        source = open_source(f"{address}/x.mkv")
        assert source.live
        found = []
        for item in source:
            found.append(item)
            if len(found) == 15:
                source.close()
    frames = [item for item in found if isinstance(item, Frame)]
    lost = [item for item in found if isinstance(item, Failure)]
    assert [frame.source for frame in frames] == [f"{address}/x.mkv#{n}" for n in range(13)]
    assert len(lost) == 2 and "broke off (it has ended)" in lost[0].reason


def readers() -> list[threading.Thread]:
    return [t for t in threading.enumerate() if t.name.startswith("tta-reader")]


def test_a_host_that_never_answers_is_given_up_in_time():
    """It accepts and is silent; and no password is shown."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        port = listener.getsockname()[1]
        source = LiveSource(
            f"rtsp://u:secret@127.0.0.1:{port}/x", "x", "rtsp://host/x", timeout=0.3, tries=2
        )
        begun = time.monotonic()
        found = list(source)
    assert time.monotonic() - begun < 10
    assert len(found) == 2 and all(isinstance(item, Failure) for item in found)
    assert not any("secret" in item.reason for item in found)
    for thread in readers():
        thread.join(5)
    assert not readers()


def test_an_open_that_hangs_for_ever_is_left_behind(monkeypatch):
    hanging = threading.Event()

    def hang(*_, **__):
        hanging.wait()
        raise av.error.ExitError(0, "released")

    monkeypatch.setattr(av, "open", hang)
    begun = time.monotonic()
    found = list(LiveSource("rtsp://x", "x", "rtsp://x", timeout=0.2, tries=2))
    assert time.monotonic() - begun < 5
    assert [item.reason for item in found] == ["rtsp://x broke off (nothing came for 0.2 s)"] * 2
    assert len(readers()) == 2  # nobody can end them
    hanging.set()
    for thread in readers():
        thread.join(5)
    assert not readers()


def test_a_camera_that_is_not_there_fails_and_ends():
    source = camera(997, "camera-997")
    source.tries = 1
    (lost,) = source
    assert isinstance(lost, Failure) and "broke off" in lost.reason


def test_the_names_are_there_after_import_tta():
    assert tta.runtime.open_source is open_source
