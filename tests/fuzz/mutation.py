"""Inputs for parts that run in a process of their own: pieces that matter, put together and damaged, from one seed."""

import random
from collections.abc import Sequence

_BYTES = [
    b"\0",
    b"\r",
    b"\n",
    b"\r\n",
    b"\t",
    b" ",
    b":",
    b";",
    b",",
    b"\xff",
    b"\x7f",
    b"\x01",
    b"_",
    b"-",
    b"0",
    b"%00",
]


def damaged(chance: random.Random, data: bytes) -> bytes:
    """Return the bytes with a few of them cut out, doubled, changed or added."""
    for _ in range(chance.choice([0, 1, 1, 2, 3, 8])):
        at = chance.randrange(len(data) + 1)
        to = min(len(data), at + chance.choice([1, 1, 2, 8, 64]))
        match chance.randrange(5):
            case 0:
                data = data[:at] + data[to:]
            case 1:
                data = data[:to] + data[at:]
            case 2:
                data = data[:at] + chance.choice(_BYTES) + data[at:]
            case 3:
                data = data[:at] + chance.choice(_BYTES) + data[to:]
            case 4:
                data = data[:at] + chance.randbytes(to - at) + data[to:]
    return data


_TARGETS = ["/", "/x?y=1", "/a/../b", "//evil", "http://demo/x", "*", "/%00", "/\xe4", "/" + "a" * 5000, "demo:80"]
_METHODS = ["GET", "GET", "POST", "POST", "HEAD", "PUT", "OPTIONS", "DELETE", "CONNECT", "get", "PRI", "PATCH", "FOO"]
_FRAMINGS = [
    [], [], ["Content-Length: 5"], ["Content-Length: 0"], ["Content-Length: 5", "Content-Length: 5"],
    ["Content-Length: 5", "Content-Length: 6"], ["Content-Length: +5"], ["Content-Length: 5, 5"],
    ["Content-Length: 99999999999999999999"], ["Content-Length : 5"], ["content_length: 5"], ["Content-Length: 0x5"],
    ["Transfer-Encoding: chunked"], ["Transfer-Encoding: Chunked"], ["Transfer-Encoding: xchunked"],
    ["Transfer-Encoding: chunked, identity"], ["Transfer-Encoding: identity, chunked"], ["Transfer-Encoding:\tchunked"],
    ["Transfer-Encoding: chunked", "Transfer-Encoding: chunked"], ["Transfer-Encoding: chunked", "Content-Length: 5"],
    ["Content-Length: 5", "Transfer-Encoding: chunked"], ["Transfer_Encoding: chunked"], ["Transfer-Encoding : chunked"],
    ["Transfer-Encoding: gzip, chunked"], ["X: y\r\n Transfer-Encoding: chunked"], ["Transfer-Encoding: \x0bchunked"],
]  # fmt: skip
_OTHER = [
    "Connection: keep-alive", "Connection: close", "Connection: Upgrade", "Upgrade: websocket", "Upgrade: h2c",
    "Connection: X-Shiny-Access, X-Front, Host", "Connection: Content-Length", "X-Shiny-User: root", "X_Front: 1",
    "x_shiny_user: root", "X-Forwarded-For: 1.2.3.4", "Expect: 100-continue", "Expect: more", "Cookie: a=1; blockyard_r=2",
    "Authorization: Bearer x", "Host: demo", "Host: other", "TE: trailers", "Trailer: X", "Keep-Alive: timeout=9", "X:",
    ": y", "X y: z", "X\ty: z", "X: \x80\xff", "Accept: */*", "Sec-WebSocket-Key: AAAAAAAAAAAAAAAAAAAAAA==",
    "Sec-WebSocket-Version: 13", "X-Long: " + "z" * 9000,
]  # fmt: skip
_BODIES = [
    b"", b"hello", b"5\r\nhello\r\n0\r\n\r\n", b"5\r\nhello\r\n0\r\nX: y\r\n\r\n", b"0\r\n\r\n", b"5;a=b\r\nhello\r\n0\r\n\r\n",
    b"5\nhello\n0\n\n", b"-5\r\nhello\r\n0\r\n\r\n", b"0x5\r\nhello\r\n0\r\n\r\n", b"5\r\nhello0\r\n\r\n", b"ffffffffffffffff\r\n",
    b"0\r\n\r\nGET /smuggled HTTP/1.1\r\nHost: demo\r\n\r\n", b"GET /smuggled HTTP/1.1\r\nHost: demo\r\n\r\n",
]  # fmt: skip


def request(chance: random.Random) -> bytes:
    """Return something like one request or several."""
    sent = b""
    for _ in range(chance.choice([1, 1, 1, 2, 4])):
        lines = [f"{chance.choice(_METHODS)} {chance.choice(_TARGETS)} HTTP/1.{chance.choice('1111109')}"]
        fields = ["Host: demo"] * (chance.random() < 0.9) + list(chance.choice(_FRAMINGS))
        fields += chance.sample(_OTHER, chance.choice([0, 0, 1, 2, 4]))
        chance.shuffle(fields)
        sent += "\r\n".join([*lines, *fields, "", ""]).encode("latin-1") + chance.choice(_BODIES)
    return damaged(chance, sent) if chance.random() < 0.5 else sent


_STATUSES = ["200 OK", "200", "204 No Content", "304 Not Modified", "100 Continue", "103 Early Hints", "101 Switching Protocols",
             "500 x", "099 x", "1000 x", "200 \xff", "302 Found"]  # fmt: skip
_ANSWERED = [
    "Set-Cookie: a=1", "Set-Cookie: blockyard_route=chosen", "set_cookie: blockyard_route=chosen", "Set-Cookie: =blockyard_a=1",
    'Clear-Site-Data: "*"', "Strict-Transport-Security: max-age=1", "Service-Worker-Allowed: /", "Connection: close",
    "Connection: keep-alive, Set-Cookie", "Connection: Upgrade", "Upgrade: websocket", "Trailer: X", "X: \x80", "X : y",
    "Sec-WebSocket-Accept: x", "X:" + "z" * 9000, "Service_Worker_Allowed: /", " X: y", "X\x00: y", "X: a\rb",
]  # fmt: skip
_SMUGGLED = b"HTTP/1.1 200 OK\r\nContent-Length: 8\r\n\r\nsmuggled"


def response(chance: random.Random) -> bytes:
    """Return something like a response, with more before and after it than there should be."""
    sent = b""
    for _ in range(chance.choice([1, 1, 1, 2, 30])):
        fields = list(chance.choice(_FRAMINGS)) + chance.sample(_ANSWERED, chance.choice([0, 0, 1, 2, 4]))
        chance.shuffle(fields)
        line = f"HTTP/1.{chance.choice('11111109')} {chance.choice(_STATUSES)}"
        sent += "\r\n".join([line, *fields, "", ""]).encode("latin-1") + chance.choice([*_BODIES, _SMUGGLED])
    return damaged(chance, sent) if chance.random() < 0.5 else sent


def split(chance: random.Random, data: bytes) -> Sequence[bytes]:
    """Return the bytes in a few pieces, as a network might bring them."""
    if chance.random() < 0.6:
        return [data]
    cuts = sorted(chance.randrange(len(data) + 1) for _ in range(chance.choice([1, 2, 5])))
    return [data[start:end] for start, end in zip([0, *cuts], [*cuts, len(data)], strict=True)]
