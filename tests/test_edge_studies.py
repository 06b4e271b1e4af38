"""Studies of exported graphs: rows that stay, tables, what they measure."""

from __future__ import annotations

import json

import pytest

from experiments.records.rows import Rows
from experiments.studies.edge_int8 import DOMAINS, EdgeInt8


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
