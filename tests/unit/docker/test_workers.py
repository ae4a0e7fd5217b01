"""The life of a Docker worker where the container, or the engine, is not as one would wish."""

import asyncio
import os
import re
import select
import subprocess

import pytest

from blockyard_spawner import config as base
from blockyard_spawner.docker import config, container
from blockyard_spawner.docker import workers as module
from blockyard_spawner.docker.keeping import Keeper
from blockyard_spawner.docker.workers import Containers
from blockyard_spawner.protocol import Refused
from blockyard_spawner.workers import Worker

DEFAULTS = {name: key.default for name, key in {**base.KEYS, **config.KEYS}.items()}


class Engine:
    """Says of its one container what it was told to, and counts who asks."""

    def __init__(self):
        self.state = {"Status": "running", "Running": True, "Pid": 0}
        self.asked = 0
        self.away = 0  # how often it is not there

    async def show(self, container):
        self.asked += 1
        return {"State": self.state}

    async def create(self, name, description):
        return "sweeper"

    async def start(self, container):
        pass

    async def wait(self, container, within=10):
        self.waited = within

    async def remove(self, container):
        if self.away:
            self.away -= 1
            raise Refused("docker_unreachable", "Start the container engine.")


@pytest.fixture
def engine():
    return Engine()


@pytest.fixture
def containers(engine, tmp_path):
    tmp_path.chmod(0o2710)
    made = Containers(DEFAULTS | {"docker.runtime_dir": str(tmp_path)}, tmp_path.stat().st_gid, engine, Keeper(""))
    made._containers["worker0001"] = "container"
    return made


@pytest.fixture
def worker(containers):
    found = Worker("worker0001", "demo", 65534)
    yield found
    if found.pidfd >= 0:
        os.close(found.pidfd)


def dead():
    """Return the number of a process that was."""
    process = subprocess.Popen(["true"])
    process.wait()
    return process.pid


@pytest.mark.parametrize("pid", [dead, lambda: 0], ids=["gone", "none"])
async def test_a_container_that_runs_for_the_engine_alone_is_not_looked_at_for_ever(
    engine, containers, worker, pid, monkeypatch
):
    monkeypatch.setattr(module, "_LOOK_AFTER", 0)
    engine.state["Pid"] = pid()
    assert await containers._meet(worker)
    assert engine.asked <= 20
    assert select.select([worker.pidfd], [], [], 0)[0]


async def test_a_process_that_the_engine_tells_late_is_met_all_the_same(engine, containers, worker, monkeypatch):
    async def sleep(seconds):
        engine.state["Pid"] = os.getpid()

    monkeypatch.setattr(asyncio, "sleep", sleep)
    engine.state["Pid"] = dead()
    assert await containers._meet(worker)
    assert worker.pid == os.getpid()
    assert not select.select([worker.pidfd], [], [], 0)[0]


async def test_the_loop_turns_while_the_many_files_of_a_worker_are_removed(containers, tmp_path):
    directory = tmp_path / "worker0001"
    directory.mkdir()
    for number in range(3000):
        (directory / f"{number}").touch()
    clearing, turns = asyncio.create_task(containers._remove_directory("worker0001")), 0
    while not clearing.done():
        await asyncio.sleep(0)
        turns += 1
    assert not directory.exists()
    assert turns >= 3000 // 256


async def test_a_sweep_is_waited_for_until_its_own_end(engine, containers, tmp_path):
    (tmp_path / "worker0001" / "some" / "thing").mkdir(parents=True)
    with pytest.raises(OSError, match="not empty"):
        await containers._remove_directory("worker0001")
    bounds = [int(grace) + int(limit) for grace, limit in re.findall(r"timeout -k(\d+) (\d+)", container._SWEEP)]
    assert len(bounds) == 2
    assert engine.waited > sum(bounds)


async def test_an_engine_that_is_away_is_told_once_for_each_worker_that_waits_for_it(
    engine, containers, worker, monkeypatch
):
    entries, pauses = [], []
    monkeypatch.setattr("blockyard_spawner.workers.audit", lambda *args, **fields: entries.append(fields))

    async def sleep(seconds):
        pauses.append(seconds)

    monkeypatch.setattr(asyncio, "sleep", sleep)
    engine.away = 6
    await containers._clear(worker)
    assert [entry["result"] for entry in entries] == ["quarantined"]
    assert pauses == [1, 2, 4, 5, 5, 5]
