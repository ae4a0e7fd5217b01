"""What one address may have of one worker: it never takes all of it, and it loses nothing that it only waits for."""

import asyncio
import contextlib
import random

import pytest
from test_relay_crowds import GET, SWITCH, UPGRADE, gone, upgrade_or_answer

from blockyard_api.relay.gate import Crowded, UpstreamError

ELSEWHERE = "127.0.0.9"
HELD = {
    "answers that nobody reads": b"GET /hold HTTP/1.1\r\nHost: demo\r\n\r\n",
    "bodies that do not come": b"POST /hold HTTP/1.1\r\nHost: demo\r\nContent-Length: 100000\r\n\r\nx",
    "handshakes that are not answered": UPGRADE.replace(b"GET /", b"GET /hold"),
}


class Holding:
    """A worker that answers when it may, what is asked of it below /hold; counts how much of that there is at once."""

    def __init__(self):
        self.may = asyncio.Event()
        self.at_once = self.most = 0
        self.seen = []

    async def __call__(self, turn):
        self.seen.append(turn.head.split()[1].decode())
        if b" /hold" in turn.head:
            self.at_once += 1
            self.most = max(self.most, self.at_once)
            turn_over = asyncio.create_task(self.may.wait())
            left = asyncio.create_task(turn.reader.read())  # the relay's end, or the rest of a body
            await asyncio.wait([turn_over, left], return_when=asyncio.FIRST_COMPLETED)
            for task in (turn_over, left):
                task.cancel()
            await asyncio.gather(turn_over, left, return_exceptions=True)
            self.at_once -= 1
            if not self.may.is_set():
                turn.close()
                return
        await turn.answer(b"served")


async def hold(stage, number, *, sent=HELD["answers that nobody reads"], address="127.0.0.1"):
    clients = [await stage.client(address) for _ in range(number)]
    for client in clients:
        await client.send(sent)
    return clients


@pytest.mark.parametrize("sent", HELD.values(), ids=HELD)
async def test_an_address_that_takes_all_it_can_get_leaves_places_to_others(stage, sent):
    stage.worker.script = holding = Holding()
    await hold(stage, 140, sent=sent)
    await stage.worker.until(lambda: len(stage.worker.turns) == 64)
    assert (await (await stage.client(ELSEWHERE)).ask(GET)).body == b"served"
    assert holding.most == 64


async def test_what_an_address_asks_beyond_its_share_is_answered_later(staging):
    stage = await staging(worker_connections=8, worker_connections_per_address=2)
    stage.worker.script = holding = Holding()
    clients = await hold(stage, 20)
    await stage.worker.until(lambda: holding.at_once == 4)
    holding.may.set()
    assert [(await client.answer()).body for client in clients] == [b"served"] * 20
    assert holding.most == 4


async def test_of_the_second_half_of_the_places_each_address_has_its_share(staging):
    stage = await staging(worker_connections=8, worker_connections_per_address=2)
    stage.worker.script = holding = Holding()
    for number, there in [(1, 4), (2, 6), (3, 8), (4, 8)]:
        await hold(stage, 5, address=f"127.0.0.{number}")
        await stage.worker.until(lambda there=there: holding.at_once == there)
    assert holding.most == 8


async def test_whoever_comes_after_a_crowd_is_the_next(staging):
    stage = await staging(worker_connections=1, worker_connections_per_address=1)
    stage.worker.script = holding = Holding()
    await hold(stage, 10)
    await stage.worker.until(lambda: len(stage.gate.heads) == 10)
    other = await stage.client(ELSEWHERE)
    await other.send(GET.replace(b"GET /", b"GET /other"))
    await stage.worker.until(lambda: len(stage.gate.heads) == 11)
    holding.may.set()
    assert (await other.answer()).body == b"served"
    assert holding.seen.index("/other") <= 2  # the one that was there, and at most one of those who waited


async def test_an_address_whose_line_is_too_long_is_told_and_others_are_served(staging):
    stage = await staging(worker_connections=2, worker_connections_per_address=1, worker_queue_per_address=2)
    stage.worker.script = holding = Holding()
    waiting = await hold(stage, 3)
    await stage.worker.until(lambda: len(stage.gate.heads) == 3)
    answer = await stage.get()
    assert answer.status == 429
    assert answer.values("Retry-After")
    assert isinstance(stage.gate.failures[0], Crowded)
    assert (await (await stage.client(ELSEWHERE)).ask(GET)).body == b"served"
    holding.may.set()
    for client in waiting:
        assert (await client.answer()).body == b"served"


async def test_an_address_with_all_its_websockets_at_a_worker_is_told_and_others_open_theirs(staging):
    stage = await staging(worker_websockets_per_address=2)
    stage.worker.script = upgrade_or_answer
    for _ in range(2):
        assert (await (await stage.client()).ask(UPGRADE)).status == 101
    refused = await (await stage.client()).ask(UPGRADE)
    assert refused.status == 429
    assert refused.values("Retry-After")
    assert (await stage.get()).body == b"served"
    assert (await (await stage.client(ELSEWHERE)).ask(UPGRADE)).status == 101
    stage.clients[0].reset()
    await gone(stage, left=4)
    assert (await (await stage.client()).ask(UPGRADE)).status == 101


async def test_handshakes_under_way_count_as_websockets(staging):
    stage = await staging(worker_websockets_per_address=2)
    stage.worker.script = holding = Holding()
    await hold(stage, 2, sent=HELD["handshakes that are not answered"])
    await stage.worker.until(lambda: holding.at_once == 2)
    assert (await (await stage.client()).ask(UPGRADE)).status == 429
    holding.may.set()  # they are refused, and so over
    for client in stage.clients[:2]:
        assert (await client.answer()).status == 200
    stage.worker.script = upgrade_or_answer
    assert (await (await stage.client()).ask(UPGRADE)).status == 101


async def test_websockets_count_for_as_long_as_they_are_open_however_idle_the_worker_is(staging):
    stage = await staging(worker_websockets_per_address=1, pooled=0.1)
    stage.worker.script = upgrade_or_answer
    assert (await (await stage.client()).ask(UPGRADE)).status == 101
    await asyncio.sleep(0.5)  # many times what an idle connection is kept
    assert (await (await stage.client()).ask(UPGRADE)).status == 429


@pytest.mark.parametrize(
    ("first", "second", "third"),
    [("192.0.2.1", "192.0.2.1", "192.0.2.2"), ("2001:db8:1:2::1", "2001:db8:1:2:ffff::9", "2001:db8:1:3::1")],
)
async def test_behind_a_proxy_each_visitor_has_a_share_and_an_ipv6_network_is_one_visitor(
    staging, first, second, third
):
    one_each = {"worker_connections": 2, "worker_connections_per_address": 1, "worker_queue_per_address": 0}
    stage = await staging(trusted="127.0.0.1/32", **one_each)
    stage.worker.script = holding = Holding()

    async def ask(visitor, target):
        client = await stage.client()
        await client.send(f"GET {target} HTTP/1.1\r\nHost: demo\r\nX-Forwarded-For: {visitor}\r\n\r\n".encode())
        return client

    held = await ask(first, "/hold")
    await stage.worker.until(lambda: holding.at_once == 1)
    assert (await (await ask(second, "/")).answer()).status == 429
    assert (await (await ask(third, "/")).answer()).body == b"served"
    holding.may.set()
    assert (await held.answer()).body == b"served"


# --- anything at once ------------------------------------------------------------------------------------------------

OK = b"HTTP/1.1 200 OK\r\n"
ANSWERS = [
    b"",
    OK + b"Content-Length: 2\r\n\r\nok",
    OK + b"Content-Length: 2\r\n\r\nok and more",
    OK + b"Content-Length: 600000\r\n\r\n" + bytes(600000),
    OK + b"Content-Length: 600000\r\n\r\n" + bytes(300000),
    OK + b"Transfer-Encoding: chunked\r\n\r\n5\r\nhello\r\n0\r\n\r\n",
    OK + b"Transfer-Encoding: chunked\r\n\r\n5\r\nhello\r\n",
    OK + b"\r\nuntil the end",
    b"HTTP/1.1 103 Early Hints\r\n\r\nHTTP/1.1 204 No Content\r\n\r\n",
    b"nonsense\r\n\r\n",
    SWITCH,
    SWITCH + b"\x82\x7e\x40\x00" + bytes(16384),
]
POST = b"POST / HTTP/1.1\r\nHost: demo\r\n"
REQUESTS = [
    GET,
    GET * 6,
    GET.replace(b"GET", b"HEAD"),
    GET.replace(b"1.1", b"1.0"),
    UPGRADE,
    UPGRADE + b"\x81\x82abcdxx",
    POST + b"Content-Length: 300000\r\n\r\n" + bytes(300000),
    POST + b"Content-Length: 300000\r\n\r\n" + bytes(150000),
    POST + b"Transfer-Encoding: chunked\r\n\r\n3\r\nabc\r\n0\r\n\r\n",
    POST + b"Transfer-Encoding: chunked\r\n\r\n3\r\nabc\r\n",
    POST + b"Transfer-Encoding: chunked\r\n\r\n3\r\nabc\r\nnonsense",
]


async def whatever(chance, stage):
    """Visit once, in one of all the ways."""
    client = await stage.client(f"127.0.0.{chance.randrange(1, 5)}")
    for _ in range(chance.randrange(1, 4)):
        if client.writer.is_closing():
            return
        with contextlib.suppress(ConnectionError, TimeoutError):
            client.writer.write(chance.choice(REQUESTS))
            async with asyncio.timeout(chance.choice([0, 0.05, 0.3])):
                await client.reader.read(chance.choice([10, 1000, 1 << 20]))
        await asyncio.sleep(chance.choice([0, 0.05]))
    if chance.random() < 0.3 and not client.writer.is_closing():
        client.writer.write_eof()
        await asyncio.sleep(chance.choice([0.02, 0.3]))
    if not client.writer.is_closing():
        chance.choice([client.reset, client.writer.close])()


@pytest.mark.parametrize("seed", range(4))
async def test_whatever_visitors_and_worker_do_everything_is_given_back(staging, seed):
    chance = random.Random(seed)
    stage = await staging(
        worker_connections=6,
        worker_connections_per_address=3,
        worker_idle_connections=3,
        worker_queue=12,
        worker_queue_per_address=6,
        worker_websockets_per_address=4,
        head=1,
        idle=1,
        upload=0.4,
        worker=0.4,
        stall=0.4,
        linger=0.4,
        pooled=0.4,
    )
    connect = stage.worker.connect

    async def script(turn):
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(chance.choice([0, 0.05, 0.5])):
                await turn.body()
        await asyncio.sleep(chance.choice([0, 0, 0.05]))
        await turn.send(chance.choice(ANSWERS))
        chance.choice([turn.close, turn.writer.transport.abort, lambda: None, lambda: None])()

    async def connects():
        await asyncio.sleep(chance.choice([0, 0, 0.05]))
        if chance.random() < 0.1:
            raise UpstreamError("no")
        return await connect()

    def decide(_head, forward):
        async def later():
            await asyncio.sleep(0.02)
            stage.gate.admitted += 1
            return forward

        return chance.choice([lambda: forward, later])()

    stage.worker.script, stage.worker.connect, stage.gate.decide = script, connects, decide
    for _ in range(6):
        await asyncio.gather(*(whatever(chance, stage) for _ in range(25)))
    await gone(stage)
    stage.worker.connect, stage.gate.decide = connect, lambda _head, forward: forward
    stage.worker.script = holding = Holding()
    for number in range(1, 4):  # as many as ever may be under way, and the fixture looks for what is left of them
        await hold(stage, 5, address=f"127.0.0.{number}")
    await stage.worker.until(lambda: holding.at_once == 6)
    await asyncio.sleep(0.1)
    assert holding.most == 6
    holding.may.set()
