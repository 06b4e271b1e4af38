"""`tta.tune` and `wrap(..., setting=)`."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch

import tta
from tests.helpers.batches import images
from tests.helpers.nets import tiny
from tta.core.passes import Passes


def test_a_setting_goes_to_json_and_back() -> None:
    setting = tta.Setting(precision="bfloat16", threads=1, keep_memory=True)
    assert tta.Setting.from_dict(setting.to_dict()) == setting
    with pytest.raises(dataclasses.FrozenInstanceError):
        setting.threads = 2  # type: ignore[misc]
    with pytest.raises(ValueError, match="not a key of a setting"):
        tta.Setting.from_dict({"thread": 1})
    for field, value in {"memory_format": "nhwc", "precision": "int8", "threads": 0}.items():
        with pytest.raises(ValueError, match=f"^`{field}` must"):
            tta.Setting(**{field: value})
    with pytest.raises(TypeError, match=r"^`keep_memory` must"):
        tta.Setting(keep_memory=1)  # type: ignore[arg-type]


def test_an_adapter_runs_with_its_setting(tmp_path) -> None:
    setting = tta.Setting(memory_format="channels_last", precision="bfloat16", threads=1)
    net, seen = tiny("bn"), []
    adapter = tta.wrap(net, "tent.cifar10", setting=setting)
    hook = net.layer1.register_forward_hook(  # type: ignore[union-attr]
        lambda _, args, __: seen.append(
            (
                args[0].is_contiguous(memory_format=torch.channels_last),
                torch.is_autocast_enabled("cpu"),
                torch.get_num_threads(),
            )
        )
    )
    before = torch.get_num_threads()
    adapter(images(0))
    hook.remove()
    assert seen[0] == (True, True, 1)
    assert torch.get_num_threads() == before and not torch.is_autocast_enabled("cpu")
    tta.save(adapter, tmp_path)
    other = tta.load(tiny("bn"), tmp_path)
    assert other.config.setting == setting
    assert torch.equal(other(images(1)), adapter(images(1)))
    with pytest.raises(TypeError, match=r"^`setting` must be a tta.Setting"):
        tta.wrap(tiny("bn"), "tent.cifar10", setting={"threads": 1})  # type: ignore[arg-type]


def test_channels_last_changes_rounding_alone() -> None:
    setting = tta.Setting(memory_format="channels_last")
    one, other = (tta.wrap(tiny("bn"), "tent.cifar10", setting=s) for s in (None, setting))
    for t in range(3):
        torch.testing.assert_close(one(images(t)), other(images(t)), atol=1e-4, rtol=1e-4)


def test_tuning_leaves_the_model_and_keeps_within_its_time() -> None:
    net = tiny("bn")
    before = {k: v.clone() for k, v in net.state_dict().items()}
    assert tta.tune(net, images(0), budget_s=0) == tta.Setting()
    found = tta.tune(net, images(0), budget_s=0.3)
    assert isinstance(found, tta.Setting)
    if found != tta.Setting():
        assert found.speedup is not None and found.speedup > 1
        assert found.agreement is not None and found.agreement >= 0.99
        assert found.difference is not None and found.difference >= 0
    assert all(torch.equal(v, before[k]) for k, v in net.state_dict().items())
    assert tta.wrap(net, "bn", setting=found)(images(0)).shape == (8, 10)


@pytest.mark.parametrize(("budget", "compiled"), [(5, False), (60, True)])
def test_compiling_begins_only_while_there_is_time(
    budget: float, compiled: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    tried = []

    def run(make: Any, x: torch.Tensor, setting: tta.Setting) -> tuple[float, torch.Tensor]:
        tried.append(setting)
        return 1.0, torch.zeros(8, 10)

    monkeypatch.setattr("tta.tuning._run", run)
    tta.tune(tiny("bn"), images(0), budget_s=budget)
    assert any(setting.compile is not None for setting in tried) == compiled
    assert any(setting.precision == "bfloat16" for setting in tried)


def test_other_arguments_are_refused() -> None:
    with pytest.raises(TypeError, match=r"^`model` must be a torch.nn.Module, got int"):
        tta.tune(3, images(0))  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=r"^`example` must be a tensor"):
        tta.tune(tiny("bn"), [1.0])  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"^`budget_s` must"):
        tta.tune(tiny("bn"), images(0), budget_s=-1)
    with pytest.raises(ValueError, match=r"^`precisions` must"):
        tta.tune(tiny("bn"), images(0), precisions=["int8"])
    with pytest.raises(TypeError, match=r"^`precisions` must"):
        tta.tune(tiny("bn"), images(0), precisions="float32")
    with pytest.raises(TypeError, match=r"^`compile` must"):
        tta.tune(tiny("bn"), images(0), compile="default")  # type: ignore[arg-type]


def test_what_may_be_tried_can_be_restricted(monkeypatch: pytest.MonkeyPatch) -> None:
    tried: list[tta.Setting] = []
    monkeypatch.setattr(
        "tta.tuning._run", lambda make, x, setting: (tried.append(setting), (1.0, x))[1]
    )
    tta.tune(tiny("bn"), images(0), precisions=["float32"], compile=False)
    assert {s.precision for s in tried} == {"float32"}
    assert {s.compile for s in tried} == {None}
    assert {s.keep_memory for s in tried} == {False, True}
    tta.tune(tiny("bn"), images(0), precisions=["float16"])
    assert {s.precision for s in tried} == {"float32", "float16"}
    assert {s.compile for s in tried} == {None, "default"}


class _Named(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.net = tiny("bn").eval()

    def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
        return {"logits": self.net(x), "images": x}


def test_models_that_return_more_than_logits_are_tuned() -> None:
    assert tta.tune(_Named(), images(0), budget_s=0) == tta.Setting()
    last = torch.nn.Sequential(_Named())
    found = tta.tune(last, images(0), budget_s=0.05, recipe="bn", logits=lambda r: r["logits"])
    assert isinstance(found, tta.Setting)
    for empty in (images(0)[:0], torch.tensor(1.0)):
        with pytest.raises(ValueError, match=r"^`images` must"):
            tta.tune(tiny("bn"), empty, budget_s=0)


def test_the_passes_of_a_recipe_are_those_that_are_timed() -> None:
    """A recipe without gradients makes no backward pass, its fields and slots are wrap's."""
    net = tiny("bn")
    counted = Passes(net)
    tta.tune(net, images(0), budget_s=0, recipe="bn", output="lame", neighbours=2)
    assert counted.forward > 0 and counted.backward == 0
    tta.tune(net, images(0), budget_s=0)
    assert counted.backward > 0
    before = counted.backward
    tta.tune(net, images(0), budget_s=0, norm="robust_bn")  # slots alone have no update
    tta.tune(net, images(0), budget_s=0, recipe=tta.wrap(tiny("bn"), "bn").config)
    assert counted.backward == before
    forward = counted.forward
    tta.tune(net, images(0), budget_s=0, recipe="bn", window=32)
    assert counted.forward - forward == 8 + (8 + 16 + 24 + 32) + 6 * 32  # timed when it is full
    counted.close()
    with pytest.raises(ValueError, match="tentt"):
        tta.tune(net, images(0), budget_s=0, recipe="tentt")
    with pytest.raises(TypeError, match=r"^`setting` must be left out"):
        tta.tune(net, images(0), budget_s=0, setting=tta.Setting())
    assert tta.wrap(net, "bn")(images(0)).shape == (8, 10)


def test_a_busy_moment_makes_no_setting_fast(monkeypatch: pytest.MonkeyPatch) -> None:
    """What was slow by chance before a change is measured again after it."""
    plain = iter([9.0, 1.0])

    def run(make, x, setting):  # type: ignore[no-untyped-def]
        return next(plain) if setting == tta.Setting() else 0.99, x

    monkeypatch.setattr("tta.tuning._run", run)
    assert tta.tune(tiny("bn"), images(0), precisions=["float32"], compile=False) == tta.Setting()
    plain = iter([9.0, 1.2])
    found = tta.tune(tiny("bn"), images(0), precisions=["float32"], compile=False)
    assert found.memory_format == "channels_last" and not found.keep_memory
    assert found.speedup == pytest.approx(1.2 / 0.99)


@pytest.mark.parametrize("method", ["source", "tent.cifar10", "lame", "robust_bn"])
def test_half_precision_of_passes_is_not_that_of_the_logits(method: str) -> None:
    setting = tta.Setting(precision="bfloat16")
    adapter = tta.wrap(tiny("bn"), method, setting=setting)
    assert adapter(images(0)).dtype == torch.float32
    adapter.freeze()
    assert adapter(images(0)).dtype == torch.float32
    bad = images(1).clone()
    bad[0] = float("nan")
    assert adapter(bad).dtype == torch.float32
    own = tta.wrap(tiny("bn").bfloat16(), method, setting=setting)
    assert own(images(0).bfloat16()).dtype == torch.bfloat16
