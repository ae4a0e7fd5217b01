"""What a worker ran into, in words for its owner: each limit once when it is first hit, and all of them on demand."""

from collections.abc import Iterator

from blockyard_api.host.accounting import Hits
from blockyard_api.settings import Process

_HELD_BACK = 10.0  # seconds without the processor after which it is told; four times as many, again
_OPEN_FILES = b"Too many open files"  # the C library's words, which every language passes on
_NO_SPACE = b"No space left on device"


class Limits:
    """One worker's limits, and what is known of its collisions with them."""

    def __init__(self, process: Process) -> None:
        self._process = process
        self._told_held_back = _HELD_BACK
        self._words: dict[bytes, str] = {}
        self.hits = Hits()
        self.held_back = 0.0  # seconds

    def heard(self, hits: Hits) -> Iterator[str]:
        """Take what the kernel says, and give what is new to the owner."""
        refused_before = self.hits.forks_refused
        self.hits = Hits(  # counters only grow; once the worker has ended they read as zero
            max(refused_before, hits.forks_refused),
            hits.process_limit or self.hits.process_limit,
            max(self.hits.memory_exhausted, hits.memory_exhausted),
            max(self.hits.memory_kills, hits.memory_kills),
        )
        if self.hits.forks_refused and not refused_before:
            yield self._processes()

    def saw(self, words: bytes) -> Iterator[str]:
        """Look at what the app wrote for the errors that its sandbox alone knows of, and explain each of them once."""
        for error, sentence in (
            (_NO_SPACE, f"ran out of room for files: its /tmp holds at most {self._process.tmp_size >> 20} MB"),
            (_OPEN_FILES, "could not open more files at once"),
        ):
            if error in words and error not in self._words:
                self._words[error] = sentence
                yield sentence

    def was_held_back(self, seconds: float) -> Iterator[str]:
        """Take for how long it had to wait for its share of the processor, and give what is new to the owner."""
        self.held_back = seconds
        if seconds >= self._told_held_back:
            self._told_held_back = seconds * 4
            yield self._processor()

    @property
    def server_was_full(self) -> bool:
        """Whether it was killed for memory although its own limit never stood against it."""
        return bool(self.hits.memory_kills) and not self.hits.memory_exhausted

    def before_its_end(self) -> str:
        """Word what may have led to an end, or nothing."""
        return f" after it {self._processes()}" if self.hits.forks_refused else ""

    def all(self, dropped: int) -> list[str]:
        """Word all that was hit so far; `dropped` bytes of its log are missing."""
        found = list(self._words.values())
        if self.hits.forks_refused:
            found.append(self._processes())
        if self.held_back >= 1:
            found.append(self._processor())
        if dropped:
            found.append(f"wrote more than is kept: {dropped} bytes of its log were dropped")
        return found

    def _processes(self) -> str:
        most = self.hits.process_limit or self._process.pids_limit
        return f"could not start more than {most} processes"

    def _processor(self) -> str:
        return f"had to wait {self.held_back:.0f} s for its share of the processor"
