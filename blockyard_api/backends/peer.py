"""Who is at the other end of a Unix socket: the kernel's word, in the ids of this process's user namespace."""

import contextlib
import os
import socket
import struct
from collections.abc import Iterator
from dataclasses import dataclass

from blockyard_api.errors import BlockyardError

_WITHIN = 3.0  # seconds until a socket whose queue is full is given up


class PeerUnknown(BlockyardError):
    """Nobody listens there."""


@dataclass(frozen=True, slots=True)
class Peer:
    """Who called listen(2) on a socket."""

    pid: int
    uid: int
    gid: int


@contextlib.contextmanager
def opened(directory: str, name: str) -> Iterator[int]:
    """Open what stands at a name, following no link to it, to be connected to as `address` says. Raises OSError."""
    parent = os.open(directory, os.O_PATH | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
    try:
        node = os.open(name, os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=parent)
    finally:
        os.close(parent)
    try:
        yield node
    finally:
        os.close(node)


def address(node: int) -> str:
    """Name what was opened for connect(2): another name could be swapped between the check and the connect."""
    return f"/proc/self/fd/{node}"


def of(sock: socket.socket) -> Peer:
    """Return who listens at the other end of a connected socket."""
    return Peer(*struct.unpack("3i", sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, struct.calcsize("3i"))))


def peer(directory: str, name: str, kind: socket.SocketKind = socket.SOCK_STREAM) -> Peer:
    """Connect to a socket, following no link to it, and return who listens; blocking. Raises PeerUnknown."""
    try:
        with opened(directory, name) as node, socket.socket(socket.AF_UNIX, kind | socket.SOCK_CLOEXEC) as sock:
            sock.settimeout(_WITHIN)
            sock.connect(address(node))
            return of(sock)
    except OSError as error:
        raise PeerUnknown("peer_unknown", f"{directory}/{name} cannot be connected to: {error.strerror}.") from error
