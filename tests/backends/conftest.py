"""Fixtures: an engine of the tests' own, and a worker's helper of either kind."""

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "host"))

from docker_helper import DockerHelper, engine_group
from running_engine import Dockerd
from running_spawner import Client, Spawner, configured_spawner


@pytest.fixture(scope="session")
def engine() -> Iterator[Dockerd]:
    """A dockerd with the worker image, for all tests."""
    with Dockerd(engine_group()) as running:
        yield running


@pytest.fixture(params=["process", "docker"])
def backend(request) -> str:
    """Which of the two helpers a statement is about."""
    return request.param


@pytest.fixture
def stopped_helper(backend, request) -> Iterator[Spawner]:
    """A helper that is configured, but not started; after a sound test nothing of its workers may be left."""
    helper = DockerHelper(request.getfixturevalue("engine")) if backend == "docker" else configured_spawner()
    yield helper
    helper.remove()


@pytest.fixture
def helper(stopped_helper: Spawner) -> Spawner:
    """A running helper."""
    stopped_helper.start()
    return stopped_helper


@pytest.fixture
def client(helper: Spawner) -> Client:
    """A greeted connection of the API's user."""
    return helper.client()


@pytest.fixture
def docker(engine) -> Iterator[DockerHelper]:
    """A Docker helper that is configured, but not started."""
    helper = DockerHelper(engine)
    yield helper
    helper.remove()
