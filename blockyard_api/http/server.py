"""The control plane's HTTP server: uvicorn, with the bounds on what strangers may send that it leaves to others."""

import asyncio
import json
import re
import socket
from collections.abc import Callable
from enum import Enum, auto

import uvicorn
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from blockyard_api.relay.origin import neighbourhood

_MOST_CONNECTIONS = 2000
_MOST_OF_ONE_ADDRESS = 500  # a proxy in front of all is one, too
_HEAD_WITHIN = 30.0  # seconds from a connection's, or a request's, first moment to the end of its head
_MOST_HEAD = 65536  # bytes
_LINGER = 10.0  # seconds from an answer to the end of a connection whose body nobody wants
_TAKEN_WITHIN = 120.0  # seconds in which a client must take something of its answer, as from the relay
_MOST_BODY = 65536  # bytes; of all routes but the upload, which has its own bound, and knows by then who sends
_MOST_OF_A_STRANGER = 1024  # bytes, where nobody has a token yet
_BODY_WITHIN = 60.0  # seconds for a body; of an upload, for each piece
_UPLOAD = re.compile(r"/api/v1/apps/[^/]+/bundles")
_BOOTSTRAP = "/api/v1/bootstrap"


def server(control_plane: ASGIApp, shutdown_timeout: float, stopping: Callable[[], None]) -> uvicorn.Server:
    """Return a server of the control plane that waits `shutdown_timeout` seconds for what is under way.

    `stopping` is called before that, to end what would have no end of its own.
    """
    return _Server(
        stopping,
        uvicorn.Config(
            _BoundedBodies(control_plane),
            loop="none",
            http=_BoundedConnection,
            ws="none",
            lifespan="off",
            log_config=None,
            access_log=False,
            server_header=False,
            proxy_headers=False,
            timeout_keep_alive=75,  # as the relay: uvicorn's 5 s meet clients that are just about to send again
            timeout_graceful_shutdown=max(1, round(shutdown_timeout)),
        ),
    )


class _Server(uvicorn.Server):
    """Uvicorn's server, which tells nobody that it stops before all have been waited for."""

    def __init__(self, stopping: Callable[[], None], config: uvicorn.Config) -> None:
        super().__init__(config)
        self._stopping = stopping

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        self._stopping()
        await super().shutdown(sockets)


class _Reads(Enum):
    """What a connection's parser is in."""

    NOTHING = auto()
    HEAD = auto()
    BODY = auto()


class _BoundedConnection(HttpToolsProtocol):
    """Uvicorn's protocol with an end to each phase: alone it waits for ever for a head, the rest of a body, a reader.

    What comes is bounded by the timer `_due`: the head, the body that nobody reads since the answer is given, the next
    request, the end of a close. `_untaken` is the timer of a client that takes nothing of its answer. A body under way
    is the bound of `_BoundedBodies`.
    """

    near: str | None = None
    _reads = _Reads.NOTHING
    _due: asyncio.TimerHandle | None = None
    _untaken: asyncio.TimerHandle | None = None
    _leaving = False
    _size = 0  # of what came since the last piece of a body, or end of a request: the parser may keep all of it
    _piece = 0

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]  # as uvicorn has it
        super().connection_made(transport)
        self.near = neighbourhood(self.client[0]) if self.client else None
        self._within(_HEAD_WITHIN, self._close)
        if len(self.connections) > _MOST_CONNECTIONS:
            self._turn_away(b"503 Service Unavailable", "Too many connections are open; try again shortly.")
        elif sum(getattr(other, "near", None) == self.near for other in self.connections) > _MOST_OF_ONE_ADDRESS:
            self._turn_away(b"429 Too Many Requests", "Too many connections from one address are open; close some.")

    def connection_lost(self, exc: Exception | None) -> None:
        for timer in (self._due, self._untaken):
            if timer is not None:
                timer.cancel()
        super().connection_lost(exc)

    def eof_received(self) -> None:
        """Have the rest of the answer taken in time, too: the transport closes once it is."""
        self._within(_TAKEN_WITHIN, self.transport.abort)

    def data_received(self, data: bytes) -> None:
        if self._leaving:
            return
        self._piece = len(data)
        super().data_received(data)
        self._size += self._piece
        if self._size > _MOST_HEAD and not self.transport.is_closing():
            if self._reads is _Reads.BODY:  # chunks' extensions or trailers without end; an answer may have begun
                self.transport.abort()
            else:
                self._refuse(b"431 Request Header Fields Too Large", "head_too_large", "Send a head of at most 64 KB.")

    def on_message_begin(self) -> None:
        super().on_message_begin()
        self._reads, self._size = _Reads.HEAD, 0
        self._within(_HEAD_WITHIN, self._close)

    def on_header(self, name: bytes, value: bytes) -> None:
        """Keep a header, but not a trailer: it would come to those of the head, after everybody has looked at them."""
        if self._reads is _Reads.HEAD:
            super().on_header(name, value)

    def on_headers_complete(self) -> None:
        self._reads = _Reads.BODY
        self._cancel_due()
        super().on_headers_complete()
        self.cycle.transport = _OfCycle(self.transport, self._leave)  # type: ignore[assignment]  # all that it uses

    def on_body(self, body: bytes) -> None:
        self._size = self._piece = 0
        super().on_body(body)

    def on_message_complete(self) -> None:
        self._reads = _Reads.NOTHING
        self._size = self._piece = 0
        super().on_message_complete()
        if self.cycle.response_complete:
            self._await_next()

    def on_response_complete(self) -> None:
        if self._leaving:
            return
        last = not self.pipeline
        super().on_response_complete()
        if last and not self.transport.is_closing():
            if self._reads is _Reads.BODY:
                self._within(_LINGER, self._close)
            elif self._reads is _Reads.NOTHING:
                self._await_next()

    def pause_writing(self) -> None:
        super().pause_writing()
        self._untaken = self.loop.call_later(_TAKEN_WITHIN, self.transport.abort)

    def resume_writing(self) -> None:
        super().resume_writing()
        if self._untaken is not None:
            self._untaken.cancel()

    def send_400_response(self, msg: str) -> None:
        """Word uvicorn's refusal as the contract does."""
        self._refuse(b"400 Bad Request", "invalid_request", msg)

    def _await_next(self) -> None:
        # by a timer of our own: any byte ends uvicorn's, also a blank line, which begins no request
        self._within(self.timeout_keep_alive, self._close)

    def _within(self, seconds: float, end: Callable[[], None]) -> None:
        self._cancel_due()
        self._due = self.loop.call_later(seconds, end)

    def _cancel_due(self) -> None:
        if self._due is not None:
            self._due.cancel()
            self._due = None

    def _close(self) -> None:
        """Close once what was written is taken, or after a while all the same."""
        self.transport.close()
        self._within(_TAKEN_WITHIN, self.transport.abort)

    def _leave(self) -> None:
        """Close, but let a client that still sends read its answer first: what is left unread takes that back."""
        if self.transport.is_closing():
            return
        if self._reads is not _Reads.BODY:
            self._close()
            return
        self._leaving = True
        self.flow.resume_reading()
        self.transport.write_eof()
        self._within(_LINGER, self._close)

    def _turn_away(self, status: bytes, message: str) -> None:
        self._refuse(status, "too_many_connections", message, b"Retry-After: 10\r\n")

    def _refuse(self, status: bytes, code: str, message: str, more: bytes = b"") -> None:
        body = json.dumps({"error": code, "message": message}).encode()
        head = b"HTTP/1.1 %b\r\nContent-Type: application/json\r\nContent-Length: %d\r\n%bConnection: close\r\n\r\n"
        self.transport.write(head % (status, len(body), more) + body)
        self._close()


class _OfCycle:
    """A connection as uvicorn's answer to one request has it: what it closes is left with a linger."""

    def __init__(self, transport: asyncio.Transport, leave: Callable[[], None]) -> None:
        self._transport = transport
        self.is_closing = transport.is_closing
        self.close = leave

    def write(self, data: bytes) -> None:
        """Write while there is a connection: of its loss, uvicorn tells only the last of several pipelined requests."""
        if not self._transport.is_closing():
            self._transport.write(data)


class _BoundedBodies:
    """Ends a request whose body is too large, or does not come in time, before anybody parses it."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        most = _most(scope["path"])
        announced = int(dict(scope["headers"]).get(b"content-length", 0))  # the parser refuses what is no number
        size, whole = 0, False
        now = asyncio.get_running_loop().time
        due = now() + _BODY_WITHIN

        async def bounded_receive() -> Message:
            nonlocal size, whole
            if whole:  # what comes now is the client's leaving, and that may take its time
                return await receive()
            _check(announced, most)  # not sooner: who reads no body need not mind its size
            try:
                async with asyncio.timeout_at(now() + _BODY_WITHIN if most is None else due):
                    message = await receive()
            except TimeoutError:
                return {"type": "http.disconnect"}
            whole = not message.get("more_body", False)
            size += len(message.get("body", b""))
            _check(size, most)
            return message

        await self._app(scope, bounded_receive, send)


def _most(path: str) -> int | None:
    if _UPLOAD.fullmatch(path):
        return None
    return _MOST_OF_A_STRANGER if path == _BOOTSTRAP else _MOST_BODY


def _check(size: int, most: int | None) -> None:
    if most is not None and size > most:
        raise HTTPException(413, f"Send a body of at most {most >> 10} KB")
