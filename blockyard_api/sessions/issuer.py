"""Which of several workers made a page: below /session/ its path has a token that only that worker knows.

Shiny tells a page its token over the WebSocket, into which the relay does not look. But a worker answers such a path
with 400 where it knows the token and nothing follows it, and with 404 where it does not (R/shiny.R, `handleRequest`).
"""

import asyncio
import re
from collections.abc import Sequence

from blockyard_api.relay.gate import UpstreamError
from blockyard_api.workers.readiness import status
from blockyard_api.workers.worker import Worker

_PATH = re.compile(rb"/session/([A-Za-z0-9]{1,64})/")
_KNOWN = b"400"
_WITHIN = 10.0  # seconds: R answers nobody while it computes


def token_of(rest: bytes) -> bytes | None:
    """Return the token in an app's own path, if it has one."""
    return found[1] if (found := _PATH.match(rest)) else None


async def issuer(token: bytes, workers: Sequence[Worker]) -> Worker | None:
    """Ask all of the workers at once; return the one that knows the token, None if it is not to be found out."""
    answers = await asyncio.gather(*(_answer(worker, token) for worker in workers))
    return next((worker for worker, answer in zip(workers, answers, strict=True) if answer == _KNOWN), None)


async def _answer(worker: Worker, token: bytes) -> bytes | None:
    try:
        async with asyncio.timeout(_WITHIN):
            return await status(worker.upstream, b"/session/%b/" % token)
    except (TimeoutError, UpstreamError):
        return None
