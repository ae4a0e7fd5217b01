"""The service manager's side of a daemon's life: readiness, the watchdog, passed sockets, and kept descriptors."""

import contextlib
import os
import socket
from collections.abc import MutableMapping

import sdnotify

_FIRST = 3  # SD_LISTEN_FDS_START


def take_passed(environ: MutableMapping[str, str]) -> tuple[list[socket.socket], dict[str, int]]:
    """Return the listening sockets that systemd passed, in its order, and the kept descriptors by name.

    See sd_listen_fds(3). The variables are removed, so that no child takes them for its own.
    """
    count = int(environ.pop("LISTEN_FDS", "0"))
    names = environ.pop("LISTEN_FDNAMES", "").split(":")
    if environ.pop("LISTEN_PID", "") != str(os.getpid()):
        return [], {}
    listening: list[socket.socket] = []
    kept: dict[str, int] = {}
    for index in range(count):
        descriptor = _FIRST + index
        os.set_inheritable(descriptor, False)
        name = names[index] if index < len(names) else ""
        if name.startswith(LOG_PREFIX):
            kept[name.removeprefix(LOG_PREFIX)] = descriptor
        else:
            listening.append(socket.socket(fileno=descriptor))
    return listening, kept


LOG_PREFIX = "log-"


class ServiceManager:
    """systemd, if this process was started by it; otherwise every call does nothing."""

    def __init__(self, environ: MutableMapping[str, str]) -> None:
        """Take ``NOTIFY_SOCKET`` out of the environment, once sdnotify has read it: no child is to speak for us."""
        self._address = environ.get("NOTIFY_SOCKET", "")
        self._notifier = sdnotify.SystemdNotifier() if self._address else None
        environ.pop("NOTIFY_SOCKET", None)

    def say(self, state: str) -> None:
        """Send one state, such as ``READY=1``."""
        if self._notifier is not None:
            self._notifier.notify(state)

    def keep_log(self, worker_id: str, descriptor: int) -> None:
        """Leave a log pipe's read end with systemd, so that a restart of this daemon loses no byte.

        FDPOLL=0: systemd would drop it as soon as the worker ends, with what is still unread in it.
        """
        self._store(f"FDSTORE=1\nFDNAME={LOG_PREFIX}{worker_id}\nFDPOLL=0", [descriptor])

    def drop_log(self, worker_id: str) -> None:
        """Let systemd close what `keep_log` left with it."""
        self._store(f"FDSTOREREMOVE=1\nFDNAME={LOG_PREFIX}{worker_id}", [])

    def _store(self, state: str, descriptors: list[int]) -> None:
        if self._notifier is None:
            return
        address = f"\0{self._address[1:]}" if self._address.startswith("@") else self._address
        # sdnotify sends no descriptors; a full or absent socket costs the store, never the worker
        with (
            socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as sock,
            contextlib.suppress(OSError),
        ):
            sock.connect(address)
            socket.send_fds(sock, [state.encode()], descriptors)
