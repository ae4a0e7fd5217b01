"""Where an exchange passes into the next, a tunnel, or the end: nothing is lost, nothing grows, nobody waits."""

import asyncio
import contextlib
import time

import pytest
from test_relay_crowds import GET, UPGRADE

from blockyard_api.relay import upstream
from blockyard_api.relay.body import LAST_CHUNK, BadBody, ChunkedDecoder
from blockyard_api.relay.gate import Reply
from blockyard_api.relay.places import Bounds
from blockyard_api.relay.websocket import FrameScanner

POST = b"POST / HTTP/1.1\r\nHost: demo\r\nContent-Length: %d\r\n\r\n"


async def flood(turn, sent):
    """Write as long as somebody takes it."""
    while not turn.writer.is_closing():
        await turn.send(b"\x82\x7f" + (1 << 16).to_bytes(8, "big") + bytes(1 << 16))
        sent.append(1 << 16)


def waiting_for_the_visitor(stage):
    (connection,) = stage.relay._connections
    return connection._transport.get_write_buffer_size()


async def test_a_handshake_that_fills_what_the_visitor_does_not_read_holds_the_worker_back(stage):
    sent, steps = [], []

    async def script(turn):
        if not turn.values("upgrade"):
            await turn.answer(bytes(30_000))
            steps.append(turn)
            stage.worker.tell()
            return
        filler = b"X-Filler: " + b"x" * 60_000 + b"\r\n"
        await turn.send(b"HTTP/1.1 101 X\r\nConnection: upgrade\r\nUpgrade: websocket\r\n" + filler + b"\r\n")
        with contextlib.suppress(ConnectionError):
            await flood(turn, sent)

    stage.worker.script = script
    client = await stage.client()
    client.writer.transport.pause_reading()
    while waiting_for_the_visitor(stage) < 8192:  # the kernel takes some megabytes first
        wanted = len(steps) + 1
        await client.send(GET)
        await stage.worker.until(lambda wanted=wanted: len(steps) >= wanted and stage.gate.ended >= wanted)
    assert waiting_for_the_visitor(stage) < 64 << 10
    await client.send(UPGRADE)
    await asyncio.sleep(1)
    before = sum(sent)
    await asyncio.sleep(0.5)
    assert sum(sent) == before, "the worker is not held back"
    assert before < 8 << 20
    client.reset()


async def test_a_worker_that_has_not_taken_all_of_an_upload_gets_no_further_request_on_that_connection(stage):
    never = asyncio.Event()

    async def script(turn):
        if turn.number > 1:
            await turn.answer(b"served")
            return
        turn.writer.transport.pause_reading()
        await asyncio.sleep(0.3)  # the upload is on its way
        await turn.answer(b"enough")
        await never.wait()

    stage.worker.script = script
    client = await stage.client()
    await client.send(POST % 350_000)
    await stage.worker.until(lambda: stage.worker.turns)
    await client.send(bytes(350_000))  # a Unix socket takes 208 KB, the relay what it has read by then
    assert (await client.answer()).body == b"enough"
    assert (await stage.get()).body == b"served"
    client.reset()


def test_the_last_words_of_a_worker_that_writes_on_are_not_waited_for():
    class Endless:
        reads = 0

        def recv(self, _most):
            self.reads += 1
            if self.reads > 1000:
                raise BlockingIOError
            return b"HTTP/1.1 200 OK\r\n\r\n" if self.reads == 1 else bytes(65536)

    class Heard:
        wants_body, websocket = True, False

        def __getattr__(self, _name):
            return lambda *_args, **_more: None

    sock = Endless()
    pool = upstream.Pool(None, Bounds(places=1, places_each=1, waiting=0, waiting_each=0, websockets_each=0), idle=0)
    connection = upstream.WorkerConnection(pool, sock)
    connection.transport = Heard()
    connection.begin(Heard(), pool.share("here"), b"")
    connection.connection_lost(BrokenPipeError())
    assert 1 < sock.reads < 100


async def test_connections_that_are_refused_take_nobodys_place(staging):
    stage = await staging(connections=20, connections_per_address=3)
    for _ in range(40):
        await stage.client()
    assert (await stage.clients[-1].head()).status == 429
    reader, writer = await asyncio.open_connection("127.0.0.1", stage.port, local_addr=("127.0.0.9", 0))
    writer.write(GET)
    assert (await reader.readuntil(b"\r\n")).startswith(b"HTTP/1.1 200")
    writer.close()


@pytest.mark.parametrize("version", [b"1.0", b"1.1"])
async def test_a_body_that_only_the_connections_end_would_end_is_reset_where_it_is_cut_off(staging, version):
    stage = await staging(worker=0.5)

    async def script(turn):
        await turn.send(b"HTTP/1.1 200 OK\r\n\r\nhalf")
        await asyncio.sleep(5)

    stage.worker.script = script
    client = await stage.client()
    await client.send(b"GET / HTTP/%b\r\nHost: demo\r\n\r\n" % version)
    assert (await client.head()).status == 200
    with pytest.raises(ConnectionResetError):
        await client.rest()


async def test_a_stop_waits_for_what_is_under_way_and_no_longer(stage):
    async def script(turn):
        await turn.send(b"HTTP/1.1 200 OK\r\nContent-Length: 4\r\n\r\nha")
        await asyncio.sleep(0.3)
        await turn.send(b"lf")

    stage.worker.script = script
    client = await stage.client()
    await client.send(GET)
    await client.head()
    began = time.monotonic()
    await stage.relay.close(15)
    assert time.monotonic() - began < 10
    assert await client.rest() == b"half"


@pytest.mark.parametrize("targets", [["/", "/own", "/own", "/own"], ["/own"] * 3, ["/", "/", "/own"]], ids=str)
async def test_each_of_several_requests_is_answered_after_their_sender_closed_his_half(stage, targets):
    async def script(turn):
        await asyncio.sleep(0.1)
        await turn.answer()

    stage.worker.script = script
    stage.gate.decide = lambda head, forward: Reply(404, (), b"no") if head.target == b"/own" else forward
    client = await stage.client()
    await client.send(b"".join(b"GET %b HTTP/1.1\r\nHost: demo\r\n\r\n" % target.encode() for target in targets))
    client.writer.write_eof()
    assert (await client.rest()).count(b"HTTP/1.1 ") == len(targets)


def test_a_flood_of_tiny_chunks_is_refused_and_what_a_server_writes_is_not():
    with pytest.raises(BadBody):
        ChunkedDecoder().feed(b"1\r\nx\r\n" * 40_000 + LAST_CHUNK)
    pieces, rest = ChunkedDecoder().feed(b"20\r\n" + bytes(32) + b"\r\n" + LAST_CHUNK)
    assert (pieces, rest) == ([bytes(32)], b"")
    assert ChunkedDecoder().feed((b"28\r\n" + bytes(40) + b"\r\n") * 5_500 + LAST_CHUNK)[1] == b""


def test_too_many_frames_to_follow_count_as_data_and_end_nowhere_in_particular():
    scanner = FrameScanner()
    assert not scanner.scan(b"\x89\x00" * 100)  # pings
    assert scanner.between_frames
    assert scanner.scan(b"\x89\x00" * 100_000)
    assert not scanner.between_frames
    assert scanner.scan(b"\x89\x00")
