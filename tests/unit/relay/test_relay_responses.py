"""What reaches the visitor of a worker's response, and what a broken one costs."""

import asyncio

import pytest

GET = b"GET / HTTP/1.1\r\nHost: demo\r\n\r\n"
GET_1_0 = b"GET / HTTP/1.0\r\nHost: demo\r\n\r\n"
HEAD = b"HEAD / HTTP/1.1\r\nHost: demo\r\n\r\n"


def says(response, *, then_close=False):
    async def script(turn):
        await turn.body()
        await turn.send(response)
        if then_close:
            turn.close()

    return script


async def test_a_head_response_with_a_length_keeps_it_and_has_no_body(stage):
    stage.worker.script = says(b"HTTP/1.1 200 OK\r\nContent-Length: 1000\r\n\r\n")
    client = await stage.client()
    for _ in range(2):
        assert (await client.ask(HEAD)).values("content-length") == ["1000"]
    assert stage.worker.connections == 1


async def test_a_head_response_with_chunks_announced_has_no_body(stage):
    stage.worker.script = says(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n")
    client = await stage.client()
    for _ in range(2):
        assert (await client.ask(HEAD)).values("transfer-encoding") == ["chunked"]


@pytest.mark.parametrize("status", [204, 304])
@pytest.mark.parametrize("framing", [b"", b"Content-Length: 10\r\n", b"Transfer-Encoding: chunked\r\n"])
async def test_204_and_304_have_no_body_whatever_they_announce(stage, status, framing):
    stage.worker.script = says(b"HTTP/1.1 %d X\r\n%b\r\n" % (status, framing))
    client = await stage.client()
    for _ in range(2):
        answer = await client.ask(GET)
        assert answer.status == status
        assert answer.values("transfer-encoding") == []
    assert stage.worker.connections == 1


async def test_a_chunked_response_arrives_whole_and_the_connection_stays(stage):
    stage.worker.script = says(
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n3;x=y\r\nabc\r\n5\r\ndefgh\r\n0\r\nX-Trailer: 1\r\n\r\n"
    )
    client = await stage.client()
    for _ in range(2):
        assert (await client.ask(GET)).body == b"abcdefgh"
    assert stage.worker.connections == 1


async def test_a_chunked_response_reaches_an_http_1_0_client_without_chunks(stage):
    stage.worker.script = says(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n3\r\nabc\r\n2\r\nde\r\n0\r\n\r\n")
    client = await stage.client()
    answer = await client.ask(GET_1_0)
    assert (answer.body, answer.values("transfer-encoding")) == (b"abcde", [])


@pytest.mark.parametrize("request_", [GET, GET_1_0])
async def test_a_response_that_ends_with_its_connection_does_so_here(stage, request_):
    stage.worker.script = says(b"HTTP/1.1 200 OK\r\nContent-Type: text/plain\r\n\r\nall of it", then_close=True)
    client = await stage.client()
    answer = await client.ask(request_)
    assert (answer.body, answer.values("connection")) == (b"all of it", ["close"])


async def test_a_response_in_http_1_0_arrives_and_its_connection_is_not_used_again(stage):
    stage.worker.script = says(b"HTTP/1.0 200 OK\r\nContent-Length: 2\r\n\r\nok")
    client = await stage.client()
    for _ in range(2):
        assert (await client.ask(GET)).body == b"ok"
    assert stage.worker.connections == 2


async def test_every_cookie_arrives_but_ours(stage):
    stage.gate.response_headers = ((b"Set-Cookie", b"blockyard_route=true; HttpOnly"),)
    ours = ["blockyard_route=x", "Blockyard_route=x", "blockyard_route", "=blockyard_route=x", " = blockyard_route=x"]
    fields = ["a=1", *ours, "__Host-blockyard_session=x", "__Secure-blockyard=x", "b=2; Path=/"]

    async def script(turn):
        await turn.answer(b"", *(f"Set-Cookie: {field}" for field in fields))

    stage.worker.script = script
    answer = await stage.get()
    assert sorted(answer.values("set-cookie")) == ["a=1", "b=2; Path=/", "blockyard_route=true; HttpOnly"]


@pytest.mark.parametrize(
    "field",
    [
        "Clear-Site-Data: *",
        "clear-site-data: *",
        "Clear_Site_Data: *",
        "Strict-Transport-Security: max-age=1",
        "Service-Worker-Allowed: /",
        "Service_Worker-Allowed: /",
        "Keep-Alive: timeout=1",
        "Proxy-Authenticate: Basic",
        "Upgrade: h2c",
        "Trailer: X",
    ],
)
async def test_what_would_act_beyond_the_app_is_removed(stage, field):
    async def script(turn):
        await turn.answer(b"ok", field, "X-Kept: 1")

    stage.worker.script = script
    answer = await stage.get()
    assert answer.values("x-kept") == ["1"]
    assert field.split(":")[0].lower() not in answer.head.decode().lower()


async def test_what_the_workers_connection_field_names_is_removed(stage):
    async def script(turn):
        await turn.answer(b"ok", "Connection: X-One", "X-One: 1", "X-Two: 2")

    stage.worker.script = script
    answer = await stage.get()
    assert (answer.values("x-one"), answer.values("x-two"), answer.values("connection")) == ([], ["2"], [])


async def test_early_hints_arrive_before_the_response(stage):
    stage.worker.script = says(
        b"HTTP/1.1 103 Early Hints\r\nLink: </a>\r\n\r\nHTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n"
    )
    client = await stage.client()
    hints = await client.ask(GET)
    assert (hints.status, hints.values("link"), hints.values("connection")) == (103, ["</a>"], [])
    assert (await client.answer()).status == 200
    assert (await client.ask(GET)).status == 103


async def test_an_http_1_0_client_gets_no_interim_response(stage):
    stage.worker.script = says(b"HTTP/1.1 103 Early Hints\r\n\r\nHTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n")
    assert (await stage.ask(GET_1_0)).status == 200


@pytest.mark.parametrize("framing", [b"Content-Length: 6\r\n", b"Transfer-Encoding: chunked\r\n", b""])
async def test_the_first_byte_goes_out_when_it_comes_in(stage, framing):
    seen = asyncio.Event()

    async def script(turn):
        await turn.send(b"HTTP/1.1 200 OK\r\n%b\r\n" % framing)
        await turn.send(b"3\r\nabc\r\n" if b"chunked" in framing else b"abc")
        await seen.wait()
        await turn.send(b"3\r\ndef\r\n0\r\n\r\n" if b"chunked" in framing else b"def")
        turn.close()

    stage.worker.script = script
    client = await stage.client()
    await client.send(GET)
    await client.head()
    first = b"3\r\nabc\r\n" if b"chunked" in framing else b"abc"
    assert await client.reader.readexactly(len(first)) == first
    seen.set()
    assert await client.reader.readexactly(3)


@pytest.mark.parametrize("abrupt", [False, True])
@pytest.mark.parametrize("request_", [GET, GET_1_0])
@pytest.mark.parametrize(
    "response",
    [
        b"Content-Length: 10\r\n\r\nhalf",
        b"Transfer-Encoding: chunked\r\n\r\n4\r\nhalf\r\n",
        b"Transfer-Encoding: chunked\r\n\r\n9\r\nhalf",
    ],
)
async def test_half_a_body_never_looks_whole(stage, response, request_, abrupt):
    async def script(turn):
        await turn.send(b"HTTP/1.1 200 OK\r\n" + response)
        await stage.worker.until(lambda: stage.gate.admitted == 1)
        turn.writer.transport.abort() if abrupt else turn.close()

    stage.worker.script = script
    client = await stage.client()
    await client.send(request_)
    answer = await client.head()
    try:
        body = await client.rest()
    except ConnectionResetError:
        return
    assert answer.values("content-length") == ["10"] or answer.values("transfer-encoding") == ["chunked"]
    assert b"0\r\n\r\n" not in body
    assert len(body) < 10


BROKEN = {
    "bytes after the end": b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nokEXTRA",
    "a body after 204": b"HTTP/1.1 204 No Content\r\n\r\nEXTRA",
    "a body after 304": b"HTTP/1.1 304 Not Modified\r\nContent-Length: 5\r\n\r\nEXTRA",
    "a second response": b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\nHTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n",
    "length with transfer coding": b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\nTransfer-Encoding: chunked\r\n\r\n0",
    "two lengths": b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\nContent-Length: 3\r\n\r\nok",
    "a bad length": b"HTTP/1.1 200 OK\r\nContent-Length: +2\r\n\r\nok",
    "another transfer coding": b"HTTP/1.1 200 OK\r\nTransfer-Encoding: gzip, chunked\r\n\r\n0\r\n\r\n",
    "transfer coding in HTTP/1.0": b"HTTP/1.0 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
    "an unasked 101": b"HTTP/1.1 101 Switching Protocols\r\nConnection: upgrade\r\nUpgrade: websocket\r\n\r\n",
    "an endless head": b"HTTP/1.1 200 OK\r\nX: " + b"y" * 70_000,
    "endless fields": b"HTTP/1.1 200 OK\r\n" + b"X: y\r\n" * 20_000,
    "endless interim responses": b"HTTP/1.1 103 Early Hints\r\n\r\n" * 100,
    "no HTTP": b"SSH-2.0-OpenSSH_9.2\r\n\r\n",
    "HTTP/2.0": b"HTTP/2.0 200 OK\r\nContent-Length: 0\r\n\r\n",
    "a status of two digits": b"HTTP/1.1 99 X\r\nContent-Length: 0\r\n\r\n",
    "a status below 100": b"HTTP/1.1 099 X\r\nContent-Length: 0\r\n\r\n",
    "a status of four digits": b"HTTP/1.1 2000 X\r\nContent-Length: 0\r\n\r\n",
    "NUL in the reason": b"HTTP/1.1 200 O\x00K\r\nContent-Length: 0\r\n\r\n",
    "a bare LF": b"HTTP/1.1 200 OK\nContent-Length: 0\r\n\r\n",
    "a bare CR": b"HTTP/1.1 200 OK\r\nX: a\rSet-Cookie: b\r\nContent-Length: 0\r\n\r\n",
    "obs-fold": b"HTTP/1.1 200 OK\r\nX: a\r\n b\r\nContent-Length: 0\r\n\r\n",
    "a space before the colon": b"HTTP/1.1 200 OK\r\nContent-Length : 0\r\n\r\n",
    "NUL in a value": b"HTTP/1.1 200 OK\r\nX: \x00\r\nContent-Length: 0\r\n\r\n",
    "nothing": b"",
    "half a head": b"HTTP/1.1 200 OK\r\nContent-",
}


@pytest.mark.parametrize("name", BROKEN)
async def test_a_broken_response_is_a_502_and_the_end_of_that_connection(stage, name):
    stage.worker.script = says(BROKEN[name], then_close=name in ("nothing", "half a head"))
    client = await stage.client()
    await client.send(GET)
    while (answer := await client.answer()).status < 200:
        assert name == "endless interim responses"
    assert answer.status == 502
    assert len(stage.gate.failures) == 1
    await stage.worker.until(lambda: stage.worker.open == 0)
    stage.worker.script = says(b"HTTP/1.1 200 OK\r\nContent-Length: 4\r\n\r\nnext")
    assert (await client.ask(GET)).body == b"next"  # byte-exact, on a connection of its own


async def test_chunks_that_break_later_end_the_visitors_connection_unfinished(stage):
    stage.worker.script = says(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n3\r\nabc\r\nxyz\r\n")
    client = await stage.client()
    await client.send(GET)
    await client.head()
    assert b"0\r\n\r\n" not in await client.rest()
    await stage.worker.until(lambda: stage.worker.open == 0)


async def test_a_connection_that_talks_while_idle_is_not_used_again(stage):
    async def script(turn):
        await turn.answer()
        await stage.worker.until(lambda: stage.gate.ended == len(stage.worker.turns))
        await turn.send(b"HTTP/1.1 200 OK\r\nContent-Length: 6\r\n\r\npoison")

    stage.worker.script = script
    client = await stage.client()
    await client.ask(GET)
    await stage.worker.until(lambda: stage.worker.open == 0)
    assert (await client.ask(GET)).body == b"ok"
    assert stage.worker.connections == 2


async def test_a_pooled_connection_that_closed_meanwhile_is_retried_once(stage):
    async def script(turn):
        if turn.number == 1 and len(stage.worker.turns) == 2:
            turn.close()  # takes the second request and hangs up without a word
        else:
            await turn.answer(b"%d" % turn.number)

    stage.worker.script = script
    client = await stage.client()
    assert [(await client.ask(GET)).body for _ in range(2)] == [b"1", b"2"]
    assert len(stage.worker.turns) == 3


async def test_a_request_is_retried_only_once(stage):
    async def script(turn):
        if len(stage.worker.turns) == 1:
            await turn.answer()
        else:
            turn.close()

    stage.worker.script = script
    client = await stage.client()
    await client.ask(GET)
    assert (await client.ask(GET)).status == 502
    assert len(stage.worker.turns) == 3


@pytest.mark.parametrize("method", [b"POST", b"PATCH"])
async def test_what_may_not_be_repeated_takes_a_fresh_connection(stage, method):
    client = await stage.client()
    await client.ask(GET)
    for _ in range(2):
        assert (await client.ask(method + b" / HTTP/1.1\r\nHost: demo\r\nContent-Length: 2\r\n\r\nhi")).status == 200
    assert stage.worker.connections == 3


async def test_what_may_not_be_repeated_is_not(stage):
    async def script(turn):
        turn.close()

    stage.worker.script = script
    assert (await stage.ask(b"POST / HTTP/1.1\r\nHost: demo\r\nContent-Length: 0\r\n\r\n")).status == 502
    assert len(stage.worker.turns) == 1


async def test_a_worker_that_closes_right_after_each_answer_costs_no_request(stage):
    async def script(turn):
        await turn.body()
        await turn.answer()
        turn.close()

    stage.worker.script = script
    client = await stage.client()
    for number in range(100):
        method = (b"GET", b"POST", b"PUT")[number % 3]
        assert (await client.ask(method + b" / HTTP/1.1\r\nHost: demo\r\nContent-Length: 1\r\n\r\nx")).status == 200


async def test_a_worker_that_nobody_answers_for_is_the_gates_to_explain(stage):
    stage.worker.path += ".gone"
    answer = await stage.get()
    assert (answer.status, answer.body) == (502, b"the worker failed")
    assert stage.gate.failures
    assert answer.values("date")


async def test_a_failure_after_an_upload_keeps_the_visitors_connection(stage):
    async def script(turn):
        await turn.body()
        turn.close()

    stage.worker.script = script
    client = await stage.client()
    for _ in range(2):
        assert (await client.ask(b"POST / HTTP/1.1\r\nHost: demo\r\nContent-Length: 2\r\n\r\nhi")).status == 502
