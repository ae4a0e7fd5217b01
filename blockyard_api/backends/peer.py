"""Who is at the other end of a Unix socket: the kernel's word, in the ids of this process's user namespace."""

import os
import socket
import struct
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


def peer(directory: str, name: str, kind: socket.SocketKind = socket.SOCK_STREAM) -> Peer:
    """Connect to a socket, following no link to it, and return who listens; blocking. Raises PeerUnknown."""
    try:
        parent = os.open(directory, os.O_PATH | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
        try:
            node = os.open(name, os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=parent)
        finally:
            os.close(parent)
        try:
            with socket.socket(socket.AF_UNIX, kind | socket.SOCK_CLOEXEC) as sock:
                sock.settimeout(_WITHIN)
                sock.connect(f"/proc/self/fd/{node}")
                return Peer(*struct.unpack("3i", sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12)))
        finally:
            os.close(node)
    except OSError as error:
        raise PeerUnknown("peer_unknown", f"{directory}/{name} cannot be connected to: {error.strerror}.") from error
