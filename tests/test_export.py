"""Exported graphs do what the adapter does: logits, state, resets, and what they refuse."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import warnings

import numpy as np
import pytest
import torch
from torch import nn

import tta
from tests.helpers.exported import Graph, differences, make, stream
from tests.helpers.nets import tiny

pytest.importorskip("onnxscript")
pytest.importorskip("onnxruntime")

SHAPE = (3, 16, 16)
EXAMPLE = torch.rand(2, *SHAPE, generator=torch.Generator().manual_seed(0))
SLOTS = [
    {"recipe": "source"},
    {"norm": "bn"},
    {"norm": tta.get_config("bn", official=True)},
    {"norm": "alpha_bn"},
    {"norm": "unmix_tns"},
    {"norm": "robust_bn"},
    {"norm": tta.get_config("robust_bn", official=True)},
    {"norm": "bn_ema"},
    {"norm": "adaptive_bn"},
    {"norm": "iabn"},
    {"norm": tta.get_config("iabn", learned_statistics=False)},
    {"output": "lsa", "source": [(torch.rand(40, *SHAPE), torch.arange(40) % 10)]},
    {"output": "neo"},
    {"output": tta.get_config("neo", balanced=True, momentum=0.1)},
    {"output": "foa_shift"},
    {"output": tta.get_config("t3a", filter_size=3)},
    {"norm": "bn", "output": "prior_correction"},
    {"output": "lame"},
    {"output": tta.get_config("lame", affinity="knn", symmetric=True)},
    {"output": tta.get_config("lame", affinity="linear")},
    {"output": tta.get_config("adanpc", capacity=20, neighbours=10)},
    {"output": tta.get_config("adanpc", capacity=20, ball_radius=0.6)},
    {"output": "drift"},
    {"output": "persistence"},
    {"norm": "adaptive_bn", "output": "drift"},
    {"norm": "robust_bn", "output": "neo", "guard": tta.get_config("periodic", every=3)},
]
LEARNED = [{"update": "tent"}, {"recipe": "rotta", "mean": (0.0,) * 3, "std": (1.0,) * 3}]


def _name(recipe) -> str:
    parts = [
        v if isinstance(v, str) else v.name
        for k, v in recipe.items()
        if k not in ("mean", "std", "source")
    ]
    fields = [
        f"{k}={v}"
        for part in recipe.values()
        if hasattr(part, "to_dict")
        for k, v in part.to_dict().items()
        if k in ("affinity", "learned_statistics", "official", "balanced", "ball_radius")
        and v != tta.get_config(part.name).to_dict()[k]
    ]
    return "+".join([*parts, *fields])


# Some among the slow tests, one of each kind of trouble; the others are for `make soak`.
CHOSEN = ("unmix_tns", "iabn", "adaptive_bn+drift", "t3a", "lame", "adanpc", "rotta")
SAMPLED = [
    pytest.param(r, marks=pytest.mark.slow if _name(r) in CHOSEN else pytest.mark.soak)
    for r in [*SLOTS, *LEARNED]
]


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """One graph for all quick tests, since making it takes seconds."""
    adapter = tta.wrap(tiny("bn"), norm="robust_bn", output="neo")
    for images in stream(3, [4], SHAPE, seed=5):
        adapter(images)
    before = adapter.state()
    folder = tta.export.to_onnx(adapter, tmp_path_factory.mktemp("edge") / "camera", EXAMPLE)
    after = adapter.state()
    assert all(torch.equal(before[key], after[key]) for key in before)
    return adapter, folder


def test_same_logits_and_state_for_any_batch_size(exported) -> None:
    adapter, folder = exported
    graph, start = Graph(folder), adapter.state()
    found = differences(graph, adapter, stream(12, [1, 4, 16], SHAPE))
    assert found["logits"] < 1e-5 and found["state"] < 1e-5 and found["decisions"] == 0
    assert set(graph.keys.values()) == set(start) - {"rng"}
    moved = graph.by_key()["output/centre"]
    assert not np.allclose(moved, start["output/centre"].numpy())
    adapter.load_state(start)


def test_images_far_outside_are_left_out_there_too(exported) -> None:
    """One of four, then all of the batch."""
    adapter, folder = exported
    graph, start = Graph(folder), adapter.state()
    for rows in ([1], [0, 1, 2, 3], []):
        images = next(stream(1, [4], SHAPE, seed=len(rows)))
        images[rows] *= 500
        before = adapter.state()
        found = differences(graph, adapter, [images])
        assert found["logits"] < 1e-4 and found["state"] < 1e-4 and found["decisions"] == 0
        moved = not torch.equal(before["norm/layer1.1.mean"], adapter.state()["norm/layer1.1.mean"])
        assert moved == (len(rows) < 4)
    adapter.load_state(start)


def test_reset_starts_from_the_exported_state(exported) -> None:
    adapter, folder = exported
    graph, x = Graph(folder), EXAMPLE
    with adapter.frozen():
        first = graph(x, reset=True)
    graph(3 * x)
    assert not np.array_equal(graph(x), first)
    assert np.array_equal(graph(x, reset=True), first)


def test_a_guard_goes_back_to_where_the_adapter_began() -> None:
    """However much it had learned before it was exported; a reset starts from that."""
    periodic = tta.get_config("periodic", every=4)
    adapter = tta.wrap(tiny("bn"), norm="robust_bn", output="neo", guard=periodic)
    batches = list(stream(12, [4, 1], SHAPE))
    for images in batches[:2]:
        adapter(images)
    function = tta.export.to_function(adapter, EXAMPLE)
    state = function.start()
    with torch.no_grad():
        for t, images in enumerate(batches[2:]):
            logits, *state = function(images, torch.tensor([t == 0]), state)
            torch.testing.assert_close(logits, adapter(images), atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("norm", ["adaptive_bn", "robust_bn"])
def test_a_layer_that_one_image_gives_one_value(tmp_path, norm: str) -> None:
    """As behind a pool: such a batch moves nothing there, in a graph as in Python."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        body = [nn.Conv2d(3, 8, 3), nn.AdaptiveAvgPool2d(1), nn.BatchNorm2d(8), nn.Flatten()]
        net = nn.Sequential(*body, nn.BatchNorm1d(8), nn.Linear(8, 10)).eval()
    adapter = tta.wrap(net, norm=norm)
    graph = Graph(tta.export.to_onnx(adapter, tmp_path / "camera", EXAMPLE))
    found = differences(graph, adapter, stream(8, [1, 3, 1, 1], SHAPE))
    assert found["logits"] < 1e-5 and found["state"] < 1e-5 and found["decisions"] == 0


def test_classes_of_next_to_no_probability(tmp_path) -> None:
    """LAME adds 1e-10 to each probability, which an exporter must not take for nothing."""
    net = tiny("bn")
    head = [m for m in net.modules() if isinstance(m, nn.Linear)][-1]
    with torch.no_grad():
        head.weight.mul_(200)
    adapter = tta.wrap(net, "lame")
    images = next(stream(1, [4], SHAPE, seed=0))
    assert net(images).softmax(1).min() < 1e-12
    graph = Graph(tta.export.to_onnx(adapter, tmp_path / "g", images))
    found = differences(graph, adapter, stream(3, [4], SHAPE, seed=1))
    assert found["logits"] < 1e-3 and found["decisions"] == 0


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_state_that_is_no_number_is_refused(exported, bad) -> None:
    """The source answers, and the state stays as it came, until a reset heals it."""
    _, folder = exported
    graph = Graph(folder)
    graph(EXAMPLE)
    graph.state["state_in_1"] = np.full_like(graph.state["state_in_1"], bad)
    before = dict(graph.state)
    with torch.no_grad():
        source = tiny("bn")(EXAMPLE).numpy()
    assert np.allclose(graph(EXAMPLE), source, atol=1e-6)
    assert all(np.array_equal(graph.state[k], before[k], equal_nan=True) for k in before)
    graph(EXAMPLE, reset=True)
    assert all(np.isfinite(value).all() for value in graph.state.values())


@pytest.mark.parametrize("bad", [np.nan, np.inf, 1e30])
def test_images_that_are_no_numbers_teach_nothing(exported, bad) -> None:
    _, folder = exported
    graph, x = Graph(folder), EXAMPLE.clone()
    graph(EXAMPLE)
    before, x[0, 0, 0, 0] = dict(graph.state), bad
    with torch.no_grad():
        source = tiny("bn")(EXAMPLE).numpy()
    answer = graph(x)
    assert np.allclose(answer[1], source[1], atol=1e-6) and np.isnan(answer[0]).all()
    assert all(np.array_equal(graph.state[k], before[k]) for k in before)


def test_an_update_that_learns_fast_is_exported_as_it_is_now(tmp_path) -> None:
    """Also in 8 bits, where a network makes numbers of what is none."""
    layers = nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.AdaptiveAvgPool2d(1)
    net = nn.Sequential(*layers, nn.Flatten(), nn.Linear(8, 10)).eval()
    adapter = tta.wrap(net, "tent.cifar10", lr=1.0)
    adapter(EXAMPLE)
    before = adapter.state()
    graph = Graph(tta.export.to_onnx(adapter, tmp_path, EXAMPLE, calibration=[EXAMPLE]))
    assert adapter.session.learning and torch.equal(before["rng"], adapter.state()["rng"])
    with adapter.frozen():
        wanted = adapter(EXAMPLE).numpy()
    assert np.allclose(graph(EXAMPLE), wanted, atol=0.1)
    x = EXAMPLE.clone()
    x[0, 0, 0, 0] = torch.nan
    assert np.isnan(graph(x)).all(1).tolist() == [True, False]


def test_the_graph_holds_plain_arithmetic(exported) -> None:
    import onnx

    _, folder = exported
    model = onnx.load(str(folder / "model.onnx"))
    onnx.checker.check_model(model)
    assert [(o.domain, o.version) for o in model.opset_import] == [("", 18)]
    modes = [a.i for n in model.graph.node for a in n.attribute if a.name == "training_mode"]
    assert not any(modes) and not any(n.domain for n in model.graph.node)
    inputs = {i.name: i.type.tensor_type for i in model.graph.input}
    assert list(inputs)[:3] == ["images", "reset", "state_in_0"]
    shape = [d.dim_value or d.dim_param for d in inputs["images"].shape.dim]
    assert isinstance(shape[0], str) and shape[1:] == list(SHAPE)
    assert [d.dim_value for d in inputs["reset"].shape.dim] == [1]
    assert [o.name for o in model.graph.output][:2] == ["logits", "state_out_0"]


def test_config_for_triton(exported) -> None:
    """What its documentation asks of implicit state: names, types and shapes as in the graph."""
    _, folder = exported
    text = (folder / "config.pbtxt").read_text()
    graph = Graph(folder)
    assert 'name: "camera"' in text and "max_batch_size: 0" in text
    assert text.count("{") == text.count("}") and text.count("[") == text.count("]")
    assert "CONTROL_SEQUENCE_START" in text and "bool_false_true: [ false, true ]" in text
    entry = r'input_name: "(\w+)"\s+output_name: "(\w+)"\s+data_type: TYPE_(\w+)\s+dims: '
    entry += r"\[ ([\d, ]+) \]"
    found = re.findall(entry, text)
    kinds = {"FP32": np.float32, "INT64": np.int64}
    assert [name for name, *_ in found] == list(graph.state)
    for name, output, kind, dims in found:
        value = graph.state[name]
        assert output == name.replace("_in_", "_out_") and kinds[kind] == value.dtype
        assert tuple(map(int, dims.split(", "))) == value.shape


def test_run_py_over_a_folder(exported, tmp_path) -> None:
    from PIL import Image

    adapter, folder = exported
    script = (folder / "run.py").read_text()
    assert len(script.splitlines()) <= 60
    assert set(re.findall(r"^\s*(?:import|from) (\w+)", script, re.M)) <= {
        "argparse", "collections", "json", "os", "pathlib", "sys", "typing",
        "numpy", "onnxruntime", "PIL",
    }  # fmt: skip
    images = tmp_path / "images"
    images.mkdir()
    arrays = [x[0] for x in stream(3, [1], SHAPE)]
    for i, array in enumerate(arrays):
        np.save(images / f"{i}.npy", array.numpy())
    picture = (np.random.default_rng(0).random((20, 24, 3)) * 255).astype(np.uint8)
    Image.fromarray(picture).save(images / "z.png")
    command = [sys.executable, folder / "run.py", images, "--state", tmp_path / "state.npz"]
    lines = subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()
    rows = [json.loads(line) for line in lines]
    assert [row["file"] for row in rows] == ["0.npy", "1.npy", "2.npy", "z.png"]
    start = adapter.state()
    for row, array in zip(rows, arrays, strict=False):
        probs = adapter(array[None]).softmax(1)[0]
        assert row["class"] == int(probs.argmax())
        assert row["probability"] == pytest.approx(float(probs.max()), abs=2e-4)
    adapter.load_state(start)
    kept = dict(np.load(tmp_path / "state.npz"))
    assert kept["state_in_5"] == start["output/count"].item() + 4
    subprocess.run(command, capture_output=True, check=True)
    assert np.load(tmp_path / "state.npz")["state_in_5"] == kept["state_in_5"] + 4


def test_what_has_no_graph_is_refused(tmp_path) -> None:
    with pytest.raises(TypeError, match=r"`adapter` must be one that tta\.wrap returned, got Cnn"):
        tta.export.to_onnx(tiny("bn"), tmp_path, EXAMPLE)
    growing = tta.wrap(tiny("bn"), output=tta.get_config("t3a", filter_size=None))
    with pytest.raises(ValueError, match="fixed shapes to be exported, got 'output/support"):
        tta.export.to_onnx(growing, tmp_path, EXAMPLE)
    trained = make({"output": "adanpc_bn"}, tiny("bn"))
    with pytest.raises(ValueError, match="without gradients to be exported, got 'adanpc_bn'"):
        tta.export.to_onnx(trained, tmp_path, EXAMPLE)
    guarded = tta.wrap(tiny("bn"), norm="robust_bn", guard="steady")
    with pytest.raises(ValueError, match="by the number of batches alone"):
        tta.export.to_onnx(guarded, tmp_path, EXAMPLE)
    shadow = tta.wrap(tiny("bn"), norm="robust_bn", shadow=True)
    with pytest.raises(ValueError, match="shadow=True"):
        tta.export.to_onnx(shadow, tmp_path, EXAMPLE)
    windowed = tta.wrap(tiny("bn"), "bn", window=4)
    with pytest.raises(ValueError, match="`window` must be left out"):
        tta.export.to_onnx(windowed, tmp_path, EXAMPLE)
    assert list(tmp_path.iterdir()) == []


class Around(nn.Module):
    """A network that is called in another way: twice, in parts, or in half precision."""

    def __init__(self, way: str) -> None:
        super().__init__()
        self.net, self.way = tiny("bn").eval(), way

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.way == "parts":
            return torch.cat([self.net(part) for part in x.split(3)])
        if self.way == "autocast":
            with torch.autocast("cpu", torch.bfloat16):
                return self.net(x)
        return self.net(x) + self.net(x.flip(-1))


@pytest.mark.slow
@pytest.mark.parametrize("norm", ["robust_bn", "bn_ema"])
def test_layers_that_are_called_twice_in_a_pass(norm, tmp_path) -> None:
    graph = Graph(
        tta.export.to_onnx(tta.wrap(Around("twice").eval(), norm=norm), tmp_path, EXAMPLE)
    )
    adapter = tta.wrap(Around("twice").eval(), norm=norm)
    found = differences(graph, adapter, stream(6, [4, 1, 3], SHAPE))
    assert found["logits"] < 1e-5 and found["state"] < 1e-5 and found["decisions"] == 0


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_precisions_are_refused(dtype, tmp_path) -> None:
    adapter = tta.wrap(tiny("bn").to(dtype), norm="robust_bn")
    with pytest.raises(ValueError, match="`adapter` must be in float32 to be exported, got"):
        tta.export.to_onnx(adapter, tmp_path, EXAMPLE.to(dtype))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
@pytest.mark.parametrize("way", ["parts", "autocast"])
def test_what_the_runtime_refuses_is_said(way, tmp_path) -> None:
    adapter = tta.wrap(Around(way).eval(), norm="robust_bn")
    with pytest.raises(ValueError, match="whose graph onnxruntime runs to be exported") as caught:
        tta.export.to_onnx(adapter, tmp_path, EXAMPLE)
    assert len(str(caught.value)) <= 300 and list(tmp_path.iterdir()) == []


def test_a_setting_is_none_of_the_graph(tmp_path) -> None:
    """What is in half precision in torch is in float32 there."""
    setting = tta.Setting(precision="bfloat16", memory_format="channels_last")
    adapter = tta.wrap(tiny("bn"), output="neo", setting=setting)
    graph = Graph(tta.export.to_onnx(adapter, tmp_path, EXAMPLE))
    assert adapter.config.setting == setting
    plain = tta.wrap(tiny("bn"), output="neo")
    found = differences(graph, plain, stream(3, [4], SHAPE))
    assert found["logits"] < 1e-5 and found["decisions"] == 0


@pytest.fixture(scope="module")
def in_8_bits(tmp_path_factory):
    adapter = tta.wrap(tiny("bn"), norm="bn_ema", output="neo")
    images = [(x, torch.zeros(len(x))) for x in stream(30, [8], SHAPE, seed=3)]
    folder = tmp_path_factory.mktemp("int8")
    return adapter, tta.export.to_onnx(adapter, folder, EXAMPLE, calibration=images)


@pytest.mark.slow
def test_the_network_is_quantised_and_what_adapts_is_not(in_8_bits) -> None:
    import onnx

    adapter, folder = in_8_bits
    model = onnx.load(str(folder / "model.onnx"))
    made_by = {output: node for node in model.graph.node for output in node.output}
    kinds = [node.op_type for node in model.graph.node]
    weights = {t.name: t for t in model.graph.initializer}
    for node in model.graph.node:
        from_8_bits = [made_by[i].op_type == "DequantizeLinear" for i in node.input if i in made_by]
        if node.op_type == "Conv":
            assert all(from_8_bits)
            scales = weights[made_by[node.input[1]].input[1]].dims
            assert list(scales) == [weights[made_by[node.input[1]].input[0]].dims[0]]
        elif node.op_type == "BatchNormalization":  # its statistics are in float32
            assert not any(from_8_bits)
    assert kinds.count("Conv") == 2 and kinds.count("QuantizeLinear") >= 4
    noted = {p.key: p.value for p in model.metadata_props}
    assert noted["precision"] == "int8" and not any(key.startswith("onnx") for key in noted)
    graph = Graph(folder)
    assert set(graph.keys.values()) == set(adapter.state()) - {"rng"}
    start, gap = adapter.state(), 0.0
    for images in stream(20, [8], SHAPE, seed=3):
        own, theirs = adapter(images).numpy(), graph(images)
        gap = max(gap, float(np.abs(own - theirs).max() / np.abs(own).max()))
    assert 1e-6 < gap < 0.5
    for key, value in graph.by_key().items():
        assert np.allclose(value, adapter.state()[key].numpy().reshape(value.shape), atol=0.1), key
    adapter.load_state(start)
    bad = EXAMPLE.clone()
    bad[0] = np.nan
    before = dict(graph.state)
    graph(bad)
    assert all(np.array_equal(graph.state[k], before[k]) for k in before)


def test_what_cannot_calibrate_is_refused(tmp_path) -> None:
    adapter = tta.wrap(tiny("bn"), output="neo")
    for calibration, kind, message in (
        (EXAMPLE, TypeError, "`calibration` must give batches of images, got Tensor"),
        ([[1.0]], TypeError, "`calibration` must give tensors, got float"),
        ([], ValueError, "`calibration` must hold at least one image, got none"),
        ([EXAMPLE[..., :8]], ValueError, "`calibration` must hold images like the example"),
        ([EXAMPLE / 0], ValueError, "`calibration` must hold finite pixels"),
    ):
        with pytest.raises(kind, match=message):
            tta.export.to_onnx(adapter, tmp_path, EXAMPLE, calibration=calibration)
    assert list(tmp_path.iterdir()) == []


class Deciding(nn.Module):
    """A model that looks at values in Python, which a graph cannot."""

    def __init__(self) -> None:
        super().__init__()
        self.net = tiny("bn")

    def forward(self, x):
        return self.net(x) if float(x.mean()) > 0 else self.net(-x)


def test_a_model_that_decides_by_values_is_refused_and_stays(tmp_path) -> None:
    adapter = tta.wrap(Deciding(), norm="robust_bn")
    before = adapter.state()
    with pytest.raises(ValueError, match="`adapter` must compute the same way for all values"):
        tta.export.to_onnx(adapter, tmp_path, EXAMPLE)
    assert all(torch.equal(value, before[key]) for key, value in adapter.state().items())
    assert list(tmp_path.iterdir()) == [] and torch.isfinite(adapter(EXAMPLE)).all()


def test_torch_export_asks_for_a_frozen_adapter() -> None:
    adapter = tta.wrap(tiny("bn"), norm="robust_bn", output="neo")
    with pytest.raises(RuntimeError, match="`adapter` must be frozen"):
        torch.export.export(adapter, (EXAMPLE,), strict=False)
    adapter.freeze()
    free = {"args": ({0: torch.export.Dim.DYNAMIC},)}
    program = torch.export.export(adapter, (EXAMPLE,), dynamic_shapes=free, strict=False)
    other = torch.rand(5, *SHAPE)
    found = program.module()(other)
    assert torch.allclose(found, adapter(other), atol=1e-6) and not found.requires_grad
    assert type(adapter.output.report.get("x", 0)) is int  # nothing of the trace stays behind


@pytest.mark.parametrize(
    ("update", "output"), [(None, "lame"), (None, "prior_correction"), ("tent.cifar10", "lame")]
)
def test_a_guard_that_answers_without_the_output_rule_does_so_in_graphs(
    update, output, tmp_path
) -> None:
    adapter = tta.wrap(tiny("gn"), update, output=output, guard="steady")
    for images in stream(4, [32], SHAPE):
        adapter(images)
    assert "output rule" in adapter.health["reason"]
    adapter.freeze()
    images = next(stream(1, [32], SHAPE, seed=9))
    wanted = adapter(images)
    tta.export.to_onnx(adapter, tmp_path, EXAMPLE)  # tries the graph beside the adapter
    free = {"args": ({0: torch.export.Dim.DYNAMIC},)}
    program = torch.export.export(adapter, (EXAMPLE,), dynamic_shapes=free, strict=False)
    assert torch.allclose(program.module()(images), wanted, atol=1e-5)


def test_a_loop_in_a_program_asks_for_no_gradients_of_statistics() -> None:
    adapter = tta.wrap(tiny("bn"), norm="bn", output="lame")
    adapter.freeze()
    free = {"args": ({0: torch.export.Dim.DYNAMIC},)}
    program = torch.export.export(adapter, (EXAMPLE,), dynamic_shapes=free, strict=False)
    images = next(stream(1, [7], SHAPE))
    assert torch.allclose(program.module()(images), adapter(images), atol=1e-4)


@pytest.mark.parametrize("recipe", SAMPLED, ids=_name)
def test_torch_export_of_frozen_adapters(recipe) -> None:
    adapter = make(recipe, tiny("bn"))
    for images in stream(3, [8], SHAPE):
        adapter(images)
    adapter.freeze()
    free = {"args": ({0: torch.export.Dim.DYNAMIC},)}
    program = torch.export.export(adapter, (EXAMPLE,), dynamic_shapes=free, strict=False)
    for size in (2, 7):
        images = next(stream(1, [size], SHAPE, seed=size))
        assert torch.allclose(program.module()(images), adapter(images), atol=1e-4)


@pytest.mark.parametrize("recipe", SAMPLED, ids=_name)
def test_every_recipe_over_200_batches(recipe, tmp_path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        adapter = make(recipe, tiny("bn"))
        for images in stream(3, [8], SHAPE) if adapter.update is not None else ():
            adapter(images)
        if adapter.update is not None:
            adapter.freeze()
        start, folder = adapter.state(), tta.export.to_onnx(adapter, tmp_path / "g", EXAMPLE)
        for size in (1, 16):
            adapter.load_state(start)
            found = differences(Graph(folder), adapter, stream(200, [size], SHAPE, seed=size))
            assert found["logits"] < 1e-3 and found["state"] < 1e-3, found
            assert found["decisions"] == 0
    assert (
        bool(Graph(folder).keys)
        == any(
            key != "rng" and not key.startswith(("guard", "param", "update", "optim"))
            for key in start
        )
        or adapter.update is not None
    )


@pytest.mark.slow
def test_it_runs_where_there_is_no_torch(exported, tmp_path) -> None:
    """An empty environment with numpy and onnxruntime, from the package index if it is reached."""
    _, folder = exported
    venv = tmp_path / "venv"
    subprocess.run([sys.executable, "-m", "venv", venv], check=True)
    python = venv / "bin" / "python"
    command = [python, "-m", "pip", "install", "-q", "--retries", "1", "onnxruntime", "numpy"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600)
    if done.returncode:
        pytest.skip(f"pip cannot install onnxruntime here: {done.stderr.strip()[-200:]}")
    missing = subprocess.run([python, "-c", "import torch"], capture_output=True)
    assert missing.returncode
    images = tmp_path / "images"
    images.mkdir()
    for i, image in enumerate(stream(3, [1], SHAPE)):
        np.save(images / f"{i}.npy", image[0].numpy())
    own, theirs = (
        subprocess.run([p, folder / "run.py", images], capture_output=True, text=True, check=True)
        for p in (sys.executable, python)
    )
    assert theirs.stdout == own.stdout and len(own.stdout.splitlines()) == 3
