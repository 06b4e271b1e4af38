"""Checkpoints as training scripts leave them: containers, prefixes, extra keys, ports."""

from __future__ import annotations

import argparse
import socket
import zipfile
from collections import OrderedDict
from datetime import datetime
from pathlib import Path
from types import SimpleNamespace as Settings

import huggingface_hub
import numpy as np
import pytest
import timm
import torch
import torchvision
from safetensors.torch import save_file

import models
from tta.runtime import libraries

NAME = "timm:test_resnet"


@pytest.fixture(scope="module")
def net():
    torch.manual_seed(0)
    net = timm.create_model("test_resnet", num_classes=7).eval()
    for buffer in net.buffers():  # counters and statistics that no fresh model has
        buffer.add_(1)
    return net


def under(prefix, state):
    return OrderedDict((f"{prefix}{key}", value) for key, value in state.items())


def counted(state):
    """With the buffers that a profiler of operations adds to every module."""
    one = torch.ones(1, dtype=torch.float64)
    extra = {"total_ops": one, "total_params": one, "layer1.0.total_ops": one}
    return {**state, **extra, "layer1.total_params": one}


def settings():
    return argparse.Namespace(model="test_resnet", lr=0.1, mean=(0.5,), seed=np.int64(3), amp=False)


KINDS = {
    "plain": lambda s: s,
    "compiled": lambda s: under("_orig_mod.", s),
    "data parallel": lambda s: under("module.", s),
    "data parallel of compiled": lambda s: under("module._orig_mod.", s),
    "compiled data parallel": lambda s: under("_orig_mod.module.", s),
    "compiled part": lambda s: {k.replace("layer1.", "layer1._orig_mod."): v for k, v in s.items()},
    "sharded": lambda s: under("_fsdp_wrapped_module.", s),
    "lightning model": lambda s: {
        "state_dict": under("model.", s) | {"criterion.weight": torch.ones(7)},
        "epoch": 3, "hyper_parameters": {"lr": 0.1}, "pytorch-lightning_version": "2.4",
    },
    "lightning net": lambda s: {"state_dict": under("net.", s), "callbacks": {}},
    "lightning compiled": lambda s: {"state_dict": under("model._orig_mod.", s)},
    "own attribute": lambda s: {"state_dict": under("student.backbone.", s)},
    "model_state_dict": lambda s: {
        "epoch": 1, "model_state_dict": s,
        "optimizer_state_dict": {"state": {0: {"exp_avg": torch.ones(2)}}, "param_groups": [{}]},
    },
    "model": lambda s: {"model": under("module.", s), "args": settings()},
    "net": lambda s: {"net": s, "acc": 93.1, "epoch": 2},
    "weights of an unknown key": lambda s: {"weights": s, "loss": torch.tensor(0.3)},
    "averaged alone": lambda s: {"state_dict_ema": s},
    "averaged before last": lambda s: {
        "state_dict": {k: torch.zeros_like(v) for k, v in s.items()}, "state_dict_ema": s,
    },
    "torch's averaged model": lambda s: {"n_averaged": torch.tensor(3), **under("module.", s)},
    "timm": lambda s: {
        "epoch": 9, "arch": "test_resnet", "state_dict": s, "version": 2, "args": settings(),
        "optimizer": {"state": {}, "param_groups": [{"lr": np.float64(0.1), "params": [0]}]},
        "metric": np.float64(76.5), "best": np.float32(1), "last": np.bool_(True),
    },
    "profiled": counted,
    "profiled data parallel": lambda s: under("module.", counted(s)),
    "averaged under another key": lambda s: {
        "state_dict": {k: torch.zeros_like(v) for k, v in s.items()}, "ema_state_dict": s,
    },
    "paths and times": lambda s: {
        "state_dict": s, "data": Path("data"), "when": datetime(2026, 1, 2), "cfg": Settings(a=1),
    },
    "generators": lambda s: {"state_dict": s, "rng": np.random.RandomState(0).get_state()},
    "arrays": lambda s: {k: v.numpy() for k, v in s.items()},
    "half": lambda s: {k: v.half() if v.is_floating_point() else v for k, v in s.items()},
    "without counters": lambda s: {k: v for k, v in s.items() if "num_batches" not in k},
}  # fmt: skip


@pytest.mark.parametrize("kind", KINDS)
def test_a_training_script_s_file(kind, net, tmp_path):
    state = KINDS[kind](net.state_dict())
    path = tmp_path / "net.pt"
    torch.save(state, path)
    loaded, info = models.load(f"{NAME}@{path}")
    assert info.num_classes == 7
    written = len([k for k in net.state_dict() if kind != "without counters" or "num_b" not in k])
    assert info.matched == written
    expected = net.state_dict()
    for key, value in loaded.state_dict().items():
        if kind == "half":
            assert torch.equal(value, expected[key].half().to(value.dtype)), key
        elif not (kind == "without counters" and "num_batches" in key):
            assert torch.equal(value, expected[key]), key


def test_figures_written_with_numpy_1(net, tmp_path):
    """Its numbers are stored under the name of a module that numpy 2 has moved."""
    new, path = tmp_path / "new.pt", tmp_path / "net.pt"
    torch.save({"state_dict": net.state_dict(), "metric": np.float64(76.5)}, new)
    changed = 0
    with zipfile.ZipFile(new) as source, zipfile.ZipFile(path, "w") as target:
        for name in source.namelist():
            content = source.read(name)
            if name.endswith("data.pkl"):
                changed = content.count(b"cnumpy._core.multiarray\n")
                content = content.replace(b"cnumpy._core.multiarray\n", b"cnumpy.core.multiarray\n")
            target.writestr(name, content)
    if np.__version__ >= "2":
        assert changed == 1
    loaded, _ = models.load(f"{NAME}@{path}")
    for key, value in net.state_dict().items():
        assert torch.equal(loaded.state_dict()[key], value), key


def test_the_kind_of_a_file_is_told_by_what_is_in_it(net, tmp_path):
    tensors, pickled = tmp_path / "tensors.pt", tmp_path / "pickled.safetensors"
    save_file(net.state_dict(), str(tensors))
    torch.save(net.state_dict(), pickled)
    for path in (tensors, pickled):
        loaded, _ = models.load(f"{NAME}@{path}")
        assert torch.equal(loaded.fc.weight, net.fc.weight)
    with pytest.raises(ValueError, match="order"):  # such files have none
        models.load(f"{NAME}@{tensors}", match="order")


@pytest.mark.parametrize("kind", ["sparse", "quantised"])
def test_tensors_that_are_not_dense_are_named(kind, net, tmp_path):
    weight = net.fc.weight.detach()
    changed = (
        weight.to_sparse()
        if kind == "sparse"
        else torch.quantize_per_tensor(weight, 0.1, 0, torch.qint8)
    )
    torch.save({**net.state_dict(), "fc.weight": changed}, tmp_path / "net.pt")
    with pytest.raises(ValueError, match=rf"dense tensors, but 'fc\.weight' of .* is {kind}"):
        models.load(f"{NAME}@{tmp_path / 'net.pt'}")


def test_weights_of_a_run_that_diverged_are_warned_of(net, tmp_path):
    weight = net.fc.weight.detach().clone()
    weight[0, 0] = float("nan")
    torch.save({**net.state_dict(), "fc.weight": weight}, tmp_path / "net.pt")
    with pytest.warns(UserWarning, match=r"finite weights, but 'fc\.weight' of .* has NaN"):
        models.load(f"{NAME}@{tmp_path / 'net.pt'}")


class Greeting:
    """An object that runs code when it is unpickled."""

    def __reduce__(self):
        return print, ("unpickled",)


def test_objects_that_could_run_code_are_refused(net, tmp_path, capsys):
    path = tmp_path / "net.pt"
    torch.save({"state_dict": net.state_dict(), "config": Greeting()}, path)
    with pytest.raises(ValueError, match=r"holds no plain tensors but a \S+, which could run code"):
        models.load(f"{NAME}@{path}")
    assert "unpickled" not in capsys.readouterr().out
    assert argparse.Namespace not in torch.serialization.get_safe_globals()


def port(state):
    """The same tensors in the same order under another framework's names."""
    return OrderedDict((f"op{i}/kernel", value) for i, value in enumerate(state.values()))


@pytest.mark.parametrize("counters", [True, False])
@pytest.mark.parametrize("container", [lambda s: s, lambda s: {"epoch": 1, "params": s}])
def test_a_port_in_order(net, tmp_path, counters, container):
    state = {k: v for k, v in net.state_dict().items() if counters or "num_batches" not in k}
    path = tmp_path / "port.pt"
    torch.save(container(port(state)), path)
    with pytest.warns(UserWarning, match=rf"all {len(state)} tensors of .*port\.pt"):
        loaded, info = models.load(f"{NAME}@{path}", match="order")
    assert info.matched == len(state) and info.num_classes == 7
    x = torch.rand(2, *info.input_size)
    with torch.no_grad():
        assert torch.equal(loaded(x), net(x))
    seven = r"does not fit \(\d+ missing: conv1.*; \d+ unexpected: op0/kernel, .*\): pass"
    with pytest.raises(ValueError, match=seven):
        models.load(f"{NAME}@{path}")


def test_a_port_that_does_not_fit(net, tmp_path):
    path = tmp_path / "port.pt"
    state = port(net.state_dict())
    values = list(state.values())
    total = len(values)

    def refused(words, content, file=path):
        torch.save(content, file)
        with pytest.raises(ValueError, match=words) as caught:
            models.load(f"{NAME}@{file}", match="order")
        assert "\n" not in str(caught.value) and f"of {total} tensors" in str(caught.value)

    refused(
        r"the first 0 match .* op0/kernel of shape",
        state | {"op0/kernel": values[0].permute(2, 3, 1, 0)},
    )
    short = dict(list(state.items())[:-2])
    refused(r"has \d+ tensors in place of", short)
    ordered = tmp_path / "port.safetensors"
    save_file({k.replace("/", "."): v for k, v in state.items()}, str(ordered))
    with pytest.raises(ValueError, match="keeps the order"):
        models.load(f"{NAME}@{ordered}", match="order")
    with pytest.raises(ValueError, match="must come with a checkpoint"):
        models.load(NAME, match="order")
    with pytest.raises(ValueError, match="`match` must be one of name, order, got 'fuzzy'"):
        models.load(NAME, checkpoint=path, match="fuzzy")


def test_order_is_offered_where_it_would_do(tmp_path):
    net, info = models.load("cifar10_resnet20_bn")
    assert info.matched is None
    path = tmp_path / "port.pt"
    torch.save(port(net.state_dict()), path)
    with pytest.raises(ValueError, match='or match="order" since all shapes match'):
        models.load("cifar10_resnet20_bn", checkpoint=path)


def test_what_does_not_fit_is_named_in_one_sentence(net, tmp_path):
    path = tmp_path / "net.pt"
    state = net.state_dict()
    first, *rest = state
    wide = {**state, first: torch.ones(3, 3, 3, 3)}
    del wide[rest[-1]]
    wide["extra.weight"] = torch.ones(2)
    torch.save({"state_dict": under("module.", wide)}, path)
    words = rf"1 missing: {rest[-1]}; 1 unexpected: extra.weight; 1 of another shape: {first} is"
    with pytest.raises(ValueError, match=words) as caught:
        models.load(f"{NAME}@{path}")
    assert "\n" not in str(caught.value) and 'match="order"' not in str(caught.value)


@pytest.mark.parametrize("name", ["timm:test_resnet", "torchvision:resnet18"])
def test_without_a_network_the_answer_comes_at_once(name, monkeypatch):
    """No retries, and advice that serves the library and the command line."""
    seen = []

    def create(*args, **keywords):
        seen.append((huggingface_hub.constants.HF_HUB_OFFLINE, socket.getdefaulttimeout()))
        raise OSError("no network")

    monkeypatch.setattr(timm, "create_model", create)
    monkeypatch.setattr(torchvision.models, "get_model", create)
    monkeypatch.setattr(libraries, "_answers", lambda host: False)
    before = huggingface_hub.constants.HF_HUB_OFFLINE, socket.getdefaulttimeout()
    with pytest.raises(RuntimeError, match=rf"`name`='{name}' .* in {name}@PATH\.$") as caught:
        models.load(name)
    assert "pretrained=" not in str(caught.value) and "\n" not in str(caught.value)
    assert seen == [(True, libraries.PATIENCE_S)]
    assert (huggingface_hub.constants.HF_HUB_OFFLINE, socket.getdefaulttimeout()) == before
    monkeypatch.setattr(libraries, "_answers", lambda host: True)
    with pytest.raises(RuntimeError):
        models.load(name)
    assert seen[1] == before


def test_whether_a_host_answers():
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port = listener.getsockname()[1]
    assert not libraries._answers(f"http://127.0.0.1:{port}/weights")
    assert not libraries._answers("no address")
