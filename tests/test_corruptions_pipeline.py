"""`Corrupt` in torchvision pipelines and `CorruptedDataset` under data loaders."""

import PIL.Image
import pytest
import torch
from torch.utils.data import DataLoader, TensorDataset
from torchvision import tv_tensors
from torchvision.transforms import v2

import corruptions
from tests.helpers.pictures import smooth_pictures


def fog():
    return corruptions.Corrupt("fog", 3, generator=torch.Generator().manual_seed(1))


def picture():
    return PIL.Image.fromarray(smooth_pictures(1)[0].movedim(0, -1).numpy())


def test_compose_from_pillow_to_normalised():
    """The usual chain: crop and flip a Pillow image, corrupt it, make it a normalised tensor."""
    chain = v2.Compose(
        [
            v2.RandomCrop(28),
            v2.RandomHorizontalFlip(),
            fog(),
            v2.ToImage(),
            v2.ToDtype(torch.float32, scale=True),
            v2.Normalize([0.5] * 3, [0.25] * 3),
        ]
    )
    out = chain(picture())
    assert isinstance(out, tv_tensors.Image) and out.dtype == torch.float32
    assert out.shape == (3, 28, 28) and out.min() >= -2 and out.max() <= 2


def test_kinds_of_image_agree():
    pixels = smooth_pictures(1)[0]
    expected = fog()(pixels)
    assert type(expected) is torch.Tensor and not torch.equal(expected, pixels)
    as_image = fog()(tv_tensors.Image(pixels))
    assert isinstance(as_image, tv_tensors.Image) and torch.equal(as_image, expected)
    as_picture = fog()(picture())
    assert isinstance(as_picture, PIL.Image.Image)
    assert torch.equal(v2.functional.pil_to_tensor(as_picture), expected)
    levels = fog()(v2.functional.to_dtype(pixels, torch.float32, scale=True))
    assert torch.equal(levels, expected.float() / 255)
    grey = picture().convert("L")
    assert fog()(grey).mode == "RGB"


def test_only_images_change():
    """Boxes, masks, labels and names pass through, in structures of any shape."""
    pixels = smooth_pictures(1)[0]
    sample = {
        "image": tv_tensors.Image(pixels),
        "boxes": tv_tensors.BoundingBoxes([[1, 2, 3, 4]], format="XYXY", canvas_size=(32, 32)),
        "mask": tv_tensors.Mask(torch.ones(32, 32, dtype=torch.uint8)),
        "label": 5,
        "name": "horse",
    }
    out = v2.Compose([fog(), v2.Identity()])(sample)
    assert not torch.equal(out["image"], sample["image"])
    assert torch.equal(out["boxes"], sample["boxes"]) and torch.equal(out["mask"], sample["mask"])
    assert out["label"] == 5 and out["name"] == "horse"


def test_random_choice_and_apply():
    either = v2.RandomChoice([corruptions.Corrupt("contrast", 3), corruptions.Corrupt("fog", 3)])
    assert v2.RandomApply([either], p=1.0)(smooth_pictures(1)).shape == (1, 3, 32, 32)


def test_dataset_does_not_depend_on_access():
    pixels = smooth_pictures(9)
    source = TensorDataset(pixels, torch.arange(9))
    data = corruptions.CorruptedDataset(source, "gaussian_noise", 3, seed=5)
    assert len(data) == 9
    expected = torch.stack([data[i][0] for i in range(9)])
    assert torch.equal(data[-1][0], expected[8])
    assert not torch.equal(expected[0] - pixels[0].int(), expected[1] - pixels[1].int())
    for workers in (0, 2):
        loader = DataLoader(data, batch_size=4, num_workers=workers)
        batches = list(loader)
        assert torch.equal(torch.cat([batch[0] for batch in batches]), expected)
        assert torch.cat([batch[1] for batch in batches]).tolist() == list(range(9))
    other = corruptions.CorruptedDataset(source, "gaussian_noise", 3, seed=6)
    assert not torch.equal(other[0][0], expected[0])


def test_dataset_of_pictures():
    data = corruptions.CorruptedDataset([picture()], "contrast", 3)
    assert isinstance(data[0], PIL.Image.Image)
    expected = corruptions.corrupt(smooth_pictures(1), "contrast", 3, seeds=[0])[0]
    chained = corruptions.CorruptedDataset([(picture(), 2)], "contrast", 3, transform=v2.ToImage())
    image, label = chained[0]
    assert torch.equal(image, expected) and label == 2


def test_dataset_errors():
    with pytest.raises(TypeError, match="map-style"):
        corruptions.CorruptedDataset(iter([]), "fog", 3)
    with pytest.raises(ValueError, match="mean 'fog'"):
        corruptions.CorruptedDataset([], "fogg", 3)
    with pytest.raises(TypeError, match="got str"):
        corruptions.CorruptedDataset(["a.png"], "fog", 3)[0]
    with pytest.raises(IndexError):
        corruptions.CorruptedDataset([picture()], "fog", 3)[1]
