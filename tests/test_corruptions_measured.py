"""The measurements of `corruptions` in `experiments`: what they compute, never how fast."""

import numpy as np
import PIL.Image
import pytest
import torch

import corruptions
from experiments import cli
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


@pytest.mark.parametrize("side", [32, 224])
def test_the_unit_of_work_is_no_corruption(side):
    """It marks edges, equalised, so that all grey levels are equally frequent in its result."""
    (image,) = corruption_speed.pictures(side, 1)
    picture = PIL.Image.fromarray(image.movedim(0, -1).contiguous().numpy())
    out = corruption_speed.edge_map(picture)
    assert out.shape == (side, side, 3) and (out[..., 0] == out[..., 2]).all()
    assert np.sort(out[..., 0], axis=None) == pytest.approx(np.linspace(0, 255, side**2))
    flat = PIL.Image.new("RGB", (side, side), (9, 9, 9))
    half = PIL.Image.new("RGB", (side // 2, side), (200, 200, 200))
    flat.paste(half)
    edges = corruption_speed.edge_map(flat)[..., 0]
    assert edges[:, side // 2 - 1 : side // 2 + 1].min() > edges[:, 0].max()


def test_rates_are_carried_over_by_the_unit(monkeypatch):
    class Machine:
        """Twice as fast as that of the published rates."""

        def scale(self, side, seconds):
            return 2.0

        def close(self):
            pass

    monkeypatch.setattr(corruption_speed, "_Baseline", Machine)
    monkeypatch.setattr(corruption_speed, "_our_rate", lambda images, name, seconds: 100.0)
    (row,) = corruption_speed.measure(["fog"], [32], 3, 0.0, torch.device("cpu"), quiet=True)
    assert row["baseline"] == 2 * corruption_speed.PUBLISHED["fog"][0]
    assert row["ratio"] == pytest.approx(100.0 / row["baseline"])


@pytest.mark.slow
def test_speed_table_goes_on_the_page(tmp_path, capsys):
    page = tmp_path / "page.md"
    page.write_text("before\n<!-- speed -->\nold\n<!-- /speed -->\nafter\n")
    command = [
        "corruption-speed",
        "--corruptions",
        "contrast",
        "--sides",
        "32",
        "--rounds",
        "1",
        "--seconds",
        "0.01",
    ]
    before = torch.get_num_threads()
    assert cli.main([*command, "--page", str(page)]) == 0
    assert torch.get_num_threads() == before
    text = page.read_text()
    assert text.startswith("before\n<!-- speed -->\nMeasured on ") and "\nold\n" not in text
    assert "| contrast |" in text and text.endswith("<!-- /speed -->\nafter\n")
    assert "| contrast |" in capsys.readouterr().out
    page.write_text("nothing to replace")
    assert cli.main([*command, "--page", str(page)]) == 2
    assert "`page` must be a file with the comments <!-- speed -->" in capsys.readouterr().err


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
