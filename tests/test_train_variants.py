"""Networks that are made for one method: long-tailed, instance-aware, and the denoiser."""

from __future__ import annotations

import json
import sys
from contextlib import nullcontext
from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

import models
import tta
from models import bundled, denoiser, train, train_denoiser, train_sda
from models.artefacts import save_half
from models.denoiser import BETAS, DENOISER, UNet
from models.resnet import CifarResNet, InstanceAwareBatchNorm2d
from tests.helpers.nets import tiny

BN = "cifar10_resnet20_bn"


@pytest.fixture
def place(tmp_path, monkeypatch):
    """Images of noise, twenty of each class, and short training of tiny networks."""
    draw = np.random.default_rng(0)
    arrays = {}
    for split, count in (("train", 200), ("test", 20)):
        arrays[f"{split}_images"] = draw.integers(0, 256, (count, 32, 32, 3), dtype=np.uint8)
        arrays[f"{split}_labels"] = np.arange(count) % 10
    np.savez(tmp_path / "data.npz", **arrays)
    for module in (bundled, train, train_denoiser, denoiser, sys.modules["models.load"]):
        monkeypatch.setattr(module, "FOLDER", tmp_path / "weights")
    monkeypatch.setitem(bundled.BUNDLED, BN, lambda: tiny("bn"))
    for module in (train_denoiser, denoiser):
        monkeypatch.setattr(module, "UNet", lambda: UNet((8, 8, 8)))
    monkeypatch.setattr(train_denoiser, "BATCH", 8)
    recipe = replace(train.RECIPES[BN], batch_size=16, bfloat16=False, channels_last=False)
    monkeypatch.setitem(train.RECIPES, BN, recipe)
    return tmp_path


def command(place, name, *flags, work="work"):
    data = ["--data", str(place / "data.npz"), "--work", str(place / work)]
    train.main([name, *data, *flags])


def test_artefacts_of_later_methods_are_added_to_those_of_a_network_that_is_there(
    place, capsys, monkeypatch
):
    small = partial(CifarResNet, [0.5] * 3, [0.25] * 3, blocks=1, widths=(4, 4, 8))
    monkeypatch.setitem(bundled.BUNDLED, BN, small)
    command(place, BN, "--epochs", "2")
    path = place / "weights" / BN / "source.safetensors"
    whole = load_file(path)
    earlier = {n: t for n, t in whole.items() if not n.startswith(("class_", "block_", "style_"))}
    save_file(earlier, path)
    command(place, BN, "--artefacts")
    again = load_file(path)
    assert again.keys() == whole.keys() > earlier.keys()
    assert all(t.dtype == whole[n].dtype and torch.equal(t, whole[n]) for n, t in again.items())
    net, info = models.load(BN)
    for method in ("petta.cifar10", "pea", "reservoir.cifar10"):
        adapter = tta.wrap(net, method, source=info.source, mean=[0.0] * 3, std=[1.0] * 3)
        assert adapter(torch.rand(4, 3, 32, 32)).isfinite().all()
        adapter.unwrap()
    before = path.read_bytes()
    command(place, BN, "--artefacts")
    assert "nothing added" in capsys.readouterr().out and path.read_bytes() == before
    with pytest.raises(SystemExit):
        command(place, BN, "--artefacts", "--long-tailed", "10")


def test_a_long_tailed_network_comes_with_its_label_shift_adapter(place):
    command(place, BN, "--long-tailed", "10", "--epochs", "4")
    net, info = models.load(f"{BN}_lt10")
    assert info.source is not None and info.source.source_prior is not None
    kept = [round(20 * 10 ** (-k / 9)) for k in range(10)]
    assert kept[0] == 20 and kept[9] == 2
    shares = torch.tensor(kept) / sum(kept)
    assert torch.allclose(info.source.source_prior.double(), shares.double(), atol=1e-6)
    adapter = tta.wrap(net, output="lsa", source=info.source)
    assert adapter(torch.rand(4, 3, 32, 32)).shape == (4, 10)
    log = json.loads((place / "weights" / f"{BN}_lt10" / "training.json").read_text())
    assert "--long-tailed 10" in log["command"] and log["name"] == f"{BN}_lt10"
    assert f"{BN}_lt10" not in models.list_models()


def test_the_first_images_of_each_class_are_kept_in_their_order(place):
    data = train.read_cifar10(place / "data.npz")
    found = train.long_tailed(data, 10)
    counts = torch.bincount(found["train_labels"])
    assert counts.tolist() == [round(20 * 10 ** (-k / 9)) for k in range(10)]
    places = [
        i for i in range(200) if sum(data["train_labels"][:i] == data["train_labels"][i])
        < counts[data["train_labels"][i]]
    ]  # fmt: skip
    assert torch.equal(found["train_images"], data["train_images"][places])
    assert torch.equal(found["test_labels"], data["test_labels"])


def test_instance_aware_layers_are_what_the_rule_makes_of_plain_ones():
    torch.manual_seed(0)
    aware = CifarResNet((0.5,) * 3, (0.25,) * 3, InstanceAwareBatchNorm2d, 1, (8, 8, 8)).eval()
    plain = CifarResNet((0.5,) * 3, (0.25,) * 3, blocks=1, widths=(8, 8, 8)).eval()
    for module in aware.modules():
        if isinstance(module, InstanceAwareBatchNorm2d):
            module.running_var.uniform_(0.5, 2)
            module.running_mean.normal_()
    plain.load_state_dict(aware.state_dict())
    x = torch.rand(4, 3, 32, 32)
    with torch.no_grad():
        expected, other = aware(x), plain(x)
    assert not torch.allclose(expected, other, atol=1e-2)

    def adapted(net, method, **slots):
        adapter = tta.wrap(net, method, **slots)
        y = adapter(x)
        adapter.unwrap()
        return y

    assert torch.allclose(adapted(aware, "source"), expected)
    assert torch.allclose(adapted(aware, "bn", shadow=True), expected, atol=1e-5)
    batch = adapted(plain, "bn")
    for net in (aware, plain):
        assert torch.allclose(adapted(net, None, norm="iabn"), expected, atol=1e-5)
        # Another rule takes the place of all that the layer does.
        assert torch.allclose(adapted(net, "bn"), batch, atol=1e-5)


def test_instance_aware_layers_learn_statistics_of_the_batch():
    layer = InstanceAwareBatchNorm2d(2, momentum=0.5)
    x = torch.randn(8, 2, 4, 4) * 3 + 5
    layer(x)
    var, mean = torch.var_mean(x, dim=(0, 2, 3))
    assert torch.allclose(layer.running_mean, 0.5 * mean, atol=1e-5)
    assert torch.allclose(layer.running_var, 0.5 + 0.5 * var, atol=1e-4)
    y = layer.eval()(x)
    assert torch.allclose(y, layer(x[:1].expand_as(x))[:1] * 0 + y)
    assert torch.allclose(layer(x[3:4]), y[3:4], atol=1e-6)  # an image does not depend on others


def test_the_denoiser_is_trained_saved_and_loaded(place):
    command(place, DENOISER, "--steps", "2")
    diffusion = models.load_diffusion("dda", steps=2, respacing=10)
    assert torch.equal(diffusion.betas, BETAS) and diffusion.config.steps == 2
    saved = torch.load(place / "work" / f"{DENOISER}.pt", weights_only=True)
    for name, value in diffusion.denoiser.state_dict().items():
        assert torch.equal(value, saved["averaged"][name].half().float()), name
    adapter = tta.wrap(tiny("bn"), input=diffusion, mean=(0, 0, 0), std=(1, 1, 1))
    assert adapter(torch.rand(2, 3, 32, 32)).isfinite().all()
    assert not any(p.requires_grad for p in diffusion.denoiser.parameters())


def test_a_training_of_the_denoiser_goes_on_where_it_was_cut_off(place, monkeypatch):
    monkeypatch.setattr(train_denoiser, "EVERY", 1)
    monkeypatch.setattr(train_denoiser, "WARMUP", 1)
    monkeypatch.setattr(train_denoiser, "PEAK_LR", 1.0)
    # Rounding depends on where in memory tensors lie: that of bfloat16 is a hundredth, and Adam
    # divides by gradients that may be next to nothing, unless its eps is large.
    monkeypatch.setattr(torch, "autocast", lambda *_, **__: nullcontext())
    monkeypatch.setattr(torch.optim, "Adam", partial(torch.optim.Adam, eps=1.0))
    images = train.read_cifar10(place / "data.npz")["train_images"]
    real = train_denoiser._loss
    for work, cut, steps in (("whole", False, 3), ("cut", True, 3), ("short", False, 2)):
        (place / work).mkdir()
        if cut:
            monkeypatch.setattr(train_denoiser, "_loss", _raise_at(2, real))
            with pytest.raises(KeyboardInterrupt):
                train_denoiser.train(images, images[:4], place / work, steps, 0)
            monkeypatch.setattr(train_denoiser, "_loss", real)
        train_denoiser.train(images, images[:4], place / work, steps, 0)
    files = [place / work / f"{DENOISER}.pt" for work in ("whole", "cut", "short")]
    saved = [torch.load(file, weights_only=True)["averaged"] for file in files]
    whole, cut, short = (torch.cat([v.flatten() for v in one.values()]) for one in saved)
    # Nearly the whole one, and far from a shorter one.
    assert (whole - cut).abs().mean() < 1e-3 * (whole - short).abs().mean()


def _raise_at(call, real):
    count = [0]

    def loss(*args):
        count[0] += 1
        if count[0] == call:
            raise KeyboardInterrupt
        return real(*args)

    return loss


def test_a_training_of_another_seed_or_length_is_not_gone_on_with(place):
    images = train.read_cifar10(place / "data.npz")["train_images"]
    train_denoiser.train(images, images[:4], place, 2, 0)
    for steps, seed in ((1, 0), (4, 1)):
        with pytest.raises(ValueError, match="seed 0 and 2: choose another folder"):
            train_denoiser.train(images, images[:4], place, steps, seed)


def test_a_damaged_file_of_the_denoiser_is_named(place):
    file = place / "weights" / DENOISER / "weights.safetensors"
    file.parent.mkdir(parents=True)
    file.write_bytes(b"abc")
    with pytest.raises(ValueError, match=f"{DENOISER}.*cannot be read"):
        models.load_diffusion()
    with pytest.raises(TypeError, match="`config`"):
        models.load_diffusion(3)  # type: ignore[arg-type]


def test_noise_is_that_of_the_step():
    x, noise = torch.ones(2, 3, 4, 4), torch.full((2, 3, 4, 4), 2.0)
    found = train_denoiser.noisy(x, torch.tensor([0, 999]), noise)
    kept = torch.cumprod(1 - BETAS, 0)
    for row, k in zip(found, (kept[0], kept[999]), strict=True):
        assert torch.allclose(row, torch.full_like(row, float(k.sqrt() + 2 * (1 - k).sqrt())))


def test_the_network_knows_its_step_and_takes_other_sizes():
    torch.manual_seed(0)
    net = UNet((8, 16, 16))
    for layer in (net.last, *(block.conv2 for block in net.up)):  # they begin at 0
        torch.nn.init.normal_(layer.weight)
    x = torch.randn(2, 3, 16, 16)
    a, b = (net(x, torch.full((2,), t)) for t in (5, 600))
    assert a.shape == x.shape and not torch.allclose(a, b, atol=1e-4)
    assert sum(p.numel() for p in UNet().parameters()) < 1_000_000


def test_a_denoiser_that_was_not_trained_is_told_how(place):
    with pytest.raises(FileNotFoundError, match=r"models\.train cifar10_denoiser"):
        models.load_diffusion()


def test_sda_trains_on_what_the_diffusion_model_makes_of_images(place, monkeypatch):
    monkeypatch.setattr(train_sda, "IMAGES", 4)
    monkeypatch.setattr(train_sda, "CHUNK", 15)
    command(place, DENOISER, "--steps", "2")
    (place / "weights" / BN).mkdir()
    tta.SourceStatistics().save(place / "weights" / BN / "source.safetensors")
    weights = place / "weights" / BN / "weights.safetensors"
    save_half(tiny("bn").state_dict(), weights)
    (place / "plain").touch()
    assert weights.stat().st_mode == (place / "plain").stat().st_mode  # as the umask has it
    command(place, BN, "--sda", "--sda-epochs", "2", work="whole")
    command(place, BN, "--sda", "--sda-epochs", "1", work="cut")
    # A killed training has a part of the projections.
    (place / "cut" / "projected" / "train-0" / "2.pt").unlink()
    command(place, BN, "--sda", "--sda-epochs", "2", work="cut")
    whole, cut = (
        torch.load(place / work / f"{BN}_sda.pt", weights_only=True) for work in ("whole", "cut")
    )
    assert all(torch.equal(v, cut["model"][k]) for k, v in whole["model"].items())
    assert json.loads(whole["log"])["history"] == json.loads(cut["log"])["history"]
    images = train.read_cifar10(place / "data.npz")["train_images"]
    places = [k * 10 + c for k in range(4) for c in range(10)]  # the first four of each class
    made = train_sda.projected(images[places], place / "whole" / "projected" / "train-0", 0)
    assert made.dtype == torch.uint8 and made.shape == (40, 3, 32, 32)
    assert not torch.equal(made, images[places])

    tuned, info = models.load(f"{BN}_sda")
    first = models.load(BN)[0]
    assert not torch.equal(tuned.fc.weight, first.fc.weight)
    x = torch.rand(3, 3, 32, 32)
    fields = {"steps": 3, "respacing": 100, "seed": 0, "mean": (0, 0, 0), "std": (1, 1, 1)}
    adapter = tta.wrap(tuned, "sda", source=info.source, **fields)
    both = adapter(x)
    adapter.unwrap()
    alone = tta.SourceStatistics(denoiser=models.load_diffusion())
    projected = tta.wrap(tuned, "sda", source=alone, join=None, **fields)(x)
    torch.testing.assert_close(both, first(x) + projected)


@pytest.mark.parametrize(
    "flags",
    [
        ("--long-tailed", "0"),
        ("--long-tailed", "5001"),
        ("--itta", "--long-tailed", "10"),
        ("--itta", "--sda"),
        ("--sda", "--sda-epochs", "0"),
        ("--steps", "-1"),
    ],
)
def test_flags_that_do_not_go_are_refused(place, capsys, flags):
    with pytest.raises(SystemExit, match="2"):
        command(place, BN, *flags)
    assert "must be" in capsys.readouterr().err
