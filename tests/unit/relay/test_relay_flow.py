"""Back-pressure, splitting and limits: what is slow, large, cut up or too much."""

import asyncio
import contextlib
import itertools
import os
import resource
import socket

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from blockyard_api.relay.body import BadBody, ChunkedDecoder
from blockyard_api.relay.gate import Overloaded, Reply
from blockyard_api.relay.upstream import TooSlow

GET = b"GET / HTTP/1.1\r\nHost: demo\r\n\r\n"
BLOCK = bytes(256 << 10)
FLAT = 24 << 20  # more than every buffer on the way, kernels' included, and far less than what is sent


def resident():
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * resource.getpagesize()


async def settled(value):
    """Wait until `value()` has stopped changing: the sender is blocked."""
    async with asyncio.timeout(20):
        before, same = None, 0
        while same < 4:
            same = same + 1 if (now := value()) == before else 0
            before = now
            await asyncio.sleep(0.05)
    return before


def small_buffers(client):
    client.writer.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 65536)


@pytest.mark.parametrize("framing", ["length", "chunked"])
async def test_a_slow_client_of_a_1_gb_download_keeps_memory_flat(stage, framing):
    size = 1 << 30
    sent = 0

    async def script(turn):
        nonlocal sent
        head = f"Content-Length: {size}" if framing == "length" else "Transfer-Encoding: chunked"
        await turn.send(f"HTTP/1.1 200 OK\r\n{head}\r\n\r\n".encode())
        while sent < size:
            if framing == "length":
                await turn.send(BLOCK)
            else:
                await turn.send(b"40000\r\n" + BLOCK + b"\r\n")
            sent += len(BLOCK)
        if framing == "chunked":
            await turn.send(b"0\r\n\r\n")

    stage.worker.script = script
    client = await stage.client()
    before = resident()
    await client.send(GET)
    await client.head()
    assert await settled(lambda: sent) < FLAT
    assert resident() - before < FLAT
    received = 0
    peak = 0
    async with asyncio.timeout(60):
        while received < size and (data := await client.reader.read(1 << 20)):
            received += len(data)
            peak = max(peak, resident() - before)
    assert received >= size
    assert peak < FLAT


async def test_a_slow_worker_holds_an_upload_back(stage):
    sent = 0
    go_on = asyncio.Event()

    async def script(turn):
        turn.reader._limit = 65536
        await go_on.wait()
        await turn.answer(b"%d" % len(await turn.body()))

    stage.worker.script = script
    client = await stage.client()
    size = 200 << 20
    await client.send(b"POST / HTTP/1.1\r\nHost: demo\r\nContent-Length: %d\r\n\r\n" % size)

    async def upload():
        nonlocal sent
        while sent < size:
            await client.send(BLOCK)
            sent += len(BLOCK)

    uploading = asyncio.create_task(upload())
    before = resident()
    assert await settled(lambda: sent) < FLAT
    assert resident() - before < FLAT
    go_on.set()
    assert (await client.answer()).body == b"%d" % size
    await uploading


async def test_a_slow_websocket_reader_holds_the_worker_back(stage):
    sent = 0

    async def script(turn):
        nonlocal sent
        await turn.send(b"HTTP/1.1 101 X\r\nUpgrade: websocket\r\nConnection: upgrade\r\n\r\n")
        while True:
            await turn.send(BLOCK)
            sent += len(BLOCK)

    stage.worker.script = script
    client = await stage.client()
    await client.ask(
        b"GET / HTTP/1.1\r\nHost: demo\r\nConnection: upgrade\r\nUpgrade: websocket\r\n"
        b"Sec-WebSocket-Version: 13\r\nSec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n\r\n"
    )
    before = resident()
    blocked_at = await settled(lambda: sent)
    assert blocked_at < FLAT
    assert resident() - before < FLAT
    await client.reader.readexactly(blocked_at + (4 << 20))  # and on it goes


async def test_a_client_that_pipelines_without_reading_waits_for_itself(stage):
    async def script(turn):
        await turn.answer(BLOCK)

    stage.worker.script = script
    client = await stage.client()
    client.writer.write(GET * 2000)
    answered = await settled(lambda: len(stage.worker.turns))
    assert answered * len(BLOCK) < FLAT
    for _ in range(2000):
        assert len((await client.answer()).body) == len(BLOCK)


# splitting


def pieces_of(stream, cuts):
    return [
        stream[a:b] for a, b in itertools.pairwise([0, *sorted(cut % (len(stream) + 1) for cut in cuts), len(stream)])
    ]


REQUESTS = (
    GET
    + b"POST /a HTTP/1.1\r\nHost: demo\r\nContent-Length: 11\r\n\r\nhello world"
    + b"\r\nPUT /b HTTP/1.1\r\nHost: demo\r\nTransfer-Encoding: chunked\r\n\r\n"
    + b"5;x\r\nhello\r\n06\r\n world\r\n0\r\nX: y\r\n\r\n"
    + b"DELETE /c HTTP/1.1\r\nHost: demo\r\nCookie: blockyard_route=1; a=2\r\n\r\n"
)
RESPONSE = (
    b"HTTP/1.1 103 Early Hints\r\nLink: <a>\r\n\r\n"
    b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\nSet-Cookie: a=1\r\n\r\n"
    b"5\r\nhello\r\n6;x=y\r\n world\r\n0\r\nX: y\r\n\r\n"
)


async def send_in_pieces(writer, pieces):
    for piece in pieces:
        writer.write(piece)
        await writer.drain()
        await asyncio.sleep(0)


@pytest.mark.parametrize("seed", range(12))
async def test_requests_cut_anywhere_arrive_the_same(stage, seed):
    received = []

    async def script(turn):
        body = await turn.body()
        received.append((turn.head.split(b"\r\n")[0], body, turn.values("cookie")))
        await turn.answer()

    stage.worker.script = script
    client = await stage.client()
    client.writer.get_extra_info("socket").setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    cuts = range(len(REQUESTS)) if seed == 0 else list(os.urandom(seed * 3) * 2)
    sending = asyncio.create_task(send_in_pieces(client.writer, pieces_of(REQUESTS, cuts)))
    for _ in range(4):
        assert (await client.answer()).status == 200
    await sending
    assert received == [
        (b"GET / HTTP/1.1", b"", []),
        (b"POST /a HTTP/1.1", b"hello world", []),
        (b"PUT /b HTTP/1.1", received[2][1], []),
        (b"DELETE /c HTTP/1.1", b"", ["a=2"]),
    ]
    pieces, rest = ChunkedDecoder().feed(received[2][1])
    assert (b"".join(pieces), rest) == (b"hello world", b"")


@pytest.mark.parametrize("seed", range(12))
async def test_responses_cut_anywhere_arrive_the_same(stage, seed):
    cuts = range(len(RESPONSE)) if seed == 0 else list(os.urandom(seed * 3))

    async def script(turn):
        await send_in_pieces(turn.writer, pieces_of(RESPONSE, cuts))

    stage.worker.script = script
    client = await stage.client()
    for _ in range(2):
        assert (await client.ask(GET)).values("link") == ["<a>"]
        answer = await client.answer()
        assert (answer.body, answer.values("set-cookie")) == (b"hello world", ["a=1"])
    assert stage.worker.connections == 1


async def test_a_head_cut_in_two_and_glued_to_a_large_body_is_no_large_head(stage):
    async def script(turn):
        await turn.answer(b"%d" % len(await turn.body()))

    stage.worker.script = script
    client = await stage.client()
    await client.send(b"POST / HTTP/1.1\r\nHost: demo\r\nContent-Le")
    await asyncio.sleep(0.05)
    assert (await client.ask(b"ngth: 300000\r\n\r\n" + bytes(300_000))).body == b"300000"


async def test_a_response_head_cut_in_two_and_glued_to_a_large_body_is_no_large_head(stage):
    async def script(turn):
        await turn.send(b"HTTP/1.1 200 OK\r\nContent-Le")
        await asyncio.sleep(0.05)
        await turn.send(b"ngth: 300000\r\n\r\n" + bytes(300_000))

    stage.worker.script = script
    assert len((await stage.get()).body) == 300_000


async def test_a_head_of_almost_64_kb_passes(stage):
    assert (await stage.get("X: " + "y" * 65_000)).status == 200
    assert len(stage.worker.turns[0].values("x")[0]) == 65_000


CHUNKED = st.lists(st.binary(min_size=1, max_size=40), max_size=5).map(
    lambda pieces: b"".join(b"%x\r\n%b\r\n" % (len(piece), piece) for piece in pieces) + b"0\r\n\r\n"
)


def decoded(pieces):
    decoder, payload, rest = ChunkedDecoder(), b"", b""
    try:
        for piece in pieces:
            if decoder.done:
                rest += piece
            else:
                got, rest = decoder.feed(piece)
                payload += b"".join(got)
    except BadBody:
        return "bad"
    return payload, rest, decoder.done


@settings(max_examples=500, deadline=None)
@given(
    CHUNKED,
    st.lists(st.tuples(st.integers(0, 80), st.binary(max_size=3)), max_size=2),
    st.lists(st.integers(0, 300), max_size=8),
)
def test_a_chunked_body_is_read_the_same_however_it_is_split(body, damage, cuts):
    for at, inserted in damage:
        body = body[:at] + inserted + body[at:]
    body += b"GET / HTTP/1.1"
    assert decoded(pieces_of(body, cuts)) == decoded([body]) == decoded([bytes([byte]) for byte in body])


# limits


async def test_a_head_that_does_not_end_in_time_is_408(staging):
    stage = await staging(head=0.2)
    client = await stage.client()
    await client.send(b"GET / HTTP/1.1\r\n")
    feeding = asyncio.create_task(send_slowly(client, b"X: y\r\n"))
    assert (await client.answer()).status == 408
    assert await client.rest() == b""
    feeding.cancel()


async def send_slowly(client, line):
    with contextlib.suppress(ConnectionError):
        while True:
            await client.send(line)
            await asyncio.sleep(0.02)


async def test_an_idle_connection_is_closed_without_a_word(staging):
    stage = await staging(idle=0.2)
    client = await stage.client()
    await client.ask(GET)
    assert await client.rest() == b""


async def test_an_upload_that_stalls_is_408_and_frees_the_worker(staging):
    stage = await staging(upload=0.2)

    async def script(turn):
        await turn.reader.read()

    stage.worker.script = script
    answer = await stage.ask(b"POST / HTTP/1.1\r\nHost: demo\r\nContent-Length: 10\r\n\r\nhalf")
    assert answer.status == 408
    await stage.worker.until(lambda: stage.worker.open == 0)


async def test_an_upload_that_is_slow_but_goes_on_is_not_cut_off(staging):
    stage = await staging(upload=0.4)

    async def script(turn):
        await turn.answer(await turn.body())

    stage.worker.script = script
    client = await stage.client()
    await client.send(b"POST / HTTP/1.1\r\nHost: demo\r\nContent-Length: 80000\r\n\r\n")
    for _ in range(20):
        await client.send(bytes(4000))
        await asyncio.sleep(0.05)
    assert (await client.answer()).body == bytes(80000)


@pytest.mark.parametrize("length", ["Content-Length: 100000", "Transfer-Encoding: chunked"])
async def test_an_upload_that_comes_byte_by_byte_is_408_and_frees_the_worker(staging, length):
    stage = await staging(upload=0.3)

    async def script(turn):
        await turn.reader.read()

    stage.worker.script = script
    client = await stage.client()
    await client.send(b"POST / HTTP/1.1\r\nHost: demo\r\n%b\r\n\r\n" % length.encode())

    async def trickle():
        with contextlib.suppress(ConnectionError):
            while True:
                await client.send(b"1\r\nx\r\n" if "chunked" in length else b"x")
                await asyncio.sleep(0.02)

    trickling = asyncio.create_task(trickle())
    assert (await client.answer()).status == 408
    await stage.worker.until(lambda: stage.worker.open == 0)
    trickling.cancel()


async def test_an_upload_that_the_worker_does_not_take_is_not_slow(staging):
    stage = await staging(upload=0.3)

    async def script(turn):
        turn.writer.transport.pause_reading()
        await asyncio.sleep(1)
        turn.writer.transport.resume_reading()
        await turn.body()
        await turn.answer(b"taken")

    stage.worker.script = script
    body = bytes(8 << 20)
    answer = await stage.ask(b"POST / HTTP/1.1\r\nHost: demo\r\nContent-Length: %d\r\n\r\n%b" % (len(body), body))
    assert answer.body == b"taken"


async def test_a_worker_that_stays_silent_is_the_gates_to_explain(staging):
    stage = await staging(worker=0.2)

    async def script(turn):
        await turn.reader.read()

    stage.worker.script = script
    assert (await stage.get()).status == 502
    assert isinstance(stage.gate.failures[0], TooSlow)
    await stage.worker.until(lambda: stage.worker.open == 0)


async def test_a_worker_that_drips_its_head_is_too_slow_all_the_same(staging):
    stage = await staging(worker=0.3)

    async def script(turn):
        await turn.send(b"HTTP/1.1 200 OK\r\n")
        while True:
            await turn.send(b"X: y\r\n")
            await asyncio.sleep(0.02)

    stage.worker.script = script
    assert (await stage.get()).status == 502


async def test_a_visitor_who_takes_nothing_is_dropped(staging):
    stage = await staging(stall=0.3)

    async def script(turn):
        await turn.send(b"HTTP/1.1 200 OK\r\nContent-Length: 1000000000\r\n\r\n")
        while True:
            await turn.send(BLOCK)

    stage.worker.script = script
    client = await stage.client()
    small_buffers(client)
    client.writer.transport.pause_reading()
    await client.send(GET)
    await stage.worker.until(lambda: stage.gate.ended == 1 and stage.worker.open == 0)
    client.writer.transport.resume_reading()


async def test_more_connections_than_allowed_get_503(staging):
    stage = await staging(connections=2)
    for _ in range(2):
        await (await stage.client()).ask(GET)
    third = await stage.client()
    answer = await third.ask(GET)
    assert answer.status == 503
    assert answer.values("retry-after")
    assert await third.rest() == b""


async def test_more_connections_from_one_address_than_allowed_get_429(staging):
    stage = await staging(connections_per_address=2)
    clients = [await stage.client() for _ in range(2)]
    for client in clients:
        assert (await client.ask(GET)).status == 200
    refused = await stage.client()
    answer = await refused.ask(GET)
    assert answer.status == 429
    assert answer.values("retry-after")
    for client in (clients[0], refused):
        client.writer.close()
        await client.writer.wait_closed()
    await settled(lambda: stage.relay.open_connections)
    assert (await stage.get()).status == 200


async def test_all_addresses_that_one_ipv6_customer_has_count_as_one(staging):
    relay = (await staging(connections_per_address=2)).relay
    counted = [(object(), f"2001:db8:1:2::{number}") for number in range(3)] + [(object(), "2001:db8:1:3::1")]
    refused = [relay.arrived(connection, address) is not None for connection, address in counted]
    for connection, address in counted:
        relay.left(connection, address)
    assert refused == [False, False, True, False]


async def test_a_trusted_proxy_may_hold_as_many_connections_as_it_likes(staging):
    stage = await staging(trusted="127.0.0.1/32", connections_per_address=1)
    for _ in range(3):
        assert (await (await stage.client()).ask(GET)).status == 200


class Busy:
    """A worker's script that takes a moment, and counts how many it has in hand."""

    def __init__(self, answer):
        self.answer = answer
        self.at_once = self.most = 0

    async def __call__(self, turn):
        self.at_once += 1
        self.most = max(self.most, self.at_once)
        await asyncio.sleep(0.01)
        self.at_once -= 1
        await self.answer(turn)


async def test_requests_beyond_a_workers_places_wait_in_line(staging):
    stage = await staging(worker_connections=2)
    busy = stage.worker.script = Busy(lambda turn: turn.answer())
    answers = await asyncio.gather(*(stage.get() for _ in range(20)))
    assert {answer.status for answer in answers} == {200}
    assert busy.most == 2


async def test_answers_that_end_with_the_connection_give_one_place_back_and_not_two(staging):
    stage = await staging(worker_connections=2)

    async def answer(turn):
        await turn.send(b"HTTP/1.1 200 OK\r\n\r\nall of it")
        turn.close()

    busy = stage.worker.script = Busy(answer)
    for _ in range(3):
        answers = await asyncio.gather(*(stage.get() for _ in range(10)))
        assert {answer.body for answer in answers} == {b"all of it"}
    assert busy.most == 2


async def test_a_line_that_is_too_long_is_turned_away(staging):
    stage = await staging(worker_connections=1, worker_queue=1)
    go_on = asyncio.Event()

    async def script(turn):
        await go_on.wait()
        await turn.answer()

    stage.worker.script = script
    first, second = await stage.client(), await stage.client()
    await first.send(GET)
    await stage.worker.until(lambda: len(stage.worker.turns) == 1)
    await second.send(GET)
    await settled(lambda: len(stage.gate.heads))
    assert (await stage.get()).status == 503
    assert isinstance(stage.gate.failures[0], Overloaded)
    go_on.set()
    assert (await first.answer()).status == (await second.answer()).status == 200


async def test_who_waits_in_line_for_too_long_is_told_so(staging):
    stage = await staging(worker_connections=1, worker=0.4)
    over = asyncio.Event()

    async def script(turn):  # takes its time, but is not silent
        await turn.send(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n")
        while not over.is_set():
            await turn.send(b"1\r\nx\r\n")
            await asyncio.sleep(0.05)
        await turn.send(b"0\r\n\r\n")

    stage.worker.script = script
    first = await stage.client()
    await first.send(GET)
    await first.head()
    second = await stage.client()
    answer = await second.ask(GET)
    assert answer.status == 503
    assert answer.values("Retry-After")
    assert isinstance(stage.gate.failures[0], Overloaded)
    over.set()
    stage.worker.script = lambda turn: turn.answer()
    await first.reader.readuntil(b"0\r\n\r\n")
    assert (await second.ask(GET)).status == 200


async def test_who_leaves_while_a_connection_to_the_worker_is_made_gives_his_place_back(staging):
    stage = await staging(worker_connections=1, linger=0.2)
    connect, asked, never = stage.worker.connect, asyncio.Event(), asyncio.Event()

    async def hangs():
        asked.set()
        await never.wait()

    stage.worker.connect = hangs
    client = await stage.client()
    await client.send(GET)
    await asked.wait()
    client.reset()
    await stage.worker.until(lambda: stage.gate.ended == 1)
    stage.worker.connect = connect
    assert (await stage.get()).status == 200


async def test_who_leaves_the_line_does_not_take_a_place_along(staging):
    stage = await staging(worker_connections=1, linger=0.2)
    go_on = asyncio.Event()

    async def script(turn):
        await go_on.wait()
        await turn.answer()

    stage.worker.script = script
    clients = [await stage.client() for _ in range(3)]
    for number, client in enumerate(clients):
        await client.send(GET)
        await stage.worker.until(lambda: len(stage.worker.turns) == 1)
        await settled(lambda number=number: len(stage.gate.heads) > number)
    clients[1].reset()
    await stage.worker.until(lambda: stage.gate.ended == 1)
    go_on.set()
    assert (await clients[0].answer()).status == (await clients[2].answer()).status == 200
    assert (await stage.get()).status == 200


async def test_idle_connections_to_a_worker_are_bounded_and_expire(staging):
    stage = await staging(worker_idle_connections=3, pooled=0.2, linger=0.2)
    barrier = asyncio.Barrier(10)

    async def script(turn):
        await barrier.wait()
        await turn.answer()

    stage.worker.script = script
    await asyncio.gather(*(stage.get() for _ in range(10)))
    await stage.worker.until(lambda: stage.worker.open <= 3)
    await stage.worker.until(lambda: stage.worker.open == 0)


async def test_a_forgotten_worker_is_left_alone(stage):
    client = await stage.client()
    await client.ask(GET)
    stage.relay.forget(stage.worker)
    await stage.worker.until(lambda: stage.worker.open == 0)
    stage.relay.forget(stage.worker)  # once more does no harm
    assert (await client.ask(GET)).status == 200


async def test_two_workers_never_share_a_connection(stage, staging):
    other = await staging()
    stage.gate.decide = lambda head, forward: forward._replace(
        upstream=other.worker if b"other" in head.target else stage.worker
    )
    other.worker.script = lambda turn: turn.answer(b"other")
    client = await stage.client()
    for _ in range(3):
        assert (await client.ask(b"GET /other HTTP/1.1\r\nHost: demo\r\n\r\n")).body == b"other"
        assert (await client.ask(GET)).body == b"ok"
    assert len(other.worker.turns) == len(stage.worker.turns) == 3


# the end


async def test_a_stopping_relay_finishes_what_is_under_way_and_closes_what_is_idle(stage):
    go_on = asyncio.Event()

    async def script(turn):
        await go_on.wait()
        await turn.answer()

    idle, busy = await stage.client(), await stage.client()
    await idle.ask(GET)
    stage.worker.script = script
    await busy.send(GET)
    await stage.worker.until(lambda: len(stage.worker.turns) == 2)
    closing = asyncio.create_task(stage.relay.close(10))
    assert await idle.rest() == b""
    go_on.set()
    answer = await busy.answer()
    assert (answer.status, answer.values("connection")) == (200, ["close"])
    assert await busy.rest() == b""
    await closing
    with pytest.raises(ConnectionRefusedError):
        await stage.client()


async def test_a_stopping_relay_does_not_wait_beyond_its_grace(stage):
    async def script(turn):
        await turn.reader.read()

    stage.worker.script = script
    client = await stage.client()
    await client.send(GET)
    await stage.worker.until(lambda: len(stage.worker.turns) == 1)
    await stage.relay.close(0.1)
    assert stage.relay.open_connections == 0


async def test_a_reply_of_the_gates_own_is_sent_as_it_is(stage):
    stage.gate.decide = lambda head, forward: Reply(401, ((b"WWW-Authenticate", b"Bearer"),), b"please log in")
    client = await stage.client()
    for _ in range(2):
        answer = await client.ask(GET)
        assert (answer.status, answer.body, answer.values("www-authenticate")) == (401, b"please log in", ["Bearer"])
        assert len(answer.values("date")) == 1
    answer = await client.ask(GET.replace(b"GET", b"HEAD"))
    assert answer.values("content-length") == ["13"]
    assert stage.worker.turns == []


async def test_a_reply_to_an_unfinished_upload_closes_after_it(stage):
    stage.gate.decide = lambda head, forward: Reply(403, (), b"no")
    client = await stage.client()
    await client.send(b"POST / HTTP/1.1\r\nHost: demo\r\nContent-Length: 10000000\r\n\r\n")
    sending = asyncio.create_task(client.send(bytes(1_000_000)))
    answer = await client.answer()
    assert (answer.status, answer.values("connection")) == (403, ["close"])
    assert await client.rest() == b""
    await asyncio.gather(sending, return_exceptions=True)
