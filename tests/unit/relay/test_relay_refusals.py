"""Requests that are refused: whatever two parsers could read in two ways never reaches a worker."""

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from blockyard_api.relay.head import BadHead, parse_request

POST = b"POST / HTTP/1.1\r\nHost: demo\r\n"
SMUGGLED = b"GET /smuggled HTTP/1.1\r\nHost: demo\r\n\r\n"

AMBIGUOUS = {
    "length and transfer coding": POST + b"Content-Length: 5\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
    "transfer coding and length": POST + b"Transfer-Encoding: chunked\r\nContent-Length: 5\r\n\r\n0\r\n\r\n",
    "two different lengths": POST + b"Content-Length: 5\r\nContent-Length: 6\r\n\r\nhello",
    "two equal lengths": POST + b"Content-Length: 5\r\nContent-Length: 5\r\n\r\nhello",
    "length with plus": POST + b"Content-Length: +5\r\n\r\nhello",
    "length with minus": POST + b"Content-Length: -5\r\n\r\nhello",
    "length as a list": POST + b"Content-Length: 5,5\r\n\r\nhello",
    "length as a spaced list": POST + b"Content-Length: 5, 5\r\n\r\nhello",
    "length with a space inside": POST + b"Content-Length: 1 0\r\n\r\nhello",
    "length in hex": POST + b"Content-Length: 0x5\r\n\r\nhello",
    "length with underscore": POST + b"Content-Length: 1_0\r\n\r\nhello",
    "length with a fraction": POST + b"Content-Length: 5.0\r\n\r\nhello",
    "length with an exponent": POST + b"Content-Length: 5e0\r\n\r\nhello",
    "length in other digits": POST + "Content-Length: \N{ARABIC-INDIC DIGIT FIVE}\r\n\r\nhello".encode(),
    "length beyond 64 bits": POST + b"Content-Length: 18446744073709551621\r\n\r\nhello",
    "length of nineteen digits": POST + b"Content-Length: 0000000000000000005\r\n\r\nhello",
    "empty length": POST + b"Content-Length:\r\n\r\n",
    "xchunked": POST + b"Transfer-Encoding: xchunked\r\n\r\n0\r\n\r\n",
    "chunked, identity": POST + b"Transfer-Encoding: chunked, identity\r\n\r\n0\r\n\r\n",
    "identity, chunked": POST + b"Transfer-Encoding: identity, chunked\r\n\r\n0\r\n\r\n",
    "gzip, chunked": POST + b"Transfer-Encoding: gzip, chunked\r\n\r\n0\r\n\r\n",
    "identity": POST + b"Transfer-Encoding: identity\r\nContent-Length: 5\r\n\r\nhello",
    "chunked with a parameter": POST + b"Transfer-Encoding: chunked;q=1\r\n\r\n0\r\n\r\n",
    "chunked in quotes": POST + b'Transfer-Encoding: "chunked"\r\n\r\n0\r\n\r\n',
    "chunked with a vertical tab": POST + b"Transfer-Encoding: \x0bchunked\r\n\r\n0\r\n\r\n",
    "chunked, chunked": POST + b"Transfer-Encoding: chunked, chunked\r\n\r\n0\r\n\r\n",
    "empty transfer coding": POST + b"Transfer-Encoding:\r\n\r\n0\r\n\r\n",
    "two transfer codings": POST + b"Transfer-Encoding: chunked\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
    "a second, harmless transfer coding": POST + b"Transfer-Encoding: chunked\r\nTransfer-Encoding: x\r\n\r\n0\r\n\r\n",
    "transfer coding in HTTP/1.0": b"POST / HTTP/1.0\r\nHost: demo\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
    "space before the colon": POST + b"Content-Length : 5\r\n\r\nhello",
    "tab before the colon": POST + b"Content-Length\t: 5\r\n\r\nhello",
    "space in a name": POST + b"Content Length: 5\r\n\r\nhello",
    "space before a name": POST + b" Content-Length: 5\r\n\r\nhello",
    "space before the first name": b"GET / HTTP/1.1\r\n Host: demo\r\n\r\n",
    "obs-fold": POST + b"X-One: a\r\n b\r\n\r\n",
    "obs-fold with a tab": POST + b"Transfer-Encoding:\r\n\tchunked\r\n\r\n0\r\n\r\n",
    "no colon": POST + b"Content-Length\r\n\r\n",
    "no name": POST + b": 5\r\n\r\n",
    "a name of bytes above ASCII": POST + b"Cont\xe9nt: 5\r\n\r\n",
    "a name in parentheses": POST + b"(X): 5\r\n\r\n",
    "a name with a NUL": POST + b"X\x00: 5\r\n\r\n",
    "NUL in a value": POST + b"X: a\x00b\r\n\r\n",
    "bell in a value": POST + b"X: a\x07b\r\n\r\n",
    "delete in a value": POST + b"X: a\x7fb\r\n\r\n",
    "bare CR in a value": POST + b"X: a\rb\r\n\r\n",
    "bare CR before the end of a line": POST + b"X: a\r\r\n\r\n",
    "bare LF between fields": POST + b"X: a\nContent-Length: 5\r\n\r\nhello",
    "bare LF after the request line": b"GET / HTTP/1.1\nHost: demo\r\n\r\n",
    "bare LF everywhere": b"GET / HTTP/1.1\nHost: demo\n\n",
    "bare LF at the end": b"GET / HTTP/1.1\r\nHost: demo\r\n\n",
    "NUL in the target": b"GET /\x00 HTTP/1.1\r\nHost: demo\r\n\r\n",
    "space in the target": b"GET /a b HTTP/1.1\r\nHost: demo\r\n\r\n",
    "tab in the target": b"GET /a\tb HTTP/1.1\r\nHost: demo\r\n\r\n",
    "bytes above ASCII in the target": "GET /é HTTP/1.1\r\nHost: demo\r\n\r\n".encode(),
    "a fragment in the target": b"GET /a#b HTTP/1.1\r\nHost: demo\r\n\r\n",
    "a target without slash": b"GET a HTTP/1.1\r\nHost: demo\r\n\r\n",
    "a target of another host": b"GET http://other/ HTTP/1.1\r\nHost: demo\r\n\r\n",
    "a target with userinfo": b"GET http://demo@other/ HTTP/1.1\r\nHost: demo\r\n\r\n",
    "a target of another scheme": b"GET ftp://demo/ HTTP/1.1\r\nHost: demo\r\n\r\n",
    "an asterisk for a target": b"OPTIONS * HTTP/1.1\r\nHost: demo\r\n\r\n",
    "no target": b"GET  HTTP/1.1\r\nHost: demo\r\n\r\n",
    "two spaces after the method": b"GET  / HTTP/1.1\r\nHost: demo\r\n\r\n",
    "two spaces before the version": b"GET /  HTTP/1.1\r\nHost: demo\r\n\r\n",
    "a space after the version": b"GET / HTTP/1.1 \r\nHost: demo\r\n\r\n",
    "a tab after the method": b"GET\t/ HTTP/1.1\r\nHost: demo\r\n\r\n",
    "a space before the method": b" GET / HTTP/1.1\r\nHost: demo\r\n\r\n",
    "HTTP/0.9": b"GET /\r\n\r\n",
    "HTTP/2.0": b"GET / HTTP/2.0\r\nHost: demo\r\n\r\n",
    "HTTP/1.2": b"GET / HTTP/1.2\r\nHost: demo\r\n\r\n",
    "HTTP/1.10": b"GET / HTTP/1.10\r\nHost: demo\r\n\r\n",
    "HTTP/01.1": b"GET / HTTP/01.1\r\nHost: demo\r\n\r\n",
    "http/1.1": b"GET / http/1.1\r\nHost: demo\r\n\r\n",
    "another protocol": b"GET / RTSP/1.0\r\nHost: demo\r\n\r\n",
    "the preface of HTTP/2": b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
    "no host": b"GET / HTTP/1.1\r\nX: demo\r\n\r\n",
    "two hosts": b"GET / HTTP/1.1\r\nHost: demo\r\nHost: demo\r\n\r\n",
    "two hosts in HTTP/1.0": b"GET / HTTP/1.0\r\nHost: demo\r\nhost: other\r\n\r\n",
    "an empty host": b"GET / HTTP/1.1\r\nHost:\r\n\r\n",
    "a host with a space": b"GET / HTTP/1.1\r\nHost: demo evil\r\n\r\n",
    "a host with a path": b"GET / HTTP/1.1\r\nHost: demo/evil\r\n\r\n",
    "a host with userinfo": b"GET / HTTP/1.1\r\nHost: a@demo\r\n\r\n",
    "a host list": b"GET / HTTP/1.1\r\nHost: demo, other\r\n\r\n",
    "a host with a bad port": b"GET / HTTP/1.1\r\nHost: demo:http\r\n\r\n",
    "a host with two ports": b"GET / HTTP/1.1\r\nHost: demo:1:2\r\n\r\n",
    "a host with an open bracket": b"GET / HTTP/1.1\r\nHost: [::1\r\n\r\n",
    "a host with a quote": b"GET / HTTP/1.1\r\nHost: demo'\r\n\r\n",
    "a WebSocket upgrade with a body": b"GET / HTTP/1.1\r\nHost: demo\r\nConnection: upgrade\r\nUpgrade: websocket\r\n"
    b"Sec-WebSocket-Version: 13\r\nSec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\nContent-Length: 3\r\n\r\nabc",
}

OTHERWISE = {
    "CONNECT": (b"CONNECT demo:443 HTTP/1.1\r\nHost: demo:443\r\n\r\n", 501),
    "a lowercase method": (b"get / HTTP/1.1\r\nHost: demo\r\n\r\n", 501),
    "an expectation nobody knows": (POST + b"Content-Length: 5\r\nExpect: tea\r\n\r\nhello", 417),
    "too many fields": (POST + b"X: y\r\n" * 300 + b"\r\n", 431),
    "a head above 64 KB": (POST + b"X: " + b"y" * 65536 + b"\r\n\r\n", 431),
    "a head above 64 KB without an end": (POST + b"X: " + b"y" * 70000, 431),
}


@pytest.mark.parametrize("name", AMBIGUOUS)
async def test_an_ambiguous_request_is_answered_400_and_the_connection_closed(stage, name):
    client = await stage.client()
    await client.send(AMBIGUOUS[name] + SMUGGLED)
    answer = await client.answer()
    assert answer.status == 400
    assert answer.values("connection") == ["close"]
    assert answer.values("content-type") == ["application/json"]
    told = json.loads(answer.body)
    assert told.pop("error") == "bad_request"
    assert told.pop("message").endswith(".")
    assert told == {}
    assert await client.rest() == b""
    assert stage.worker.turns == []
    assert stage.gate.heads == []


@pytest.mark.parametrize("name", OTHERWISE)
async def test_what_is_not_served_is_refused_and_the_connection_closed(stage, name):
    request, status = OTHERWISE[name]
    client = await stage.client()
    await client.send(request + SMUGGLED)
    answer = await client.answer()
    assert answer.status == status
    assert json.loads(answer.body).keys() == {"error", "message"}
    assert await client.rest() == b""
    assert stage.worker.turns == []


BAD_CHUNKS = {
    "no hex digits": b"xyz\r\nabc\r\n0\r\n\r\n",
    "an empty size": b"\r\nabc\r\n0\r\n\r\n",
    "a minus": b"-3\r\nabc\r\n0\r\n\r\n",
    "a plus": b"+3\r\nabc\r\n0\r\n\r\n",
    "a 0x": b"0x3\r\nabc\r\n0\r\n\r\n",
    "a leading space": b" 3\r\nabc\r\n0\r\n\r\n",
    "a trailing space": b"3 \r\nabc\r\n0\r\n\r\n",
    "a size beyond 60 bits": b"1000000000000000\r\nabc\r\n0\r\n\r\n",
    "an underscore": b"1_0\r\n" + b"a" * 16 + b"\r\n0\r\n\r\n",
    "bare LF after the size": b"3\nabc\r\n0\r\n\r\n",
    "bare LF after the data": b"3\r\nabc\n0\r\n\r\n",
    "bare LF after the last chunk": b"0\n\n",
    "bare CR in an extension": b"3;a\rb\r\nabc\r\n0\r\n\r\n",
    "bare LF in an extension": b"3;a\nb\r\nabc\r\n0\r\n\r\n",
    "NUL in an extension": b"3;a\x00b\r\nabc\r\n0\r\n\r\n",
    "data longer than its size": b"3\r\nabcd\r\n0\r\n\r\n",
    "data shorter than its size": b"5\r\nabc\r\n0\r\n\r\n",
    "no line end after the data": b"3\r\nabc0\r\n\r\n",
    "an endless size": b"0" * 5000,
    "an endless extension": b"3;" + b"a" * 5000,
    "a malformed trailer": b"0\r\nno colon\r\n\r\n",
    "a folded trailer": b"0\r\nX: a\r\n b\r\n\r\n",
    "endless trailers": b"0\r\n" + b"X: y\r\n" * 5000,
}


@pytest.mark.parametrize("name", BAD_CHUNKS)
async def test_a_bad_chunk_is_answered_400_and_both_connections_closed(stage, name):
    async def script(turn):
        await turn.reader.read()

    stage.worker.script = script
    client = await stage.client()
    await client.send(POST + b"Transfer-Encoding: chunked\r\n\r\n" + BAD_CHUNKS[name])
    assert (await client.answer()).status == 400
    assert await client.rest() == b""
    await stage.worker.until(lambda: stage.worker.open == 0)


async def test_a_field_that_only_looks_like_a_length_is_dropped(stage):
    client = await stage.client()
    answer = await client.ask(
        b"GET / HTTP/1.1\r\nHost: demo\r\nContent_Length: 40\r\nTransfer_Encoding: chunked\r\n\r\n" + SMUGGLED
    )
    assert answer.status == 200
    assert (await client.answer()).status == 200  # the second request is one, not a body
    assert b"ength" not in stage.worker.turns[0].head
    assert b"ncoding" not in stage.worker.turns[0].head


async def test_one_empty_line_before_a_request_is_forgiven(stage):
    client = await stage.client()
    assert (await client.ask(b"\r\nGET / HTTP/1.1\r\nHost: demo\r\n\r\n")).status == 200
    await client.send(b"\r")
    assert (await client.ask(b"\nGET / HTTP/1.1\r\nHost: demo\r\n\r\n")).status == 200


async def test_a_refused_client_that_still_sends_can_read_why(stage):
    client = await stage.client()
    await client.send(AMBIGUOUS["two different lengths"])
    client.writer.write(bytes(3_000_000))
    assert (await client.answer()).status == 400
    assert await client.rest() == b""


_PIECES = st.one_of(
    st.sampled_from(
        [b"\r\n", b"\r", b"\n", b"\x00", b" ", b"\t", b":", b",", b"+", b"-", b"_", b"#", b";", b"/", b"\xff"]
    ),
    st.sampled_from(
        [b"Host", b"demo", b"Content-Length", b"5", b"Transfer-Encoding", b"chunked", b"Connection", b"close"]
    ),
    st.sampled_from([b"GET", b"HTTP/1.1", b"X-Shiny-User"]),
)


@settings(max_examples=400, deadline=None)
@given(st.lists(_PIECES, max_size=14).map(b"".join), st.integers(0, 40))
def test_whatever_is_accepted_has_one_reading(inserted, at):
    raw = b"POST /path HTTP/1.1\r\nHost: demo\r\nX-One: 1\r\nContent-Length: 5\r\n\r\n"
    at = min(at, len(raw))
    head = (raw[:at] + inserted + raw[at:]).split(b"\r\n\r\n")[0] + b"\r\n\r\n"
    try:
        request = parse_request(head)
    except BadHead:
        return
    lines = head[:-4].split(b"\r\n")
    assert b"".join(lines).isascii() or b"\xff" in head
    assert not any(byte in line for line in lines for byte in (b"\r", b"\n", b"\x00"))
    assert lines[0].count(b" ") == 2
    names = [line.partition(b":")[0] for line in lines[1:]]
    assert all(name and name == name.strip() for name in names)
    assert [name for name, _ in request.headers] == names
    lengths = [
        line.partition(b":")[2].strip(b" \t") for line in lines[1:] if line.lower().startswith(b"content-length:")
    ]
    assert len(lengths) <= 1
    assert request.chunked or request.length == int((lengths or [b"0"])[0])
    assert not any(name.lower().replace(b"_", b"-").startswith(b"x-shiny-") for name in request.kept[::4])
