"""FOA: replaying its traces, the search, and what it does beyond them."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import tta
from tests.helpers.batches import images, source_batches
from tests.helpers.faults import same
from tests.helpers.nets import tiny
from tests.helpers.traces import GOLDEN, Trace
from tta.parts import cma
from tta.parts.losses import entropy
from tta.parts.moments import RunningMoments

# Its presets, as the papers have them, see `tests/test_presets.py`.
PRESETS = {
    "foa": {"prompts": 3, "population": 27, "sigma": 1.0, "search_seed": 2020},
    "foa.imagenet": {"fitness_weight": 0.4},
    "foa.imagenet_r": {"fitness_weight": 0.2},
    "foa_shift": {"momentum": 0.1, "balanced": False},
}

# What the keys of its traces are, see `tests/helpers/trace_keys.py`.
TRACE_KEYS = {
    "set-d": {
        "arrays": {
            "hist_after": "state: update/shift, output/shift; source_mean less this",
            "candidates": "wrap: draws=, but for the last, the former best",
            "fitness": "report.fitness",
            "best_index": "report.best",
            "shift_before": "state: update/shift, before the batch",
            "best_prompt_after": "state: update/best",
            "es_mean_after": "state: update/search_mean",
            "es_sigma_after": "state: update/search_sigma",
            "rank_slack": "none: provenance",
        },
        "hparams": {
            "params.popsize": "field: population",
            "params.fitness_lambda": "field: fitness_weight",
            "params.sigma0": "field: sigma",
            "params.cma_seed": "field: search_seed",
        },
    },
}

pytestmark = pytest.mark.filterwarnings("ignore:.*preset, made for:UserWarning")
LOGITS = {"atol": 5e-5, "rtol": 1e-4}
FITNESS = {"atol": 1e-3, "rtol": 0.0}
SEARCH = {"atol": 1e-5, "rtol": 0.0}
TRACES = sorted((GOLDEN / "set-d").glob("foa_ln_*.npz"))
close = torch.testing.assert_close


def _wrapped(net: Any = None, **fields: Any) -> tta.Adapter:
    fields = {"population": 4, "prompts": 2, "source": source_batches()} | fields
    return tta.wrap(tiny("ln") if net is None else net, "foa", **fields)


@pytest.mark.parametrize("path", TRACES, ids=lambda p: p.stem)
def test_trace(path: Path) -> None:
    trace = Trace(path)
    p, width = trace.params, trace.hparams["model"]["dim"]
    inputs = trace.tensor("source_inputs")
    parts = [(x, torch.zeros(len(x)).long()) for x in inputs.split(24)]
    source = tta.collect_source(trace.model(), parts, for_methods=["foa"])
    assert source.contents == ["layer_mean", "layer_std"]
    mean, std = (trace.tensor(f"source_{kind}").view(-1, width) for kind in ("mean", "std"))
    assert source.layer_mean is not None and source.layer_std is not None
    close(source.layer_mean, mean, **SEARCH)
    close(source.layer_std, std, **SEARCH)

    def draws(name: str, shape: torch.Size, call: int) -> Tensor:
        if name == "prompts_init":
            return trace.tensor("prompts_init")[0]
        assert name == "candidates"
        return trace.tensor("candidates")[call][:-1]

    adapter = tta.wrap(
        trace.model(),
        "foa",
        prompts=p["num_prompts"],
        population=p["popsize"],
        fitness_weight=p["fitness_lambda"],
        sigma=p["sigma0"],
        search_seed=p["cma_seed"],
        source=tta.SourceStatistics(layer_mean=mean, layer_std=std),
        draws=draws,
    )
    close(adapter.state()["update/best"], trace.tensor("prompts_init").flatten())
    for t, x in enumerate(trace.tensor("inputs")):
        with torch.no_grad():
            close(adapter.network(x).logits, trace.tensor("source_outputs")[t], **LOGITS)
        shift = trace.tensor("shift_before")[t]
        close(adapter.state()["update/shift"], shift, **SEARCH, equal_nan=True)
        close(adapter(x), trace.tensor("outputs")[t], **LOGITS)
        report, state = adapter.report, adapter.state()
        close(report.fitness, trace.tensor("fitness")[t], **FITNESS)
        assert report.best == trace.arrays["best_index"][t] and report.stepped
        close(state["update/shift"], mean[-1] - trace.tensor("hist_after")[t], **SEARCH)
        close(state["update/best"], trace.tensor("best_prompt_after")[t])
        close(state["update/search_mean"], trace.tensor("es_mean_after")[t], **SEARCH)
        close(state["update/search_sigma"], trace.tensor("es_sigma_after")[t], **SEARCH)


@pytest.mark.parametrize(("size", "population"), [(8, 10), (20, 27), (3, 4)])
def test_the_search_finds_the_minimum_of_a_narrow_valley(size: int, population: int) -> None:
    constants, state = cma.Constants(size, population), cma.start(size, 1.0)
    scales = torch.logspace(0, 3, size, dtype=torch.float64)
    aim = torch.linspace(-1, 1, size, dtype=torch.float64)
    draw = torch.Generator().manual_seed(0)
    while (state["mean"] - aim).abs().max() > 1e-4 and int(state["steps"]) < 20_000 // population:
        normals = torch.randn(population, size, generator=draw)
        solutions = cma.ask(state, normals)
        values = (scales * (solutions - aim)).square().sum(1)
        cma.tell(state, constants, solutions, values)
    assert float((state["mean"] - aim).abs().max()) <= 1e-4
    assert float(state["sigma"]) < 0.1


def test_a_solution_from_outside_is_shortened_and_gets_no_negative_weight() -> None:
    constants = cma.Constants(4, 6)
    weights = constants.covariance_weights(7)
    assert weights[3] == 0 and len(weights) == 7  # behind the three that are positive
    close(weights[:3], constants.recombination)
    assert (weights[4:] < 0).all()
    state = cma.start(4, 0.5)
    far = torch.zeros(7, 4)
    far[-1, 0] = 1000.0
    values = torch.arange(7.0)
    values[-1] = -1.0  # the best one
    cma.tell(state, constants, far, values, foreign=1)
    longest = 0.5 * (2 + 8 / 6)
    close(state["mean"][0], (constants.recombination[0] * longest).float())


def test_the_covariance_of_many_numbers_is_decomposed_now_and_then() -> None:
    assert cma.Constants(32, 8).every == 1
    large = cma.Constants(2304, 27)
    assert 10 < large.every < 30


def test_moments_of_parts_are_those_of_the_whole() -> None:
    rows = torch.randn(50, 2, 3, generator=torch.Generator().manual_seed(0)) + 100
    moments = RunningMoments()
    for part in rows.split([20, 1, 29]):
        moments.add(part)
    close(moments.mean(), rows.double().mean(0))
    close(moments.variance(), rows.double().var(0))
    with pytest.raises(ValueError, match="`source` must hold at least 2 images, got 0"):
        RunningMoments().variance()


@pytest.mark.parametrize("count", [1, 5])
@torch.no_grad()
def test_the_fitness_written_out(count: int) -> None:
    """Sums over blocks, weighted for the batch at hand; one image has no deviation."""
    adapter, x = _wrapped(fitness_weight=0.3), images(0, count)
    update: Any = adapter.update
    candidates = update._candidates()
    expected = []
    for prompts in candidates:
        prediction, tokens = update.tokens.run_reading(update.network, x, prompts.view(2, 16))
        total = 0.0
        for layer in range(2):
            own = tokens[layer]
            total += float((own.mean(0) - update.layer_mean[layer]).square().sum())
            if count > 1:
                total += float((own.std(0) - update.layer_std[layer]).square().sum())
        certain = float(entropy(prediction.logits).sum())
        expected.append(0.3 * count / 64 * total + certain)
    adapter(x)
    close(adapter.report.fitness, torch.tensor(expected), atol=1e-4, rtol=1e-5)
    assert adapter.report.best == int(torch.tensor(expected).argmin())
    assert adapter.report.loss == pytest.approx(min(expected), rel=1e-5)


def test_a_frozen_adapter_predicts_as_the_source_and_later_with_what_was_found() -> None:
    adapter = _wrapped()
    with adapter.frozen():
        close(adapter(images(0)), tiny("ln")(images(0)).detach())
    adapter(images(0))
    state = adapter.state()
    update: Any = adapter.update
    with adapter.frozen(), torch.no_grad():
        found = adapter(images(1))
        best = update.tokens.run(update.network, images(1), state["update/best"].view(2, 16))
    weight = adapter.network.classifier.weight.detach()
    close(found, best.logits + weight @ state["update/shift"])


def test_the_first_batch_is_not_shifted_and_the_shift_is_of_all_candidates() -> None:
    adapter, x = _wrapped(), images(0)
    update: Any = adapter.update
    candidates = update._candidates()
    with torch.no_grad():
        runs = [update.tokens.run(update.network, x, c.view(2, 16)) for c in candidates]
    y = adapter(x)
    close(y, runs[adapter.report.best].logits)
    mean = torch.stack([run.features.mean(0) for run in runs]).mean(0)
    close(adapter.state()["update/shift"], update.layer_mean[-1] - mean)


@pytest.mark.parametrize("official", [False, True])
def test_reset_goes_back_to_the_prompts_or_draws_new_ones(official: bool) -> None:
    adapter = _wrapped(official=official)
    start = adapter.state()
    assert start["update/best"].abs().max() <= (6 / (3 * 8 * 8 + 16)) ** 0.5
    seen = [start["update/best"]]
    for t in range(2):
        adapter(images(t))
        adapter.reset()
        seen.append(adapter.state()["update/best"])
    assert official == (not torch.equal(seen[0], seen[1]))
    assert official == (not torch.equal(seen[1], seen[2]))
    kept = [f"update/{name}" for name in adapter.update.survives_reset()]
    assert kept == (["update/best", "update/starts"] if official else [])
    end = adapter.state()
    assert same(
        {k: v for k, v in start.items() if k not in kept},
        {k: v for k, v in end.items() if k not in kept},
    )


def test_an_official_reset_asks_for_the_draw_again() -> None:
    asked: list[tuple[str, int]] = []

    def draws(name: str, shape: torch.Size, call: int) -> Tensor | None:
        asked.append((name, call))
        return None

    adapter = _wrapped(official=True, draws=draws)
    adapter(images(0))
    adapter.reset()
    first, init = ("candidates", 0), ("prompts_init", 0)
    assert asked == [init, first, ("prompts_init", 1)]


def test_the_best_prompt_of_a_batch_gets_better() -> None:
    trace = Trace(TRACES[0])
    x, source = trace.tensor("inputs")[0], [(trace.tensor("source_inputs"), None)]
    adapter = tta.wrap(trace.model(), "foa", population=12, source=source)
    fitness = []
    for _ in range(15):
        adapter(x)
        fitness.append(float(adapter.report.loss))
    assert all(later <= earlier + 1e-4 for earlier, later in pairwise(fitness))
    assert fitness[-1] < 0.9 * fitness[0]


@pytest.mark.parametrize(
    ("source", "words"),
    [
        (None, "`source` must give foa layer_mean and layer_std, got nothing"),
        (
            tta.SourceStatistics(layer_mean=torch.zeros(2, 16)),
            r"must give foa layer_mean and layer_std, got \['layer_mean'\]",
        ),
        (
            tta.SourceStatistics(layer_mean=torch.zeros(3, 16), layer_std=torch.ones(3, 16)),
            r"`source.layer_mean` must be of shape \(2, 16\)",
        ),
        ([(images(0, 1), torch.zeros(1).long())], "must hold at least 2 images, got 1"),
    ],
)
def test_what_is_missing_or_of_another_model_is_refused(source: Any, words: str) -> None:
    net = tiny("ln")
    with pytest.raises(ValueError, match=words) as caught:
        _wrapped(net, source=source)
    assert len(str(caught.value)) <= 300
    assert not any(m._forward_pre_hooks or m._forward_hooks for m in net.modules())


def test_what_it_learned_cannot_be_written_into_the_model() -> None:
    adapter = _wrapped()
    adapter(images(0))
    with pytest.raises(ValueError, match="`keep` must be False for foa"):
        adapter.unwrap(keep=True)
    adapter.unwrap()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(dtype: torch.dtype) -> None:
    source = [(x.to(dtype), y) for x, y in source_batches()]
    adapter = _wrapped(tiny("ln").to(dtype), source=source)
    for t in range(2):
        y = adapter(images(t).to(dtype))
        assert y.dtype == dtype and y.isfinite().all()
    state = adapter.state()
    assert state["update/best"].dtype == torch.float32 and state["update/shift"].isfinite().all()
