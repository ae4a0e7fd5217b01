"""Workers' logs: read from their pipes without ever stopping, kept in two capped segments a worker, followed live.

A worker writes what it likes, so nothing here looks for lines: a reader with a line limit stops at the first long
line, the pipe fills, and R hangs.
"""

import asyncio
import contextlib
import logging
import os
import time
from collections.abc import AsyncIterator, Callable, Iterable, Iterator, Sequence
from pathlib import Path

SEGMENT = 5 << 20  # bytes; a log is at most two of them
RATE = 1 << 20  # bytes a second that are kept for ever: a person reads a thousandth of that
BURST = SEGMENT  # bytes that may come at once before that: what an app says at its start is kept whole
_CHUNK = 65536  # a pipe's capacity
_BREATH = 0.01  # seconds between two readings of what is dropped: a flood costs no processor, and no app waits longer
_QUIET = 1.0  # seconds without a byte after which a flood is over

_logger = logging.getLogger(__name__)


class WorkerLog:
    """One worker's log; positions count from its first byte ever, also when the oldest are gone."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._older = _older(path)
        self._base = 0  # position of the first byte in `_path`
        self._changed = asyncio.Event()
        self.closed = False
        self.dropped = 0  # bytes, since its worker wrote faster than RATE
        self._losing = False
        self._one_by_one = asyncio.Lock()  # the platform's lines come between the app's
        self._within_line = False
        with contextlib.suppress(OSError):  # an adopted worker's log goes on where it was
            self._base = self._older.stat().st_size
        self.end = self._base
        with contextlib.suppress(OSError):
            self.end += path.stat().st_size

    def _append(self, data: bytes) -> None:
        if self.end - self._base + len(data) > SEGMENT and self._path.exists():
            self._path.replace(self._older)
            self._base = self.end
        descriptor = os.open(self._path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            self.end += os.write(descriptor, data)
        finally:
            os.close(descriptor)

    async def append(self, data: bytes) -> None:
        """Add bytes and wake the followers; what cannot be stored is lost, since waiting would stop the app."""
        async with self._one_by_one:
            await self._store(data)

    async def note(self, sentence: str) -> None:
        """Add a line of the platform's own, at the start of a line whatever the app left unfinished."""
        async with self._one_by_one:
            await self._store(b"\n" * self._within_line + stamp(sentence))

    async def _store(self, data: bytes) -> None:
        self._within_line = not data.endswith(b"\n")
        try:
            await asyncio.to_thread(self._append, data)
        except OSError as error:
            if not self._losing:
                _logger.warning("%s loses what its worker writes: %s", self._path, error.strerror)
            self._losing = True
        else:
            self._losing = False
        self._wake()

    def close(self) -> None:
        """No more bytes will come."""
        self.closed = True
        self._wake()

    def _wake(self) -> None:
        self._changed.set()
        self._changed = asyncio.Event()

    def _read(self, position: int) -> tuple[int, bytes]:
        """Return up to one chunk at `position`, or at the first byte still kept after it."""
        if position < self._base:
            with contextlib.suppress(FileNotFoundError), self._older.open("rb") as older:
                start = self._base - os.fstat(older.fileno()).st_size
                position = max(position, start)
                older.seek(position - start)
                return position, older.read(_CHUNK)
            position = self._base
        with contextlib.suppress(FileNotFoundError), self._path.open("rb") as newer:
            newer.seek(position - self._base)
            return position, newer.read(_CHUNK)
        return position, b""

    async def read(self, *, follow: bool) -> AsyncIterator[bytes]:
        """Yield what there is, then, with `follow`, what comes until the worker has ended."""
        position = 0
        while True:
            changed = self._changed
            start, data = await asyncio.to_thread(self._read, position)
            if start > position and position:
                yield f"\n[{start - position} bytes were dropped]\n".encode()
            position = start + len(data)
            if data:
                yield data
            elif not follow or self.closed:
                return
            else:
                await changed.wait()

    async def tail(self, size: int = 2000) -> str:
        """Return the last bytes as text."""
        _, data = await asyncio.to_thread(self._read, max(self._base, self.end - size))
        return data.decode(errors="replace")


class Logs:
    """All workers' logs below one directory."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._open: dict[str, WorkerLog] = {}

    def of(self, worker_id: str) -> WorkerLog:
        """Return a worker's log; one that nobody writes any more is closed."""
        if worker_id in self._open:
            return self._open[worker_id]
        log = WorkerLog(self._path(worker_id))
        log.closed = True
        return log

    def grows(self, worker_id: str) -> bool:
        """Whether somebody writes this worker's log."""
        return worker_id in self._open

    def _path(self, worker_id: str) -> Path:
        return self._directory / f"{worker_id}.log"

    @contextlib.contextmanager
    def writing(self, worker_id: str) -> Iterator[WorkerLog]:
        """Open a worker's log for its whole life; followers end when it is left."""
        log = self._open[worker_id] = WorkerLog(self._path(worker_id))
        try:
            yield log
        finally:
            log.close()
            del self._open[worker_id]

    async def keep_within(self, newest_first: Sequence[str], most: int) -> None:
        """Delete the logs of those workers that do not fit into so many bytes, after newer ones."""
        await asyncio.to_thread(_keep_within, [self._path(worker_id) for worker_id in newest_first], most)

    async def prune(self, retention: float) -> None:
        """Delete the logs of ended workers to which nothing was added for `retention` seconds."""
        open_now = {self._path(worker_id) for worker_id in self._open}
        await asyncio.to_thread(_prune, self._directory, time.time() - retention, open_now)


def _keep_within(newest_first: Sequence[Path], most: int) -> None:
    used = 0
    for path in newest_first:
        for part in (path, _older(path)):
            with contextlib.suppress(OSError):  # there is none, or the disk is ill: no reason to end anything
                used += part.stat().st_size
                if used > most:
                    part.unlink()


def _older(path: Path) -> Path:
    return path.with_suffix(".1.log")


def _prune(directory: Path, older_than: float, keep: set[Path]) -> None:
    for path in directory.glob("*.log"):
        with contextlib.suppress(FileNotFoundError):
            if path not in keep and path.stat().st_mtime < older_than:
                path.unlink()


class _Allowance:
    """What a worker may write: RATE for ever, and BURST at once after a silence."""

    def __init__(self) -> None:
        self._left = float(BURST)
        self._since = time.monotonic()
        self._spent = False

    def take(self, size: int) -> int:
        """Return how many of `size` bytes are kept; once one was not, none is until there is room for a second's."""
        now = time.monotonic()
        self._left = min(BURST, self._left + (now - self._since) * RATE)
        self._since = now
        if self._spent and self._left < RATE:
            return 0
        kept = min(size, int(self._left))
        self._left -= kept
        self._spent = kept < size
        return kept


async def pump(descriptor: int, log: WorkerLog, notice: Callable[[bytes], Iterable[str]] = lambda _: ()) -> None:
    """Move bytes from a pipe's read end to a log until its writers are gone; closes the descriptor.

    What comes faster than RATE is read and dropped, and said so in one line. `notice` looks at what is kept, and
    returns what the platform has to say about it.
    """
    os.set_blocking(descriptor, False)
    allowance = _Allowance()
    dropped = 0
    try:
        while (data := await _next(descriptor, _QUIET if dropped else None)) != b"":
            kept = data[: allowance.take(len(data))] if data else b""
            if dropped and (kept or data is None):
                await _tell_dropped(log, dropped)
                dropped = 0
            if kept:
                await log.append(kept)
                for sentence in notice(kept):
                    await log.note(sentence)
            if data is not None and len(kept) < len(data):
                dropped += len(data) - len(kept)
                log.dropped += len(data) - len(kept)
                await asyncio.sleep(_BREATH)
        if dropped:
            await _tell_dropped(log, dropped)
    finally:
        os.close(descriptor)


async def _tell_dropped(log: WorkerLog, number: int) -> None:
    await log.note(f"{number} bytes were dropped: more than {RATE >> 20} MB a second")


async def _next(descriptor: int, patience: float | None) -> bytes | None:
    """Return what is in a pipe, b"" after its end, or None if nothing comes within `patience` seconds."""
    with contextlib.suppress(BlockingIOError):
        return os.read(descriptor, _CHUNK)
    loop = asyncio.get_running_loop()
    readable = asyncio.Event()
    loop.add_reader(descriptor, readable.set)
    try:
        async with asyncio.timeout(patience):
            await readable.wait()
    except TimeoutError:
        return None
    finally:
        loop.remove_reader(descriptor)
    return os.read(descriptor, _CHUNK)


def stamp(sentence: str) -> bytes:
    """Word a line of the platform's own for a log, so that it stands out from the app's."""
    return f"[blockyard {time.strftime('%Y-%m-%dT%H:%M:%SZ', time.gmtime())}] {sentence}\n".encode()
