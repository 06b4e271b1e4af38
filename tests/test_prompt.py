"""The input rule `prompt`: what the model sees, what is refused, and what moves."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import tta
from tests.helpers.batches import images
from tests.helpers.nets import tiny
from tests.helpers.refusals import refused
from tta.parts import join as joining
from tta.parts.prompts import add_prompt, frame_mask, levels_of

PIXELS: dict[str, Any] = {"mean": (0.0,), "std": (1.0,)}
MEAN, STD = (0.4, 0.5, 0.6), (0.2, 0.25, 0.3)
close = torch.testing.assert_close


def offsets(seed: int = 1, size: int = 32) -> Tensor:
    return 0.4 * torch.randn(3, size, size, generator=torch.Generator().manual_seed(seed))


def prompted(net: nn.Module, prompt: Tensor | None = None, **more: Any) -> tta.Adapter:
    adapter = tta.wrap(net, **{"input": "prompt", **PIXELS, **more})
    adapter.load_state({"input/prompt": offsets() if prompt is None else prompt})
    return adapter


def plain(x: Tensor) -> Tensor:
    with torch.no_grad():
        return tiny("gn")(x)


def test_it_is_added_to_pixels_which_stay_in_0_and_1() -> None:
    x = images(0)
    found = prompted(tiny("gn"))(x)
    close(found, plain((x + offsets()).clamp(0, 1)), rtol=0, atol=0)
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in (MEAN, STD))
    adapter = prompted(tiny("gn"), mean=MEAN, std=STD)
    close(adapter((x - mean) / std), plain(((x + offsets()).clamp(0, 1) - mean) / std))


def test_a_frame_leaves_the_inside_alone() -> None:
    x, width = images(0), 5
    mask = torch.zeros(32, 32)
    mask[:width] = mask[-width:] = 1
    mask[:, :width] = mask[:, -width:] = 1
    config = tta.get_config("prompt", width=width)
    found = prompted(tiny("gn"), input=config)(x)
    close(found, plain((x + offsets() * mask).clamp(0, 1)))
    assert torch.equal(frame_mask((3, 32, 32), width), mask.bool())
    assert frame_mask((3, 32, 32), 16).all() and frame_mask((3, 32, 32), None).all()


def test_a_prompt_of_zeros_changes_no_bit_of_an_image() -> None:
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in (MEAN, STD))
    levels = torch.arange(256).float().div(255).repeat(3, 1).view(1, 3, 16, 16)
    x = (levels - mean) / std
    for dtype in (torch.float32, torch.bfloat16, torch.float64):
        wide = x.to(dtype)
        for prompt in (torch.zeros(0), torch.zeros(3, 16, 16)):
            found = add_prompt(wide, prompt, (MEAN, STD))
            assert found.dtype == dtype
            close(found, wide, rtol=0, atol=1e-6 if dtype == torch.float64 else 0)
    adapter = tta.wrap(tiny("gn"), input="prompt", **PIXELS)
    assert torch.equal(adapter(images(0)), plain(images(0)))


def test_levels_come_back_from_what_the_model_takes() -> None:
    levels = torch.randint(0, 256, (4, 3, 8, 8), dtype=torch.uint8)
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in (MEAN, STD))
    assert torch.equal(levels_of((levels / 255 - mean) / std, (MEAN, STD)), levels)
    assert levels_of(levels, (MEAN, STD)) is levels
    # Images of levels are those of pixels, whatever the figures say of what is normalised.
    found = add_prompt(levels, torch.full((3, 8, 8), 0.2), (MEAN, STD))
    assert torch.equal(found, (levels.int() + 51).clamp(0, 255).to(torch.uint8))


def test_it_is_state_that_moves_by_loading_alone(tmp_path: Path) -> None:
    adapter = tta.wrap(tiny("gn"), input="prompt", **PIXELS)
    assert adapter.state()["input/prompt"].shape == (0,)
    with adapter.frozen():
        adapter(images(0))
    assert adapter.state()["input/prompt"].shape == (0,)
    adapter(images(0))
    assert torch.equal(adapter.state()["input/prompt"], torch.zeros(3, 32, 32))
    adapter.load_state({"input/prompt": offsets()})
    y = adapter(images(0))
    assert torch.equal(adapter.state()["input/prompt"], offsets())
    tta.save(adapter, tmp_path)
    again = tta.load(tiny("gn"), tmp_path)
    assert torch.equal(again(images(0)), y)
    with adapter.frozen():
        assert torch.equal(adapter(images(0)), y)
    adapter.reset()
    assert torch.equal(adapter(images(0)), plain(images(0)))
    adapter.load_state({"input/prompt": offsets()}, as_source=True)
    adapter.reset()
    assert torch.equal(adapter(images(0)), y)


def test_it_can_be_loaded_and_reset_in_inference_mode() -> None:
    adapter = tta.wrap(tiny("gn"), input="prompt", **PIXELS)
    with torch.inference_mode():
        adapter.load_state({"input/prompt": offsets()})
    y = adapter(images(0))
    with torch.inference_mode():
        assert torch.equal(adapter(images(0)), y)
        adapter.reset()
        adapter(images(0))
    adapter.load_state({"input/prompt": offsets()})
    assert torch.equal(adapter(images(0)), y)


def test_zeros_suit_any_size_and_a_prompt_its_own() -> None:
    adapter = tta.wrap(tiny("gn"), input="prompt", **PIXELS)
    small = torch.rand(2, 3, 16, 16)
    for x in (images(0), small, images(1)):
        assert torch.equal(adapter(x), plain(x))
    adapter.load_state({"input/prompt": offsets()})
    before = adapter.state()
    text = refused(ValueError, r"must be \(B, 3, 32, 32\) like the prompt", lambda: adapter(small))
    assert "(2, 3, 16, 16)" in text
    assert all(torch.equal(v, before[k]) for k, v in adapter.state().items())
    adapter(images(0))


def test_an_update_learns_from_prompted_images() -> None:
    tent = tta.get_config("tent", lr=0.05)
    adapter, other = prompted(tiny("bn"), update=tent), tta.wrap(tiny("bn"), update=tent)
    for t in range(2):
        expected = other((images(t) + offsets()).clamp(0, 1))
        assert torch.equal(adapter(images(t)), expected)


@pytest.mark.parametrize("rule", ["sum", "select_entropy", "entropy_fuse"])
def test_joined_with_the_prediction_for_the_images_as_they_came(rule: str) -> None:
    x = images(0)
    y = prompted(tiny("gn"), input=tta.get_config("prompt", join=rule))(x)
    shifted = (x + offsets()).clamp(0, 1)
    if rule in joining.JOINS:
        close(y, joining.join(plain(x), plain(shifted), rule))
    else:
        close(y, plain(joining.fuse(x, shifted, plain(x), plain(shifted), rule)))


def test_gradients_flow_to_images_of_a_frozen_adapter() -> None:
    adapter = prompted(tiny("gn"), torch.full((3, 32, 32), 0.1))
    adapter.freeze()
    x = images(0).requires_grad_()
    adapter(x).sum().backward()
    assert x.grad is not None and (x.grad[x.detach() > 0.95] == 0).all() and x.grad.any()


def test_refusals() -> None:
    net = tiny("gn")
    refused(ValueError, "`mean` and `std` must say", lambda: tta.wrap(net, input="prompt"))
    for call in (
        lambda: tta.get_config("prompt", width=0),
        lambda: tta.get_config("prompt", join="product"),
    ):
        with pytest.raises(ValueError, match="must be"):
            call()
    adapter = tta.wrap(net, input="prompt", mean=(0.0,) * 4, std=(1.0,))
    refused(ValueError, "one for each of 3 channels", lambda: adapter(images(0)))
    adapter = tta.wrap(adapter.unwrap(), input="prompt", **PIXELS)
    text = "`images` must be \\(B, C, H, W\\)"
    refused(ValueError, text, lambda: adapter(images(0)[:, :, 0]))
    assert adapter.state()["input/prompt"].shape == (0,)


def test_a_models_own_figures_are_used() -> None:
    net = tiny("gn")
    net.pretrained_cfg = {"mean": MEAN, "std": STD}  # type: ignore[assignment]
    x = images(0)
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in (MEAN, STD))
    adapter = tta.wrap(net, input="prompt")
    adapter.load_state({"input/prompt": offsets()})
    close(adapter((x - mean) / std), plain(((x + offsets()).clamp(0, 1) - mean) / std))
