"""The measurements of `corruptions` in `experiments`: what they compute, never how fast."""

import numpy as np
import PIL.Image
import pytest
import torch

import corruptions
from experiments.studies import corruption_errors, corruption_speed


def rows(ratio):
    names = corruptions.list_corruptions(extra=True)
    return [
        {"name": n, "side": s, "baseline": 100.0, "rate": 100 * ratio[s], "ratio": ratio[s]}
        for n in names
        for s in (32, 224)
    ]


def test_published_rates_cover_every_corruption():
    assert list(corruption_speed.PUBLISHED) == corruptions.list_corruptions(extra=True)


def test_table_says_what_falls_short():
    good = corruption_speed.render(rows({32: 12.0, 224: 6.0}))
    assert "at 32x32: 12.0." in good and "Fell short: nothing." in good
    table = rows({32: 12.0, 224: 4.0})
    table[0]["ratio"] = 0.5
    bad = corruption_speed.render(table)
    assert "gaussian_noise at 32 (0.50, wanted 1)" in bad
    assert "the mean at 224 (4.0, wanted 5)" in bad


@pytest.mark.parametrize("name", ["contrast", "zoom_blur"])
@pytest.mark.parametrize("side", [32, 224])
def test_plain_functions_do_the_published_work(name, side):
    """What is timed must be the corruption: it gives our result within a level."""
    batch = corruption_speed.pictures(side, 2)
    ours = corruptions.corrupt(batch, name, 3, seeds=[0, 1])
    for image, out in zip(batch, ours, strict=True):
        picture = PIL.Image.fromarray(image.movedim(0, -1).contiguous().numpy())
        plain = corruption_speed.PLAIN[name](picture).astype(np.uint8)
        assert np.abs(plain.astype(int) - out.movedim(0, -1).numpy()).max() <= 1


def test_plain_noise_has_the_published_scale():
    grey = PIL.Image.new("RGB", (224, 224), (128, 128, 128))
    out = corruption_speed.PLAIN["gaussian_noise"](grey)
    assert out.std() == pytest.approx(0.18 * 255, rel=0.02)


def test_speed_table_goes_on_the_page(tmp_path, capsys):
    page = tmp_path / "page.md"
    page.write_text("before\n<!-- speed -->\nold\n<!-- /speed -->\nafter\n")
    command = ["--corruptions", "contrast", "--sides", "32", "--rounds", "1", "--seconds", "0.01"]
    before = torch.get_num_threads()
    assert corruption_speed.main([*command, "--page", str(page)]) == 0
    assert torch.get_num_threads() == before
    text = page.read_text()
    assert text.startswith("before\n<!-- speed -->\nMeasured on ") and "\nold\n" not in text
    assert "| contrast |" in text and text.endswith("<!-- /speed -->\nafter\n")
    assert "| contrast |" in capsys.readouterr().out


def test_errors_on_the_kept_images():
    (row,) = corruption_errors.compare(["contrast"], ["cifar10_resnet20_bn"])
    assert row["pixels_32"] == "0" and row["images"] == 40
    published, ours, differing = row["cifar10_resnet20_bn"]
    assert published == ours and differing == 0 and 0 < published < 40


def test_frost_variants():
    ((name, severity, errors),) = corruption_errors.frost_errors(["cifar10_resnet20_bn"], [3], 100)
    assert (name, severity) == ("cifar10_resnet20_bn", 3)
    assert errors["clean"] < errors["texture"] and set(errors) == {
        "clean", "texture", "shuffled", "mean colour"
    }  # fmt: skip
