"""What must hold of every input, whoever made it up: decoders without I/O, each with its oracle."""

import re
from collections.abc import Callable, Mapping

import h11

from blockyard_api.backends.spawner import encode
from blockyard_api.relay import head as heads
from blockyard_api.relay.body import LAST_CHUNK, BadBody, ChunkedDecoder, chunk
from blockyard_api.relay.gate import Forward
from blockyard_api.relay.head import BadHead
from blockyard_api.relay.websocket import FrameScanner
from blockyard_spawner import protocol

# Whatever spelling: what a visitor may never hand to a worker, and a worker never to a visitor.
NEVER_TO_A_WORKER = re.compile(
    r"(authorization|proxy-.*|proxy|te|trailer|keep-alive|forwarded|x-real-ip|http2-settings)"
)
OURS = {"x-shiny-access", "x-forwarded-for", "x-forwarded-proto", "x-forwarded-host", "x-forwarded-prefix"}
NEVER_TO_A_VISITOR = re.compile(
    r"(clear-site-data|strict-transport-security|service-worker-allowed|keep-alive|proxy-connection|te|trailer)"
)
_FORWARD = Forward(None, b"/target", b"/app/demo", ((b"X-Shiny-Access", b"anonymous"),), (), None)
_FORWARDED = b"X-Forwarded-For: 192.0.2.1\r\nX-Forwarded-Proto: http\r\nX-Forwarded-Host: demo\r\n"
_LINE = re.compile(rb"([!#$%&'*+.^_`|~0-9A-Za-z-]+): ?([\t\x20-\x7e\x80-\xff]*)")


def fields_of(head: bytes) -> tuple[bytes, list[tuple[str, str]]]:
    """Read a head as the strictest of readers would; anything ambiguous is an AssertionError."""
    assert head.endswith(b"\r\n\r\n"), head
    assert head.count(b"\r") == head.count(b"\n") == head.count(b"\r\n"), head
    assert b"\0" not in head, head
    first, *lines = head[:-4].split(b"\r\n")
    found = []
    for line in lines:
        match = _LINE.fullmatch(line)
        assert match, line
        found.append((match[1].decode().lower().replace("_", "-"), match[2].decode("latin-1").strip(" \t")))
    return first, found


def framing_of(fields: list[tuple[str, str]]) -> int | str | None:
    """Return a body's length, or "chunked", or None; two answers are an AssertionError."""
    told = [(name, value) for name, value in fields if name in ("content-length", "transfer-encoding")]
    assert len(told) <= 1, told
    if not told:
        return None
    name, value = told[0]
    if name == "transfer-encoding":
        assert value == "chunked", told
        return value
    assert re.fullmatch("[0-9]{1,18}", value), told
    return int(value)


def packet(data: bytes) -> None:
    """A packet is a request with exact types, or is refused; what is a request can be written and read again."""
    try:
        request = protocol.decode(data)
    except protocol.Refused as refused:
        told = refused
    else:
        assert type(request.seq) is int
        assert 0 <= request.seq < 2**53
        assert protocol.decode(encode(request)) == request
        return
    assert told.code == "malformed"  # the others are not the decoder's to say
    assert len(told.message) < 2000


def request_head(data: bytes) -> None:
    """A request head is refused, or what is written in its place has one meaning for whoever reads it."""
    try:
        request = heads.parse_request(data)
    except BadHead as bad:
        assert bad.status in (400, 417, 431, 501)  # noqa: PT017
        return
    _has_one_meaning(data)
    written = heads.request_head(request, _FORWARD, _FORWARDED)
    first, fields = fields_of(written)
    assert first == request.method + b" /target HTTP/1.1"
    names = [name for name, _ in fields]
    assert names.count("host") == 1
    for name in OURS:
        assert names.count(name) == 1, written
    assert not [name for name in names if NEVER_TO_A_WORKER.fullmatch(name)], written
    assert not [name for name in names if name.startswith(("x-shiny-", "x-forwarded-")) and name not in OURS], written
    assert "shiny-server-credentials" not in names
    for name, value in fields:
        assert name != "cookie" or not re.search(r"(^|;)[ \t=]*(__host-|__secure-)?blockyard_", value.lower()), written
    framing = framing_of(fields)
    assert (framing == "chunked") == request.chunked
    assert request.chunked or (framing or 0) == request.length
    if request.websocket:
        assert framing is None
        return
    other = h11.Connection(h11.SERVER, max_incomplete_event_size=1 << 20)
    other.receive_data(written)
    event = other.next_event()
    assert isinstance(event, h11.Request), (event, written)
    assert len(event.headers) == len(fields)


def _has_one_meaning(accepted: bytes) -> None:
    """Fail for a head that was accepted although somebody in front of us may have read it otherwise."""
    assert accepted.count(b"\r") == accepted.count(b"\n") == accepted.count(b"\r\n"), accepted
    assert b"\0" not in accepted, accepted
    names, lengths = [], []
    for line in accepted.removesuffix(b"\r\n\r\n").split(b"\r\n")[1:]:
        name, colon, value = line.partition(b":")
        assert colon, accepted
        assert not re.search(rb"[^!#$%&'*+.^_`|~0-9A-Za-z-]", name), accepted
        names.append(name.lower())
        lengths += [value.strip(b" \t")] if names[-1] == b"content-length" else []
    assert names.count(b"content-length") + names.count(b"transfer-encoding") <= 1, accepted
    assert names.count(b"host") <= 1, accepted
    assert all(value.isdigit() for value in lengths), accepted


def response_head(data: bytes) -> None:
    """A response head is refused, or what is written in its place has one meaning for whoever reads it."""
    try:
        response = heads.parse_response(data)
    except BadHead:
        return
    assert 100 <= response.status <= 999
    first, fields = fields_of(heads.response_head(response, (), b""))
    assert first.startswith(b"HTTP/1.1 %d" % response.status)
    names = [name for name, _ in fields]
    assert not {"content-length", "transfer-encoding", "connection", "upgrade"} & {*names}
    assert not [name for name in names if NEVER_TO_A_VISITOR.fullmatch(name)]
    for name, value in fields:
        assert name != "set-cookie" or not re.match(r"[ \t=]*(__host-|__secure-)?blockyard_", value.lower()), value
    assert not (response.chunked and response.length is not None)


def _dechunked(pieces: list[bytes]) -> tuple[bytes, bytes] | None:
    decoder, body, rest = ChunkedDecoder(), b"", b""
    try:
        for piece in pieces:
            if decoder.done:
                rest += piece
            else:
                found, rest = decoder.feed(piece)
                body += b"".join(found)
    except BadBody:
        return None
    return (body, rest) if decoder.done else (body, b"unfinished")


def chunked_body(data: bytes) -> None:
    """However a chunked body is split, it is the same body; written again, it is read the same."""
    whole = _dechunked([data])
    assert _dechunked([data[at : at + 1] for at in range(len(data))]) == whole
    size = 1 + len(data) // 3
    assert _dechunked([data[at : at + size] for at in range(0, len(data), size)]) == whole
    if whole is not None and whole[0]:
        assert _dechunked([chunk(whole[0]) + LAST_CHUNK + b"next"]) == (whole[0], b"next")


def frames(data: bytes) -> None:
    """However a WebSocket's bytes are split, they hold the same frames."""
    whole, bytewise = FrameScanner(), FrameScanner()
    seen = whole.scan(data)
    assert seen == (sum(bytewise.scan(data[at : at + 1]) for at in range(len(data))) > 0)
    assert whole.between_frames == bytewise.between_frames


_HEADS: tuple[Callable[[bytes], None], ...] = (request_head, response_head, chunked_body, frames)


def head(data: bytes) -> None:
    """One of what the relay reads, chosen by the first byte."""
    if data:
        rest = data[1:]
        check = _HEADS[data[0] & 3]
        if check in (request_head, response_head):  # the relay looks for the end by itself
            end = rest.find(b"\r\n\r\n")
            if end < 0:
                return
            rest = rest[: end + 4]
        check(rest)


GUIDED: Mapping[str, Callable[[bytes], None]] = {"packets": packet, "heads": head}
