"""The table of trace keys: every key of every public trace, and nothing that is in none."""

from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np
import pytest

from tests.helpers.trace_keys import ARRAYS, HPARAMS, entries, figures, unknown

GOLDEN = Path(__file__).parent / "golden"
BEGINNINGS = "model|stream|wrap|source|field|call|output|report|state|constant|piece|none"
# The README or the code of the traces speaks of them, for traces that are not here.
NOT_IN_PUBLIC = {"params.inner", r"params\.tent_cfg\..*", "eps_ball", "mean"}


def _keys(which: str) -> tuple[set[str], set[str]]:
    """Keys of the arrays and of the JSON in all traces of a set."""
    arrays, hparams = set(), set()
    for path in sorted((GOLDEN / which).glob("*.npz")):
        with np.load(path) as file:
            arrays |= set(file.files)
            text = file["hparams_json" if which == "set-b" else "hparams"]
            hparams |= set(entries(json.loads(str(text))))
    return arrays, hparams


@pytest.mark.parametrize("which", ARRAYS)
def test_every_key_is_in_the_table(which: str) -> None:
    arrays, hparams = _keys(which)
    assert len(arrays) > 30 and len(hparams) > 5
    assert not unknown(sorted(arrays), ARRAYS[which])
    assert not unknown(sorted(hparams), HPARAMS[which])


@pytest.mark.parametrize("which", ARRAYS)
def test_every_entry_is_of_some_trace(which: str) -> None:
    for keys, table in zip(_keys(which), (ARRAYS[which], HPARAMS[which]), strict=True):
        heads = {key.partition("/")[0] for key in keys}
        for pattern, meaning in table.items():
            assert re.match(rf"({BEGINNINGS})\b", meaning), meaning
            found = any(re.fullmatch(pattern, head) for head in heads)
            assert found or pattern in NOT_IN_PUBLIC, pattern


def test_a_key_that_is_missing_is_found() -> None:
    assert unknown(["inputs", "inputs_2/a"], ARRAYS["set-a"]) == {"inputs_2"}
    assert entries({"a": {"b": 1}, "c": []}) == ["a.b", "c"]
    assert figures("set-a")["n_filter2"] == "selected_second"
