"""Fixtures: a real spawner for every test that wants one."""

import itertools
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from running_spawner import Client, Spawner, api_user, cgroup_mount

from blockyard_api.hardening import seccomp

_numbers = itertools.count(os.getpid() % 200 * 20)


@pytest.fixture
def stopped_spawner() -> Iterator[Spawner]:
    """A spawner that is configured, but not started."""
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
    filter_ = root / "seccomp.bpf"
    filter_.write_bytes(seccomp.compiled(seccomp.read_policy(), seccomp.native()))
    spawner.configure(
        api_user=user.pw_name,
        seccomp_profile=str(filter_),
        runtime_dir=str(spawner.runtime_dir),
        cgroup_root=str(spawner.cgroup_root),
        worker_uid_range_start=uids[0],
        worker_uid_range_end=uids[-1],
        allow_unlimited=True,
    )
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
