"""What is left with the service manager: ends of the workers' log pipes, so that a restart keeps them.

The helper leaves those that are written to, the API those that are read.
"""

import contextlib
import os
import socket
from collections.abc import MutableMapping

_FIRST = 3  # SD_LISTEN_FDS_START
_PREFIX = "log-"


def take_passed(environ: MutableMapping[str, str]) -> tuple[list[int], dict[str, int]]:
    """Return the listening sockets that systemd passed, and the kept pipes by worker. See sd_listen_fds(3)."""
    count, names = int(environ.pop("LISTEN_FDS", "0")), environ.pop("LISTEN_FDNAMES", "").split(":")
    if environ.pop("LISTEN_PID", "") != str(os.getpid()):
        return [], {}
    listening, pipes = [], {}
    for number in range(count):
        descriptor = _FIRST + number
        os.set_inheritable(descriptor, False)
        name = names[number] if number < len(names) else ""
        if name.startswith(_PREFIX):
            pipes[name.removeprefix(_PREFIX)] = descriptor
        else:
            listening.append(descriptor)
    return listening, pipes


class Keeper:
    """The service manager's descriptor store; without a service manager, every call does nothing."""

    def __init__(self, address: str) -> None:
        self._address = f"\0{address[1:]}" if address.startswith("@") else address

    def keep(self, worker: str, pipe: int) -> None:
        """Leave a pipe there.

        FDPOLL=0: systemd would drop it as soon as its other end is closed, with what is still unread in it.
        """
        self._tell(f"FDSTORE=1\nFDNAME={_PREFIX}{worker}\nFDPOLL=0", [pipe])

    def drop(self, worker: str) -> None:
        """Have it closed there."""
        self._tell(f"FDSTOREREMOVE=1\nFDNAME={_PREFIX}{worker}", [])

    def _tell(self, state: str, descriptors: list[int]) -> None:
        if not self._address:
            return
        with (
            socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as sock,
            contextlib.suppress(OSError),  # a full or absent socket costs the next restart some lines, never the worker
        ):
            sock.connect(self._address)
            socket.send_fds(sock, [state.encode()], descriptors)
