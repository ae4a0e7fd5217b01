"""The control plane's HTTP server: uvicorn, with the bounds on what strangers may send that it leaves to others."""

import asyncio
import json
import re

import uvicorn
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

_MOST_CONNECTIONS = 2000
_MOST_OF_ONE_ADDRESS = 500  # a proxy in front of all is one, too
_HEAD_WITHIN = 30.0  # seconds from a connection's, or a request's, first moment to the end of its head
_MOST_HEAD = 65536  # bytes
_MOST_BODY = 65536  # bytes; of all routes but the upload, which has its own bound, and knows by then who sends
_MOST_OF_A_STRANGER = 1024  # bytes, where nobody has a token yet
_BODY_WITHIN = 60.0  # seconds for a body; of an upload, for each piece
_UPLOAD = re.compile(r"/api/v1/apps/[^/]+/bundles")
_BOOTSTRAP = "/api/v1/bootstrap"


def server(control_plane: ASGIApp, shutdown_timeout: float) -> uvicorn.Server:
    """Return a server of the control plane that waits `shutdown_timeout` seconds for what is under way."""
    return uvicorn.Server(
        uvicorn.Config(
            _BoundedBodies(control_plane),
            loop="none",
            http=_BoundedHeads,
            ws="none",
            lifespan="off",
            log_config=None,
            access_log=False,
            server_header=False,
            proxy_headers=False,
            timeout_keep_alive=75,  # as the relay: uvicorn's 5 s meet clients that are just about to send again
            timeout_graceful_shutdown=max(1, round(shutdown_timeout)),
        )
    )


class _BoundedHeads(HttpToolsProtocol):
    """Uvicorn's protocol, which alone would read a head for ever and keep all of it."""

    _due: asyncio.TimerHandle | None = None
    _size = 0

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]  # as uvicorn has it
        super().connection_made(transport)
        self._await_head()
        if len(self.connections) > _MOST_CONNECTIONS:
            self._turn_away(b"503 Service Unavailable", "Too many connections are open; try again shortly.")
        elif sum(_address(other) == _address(self) for other in self.connections) > _MOST_OF_ONE_ADDRESS:
            self._turn_away(b"429 Too Many Requests", "Too many connections from one address are open; close some.")

    def connection_lost(self, exc: Exception | None) -> None:
        self._have_head()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        if self._due is not None and not self.transport.is_closing():  # still in a head
            self._size += len(data)
            if self._size > _MOST_HEAD:
                self._refuse(b"431 Request Header Fields Too Large", "head_too_large", "Send a head of at most 64 KB.")

    def on_message_begin(self) -> None:
        super().on_message_begin()
        self._await_head()

    def on_headers_complete(self) -> None:
        self._have_head()
        super().on_headers_complete()

    def send_400_response(self, msg: str) -> None:
        """Word uvicorn's refusal as the contract does."""
        self._refuse(b"400 Bad Request", "invalid_request", msg)

    def _await_head(self) -> None:
        self._have_head()
        self._size = 0
        self._due = self.loop.call_later(_HEAD_WITHIN, self.transport.close)

    def _have_head(self) -> None:
        if self._due is not None:
            self._due.cancel()
            self._due = None

    def _turn_away(self, status: bytes, message: str) -> None:
        self._refuse(status, "too_many_connections", message, b"Retry-After: 10\r\n")

    def _refuse(self, status: bytes, code: str, message: str, more: bytes = b"") -> None:
        body = json.dumps({"error": code, "message": message}).encode()
        head = b"HTTP/1.1 %b\r\nContent-Type: application/json\r\nContent-Length: %d\r\n%bConnection: close\r\n\r\n"
        self.transport.write(head % (status, len(body), more) + body)
        self.transport.close()


def _address(connection: object) -> str | None:
    """Return a connection's other end; uvicorn's set of them holds both its protocols, which have that in common."""
    client: tuple[str, int] | None = getattr(connection, "client", None)
    return client[0] if client else None


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
