"""The service manager's side of a daemon's life: readiness, the watchdog, passed sockets, and kept descriptors."""

import socket
from collections.abc import MutableMapping

import sdnotify

from blockyard_spawner.docker import keeping


def take_passed(environ: MutableMapping[str, str]) -> tuple[list[socket.socket], dict[str, int]]:
    """Return the listening sockets that systemd passed, in its order, and the kept log pipes by worker.

    See sd_listen_fds(3). The variables are removed, so that no child takes them for its own.
    """
    listening, pipes = keeping.take_passed(environ)
    return [socket.socket(fileno=descriptor) for descriptor in listening], pipes


class ServiceManager:
    """systemd, if this process was started by it; otherwise every call does nothing."""

    def __init__(self, environ: MutableMapping[str, str]) -> None:
        """Take ``NOTIFY_SOCKET`` out of the environment, once sdnotify has read it: no child is to speak for us."""
        address = environ.get("NOTIFY_SOCKET", "")
        self._keeper = keeping.Keeper(address)
        self._notifier = sdnotify.SystemdNotifier() if address else None
        environ.pop("NOTIFY_SOCKET", None)

    def say(self, state: str) -> None:
        """Send one state, such as ``READY=1``."""
        if self._notifier is not None:
            self._notifier.notify(state)

    def keep_log(self, worker_id: str, descriptor: int) -> None:
        """Leave a log pipe's read end with systemd, so that a restart of this daemon loses no byte."""
        self._keeper.keep(worker_id, descriptor)

    def drop_log(self, worker_id: str) -> None:
        """Let systemd close what `keep_log` left with it."""
        self._keeper.drop(worker_id)
