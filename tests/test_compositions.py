"""Which norm and output rules go with which update: all are tried, and the documents say it.

``python -m tests.test_compositions`` writes the table in ``docs/composition.md`` anew.
"""

from __future__ import annotations

import sys
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch

import tta
from experiments.records import markdown
from tests.helpers.batches import images
from tests.helpers.compositions import arguments
from tests.helpers.nets import tiny

PAGE = Path(__file__).parents[1] / "docs" / "composition.md"
START, END = "<!-- compositions -->", "<!-- /compositions -->"
FAMILIES = {"bn": "BatchNorm", "gn": "GroupNorm", "ln": "LayerNorm"}


def _runs(family: str, **named: str) -> bool:
    """Whether the components adapt together (True) or are refused at wrap with a reason (False)."""
    net = tiny(family)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            adapter = tta.wrap(net, **arguments(named))
            logits = [adapter(images(t)) for t in range(2)]
    except ValueError as refusal:
        assert str(refusal).startswith("`") and len(str(refusal)) <= 300
        return False
    assert all(y.shape == (len(images(0)), 10) and torch.isfinite(y).all() for y in logits)
    return True


def _cell(family: str, update: str, slot: str) -> str:
    """In words which components of a slot go with an update on a family of norm layers."""
    names = tta.list_methods(slot=slot)
    going = [name for name in names if _runs(family, update=update, **{slot: name})]
    left_out = [name for name in names if name not in going]
    few = going if len(going) < len(left_out) else left_out
    listed = ", ".join(f"`{name}`" for name in few)
    if not left_out or not going:
        return "none" if left_out else "all"
    return listed if few is going else f"all but {listed}"


def table() -> str:
    """Markdown: a row for updates of which the same is true, two columns for each norm family."""
    by_cells: dict[tuple[str, ...], list[str]] = {}
    for update in tta.list_methods(slot="update"):
        cells = tuple(
            _cell(family, update, slot) for family in FAMILIES for slot in ("norm", "output")
        )
        by_cells.setdefault(cells, []).append(f"`{update}`")
    header = [f"{name}: {slot}" for name in FAMILIES.values() for slot in ("norm", "output")]
    rows = [[", ".join(updates), *cells] for cells, updates in by_cells.items()]
    return "\n".join(markdown.table(["update", *header], rows, "l" * 7)) + "\n"


def _page_with(part: str) -> str:
    text = PAGE.read_text()
    before, rest = text.split(START)
    return f"{before}{START}\n{part}{END}{rest.split(END)[1]}"


@pytest.mark.slow
def test_the_table_of_compositions_is_what_happens() -> None:
    assert PAGE.read_text() == _page_with(table()), (
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


@pytest.mark.parametrize("update", ["cotta", "deyo", "petal", "roid"])
def test_views_and_teachers_do_not_move_the_components_of_unmix_tns(update) -> None:
    """One batch moves them by the pass over it alone: as far as tent's, which has no other."""
    moved = {}
    for name in ("tent", update):
        given = arguments({"update": name})
        adapter = tta.wrap(tiny("bn"), norm="unmix_tns.cifar10", **given)
        start = adapter.state()
        adapter(images(0))
        moved[name] = {k: v for k, v in adapter.state().items() if k.startswith("norm/")}
    assert any(not torch.equal(start[key], value) for key, value in moved[update].items())
    assert moved["tent"].keys() == moved[update].keys()
    for key, value in moved["tent"].items():
        torch.testing.assert_close(moved[update][key], value)


if __name__ == "__main__":
    PAGE.write_text(_page_with(table()))
    sys.exit(0)
