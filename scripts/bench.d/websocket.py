"""Part: WebSocket messages through the relay beside nginx (and Go): CPU per message, round trip, idle memory."""

import asyncio
import statistics
import sys
import time
from typing import cast

import uvloop
from _measure import HERE, Options, Row, cpu_seconds, listens, proxies, resident_bytes, running

TITLE = "WebSocket through the relay: CPU per echoed message, peer ÷ relay (1.00 = as cheap as the peer)"
REACH = {"nginx": 0.8, "go": 1.1}
SOCKETS = 200
IDLE = 500
ROUND_TRIPS = 2000
HANDSHAKE = (
    b"GET / HTTP/1.1\r\nHost: bench\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n"
    b"Sec-WebSocket-Version: 13\r\nSec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n\r\n"
)
MESSAGE = b"\x82" + bytes((128 | 64,)) + bytes(4) + b"x" * 64
ECHOED = len(MESSAGE) - 4

Address = tuple[str, int] | str


class Visitor(asyncio.Protocol):
    """Sends a message whenever the one before has come back."""

    def __init__(self) -> None:
        self.opened = asyncio.get_running_loop().create_future()
        self.echoed = 0
        self.sending = False
        self.came_back = asyncio.Event()
        self._waiting = 0

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Shake hands."""
        self.transport = cast("asyncio.Transport", transport)
        self.transport.write(HANDSHAKE)

    def data_received(self, data: bytes) -> None:
        """Count what came back whole, and go on."""
        if not self.opened.done():
            if data.startswith(b"HTTP/1.1 101"):
                self.opened.set_result(None)
            else:
                self.opened.set_exception(SystemExit(f"bench: the handshake was refused: {data!r}"))
            return
        self._waiting -= len(data)
        if not self._waiting:
            self.echoed += 1
            if self.sending:
                self.send()
            else:
                self.came_back.set()

    def send(self) -> None:
        """Send one message."""
        self._waiting = ECHOED
        self.transport.write(MESSAGE)


async def visit(address: Address) -> Visitor:
    """Open one WebSocket."""
    loop = asyncio.get_running_loop()
    if isinstance(address, str):
        _, visitor = await loop.create_unix_connection(Visitor, address)
    else:
        _, visitor = await loop.create_connection(Visitor, *address)
    await visitor.opened
    return visitor


async def echo(address: Address, seconds: float) -> int:
    """Keep `SOCKETS` WebSockets busy; returns how many messages came back."""
    visitors = [await visit(address) for _ in range(SOCKETS)]
    for visitor in visitors:
        visitor.sending = True
        visitor.send()
    await asyncio.sleep(seconds)
    for visitor in visitors:
        visitor.transport.abort()
    return sum(visitor.echoed for visitor in visitors)


async def round_trip(address: Address) -> float:
    """Return the median round trip of one WebSocket, in milliseconds."""
    visitor = await visit(address)
    times = []
    for _ in range(ROUND_TRIPS):
        visitor.came_back.clear()
        before = time.perf_counter()
        visitor.send()
        await visitor.came_back.wait()
        times.append(time.perf_counter() - before)
    visitor.transport.abort()
    return statistics.median(times) * 1000


async def idle_bytes(address: Address, pid: int) -> float:
    """Return what one more idle WebSocket adds to a process."""
    first = [await visit(address) for _ in range(50)]  # what is allocated once, is
    before = resident_bytes(pid)
    more = [await visit(address) for _ in range(IDLE)]
    added = (resident_bytes(pid) - before) / IDLE
    for visitor in first + more:
        visitor.transport.abort()
    return added


def run(options: Options) -> list[Row]:
    """Measure every proxy in every round."""
    backend = str(options.directory / "echo.sock")
    costs: dict[str, list[float]] = {}
    rates: dict[str, list[float]] = {}
    added: list[float] = []
    with (
        running([sys.executable, HERE / "_echo_server.py", backend], listens(backend)),
        proxies(options, backend) as peers,
    ):
        port, pid = peers["relay"]
        idle = uvloop.run(idle_bytes(("127.0.0.1", port), pid))
        for _ in range(options.rounds):
            for name, (port, pid) in peers.items():
                before = cpu_seconds(pid)
                echoed = uvloop.run(echo(("127.0.0.1", port), options.seconds))
                costs.setdefault(name, []).append((cpu_seconds(pid) - before) / echoed)
                rates.setdefault(name, []).append(echoed / options.seconds)
            through = uvloop.run(round_trip(("127.0.0.1", peers["relay"][0])))
            added.append(through - uvloop.run(round_trip(backend)))
    rows = []
    for peer in peers:
        cost, rate = statistics.median(costs[peer]) * 1e6, statistics.median(rates[peer])
        ratio = statistics.median(theirs / ours for theirs, ours in zip(costs[peer], costs["relay"], strict=True))
        what = f"{SOCKETS} sockets, {peer}: {cost:.1f} µs, {rate:,.0f}/s"
        rows.append(Row(what, "" if peer == "relay" else f"{ratio:.2f}", f"≥ {REACH[peer]}" if peer in REACH else ""))
    rows.append(Row("round trip through the relay minus direct, p50", f"{statistics.median(added):.3f} ms", "≤ 0.2 ms"))
    rows.append(Row("memory of an idle WebSocket", f"{idle / 1024:.1f} KB", "≤ 25 KB"))
    return rows
