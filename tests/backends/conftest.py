"""Fixtures: an engine of the tests' own, and a worker's helper of either kind."""

import itertools
import os
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "host"))

from docker_helper import DockerHelper, engine_group
from running_engine import Dockerd
from running_spawner import Client, Spawner, api_user, cgroup_mount

_numbers = itertools.count(os.getpid() % 200 * 20)


@pytest.fixture(scope="session")
def engine() -> Iterator[Dockerd]:
    """A dockerd with the worker image, for all tests."""
    running = Dockerd(engine_group())
    try:
        running.start()
        running.import_image()
        yield running
    finally:
        running.remove()


def _process_helper() -> Spawner:
    user, number = api_user(), next(_numbers) % 4000
    root = Path(tempfile.mkdtemp(prefix="blockyard-"))
    root.chmod(0o711)
    uids = range(70000 + number * 16, 70000 + number * 16 + 16)
    spawner = Spawner(root, uids, cgroup_mount() / f"blockyard-test-{os.getpid()}-{number}", {})
    spawner.cgroup_root.mkdir()
    for name in ("bundles", "libraries"):
        (spawner.state_dir / name).mkdir(parents=True)
    for directory in (spawner.state_dir, *spawner.state_dir.iterdir()):
        directory.chmod(0o711)
        os.chown(directory, user.pw_uid, user.pw_gid)
    spawner.configure(
        api_user=user.pw_name,
        runtime_dir=str(spawner.runtime_dir),
        cgroup_root=str(spawner.cgroup_root),
        worker_uid_range_start=uids[0],
        worker_uid_range_end=uids[-1],
        allow_unlimited=True,
    )
    return spawner


@pytest.fixture(params=["process", "docker"])
def backend(request) -> str:
    """Which of the two helpers a statement is about."""
    return request.param


@pytest.fixture
def stopped_helper(backend, request) -> Iterator[Spawner]:
    """A helper that is configured, but not started; after a sound test nothing of its workers may be left."""
    helper = DockerHelper(request.getfixturevalue("engine")) if backend == "docker" else _process_helper()
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
