"""Readiness: the app's own HTTP answer on its socket, not the socket's existence and not an accepted connection."""

import asyncio

from blockyard_api.backends.worker_socket import NotListening
from blockyard_api.relay.gate import Upstream

_HEADERS = b"Host: localhost\r\nX-Forwarded-Proto: http\r\nConnection: close\r\n"
_FIRST_PAUSE, _LONGER = 0.005, 1.01  # seconds: 10 ms after half a second, which R takes, and 0.2 s after twenty
_MOST = 1 << 20  # bytes of one answer that are read: enough for the page, so that the app is not cut off in writing it


async def answers(upstream: Upstream) -> None:
    """Return once the worker has answered with HTTP, at most a hundredth of its start later. Raises UpstreamError.

    Without an end of its own: the caller's deadline is the bound.
    """
    pause = _FIRST_PAUSE
    while await status(upstream, b"/") is None:  # asked, since the directory may be entered but not watched
        await asyncio.sleep(pause)
        pause *= _LONGER


async def status(upstream: Upstream, target: bytes) -> bytes | None:
    """Return the status, three bytes, with which a worker answers a GET; None where it does not answer with HTTP.

    Raises UpstreamError. Without an end of its own, as above.
    """
    try:
        sock = await upstream.connect()
    except NotListening:
        return None
    try:
        reader, writer = await asyncio.open_unix_connection(sock=sock)
    except BaseException:
        sock.close()
        raise
    try:
        writer.write(b"GET %b HTTP/1.1\r\n%b\r\n" % (target, _HEADERS))
        await writer.drain()
        start = await reader.readexactly(12)
        left = _MOST
        while left > 0 and (data := await reader.read(65536)):
            left -= len(data)
    except (OSError, asyncio.IncompleteReadError):
        return None
    else:
        return start[9:] if start.startswith(b"HTTP/") else None
    finally:
        writer.close()
