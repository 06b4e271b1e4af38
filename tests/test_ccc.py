"""What stands around the corruptions of a stream: CCC's crop and flip, and its compression."""

from __future__ import annotations

import io

import numpy as np
import PIL.Image
import pytest
import torch
from torchvision.transforms import v2

import corruptions
from tta.streams import build, from_config


def pictures(sizes):
    """Random images of these (height, width), with labels, as a data set."""
    random = np.random.default_rng(0)
    return [
        (PIL.Image.fromarray(random.integers(0, 256, (h, w, 3), dtype=np.uint8)), k % 3)
        for k, (h, w) in enumerate(sizes)
    ]


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def test_parts_have_the_published_areas_and_shapes():
    crop = corruptions.CropAndFlip(32)
    random = torch.rand(2000, 40, generator=generator(), dtype=torch.float64).tolist()
    boxes = np.array([crop._box(100, 140, draws) for draws in random])
    top, left, tall, wide = boxes.T
    assert (top >= 0).all() and (left >= 0).all()
    assert (top + tall <= 100).all() and (left + wide <= 140).all()
    area, shape = tall * wide / 14000, wide / tall
    assert 0.07 < area.min() < 0.1 and 0.9 < area.max() <= 1
    assert shape.min() > 0.7 and shape.max() < 1.4
    with torch.random.fork_rng():
        torch.manual_seed(0)
        published = v2.RandomResizedCrop(32)
        blank = torch.zeros(3, 100, 140)
        drawn = [published.make_params([blank]) for _ in range(2000)]
    theirs = np.array([[d["top"], d["left"], d["height"], d["width"]] for d in drawn])
    for ours, their in zip(boxes.T, theirs.T, strict=True):
        assert ours.mean() == pytest.approx(their.mean(), abs=2.5)
        assert ours.std() == pytest.approx(their.std(), rel=0.06)


def test_the_whole_image_is_what_a_scale_of_one_gives_and_half_are_flipped():
    image = torch.rand(3, 32, 32, generator=generator())
    crop = corruptions.CropAndFlip(32, scale=(1.0, 1.0), ratio=(1.0, 1.0))
    out = crop(image.expand(400, -1, -1, -1), generator=generator())
    levels = image.mul(255).round().div(255)
    same = (out == levels).flatten(1).all(1)
    flipped = (out == levels.flip(-1)).flatten(1).all(1)
    assert (same ^ flipped).all() and 160 < int(flipped.sum()) < 240


def test_an_image_too_flat_for_any_ratio_is_cropped_in_the_middle():
    crop = corruptions.CropAndFlip(8, scale=(1.0, 1.0))
    assert crop._box(10, 100, [0.5] * 40) == (0, 43, 10, 13)


def test_compression_is_that_of_a_jpeg_file():
    image = torch.rand(3, 40, 40, generator=generator()).mul(255).round().div(255)
    with io.BytesIO() as file:
        array = image.mul(255).round().byte().movedim(0, -1).numpy()
        PIL.Image.fromarray(array).save(file, "jpeg", quality=85)
        expected = torch.from_numpy(np.array(PIL.Image.open(file))).movedim(-1, 0)
    assert torch.equal(corruptions.Jpeg()(image[None])[0].mul(255).round().byte(), expected)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: corruptions.CropAndFlip(0), "`size` must be a number of pixels"),
        (lambda: corruptions.CropAndFlip(True), "`size`"),
        (lambda: corruptions.CropAndFlip(8, scale=(0.5, 2.0)), "`scale`"),
        (lambda: corruptions.CropAndFlip(8, ratio=(2.0, 1.0)), "`ratio`"),
        (lambda: corruptions.Jpeg(0), "`quality` must be 1 to 100"),
        (lambda: corruptions.Jpeg(85.5), "`quality`"),
    ],
)
def test_nonsense_is_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def walk(dataset, **more):
    return build(
        "walk",
        dataset,
        ["fog", "contrast", "brightness"],
        batch_size=4,
        transform=corruptions.corrupt,
        speed=6,
        total=60,
        seed=1,
        **more,
    )


def test_a_walk_with_both_is_replayed_and_taken_up_anywhere():
    dataset = pictures([(30 + k, 70 - 3 * k) for k in range(9)])  # of nine sizes
    around = {"before": corruptions.CropAndFlip(24), "after": corruptions.Jpeg()}
    whole = list(walk(dataset, **around))
    assert all(batch.images.shape[1:] == (3, 24, 24) for batch in whole)
    stream = from_config(
        walk(dataset, **around).config, dataset, transform=corruptions.corrupt, **around
    )
    for again, batch in zip(stream.from_step(7), whole[7:], strict=True):
        assert torch.equal(again.images, batch.images)
    # The same image, shown twice, is cropped in two ways.
    seen = {}
    for batch in whole:
        for index, image in zip(batch.index.tolist(), batch.images, strict=True):
            seen.setdefault(index, []).append(image)
    assert all(not torch.equal(a, b) for a, b, *_ in (images for images in seen.values()))


def test_the_last_thing_done_to_an_image_is_its_compression():
    plain = pictures([(24, 24)] * 9)
    compressed = list(walk(plain, after=corruptions.Jpeg(10)))
    for batch, coded in zip(walk(plain), compressed, strict=True):
        assert torch.equal(corruptions.Jpeg(10)(batch.images), coded.images)


def test_compression_takes_no_images_and_gives_a_plain_layout():
    assert corruptions.Jpeg()(torch.zeros(0, 3, 32, 32)).shape == (0, 3, 32, 32)
    assert corruptions.Jpeg()(torch.zeros(2, 3, 32, 32)).is_contiguous()


@pytest.mark.parametrize(
    ("around", "error", "message"),
    [
        ({"before": 3}, TypeError, "`before` must be callable"),
        ({"after": "jpeg"}, TypeError, "`after` must be callable"),
        ({"before": lambda images, generator: images[:1]}, TypeError, "`before` must return"),
        ({"after": lambda images: images * 255}, ValueError, r"`after` must return pixels in"),
        ({"after": lambda images: images.numpy()}, TypeError, "`after` must return a tensor"),
    ],
)
def test_functions_that_do_not_fit(around, error, message):
    with pytest.raises(error, match=message):
        next(iter(walk(pictures([(24, 24)] * 9), **around)))
