"""Settings for all tests."""

from __future__ import annotations

import random

import numpy as np
import pytest
import torch

from tests.helpers.soak import Soak

# The networks are tiny: more threads only wait for each other, on shared machines for seconds.
torch.set_num_threads(1)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--soak-seed", type=int, default=0, help="of the draws of `make soak`")


def pytest_configure(config: pytest.Config) -> None:
    config.pluginmanager.register(Soak(config), "soak")


@pytest.fixture(autouse=True)
def same_draws_in_any_order():
    """What a test draws without a generator does not depend on the tests before it."""
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)


@pytest.fixture
def soak_seed(request: pytest.FixtureRequest) -> int:
    """Seed of a test that draws its cases, from ``--soak-seed``."""
    return request.config.getoption("soak_seed")
