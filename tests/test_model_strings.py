"""MODEL strings: models, transforms and classes, and what is refused; flags of the commands."""

from __future__ import annotations

import argparse
import pickle
import sys

import pytest
import timm
import torch
import torchvision
from PIL import Image
from safetensors.torch import save_file

import tta
from tests.helpers import own_models
from tta.cli import common
from tta.runtime.extras import needed
from tta.runtime.model_strings import Pixels, open_model, read_class_names

OWN = "tests.helpers.own_models"
PICTURE = Image.new("RGB", (300, 260), (255, 128, 0))


def saved(model, path):
    """A file of a model's weights."""
    state = {key: value.contiguous() for key, value in model.state_dict().items()}
    save_file(state, path) if path.suffix == ".safetensors" else torch.save(state, path)
    return path


@pytest.mark.parametrize("suffix", ["safetensors", "pt"])
def test_timm_with_a_file_has_its_transform_and_as_many_classes_as_the_file(tmp_path, suffix):
    model = timm.create_model("test_resnet", num_classes=7)
    path = saved(model, tmp_path / f"w.{suffix}")
    opened = open_model(f"timm:test_resnet@{path}", device="cpu")
    assert not opened.model.training and opened.class_names is None
    assert all(map(torch.equal, opened.model.state_dict().values(), model.state_dict().values()))
    config = timm.data.resolve_model_data_config(model)
    expected = timm.data.create_transform(**config)(PICTURE)
    assert torch.equal(opened.transform(PICTURE), expected)
    assert (opened.mean, opened.std) == (config["mean"], config["std"])
    assert opened.model(opened.transform(PICTURE)[None]).shape == (1, 7)


def test_torchvision_with_a_file_of_as_many_classes_has_the_names_of_the_weights(tmp_path):
    model = torchvision.models.shufflenet_v2_x0_5()
    opened = open_model(
        "torchvision:shufflenet_v2_x0_5", weights=saved(model, tmp_path / "w.pt"), device="cpu"
    )
    assert opened.class_names is not None and opened.class_name(1) == "goldfish"
    assert opened.class_name(1000) is None and opened.class_name(-1) is None
    weights = torchvision.models.ShuffleNet_V2_X0_5_Weights.DEFAULT
    assert torch.equal(opened.transform(PICTURE), weights.transforms()(PICTURE))
    assert opened.mean == (0.485, 0.456, 0.406)


def test_random_weights_and_names_of_timm():
    opened = open_model("timm:test_resnet", weights="random", device="cpu")
    assert opened.class_name(1) == "goldfish, Carassius auratus"


def test_a_bundled_name_has_its_card_and_artefacts():
    opened = open_model("cifar10_resnet20_bn", device="cpu")
    assert opened.class_name(3) == "cat" and opened.source is not None
    pixels = opened.transform(PICTURE)
    assert pixels.shape == (3, 32, 32) and pixels.dtype == torch.float32
    assert pixels[:, 5, 5].tolist() == pytest.approx([1, 128 / 255, 0])
    adapter = tta.wrap(opened.model, "cotta", mean=opened.mean, std=opened.std)  # takes pixels
    assert adapter(pixels[None].expand(4, -1, -1, -1)).shape == (4, 10)


def test_a_function_of_the_users_own(tmp_path):
    opened = open_model(f"{OWN}:named", device="cpu")
    assert opened.class_name(2) == "kind 2" and opened.mean is None
    assert opened.transform is own_models.to_pixels
    assert open_model(f"{OWN}:model", device="cpu").class_names is None
    plain = open_model(f"{OWN}:net", device="cpu")
    assert torch.equal(plain.transform(PICTURE), Pixels()(PICTURE))
    assert plain.transform(PICTURE).shape == (3, 260, 300)
    other = own_models.net()
    with torch.no_grad():
        next(other.parameters()).zero_()
    path = saved(other, tmp_path / "own.pt")
    filled = open_model(f"{OWN}:net@{path}", device="cpu")
    assert not next(filled.model.parameters()).any()


def test_a_model_with_a_timm_config_needs_no_transform(monkeypatch):
    monkeypatch.setattr(own_models, "net", lambda: timm.create_model("test_resnet"))
    opened = open_model(f"{OWN}:net", device="cpu")
    assert opened.transform(PICTURE).shape == (3, 160, 160) and opened.mean is not None


def test_class_names_from_a_file(tmp_path):
    path = tmp_path / "names.txt"
    path.write_text("\n".join(f"é {i}" for i in range(10)) + "\n\n", encoding="utf-8")
    names = read_class_names(path)
    assert open_model(f"{OWN}:named", device="cpu", class_names=names).class_name(9) == "é 9"
    with pytest.raises(ValueError, match="`classes` must name the model's 10 classes, got 3"):
        open_model(f"{OWN}:named", class_names=names[:3])
    path.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ValueError, match="`classes` must be a text file"):
        read_class_names(path)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("cifar10_resnet20", "known here, got 'cifar10_resnet20': did you mean"),
        ("timm:resnet8", "unknown timm model 'resnet8': did you mean"),
        ("torchvision:resnet8", "unknown torchvision model"),
        ("nowhere:net", "timm:NAME, torchvision:NAME or MODULE:CALLABLE, got 'nowhere:net'"),
        (f"{OWN}:nothing", "has no attribute 'nothing'"),
        (f"{OWN}:number", "which is a int"),
        (f"{OWN}:broken", "returned str: correct it"),
        (f"{OWN}:raising", "raised KeyError ('gone'): correct it"),
        (":", "MODULE:CALLABLE"),
        ("", "known here"),
    ],
)
def test_what_cannot_be_opened_is_said_in_a_sentence(text, message):
    with pytest.raises(ValueError) as caught:
        open_model(text, device="cpu")
    assert message in str(caught.value) and len(str(caught.value)) <= 300


def test_weights_are_never_unpickled(tmp_path):
    path = tmp_path / "w.pt"

    class Hostile:
        def __reduce__(self):
            return (path.with_name("ran").write_text, ("x",))

    path.write_bytes(pickle.dumps({"weight": Hostile()}))
    for text in (f"timm:test_resnet@{path}", f"{OWN}:net@{path}"):
        with pytest.raises(ValueError, match="`checkpoint` must be"):
            open_model(text, device="cpu")
    assert not path.with_name("ran").exists()
    with pytest.raises(FileNotFoundError):
        open_model("timm:test_resnet@gone.pt")
    with pytest.raises(ValueError, match="`weights` must be left out"):
        open_model(f"timm:test_resnet@{path}", weights=path)
    with pytest.raises(ValueError, match="`device` must be one"):
        open_model(f"{OWN}:net", device="abacus")


def test_a_missing_package_is_named_with_the_line_that_installs_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "av", None)
    with pytest.raises(ImportError, match=r"`PyAV` must .*: pip install \"tta-vision\[video\]\"$"):
        needed("av", "video")


def flags(*arguments: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser(exit_on_error=False)
    common.add_model(parser)
    common.add_method(parser)
    return parser.parse_args(arguments)


def test_flags_make_an_adapter(tmp_path):
    args = flags("cifar10_resnet20_bn", "--device", "cpu")
    opened = common.open_from(args)
    adapter = common.wrap_from(args, opened)
    assert adapter.config.norm.name == "adaptive_bn" and adapter.config.guard.name == "auto"
    assert adapter.config.output.name == "drift"  # what the recipe brings
    adapter.unwrap()
    args.method, args.seed = "lame + tent[lr=0.5]", 9
    adapter = common.wrap_from(args, opened, health=True)
    assert adapter.config.update.lr == 0.5 and adapter.config.output.name == "lame"
    assert adapter.config.seed == 9
    adapter.unwrap()
    args.method = "source"
    assert common.wrap_from(args, opened).config.update is None
    args.source = str(tmp_path / "gone")
    with pytest.raises(FileNotFoundError, match="`source` must be a file"):
        common.source_from(args, opened)


def test_random_weights_are_those_of_the_seed():
    args = flags("timm:test_resnet", "--weights", "random", "--device", "cpu", "--seed", "5")
    first, second = (common.open_from(args).model.state_dict() for _ in range(2))
    assert all(map(torch.equal, first.values(), second.values()))
    args.seed = 6
    other = common.open_from(args).model.state_dict()
    assert not all(map(torch.equal, first.values(), other.values()))


@pytest.mark.parametrize("value", ["0", "-1", "1.5", "x", "9" * 30])
def test_numbers_are_checked(value):
    with pytest.raises(argparse.ArgumentError, match="from 1 to 2147483647"):
        flags("m", "--batch-size", value)


def test_a_byte_order_mark_is_no_part_of_a_name(tmp_path) -> None:
    path = tmp_path / "classes.txt"
    path.write_bytes("\ufeffcat\ndog\n".encode())
    assert read_class_names(path) == ("cat", "dog")


def test_a_model_without_values_is_refused(tmp_path, monkeypatch) -> None:
    (tmp_path / "empty_ones.py").write_text(
        "from torch import nn\ndef net(): return nn.Linear(4, 2, device='meta')\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ValueError, match="`model` must hold weights, got 'empty_ones:net'"):
        open_model("empty_ones:net")
