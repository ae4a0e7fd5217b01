"""Fixtures: a real spawner for every test that wants one."""

from collections.abc import Iterator

import pytest
from running_spawner import Client, Spawner, configured_spawner


@pytest.fixture
def stopped_spawner() -> Iterator[Spawner]:
    """A spawner that is configured, but not started."""
    spawner = configured_spawner()
    yield spawner
    spawner.remove()


@pytest.fixture
def spawner(stopped_spawner: Spawner) -> Spawner:
    """A running spawner; after the test it must have left nothing of its workers behind."""
    stopped_spawner.start()
    return stopped_spawner


@pytest.fixture
def client(spawner: Spawner) -> Client:
    """A greeted connection of the API's user."""
    return spawner.client()
