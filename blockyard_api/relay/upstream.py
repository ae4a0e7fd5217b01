"""The worker's side of an exchange: connections to one worker, pooled, and the strict reading of its responses."""

import asyncio
import contextlib
import socket
from typing import Final, Protocol, cast

from blockyard_api.relay.body import BadBody, ChunkedDecoder
from blockyard_api.relay.gate import Upstream, UpstreamError
from blockyard_api.relay.head import END, MAX_HEAD, BadHead, Response, parse_response
from blockyard_api.relay.places import Bounds, Places, Share
from blockyard_api.relay.splice import FROM, Splice, Unsupported

_MAX_INTERIM: Final = 16
_LAST_WORDS: Final = 16  # reads; what waits for us is a socket's buffer, and who writes on is not waited for
_DIAL_WITHIN: Final = 10.0  # seconds; a Unix socket connects at once unless its backlog is full

COPIED: Final = 8192  # bytes; more are handed on where they are, which is dearer for fewer
Piece = bytes | memoryview

_HEAD, _LENGTH, _CHUNKED, _UNTIL_CLOSE = range(4)


class HungUp(UpstreamError):
    """The worker closed the connection before it sent a response head."""


class BadResponse(UpstreamError):
    """The worker's response violates HTTP."""


class TooSlow(UpstreamError):
    """The worker took longer than it may."""


class Exchange(Protocol):
    """What a connection to a worker tells the visitor's side, in this order; nothing follows `ended` or `lost`."""

    wants_body: bool  # False for HEAD
    websocket: bool

    def interim(self, response: Response) -> None:
        """A 1xx other than 101 came."""

    def upgraded(self, response: Response, rest: bytes) -> None:
        """The worker switched to WebSocket; `rest` are its first bytes."""

    def responded(self, response: Response, body: Piece, *, has_body: bool, ended: bool) -> None:
        """The final head came, with the first bytes of the body, all of it if `ended`."""

    def body(self, pieces: list[bytes]) -> None:
        """More of the body came."""

    def sink(self) -> asyncio.Transport | None:
        """Return where the rest of a body of known length can go without this process; None if the visitor left."""

    def ended(self) -> None:
        """The body is complete."""

    def lost(self, error: UpstreamError, *, untouched: bool) -> None:
        """It went wrong; `untouched` if a pooled connection closed before it sent a byte."""

    def worker_blocked(self, *, blocked: bool) -> None:
        """The worker does not take the request's body at the moment, or does so again."""


class WorkerConnection(asyncio.Protocol):
    """One connection to a worker: at most one exchange at a time."""

    __slots__ = (
        "_decoder",
        "_exchange",
        "_held",
        "_interim",
        "_keep",
        "_left",
        "_mode",
        "_pool",
        "_share",
        "_sock",
        "age",
        "splice",
        "transport",
        "used",
    )

    transport: asyncio.Transport
    _share: Share  # of whose places one belongs to the exchange

    def __init__(self, pool: "Pool", sock: socket.socket) -> None:
        self._pool = pool
        self._sock = sock
        self._exchange: Exchange | None = None
        self._mode = _HEAD
        self._held = b""
        self._left = 0
        self._interim = 0
        self._keep = True
        self._decoder: ChunkedDecoder | None = None
        self.splice: Splice | None = None  # the rest of the body, if nobody here reads it
        self.used = False  # for an earlier exchange
        self.age = 0  # ticks in the pool

    def begin(self, exchange: Exchange, share: Share, head: bytes) -> None:
        """Send a request's head; its body, if any, goes straight to `transport`. Its place is given back from here."""
        self._exchange = exchange
        self._share = share
        self._mode = _HEAD
        self._interim = 0
        self.transport.write(head)

    def release(self, *, reusable: bool) -> None:
        """End the exchange after its response; `reusable` if the request was sent whole."""
        self._exchange = None
        self.used = True
        # what it has not taken yet of this request would keep the next one waiting
        if reusable and self._keep and not self.transport.get_write_buffer_size():
            self._pool.put(self, self._share)
        else:
            self.transport.abort()
            self._pool.give(self._share)

    def abandon(self) -> None:
        """Break off: the visitor went away, or nothing that comes can be of use."""
        self._exchange = None
        self._stop_splice()
        self.transport.abort()
        self._pool.give(self._share)

    def hold_back(self) -> None:
        """Read no more for now: the visitor does not take what there is."""
        if self.splice is None and not self.transport.is_closing():
            self.transport.pause_reading()

    def go_on(self) -> None:
        """Read on."""
        if self.splice is None and not self.transport.is_closing():
            self.transport.resume_reading()

    def detach(self) -> asyncio.Transport:
        """Give up the transport, which becomes one end of a tunnel."""
        self._exchange = None
        self._pool.give(self._share)
        return self.transport

    # asyncio.Protocol

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Keep the transport."""
        self.transport = cast("asyncio.Transport", transport)

    def data_received(self, data: bytes) -> None:
        """Read the response on."""
        exchange = self._exchange
        if exchange is None:
            self.transport.abort()  # nobody asked: a connection that talks while idle is not trusted further
        elif self._mode == _HEAD:
            self._read_head(exchange, self._held + data if self._held else data)
        elif self._mode == _LENGTH:
            self._read_length(exchange, data)
        elif self._mode == _UNTIL_CLOSE:
            exchange.body([data])
        else:
            self._read_chunks(exchange, data)

    def pause_writing(self) -> None:
        """Hold the visitor's upload back."""
        if self._exchange is not None:
            self._exchange.worker_blocked(blocked=True)

    def resume_writing(self) -> None:
        """Let the upload go on."""
        if self._exchange is not None:
            self._exchange.worker_blocked(blocked=False)

    def connection_lost(self, error: Exception | None) -> None:
        """Tell a good end from a bad one."""
        if error is not None and self._exchange is not None and self._mode == _HEAD:
            self._read_last_words()
        self._stop_splice()
        exchange, self._exchange = self._exchange, None
        if exchange is None:
            self._pool.discard(self)
        elif self._mode == _UNTIL_CLOSE and error is None:
            exchange.ended()  # gives the place back, by `release`
        else:
            self._pool.give(self._share)
            untouched = self.used and self._mode == _HEAD and not self._held and not self._interim
            exchange.lost(HungUp("the worker closed the connection too early"), untouched=untouched)

    def _read_last_words(self) -> None:
        # a worker that refuses an upload answers and closes: our write fails while its answer is still unread
        with contextlib.suppress(OSError):
            for _ in range(_LAST_WORDS):
                if self._exchange is None or not (data := self._sock.recv(MAX_HEAD)):
                    break
                self.data_received(data)

    # reading

    def _read_head(self, exchange: Exchange, data: bytes) -> None:
        begin = 0
        while True:
            end = data.find(END, begin, begin + MAX_HEAD)
            if end < 0:
                self._held = data[begin:]
                if len(self._held) >= MAX_HEAD:
                    self._refuse(exchange, "the worker's response head is too large")
                return
            try:
                response = parse_response(data[begin : end + 4])
            except BadHead as bad:
                self._refuse(exchange, bad.why)
                return
            begin = end + 4
            if response.status >= 200:
                break
            if response.status == 101:
                self._upgrade(exchange, response, data[begin:])
                return
            self._interim += 1
            if self._interim > _MAX_INTERIM:
                self._refuse(exchange, "the worker sends interim responses without end")
                return
            exchange.interim(response)
        self._held = b""
        self._begin_body(exchange, response, data[begin:] if len(data) < COPIED else memoryview(data)[begin:])

    def _upgrade(self, exchange: Exchange, response: Response, rest: bytes) -> None:
        if self.transport.is_closing():  # these are its last words: there is nobody to be connected with
            self._refuse(exchange, "the worker closed the connection too early")
        elif exchange.websocket and response.upgrade == b"websocket":
            exchange.upgraded(response, rest)
        else:
            self._refuse(exchange, "the worker switched protocols unasked")

    def _begin_body(self, exchange: Exchange, response: Response, data: Piece) -> None:
        has_body = exchange.wants_body and response.status not in (204, 304)
        self._keep = response.keep_alive
        if not has_body or response.length is not None:
            length = response.length if has_body and response.length is not None else 0
            self._left = length - len(data)
            self._mode = _LENGTH
            if self._left < 0:
                self._refuse(exchange, "the worker sent more than it announced")
            else:
                exchange.responded(response, data, has_body=has_body, ended=not self._left)
                if self._left >= FROM and self._exchange is exchange:
                    self._begin_splice(exchange)
        elif response.chunked:
            self._mode = _CHUNKED
            self._decoder = ChunkedDecoder()
            exchange.responded(response, b"", has_body=True, ended=False)
            if data:
                self._read_chunks(exchange, bytes(data))
        else:
            self._keep = False
            self._mode = _UNTIL_CLOSE
            exchange.responded(response, data, has_body=True, ended=False)

    def _read_length(self, exchange: Exchange, data: bytes) -> None:
        self._left -= len(data)
        if self._left < 0:
            self._keep = False
            data = data[: self._left]
        exchange.body([data])
        if self._left <= 0 and self._exchange is exchange:
            exchange.ended()

    def _read_chunks(self, exchange: Exchange, data: bytes) -> None:
        decoder = cast("ChunkedDecoder", self._decoder)
        try:
            pieces, rest = decoder.feed(data)
        except BadBody as bad:
            self._refuse(exchange, str(bad))
            return
        if pieces:
            exchange.body(pieces)
        if decoder.done and self._exchange is exchange:
            self._keep = self._keep and not rest
            exchange.ended()

    def _begin_splice(self, exchange: Exchange) -> None:
        sink = exchange.sink()
        if sink is None:
            return
        with contextlib.suppress(OSError):  # out of descriptors: it is copied, then
            splice = Splice(self._sock.fileno(), sink, self._left, self._splice_ended)
            self.hold_back()
            self.splice = splice

    def _splice_ended(self, error: Exception | None) -> None:
        exchange, self.splice = cast("Exchange", self._exchange), None
        if error is None:
            self._keep = False  # nobody looked at what may have come after the body
            exchange.ended()
        elif isinstance(error, Unsupported):
            self.go_on()
        else:
            self.abandon()
            exchange.lost(HungUp(str(error)), untouched=False)

    def _stop_splice(self) -> None:
        if self.splice is not None:
            self.splice.close()
            self.splice = None

    def _refuse(self, exchange: Exchange, why: str) -> None:
        self.abandon()
        exchange.lost(BadResponse(why), untouched=False)


class Pool(Places):
    """The connections to one worker: one for each place that is taken, and idle ones kept for reuse."""

    def __init__(self, upstream: Upstream, bounds: Bounds, *, idle: int) -> None:
        super().__init__(bounds)
        self._upstream = upstream
        self._most_idle = idle
        self._idle: list[WorkerConnection] = []
        self._forgotten = False

    def take(self, share: Share) -> WorkerConnection | None:
        """Return an idle connection, and take a place, if there are both: `enter` and `idle` at once, for speed."""
        while self._idle and (
            self._taken < self._first or (share.taken < self._most_each and self._taken < self._most)
        ):
            connection = self._idle.pop()
            if not connection.transport.is_closing():
                self._taken += 1
                share.taken += 1
                return connection
        return None

    def idle(self) -> WorkerConnection | None:
        """Return an idle connection, for one who has a place."""
        while self._idle:
            connection = self._idle.pop()
            if not connection.transport.is_closing():
                return connection
        return None

    async def dial(self) -> WorkerConnection:
        """Return a new connection, for one who has a place. Raises UpstreamError."""
        try:
            async with asyncio.timeout(_DIAL_WITHIN):
                sock = await self._upstream.connect()
                return await self._adopt(sock)
        except TimeoutError as error:
            raise TooSlow("the worker does not accept connections") from error

    async def _adopt(self, sock: socket.socket) -> WorkerConnection:
        loop = asyncio.get_running_loop()
        try:
            _, connection = await loop.create_unix_connection(lambda: WorkerConnection(self, sock), sock=sock)
        except BaseException:
            sock.close()
            raise
        return connection

    def put(self, connection: WorkerConnection, share: Share) -> None:
        """Take a connection back after its exchange, and its place."""
        if self._forgotten or len(self._idle) >= self._most_idle:
            connection.transport.abort()
        else:
            connection.age = 0
            self._idle.append(connection)
        share.taken -= 1  # as `give` does
        self._taken -= 1
        if self._turns:
            self._seat()

    def discard(self, connection: WorkerConnection) -> None:
        """Drop a connection that closed while idle."""
        with contextlib.suppress(ValueError):
            self._idle.remove(connection)

    def expire(self, ticks: int) -> bool:
        """Close what has been idle for `ticks` calls; return whether nothing is left of the pool."""
        for connection in self._idle:
            connection.age += 1
        for connection in [connection for connection in self._idle if connection.age > ticks]:
            self._idle.remove(connection)
            connection.transport.abort()
        return not self.in_use() and not self._idle

    def close(self) -> None:
        """Close what is idle now, and what is busy when its exchange ends."""
        self._forgotten = True
        for connection in self._idle:
            connection.transport.abort()
        self._idle.clear()
