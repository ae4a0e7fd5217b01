"""Fixtures on this host: a pair of its own to attack. In the booted machines the installed server takes its place."""

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "host" / "api"))

from running_pair import USER, Pair
from target import Target

SETTINGS = "process.tmp_size = '32m'\nprocess.network = 'none'\nproxy.max_workers = 20"


@pytest.fixture(scope="session")
def target():
    with Pair("hostile", SETTINGS, first_uid=201_000, last_uid=201_999) as pair:
        yield Target(
            pair, pair.config, sys.executable, USER, pair.state, pair.runtime_dir, pair.cgroup, pair.spawner_socket,
            tmp_size=32 << 20, processes=100_000,
        )  # fmt: skip
