"""What reaches the worker of a visitor's request, and what never does."""

import asyncio

import pytest

from blockyard_api.relay.gate import Reply

GET = b"GET / HTTP/1.1\r\nHost: demo\r\n\r\n"


async def test_many_requests_use_one_connection_on_either_side(stage):
    client = await stage.client()
    for _ in range(5):
        assert (await client.ask(GET)).body == b"ok"
    assert stage.worker.connections == 1


@pytest.mark.parametrize("method", ["GET", "OPTIONS", "DELETE", "TRACE", "PROPFIND", "REPORT", "M-SEARCH", "QUERY"])
async def test_the_method_is_kept(stage, method):
    await stage.ask(f"{method} / HTTP/1.1\r\nHost: demo\r\n\r\n".encode())
    assert stage.worker.turns[0].head.startswith(f"{method} / HTTP/1.1\r\n".encode())


async def test_a_method_nobody_knows_is_501(stage):
    assert (await stage.ask(b"BREW / HTTP/1.1\r\nHost: demo\r\n\r\n")).status == 501
    assert stage.worker.turns == []


@pytest.mark.parametrize(
    "target",
    ["/a//b/../c/", "/%2e%2e/%2F%00", "/a;b=c?x=1&x=2&y=a+b%20c", "/?", "/a?b?c", '/{a}|b^c`d"<>\\', "/~!$&'()*,:@"],
)
async def test_the_raw_path_and_query_are_kept(stage, target):
    assert (await stage.get(target=target)).status == 200
    assert stage.worker.turns[0].head.split(b" ")[1] == target.encode()
    assert stage.gate.heads[0].target == target.encode()


async def test_the_worker_sees_the_target_that_the_gate_names(stage):
    stage.gate.decide = lambda head, forward: forward._replace(target=b"/inner")
    await stage.get(target="/app/demo/inner")
    assert stage.worker.turns[0].head.startswith(b"GET /inner HTTP/1.1\r\n")


async def test_an_absolute_target_of_the_same_host_becomes_a_path(stage):
    answer = await stage.ask(b"GET http://demo?q HTTP/1.1\r\nHost: demo\r\n\r\n")
    assert answer.status == 200
    assert stage.gate.heads[0].target == b"/?q"


SPOOFS = [
    f"{name}: {value}"
    for value in ("root", "")
    for name in (
        "X-Shiny-User",
        "x-shiny-user",
        "X_Shiny_User",
        "X-Shiny_User",
        "X_SHINY-USER",
        "x_shiny_user",
        "X-Shiny-Groups",
        "X_Shiny_Groups",
        "X-SHINY-GROUPS",
        "X-Shiny-Access",
        "X_Shiny_Access",
        "x-shiny-access",
        "X-Shiny-Anything",
        "X_Shiny_",
        "Shiny-Server-Credentials",
        "Shiny_Server_Credentials",
        "shiny_server-credentials",
        "SHINY-SERVER-CREDENTIALS",
        "Authorization",
        "Proxy-Authorization",
    )
]


@pytest.mark.parametrize("spoof", SPOOFS)
async def test_a_spoofed_identity_never_arrives(stage, spoof):
    await stage.get(spoof, spoof, "X-Ordinary: kept")
    turn = stage.worker.turns[0]
    assert turn.values("x-ordinary") == ["kept"]
    assert not [key for key, _ in turn.fields if "shiny" in key.lower() or "authorization" in key.lower()]


@pytest.mark.parametrize("spoof", SPOOFS)
async def test_of_a_spoofed_and_a_true_identity_only_the_true_one_arrives(stage, spoof):
    stage.gate.headers = ((b"X-Shiny-User", b"anna"), (b"Shiny-Server-Credentials", b'{"user": "anna"}'))
    await stage.get(spoof)
    turn = stage.worker.turns[0]
    assert turn.values("x-shiny-user") == ["anna"]
    assert turn.values("shiny-server-credentials") == ['{"user": "anna"}']
    assert "root" not in turn.head.decode()


@pytest.mark.parametrize("name", ["X-Shiny-User", "x_shiny_user", "close, X-Shiny-User", "X-Forwarded-For, Host"])
async def test_a_connection_field_cannot_remove_what_the_relay_sets(stage, name):
    stage.gate.headers = ((b"X-Shiny-User", b"anna"),)
    await stage.get(f"Connection: {name}")
    turn = stage.worker.turns[0]
    assert turn.values("x-shiny-user") == ["anna"]
    assert turn.values("x-forwarded-for") == ["127.0.0.1"]
    assert turn.values("host") == ["demo"]


async def test_what_a_connection_field_names_is_removed(stage):
    await stage.get("X-One: 1", "X_One: 1", "Connection: keep-alive, x-one", "X-Two: 2")
    turn = stage.worker.turns[0]
    assert turn.values("x-one") == []
    assert turn.values("x-two") == ["2"]
    assert turn.values("connection") == []


async def test_hop_by_hop_fields_end_here(stage):
    fields = [
        "Keep-Alive: timeout=5",
        "TE: trailers",
        "Trailer: X",
        "Proxy-Connection: close",
        "Upgrade: h2c",
        "Proxy: x",
    ]
    await stage.get(*fields)
    names = {key.lower() for key, _ in stage.worker.turns[0].fields}
    assert names == {"host", "x-forwarded-for", "x-forwarded-proto", "x-forwarded-host", "x-forwarded-prefix"}


async def test_an_upgrade_to_h2c_is_ignored(stage):
    answer = await stage.get("Connection: Upgrade, HTTP2-Settings", "Upgrade: h2c", "HTTP2-Settings: AAMAAABkAAQAoAAA")
    assert answer.status == 200
    assert not stage.gate.heads[0].websocket
    head = stage.worker.turns[0].head.lower()
    assert b"upgrade" not in head
    assert b"http2" not in head


@pytest.mark.parametrize(
    ("sent", "arrives"),
    [
        ("a=1; blockyard_route=secret; b=2", ["a=1; b=2"]),
        ("blockyard_route=secret", []),
        ("__Host-blockyard_session=secret; a=1", ["a=1"]),
        ("a=1;blockyard_route=secret;", ["a=1"]),
        ("=blockyard_route=secret; a=1", ["a=1"]),
        ('q="x; blockyard_route=secret"; a=1', ['q="x; a=1']),
        ("Blockyard_Route=secret", []),
        ("not_blockyard_route=mine", ["not_blockyard_route=mine"]),
    ],
)
async def test_our_cookies_stay_here_and_the_apps_own_arrive(stage, sent, arrives):
    await stage.get(f"Cookie: {sent}")
    assert stage.worker.turns[0].values("cookie") == arrives
    assert dict(stage.gate.heads[0].headers)[b"Cookie"] == sent.encode()


async def test_the_worker_learns_who_asked_and_how(stage):
    await stage.get(
        "X-Forwarded-For: 6.6.6.6",
        "X_Forwarded_For: 6.6.6.6",
        "X-Forwarded-Proto: https",
        "X-Real-IP: 6.6.6.6",
        "X-Forwarded-Host: evil",
        "X-Forwarded-Prefix: /evil",
        "X-Forwarded-Port: 1",
        "Forwarded: for=6.6.6.6",
    )
    turn = stage.worker.turns[0]
    assert turn.values("x-forwarded-for") == ["127.0.0.1"]
    assert turn.values("x-forwarded-proto") == ["http"]
    assert turn.values("x-forwarded-host") == ["demo"]
    assert turn.values("x-forwarded-prefix") == ["/app/demo"]
    assert b"6.6.6.6" not in turn.head
    assert b"evil" not in turn.head
    assert stage.gate.heads[0].client == "127.0.0.1"


async def test_a_trusted_proxy_is_believed_up_to_the_first_address_that_is_not_one(staging):
    stage = await staging(trusted="127.0.0.0/8")
    await stage.get(
        "X-Forwarded-For: 6.6.6.6, 9.9.9.9",
        "X-Forwarded-For: 127.0.0.3",
        "X-Forwarded-Proto: https",
        "X-Forwarded-Host: www",
    )
    turn = stage.worker.turns[0]
    assert turn.values("x-forwarded-for") == ["6.6.6.6, 9.9.9.9, 127.0.0.3, 127.0.0.1"]
    assert turn.values("x-forwarded-proto") == ["https"]
    assert turn.values("x-forwarded-host") == ["www"]
    assert (stage.gate.heads[0].client, stage.gate.heads[0].secure) == ("9.9.9.9", True)


@pytest.mark.parametrize("said", ["nonsense", "", "1.2.3.4:80", "unknown"])
async def test_what_is_no_address_is_not_taken_for_the_visitors(staging, said):
    stage = await staging(trusted="127.0.0.0/8")
    await stage.get(f"X-Forwarded-For: {said}")
    assert stage.gate.heads[0].client == "127.0.0.1"


async def test_an_upload_keeps_its_length(stage):
    async def script(turn):
        await turn.answer(await turn.body())

    stage.worker.script = script
    payload = bytes(range(256)) * 4096
    client = await stage.client()
    answer = await client.ask(
        b"POST /up HTTP/1.1\r\nHost: demo\r\nContent-Length: %d\r\n\r\n%b" % (len(payload), payload)
    )
    assert answer.body == payload
    assert stage.worker.turns[0].values("content-length") == [str(len(payload))]
    assert stage.worker.turns[0].values("transfer-encoding") == []


async def test_an_empty_post_says_so(stage):
    await stage.ask(b"POST / HTTP/1.1\r\nHost: demo\r\nContent-Length: 0\r\n\r\n")
    assert stage.worker.turns[0].values("content-length") == ["0"]


async def test_a_chunked_upload_arrives_chunked_without_extensions_and_trailers(stage):
    async def script(turn):
        await turn.answer(await turn.body())

    stage.worker.script = script
    answer = await stage.ask(
        b"POST / HTTP/1.1\r\nHost: demo\r\nTransfer-Encoding: Chunked\r\n\r\n"
        b"3;name=value\r\nabc\r\n00A\r\n0123456789\r\n0\r\nX-Shiny-User: root\r\n\r\n"
    )
    assert answer.body == b"3\r\nabc\r\na\r\n0123456789\r\n0\r\n\r\n"


async def test_the_worker_asks_for_the_body_that_was_announced_by_expect(stage):
    async def script(turn):
        await turn.send(b"HTTP/1.1 100 Continue\r\n\r\n")
        await turn.answer(await turn.body())

    stage.worker.script = script
    client = await stage.client()
    await client.send(b"POST / HTTP/1.1\r\nHost: demo\r\nExpect: 100-continue\r\nContent-Length: 4\r\n\r\n")
    assert (await client.answer()).status == 100
    assert (await client.ask(b"body")).body == b"body"
    assert stage.worker.turns[0].values("expect") == ["100-continue"]


async def test_a_100_that_nobody_asked_for_is_dropped(stage):
    async def script(turn):
        await turn.send(b"HTTP/1.1 100 Continue\r\n\r\n")
        await turn.answer()

    stage.worker.script = script
    assert (await stage.get()).status == 200


async def test_an_early_413_reaches_the_client_while_it_still_sends(stage):
    async def script(turn):
        await turn.send(b"HTTP/1.1 413 Too Large\r\nContent-Length: 3\r\n\r\nbig")
        turn.close()

    stage.worker.script = script
    client = await stage.client()
    await client.send(b"POST / HTTP/1.1\r\nHost: demo\r\nContent-Length: 500000000\r\n\r\n")
    sending = asyncio.create_task(client.send(bytes(64 << 20)))
    answer = await client.answer()
    assert (answer.status, answer.body) == (413, b"big")
    assert answer.values("connection") == ["close"]
    sending.cancel()
    await asyncio.gather(sending, return_exceptions=True)


async def test_a_worker_that_refuses_an_upload_and_closes_at_once_is_still_heard(stage):
    async def script(turn):
        turn.writer.write(b"HTTP/1.1 413 Too Large\r\nContent-Length: 3\r\n\r\nbig")
        turn.writer.transport.close()

    stage.worker.script = script
    for _ in range(30):
        client = await stage.client()
        await client.send(b"POST / HTTP/1.1\r\nHost: demo\r\nContent-Length: 3000000\r\n\r\n" + bytes(300_000))
        assert (await client.answer()).status == 413


async def test_pipelined_requests_are_answered_in_order(stage):
    async def script(turn):
        await turn.answer(turn.head.split(b" ")[1])

    stage.worker.script = script
    client = await stage.client()
    requests = [b"GET /%d HTTP/1.1\r\nHost: demo\r\n\r\n" % number for number in range(50)]
    requests[7] = b"POST /7 HTTP/1.1\r\nHost: demo\r\nContent-Length: 5\r\n\r\nGET /"
    requests[9] = b"POST /9 HTTP/1.1\r\nHost: demo\r\nTransfer-Encoding: chunked\r\n\r\n5\r\nGET /\r\n0\r\n\r\n"

    async def reading(turn):
        await turn.body()
        await script(turn)

    stage.worker.script = reading
    await client.send(b"".join(requests))
    assert [(await client.answer()).body for _ in requests] == [b"/%d" % number for number in range(50)]


async def test_pipelined_requests_that_the_gate_answers_itself_do_not_pile_up_calls(stage):
    stage.gate.decide = lambda head, forward: Reply(200, (), head.target)
    client = await stage.client()
    await client.send(b"".join(b"GET /%d HTTP/1.1\r\nHost: demo\r\n\r\n" % number for number in range(2000)))
    assert [(await client.answer()).body for _ in range(2000)] == [b"/%d" % number for number in range(2000)]


async def test_a_client_that_goes_away_frees_the_workers_connection(stage):
    async def script(turn):
        await turn.reader.read()  # until the relay closes

    stage.worker.script = script
    client = await stage.client()
    await client.send(GET)
    await stage.worker.until(lambda: len(stage.worker.turns) == 1)
    client.reset()
    await stage.worker.until(lambda: stage.worker.open == 0)
    assert stage.gate.ended == 1


async def test_a_client_that_closes_politely_while_the_worker_is_silent_is_found_out(staging):
    stage = await staging(linger=0.2)

    async def script(turn):
        await turn.reader.read()

    stage.worker.script = script
    client = await stage.client()
    await client.send(GET)
    await stage.worker.until(lambda: len(stage.worker.turns) == 1)
    client.writer.close()
    await stage.worker.until(lambda: stage.worker.open == 0)


async def test_a_client_that_leaves_in_the_middle_of_its_upload_ends_the_request(stage):
    received = []

    async def script(turn):
        received.append(await turn.reader.read())

    stage.worker.script = script
    client = await stage.client()
    await client.send(b"POST / HTTP/1.1\r\nHost: demo\r\nContent-Length: 10\r\n\r\nhalf")
    await stage.worker.until(lambda: len(stage.worker.turns) == 1)
    client.writer.close()
    await stage.worker.until(lambda: stage.worker.open == 0)
    assert received == [b"half"]


async def test_a_client_that_closes_its_sending_half_still_gets_its_answers(stage):
    client = await stage.client()
    await client.send(GET + GET)
    client.writer.write_eof()
    assert (await client.rest()).count(b"HTTP/1.1 200 OK") == 2


async def test_a_client_that_waits_for_the_gate_and_leaves_is_no_longer_waited_for(staging):
    stage = await staging(linger=0.2)
    cancelled = asyncio.Event()

    async def wait():
        try:
            await asyncio.Event().wait()
        finally:
            cancelled.set()

    stage.gate.decide = lambda head, forward: wait()
    client = await stage.client()
    await client.send(GET)
    await stage.worker.until(lambda: True)
    client.writer.close()
    async with asyncio.timeout(10):
        await cancelled.wait()


async def test_what_comes_while_the_gate_decides_is_kept_for_the_worker(stage):
    deciding = asyncio.Event()

    async def later(forward):
        await deciding.wait()
        stage.gate.admitted += 1
        return forward

    async def script(turn):
        await turn.answer(await turn.body())

    stage.worker.script = script
    stage.gate.decide = lambda head, forward: later(forward)
    client = await stage.client()
    payload = bytes(1_000_000)
    await client.send(b"POST / HTTP/1.1\r\nHost: demo\r\nContent-Length: 1000000\r\n\r\n")
    sending = asyncio.create_task(client.send(payload))
    await asyncio.sleep(0.05)
    deciding.set()
    assert (await client.answer()).body == payload
    await sending


async def test_a_gate_that_raises_costs_the_request_not_the_server(stage):
    def fail(head, forward):
        raise RuntimeError("bug")

    stage.gate.decide = fail
    answer = await stage.get()
    assert answer.status == 500
    assert b"bug" not in answer.body


async def test_http_1_0_is_answered_and_closed(stage):
    client = await stage.client()
    await client.send(b"GET / HTTP/1.0\r\n\r\n")
    assert (await client.answer()).values("connection") == ["close"]
    assert await client.rest() == b""


async def test_http_1_0_with_keep_alive_stays_open(stage):
    client = await stage.client()
    request = b"GET / HTTP/1.0\r\nHost: demo\r\nConnection: keep-alive\r\n\r\n"
    assert (await client.ask(request)).values("connection") == ["keep-alive"]
    assert (await client.ask(request)).status == 200


async def test_connection_close_is_heeded(stage):
    client = await stage.client()
    await client.send(b"GET / HTTP/1.1\r\nHost: demo\r\nConnection: Close\r\n\r\n")
    assert (await client.answer()).values("connection") == ["close"]
    assert await client.rest() == b""
