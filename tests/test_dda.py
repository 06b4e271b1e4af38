"""DDA and SDA: replaying their traces, and what they do beyond them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import tta
from tests.helpers.batches import images
from tests.helpers.denoisers import Toy, diffusion
from tests.helpers.nets import tiny
from tests.helpers.recorded import GOLDEN, Recorded
from tta.parts import join as joining
from tta.parts.diffusion import lowpass_matrix, shorten

# What the keys of its traces are, see `tests/helpers/trace_keys.py`.
TRACE_KEYS = {
    "set-d": {
        "arrays": {
            "denoiser": "wrap: input=",
            "ref": "stream: images in [-1, 1]",
            r"noise_q|noise_p": "wrap: draws=",
            r"x_start_loop|samples|sample_rows|pred_xstart": "none: steps on the way to final",
            r"lowpass_(ref|matrix)": "piece: diffusion.lowpass_matrix",
            "model_times": "output: what the denoiser is asked",
            r"alphas_cumprod_respaced|betas_respaced|timestep_map": "piece: diffusion.shorten",
        },
        "hparams": {
            "params.N": "field: steps",
            "params.D": "field: scale",
            "params.scale": "field: guidance",
            "params.respacing": "field: respacing",
            r"params\.(diffusion_steps|schedule)": "wrap: betas of input=",
            r"params\.(learn_sigma|variance|size)": "none: shapes say it",
            "params.clip": "none: always",
        },
    },
}

TRACES = sorted((GOLDEN / "set-d").glob("dda_*.npz"))
PIXELS: dict[str, Any] = {"mean": (0.0,), "std": (1.0,)}
close = torch.testing.assert_close


def _replay(trace: Recorded) -> tuple[tta.Adapter, Toy, torch.Tensor]:
    p = trace.hparams["params"]
    weights = trace.group("denoiser")
    toy = Toy(len(weights["c1.weight"]), len(weights["c2.weight"]))
    toy.load_state_dict(weights)
    steps = p["diffusion_steps"]
    betas = torch.linspace(0.1 / steps, 20 / steps, steps, dtype=torch.float64)
    config = tta.get_config(
        "dda",
        steps=p["N"],
        respacing=p["respacing"],
        scale=p["D"],
        guidance=p["scale"],
        join=None,
        official=True,
    )
    asked = {"noise_q": 0, "noise_p": 0}

    def draws(name: str, shape: torch.Size, call: int) -> torch.Tensor:
        asked[name] += 1
        found = trace.tensor(name)
        assert found.shape[-4:] == shape and call == 0
        return found if name == "noise_q" else found[asked[name] - 1]

    ref = trace.tensor("ref")
    arguments: dict[str, Any] = {"num_classes": ref[0].numel(), "draws": draws}
    given = tta.Diffusion(toy, betas, config)
    return tta.wrap(nn.Flatten(), input=given, mean=(0.5,), std=(0.5,), **arguments), toy, betas


@pytest.mark.parametrize("path", TRACES, ids=lambda p: p.stem)
def test_trace(path: Path) -> None:
    trace = Recorded(path)
    adapter, toy, betas = _replay(trace)
    ref = trace.tensor("ref")
    y = adapter(ref).view_as(ref)
    close(y, trace.tensor("final"), atol=2e-4, rtol=0.0)
    np.testing.assert_array_equal(toy.times, trace.arrays["model_times"])
    p = trace.hparams["params"]
    chain = shorten(betas, p["respacing"])
    assert list(chain.times) == trace.arrays["timestep_map"].tolist()
    np.testing.assert_allclose(chain.kept, trace.arrays["alphas_cumprod_respaced"], atol=1e-6)
    short = [chain.beta(i) for i in range(p["respacing"])]
    np.testing.assert_allclose(short, trace.arrays["betas_respaced"], atol=1e-6)
    matrix = lowpass_matrix(p["size"], p["D"])
    close(matrix, trace.tensor("lowpass_matrix"), atol=2e-6, rtol=0.0)
    close(matrix @ ref @ matrix.T, trace.tensor("lowpass_ref"), atol=2e-6, rtol=0.0)
    assert all(p.grad is None for p in toy.parameters())


def test_the_ensembles_are_those_of_the_authors() -> None:
    trace = Recorded(GOLDEN / "set-d" / "pieces_dda_ensemble.npz")
    z, other = trace.tensor("logits_original"), trace.tensor("logits_projected")
    x, projected = trace.tensor("image_original"), trace.tensor("image_projected")
    for rule in joining.JOINS:
        key = rule.replace("variance", "var")
        found = joining.join(z, other, rule)
        close(found, trace.tensor(key), atol=2e-6, rtol=0.0)
        if f"{key}_index" in trace:
            taken = (found == other).all(1, keepdim=True)
            assert torch.equal(taken, trace.tensor(f"{key}_index"))
    for rule in joining.FUSIONS:
        found = joining.fuse(x, projected, z, other, rule)
        close(found, trace.tensor(f"image_{rule.replace('variance', 'var')}"), atol=2e-6, rtol=0.0)
    one, two = torch.tensor([[1.0, 0.0]]), torch.tensor([[0.0, 1.0]])
    assert torch.equal(joining.join(one, two, "select_entropy"), two)  # a tie


def test_every_image_is_projected_alone_unless_official() -> None:
    x = images(0, 4)
    q, p = torch.randn(4, 3, 32, 32), torch.randn(4, 3, 32, 32)

    def run(rows: slice, **fields: Any) -> torch.Tensor:
        def draws(name: str, shape: torch.Size, call: int) -> torch.Tensor:
            return (q if name == "noise_q" else p)[rows]

        given = diffusion(join=None, **fields)
        adapter = tta.wrap(nn.Flatten(), input=given, num_classes=3072, draws=draws, **PIXELS)
        return adapter(x[rows])

    whole, halves = run(slice(0, 4)), [run(slice(0, 2)), run(slice(2, 4))]
    close(whole, torch.cat(halves), atol=1e-5, rtol=0.0)
    official = run(slice(0, 4), official=True)
    assert (official - whole).abs().max() > 1e-3
    close(official, run(slice(0, 4), per_image=False))


@pytest.mark.parametrize("rule", [*joining.JOINS, *joining.FUSIONS])
def test_joined_predictions(rule: str) -> None:
    net = tiny("gn")
    plain = tta.wrap(tiny("gn"), input=diffusion(join=None), **PIXELS)
    adapter = tta.wrap(net, input=diffusion(join=rule), **PIXELS)
    x = images(0)
    y = adapter(x)
    with torch.no_grad():
        z = tiny("gn")(x)
        z2 = plain(x)
        plain.reset()
        projected = plain.input.transform(x)  # type: ignore[union-attr]
        if rule in joining.JOINS:
            expected = joining.join(z, z2, rule)
        else:
            expected = tiny("gn")(joining.fuse(x, projected, z, z2, rule))
    close(y, expected)


def test_an_update_learns_from_projections() -> None:
    net = tiny("gn")
    alone = tta.wrap(tiny("gn"), input=diffusion(join=None), **PIXELS)
    projected = alone.input.transform(images(0))  # type: ignore[union-attr]
    tent = tta.get_config("tent", lr=0.05)
    adapter = tta.wrap(net, update=tent, input=diffusion(), **PIXELS)
    adapter(images(0))
    expected = tta.wrap(tiny("gn"), update=tent)
    expected(projected)
    for name, p in expected.parameters_adapted.items():
        close(adapter.state()[f"param/{name}"], p.detach(), atol=1e-5, rtol=1e-4)


def test_sda_asks_the_original_classifier_about_the_images_as_they_came() -> None:
    original, tuned = tiny("gn", seed=1), tiny("gn")
    given = diffusion("sda")
    given.classifier = original
    y = tta.wrap(tuned, input=given, **PIXELS)(images(0))
    z2 = tta.wrap(tiny("gn"), input=diffusion("sda", join=None), **PIXELS)(images(0))
    with torch.no_grad():
        close(y, tiny("gn", seed=1)(images(0)) + z2)


def test_where_the_denoiser_comes_from(tmp_path: Path) -> None:
    made = diffusion()
    config = made.config
    source = tta.SourceStatistics(denoiser=made, feature_mean=torch.zeros(8))
    one = tta.wrap(tiny("gn"), input=config, source=source, **PIXELS)
    two = tta.wrap(tiny("gn"), input=made, **PIXELS)
    assert one.config == two.config and one.config.source == "denoiser as given"
    assert torch.equal(one(images(0)), two(images(0)))
    tta.save(two, tmp_path / "adapter")
    with pytest.raises(ValueError, match="`source` must give dda its denoiser"):
        tta.load(tiny("gn"), tmp_path / "adapter")
    again = tta.load(tiny("gn"), tmp_path / "adapter", input=diffusion())
    assert torch.equal(again(images(1)), two(images(1)))
    with pytest.warns(UserWarning, match="`denoiser` is not saved"):
        source.save(tmp_path / "source.safetensors")
    read = tta.SourceStatistics.load(tmp_path / "source.safetensors")
    assert read.contents == ["feature_mean"]


def test_without_a_normalisation_images_are_taken_for_those_of_the_denoiser() -> None:
    given = diffusion(join=None)
    with pytest.warns(UserWarning, match=r"given to the denoiser as they are, in \[-1, 1\]"):
        adapter = tta.wrap(nn.Flatten(), input=given, num_classes=3072)
        y = adapter(images(0) * 2 - 1)
    other = tta.wrap(nn.Flatten(), input=diffusion(join=None), num_classes=3072, **PIXELS)
    close(y, other(images(0)) * 2 - 1, atol=1e-5, rtol=1e-4)


def test_gradients_flow_through_a_frozen_adapter() -> None:
    adapter = tta.wrap(tiny("gn"), input=diffusion(), **PIXELS)
    x = images(0, 2).requires_grad_()
    with adapter.frozen():
        adapter(x).sum().backward()
    assert x.grad is not None and x.grad.isfinite().all() and x.grad.abs().max() > 0


def test_refusals() -> None:
    toy = Toy()
    with pytest.raises(ValueError, match="`betas` must be at least two variances"):
        tta.Diffusion(toy, torch.tensor([0.1, 1.5]))
    with pytest.raises(TypeError, match="`denoiser` must be a module or a function"):
        tta.Diffusion(3, torch.full((10,), 0.1))  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="`respacing` must be at most the denoiser's 10 steps"):
        tta.wrap(tiny("gn"), input=tta.Diffusion(toy, torch.full((10,), 0.1)), **PIXELS)
    with pytest.raises(ValueError, match="`steps` must be below respacing"):
        tta.get_config("dda", steps=100)
    with pytest.raises(TypeError, match=r"`denoiser` must be a tta.Diffusion"):
        tta.SourceStatistics(denoiser=toy)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="`source` must give sda its denoiser"):
        tta.wrap(tiny("gn"), "sda", **PIXELS)
    given = diffusion(join=None)
    given.classifier = tiny("gn")
    with pytest.raises(ValueError, match="`classifier` must have a join="):
        tta.wrap(tiny("gn"), input=given, **PIXELS)
    adapter = tta.wrap(tiny("gn"), input=diffusion(), **PIXELS)
    with pytest.raises(ValueError, match="`images` must have 3 channels"):
        adapter(images(0)[:, :2])
