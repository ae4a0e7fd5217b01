"""The worker's side of an exchange: connections to one worker, pooled, and the strict reading of its responses."""

import asyncio
import contextlib
import socket
from collections import deque
from typing import Final, Protocol, cast

from blockyard_api.relay.body import BadBody, ChunkedDecoder
from blockyard_api.relay.gate import Upstream, UpstreamError
from blockyard_api.relay.head import END, MAX_HEAD, BadHead, Response, parse_response

_MAX_INTERIM: Final = 16
_DIAL_WITHIN: Final = 10.0  # seconds; a Unix socket connects at once unless its backlog is full

_HEAD, _LENGTH, _CHUNKED, _UNTIL_CLOSE = range(4)


class HungUp(UpstreamError):
    """The worker closed the connection before it sent a response head."""


class BadResponse(UpstreamError):
    """The worker's response violates HTTP."""


class TooSlow(UpstreamError):
    """The worker took longer than it may."""


class Overloaded(UpstreamError):
    """As many requests wait for this worker as may."""


class Exchange(Protocol):
    """What a connection to a worker tells the visitor's side, in this order; nothing follows `ended` or `lost`."""

    wants_body: bool  # False for HEAD
    websocket: bool

    def interim(self, response: Response) -> None:
        """A 1xx other than 101 came."""

    def upgraded(self, response: Response, rest: bytes) -> None:
        """The worker switched to WebSocket; `rest` are its first bytes."""

    def responded(self, response: Response, body: bytes, *, has_body: bool, ended: bool) -> None:
        """The final head came, with the first bytes of the body, all of it if `ended`."""

    def body(self, pieces: list[bytes]) -> None:
        """More of the body came."""

    def ended(self) -> None:
        """The body is complete."""

    def lost(self, error: UpstreamError, *, untouched: bool) -> None:
        """It went wrong; `untouched` if a pooled connection closed before it sent a byte."""

    def worker_blocked(self, *, blocked: bool) -> None:
        """The worker does not take the request's body at the moment, or does so again."""


class WorkerConnection(asyncio.Protocol):
    """One connection to a worker: at most one exchange at a time."""

    __slots__ = ("_decoder", "_exchange", "_held", "_interim", "_left", "_mode", "_pool", "_sock", "reused", "transport")

    transport: asyncio.Transport

    def __init__(self, pool: "Pool", sock: socket.socket) -> None:
        self._pool = pool
        self._sock = sock
        self._exchange: Exchange | None = None
        self._mode = _HEAD
        self._held = b""
        self._left = 0
        self._interim = 0
        self._decoder: ChunkedDecoder | None = None
        self.reused = False

    def begin(self, exchange: Exchange, head: bytes) -> None:
        """Send a request's head; its body, if any, goes straight to `transport`."""
        self._exchange = exchange
        self._mode = _HEAD
        self._interim = 0
        self.transport.write(head)

    def abandon(self) -> None:
        """Break off: the visitor went away, or nothing that comes can be of use."""
        self._exchange = None
        self.transport.abort()

    def detach(self) -> asyncio.Transport:
        """Give up the transport, which becomes one end of a tunnel."""
        self._exchange = None
        self._pool.leave()
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
        self._pool.lost(self, held=self._exchange is not None)
        exchange, self._exchange = self._exchange, None
        if exchange is None:
            return
        if self._mode == _UNTIL_CLOSE and error is None:
            exchange.ended()
        else:
            untouched = self.reused and self._mode == _HEAD and not self._held and not self._interim
            exchange.lost(HungUp("the worker closed the connection too early"), untouched=untouched)

    def _read_last_words(self) -> None:
        # a worker that refuses an upload answers and closes: our write fails while its answer is still unread
        with contextlib.suppress(OSError):
            while self._exchange is not None and (data := self._sock.recv(MAX_HEAD)):
                self.data_received(data)

    # reading

    def _read_head(self, exchange: Exchange, data: bytes) -> None:
        while True:
            end = data.find(END, 0, MAX_HEAD)
            if end < 0:
                self._held = data
                if len(data) >= MAX_HEAD:
                    self._refuse(exchange, "its response head is too large")
                return
            try:
                response = parse_response(data[: end + 4])
            except BadHead as bad:
                self._refuse(exchange, bad.why)
                return
            data = data[end + 4 :]
            if response.status >= 200:
                break
            if response.status == 101:
                self._upgrade(exchange, response, data)
                return
            self._interim += 1
            if self._interim > _MAX_INTERIM:
                self._refuse(exchange, "it sends interim responses without end")
                return
            exchange.interim(response)
        self._held = b""
        self._begin_body(exchange, response, data)

    def _begin_body(self, exchange: Exchange, response: Response, data: bytes) -> None:
        has_body = exchange.wants_body and response.status not in (204, 304)
        length = response.length if has_body else 0
        if not response.keep_alive or (length is None and not response.chunked):
            self.reused = False
            self._pool.retire(self)
        if length is not None and (not response.chunked or not has_body):
            if len(data) > length:
                self._refuse(exchange, "it sends more than it announced")
                return
            self._left = length - len(data)
            self._mode = _LENGTH
            if self._left:
                exchange.responded(response, data, has_body=has_body, ended=False)
            else:
                self._release()
                exchange.responded(response, data, has_body=has_body, ended=True)
        elif response.chunked:
            self._mode = _CHUNKED
            self._decoder = ChunkedDecoder()
            exchange.responded(response, b"", has_body=True, ended=False)
            if data and self._exchange is not None:
                self._read_chunks(exchange, data)
        else:
            self._mode = _UNTIL_CLOSE
            exchange.responded(response, data, has_body=True, ended=False)
