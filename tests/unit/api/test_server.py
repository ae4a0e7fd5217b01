"""The control plane's server against raw sockets: what strangers may send is bounded in size and in time."""

import asyncio
import contextlib
import json
import tracemalloc

import pytest
from running_control import until


@pytest.fixture
async def connect(listening):
    opened = []

    async def connected():
        opened.append(await asyncio.open_connection(*listening.address))
        return opened[-1]

    yield connected
    for _, writer in opened:
        writer.close()


async def refused(reader, status):
    head, _, body = (await reader.read()).partition(b"\r\n\r\n")
    assert int(head.split()[1]) == status, head
    assert set(json.loads(body)) == {"error", "message"}


async def ok(connect, request=b"GET /healthz HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n"):
    reader, writer = await connect()
    writer.write(request)
    assert (await reader.read()).startswith(b"HTTP/1.1 200")


@pytest.mark.parametrize("begun", [b"", b"GET / HT", b"GET /healthz HTTP/1.1\r\nHost: x\r\nX-Slow: "])
async def test_a_head_that_does_not_come_in_time_ends_its_connection(listening, connect, clock, begun):
    reader, writer = await connect()
    writer.write(begun)
    await until(lambda: len(listening.server_state.connections) == 1)
    await asyncio.sleep(0.05)  # until what was sent is read
    await clock.advance(29)
    assert len(listening.server_state.connections) == 1
    await clock.advance(2)
    assert await reader.read() == b""
    await ok(connect)


async def test_one_address_cannot_take_all_connections(listening, connect):
    for _ in range(500):
        await connect()
    reader, _ = await connect()
    answer = await reader.read()
    assert answer.startswith(b"HTTP/1.1 429")
    assert b"Retry-After: " in answer
    reader, writer = await asyncio.open_connection(*listening.address, local_addr=("127.0.0.2", 0))
    writer.write(b"GET /healthz HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n")
    assert (await reader.read()).startswith(b"HTTP/1.1 200")
    writer.close()


async def test_a_thousand_idle_connections_are_gone_after_a_while_and_hold_up_nobody_meanwhile(
    listening, connect, clock
):
    crowd = []
    for number in range(1000):
        address = (f"127.0.0.{2 + number // 400}", 0)
        crowd.append(await asyncio.open_connection(*listening.address, local_addr=address))
        crowd[-1][1].write((b"", b"GET / HT", b"POST / HTTP/1.1\r\nX-Slow: ")[number % 3])
    await until(lambda: len(listening.server_state.connections) == 1000, "all connections")
    await ok(connect)
    await asyncio.sleep(0.1)
    await clock.advance(31)
    await until(lambda: not listening.server_state.connections, "the end of all")
    for _, writer in crowd:
        writer.close()


async def test_a_connection_that_is_used_again_has_the_time_anew(listening, connect, clock):
    reader, writer = await connect()
    for _ in range(3):
        writer.write(b"GET /healthz HTTP/1.1\r\nHost: x\r\n\r\n")
        assert (await reader.readuntil(b"\r\n\r\n")).startswith(b"HTTP/1.1 200")
        await reader.readexactly(2)
        await clock.advance(25)
    writer.write(b"GET /healthz HTTP/1.1\r\nHost: x\r\nX-Slow: ")
    await asyncio.sleep(0.05)
    await clock.advance(31)
    assert await reader.read() == b""


@pytest.mark.parametrize("line", [b"X-A: b\r\n", b"X: " + b"y" * 5000 + b"\r\n"])
async def test_a_head_without_end_is_refused_and_not_kept(connect, line):
    tracemalloc.start()
    _, writer = await connect()
    writer.write(b"GET /healthz HTTP/1.1\r\nHost: x\r\n")
    with contextlib.suppress(ConnectionError):
        for _ in range(200):
            writer.write(line * (200_000 // len(line)))
            await writer.drain()
    _, most = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert most < 20 << 20  # of 40 MB that were sent
    await ok(connect)


async def test_a_head_above_the_bound_is_told_in_the_contracts_shape(connect):
    reader, writer = await connect()
    writer.write(b"GET /" + b"a" * 66_000)
    await refused(reader, 431)


async def test_a_large_body_glued_to_its_head_is_not_taken_for_one(connect):
    body = b" " * 300_000
    head = b"POST /api/v1/apps HTTP/1.1\r\nHost: x\r\nConnection: close\r\nContent-Length: %d\r\n\r\n" % len(body)
    reader, writer = await connect()
    writer.write(head + body)
    await refused(reader, 401)  # and not 431


@pytest.mark.parametrize("sent", [b"\x00\x01\x02\r\n\r\n", b"GET / HTTP/9.9\r\n\r\n", b"CONNECT x:1 HTTP/1.1\r\n\r\n"])
async def test_what_is_no_request_is_refused_in_the_contracts_shape(connect, sent):
    reader, writer = await connect()
    writer.write(sent)
    await refused(reader, 400)


@pytest.mark.parametrize("framing", ["length", "chunks"])
@pytest.mark.parametrize("path", [b"/api/v1/bootstrap", b"/api/v1/apps", b"/api/v1/users/me/tokens"])
async def test_a_strangers_body_is_read_up_to_a_bound_and_no_further(connect, path, framing):
    reader, writer = await connect()
    head = b"POST " + path + b" HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nConnection: close\r\n"
    head += b"Content-Length: 100000000\r\n\r\n" if framing == "length" else b"Transfer-Encoding: chunked\r\n\r\n"
    writer.write(head)
    answer = asyncio.create_task(refused(reader, 413))
    piece = b" " * 65536
    with contextlib.suppress(ConnectionError):
        for _ in range(17):
            writer.write(piece if framing == "length" else b"10000\r\n" + piece + b"\r\n")
            await writer.drain()
    await answer


async def test_a_body_that_does_not_go_on_is_given_up(connect, clock):
    reader, writer = await connect()
    writer.write(b"POST /api/v1/bootstrap HTTP/1.1\r\nHost: x\r\nConnection: close\r\nContent-Length: 9\r\n\r\n{")
    await asyncio.sleep(0.05)
    await clock.advance(61)
    await refused(reader, 400)


async def test_an_upload_that_does_not_go_on_is_given_up_and_leaves_nothing(control, connect, clock):
    await control.app()
    _, plain = await control.services.tokens.create("admin", "t")
    reader, writer = await connect()
    writer.write(
        b"POST /api/v1/apps/plain/bundles HTTP/1.1\r\nHost: x\r\nConnection: close\r\nContent-Length: 3000000\r\n"
        b"Authorization: Bearer %b\r\n\r\n" % plain.encode()
    )
    for _ in range(30):  # more than other routes take
        writer.write(bytes(65536))
        await writer.drain()
    uploads = control.state / "uploads"
    await until(lambda: [file for file in uploads.iterdir() if file.stat().st_size > 1_800_000], "the upload")
    await asyncio.sleep(0.1)  # until the rest is read
    await clock.advance(61)
    await refused(reader, 400)
    assert not list(uploads.iterdir())
