"""The way to one worker's socket: opened without following links, its peer compared with the uid the spawner gave.

The worker owns the directory, so what stands there under the socket's name may be anything (architecture: a worker is
not trusted by the API).
"""

import asyncio
import contextlib
import os
import socket
import stat
from collections.abc import Callable
from dataclasses import dataclass

from blockyard_api.backends import peer
from blockyard_api.relay.gate import UpstreamError

SOCKET_NAME = "app.sock"
_QUEUE_FULL = 0.02  # seconds until the next try


class NotListening(UpstreamError):
    """The socket is not there or nobody accepts on it: not yet, or not any more."""


class Impostor(UpstreamError):
    """What stands at the socket's name is not this worker's socket."""


@dataclass(frozen=True, eq=False, slots=True)
class WorkerSocket:
    """One worker's socket; `betrayed` hears once an impostor was met there."""

    directory: str
    uid: int
    betrayed: Callable[[str], None]

    async def connect(self) -> socket.socket:
        """Return a connected, verified, non-blocking socket. Raises NotListening or Impostor."""
        try:
            sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC | socket.SOCK_NONBLOCK)
        except OSError as error:
            raise NotListening(f"there is no descriptor left to reach the worker: {error.strerror}") from error
        try:
            await self._connect(sock)
        except Impostor as error:
            sock.close()
            self.betrayed(str(error))
            raise
        except BaseException:
            sock.close()
            raise
        return sock

    async def _connect(self, sock: socket.socket) -> None:
        with contextlib.ExitStack() as held:
            try:
                node = held.enter_context(peer.opened(self.directory, SOCKET_NAME))
            except OSError as error:
                raise NotListening(f"the worker's socket cannot be opened: {error.strerror}") from error
            if not stat.S_ISSOCK(os.fstat(node).st_mode):
                raise Impostor("the worker put something else in its socket's place")
            try:
                await _dial(sock, peer.address(node))
            except OSError as error:
                raise NotListening(f"the worker does not accept connections: {error.strerror}") from error
        if (uid := peer.of(sock).uid) != self.uid:
            raise Impostor(f"the socket belongs to uid {uid}, not to the worker's {self.uid}")


async def _dial(sock: socket.socket, path: str) -> None:
    """Connect to an address.

    Waits while the worker's queue is full; the caller's deadline is the bound. Not `loop.sock_connect`: that takes
    EAGAIN for a connection under way, and hands out a socket without a peer (connect(2)).
    """
    while True:
        try:
            sock.connect(path)
        except BlockingIOError:
            await asyncio.sleep(_QUEUE_FULL)  # nothing tells when there is room: poll(2) calls the socket writable
        else:
            return
