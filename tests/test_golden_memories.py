"""Replaying traces of updates that remember more than weights; the README gives the tolerances."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import tta
from tests.helpers.recorded import recordings
from tests.helpers.traces import Trace
from tests.helpers.update_traces import (
    WEIGHTS,
    check_source,
    check_state,
    check_weights,
    replay,
)

CMF = recordings("set-d", "cmf_*")
PETTA = recordings("set-d", "petta_*")
NOTE = recordings("set-d", "note_*")
RESERVOIR = recordings("set-d", "reservoir_*")
LOGITS = {"atol": 1e-4, "rtol": 1e-4}
AVERAGES = {"atol": 1e-5, "rtol": 0.0}
RAW = {"mean": (0.0, 0.0, 0.0), "std": (1.0, 1.0, 1.0)}
close = torch.testing.assert_close


def _named(paths: list[Path]):
    return pytest.mark.parametrize("path", paths, ids=lambda p: p.stem)


def _trained(adapter: tta.Adapter, found: dict[str, Tensor]) -> dict[str, Tensor]:
    """Of a copy of all parameters, those that can differ from the source."""
    return {name: found[name] for name in adapter.parameters_adapted}


@_named([*CMF, *PETTA, *NOTE, *RESERVOIR])
def test_source_outputs(path: Path) -> None:
    check_source(Trace(path))


@_named(CMF)
def test_cmf(path: Path) -> None:
    trace = Trace(path)
    p = trace.params
    config = tta.get_config(
        "cmf",
        hidden_momentum=p["alpha"],
        ensemble_momentum=p["gamma"],
        process_noise=p["q"],
        probs_momentum=p["momentum_probs"],
        temperature=p["temperature"],
        consistency=p["use_consistency"],
        official=True,
        **trace.optimizer(),
    )
    size, augment = p["configured_batch"], trace.augment
    adapter = tta.wrap(trace.model(), update=config, batch_size=size, augment=augment, **RAW)
    figures = {"n_kept": "selected", "beta": "gain", "loss": "loss"}
    for t in replay(trace, adapter, figures, LOGITS):
        state = adapter.state()
        close(state["update/ema_probs"], trace.tensor("ema_probs")[t], **AVERAGES)
        close(state["update/hidden_variance"], trace.tensor("hidden_var")[t], **AVERAGES)
        if t == 0:
            check_weights(trace, adapter, "model_after_step0")
            _check_hidden(adapter, trace.group("hidden_after_step0"))
    _check_hidden(adapter, trace.group("hidden_final"))


def _check_hidden(adapter: tta.Adapter, found: dict[str, Tensor]) -> None:
    expected = _trained(adapter, found)
    check_state(adapter, {f"update/hidden.{n}": v for n, v in expected.items()}, **AVERAGES)


@_named(PETTA)
def test_petta(path) -> None:
    trace = Trace(path)
    p = trace.params
    config = tta.get_config(
        "petta",
        regulariser=p["regularizer"],
        regulariser_weight=p["lambda_0"],
        teacher_rate=p["alpha_0"],
        anchor_weight=p["anchor_weight"],
        consistency_loss=p["loss"],
        memory_size=p["memory_size"],
        prototype_rate=p["prototype_rate"],
        **trace.optimizer(),
    )
    mean, variance = trace.tensor("source_mean"), trace.tensor("source_variance")
    source = tta.SourceStatistics(class_mean=mean, class_variance=variance)
    norm = tta.get_config("robust_bn", batch_weight=p["rbn_batch_weight"])
    adapter = tta.wrap(
        trace.model(), norm=norm, update=config, source=source, augment=trace.augment, **RAW
    )
    figures = {"divergence": "divergence", "alpha": "teacher_rate", "reg_loss": "regulariser"}
    figures |= {"cls_loss": "consistency", "anchor_loss": "anchor"}
    for t in replay(trace, adapter, figures, LOGITS):
        _check_bank(adapter.state(), trace, t)
        if t == 0:
            check_weights(trace, adapter, "student_after_step0")
            _check_teacher(adapter, trace.group("teacher_after_step0"))
    check_weights(trace, adapter, "student_final")
    _check_teacher(adapter, trace.group("teacher_final"))
    close(adapter.state()["update/prototypes"], trace.tensor("prototypes_final"), **AVERAGES)
    for who in ("student", "teacher", "anchor"):
        found = trace.group(f"bn_{who}_final")
        prefix = "norm/" if who == "student" else f"update/{who}."
        expected = {prefix + n.replace("running_", ""): v for n, v in found.items()}
        check_state(adapter, expected, **AVERAGES)


def _check_teacher(adapter: tta.Adapter, found: dict[str, Tensor]) -> None:
    expected = _trained(adapter, found)
    check_state(adapter, {f"update/teacher.{n}": v for n, v in expected.items()}, **AVERAGES)


def _check_bank(state: dict[str, Tensor], trace: Trace, t: int) -> None:
    """The trace has images class by class, the oldest first, and then empty places."""
    labels, ages = state["update/bank.labels"], state["update/bank.ages"]
    held = [i for i in range(len(labels)) if labels[i] >= 0]
    held.sort(key=lambda i: (int(labels[i]), -int(ages[i])))
    assert labels[held].tolist() == trace.tensor("memory_labels")[t][: len(held)].tolist()
    assert (trace.tensor("memory_labels")[t][len(held) :] == -1).all()
    assert ages[held].tolist() == trace.tensor("memory_ages")[t][: len(held)].tolist()
    expected = trace.tensor("memory_entropy")[t][: len(held)]
    close(state["update/bank.entropies"][held], expected, atol=5e-5, rtol=1e-4)


@_named(NOTE)
def test_note(path: Path) -> None:
    """The trace calls the layers inside of IABN ``_bn``."""
    trace = Trace(path)
    p = trace.params
    norm = tta.get_config("iabn", alpha=p["iabn_k"], momentum=p["bn_momentum"])
    plain = tta.wrap(trace.model(), norm=norm)
    for t, x in enumerate(trace.tensor("inputs")):
        close(plain(x), trace.tensor("source_iabn_outputs")[t], **LOGITS)
    values = iter([float(v) for row in trace.arrays["draw_value"] for v in row if v == v])
    orders = iter(trace.tensor("batch_order"))

    def draws(name: str, shape: torch.Size, call: int) -> Tensor:
        return next(orders) if name == "batch_order" else torch.tensor(next(values))

    config = tta.get_config(
        "note",
        memory=p["memory_type"].lower(),
        memory_size=p["memory_size"],
        update_every=p["update_every"],
        epochs=p["epochs"],
        mini_batch=p["batch_size"],
        temperature=p["temperature"],
        **trace.optimizer(),
    )
    norm = norm.replace(learned_statistics=p["use_learned_stats"])
    adapter = tta.wrap(trace.model(), norm=norm, update=config, draws=draws)
    start = adapter.state()["rng"]
    images = trace.tensor("inputs").flatten(0, 1)
    due = trace.arrays["updates_after_sample"].tolist()
    seen = updates = 0
    for t, x in enumerate(trace.tensor("inputs")):
        close(adapter(x), trace.tensor("outputs")[t], **LOGITS)
        seen += len(x)
        if adapter.report.updates:
            updates += 1
            assert due[updates - 1] == seen
            _check_memory(adapter, trace, images, updates - 1)
        if updates == 1:
            _check_iabn(adapter, trace.group("after_update0"))
    assert updates == len(due) and next(values, None) is None and next(orders, None) is None
    assert torch.equal(adapter.state()["rng"], start)  # nothing was drawn
    _check_iabn(adapter, trace.group("adapted") | trace.group("final"))
    names = [str(n).replace("._bn", "") for n in trace.arrays["param_names"]]
    assert list(adapter.parameters_adapted) == names
    for name, value in trace.group("opt").items():
        key = name.replace("._bn", "").replace("/", ".")
        close(adapter.state()[f"optim/{key}"], value, **WEIGHTS)


def _check_memory(adapter: tta.Adapter, trace: Trace, images: Tensor, update: int) -> None:
    bank, state = adapter.update.bank, adapter.state()  # type: ignore[union-attr]
    close(adapter.report.loss, float(trace.arrays["loss"][update]), atol=5e-5, rtol=1e-4)
    order = bank.order()
    expected = trace.arrays["memory_image"][update].tolist()
    if trace.params["memory_type"] == "FIFO":  # the trace has it by true label
        expected = sorted(expected)
    else:
        labels = trace.tensor("memory_label")[update]
        assert torch.equal(state["update/bank.labels"][order], labels)
    assert torch.equal(state["update/memory"][order], images[expected])


def _check_iabn(adapter: tta.Adapter, found: dict[str, Tensor]) -> None:
    expected = {}
    for name, value in found.items():
        name = name.replace("._bn", "")
        if "running_" in name:
            expected[f"norm/{name.replace('running_', '')}"] = value
        elif not name.endswith("num_batches_tracked"):
            expected[f"param/{name}"] = value
    check_state(adapter, expected, **WEIGHTS)


class StyleNet(nn.Module):
    """The small network in the place of VGG-19's first layers.

    Args:
        trace: Has its weights.
    """

    def __init__(self, trace: Trace) -> None:
        super().__init__()
        self.weights = trace.group("style_net")
        self.mean, self.std = (torch.tensor(trace.params[k]).view(1, -1, 1, 1) for k in RAW)

    def _convolved(self, x: Tensor, layer: int) -> Tensor:
        weight, bias = (self.weights[f"{layer}.{key}"] for key in ("weight", "bias"))
        return F.conv2d(x, weight, bias, padding=1)

    def forward(self, x: Tensor) -> list[Tensor]:
        second = self._convolved(self._convolved((x - self.mean) / self.std, 0).relu(), 2)
        third = self._convolved(F.max_pool2d(second.relu(), 2), 5)
        return [second, third, self._convolved(third.relu(), 7)]


def _reservoir(trace: Trace, source: tta.SourceStatistics, draws=None) -> tta.Adapter:
    p, fields = trace.params, trace.optimizer()
    config = tta.get_config(
        "reservoir",
        inner=tta.get_config(trace.hparams["method"].removeprefix("reservoir_"), **fields),
        clusters=p["max_models"],
        buffer=p["buffer"],
        quantile=p["quantile"],
        sampling=p["sampling"],
        start="best" if p["init"] == "mi" else "source",
    )
    size = p["configured_batch"]
    return tta.wrap(
        trace.model(), update=config, source=source, batch_size=size, draws=draws, **RAW
    )


@_named(RESERVOIR)
def test_reservoir(path: Path) -> None:
    trace = Trace(path)
    threshold = trace.tensor("threshold").reshape(())
    mean = trace.tensor("source_style_mean")[0]
    net = StyleNet(trace)
    source = tta.SourceStatistics(style_net=net, style_mean=mean, style_threshold=threshold)
    places = iter([v for v in trace.arrays["replace_index"].tolist() if v >= 0])

    def draws(name: str, shape: torch.Size, call: int) -> Tensor:
        assert name == "replace_index" and shape == ()
        return torch.tensor(next(places))

    adapter = _reservoir(trace, source, draws)
    figures = {"model_index": "cluster", "num_models": "clusters", "min_dist": "style_distance"}
    for t in replay(trace, adapter, figures, LOGITS):
        expected = trace.tensor("model_prob")[t]
        count = adapter.report.clusters
        close(adapter.report.weights, expected[:count], **LOGITS)
        assert expected[count:].isnan().all()
        before = trace.arrays["num_models"][t - 1] if t else 1
        assert count - before == trace.arrays["new_cluster"][t]
    assert next(places, None) is None
    state, count = adapter.state(), adapter.report.clusters
    for k in range(count):
        found = trace.group(f"model{k}_final")
        check_state(adapter, {f"update/set{k}.{n}": v for n, v in found.items()}, **WEIGHTS)
    for key, name in (("centroids_final", "centroids"), ("buffer_final", "styles")):
        expected = trace.tensor(key)
        close(state[f"update/{name}"][: len(expected)], expected, **AVERAGES)
        assert state[f"update/{name}"][len(expected) :].isnan().all()


@_named(RESERVOIR)
def test_the_source_styles_of_reservoir(path: Path) -> None:
    trace = Trace(path)
    batches = [(x, torch.zeros(len(x), dtype=torch.int64)) for x in trace.tensor("source_inputs")]
    source = tta.SourceStatistics(style_net=StyleNet(trace), batches=batches)
    constants = _reservoir(trace, source).constants()
    close(constants["update/style_mean"], trace.tensor("source_style_mean")[0], **AVERAGES)
    expected = trace.tensor("threshold").reshape(())
    close(constants["update/style_threshold"], expected, **AVERAGES)
