"""WebSockets: negotiated end to end, relayed as bytes, watched for visitors' messages only."""

import asyncio
import base64
import hashlib
import itertools
import os

import pytest
import websockets
from hypothesis import given, settings
from hypothesis import strategies as st

from blockyard_api.relay.websocket import FrameScanner, Tunnel

KEY = "dGhlIHNhbXBsZSBub25jZQ=="
ACCEPT = base64.b64encode(hashlib.sha1(KEY.encode() + b"258EAFA5-E914-47DA-95CA-C5AB0DC85B11").digest()).decode()
UPGRADE = (
    b"GET /ws?x=1 HTTP/1.1\r\nHost: demo\r\nConnection: keep-alive, Upgrade\r\nUpgrade: WebSocket\r\n"
    b"Sec-WebSocket-Version: 13\r\nSec-WebSocket-Key: " + KEY.encode() + b"\r\n\r\n"
)
SWITCH = (
    "HTTP/1.1 101 Switching Protocols\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
    f"Sec-WebSocket-Accept: {ACCEPT}\r\nSet-Cookie: a=1\r\nSet-Cookie: blockyard_route=x\r\n\r\n"
).encode()


def frame(payload=b"", opcode=1, *, masked=True, final=True):
    """One frame as RFC 6455 writes it; the mask is zero, so that payloads stay readable."""
    size = len(payload)
    length, extended = (
        (size, b"") if size < 126 else (126, size.to_bytes(2)) if size < 65536 else (127, size.to_bytes(8))
    )
    head = bytes([opcode | (128 if final else 0), length | (128 if masked else 0)]) + extended
    return head + (bytes(4) if masked else b"") + payload


def accepts(then):
    async def script(turn):
        await turn.send(SWITCH)
        await then(turn)

    return script


async def echo(turn):
    while data := await turn.reader.read(65536):
        await turn.send(data)
    turn.close()


async def opened(stage, then=echo):
    stage.worker.script = accepts(then)
    client = await stage.client()
    assert (await client.ask(UPGRADE)).status == 101
    return client


async def test_the_handshake_passes_in_both_directions(stage):
    stage.gate.response_headers = ((b"Set-Cookie", b"blockyard_route=true"),)
    stage.gate.headers = ((b"X-Shiny-User", b"anna"),)
    stage.worker.script = accepts(echo)
    answer = await stage.ask(UPGRADE)
    turn = stage.worker.turns[0]
    assert (turn.values("connection"), turn.values("upgrade")) == (["Upgrade"], ["websocket"])
    assert (turn.values("sec-websocket-key"), turn.values("x-shiny-user")) == ([KEY], ["anna"])
    assert stage.gate.heads[0].websocket
    assert (answer.values("connection"), answer.values("upgrade")) == (["Upgrade"], ["websocket"])
    assert answer.values("sec-websocket-accept") == [ACCEPT]
    assert sorted(answer.values("set-cookie")) == ["a=1", "blockyard_route=true"]


async def test_frames_glued_to_the_handshake_arrive_both_ways(stage):
    received = []

    async def script(turn):
        await turn.send(SWITCH + frame(b"hello", masked=False))
        received.append(await turn.reader.readexactly(len(frame(b"first"))))
        await turn.send(frame(b"again", masked=False))

    stage.worker.script = script
    client = await stage.client()
    await client.send(UPGRADE + frame(b"first"))
    await client.head()
    assert await client.reader.readexactly(14) == frame(b"hello", masked=False) + frame(b"again", masked=False)
    assert received == [frame(b"first")]
    assert stage.gate.messages == 1


async def test_a_real_client_and_a_real_server_agree_on_compression_and_a_sub_protocol(stage, tmp_path):
    async def handler(connection):
        async for message in connection:
            await connection.send(message)

    stage.worker.path = str(tmp_path / "real.sock")
    async with (
        websockets.unix_serve(handler, stage.worker.path, subprotocols=["two", "one"]),
        websockets.connect(f"ws://127.0.0.1:{stage.port}/ws", subprotocols=["one"], proxy=None) as connection,
    ):
        assert connection.subprotocol == "one"
        assert "permessage-deflate" in connection.response.headers["Sec-WebSocket-Extensions"]
        text = "hello " * 10_000
        await connection.send(text)
        assert await connection.recv() == text
        await (await connection.ping())
        assert stage.gate.messages == 1


async def test_messages_of_16_mb_arrive(stage, tmp_path):
    async def handler(connection):
        async for message in connection:
            await connection.send(message)

    stage.worker.path = str(tmp_path / "real.sock")
    async with (
        websockets.unix_serve(handler, stage.worker.path, max_size=None, compression=None),
        websockets.connect(f"ws://127.0.0.1:{stage.port}/", max_size=None, compression=None, proxy=None) as connection,
    ):
        message = os.urandom(16 << 20)
        await connection.send(message)
        assert await connection.recv() == message
        assert stage.gate.messages == 1


async def test_a_refused_upgrade_passes_as_it_is_and_the_connection_goes_on(stage):
    async def script(turn):
        await turn.send(b"HTTP/1.1 403 Forbidden\r\nContent-Length: 2\r\nX-Why: no\r\n\r\nno")

    stage.worker.script = script
    client = await stage.client()
    for _ in range(2):
        answer = await client.ask(UPGRADE)
        assert (answer.status, answer.body, answer.values("x-why")) == (403, b"no", ["no"])
    assert stage.gate.close_websocket is None


@pytest.mark.parametrize(
    ("old", "new"),
    [
        (b"GET", b"POST"),
        (b"Version: 13", b"Version: 8"),
        (b"Sec-WebSocket-Version: 13\r\n", b""),
        (KEY.encode(), b"short"),
        (b"Sec-WebSocket-Key", b"X-Key"),
        (b"Upgrade: WebSocket", b"Upgrade: h2c"),
        (b"keep-alive, Upgrade", b"keep-alive"),
    ],
)
async def test_what_is_no_proper_upgrade_is_an_ordinary_request(stage, old, new):
    answer = await stage.ask(UPGRADE.replace(old, new))
    assert answer.status == 200
    assert not stage.gate.heads[0].websocket
    assert stage.worker.turns[0].values("upgrade") == []


async def test_a_switch_to_another_protocol_is_a_502(stage):
    async def script(turn):
        await turn.send(SWITCH.replace(b"websocket", b"h2c"))
        await turn.reader.read()

    stage.worker.script = script
    assert (await stage.ask(UPGRADE)).status == 502
    await stage.worker.until(lambda: stage.worker.open == 0)


async def test_a_visitor_who_leaves_closes_the_workers_side(stage):
    client = await opened(stage)
    client.reset()
    await stage.worker.until(lambda: stage.worker.open == 0 and stage.gate.ended == 1)


async def test_a_visitor_who_closes_politely_is_heard_to_the_end(stage):
    received = []

    async def script(turn):
        received.append(await turn.reader.read())

    client = await opened(stage, script)
    client.writer.write(frame(b"bye"))
    client.writer.close()
    await stage.worker.until(lambda: stage.worker.open == 0 and stage.gate.ended == 1)
    assert received == [frame(b"bye")]


async def test_a_worker_that_leaves_closes_the_visitors_side_after_its_last_words(stage):
    async def script(turn):
        await turn.send(bytes(1_000_000))
        turn.close()

    client = await opened(stage, script)
    assert len(await client.rest()) == 1_000_000


async def test_the_gate_can_close_a_websocket_at_once(stage):
    client = await opened(stage)
    stage.gate.close_websocket()
    with pytest.raises((asyncio.IncompleteReadError, ConnectionResetError)):
        await client.reader.readexactly(1)
    await stage.worker.until(lambda: stage.worker.open == 0 and stage.gate.ended == 1)
    stage.gate.close_websocket()  # once more does no harm


async def test_a_stopping_server_says_going_away(stage):
    client = await opened(stage)
    await client.send(frame(b"x"))
    await client.reader.readexactly(len(frame(b"x")))
    closing = asyncio.create_task(stage.relay.close(5))
    assert await client.rest() == b"\x88\x02\x03\xe9"
    client.writer.close()
    await closing


async def test_no_farewell_is_put_into_the_middle_of_a_frame(stage):
    half = frame(b"half of it", masked=False)[:6]

    async def script(turn):
        await turn.send(half)
        await turn.reader.read()

    client = await opened(stage, script)
    await client.reader.readexactly(6)
    closing = asyncio.create_task(stage.relay.close(5))
    assert await client.rest() == b""
    client.writer.close()
    await closing


@pytest.mark.parametrize(
    ("sent", "counted"),
    [
        (frame(b"text", 1), 1),
        (frame(b"binary", 2), 1),
        (frame(b"", 1), 1),
        (frame(b"ping", 9), 0),
        (frame(b"pong", 10), 0),
        (frame(b"\x03\xe8", 8), 0),
        (frame(b"ping", 9) + frame(b"text", 1), 1),
        (frame(b"x" * 125, 9), 0),
        (frame(b"x" * 70_000, 1), 1),
    ],
)
async def test_only_data_frames_of_the_visitor_are_activity(stage, sent, counted):
    client = await opened(stage)
    await client.send(sent)
    await client.reader.readexactly(len(sent))
    assert stage.gate.messages == counted


async def test_what_the_worker_sends_is_no_activity(stage):
    async def script(turn):
        for _ in range(5):
            await turn.send(frame(b"tick", masked=False))
        await turn.send(frame(b"", 9, masked=False))
        await turn.reader.read()

    client = await opened(stage, script)
    await client.reader.readexactly(5 * 6 + 2)
    assert stage.gate.messages == 0


async def test_a_visitor_who_closed_his_sending_half_before_the_upgrade_has_left(stage):
    left, over = asyncio.Event(), asyncio.Event()

    async def script(turn):
        await left.wait()
        await turn.send(SWITCH)
        assert await turn.reader.read() == b""
        over.set()
        turn.close()

    stage.worker.script = script
    client = await stage.client()
    await client.send(UPGRADE)
    await stage.worker.until(lambda: stage.worker.turns)
    client.writer.write_eof()
    await asyncio.sleep(0.1)  # the relay has heard of it
    left.set()
    async with asyncio.timeout(10):
        await over.wait()
    await stage.worker.until(lambda: stage.gate.ended == 1)


async def test_an_upgraded_connection_leaves_its_place_to_others(staging):
    stage = await staging(worker_connections=1)
    await opened(stage)
    stage.worker.script = lambda turn: turn.answer()
    assert (await stage.get()).status == 200
    assert (stage.relay.open_connections, stage.relay.open_websockets) == (2, 1)


FRAMES = st.lists(
    st.builds(
        frame,
        st.one_of(
            st.sampled_from([0, 1, 123, 124, 125, 126, 127, 65535, 65536]).map(bytes),
            st.binary(max_size=200),
            st.integers(0, 70_000).map(bytes),
        ),
        st.sampled_from([0, 1, 2, 8, 9, 10]),
        masked=st.booleans(),
        final=st.booleans(),
    ),
    max_size=6,
)


@settings(max_examples=300, deadline=None)
@given(FRAMES, st.data())
def test_the_scanner_sees_the_same_however_the_bytes_are_split(frames, data):
    stream = b"".join(frames)
    cuts = sorted(data.draw(st.lists(st.integers(0, len(stream)), max_size=12)))
    pieces = [stream[a:b] for a, b in itertools.pairwise([0, *cuts, len(stream)])]
    starts = set(itertools.accumulate(map(len, frames), initial=0))
    scanner, at, seen = FrameScanner(), 0, []
    for piece in pieces:
        seen.append(scanner.scan(piece))
        at += len(piece)
        assert scanner.between_frames == (at in starts)
    assert any(seen) == any(written[0] & 15 < 3 for written in frames)
    whole = FrameScanner()
    assert whole.scan(stream) == any(seen)
    assert sum(FrameScanner().scan(written) for written in frames) == sum(written[0] & 15 < 3 for written in frames)


@settings(max_examples=50, deadline=None)
@given(FRAMES)
def test_byte_by_byte_every_data_frame_is_counted_once(frames):
    scanner = FrameScanner()
    counted = sum(scanner.scan(bytes([byte])) for byte in b"".join(frames[:3]))
    assert counted == sum(written[0] & 15 < 3 for written in frames[:3])


class Line:
    """As much of a transport as a tunnel needs, to be cut at any byte."""

    def __init__(self):
        self.written = b""

    def write(self, data):
        self.written += data

    def set_protocol(self, protocol):
        self.protocol = protocol

    def is_closing(self):
        return False

    def abort(self):
        self.aborted = True

    def write_eof(self):
        self.ended = True


@settings(max_examples=300, deadline=None)
@given(FRAMES, FRAMES, st.data())
def test_a_tunnel_passes_every_byte_and_judges_every_piece_as_the_scanner_does(sent, answered, data):
    visitor, worker, heard, expected = Line(), Line(), [], []
    tunnel = Tunnel(visitor, worker, lambda: heard.append(1), lambda: None)
    tunnel.start(b"", b"")
    for frames, line in ((sent, visitor), (answered, worker)):
        stream = b"".join(frames)
        edges = list(itertools.accumulate(map(len, frames), initial=0))
        places = st.one_of(st.sampled_from(edges), st.integers(0, len(stream)))
        drawn = data.draw(st.lists(st.tuples(places, st.integers(-6, 6)), max_size=12))
        cuts = sorted(min(max(at + by, 0), len(stream)) for at, by in drawn)
        scanner = FrameScanner()
        for a, b in itertools.pairwise([0, *cuts, len(stream)]):
            line.protocol.data_received(stream[a:b])
            if scanner.scan(stream[a:b]) and line is visitor:
                expected.append(1)
            assert line.protocol.scanner.between_frames == scanner.between_frames
    assert (worker.written, visitor.written) == (b"".join(sent), b"".join(answered))
    assert heard == expected


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("size", [0, 1, 2, 5, 119, 120, 121, 122, 123, 124, 125, 126, 127, 128, 200])
def test_no_beginning_and_no_surplus_is_taken_for_one_small_frame(size, masked):
    stream = frame(bytes(size), 9, masked=masked) + frame(bytes(300), 9, masked=masked)
    for cut in range(len(stream) + 1):
        visitor = Line()
        Tunnel(visitor, Line(), lambda: None, lambda: None).start(b"", b"")
        scanner = FrameScanner()
        for piece in (stream[:cut], stream[cut:]):
            visitor.protocol.data_received(piece)
            scanner.scan(piece)
            assert visitor.protocol.scanner.between_frames == scanner.between_frames
        assert scanner.between_frames
