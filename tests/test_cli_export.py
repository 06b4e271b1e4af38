"""``tta export``: from a MODEL string to a folder that runs."""

from __future__ import annotations

import pytest
import torch

from tests.helpers.exported import Graph
from tests.helpers.nets import tiny
from tta.cli import main

pytest.importorskip("onnxscript")


@pytest.mark.slow
def test_a_model_becomes_a_folder(tmp_path, capsys) -> None:
    model, out = "timm:test_resnet", tmp_path / "camera"
    command = ["export", model, "--weights", "random", "--method", "robust_bn", "--out", str(out)]
    assert main(command) == 0
    assert "model.onnx" in capsys.readouterr().out
    graph = Graph(out)
    size = graph.session.get_inputs()[0].shape
    assert graph(torch.randn(2, *size[1:])).shape == (2, 1000)
    assert graph.session.get_modelmeta().custom_metadata_map["mean"] != "[0.0]"


def test_without_a_method_it_is_auto_without_its_guard(tmp_path, capsys) -> None:
    out = tmp_path / "camera"
    assert main(["export", "tests.test_cli_export:net", "--out", str(out)]) == 0
    assert "warning: auto is exported without its guard" in capsys.readouterr().err
    assert Graph(out).session.get_modelmeta().custom_metadata_map["recipe"] == "adaptive_bn+drift"


def test_in_8_bits_by_the_pictures_of_a_folder(tmp_path, capsys) -> None:
    from PIL import Image

    out, pictures = tmp_path / "camera", tmp_path / "pictures"
    pictures.mkdir()
    for n in range(5):
        Image.effect_noise((40, 30), 20 * (n + 1)).convert("RGB").save(pictures / f"{n}.png")
    (pictures / "5.png").write_bytes(b"no picture")
    command = ["export", "tests.test_cli_export:net", "--method", "neo", "--out", str(out)]
    assert main([*command, "--int8", str(tmp_path / "none")]) == 2
    assert "`FOLDER` must be a folder of pictures" in capsys.readouterr().err
    assert main([*command, "--int8", str(pictures)]) == 0
    assert "1 pictures that cannot be read" in capsys.readouterr().err
    graph = Graph(out)
    assert graph.session.get_modelmeta().custom_metadata_map["precision"] == "int8"
    size = graph.session.get_inputs()[0].shape
    assert graph(torch.rand(2, *size[1:])).shape == (2, 10)


def net() -> torch.nn.Module:
    """What the MODEL string above names."""
    return tiny("bn")


def test_a_mistake_is_said_in_a_sentence(tmp_path, capsys) -> None:
    model, out = "timm:test_resnet", tmp_path / "camera"
    command = ["export", model, "--weights", "random", "--method", "t3a[filter_size=None]"]
    assert main([*command, "--out", str(out)]) == 2
    assert "`adapter` must have a state of fixed shapes" in capsys.readouterr().err
    assert not out.exists()
    out.write_text("a file")
    assert main([*command[:-1], "source", "--out", str(out)]) == 2
    assert "`folder` must be a folder, got the file" in capsys.readouterr().err
