"""Chunked bodies: a strict decoder that knows where the body ends, and the encoder. No I/O."""

import re
from typing import Final

LAST_CHUNK: Final = b"0\r\n\r\n"

_MAX_LINE: Final = 4096
_MAX_TRAILER: Final = 16384
# Chunks in what the loop reads at once (uvloop: 256 KB). Each costs 2 µs: a flood of single bytes would keep everybody
# waiting for a tenth of a second, again and again.
_MOST_AT_ONCE: Final = 8192
_SIZE: Final = re.compile(rb"([0-9A-Fa-f]{1,15})(?:[ \t]*;[\t\x20-\x7e\x80-\xff]*)?")
_TRAILER: Final = re.compile(rb"[!#$%&'*+.^_`|~0-9A-Za-z-]+:[\t\x20-\x7e\x80-\xff]*")


class BadBody(Exception):
    """A chunked body whose framing is broken."""


class ChunkedDecoder:
    """Takes a chunked body apart, however it is split; extensions and trailers are checked and dropped."""

    __slots__ = ("_after_data", "_held", "_in_trailer", "_left", "_trailer_size", "done")

    def __init__(self) -> None:
        self.done = False
        self._held = b""  # the beginning of a line
        self._left = 0  # of the chunk at hand
        self._after_data = False
        self._in_trailer = False
        self._trailer_size = 0

    def feed(self, data: bytes) -> tuple[list[bytes], bytes]:
        """Return the payload in `data` piece by piece, and the bytes after the body's end. Raises BadBody."""
        if self._held:
            data, self._held = self._held + data, b""
        pieces: list[bytes] = []
        at = 0
        while not self.done:
            if self._left:
                piece = data[at : at + self._left]
                if not piece:
                    break
                pieces.append(piece)
                if len(pieces) > _MOST_AT_ONCE:
                    raise BadBody("The chunks are too small.")
                at += len(piece)
                self._left -= len(piece)
                self._after_data = not self._left
                continue
            end = data.find(b"\r\n", at, at + _MAX_LINE)
            if end < 0:
                self._hold(data[at:])
                return pieces, b""
            self._line(data[at:end])
            at = end + 2
        return pieces, data[at:] if self.done else b""

    def _hold(self, begun: bytes) -> None:
        if len(begun) >= _MAX_LINE or b"\n" in begun or (self._after_data and begun not in (b"", b"\r")):
            raise BadBody("A line in the chunked body is malformed.")
        self._held = begun

    def _line(self, line: bytes) -> None:
        if self._after_data:
            if line:
                raise BadBody("A chunk is longer than its size.")
            self._after_data = False
        elif self._in_trailer:
            self._trailer_size += len(line)
            if line and (self._trailer_size > _MAX_TRAILER or not _TRAILER.fullmatch(line)):
                raise BadBody("A trailer is malformed, or there are too many.")
            self.done = not line
        else:
            size = _SIZE.fullmatch(line)
            if size is None:
                raise BadBody("A chunk size is malformed.")
            self._left = int(size[1], 16)
            self._in_trailer = not self._left


def chunk(piece: bytes) -> bytes:
    """Wrap one non-empty piece."""
    return b"%x\r\n%b\r\n" % (len(piece), piece)
