"""Streams whose domain and class follow two independent Markov chains (UniTTA).

Source: Du et al., "UniTTA: Unified Benchmark and Versatile Framework Towards Realistic Test-Time
Adaptation", 2024, arXiv 2407.20080. The state is (domain, class); the joint transition matrix is
the Kronecker product of the chains'. In a chain of n states, state i stays with probability c_i
and moves to each other state with (1 - c_i)/(n - 1), so its stationary mass is proportional to
1/(1 - c_i). An imbalance IF between head and tail is therefore 1 - c_i = (1 - c_max) IF^(i/(n-1)),
possible while (1 - c_max) IF <= 1 - 1/n; beyond that all c_i = c_max and a state closes once its
quota is used up. Quotas are of pairs and decay by both imbalances, also by one that its chain makes
by itself: with the same quota for its head and its tail, heads would close first and level it.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from tta.streams.draws import Draws, exp, log
from tta.streams.pool import Ints, Pool, by_class

__all__ = ["Chain", "make_chain", "markov"]


@dataclass(frozen=True)
class Chain:
    """One chain.

    Args:
        stay: (n,) self-transition probabilities.
        quota: (n,) relative quotas, which decay by the imbalance.
        closes: Whether it takes them to make the imbalance.
    """

    stay: np.ndarray
    quota: np.ndarray
    closes: bool


def make_chain(states: int, correlation: float | None, imbalance: float) -> Chain:
    """Make the chain of a self-transition probability and an imbalance factor.

    Args:
        states: n.
        correlation: c_max in [0, 1]; None = 1/n, successive states independent.
        imbalance: IF, at least 1.
    """
    c_max = 1.0 / states if correlation is None else correlation
    ranks = np.arange(states) / max(1, states - 1)
    decay = exp(log(np.array(float(imbalance))) * ranks)
    if c_max < 1.0 and (1.0 - c_max) * imbalance <= 1.0 - 1.0 / states + 1e-12:
        return Chain(1.0 - (1.0 - c_max) * decay, 1.0 / decay, closes=False)
    return Chain(np.full(states, c_max), 1.0 / decay, closes=imbalance > 1)


class _UniformFeed:
    """Gives uniform numbers in [0, 1) one at a time, which it draws in blocks."""

    def __init__(self, draws: Draws) -> None:
        self._draws = draws
        self._block: list[float] = []

    def next(self) -> float:
        if not self._block:
            self._block = self._draws.uniform(4096).tolist()[::-1]
        return self._block.pop()


def _move(chain: Chain, state: int, open_states: list[int], feed: _UniformFeed) -> int:
    """Take one step of a chain, among the open states.

    A closed state's probability is shared in proportion: stay with c_i if still open, else move
    to another open state uniformly.
    """
    n = len(chain.stay)
    whole = len(open_states) == n  # then a state is at its own number; no need to search
    if whole or state in open_states:
        others = len(open_states) - 1
        stay = float(chain.stay[state])
        leave = (1.0 - stay) * others / max(1, n - 1)
        u = feed.next() * (stay + leave)
        if u < stay or others == 0:
            return state
        chosen = min(int((u - stay) / leave * others), others - 1)
        place = state if whole else open_states.index(state)
        return open_states[chosen + (chosen >= place)]
    return open_states[int(feed.next() * len(open_states))]


def markov(
    pool: Pool,
    draws: Draws,
    *,
    class_correlation: float | None = None,
    class_imbalance: float = 1.0,
    domain_correlation: float | None = None,
    domain_imbalance: float = 1.0,
    max_state_samples: int | None = None,
) -> Ints:
    """Walk over (domain, class) states; each state shows its samples from a shuffled ring.

    The stream ends when a state that is not closed by a quota has shown `max_state_samples`.
    With `domain_correlation` = 1 the domains come strictly one after the other: each ends so,
    within its own quota.

    Args:
        pool: Samples of all domains.
        draws: Source of randomness.
        class_correlation: c_max of the class chain; None = 1/C (independent); UniTTA: 0.95.
        class_imbalance: Class IF, at least 1 (UniTTA: 1 or 10); the head is class 0.
        domain_correlation: c_max of the domain chain; None = 1/D; UniTTA: 0.85, or 1.
        domain_imbalance: Domain IF, at least 1 (UniTTA: 1 or 5); the head is the first domain.
        max_state_samples: Default: the size of the largest state, so that no sample comes twice
            in a balanced pool.

    Returns:
        (m,) row numbers.
    """
    classes, class_of = np.unique(pool.labels, return_inverse=True)
    state_of = pool.which * len(classes) + class_of
    rings = _shuffled_rings(state_of, draws)
    most = max_state_samples or max(len(ring) for ring in rings.values())
    class_chain = make_chain(len(classes), class_correlation, class_imbalance)
    domain_chain = make_chain(int(pool.which.max()) + 1, domain_correlation, domain_imbalance)
    shares = np.outer(domain_chain.quota, class_chain.quota)
    if not (domain_chain.closes or class_chain.closes):
        shares = np.ones_like(shares)
    quota = np.maximum(1, np.floor(most * shares + 1e-9)).astype(int)
    sequential = domain_correlation == 1.0
    states = _States(rings, quota, sequential)
    feed = _UniformFeed(draws)
    if sequential:
        domain = states.domains[0]
    else:
        domain = states.domains[int(feed.next() * len(states.domains))]
    label = states.classes[domain][int(feed.next() * len(states.classes[domain]))]
    order: list[int] = []
    while True:
        order.append(states.show(domain, label))
        if not states.domains:
            return np.array(order, dtype=np.int64)
        if sequential:
            domain = states.domains[0]
        else:
            domain = _move(domain_chain, domain, states.domains, feed)
        label = _move(class_chain, label, states.classes[domain], feed)


def _shuffled_rings(state_of: Ints, draws: Draws) -> dict[int, Ints]:
    """Shuffle the rows of each state.

    Args:
        state_of: (n,) number of each row's state.
        draws: Source of randomness.

    Returns:
        The rows of each state that occurs, by number of the state in ascending order.
    """
    return {
        int(state_of[rows[0]]): rows[draws.permutation(len(rows))] for rows in by_class(state_of)
    }


class _States:
    """Which (domain, class) states are open, and how often each was shown.

    Args:
        rings: The rows of each state d * C + k that has any, shown in turn and again from the
            start.
        quota: (D, C) samples after which a state closes.
        sequential: Whether domains follow each other: a domain then closes as a whole when one of
            its states has shown the largest quota of the domain. Otherwise all states close when
            one has shown the largest quota of all.
    """

    def __init__(self, rings: dict[int, Ints], quota: np.ndarray, sequential: bool) -> None:
        domains, classes = quota.shape
        #: Open classes of each domain, and open domains.
        self.classes = [
            [k for k in range(classes) if d * classes + k in rings] for d in range(domains)
        ]
        self.domains = [d for d in range(domains) if self.classes[d]]
        self._rings = rings
        self._quota = quota
        self._largest = [row.max() if sequential else quota.max() for row in quota]
        self._sequential = sequential
        self._shown = np.zeros((domains, classes), dtype=int)

    def show(self, domain: int, label: int) -> int:
        """Return the next row of a state, and close what has shown all that it may."""
        ring = self._rings[domain * self._quota.shape[1] + label]
        row = int(ring[int(self._shown[domain, label]) % len(ring)])
        self._shown[domain, label] += 1
        count = int(self._shown[domain, label])
        if count >= self._largest[domain]:
            self.domains = [d for d in self.domains if d != domain] if self._sequential else []
        elif count >= self._quota[domain, label]:
            self.classes[domain] = [k for k in self.classes[domain] if k != label]
            if not self.classes[domain]:
                self.domains = [d for d in self.domains if d != domain]
        return row
