"""What a worker writes, moved from the engine to the API's pipe.

The engine keeps it in a bounded log of its own, so nothing is lost while nobody reads the pipe, or while this helper
is away: which piece was the last is written down, and reading goes on after it. What comes faster than a rate is
dropped, and said so in a line.
"""

import asyncio
import contextlib
import fcntl
import os
import select
import time
from collections.abc import Callable
from typing import Self

from blockyard_spawner.docker.engine import Engine, Output
from blockyard_spawner.protocol import Refused

RATE = 2 << 20  # bytes a second: twice what the API keeps, so that it, too, sees who writes too much
BURST = 16 << 20  # bytes at once before that: more than the engine keeps, so no restart of this helper drops a line
_TIMED = 40  # bytes that the engine sends with each piece: the shortest lines take the most work
_QUIET = 1.0  # seconds without output after which a flood is over
_PIPE = 1 << 20  # bytes: as much as an ordinary user may ask for
_WHOLE = select.PIPE_BUF  # bytes that a pipe takes at once or not at all
_AGAIN, _AGAIN_AT_MOST = 0.2, 2.0  # seconds
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
        self._descriptor = -1
        with contextlib.suppress(FileNotFoundError, ValueError), open(path, encoding="ascii") as file:
            moment, count, newest = file.read().split()
            _earlier(moment), _earlier(newest)  # one that is none is a ValueError
            self._moment, self._count, self._newest = moment, int(count), newest

    def __enter__(self) -> Self:
        """Keep its file open, and its place in the file system before an app fills that."""
        with contextlib.suppress(OSError):
            self._descriptor = os.open(self._path, os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC, 0o600)
            os.posix_fallocate(self._descriptor, 0, _WIDTH)
        return self

    def __exit__(self, *_: object) -> None:
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1

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
        """Note that a piece of this time was moved, or is about to be."""
        self._count = self._count + 1 if moment == self._moment else 1
        self._moment, self._newest = moment, max(self._newest, moment)

    def written(self) -> bytes:
        """Return what to write down of it."""
        return f"{self._moment} {self._count} {self._newest}".ljust(_WIDTH).encode()  # always over all of the last

    def write_down(self, written: bytes) -> None:
        """Keep a position for the next start.

        Where that cannot be, the log goes on all the same, and after a restart some of it is moved again.
        """
        with contextlib.suppress(OSError):
            os.pwrite(self._descriptor, written, 0)


class _Flow:
    """What of a worker's output is moved: RATE for ever, and BURST at once after a silence."""

    def __init__(self) -> None:
        self._left, self._since, self._spent = float(BURST), time.monotonic(), False
        self._within_line = False
        self.dropped = 0  # bytes of which no line has told yet

    def refill(self) -> None:
        """Let more pass, as time does."""
        now = time.monotonic()
        self._left = min(BURST, self._left + (now - self._since) * RATE)
        self._since = now

    def passed(self, data: bytes) -> bytes:
        """Return what to move for a piece: nothing, or it, after a line that tells what was dropped before it.

        Once one was dropped, all are until there is room for a second's.
        """
        size = len(data) + _TIMED
        self._spent = self._left < (RATE if self._spent else size)
        if self._spent:
            self.dropped += len(data)
            return b""
        self._left -= size
        told = self.told()
        self._within_line = not data.endswith(b"\n")
        return told + data

    def told(self) -> bytes:
        """Return a line that tells what was dropped since the last such line; nothing if nothing was."""
        if not self.dropped:
            return b""
        moment, begun = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()), "\n" * self._within_line
        # "At least": of what comes faster than it is read, the engine's own log forgets the oldest.
        line = f"at least {self.dropped} bytes were dropped: with each line's time, more than {RATE >> 20} MB a second"
        self.dropped, self._within_line = 0, False
        return f"{begun}[blockyard {moment}] {line}\n".encode()


def _earlier(moment: str) -> str:
    """Return a time before another, both ``seconds.nanoseconds``. Raises ValueError."""
    seconds, nanoseconds = moment.split(".")
    return f"{int(seconds) - _BEFORE}.{int(nanoseconds):09}"


async def forward(engine: Engine, container: str, pipe: int, position: Position, ended: Callable[[], bool]) -> None:
    """Move output until the container has ended and all of it is moved, or nobody has the pipe's other end any more."""
    os.set_blocking(pipe, False)
    with contextlib.suppress(OSError):  # the user has many pipes already
        fcntl.fcntl(pipe, fcntl.F_SETPIPE_SZ, _PIPE)
    flow, pause = _Flow(), _AGAIN
    with contextlib.suppress(BrokenPipeError), position:
        while True:
            last = ended()  # before the look: what comes after the end is nothing
            try:
                async with engine.output(container, position.since) as output:
                    await _move(engine, output, pipe, position, flow)
            except Refused as error:
                last = last and getattr(error, "status", 0) == 404
                pause = min(2 * pause, _AGAIN_AT_MOST)  # not all workers ask one that is away five times a second
            else:
                pause = _AGAIN
            if last:
                await _write(pipe, flow.told())
                return
            await asyncio.sleep(pause)


async def _move(engine: Engine, output: Output, pipe: int, position: Position, flow: _Flow) -> None:
    is_unmoved = position.unmoved()
    while await output.more(_QUIET if flow.dropped else None):
        async with engine.turns.take():
            batches = _batches(output.pieces(), is_unmoved, position, flow)
        for data, written in batches:
            await _write(pipe, data)
            position.write_down(written)


def _batches(
    pieces: list[tuple[str, bytes]], is_unmoved: Callable[[str], bool], position: Position, flow: _Flow
) -> list[tuple[bytes, bytes]]:
    """Put pieces together for the pipe, each batch with the position after it.

    A batch is moved whole or not at all, so that one of several pieces is never in part: a helper that is killed while
    it waits for room in the pipe has moved what it has written down.
    """
    flow.refill()
    found, batch = [], flow.told() if flow.dropped and not pieces else b""
    for moment, data in pieces:
        if is_unmoved(moment):
            passed = flow.passed(data)
            if batch and len(batch) + len(passed) > _WHOLE:
                found.append((batch, position.written()))
                batch = b""
            batch += passed
            position.advance(moment)
    if batch or pieces:
        found.append((batch, position.written()))
    return found


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
