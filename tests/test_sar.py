"""SAR beyond its traces: which layers it leaves out, recovery, scaling of its learning rate."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import tta
from tests.helpers.batches import images
from tests.helpers.nets import cnn, tiny, trace_model
from tta.parts.sam import perturbed

FIELDS = {"lr": 0.05, "entropy_margin": 10.0, "reset_threshold": 0.0}


class Backwards(nn.Module):
    """Layers defined last to first and one that is never called."""

    def __init__(self, depth: int) -> None:
        super().__init__()
        self.depth = depth
        self.head = nn.Linear(8, 10)
        self.unused = nn.LayerNorm(8)
        for i in reversed(range(depth)):
            self.add_module(f"norm_{i}", nn.GroupNorm(2, 8))
        self.stem = nn.Conv2d(3, 8, 3, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for i in range(self.depth):
            x = getattr(self, f"norm_{i}")(x).relu()
        return self.head(x.mean(dim=(2, 3)))


def _moved(adapter: tta.Adapter, before: dict[str, Tensor]) -> set[str]:
    after = adapter.state()
    keys = [k for k in before if k.startswith("param/")]
    return {
        k.removeprefix("param/").rpartition(".")[0]
        for k in keys
        if not torch.equal(before[k], after[k])
    }


def _trained(net: nn.Module, **fields) -> set[str]:
    adapter = tta.wrap(net.eval(), update=tta.get_config("sar", **(FIELDS | fields)))
    before = adapter.state()
    adapter(images(0))
    moved = _moved(adapter, before)
    assert moved == {n.rpartition(".")[0] for n in adapter.parameters_adapted}
    assert list(adapter.state()) == list(before)
    return moved


def test_layers_are_left_out_in_the_order_of_first_calls() -> None:
    """Of eight called, the last two; not those defined last, and not counting the unused one."""
    assert _trained(Backwards(8)) == {f"norm_{i}" for i in range(6)}
    assert _trained(Backwards(8), skip_blocks=0.5) == {f"norm_{i}" for i in range(4)}
    assert _trained(Backwards(8), skip_blocks=0.0) == {f"norm_{i}" for i in range(7)}
    assert _trained(Backwards(1)) == {"norm_0"}  # something is always trained


def test_positions_agree_with_the_official_names_on_a_vit() -> None:
    """What the official list leaves out of ViT-B's 25 norm layers, in a small one of its depth."""
    model = {"kind": "ln_vit", "dim": 16, "depth": 12, "heads": 2, "num_classes": 10}
    kept = {f"blocks.{i}.norm{j}" for i in range(9) for j in (1, 2)}
    assert _trained(trace_model(model)) == kept
    assert _trained(trace_model(model), official=True) == kept


def test_official_names_and_other_parameters() -> None:
    net = cnn((4, 4, 4, 4), lambda c: nn.GroupNorm(2, c))
    assert _trained(net, official=True) == {"layer1.1", "layer2.1", "layer3.1"}
    assert _trained(cnn((4, 8), nn.BatchNorm2d), params="weight_bias") == {
        *("layer1.0", "layer1.1", "layer2.0", "layer2.1", "fc")
    }
    with pytest.raises(ValueError, match="leaves out all 2 parameters"):
        tta.wrap(
            nn.Sequential(
                nn.Sequential(), nn.ModuleDict({"layer4": nn.BatchNorm1d(8)}), nn.Linear(8, 10)
            ),
            update=tta.get_config("sar", official=True),
        )


def test_batch_norm_layers_are_watched_through_their_wrappers() -> None:
    assert _trained(tiny("bn")) == {"layer1.1"}
    assert _trained(tiny("bn_act")) == {"layer1.1"}


def test_unwrapping_before_the_first_batch_leaves_no_hook() -> None:
    net = tiny("gn")
    adapter = tta.wrap(net, update=tta.get_config("sar", **FIELDS))
    assert any(m._forward_pre_hooks for m in net.modules())
    adapter.unwrap()
    assert not any(m._forward_pre_hooks for m in net.modules())


def test_a_frozen_first_batch_teaches_the_order() -> None:
    adapter = tta.wrap(Backwards(8).eval(), update=tta.get_config("sar", **FIELDS))
    with adapter.frozen():
        adapter(images(0))
    adapter(images(1))
    assert len(adapter.parameters_adapted) == 12


def test_one_step_by_hand() -> None:
    """Against autograd on a copy: climb, gradient there, plain SGD step from the start."""
    net, rho = tiny("gn"), 0.05
    twin, x = tiny("gn"), images(0)
    adapter = tta.wrap(net, update=tta.get_config("sar", **FIELDS, rho=rho, momentum=0.0))
    adapter(x)
    parameters = [p for n, p in twin.named_parameters() if n in adapter.parameters_adapted]

    def slope() -> list[Tensor]:
        probs = twin(x).softmax(1)
        return list(torch.autograd.grad(-(probs * probs.log()).sum(1).mean(), parameters))

    start, g = [p.detach().clone() for p in parameters], slope()
    norm = torch.cat([t.flatten() for t in g]).norm()
    with torch.no_grad():
        for p, t in zip(parameters, g, strict=True):
            p += rho * t / (norm + 1e-12)
    second = slope()
    for p, s, t in zip(adapter.parameters_adapted.values(), start, second, strict=True):
        torch.testing.assert_close(p.detach(), s - 0.05 * t, atol=1e-6, rtol=1e-5)


def test_recovery_brings_parameters_and_momentum_back_and_forgets_the_average() -> None:
    adapter = tta.wrap(tiny("gn"), update=tta.get_config("sar", **(FIELDS | {"lr": 0.2})))
    start = adapter.state()
    adapter(images(0))
    assert adapter.report.resets == 0 and not adapter.state()["update/ema"].isnan()
    moved = adapter.state()
    config = tta.get_config("sar", **(FIELDS | {"reset_threshold": 10.0}))
    eager = tta.wrap(tiny("gn"), update=config)
    eager(images(0))
    after = eager.state()
    assert eager.report.resets == 1 and after["update/ema"].isnan()
    groups = ("param/", "optim/")
    assert all(torch.equal(after[k], start[k]) for k in start if k.startswith(groups))
    assert not all(torch.equal(moved[k], start[k]) for k in start if k.startswith(groups))
    eager.reset()
    assert eager.report.resets == 0


@pytest.mark.parametrize(
    ("preset", "batch_size", "expected"),
    [
        ("sar.imagenet", 64, 2.5e-4),
        ("sar.imagenet", 32, 2.5e-4),
        ("sar.imagenet", 16, 1.25e-4),
        ("sar.imagenet", 1, 1.5625e-5),
        ("sar.imagenet_vit", 64, 1e-3),
        ("sar.imagenet_vit", 16, 2.5e-4),
        ("sar.imagenet_vit", 1, 3.125e-5),
        ("sar.cifar10", 1, 1e-3 / 200),  # no rule of the authors: ours
    ],
)
def test_learning_rates_of_the_official_scripts(preset, batch_size, expected) -> None:
    config = tta.get_config(preset).for_batch_size(batch_size)
    assert config.lr == pytest.approx(expected) and config.for_batch_size(1).lr == config.lr
    assert tta.get_config(preset, lr=0.1).for_batch_size(1).lr == 0.1


def test_a_failure_at_the_perturbed_point_leaves_parameters_as_they_were() -> None:
    p = torch.tensor([1.0, 2.0])
    with pytest.raises(RuntimeError), perturbed([p], [torch.tensor([1.0, 0.0])], rho=0.5):
        assert p.tolist() == [1.5, 2.0]
        raise RuntimeError
    assert p.tolist() == [1.0, 2.0]
