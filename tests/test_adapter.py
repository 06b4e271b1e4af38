"""Inputs, warnings, state names and devices of an adapter."""

from __future__ import annotations

import copy
import warnings

import pytest
import torch
from torch import nn

import tta
from tests.helpers.batches import images, source_batches
from tests.helpers.nets import tiny

BAD_INPUT = [
    ("not a tensor", [[0.0]], TypeError, "list"),
    ("integers", torch.zeros(2, 3, 32, 32, dtype=torch.uint8), TypeError, "uint8"),
    ("double", torch.zeros(2, 3, 32, 32, dtype=torch.float64), TypeError, "float64"),
    ("half", torch.zeros(2, 3, 32, 32, dtype=torch.float16), TypeError, "float16"),
    ("one image", torch.zeros(3, 32, 32), ValueError, r"\(3, 32, 32\).*images\[None\]"),
    ("five axes", torch.zeros(1, 1, 3, 32, 32), ValueError, r"4 axes"),
    ("channels", torch.zeros(2, 1, 32, 32), ValueError, r"3 channels.*\(2, 1, 32, 32\)"),
    ("empty", torch.zeros(0, 3, 32, 32), ValueError, "at least one image"),
]


@pytest.mark.parametrize("method", ["source", "eata.cifar10"])
@pytest.mark.parametrize("family", ["bn", "ln"])
@pytest.mark.parametrize(
    ("bad", "error", "words"), [b[1:] for b in BAD_INPUT], ids=[b[0] for b in BAD_INPUT]
)
def test_bad_input_is_refused_and_changes_nothing(method, family, bad, error, words) -> None:
    adapter = tta.wrap(tiny(family), method, source=source_batches())
    adapter(images(0))
    before = adapter.state()
    with pytest.raises(error, match=words) as caught:
        adapter(bad)
    assert "`images`" in str(caught.value) and "\n" not in str(caught.value)
    after = adapter.state()
    assert all(torch.equal(before[k].nan_to_num(), after[k].nan_to_num()) for k in before)
    assert torch.isfinite(adapter(images(1))).all()


def test_a_batch_of_one_falls_back_and_warns_once() -> None:
    net = tiny("bn")
    with torch.no_grad():
        expected = net(images(0, 1))
    adapter = tta.wrap(net, "bn")
    with pytest.warns(UserWarning, match="at least 2 images for batch statistics, got 1"):
        assert torch.equal(adapter(images(0, 1)), expected)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert torch.equal(adapter(images(0, 1)), expected)
        adapter(images(0))


def test_batch_norm_1d_and_3d() -> None:
    one = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Linear(8, 10)).eval()
    three = nn.Sequential(
        nn.Conv3d(2, 4, 3),
        nn.BatchNorm3d(4),
        nn.AdaptiveAvgPool3d(1),
        nn.Flatten(),
        nn.Linear(4, 10),
    ).eval()
    for net, x in ((one, torch.rand(8, 6)), (three, torch.rand(8, 2, 4, 4, 4))):
        for norm in tta.list_methods(slot="norm"):
            adapter = tta.wrap(net, norm=norm, update="tent.cifar10")
            assert torch.isfinite(adapter(x)).all()
            adapter.unwrap()


def test_alpha_bn_at_its_ends_is_the_source_model_and_batch_statistics() -> None:
    net, x = tiny("bn_act"), images(0)
    with torch.no_grad():
        source = net(x)
    adapter = tta.wrap(net, "alpha_bn", source_weight=1.0)
    torch.testing.assert_close(adapter(x), source)
    adapter.unwrap()
    adapter = tta.wrap(net, "alpha_bn", source_weight=0.0, unbiased=False)
    mixed = adapter(x)
    adapter.unwrap()
    torch.testing.assert_close(mixed, tta.wrap(net, "bn")(x))


def test_a_subclass_with_a_forward_of_its_own_keeps_it() -> None:
    class Doubling(nn.BatchNorm2d):
        def forward(self, input):
            return 2 * super().forward(input).relu()

    net = nn.Sequential(
        nn.Conv2d(3, 4, 3), Doubling(4), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 10)
    ).eval()
    x = images(0)
    with torch.no_grad():
        expected = net(x)
    torch.testing.assert_close(tta.wrap(net, "alpha_bn", source_weight=1.0)(x), expected)


def test_state_names() -> None:
    adapter = tta.wrap(
        tiny("bn"), "eata.cifar10", norm="unmix_tns", output="lame", source=source_batches()
    )
    state = adapter.state()
    for key in (
        "param/layer1.1.weight",
        "norm/layer1.1.means",
        "norm/layer2.1.vars",
        "update/ema_probs",
        "optim/layer1.1.bias.momentum_buffer",
        "rng",
    ):
        assert key in state
    assert state["norm/layer1.1.means"].shape == (16, 4)
    assert state["update/ema_probs"].isnan().all()
    assert not any(k.startswith("norm/") and ".base" in k for k in state)
    constants = adapter.constants()
    assert {"update/fisher.layer1.1.weight", "update/anchor.layer2.1.bias"} <= set(constants)


def test_load_state_refuses_what_is_not_its_own() -> None:
    adapter = tta.wrap(tiny("bn"), "tent.cifar10")
    before = adapter.state()
    other = tta.wrap(tiny("bn"), "eta.cifar10").state()
    with pytest.raises(ValueError, match=r"`state`.*bn\+tent on source.*bn\+eta on source"):
        adapter.load_state(other)
    with pytest.raises(ValueError, match=r"`state`.*'update/ema_probs'"):
        adapter.load_state(dict(other))
    with pytest.raises(ValueError, match=r"'param/layer1.1.weight'.*\(4,\).*\(5,\)"):
        adapter.load_state(
            {
                "param/layer1.1.bias": before["param/layer1.1.bias"] + 1,
                "param/layer1.1.weight": torch.zeros(5),
            }
        )
    assert all(torch.equal(before[k], v) for k, v in adapter.state().items())


def test_a_state_knows_its_method_and_its_weights(tmp_path) -> None:
    state = tta.wrap(tiny("bn"), "tent.cifar10").state()
    with pytest.raises(ValueError, match=r"bn\+eta on source weights.*bn\+tent on source"):
        tta.wrap(tiny("bn"), "eta.cifar10").load_state(state)
    other = tta.wrap(tiny("bn", seed=1), "tent.cifar10")
    before = other.state()
    with pytest.raises(ValueError, match=r"source weights [0-9a-f]{8}.*pass dict\(state\)"):
        other.load_state(state)
    assert all(torch.equal(before[k], v) for k, v in other.state().items())
    torch.save(state, tmp_path / "state.pt")
    again = torch.load(tmp_path / "state.pt", weights_only=True)
    with pytest.raises(ValueError, match="source weights"):
        other.load_state(again)
    other.load_state(dict(state))
    adapted = tta.wrap(tiny("bn"), "tent.cifar10")
    adapted(images(0))
    adapted.load_state(again)
    assert all(torch.equal(state[k], v) for k, v in adapted.state().items())


def test_load_state_as_source_moves_the_reset_point() -> None:
    adapter = tta.wrap(tiny("bn"), "tent.cifar10")
    name = "param/layer1.1.weight"
    adapter.load_state({name: torch.full((4,), 2.0)}, as_source=True)
    adapter(images(0))
    adapter.reset()
    assert torch.equal(adapter.state()[name], torch.full((4,), 2.0))
    net = adapter.unwrap()
    assert torch.equal(
        net.state_dict()["layer1.1.weight"], tiny("bn").state_dict()["layer1.1.weight"]
    )


@pytest.mark.parametrize("optimizer", ["adam", "sgd"])
def test_the_reset_point_of_a_whole_model_is_one_copy_of_it(optimizer: str) -> None:
    net = nn.Sequential(
        nn.Conv2d(3, 64, 3), nn.AdaptiveAvgPool2d(8), nn.Flatten(), nn.Linear(4096, 64)
    )
    net[3].weight.data[0, 0] = -0.0
    adapter = tta.wrap(net, "cotta", optimizer=optimizer, lr=1e-3, mean=(0.0,) * 3, std=(1.0,) * 3)
    start, weights = adapter.state(), {k: v.clone() for k, v in net.state_dict().items()}
    size = sum(p.numel() * p.element_size() for p in net.parameters())

    def held() -> int:
        storages = [v.untyped_storage() for v in adapter.session.reset_point.values()]
        return sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())

    assert held() < 1.1 * size
    adapter.load_state(start, as_source=True)
    assert held() < 1.1 * size
    for value in adapter.reset_point().values():
        value.zero_()  # the caller's own
    adapter(images(0))
    assert any(not torch.equal(start[k], v) for k, v in adapter.state().items())
    adapter.reset()
    for name, value in adapter.state().items():
        assert torch.equal(value, start[name]) and torch.equal(
            value.signbit(), start[name].signbit()
        )
    back = adapter.unwrap().state_dict()
    assert all(torch.equal(back[k], v) for k, v in weights.items())


def test_an_interrupt_at_the_end_of_wrap_leaves_the_model_as_it_was(monkeypatch) -> None:
    net = tiny("bn")
    keys = list(net.state_dict())

    def interrupt(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr("tta.core.state.compact_copies", interrupt)
    with pytest.raises(KeyboardInterrupt):
        tta.wrap(net, "unmix_tns")
    monkeypatch.undo()
    assert list(net.state_dict()) == keys
    tta.wrap(net, "unmix_tns").unwrap()


def test_state_is_cloned() -> None:
    adapter = tta.wrap(tiny("bn"), "tent.cifar10")
    state = adapter.state()
    kept = {k: v.clone() for k, v in state.items()}
    adapter(images(0))
    assert all(torch.equal(kept[k], v) for k, v in state.items())
    for value in state.values():
        value.zero_()
    adapter.reset()
    assert all(torch.equal(kept[k], v) for k, v in adapter.state().items())


def test_save_and_load_refuse_other_models_and_folders(tmp_path) -> None:
    adapter = tta.wrap(tiny("bn"), "tent.cifar10")
    tta.save(adapter, tmp_path / "a")
    with pytest.raises(FileNotFoundError, match=r"config.json"):
        tta.load(tiny("bn"), tmp_path)
    other = tiny("gn")
    with pytest.raises(ValueError, match="`norm`='bn'"):
        tta.load(other, tmp_path / "a")
    bigger = nn.Sequential(tiny("bn"), nn.BatchNorm1d(10)).eval()
    with pytest.raises(ValueError, match="`model` must be the one that was saved"):
        tta.load(bigger, tmp_path / "a")
    tta.wrap(bigger, "source")  # it was given back
    twin = tiny("bn", seed=5)
    with pytest.raises(ValueError, match="weights"):
        tta.load(twin, tmp_path / "a")
    assert tta.load(tiny("bn"), tmp_path / "a").config == adapter.config
    with pytest.raises(TypeError, match="`adapter`"):
        tta.save(tiny("bn"), tmp_path / "b")  # type: ignore[arg-type]


def test_nonfinite_weights_stop_learning_not_predicting() -> None:
    net = tiny("bn")
    adapter = tta.wrap(net, "tent.cifar10")
    with torch.no_grad():
        net.fc.bias[0] = float("nan")
    before = adapter.state()
    adapter(images(0))
    assert not adapter.report.stepped
    after = adapter.state()
    assert all(torch.equal(before[k], after[k]) for k in before)


def test_report_reads_as_numbers() -> None:
    adapter = tta.wrap(tiny("bn"), "tent.cifar10")
    assert adapter.report.stepped is False and adapter.report.resets == 0
    adapter(images(0))
    report = adapter.report
    assert isinstance(report.loss, float) and report["loss"] == report.loss
    assert report.selected == report.seen == 8 and report.stepped is True
    with pytest.raises(AttributeError, match="no figure 'accuracy'"):
        _ = report.accuracy


def test_memory_does_not_grow_with_the_stream() -> None:
    adapter = tta.wrap(tiny("bn"), "eata.cifar10", norm="unmix_tns", source=source_batches())
    sizes = {k: v.shape for k, v in adapter.state().items()}
    for t in range(50):
        adapter(images(t, 4))
    assert {k: v.shape for k, v in adapter.state().items()} == sizes


def test_moving_the_adapter_to_another_dtype_moves_the_optimiser() -> None:
    adapter = tta.wrap(tiny("bn"), "tent.cifar10").double()
    assert torch.isfinite(adapter(images(0).double())).all()
    assert adapter.state()["optim/layer1.1.weight.exp_avg"].dtype == torch.float64


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
@pytest.mark.parametrize("norm", ["bn", "alpha_bn", "unmix_tns"])
def test_models_in_other_precisions(norm: str, dtype: torch.dtype) -> None:
    expected = tta.wrap(tiny("bn"), norm=norm, update="tent.cifar10")
    adapter = tta.wrap(tiny("bn").to(dtype), norm=norm, update="tent.cifar10")
    for t in range(2):
        y = adapter(images(t).to(dtype))
        assert y.dtype == dtype
        torch.testing.assert_close(y.float(), expected(images(t)), atol=0.1, rtol=0.1)
    with adapter.frozen():
        assert torch.isfinite(adapter(images(2).to(dtype))).all()


def test_one_huge_image_does_not_spoil_the_components() -> None:
    adapter = tta.wrap(tiny("bn"), norm="unmix_tns")
    spoiled = images(0)
    spoiled[0] = 3e38
    adapter(spoiled)
    assert torch.isfinite(adapter(images(1))).all()


def test_a_frozen_report_is_of_its_own_batch() -> None:
    adapter = tta.wrap(tiny("bn"), "tent.cifar10")
    adapter(images(0))
    adapter.freeze()
    adapter(images(1, 3))
    assert adapter.report.seen == 3 and adapter.report.selected == 0
    assert adapter.report.stepped is False


def test_a_wrong_generator_state_copies_nothing() -> None:
    adapter = tta.wrap(tiny("bn"), "tent.cifar10")
    before = adapter.state()
    wrong = {k: v + 1 if k.startswith("param/") else v for k, v in before.items()}
    wrong["rng"] = torch.zeros(7)
    with pytest.raises(ValueError, match=r"`state`\['rng'\]"):
        adapter.load_state(wrong)
    assert all(torch.equal(before[k], v) for k, v in adapter.state().items())


def test_an_unwrapped_adapter_lets_go_of_the_model() -> None:
    adapter = tta.wrap(tiny("bn"), "tent.cifar10")
    state = adapter.state()
    net = adapter.unwrap()
    for call in (adapter.reset, lambda: adapter.load_state(state)):
        with pytest.raises(RuntimeError, match="unwrapped"):
            call()
    assert repr(adapter) == "Adapter(unwrapped, norm=bn, update=tent)"
    assert torch.equal(net.layer1[1].weight, tiny("bn").layer1[1].weight)


def test_what_a_model_takes_is_its_own_affair() -> None:
    class Video(nn.Module):
        """Frames of a clip are classified together: (B, T, 3, H, W)."""

        def __init__(self) -> None:
            super().__init__()
            self.net = tiny("bn")

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.net(x.flatten(0, 1)).unflatten(0, x.shape[:2]).mean(1)

    class Grey(Video):
        """(B, 1, H, W) or (B, H, W)."""

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            x = x[:, None] if x.ndim == 3 else x
            return self.net(x.expand(-1, 3, -1, -1))

    x = images(0)
    assert tta.wrap(Video(), "tent.cifar10")(x.view(4, 2, 3, 32, 32)).shape == (4, 10)
    adapter = tta.wrap(Grey(), "tent.cifar10")
    assert adapter(x[:, :1]).shape == adapter(x[:, 0]).shape == (8, 10)


def test_a_model_without_convolution_is_refused_in_words() -> None:
    layers = [nn.Linear(48, 8), nn.LayerNorm(8), nn.Linear(8, 10)]
    adapter = tta.wrap(nn.Sequential(nn.Flatten(), *layers), "tent.cifar10")
    assert adapter(torch.rand(4, 3, 4, 4)).shape == (4, 10)
    adapter.unwrap()
    mlp = tta.wrap(nn.Sequential(*layers), "tent.cifar10")
    with pytest.raises(ValueError, match=r"must end in an axis of 48, got shape \(4, 50\)"):
        mlp(torch.rand(4, 50))


def test_a_batch_axis_that_the_model_swallows() -> None:
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.GroupNorm(2, 4), nn.AdaptiveAvgPool2d(1))
    net = nn.Sequential(net, nn.Flatten(-3), nn.Linear(4, 10), nn.Unflatten(0, (-1, 10)))
    with pytest.raises(ValueError, match=r"`images` must have 4 axes.*images\[None\]"):
        tta.wrap(net, "source")(torch.rand(3, 8, 8))


def test_no_running_statistics_and_one_value_per_channel() -> None:
    net = nn.Sequential(nn.Linear(6, 4), nn.BatchNorm1d(4, track_running_stats=False))
    net.append(nn.Linear(4, 10))
    for method in ("bn", "tent.cifar10"):
        adapter = tta.wrap(copy.deepcopy(net), method)
        assert adapter(torch.rand(5, 6)).shape == (5, 10)
        with pytest.raises(ValueError, match=r"`images` must hold at least 2 images.*got 1"):
            adapter(torch.rand(1, 6))


def test_unmix_tns_leaves_batch_norm_1d_at_its_source_statistics() -> None:
    net = nn.Sequential(nn.Conv1d(3, 4, 3), nn.BatchNorm1d(4), nn.Flatten(), nn.Linear(24, 10))
    net[1].running_mean.normal_()
    x = torch.rand(5, 3, 8)
    with torch.no_grad():
        expected = net.eval()(x)
    adapter = tta.wrap(net, norm="unmix_tns.cifar10")
    before = adapter.state()
    torch.testing.assert_close(adapter(x), expected)
    assert all(torch.equal(before[k], v) for k, v in adapter.state().items())


def test_the_callers_hooks_on_norm_layers_are_called() -> None:
    net = tiny("bn")
    seen = []
    handle = net.layer1[1].register_forward_hook(lambda m, args, y: seen.append(y.shape))
    adapter = tta.wrap(net, "bn")
    net.layer2[1].register_forward_pre_hook(lambda m, args: seen.append(args[0].shape))
    adapter(images(0))
    assert seen == [(8, 4, 32, 32), (8, 8, 16, 16)]
    handle.remove()
    adapter.unwrap()(images(0))
    assert len(seen) == 3


@pytest.mark.parametrize("method", ["tent.cifar10", "roid.cifar10", "cotta.cifar10", "rotta"])
def test_adam_in_float16(method: str) -> None:
    pixels = {} if method.startswith("tent") else {"mean": (0.0,), "std": (1.0,)}
    adapter = tta.wrap(tiny("bn").half(), method, **pixels)
    for t in range(3):
        assert torch.isfinite(adapter(images(t).half())).all()
    assert all(p.isfinite().all() for p in adapter.parameters_adapted.values())


@pytest.mark.parametrize("method", ["cafa", "rmt", "adanpc_bn"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_an_adapter_moved_to_another_dtype_predicts(method: str, dtype: torch.dtype) -> None:
    more = {"mean": (0.0,), "std": (1.0,), "warmup_samples": 0, "weight_source": 0.0}
    adapter = tta.wrap(
        tiny("bn"), method, source=source_batches(), **(more if method == "rmt" else {})
    ).to(dtype)
    for t in range(2):
        assert torch.isfinite(adapter(images(t).to(dtype))).all()


def test_an_interrupt_leaves_the_model_and_the_state_as_they_were() -> None:
    def interrupted():
        yield from source_batches()
        raise KeyboardInterrupt

    net = tiny("bn")
    with pytest.raises(KeyboardInterrupt):
        tta.wrap(net, "cafa", source=interrupted())
    adapter = tta.wrap(net, norm="unmix_tns.cifar10")
    before = adapter.state()

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    net.fc.register_forward_pre_hook(interrupt)
    with pytest.raises(KeyboardInterrupt):
        adapter(images(0))
    assert all(torch.equal(before[k], v) for k, v in adapter.state().items())


def test_a_warning_turned_into_an_error_comes_before_learning() -> None:
    adapter = tta.wrap(tiny("bn"), "tent.cifar10")
    before = adapter.state()
    with warnings.catch_warnings(), pytest.raises(UserWarning, match="at least 2 images"):
        warnings.simplefilter("error")
        adapter(images(0, 1))
    assert all(torch.equal(before[k], v) for k, v in adapter.state().items())


def test_a_model_without_a_graph_is_refused_in_words() -> None:
    class Detached(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = tiny("bn")

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.net(x).detach()

    with pytest.raises(ValueError, match="`model` must let gradients flow"):
        tta.wrap(Detached(), "tent.cifar10")(images(0))


def test_states_of_other_kinds_of_numbers_and_of_unwrapped_adapters() -> None:
    adapter = tta.wrap(tiny("bn"), "tent.cifar10")
    for wrong in (torch.zeros(4, dtype=torch.complex64), torch.zeros(4, dtype=torch.int64)):
        with pytest.raises(ValueError, match="or convert to it, got torch"):
            adapter.load_state({"param/layer1.1.weight": wrong})
    adapter.unwrap()
    with pytest.raises(RuntimeError, match="unwrapped"):
        adapter.state()


@pytest.mark.parametrize("affinity", ["rbf", "knn", "linear"])
def test_lame_leaves_an_image_that_is_alone(affinity) -> None:
    adapter = tta.wrap(tiny("bn"), "lame", affinity=affinity)
    with torch.no_grad():
        expected = tiny("bn")(images(0, 1)).log_softmax(1)
    torch.testing.assert_close(adapter(images(0, 1)), expected)
