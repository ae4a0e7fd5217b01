"""What a process uses, before and after."""

import os
import time
from pathlib import Path

_SETTLES_WITHIN = 10.0  # seconds


class Watch:
    """Remembers a process's memory and descriptors once it is warm; afterwards neither may have grown."""

    def __init__(self, pid: int) -> None:
        self._pid = pid
        self.remember()

    def remember(self) -> None:
        """Take what is used now as what it may use."""
        self._memory = self._resident()
        self._descriptors = self._open()

    def holds(self, more: int) -> None:
        """Fail unless memory is within `more` kilobytes of what it was, and the descriptors have not become more."""
        end = time.monotonic() + _SETTLES_WITHIN
        while (found := self._open()) > self._descriptors and time.monotonic() < end:
            time.sleep(0.1)
        assert found <= self._descriptors, f"{found} descriptors are open, and were {self._descriptors}"
        grown = self._resident() - self._memory
        assert grown < more, f"{grown} KB more are used than at first"

    def _resident(self) -> int:
        status = Path(f"/proc/{self._pid}/status").read_text()
        return int(status.partition("VmRSS:")[2].split()[0])

    def _open(self) -> int:
        return len(os.listdir(f"/proc/{self._pid}/fd"))
