"""The control plane's server against raw sockets: what strangers may send is bounded in size and in time."""

import asyncio
import contextlib
import json
import socket
import tracemalloc

import pytest
from pydantic import ValidationError
from running_control import until
from uvicorn.protocols.http import httptools_impl

from blockyard_api.http.models import AppChanges


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
    told = json.loads(body)
    assert set(told) == {"error", "message"}
    return told


async def ok(connect, request=b"GET /healthz HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n"):
    reader, writer = await connect()
    writer.write(request)
    assert (await reader.read()).startswith(b"HTTP/1.1 200")


async def test_a_probe_that_asks_by_head_gets_the_answer_without_its_body(connect):
    reader, writer = await connect()
    for request in (b"HEAD /readyz", b"HEAD /api/v1/apps", b"GET /healthz"):
        writer.write(request + b" HTTP/1.1\r\nHost: x\r\n\r\n")
    writer.write(b"HEAD /healthz HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n")
    *heads, rest = (await reader.read()).split(b"\r\n\r\n")
    assert [int(head.rpartition(b"HTTP/1.1 ")[2][:3]) for head in heads] == [200, 401, 200, 200]
    assert b"content-length: 0" not in heads[-1]
    assert rest == b""


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


async def test_the_addresses_of_one_ipv6_network_share_their_connections(connect, monkeypatch):
    peers = iter([*(f"2001:db8::{number:x}" for number in range(501)), "2001:db8:0:1::1"])
    monkeypatch.setattr(httptools_impl, "get_remote_addr", lambda _: (next(peers), 1))
    for _ in range(500):
        await connect()
    reader, _ = await connect()
    assert (await reader.read()).startswith(b"HTTP/1.1 429")
    await ok(connect)


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


BEGUN = b"GET /healthz HTTP/1.1\r\nHost: x\r\n"
BEGUN_TRAILERS = b"POST /api/v1/bootstrap HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n"


@pytest.mark.parametrize("line", [b"X-A: b\r\n", b"X: " + b"y" * 5000 + b"\r\n"])
@pytest.mark.parametrize("begun", [BEGUN, BEGUN_TRAILERS], ids=["head", "trailers"])
async def test_a_head_without_end_and_trailers_without_end_are_not_kept(connect, begun, line):
    tracemalloc.start()
    _, writer = await connect()
    writer.write(begun)
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
    reader, writer = await connect()
    writer.write(b"POST /api/v1/apps HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n\r\n" % len(body) + body)
    assert (await reader.readuntil(b"\r\n")).split()[1] == b"401"  # and not 431


@pytest.mark.parametrize("sent", [b"\x00\x01\x02\r\n\r\n", b"GET / HTTP/9.9\r\n\r\n", b"CONNECT x:1 HTTP/1.1\r\n\r\n"])
async def test_what_is_no_request_is_refused_in_the_contracts_shape(connect, sent):
    reader, writer = await connect()
    writer.write(sent)
    await refused(reader, 400)


async def token(control):
    return (await control.services.tokens.create("admin", "t"))[1].encode()


def framed(body, framing):
    if framing == "length":
        return b"Content-Length: %d\r\n\r\n%b" % (len(body), body)
    return b"Transfer-Encoding: chunked\r\n\r\n%x\r\n%b\r\n0\r\n\r\n" % (len(body), body)


@pytest.mark.parametrize("framing", ["length", "chunks"])
@pytest.mark.parametrize(("path", "most"), [(b"bootstrap", 1024), (b"apps", 65536), (b"users/me/tokens", 65536)])
async def test_a_body_is_taken_up_to_a_bound_and_no_further(control, connect, path, most, framing):
    head = b"POST /api/v1/%b HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n" % path
    head += b"Connection: close\r\nAuthorization: Bearer %b\r\n" % await token(control)
    for more, status in ((0, 400), (1, 413)):
        reader, writer = await connect()
        writer.write(head + framed(b'{"a": 1}'.ljust(most + more), framing))
        await refused(reader, status)


async def test_a_body_announced_as_too_large_is_refused_before_it_comes(connect):
    reader, writer = await connect()
    writer.write(b"POST /api/v1/bootstrap HTTP/1.1\r\nHost: x\r\nConnection: close\r\nContent-Length: 1025\r\n\r\n")
    await refused(reader, 413)


@pytest.mark.parametrize("secret", [b"", b"Authorization: Bearer by_wrong\r\n"])
@pytest.mark.parametrize(
    "request_line", [b"POST /api/v1/apps", b"PATCH /api/v1/apps/x", b"POST /api/v1/users/me/tokens"]
)
async def test_who_calls_is_asked_before_the_body_is_read(connect, request_line, secret):
    reader, writer = await connect()
    writer.write(request_line + b" HTTP/1.1\r\nHost: x\r\nConnection: close\r\n%bContent-Length: 9\r\n\r\n" % secret)
    await refused(reader, 401)


async def test_no_body_of_strangers_is_parsed_but_small_ones_and_others_are_answered_meanwhile(connect, monkeypatch):
    parsed = []
    loads = json.loads
    monkeypatch.setattr(json, "loads", lambda text, **more: parsed.append(len(text)) or loads(text, **more))
    body = b"{" + b",".join(b'"%06d":0' % number for number in range(100_000)) + b"}"
    strangers = []
    for path in (b"/api/v1/bootstrap", b"/api/v1/apps", b"/api/v1/users/me/tokens", b"/api/v1/apps/x/rollback") * 3:
        strangers.append(await connect())
        strangers[-1][1].write(
            b"POST %b HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n%b"
            % (path, len(body), body)
        )
    await ok(connect)
    for reader, _ in strangers:
        assert (await reader.readuntil(b"\r\n")).split()[1] in (b"401", b"413")
    assert not [size for size in parsed if size > 1024]


def test_unknown_keys_make_one_error_however_many_they_are():
    with pytest.raises(ValidationError) as refusal:
        AppChanges.model_validate({f"{number}\ud800": 0 for number in range(1000)})
    assert refusal.value.error_count() == 1


async def test_an_unknown_key_is_named_in_the_contracts_shape(control, connect):
    reader, writer = await connect()
    writer.write(
        b"POST /api/v1/apps HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nConnection: close\r\n"
        b"Authorization: Bearer %b\r\n"
        % await token(control)
        + framed(b'{"name": "a", "\\ud800{colour}": 1}', "length")
    )
    assert "colour" in (await refused(reader, 400))["message"]


async def answered(reader):
    """Read the answer to GET /healthz, and no further."""
    assert (await reader.readuntil(b"\r\n\r\n")).startswith(b"HTTP/1.1 200")
    assert await reader.readexactly(2) == b"ok"


@pytest.mark.parametrize("more", [b"", b"a", b"a" * 300_000])
async def test_a_body_that_does_not_end_after_its_answer_ends_the_connection(listening, connect, clock, more):
    reader, writer = await connect()
    writer.write(b"GET /healthz HTTP/1.1\r\nHost: x\r\nContent-Length: 1000000\r\n\r\n")
    await answered(reader)
    writer.write(more)
    await asyncio.sleep(0.05)  # until that is read
    await clock.advance(11)
    assert await reader.read() == b""
    await until(lambda: not listening.server_state.connections)


async def test_a_body_that_ends_soon_after_its_answer_leaves_the_connection_to_the_next_request(connect, clock):
    reader, writer = await connect()
    for _ in range(2):
        writer.write(b"GET /healthz HTTP/1.1\r\nHost: x\r\nContent-Length: 3\r\n\r\na")
        await answered(reader)
        writer.write(b"bc")
        await asyncio.sleep(0.05)
        await clock.advance(11)


@pytest.mark.parametrize("more", [b"", b"\r\n", b"\r\n\r\n"])
async def test_an_idle_connection_ends_whatever_comes_that_is_no_request(listening, connect, clock, more):
    reader, writer = await connect()
    writer.write(b"GET /healthz HTTP/1.1\r\nHost: x\r\n\r\n")
    await answered(reader)
    writer.write(more)
    await asyncio.sleep(0.05)
    await clock.advance(76)
    assert await reader.read() == b""
    await until(lambda: not listening.server_state.connections)


async def test_an_answer_is_read_although_the_request_goes_on_and_the_connection_closes(connect):
    reader, writer = await connect()
    writer.write(
        b"POST /api/v1/apps HTTP/1.1\r\nHost: x\r\nConnection: close\r\nContent-Length: 90000000\r\n\r\n"
        + bytes(9_000_000)
    )
    await refused(reader, 401)


@pytest.mark.parametrize("last", [b"", b"Connection: close\r\n"])
@pytest.mark.parametrize("requests", [1, 20])
async def test_who_takes_nothing_of_his_answers_is_not_waited_for_for_ever(listening, clock, requests, last):
    (accepting,) = listening.servers[0].sockets
    accepting.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)
    with socket.socket() as stalled:
        stalled.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        stalled.connect(listening.address)
        stalled.sendall(b"GET /openapi.json HTTP/1.1\r\nHost: x\r\n%b\r\n" % last * requests)
        connections = listening.server_state.connections
        await until(lambda: [one for one in connections if one.transport.get_write_buffer_size()])
        for _ in range(3):  # uvicorn's own timer for what comes next may fire first
            await clock.advance(80)
            await asyncio.sleep(0.05)
        await until(lambda: not connections)


async def test_a_request_under_way_when_a_body_ends_is_no_part_of_that_body(connect):
    reader, writer = await connect()
    writer.write(b"GET /healthz HTTP/1.1\r\nHost: x\r\nContent-Length: 100000\r\n\r\n" + bytes(100_000) + b"GET /he")
    await answered(reader)
    writer.write(b"althz HTTP/1.1\r\nHost: x\r\n\r\n")
    await answered(reader)


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
