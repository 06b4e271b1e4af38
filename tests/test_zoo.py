"""A sample of the sweep over networks: every recipe adapts, or refuses for a known reason."""

from __future__ import annotations

import json

import pytest

from experiments.cli import main
from experiments.studies import zoo

RECIPES = ["source", "bn", "unmix_tns", "tent", "eata", "sar", "adanpc", "roid"]
QUICK = ["timm:test_resnet", "timm:test_vit", "timm:test_efficientnet_evos"]
SLOW = [
    "timm:test_byobnet",
    "timm:test_efficientnet_gn",
    "timm:test_convnext",
    "timm:deit_tiny_distilled_patch16_224",  # two heads whose mean is the prediction
    "torchvision:squeezenet1_1",  # no norm layers, a convolution as classifier
    *(
        pytest.param(name, marks=pytest.mark.soak)  # as long as all the others
        for name in (
            "torchvision:inception_v3",  # an auxiliary head
            "torchvision:swin_t",  # windows
            "timm:crossvit_tiny_240",  # two heads
            "timm:coat_tiny",  # modules that are used in several places
        )
    ),
]


def _explained(line: dict) -> bool:
    return all(said == "adapts" or said in zoo.REASONS for said in line["recipes"].values())


@pytest.mark.parametrize("name", QUICK)
def test_recipes_on_small_networks(name: str) -> None:
    line = zoo.examine(name, RECIPES)
    assert _explained(line), line
    has_bn = any(kind.startswith("BatchNorm") for kind in line["norms"])
    assert line["recipes"]["tent"] == "adapts"
    assert line["recipes"]["bn"] == ("adapts" if has_bn else "no BatchNorm")


@pytest.mark.slow
@pytest.mark.parametrize("name", SLOW)
def test_every_recipe_on_odd_networks(name: str) -> None:
    import tta

    line = zoo.examine(name, tta.list_methods())
    assert _explained(line), line


def test_a_sweep_goes_on_where_its_file_ends(tmp_path, monkeypatch, capsys) -> None:
    output, page = tmp_path / "zoo.jsonl", tmp_path / "networks.md"
    (tmp_path / "zoo.names.json").write_text(json.dumps(["timm:test_resnet", "timm:test_vit"]))
    seen = []

    def examine(name, recipes):
        seen.append((name, tuple(recipes)))
        outcomes = dict.fromkeys(recipes, "adapts") | {"bn": "no BatchNorm"}
        return {"model": name, "size": 32, "norms": {"LayerNorm": 2}, "recipes": outcomes}

    monkeypatch.setattr(zoo, "examine", examine)
    command = ["zoo", "--output", str(output), "--page", str(page), "--quiet", "--recipes"]
    assert main([*command, "bn"]) == 0
    with output.open("a") as file:
        file.write('{"model": "timm:cut_')  # as a kill leaves it
    assert main([*command, "bn", "tent"]) == 0
    assert seen[2:] == [("timm:test_resnet", ("tent",)), ("timm:test_vit", ("tent",))]
    assert len(output.read_text().splitlines()) == 4
    assert "2 networks, 4 runs: 2 adapt, 2 refuse (no BatchNorm), 0 unexplained" in page.read_text()
    assert main(["zoo", "--recipes", "tnet"]) == 2
    assert "did you mean 'tent'" in capsys.readouterr().err


def test_the_committed_table_has_no_unexplained_cell() -> None:
    lines = [json.loads(text) for text in zoo.RESULTS.read_text().splitlines()]
    assert lines
    for line in lines:
        assert _explained(line), line["model"]
