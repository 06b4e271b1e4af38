"""What ``wrap`` accepts, refuses and warns of; whatever is refused leaves the model as it was."""

from __future__ import annotations

import contextlib
import copy
import re
import sys
import threading
import warnings
from typing import Any

import pytest
import torch
from torch import nn

import tta
from tests.helpers.batches import images, source_batches
from tests.helpers.faults import Fault, at_places
from tests.helpers.nets import tiny
from tta.core import compiled
from tta.core.classifier import find_classifier
from tta.core.compiled import without_graphs


def _state(net: nn.Module) -> tuple:
    return (
        {k: v.clone() for k, v in net.state_dict().items()},
        [(type(m), m.training, len(m._forward_pre_hooks)) for m in net.modules()],
        [p.requires_grad for p in net.parameters()],
    )


def _equal(a: tuple, b: tuple) -> bool:
    return a[1:] == b[1:] and all(torch.equal(a[0][k], b[0][k]) for k in a[0])


REFUSED = [
    ("unknown method", "bn", {"recipe": "tnet"}, ["unknown method 'tnet'", "'tent'"]),
    (
        "a composition",
        "bn",
        {"recipe": "robust_bn+tent"},
        ["`recipe`", "wrap(model, norm='robust_bn', update='tent')"],
    ),
    ("no such composition", "bn", {"recipe": "a+b"}, ["`recipe`", "wrap(model, norm='unmix_tns',"]),
    (
        "no guard",
        "bn",
        {"recipe": "tent", "guard": "stedy"},
        ["`guard` must name a component of it, got 'stedy': did you mean 'steady'?", "periodic"],
    ),
    ("unknown preset", "bn", {"recipe": "eata.cifar"}, ["unknown preset 'cifar'", "'cifar10'"]),
    ("unknown field", "bn", {"recipe": "tent", "learning_rate": 1}, ["`learning_rate`", "tent"]),
    ("near field", "bn", {"recipe": "eta", "entropy_margn": 1}, ["did you mean 'entropy_margin'"]),
    ("wrong slot", "bn", {"norm": "lame"}, ["`norm`", "'lame'", "output='lame'"]),
    ("not a name", "bn", {"recipe": 3}, ["`recipe`", "int"]),
    ("nothing", "bn", {}, ["`recipe`", "none"]),
    ("no BatchNorm", "ln", {"norm": "unmix_tns"}, ["'unmix_tns'", "LayerNorm", "leave norm= out"]),
    ("no BatchNorm", "gn", {"recipe": "bn"}, ["'bn'", "GroupNorm"]),
    ("no source", "bn", {"recipe": "eata"}, ["`source`", "tta.collect_source"]),
    ("bad source", "bn", {"recipe": "eata", "source": 5}, ["`source`", "int"]),
    ("empty source", "bn", {"recipe": "eata", "source": []}, ["`source`", "at least one batch"]),
    ("bad value", "bn", {"recipe": "tent", "lr": -1.0}, ["`lr`", "-1.0"]),
    ("bad steps", "bn", {"recipe": "tent", "steps": 0}, ["`steps`", "0"]),
    ("bad regex", "bn", {"recipe": "tent", "params": "("}, ["`params`", "'('"]),
    ("no such parameters", "bn", {"recipe": "tent", "params": "lora"}, ["`params`", "'lora'"]),
    ("bad affinity", "bn", {"recipe": "lame", "affinity": "cosine"}, ["`affinity`", "'cosine'"]),
    (
        "shared field",
        "bn",
        {"norm": "unmix_tns", "update": "tent", "momentum": 0.5},
        ["`momentum`", "tta.get_config("],
    ),
]


@pytest.mark.parametrize(
    ("family", "arguments", "words"), [r[1:] for r in REFUSED], ids=[r[0] for r in REFUSED]
)
def test_refused_in_one_sentence_and_without_a_trace(family, arguments, words) -> None:
    net = tiny(family).train()
    before = _state(net)
    with pytest.raises((ValueError, TypeError)) as caught:
        tta.wrap(net, **arguments)
    text = str(caught.value)
    for word in words:
        assert word in text
    assert "\n" not in text
    assert _equal(_state(net), before)
    tta.wrap(net, "source")  # nothing was left behind that would forbid it


def test_a_model_without_norm_layers() -> None:
    net = nn.Sequential(nn.Flatten(), nn.Linear(12, 10))
    with pytest.raises(ValueError, match=r"`params`='norm'.*no norm layers"):
        tta.wrap(net, "tent")
    assert tta.wrap(net, "tent.cifar10", params="head")(torch.rand(4, 3, 2, 2)).shape == (4, 10)


def test_not_a_model() -> None:
    with pytest.raises(TypeError, match=r"`model`.*function"):
        tta.wrap(lambda x: x, "tent")  # type: ignore[arg-type]


@pytest.mark.parametrize("name", ["source", "tent.cifar10"])
def test_wrapping_twice(name: str) -> None:
    net = tiny("bn")
    adapter = tta.wrap(net, name)
    before = adapter.state()
    for target in (net, adapter, nn.Sequential(net)):
        with pytest.raises(ValueError, match="must not be wrapped yet"):
            tta.wrap(target, name)
    assert all(torch.equal(before[k], v) for k, v in adapter.state().items())
    adapter.unwrap()
    tta.wrap(net, name)
    with pytest.raises(RuntimeError, match="unwrapped"):
        adapter(images(0))
    with pytest.raises(RuntimeError, match="unwrapped"):
        adapter.unwrap()


def test_a_failing_source_pass_is_undone() -> None:
    def broken():
        yield images(0), torch.zeros(8)
        raise OSError("disk gone")

    net = tiny("bn")
    before = _state(net)
    with pytest.raises(OSError, match="disk gone"):
        tta.wrap(net, "eata.cifar10", source=broken())
    assert _equal(_state(net), before)


def test_bare_names_warn_of_another_class_count() -> None:
    with pytest.warns(UserWarning, match=r"1000 classes.*has 10: 'eta.cifar10' exists"):
        tta.wrap(tiny("bn"), "eta")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        tta.wrap(tiny("bn"), "eta.cifar10")
        tta.wrap(tiny("bn"), "lame")


def test_an_update_brings_batch_statistics_only_where_there_is_batch_norm() -> None:
    assert tta.wrap(tiny("bn"), "tent.cifar10").config.norm == tta.get_config("bn")
    assert tta.wrap(tiny("ln"), "tent.cifar10").config.norm is None
    assert tta.wrap(tiny("bn"), "tent.cifar10", norm="source").config.norm is None
    assert tta.wrap(tiny("bn"), "source").config.norm is None


def test_learning_rates_are_scaled_once_and_never_when_given() -> None:
    def lr(name: str, **arguments) -> float:
        return tta.wrap(tiny("bn"), name, **arguments).config.update.lr  # type: ignore[union-attr]

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert lr("tent") == 2.5e-4
        assert lr("tent", batch_size=128) == 2.5e-4
        assert lr("tent", batch_size=16) == pytest.approx(2.5e-4 / 64 * 16 * 2)
        assert lr("tent.imagenet_vit", batch_size=16) == pytest.approx(1e-3 / 4)
        assert lr("tent", batch_size=16, lr=0.1) == 0.1
        config = tta.get_config("tent", lr=0.1)
        assert tta.wrap(tiny("bn"), update=config, batch_size=1).config.update.lr == 0.1  # type: ignore[union-attr]
        adapter = tta.wrap(tiny("bn"), "tent", batch_size=16)
        again = tta.wrap(tiny("bn"), adapter.config)
        assert again.config.update.lr == adapter.config.update.lr  # type: ignore[union-attr]


def test_a_norm_rule_may_lower_the_learning_rate_of_a_named_update() -> None:
    def lr(**arguments) -> float:
        return tta.wrap(tiny("bn"), norm="unmix_tns.cifar10", **arguments).config.update.lr  # type: ignore[union-attr]

    assert lr(update="tent.cifar10") == 1e-5
    assert lr(recipe="eta.cifar10") == 1e-5
    assert lr(update="tent.cifar10", lr=0.1) == 0.1
    assert lr(update=tta.get_config("tent.cifar10")) == 1e-3
    assert lr(update="tent.cifar10", update_lr=0.2) == 0.2


def test_batch_size_reaches_the_norm_rule() -> None:
    rates = [
        next(iter(a.norm_layers.values())).rule.rate
        for a in (
            tta.wrap(tiny("bn"), norm="unmix_tns.cifar10"),
            tta.wrap(tiny("bn"), norm="unmix_tns.cifar10", batch_size=1),
            tta.wrap(tiny("bn"), norm="unmix_tns.imagenet"),
            tta.wrap(tiny("bn"), norm="unmix_tns", momentum=0.3),
        )
    ]
    assert rates == pytest.approx([0.1, 1 - 0.9 ** (1 / 64), 0.1, 0.3])


def test_the_collected_fisher_is_what_wrap_would_compute() -> None:
    net = tiny("bn")
    statistics = tta.collect_source(net, source_batches(), for_methods=["eata"])
    direct = tta.wrap(net, "eata.cifar10", source=source_batches()).constants()
    assert statistics.fisher is not None
    for name, value in statistics.fisher.items():
        assert torch.equal(value, direct[f"update/fisher.{name}"])


def test_fisher_leaves_the_norm_rule_untouched_and_sees_it() -> None:
    adapters = [
        tta.wrap(tiny("bn"), "eata.cifar10", norm=norm, source=source_batches())
        for norm in ("bn", "unmix_tns")
    ]
    plain = tta.wrap(tiny("bn"), norm="unmix_tns")
    for key, value in plain.state().items():
        if key.startswith("norm/"):
            assert torch.equal(value, adapters[1].state()[key])
    fishers = [a.constants()["update/fisher.layer1.1.weight"] for a in adapters]
    assert not torch.equal(*fishers)


def test_the_config_records_what_was_used_of_the_source() -> None:
    given = tta.collect_source(tiny("bn"), source_batches(), for_methods=["eata"])
    for source, words in (
        (source_batches(), "fisher from 16 images in 2 batches"),
        (given, "fisher as given"),
    ):
        assert tta.wrap(tiny("bn"), "eata.cifar10", source=source).config.source == words
    assert tta.wrap(tiny("bn"), "eta.cifar10", source=given).config.source is None


def test_fisher_of_another_model() -> None:
    statistics = tta.collect_source(tiny("gn"), source_batches(), for_methods=["eata"])
    assert statistics.fisher is not None
    statistics.fisher.pop("layer1.1.weight")
    with pytest.raises(ValueError, match=r"`source.fisher`.*'layer1.1.weight'"):
        tta.wrap(tiny("gn"), "eata.cifar10", source=statistics)


def test_shared_layers_get_one_wrapper() -> None:
    bn = nn.BatchNorm2d(3)
    net = nn.Sequential(bn, nn.Conv2d(3, 3, 1), bn, nn.Flatten(), nn.Linear(48, 10)).eval()
    reference = copy.deepcopy(net)
    adapter = tta.wrap(net, "bn")
    assert net[0] is net[2] and len(adapter.norm_layers) == 1
    adapter(torch.rand(4, 3, 4, 4))
    adapter.unwrap()
    assert net[0] is bn and net[2] is bn
    x = torch.rand(2, 3, 4, 4)
    assert torch.equal(net(x), reference(x))


def test_repr_says_what_is_inside() -> None:
    text = repr(tta.wrap(tiny("bn"), "tent.cifar10", output="lame"))
    assert re.search(r"norm=bn, update=tent, output=lame, 2 norm layers wrapped, 24 of", text)


def test_the_callers_gradients_are_neither_used_nor_lost() -> None:
    net, clean = tiny("bn"), tiny("bn")
    net(images(3)).sum().backward()
    before = {n: p.grad.clone() for n, p in net.named_parameters() if p.grad is not None}
    one, two = (tta.wrap(m, "tent.cifar10", lr=0.1) for m in (net, clean))
    for t in range(2):
        assert torch.equal(one(images(t)), two(images(t)))
    one.unwrap()
    after = {n: p.grad for n, p in net.named_parameters() if p.grad is not None}
    assert before.keys() == after.keys() and all(torch.equal(before[n], after[n]) for n in before)


def test_parts_and_wholes_of_a_wrapped_model_are_wrapped() -> None:
    inner = tiny("bn")
    adapter = tta.wrap(nn.Sequential(inner), "source")
    with pytest.raises(ValueError, match="must not be wrapped yet"):
        tta.wrap(inner, "tent.cifar10")
    adapter.unwrap()
    tta.wrap(inner, "tent.cifar10")


def test_a_warning_turned_into_an_error_leaves_the_model_alone() -> None:
    net = tiny("bn")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(UserWarning):
            tta.wrap(net, "tent")
    tta.wrap(net, "tent.cifar10")


def test_eta_gives_no_fisher_and_spoils_none() -> None:
    found = tta.collect_source(tiny("bn"), source_batches(), for_methods=["eata", "eta"])
    assert found.fisher is not None and any((v > 0).any() for v in found.fisher.values())
    assert tta.collect_source(tiny("bn"), source_batches(), for_methods=["eta"]).fisher is None


def test_a_taken_name_is_taken() -> None:
    from tta.methods.tent import Tent as Original

    class TentConfig(Original.Config):
        """A config of its own."""

    class Tent(Original):
        """Another one."""

        Config = TentConfig

    with pytest.raises(ValueError, match=r"`name` must be new, got 'tent'.*tta\.methods\.tent"):
        tta.register("tent")(Tent)


def test_a_shuffling_loader_leaves_the_global_generator_alone() -> None:
    data = torch.utils.data.TensorDataset(images(0), torch.arange(8))
    loader = torch.utils.data.DataLoader(data, batch_size=4, shuffle=True)
    for method in ("eata.cifar10", "adanpc"):
        torch.manual_seed(3)
        before = torch.get_rng_state()
        first = tta.wrap(tiny("bn"), method, source=loader).constants()
        assert torch.equal(before, torch.get_rng_state())
        again = tta.wrap(tiny("bn"), method, source=loader).constants()
        assert all(torch.equal(v, again[k]) for k, v in first.items())


def test_a_layer_that_normalises_its_weight_is_no_norm_layer() -> None:
    class NormedLinear(nn.Linear):
        pass

    net = nn.Sequential(nn.Flatten(), nn.Linear(12, 4), nn.LayerNorm(4), NormedLinear(4, 10))
    assert list(tta.wrap(net, "tent.cifar10").parameters_adapted) == ["2.weight", "2.bias"]


def test_a_tied_parameter_is_trained_once() -> None:
    net = nn.Sequential(nn.Flatten(), nn.Linear(12, 4), nn.LayerNorm(4), nn.LayerNorm(4))
    net[3].weight = net[2].weight
    net.append(nn.Linear(4, 10))
    adapted = tta.wrap(net, "tent.cifar10").parameters_adapted
    assert list(adapted) == ["2.weight", "2.bias", "3.bias"]


def compiled_outside(net: nn.Module) -> Any:
    return torch.compile(net, backend="eager")


def compiled_inside(net: nn.Module) -> Any:
    net.compile(backend="eager")
    return net


def compiled_forward(net: nn.Module) -> Any:
    net.forward = torch.compile(net.forward, backend="eager")
    return net


@pytest.mark.parametrize("compiled", [compiled_outside, compiled_inside, compiled_forward])
@pytest.mark.parametrize("method", ["source", "bn", "eata.cifar10", "lame", "sar.cifar10"])
def test_a_compiled_model_adapts_as_a_plain_one(method: str, compiled) -> None:
    """Also one that was called before, beside another of its class, whose graphs fit."""
    torch.compiler.reset()
    source = source_batches()
    plain = tta.wrap(tiny("bn"), method, source=source)
    net, other = compiled(tiny("bn")), compiled(tiny("bn", seed=1))
    with torch.no_grad():
        net(images(0))
    adapter = tta.wrap(net, method, source=source)
    beside = tta.wrap(other, method, source=source)
    for t in range(3):
        beside(images(t + 3))
        torch.testing.assert_close(adapter(images(t)), plain(images(t)))
    assert len(adapter.parameters_adapted) == len(plain.parameters_adapted)
    assert adapter.unwrap() is net
    with torch.no_grad():
        torch.testing.assert_close(net(images(0)), tiny("bn")(images(0)))


class CalledInReverse(nn.Module):
    """Norm layers and linear layers that are defined in the other order."""

    def __init__(self) -> None:
        super().__init__()
        self.head, self.last = nn.Linear(10, 10), nn.GroupNorm(1, 10)
        self.first, self.middle = nn.GroupNorm(1, 10), nn.Linear(10, 10)
        self.stem = nn.Conv2d(3, 10, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.middle(self.first(self.stem(x).mean((2, 3))))
        return self.head(self.last(x))


@pytest.mark.parametrize("compiled", [compiled_outside, compiled_inside, compiled_forward])
def test_a_compiled_model_is_looked_into_by_calls_though_its_graphs_know_no_hooks(compiled) -> None:
    torch.compiler.reset()
    net, x = compiled(CalledInReverse()).eval(), torch.rand(4, 3, 4, 4)
    for layer in (net.head, net.middle, net.stem):
        layer.requires_grad_(False)
    for graph in (True, False):
        with torch.set_grad_enabled(graph):
            net(x)
    assert find_classifier(net) is net.head
    adapter = tta.wrap(net, "sar.cifar10")
    adapter(x)
    trained = [name.removeprefix("_orig_mod.") for name in adapter.parameters_adapted]
    assert trained == ["first.weight", "first.bias"]


def test_a_compiled_model_is_not_compiled_to_look_for_its_classifier() -> None:
    torch.compiler.reset()
    calls: list[int] = []
    net = torch.compile(CalledInReverse(), backend=lambda graph, inputs: calls.append(1))
    assert find_classifier(net) is net.head and not calls


def test_a_compiled_adapter_gives_what_it_gives_otherwise() -> None:
    torch.compiler.reset()
    plain = tta.wrap(tiny("bn"), "lame")
    compiled = torch.compile(tta.wrap(compiled_inside(tiny("bn")), "lame"), backend="eager")
    for t in range(2):
        torch.testing.assert_close(compiled(images(t)), plain(images(t)))


def test_a_norm_layer_that_was_compiled_by_itself_is_refused() -> None:
    net = nn.Sequential(nn.Conv2d(3, 4, 3), torch.compile(nn.BatchNorm2d(4)), nn.Flatten())
    with pytest.raises(ValueError, match=r"compiled as a whole, got a BatchNorm2d"):
        tta.wrap(net.append(nn.LazyLinear(10)), "bn")


def test_graphs_are_left_alone_until_the_last_thread_leaves() -> None:
    torch.compiler.reset()
    calls: list[int] = []

    def backend(graph, inputs):
        calls.append(1)
        return graph.forward

    net = torch.compile(nn.Linear(2, 2), backend=backend)
    entered, leave = threading.Event(), threading.Event()

    def other() -> None:
        with without_graphs():
            entered.set()
            leave.wait()

    thread = threading.Thread(target=other, daemon=True)
    thread.start()
    try:
        entered.wait()
        with without_graphs():
            net(torch.ones(1, 2))
        net(torch.ones(1, 2))  # the other thread is still inside
        assert not calls
    finally:
        leave.set()
        thread.join()
    net(torch.ones(1, 2))
    assert calls == [1]


def test_a_visit_that_a_signal_has_ended_goes_with_the_call_that_failed() -> None:
    """And not when Python finds the circle in which the error holds it, which may be much later."""
    torch.compiler.reset()  # loads the compiler, without which nothing is switched
    others = set(compiled._inside)
    visit = without_graphs()
    visit.__enter__()  # its exit never comes
    try:
        assert len(compiled._inside) == len(others) + 1 and compiled._stance is not None
        compiled.end_visit(visit.gen.gi_frame)  # type: ignore[attr-defined]
        assert set(compiled._inside) == others and (compiled._stance is None) is not bool(others)
    finally:
        visit.__exit__(None, None, None)


def test_an_exception_at_any_line_does_not_turn_graphs_off_for_good() -> None:
    calls: list[int] = []

    def backend(graph, inputs):
        calls.append(1)
        return graph.forward

    code = without_graphs.__wrapped__.__code__

    def interrupted(at: int) -> bool:
        """Whether there are so many lines; at the last of them an exception was raised."""
        left = at

        def trace(frame, event, arg):
            nonlocal left
            if frame.f_code is not code:
                return None
            if event != "line" or compiled._turns.lock._is_owned():
                return trace  # no signal comes between the end of a block and the lock's release
            left -= 1
            if left < 0:
                sys.settrace(None)
                raise KeyboardInterrupt
            return trace

        before = sys.gettrace()
        sys.settrace(trace)
        try:
            with without_graphs():
                pass
        except KeyboardInterrupt:
            return True
        finally:
            sys.settrace(before)
        return False

    lines = 0
    while interrupted(lines):
        lines += 1
        with without_graphs():
            pass
        torch.compiler.reset()  # else the graph of the last one is found
        torch.compile(nn.Linear(2, 2), backend=backend)(torch.ones(1, 2))
        assert len(calls) == lines, lines
    assert lines > 4


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (nn.DataParallel, r"one copy of a network, got a DataParallel.*wrap its \.module"),
        (lambda net: nn.Sequential(nn.DataParallel(net)), "got a DataParallel"),
        (lambda net: torch.jit.trace(net, images(0)), "looked into, got a TopLevelTracedModule"),
    ],
)
def test_models_that_cannot_be_wrapped_are_refused_in_words(make, words) -> None:
    with pytest.raises(ValueError, match=f"`model` must .*{words}"):
        tta.wrap(make(tiny("bn")), "tent.cifar10")


def test_a_normaliser_around_a_model_of_odd_size() -> None:
    import timm

    class Normalised(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = timm.create_model("test_vit", img_size=48, num_classes=10)
            self.unused = nn.Linear(3, 3)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.net((x - 0.5) / 0.2)

    adapter = tta.wrap(
        Normalised(), "adanpc.cifar10", source=[(torch.rand(10, 3, 48, 48), torch.arange(10))]
    )
    assert adapter(torch.rand(4, 3, 48, 48)).shape == (4, 10)


def test_artefacts_with_a_graph_of_their_own() -> None:
    net = tiny("bn")
    fisher = {n: p.square() + 1 for n, p in net.named_parameters()}
    adapter = tta.wrap(net, "eata.cifar10", source=tta.SourceStatistics(fisher=fisher))
    for t in range(3):
        adapter(images(t))
    assert not any(v.requires_grad for v in adapter.constants().values())


@pytest.mark.parametrize("recipe", ["bn", "tent.cifar10", "lame"])
def test_a_signal_at_any_place_of_wrap_leaves_the_model_as_it_was(recipe: str) -> None:
    parts = ("build", "loan", "adapter", "norm_layers", "backbone", "state", "transaction")
    files = (*(f"tta/core/{part}.py" for part in parts), "tta/wrapping.py", "/contextlib.py")
    net = tiny("bn")
    next(net.parameters()).requires_grad_(False)
    tta.wrap(net, recipe).unwrap()
    before = _state(net)
    hooks = [list(m._forward_hooks) for m in net.modules()]
    faults = 0
    for place in at_places(files, 7, most=100_000):
        adapter = None
        with contextlib.suppress(Fault), place:
            adapter = tta.wrap(net, recipe)
        # At the end, and where Python ignores what is raised while it collects a generator.
        if adapter is not None:
            adapter.unwrap()
        faults += bool(place.where)
        assert _equal(_state(net), before), place.where
        assert [list(m._forward_hooks) for m in net.modules()] == hooks, place.where
    assert faults > 100


def test_a_signal_after_compiling_leaves_the_model_uncompiled(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    net, compile_it = tiny("bn"), nn.Module.compile

    def compile_and_stop(module: nn.Module, **options: object) -> None:
        compile_it(module, **options)
        raise Fault

    monkeypatch.setattr(nn.Module, "compile", compile_and_stop)
    for others in (False, True):  # what the caller had compiled stays so
        if others:
            compile_it(net)
        with contextlib.suppress(Fault):
            tta.wrap(net, "bn", setting=tta.Setting(compile="default")).unwrap()
        assert (net._compiled_call_impl is not None) == others
