"""What a worker writes, moved from the engine to the API's pipe.

The engine keeps it in a bounded log of its own, so nothing is lost while nobody reads the pipe, or while this helper
is away: the last line's time is written down, and reading goes on after it.
"""

import asyncio
import contextlib
import fcntl
import os
from collections.abc import Callable
from datetime import UTC, datetime

from blockyard_spawner.docker.engine import Engine
from blockyard_spawner.protocol import Refused

_PIPE = 1 << 20  # bytes: as much as an ordinary user may ask for
_AGAIN = 0.2  # seconds
_WIDTH = 64  # bytes of a position's file


class Position:
    """How far a worker's output was moved, kept in a file; a missing one is the beginning.

    The parts of a long line have one and the same time, so the time alone does not tell how far.
    """

    def __init__(self, path: str) -> None:
        self._path, self.moment, self.count = path, "", 0
        with contextlib.suppress(FileNotFoundError, ValueError), open(path, encoding="ascii") as file:
            moment, count = file.read().split()
            instant(moment)  # one that is none is a ValueError
            self.moment, self.count = moment, int(count)

    @property
    def since(self) -> str:
        """Where to go on reading: what has this time may be there already, `count` times."""
        return instant(self.moment) if self.moment else "0"

    def advance(self, moment: str) -> None:
        """Note that a piece of this time was moved.

        Where an app has filled the file system, it cannot be written down, and after a restart it is moved again.
        """
        self.count = self.count + 1 if moment == self.moment else 1
        self.moment = moment
        with contextlib.suppress(OSError):
            descriptor = os.open(self._path, os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC, 0o600)
            try:
                os.pwrite(descriptor, f"{moment} {self.count}".ljust(_WIDTH).encode(), 0)  # always over all of the last
            finally:
                os.close(descriptor)


def instant(moment: str) -> str:
    """Turn the engine's time (RFC 3339, up to nanoseconds) into ``seconds.nanoseconds``."""
    whole, _, rest = moment.partition(".")
    digits = "".join(character for character in rest if character.isdigit())[:9].ljust(9, "0")
    return f"{int(datetime.fromisoformat(whole[:19]).replace(tzinfo=UTC).timestamp())}.{digits}"


async def forward(engine: Engine, container: str, pipe: int, position: Position, ended: Callable[[], bool]) -> None:
    """Move output until the container has ended and all of it is moved, or nobody has the pipe's other end any more."""
    os.set_blocking(pipe, False)
    with contextlib.suppress(OSError):  # the user has many pipes already
        fcntl.fcntl(pipe, fcntl.F_SETPIPE_SZ, _PIPE)
    with contextlib.suppress(BrokenPipeError):
        while True:
            last = ended()  # before the look: what comes after the end is nothing
            begun, known = position.moment, position.count
            try:
                async for moment, data in engine.output(container, position.since):
                    if moment == begun and known:
                        known -= 1
                        continue
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
