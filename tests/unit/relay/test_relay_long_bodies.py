"""Long bodies of a known length, which the kernel moves without this process: what holds for short ones holds here."""

import asyncio
import errno
import os
import random
import socket

import pytest

from blockyard_api.relay import splice

GET = b"GET / HTTP/1.1\r\nHost: demo\r\n\r\n"
BODY = random.Random(1).randbytes(3_000_001)


def announced(length):
    return b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n" % length


def descriptors():
    return len(os.listdir("/proc/self/fd"))


@pytest.fixture
def moved(monkeypatch):
    """The sizes that were moved so far."""
    sizes, move = [], os.splice

    def counted(*words, **options):
        sizes.append(move(*words, **options))
        return sizes[-1]

    monkeypatch.setattr(os, "splice", counted)
    return sizes


@pytest.mark.parametrize("length", [splice.FROM - 1, splice.FROM, splice.FROM + 1, len(BODY)])
@pytest.mark.parametrize("glued", [0, 1, 1000])
async def test_a_body_arrives_whole_and_the_visitors_connection_stays(stage, moved, length, glued):
    async def script(turn):
        await turn.send(announced(length) + BODY[:glued])
        await asyncio.sleep(0.01)
        await turn.send(BODY[glued:length])

    stage.worker.script = script
    client = await stage.client()
    for _ in range(3):
        assert (await client.ask(GET)).body == BODY[:length]
    assert sum(moved) == (3 * 2 * (length - glued) if length - glued >= splice.FROM else 0)


async def test_a_body_is_not_held_up_until_more_of_it_comes(stage):
    steps = asyncio.Semaphore(0)

    async def script(turn):
        await turn.send(announced(len(BODY)))
        for at in range(0, len(BODY), 100_000):
            await turn.send(BODY[at : at + 100_000])
            await steps.acquire()

    stage.worker.script = script
    client = await stage.client()
    await client.send(GET)
    await client.head()
    async with asyncio.timeout(10):
        for at in range(0, len(BODY), 100_000):
            piece = BODY[at : at + 100_000]
            assert await client.reader.readexactly(len(piece)) == piece
            steps.release()


async def test_a_body_that_breaks_off_is_not_taken_for_a_whole_one(stage):
    async def script(turn):
        await turn.send(announced(len(BODY)) + BODY[:2_000_000])
        turn.close()

    stage.worker.script = script
    client = await stage.client()
    await client.send(GET)
    await client.head()
    assert await client.rest() == BODY[:2_000_000]


async def test_what_follows_a_body_is_never_part_of_another_answer(stage):
    async def script(turn):
        await turn.send(announced(len(BODY)) + BODY + b"HTTP/1.1 200 OK\r\nContent-Length: 6\r\n\r\nforged")

    stage.worker.script = script
    client = await stage.client()
    for _ in range(3):
        assert (await client.ask(GET)).body == BODY
    assert stage.worker.connections == 3


async def test_requests_that_wait_behind_a_body_are_answered_after_it(stage):
    async def script(turn):
        await turn.answer(BODY)

    stage.worker.script = script
    client = await stage.client()
    await client.send(GET * 3)
    for _ in range(3):
        assert (await client.answer()).body == BODY


async def test_a_visitor_who_closes_his_sending_half_still_gets_all_of_it(stage):
    async def script(turn):
        await turn.answer(BODY)

    stage.worker.script = script
    client = await stage.client()
    await client.send(GET)
    client.writer.write_eof()
    assert (await client.answer()).body == BODY
    assert await client.rest() == b""


async def test_a_visitor_who_leaves_in_the_middle_frees_the_worker_and_every_descriptor(stage):
    begun = asyncio.Event()

    async def script(turn):
        await turn.send(announced(1 << 40))
        while True:
            await turn.send(BODY)
            begun.set()

    stage.worker.script = script
    before = descriptors()
    client = await stage.client()
    await client.send(GET)
    await client.head()
    await client.reader.readexactly(1_000_000)
    client.reset()
    await stage.worker.until(lambda: stage.gate.ended == 1 and stage.worker.open == 0)
    assert descriptors() <= before + 1  # the worker's end of a test's own connection may close later


async def test_a_worker_that_falls_silent_in_the_middle_is_given_up(staging):
    stage = await staging(worker=0.3)

    async def script(turn):
        await turn.send(announced(len(BODY)) + BODY[:1_000_000])
        await turn.reader.read()

    stage.worker.script = script
    client = await stage.client()
    await client.send(GET)
    await client.head()
    assert await client.rest() == BODY[:1_000_000]
    await stage.worker.until(lambda: stage.worker.open == 0)


async def test_a_slow_but_steady_visitor_is_not_dropped(staging):
    stage = await staging(stall=0.4, worker=0.4)

    async def script(turn):
        await turn.answer(BODY)

    stage.worker.script = script
    client = await stage.client()
    client.writer.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 65536)
    client.reader._limit = 65536
    await client.send(GET)
    await client.head()
    got = b""
    while len(got) < len(BODY):
        got += await client.reader.read(150_000)
        await asyncio.sleep(0.05)
    assert got == BODY


@pytest.mark.parametrize("number", [errno.EPERM, errno.ENOSYS, errno.EINVAL])
async def test_where_the_kernel_does_not_move_it_it_is_copied(stage, monkeypatch, number):
    def refuses(*_, **__):
        raise OSError(number, os.strerror(number))

    async def script(turn):
        await turn.answer(BODY)

    monkeypatch.setattr(os, "splice", refuses)
    stage.worker.script = script
    client = await stage.client()
    for _ in range(2):
        assert (await client.ask(GET)).body == BODY


async def test_without_descriptors_for_it_it_is_copied(stage, monkeypatch):
    def refuses(_):
        raise OSError(errno.EMFILE, "Too many open files")

    async def script(turn):
        await turn.answer(BODY)

    stage.worker.script = script
    client = await stage.client()
    before = descriptors()
    monkeypatch.setattr(os, "pipe2", refuses)
    assert (await client.ask(GET)).body == BODY
    assert descriptors() <= before + 2  # the connection to the worker, which stays, has two ends here


async def test_many_at_once_share_the_loop(stage):
    async def script(turn):
        await turn.answer(BODY if turn.head.startswith(b"GET /long") else b"short")

    stage.worker.script = script
    async with asyncio.TaskGroup() as visitors:
        long = [visitors.create_task(stage.get(target=f"/long{number}")) for number in range(20)]
        short = [visitors.create_task(stage.get()) for _ in range(20)]
    assert {answer.result().body for answer in long} == {BODY}
    assert {answer.result().body for answer in short} == {b"short"}


async def test_a_stopping_relay_lets_a_body_come_to_its_end(stage):
    go_on = asyncio.Event()

    async def script(turn):
        await turn.send(announced(len(BODY)) + BODY[:1_000_000])
        await go_on.wait()
        await turn.send(BODY[1_000_000:])

    stage.worker.script = script
    client = await stage.client()
    await client.send(GET)
    await client.head()
    closing = asyncio.create_task(stage.relay.close(10))
    await asyncio.sleep(0.05)
    go_on.set()
    assert await client.rest() == BODY
    await closing
