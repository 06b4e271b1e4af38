"""Building, resuming, reproducing, and refusing streams."""

import json
import random
import sys
from itertools import chain, islice

import numpy as np
import pytest
import torch
from matplotlib.figure import Figure
from matplotlib.text import Text
from PIL import Image

from tta import streams
from tta.streams import strip

SIZE = 200
LABELS = np.random.default_rng(0).permutation(np.arange(SIZE) % 4)
IMAGES = np.random.default_rng(1).integers(0, 256, (SIZE, 4, 4, 3), dtype=np.uint8)
DATA = (IMAGES, LABELS)
NAMES = ["fog", "snow", "frost"]
SCENARIOS = streams.list_scenarios()


def noisy(images, domain, severity, *, generator):
    return (images + 0.1 * severity * torch.rand(images.shape, generator=generator)).clamp(0, 1)


def build(scenario="continual", dataset=DATA, **arguments):
    arguments = {"domains": NAMES, "transform": noisy, "batch_size": 24, **arguments}
    if scenario == "walk":
        arguments.setdefault("total", 1000)
    if scenario == "recurring":
        arguments.setdefault("visits", 3)
    return streams.build(scenario, dataset, **arguments)


def same(a, b):
    return (
        torch.equal(a.images, b.images)
        and torch.equal(a.labels, b.labels)
        and torch.equal(a.index, b.index)
        and (a.step, a.domains, a.severities, a.reset, a.late, a.adapt, a.visit, a.latency)
        == (b.step, b.domains, b.severities, b.reset, b.late, b.adapt, b.visit, b.latency)
    )


def test_all_seventeen_names():
    assert len(SCENARIOS) == 17 and "dirichlet_slots" in SCENARIOS


@pytest.mark.parametrize("scenario", SCENARIOS)
def test_batches_have_the_promised_form(scenario):
    stream = build(scenario, seed=1)
    steps = []
    for batch in stream.from_step(max(0, len(stream) - 20)):
        n = len(batch)
        assert batch.images.shape == (n, 3, 4, 4) and batch.images.dtype == torch.float32
        assert batch.images.min() >= 0 and batch.images.max() <= 1
        assert batch.labels.shape == batch.index.shape == (n,)
        assert batch.labels.dtype == batch.index.dtype == torch.int64
        assert np.array_equal(batch.labels.numpy(), LABELS[batch.index.numpy()])
        assert len(batch.domains) == len(batch.severities) == n and isinstance(batch.domain, str)
        steps.append(batch.step)
    assert steps == list(range(max(0, len(stream) - 20), len(stream)))


@pytest.mark.parametrize("scenario", SCENARIOS)
def test_reproducible_resumable_and_json(scenario):
    random.seed(0), np.random.seed(0), torch.manual_seed(0)
    before = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state()
    stream = build(scenario, seed=7, clock={"ratio": 2.0})
    config = json.loads(json.dumps(stream.config))
    again = streams.from_config(config, DATA, transform=noisy)
    assert again.config == stream.config and len(again) == len(stream)
    n = len(stream) * 2 // 3
    whole = [b for b in stream if b.step >= n][:8]
    for view in (again.from_step(n), stream.from_step(n)):
        assert len(view) == len(stream) - n
        assert all(same(a, b) for a, b in zip(view, whole, strict=False))
    assert random.getstate() == before[0]
    assert np.random.get_state()[1].tolist() == before[1]
    assert torch.equal(torch.get_rng_state(), before[2])
    other = build(scenario, seed=8)
    first = [next(iter(s)).index.tolist() for s in (stream, other)]
    assert first[0] != first[1]


def test_from_step_makes_no_skipped_image():
    calls = []

    def counting(images, domain, severity, *, generator):
        calls.append(len(images))
        return images

    stream = build(transform=counting)
    assert not calls
    iterator = iter(stream.from_step(20))
    assert not calls
    assert next(iterator).step == 20 and len(calls) == 1
    stream.preview()
    assert len(calls) == 1
    assert list(stream.from_step(len(stream))) == []


def test_order_of_a_domain_does_not_depend_on_its_place():
    def order(stream, name):
        return [
            rows.index.tolist() for rows, _ in stream.rows() if rows.conditions[0].domain == name
        ]

    ahead, behind = build(), build(domains=["snow", "frost", "fog"])
    assert order(ahead, "fog") == order(behind, "fog")
    assert order(ahead, "fog") != order(ahead, "snow")
    assert build().preview().same_order < 0.05
    shared = build(shared_order=True)
    assert order(shared, "fog") == order(shared, "snow") and shared.preview().same_order == 1.0
    subset = build(num_samples=50)
    chosen = [set(chain(*order(subset, name))) for name in NAMES]
    assert all(len(c) == 50 for c in chosen) and chosen[0] != chosen[1]
    chosen = [set(chain(*order(build(num_samples=50, shared_order=True), n))) for n in NAMES]
    assert chosen[0] == chosen[1] == chosen[2]


def test_shuffled_domains_depend_on_the_seed():
    orders = {
        tuple(s.domain for s in build(shuffle_domains=True, seed=seed).preview().visits)
        for seed in range(12)
    }
    assert len(orders) > 2 and all(sorted(o) == sorted(NAMES) for o in orders)
    stream = build(shuffle_domains=True, seed=3)
    again = streams.from_config(stream.config, DATA, transform=noisy)
    assert again.preview().visits == stream.preview().visits


def test_last_batch_policies():
    assert [len(b) for b in build()][8::9] == [8, 8, 8]
    assert {len(b) for b in build(last_batch="drop")} == {24}
    spanning = list(build(last_batch="span"))
    assert [len(b) for b in spanning] == [24] * 25
    assert spanning[8].domain == "mixed" and set(spanning[8].domains) == {"fog", "snow"}
    # A reset ends a batch even so.
    resetting = list(build("reset_each_shift", last_batch="span"))
    assert [len(b) for b in resetting][8::9] == [8, 8, 8]


class Items(torch.utils.data.Dataset):
    """A dataset of tensors that counts what is read."""

    def __init__(self, labelled):
        self.read = 0
        if labelled:
            self.targets = LABELS.tolist()

    def __len__(self):
        return SIZE

    def __getitem__(self, i):
        self.read += 1
        return torch.from_numpy(IMAGES[i]).permute(2, 0, 1), int(LABELS[i])


def test_kinds_of_datasets_agree():
    tensors = torch.utils.data.TensorDataset(
        torch.from_numpy(IMAGES).permute(0, 3, 1, 2) / 255, torch.from_numpy(LABELS)
    )
    subset = torch.utils.data.Subset(Items(True), range(SIZE))
    listed = [(IMAGES[i], LABELS[i]) for i in range(SIZE)]
    wanted = next(iter(build("sorted")))
    for dataset in (
        Items(True),
        Items(False),
        tensors,
        subset,
        listed,
        (torch.from_numpy(IMAGES), torch.from_numpy(LABELS)),
    ):
        assert same(next(iter(build("sorted", dataset))), wanted)
    quiet, talking = Items(True), Items(False)
    build("sorted", quiet).preview()
    assert quiet.read == 0
    build("sorted", talking, labels=LABELS).preview()
    assert talking.read == 0
    build("sorted", talking).preview()
    assert talking.read == SIZE


def test_target_transform_is_not_bypassed():
    dataset = Items(True)
    dataset.targets = [9] * SIZE
    dataset.target_transform = int
    batch = next(iter(build("sorted", dataset)))
    assert batch.labels.tolist() == [0] * 24


def test_domains_that_are_datasets():
    small = (IMAGES[:40] // 2, LABELS[:40])
    stream = streams.build("lifelong", DATA, {"photo": small, "sketch": DATA}, batch_size=20)
    kept = [(s.domain, s.samples) for s in stream.preview().visits]
    assert kept == [("photo", 40), ("clean", 200), ("sketch", 200), ("clean", 200)]
    batch = next(iter(stream))
    pixels = torch.from_numpy(small[0][batch.index.numpy()]).permute(0, 3, 1, 2) / 255
    assert torch.equal(batch.images, pixels)
    mapping = {"photo": small, "sketch": DATA}
    again = streams.from_config(stream.config, DATA, domains=mapping)
    assert same(next(iter(again)), batch)
    levels = {"fog": {s: (np.full_like(IMAGES, 10 * s), LABELS) for s in range(1, 6)}}
    gradual = list(streams.build("gradual", None, levels, batch_size=SIZE))
    assert [round(float(b.images.mean() * 25.5)) for b in gradual] == [1, 2, 3, 4, 5, 4, 3, 2, 1]


def test_declared_clock_and_stopwatch():
    late = [b.late for b in build(clock=streams.Clock(ratio=2.5, eta=1.0))][:7]
    assert late == [False, True, True, False, True, True, False]
    assert not any(b.late for b in build(clock={"ratio": 40.0, "eta": 0.0}))
    assert [b.adapt for b in build(clock={"ratio": 2.0})][:4] == [True, False, True, False]
    # 0.1 * 30 is a little more than 3 in floating point.
    assert streams.Clock(ratio=30.0, eta=0.1).delay(30.0) == 2
    stream = build(clock={"measured": True})
    flags = []
    for batch in stream:
        flags.append(batch.late)
        if not batch.late:
            stream.stopwatch.report(adaptive=3.0, plain=1.0)
    assert flags[:6] == [False, True, True, False, True, True]
    assert not next(iter(stream)).late
    result = stream.stopwatch.run(lambda: "answer", lambda: None)
    assert result == "answer" and stream.stopwatch.ratio > 0


def turns(count, **fields):
    return list(islice(streams.Clock(**fields).turns(), count))


def test_batches_wait_and_the_oldest_is_evicted():
    # Batch 0 takes 0 to 2, batch 1 waits from 1 and takes 2 to 4. At 4, batches 2 and 3 have come
    # and one may wait: 2 is evicted. Batch 3 takes 4 to 6, and so on.
    found = turns(7, ratio=2.0, queue=1)
    assert [turn.late for turn in found] == [False, False, True, False, True, False, True]
    assert [turn.latency for turn in found] == [2.0, 3.0, 1.0, 3.0, 1.0, 3.0, 1.0]
    # Two may wait, batches come at half the pace: every answer takes 1.5 arrivals.
    found = turns(7, ratio=3.0, eta=0.5, queue=2)
    assert [turn.late for turn in found] == [False] * 5 + [True, False]
    assert [turn.latency for turn in found[:5]] == [3.0, 4.0, 5.0, 6.0, 7.0]
    # Nobody waits for a method that is in time, and a stream that waits has no queue.
    assert not any(turn.late for turn in turns(50, ratio=1.0, queue=0))
    assert {turn.latency for turn in turns(9, ratio=9.0, eta=0.0, queue=1)} == {9.0}


@pytest.mark.parametrize("ratio", [0.5, 1.0, 2.0, 2.5, 30.0])
@pytest.mark.parametrize("eta", [0.0, 0.1, 0.7, 1.0])
def test_without_a_queue_the_clock_is_that_of_alfarra(ratio, eta):
    clock = streams.Clock(ratio=ratio, eta=eta)
    period = clock.delay(ratio) + 1
    assert [turn.late for turn in islice(clock.turns(), 200)] == [
        k % period != 0 for k in range(200)
    ]
    assert clock.is_late(101) is (101 % period != 0)


def test_learning_ends_when_its_time_is_used_up():
    # Each batch that is learned from uses two plain forwards more than a plain one.
    learns = [True, True, True, False, False, False]
    found = turns(6, ratio=3.0, eta=0.0, overhead=5.0)
    assert [turn.learns for turn in found] == learns and not any(turn.late for turn in found)
    assert [turn.latency for turn in found] == [3.0, 3.0, 3.0, 1.0, 1.0, 1.0]
    clock = {"ratio": 3.0, "eta": 0.0, "overhead": 5.0}
    assert [b.adapt for b in build(clock=clock)][:6] == learns
    assert [b.adapt for b in build(clock=clock).from_step(2)][:4] == learns[2:]
    assert not any(turn.learns for turn in turns(3, ratio=3.0, overhead=0.0))
    # A frozen method is in time again.
    late = [turn.late for turn in turns(6, ratio=3.0, overhead=2.0)]
    assert late == [False, True, True, False, False, False]


def test_a_stopwatch_does_as_a_declared_clock():
    for fields in ({}, {"queue": 1}, {"queue": 2, "eta": 0.5}, {"overhead": 5.0, "queue": 1}):
        stream = build(clock={"measured": True, **fields})
        found = []
        for batch in stream:
            if batch.adapt:
                stream.stopwatch.report(adaptive=3.0, plain=1.0)
            assert batch.latency is None
            found.append((batch.late, batch.adapt, stream.stopwatch.latency))
        assert found == turns(len(found), ratio=3.0, **fields), fields
    assert stream.stopwatch.spent == 6.0
    assert not streams.Stopwatch(stream.clock, spent=5.0).learns


def test_a_preview_can_be_drawn(tmp_path, monkeypatch):
    stream = build("gradual", domains=["fog", "sn$w$"], severities=[1, 5], batch_size=50)
    drawn = []
    plot = strip._plot
    monkeypatch.setattr(strip, "_plot", lambda f, *a: (drawn.append(f), plot(f, *a)))
    figures = stream.preview(draw=tmp_path / "stream.png")
    (domain, label, severity) = [axes.lines[0].get_ydata() for axes in drawn[0].axes]
    batches = list(stream)
    assert label.tolist() == torch.cat([b.labels for b in batches]).tolist()
    assert severity.tolist() == [s for b in batches for s in b.severities]
    names = ["fog", "sn$w$"]
    assert [names[i] for i in domain] == [name for b in batches for name in b.domains]
    assert figures.as_dict() == stream.preview().as_dict()
    with Image.open(tmp_path / "stream.png") as picture:
        assert picture.format == "PNG" and picture.width > 1000 and len(np.unique(picture)) > 10
    with pytest.raises(FileNotFoundError, match="`draw` must lie in a folder that is there"):
        stream.preview(draw=tmp_path / "nowhere" / "stream.png")
    with pytest.raises(TypeError, match="`draw` must be a path"):
        stream.preview(draw=True)
    for path in (tmp_path, tmp_path / "stream.pdf"):
        with pytest.raises(ValueError, match="`draw` must be the name of a PNG file"):
            stream.preview(draw=path)
    with pytest.raises(ValueError, match="stream without images"):
        stream.from_step(len(stream)).preview(draw=tmp_path / "stream.png")
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ImportError, match="pip install matplotlib"):
        stream.preview(draw=tmp_path / "stream.png")


def test_datasets_in_a_list_are_domains_in_that_order():
    other = 255 - IMAGES, LABELS
    expected = [b.images for b in build(domains={"0": DATA, "1": other}, transform=None)]
    numbered = build(domains=[DATA, other], transform=None)
    assert numbered.config["domains"] == ["0", "1"]
    for a, b in zip(expected, numbered, strict=True):
        assert torch.equal(a, b.images)
    again = streams.from_config(numbered.config, domains=[DATA, other])
    assert torch.equal(next(iter(again)).images, expected[0])
    pairs = build(domains=[("day", DATA), ("night", other)], transform=None)
    assert pairs.config["domains"] == ["day", "night"]
    with pytest.raises(ValueError, match=r"`domains` must have different names, got \['a', 'a'\]"):
        build(domains=[("a", DATA), ("a", other)], transform=None)
    with pytest.raises(ValueError, match=r"all datasets or all pairs .*got 1 pairs among 2"):
        build(domains=[("a", DATA), DATA], transform=None)
    with pytest.raises(ValueError, match=r"a dataset for each of \['0', '1'\], got \['0'\]"):
        streams.from_config(numbered.config, domains=[DATA])


def test_preview_counts_and_prints():
    stream = build("reset_each_shift")
    preview = stream.preview()
    assert (preview.batches, preview.samples) == (27, 600)
    assert preview.transitions == {("fog", "snow"): 1, ("snow", "frost"): 1}
    assert preview.resets == (0, 9, 18) and preview.class_counts == dict.fromkeys(range(4), 150)
    assert abs(preview.effective_classes - 4) < 1e-9
    assert preview.repeated == 0.0 and abs(preview.reused - 2 / 3) < 1e-9
    text = str(preview)
    assert "fog severity 5: 9 batches, 200 samples" in text and "3 resets" in text
    json.dumps(preview.as_dict())
    ordered = build("sorted", domains=["fog"]).preview()
    assert ordered.run_length == 50.0 and abs(ordered.next_equal - (1 - 3 / 199)) < 1e-9
    assert build("imbalance").preview().repeated > 0.4


WRONG = [
    (ValueError, r"`scenario` .* did you mean 'dirichlet'", {"scenario": "dirichlett"}),
    (ValueError, r"`deta` .* did you mean 'delta'", {"scenario": "dirichlet", "deta": 1}),
    (
        ValueError,
        r"`delta` must be an option of the scenario \"mixed\"",
        {"scenario": "mixed", "delta": 1.0},
    ),
    (
        ValueError,
        r"`delta` must be a number greater than 0.*got -1",
        {"scenario": "dirichlet", "delta": -1},
    ),
    (TypeError, r"`delta` must be a number", {"scenario": "dirichlet", "delta": "0.1"}),
    (
        ValueError,
        r"`gamma` must be left out",
        {"scenario": "dirichlet_slots", "delta": 1.0, "gamma": 1.0},
    ),
    (ValueError, r"`dataset` must hold at least one image", {"dataset": (IMAGES[:0], LABELS[:0])}),
    (ValueError, r"one label per image, got 200 images and 199", {"dataset": (IMAGES, LABELS[1:])}),
    (ValueError, r"`dataset` must be a pair of images", {"dataset": (IMAGES[0], LABELS)}),
    (TypeError, r"`dataset` must have __len__", {"dataset": 3}),
    (TypeError, r"`dataset` must have __len__ .* got 'x'; open the images", {"dataset": "x"}),
    (ValueError, r"`dataset` must be a dataset", {"dataset": None}),
    (ValueError, r"`labels` must hold one label per image", {"labels": LABELS[1:]}),
    (TypeError, r"`domains` must be a list of names, got 'fog'", {"domains": "fog"}),
    (ValueError, r"`domains` must be at least one name", {"domains": []}),
    (ValueError, r"`domains` must be different names", {"domains": ["fog", "fog"]}),
    (ValueError, r"`transform` must be given", {"transform": None}),
    (
        ValueError,
        r"`transform` must be given .*xx\.\.\.",
        {"transform": None, "domains": ["x" * 999]},
    ),
    (TypeError, r"`dataset` must have __len__ .*xx\.\.\.", {"dataset": "x" * 999}),
    (TypeError, r"`transform` must be callable", {"transform": "fog"}),
    (ValueError, r"`transform` must be None where", {"domains": {"a": DATA}}),
    (ValueError, r"`severity` must be a number of at least 0 and at most 5", {"severity": 7}),
    (TypeError, r"`batch_size` must be a whole number", {"batch_size": 2.5}),
    (ValueError, r"`batch_size` must be a whole number of at least 1, got 0", {"batch_size": 0}),
    (ValueError, r"`seed` must be a whole number of at least 0", {"seed": -1}),
    (ValueError, r"`reset` must be one of", {"reset": "shifts"}),
    (TypeError, r"`reset` must be one of .* got 0; pass one of these words", {"reset": 0}),
    (ValueError, r"`schedule` must be one of .* got ''", {"schedule": ""}),
    (ValueError, r"`select` must be one of .* got ''", {"select": ""}),
    (TypeError, r"`arrange` must be one of .* got False", {"arrange": False}),
    (ValueError, r"`last_batch` must be one of .* got ''", {"last_batch": ""}),
    (ValueError, r"`window` must be None unless", {"window": 8}),
    (
        ValueError,
        r"`arrange` must be one of .* did you mean 'dirichlet'",
        {"arrange": "dirichle"},
    ),
    (ValueError, r"`clock` has no field `etta`; did you mean 'eta'", {"clock": {"etta": 1}}),
    (ValueError, r"`ratio` must be given", {"clock": {"eta": 1.0}}),
    (ValueError, r"`queue` must be", {"clock": {"ratio": 2.0, "queue": -1}}),
    (ValueError, r"`overhead` must be", {"clock": {"ratio": 2.0, "overhead": -1.0}}),
    (ValueError, r"`half_life` must be", {"clock": {"ratio": 2.0, "half_life": 0.0}}),
    (
        ValueError,
        r"`eta` must be a number of at least 0 and at most 1",
        {"clock": {"ratio": 2.0, "eta": 2}},
    ),
    (
        ValueError,
        r"`min_chunk` must be at most the mean chunk, 5 samples .*dirichlet_slots",
        {"scenario": "dirichlet", "num_samples": 20},
    ),
    (
        ValueError,
        r"`delta` must leave at least `min_chunk`",
        {"scenario": "dirichlet", "min_chunk": 50, "attempts": 3},
    ),
    (
        ValueError,
        r"`total` must be at least the number of classes",
        {"scenario": "imbalance", "total": 3},
    ),
    (ValueError, r"`speed` must be at most the dataset's size", {"scenario": "walk", "speed": 201}),
    (
        ValueError,
        r"`domains` must be at least two corruptions",
        {"scenario": "walk", "domains": ["fog"]},
    ),
    (
        ValueError,
        r"`orders` must use names in `domains`, got \"rain\"",
        {"scenario": "recurring", "orders": [["rain"]]},
    ),
    (
        ValueError,
        r"`groups` must hold one number per image",
        {"scenario": "lame_noniid", "groups": [0, 1]},
    ),
    (
        ValueError,
        r"`groups` must be numbers of at most 64 bits, got 1000",
        {"scenario": "lame_noniid", "groups": [0, 10**30]},
    ),
    (
        ValueError,
        r"`domains` must hold each severity",
        {"scenario": "gradual", "domains": {"a": DATA}, "transform": None},
    ),
]


@pytest.mark.parametrize(("error", "message", "arguments"), WRONG)
def test_wrong_input_is_named(error, message, arguments):
    with pytest.raises(error, match=message) as caught:
        list(build(**arguments))
    assert "\n" not in str(caught.value) and len(str(caught.value)) <= 300


class _TooLarge:
    def __array__(self, *args, **kwargs):
        raise MemoryError


def test_a_window_may_be_a_number_of_numpy():
    batches = list(build("single", window=np.int64(3)))
    assert len(batches[2].window) == 3


def test_wrong_pixels_and_labels_are_named():
    with pytest.raises(ValueError, match=r"pixels in \[0, 1\]"):
        next(iter(build(dataset=[(torch.randn(3, 4, 4), 0)] * 3)))
    with pytest.raises(ValueError, match="colour images"):
        next(iter(build(dataset=[(torch.rand(1, 4, 4), 0)] * 3)))
    with pytest.raises(TypeError, match="whole numbers"):
        build("sorted", (IMAGES, LABELS / 2)).preview()
    with pytest.raises(ValueError, match="class numbers from 0"):
        build("sorted", (IMAGES, LABELS - 1)).preview()
    with pytest.raises(ValueError, match=r"`after` must return images with pixels, got \(2, 3, 0"):
        next(iter(build(batch_size=2, after=lambda x: x[:, :, :0])))
    with pytest.raises(TypeError, match=r"an array of numbers, got a _TooLarge .*MemoryError"):
        next(iter(build(dataset=[(_TooLarge(), 0)] * 3)))
    with pytest.raises(TypeError, match="`transform` must return a tensor"):
        next(iter(build(transform=lambda x, d, s, generator: None)))
    with pytest.raises(ValueError, match="`n` must be at most"):
        build().from_step(10_000)


def test_the_former_names_of_visits_warn_and_work():
    preview = build("continual").preview()
    with pytest.warns(DeprecationWarning, match="visits"):
        assert preview.stays == preview.visits
    with pytest.warns(DeprecationWarning, match="Visit"):
        assert streams.Stay is streams.Visit
    with pytest.raises(AttributeError, match="Stayed"):
        streams.Stayed  # noqa: B018


def test_a_scenario_says_what_sets_it_apart():
    assert streams.get_scenario("single").batch_size == 1
    assert [name for name, s in streams.SCENARIOS.items() if s.smooth] == ["walk"]
    own = [name for name, s in streams.SCENARIOS.items() if s.own_severities]
    assert own == ["gradual", "walk"]
    ramped = streams.get_scenario("continual").with_choices(schedule="ramped", reset=None)
    assert ramped.severities(5, {"first_severities": [0.5, 2]}) == (0.5, 1, 2, 3, 4, 5)
    assert streams.get_scenario("continual").severities(5, {}) == (5,)
    with pytest.raises(ValueError, match="did you mean 'walk'"):
        streams.get_scenario("wlk")
    with pytest.raises(ValueError, match="reset"):
        ramped.with_choices(reset="sometimes")


def test_letters_in_the_picture_lie_flat_and_have_one_size(tmp_path, monkeypatch):
    kept = []
    monkeypatch.setattr(Figure, "savefig", lambda figure, path, **_: kept.append(figure))
    for scenario, below in (("gradual", "severity"), ("walk", "sum of severities")):
        build(scenario).preview(draw=tmp_path / "x.png")
        figure = kept.pop()
        figure.draw_without_rendering()
        texts = [t for t in figure.findobj(Text) if t.get_visible() and t.get_text()]
        assert {text.get_rotation() for text in texts} == {0}
        assert {text.get_fontsize() for text in texts} == {9, 11}
        assert {"domain", "label", below} <= {text.get_text() for text in texts}
