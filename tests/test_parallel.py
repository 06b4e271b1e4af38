"""Batches shared by several processes: what one process gives, on every rank."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
import torch.distributed as dist

import tta
from experiments.records.file import read_lines
from tests.helpers import ranks
from tests.helpers.compositions import ALONE, SAMPLED_PAIRS, SAMPLED_TRIPLES, components
from tests.helpers.nets import batch_statistics, tiny
from tta.core.batch_split import Ranks, Split
from tta.runtime.parallel import split_batches

pytestmark = pytest.mark.skipif(not dist.is_gloo_available(), reason="needs gloo")

# Largest difference of logits and states, by their size: sums in another order, after four large
# steps, of which each magnifies what the last one left.
CLOSE = 5e-4


def close(a: torch.Tensor, b: torch.Tensor) -> bool:
    return ranks.close(a, b, CLOSE)


def check(cases, size, tmp_path, *more):
    """Compare the cases on so many ranks with one process; the same ranks do more afterwards."""
    cases = [case for case in cases if all(cls.splits for cls in components(case))]
    works = [(ranks.all_cases, (cases, str(tmp_path))), *((work, ()) for work in more)]
    ranks.run_ranks(size, ranks.in_turn, works)
    found = [torch.load(tmp_path / f"{rank}.pt") for rank in range(size)]
    for number, case in enumerate(cases):
        alone, shared = ranks.outcome(case), [rank[number] for rank in found]
        for a, b in zip(alone["logits"], shared[0]["logits"], strict=True):
            assert close(a, b), case
        for a, b in zip(alone["reports"], shared[0]["reports"], strict=True):
            assert a["selected"] == b["selected"] and a["stepped"] == b["stepped"], case
        for key, value in alone["state"].items():
            assert close(value, shared[0]["state"][key]), (case, key)
            # Not merely close: ranks that drift apart would decide differently one day.
            for other in shared[1:]:
                torch.testing.assert_close(
                    other["state"][key], shared[0]["state"][key], rtol=0, atol=0, equal_nan=True
                )


def test_two_ranks_give_what_one_gives_copy_themselves_and_refuse(tmp_path):
    check(ALONE, 2, tmp_path, ranks.copies, ranks.refusals)


@pytest.mark.slow
def test_three_ranks_give_what_one_gives_in_any_composition(tmp_path):
    check((SAMPLED_PAIRS + SAMPLED_TRIPLES)[::10], 3, tmp_path)


def test_shares_differ_by_a_row_and_leave_none_out():
    group = Ranks.__new__(Ranks)
    group.size = 3
    for rows in range(3, 12):
        taken = []
        for group.rank in range(3):
            taken += list(range(rows))[Split(group, rows).own]
        assert taken == list(range(rows))
        assert max(Split(group, rows).sizes) - min(Split(group, rows).sizes) <= 1


def test_without_a_group_of_processes_it_is_refused():
    with pytest.raises(RuntimeError, match="init_process_group"):
        split_batches(tta.wrap(tiny("bn"), "bn"))


def test_norm_layers_without_a_rule_would_see_a_share_only():
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        with pytest.raises(ValueError, match="norm='bn'"):
            split_batches(tta.wrap(batch_statistics(tiny("bn")), "source"))
    finally:
        dist.destroy_process_group()


@pytest.mark.slow
def test_a_run_under_torchrun_is_that_of_one_process_and_goes_on(tmp_path):
    methods = ["source", "unmix_tns+eata+lame", "sar"]
    flags = ["run", "--images", "60", "--corruptions", "fog", "contrast", "--device", "cpu"]
    flags += ["--scenario", "continual", "--batch-size", "25", "--methods", *methods]
    torchrun = ["torch.distributed.run", "--nproc-per-node", "2", "-m"]

    def rows(folder):
        found = list(read_lines(next(folder.glob("*/results.jsonl")), "batch"))
        return {(row["method"], row["step"]): row for row in found}

    def run(folder, *module):
        command = [sys.executable, "-m", *module, "experiments", *flags, "--output", str(folder)]
        done = subprocess.run(command, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stderr
        return done.stdout

    run(tmp_path / "one")
    assert run(tmp_path / "two", *torchrun).count("Results, TensorBoard") == 1
    one, two = rows(tmp_path / "one"), rows(tmp_path / "two")
    assert one.keys() == two.keys()
    for key, row in one.items():
        for name in ("errors", "selected", "resets", "images"):
            assert row[name] == two[key][name], (key, name)
        assert two[key]["nll"] == pytest.approx(row["nll"], rel=1e-2)
    # Cut off, it goes on on both ranks.
    (path,) = (tmp_path / "two").glob("*/results.jsonl")
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(b"".join(lines[: len(lines) // 2]) + b'{"kind": "ba')
    assert "continuing" in run(tmp_path / "two", *torchrun)
    assert {k: r["errors"] for k, r in rows(tmp_path / "two").items()} == {
        k: r["errors"] for k, r in two.items()
    }
