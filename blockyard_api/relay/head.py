"""Request and response heads: parsed by llhttp, checked again where it is lenient, and rebuilt. No I/O.

Nothing of a head is passed on as it came: what llhttp found is filtered and written anew, so that both ends see the
same framing.
"""

import functools
import json
import re
from collections.abc import Iterable, Mapping
from email.utils import formatdate
from http import HTTPStatus
from typing import Final

from httptools import (
    HttpParserError,
    HttpParserInvalidMethodError,
    HttpParserUpgrade,
    HttpRequestParser,
    HttpResponseParser,
)

from blockyard_api.relay.gate import Forward, Header, Reply

MAX_HEAD: Final = 65536
MAX_FIELDS: Final = 200
END: Final = b"\r\n\r\n"

# Lowercase, and `_` as `-`: CGI-style servers, httpuv among them, cannot tell the two apart.
_FOLD: Final = bytes.maketrans(b"ABCDEFGHIJKLMNOPQRSTUVWXYZ_", b"abcdefghijklmnopqrstuvwxyz-")

_REQUEST_LINE: Final = re.compile(rb"([!#$%&'*+.^_`|~0-9A-Za-z-]+) ([\x21\x22\x24-\x7e]+) HTTP/1\.([01])\r\n")
_STATUS_LINE: Final = re.compile(rb"HTTP/1\.[01] [1-9][0-9]{2}(?: [\t\x20-\x7e\x80-\xff]*)?\r\n")
_ABSOLUTE: Final = re.compile(rb"[Hh][Tt][Tt][Pp][Ss]?://([^/?]*)(.*)")
_HOST: Final = re.compile(rb"(?:[A-Za-z0-9._-]+|\[[0-9A-Fa-f:.]+\])(?::[0-9]{1,5})?")
_PERSISTENT: Final = [b"keep-alive"]
_WEBSOCKET_KEY: Final = re.compile(rb"[A-Za-z0-9+/]{22}==")

_PHRASES: Final[Mapping[int, bytes]] = {status.value: status.phrase.encode() for status in HTTPStatus}
_OUR_COOKIES: Final = (b"blockyard_", b"__host-blockyard", b"__secure-blockyard")


# Fields that mean something to us are interpreted (True) or dropped (False): hop-by-hop, or never believed from that
# side. Every other field is passed on.
_REQUEST_FIELDS: Final[Mapping[bytes, bool]] = {
    **dict.fromkeys(
        (
            b"host",
            b"content-length",
            b"transfer-encoding",
            b"connection",
            b"upgrade",
            b"expect",
            b"cookie",
            b"x-forwarded-for",
            b"x-forwarded-proto",
            b"x-forwarded-host",
        ),
        True,
    ),
    **dict.fromkeys(
        (
            b"keep-alive",
            b"proxy-connection",
            b"proxy-authorization",
            b"proxy-authenticate",
            b"te",
            b"trailer",
            b"http2-settings",
            b"authorization",
            b"forwarded",
            b"proxy",  # CGI makes HTTP_PROXY of it
            b"x-real-ip",
            b"shiny-server-credentials",
        ),
        False,
    ),
}
_RESERVED: Final = (b"x-shiny-", b"x-forwarded-")

# Spared the folding: what nearly every head contains, as nearly everybody spells it, and is none of the above.
_ORDINARY: Final = frozenset(
    (
        b"Accept",
        b"Accept-Encoding",
        b"Accept-Language",
        b"Accept-Ranges",
        b"Cache-Control",
        b"Content-Encoding",
        b"Content-Type",
        b"Date",
        b"ETag",
        b"Last-Modified",
        b"Referer",
        b"Sec-Fetch-Dest",
        b"Sec-Fetch-Mode",
        b"Sec-Fetch-Site",
        b"Server",
        b"User-Agent",
        b"Vary",
    )
)

_RESPONSE_FIELDS: Final[Mapping[bytes, bool]] = {
    **dict.fromkeys((b"content-length", b"transfer-encoding", b"connection", b"upgrade", b"set-cookie"), True),
    **dict.fromkeys(
        (
            b"keep-alive",
            b"proxy-connection",
            b"proxy-authenticate",
            b"te",
            b"trailer",
            b"clear-site-data",
            b"strict-transport-security",
            b"service-worker-allowed",
        ),
        False,
    ),
}

# Spared the folding, too: what is interpreted, as nearly everybody spells it.
_USUAL_REQUEST: Final = {key.title(): key for key, interpreted in _REQUEST_FIELDS.items() if interpreted}
_USUAL_RESPONSE: Final = {key.title(): key for key, interpreted in _RESPONSE_FIELDS.items() if interpreted}


class BadHead(Exception):
    """A head that is refused; `status` is what a client is told (a worker's bad head is always a 502)."""

    def __init__(self, why: str, status: int = 400) -> None:
        super().__init__(why)
        self.why = why
        self.status = status


class Request:
    """A checked request head. `kept` holds the pieces of the fields that may reach a worker."""

    method = b""
    target = b""
    minor = 1
    host: bytes | None = None
    length = 0
    chunked = False
    keep_alive = True
    websocket = False
    expects_continue = False

    def __init__(self) -> None:
        self.headers: list[Header] = []
        self.kept: list[bytes] = []
        self.special: dict[bytes, list[bytes]] = {}

    def on_header(self, name: bytes, value: bytes) -> None:
        """Sort one field (called by llhttp)."""
        self.headers.append((name, value))
        if name in _ORDINARY:
            self.kept += (name, b": ", value, b"\r\n")
        elif (key := _USUAL_REQUEST.get(name)) and key not in self.special:
            self.special[key] = [value]
        else:
            _sort(self, name, value, _REQUEST_FIELDS, _RESERVED)


class Response:
    """A checked response head. `kept` holds the pieces of the fields that may reach a visitor."""

    status = 0
    line = b""  # from the space after the version on
    length: int | None = None
    chunked = False
    keep_alive = True
    upgrade = b""

    def __init__(self) -> None:
        self.kept: list[bytes] = []
        self.special: dict[bytes, list[bytes]] = {}

    def on_header(self, name: bytes, value: bytes) -> None:
        """Sort one field (called by llhttp)."""
        if name in _ORDINARY:
            self.kept += (name, b": ", value, b"\r\n")
        elif (key := _USUAL_RESPONSE.get(name)) and key not in self.special:
            self.special[key] = [value]
        else:
            _sort(self, name, value, _RESPONSE_FIELDS, ())


def _sort(
    head: Request | Response, name: bytes, value: bytes, meanings: Mapping[bytes, bool], reserved: tuple[bytes, ...]
) -> None:
    """Keep, interpret or drop a field, however it is spelled and how often it comes."""
    key = name.translate(_FOLD)
    interpreted = meanings.get(key)
    if interpreted is None:
        if not key.startswith(reserved):
            head.kept += (name, b": ", value, b"\r\n")
    elif interpreted and b"_" not in name:
        head.special.setdefault(key, []).append(value)


def parse_request(raw: bytes) -> Request:
    """Parse one whole request head, up to and with its empty line. Raises BadHead."""
    request = Request()
    try:
        HttpRequestParser(request).feed_data(raw)
    except HttpParserUpgrade:
        pass  # CONNECT, or any Upgrade: what to make of it is decided below
    except HttpParserInvalidMethodError as error:
        if _REQUEST_LINE.match(raw):
            raise BadHead("This method is not known here.", 501) from error
        raise BadHead("The request line is malformed.") from error
    except HttpParserError as error:
        raise BadHead("The request head is malformed.") from error
    line = _REQUEST_LINE.match(raw)
    if line is None:
        raise BadHead("The request line is malformed.")
    request.method, request.target, minor = line.groups()
    request.minor = 1 if minor == b"1" else 0
    if request.method == b"CONNECT":
        raise BadHead("This server is not a forward proxy.", 501)
    if len(request.headers) > MAX_FIELDS:
        raise BadHead("The request head has too many fields.", 431)
    _interpret_request(request)
    if request.target[0] != 0x2F:
        _normalise_target(request)
    return request


def _interpret_request(request: Request) -> None:
    special = request.special
    request.host = _only(special, b"host")
    if request.host is None:
        if request.minor:
            raise BadHead("The Host field is missing.")
    elif not _is_host(request.host):
        raise BadHead("The Host field is malformed.")
    if b"cookie" in special:
        for value in special[b"cookie"]:
            if cookies := _without_our_cookies(value):
                request.kept += (b"Cookie", b": ", cookies, b"\r\n")
    if b"content-length" in special or b"transfer-encoding" in special:
        length, request.chunked = _framing(special, request.minor)
        request.length = length or 0
    if b"expect" in special:
        if (_only(special, b"expect") or b"").lower() != b"100-continue":
            raise BadHead("Only 100-continue can be expected.", 417)
        request.expects_continue = request.minor == 1
    _heed_connection(request)


@functools.lru_cache(maxsize=64)
def _is_host(value: bytes) -> bool:
    return bool(_HOST.fullmatch(value))


def _heed_connection(request: Request) -> None:
    options = request.special.get(b"connection")
    if request.minor and (options is None or options == _PERSISTENT):
        return
    tokens = _tokens(options or [])
    request.keep_alive = b"close" not in tokens and (request.minor == 1 or b"keep-alive" in tokens)
    request.kept = _without(request.kept, tokens)
    if b"upgrade" in tokens and b"websocket" in _tokens(request.special.get(b"upgrade", [])):
        request.websocket = _is_websocket(request)


def _only(special: Mapping[bytes, list[bytes]], name: bytes) -> bytes | None:
    """Return the value of a field that may stand in a head but once."""
    values = special.get(name)
    if values is None:
        return None
    if len(values) > 1:
        raise BadHead(f"The field {name.decode().title()} is given twice.")
    return values[0].strip(b" \t")


def _framing(special: Mapping[bytes, list[bytes]], minor: int) -> tuple[int | None, bool]:
    """Return the body's length, if the head tells it, and whether the body is chunked."""
    length = _only(special, b"content-length")
    if b"transfer-encoding" in special:
        if length is not None:
            raise BadHead("Content-Length and Transfer-Encoding exclude each other.")
        if (_only(special, b"transfer-encoding") or b"").lower() != b"chunked" or not minor:
            raise BadHead("The only transfer coding known here is 'chunked', in HTTP/1.1.")
        return None, True
    if length is None:
        return None, False
    if not length.isdigit() or len(length) > 18:
        raise BadHead("Content-Length is not a number.")
    return int(length), False


def _is_websocket(request: Request) -> bool:
    if request.method != b"GET" or request.minor != 1:
        return False
    if request.length or request.chunked:
        raise BadHead("A WebSocket upgrade has no body.")
    keys = [value for name, value in request.headers if name.lower() == b"sec-websocket-key"]
    versions = [value for name, value in request.headers if name.lower() == b"sec-websocket-version"]
    return len(keys) == 1 and bool(_WEBSOCKET_KEY.fullmatch(keys[0].strip(b" \t"))) and versions == [b"13"]


def _normalise_target(request: Request) -> None:
    absolute = _ABSOLUTE.fullmatch(request.target)
    if absolute is None or request.host is None or absolute[1].lower() != request.host.lower():
        raise BadHead("The request target must be a path.")
    path = absolute[2]
    request.target = path if path.startswith(b"/") else b"/" + path


def _tokens(values: list[bytes]) -> set[bytes]:
    return {token.strip(b" \t").lower() for value in values for token in value.split(b",")} - {b""}


def _without(kept: list[bytes], names: set[bytes]) -> list[bytes]:
    """Drop the fields that a Connection field names."""
    if names <= {b"close", b"keep-alive", b"upgrade"}:
        return kept
    folded = {name.translate(_FOLD) for name in names}
    out: list[bytes] = []
    for at in range(0, len(kept), 4):
        if kept[at].translate(_FOLD) not in folded:
            out += kept[at : at + 4]
    return out


def _is_ours(cookie: bytes) -> bool:
    # browsers send a cookie without a name as its bare value: "=blockyard_route=x" comes back as ours
    return cookie.lstrip(b" \t=").lower().startswith(_OUR_COOKIES)


def _without_our_cookies(value: bytes) -> bytes:
    if b"blockyard" not in value.lower():
        return value
    return b"; ".join(pair.strip(b" \t") for pair in value.split(b";") if pair.strip(b" \t") and not _is_ours(pair))


def parse_response(raw: bytes) -> Response:
    """Parse one whole response head, up to and with its empty line. Raises BadHead."""
    response = Response()
    try:
        HttpResponseParser(response).feed_data(raw)
    except HttpParserUpgrade:
        pass  # a 101: whether it was asked for is the exchange's to know
    except HttpParserError as error:
        raise BadHead("The response head is malformed.") from error
    response.status, response.line, minor = _status_line(raw[: raw.find(b"\n") + 1])
    _interpret_response(response, minor)
    return response


@functools.lru_cache(maxsize=64)  # a worker has few of them, and the longest is MAX_HEAD
def _status_line(line: bytes) -> tuple[int, bytes, int]:
    """Return the status, what follows the version, and the version's second number. Raises BadHead."""
    if not _STATUS_LINE.fullmatch(line):
        raise BadHead("The status line is malformed.")
    return int(line[9:12]), line[8:], line[7] - 0x30


def _interpret_response(response: Response, minor: int) -> None:
    special = response.special
    if not minor:
        response.keep_alive = False
    if b"set-cookie" in special:
        for value in special[b"set-cookie"]:
            if not _is_ours(value):
                response.kept += (b"Set-Cookie", b": ", value, b"\r\n")
    if b"content-length" in special or b"transfer-encoding" in special:
        response.length, response.chunked = _framing(special, minor)
    if b"connection" in special and special[b"connection"] != _PERSISTENT:
        tokens = _tokens(special[b"connection"])
        response.keep_alive = response.keep_alive and b"close" not in tokens
        response.kept = _without(response.kept, tokens)
    if b"upgrade" in special:
        response.upgrade = b",".join(special[b"upgrade"]).strip(b" \t").lower()


def request_head(request: Request, forward: Forward, forwarded: bytes) -> bytes:
    """Write the head that goes to the worker; `forwarded` holds the X-Forwarded fields, ended."""
    out = [
        request.method,
        b" ",
        forward.target,
        b" HTTP/1.1\r\nHost: ",
        request.host or b"localhost",
        b"\r\n",
        *request.kept,
        forwarded,
        b"X-Forwarded-Prefix: ",
        forward.prefix,
        b"\r\n",
    ]
    for name, value in forward.headers:
        out += (name, b": ", value, b"\r\n")
    if request.websocket:
        out.append(b"Connection: Upgrade\r\nUpgrade: websocket\r\n")
    elif request.chunked:
        out.append(b"Transfer-Encoding: chunked\r\n")
    elif request.length or request.method in _BODY_EXPECTED:
        out.append(b"Content-Length: %d\r\n" % request.length)
    if request.expects_continue:
        out.append(b"Expect: 100-continue\r\n")
    out.append(b"\r\n")
    return b"".join(out)


_BODY_EXPECTED: Final = frozenset((b"POST", b"PUT", b"PATCH"))


def response_head(response: Response, added: Iterable[Header], connection: bytes) -> bytes:
    """Write the head that goes to the visitor; `connection` holds the framing fields, ended."""
    out = [b"HTTP/1.1", response.line, *response.kept]
    for name, value in added:
        out += (name, b": ", value, b"\r\n")
    out += (connection, b"\r\n")
    return b"".join(out)


def reply(answer: Reply, *, close: bool, body: bool) -> bytes:
    """Write an answer of the relay's own, without its body for a HEAD."""
    out = [b"HTTP/1.1 %d " % answer.status, _PHRASES.get(answer.status, b""), b"\r\n"]
    for name, value in answer.headers:
        out += (name, b": ", value, b"\r\n")
    if answer.status >= 200 and answer.status not in (204, 304):
        out.append(b"Content-Length: %d\r\n" % len(answer.body))
    out.append(b"Date: %b\r\n" % formatdate(usegmt=True).encode())
    out.append(b"Connection: close\r\n\r\n" if close else b"\r\n")
    if body:
        out.append(answer.body)
    return b"".join(out)


def refusal(status: int, why: str, *headers: Header) -> Reply:
    """Word a refusal that the relay gives by itself, in the contract's shape; its code is the status' name."""
    code = HTTPStatus(status).name.lower() if status != HTTPStatus.INTERNAL_SERVER_ERROR else "internal_error"
    body = {"error": code, "message": why}
    return Reply(
        status,
        ((b"Content-Type", b"application/json"), (b"Cache-Control", b"no-store"), *headers),
        json.dumps(body).encode(),
    )
