"""``python -m experiments tune``: choose a method's fields without the test stream.

The field's accepted protocol: candidates are compared, with labels, on the four corruptions that
are held out of the benchmark's 15 (Hendrycks and Dietterich 2019; for test-time adaptation advised
by the authors of TENT). Data that does not have these has other domains held out by ``--held-out``,
and the run is on the rest. What was tried and what came out is written beside the choice, and
``run --tuned FILE`` puts all of it into the results of the run that uses it.
"""

from __future__ import annotations

import argparse
import itertools
import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import tta
from experiments.records.config import BASELINE, SweepConfig
from experiments.report.collect import collect
from experiments.report.statistics import over_seeds
from experiments.run.flags import add_settings, parse_value, settings_flags
from experiments.run.method_strings import parse_method
from experiments.run.settings import make_sweep
from experiments.run.subject import load_subject, pick_device, subject_arguments
from experiments.sweep.sweep import Sweep, add_workers, pick_executor
from experiments.sweep.workers import Outcome
from tta.core.checks import shown
from tta.core.config import UpdateConfig
from tta.core.files import replacing
from tta.runtime.method_strings import PLUS

__all__ = ["HELD_OUT", "Tune", "add_flags", "candidates", "with_fields"]

HELD_OUT = ("speckle_noise", "gaussian_blur", "spatter", "saturate")
FACTORS = (0.1, 0.3, 1.0, 3.0, 10.0)  # of the learning rate, where no grid is given


def add_flags(parser: argparse.ArgumentParser) -> None:
    """Say what ``tune`` does and takes."""
    parser.description = (
        "Compare values of a method's fields on the four corruptions that are no part "
        "of the benchmark, or on other domains that are held out, and write the choice to "
        "tuned.json, for run --tuned."
    )
    add = parser.add_argument
    add("method", help="such as eata or unmix_tns+eata")
    add_settings(parser, methods=False)
    add(
        "--grid",
        action="append",
        default=[],
        metavar="FIELD=V1,V2,...",
        help="values of a field; may be repeated (default: the learning rate times "
        + ", ".join(f"{factor:g}" for factor in FACTORS)
        + ")",
    )
    add(
        "--held-out",
        nargs="+",
        metavar="NAME",
        help="domains to tune on, which are no part of the stream that the method is tested on "
        f"(default: {' '.join(HELD_OUT)})",
    )
    add("--seeds", nargs="+", type=int, metavar="N", help="default: 0")
    add("--name", help="the folder's name (default: tune-METHOD)")
    add("--output", type=Path, default=Path("runs"), help="where the folder is made")
    add("--quiet", action="store_true", help="print only the choice")
    add_workers(parser)
    parser.set_defaults(prepare=_prepare)


def _prepare(args: argparse.Namespace) -> Tune:
    args.methods = [args.method]
    held_out = tuple(args.held_out or HELD_OUT)
    args.corruptions = args.corruptions or list(held_out)
    args.scenario = args.scenario or "continual"
    args.name = args.name or f"tune-{args.method}"
    settings, flags = settings_flags(args)
    config = make_sweep(settings, {**flags, "seeds": args.seeds})
    names = config.run.streams[0].domains
    if set(names) - set(held_out):
        raise ValueError(
            f"`corruptions` must be held out ({' '.join(held_out)}), got {' '.join(names)}: what "
            "is chosen on the benchmark's own corruptions is no result on them; --held-out names "
            "other domains to tune on"
        )
    stored = _subject(config).data.stored
    if stored and set(names) - set(stored):
        lacking = [name for name in names if name not in stored]
        raise ValueError(
            f"`held-out` must be domains of {config.run.data}, which has no {' or '.join(lacking)}:"
            f" name those of its domains to tune on ({' '.join(stored)}), by --held-out, and test "
            "on the others"
        )
    grid = dict(_axis(text) for text in args.grid) or {"lr": _learning_rates(config)}
    methods = candidates(args.method, grid)
    classes = load_classes(config)
    for method in methods:
        parse_method(method, classes)
    config = replace(config, run=replace(config.run, methods=tuple(methods)))
    deadline = None if args.budget_minutes is None else time.time() + 60 * args.budget_minutes
    sweep = Sweep(
        config, args.output, pick_executor(args), args.threads, args.retries, deadline, args.quiet
    )
    return Tune(args.method, grid, config, sweep)


class Tune:
    """A choice among candidates.

    Args:
        method: As it is without a choice.
        grid: Values by field.
        config: Of all candidates.
        sweep: Runs them.
    """

    def __init__(
        self, method: str, grid: Mapping[str, Sequence[Any]], config: SweepConfig, sweep: Sweep
    ) -> None:
        self.method = method
        self.grid = grid
        self.config = config
        self.sweep = sweep

    def execute(self) -> list[Outcome]:
        """Run the candidates and write the choice, if all came to their end."""
        left = self.sweep.execute()
        if left:
            print(f"no choice yet: {len(left)} runs are not done")
            return left
        config = self.config
        results = collect([cell.folder for cell in self.sweep.cells])
        errors = {
            method: over_seeds(
                [result for result in results if result.method == method],
                lambda result: result.summary["mean_error"],
            )
            for method in config.run.methods
        }
        ranked = sorted(errors, key=lambda method: (errors[method].mean, method))  # type: ignore[union-attr]
        choice = {
            "method": self.method,
            "chosen": ranked[0],
            "criterion": "mean error over held-out corruptions, with labels",
            "domains": list(config.run.streams[0].domains),
            "grid": {name: list(values) for name, values in self.grid.items()},
            "candidates": [
                {"method": method}
                | {name: getattr(errors[method], name) for name in ("mean", "half", "count")}
                for method in ranked
            ],
            "runs": config.run.to_dict() | {"methods": [], "seeds": list(config.seeds)},
        }
        path = self.sweep.folder / "tuned.json"
        with replacing(path) as part:
            part.write_text(json.dumps(choice, indent=2) + "\n")
        for method in ranked:
            estimate = errors[method]
            assert estimate is not None
            print(f"{estimate.text(100):>14} % error  {method}")
        print(f"chosen: {ranked[0]}\npython -m experiments run --tuned {path}")
        return []


def candidates(method: str, grid: Mapping[str, Sequence[Any]]) -> list[str]:
    """The method as it is, and with every combination of values.

    >>> candidates("bn+tent", {"lr": [0.1, 0.01]})
    ['bn+tent', 'bn+tent[lr=0.1]', 'bn+tent[lr=0.01]']
    """
    combinations = itertools.product(*grid.values())
    changed = [with_fields(method, dict(zip(grid, c, strict=True))) for c in combinations]
    return list(dict.fromkeys([method, *changed]))


def with_fields(method: str, values: Mapping[str, Any]) -> str:
    """The method string with fields set, each at the component that has it.

    Raises:
        ValueError: For a field that none of the components has.
    """
    parts = [part.strip() for part in PLUS.split(method)]
    left = dict(values)
    for number, part in enumerate(parts):
        name, bracket, inside = part.partition("[")
        known = {f.name for f in fields(tta.get_config(name))} if name != BASELINE else set()
        own = [f"{key}={left.pop(key)!r}" for key in list(left) if key in known]
        if own:
            before = [inside.removesuffix("]")] if bracket else []
            parts[number] = f"{name}[{', '.join([*before, *own])}]"
    if left:
        raise ValueError(f"`grid` must name fields of {method}, got {', '.join(left)}")
    return "+".join(parts)


def load_classes(config: SweepConfig) -> int:
    """The number of classes of the sweep's model."""
    return _subject(config).info.num_classes


def _subject(config: SweepConfig) -> Any:
    run = config.run
    return load_subject(*subject_arguments(run, pick_device(run.device)))


def _axis(text: str) -> tuple[str, list[Any]]:
    name, equals, values = text.partition("=")
    if not equals or not values:
        raise ValueError(f"`grid` must be FIELD=V1,V2,..., got {shown(text)}: such as lr=1e-3,1e-4")
    return name.strip(), [parse_value(value.strip()) for value in values.split(",")]


def _learning_rates(config: SweepConfig) -> list[float]:
    """Multiples of the rate that the method has for this model and batch size."""
    subject, run = _subject(config), config.run
    method = parse_method(run.methods[0], subject.info.num_classes)
    adapter = method.wrap_subject(subject, run.streams[0].size(run.batch_size), run.seed)
    update = adapter.config.update
    adapter.unwrap()
    if not isinstance(update, UpdateConfig):
        raise ValueError(
            f"`grid` must be given for {method.label}, which has no learning rate: FIELD=V1,V2,..."
        )
    return [float(f"{factor * update.lr:.3g}") for factor in FACTORS]
