"""A relay on a real TCP port, a scripted worker behind a real Unix socket, and raw clients."""

import asyncio
import contextlib
import ipaddress
import itertools
import socket
import struct
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass, field
from pathlib import Path

import pytest_asyncio
import uvloop

from blockyard_api.relay.gate import Crowded, Forward, Header, Overloaded, Reply, RequestHead, UpstreamError, Verdict
from blockyard_api.relay.server import Relay, RelayLimits

WITHIN = 20  # seconds; a hang is a failure, not a wait


def pytest_asyncio_loop_factories(config, item):
    return {"uvloop": uvloop.new_event_loop}


@dataclass
class Turn:
    """One request as the worker sees it."""

    reader: asyncio.StreamReader
    writer: asyncio.StreamWriter
    head: bytes
    number: int  # of the connection

    @property
    def fields(self) -> list[tuple[str, str]]:
        lines = self.head.decode("latin-1").split("\r\n")[1:-2]
        return [tuple(line.split(": ", 1)) for line in lines]

    def values(self, name: str) -> list[str]:
        return [value for key, value in self.fields if key.lower().replace("_", "-") == name.lower()]

    async def send(self, data: bytes) -> None:
        self.writer.write(data)
        await self.writer.drain()

    async def answer(self, body: bytes = b"ok", *fields: str) -> None:
        extra = "".join(f"{line}\r\n" for line in fields).encode()
        await self.send(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n%b\r\n%b" % (len(body), extra, body))

    async def body(self) -> bytes:
        """The whole request body, chunked bodies with their framing."""
        if lengths := self.values("content-length"):
            return await self.reader.readexactly(int(lengths[0]))
        if self.values("transfer-encoding"):
            return await self.reader.readuntil(b"0\r\n\r\n")
        return b""

    def close(self) -> None:
        self.writer.close()


@dataclass
class Worker:
    """Plays `script` for every request."""

    path: str
    script: Callable[[Turn], Awaitable[None]] = lambda turn: turn.answer()
    turns: list[Turn] = field(default_factory=list)
    connections: int = 0
    open: int = 0
    _changed: asyncio.Event = field(default_factory=asyncio.Event)
    _tasks: set[asyncio.Task] = field(default_factory=set)

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._tasks.add(asyncio.current_task())
        self.connections += 1
        self.open += 1
        number = self.connections
        try:
            with contextlib.suppress(asyncio.IncompleteReadError, ConnectionError):
                while not writer.is_closing():
                    turn = Turn(reader, writer, await reader.readuntil(b"\r\n\r\n"), number)
                    self.turns.append(turn)
                    self.tell()
                    await self.script(turn)
        except asyncio.CancelledError:
            pass  # the test is over; a streams server would log it
        finally:
            writer.close()
            self.open -= 1
            self.tell()
            self._tasks.discard(asyncio.current_task())

    def tell(self) -> None:
        self._changed.set()

    async def until(self, condition: Callable[[], bool]) -> None:
        async with asyncio.timeout(WITHIN):
            while not condition():
                self._changed.clear()
                await self._changed.wait()

    async def end(self) -> None:
        for task in list(self._tasks):
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    # Upstream

    async def connect(self) -> socket.socket:
        sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK)
        try:
            await asyncio.get_running_loop().sock_connect(sock, self.path)
        except OSError as error:
            sock.close()
            raise UpstreamError(str(error)) from error
        return sock


@dataclass
class Doorkeeper:
    """A gate that lets everything pass to one worker, unless told otherwise, and counts what it hears."""

    worker: Worker
    headers: tuple[Header, ...] = ()
    response_headers: tuple[Header, ...] = ()
    decide: Callable[[RequestHead, Forward], Verdict | Awaitable[Verdict]] = lambda head, forward: forward
    heads: list[RequestHead] = field(default_factory=list)
    failures: list[Exception] = field(default_factory=list)
    admitted: int = 0
    ended: int = 0
    messages: int = 0
    close_websocket: Callable[[], None] | None = None

    def admit(self, head: RequestHead) -> Verdict | Awaitable[Verdict]:
        self.heads.append(head)
        self.worker.tell()
        forward = Forward(self.worker, head.target, b"/app/demo", self.headers, self.response_headers, self)
        verdict = self.decide(head, forward)
        self.admitted += isinstance(verdict, Forward)
        return verdict

    def failed(self, head: RequestHead, forward: Forward, error: Exception) -> Reply:
        self.failures.append(error)
        if isinstance(error, Crowded | Overloaded):
            status = 429 if isinstance(error, Crowded) else 503
            return Reply(status, ((b"Retry-After", b"%d" % error.retry_after),), b"later")
        return Reply(502, ((b"Content-Type", b"text/plain"),), b"the worker failed")

    def request_ended(self) -> None:
        self.ended += 1
        self.worker.tell()

    def websocket_opened(self, close: Callable[[], None]) -> None:
        self.close_websocket = close

    def visitor_message(self) -> None:
        self.messages += 1
        self.worker.tell()


@dataclass
class Answer:
    status: int
    head: bytes
    body: bytes

    def values(self, name: str) -> list[str]:
        lines = [line.split(": ", 1) for line in self.head.decode("latin-1").split("\r\n")[1:-2]]
        return [value for key, value in lines if key.lower() == name.lower()]


class Client:
    """A raw connection to the relay."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.reader = reader
        self.writer = writer

    async def send(self, data: bytes) -> None:
        self.writer.write(data)
        await self.writer.drain()

    async def head(self) -> Answer:
        async with asyncio.timeout(WITHIN):
            head = await self.reader.readuntil(b"\r\n\r\n")
        return Answer(int(head[9:12]), head, b"")

    async def answer(self, *, to_head: bool = False) -> Answer:
        """The next response with its whole body, chunked ones decoded; delimited by length unless it says otherwise."""
        answer = await self.head()
        async with asyncio.timeout(WITHIN):
            if to_head or answer.status < 200 or answer.status in (204, 304):
                return answer
            if lengths := answer.values("content-length"):
                answer.body = await self.reader.readexactly(int(lengths[0]))
            elif answer.values("transfer-encoding") == ["chunked"]:
                while size := int(await self.reader.readline(), 16):
                    answer.body += await self.reader.readexactly(size)
                    assert await self.reader.readexactly(2) == b"\r\n"
                assert await self.reader.readexactly(2) == b"\r\n"
            else:
                answer.body = await self.reader.read()
        return answer

    async def ask(self, data: bytes) -> Answer:
        await self.send(data)
        return await self.answer(to_head=data.startswith(b"HEAD"))

    async def rest(self) -> bytes:
        """Everything up to the end of the connection."""
        async with asyncio.timeout(WITHIN):
            return await self.reader.read()

    def reset(self) -> None:
        """Go away at once, with a reset."""
        sock = self.writer.get_extra_info("socket")
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.writer.transport.abort()


@dataclass
class Stage:
    worker: Worker
    gate: Doorkeeper
    relay: Relay
    port: int
    clients: list[Client] = field(default_factory=list)

    async def client(self, address: str = "127.0.0.1") -> Client:
        there = {"local_addr": (address, 0), "limit": 1 << 20}
        client = Client(*await asyncio.open_connection("127.0.0.1", self.port, **there))
        self.clients.append(client)
        return client

    async def ask(self, data: bytes) -> Answer:
        return await (await self.client()).ask(data)

    async def get(self, *fields: str, target: str = "/") -> Answer:
        lines = "".join(f"{line}\r\n" for line in fields)
        return await self.ask(f"GET {target} HTTP/1.1\r\nHost: demo\r\n{lines}\r\n".encode("latin-1"))


Staging = Callable[..., Awaitable[Stage]]


@pytest_asyncio.fixture
async def staging(tmp_path: Path) -> AsyncIterator[Staging]:
    """Build stages with relays of any limits; afterwards nothing of them may be left."""
    numbers = itertools.count()
    async with contextlib.AsyncExitStack() as stack:

        async def build(trusted: str | None = None, scheme: str = "http", **limits: float) -> Stage:
            worker = Worker(str(tmp_path / f"{next(numbers)}.sock"))
            server = await asyncio.start_unix_server(worker.serve, worker.path, limit=1 << 20)
            gate = Doorkeeper(worker)
            proxies = (ipaddress.ip_network(trusted),) if trusted else ()
            relay = Relay(gate, trusted_proxies=proxies, public_scheme=scheme, limits=RelayLimits(**limits))
            sock = socket.create_server(("127.0.0.1", 0))
            sock.setblocking(False)
            await relay.listen(sock)
            stage = Stage(worker, gate, relay, sock.getsockname()[1])

            async def leave() -> None:
                pools = [pool for _, pool in relay._pools.values()]
                for client in stage.clients:
                    client.writer.close()
                async with asyncio.timeout(WITHIN):
                    await relay.close(0.2)
                server.close()
                await worker.end()
                assert relay.open_connections == 0
                assert gate.ended == gate.admitted, "every admitted request ends exactly once"
                for pool in pools:
                    left = [(share.taken, share.websockets, len(share.line)) for share in pool.shares.values()]
                    assert not pool.in_use(), f"places, WebSockets and waiting requests that nobody gave back: {left}"
                    assert (pool._taken, pool._waiting, len(pool._turns)) == (0, 0, 0)

            stack.push_async_callback(leave)
            return stage

        yield build


@pytest_asyncio.fixture
async def stage(staging: Staging) -> Stage:
    return await staging()
