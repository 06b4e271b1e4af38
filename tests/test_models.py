"""Loading classifiers: bundled, timm, torchvision, local checkpoints."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

import models
import tta
from experiments.data import open_data, read_bundled
from models import artefacts
from models.bundled import FOLDER

BUNDLED = models.list_models()
CLEAN_ACCURACY = {  # on the 10,000 test images; the cards have the measured figures
    "cifar10_resnet20_bn": 0.90,
    "cifar10_resnet20_gn": 0.87,
    "cifar10_convvit_ln": 0.80,
}


def accuracy_of(net: torch.nn.Module) -> float:
    """Share of 500 bundled images that are classified rightly."""
    data = open_data("bundled").clean
    assert data is not None
    x = torch.stack([data[i][0] for i in range(0, len(data), 4)]).float() / 255
    y = torch.tensor([int(data[i][1]) for i in range(0, len(data), 4)])
    with torch.no_grad():
        return float((net(x).argmax(1) == y).float().mean())


def test_there_are_three() -> None:
    assert set(BUNDLED) == set(CLEAN_ACCURACY)
    weights = [FOLDER / name / "weights.safetensors" for name in BUNDLED]
    assert sum(path.stat().st_size for path in weights) < 8e6


@pytest.mark.parametrize("name", BUNDLED)
def test_a_bundled_model_does_what_its_card_says(name: str) -> None:
    net, info = models.load(name)
    parameters = sum(p.numel() for p in net.parameters())
    assert parameters <= (400_000 if "vit" in name else 1_000_000)
    assert not net.training and info.mean == (0.0, 0.0, 0.0) and info.std == (1.0, 1.0, 1.0)
    assert info.input_size == (3, 32, 32) and len(info.class_names or ()) == 10
    card = json.loads((FOLDER / name / "card.json").read_text())
    assert card["clean_accuracy"] >= CLEAN_ACCURACY[name]
    accuracy = accuracy_of(net)
    # 500 images: four standard deviations are below 0.06.
    assert abs(accuracy - card["clean_accuracy"]) < 0.06


@pytest.mark.parametrize("name", BUNDLED)
def test_source_artefacts_serve_every_method(name: str) -> None:
    net, info = models.load(name)
    source = info.source
    assert source is not None
    names = {n for n, _ in net.named_parameters()}
    assert source.prototypes is not None and source.prototypes.shape[0] == 10
    assert source.features is not None and source.feature_labels is not None
    assert torch.bincount(source.feature_labels).tolist() == [200] * 10
    assert source.features.shape == (2000, source.prototypes.shape[1])
    assert source.posterior_mean is not None and set(source.posterior_mean) == names
    assert source.posterior_variance is not None and set(source.posterior_variance) == names
    assert all((v >= 0).all() for v in source.posterior_variance.values())
    assert any((v > 0).any() for v in source.posterior_variance.values())
    adapter = tta.wrap(net, "eata.cifar10", source=source)
    fisher = [v for k, v in adapter.constants().items() if "fisher" in k]
    assert all((v >= 0).all() and v.isfinite().all() for v in fisher)
    assert any((v > 0).any() for v in fisher)


def test_artefacts_are_made_as_those_that_lie_there() -> None:
    """The same kinds for the same images, with the plain formulas behind them."""
    net, info = models.load("cifar10_resnet20_gn")
    data = read_bundled().balanced(200)
    pixels, labels = data.tensor(), torch.from_numpy(data.labels)
    found = artefacts.collect(net, pixels, labels, 0)
    assert info.source is not None
    made = {key for key, value in vars(found).items() if value is not None}
    stored = {key for key, value in vars(info.source).items() if value is not None}
    alone = {"posterior_mean", "posterior_variance", "denoiser"}  # of trainings of their own
    assert stored - made == alone and made <= stored
    order = torch.randperm(len(pixels), generator=torch.Generator().manual_seed(0))
    inputs: list[torch.Tensor] = []
    hook = net.get_classifier().register_forward_pre_hook(lambda _, args: inputs.append(args[0]))
    with torch.no_grad():
        net(pixels[order].float() / 255)
    hook.remove()
    features, labels = inputs[0], labels[order]
    means = torch.stack([features[labels == c].mean(0) for c in range(10)])
    around = (features - means[labels]).double()
    assert found.prototypes is not None and found.covariance is not None
    torch.testing.assert_close(found.prototypes, means, atol=1e-5, rtol=0)
    covariance = (around.t() @ around / len(around)).float()
    torch.testing.assert_close(found.covariance, covariance, atol=1e-5, rtol=0)
    assert found.features is not None and found.feature_labels is not None
    assert torch.equal(found.feature_labels, labels.sort(stable=True).values)
    torch.testing.assert_close(
        found.features, features[labels.argsort(stable=True)], atol=1e-4, rtol=0
    )


@pytest.mark.parametrize(
    ("name", "least"), [("iabn", 0.88), ("bn_lt100", 0.55), ("bn_itta", 0.9), ("bn_sda", 0.85)]
)
def test_a_network_that_was_made_for_one_method_is_loaded_by_name(name: str, least: float) -> None:
    net, info = models.load(f"cifar10_resnet20_{name}")
    log = json.loads((FOLDER / info.name / "training.json").read_text())
    assert log["history"][-1]["test_accuracy"] > least and info.name in log["name"]
    assert (FOLDER / info.name / "weights.safetensors").stat().st_size < 1e6
    accuracy = accuracy_of(net)
    assert abs(accuracy - log["history"][-1]["test_accuracy"]) < 0.08
    assert info.name not in models.list_models()


def test_the_bundled_denoiser_tells_noise_from_images() -> None:
    diffusion = models.load_diffusion()
    data = open_data("bundled").clean
    assert data is not None and isinstance(diffusion.denoiser, torch.nn.Module)
    x = torch.stack([data[i][0] for i in range(64)]).float() / 127.5 - 1
    kept = torch.cumprod(1 - diffusion.betas, 0)[100].float()
    noise = torch.randn(x.shape, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        found = diffusion.denoiser(
            kept.sqrt() * x + (1 - kept).sqrt() * noise, torch.full((64,), 100)
        )
    assert float((found - noise).square().mean()) < 0.15  # 1 is what knows nothing


def test_features_are_those_of_the_model() -> None:
    net, info = models.load("cifar10_resnet20_gn")
    assert info.source is not None and info.source.features is not None
    with torch.no_grad():
        labels = net.get_classifier()(info.source.features).argmax(1)
    assert info.source.feature_labels is not None
    assert float((labels == info.source.feature_labels).float().mean()) > 0.85


def test_random_weights_and_unknown_names() -> None:
    _, info = models.load("cifar10_resnet20_bn", pretrained=False)
    assert info.source is None and info.norm_types == {"BatchNorm2d": 21}
    with pytest.raises(ValueError, match=r"unknown model 'cifar10_resnet20'.*_bn|_gn"):
        models.load("cifar10_resnet20")
    with pytest.raises(ValueError, match=r"unknown library 'tim'.*'timm'"):
        models.load("tim:resnet18")
    with pytest.raises(ValueError, match=r"unknown torchvision model.*resnet18"):
        models.load("torchvision:resnet_18")
    with pytest.raises(ValueError, match=r"unknown timm model.*resnet18"):
        models.load("timm:resnet_18")


@pytest.mark.parametrize("name", ["timm:test_resnet", "torchvision:mobilenet_v3_small"])
def test_library_models_and_their_preprocessing(name: str) -> None:
    net, info = models.load(name, pretrained=False)
    assert len(info.mean) == len(info.std) == 3 and min(info.std) > 0
    x = torch.rand(2, *info.input_size)
    with torch.no_grad():
        assert net(x).shape == (2, info.num_classes)


def test_vit_normalisation_is_the_models_own() -> None:
    _, info = models.load("timm:vit_tiny_patch16_224.augreg_in21k_ft_in1k", pretrained=False)
    assert info.mean == (0.5, 0.5, 0.5) and info.std == (0.5, 0.5, 0.5)


@pytest.mark.parametrize("suffix", [".safetensors", ".pt"])
def test_a_local_checkpoint(tmp_path, suffix: str) -> None:
    import timm

    torch.manual_seed(0)
    net = timm.create_model("test_resnet", num_classes=7).eval()
    path = tmp_path / f"net{suffix}"
    if suffix == ".pt":
        state = {f"module.{k}": v for k, v in net.state_dict().items()}
        torch.save({"state_dict": state, "epoch": 3}, path)
    else:
        save_file(net.state_dict(), str(path))
    loaded, info = models.load(f"timm:test_resnet@{path}")
    assert info.num_classes == 7
    x = torch.rand(2, *info.input_size)
    with torch.no_grad():
        assert torch.equal(loaded(x), net(x))
    with pytest.raises(ValueError, match="`checkpoint` must hold a state dict of timm:test_vit"):
        models.load("timm:test_vit", checkpoint=path)
    with pytest.raises(FileNotFoundError, match=r"nothing\.pt"):
        models.load("timm:test_vit", checkpoint=tmp_path / "nothing.pt")


def test_the_card_says_what_a_figure_of_the_source_depends_on(tmp_path: Path) -> None:
    model, info = models.load("timm:test_vit", pretrained=False)
    assert info.card is not None and info.card.weights == "random"
    assert (info.card.mean, info.card.input_size) == (info.mean, info.input_size)

    def saved(name: str) -> str:
        save_file(model.state_dict(), tmp_path / name)
        loaded = models.load("timm:test_vit", checkpoint=tmp_path / name)[1]
        assert loaded.card is not None
        return loaded.card.weights

    before = saved("net.safetensors")
    assert before.startswith("net.safetensors (sha256 ") and before == saved("net.safetensors")
    with torch.no_grad():
        next(model.parameters()).add_(1e-3)
    assert saved("net.safetensors") != before


def test_the_card_of_a_bundled_model_names_its_input() -> None:
    card = models.load(BUNDLED[0])[1].card
    assert str(card) == f"{BUNDLED[0]}, weights bundled, mean 0, std 1, input 3x32x32, crop 1"
