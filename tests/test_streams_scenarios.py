"""Every scenario against its definition, on arrays small enough to count."""

from collections import Counter
from itertools import pairwise

import numpy as np
import pytest
import torch

from tta import streams
from tta.streams.draws import Draws
from tta.streams.markov import make_chain
from tta.streams.pool import Pool
from tta.streams.selections import zipf
from tta.streams.walk import TARGETS, best_path, synthetic_surface, walk_domains

CLASSES, SIZE = 10, 600
LABELS = np.random.default_rng(0).permutation(np.arange(SIZE) % CLASSES)
IMAGES = np.random.default_rng(1).integers(0, 256, (SIZE, 4, 4, 3), dtype=np.uint8)
DATA = (IMAGES, LABELS)
NAMES = ["fog", "snow", "frost"]


def shade(images, domain, severity, *, generator):
    """Darken by severity, with a trace of noise."""
    noise = torch.rand(images.shape, generator=generator)
    return (images * (1 - severity / 10) + 0.01 * noise).clamp(0, 1)


def build(scenario, **arguments):
    arguments = {"domains": NAMES, "transform": shade, "seed": 5, "batch_size": 32, **arguments}
    return streams.build(scenario, DATA, **arguments)


def shown(stream):
    """Return (domain of each sample, index of each sample, label of each sample)."""
    domains, index, labels = [], [], []
    for rows, batch_labels in stream.rows():
        domains += [rows.conditions[i].domain for i in rows.which]
        index.append(rows.index)
        labels.append(batch_labels)
    return np.array(domains), np.concatenate(index), np.concatenate(labels)


def visits(stream):
    return [(s.domain, s.severity, s.samples) for s in stream.preview().visits]


def run_count(values):
    return 1 + int(np.count_nonzero(values[1:] != values[:-1]))


@pytest.mark.parametrize(
    "scenario",
    [
        "continual",
        "reset_each_shift",
        "sorted",
        "dirichlet",
        "dirichlet_slots",
        "mixed",
        "single",
        "lame_noniid",
    ],
)
@pytest.mark.parametrize("shared_order", [False, True])
def test_each_domain_shows_each_sample_once(scenario, shared_order):
    domains, index, labels = shown(build(scenario, shared_order=shared_order))
    assert len(index) == 3 * SIZE
    for name in NAMES:
        assert sorted(index[domains == name]) == list(range(SIZE))
    assert np.array_equal(labels, LABELS[index])


def test_continual_and_reset_each_shift_differ_in_resets_only():
    one, other = build("continual"), build("reset_each_shift")
    assert visits(one) == [(name, 5, SIZE) for name in NAMES] == visits(other)
    assert np.array_equal(shown(one)[1], shown(other)[1])
    per_domain = -(-SIZE // 32)
    assert [b.step for b in one if b.reset] == [0]
    assert [b.step for b in other if b.reset] == [0, per_domain, 2 * per_domain]
    assert not any(b.reset for b in build("reset_each_shift", reset="never"))


@pytest.mark.parametrize(("scenario", "resets"), [("continual", [0]), ("reset_each_shift", [0, 2])])
def test_a_domain_too_small_to_be_shown_takes_no_reset_with_it(scenario, resets):
    sizes = {"small": 5, "fog": 20, "smaller": 4, "snow": 20}
    domains = {name: (IMAGES[:size], LABELS[:size]) for name, size in sizes.items()}
    stream = streams.build(scenario, domains=domains, batch_size=8, last_batch="drop")
    assert [(b.domain, b.reset) for b in stream] == [
        (domain, step in resets) for step, domain in enumerate(["fog", "fog", "snow", "snow"])
    ]


def test_only_the_batches_that_fill_a_window_take_the_time_of_learning():
    arguments = {"batch_size": 1, "num_samples": 12, "window": 5}
    stream = build("single", **arguments, clock={"ratio": 2.3})
    batches = list(stream)
    assert [b.step for b in batches if b.adapt] == [4, 9, 16, 21, 28, 33]  # of three visits
    assert [b.step for b in batches if b.late] == [5, 6, 10, 11, 17, 18, 22, 23, 29, 30, 34, 35]
    assert [b.latency for b in batches[3:6]] == [1.0, 2.3, 1.0]
    assert [(b.adapt, b.late) for b in stream.from_step(17)] == [
        (b.adapt, b.late) for b in batches[17:]
    ]
    measured = build("single", **arguments, clock={"measured": True})
    shown = []
    for batch in measured:
        shown.append((batch.adapt, batch.late))
        if batch.adapt:
            measured.stopwatch.report(adaptive=2.3, plain=1.0)
    assert shown == [(b.adapt, b.late) for b in batches]


def test_gradual_ramps_each_type():
    ramp = [1, 2, 3, 4, 5, 4, 3, 2, 1]
    stream = build("gradual", batch_size=SIZE)
    # Neighbouring types meet at severity 1, so no two passes merge into one visit.
    assert visits(stream) == [(name, s, SIZE) for name in NAMES for s in ramp]
    assert [b.step for b in stream if b.reset] == [0]
    first = build("gradual", first_severities=[5, 4, 3, 2, 1], batch_size=SIZE)
    assert [s for _, s, _ in visits(first)] == [5, 4, 3, 2, 1] + 2 * ramp
    passes = [rows.index.tolist() for rows, _ in stream.rows()]
    assert all(sorted(p) == list(range(SIZE)) for p in passes)
    assert len({tuple(p) for p in passes}) == 27


def test_lifelong_returns_to_clean():
    stream = build("lifelong")
    expected = [x for name in NAMES for x in ((name, 5, SIZE), ("clean", 0, SIZE))]
    assert visits(stream) == expected
    clean = next(b for b in stream if b.domain == "clean")
    pixels = torch.from_numpy(IMAGES[clean.index.numpy()]).permute(0, 3, 1, 2) / 255
    assert torch.equal(clean.images, pixels)


def test_sorted_is_one_run_per_class():
    domains, index, labels = shown(build("sorted"))
    for name in NAMES:
        own = labels[domains == name]
        assert np.all(np.diff(own) >= 0) and run_count(own) == CLASSES
    inside = index[(domains == "fog") & (labels == 3)]
    assert not np.all(np.diff(inside) > 0)
    # On the pool of all domains: classes outside, domains shuffled inside.
    domains, _, labels = shown(build("sorted", schedule="pooled"))
    assert np.all(np.diff(labels) >= 0)
    assert set(domains[:32]) == set(NAMES)


def test_mixed_is_one_shuffled_pool():
    stream = build("mixed")
    assert len(stream) == -(-3 * SIZE // 32)
    first = next(iter(stream))
    assert first.domain == "mixed" and first.severity == 5 and set(first.domains) == set(NAMES)
    domains, _, labels = shown(stream)
    share = np.mean(domains[1:] == domains[:-1])
    assert abs(share - 1 / 3) < 0.05 and abs(np.mean(labels[1:] == labels[:-1]) - 0.1) < 0.03


def test_dirichlet_chunks_hold_class_blocks_and_the_least_size():
    _, _, labels = shown(build("dirichlet", domains=["fog"], delta=1.0))
    # At most C blocks in each of C chunks.
    assert run_count(labels) <= CLASSES * CLASSES
    spiky = run_count(shown(build("dirichlet", domains=["fog"], delta=0.01))[2])
    assert spiky < run_count(labels)
    pool, _, _ = shown(build("mixed", arrange="dirichlet", delta=0.1))
    assert set(pool[:64]) == set(NAMES)


def test_slots_keep_the_order_inside_a_class():
    _, index, labels = shown(build("dirichlet_slots", domains=["fog"], delta=0.5))
    assert all(np.all(np.diff(index[labels == k]) > 0) for k in range(CLASSES))
    assert run_count(labels) <= CLASSES * CLASSES


def test_imbalance_takes_turns():
    stream = build("imbalance", domains=["fog"], ir=500_000)
    _, index, labels = shown(stream)
    assert len(index) == 2 * SIZE
    turns = labels.reshape(CLASSES, -1)
    dominant = [Counter(turn.tolist()).most_common(1)[0][0] for turn in turns]
    assert sorted(dominant) == list(range(CLASSES)) and dominant != sorted(dominant)
    assert np.mean(turns == np.array(dominant)[:, None]) > 0.999
    # Drawn with replacement twice as often as there are images: 1 - e^-2 of them appear.
    assert abs(len(np.unique(index)) / SIZE - 0.865) < 0.05
    share = np.mean(shown(build("imbalance", domains=["fog"], ir=1, total=6000))[2] == 0)
    assert abs(share - 0.1) < 0.02
    assert [b.reset for b in build("imbalance", batch_size=1200)] == [True] * 3


def test_single_and_its_window():
    stream = build("single", batch_size=64, window=4, num_samples=6)
    batches = list(stream)
    assert len(batches) == 18 and all(len(b) == 1 for b in batches)
    assert [b.adapt for b in batches[:8]] == [False, False, False, True, False, False] + [False] * 2
    assert [len(b.window) for b in batches[:8]] == [1, 2, 3, 4, 4, 4, 1, 2]
    assert torch.equal(batches[4].window, torch.cat([b.images for b in batches[1:5]]))
    for n in (0, 2, 5, 6, 9):
        again = next(iter(stream.from_step(n)))
        assert torch.equal(again.window, batches[n].window) and again.adapt == batches[n].adapt


def test_zipf_sizes_respect_the_limit():
    labels = np.arange(20_000) % 100
    pool = Pool(np.arange(20_000), np.zeros(20_000, dtype=np.int64), lambda: labels)
    for seed in range(20):
        for mode, share, limit in (("test", 10, 0.9), ("validation", 20, 0.8)):
            rows = zipf(pool, Draws(seed, "z"), mode=mode)
            counts = np.sort(np.bincount(labels[rows], minlength=100))[::-1]
            assert len(rows) == 20_000
            assert counts[:share].sum() / 20_000 < limit + 0.001
            assert counts[0] > 3 * counts[50]


def test_lame_streams_are_two_by_two():
    _, index, labels = shown(build("lame_imbalance", domains=["fog"]))
    assert len(index) == SIZE and len(np.unique(index)) < SIZE
    _, _, grouped = shown(build("lame_imbalance", domains=["fog"], arrange="grouped"))
    assert run_count(grouped) == len(np.unique(grouped)) < run_count(labels)
    domains, _, _ = shown(build("lame_noniid"))
    assert run_count(domains) == 3
    _, _, labels = shown(build("lame_noniid", domains=["fog"]))
    assert run_count(labels) == CLASSES
    videos = [i // 50 for i in range(SIZE)]
    _, index, _ = shown(build("lame_noniid", domains=["fog"], groups=videos))
    assert run_count(index // 50) == 12 and np.all(np.diff(index.reshape(12, 50)) == 1)


def test_label_shift_uses_up_the_favoured_class():
    for seed in range(5):
        _, index, labels = shown(build("label_shift", domains=["fog"], seed=seed))
        assert len(np.unique(index)) == len(index) < SIZE
        assert np.bincount(labels).max() == SIZE // CLASSES
    _, index, labels = shown(build("label_shift", domains=["fog"], constant_size=True))
    assert len(index) == SIZE
    counts = np.bincount(labels, minlength=CLASSES)
    repeats = Counter(Counter(index.tolist()).values())
    assert counts.max() > 60 and max(repeats) <= -(-counts.max() // 60)
    # Large concentration: nearly balanced.
    _, _, labels = shown(build("label_shift", domains=["fog"], concentration=1e6))
    assert np.bincount(labels).min() >= 58


def test_in_out_mixture():
    domains, _, _ = shown(build("label_shift", select="everything", clean_ratio=0.5))
    first = domains[:SIZE]
    assert Counter(first.tolist()) == {"fog": SIZE // 2, "clean": SIZE // 2}
    assert set(first[:32]) == {"fog", "clean"}


@pytest.mark.parametrize("factor", [10, 100])
def test_long_tail_counts(factor):
    stream = build("long_tailed", imbalance_factor=factor)
    domains, index, labels = shown(stream)
    expected = [max(1, int(60 * factor ** (-k / 9) + 1e-9)) for k in range(CLASSES)]
    for name in NAMES:
        own = domains == name
        assert np.bincount(labels[own], minlength=CLASSES).tolist() == expected
        assert len(np.unique(index[own])) == own.sum()
    domains, _, labels = shown(build("long_tailed", class_order="shuffled"))
    heads = [np.bincount(labels[domains == name]).argmax() for name in NAMES]
    assert len(set(heads)) > 1


def test_recurring_redraws_each_visit():
    stream = build("recurring", visits=4, batch_size=SIZE)
    assert visits(stream) == [(name, 5, SIZE) for name in NAMES] * 4
    orders = [tuple(rows.index.tolist()) for rows, _ in stream.rows()]
    assert len(set(orders)) == 12
    shared = build("recurring", visits=2, batch_size=SIZE, shared_order=True)
    orders = [tuple(rows.index.tolist()) for rows, _ in shared.rows()]
    assert len(set(orders[:3])) == 1 and orders[0] != orders[3]
    given = build("recurring", visits=3, orders=[["snow", "fog"], ["frost"]], batch_size=SIZE)
    assert [s[0] for s in visits(given)] == ["snow", "fog", "frost", "snow", "fog"]


def test_interleaved_recurrence_keeps_every_batch():
    stream = build("recurring", visits=5, interleave=True, arrange="shuffled")
    domains, index, _ = shown(stream)
    plain, _, _ = shown(build("recurring", visits=5, arrange="shuffled"))
    assert len(stream) == 5 * 3 * -(-SIZE // 32) and len(domains) == len(plain)
    for cycle in np.split(np.arange(len(index)), 5):
        for name in NAMES:
            own = index[cycle][domains[cycle] == name]
            assert sorted(own) == list(range(SIZE))
    assert run_count(domains) > run_count(plain) + 5


def test_markov_chains_have_the_stated_transitions():
    names = [*NAMES, "rain", "dust"]
    settings = {"class_correlation": 0.95, "domain_correlation": 0.85, "max_state_samples": 3000}

    def stay(values, value):
        return np.mean(values[1:][values[:-1] == value] == value)

    domains, _, labels = shown(build("markov", domains=names, **settings))
    assert np.allclose([stay(labels, k) for k in range(CLASSES)], 0.95, atol=0.02)
    assert np.allclose([stay(domains, name) for name in names], 0.85, atol=0.02)
    # With imbalance the head keeps c_max and 1 - c grows by IF down to the tail.
    domains, _, labels = shown(
        build("markov", domains=names, class_imbalance=10, domain_imbalance=5, **settings)
    )
    assert np.allclose([stay(labels, k) for k in (0, CLASSES - 1)], [0.95, 0.5], atol=0.04)
    assert np.allclose([stay(domains, names[d]) for d in (0, 4)], [0.85, 0.25], atol=0.04)
    counts = np.bincount(labels, minlength=CLASSES)
    assert 6 < counts[0] / counts[-1] < 16
    assert 3.5 < np.mean(domains == names[0]) / np.mean(domains == names[4]) < 7


def test_markov_independent_states_are_uniform():
    domains, index, labels = shown(build("markov"))
    pairs = Counter(zip(domains.tolist(), index.tolist(), strict=True))
    assert max(pairs.values()) == 1  # a state ends the stream when its images are used up
    assert abs(np.mean(labels[1:] == labels[:-1]) - 0.1) < 0.03
    assert abs(np.mean(domains[1:] == domains[:-1]) - 1 / 3) < 0.04


def test_markov_quotas_and_strict_sequence():
    stream = build("markov", class_imbalance=10, max_state_samples=50)
    domains, _, labels = shown(stream)
    state = Counter(zip(domains.tolist(), labels.tolist(), strict=True))
    assert max(state.values()) == 50
    assert all(state[name, CLASSES - 1] == 5 for name in NAMES)
    domains, _, _ = shown(
        build("markov", domain_correlation=1.0, domain_imbalance=5, max_state_samples=2000)
    )
    assert run_count(domains) == 3 and domains[0] == "fog"
    counts = Counter(domains.tolist())
    assert 4 < counts["fog"] / counts["frost"] < 6


@pytest.mark.parametrize(("correlations"), [(0.95, None), (None, 0.85), (None, None)])
def test_markov_keeps_an_imbalance_beside_one_that_needs_quotas(correlations):
    of_classes, of_domains = correlations
    domains, _, labels = shown(
        build(
            "markov",
            class_correlation=of_classes,
            class_imbalance=10,
            domain_correlation=of_domains,
            domain_imbalance=5,
            max_state_samples=1000,
        )
    )
    counts = np.bincount(labels, minlength=CLASSES)
    assert 7 < counts[0] / counts[-1] < 14
    assert 3.5 < np.mean(domains == NAMES[0]) / np.mean(domains == NAMES[-1]) < 6.5


def test_markov_chain_is_stationary_where_possible():
    chain = make_chain(10, 0.95, 10.0)
    n = len(chain.stay)
    matrix = np.full((n, n), 0.0) + ((1 - chain.stay) / (n - 1))[:, None]
    np.fill_diagonal(matrix, chain.stay)
    assert np.allclose(matrix.sum(1), 1.0) and chain.stay.max() == chain.stay[0] == 0.95
    stationary = np.linalg.matrix_power(matrix, 10_000)[0]
    assert np.isclose(stationary[0] / stationary[-1], 10.0)
    assert np.allclose(stationary[:-1] / stationary[1:], 10 ** (1 / 9))
    assert np.allclose(make_chain(10, None, 10.0).stay, 0.1)


@pytest.mark.parametrize(
    ("difficulty", "low", "high"), [("hard", 41, 41), ("medium", 20, 25), ("easy", 10, 14)]
)
def test_walk_paths(difficulty, low, high):
    surface = synthetic_surface()
    path = best_path(surface, TARGETS[difficulty])
    assert low <= len(path) <= high
    assert path[0][1] == 0 and path[-1][0] == 0
    steps = np.diff(np.array(path), axis=0)
    assert set(map(tuple, steps.tolist())) <= {(-0.25, 0.0), (0.0, 0.25)}
    mean = np.mean([surface[int(4 * a), int(4 * b)] for a, b in path])
    assert difficulty == "hard" or abs(mean - TARGETS[difficulty]) < 2.0


def test_walk_chains_pairs():
    names = walk_domains("easy")
    stream = build("walk", domains=names, difficulty="easy", speed=40, total=4000)
    pieces = [s.domain.split("+") for s in stream.preview().visits]
    pairs = [pair for i, pair in enumerate(pieces) if i == 0 or pair != pieces[i - 1]]
    assert len(pairs) > 3 and all(a[1] == b[0] for a, b in pairwise(pairs))
    assert all(s.samples == 40 for s in stream.preview().visits)
    assert len(stream) == 4000 // 32 and all(len(b) == 32 for b in stream.from_step(120))
    batch = next(iter(stream))
    assert batch.severities[0][1] == 0.0 and batch.domain == "+".join(pairs[0])


def test_walk_takes_a_measured_surface():
    field = np.full((21, 21), 30.0)
    surface = {a: {b: field for b in NAMES if b != a} for a in NAMES}
    pairs = {(a, b): field for a in NAMES for b in NAMES if a != b}
    one, other = build("walk", surface=surface, total=900), build("walk", surface=pairs, total=900)
    assert one.config == other.config
    with pytest.raises(ValueError, match=r"`surface` must hold every ordered pair"):
        build("walk", surface={("fog", "snow"): field})
    with pytest.raises(ValueError, match=r"`surface` must be \(21, 21\)"):
        build("walk", surface={a: {b: [[1.0]] for b in NAMES} for a in NAMES})
