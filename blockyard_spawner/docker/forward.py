"""What a worker writes, moved from the engine to the API's pipe.

The engine keeps it in a bounded log of its own, so nothing is lost while nobody reads the pipe, or while this helper
is away: which piece was the last is written down, and reading goes on after it.
"""

import asyncio
import contextlib
import fcntl
import os
from collections.abc import Callable

from blockyard_spawner.docker.engine import Engine
from blockyard_spawner.protocol import Refused

_PIPE = 1 << 20  # bytes: as much as an ordinary user may ask for
_AGAIN = 0.2  # seconds
_WIDTH = 96  # bytes of a position's file
_BEFORE = 2  # seconds by which a line may be later in the engine's log than one that was stamped after it


class Position:
    """Which piece of a worker's output was moved last, kept in a file; a missing one is the beginning.

    It is known by its time and by how many of that time came before it: the parts of a long line share one, and some
    engines tell seconds alone. Times do not only grow: an engine's two readers, of standard output and error, stamp a
    line before they queue it, and a busy machine lets them pass each other.
    """

    def __init__(self, path: str) -> None:
        self._path, self._moment, self._count, self._newest = path, "", 0, ""
        with contextlib.suppress(FileNotFoundError, ValueError), open(path, encoding="ascii") as file:
            moment, count, newest = file.read().split()
            _earlier(moment), _earlier(newest)  # one that is none is a ValueError
            self._moment, self._count, self._newest = moment, int(count), newest

    @property
    def since(self) -> str:
        """Where to go on reading: a little before the last piece."""
        return _earlier(self._moment) if self._moment else "0"

    def unmoved(self) -> Callable[[str], bool]:
        """Return a function that tells of each piece from `since` on, in the engine's order, whether to move it.

        Up to the last one that was moved, none is; nor while times are no newer than the newest, so that nothing is
        moved twice where the engine has dropped that piece meanwhile.
        """
        left, moment, newest = self._count, self._moment, self._newest

        def is_unmoved(of: str) -> bool:
            nonlocal left
            if of > newest:
                left = 0
            if not left:
                return True
            left -= of == moment
            return False

        return is_unmoved

    def advance(self, moment: str) -> None:
        """Note that a piece of this time was moved.

        Where an app has filled the file system, it cannot be written down, and after a restart it is moved again.
        """
        self._count = self._count + 1 if moment == self._moment else 1
        self._moment, self._newest = moment, max(self._newest, moment)
        with contextlib.suppress(OSError):
            descriptor = os.open(self._path, os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC, 0o600)
            try:
                line = f"{moment} {self._count} {self._newest}"
                os.pwrite(descriptor, line.ljust(_WIDTH).encode(), 0)  # always over all of the last
            finally:
                os.close(descriptor)


def _earlier(moment: str) -> str:
    """Return a time before another, both ``seconds.nanoseconds``. Raises ValueError."""
    seconds, nanoseconds = moment.split(".")
    return f"{int(seconds) - _BEFORE}.{int(nanoseconds):09}"


async def forward(engine: Engine, container: str, pipe: int, position: Position, ended: Callable[[], bool]) -> None:
    """Move output until the container has ended and all of it is moved, or nobody has the pipe's other end any more."""
    os.set_blocking(pipe, False)
    with contextlib.suppress(OSError):  # the user has many pipes already
        fcntl.fcntl(pipe, fcntl.F_SETPIPE_SZ, _PIPE)
    with contextlib.suppress(BrokenPipeError):
        while True:
            last = ended()  # before the look: what comes after the end is nothing
            is_unmoved = position.unmoved()
            try:
                async for moment, data in engine.output(container, position.since):
                    if is_unmoved(moment):
                        await _write(pipe, data)
                        position.advance(moment)
            except Refused as error:
                last = last and getattr(error, "status", 0) == 404
            if last:
                return
            await asyncio.sleep(_AGAIN)


async def _write(pipe: int, data: bytes) -> None:
    loop = asyncio.get_running_loop()
    while data:
        try:
            data = data[os.write(pipe, data) :]
        except BlockingIOError:
            writable = asyncio.Event()
            loop.add_writer(pipe, writable.set)
            try:
                await writable.wait()
            finally:
                loop.remove_writer(pipe)
