"""A service manager that keeps descriptors over a restart, as systemd does."""

import os
import socket
import threading

from docker_helper import DockerHelper


class KeepingManager:
    """What systemd does with descriptors: takes them at NOTIFY_SOCKET, and passes them to the next start."""

    def __init__(self, docker: DockerHelper) -> None:
        self.kept: dict[str, int] = {}
        address = docker.root / "notify.sock"
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self._socket.bind(str(address))
        address.chmod(0o666)
        self._listener = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._listener.bind(str(docker.socket))
        docker.socket.chmod(0o666)
        self._listener.listen()
        docker.manager = self
        self.environment = {"NOTIFY_SOCKET": str(address)}
        self._thread = threading.Thread(target=self._take, daemon=True)
        self._thread.start()

    def _take(self) -> None:
        while True:
            try:
                data, descriptors, _, _ = socket.recv_fds(self._socket, 4096, 4)
            except OSError:
                return
            fields = dict(line.split("=", 1) for line in data.decode().splitlines() if "=" in line)
            name = fields.get("FDNAME", "")
            if "FDSTORE" in fields:
                os.set_inheritable(descriptors[0], False)  # recv_fds takes no flag for it
                self.kept[name] = descriptors[0]
            elif "FDSTOREREMOVE" in fields and name in self.kept:
                os.close(self.kept.pop(name))

    def passed(self) -> list[tuple[str, int]]:
        return [("blockyard-spawner-docker.socket", self._listener.fileno()), *self.kept.items()]

    def close(self) -> None:
        for descriptor in self.kept.values():
            os.close(descriptor)
        self.kept.clear()
