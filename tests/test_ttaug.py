"""TTAug: each image a batch of its own of its views, beside other slots, and what it refuses."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import tta
from tests.helpers.batches import images
from tests.helpers.nets import FAMILIES, tiny

RAW: dict[str, Any] = {"mean": (0.0, 0.0, 0.0), "std": (1.0, 1.0, 1.0)}
close = torch.testing.assert_close


def _view(x: torch.Tensor, index: int) -> torch.Tensor:
    return x.roll(1 + index, dims=3) * 0.9


def test_the_plain_image_is_the_first_of_its_views() -> None:
    x, w = images(0, 2), 0.7
    adapter = tta.wrap(tiny("bn"), "ttaug", views=3, source_weight=w, augment=_view, **RAW)
    assert adapter.config.norm == tta.get_config("alpha_bn", source_weight=w)
    net = tta.wrap(tiny("bn"), norm=tta.get_config("alpha_bn", source_weight=w))
    found = adapter(x)
    for i in range(2):
        views = [x[i : i + 1], *(_view(x[i : i + 1], 3 * i + v) for v in range(3))]
        close(found[i], net(torch.cat(views)).mean(0))
    other = tta.wrap(tiny("bn"), "ttaug", views=3, plain=False, augment=_view, **RAW)
    assert not torch.allclose(other(x), found)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_batch_is_its_images_one_by_one(family: str) -> None:
    x = images(0, 3)
    together = tta.wrap(tiny(family), "ttaug", views=4, seed=5, **RAW)
    alone = tta.wrap(tiny(family), "ttaug", views=4, seed=5, **RAW)
    assert torch.equal(together(x), torch.cat([alone(x[i : i + 1]) for i in range(3)]))
    assert torch.equal(together.state()["rng"], alone.state()["rng"])


def test_a_frozen_adapter_draws_the_same_views_every_time() -> None:
    adapter = tta.wrap(tiny("bn"), "ttaug", views=4, **RAW)
    before = adapter.state()["rng"]
    with adapter.frozen():
        first = adapter(images(0))
        assert torch.equal(first, adapter(images(0)))
    assert torch.equal(adapter.state()["rng"], before)
    assert not torch.equal(adapter(images(0)), adapter(images(0)))


def test_an_update_learns_from_the_images_themselves() -> None:
    x = images(0)
    update = tta.get_config("tent", lr=0.05)
    adapter = tta.wrap(tiny("bn"), update=update, output="ttaug", views=2, augment=_view, **RAW)
    plain = tta.wrap(tiny("bn"), update=update, norm="alpha_bn")
    found, logits = adapter(x), plain(x)
    assert not torch.allclose(found, logits)
    for name, p in plain.parameters_adapted.items():
        assert torch.equal(adapter.parameters_adapted[name], p)
    again = tta.wrap(tiny("bn"), "ttaug", update=update, views=2, augment=_view, **RAW)
    assert torch.equal(again(x), found)  # whichever slot is named first


def test_an_image_whose_features_overflow_is_left_out() -> None:
    x = images(0, 4)
    adapter = tta.wrap(tiny("bn"), "ttaug", views=2, augment=_view, **RAW)
    expected = adapter(x[[0, 2, 3]])
    x[1] = 1e38
    other = tta.wrap(tiny("bn"), "ttaug", views=2, augment=_view, **RAW)
    with pytest.warns(UserWarning, match="1 of 4"):
        found = other(x)
    assert found[1].isnan().all() and torch.equal(found[[0, 2, 3]], expected)


def test_it_says_what_it_returns_of_a_model_that_returns_more(tmp_path) -> None:
    class Both(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = tiny("gn")

        def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
            return {"logits": self.net(x), "means": x.mean((1, 2, 3))}

    x = images(0, 3)
    adapter = tta.wrap(Both().eval(), "ttaug", views=2, num_classes=10, **RAW)
    found = adapter(x)
    close(found["means"], x.mean((1, 2, 3)))
    tta.save(adapter, tmp_path)
    again = tta.load(Both().eval(), tmp_path)
    assert torch.equal(again(x)["logits"], adapter(x)["logits"])


def test_words() -> None:
    for norm in ("bn", "source", tta.get_config("alpha_bn", source_weight=0.5)):
        with pytest.raises(ValueError, match="`norm` must be left out with ttaug"):
            tta.wrap(tiny("bn"), norm=norm, output="ttaug", **RAW)
    tta.wrap(tiny("gn"), norm="source", output="ttaug", **RAW)
    with pytest.raises(ValueError, match="`mean` and `std` must say"):
        tta.wrap(tiny("bn"), "ttaug")
    with pytest.raises(ValueError, match="`views` must be a whole number of at least 1"):
        tta.get_config("ttaug", views=0)
