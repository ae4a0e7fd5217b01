"""After the upgrade: bytes relayed as they are, both ways, with an eye on frame headers only."""

import asyncio
from collections.abc import Callable
from typing import Final

_MOST_AT_ONCE: Final = 8192  # frames in what the loop reads at once: as with chunks, more would keep everybody waiting
_GOING_AWAY: Final = b"\x88\x02\x03\xe9"  # a server's Close frame, status 1001


class FrameScanner:
    """Follows one direction of a WebSocket, however its bytes are split, without looking at payloads."""

    __slots__ = ("_header", "_lost", "_skip", "between_frames")

    def __init__(self) -> None:
        self._lost = False  # there were too many frames to follow
        self._header = b""  # the beginning of a frame header
        self._skip = 0  # payload bytes still to come
        self.between_frames = True  # the bytes seen so far end where a frame ends

    def scan(self, data: bytes) -> bool:
        """Take the next bytes; return whether a data frame (text, binary, continuation) begins in them.

        Where there are too many frames to be followed, everything counts as data from then on.
        """
        if self._lost:
            return True
        size = len(data)
        at = self._skip
        seen = False
        frames = 0
        while at < size:
            frames += 1
            if frames > _MOST_AT_ONCE:
                self._lost, self.between_frames = True, False
                return True
            begun = len(self._header)
            header = self._header + data[at : at + 14 - begun]
            length = _header_length(header)
            if length > len(header):
                self._header = header
                at = size
                break
            self._header = b""
            at += length - begun + _payload_length(header)
            seen = seen or header[0] & 15 < 3
        self._skip = at - size
        self.between_frames = at == size and not self._header
        return seen


def _header_length(header: bytes) -> int:
    if len(header) < 2:
        return 2
    size = header[1] & 127
    return 2 + (0 if size < 126 else 2 if size == 126 else 8) + (4 if header[1] & 128 else 0)


def _payload_length(header: bytes) -> int:
    size = header[1] & 127
    if size < 126:
        return size
    return int.from_bytes(header[2:4] if size == 126 else header[2:10], "big")


class Tunnel:
    """Two transports joined; ends when either side leaves. `message` hears of the visitor's data frames."""

    __slots__ = ("_buffered", "_ended", "_leaving", "_open", "_stalled", "_visitor", "_worker")

    def __init__(
        self,
        visitor: asyncio.Transport,
        worker: asyncio.Transport,
        message: Callable[[], None],
        ended: Callable[[], None],
    ) -> None:
        self._visitor = _End(self, visitor, worker, message)
        self._worker = _End(self, worker, visitor, None)
        self._ended = ended
        self._open = 2
        self._leaving = False
        self._buffered = (0, 0)
        self._stalled = 0

    def start(self, from_visitor: bytes, from_worker: bytes) -> None:
        """Take both transports over, first passing on what came glued to the handshake."""
        self._visitor.transport.set_protocol(self._visitor)
        self._worker.transport.set_protocol(self._worker)
        if from_worker:
            self._worker.data_received(from_worker)
        if from_visitor:
            self._visitor.data_received(from_visitor)

    def abort(self) -> None:
        """End both sides at once."""
        self._visitor.transport.abort()
        self._worker.transport.abort()

    def go_away(self) -> None:
        """End because the server stops: with a Close frame (1001) where the worker's last frame is whole."""
        if self._leaving or self._visitor.transport.is_closing():
            return
        self._leaving = True
        self._worker.transport.abort()
        if self._worker.scanner.between_frames:
            self._visitor.transport.write(_GOING_AWAY)
        self._visitor.discard_input()
        self._visitor.transport.write_eof()

    def tick(self, stall_ticks: int) -> None:
        """Break off when what is buffered for one side has not moved for `stall_ticks` calls."""
        buffered = (
            self._visitor.transport.get_write_buffer_size(),
            self._worker.transport.get_write_buffer_size(),
        )
        stuck = any(now and now == before for now, before in zip(buffered, self._buffered, strict=True))
        self._buffered = buffered
        self._stalled = self._stalled + 1 if stuck or self._leaving else 0
        if self._stalled > stall_ticks:
            self.abort()

    def lost(self, other: asyncio.Transport) -> None:
        """One side is gone: close the other after what is buffered for it."""
        self._open -= 1
        if not self._open:
            self._ended()
        elif not self._leaving:
            other.close()


class _End(asyncio.Protocol):
    """One side of a tunnel: what it sends goes to the other."""

    __slots__ = ("_message", "_other", "_tunnel", "_write", "scanner", "transport")

    def __init__(
        self, tunnel: Tunnel, transport: asyncio.Transport, other: asyncio.Transport, message: Callable[[], None] | None
    ) -> None:
        self.transport = transport
        self._tunnel = tunnel
        self._other = other
        self._write: Callable[[bytes], None] = other.write
        self.scanner = FrameScanner()
        self._message = message

    def discard_input(self) -> None:
        self._write = _discard

    def data_received(self, data: bytes) -> None:
        self._write(data)
        size = len(data)
        second = data[1] if size > 1 else 126  # mask bit and length
        # nearly every read is one small frame from its first byte to its last: spare it the scanner
        if (
            size == (second - 122 if second > 127 else second + 2)
            and second & 127 < 126
            and self.scanner.between_frames
        ):
            seen = data[0] & 15 < 3
        else:
            seen = self.scanner.scan(data)
        if seen and self._message is not None:
            self._message()

    def pause_writing(self) -> None:
        if not self._other.is_closing():
            self._other.pause_reading()

    def resume_writing(self) -> None:
        if not self._other.is_closing():
            self._other.resume_reading()

    def connection_lost(self, error: Exception | None) -> None:  # noqa: ARG002 - either end of either kind ends both
        self._tunnel.lost(self._other)


def _discard(data: bytes) -> None:
    """Drop what a visitor still sends after the server's farewell."""
