"""``models.train --itta``: what it leaves, that it goes on after a kill, what it refuses."""

from __future__ import annotations

import json
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

import models
import tta
from models import bundled, train, train_itta
from tests.helpers.nets import tiny
from tta.parts import itta

NAME = "cifar10_resnet20_bn"
ITTA = f"{NAME}_itta"


@pytest.fixture
def place(tmp_path, monkeypatch):
    """Images of noise, and a tiny network with its weights in place of the bundled one."""
    draw = np.random.default_rng(0)
    arrays = {}
    for split, count in (("train", 40), ("test", 20)):
        arrays[f"{split}_images"] = draw.integers(0, 256, (count, 32, 32, 3), dtype=np.uint8)
        arrays[f"{split}_labels"] = np.arange(count) % 10
    np.savez(tmp_path / "data.npz", **arrays)
    monkeypatch.setitem(bundled.BUNDLED, NAME, lambda: tiny("bn"))
    recipe = replace(train.RECIPES[NAME], batch_size=16, bfloat16=False, channels_last=False)
    monkeypatch.setitem(train.RECIPES, NAME, recipe)
    for module in (bundled, train, sys.modules["models.load"]):
        monkeypatch.setattr(module, "FOLDER", tmp_path)
    (tmp_path / NAME).mkdir()
    stored = {k: v.half() for k, v in tiny("bn").state_dict().items() if v.is_floating_point()}
    whole = {k: v for k, v in tiny("bn").state_dict().items() if not v.is_floating_point()}
    save_file(stored | whole, tmp_path / NAME / "weights.safetensors")
    return tmp_path


def command(place, *flags, work="work"):
    data, folder = str(place / "data.npz"), str(place / work)
    train.main([NAME, "--data", data, "--work", folder, "--itta", *flags])


def test_it_leaves_a_network_of_its_own_with_its_loss(place):
    command(place, "--itta-epochs", "2")
    model, info = models.load(ITTA)
    assert info.source is not None and info.source.consistency is not None
    w = info.source.consistency
    saved = torch.load(place / "work" / f"{ITTA}.pt", weights_only=True)
    assert torch.equal(w, saved["consistency"]) and w.dtype == torch.float32
    start = itta.identity(train_itta.DEPTH, w.shape[2])
    assert not torch.equal(w, start)
    # Six updates of Adam move no number further than six times its rate.
    assert float((w - start).abs().max()) <= 6.01 * 5e-6
    before = load_file(str(place / NAME / "weights.safetensors"))
    moved = {k for k, v in model.state_dict().items() if not torch.equal(v, before[k].to(v.dtype))}
    assert moved and not any("running" in name for name in moved)  # statistics rest
    log = json.loads((place / ITTA / "training.json").read_text())
    assert log["name"] == ITTA and "--itta --itta-epochs 2" in log["command"]
    assert [row["epoch"] for row in log["history"]] == [1, 2]
    assert {"loss_cla", "loss_reg", "penalty", "test_accuracy"} <= log["history"][0].keys()
    adapter = tta.wrap(model, "itta", lr=0.01, source=info.source, batch_size=8)
    assert torch.equal(adapter.constants()["update/consistency"], w)
    adapter(torch.rand(8, 3, 32, 32))
    assert adapter.report.stepped
    assert ITTA not in models.list_models()


def test_its_updates_are_those_of_learn(place):
    data = train.read_cifar10(place / "data.npz")
    train_itta.train(NAME, data, place, 1, 3, 16)
    saved = torch.load(place / f"{ITTA}.pt", weights_only=True)
    model = tiny("bn")
    model.load_state_dict(load_file(str(place / NAME / "weights.safetensors")))
    generator = torch.Generator().manual_seed(3000)
    order = torch.randperm(40, generator=generator)
    batches = [
        (train.augmented(train.padded(data["train_images"]), i, generator), data["train_labels"][i])
        for i in order.split(16)
    ]
    w = itta.identity(train_itta.DEPTH, model.fc.in_features)
    *_, last = itta.learn(model.eval(), w, batches, seed=3000)
    assert torch.equal(last["consistency"], saved["consistency"])
    for name, value in model.state_dict().items():
        assert torch.equal(value, saved["model"][name]), name


def test_a_training_that_was_cut_off_ends_where_a_whole_one_does(place):
    data = train.read_cifar10(place / "data.npz")
    for work in ("whole", "cut"):
        (place / work).mkdir()
    train_itta.train(NAME, data, place / "whole", 3, 0, 16)
    train_itta.train(NAME, data, place / "cut", 1, 0, 16)

    def killed(*args, **kwargs):
        learned = itta.learn(*args, **kwargs)
        yield next(learned)
        raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(train_itta, "learn", killed)
        train_itta.train(NAME, data, place / "cut", 3, 0, 16)
    train_itta.train(NAME, data, place / "cut", 3, 0, 16)
    whole, cut = (
        torch.load(place / work / f"{ITTA}.pt", weights_only=True) for work in ("whole", "cut")
    )
    assert torch.equal(whole["consistency"], cut["consistency"])
    assert all(torch.equal(v, cut["model"][k]) for k, v in whole["model"].items())
    history = [json.loads(saved["log"])["history"] for saved in (whole, cut)]
    assert history[0] == history[1] and len(history[0]) == 3
    # The optimisers matter: with new ones at each epoch it would end elsewhere.
    steps = whole["optimizers"]["model"]["state"][0]["step"]
    assert float(steps) == 9


def test_it_begins_with_the_training_that_lies_in_the_work_folder(place):
    data = train.read_cifar10(place / "data.npz")
    work = place / "work"
    work.mkdir()
    train.train(NAME, data, work, 1, 0)
    train_itta.train(NAME, data, work, 1, 0, 16)
    trained = torch.load(work / f"{NAME}.pt", weights_only=True)["model"]
    found = torch.load(work / f"{ITTA}.pt", weights_only=True)["model"]
    # Adam's three steps of 5e-5 lie between the two; the statistics are the same.
    for name, value in trained.items():
        limit = 1.6e-4 if "running" not in name else 0
        assert float((found[name].float() - value.float()).abs().max()) <= limit, name


def test_what_is_refused_says_so_before_anything_is_trained(place, capsys):
    for flags, words in (
        (["cifar10_convvit_ln", "--itta"], "must have two stages"),
        ([NAME, "--itta", "--itta-epochs", "0"], "`--itta-epochs` must be 1 or more"),
    ):
        with pytest.raises(SystemExit) as stopped:
            train.main([*flags, "--data", str(place / "none.npz"), "--work", str(place / "w")])
        assert stopped.value.code == 2 and words in capsys.readouterr().err
    assert not (place / "w").exists()
    with pytest.raises(ValueError, match="unknown model"):
        models.load(ITTA)
