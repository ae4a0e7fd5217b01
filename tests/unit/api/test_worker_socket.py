"""The way to a worker's socket: what stands there may be anything, and no descriptor may be left."""

import asyncio
import contextlib
import os
import resource
import socket

import pytest

from blockyard_api.backends.worker_socket import Impostor, NotListening, WorkerSocket


@pytest.fixture
def met():
    return []


@pytest.fixture
def upstream(tmp_path, met):
    return WorkerSocket(str(tmp_path), os.getuid(), met.append)


def listening(path, backlog=8):
    sock = socket.socket(socket.AF_UNIX)
    sock.bind(str(path))
    sock.listen(backlog)
    return sock


def sockets():
    """The sockets that are open, by what they are: the end of another test may still close its own."""
    held = set()
    for number in os.listdir("/proc/self/fd"):
        with contextlib.suppress(FileNotFoundError):  # the listing itself
            held.add(os.readlink(f"/proc/self/fd/{number}"))
    return {name for name in held if name.startswith("socket:")}


async def test_the_workers_own_socket_is_connected(upstream, tmp_path, met):
    with listening(tmp_path / "app.sock"), await upstream.connect() as sock:
        assert sock.getpeername()
    assert not met


@pytest.mark.parametrize("what", ["nothing", "nobody listens", "no directory"])
async def test_a_worker_that_does_not_listen_is_not_an_impostor(upstream, tmp_path, met, what):
    if what == "nobody listens":
        listening(tmp_path / "app.sock").close()
    if what == "no directory":
        tmp_path.rmdir()
    with pytest.raises(NotListening):
        await upstream.connect()
    assert not met


@pytest.mark.parametrize("what", ["link", "file", "fifo", "directory"])
async def test_anything_but_a_socket_in_its_place_is_an_impostor(upstream, tmp_path, met, what):
    path = tmp_path / "app.sock"
    with listening(tmp_path / "other.sock") as other:
        if what == "link":
            path.symlink_to(tmp_path / "other.sock")
        elif what == "file":
            path.touch()
        elif what == "fifo":
            os.mkfifo(path)
        else:
            path.mkdir()
        with pytest.raises(Impostor):
            await upstream.connect()
        other.setblocking(False)
        with pytest.raises(BlockingIOError):
            other.accept()
    assert len(met) == 1


async def test_a_socket_of_another_uid_is_an_impostor(tmp_path, met):
    with listening(tmp_path / "app.sock"), pytest.raises(Impostor):
        await WorkerSocket(str(tmp_path), os.getuid() + 1, met.append).connect()
    assert len(met) == 1


async def test_a_worker_whose_queue_is_full_is_waited_for_and_not_taken_for_an_impostor(upstream, tmp_path, met):
    with listening(tmp_path / "app.sock", backlog=1) as sock:
        crowd = [await upstream.connect() for _ in range(2)]
        waiting = asyncio.create_task(upstream.connect())
        done, _ = await asyncio.wait([waiting], timeout=0.1)
        assert not done
        accepted, _ = sock.accept()
        async with asyncio.timeout(5):
            crowd.append(await waiting)
        for each in (*crowd, accepted):
            each.close()
    assert not met


async def test_giving_up_on_a_full_queue_leaves_nothing_open(upstream, tmp_path):
    with listening(tmp_path / "app.sock", backlog=0) as sock, await upstream.connect():
        before = sockets()
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.1):
                await upstream.connect()
        assert sockets() <= before
        assert sock


async def test_without_a_descriptor_left_the_worker_is_told_as_not_reachable_now(upstream, tmp_path, met):
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    spare = []
    with listening(tmp_path / "app.sock"):
        resource.setrlimit(resource.RLIMIT_NOFILE, (max(map(int, os.listdir("/proc/self/fd"))) + 4, hard))
        try:
            with pytest.raises(OSError, match="Too many open files"):
                spare.extend(os.dup(0) for _ in iter(int, 1))
            for _ in range(3):  # it takes three: the socket's own, the directory's, the name's
                with pytest.raises(NotListening):
                    await upstream.connect()
                os.close(spare.pop())
            (await upstream.connect()).close()
        finally:
            resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
            for descriptor in spare:
                os.close(descriptor)
    assert not met
