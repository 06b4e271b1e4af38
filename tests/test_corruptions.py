"""The public functions of `corruptions`: what goes in, what comes out, what is refused."""

import copy
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import PIL.Image
import pytest
import torch
from torchvision.transforms import v2

import corruptions
from corruptions import chunks, digital, draws, severity
from tests.helpers.pictures import smooth_pictures

ALL = corruptions.list_corruptions(extra=True)


def test_names():
    assert corruptions.list_corruptions() == [
        "gaussian_noise", "shot_noise", "impulse_noise", "defocus_blur", "glass_blur",
        "motion_blur", "zoom_blur", "snow", "frost", "fog", "brightness", "contrast",
        "elastic_transform", "pixelate", "jpeg_compression",
    ]  # fmt: skip
    extra = ["speckle_noise", "gaussian_blur", "spatter", "saturate"]
    assert corruptions.list_corruptions() + extra == ALL


@pytest.mark.parametrize("name", ALL)
def test_batch_does_not_matter(name):
    batch, seeds = smooth_pictures(7), torch.tensor([5, -3, 2**62, 0, 1, 2, 5])
    whole = corruptions.corrupt(batch, name, 4, seeds=seeds)
    for part in (1, 3):
        pieces = [
            corruptions.corrupt(batch[i : i + part], name, 4, seeds=seeds[i : i + part])
            for i in range(0, 7, part)
        ]
        assert torch.equal(torch.cat(pieces), whole)


@pytest.mark.parametrize("name", ["zoom_blur", "pixelate", "defocus_blur"])
def test_matmul_precision_does_not_matter(name):
    """Some processors multiply float32 in bfloat16 under this setting."""
    batch = smooth_pictures(16, 96, 96) if name == "pixelate" else smooth_pictures(64)
    before = torch.get_float32_matmul_precision()
    expected = corruptions.corrupt(batch, name, 4, seeds=range(len(batch)))
    torch.set_float32_matmul_precision("medium")
    try:
        out = corruptions.corrupt(batch, name, 4, seeds=range(len(batch)))
    finally:
        torch.set_float32_matmul_precision(before)
    assert torch.equal(out, expected)


@pytest.mark.parametrize("name", ["gaussian_noise", "glass_blur", "fog"])
def test_large_batches_are_worked_in_parts(name):
    """300 images make several parts; the last image must match its own call."""
    batch, seeds = smooth_pictures(300), torch.arange(300)
    whole = corruptions.corrupt(batch, name, 3, seeds=seeds)
    assert torch.equal(whole[-1:], corruptions.corrupt(batch[-1:], name, 3, seeds=[299]))


@pytest.fixture
def three_threads(monkeypatch):
    """Parts of a few images on three threads, whatever else this machine does."""
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    monkeypatch.setattr(chunks, "_idle_cores", lambda: 3)
    monkeypatch.setattr(chunks, "_PIXELS", 1 << 13)
    yield
    torch.set_num_threads(before)


def alone(*arguments, **keywords):
    """As `corrupt`, on one thread."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(chunks, "_idle_cores", lambda: 1)
        out = corruptions.corrupt(*arguments, **keywords)
    torch.set_num_threads(before)
    return out


@pytest.mark.parametrize("name", ALL)
def test_threads_do_not_matter(name, three_threads):
    """However many torch has, and that number is left alone."""
    batch = smooth_pictures(64)
    expected = alone(batch, name, 3, seeds=range(64))
    assert torch.equal(corruptions.corrupt(batch, name, 3, seeds=range(64)), expected)
    assert torch.get_num_threads() == 3
    with ThreadPoolExecutor(1) as pool:
        assert pool.submit(torch.get_num_threads).result() == 3
    large = smooth_pictures(4, 256, 250)
    expected = alone(large, name, 3, seeds=range(4))
    assert torch.equal(corruptions.corrupt(large, name, 3, seeds=range(4)), expected)


def test_threads_take_over_modes_and_give_errors_back(three_threads, tmp_path):
    with torch.inference_mode():
        batch = smooth_pictures(64)
        out = corruptions.corrupt(batch, "fog", 3, seeds=range(64))
    assert torch.equal(out, alone(batch, "fog", 3, seeds=range(64)))
    leaf = (smooth_pictures(64) / 255).requires_grad_()
    assert not corruptions.corrupt(leaf, "fog", 3, seeds=range(64)).requires_grad
    with torch.no_grad():
        clean = corruptions.corrupt(leaf, "fog", 0, seeds=range(64))
    assert not clean.requires_grad and torch.equal(clean, leaf)
    expected = alone(batch, "zoom_blur", 3, seeds=range(64))
    with torch.autocast("cpu", torch.bfloat16):
        for out in (corruptions.corrupt, alone):
            assert torch.equal(out(batch, "zoom_blur", 3, seeds=range(64)), expected)
    with pytest.raises(ValueError, match="`frost_pictures` must be a folder with pictures"):
        corruptions.corrupt(batch, "frost", 3, seeds=range(64), frost_pictures=tmp_path)
    assert torch.get_num_threads() == 3


def test_busy_cores_are_left_to_others(monkeypatch):
    """Waiting for a thread that has no core costs more than the thread gives."""
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(4)
        monkeypatch.setattr("corruptions.chunks.usable_cores", lambda: 4)
        monkeypatch.setattr("os.cpu_count", lambda: 4)
        for busy, left in ((0, 4), (1, 3), (9, 1)):
            monkeypatch.setattr("corruptions.chunks._busy_cores", lambda busy=busy: busy)
            assert chunks._idle_cores() == left
            seen = []

            def note(rows, seen=seen):
                seen.append((rows, torch.get_num_threads()))

            chunks.in_parts(note, 12, 4, torch.device("cpu"))
            assert {i for rows, _ in seen for i in range(12)[rows]} == set(range(12))
            assert {threads for _, threads in seen} == {1}  # in each of ours, not even torch's own
            assert torch.get_num_threads() == 4
            seen.clear()
            chunks.in_parts(note, 12, 4, torch.device("cuda"))  # in order, in the caller's stream
            assert [rows for rows, _ in seen] == [slice(0, 4), slice(4, 8), slice(8, 12)]
    finally:
        torch.set_num_threads(before)


def test_counting_busy_cores_sees_another_process():
    """Where the system tells at all."""
    if not Path("/proc/loadavg").exists():
        pytest.skip("busy cores are counted in /proc, which this system does not have")
    spin = subprocess.Popen([sys.executable, "-c", "while True: pass"])
    try:
        seen = 0
        for _ in range(100):
            chunks._load["at"] = -1.0
            seen = max(seen, chunks._busy_cores())
            time.sleep(0.02)
            if seen:
                break
        assert seen >= 1
    finally:
        spin.kill()
        spin.wait()


@pytest.mark.parametrize("quality", [1, 25, 80, 100])
def test_both_codecs_give_the_same_levels(quality):
    """Pillow stands in where torchvision has no codec."""
    for height, width in ((32, 32), (17, 45)):
        noisy = corruptions.corrupt(
            smooth_pictures(3, height, width), "gaussian_noise", 3, seeds=range(3)
        )
        for image in noisy:
            first = digital._through_torchvision(image, quality)
            assert torch.equal(first, digital._through_pillow(image, quality))


@pytest.mark.parametrize("name", ALL)
def test_floats_give_the_levels_of_uint8(name):
    batch, seeds = smooth_pictures(2), [1, 2]
    levels = corruptions.corrupt(batch, name, 3, seeds=seeds)
    assert levels.dtype == torch.uint8 and levels.shape == batch.shape
    for dtype in (torch.float32, torch.float64, torch.float16, torch.bfloat16):
        out = corruptions.corrupt(batch.to(dtype) / 255, name, 3, seeds=seeds)
        assert out.dtype == dtype
        assert torch.equal(out, levels.to(dtype) / 255)


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize("size", [(8, 9), (28, 28), (48, 64), (96, 70)])
def test_sizes_in_between(name, size):
    batch = smooth_pictures(2, *size)
    out = corruptions.corrupt(batch, name, 3, seeds=[0, 1])
    assert out.shape == batch.shape
    assert not torch.equal(out, batch)


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize("parameters", ["cifar", "imagenet"])
def test_forced_parameters(name, parameters):
    batch = smooth_pictures(2, 40, 40)
    # Severity 4, because the two sets have the same saturate at 1 and 2.
    forced = corruptions.corrupt(batch, name, 4, seeds=[0, 1], parameters=parameters)
    assert not torch.equal(forced, batch)
    assert not torch.equal(forced, corruptions.corrupt(batch, name, 4, seeds=[0, 1]))


@pytest.mark.parametrize("name", ALL)
def test_severity_zero_is_a_copy(name):
    batch = torch.rand(2, 3, 32, 32)
    out = corruptions.corrupt(batch, name, 0, seeds=[0, 1])
    assert torch.equal(out, batch) and out.data_ptr() != batch.data_ptr()


@pytest.mark.parametrize("name", ALL)
def test_inputs_stay_as_they_were(name):
    batch = smooth_pictures(2)
    params = corruptions.sample(name, batch.shape, 2, [0, 1])
    before = copy.deepcopy(params)
    kept = batch.clone()
    first = corruptions.apply(batch, name, params)
    assert torch.equal(batch, kept)
    assert all(torch.equal(params[key], before[key]) for key in before)
    assert torch.equal(first, corruptions.apply(batch, name, params))
    assert torch.equal(first, corruptions.corrupt(batch, name, 2, seeds=[0, 1]))


@pytest.mark.parametrize("name", [name for name in ALL if name != "pixelate"])
def test_fractional_severities_join_up(name):
    """Just beside a whole severity the output is near the one at it, on either side."""
    # Not pixelate: its inner size is cut to whole pixels, so 24.0 jumps to 23 just beside.
    # Constants that count things may jump at halves, and spatter turns from water to mud there.
    batch, seeds = smooth_pictures(3, seed=2), [3, 4, 5]
    for level in (1, 2, 3, 4):
        at = corruptions.corrupt(batch, name, level, seeds=seeds).float()
        for beside in (level - 0.001, level + 0.001):
            near = corruptions.corrupt(batch, name, beside, seeds=seeds).float()
            assert (near - at).abs().mean() < 1.0
    for fraction in (0.01, 0.4, 0.6, 3.5, 4.99):
        assert corruptions.corrupt(batch, name, fraction, seeds=seeds).shape == batch.shape


@pytest.mark.parametrize(
    "name", [n for n in ALL if n not in ("pixelate", "jpeg_compression", "impulse_noise")]
)
def test_small_severities_are_nearly_clean(name):
    batch = smooth_pictures(3)
    out = corruptions.corrupt(batch, name, 0.01, seeds=[0, 1, 2])
    # The published truncation alone takes up to one level.
    assert (out.float() - batch.float()).abs().mean() < 1.2


def test_constants_are_linear_between_published_points():
    assert severity.constants("fog", 3, 32)["amount"] == 0.75
    assert severity.constants("fog", 3, 224)["amount"] == 2.5
    assert severity.constants("fog", 3.5, 32)["amount"] == pytest.approx(0.875)
    assert severity.constants("gaussian_noise", 0.5, 32)["scale"] == pytest.approx(0.02)
    middle = round((32 * 224) ** 0.5)
    assert severity.constants("fog", 3, middle)["amount"] == pytest.approx(1.625, rel=1e-2)
    assert severity.constants("fog", 3, 500) == severity.constants("fog", 3, 224)
    assert severity.constants("fog", 3, 20) == severity.constants("fog", 3, 32)
    assert severity.constants("fog", 3, 224, "cifar") == severity.constants("fog", 3, 32)
    assert severity.constants("shot_noise", 1.5, 32)["photons"] == pytest.approx(1 / 0.003)


def test_mixture_weights_sum_to_one():
    for level in (0, 0.3, 1, 4.7, 5):
        for side in (16, 32, 100, 224, 300):
            points = severity.mixture(level, side)
            assert sum(weight for weight, _, _ in points) == pytest.approx(1)
            assert all(0 <= point[2] <= 5 for point in points)


def test_draws_do_not_depend_on_severity():
    shape, seeds = (2, 3, 32, 32), [8, 9]
    for name, field in (("gaussian_noise", "normal"), ("fog", "noise"), ("motion_blur", "angle")):
        low, high = (corruptions.sample(name, shape, level, seeds)[field] for level in (1, 5))
        assert torch.equal(low, high)


def test_draws_differ_between_images_and_corruptions():
    normal = corruptions.sample("gaussian_noise", (2, 3, 32, 32), 1, [0, 1])["normal"]
    other = corruptions.sample("speckle_noise", (2, 3, 32, 32), 1, [0, 1])["normal"]
    pairs = torch.stack((*normal, *other)).flatten(1)
    correlation = torch.corrcoef(pairs) - torch.eye(4)
    assert correlation.abs().max() < 0.08


def test_words_are_splitmix64():
    """Words of two seeds against the generator written out with Python integers."""
    mask = (1 << 64) - 1

    def mix(z):
        z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & mask
        z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & mask
        return z ^ (z >> 31)

    import zlib

    gamma = 0x9E3779B97F4A7C15
    for seed in (1, -7):
        start = mix(mix(seed & mask) ^ (zlib.crc32(b"field") * gamma & mask))
        expected = [mix((start + (j + 1) * gamma) & mask) for j in range(3)]
        ours = draws.words(torch.tensor([seed]), "field", 3)[0].tolist()
        assert [word & mask for word in ours] == expected
    # The reference sequence of SplitMix64 from state 0 begins with this word.
    assert mix(gamma) == 0xE220A8397B1DCDAF


def test_uniform_and_normal_moments():
    seeds = torch.arange(200)
    uniform = draws.uniforms(seeds, "u", 1001).double()
    assert uniform.shape == (200, 1001) and uniform.min() >= 0 and uniform.max() < 1
    assert uniform.mean().item() == pytest.approx(0.5, abs=0.003)
    assert uniform.var().item() == pytest.approx(1 / 12, abs=0.001)
    normal = draws.normals(seeds, "n", 1001).double()
    assert normal.shape == (200, 1001)
    for power, moment in ((1, 0), (2, 1), (3, 0), (4, 3)):
        assert (normal**power).mean().item() == pytest.approx(moment, abs=0.08)


def test_global_generators_are_left_alone():
    torch.manual_seed(1)
    np.random.seed(1)
    before = torch.get_rng_state(), np.random.get_state()[1].copy()
    for name in ALL:
        corruptions.corrupt(smooth_pictures(2), name, 3)
        corruptions.corrupt(smooth_pictures(2), name, 3, generator=torch.Generator().manual_seed(0))
    assert torch.equal(torch.get_rng_state(), before[0])
    assert np.array_equal(np.random.get_state()[1], before[1])


def test_generator_draws_one_seed_for_each_image():
    batch = smooth_pictures(1).expand(3, -1, -1, -1)
    first, again = (
        corruptions.corrupt(batch, "fog", 3, generator=torch.Generator().manual_seed(7))
        for _ in range(2)
    )
    assert torch.equal(first, again)
    assert not torch.equal(first[0], first[1])
    generator = np.random.default_rng(7)
    first = corruptions.corrupt(batch, "fog", 3, generator=generator)
    assert not torch.equal(first, corruptions.corrupt(batch, "fog", 3, generator=generator))


def test_without_seeds_calls_differ():
    batch = smooth_pictures(1)
    first, second = (corruptions.corrupt(batch, "gaussian_noise", 3) for _ in range(2))
    assert not torch.equal(first, second)


def test_gradient_is_not_tracked():
    batch = torch.rand(1, 3, 32, 32, requires_grad=True)
    assert not corruptions.corrupt(batch, "fog", 3, seeds=[0]).requires_grad


def test_strided_input():
    batch = smooth_pictures(2)
    last = batch.contiguous(memory_format=torch.channels_last)
    for name in ALL:
        expected = corruptions.corrupt(batch, name, 3, seeds=[0, 1])
        assert torch.equal(corruptions.corrupt(last, name, 3, seeds=[0, 1]), expected)


def test_frost_pictures(tmp_path):
    y, x = np.mgrid[:300, :400]
    for i in range(2):
        pixels = np.stack((x % 256, y % 256, np.full_like(x, i)), -1).astype(np.uint8)
        PIL.Image.fromarray(pixels).save(tmp_path / f"{i}.png")
    params = corruptions.sample("frost", (40, 3, 32, 32), 3, range(40), frost_pictures=tmp_path)
    crop = params["crop"].int()
    # Every fifth pixel from the third on, as the published 32x32 script takes them.
    assert ((crop[:, 0] % 256 - 2) % 5 == 0).logical_or(crop[:, 0] < 256).all()
    assert (crop[:, 1].diff(dim=1) % 256 == 5).all()
    assert set(crop[:, 2].unique().tolist()) == {0, 1}
    whole = corruptions.sample("frost", (1, 3, 224, 224), 3, [0], frost_pictures=tmp_path)
    assert (whole["crop"][:, 1].int().diff(dim=1) % 256 == 1).all()
    with pytest.raises(ValueError, match="at least 1600 x 1600"):
        corruptions.sample(
            "frost", (1, 3, 320, 320), 3, [0], parameters="cifar", frost_pictures=tmp_path
        )


def test_transform():
    transform = corruptions.Corrupt("contrast", 3)
    assert isinstance(transform, torch.nn.Module)
    assert "contrast" in str(transform)
    batch = smooth_pictures(2)
    expected = corruptions.corrupt(batch, "contrast", 3, seeds=[0, 1])
    assert torch.equal(transform(batch), expected)
    assert torch.equal(transform(batch[0]), expected[0])
    picture = PIL.Image.fromarray(batch[0].movedim(0, -1).numpy())
    out = v2.Compose([transform, v2.PILToTensor()])(picture)
    assert torch.equal(out, expected[0])
    pair = transform((batch, torch.tensor([3, 4])))
    assert torch.equal(pair[0], expected) and pair[1].tolist() == [3, 4]
    seeded = [
        corruptions.Corrupt("fog", 3, generator=torch.Generator().manual_seed(1))(batch)
        for _ in range(2)
    ]
    assert torch.equal(*seeded)


GOOD = torch.rand(2, 3, 32, 32)


@pytest.mark.parametrize(
    ("error", "words", "call"),
    [
        (ValueError, "mean 'motion_blur'", lambda: corruptions.corrupt(GOOD, "motion_blurr", 3)),
        (ValueError, "choose from", lambda: corruptions.corrupt(GOOD, "zzzz", 3)),
        (TypeError, "`name` must", lambda: corruptions.corrupt(GOOD, 3, 3)),
        (
            ValueError,
            "`severity` must lie in 0..5, got 6",
            lambda: corruptions.corrupt(GOOD, "fog", 6),
        ),
        (ValueError, "got -1", lambda: corruptions.corrupt(GOOD, "fog", -1)),
        (ValueError, "got nan", lambda: corruptions.corrupt(GOOD, "fog", float("nan"))),
        (TypeError, "got str", lambda: corruptions.corrupt(GOOD, "fog", "3")),
        (TypeError, "got bool", lambda: corruptions.corrupt(GOOD, "fog", True)),
        (ValueError, "add a batch dimension", lambda: corruptions.corrupt(GOOD[0], "fog", 3)),
        (ValueError, "movedim", lambda: corruptions.corrupt(GOOD.movedim(1, -1), "fog", 3)),
        (ValueError, "or grey ones", lambda: corruptions.corrupt(GOOD[:, :2], "fog", 3)),
        (ValueError, "at least one image", lambda: corruptions.corrupt(GOOD[:0], "fog", 3)),
        (ValueError, "at least 8 x 8", lambda: corruptions.corrupt(GOOD[..., :7], "fog", 3)),
        (TypeError, "got ndarray", lambda: corruptions.corrupt(GOOD.numpy(), "fog", 3)),
        (TypeError, "torch.int64", lambda: corruptions.corrupt(GOOD.long(), "fog", 3)),
        (ValueError, "divide levels by 255", lambda: corruptions.corrupt(GOOD * 255, "fog", 3)),
        (ValueError, "normalisation", lambda: corruptions.corrupt(GOOD - 0.5, "fog", 3)),
        (ValueError, "finite", lambda: corruptions.corrupt(GOOD * torch.nan, "fog", 3)),
        (ValueError, "finite", lambda: corruptions.corrupt(GOOD * torch.inf, "fog", 3)),
        (ValueError, "got \\(3,\\)", lambda: corruptions.corrupt(GOOD, "fog", 3, seeds=[1, 2, 3])),
        (TypeError, "torch.float32", lambda: corruptions.corrupt(GOOD, "fog", 3, seeds=[0.0, 1])),
        (
            ValueError,
            "drop one",
            lambda: corruptions.corrupt(GOOD, "fog", 3, seeds=[0, 1], generator=torch.Generator()),
        ),
        (TypeError, "got int", lambda: corruptions.corrupt(GOOD, "fog", 3, generator=0)),
        (
            ValueError,
            "got 'tiny'",
            lambda: corruptions.corrupt(GOOD, "fog", 3, parameters="tiny"),
        ),
        (
            ValueError,
            "existing folder",
            lambda: corruptions.corrupt(GOOD, "frost", 3, frost_pictures="/no/such"),
        ),
        (ValueError, "at least 8", lambda: corruptions.sample("fog", (1, 3, 4, 4), 3, [0])),
        (ValueError, "mean 'fog'", lambda: corruptions.Corrupt("foq", 3)),
        (ValueError, "got 9", lambda: corruptions.Corrupt("fog", 9)),
    ],
)
def test_errors(error, words, call):
    with pytest.raises(error, match=words):
        call()


def test_the_sixth_published_picture_is_never_chosen(tmp_path):
    for i in range(1, 7):
        PIL.Image.new("RGB", (300, 300), (i, 0, 0)).save(tmp_path / f"frost{i}.png")
    params = corruptions.sample("frost", (60, 3, 32, 32), 3, range(60), frost_pictures=tmp_path)
    assert set(params["crop"][:, 0].unique().tolist()) == {1, 2, 3, 4, 5}


@pytest.mark.parametrize("size", [(40, 24), (600, 520)])
def test_frost_textures_have_their_statistics(size):
    """Fields of any size, also beyond where they repeat, have mean 0 and variance 1."""
    shape = (64, 3, *size) if size[0] < 100 else (4, 3, *size)
    crop = corruptions.sample("frost", shape, 3, range(shape[0]))["crop"].float() / 255
    contrast = crop.flatten(2).std(2)
    assert contrast.min() > 0.03 and contrast.max() < 0.25
    assert crop.mean((2, 3)).min() > 0.2 and crop.mean((2, 3)).max() < 0.95


def test_empty_frost_folder(tmp_path):
    with pytest.raises(ValueError, match="holds none"):
        corruptions.corrupt(GOOD, "frost", 3, frost_pictures=tmp_path)


def test_params_of_another_rank_are_refused():
    params = corruptions.sample("defocus_blur", (2, 3, 32, 32), 3, range(2))
    with pytest.raises(ValueError, match=r"must come from sample.*tensors that do not fit"):
        corruptions.apply(GOOD, "defocus_blur", params | {"weights": params["weights"][0]})


def test_params_of_another_batch_are_refused():
    params = corruptions.sample("fog", (3, 3, 32, 32), 3, range(3))
    with pytest.raises(ValueError, match="drawn for 3 images, got 2"):
        corruptions.apply(GOOD, "fog", params)
    params = corruptions.sample("fog", (2, 3, 32, 32), 3, range(2))
    with pytest.raises(ValueError, match="lacks 'normal'"):
        corruptions.apply(GOOD, "snow", params)
