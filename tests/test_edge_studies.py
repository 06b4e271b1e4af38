"""Studies of exported graphs: rows that stay, tables, what they measure."""

from __future__ import annotations

import json

import pytest
import torch

from experiments.records.rows import Rows
from experiments.studies.device_cost import DeviceCost
from experiments.studies.edge_cost import EdgeCost
from experiments.studies.edge_int8 import DOMAINS, EdgeInt8
from experiments.studies.tuned import Tuned


def test_rows_are_found_by_their_keys_and_replaced(tmp_path) -> None:
    path = tmp_path / "rows.jsonl"
    rows = Rows(path, ("a", "b"))
    rows.put({"a": 1, "b": "x", "value": 1})
    rows.put({"a": 2, "b": "x", "value": 2})
    rows.put({"a": 1, "b": "x", "value": 3})
    again = Rows(path, ("a", "b"))
    assert [row["value"] for row in again.rows] == [3, 2]
    assert again.get({"a": 2, "b": "x", "c": 0}) == {"a": 2, "b": "x", "value": 2}
    assert again.get({"a": 3, "b": "x"}) is None
    path.write_text('{"a": 1}\n')
    with pytest.raises(ValueError, match="must hold rows with a, b"):
        Rows(path, ("a", "b"))


@pytest.mark.slow
def test_errors_in_8_bits_go_on_where_they_stopped(tmp_path, capsys) -> None:
    pytest.importorskip("onnxscript")
    page, results = tmp_path / "edge.md", tmp_path / "rows.jsonl"
    page.write_text("<!-- int8 -->\n<!-- /int8 -->\n")

    def study(**more):
        return EdgeInt8(["cifar10_resnet20_gn"], ["source", "bn"], 50, results=results, page=page,
                        **more)  # fmt: skip

    study().execute()
    source, bn = (json.loads(line) for line in results.read_text().splitlines())
    assert "must find BatchNorm" in bn["left_out"]
    assert source["int8_bytes"] < 0.5 * source["float32_bytes"]
    assert all(abs(source["int8"][d] - source["float32"][d]) <= 10 for d in DOMAINS)
    assert source["float32"]["clean"] < 20 < source["float32"]["gaussian_noise"]
    text = page.read_text()
    assert text.count("| `cifar10_resnet20_gn` | `source` |") == 1 and "`bn`" not in text
    capsys.readouterr()
    study().execute()
    assert "float32" not in capsys.readouterr().out  # nothing was measured


def test_recipes_on_a_device_are_measured_once(tmp_path, capsys) -> None:
    page, results = tmp_path / "budgets.md", tmp_path / "rows.jsonl"
    page.write_text("<!-- device -->\n<!-- /device -->\n")
    before = torch.get_num_threads()

    def study(methods, again=False):
        more = {"again": again, "results": results, "page": page}
        return DeviceCost(["test_resnet"], methods, [1, 2], [1], 3, 32, **more)

    study(["source"]).execute()
    study(["source", "robust_bn+tent"]).execute()
    rows = [json.loads(line) for line in results.read_text().splitlines()]
    assert [(r["method"], r["batch"], r["backwards"]) for r in rows] == [
        ("source", 1, 0), ("source", 2, 0), ("robust_bn+tent", 1, 1), ("robust_bn+tent", 2, 1),
    ]  # fmt: skip
    assert rows[2]["peak MB"] > rows[0]["peak MB"] and rows[2]["ratio"] > 1
    assert torch.get_num_threads() == before
    assert "batch 1, 1 thread | batch 2, 1 thread" in page.read_text()
    capsys.readouterr()
    study(["source"]).execute()
    assert "ratio" not in capsys.readouterr().out
    study(["source"], again=True).execute()
    assert capsys.readouterr().out.count("ratio") == 2
    with pytest.raises(ValueError, match="tentt"):
        study(["tentt"])


def test_gains_of_tuning_go_on_where_they_stopped(tmp_path, capsys) -> None:
    page, results = tmp_path / "budgets.md", tmp_path / "rows.jsonl"
    page.write_text("<!-- tuned -->\n<!-- /tuned -->\n")

    def study(methods):
        return Tuned(["cifar10_resnet20_bn"], methods, 0, 256, results=results, page=page)

    study(["bn"]).execute()
    study(["bn", "source"]).execute()
    rows = [json.loads(line) for line in results.read_text().splitlines()]
    assert [(r["method"], r["allowed"]) for r in rows] == [
        ("bn", "float32"), ("bn", "bfloat16"), ("source", "float32"), ("source", "bfloat16"),
    ]  # fmt: skip
    for row in rows:  # without time nothing is found, and plain is compared with plain
        assert row["equal"] == 1 and row["error"][0] == row["error"][1] > 0
        assert row["speedup"] > 0 and row["setting"]["threads"] is None
    text = page.read_text()
    assert (
        text.count("| `bn` |") == text.count("| `source` |") == 1
        and "100.0 %, +0.0 | plain" in text
    )
    capsys.readouterr()
    study(["bn"]).execute()
    assert "speedup" not in capsys.readouterr().out
    with pytest.raises(ValueError, match="`images` must"):
        Tuned(["cifar10_resnet20_bn"], ["bn"], 0, 100)


@pytest.mark.slow
def test_costs_are_those_of_processes_without_torch(tmp_path, capsys) -> None:
    pytest.importorskip("onnxscript")
    page, results = tmp_path / "edge.md", tmp_path / "rows.jsonl"
    page.write_text("<!-- cost -->\n<!-- /cost -->\n")

    def study(*methods):
        return EdgeCost(["test_resnet"], methods, 8, 32, results=results, page=page)

    study("source").execute()
    study("source", "neo").execute()
    rows = {row["method"]: row for row in map(json.loads, results.read_text().splitlines())}
    assert list(rows) == ["plain model", "source", "neo"]
    for row in rows.values():
        assert 0 < row["p50"] <= row["p95"] <= row["p99"] and row["file"] > 1e4
        assert 20 < row["peak"] < 400  # torch alone takes more
        assert row["peak_ratio"] < 1.3
    assert rows["plain model"]["p50_ratio"] == 1 and rows["plain model"]["processor"] > 0
    assert page.read_text().count("| `test_resnet` |") == 3
    capsys.readouterr()
    study("source", "neo").execute()
    assert "exporting" not in capsys.readouterr().out
