"""Bad arguments: one sentence each, the kind of error that fits, and nothing changed."""

from __future__ import annotations

import json
import os
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import nn

import corruptions
import models
import tta
import tta.state as disk
from tests.contract.cases import images, source_batches
from tests.nets import tiny
from tta.checks import nearest
from tta.config import ComponentConfig
from tta.methods.eata import EataConfig
from tta.methods.tent import Tent

NAN, INF = float("nan"), float("inf")


def _state(net: nn.Module) -> list[Any]:
    tensors = [v.clone() for v in net.state_dict().values()]
    flags = [(type(m), m.training, len(m._forward_pre_hooks)) for m in net.modules()]
    return [tensors, flags, [p.requires_grad for p in net.parameters()]]


def _refused(error: type[Exception], words: str, call: Any) -> str:
    with pytest.raises(error, match=words) as caught:
        call()
    text = str(caught.value)
    assert type(caught.value) is error, type(caught.value)
    assert "\n" not in text and "`" in text
    return text


WRAP = [
    (ValueError, r"`batch_size` must be a whole number of at least 1, got 0", {"batch_size": 0}),
    (ValueError, r"`batch_size` .* got -4", {"batch_size": -4}),
    (TypeError, r"`batch_size` .* got 'a'; pass an int", {"batch_size": "a"}),
    (TypeError, r"`batch_size` .* got True", {"batch_size": True}),
    (TypeError, r"`seed` must be a whole number, got 'a'; pass an int", {"seed": "a"}),
    (TypeError, r"`seed` .* got 1\.5", {"seed": 1.5}),
    (TypeError, r"`seed` .* got None", {"seed": None}),
    (TypeError, r"`seed` .* got False", {"seed": False}),
    (ValueError, r"`seed` .* at most 64 bits, got 1180591620717411303424", {"seed": 2**70}),
    (TypeError, r"`mean` must be a list of numbers.* got 3; pass a tuple", {"mean": 3, "std": 1}),
    (TypeError, r"`std` must be a list of numbers", {"mean": (0.0,), "std": 1.0}),
    (TypeError, r"`mean` .* got 'abc'", {"mean": "abc", "std": (1.0,)}),
    (TypeError, r"`mean` .* got \('a',\)", {"mean": ("a",), "std": (1.0,)}),
    (TypeError, r"`mean` .* got tensor", {"mean": torch.tensor(0.5), "std": (1.0,)}),
    (ValueError, r"`mean` and `std` must be given together.*std=None", {"mean": (0.0,)}),
    (ValueError, r"`mean` and `std` must be given together.*mean=None", {"std": (1.0,)}),
    (ValueError, r"`mean` .* got \(nan,\)", {"mean": (NAN,), "std": (1.0,)}),
    (ValueError, r"`std` .* above 0, got \(nan,\)", {"mean": (0.0,), "std": (NAN,)}),
    (ValueError, r"`std` .* above 0, got \(0\.0,\)", {"mean": (0.0,), "std": (0,)}),
    (ValueError, r"`mean` .* got \(\)", {"mean": (), "std": (1.0,)}),
    (ValueError, r"`mean` and `std` .* got 3 and 2", {"mean": (0.0,) * 3, "std": (1.0,) * 2}),
    (TypeError, r"`params` must be a string, got 3", {"params": 3}),
    (TypeError, r"`optimizer` must be a string, got None", {"optimizer": None}),
    (ValueError, r"`optimizer` must be one of .* got 'adamw'", {"optimizer": "adamw"}),
    (TypeError, r"`official` must be True or False, got 'yes'", {"official": "yes"}),
    (TypeError, r"`nesterov` must be True or False, got 1", {"nesterov": 1}),
    (TypeError, r"`lr` must be a number", {"lr": "fast"}),
    (ValueError, r"`lr` must be a number", {"lr": 10**400}),
    (TypeError, r"`betas` must be a pair", {"betas": 0.9}),
    (ValueError, r"`betas` must be a pair", {"betas": (0.9,)}),
    (TypeError, r"`norm` must be a name or a config, got int", {"norm": 3}),
    (TypeError, r"`augment` must be callable, got int: pass", {"augment": 3}),
    (TypeError, r"`restore_mask` must be callable, got str", {"restore_mask": "all"}),
    (ValueError, r"`augment` must belong to an update that takes it", {"augment": images}),
]


@pytest.mark.parametrize(("error", "words", "arguments"), WRAP)
def test_wrap(error, words, arguments) -> None:
    net = tiny("bn").train()
    before = _state(net)
    _refused(error, words, lambda: tta.wrap(net, "tent.cifar10", **arguments))
    after = _state(net)
    assert all(map(torch.equal, before[0], after[0])) and before[1:] == after[1:]
    tta.wrap(net, "source")


@pytest.mark.parametrize("name", [n for n in tta.list_methods() if n != "source"])
def test_flags_and_words_of_every_config(name: str) -> None:
    config = tta.get_config(name)
    for key, value in config.to_dict().items():
        if isinstance(value, bool):
            _refused(TypeError, f"`{key}` must be True", lambda k=key: config.replace(**{k: "yes"}))
        elif isinstance(value, str) and key != "name":
            _refused(TypeError, f"`{key}` must be", lambda k=key: config.replace(**{k: 3}))


def test_whole_numbers_of_numpy_are_whole_numbers() -> None:
    config = tta.wrap(
        tiny("bn"), "tent.cifar10", batch_size=np.int64(8), seed=np.int32(3), mean=np.zeros(3),
        std=torch.ones(3),
    ).config  # fmt: skip
    assert tta.AdapterConfig.from_json(config.to_json()) == config
    assert (config.batch_size, config.seed, config.std) == (8, 3, (1.0, 1.0, 1.0))


def test_the_config_called_source_empties_a_slot() -> None:
    source = tta.get_config("source")
    assert tta.wrap(tiny("bn"), "tent.cifar10", norm=source).config.norm is None
    assert tta.wrap(tiny("bn"), source).config == tta.wrap(tiny("bn"), "source").config
    assert tta.wrap(tiny("bn"), "bn", update=source).config.update is None


TENT = tta.get_config("tent").to_dict()
ADAPTER = [
    (TypeError, r"`update` must be a component's config or None, got 'tent'", {"update": "tent"}),
    (ValueError, r"`norm` .* got 'tent', which belongs to update", {"norm": TENT}),
    (ValueError, r"`norm` .* got 'source'.*pass norm=None", {"norm": {"name": "source"}}),
    (TypeError, r"`batch_size` must be a whole number", {"batch_size": "64"}),
    (TypeError, r"`seed` must be a whole number", {"seed": None}),
    (ValueError, r"`mean` and `std` must be given together", {"mean": [0.5]}),
    (ValueError, r"`std` .* above 0", {"mean": [0.5], "std": [-1]}),
    (TypeError, r"`source` must be a string", {"source": 3}),
    (ValueError, r"`updaet` is not a key .*'update'", {"updaet": None}),
    (ValueError, r"`3` is not a key", {3: None}),
    (ValueError, r"`name` must be a key .* got the keys lr", {"update": {"lr": 0.1}}),
    (ValueError, r"`name` must be a key .* got the keys none", {"update": {}}),
    (TypeError, r"`name` must be a string, got 3", {"update": {"name": 3}}),
    (ValueError, r"`lrr` is not a field of tent.*'lr'", {"update": TENT | {"lrr": 1}}),
    (TypeError, r"`lr` must be a number", {"update": TENT | {"lr": "1"}}),
    (TypeError, r"`steps` must be a whole number", {"update": TENT | {"steps": 1.0}}),
    (TypeError, r"`data` must be a dict of an adapter's config, got list", []),
]


@pytest.mark.parametrize(("error", "words", "data"), ADAPTER)
def test_adapter_configs(error, words, data) -> None:
    _refused(error, words, lambda: tta.AdapterConfig.from_dict(data))
    if 3 not in data:
        _refused(error, words, lambda: tta.AdapterConfig.from_json(json.dumps(data)))


def test_configs_from_text_and_by_component() -> None:
    _refused(ValueError, r"`text` must be JSON", lambda: tta.AdapterConfig.from_json("{"))
    _refused(TypeError, r"`text` .* got int", lambda: tta.AdapterConfig.from_json(3))  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"unknown method 'tnet': did you mean 'tent'"):
        tta.AdapterConfig.from_dict({"update": {"name": "tnet"}})
    assert ComponentConfig.from_dict(TENT) == tta.get_config("tent")
    assert Tent.Config.from_dict(TENT) == tta.get_config("tent")
    _refused(ValueError, r"`name` must be 'eata' .* got 'tent'", lambda: EataConfig.from_dict(TENT))
    _refused(TypeError, r"`data` .* got str", lambda: ComponentConfig.from_dict("tent"))  # type: ignore[arg-type]


def pair(x: Any = None, y: Any = None) -> tuple[Any, Any]:
    return images(0) if x is None else x, torch.zeros(8, dtype=torch.int64) if y is None else y


BATCHES = [
    (TypeError, r"pairs \(images, labels\), but batch 1 is a Tensor", [pair(), images(0)]),
    (TypeError, r"batch 0 is a tuple of 3", [(*pair(), 1)]),
    (TypeError, r"batch 0 is a str", ["ab"]),
    (TypeError, r"batch 0 has images.*floating point, got torch.uint8", [pair(images(0).byte())]),
    (TypeError, r"batch 0 has images.*must be a tensor, got list", [pair([1.0])]),
    (ValueError, r"batch 0 has images.*3 channels, got shape", [pair(torch.rand(8, 1, 32, 32))]),
    (ValueError, r"batch 0 has images.*4 axes", [pair(torch.rand(8, 3, 32))]),
    (ValueError, r"batch 0 has images.*at least one", [pair(torch.rand(0, 3, 32, 32))]),
    (TypeError, r"labels of list: pass class numbers", [pair(y=[0] * 8)]),
    (TypeError, r"labels of torch.float32", [pair(y=torch.zeros(8))]),
    (ValueError, r"labels of shape \(7,\) for 8 images", [pair(y=torch.zeros(7).long())]),
    (ValueError, r"labels of shape \(8, 10\)", [pair(y=torch.zeros(8, 10).long())]),
    (ValueError, r"labels from 3 to 10, and this model has 10", [pair(y=torch.arange(8) + 3)]),
    (ValueError, r"labels from -1 to", [pair(y=torch.arange(8) - 1)]),
    (ValueError, r"batch", []),
]


class Loader:
    """What a data loader is to us: read in passes, without a length."""

    def __init__(self, batches: Any) -> None:
        self.batches = batches

    def __iter__(self) -> Any:
        return iter(self.batches)


@pytest.mark.parametrize("kind", [list, Loader])
@pytest.mark.parametrize("method", ["petal", "rmt", "adanpc", "eata"])
@pytest.mark.parametrize(("error", "words", "batches"), BATCHES)
def test_source_batches(error, words, batches, method, kind) -> None:
    net = tiny("bn")
    before = _state(net)
    more = {} if method in ("eata", "adanpc") else {"mean": (0.0,), "std": (1.0,)}

    def call() -> None:
        tta.wrap(net, f"{method}.cifar10", source=kind(batches), **more)

    if (method == "eata" and "labels of" in words) or (method == "eata" and "labels from" in words):
        call()  # its Fisher information is of pseudo-labels
        return
    assert "`source`" in _refused(error, words, call)
    after = _state(net)
    assert all(map(torch.equal, before[0], after[0])) and before[1:] == after[1:]


def test_a_method_that_takes_nothing_of_the_source_reads_no_batch() -> None:
    tta.wrap(tiny("bn"), "tent.cifar10", source=Loader(None))


FISHER = {n: torch.ones_like(p) for n, p in tiny("bn").named_parameters()}
NAME = "layer1.1.weight"
STATISTICS = [
    (TypeError, r"`fisher` must be a dict of tensors.* got Tensor", {"fisher": torch.ones(3)}),
    (TypeError, r"`fisher` .* got float under", {"fisher": FISHER | {NAME: 1.0}}),
    (TypeError, r"`fisher` .* got Tensor under 3", {"fisher": {3: torch.ones(3)}}),
    (ValueError, r"`fisher` .* got NaN .*'layer1", {"fisher": {NAME: torch.tensor([NAN] * 4)}}),
    (ValueError, r"`fisher` .* got negative values", {"fisher": {NAME: -torch.ones(4)}}),
    (ValueError, r"`posterior_mean` .* got NaN", {"posterior_mean": {"a": torch.tensor(INF)}}),
    (TypeError, r"`prototypes` must be a tensor of shape \(C, D\), got list", {"prototypes": []}),
    (ValueError, r"`prototypes` .* got shape \(3,\)", {"prototypes": torch.ones(3)}),
    (ValueError, r"`prototypes` must be finite", {"prototypes": torch.full((2, 2), INF)}),
    (ValueError, r"`features` must be finite", {"features": torch.full((2, 2), NAN)}),
    (TypeError, r"`feature_labels` .* torch.float32", {"feature_labels": torch.ones(2)}),
    (ValueError, r"`feature_labels` must come together", {"features": torch.ones(2, 2)}),
    (TypeError, r"`batches` must be an iterable .* got int", {"batches": 3}),
]  # fmt: skip


@pytest.mark.parametrize(("error", "words", "fields"), STATISTICS)
def test_source_statistics(error, words, fields) -> None:
    _refused(error, words, lambda: tta.SourceStatistics(**fields))


@pytest.mark.parametrize(
    ("words", "fisher"),
    [
        (r"'layer1.1.weight' of shape \(4,\), got \(8,\)", FISHER | {NAME: torch.ones(8)}),
        (r"got 'layer9.weight': did you mean .*Known: layer1", FISHER | {"layer9.weight": torch.ones(4)}),
        (r"'layer1.1.weight' is missing", {k: v for k, v in FISHER.items() if k != NAME}),
    ],
)
def test_a_fisher_that_is_not_this_models(words, fisher) -> None:
    net = tiny("bn")
    given = tta.SourceStatistics(fisher=fisher)
    text = _refused(ValueError, words, lambda: tta.wrap(net, "eata.cifar10", source=given))
    assert "`source.fisher`" in text
    tta.wrap(net, "source")


def test_states_that_are_none() -> None:
    adapter: Any = tta.wrap(tiny("bn"), "tent.cifar10")
    for state in ([1], None, 3):
        _refused(TypeError, r"`state` must be a dict", lambda s=state: adapter.load_state(s))
    _refused(ValueError, r"`state`.*'3'", lambda: adapter.load_state({3: torch.ones(2)}))


def test_a_first_row_of_another_model() -> None:
    given = tta.SourceStatistics(
        features=torch.ones(2, 8), feature_labels=torch.arange(2), memory_init=torch.ones(3)
    )
    words = r"`source.memory_init` must be of shape \(8,\).*got \(3,\)"
    _refused(ValueError, words, lambda: tta.wrap(tiny("bn"), "adanpc.domainbed", source=given))


def test_statistics_from_files(tmp_path: Path) -> None:
    load = tta.SourceStatistics.load
    _refused(TypeError, r"`path` must be a path, got None", lambda: load(None))  # type: ignore[arg-type]
    _refused(FileNotFoundError, r"`path` .* is not there", lambda: load(tmp_path / "no"))
    _refused(FileNotFoundError, r"`path` .* is not there", lambda: load(tmp_path))
    junk = tmp_path / "junk.safetensors"
    junk.write_bytes(b"junk" * 100)
    _refused(ValueError, r"`path` .* no whole safetensors file", lambda: load(junk))
    for key in ("fisher", "features/a", "batches", "fishre/a"):
        save_file({key: torch.ones(2, 2)}, junk)
        _refused(ValueError, rf"`path` .* holds '{key}'.*Known: ", lambda: load(junk))
    statistics = tta.SourceStatistics(fisher=FISHER)
    _refused(TypeError, r"`path`", lambda: statistics.save(3))  # type: ignore[arg-type]
    _refused(FileNotFoundError, r"`path` .* folder", lambda: statistics.save(tmp_path / "a" / "b"))
    statistics.save(junk)
    assert load(junk).contents == ["fisher"]
    junk.write_bytes(junk.read_bytes()[:-8])
    _refused(ValueError, r"`path` .* no whole safetensors file", lambda: load(junk))


COLLECT = [
    (ValueError, r"unknown method 'a'", source_batches(), "a"),
    (ValueError, r"unknown method 'a'", source_batches(), ["a"]),
    (TypeError, r"`for_methods` must be a list of names, got 3", source_batches(), 3),
    (TypeError, r"`for_methods` .* got \[3\]", source_batches(), [3]),
    (ValueError, r"`for_methods` must name at least one method", source_batches(), []),
    (ValueError, r"`source` must hold at least one batch", [], ["eata"]),
    (TypeError, r"`loader` must be an iterable .* got NoneType", None, ["eata"]),
    (TypeError, r"`loader` must be an iterable .* got Tensor", images(0), ["eata"]),
    (TypeError, r"batch 0 is a Tensor", [images(0)], ["eata"]),
]


@pytest.mark.parametrize(("error", "words", "loader", "methods"), COLLECT)
def test_collect_source(error, words, loader, methods) -> None:
    net = tiny("bn")
    before = _state(net)
    with pytest.raises(error, match=words) as caught:
        tta.collect_source(net, loader, methods)
    assert "\n" not in str(caught.value)
    assert all(map(torch.equal, before[0], _state(net)[0]))
    tta.wrap(net, "source")


def test_registry() -> None:
    get: Any = tta.get_config
    for call in (get, tta.register, tta.list_methods):
        argument = "pattern" if call is tta.list_methods else "name"
        _refused(TypeError, f"`{argument}` must be a string, got 3", lambda c=call: c(3))
    _refused(ValueError, r"`slot` must be one of .*got 'x'", lambda: tta.list_methods(slot="x"))
    _refused(TypeError, r"`slot` must be one of .*got 3", lambda: tta.list_methods(slot=3))  # type: ignore[arg-type]
    _refused(ValueError, r"`name` must be an identifier", lambda: tta.register("a-b"))
    _refused(TypeError, r"`mine` must be a class with a slot", lambda: tta.register("mine")(dict))  # type: ignore[type-var]
    assert "mine" not in tta.list_methods()


# Adapters on disk --------------------------------------------------------------------------


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    adapter = tta.wrap(tiny("bn"), "eata.cifar10", source=source_batches())
    adapter(images(0))
    tta.save(adapter, tmp_path / "saved")
    return tmp_path / "saved"


def _edit(folder: Path, **changes: Any) -> None:
    about = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(about | changes))


DAMAGE = [
    (r"config.json is cut off", lambda f: (f / "config.json").write_text('{"format": 1, "con')),
    (r"config.json is cut off", lambda f: (f / "config.json").write_text("[1]")),
    (r"config.json is cut off", lambda f: (f / "config.json").write_bytes(b"\xff\xfe\x00")),
    (r"config.json is cut off", lambda f: _edit(f, config=None)),
    (r"config.json is cut off", lambda f: _edit(f, model="big")),
    (r"must be of format 1, got 2", lambda f: _edit(f, format=2)),
    (r"config of this version.*`updaet`", lambda f: _edit(f, config={"updaet": None})),
    (r"config of this version.*`seed`", lambda f: _edit(f, config={"seed": "a"})),
    (r"saved together", lambda f: _edit(f, pair="another")),
    (r"safetensors is cut off", lambda f: (f / "adapter.safetensors").write_bytes(b"junk" * 50)),
    (
        r"safetensors is cut off",
        lambda f: (f / "adapter.safetensors").write_bytes(
            (f / "adapter.safetensors").read_bytes()[:-9]
        ),
    ),
    (
        r"safetensors is cut off",
        lambda f: save_file({"other:x": torch.ones(2)}, f / "adapter.safetensors"),
    ),
]


@pytest.mark.parametrize(("words", "damage"), DAMAGE)
def test_load_of_damaged_folders(saved: Path, words, damage) -> None:
    damage(saved)
    net = tiny("bn")
    assert "`folder`" in _refused(ValueError, words, lambda: tta.load(net, saved))
    tta.wrap(net, "source")


@pytest.mark.parametrize(
    ("words", "change"),
    [
        (r"constants of eata.*'fisher.layer1.1.bias' is missing", None),
        (r"constants of eata.*size", torch.ones(9)),
    ],
)
def test_load_of_other_constants(saved: Path, words, change) -> None:
    from safetensors import safe_open

    with safe_open(str(saved / "adapter.safetensors"), "pt") as file:
        about, tensors = file.metadata(), {k: file.get_tensor(k) for k in file.keys()}  # noqa: SIM118
    key = "constant:update/fisher.layer1.1.bias"
    del tensors[key]
    tensors |= {} if change is None else {key: change}
    save_file(tensors, saved / "adapter.safetensors", about)
    net = tiny("bn")
    _refused(ValueError, words, lambda: tta.load(net, saved))
    tta.wrap(net, "source")


def test_folders_that_are_none(saved: Path) -> None:
    load: Any = tta.load
    for folder in (None, 3):
        _refused(TypeError, r"`folder` must be a path, got", lambda f=folder: load(tiny("bn"), f))
    for folder in (saved / "no", saved.parent):
        _refused(FileNotFoundError, r"`folder`.*missing", lambda f=folder: load(tiny("bn"), f))
    file = saved / "config.json"
    adapter = tta.wrap(tiny("bn"), "source")
    for call in (lambda: load(tiny("bn"), file), lambda: tta.save(adapter, file)):
        _refused(NotADirectoryError, r"`folder` must be a folder, got the file", call)
    _refused(TypeError, r"`folder` must be a path", lambda: tta.save(adapter, None))  # type: ignore[arg-type]
    adapter.unwrap()
    with pytest.raises(RuntimeError, match="unwrapped"):
        tta.save(adapter, saved / "new")
    assert not (saved / "new").exists()
    (saved / "adapter.safetensors").unlink()
    _refused(FileNotFoundError, r"safetensors is missing", lambda: load(tiny("bn"), saved))


@pytest.mark.parametrize("first", [True, False])
@pytest.mark.parametrize("dies_at", range(4))
def test_a_process_that_dies_while_saving_leaves_a_whole_pair(
    tmp_path: Path, monkeypatch, dies_at: int, first: bool
) -> None:
    adapter = tta.wrap(tiny("bn"), "tent.cifar10")
    old = adapter.state()
    if not first:
        tta.save(adapter, tmp_path)
    adapter(images(0))
    adapter.config = tta.AdapterConfig.from_dict(adapter.config.to_dict() | {"seed": 9})
    done = 0

    def step(real: Any) -> Any:
        def call(*args: Any, **kwargs: Any) -> Any:
            nonlocal done
            if done == dies_at:
                raise KeyboardInterrupt
            done += 1
            return real(*args, **kwargs)

        return call

    with monkeypatch.context() as patch:
        patch.setattr(disk, "save_file", step(save_file))
        patch.setattr(Path, "write_text", step(Path.write_text))
        patch.setattr("os.replace", step(os.replace))
        patch.setattr(Path, "unlink", lambda *_, **__: None)  # a dead process tidies nothing up
        with pytest.raises(KeyboardInterrupt):
            tta.save(adapter, tmp_path)
    if first and dies_at < 3:
        _refused(FileNotFoundError, "missing", lambda: tta.load(tiny("bn"), tmp_path))
        return
    loaded = tta.load(tiny("bn"), tmp_path)
    expected, seed = (adapter.state(), 9) if dies_at == 3 else (old, 0)
    assert loaded.config.seed == seed
    assert all(torch.equal(expected[k], v) for k, v in loaded.state().items())
    tta.save(adapter, tmp_path)
    assert tta.load(tiny("bn"), tmp_path).config.seed == 9
    assert sorted(p.name for p in tmp_path.iterdir()) == ["adapter.safetensors", "config.json"]


def test_a_save_that_fails_leaves_no_parts(tmp_path: Path, monkeypatch) -> None:
    adapter = tta.wrap(tiny("bn"), "source")
    tta.save(adapter, tmp_path)

    def full(*_: Any, **__: Any) -> None:
        raise OSError("disk full")

    with monkeypatch.context() as patch:
        patch.setattr(Path, "write_text", full)
        with pytest.raises(OSError, match="disk full"):
            tta.save(adapter, tmp_path)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["adapter.safetensors", "config.json"]
    tta.load(tiny("bn"), tmp_path)


# Models and corruptions --------------------------------------------------------------------


def test_models_by_name() -> None:
    load: Any = models.load
    _refused(TypeError, r"`name` must be a string, got 3", lambda: load(3))
    _refused(TypeError, r"`pattern` must be a string", lambda: models.list_models(3))  # type: ignore[arg-type]
    _refused(TypeError, r"`pretrained` .* got 'no'", lambda: load("cifar10_resnet20_bn", "no"))
    with pytest.raises(ValueError, match=r"did you mean 'resnet18'\? Known: resnet18, .* more\."):
        load("timm:resnet_18")


@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
def test_checkpoints_that_are_none(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"net{suffix}"
    name = "timm:test_resnet"

    def refused(words: str) -> None:
        text = _refused(ValueError, words, lambda: models.load(name, checkpoint=path))
        assert "`checkpoint`" in text and len(text) < 600

    whole = tmp_path / "whole.pt"
    torch.save({"a": torch.ones(1000)}, whole)
    for content in (b"", b"junk" * 100, whole.read_bytes()[:2000]):
        path.write_bytes(content)
        refused(r"is not \(")
    if suffix == ".pt":
        for value, words in (
            (torch.ones(3), "holds a Tensor"),
            ([1], "holds a list"),
            ({"epoch": 3}, "holds no tensors"),
            (tiny("bn"), "is not"),
        ):
            torch.save(value, path)
            refused(words)
    tensors = {"head.fc.weight": torch.tensor(1.0), "x": torch.ones(2)}
    _ = torch.save(tensors, path) if suffix == ".pt" else save_file(tensors, path)
    refused("does not fit")
    _refused(TypeError, r"`checkpoint` must be a path", lambda: models.load(name, checkpoint=3))  # type: ignore[arg-type]
    _refused(FileNotFoundError, r"`checkpoint`", lambda: models.load(name, checkpoint=tmp_path))


X = images(0, 4)
SEEDS = [
    (TypeError, r"got 'abcd'", "abcd"),
    (TypeError, r"got \[0, None", [0, None, 1, 2]),
    (TypeError, r"got \[\[0\], \[0, 1\]\]", [[0], [0, 1]]),
    (TypeError, r"got \[1180591620717411303424", [2**70] * 4),
    (TypeError, r"torch.float32", [0.0] * 4),
    (TypeError, r"torch.bool", torch.zeros(4, dtype=torch.bool)),
    (ValueError, r"shape \(4,\), .* got \(3,\)", [0, 1, 2]),
    (ValueError, r"got \(4, 1\)", torch.zeros(4, 1, dtype=torch.int64)),
    (ValueError, r"got \(\)", 3),
]


@pytest.mark.parametrize(("error", "words", "seeds"), SEEDS)
def test_seeds_of_corruptions(error, words, seeds) -> None:
    for call in (
        lambda: corruptions.corrupt(X, "fog", 3, seeds=seeds),
        lambda: corruptions.sample("fog", X.shape, 3, seeds),
    ):
        assert "`seeds`" in _refused(error, words, call)


def test_params_that_are_none() -> None:
    apply: Any = corruptions.apply
    _refused(TypeError, r"`params` must be a dict of tensors, got int", lambda: apply(X, "fog", 3))
    _refused(TypeError, r"`params` .* float for 'a'", lambda: apply(X, "fog", {"a": 1.0}))
    _refused(ValueError, r"`params` must come from sample", lambda: apply(X, "fog", {}))
    drawn = corruptions.sample("fog", X.shape, 3, range(4))
    for change in ({"amount": torch.ones(4)}, {"noise": torch.ones(4, 9, 9)}):
        words = r"`params` must come from sample\('fog', ...\) .* do not fit"
        _refused(ValueError, words, lambda c=change: apply(X, "fog", drawn | c))


def test_shapes_and_folders_that_are_none() -> None:
    sample: Any = corruptions.sample
    for shape in (3, "abcd", (4, 3, 32, 32.5), None):
        words = r"`shape` must be the whole numbers"
        _refused(TypeError, words, lambda s=shape: sample("fog", s, 3, [0]))
    call: Any = corruptions.corrupt
    words = r"`frost_pictures` must be a path, got int"
    _refused(TypeError, words, lambda: call(X, "frost", 3, frost_pictures=3))


@pytest.mark.parametrize("name", corruptions.list_corruptions(extra=True))
def test_params_of_other_images(name: str) -> None:
    for shape in ((4, 3, 32, 40), (4, 3, 70, 32), (4, 3, 16, 16)):
        params = corruptions.sample(name, shape, 3, range(4))
        # Filters and constants fit any size; every other draw is one for each pixel.
        per_pixel = any(v.ndim > 1 and v.numel() > 4 * 100 for v in params.values())
        if not per_pixel:
            corruptions.apply(X, name, params)
            continue
        words = r"`params` must be drawn for the images.* pixels, got 32 x 32"
        _refused(ValueError, words, lambda p=params: corruptions.apply(X, name, p))
    params = corruptions.sample(name, (3, 3, 32, 32), 3, range(3))
    if any(v.ndim and len(v) == 3 for v in params.values()):
        with pytest.raises(ValueError, match="drawn for 3 images, got 4"):
            corruptions.apply(X, name, params)


# Words -------------------------------------------------------------------------------------


def test_names_that_are_known_come_in_one_order() -> None:
    assert nearest("q", {"b", "c", "a"}) == "Known: a, b, c."
    assert nearest("q", ["b", "a"]) == "Known: b, a."
    many = [f"name{i}" for i in range(100)]
    assert nearest("name77", many, limit=3).endswith(" and 97 more.")
    texts = {
        _refused(ValueError, "`rate`", lambda: tta.wrap(tiny("bn"), "tent", rate=1))
        for _ in range(3)
    }
    (text,) = texts
    fields = text[text.index("Known: ") + 7 :].split(", ")
    own = [key for key in tta.get_config("tent").to_dict() if key != "name"]
    assert fields[: len(own)] == sorted(own)


def test_the_small_batch_warning_recommends_something_else() -> None:
    for norm, others in (("bn", ["alpha_bn", "unmix_tns"]), ("alpha_bn", ["unmix_tns"])):
        net = nn.Sequential(
            nn.Conv2d(3, 4, 3), nn.AdaptiveAvgPool2d(1), nn.BatchNorm2d(4), nn.Flatten(),
            nn.Linear(4, 10),
        ).eval()  # fmt: skip
        with pytest.warns(UserWarning, match="use larger batches or ") as caught:
            tta.wrap(net, norm)(images(0, 1))
        text = str(caught[0].message)
        assert [n for n in ("alpha_bn", "unmix_tns") if f"norm='{n}'" in text] == others


def _line_of(call: Any) -> tuple[str, str]:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        call()
    (one,) = caught
    return one.filename, Path(one.filename).read_text().splitlines()[one.lineno - 1].strip()


def test_warnings_point_at_the_callers_line() -> None:
    here = __file__
    spoiled = images(0)
    spoiled[0] = NAN

    def wrapped() -> None:
        tta.wrap(tiny("bn"), "tent")  # here: wrap

    def small() -> None:
        adapter(images(0, 1))  # here: one image

    def nested() -> None:
        inside(spoiled)  # here: inside torch

    def ungraded() -> None:
        with torch.no_grad():
            adapter(spoiled)  # here: no_grad

    for call, mark in (
        (wrapped, "wrap"),
        (small, "one image"),
        (nested, "inside torch"),
        (ungraded, "no_grad"),
    ):
        adapter = tta.wrap(tiny("bn"), "bn")
        inside = nn.Sequential(nn.Identity(), nn.Sequential(adapter))
        filename, line = _line_of(call)
        assert filename == here and line.endswith(f"# here: {mark}"), (filename, line)


def test_a_report_reads_the_same_every_way() -> None:
    adapter = tta.wrap(tiny("bn"), "eata.cifar10", source=source_batches())
    adapter(images(0))
    report = adapter.report
    assert any(isinstance(v, torch.Tensor) for v in report.raw().values())
    expected = {key: report[key] for key in report}
    assert all(isinstance(v, (bool, int, float)) for v in expected.values())
    for read in (
        dict(report),
        dict(report.items()),
        {**report},
        dict(zip(report, report.values(), strict=True)),
        dict(report.copy()),
        {k: report.get(k) for k in report},
        {k: getattr(report, k) for k in report},
        json.loads(json.dumps(report)),
        eval(repr(report), {"nan": NAN}),
    ):
        assert read.keys() == expected.keys()
        for key, value in read.items():
            assert type(value) is type(expected[key]) and (value == expected[key] or value != value)
    assert any(isinstance(v, torch.Tensor) for v in report.copy().raw().values())
