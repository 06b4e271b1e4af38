"""Lists of names, warnings and reports: the same words whoever reads them."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import tta
from tests.helpers.batches import BATCH, images, source_batches
from tests.helpers.nets import tiny
from tests.helpers.refusals import refused
from tta.core.checks import nearest

NAN, INF = float("nan"), float("inf")


def test_names_that_are_known_come_in_one_order() -> None:
    assert nearest("q", {"b", "c", "a"}) == "Known: a, b, c."
    assert nearest("q", ["b", "a"]) == "Known: b, a."
    assert nearest("q", []) == "Known: none."
    many = [f"name{i}" for i in range(100)]
    assert nearest("name77", many, limit=3).endswith(" and 97 more.")
    texts = {
        refused(ValueError, "`rate`", lambda: tta.wrap(tiny("bn"), "tent", rate=1))
        for _ in range(3)
    }
    (text,) = texts
    fields = text[text.index("Known: ") + 7 :].split(", ")
    own = sorted(key for key in tta.get_config("tent").to_dict() if key != "name")
    listed = [field for field in fields if field in own]
    assert len(listed) > 3 and listed == [key for key in own if key in fields]


def test_the_small_batch_warning_recommends_something_else() -> None:
    for norm, others in (("bn", ["robust_bn", "unmix_tns"]), ("robust_bn", ["unmix_tns"])):
        net = nn.Sequential(
            nn.Conv2d(3, 4, 3), nn.AdaptiveAvgPool2d(1), nn.BatchNorm2d(4), nn.Flatten(),
            nn.Linear(4, 10),
        ).eval()  # fmt: skip
        with pytest.warns(UserWarning, match="use larger batches or ") as caught:
            tta.wrap(net, norm)(images(0, 1))
        text = str(caught[0].message)
        assert [n for n in ("robust_bn", "unmix_tns") if f"norm='{n}'" in text] == others


def _line_of(call: Any) -> tuple[str, str]:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        call()
    (one,) = caught
    return one.filename, Path(one.filename).read_text().splitlines()[one.lineno - 1].strip()


def test_warnings_point_at_the_callers_line() -> None:
    here = __file__
    spoiled = images(0)
    spoiled[0] = NAN

    def wrapped() -> None:
        tta.wrap(tiny("bn"), "tent")  # here: wrap

    def small() -> None:
        adapter(images(0, 1))  # here: one image

    def nested() -> None:
        inside(spoiled)  # here: inside torch

    def ungraded() -> None:
        with torch.no_grad():
            adapter(spoiled)  # here: no_grad

    for call, mark in (
        (wrapped, "wrap"),
        (small, "one image"),
        (nested, "inside torch"),
        (ungraded, "no_grad"),
    ):
        adapter = tta.wrap(tiny("bn"), "bn")
        inside = nn.Sequential(nn.Identity(), nn.Sequential(adapter))
        filename, line = _line_of(call)
        assert filename == here and line.endswith(f"# here: {mark}"), (filename, line)


def test_a_report_reads_the_same_every_way() -> None:
    adapter = tta.wrap(tiny("bn"), "eata.cifar10", source=source_batches())
    adapter(images(0))
    rows = adapter.report.kept  # one figure of each image stays a tensor
    report = tta.Report({k: v for k, v in adapter.report.raw().items() if k != "kept"})
    assert rows.shape == (BATCH,) and rows.dtype == torch.bool
    assert int(rows.sum()) == adapter.report.selected
    assert any(isinstance(v, torch.Tensor) for v in report.raw().values())
    expected = {key: report[key] for key in report}
    assert all(isinstance(v, (bool, int, float)) for v in expected.values())
    for read in (
        dict(report),
        dict(report.items()),
        {**report},
        dict(zip(report, report.values(), strict=True)),
        dict(report.copy()),
        {k: report.get(k) for k in report},
        {k: getattr(report, k) for k in report},
        json.loads(json.dumps(report)),
        eval(repr(report), {"nan": NAN}),
    ):
        assert read.keys() == expected.keys()
        for key, value in read.items():
            assert type(value) is type(expected[key]) and (value == expected[key] or value != value)
    assert any(isinstance(v, torch.Tensor) for v in report.copy().raw().values())
