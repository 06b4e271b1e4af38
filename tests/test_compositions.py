"""Which norm rule goes with which update and output: all are tried, and the documents say it.

``python -m tests.test_compositions`` writes the table in ``docs/composition.md`` anew.
"""

from __future__ import annotations

import itertools
import sys
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch

import tta
from tests.helpers.batches import images
from tests.helpers.compositions import arguments
from tests.helpers.nets import tiny

PAGE = Path(__file__).parents[1] / "docs" / "composition.md"
START, END = "<!-- compositions -->", "<!-- /compositions -->"
FAMILIES = {"bn": "BatchNorm", "gn": "GroupNorm", "ln": "LayerNorm"}


def _choices(slot: str) -> list[str]:
    return ["source", *tta.list_methods(slot=slot)]


def _runs(family: str, norm: str, update: str, output: str) -> bool:
    """Whether the composition adapts (True) or is refused at wrap with a reason (False)."""
    named = {"norm": norm, "update": update, "output": output}
    parts = arguments({slot: name for slot, name in named.items() if name != "source"})
    parts |= {slot: "source" for slot, name in named.items() if name == "source"}
    net = tiny(family)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            adapter = tta.wrap(net, **parts)
            logits = [adapter(images(t)) for t in range(2)]
    except ValueError as refusal:
        assert "`norm`" in str(refusal) and "must find BatchNorm" in str(refusal)
        return False
    assert all(y.shape == (len(images(0)), 10) and torch.isfinite(y).all() for y in logits)
    return True


def _tried() -> dict[tuple[str, str, str, str], bool]:
    slots = [_choices(slot) for slot in ("norm", "update", "output")]
    return {key: _runs(*key) for key in itertools.product(FAMILIES, *slots)}


def table(tried: dict[tuple[str, str, str, str], bool]) -> str:
    """Markdown: a row for each norm rule and update, a column for each norm family."""
    outputs = _choices("output")

    def cell(family: str, norm: str, update: str) -> str:
        running = [o for o in outputs if tried[family, norm, update, o]]
        if len(running) == len(outputs):
            return "all outputs"
        return ", ".join(f"`{o}`" for o in running) or "refused: no BatchNorm"

    lines = [f"| norm | update | {' | '.join(FAMILIES.values())} |", "|---|---|---|---|---|"]
    for norm in _choices("norm"):
        by_cells: dict[tuple[str, ...], list[str]] = {}
        for update in _choices("update"):
            cells = tuple(cell(family, norm, update) for family in FAMILIES)
            by_cells.setdefault(cells, []).append(f"`{update}`")
        lines += [
            f"| `{norm}` | {', '.join(updates)} | {' | '.join(cells)} |"
            for cells, updates in by_cells.items()
        ]
    count = f"{sum(tried.values())} of {len(tried)} compositions run, {len(outputs)} outputs each: "
    return count + ", ".join(f"`{o}`" for o in outputs) + ".\n\n" + "\n".join(lines) + "\n"


def _page_with(part: str) -> str:
    text = PAGE.read_text()
    before, rest = text.split(START)
    return f"{before}{START}\n{part}{END}{rest.split(END)[1]}"


@pytest.mark.slow
def test_the_table_of_compositions_is_what_happens() -> None:
    assert PAGE.read_text() == _page_with(table(_tried())), (
        "run `python -m tests.test_compositions` and look at what changed"
    )


@pytest.mark.parametrize(
    ("arguments_", "words"),
    [
        ({"norm": "lame"}, "'lame', which belongs to output"),
        ({"recipe": "tent", "norm": "bn", "output": "alpha_bn"}, "'alpha_bn', which belongs to"),
    ],
)
def test_a_component_in_another_slot_is_refused(arguments_: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        tta.wrap(tiny("bn"), **arguments_)


if __name__ == "__main__":
    PAGE.write_text(_page_with(table(_tried())))
    sys.exit(0)
