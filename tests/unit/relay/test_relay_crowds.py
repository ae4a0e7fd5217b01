"""Crowds that come to take and not to ask: whoever comes after them is served, and they are gone after a while."""

import asyncio
import contextlib
import socket

import pytest

from blockyard_api.relay.upstream import Pool

GET = b"GET / HTTP/1.1\r\nHost: demo\r\n\r\n"
UPGRADE = (
    b"GET /websocket/ HTTP/1.1\r\nHost: demo\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n"
    b"Sec-WebSocket-Version: 13\r\nSec-WebSocket-Key: AAAAAAAAAAAAAAAAAAAAAA==\r\n\r\n"
)
SWITCH = b"HTTP/1.1 101 Switching Protocols\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n\r\n"
SLOW = {
    "nothing": b"",
    "half a request line": b"GET / HT",
    "a head without end": b"GET / HTTP/1.1\r\nHost: demo\r\nX-Slow: ",
    "a body that does not come": b"POST / HTTP/1.1\r\nHost: demo\r\nContent-Length: 1000000\r\n\r\nx",
    "a chunk that does not come": b"POST / HTTP/1.1\r\nHost: demo\r\nTransfer-Encoding: chunked\r\n\r\n5\r\nab",
}


async def upgrade_or_answer(turn):
    await turn.body()
    if turn.values("upgrade"):
        await turn.send(SWITCH)
        with contextlib.suppress(asyncio.IncompleteReadError):
            await turn.reader.readexactly(1 << 20)
        turn.close()
    else:
        await turn.answer(b"served")


async def gone(stage, left=0):
    for _ in range(1000):
        if stage.relay.open_connections <= left:
            return
        await asyncio.sleep(0.02)
    raise AssertionError(f"{stage.relay.open_connections} are still connected")


@pytest.mark.parametrize("sent", SLOW.values(), ids=SLOW)
async def test_a_crowd_that_sends_too_slowly_is_gone_after_a_while_and_holds_up_nobody(staging, sent):
    stage = await staging(head=1.0, idle=1.0, upload=1.0, linger=0.2)
    stage.worker.script = upgrade_or_answer
    for _ in range(300 if b"POST" not in sent else 100):  # a request that has begun takes one of the worker's places
        await (await stage.client()).send(sent)
    assert (await stage.get()).body == b"served"
    await gone(stage, left=1)
    assert (await stage.get()).body == b"served"


async def test_a_thousand_idle_websockets_hold_up_nobody(staging):
    stage = await staging(connections_per_address=2000, worker_websockets_per_address=2000)
    stage.worker.script = upgrade_or_answer
    for _ in range(1000):
        client = await stage.client()
        await client.send(UPGRADE)
        assert (await client.head()).status == 101
    assert stage.relay.open_websockets == 1000
    for _ in range(20):
        assert (await stage.get()).body == b"served"
    for client in stage.clients:
        client.writer.close()
    await gone(stage)
    assert stage.relay.open_websockets == 0


async def test_an_address_with_as_many_websockets_as_one_may_have_is_told_and_others_are_served(staging):
    stage = await staging(connections_per_address=50)
    stage.worker.script = upgrade_or_answer
    for _ in range(50):
        client = await stage.client()
        await client.send(UPGRADE)
        assert (await client.head()).status == 101
    refused = await (await stage.client()).head()
    assert refused.status == 429
    assert refused.values("Retry-After")
    assert (await (await stage.client("127.0.0.9")).ask(GET)).status == 200


async def test_a_worker_that_becomes_a_websocket_and_is_gone_leaves_nothing_behind(stage, monkeypatch):
    listener, peers = socket.socket(socket.AF_UNIX), []
    listener.bind(f"{stage.worker.path}x")
    listener.listen(8)

    async def connect():
        sock = socket.socket(socket.AF_UNIX)
        sock.connect(f"{stage.worker.path}x")
        sock.setblocking(False)
        peers.append(listener.accept()[0])
        return sock

    dial = Pool.dial

    async def dialled(pool):
        connection = await dial(pool)
        with peers.pop() as peer:  # so that the request cannot be written any more, and this is still to be read
            peer.sendall(SWITCH)
        return connection

    monkeypatch.setattr(stage.worker, "connect", connect)
    monkeypatch.setattr(Pool, "dial", dialled)
    with listener:
        client = await stage.client()
        assert (await client.ask(UPGRADE)).status == 502
        client.reset()
        await gone(stage)
        assert stage.gate.ended == stage.gate.admitted == 1
