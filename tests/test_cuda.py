"""The same on a GPU as on the CPU: adapters, saved states, corruptions, streams, runs, pipelines.

All of it needs a CUDA device and is skipped where there is none:
``python -m pytest -m gpu tests``.
"""

from __future__ import annotations

import json
import os
import threading

import pytest
import torch

import corruptions
import tta
from experiments.cli import main
from experiments.records.file import read_lines
from tests.helpers import ranks
from tests.helpers.batches import images, source_batches
from tests.helpers.capturable import LEARNING, RECIPES, named
from tests.helpers.compositions import CASES
from tests.helpers.exported import make
from tests.helpers.nets import tiny
from tests.helpers.traces import TRACES, Trace
from tta.runtime import Pipeline
from tta.runtime.capturing import Captured, CudaGraph, NotCapturedError

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

CLOSE = 2e-3  # largest difference of logits and states, by their size, after four batches
ALL = corruptions.list_corruptions(extra=True)


@pytest.fixture(autouse=True)
def _whole_float32():
    """Convolutions in whole float32: TF32, torch's default, has 10 bits of it."""
    before = torch.backends.cudnn.allow_tf32
    torch.backends.cudnn.allow_tf32 = False
    yield
    torch.backends.cudnn.allow_tf32 = before


def close(a: torch.Tensor, b: torch.Tensor) -> bool:
    return ranks.close(a, b, CLOSE)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_every_composition_gives_what_it_gives_on_the_cpu(case) -> None:
    here, there = ranks.outcome(case), ranks.outcome(case, device="cuda")
    # Votes of the nearest of many features that are nearly the same change with any rounding.
    least = 0.75 if any("adanpc" in name for name in case[1].values()) else 1.0
    for a, b in zip(here["logits"], there["logits"], strict=True):
        assert close(a, b) if least == 1 else (a - b).abs().lt(0.01).float().mean() >= least
    for a, b in zip(here["reports"], there["reports"], strict=True):
        assert a["selected"] == b["selected"] and a["stepped"] == b["stepped"]
    assert here["state"].keys() == there["state"].keys()
    for key, value in here["state"].items():
        assert least < 1 or close(value, there["state"][key]), key


@pytest.mark.parametrize("path", TRACES, ids=lambda p: p.stem)
def test_traces_of_official_code(path, monkeypatch) -> None:
    trace, model = Trace(path), Trace.model
    monkeypatch.setattr(Trace, "model", lambda self: model(self).cuda())
    for key, adapter in trace.adapters():
        for t, x in enumerate(trace.tensor("inputs")):
            if trace.params.get("episodic") or t in trace.params.get("reset_before", []):
                adapter.reset()
            y = adapter(x.cuda()).cpu()
            y = y.exp() if trace.hparams["method"] == "lame" else y
            torch.testing.assert_close(y, trace.tensor(key)[t], atol=2e-3, rtol=1e-3)


@pytest.mark.parametrize("recipe", ["eata", "sar", "cotta", "rotta", "unmix_tns"])
def test_a_state_goes_on_where_it_is_loaded(recipe, tmp_path) -> None:
    def make(device):
        config = {"source": source_batches(), "mean": (0.0,) * 3, "std": (1.0,) * 3}
        return tta.wrap(tiny("bn").to(device), recipe, **config)

    here, there = make("cpu"), make("cuda")
    for t in range(3):
        there(images(t).cuda())
    torch.save(there.state(), tmp_path / "state.pt")
    here.load_state(torch.load(tmp_path / "state.pt", map_location="cpu", weights_only=False))
    assert close(here(images(3)), there(images(3).cuda()).cpu())
    there.reset()
    first = there(images(0).cuda())
    there.reset()
    assert torch.equal(there(images(0).cuda()), first)
    weights = tiny("bn").state_dict()
    assert all(torch.equal(v.cpu(), weights[k]) for k, v in there.unwrap().state_dict().items())


@pytest.mark.parametrize("recipe", ["bn", "tent.cifar10", "unmix_tns.cifar10", "lame"])
def test_layouts_and_precisions(recipe) -> None:
    expected = tta.wrap(tiny("bn").cuda(), recipe)
    last = tta.wrap(tiny("bn").cuda().to(memory_format=torch.channels_last), recipe)
    low = tta.wrap(tiny("bn").cuda(), recipe)
    brain = tta.wrap(tiny("bn").cuda().bfloat16(), recipe)
    for t in range(3):
        x = images(t).cuda()
        y = expected(x)
        assert close(last(x.to(memory_format=torch.channels_last)), y)
        with torch.autocast("cuda", torch.bfloat16):
            torch.testing.assert_close(low(x).float(), y, atol=0.15, rtol=0.1)
        assert torch.isfinite(brain(x.bfloat16())).all()


@pytest.mark.parametrize("side", [32, 48, 224])
@pytest.mark.parametrize("name", ALL)
def test_corruptions(name, side) -> None:
    generator = torch.Generator().manual_seed(3)
    batch = torch.randint(0, 256, (6, 3, side, side), generator=generator, dtype=torch.uint8)
    batch[3:] = (batch[3:] // 64) * 3 + torch.arange(side, dtype=torch.uint8)[:, None] // 2
    for severity in (1, 3, 5) if side == 32 else (3,):
        here = corruptions.corrupt(batch, name, severity, seeds=range(6))
        there = corruptions.corrupt(batch.cuda(), name, severity, seeds=range(6))
        assert there.device.type == "cuda"
        different = there.cpu() != here
        if os.environ.get("SHOW_DIFFERENCES"):
            size = (there.cpu().int() - here.int()).abs()
            print("DIFF", name, side, severity, f"{different.float().mean():.2e}", int(size.max()))
        assert different.float().mean() < 1e-3
    alone = corruptions.corrupt(batch[2:3].cuda(), name, 3, seeds=[2])
    assert torch.equal(alone, corruptions.corrupt(batch.cuda(), name, 3, seeds=range(6))[2:3])


def test_a_run_gives_the_errors_of_the_cpu_and_goes_on(tmp_path) -> None:
    def run(device):
        folder = tmp_path / device
        methods = ["source", "bn", "eata", "unmix_tns+lame", "rotta"]
        flags = ["run", "--images", "60", "--corruptions", "fog", "contrast", "gaussian_noise"]
        flags += ["--scenario", "continual", "--batch-size", "20", "--methods", *methods]
        assert main([*flags, "--device", device, "--quiet", "--output", str(folder)]) == 0
        (path,) = folder.glob("*/results.jsonl")
        return path, {(r["method"], r["step"]): r for r in read_lines(path, "batch")}

    _, here = run("cpu")
    path, there = run("cuda")
    assert here.keys() == there.keys()
    wrong = {
        d: sum(row["errors"] for row in rows.values())
        for d, rows in (("cpu", here), ("cuda", there))
    }
    assert wrong["cuda"] == pytest.approx(wrong["cpu"], rel=0.02)
    # Cut off, it goes on with the same numbers.
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(b"".join(lines[: len(lines) // 2]) + b'{"kind": "ba')
    _, again = run("cuda")
    assert json.dumps([r["errors"] for r in again.values()]) == json.dumps(
        [r["errors"] for r in there.values()]
    )


def test_streams_move_to_a_gpu_and_back(tmp_path) -> None:
    """On a GPU each stream is bitwise what it is alone; over a file, what it is on a CPU."""
    own = {name: tta.wrap(tiny("bn").cuda(), "tent.cifar10") for name in "ab"}
    pool = tta.runtime.StreamPool(
        tta.wrap(tiny("bn").cuda(), "tent.cifar10"), 1, tmp_path / "pool", interval=None
    )
    for number in range(4):
        for name, alone in own.items():
            batch = images(number).cuda()
            assert torch.equal(pool.stream(name, create=True)(batch), alone(batch))
    pool.close()
    on_cpu = tta.runtime.StreamPool.open(tiny("bn"), tmp_path / "pool", interval=None)
    for name, alone in own.items():
        state = on_cpu.stream(name).state()
        assert all(torch.equal(state[key], value.cpu()) for key, value in alone.state().items())
        logits = on_cpu.stream(name)(images(9))
        torch.testing.assert_close(logits, alone(images(9).cuda()).cpu(), rtol=CLOSE, atol=CLOSE)


@pytest.mark.parametrize("recipe", [recipe for recipe, _ in RECIPES] + LEARNING, ids=named)
def test_a_captured_step_gives_what_the_adapter_gives(recipe) -> None:
    one, other = make(recipe, tiny("bn").cuda()), make(recipe, tiny("bn").cuda())
    one(images(0).cuda()), other(images(0).cuda())
    captured = Captured(one, images(1).cuda(), CudaGraph(torch.device("cuda", 0)))
    for key, value in other.state().items():
        assert torch.equal(one.state()[key], value), key
    for number in range(1, 6):
        x = images(number).cuda()
        logits = captured.serve(x)
        assert logits is not None and close(logits, other(x))
        assert one.report["seen"] == len(x)
    for key, value in other.state().items():
        assert close(one.state()[key], value), key


def test_what_waits_for_values_is_not_captured_and_the_device_goes_on() -> None:
    one = tta.wrap(tiny("bn").cuda(), "lame")
    one(images(0).cuda())
    with pytest.raises(NotCapturedError):
        Captured(one, images(0).cuda(), CudaGraph(torch.device("cuda", 0)))
    assert torch.isfinite(one(images(1).cuda())).all()


@pytest.mark.parametrize("options", [{}, {"graphs": True}, {"staleness": 2}], ids=str)
@pytest.mark.parametrize("recipe", ["unmix_tns", "tent.cifar10", "sar"])
def test_a_pipeline_gives_what_a_loop_gives(recipe, options) -> None:
    """Bit for bit but for graphs, and with staleness in the end; while others use the device."""
    frames = torch.cat([images(number) for number in range(8)]).cpu()
    batches = frames.split(8)
    one, own = (tta.wrap(tiny("bn").cuda(), recipe) for _ in range(2))
    expected = torch.cat([own(batch.cuda()).softmax(1).cpu() for batch in batches])
    done = threading.Event()

    def disturb() -> None:
        while not done.is_set():
            torch.ones(512, 512, device="cuda").sum().item()

    other = threading.Thread(target=disturb)
    other.start()
    try:
        pipeline = Pipeline(one, frames, batch_size=8, workers=2, **options)
        results = list(pipeline)
    finally:
        done.set()
        other.join()
    found = torch.stack([result.probabilities for result in results])
    if "staleness" in options:
        assert found.shape == expected.shape and torch.isfinite(found).all()
    else:
        assert (found - expected).abs().max() < (CLOSE if options else 1e-6)
    for key, value in own.state().items():
        same = close(one.state()[key], value)
        assert same if options else same and torch.equal(one.state()[key], value), key
    if "graphs" in options:
        assert ("are captured" in pipeline.graphs) == (recipe != "sar")


def test_the_study_of_a_gpu_runs(tmp_path) -> None:
    flags = ["--quick", "--device", "cuda", "--results", str(tmp_path / "gpu.jsonl")]
    assert main(["gpu", *flags]) == 0
    rows = [json.loads(line) for line in (tmp_path / "gpu.jsonl").read_text().splitlines()]
    assert all(row["difference"] < CLOSE for row in rows if row["part"] == "agreement")
