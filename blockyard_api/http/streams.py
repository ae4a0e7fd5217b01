"""Answers that go on while something grows: what a worker writes, how a deployment gets on.

Each ends with the token that asked for it, and when this daemon stops, in a line that says so: whoever was shut out
reads on no further, and a stop waits for nobody who merely reads.
"""

import asyncio
import contextlib
import math
import time
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Mapping
from dataclasses import dataclass

from starlette.responses import StreamingResponse
from starlette.types import Send

from blockyard_api.identity.tokens import Principal
from blockyard_api.workers.log import stamp

_EXPIRED = "this ends here: the token has expired"
_REVOKED = "this ends here: the token was revoked"
_STOPPING = "this ends here: the server is stopping; what it runs goes on and can be followed again when it is back"
_LAST_WORDS = 1.0  # seconds for a reader who has stopped to read


@dataclass(eq=False, slots=True)
class _Reading:
    """One answer under way, and why it is to end."""

    token_id: str
    limit: asyncio.Timeout
    why: str

    def end(self, why: str) -> None:
        """Let no more of it be sent; the first reason counts."""
        if not self.limit.expired():
            self.why = why
            self.limit.reschedule(asyncio.get_running_loop().time())


class Streams:
    """All answers that go on; `stands` tells whether a caller's token still counts."""

    def __init__(self, stands: Callable[[Principal], bool]) -> None:
        self._stands = stands
        self._open: set[_Reading] = set()
        self._stopping = False

    def answer(
        self, principal: Principal, text: AsyncGenerator[bytes, None], headers: Mapping[str, str] | None = None
    ) -> StreamingResponse:
        """Return a response that sends `text` to a caller for as long as he may read it."""
        return _Lasting(self, principal, text, headers)

    @contextlib.asynccontextmanager
    async def reading(self, principal: Principal) -> AsyncIterator[_Reading]:
        """Cut off what is done within when the caller may read no further; `limit` and `why` tell of it then."""
        why, left = _EXPIRED, max(0.0, principal.expires_at - time.time())
        if self._stopping:
            why, left = _STOPPING, 0.0
        elif not self._stands(principal):  # revoked since the request was let in
            why, left = _REVOKED, 0.0
        limit = asyncio.timeout(None if left == math.inf else left)
        reading = _Reading(principal.token_id, limit, why)
        try:
            async with limit:
                self._open.add(reading)
                try:
                    yield reading
                finally:
                    self._open.discard(reading)
        except TimeoutError:
            if not limit.expired():
                raise

    def end_of_token(self, token_id: str) -> None:
        """End what was asked for with a token."""
        for reading in self._open:
            if reading.token_id == token_id:
                reading.end(_REVOKED)

    def stop(self) -> None:
        """End all of them, and at once what is asked for from now on."""
        self._stopping = True
        for reading in self._open:
            reading.end(_STOPPING)


class _Lasting(StreamingResponse):
    """A streamed response that may be cut off, and says so then."""

    def __init__(
        self,
        streams: Streams,
        principal: Principal,
        text: AsyncGenerator[bytes, None],
        headers: Mapping[str, str] | None,
    ) -> None:
        super().__init__(text, headers=headers, media_type="text/plain; charset=utf-8")
        self._streams = streams
        self._principal = principal
        self._text = text

    async def stream_response(self, send: Send) -> None:
        await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
        last = b""
        within_line = False
        async with self._streams.reading(self._principal) as reading, contextlib.aclosing(self._text) as text:
            async for chunk in text:
                await send({"type": "http.response.body", "body": chunk, "more_body": True})
                within_line = not chunk.endswith(b"\n")
        if reading.limit.expired():
            last = b"\n" * within_line + stamp(reading.why)
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(_LAST_WORDS):
                await send({"type": "http.response.body", "body": last, "more_body": False})
