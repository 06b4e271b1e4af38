"""LSA: replaying the traces of its definition, and what it does beyond them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F

import tta
from tests.helpers.batches import images, source_batches
from tests.helpers.nets import tiny
from tests.helpers.traces_sheet import FOLDER, SheetTrace
from tests.helpers.wild import Cosine
from tta.parts import label_shift
from tta.parts.losses import entropy

# Its presets, as the papers have them, see `tests/test_presets.py`.
PRESETS = {
    "lsa": {"code": None, "delta": "full", "prior_momentum": 0.9, "floor": 1e-6},
}

# What the keys of its traces are, see `tests/helpers/trace_keys.py`.
TRACE_KEYS = {
    "set-c": {
        "arrays": {
            "adapter": "source: label_shift",
            "source_prior": "source: source_prior; lsa_train: piece",
            "plain_outputs": "output: of the linear layer as it is",
            "features": "output: what the classifier is fed; lsa_train: piece",
            "code": "report.code",
            "estimate": "state: output/estimate",
            r"classifier|batch_index|target_priors|init|final|codes": "piece: label_shift.fit",
            "anchor": "none: target_priors in words",
        },
        "hparams": {
            "host": "wrap: update",
            "mapping": "field: code",
            "floor": "field: floor",
            "momentum_prior": "field: prior_momentum",
        },
    },
}

OUTPUTS = {"atol": 5e-5, "rtol": 0.0}
REST = {"atol": 2e-5, "rtol": 0.0}
STREAMS = [FOLDER / "lsa_none.npz", FOLDER / "lsa_tent.npz"]
PRIOR = torch.tensor([0.6, 0.3, 0.1])
close = torch.testing.assert_close


def _source(trace: SheetTrace) -> tta.SourceStatistics:
    return tta.SourceStatistics(
        label_shift=trace.group("adapter"), source_prior=trace.tensor("source_prior")
    )


def _imbalanced(count: int = 64) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Source batches in which class 0 is much more frequent than the others."""
    labels = torch.arange(count) % 10
    labels = labels.where(torch.arange(count) % 4 == 0, 0)
    return [(images(50, count), labels)]


@pytest.mark.parametrize("path", STREAMS, ids=lambda p: p.stem)
def test_trace(path: Path) -> None:
    trace, host = SheetTrace(path), {}
    p = trace.hparams
    if p["host"] == "tent":
        host = {"update": tta.get_config("tent", optimizer=p["optimizer"], lr=p["lr"])}
    lsa = tta.get_config(
        "lsa", code=p["mapping"], floor=p["floor"], prior_momentum=p["momentum_prior"]
    )
    net = trace.model()
    with torch.no_grad():
        close(net(trace.tensor("inputs")[0]), trace.tensor("source_outputs")[0], **OUTPUTS)
    adapter = tta.wrap(net, **host, output=lsa, source=_source(trace))
    classes = adapter.num_classes
    close(adapter.state()["output/estimate"], torch.full((classes,), 1 / classes))
    for t, x in enumerate(trace.tensor("inputs")):
        with torch.no_grad(), adapter.session.plain_head():
            prediction = adapter.network(x)
        assert prediction.features is not None
        close(prediction.features, trace.tensor("features")[t], **OUTPUTS)
        close(prediction.logits, trace.tensor("plain_outputs")[t], **OUTPUTS)
        y = adapter(x)
        close(y, trace.tensor("outputs")[t], **OUTPUTS)
        close(entropy(y).mean(), trace.tensor("loss")[t], **REST)
        if host:
            close(torch.tensor(adapter.report.loss), trace.tensor("loss")[t], **REST)
        close(adapter.report.raw()["code"], trace.tensor("code")[t], **REST)
        close(adapter.state()["output/estimate"], trace.tensor("estimate")[t], **REST)
    state = adapter.state()
    for name, value in trace.group("adapted").items():
        close(state[f"param/{name}"], value, **REST)
    adapter.reset()
    close(adapter(trace.tensor("inputs")[0]), trace.tensor("outputs")[0], **OUTPUTS)


def test_fitting_replays_the_trace() -> None:
    trace = SheetTrace(FOLDER / "lsa_train_scalar.npz")
    codes = []

    def draws(name: str, shape: torch.Size, call: int) -> torch.Tensor:
        if name == "target_priors":
            shares = trace.tensor(name)[call]
            codes.append(label_shift.encode(shares, trace.tensor("source_prior"), "scalar"))
        return trace.tensor(name)[call]

    steps, size = trace.tensor("batch_index").shape
    found, losses = label_shift.fit(
        trace.tensor("features"),
        trace.tensor("labels"),
        *(trace.tensor(f"classifier/{name}") for name in ("weight", "bias")),
        trace.tensor("source_prior"),
        code=trace.hparams["mapping"],
        start=trace.group("init"),
        lr=trace.hparams["lr"],
        floor=trace.hparams["floor"],
        steps=steps,
        batch_size=size,
        draws=draws,
    )
    close(losses, trace.tensor("loss"), **REST)
    close(torch.stack(codes), trace.tensor("codes"), **REST)
    for name, value in trace.group("final").items():
        close(found[name], value, **REST)


@pytest.mark.parametrize(
    ("shares", "scalar", "vector"),
    [
        ((0.2, 0.3, 0.5), -0.5072, (-1.2689, -0.1703, 1.4392)),
        ((0.6, 0.3, 0.1), 1.0, (0.0, 0.0, 0.0)),
        ((1 / 3, 1 / 3, 1 / 3), 0.0, (-0.8283, -0.1352, 0.9635)),
        ((1 / 9, 2 / 9, 6 / 9), -1.0, (-1.6566, -0.2703, 1.9269)),
        ((0.98, 0.015, 0.005), 1.0, None),  # cut
    ],
)
def test_codes_by_hand(shares: Any, scalar: float, vector: Any) -> None:
    given = torch.tensor(shares)
    close(label_shift.encode(given, PRIOR, "scalar"), torch.tensor([scalar]), atol=1e-4, rtol=0.0)
    if vector is not None:
        found = label_shift.encode(given, PRIOR, "vector")
        close(found, torch.tensor(vector), atol=1e-4, rtol=0.0)


def test_the_parts_of_what_the_network_gives() -> None:
    classes, width = 2, 3
    numbers = torch.arange(1.0, 15.0)  # gamma - 1, beta, dW row by row, db
    net = {"A1": torch.zeros(1, 1), "c1": torch.ones(1), "A2": numbers[:, None]}
    net["c2"] = torch.zeros(14)
    found = label_shift.change(net, torch.ones(1), classes, width, "full")
    h, weight, bias = torch.rand(4, width), torch.rand(classes, width), torch.rand(classes)
    gamma, beta = 1 + numbers[:3], numbers[3:6]
    expected = (gamma * h + beta) @ (weight + numbers[6:12].view(2, 3)).T + bias + numbers[12:]
    close(found.logits(h, weight, bias), expected)
    low = torch.cat([numbers[:6], torch.tensor([1.0, 2, 3, 4, 5, 6, 7])])  # rank 1: 2 + 3, then 2
    low_net = net | {"A2": low[:, None], "c2": torch.zeros(13)}
    found = label_shift.change(low_net, torch.ones(1), classes, width, "low_rank")
    close(found.weight, torch.tensor([[1.0], [2.0]]) @ torch.tensor([[3.0, 4.0, 5.0]]))
    close(found.bias, torch.tensor([6.0, 7.0]))


@pytest.mark.parametrize("delta", label_shift.DELTAS)
@pytest.mark.parametrize("code", label_shift.CODES)
def test_fitting_starts_as_the_layer_and_lowers_its_loss(code: str, delta: str) -> None:
    h = torch.randn(300, 6)
    y = (h[:, 0] > 0.8).long() + (h[:, 1] > 1.2).long()
    prior = torch.bincount(y, minlength=3) / len(y)
    weight, bias = torch.randn(3, 6), torch.randn(3)
    fields: dict[str, Any] = {"code": code, "delta": delta, "rank": 2, "lr": 0.01}
    start, first = label_shift.fit(h, y, weight, bias, prior, steps=1, **fields | {"lr": 0.0})
    shares = torch.tensor([0.2, 0.3, 0.5])
    found = label_shift.change(start, label_shift.encode(shares, prior, code), 3, 6, delta)
    close(found.logits(h, weight, bias), F.linear(h, weight, bias))
    _, losses = label_shift.fit(h, y, weight, bias, prior, steps=300, **fields)
    assert losses.shape == (300,) and losses[-50:].mean() < 0.7 * float(first)


def test_the_classes_of_the_stream_are_followed() -> None:
    """Inverted shares: accuracy is far above that of the model, which leans to class 0."""
    torch.manual_seed(0)
    h = torch.randn(600, 8)
    h[:, 0] += 1.0
    y = (torch.arange(600) % 20 == 0).long()
    h[y == 1, 0] -= 2.0
    head = torch.nn.Linear(8, 2)
    with torch.no_grad():  # of a model that knows the classes' distance and their shares
        head.weight.zero_()
        head.weight[:, 0] = torch.tensor([1.0, -1.0])
        head.bias.copy_(torch.tensor([1.5, -1.5]))
    net = torch.nn.Sequential(torch.nn.Flatten(), head)
    adapter = tta.wrap(net, output="lsa", source=[(h, y)])
    stream = h[torch.cat([torch.arange(600)[y == 1], torch.arange(600)[y == 0][:2]])]
    truth = torch.tensor([1] * 30 + [0] * 2)
    with torch.no_grad(), adapter.session.plain_head():
        plain = (adapter.network(stream).logits.argmax(1) == truth).float().mean()
    for _ in range(10):
        y = adapter(stream)
    assert (y.argmax(1) == truth).float().mean() > plain + 0.2
    assert adapter.report.code[0] < 0


def test_artefacts_are_made_saved_and_taken(tmp_path: Path) -> None:
    net = tiny("bn")
    made = tta.collect_source(net, _imbalanced(), for_methods=["lsa"])
    assert made.contents == ["label_shift", "source_prior"]
    made.save(tmp_path / "source.safetensors")
    read = tta.SourceStatistics.load(tmp_path / "source.safetensors")
    one = tta.wrap(tiny("bn"), "lsa", source=_imbalanced())
    two = tta.wrap(tiny("bn"), "lsa", source=read)
    for t in range(2):
        assert torch.equal(one(images(t)), two(images(t)))
    assert two.report.code.shape == (1,)


def test_a_balanced_source_has_a_vector_code_alone() -> None:
    even = [(images(0, 40), torch.arange(40) % 10)]
    adapter = tta.wrap(tiny("gn"), "lsa", source=even)
    adapter(images(1))
    assert adapter.report.code.shape == (10,)
    with pytest.raises(ValueError, match="`code` must be 'vector' for a source whose classes"):
        tta.wrap(tiny("gn"), "lsa", source=even, code="scalar")


def test_teachers_and_further_passes_have_the_adapted_layer(tmp_path: Path) -> None:
    arguments: dict[str, Any] = {"mean": (0.0,), "std": (1.0,), "source": _imbalanced()}
    cotta = tta.get_config("cotta", lr=0.0, views=1, restore_probability=0.0)
    adapter = tta.wrap(tiny("bn"), update=cotta, output="lsa", **arguments)
    alone = tta.wrap(tiny("bn"), norm="bn", output="lsa", **arguments)
    for t in range(3):  # with a rate of 0 the teacher stays what the model is
        close(adapter(images(t)), alone(images(t)), atol=1e-5, rtol=1e-4)
    tta.save(adapter, tmp_path)
    again = tta.load(tiny("bn"), tmp_path)
    assert torch.equal(again(images(4)), adapter(images(4)))


def test_the_source_that_a_guard_asks_is_the_plain_model() -> None:
    net = tiny("gn")
    with torch.no_grad():
        expected = net(images(3))
    adapter = tta.wrap(net, output="lsa", source=_imbalanced(), shadow=True)
    adapter(images(2))
    close(adapter(images(3)), expected)


def test_unwrap_takes_the_hook_off() -> None:
    net = tiny("gn")
    with torch.no_grad():
        before = net(images(0))
    adapter = tta.wrap(net, "lsa", source=_imbalanced())
    assert not torch.equal(adapter(images(0)), before)
    with pytest.raises(ValueError, match="`keep` must be False for lsa"):
        adapter.unwrap(keep=True)
    adapter.unwrap()
    assert torch.equal(net(images(0)), before)
    assert not any(module._forward_hooks for module in net.modules())


def test_refusals() -> None:
    with pytest.raises(ValueError, match="`source` must give lsa its fitted network"):
        tta.wrap(tiny("gn"), "lsa")
    with pytest.raises(ValueError, match="must make its logits by a linear layer for lsa"):
        tta.wrap(Cosine(), output="lsa", num_classes=10, features="neck", source=source_batches())
    made = tta.collect_source(tiny("gn"), _imbalanced(), for_methods=["lsa"])
    with pytest.raises(ValueError, match=r"`source.source_prior` must come with"):
        tta.wrap(tiny("gn"), "lsa", source=tta.SourceStatistics(label_shift=made.label_shift))
    with pytest.raises(ValueError, match=r"`source.label_shift` must hold A1"):
        tta.wrap(tiny("gn"), "lsa", source=made, delta="bias")
    with pytest.raises(ValueError, match=r"A1, c1, A2 and c2 with 10 inputs"):
        tta.wrap(tiny("gn"), "lsa", source=made, code="vector")
    made.source_prior = torch.ones(10) / 10  # for which the scalar that they take is not defined
    with pytest.raises(ValueError, match="`code` must be 'vector' for a source whose classes"):
        tta.wrap(tiny("gn"), "lsa", source=made)
    made.source_prior = torch.ones(3) / 3
    with pytest.raises(ValueError, match=r"`source.source_prior` must be the shares of 10 classes"):
        tta.wrap(tiny("gn"), "lsa", source=made)
