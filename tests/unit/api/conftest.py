"""A migrated database in a directory of its own, and a whole daemon around one."""

import asyncio
import contextlib
import os
import shutil
import socket

import httpx
import pytest
from running_control import Clock, Control, until

from blockyard_api.http.server import server
from blockyard_api.store import database, migrate


@pytest.fixture(scope="session")
def template(tmp_path_factory):
    """A migrated database to copy: migrating takes a second, copying none."""
    path = tmp_path_factory.mktemp("template") / "blockyard.db"
    migrate.upgrade(path)
    return path


@pytest.fixture
async def store(tmp_path, template):
    shutil.copy(template, tmp_path / "blockyard.db")
    async with database.opened(tmp_path / "blockyard.db") as opened:
        yield opened


@pytest.fixture
def clock(monkeypatch):
    return Clock(monkeypatch)


@pytest.fixture
async def start(template, clock):
    """A function that starts a daemon with given settings; what it leaves open after its end fails the test."""
    before = _open()
    started = []

    async def begin(lines=""):
        control = Control(template, lines)
        started.append(control)
        return await control.start()

    yield begin
    for control in started:
        await control.close()
    tasks = [task for task in asyncio.all_tasks() if task is not asyncio.current_task()]
    assert not [task for task in tasks if "blockyard" in repr(task.get_coro())], "tasks are left"
    await until(lambda: _open() <= before, "the end of every descriptor")


@pytest.fixture
async def control(start):
    return await start()


@pytest.fixture
async def listening(control):
    """The control plane behind its own server, on a port."""
    sock = socket.create_server(("127.0.0.1", 0))
    serving = server(control.asgi, 30, control.services.streams.stop)
    with contextlib.ExitStack() as last:
        last.callback(sock.close)
        running = asyncio.create_task(serving.serve(sockets=[sock]))
        await until(lambda: serving.started)
        serving.address = sock.getsockname()
        serving.running = running
        yield serving
        serving.should_exit = True
        await running


@pytest.fixture
async def over_tcp(control, listening):
    """An administrator's client; what ends it is the test's own timeout, since the clock stands still."""
    _, plain = await control.services.tokens.create("admin", "test")
    host, port = listening.address
    async with httpx.AsyncClient(
        base_url=f"http://{host}:{port}", headers={"Authorization": f"Bearer {plain}"}, timeout=None
    ) as opened:
        yield opened


def _open():
    """What is open, by what it is: numbers are used again."""
    found = set()
    for number in os.listdir("/proc/self/fd"):
        try:
            found.add((number, os.readlink(f"/proc/self/fd/{number}")))
        except FileNotFoundError:  # the listing itself
            continue
    # of a transaction that was cut off, SQLAlchemy closes the connection in its own time
    return {entry for entry in found if "pytest" not in entry[1] and "blockyard.db" not in entry[1]}
