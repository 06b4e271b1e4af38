"""Images as they come: every mode upright as RGB, grey tensors, files that cannot be read."""

import struct
import zlib

import numpy as np
import PIL.Image
import pytest
import torch
from PIL import ImageCms, PngImagePlugin
from torchvision import tv_tensors
from torchvision.transforms.v2 import functional

import corruptions
from corruptions import layouts, pictures
from corruptions.commands import main
from tests.helpers.pictures import smooth_pictures as images

ALL = corruptions.list_corruptions(extra=True)
RAMP = np.arange(0, 65536, 257 * 3, dtype=np.int64)[:80].reshape(8, 10)  # 16 bits, whole levels


def save(path, values, **options):
    PIL.Image.fromarray(values).save(path, **options)
    return path


def read(path):
    picture = pictures.read_picture(path)
    assert picture.mode == "RGB"
    return np.asarray(picture)


def grey(levels):
    return np.repeat(levels[..., None], 3, 2)


@pytest.mark.parametrize("suffix", ["png", "tif", "pgm"])
def test_sixteen_bits_are_scaled(tmp_path, suffix):
    path = save(tmp_path / f"x.{suffix}", RAMP.astype(np.uint16))
    assert np.array_equal(read(path), grey(RAMP // 257))
    # To the nearest level in between.
    odd = np.full((4, 4), 257 * 9 + 200, np.uint16)
    assert (read(save(path, odd)) == 10).all()


def test_other_depths_of_grey(tmp_path):
    path = tmp_path / "x.tif"
    assert np.array_equal(read(save(path, RAMP.astype(np.int32))), grey(RAMP // 257))
    inverse = read(save(path, RAMP.astype(np.uint16), tiffinfo={262: 0}))  # white is zero
    assert np.array_equal(inverse, grey(255 - RAMP // 257))
    unit = np.linspace(0, 1, 80, dtype=np.float32).reshape(8, 10)
    assert np.array_equal(read(save(path, unit)), grey(np.round(unit * 255).astype(int)))
    levels = np.arange(80, dtype=np.float32).reshape(8, 10)
    assert np.array_equal(read(save(path, levels)), grey(levels.astype(int)))
    bits = PIL.Image.fromarray((RAMP // 257 > 120).astype(np.uint8) * 255).convert("1")
    bits.save(tmp_path / "bits.png")
    assert np.array_equal(read(tmp_path / "bits.png"), grey((RAMP // 257 > 120) * 255))


@pytest.mark.parametrize(
    ("values", "words"),
    [
        (np.full((4, 4), -1, np.int32), r"in 0\.\.65535, got -1\.\.-1"),
        (np.full((4, 4), 2**20, np.int32), r"in 0\.\.65535, got 1048576"),
        (np.full((4, 4), 300, np.float32), r"in \[0, 1\] or \[0, 255\], got 300"),
        (np.full((4, 4), np.nan, np.float32), "got nan"),
    ],
)
def test_grey_values_of_no_known_range(tmp_path, values, words):
    path = save(tmp_path / "x.tif", values)
    with pytest.raises(pictures.UnreadablePictureError, match=rf"x\.tif.*{words}"):
        pictures.read_picture(path)


def photo(height=12, width=20):
    return PIL.Image.fromarray(images(1, height, width)[0].movedim(0, -1).contiguous().numpy())


@pytest.mark.parametrize(("mode", "near"), [("YCbCr", 2), ("CMYK", 0), ("RGBX", 0), ("LAB", 3)])
def test_colour_spaces_are_converted(tmp_path, mode, near):
    rgb = photo()
    if mode == "LAB":
        srgb, lab = ImageCms.createProfile("sRGB"), ImageCms.createProfile("LAB")
        other = ImageCms.profileToProfile(rgb, srgb, lab, outputMode="LAB")
    else:
        other = rgb.convert(mode)
    if mode != "RGBX":
        other.save(tmp_path / "x.tif")
        with PIL.Image.open(tmp_path / "x.tif") as file:
            assert file.mode == mode
        out = read(tmp_path / "x.tif").astype(int)
        assert np.abs(out - np.asarray(rgb)).mean() <= near
    out = np.asarray(pictures.to_rgb(other)).astype(int)
    assert np.abs(out - np.asarray(rgb)).mean() <= near
    assert np.abs(np.asarray(other)[..., :3].astype(int) - np.asarray(rgb)).max() > 20 or (
        mode == "RGBX"
    )


def test_pictures_of_any_mode_are_corrupted_as_rgb():
    rgb = photo(32, 32)
    for mode in ("HSV", "YCbCr", "CMYK"):
        other = rgb.convert(mode)
        expected = corruptions.Corrupt("contrast", 3)(other.convert("RGB"))
        out = corruptions.Corrupt("contrast", 3)(other)
        assert out.mode == "RGB" and np.array_equal(np.asarray(out), np.asarray(expected))
    deep = PIL.Image.fromarray(np.full((32, 32), 257 * 100, np.uint16))
    out, _ = corruptions.CorruptedDataset([(deep, 0)], "contrast", 3)[0]
    assert (np.asarray(out) == 100).all() and out.mode == "RGB"


def test_transparency_is_dropped(tmp_path, recwarn):
    rgb = photo()
    alpha = PIL.Image.fromarray(np.tile(np.arange(20, dtype=np.uint8) * 12, (12, 1)))
    clear = rgb.copy()
    clear.putalpha(alpha)
    clear.save(tmp_path / "rgba.png")
    assert np.array_equal(read(tmp_path / "rgba.png"), np.asarray(rgb))
    level = rgb.convert("L")
    both = PIL.Image.merge("LA", (level, alpha))
    both.save(tmp_path / "la.png")
    assert np.array_equal(read(tmp_path / "la.png"), grey(np.asarray(level)))
    palette = rgb.quantize(16)
    palette.save(tmp_path / "p.png", transparency=bytes([0, 128] + [255] * 14))
    assert np.array_equal(read(tmp_path / "p.png"), np.asarray(palette.convert("RGB")))
    for mode in ("PA", "La", "RGBa"):
        assert pictures.to_rgb(PIL.Image.new(mode, (4, 4))).mode == "RGB"
    assert not recwarn.list


@pytest.mark.parametrize("suffix", ["jpg", "png", "tif", "webp"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_pictures_are_upright(tmp_path, orientation, suffix):
    """As a viewer shows them: which corner of the stored pixels is the first one in view."""
    stored = np.zeros((16, 32, 3), np.uint8)
    stored[:8, :16] = 250
    path = tmp_path / f"x.{suffix}"
    exif = PIL.Image.Exif()
    exif[0x0112] = orientation
    options = {"lossless": True} if suffix == "webp" else {}
    PIL.Image.fromarray(stored).save(path, exif=exif, **options)
    out = read(path)
    assert out.shape == ((16, 32, 3) if orientation < 5 else (32, 16, 3))
    bright = {
        1: (0, 0),
        2: (0, 1),
        3: (1, 1),
        4: (1, 0),
        5: (0, 0),
        6: (0, 1),
        7: (1, 1),
        8: (1, 0),
    }
    down, across = bright[orientation]
    height, width = out.shape[:2]
    corners = [[out[h, w, 0] for w in (2, width - 3)] for h in (2, height - 3)]
    assert corners[down][across] > 200 and sum(c > 200 for row in corners for c in row) == 1


def test_sixteen_bits_upright(tmp_path):
    exif = PIL.Image.Exif()
    exif[0x0112] = 6
    path = save(tmp_path / "x.png", RAMP.astype(np.uint16), exif=exif)
    assert np.array_equal(read(path), grey(np.rot90(RAMP // 257, -1)))


def test_damaged_exif_costs_no_pixels(tmp_path):
    path = tmp_path / "x.jpg"
    photo().save(path, exif=b"Exif\0\0II*\0\xff\xff\xff\x7f")
    assert read(path).shape == (12, 20, 3)


def test_written_folders_are_upright(tmp_path):
    tree = tmp_path / "tree" / "cat"
    tree.mkdir(parents=True)
    exif = PIL.Image.Exif()
    exif[0x0112] = 6
    photo(40, 64).save(tree / "a.jpg", exif=exif, quality=95)
    command = ["write", "folder", str(tree.parent), str(tmp_path / "out"), "--severities", "1"]
    assert main([*command, "--corruptions", "brightness", "--processes", "1", "--quiet"]) == 0
    with PIL.Image.open(tmp_path / "out/brightness/1/cat/a.JPEG") as written:
        assert written.size == (40, 64) and not written.getexif().get(0x0112)


def chunk(kind, content):
    checksum = struct.pack(">I", zlib.crc32(kind + content))
    return struct.pack(">I", len(content)) + kind + content + checksum


def huge_png(width, height, *more):
    """A PNG file that says how large it is and has no pixels."""
    head = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + head + b"".join(more) + chunk(b"IEND", b"")


BAD = {
    "huge.png": (huge_png(15000, 13000), "fewer pixels than PIL.Image.MAX_IMAGE_PIXELS"),
    "text.png": (
        huge_png(8, 8, chunk(b"zTXt", b"k\0\0" + zlib.compress(b"x" * 2 * 2**20))),
        "too large",
    ),
    "none.png": (b"no picture", "not a whole picture"),
    "empty.jpg": (b"", "not a whole picture"),
    "cut.png": (huge_png(8, 8), "not a whole picture"),
}


@pytest.mark.parametrize("name", BAD)
def test_files_that_cannot_be_read_are_named(tmp_path, name):
    content, words = BAD[name]
    (tmp_path / name).write_bytes(content)
    with pytest.raises(pictures.UnreadablePictureError, match=words) as caught:
        pictures.read_picture(tmp_path / name)
    text = str(caught.value)
    assert str(tmp_path / name) in text and "\n" not in text
    assert isinstance(caught.value, ValueError) and isinstance(caught.value, OSError)


def test_pictures_between_the_limits(tmp_path, monkeypatch):
    """Pillow only warns of those; where warnings are errors, the file is named too."""
    photo(20, 30).save(tmp_path / "x.png")
    monkeypatch.setattr(PIL.Image, "MAX_IMAGE_PIXELS", 500)
    with pytest.warns(PIL.Image.DecompressionBombWarning):
        assert read(tmp_path / "x.png").shape == (20, 30, 3)


@pytest.mark.filterwarnings("error")
def test_bomb_warnings_as_errors(tmp_path, monkeypatch):
    photo(20, 30).save(tmp_path / "x.png")
    monkeypatch.setattr(PIL.Image, "MAX_IMAGE_PIXELS", 500)
    with pytest.raises(pictures.UnreadablePictureError, match=r"x\.png"):
        pictures.read_picture(tmp_path / "x.png")


def test_text_chunks_within_limits_do_not_matter(tmp_path):
    info = PngImagePlugin.PngInfo()
    info.add_text("comment", "x" * 5000, zip=True)
    photo().save(tmp_path / "x.png", pnginfo=info)
    assert np.array_equal(read(tmp_path / "x.png"), np.asarray(photo()))


def test_a_missing_file_is_said_to_be_missing(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"gone\.png"):
        pictures.read_picture(tmp_path / "gone.png")


@pytest.fixture
def tree(tmp_path):
    """Three good pictures, two bad ones, the first in order among them, and hidden files."""
    root = tmp_path / "tree"
    for name in ("cat/b.png", "cat/c.jpg", "dog/a.png"):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        photo(32, 40).save(root / name)
    (root / "cat/a.png").write_bytes(b"no picture")
    (root / "dog/huge.png").write_bytes(BAD["huge.png"][0])
    for name in ("cat/._b.png", "__MACOSX/cat/._b.png", ".cache/x.png", "dog/.hidden.jpg"):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(b"\0\5\x16\7 resources")
    (root / "dog/readme.txt").write_text("no picture")
    return root


def test_hidden_files_are_no_pictures(tree):
    names = ["cat/a.png", "cat/b.png", "cat/c.jpg", "dog/a.png", "dog/huge.png"]
    assert pictures.find_pictures(tree) == names
    (tree / "cat" / "loop").symlink_to("..")  # leads to the pictures again, and for ever
    assert pictures.find_pictures(tree) == names
    (tree / "cat" / "loop").unlink()
    options = layouts.Options(("fog",), (1,))
    assert layouts.Folder.open(tree, options).paths == tuple(names)


@pytest.mark.parametrize("processes", ["1", "2"])
def test_skipped_pictures_are_counted(tree, tmp_path, capsys, processes):
    out = tmp_path / "out"
    command = ["write", "folder", str(tree), str(out), "--corruptions", "fog", "--severities", "1"]
    command += ["--processes", processes, "--quiet"]
    assert main(command) == 2
    assert "cat/a.png` cannot be decoded" in capsys.readouterr().err
    for _ in range(2):  # the second time everything else is there already
        assert main([*command, "--on-error", "skip"]) == 0
        error = capsys.readouterr().err
        assert "left out 2 of 5 pictures" in error
        assert "cat/a.png" in error and "dog/huge.png" in error
    written = sorted(p.relative_to(out).as_posix() for p in out.rglob("*.JPEG"))
    assert written == [f"fog/1/{n}.JPEG" for n in ("cat/b.png", "cat/c", "dog/a.png")]
    assert (out / "contact-sheet.png").exists()
    assert main(["verify", str(out)]) == 0


def test_skipping_everything_is_an_error(tmp_path, capsys):
    root = tmp_path / "tree"
    root.mkdir()
    (root / "a.png").write_bytes(b"no picture")
    command = ["write", "folder", str(root), str(tmp_path / "out"), "--corruptions", "fog"]
    assert main([*command, "--processes", "1", "--quiet", "--on-error", "skip"]) == 2
    assert "none of the 1" in capsys.readouterr().err
    with pytest.raises(ValueError, match="`on_error` must be one of raise, skip, got 'ignore'"):
        layouts.Folder.open(root, layouts.Options(("fog",), (1,)), on_error="ignore")


def test_frost_pictures_of_16_bits_beside_hidden_files(tmp_path):
    save(tmp_path / "ice.png", np.full((200, 200), 257 * 90, np.uint16))
    (tmp_path / "._ice.png").write_bytes(b"resources")
    params = corruptions.sample("frost", (2, 3, 32, 32), 1, [0, 1], frost_pictures=tmp_path)
    assert (params["crop"] == 90).all()


# Grey images.


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize("size", [(32, 32), (48, 40)])
def test_grey_images_are_those_of_three_equal_channels(name, size):
    batch, seeds = images(3, *size)[:, :1].contiguous(), [4, 5, 6]
    colour = corruptions.corrupt(batch.expand(-1, 3, -1, -1), name, 4, seeds=seeds)
    out = corruptions.corrupt(batch, name, 4, seeds=seeds)
    assert out.shape == batch.shape and out.dtype == torch.uint8
    same = (colour == colour[:, :1]).all(1, keepdim=True)
    assert torch.equal(out[same], colour[:, :1][same])
    for grey_image, rgb in zip(out, colour, strict=True):
        picture = functional.to_pil_image(rgb).convert("L")
        assert torch.equal(functional.pil_to_tensor(picture), grey_image)
    params = corruptions.sample(name, batch.shape, 4, seeds)
    wide = corruptions.sample(name, (3, 3, *size), 4, seeds)
    assert params.keys() == wide.keys()
    assert all(torch.equal(params[key], wide[key]) for key in params)
    assert torch.equal(corruptions.apply(batch, name, params), out)
    floats = corruptions.corrupt(batch.float() / 255, name, 4, seeds=seeds)
    assert torch.equal(floats, out.float() / 255)
    clean = corruptions.corrupt(batch, name, 0, seeds=seeds)
    assert torch.equal(clean, batch)


def test_grey_through_transforms_and_datasets():
    image = images(1)[0, :1].contiguous()
    out = corruptions.Corrupt("contrast", 3)(image)
    expected = corruptions.corrupt(image[None], "contrast", 3, seeds=[0])[0]
    assert torch.equal(out, expected)
    wrapped = corruptions.Corrupt("contrast", 3)(tv_tensors.Image(image))
    assert isinstance(wrapped, tv_tensors.Image) and torch.equal(wrapped, expected)
    noise = corruptions.CorruptedDataset([(image, 3)], "gaussian_noise", 3, seed=1)
    level, label = noise[0]
    colour, _ = corruptions.CorruptedDataset(
        [(image.expand(3, -1, -1), 3)], "gaussian_noise", 3, seed=1
    )[0]
    luma = functional.pil_to_tensor(functional.to_pil_image(colour).convert("L"))
    assert label == 3 and torch.equal(level, luma) and level.shape == (1, 32, 32)


# Shapes and ranges.

LAST = images(2, 20, 24).movedim(1, -1)


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: corruptions.corrupt(LAST[0], "fog", 1), r"permute\(2, 0, 1\)\[None\]"),
        (lambda: corruptions.corrupt(LAST, "fog", 1), r"permute\(0, 3, 1, 2\)"),
        (lambda: corruptions.Corrupt("fog", 1)(LAST[0]), r"permute\(2, 0, 1\)"),
        (lambda: corruptions.Corrupt("fog", 1)(LAST), r"permute\(0, 3, 1, 2\)"),
        (lambda: corruptions.CorruptedDataset([LAST[0]], "fog", 1)[0], r"permute\(2, 0, 1\)"),
        (lambda: corruptions.corrupt(LAST[0, ..., 0], "fog", 1), r"image\[None, None\]"),
        (lambda: corruptions.corrupt(LAST[..., :1], "fog", 1), r"permute\(0, 3, 1, 2\)"),
        (lambda: corruptions.corrupt(torch.ones(1, 4, 32, 32), "fog", 1), r"images\[:, :3\]"),
        (lambda: corruptions.corrupt(torch.ones(3, 32, 32), "fog", 1), r"image\[None\]"),
        (
            lambda: corruptions.sample("fog", (2, 3, 2**62, 8), 1, [1, 2]),
            r"at most .* values, got shape",
        ),
        (lambda: corruptions.sample("fog", (2, 3, 8, 8), 1, range(2**62)), r"`seeds` must have sh"),
    ],
)
def test_shapes_are_explained(call, words):
    with pytest.raises(ValueError, match=words):
        call()


def test_overshoot_of_interpolation_is_to_be_clamped():
    fresh = torch.Generator().manual_seed(0)
    checks = (torch.rand(2, 3, 16, 16, generator=fresh) > 0.5).float()
    large = torch.nn.functional.interpolate(checks, (40, 40), mode="bicubic")
    assert large.min() < -0.02 and large.max() > 1.02
    with pytest.raises(ValueError, match=r"clamp\(0, 1\)") as caught:
        corruptions.corrupt(large, "fog", 1)
    assert "normalisation" not in str(caught.value)
    normalised = (checks - 0.45) / 0.25
    with pytest.raises(ValueError, match="normalisation") as caught:
        corruptions.corrupt(normalised, "fog", 1)
    assert "clamp" not in str(caught.value)


# Flat images.

# Averages of equal levels; jpeg_compression has its own rounding of levels.
AVERAGING = [
    "gaussian_blur", "glass_blur", "motion_blur", "elastic_transform", "pixelate", "contrast",
]  # fmt: skip
LEVELS = [0, 1, 2, 31, 64, 77, 100, 127, 128, 129, 150, 200, 251, 253, 254, 255]


def flat(size, levels):
    batch = torch.tensor(levels, dtype=torch.uint8)[:, None, None, None]
    return batch.expand(-1, 3, *size).contiguous()


@pytest.mark.parametrize("size", [(32, 32), (224, 224), (40, 56)])
@pytest.mark.parametrize("name", AVERAGING)
def test_flat_images_stay_as_they_are(name, size):
    levels = list(range(256)) if size == (32, 32) else LEVELS
    batch = flat(size, levels)
    for severity in (1, 2, 3, 4, 5, 2.5):
        out = corruptions.corrupt(batch, name, severity, seeds=range(len(batch)))
        assert torch.equal(out, batch), (name, severity)


@pytest.mark.parametrize("size", [(32, 32), (224, 224), (40, 56)])
@pytest.mark.parametrize("name", ["defocus_blur", "zoom_blur", "jpeg_compression"])
def test_flat_images_stay_flat(name, size):
    """Even where the published weights or tables move the level itself."""
    batch = flat(size, LEVELS)
    for severity in (1, 2, 3, 4, 5, 2.5):
        out = corruptions.corrupt(batch, name, severity, seeds=range(len(batch))).flatten(1)
        assert torch.equal(out.amin(1), out.amax(1)), (name, severity)
        moved = (out[:, 0].int() - batch[:, 0, 0, 0].int()).abs().max()
        # The published disc of 10 pixels weighs 1.01; a JPEG's coarsest step is 7 levels here.
        assert moved <= {"zoom_blur": 1, "defocus_blur": 3, "jpeg_compression": 8}[name]


# Levels of flat images that the published zoom blur lowers by one, by scipy's zoom in float32.
PROBED = [0, 1, 7, 37, 64, 100, 127, 128, 150, 200, 237, 251, 254, 255]
LOWERED = {32: (41, 63, 71, 83, 85), 224: (0, 3, 0, 0, 0)}


@pytest.mark.parametrize("side", LOWERED)
def test_flat_images_under_the_published_zoom(side):
    levels = list(range(256)) if side == 32 else PROBED
    batch = flat((side, side), levels)
    for severity, count in enumerate(LOWERED[side], 1):
        out = corruptions.corrupt(batch, "zoom_blur", severity, seeds=range(len(batch)))
        difference = batch[:, 0, 0, 0].int() - out[:, 0, 0, 0].int()
        assert difference.min() >= 0 and difference.sum() == count
    # Between published settings nothing was published, and no level is lowered.
    assert torch.equal(corruptions.corrupt(batch, "zoom_blur", 2.5, seeds=range(len(batch))), batch)


@pytest.mark.parametrize("size", [(63, 65), (150, 300), (224, 224)])
def test_an_image_alone_has_the_zoom_blur_of_a_batch(size):
    """Torch enlarges few channels by other sums, of which some end on the other side of a level."""
    shape = (4, 3, *size)
    batch = torch.randint(0, 256, shape, generator=torch.Generator().manual_seed(0))
    batch, before = batch.to(torch.uint8), torch.get_num_threads()
    params = corruptions.sample("zoom_blur", shape, 5, range(4))
    expected = corruptions.apply(batch, "zoom_blur", params)
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            for part in (1, 2):
                found = [corruptions.apply(b, "zoom_blur", params) for b in batch.split(part)]
                assert torch.equal(torch.cat(found), expected), (threads, part)
    finally:
        torch.set_num_threads(before)


def test_flat_colours_stay_under_elastic_transform():
    colours = torch.tensor([[255, 1, 128], [3, 254, 77]], dtype=torch.uint8)
    batch = colours[:, :, None, None].expand(-1, -1, 96, 70).contiguous()
    for severity in range(1, 6):
        out = corruptions.corrupt(batch, "elastic_transform", severity, seeds=[0, 1])
        assert torch.equal(out, batch)
