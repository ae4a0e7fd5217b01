"""The gate and the sessions behind it: who may pass, to which worker, and what becomes of it when the world changes."""

import asyncio
import contextlib
import hashlib
import inspect
import sqlite3
from types import SimpleNamespace

import pytest
from running_control import head, until
from sqlalchemy import text

from blockyard_api.relay.gate import Crowded, Overloaded
from blockyard_api.sessions import issuer
from blockyard_api.workers.life import State

# --- a visitor's way in ----------------------------------------------------------------------------------------------


async def test_a_new_visitor_waits_for_a_worker_and_is_given_a_cookie(control):
    await control.app()
    answer = await control.visit()
    assert len(answer.cookie) >= 32
    assert control.worker_of(answer).state is State.ACTIVE


async def test_a_known_visitor_of_a_public_app_is_decided_about_at_once(control):
    await control.app()
    cookie = (await control.visit()).cookie
    assert not inspect.isawaitable(control.gate.admit(head("/app/plain/x", cookie)))


async def test_a_person_gets_the_loading_page_at_once_and_its_probe_answers_with_the_app(control):
    await control.app()
    control.spawner.serves = False
    page = await control.ask("/app/plain/", html=True)
    assert page.status == 202
    probe = asyncio.create_task(control.ask("/app/plain/__blockyard__/ready", page.cookie))
    worker = await until(control.spawner.running)
    assert not probe.done()
    await control.spawner.serve(worker[0].id)
    assert (await probe).status == 204
    assert (await control.ask("/app/plain/", page.cookie, html=True)).end().forwarded


async def test_the_probe_of_a_visitor_without_cookies_starts_nothing_and_tells_him(control):
    await control.app()
    answer = await control.ask("/app/plain/__blockyard__/ready")
    assert answer.status == 403
    assert "cookies" in answer.text
    assert not control.spawner.workers


async def test_one_worker_starts_for_a_visitor_however_many_requests_he_sends_at_once(control):
    await control.app()
    control.spawner.serves = False
    cookie = (await control.ask("/app/plain/", html=True)).cookie
    asking = [asyncio.create_task(control.ask(f"/app/plain/{number}", cookie)) for number in range(20)]
    (worker,) = await until(control.spawner.running)
    await control.spawner.serve(worker.id)
    answers = [(await one).end() for one in asking]
    assert {control.worker_of(answer).id for answer in answers} == {worker.id}
    assert len(control.spawner.workers) == 1


async def test_what_calls_itself_an_asset_begins_no_session_and_starts_no_worker(control):
    await control.app()
    answer = await control.ask("/app/plain/x.png", Sec_Fetch_Dest=b"image")
    assert answer.status == 404
    assert not control.spawner.workers
    served = await control.visit()
    asset = (await control.ask("/app/plain/x.png", Sec_Fetch_Dest=b"image")).end()
    assert control.worker_of(asset) is control.worker_of(served)
    assert len(control.worker_of(served).slots) == 1


@pytest.mark.parametrize("path", ["", "?a=1", "session/abc/download/x"])
async def test_what_calls_itself_an_asset_and_is_a_page_or_somebodys_file_reaches_no_worker(control, path):
    await control.app()
    await control.visit()
    assert (await control.ask(f"/app/plain/{path}", Sec_Fetch_Dest=b"image")).status == 404


async def test_an_address_that_asks_for_many_assets_without_a_session_is_slowed_down_and_others_are_not(control, clock):
    await control.app()
    visitor = await control.visit()

    async def stray(client, cookie=None):
        return (await control.ask("/app/plain/x.png", cookie, client=client, Sec_Fetch_Dest=b"image")).end().status

    told = [await stray("203.0.113.9") for _ in range(40)]
    assert told[0] is None
    assert told[-1] == 429
    assert await stray("203.0.113.10") is None
    assert await stray("203.0.113.9", visitor.cookie) is None
    await clock.advance(60)
    assert await stray("203.0.113.9") is None


@pytest.mark.parametrize("claim", [{"websocket": True}, {"method": b"POST"}])
async def test_a_websocket_or_a_form_that_calls_itself_an_image_does_not_reach_another_visitors_worker(control, claim):
    await control.app()
    victim = await control.visit()
    intruder = await control.ask("/app/plain/websocket/", Sec_Fetch_Dest=b"image", **claim)
    assert control.worker_of(intruder) is not control.worker_of(victim)
    assert intruder.end().cookie


@pytest.mark.parametrize("origin", [b"", b"null", b"http://evil.example", b"http://[", b"http://\xff", b"://", b"[]"])
async def test_a_websocket_from_any_other_origin_is_refused_however_malformed(control, origin):
    await control.app()
    cookie = (await control.visit()).cookie
    answer = await control.ask("/app/plain/websocket/", cookie, websocket=True, origin=origin)
    assert answer.status == 403


@pytest.mark.parametrize(
    "path",
    ["/", "/app", "/app/", "/app//plain/", "/app/PLAIN/", "/app/plain%2f/", "/app/plain;x/", "/app/./plain/",
     "//app/plain/", "/app/../app/plain/", "/app/pl\xe4in/", "/app/plain%00/", "/app/plain\\/", "/APP/plain/"],
)  # fmt: skip
async def test_an_address_that_is_not_an_apps_to_the_letter_is_404(control, path):
    await control.app()
    assert (await control.ask(path)).status == 404


@pytest.mark.parametrize(
    "rest", ["..%2f..%2fother/", "../other/", "%2e%2e/other/", "//evil.example/", "a;b?c=%00", "\\"]
)
async def test_what_follows_an_apps_prefix_reaches_that_app_byte_for_byte(control, rest):
    await control.app()
    await control.app("other")
    cookie = (await control.visit()).cookie
    answer = (await control.ask(f"/app/plain/{rest}", cookie)).end()
    assert answer.verdict.target == b"/" + rest.encode()
    assert control.worker_of(answer).app_id == control.catalog.named("plain").id


async def test_a_former_name_leads_to_the_new_one_with_path_and_query(control):
    await control.app("old")
    await control.change("old", name="new")
    for asked, meant in (("/x?y=1", b"x?y=1"), ("//evil.example", b"/evil.example"), ("?y=1", b"?y=1"), ("", b"")):
        answer = await control.ask(f"/app/old{asked}")
        assert answer.status == 307
        assert dict(answer.headers)[b"Location"] == b"http://127.0.0.1:8081/app/new/" + meant


async def test_a_former_name_of_a_private_app_tells_strangers_nothing(control):
    await control.app("old")
    await control.change("old", name="new", access_type="acl")
    assert (await control.ask("/app/old/")).status == 404


# --- sessions --------------------------------------------------------------------------------------------------------


async def test_a_cookie_value_that_a_client_chose_never_becomes_a_session(control):
    await control.app()
    chosen = b"A" * 32
    answer = await control.ask("/app/plain/", chosen)
    assert answer.end().cookie not in (None, chosen)
    again = await control.ask("/app/plain/", chosen)
    assert again.end().cookie not in (None, chosen)
    assert control.worker_of(again) is not control.worker_of(answer)


async def test_a_hash_from_the_database_is_no_cookie(control):
    await control.app()
    cookie = (await control.visit()).cookie
    stored = hashlib.sha256(cookie).hexdigest().encode()
    assert (await control.ask("/app/plain/", stored)).end().cookie


async def test_where_each_app_has_its_own_host_no_other_host_can_plant_a_session(start):
    control = await start('proxy.public_url = "https://{app}.apps.example.com/"')
    await control.app()
    first = await control.ask("/", html=True, host=b"plain.apps.example.com")
    name, _, value = dict(first.headers)[b"Set-Cookie"].partition(b"=")
    assert name == b"__Host-blockyard_route"
    assert {b"Path=/", b"Secure", b"HttpOnly"} <= {part.strip() for part in value.split(b";")}
    planted = await control.ask("/", first.cookie, html=True, host=b"plain.apps.example.com")
    assert planted.cookie not in (None, first.cookie)
    known = await control.ask("/", first.cookie, host=b"plain.apps.example.com", cookie_name=name)
    assert known.end().cookie is None


async def test_a_session_of_one_app_means_nothing_to_another(control):
    await control.app("one")
    await control.app("two")
    cookie = (await control.visit("one")).cookie
    assert (await control.ask("/app/two/", cookie)).end().cookie not in (None, cookie)


async def test_only_some_cookies_of_one_request_are_looked_up(control):
    await control.app()
    cookie = (await control.visit()).cookie
    few = (await control.ask("/app/plain/", b"x; blockyard_route=".join([b""] * 4) + cookie)).end()
    assert few.cookie is None
    many = (await control.ask("/app/plain/", b"x; blockyard_route=".join([b""] * 4000) + cookie)).end()
    assert many.cookie is not None


async def test_an_address_that_begins_too_many_sessions_is_slowed_down_and_others_are_not(control):
    await control.app(max_sessions_per_worker=100)
    statuses = [(await control.ask("/app/plain/", client="203.0.113.1")).end().status for _ in range(60)]
    assert statuses[:40] == [None] * 40
    assert 429 in statuses
    assert (await control.ask("/app/plain/", client="203.0.113.2")).end().forwarded


async def test_the_addresses_of_one_ipv6_network_count_as_one(control):
    await control.app(max_sessions_per_worker=100)
    statuses = [(await control.ask("/app/plain/", client=f"2001:db8::{n:x}")).end().status for n in range(60)]
    assert 429 in statuses
    assert (await control.ask("/app/plain/", client="2001:db8:0:1::1")).end().forwarded


async def test_a_known_visitor_is_never_slowed_down(control):
    await control.app()
    cookie = (await control.visit(client="203.0.113.1")).cookie
    answers = [(await control.ask("/app/plain/", cookie, client="203.0.113.1")).end() for _ in range(100)]
    assert all(answer.forwarded for answer in answers)


async def test_a_page_without_a_websocket_holds_its_place_only_briefly(control, clock):
    await control.app(max_workers_per_app=1)
    cookie = (await control.visit()).cookie
    assert (await control.ask("/app/plain/")).status == 503
    await clock.advance(16)
    assert await control.visit()
    late = await control.ask("/app/plain/", cookie)
    assert late.status == 503  # another sits there now


async def test_a_dropped_websocket_keeps_its_place_for_a_while_and_not_for_ever(start, clock):
    control = await start("proxy.ws_cache_ttl = '60s'")
    await control.app(max_workers_per_app=1)
    cookie = (await control.visit()).cookie
    answer, _ = await control.socket("plain", cookie)
    await clock.advance(100)
    assert (await control.ask("/app/plain/")).status == 503
    answer.end()
    await clock.advance(50)
    assert (await control.ask("/app/plain/")).status == 503
    await clock.advance(20)
    assert await control.visit()


async def test_a_session_ends_its_open_websockets_when_it_is_too_old(start, clock):
    control = await start("proxy.session_max_lifetime = '1h'\nproxy.idle_worker_timeout = '24h'")
    await control.app()
    cookie = (await control.visit()).cookie
    _, ends = await control.socket("plain", cookie)
    await clock.advance(3500)
    await control.sessions.save()
    assert not ends
    await clock.advance(200)
    await control.sessions.save()
    assert ends


async def test_what_a_database_cannot_keep_costs_no_visitor_his_page(control):
    await control.app()
    async with control.services.database.begin() as connection:
        await connection.exec_driver_sql("ALTER TABLE sessions RENAME TO elsewhere")
        await connection.exec_driver_sql("ALTER TABLE workers RENAME TO elsewhere_too")
    cookie = (await control.visit()).cookie
    assert (await control.ask("/app/plain/", cookie)).end().forwarded
    control.spawner.serves = False
    await control.deploy("plain")
    moved = (await control.ask("/app/plain/", cookie, html=True)).end()
    assert moved.forwarded or moved.status == 202  # whichever is faster, its worker or the database's refusal
    assert control.alive


async def test_a_part_of_a_page_has_no_body_and_what_has_one_begins_a_session(control):
    await control.app()
    await control.visit()
    part = await control.ask("/app/plain/x.js", sec_fetch_dest=b"script")
    assert part.end().forwarded
    assert part.cookie is None
    for more in ({"content_length": b"1000000"}, {"transfer_encoding": b"chunked"}):
        claims = await control.ask("/app/plain/x.js", sec_fetch_dest=b"script", **more)
        assert claims.end().cookie is not None


# --- the world changes while a visitor waits -------------------------------------------------------------------------


async def waiting(control, name="plain", **more):
    """A visitor who waits for a worker that does not come to answer yet; returns his task and the worker."""
    control.spawner.serves = False
    asking = asyncio.create_task(control.ask(f"/app/{name}/websocket/", websocket=True, **more))
    (worker,) = await until(control.spawner.running, "a worker")
    return asking, worker


@pytest.mark.parametrize("taken_for_a_start", [14, 50])
async def test_a_place_is_kept_through_a_long_start_and_for_the_page_after_it(control, clock, taken_for_a_start):
    await control.app()
    control.spawner.serves = False
    page = await control.ask("/app/plain/", html=True)
    probe = asyncio.create_task(control.ask("/app/plain/__blockyard__/ready", page.cookie))
    (first,) = await until(control.spawner.running)
    await until(lambda: control.fleet.all()[0].socket)
    for _ in range(taken_for_a_start):
        await clock.advance(1)
    await control.spawner.serve(first.id)
    assert (await probe).status == 204
    for _ in range(14):
        await clock.advance(1)
    control.spawner.serves = True
    other = await control.visit()
    assert control.worker_of(other).id != first.id
    served = (await control.ask("/app/plain/", page.cookie, html=True)).end()
    assert control.worker_of(served).id == first.id


async def test_a_place_is_given_up_after_a_long_start_if_no_page_comes(control, clock):
    await control.app()
    control.spawner.serves = False
    await control.ask("/app/plain/", html=True)
    (first,) = await until(control.spawner.running)
    await until(lambda: control.fleet.all()[0].socket)
    await clock.advance(50)
    await control.spawner.serve(first.id)
    await control.quiet()
    await clock.advance(16)
    assert control.worker_of(await control.visit()).id == first.id


async def test_of_many_websockets_that_wait_for_a_start_no_more_than_may_be_are_opened(control):
    await control.app()
    control.spawner.serves = False
    cookie = (await control.ask("/app/plain/", html=True)).cookie
    asking = [asyncio.create_task(control.ask("/app/plain/websocket/", cookie, websocket=True)) for _ in range(100)]
    (worker,) = await until(control.spawner.running)
    await control.spawner.serve(worker.id)
    answers = await asyncio.gather(*asking)
    assert [answer.forwarded for answer in answers].count(True) == 64
    assert {answer.status for answer in answers if not answer.forwarded} == {429}


async def test_access_that_is_revoked_while_a_visitor_waits_is_not_given(control):
    await control.app()
    asking, worker = await waiting(control)
    await control.change("plain", access_type="acl")
    control.sessions.drop_where(lambda session: session.user_sub is None)
    await control.spawner.serve(worker.id)
    answer = await asking
    assert answer.status == 503
    assert not control.fleet.find(worker.id).slots


async def test_a_websocket_whose_session_ended_during_the_handshake_is_closed_at_once(control):
    await control.app()
    cookie = (await control.visit()).cookie
    answer = await control.ask("/app/plain/websocket/", cookie, websocket=True)
    control.sessions.drop_where(lambda session: True)
    assert answer.open() == ["closed"]
    assert not control.worker_of(answer).slots


async def test_an_app_switched_off_between_the_decision_and_the_placing_starts_no_worker(control):
    await control.app()
    deciding = control.gate.admit(head("/app/plain/"))
    await control.change("plain", enabled=False)
    assert (await deciding).status == 503
    assert not control.spawner.workers


async def test_an_app_deleted_between_the_decision_and_the_placing_is_404(control):
    made = await control.app()
    deciding = control.gate.admit(head("/app/plain/"))
    await control.catalog.delete(made)
    assert (await deciding).status == 404
    assert not control.spawner.workers


async def test_a_redeploy_between_the_decision_and_the_placing_does_not_bring_the_old_bundle_back(control):
    await control.app(pre_warmed_sessions=1)
    await control.quiet()
    deciding = control.gate.admit(head("/app/plain/"))
    bundle = (await control.deploy("plain")).active_bundle
    await control.quiet()
    served = await deciding
    served.tracker.request_ended()
    await control.quiet()
    assert {worker.request.bundle for worker in control.spawner.running()} == {bundle}
    assert {worker.state for worker in control.fleet.all()} == {State.ACTIVE}


async def test_a_websocket_ends_with_the_token_that_opened_it(start, clock):
    control = await start("proxy.idle_worker_timeout = '24h'\nproxy.session_idle_ttl = '24h'")
    await control.app(access_type="logged_in")
    _, plain = await control.services.tokens.create("admin", "short", 600)
    bearer = {"Authorization": f"Bearer {plain}".encode()}
    cookie = (await control.visit(**bearer)).cookie
    _, ends = await control.socket("plain", cookie, **bearer)
    await clock.advance(590)
    await control.sessions.save()
    assert not ends
    await clock.advance(30)
    await control.sessions.save()
    assert ends


async def test_each_page_that_is_open_over_two_redeploys_keeps_its_worker_and_no_longer(control, clock):
    await control.app()
    first = await control.visit()
    pages = [await control.socket("plain", first.cookie)]
    for _ in range(2):
        await control.deploy("plain")
        (await control.ask("/app/plain/", first.cookie, html=True)).end()
        await control.quiet()
        pages.append(await control.socket("plain", first.cookie))
    workers = [control.worker_of(answer) for answer, _ in pages]
    assert len(set(workers)) == 3
    assert [worker.state for worker in workers] == [State.DRAINING, State.DRAINING, State.ACTIVE]
    for (answer, _), worker in zip(pages[:2], workers[:2], strict=True):
        answer.end()
        await clock.advance(61)
        await until(worker.ended.is_set, "the end of the worker whose page was closed")
        assert worker.end_reason == "redeployed"
    assert workers[2].state is State.ACTIVE
    assert workers[2].slots


async def test_a_page_that_is_loaded_anew_after_a_redeploy_lets_the_old_worker_go_at_once(control):
    await control.app()
    first = await control.visit()
    old = control.worker_of(first)
    await control.deploy("plain")
    (await control.ask("/app/plain/", first.cookie, html=True)).end()
    await until(old.ended.is_set, "the end of the old worker")
    assert old.end_reason == "redeployed"


async def test_one_session_opens_so_many_websockets_and_no_more_until_one_is_closed(control):
    await control.app(max_sessions_per_worker=2)
    cookie = (await control.visit()).cookie
    pages = [await control.socket("plain", cookie) for _ in range(64)]
    assert (await control.ask("/app/plain/websocket/", cookie, websocket=True)).status == 429
    assert (await control.ask("/app/plain/style.css", cookie)).end().forwarded
    other = (await control.visit()).cookie
    await control.socket("plain", other)
    pages[0][0].end()
    await control.socket("plain", cookie)


async def test_websockets_that_are_still_being_opened_count_among_those_of_a_session(control):
    await control.app()
    cookie = (await control.visit()).cookie
    asked = [await control.ask("/app/plain/websocket/", cookie, websocket=True) for _ in range(70)]
    assert [answer.status for answer in asked if not answer.forwarded] == [429] * 6
    asked[0].end()  # the worker refused it
    asked[1].open()
    assert (await control.ask("/app/plain/websocket/", cookie, websocket=True)).forwarded
    assert (await control.ask("/app/plain/websocket/", cookie, websocket=True)).status == 429


async def test_what_a_stranger_fetches_keeps_no_worker_alive(control):
    await control.app()
    first = await control.visit()
    page, _ = await control.socket("plain", first.cookie)
    old = control.worker_of(page)
    asset = await control.ask("/app/plain/style.css", Sec_Fetch_Dest=b"style")
    assert control.worker_of(asset) is old
    await control.deploy("plain")
    page.end()
    (await control.ask("/app/plain/", first.cookie, html=True)).end()
    await until(old.ended.is_set, "the end of a worker that only a stranger still reads from")
    asset.end()
    assert old.requests == 0


@pytest.fixture
async def old_page(control):
    """A visitor with one page on the worker of an old bundle, and a place at the newest's: (cookie, old worker)."""
    await control.app()
    first = await control.visit()
    old, _ = await control.socket("plain", first.cookie)
    await control.deploy("plain")
    (await control.ask("/app/plain/", first.cookie, html=True)).end()
    await control.quiet()
    return first.cookie, control.worker_of(old)


@pytest.fixture
async def two_pages(control, old_page):
    """The same, and a page on the newest: (cookie, old worker, new)."""
    cookie, old = old_page
    new, _ = await control.socket("plain", cookie)
    return cookie, old, control.worker_of(new)


async def test_uploads_of_an_old_page_reach_the_worker_that_serves_it(control, old_page):
    cookie, old = old_page
    upload = (await control.ask("/app/plain/session/abc/upload/x", cookie, method=b"POST")).end()
    assert control.worker_of(upload) is old
    other = (await control.ask("/app/plain/style.css", cookie)).end()
    assert control.worker_of(other) is not old


async def test_of_two_pages_each_ones_uploads_reach_the_worker_that_made_it(control, two_pages):
    cookie, old, new = two_pages
    control.spawner.tokens = {old.id: (b"a" * 32,), new.id: (b"b" * 32,)}
    for token, worker in (("a", old), ("b", new), ("a", old)):
        upload = await control.ask(f"/app/plain/session/{token * 32}/upload/x", cookie, method=b"POST")
        assert control.worker_of(upload.end()) is worker
    control.spawner.tokens = {}  # each was asked once
    download = await control.ask(f"/app/plain/session/{'a' * 32}/download/report", cookie)
    assert control.worker_of(download.end()) is old


async def test_a_page_that_is_known_takes_no_other_pages_place_in_memory(control, two_pages, monkeypatch):
    cookie, old, new = two_pages
    monkeypatch.setattr(issuer, "_KEPT", 2)
    control.spawner.tokens = {old.id: (b"a" * 32,), new.id: (b"b" * 32,)}
    for token in "abba":
        upload = await control.ask(f"/app/plain/session/{token * 32}/upload/x", cookie, method=b"POST")
        assert control.worker_of(upload.end()) is {"a": old, "b": new}[token]
        if token == "b":
            control.spawner.tokens = {}  # each was asked once


async def test_a_page_that_no_worker_knows_is_the_newest_ones(control, two_pages):
    cookie, _, new = two_pages
    for path in ("c" * 32, "c" * 32, "zz", "../x"):
        answer = await control.ask(f"/app/plain/session/{path}/download/x", cookie)
        assert control.worker_of(answer.end()) is new


async def test_a_worker_that_does_not_answer_holds_its_visitors_other_page_up_for_seconds_at_most(
    control, two_pages, monkeypatch
):
    cookie, old, new = two_pages
    monkeypatch.setattr(issuer, "_WITHIN", 0.5)
    control.spawner.tokens = {new.id: (b"b" * 32,)}
    control.spawner.busy = {old.id}
    answer = await control.ask(f"/app/plain/session/{'b' * 32}/download/x", cookie)
    assert control.worker_of(answer.end()) is new


async def test_a_page_whose_worker_computes_is_not_taken_for_another_ones(control, two_pages, monkeypatch):
    cookie, old, _ = two_pages
    monkeypatch.setattr(issuer, "_WITHIN", 0.5)
    control.spawner.tokens = {old.id: (b"a" * 32,)}
    control.spawner.busy = {old.id}
    answer = await control.ask(f"/app/plain/session/{'a' * 32}/upload/x", cookie, method=b"POST")
    assert control.worker_of(answer.end()) is old


async def test_a_page_whose_worker_knows_it_does_not_wait_for_the_others(control, two_pages):
    cookie, old, new = two_pages
    control.spawner.tokens = {new.id: (b"b" * 32,)}
    control.spawner.busy = {old.id}
    async with asyncio.timeout(5):
        answer = await control.ask(f"/app/plain/session/{'b' * 32}/download/x", cookie)
    assert control.worker_of(answer.end()) is new


@pytest.fixture
def questions(monkeypatch):
    """How many workers are asked at the moment, at the most so far, and in all."""
    asked, ask = SimpleNamespace(now=0, most=0, all=0), issuer.status

    async def counted(*words):
        asked.now += 1
        asked.all += 1
        asked.most = max(asked.most, asked.now)
        try:
            return await ask(*words)
        finally:
            asked.now -= 1

    monkeypatch.setattr(issuer, "status", counted)
    return asked


async def test_what_a_page_fetches_at_once_is_asked_for_once(control, two_pages, questions):
    cookie, old, new = two_pages
    control.spawner.tokens = {old.id: (b"a" * 32,), new.id: (b"b" * 32,)}
    path = f"/app/plain/session/{'a' * 32}/download/x"
    answers = await asyncio.gather(*(control.ask(path, cookie) for _ in range(20)))
    assert {control.worker_of(answer.end()) for answer in answers} == {old}
    assert questions.all == 2


async def test_who_is_gone_before_the_answer_leaves_the_question_to_the_next(control, two_pages, questions):
    cookie, old, new = two_pages
    control.spawner.tokens = {old.id: (b"a" * 32,), new.id: (b"b" * 32,)}
    control.spawner.busy = {old.id, new.id}
    path = f"/app/plain/session/{'a' * 32}/download/x"
    first = asyncio.create_task(control.ask(path, cookie))
    await until(lambda: questions.now)
    second = asyncio.create_task(control.ask(path, cookie))
    await asyncio.sleep(0.01)
    first.cancel()
    control.spawner.busy = set()
    assert control.worker_of((await second).end()) is old


async def test_invented_tokens_do_not_take_a_workers_connections(control, two_pages, questions, monkeypatch):
    cookie, old, new = two_pages
    monkeypatch.setattr(issuer, "_WITHIN", 0.3)
    control.spawner.busy = {old.id, new.id}
    paths = [f"/app/plain/session/{number:032x}/download/x" for number in range(100)]
    answers = await asyncio.gather(*(control.ask(path, cookie) for path in paths))
    assert questions.most == 2 * 16
    assert [answer.status for answer in answers if not answer.forwarded] == [429] * 84
    for answer in answers:
        if answer.forwarded:
            answer.end()


async def test_a_page_that_was_closed_takes_no_slot_of_its_old_worker_again(control, clock):
    await control.app(max_sessions_per_worker=2)
    first = await control.visit()
    pages = [(await control.socket("plain", first.cookie))[0]]
    other, _ = await control.socket("plain", (await control.visit()).cookie)  # another visitor keeps that worker alive
    old = control.worker_of(pages[0])
    assert control.worker_of(other) is old
    for _ in range(2):
        await control.deploy("plain")
        (await control.ask("/app/plain/", first.cookie, html=True)).end()
        await control.quiet()
        pages.append((await control.socket("plain", first.cookie))[0])
        control.spawner.tokens = {old.id: (b"a" * 32,)}
        (await control.ask(f"/app/plain/session/{'a' * 32}/download/x", first.cookie)).end()
    pages[0].end()
    await clock.advance(61)
    await asyncio.sleep(0.01)
    assert len(old.slots) == 1
    late = await control.ask(f"/app/plain/session/{'a' * 32}/download/x", first.cookie)
    assert control.worker_of(late.end()) is control.worker_of(pages[-1])
    assert len(old.slots) == 1


async def test_a_token_that_is_revoked_while_the_server_still_starts_opens_nothing(control):
    await control.app(access_type="logged_in")
    token, plain = await control.services.tokens.create("admin", "short", 600)
    bearer = {"Authorization": f"Bearer {plain}".encode()}
    known = await control.visit(**bearer)
    control.fleet.adopted.clear()
    asked = [asyncio.create_task(control.ask("/app/plain/", cookie, **bearer)) for cookie in (known.cookie, None)]
    await asyncio.sleep(0.1)
    await control.services.tokens.revoke("admin", token.id)
    control.fleet.adopted.set()
    assert [answer.status for answer in await asyncio.gather(*asked)] == [401, 401]


async def test_a_token_that_is_revoked_while_workers_are_asked_opens_nothing(start, monkeypatch):
    control = await start()
    monkeypatch.setattr(issuer, "_WITHIN", 0.5)
    await control.app(access_type="logged_in")
    token, plain = await control.services.tokens.create("admin", "short", 600)
    bearer = {"Authorization": f"Bearer {plain}".encode()}
    first = await control.visit(**bearer)
    old, _ = await control.socket("plain", first.cookie, **bearer)
    await control.deploy("plain")
    (await control.ask("/app/plain/", first.cookie, html=True, **bearer)).end()
    await control.quiet()
    new, _ = await control.socket("plain", first.cookie, **bearer)
    control.spawner.busy = {control.worker_of(old).id, control.worker_of(new).id}
    path = f"/app/plain/session/{'a' * 32}/websocket/"
    asked = asyncio.create_task(control.ask(path, first.cookie, websocket=True, **bearer))
    await asyncio.sleep(0.1)
    await control.services.tokens.revoke("admin", token.id)
    assert (await asked).status == 401


async def test_access_that_is_lost_while_workers_are_asked_is_not_given(control, two_pages, monkeypatch):
    cookie, old, new = two_pages
    monkeypatch.setattr(issuer, "_WITHIN", 0.5)
    control.spawner.busy = {old.id, new.id}
    asked = asyncio.create_task(control.ask(f"/app/plain/session/{'a' * 32}/download/x", cookie))
    await asyncio.sleep(0)
    await control.change("plain", enabled=False)
    assert not asked.done()
    assert (await asked).status == 503


async def test_a_download_that_is_under_way_outlives_the_reload_of_its_page_after_a_redeploy(control):
    await control.app()
    first = await control.visit()
    page, _ = await control.socket("plain", first.cookie)
    old = control.worker_of(page)
    download = await control.ask("/app/plain/session/abc/download/report", first.cookie)
    await control.deploy("plain")
    page.end()
    (await control.ask("/app/plain/", first.cookie, html=True)).end()
    await control.quiet()
    assert old.state is State.DRAINING
    download.end()
    await until(old.ended.is_set, "the end of the worker that has nothing more to do")
    assert old.end_reason == "redeployed"


async def test_who_worked_for_long_without_a_request_is_known_after_his_connection_dropped(start, clock):
    control = await start("proxy.session_idle_ttl = '10m'\nproxy.idle_worker_timeout = '10h'")
    await control.app()
    first = await control.visit()
    page, _ = await control.socket("plain", first.cookie)
    await clock.advance(3600)
    page.end()
    back = await control.ask("/app/plain/", first.cookie)
    assert control.worker_of(back.end()) is control.worker_of(page)


async def test_who_worked_for_long_without_a_request_is_known_after_a_restart(start, clock):
    control = await start("proxy.session_idle_ttl = '10m'\nproxy.idle_worker_timeout = '10h'")
    await control.app()
    first = await control.visit()
    page, _ = await control.socket("plain", first.cookie)
    worker = control.worker_of(page).id
    await clock.advance(3600)
    await control.stop_daemon()
    await control.start_daemon()
    back = await control.ask("/app/plain/", first.cookie)
    assert control.worker_of(back.end()).id == worker


async def test_a_page_that_is_asked_for_while_a_failed_start_is_written_down_tells_of_the_failure(control):
    await control.app()
    control.spawner.serves = False
    control.spawner.words = b"bwrap: Can't mount /secret/path\n"
    page = await control.ask("/app/plain/", html=True)
    started = (await until(control.spawner.running))[0]
    await until(lambda: control.fleet.all()[0].socket)
    database = sqlite3.connect(control.state / "blockyard.db", isolation_level=None, check_same_thread=False)
    with contextlib.closing(database) as other:
        await asyncio.to_thread(other.execute, "BEGIN IMMEDIATE")  # somebody else's: nothing can be written meanwhile
        control.spawner.exit(started.id, status=1)
        await until(lambda: control.fleet.all()[0].state is State.ENDED)
        again = await control.ask("/app/plain/", page.cookie, html=True)
        assert "/secret/path" in control.fleet.all()[0].end_reason
        other.execute("ROLLBACK")
    assert again.status == 502
    assert "The app was ended: it exited with status 1" in again.text
    assert "secret" not in again.text


# --- what a visitor is told ------------------------------------------------------------------------------------------


async def test_a_worker_that_fails_is_told_by_whether_it_still_runs(control):
    await control.app()
    served = await control.visit()
    request = head("/app/plain/")
    running = control.gate.failed(request, served.verdict, Exception("the status line is malformed."))
    assert running.status == 502
    assert b"(the status line is malformed)" in running.body
    control.spawner.exit(control.worker_of(served).id)
    await until(lambda: not control.fleet.all())
    assert b"stopped" in control.gate.failed(request, served.verdict, Exception("gone")).body


async def test_the_sandboxs_own_words_are_for_the_owner_and_not_for_visitors(control):
    await control.app()
    control.spawner.words = b"bwrap: execvp /secret/path: No such file or directory\n"
    control.spawner.serves = False
    page = await control.ask("/app/plain/", html=True)
    (worker,) = await until(control.spawner.running)
    known = control.fleet.find(worker.id)
    await until(lambda: known.socket is not None)
    control.spawner.exit(worker.id, 1)
    await known.ended.wait()
    assert "/secret/path" in known.end_reason
    told = await control.ask("/app/plain/", page.cookie, html=True)
    assert told.status == 503
    assert "could not start" in told.text
    assert "/secret/path" not in told.text


SECRET = "Check bundles/0123abcd in /srv/secret/state, without links: No such file or directory."


async def told_twice(control, name="plain"):
    """What a program and a person are told by a start that fails, and by the next, which is not tried yet."""
    first = await control.ask(f"/app/{name}/")
    await control.quiet()
    again = await control.ask(f"/app/{name}/", html=True)
    assert (first.status, again.status) == (503, 503)
    return f"{first.text}\n{again.text}"


async def reason(control):
    async with control.services.database.begin() as connection:
        return await connection.scalar(text("SELECT end_reason FROM workers"))


@pytest.mark.parametrize("code", ["bundle_missing", "system_error"])
async def test_why_the_spawner_refuses_is_for_the_owner_and_not_for_visitors(control, code):
    await control.app()
    control.spawner.refuse = (code, SECRET)
    told = await told_twice(control)
    assert "could not start: failed for a reason that its owner can see. It is tried again in" in told
    assert "secret" not in told
    assert "0123abcd" not in told
    assert "/srv/secret/state" in await reason(control)


async def test_that_a_backend_has_no_helper_is_for_the_owner_and_not_for_visitors(start):
    control = await start('docker.spawner_socket = "/run/nobody/listens.sock"')
    await control.app(backend="docker")
    told = await told_twice(control)
    assert "its owner can see" in told
    for internal in ("listens.sock", "systemctl", "spawner"):
        assert internal not in told
    assert "/run/nobody/listens.sock" in await reason(control)


async def test_how_an_impostor_was_found_out_is_not_told_to_visitors(control):
    await control.app()
    visitor = await control.visit()
    worker = control.worker_of(visitor)
    worker.socket.betrayed("the socket belongs to uid 60017, not to the worker's 60018")
    await worker.ended.wait()
    told = await control.ask("/app/plain/", visitor.cookie, html=True)
    assert told.status == 502
    assert "The app was ended: it failed for a reason that its owner can see." in told.text
    assert "60017" in worker.end_reason


async def test_visitors_of_an_app_without_a_bundle_read_no_command(control):
    await control.app(access_type="public")
    await control.change("plain", active_bundle=None)
    told = await control.ask("/app/plain/", html=True)
    assert told.status == 503
    assert "nothing to show yet" in told.text
    assert "deploy" not in told.text


@pytest.mark.parametrize(("error", "status"), [(Crowded("full"), 429), (Overloaded("full"), 503)])
async def test_a_worker_that_others_keep_busy_is_told_as_busy_and_not_as_broken(control, error, status):
    await control.app()
    visit = await control.visit()
    reply = control.gate.failed(head("/app/plain/", html=True), visit.verdict, error)
    assert reply.status == status
    assert (b"Retry-After", b"%d" % error.retry_after) in reply.headers


async def test_a_hostile_title_is_inert_in_the_loading_page(control):
    await control.app(title="</title><script>alert(1)</script>{{7*7}}'\"")
    control.spawner.serves = False
    page = (await control.ask("/app/plain/", html=True)).text
    assert "<script>alert" not in page
    assert "{{7*7}}" in page


async def test_an_apps_identity_headers_follow_the_token_and_nothing_else(control):
    await control.app(access_type="logged_in")
    _, plain = await control.services.tokens.create("admin", "mine")
    answer = (await control.ask("/app/plain/", Authorization=f"Bearer {plain}".encode(), X_Shiny_User=b"root")).end()
    assert answer.identity[b"X-Shiny-User"] == b"admin"
    assert answer.identity[b"X-Shiny-Access"] == b"owner"
    await control.change("plain", access_type="public")
    assert (await control.ask("/app/plain/", X_Shiny_User=b"root")).end().identity == {b"X-Shiny-Access": b"anonymous"}


async def test_every_way_to_ask_for_a_token_but_bearer_is_anonymous(control):
    await control.app(access_type="logged_in")
    _, plain = await control.services.tokens.create("admin", "mine")
    for wrong in (f"Basic {plain}", plain, "Bearer", "Bearer ", f"Bearer {plain}x", f"Bearer \xff{plain}"):
        assert (await control.ask("/app/plain/", Authorization=wrong.encode("latin-1"))).status == 401


async def test_the_principal_of_another_user_is_not_given_somebodys_session(control):
    await control.app(access_type="logged_in")
    async with control.services.database.begin() as connection:
        await connection.exec_driver_sql("INSERT INTO users (sub, role, created_at) VALUES ('eve', 'viewer', 0)")
    (_, mine), (_, hers) = [await control.services.tokens.create(sub, "t") for sub in ("admin", "eve")]
    victim = await control.visit(Authorization=f"Bearer {mine}".encode())
    thief = (await control.ask("/app/plain/", victim.cookie, Authorization=f"Bearer {hers}".encode())).end()
    assert thief.cookie not in (None, victim.cookie)
    assert control.worker_of(thief) is not control.worker_of(victim)
    assert thief.identity[b"X-Shiny-User"] == b"eve"
