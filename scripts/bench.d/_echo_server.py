"""A WebSocket echo on a Unix socket for small messages, one frame a read: `_echo_server.py SOCKET`."""

import asyncio
import base64
import hashlib
import os
import re
import sys
from typing import cast

import uvloop

_GUID = b"258EAFA5-E914-47DA-95CA-C5AB0DC85B11"


class Echo(asyncio.Protocol):
    """Answers the handshake, then every masked frame with its payload (the bench's clients mask with zeros)."""

    def __init__(self) -> None:
        self._open = False

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Keep the transport."""
        self._transport = cast("asyncio.Transport", transport)

    def data_received(self, data: bytes) -> None:
        """Answer."""
        if self._open:
            self._transport.write(data[0:1] + bytes((data[1] & 127,)) + data[6:])
        elif key := re.search(rb"\r\nsec-websocket-key: *([^\r]+)", data, re.IGNORECASE):
            accept = base64.b64encode(hashlib.sha1(key[1] + _GUID).digest())
            self._transport.write(
                b"HTTP/1.1 101 Switching Protocols\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
                b"Sec-WebSocket-Accept: " + accept + b"\r\n\r\n"
            )
            self._open = True


async def serve(path: str) -> None:
    """Run until the process is ended."""
    server = await asyncio.get_running_loop().create_unix_server(Echo, path, backlog=1024)
    await server.serve_forever()


os.umask(0)  # nginx's worker, another user, must connect to the socket
uvloop.run(serve(sys.argv[1]))
