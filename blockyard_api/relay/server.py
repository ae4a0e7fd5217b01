"""The relay as a whole: its listeners, limits and clock, who is connected, and the pool of each worker."""

import asyncio
import contextlib
import logging
import math
import socket
from collections import Counter
from dataclasses import dataclass

from blockyard_api.relay.connection import ClientConnection, Patience
from blockyard_api.relay.gate import Gate, Reply, Upstream
from blockyard_api.relay.head import refusal
from blockyard_api.relay.origin import Network, Origin, is_within, neighbourhood
from blockyard_api.relay.places import Bounds
from blockyard_api.relay.upstream import Pool

_ABORTED_WITHIN = 2.0  # seconds until connections that were broken off are given up: a stop is not to wait for a fault
_REFUSED = 128  # connections that may read why they were refused, at the same time

_logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class RelayLimits:
    """Bounds of the relay. Durations are seconds of silence, not totals, but for `head`, `linger` and a line's wait."""

    connections: int = 10_000
    connections_per_address: int = 1_000  # a whole office may sit behind one address
    worker_connections: int = 128  # requests under way at one worker; WebSockets do not count
    worker_connections_per_address: int = 16  # once half are taken; R takes one at a time: more serve nobody sooner
    worker_idle_connections: int = 64
    worker_queue: int = 1_024
    worker_queue_per_address: int = 256  # a browser behind an HTTP/2 proxy asks for all parts of a page at once
    worker_websockets_per_address: int = 256  # a lecture hall that shares one R process
    head: float = 30.0  # from a head's first byte to its last
    idle: float = 75.0  # between requests
    upload: float = 60.0  # within which a few KB must come
    worker: float = 600.0  # R is single-threaded: an answer may wait for another visitor's computation, as may a place
    stall: float = 120.0  # a visitor takes nothing of what waits for him
    linger: float = 10.0  # from the last word to the end of the connection
    pooled: float = 15.0  # an idle connection to a worker


class Relay:
    """Takes visitors' connections and relays what the gate admits."""

    def __init__(
        self,
        gate: Gate,
        *,
        trusted_proxies: tuple[Network, ...] = (),
        public_scheme: str = "http",
        limits: RelayLimits | None = None,
    ) -> None:
        self.gate = gate
        self.closing = False
        self._limits = limits or RelayLimits()
        self._bounds = Bounds(
            places=self._limits.worker_connections,
            places_each=self._limits.worker_connections_per_address,
            waiting=self._limits.worker_queue,
            waiting_each=self._limits.worker_queue_per_address,
            websockets_each=self._limits.worker_websockets_per_address,
        )
        self._trusted = trusted_proxies
        self._secure = public_scheme == "https"
        durations = {name: float(getattr(self._limits, name)) for name in Patience.__dataclass_fields__}
        self._tick = min(1.0, *(seconds / 4 for seconds in durations.values()))
        self.patience = Patience(**{name: self._ticks(seconds) for name, seconds in durations.items()})
        self._connections: set[ClientConnection] = set()
        self._refused: set[ClientConnection] = set()  # of these, those that only read why
        self._addresses: Counter[str] = Counter()  # by neighbourhood
        self._pools: dict[int, tuple[Upstream, Pool]] = {}
        self._servers: list[asyncio.Server] = []
        self._clock: asyncio.TimerHandle | None = None
        self._empty = asyncio.Event()

    def _ticks(self, seconds: float) -> int:
        return max(1, math.ceil(seconds / self._tick))

    @property
    def open_connections(self) -> int:
        """Visitors' connections, WebSockets included."""
        return len(self._connections)

    @property
    def open_websockets(self) -> int:
        """Visitors' WebSockets."""
        return sum(connection.tunnelled for connection in self._connections)

    def protocol(self) -> ClientConnection:
        """Return the protocol of a new connection (a factory for `loop.create_server`)."""
        return ClientConnection(self)

    async def listen(self, sock: socket.socket) -> None:
        """Serve on a listening socket until `close`."""
        loop = asyncio.get_running_loop()
        self._servers.append(await loop.create_server(self.protocol, sock=sock, backlog=1024))

    def forget(self, upstream: Upstream) -> None:
        """Close the connections to a worker that has ended or is to get no more requests."""
        entry = self._pools.pop(id(upstream), None)
        if entry is not None:
            entry[1].close()

    async def close(self, grace: float) -> None:
        """Stop accepting, tell WebSockets to go away, finish what is under way for `grace` seconds at most."""
        self.closing = True
        for server in self._servers:
            server.close()
        self._servers.clear()
        for connection in list(self._connections):
            connection.shut_down()
        await self._until_empty(grace)
        for connection in list(self._connections):
            connection.abort()
        await self._until_empty(_ABORTED_WITHIN)
        if self._connections:
            _logger.error("%d connections do not end", len(self._connections))
        for _, pool in self._pools.values():
            pool.close()
        self._pools.clear()
        if self._clock is not None:
            self._clock.cancel()
            self._clock = None

    async def _until_empty(self, within: float) -> None:
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(within):
                while self._connections:
                    self._empty.clear()
                    await self._empty.wait()

    # what connections ask

    def arrived(self, connection: ClientConnection, address: str) -> Reply | None:
        """Count a new connection in; returns the refusal if there are too many."""
        among = len(self._connections) - len(self._refused)
        near = neighbourhood(address)
        refused = self._refusal(address, among + 1, self._addresses[near] + 1)
        self._connections.add(connection)
        self._addresses[near] += 1
        if refused is not None:
            self._refused.add(connection)
        if self._clock is None:
            self._clock = asyncio.get_running_loop().call_later(self._tick, self._on_tick)
        return refused

    def _refusal(self, address: str, among: int, of_its_address: int) -> Reply | None:
        if self.closing:
            return refusal(503, "The server is stopping.", (b"Retry-After", b"5"))
        if among > self._limits.connections:
            return refusal(503, "Too many connections are open.", (b"Retry-After", b"10"))
        if of_its_address > self._limits.connections_per_address and not is_within(address, self._trusted):
            return refusal(429, "Too many connections from one address.", (b"Retry-After", b"10"))
        return None

    @property
    def overrun(self) -> bool:
        """Whether so many are refused that they are not given the time to read why."""
        return len(self._refused) > _REFUSED

    def left(self, connection: ClientConnection, address: str) -> None:
        """Count a connection out."""
        self._connections.discard(connection)
        self._refused.discard(connection)
        near = neighbourhood(address)
        self._addresses[near] -= 1
        if not self._addresses[near]:
            del self._addresses[near]
        if not self._connections:
            self._empty.set()

    def pool(self, upstream: Upstream) -> Pool:
        """Return the pool of a worker."""
        entry = self._pools.get(id(upstream))
        if entry is None:
            pool = Pool(upstream, self._bounds, idle=self._limits.worker_idle_connections)
            # the upstream is kept beside its pool so that its id stays its own
            entry = self._pools[id(upstream)] = (upstream, pool)
        return entry[1]

    def origin(self, peer: str) -> Origin:
        """Return what tells whose the requests of a connection are."""
        return Origin(peer, self._trusted, secure=self._secure)

    def _on_tick(self) -> None:
        for connection in list(self._connections):
            connection.tick()
        pooled = self._ticks(self._limits.pooled)
        for key, (_, pool) in list(self._pools.items()):
            if pool.expire(pooled):  # of nobody: who is at this worker, on a WebSocket too, has a share that counts
                del self._pools[key]
        self._clock = None
        if self._connections or self._pools:
            self._clock = asyncio.get_running_loop().call_later(self._tick, self._on_tick)
