"""What the relay asks of the control side, as plain data: who may pass, and to which worker.

The relay knows HTTP and nothing of apps; the gate knows apps and nothing of bytes.
"""

import socket
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

Header = tuple[bytes, bytes]


class RequestHead(NamedTuple):  # a tuple, as Forward is: one of each is made for every request
    """A request's head as parsed and checked: names as sent, `target` raw and in origin form."""

    method: bytes
    target: bytes
    headers: Sequence[Header]
    client: str  # address of the visitor, after trusted proxies
    secure: bool  # the visitor came by https
    websocket: bool  # a well-formed WebSocket upgrade

    def get(self, name: bytes) -> bytes | None:
        """Return the first value of a header, its name given in lowercase."""
        for key, value in self.headers:
            if key.lower() == name:
                return value
        return None


class UpstreamError(Exception):
    """The worker cannot be reached, or is not who it should be; the gate turns it into a page."""


class Crowded(UpstreamError):
    """The visitor's address has as much of this worker as one may have: 429, and others are served."""

    retry_after = 5  # seconds


class Overloaded(UpstreamError):
    """As many requests wait for this worker as may, or this one has waited too long: 503."""

    retry_after = 10  # seconds


class Upstream(Protocol):
    """One worker's socket. Connections are pooled per Upstream object and never shared with another."""

    async def connect(self) -> socket.socket:
        """Return a connected, non-blocking stream socket whose peer has been verified. Raises UpstreamError."""


class Tracker(Protocol):
    """Hears what happens on one admitted request; calls are cheap and never raise."""

    def request_ended(self) -> None:
        """Called once when the exchange is over, however it ended."""

    def websocket_opened(self, close: Callable[[], None]) -> None:
        """The upgrade succeeded; `close` ends both sides at once (access revoked, app disabled)."""

    def visitor_message(self) -> None:
        """The visitor sent a WebSocket data frame (text or binary, not ping, pong or close)."""


@dataclass(frozen=True, slots=True)
class Reply:
    """An answer the relay gives by itself. Content-Length and Date are added."""

    status: int
    headers: Sequence[Header]
    body: bytes


class Forward(NamedTuple):
    """Pass the request on."""

    upstream: Upstream
    target: bytes  # origin form, the app's prefix removed, otherwise as sent
    prefix: bytes  # for X-Forwarded-Prefix, without trailing slash
    headers: Sequence[Header]  # identity headers to add toward the worker
    response_headers: Sequence[Header]  # to add toward the visitor (our cookie)
    tracker: Tracker


Verdict = Reply | Forward


class Gate(Protocol):
    """Decides about every request before a byte reaches a worker."""

    def admit(self, head: RequestHead) -> Verdict | Awaitable[Verdict]:
        """Decide; at once where it can (the hot path), else as an awaitable, which is cancelled if the client goes."""

    def failed(self, head: RequestHead, forward: Forward, error: Exception) -> Reply:
        """Word the answer for a worker that failed before it sent a head (never called later)."""
