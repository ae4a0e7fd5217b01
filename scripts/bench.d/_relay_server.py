"""The relay alone, before one Unix socket, with a gate that lets everything pass: `_relay_server.py PORT SOCKET`."""

import asyncio
import socket
import sys
from collections.abc import Callable

import uvloop

from blockyard_api.relay.gate import Forward, Reply, RequestHead
from blockyard_api.relay.server import Relay, RelayLimits


class Backend:
    """The upstream."""

    def __init__(self, path: str) -> None:
        self._path = path

    async def connect(self) -> socket.socket:
        """Connect."""
        sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK)
        await asyncio.get_running_loop().sock_connect(sock, self._path)
        return sock


class Silent:
    """A tracker that takes no note."""

    def request_ended(self) -> None:
        """Ignore."""

    def websocket_opened(self, close: Callable[[], None]) -> None:
        """Ignore."""

    def visitor_message(self) -> None:
        """Ignore."""


class Open:
    """A gate that lets everything pass."""

    def __init__(self, backend: Backend) -> None:
        self._backend = backend
        self._tracker = Silent()

    def admit(self, head: RequestHead) -> Forward:
        """Pass it on."""
        return Forward(self._backend, head.target, b"/app/bench", (), (), self._tracker)

    def failed(self, head: RequestHead, forward: Forward, error: Exception) -> Reply:  # noqa: ARG002 - the gate's shape
        """Say what happened."""
        return Reply(502, (), str(error).encode())


async def serve(port: int, backend: str) -> None:
    """Run until the process is ended."""
    # the load is one address: those of the round before may still be closing
    relay = Relay(Open(Backend(backend)), limits=RelayLimits(worker_websockets_per_address=1_000))
    sock = socket.create_server(("127.0.0.1", port), backlog=1024)
    sock.setblocking(False)
    await relay.listen(sock)
    await asyncio.Event().wait()


uvloop.run(serve(int(sys.argv[1]), sys.argv[2]))
