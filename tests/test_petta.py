"""PeTTA: divergence, regulariser and class moments by hand, and what is refused."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import tta
from tests.helpers.batches import images, source_batches
from tests.helpers.nets import tiny
from tta.methods.petta import distance_from

# What the keys of its traces are, see `tests/helpers/trace_keys.py`.
TRACE_KEYS = {
    "set-d": {
        "arrays": {
            "source_variance": "source: class_variance",
            "divergence": "report.divergence",
            "alpha": "report.teacher_rate",
            "reg_loss": "report.regulariser",
            "cls_loss": "report.consistency",
            "anchor_loss": "report.anchor",
            r"memory_(labels|ages|entropy)": "state: update/bank.*, class by class, the oldest "
            "first",
            "prototypes_final": "state: update/prototypes",
            r"student_(after_step0|final)": "state: param/<name>",
            r"teacher_(after_step0|final)": "state: update/teacher.<name>",
            r"bn_(student|teacher|anchor)_final": "state: norm/ or update/<who>., .mean and .var",
        },
        "hparams": {
            "params.lambda_0": "field: regulariser_weight",
            "params.alpha_0": "field: teacher_rate",
            "params.anchor_weight": "field: anchor_weight",
            "params.regularizer": "field: regulariser",
            "params.loss": "field: consistency_loss",
            "params.prototype_rate": "field: prototype_rate",
            "params.rbn_batch_weight": "field: batch_weight of robust_bn",
            r"params\.adaptive_(lambda|alpha)": "none: always True, the others are not offered",
        },
    },
}

RAW: dict[str, Any] = {"mean": (0.0,), "std": (1.0,)}
close = torch.testing.assert_close


def _petta(source: Any, net: Any = None, **fields) -> tta.Adapter:
    config = tta.get_config("petta", **{"lr": 0.02, "memory_size": 16} | fields)
    return tta.wrap(net or tiny("bn"), update=config, source=source, **RAW)


def _moments() -> tta.SourceStatistics:
    generator = torch.Generator().manual_seed(3)
    mean = torch.rand(10, 8, generator=generator)
    variance = torch.rand(10, 8, generator=generator) + 0.5
    return tta.SourceStatistics(class_mean=mean, class_variance=variance)


def _source_model(batches: list[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    """Features and predicted labels of the plain network."""
    net: Any = tiny("bn")
    features = []
    handle = net.fc.register_forward_pre_hook(lambda module, given: features.append(given[0]))
    with torch.no_grad():
        labels = torch.cat([net(x).argmax(1) for x, _ in batches])
    handle.remove()
    return torch.cat(features), labels


def test_the_regulariser_by_hand() -> None:
    weights = [torch.tensor([3.0, 4.0]), torch.tensor([[1.0], [1.0]])]
    source = [torch.tensor([4.0, 3.0]), torch.tensor([[1.0], [1.0]])]
    assert float(distance_from(weights, source, "cosine")) == pytest.approx(-(24 / 25 + 1) / 2)
    assert float(distance_from(weights, source, "l2")) == pytest.approx((2 + 0) / 2)


def test_divergence_and_class_means_by_hand() -> None:
    """The divergence is that before the means move, over the classes of the batch alone."""
    source = _moments()
    adapter = _petta(source)
    before = source.class_mean
    assert before is not None and source.class_variance is not None
    for t in range(3):
        x = images(t)
        found = adapter.update.teacher.predict(x)  # type: ignore[union-attr]
        labels = found.logits.argmax(1)
        seen = labels.unique()
        terms = (before - source.class_mean)[seen].square()  # type: ignore[operator]
        expected = 1 - math.exp(-float((terms / (source.class_variance[seen] + 1e-6)).mean()))
        after = before.clone()
        for c in seen:
            after[c] = 0.95 * before[c] + 0.05 * found.features[labels == c].mean(0)
        adapter(x)
        assert adapter.report.divergence == pytest.approx(expected, abs=1e-6)
        assert adapter.report.teacher_rate == pytest.approx((1 - expected) * 1e-3)
        close(adapter.state()["update/prototypes"], after)
        before = after
    assert adapter.report.divergence > 0


def test_the_loss_is_the_sum_of_its_parts() -> None:
    adapter = _petta(_moments(), regulariser_weight=7.0, anchor_weight=0.5)
    for t in range(2):
        adapter(images(t))
    r = adapter.report
    expected = r.consistency + r.divergence * 7.0 * r.regulariser + 0.5 * r.anchor
    assert float(r.loss) == pytest.approx(float(expected)) and r.divergence > 0


def test_source_moments_go_by_predicted_label() -> None:
    batches = source_batches()
    features, labels = _source_model(batches)
    found = tta.collect_source(tiny("bn"), batches, for_methods=["petta"])
    assert found.contents == ["class_mean", "class_variance"]
    assert found.class_mean is not None and found.class_variance is not None
    count = F.one_hot(labels, 10).sum(0)
    assert (count > 1).any() and (count < 2).any()
    for c in range(10):
        some = features[labels == c] if count[c] > 1 else features
        close(found.class_mean[c], some.mean(0), atol=1e-5, rtol=1e-5)
        close(found.class_variance[c], some.var(0), atol=1e-5, rtol=1e-5)
    given, measured = _petta(found), _petta(batches)
    assert torch.equal(given(images(0)), measured(images(0)))
    assert torch.equal(given(images(1)), measured(images(1)))


def test_rows_of_nan_are_those_of_the_other_classes() -> None:
    source = _moments()
    assert source.class_mean is not None and source.class_variance is not None
    source.class_mean[2], source.class_variance[2] = float("nan"), float("nan")
    constants = _petta(source).constants()
    others = [c for c in range(10) if c != 2]
    close(constants["update/class_mean"][2], source.class_mean[others].mean(0))
    close(constants["update/class_variance"][2], source.class_variance[others].mean(0))


def test_statistics_of_the_source_move_and_its_weights_do_not() -> None:
    adapter = _petta(_moments())
    start, constants = adapter.state(), adapter.constants()
    adapter(images(0))
    after = adapter.state()
    statistics = [key for key in start if key.startswith("update/anchor.")]
    assert statistics and all(not torch.equal(start[k], after[k]) for k in statistics)
    for key, value in adapter.constants().items():
        assert torch.equal(value, constants[key])
    assert "update/anchor.layer1.1.weight" in constants


def test_what_is_missing_or_of_another_model_is_refused() -> None:
    with pytest.raises(ValueError, match="`source` must give petta the means"):
        _petta(tta.SourceStatistics(class_mean=torch.zeros(10, 8)))
    for shape in ((9, 8), (10, 7)):
        wrong = tta.SourceStatistics(
            class_mean=torch.zeros(shape), class_variance=torch.ones(shape)
        )
        with pytest.raises(ValueError, match=r"`source\.class_mean` must be of shape"):
            _petta(wrong)
    with pytest.raises(ValueError, match="at least 2 images"):
        _petta([(images(0, 1), torch.zeros(1, dtype=torch.int64))])
    with pytest.raises(ValueError, match="`class_variance` must be finite"):
        tta.SourceStatistics(class_variance=torch.full((2, 2), float("inf")))
    for field in ({"regulariser": "l1"}, {"consistency_loss": "kl"}, {"teacher_rate": 2.0}):
        with pytest.raises(ValueError, match=f"`{next(iter(field))}` must be"):
            tta.get_config("petta", **field)
