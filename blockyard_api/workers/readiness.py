"""Readiness: the app's own HTTP answer on its socket, not the socket's existence and not an accepted connection."""

import asyncio

from blockyard_api.backends.worker_socket import NotListening
from blockyard_api.relay.gate import Upstream

_REQUEST = b"GET / HTTP/1.1\r\nHost: localhost\r\nX-Forwarded-Proto: http\r\nConnection: close\r\n\r\n"
_MOST = 1 << 20  # bytes of one answer that are read: enough for the page, so that the app is not cut off in writing it


async def answers(upstream: Upstream, pause: float) -> None:
    """Return once the worker has answered with HTTP; looks again every `pause` seconds. Raises UpstreamError.

    Without an end of its own: the caller's deadline is the bound.
    """
    while not await _answered(upstream):  # noqa: ASYNC110 - the directory may be entered but not watched
        await asyncio.sleep(pause)


async def _answered(upstream: Upstream) -> bool:
    try:
        sock = await upstream.connect()
    except NotListening:
        return False
    try:
        reader, writer = await asyncio.open_unix_connection(sock=sock)
    except BaseException:
        sock.close()
        raise
    try:
        writer.write(_REQUEST)
        await writer.drain()
        start = await reader.readexactly(5)
        left = _MOST
        while left > 0 and (data := await reader.read(65536)):
            left -= len(data)
    except (OSError, asyncio.IncompleteReadError):
        return False
    else:
        return start == b"HTTP/"
    finally:
        writer.close()
