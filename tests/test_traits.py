"""What sets a method, a scenario or a network apart is declared in its own file, and asked there.

No other file compares a string with the name of one: a trait is an attribute or a method of the
class or the entry that has the name. Tables by name are data and are allowed.
"""

from __future__ import annotations

import ast
import inspect
from pathlib import Path

import pytest

import models
import tta
from tta.core.registry import component

ROOT = Path(__file__).parents[1]
PACKAGES = ("tta", "corruptions", "models", "experiments")
CALLS = {"startswith", "endswith", "removeprefix", "removesuffix", "fnmatch", "match", "fullmatch"}
# The model without adaptation, with which every table and plot compares: no method of its own.
BASELINE = "source"
# Names of other things, which happen to be called like a method or a scenario.
OTHER_THINGS = {
    "tta/__init__.py": {"core"},  # a room of the package, and a method
    # Values of other arguments that leave a choice to the library.
    "tta/streams/arrangements.py": {"auto"},
    "corruptions/severity.py": {"auto"},
    # The name of a stream in the table of another study, which is called after its scenario.
    "experiments/studies/estimators.py": {"recurring"},
    # Streams in the benchmark's own table, each of which is called after its scenario.
    "experiments/sweep/benchmark.py": {"continual", "dirichlet", "mixed", "recurring"},
}


def owners() -> dict[str, Path]:
    """The names that are registered, each with its own file."""
    found = {
        name: Path(inspect.getfile(component(name)))
        for name in tta.list_methods()
        if name != BASELINE
    }
    scenarios = ROOT / "tta" / "streams" / "scenarios.py"
    networks = ROOT / "models" / "bundled.py"
    found |= dict.fromkeys(tta.streams.list_scenarios(), scenarios)
    return found | dict.fromkeys(models.list_models(), networks)


def strings(node: ast.AST, constants: dict[str, ast.AST]) -> set[str]:
    """The strings in an expression, and in constants of the module that it names."""
    found: set[str] = set()
    for part in ast.walk(node):
        if isinstance(part, ast.Constant) and isinstance(part.value, str):
            found.add(part.value)
        elif isinstance(part, ast.Name) and part.id in constants:
            found |= strings(constants[part.id], {})
    return found


def comparisons(source: str) -> list[tuple[int, str]]:
    """(line, string) of each string that something is compared with in a source text."""
    tree = ast.parse(source)
    constants: dict[str, ast.AST] = {}
    for statement in tree.body:
        plain = isinstance(statement, ast.Assign)
        value = statement.value if plain or isinstance(statement, ast.AnnAssign) else None
        targets = statement.targets if plain else [getattr(statement, "target", None)]
        # Strings and collections of strings; a dictionary from names to traits is a table.
        if isinstance(value, (ast.Constant, ast.Tuple, ast.List, ast.Set)):
            constants |= {t.id: value for t in targets if isinstance(t, ast.Name)}
    found: set[tuple[int, str]] = set()
    for node in ast.walk(tree):
        compared: list[ast.AST] = []
        if isinstance(node, ast.Compare):
            compared = [node.left, *node.comparators]
        elif isinstance(node, ast.Call):
            called = getattr(node.func, "attr", getattr(node.func, "id", ""))
            compared = list(node.args) if called in CALLS else []
        elif isinstance(node, ast.match_case):
            compared = [node.pattern]
        line = getattr(node, "lineno", 0) or getattr(getattr(node, "pattern", None), "lineno", 0)
        found |= {(line, text) for part in compared for text in strings(part, constants)}
    return sorted(found)


@pytest.mark.parametrize(
    "source",
    [
        "if config.name == 'eata': pass",
        "x = 1 if 'eata' != name else 2",
        "found = [m for m in methods if m not in ('tent', 'eata')]",
        "SOME = ('eata', 'tent')\nif name in SOME: pass",
        "if name.startswith('eata'): pass",
        "match name:\n    case 'eata' | 'tent':\n        pass",
    ],
)
def test_comparisons_are_found(source):
    assert "eata" in {text for _, text in comparisons(source)}


def test_tables_and_keywords_are_no_comparisons():
    assert comparisons("COSTS = {'eata': 3}\nx = COSTS['eata']\ntta.wrap(net, 'eata')") == []


@pytest.mark.parametrize("package", PACKAGES)
def test_no_name_is_compared_outside_its_own_file(package):
    own = owners()
    assert {"eata", "walk", "cifar10_resnet20_bn"} <= own.keys()
    found = [
        f"{path.relative_to(ROOT)}:{line} compares with {text!r}: declare a trait instead"
        for path in sorted((ROOT / package).rglob("*.py"))
        for line, text in comparisons(path.read_text())
        if text in own
        and path != own[text]
        and text not in OTHER_THINGS.get(str(path.relative_to(ROOT)), ())
    ]
    assert not found, "\n".join(found)


def test_costs_come_from_the_components():
    rules = [*tta.list_methods(slot="norm"), *tta.list_methods(slot="output")]
    cheap = {name for name in rules if not component(name).injects}  # others run the model
    assert all(0 < component(name).cost < 1 for name in cheap)
    assert all(component(name).cost >= 1 for name in tta.list_methods(slot="update"))
