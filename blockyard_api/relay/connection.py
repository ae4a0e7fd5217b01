"""The visitor's side: one connection, its requests in order, each admitted by the gate and relayed to a worker."""

import asyncio
import logging
import socket
import struct
from collections.abc import Awaitable
from dataclasses import dataclass
from typing import Final, Protocol, cast

from blockyard_api.relay import head as heads
from blockyard_api.relay.body import LAST_CHUNK, BadBody, ChunkedDecoder, chunk
from blockyard_api.relay.gate import (
    Forward,
    Gate,
    Overloaded,
    Reply,
    RequestHead,
    Tracker,
    Upstream,
    UpstreamError,
    Verdict,
)
from blockyard_api.relay.head import BadHead, Request, Response
from blockyard_api.relay.origin import Origin, neighbourhood
from blockyard_api.relay.places import Share
from blockyard_api.relay.splice import Splice
from blockyard_api.relay.upstream import COPIED, HungUp, Piece, Pool, TooSlow, WorkerConnection
from blockyard_api.relay.websocket import Tunnel

_logger: Final = logging.getLogger(__name__)

_MOST_HELD: Final = 65536  # bytes read ahead of what can be used at the moment
_REPEATABLE: Final = frozenset((b"GET", b"HEAD", b"OPTIONS", b"TRACE", b"PUT", b"DELETE"))
_SLOWEST: Final = 16384  # bytes of an upload that must come within the patience for it: 270 a second, less than 2G has
_CONTINUE: Final = b"HTTP/1.1 100 Continue\r\n\r\n"


@dataclass(frozen=True, slots=True)
class Patience:
    """How long each kind of silence, or of slowness, may last, in ticks of the relay's clock."""

    head: int
    idle: int
    upload: int
    worker: int
    stall: int
    linger: int


class Surroundings(Protocol):
    """What a connection needs of the relay it belongs to."""

    gate: Gate
    patience: Patience
    closing: bool

    @property
    def overrun(self) -> bool:
        """Whether so many are refused that they are not given the time to read why."""

    def arrived(self, connection: "ClientConnection", address: str) -> Reply | None:
        """Count a new connection in; returns the refusal if there are too many."""

    def left(self, connection: "ClientConnection", address: str) -> None:
        """Count a connection out."""

    def pool(self, upstream: Upstream) -> Pool:
        """Return the pool of a worker."""

    def origin(self, peer: str) -> Origin:
        """Return what tells whose the requests of a connection are."""


# What a connection is doing. Plain numbers: an Enum's members cost a look-up each, several times a request.
_BETWEEN: Final = 0  # waiting for a request head, or in the middle of one
_DECIDING: Final = 1  # the gate is awaited
_WAITING: Final = 2  # for a place at the worker
_DIALLING: Final = 3  # a place is taken, a connection to the worker is awaited
_RELAYING: Final = 4
_LINGERING: Final = 5  # all is said; what still comes is read and dropped, so that the answer is not lost in a reset
_TUNNEL: Final = 6
_CLOSED: Final = 7
_OWED: Final = (_DECIDING, _WAITING, _DIALLING, _RELAYING)  # an answer


class ClientConnection(asyncio.Protocol):
    """One visitor's TCP connection. It is the `Exchange` of whatever worker connection serves it at the moment."""

    __slots__ = (
        "_age",
        "_blocked",
        "_buffered",
        "_chunking",
        "_client",
        "_counted",
        "_decoder",
        "_eof",
        "_forward",
        "_forwarded",
        "_fresh",
        "_head",
        "_held",
        "_keep",
        "_left",
        "_near",
        "_origin",
        "_paused",
        "_peer",
        "_pool",
        "_probes",
        "_quiet",
        "_reading",
        "_relay",
        "_repeatable",
        "_request",
        "_responded",
        "_share",
        "_slow",
        "_stalled",
        "_state",
        "_task",
        "_tracker",
        "_transport",
        "_tunnel",
        "_until_close",
        "_uploaded",
        "_worker",
        "wants_body",
        "websocket",
    )

    _transport: asyncio.Transport
    _origin: Origin
    _request: Request  # meaningful while an answer is OWED, as is what is set beside it
    _head: RequestHead
    _forward: Forward
    _pool: Pool
    _share: Share

    def __init__(self, relay: Surroundings) -> None:
        self._relay = relay
        self._peer = ""
        self._client = ""  # whose the last request was
        self._near = ""  # where he is
        self._state = _BETWEEN
        self._held = b""
        self._tracker: Tracker | None = None  # of an admitted request that has not ended
        self._forwarded = b""
        self._worker: WorkerConnection | None = None
        self._tunnel: Tunnel | None = None
        self._task: asyncio.Task[None] | None = None
        self._decoder: ChunkedDecoder | None = None
        self._left = 0  # of the request's body; where it has no length, it falls below zero
        self._counted = 0  # what was left when the last few KB had come
        self._slow = 0  # ticks since then
        self._uploaded = True  # the request's body was read whole
        self._repeatable = False
        self._fresh = False  # it needs a connection to the worker that nobody has used
        self._responded = False
        self._chunking = False
        self._until_close = False  # nothing but the connection's end tells the end of the response
        self._keep = True
        self._eof = False
        self._reading = True
        self._paused = False  # the visitor does not take what we write
        self._blocked = False  # the worker does not take what the visitor uploads
        self._age = 0  # ticks since the state began
        self._quiet = 0  # ticks since something came
        self._stalled = 0
        self._buffered = 0
        self._probes = 0
        self.wants_body = True
        self.websocket = False

    # asyncio.Protocol

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Count in, or refuse."""
        self._transport = cast("asyncio.Transport", transport)
        peer = transport.get_extra_info("peername")
        self._peer = str(peer[0]).removeprefix("::ffff:") if isinstance(peer, tuple) else ""
        self._origin = self._relay.origin(self._peer)
        refusal = self._relay.arrived(self, self._peer)
        if refusal is not None:
            self._refuse(refusal)
            if self._relay.overrun:
                self._transport.close()

    def data_received(self, data: bytes) -> None:
        """Take the next bytes, whatever they are at this point."""
        self._quiet = 0
        if self._state == _BETWEEN:
            self._read_request(self._held + data if self._held else data)
        elif self._state == _RELAYING and not self._uploaded:
            self._upload(data)
        elif self._state != _LINGERING:
            self._held += data
            if len(self._held) > _MOST_HELD:
                self._read(on=False)

    def eof_received(self) -> bool:
        """Close, unless an answer is still owed: a client may close its sending half after its request."""
        self._eof = True
        if self._state == _BETWEEN and self._held:  # requests that came at once, and are not answered yet
            asyncio.get_running_loop().call_soon(self._continue)
            return True
        return self._state in _OWED and self._uploaded

    def pause_writing(self) -> None:
        """Hold the worker back."""
        self._paused = True
        if self._worker is not None:
            self._worker.hold_back()

    def resume_writing(self) -> None:
        """Let the worker go on, or begin with the next request."""
        self._paused = False
        if self._worker is not None:
            self._worker.go_on()
        elif self._state == _BETWEEN and self._held:
            self._continue()

    def connection_lost(self, error: Exception | None) -> None:  # noqa: ARG002 - gone is gone
        """Free everything that served this visitor."""
        state, self._state = self._state, _CLOSED
        if self._task is not None:
            self._task.cancel()
        if state == _WAITING:
            self._pool.leave(self._share, self)
        elif state == _DIALLING:
            self._pool.give(self._share)
        elif self._worker is not None:
            self._worker.abandon()
            self._worker = None
        self._end_exchange()
        self._relay.left(self, self._peer)

    # requests

    def _continue(self) -> None:
        if self._state == _BETWEEN and self._held and not self._paused and not self._transport.is_closing():
            data, self._held = self._held, b""
            self._read_request(data)

    def _read_request(self, data: bytes) -> None:
        if self._paused:  # a client that pipelines without reading waits for itself
            self._held = data
            self._read(on=len(data) <= _MOST_HELD)
            return
        if data.startswith(b"\r\n"):  # RFC 9112, 2.2: some clients end a body with one too many
            data = data[2:]
        end = data.find(heads.END, 0, heads.MAX_HEAD)
        if end < 0:
            self._await_head(data)
            return
        try:
            request = heads.parse_request(data[: end + 4])
        except BadHead as bad:
            self._refuse(heads.refusal(bad.status, bad.why))
            return
        self._held = data[end + 4 :]
        self._request = request
        self._left = request.length
        self._decoder = ChunkedDecoder() if request.chunked else None
        self._uploaded = not (request.length or request.chunked)
        self._responded = self._chunking = self._until_close = self._blocked = False
        self._age = self._probes = 0
        self.wants_body = request.method != b"HEAD"
        self.websocket = request.websocket
        self._admit(request)

    def _await_head(self, data: bytes) -> None:
        if len(data) >= heads.MAX_HEAD:
            self._refuse(heads.refusal(431, "The request head is larger than 64 KB."))
            return
        if b"\n" in data and data.count(b"\n") != data.count(b"\r\n"):  # it may never end the way we wait for
            self._refuse(heads.refusal(400, "A line of the request head does not end in CR LF."))
            return
        if not self._held:
            self._age = 0
        self._held = data
        if self._eof:  # the rest of it will not come
            self._transport.close()
        self._read(on=True)

    def _admit(self, request: Request) -> None:
        client, secure, self._forwarded = self._origin.of(request)
        if client != self._client:
            self._client, self._near = client, neighbourhood(client)
        self._head = RequestHead(request.method, request.target, request.headers, client, secure, request.websocket)
        self._state = _DECIDING
        try:
            verdict = self._relay.gate.admit(self._head)
        except Exception:
            _logger.exception("the gate failed")
            verdict = heads.refusal(500, "The server failed; its log says why.")
        if isinstance(verdict, Forward):
            self._pass_on(verdict)
        elif isinstance(verdict, Reply):
            self._answer(verdict)
        else:
            self._task = asyncio.get_running_loop().create_task(self._decide(verdict))

    async def _decide(self, awaited: Awaitable[Verdict]) -> None:
        try:
            verdict = await awaited
        except Exception:
            _logger.exception("the gate failed")
            verdict = heads.refusal(500, "The server failed; its log says why.")
        self._task = None
        if isinstance(verdict, Forward):
            self._pass_on(verdict)
        else:
            self._answer(verdict)

    def _pass_on(self, forward: Forward) -> None:
        self._forward = forward
        self._tracker = forward.tracker
        self._pool = self._relay.pool(forward.upstream)
        # what may not be sent twice does not go to a connection that the worker may just be closing
        self._repeatable = self._uploaded and self._request.method in _REPEATABLE
        self._share = self._pool.shares.get(self._near) or self._pool.share(self._near)
        if self._repeatable and not self.websocket and (connection := self._pool.take(self._share)) is not None:
            self._relay_through(connection)
            return
        try:
            if self.websocket:
                self._pool.open_websocket(self._share)
            self._enter(fresh=not self._repeatable)
        except UpstreamError as error:
            self._fail(error)

    def _enter(self, *, fresh: bool) -> None:
        """Take a place at the worker, or wait for one. Raises UpstreamError."""
        self._fresh = fresh
        if self._pool.enter(self._share):
            self.seated()
        else:
            self._pool.wait(self._share, self)
            self._state = _WAITING
            self._age = 0

    def seated(self) -> None:
        """Go on, with a place at the worker."""
        connection = None if self._fresh else self._pool.idle()
        if connection is None:
            self._state = _DIALLING
            self._task = asyncio.get_running_loop().create_task(self._dial())
        else:
            self._relay_through(connection)

    async def _dial(self) -> None:
        try:
            connection = await self._pool.dial()
        except UpstreamError as error:
            self._undialled(error)
        except Exception as error:
            _logger.exception("no connection to a worker")
            self._undialled(HungUp(str(error)))
        else:
            self._task = None
            self._relay_through(connection)

    def _undialled(self, error: UpstreamError) -> None:
        self._task = None
        self._pool.give(self._share)
        self._fail(error)

    def _relay_through(self, connection: WorkerConnection) -> None:
        self._worker = connection
        self._state = _RELAYING
        self._quiet = 0
        connection.begin(self, self._share, heads.request_head(self._request, self._forward, self._forwarded))
        if self._paused:
            connection.hold_back()
        if not self._uploaded:
            self._counted, self._slow = self._left, 0
            data, self._held = self._held, b""
            if data:
                self._upload(data)
            self._read(on=not self._blocked)

    def _upload(self, data: bytes) -> None:
        if self._decoder is None:
            self._left -= len(data)
            if self._left <= 0:
                self._uploaded = True
                if self._left:
                    data, self._held = data[: self._left], data[self._left :]
        else:
            self._left -= len(data)
            try:
                pieces, rest = self._decoder.feed(data)
            except BadBody as bad:
                self._refuse_upload(heads.refusal(400, str(bad)))
                return
            data = b"".join([chunk(piece) for piece in pieces])
            if self._decoder.done:
                self._uploaded = True
                self._held = rest
                data += LAST_CHUNK
        if self._worker is not None:
            self._worker.transport.write(data)

    def _refuse_upload(self, refusal: Reply) -> None:
        if self._worker is not None:
            self._worker.abandon()
            self._worker = None
        if self._responded:
            self._break_off()
        else:
            self._end_exchange()
            self._refuse(refusal)

    # Exchange: what the worker sends

    def interim(self, response: Response) -> None:
        """Pass an interim response on to those who know them; 100 only if it was asked for."""
        self._quiet = 0
        if self._request.minor and (response.status != 100 or self._request.expects_continue):
            self._transport.write(heads.response_head(response, (), b""))

    def responded(self, response: Response, body: Piece, *, has_body: bool, ended: bool) -> None:
        """Send the head, framed for this client, and the first of the body."""
        self._quiet = 0
        self._responded = True
        request = self._request
        # while the visitor still sends, the connection cannot be used again: nobody knows whether he will finish
        self._keep = request.keep_alive and self._uploaded and not self._relay.closing
        if response.length is not None and response.status != 204:
            framing = b"Content-Length: %d\r\n" % response.length
        elif response.chunked and request.minor and response.status not in (204, 304):
            self._chunking = has_body
            framing = b"Transfer-Encoding: chunked\r\n"
        else:
            self._until_close = has_body
            self._keep = self._keep and not has_body
            framing = b""
        if not self._keep:
            framing += b"Connection: close\r\n"
        elif not request.minor:
            framing += b"Connection: keep-alive\r\n"
        written = heads.response_head(response, self._forward.response_headers, framing)
        if len(body) < COPIED:
            self._transport.write(written + body)
        else:
            self._transport.writelines((written, body))
        if ended:
            self.ended()

    def body(self, pieces: list[bytes]) -> None:
        """Send more of the body."""
        self._quiet = 0
        if self._chunking:
            self._transport.write(b"".join([chunk(piece) for piece in pieces]))
        else:
            for piece in pieces:
                self._transport.write(piece)

    def sink(self) -> asyncio.Transport | None:
        """Return the visitor's transport, for a body of known length."""
        return None if self._transport.is_closing() else self._transport

    def ended(self) -> None:
        """End the response; give the worker's connection back."""
        if self._chunking:
            self._transport.write(LAST_CHUNK)
        worker, self._worker = self._worker, None
        if worker is not None:
            if self._paused:
                worker.go_on()
            worker.release(reusable=self._uploaded)
        self._finish()

    def lost(self, error: UpstreamError, *, untouched: bool) -> None:
        """Try once more where that is harmless, word the failure where nothing was said yet, else break off."""
        self._worker = None
        if self._responded:
            self._break_off()
        elif untouched and self._repeatable:
            self._again()
        else:
            self._fail(error)

    def _again(self) -> None:
        try:
            self._enter(fresh=True)
        except UpstreamError as error:
            self._fail(error)

    def worker_blocked(self, *, blocked: bool) -> None:
        """Stop reading while the worker does not."""
        self._blocked = blocked
        self._quiet = self._slow = 0  # it was not the visitor who kept still
        if not self._uploaded:
            self._read(on=not blocked)

    def upgraded(self, response: Response, rest: bytes) -> None:
        """Answer the handshake and become a tunnel."""
        worker, self._worker = cast("WorkerConnection", self._worker), None
        forward = self._forward
        self._transport.write(
            heads.response_head(response, forward.response_headers, b"Connection: Upgrade\r\nUpgrade: websocket\r\n")
        )
        self._state = _TUNNEL
        # Both before there is a tunnel, which a transport tells once, when it is full, and not again.
        self._read(on=True)
        if self._paused:
            worker.hold_back()
        keep_alive(self._transport)
        tunnel = Tunnel(self._transport, worker.detach(), forward.tracker.visitor_message, self._tunnel_ended)
        self._tunnel = tunnel
        held, self._held = self._held, b""
        tunnel.start(held, rest)
        forward.tracker.websocket_opened(tunnel.abort)
        if self._eof:  # the visitor closed his sending half before, of which the tunnel is not told again
            tunnel.abort()

    # ends

    def _answer(self, reply: Reply) -> None:
        self._keep = self._request.keep_alive and self._uploaded and not self._relay.closing
        self._transport.write(heads.reply(reply, close=not self._keep, body=self.wants_body))
        self._finish()

    def _fail(self, error: UpstreamError) -> None:
        self._answer(self._relay.gate.failed(self._head, self._forward, error))

    def _refuse(self, refusal: Reply) -> None:
        self._uploaded = False
        self._transport.write(heads.reply(refusal, close=True, body=True))
        self._leave()

    def _finish(self) -> None:
        self._end_exchange()
        if not self._keep or self._relay.closing:
            self._leave()
            return
        self._state = _BETWEEN
        self._age = self._quiet = 0
        if self._held:
            asyncio.get_running_loop().call_soon(self._continue)
        elif self._eof:
            self._transport.close()
        elif not self._reading:
            self._read(on=True)

    def _leave(self) -> None:
        """Close; if the visitor may still be sending, only once he has had time to read the answer."""
        self._state = _LINGERING
        if self._eof or (self._uploaded and not self._held):
            self._transport.close()
            return
        self._age = 0
        self._held = b""
        self._transport.write_eof()
        self._read(on=True)

    def _break_off(self) -> None:
        """Make sure that half a response is not taken for a whole one."""
        self._end_exchange()
        if self._until_close or (not self._chunking and self._request.minor == 0):
            reset(self._transport)  # the end of the connection would be the end of the body
        else:
            self._transport.close()

    def _end_exchange(self) -> None:
        tracker, self._tracker = self._tracker, None
        if tracker is not None:
            if self.websocket:
                self._share.websockets -= 1
            tracker.request_ended()

    def _tunnel_ended(self) -> None:
        self._state = _CLOSED
        self._tunnel = None
        self._end_exchange()
        self._relay.left(self, self._peer)

    def _read(self, *, on: bool) -> None:
        if on is not self._reading and not self._transport.is_closing() and not self._eof:
            self._reading = on
            if on:
                self._transport.resume_reading()
            else:
                self._transport.pause_reading()

    # the relay's clock, and its end

    @property
    def tunnelled(self) -> bool:
        """Whether this is an open WebSocket."""
        return self._tunnel is not None

    def tick(self) -> None:
        """Notice silence that lasts too long."""
        patience = self._relay.patience
        if self._tunnel is not None:
            self._tunnel.tick(patience.stall)
            return
        self._age += 1
        self._quiet += 1
        if self._worker is not None and self._worker.splice is not None:
            self._tick_splice(patience, self._worker.splice)
        elif self._transport.is_closing() or self._paused:
            self._tick_stalled(patience)
        elif self._state == _LINGERING:
            if self._age > patience.linger:
                self._transport.abort()
        elif self._state == _BETWEEN:
            if self._held and self._age > patience.head:
                self._refuse(heads.refusal(408, "The request head did not come in time."))
            elif not self._held and self._quiet > patience.idle:
                self._transport.close()
        else:
            self._tick_exchange(patience)

    def _tick_stalled(self, patience: Patience) -> None:
        buffered = self._transport.get_write_buffer_size()
        self._stalled = self._stalled + 1 if buffered == self._buffered else 0
        self._buffered = buffered
        if self._stalled > patience.stall:
            self._transport.abort()

    def _tick_splice(self, patience: Patience, splice: Splice) -> None:
        if splice.has_moved():
            self._quiet = 0
        elif splice.waits_for_visitor:
            if self._quiet > patience.stall:
                self._transport.abort()
        else:
            self._tick_exchange(patience)

    def _tick_exchange(self, patience: Patience) -> None:
        if self._eof and not self._responded and self._request.minor and self._probes < 3:
            # a closed sending half may be a visitor who left: if he did, this brings a reset
            self._probes += 1
            self._transport.write(_CONTINUE)
        if self._state == _WAITING and self._age > patience.worker:
            self._pool.leave(self._share, self)
            self._fail(Overloaded("other requests took too long"))
        if self._state != _RELAYING:
            return
        if not self._uploaded and not self._blocked and self._is_slow(patience.upload):
            self._refuse_upload(heads.refusal(408, "The request body did not come in time."))
        elif self._quiet > patience.worker and self._worker is not None:
            self._worker.abandon()
            self.lost(TooSlow("the worker did not answer in time"), untouched=False)

    def _is_slow(self, ticks: int) -> bool:
        """Count a tick of an upload; returns whether less than a few KB have come within so many."""
        self._slow += 1
        if self._counted - self._left >= _SLOWEST:
            self._counted, self._slow = self._left, 0
        return self._slow > ticks

    def shut_down(self) -> None:
        """Close now if nothing is under way; a request that is, is finished and its connection then closed."""
        if self._tunnel is not None:
            self._tunnel.go_away()
        elif self._state == _BETWEEN and not self._held:
            self._transport.close()

    def abort(self) -> None:
        """Close at once, whatever is under way."""
        if self._tunnel is not None:
            self._tunnel.abort()
        else:
            self._transport.abort()


def keep_alive(transport: asyncio.Transport) -> None:
    """Let the kernel find out about visitors who vanished without a word."""
    sock = transport.get_extra_info("socket")
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, 60)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, 20)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPCNT, 3)


def reset(transport: asyncio.Transport) -> None:
    """Close with a reset, so that the peer knows that the body is not whole."""
    sock = transport.get_extra_info("socket")
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    transport.abort()
