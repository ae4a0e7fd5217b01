"""An engine that has its faults: it kills the helper after any number of answers, hangs up, or takes its time."""

import contextlib
import os
import re
import signal
import socket
import threading
import time
from pathlib import Path

from running_engine import Dockerd


class InterruptingEngine:
    """A socket between a helper and its engine."""

    def __init__(self, engine: Dockerd, path: Path) -> None:
        self.path, self._engine = path, engine
        self._listener = socket.socket(socket.AF_UNIX)
        self._listener.bind(str(path))
        path.chmod(0o660)
        os.chown(path, 0, engine.group)
        self._listener.listen()
        self._lock = threading.Lock()
        self._left, self._victim, self._struck = 0, 0, False
        self._fault: tuple[re.Pattern[bytes], float | None] | None = None
        self.met = threading.Event()  # the fault was
        threading.Thread(target=self._serve, daemon=True).start()

    def strike(self, pid: int, after: int) -> None:
        """Kill a process when the engine has given so many more answers, the last of which it does not get."""
        with self._lock:
            self._left, self._victim, self._struck = after, pid, False

    def spare(self) -> bool:
        """Kill nobody any more; return whether somebody was killed."""
        with self._lock:
            struck, self._left, self._struck = self._struck, 0, False
            return struck

    def err(self, request: str, seconds: float | None = None) -> None:
        """Hang up on the next request that begins like this, or pass it on so much later."""
        self.met.clear()
        self._fault = re.compile(request.encode()), seconds

    def close(self) -> None:
        self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()

    def _serve(self) -> None:
        with contextlib.suppress(OSError):  # closed
            while True:
                helper, _ = self._listener.accept()
                engine = socket.socket(socket.AF_UNIX)
                engine.connect(str(self._engine.socket))
                for pump in ((helper, engine, False), (engine, helper, True)):
                    threading.Thread(target=self._pump, args=pump, daemon=True).start()

    def _pump(self, source: socket.socket, sink: socket.socket, answers: bool) -> None:
        with contextlib.suppress(OSError):
            while data := source.recv(65536):
                if answers and data.startswith(b"HTTP/1.") and self._is_the_last():
                    break
                if not answers and self._fault and self._fault[0].match(data):
                    (_, seconds), self._fault = self._fault, None
                    self.met.set()
                    if seconds is None:
                        break
                    time.sleep(seconds)
                sink.sendall(data)
        for end in (source, sink):
            with contextlib.suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)

    def _is_the_last(self) -> bool:
        with self._lock:
            self._left -= 1  # below zero, nobody is in danger
            if self._left or self._struck:
                return self._struck
            os.kill(self._victim, signal.SIGKILL)
            self._struck = True
            return True
