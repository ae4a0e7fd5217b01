"""The relay in a process of its own, to watch its memory and descriptors: `relay_process.py SOCKET NONCE`.

The gate lets everything pass to one worker and numbers what it lets pass: a request that reaches the worker without
such a number is one that the front never counted. Prints its port; tells how many it has let pass for each line on its
standard input.
"""

import asyncio
import socket
import sys

import uvloop

from blockyard_api.relay.gate import Forward, Reply, RequestHead, UpstreamError
from blockyard_api.relay.server import Relay, RelayLimits

LIMITS = RelayLimits(head=2, idle=2, upload=2, worker=2, stall=4, linger=0.5, pooled=1)


class Front:
    """Gate, upstream and tracker at once."""

    def __init__(self, path: str, nonce: str) -> None:
        self._path = path
        self._nonce = nonce
        self.passed = 0
        self.ended = 0

    def admit(self, head: RequestHead) -> Forward:
        """Number it and let it pass."""
        self.passed += 1
        number = (b"X-Front", f"{self._nonce}-{self.passed}".encode())
        ours = ((b"Set-Cookie", b"blockyard_route=ours; Path=/; HttpOnly"),)
        return Forward(self, head.target, b"/app/demo", (number,), ours, self)

    def failed(self, _head: RequestHead, _forward: Forward, error: Exception) -> Reply:
        """Say what happened."""
        return Reply(502, (), str(error).encode())

    async def connect(self) -> socket.socket:
        """Connect to the worker."""
        sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK)
        try:
            await asyncio.get_running_loop().sock_connect(sock, self._path)
        except OSError as error:
            sock.close()
            raise UpstreamError(str(error)) from error
        return sock

    def request_ended(self) -> None:
        """Count."""
        self.ended += 1

    def websocket_opened(self, close: object) -> None:
        """Ignore."""

    def visitor_message(self) -> None:
        """Ignore."""


async def serve(path: str, nonce: str) -> None:
    front = Front(path, nonce)
    relay = Relay(front, limits=LIMITS)
    sock = socket.create_server(("127.0.0.1", 0), backlog=1024)
    sock.setblocking(False)
    await relay.listen(sock)
    asked = asyncio.StreamReader()
    await asyncio.get_running_loop().connect_read_pipe(lambda: asyncio.StreamReaderProtocol(asked), sys.stdin)
    print(sock.getsockname()[1], flush=True)
    while await asked.readline():
        print(front.passed, front.ended, relay.open_connections, flush=True)


uvloop.run(serve(*sys.argv[1:]))
