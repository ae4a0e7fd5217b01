"""Visitors who want too much: places, starts and guesses are bounded by address, and only for who asks too much."""

import asyncio

import httpx
import pytest
from running_control import until

from blockyard_api.errors import TooMany, Unauthorized
from blockyard_api.identity.allowance import Allowance
from blockyard_api.identity.tokens import Tokens

GREEDY = "203.0.113.9"
FEW = "proxy.max_sessions_per_visitor = 5\nproxy.session_idle_ttl = '24h'"


def retry_after(answer):
    return int(dict(answer.headers)[b"Retry-After"])


async def take_all(control, most, **more):
    """Open pages with their WebSockets from one address, until it is refused; returns what was answered last."""
    for _ in range(most + 1):
        answer = (await control.ask("/app/plain/", client=GREEDY, **more)).end()
        if not answer.forwarded:
            return answer
        await control.socket("plain", answer.cookie, client=GREEDY, **more)
    raise AssertionError("it was never refused")


# --- places ----------------------------------------------------------------------------------------------------------


async def test_one_address_cannot_hold_more_places_than_the_configuration_says_and_others_are_served(start):
    control = await start(FEW)
    await control.app()
    refused = await take_all(control, 5)
    assert refused.status == 429
    assert retry_after(refused) > 0
    assert len(control.spawner.running()) == 5
    assert await control.visit()


async def test_a_place_that_is_given_up_can_be_taken_again(start, clock):
    control = await start(FEW)
    await control.app()
    pages = [(await control.visit(client=GREEDY)) for _ in range(5)]
    assert (await control.ask("/app/plain/", client=GREEDY)).status == 429
    await clock.advance(16)  # no page has opened a WebSocket
    assert (await control.ask("/app/plain/", pages[0].cookie, client=GREEDY)).end().forwarded
    assert [(await control.ask("/app/plain/", client=GREEDY)).end().forwarded for _ in range(5)] == [True] * 4 + [False]


@pytest.mark.parametrize("sessions", [1, 100])
async def test_cookies_that_are_saved_up_hold_no_more_places_at_once(start, clock, sessions):
    control = await start(FEW)
    await control.app(max_sessions_per_worker=sessions)
    cookies = []
    for _ in range(4):
        cookies += [(await control.visit(client=GREEDY)).cookie for _ in range(5)]
        await clock.advance(20)
    answers = [(await control.ask("/app/plain/", cookie, client=GREEDY)).end() for cookie in cookies]
    assert [answer.forwarded for answer in answers].count(True) == 5
    assert {answer.status for answer in answers if not answer.forwarded} == {429}
    assert sum(len(worker.slots) for worker in control.fleet.all()) == 5


async def test_a_class_behind_one_address_opens_its_pages_at_once_if_it_may_have_so_many(start):
    control = await start("proxy.max_sessions_per_visitor = 200")
    await control.app(max_sessions_per_worker=100)
    answers = [(await control.ask("/app/plain/", client=GREEDY)).end() for _ in range(250)]
    assert [answer.forwarded for answer in answers] == [True] * 200 + [False] * 50


async def test_the_addresses_of_one_ipv6_network_share_their_places(start):
    control = await start(FEW)
    await control.app()
    answers = [(await control.ask("/app/plain/", client=f"2001:db8::{number:x}")).end() for number in range(8)]
    assert [answer.forwarded for answer in answers].count(True) == 5


async def test_whoever_is_logged_in_counts_by_himself_and_not_with_his_address(start):
    control = await start(FEW)
    await control.app()
    await take_all(control, 5)
    _, plain = await control.services.tokens.create("admin", "office")
    bearer = {"Authorization": f"Bearer {plain}".encode()}
    assert (await take_all(control, 5, **bearer)).status == 429
    assert len(control.spawner.running()) == 10


async def test_a_page_that_moves_to_another_worker_is_not_counted_twice(start):
    control = await start(FEW)
    await control.app()
    pages = [await control.visit(client=GREEDY) for _ in range(5)]
    for page in pages:
        await control.socket("plain", page.cookie, client=GREEDY)
    await control.deploy("plain")
    for page in pages:
        assert (await control.ask("/app/plain/", page.cookie, client=GREEDY, html=True)).status in (None, 202)
    await control.quiet()
    for page in pages:
        assert (await control.ask("/app/plain/", page.cookie, client=GREEDY, html=True)).end().forwarded


async def test_places_of_workers_that_ended_count_no_more(start):
    control = await start(FEW)
    app = await control.app()
    for _ in range(3):
        await take_all(control, 5)
        await control.fleet.end_all(app, "the app was disabled")
    assert (await control.ask("/app/plain/", client=GREEDY)).end().forwarded


async def test_a_storm_of_strangers_starts_no_more_workers_than_may_be_and_passes(start, clock):
    control = await start("proxy.max_workers = 7")
    await control.app("storm")
    await control.app("calm")
    known = await control.visit("calm")
    await control.socket("calm", known.cookie)
    storm = [asyncio.create_task(control.ask("/app/storm/", client=f"198.18.{n >> 8}.{n & 255}")) for n in range(500)]
    assert (await control.ask("/app/calm/", known.cookie)).end().forwarded
    answers = [(await one).end() for one in storm]
    assert [answer.forwarded for answer in answers].count(True) == 6
    assert all(retry_after(answer) > 0 for answer in answers if not answer.forwarded)
    assert control.spawner.most_running == 7
    await clock.advance(16)
    assert await control.visit("storm")


# --- crashes ---------------------------------------------------------------------------------------------------------


async def crash(control, answer):
    worker = control.worker_of(answer)
    control.spawner.exit(worker.id, number=11)
    await worker.ended.wait()


async def test_a_visitor_who_crashes_a_fresh_worker_keeps_himself_from_the_app_and_nobody_else(control):
    await control.app()
    await crash(control, await control.visit(client=GREEDY))
    own = await control.ask("/app/plain/", client=GREEDY)
    assert own.status == 503
    assert "stopped soon after its start" in own.text
    assert retry_after(own) == 1
    assert await control.visit()


async def test_who_crashes_workers_again_and_again_waits_ever_longer(control, clock):
    await control.app()
    for expected in (1, 2, 4, 8, 16, 32, 60, 60):
        await crash(control, await control.visit(client=GREEDY))
        assert retry_after(await control.ask("/app/plain/", client=GREEDY)) == expected
        await clock.advance(expected)
    await clock.advance(121)
    await crash(control, await control.visit(client=GREEDY))
    assert retry_after(await control.ask("/app/plain/", client=GREEDY)) == 1


async def test_who_waits_after_a_crash_is_not_let_into_the_worker_of_others_meanwhile(control):
    await control.app(max_sessions_per_worker=10)
    await crash(control, await control.visit(client=GREEDY))
    await control.visit()
    assert (await control.ask("/app/plain/", client=GREEDY)).status == 503


async def test_a_worker_that_lived_well_makes_up_for_his_earlier_crash(control, clock):
    await control.app()
    for _ in range(3):
        await crash(control, await control.visit(client=GREEDY))
        await clock.advance(8)
    page = await control.visit(client=GREEDY)
    await control.socket("plain", page.cookie, client=GREEDY)
    await clock.advance(11)
    await crash(control, page)
    assert await control.visit(client=GREEDY)


async def test_a_worker_that_falls_in_nobodys_hands_is_the_apps_own_failure(control, clock):
    await control.app(pre_warmed_sessions=1)
    for number in range(4):
        await control.quiet()
        (worker,) = control.fleet.all()
        control.spawner.exit(worker.id, 1)
        await worker.ended.wait()
        assert "stopped soon after its start" in (await control.ask("/app/plain/")).text
        assert len(control.spawner.workers) == number + 1
        await clock.advance(60)
        control.fleet.reconcile(worker.app_id)


HOSTS = ["uid_pool_exhausted", "no_cgroup", "limits_unavailable", "exec_failed", "system_error"]
ENGINES = ["docker_unreachable", "docker_slow", "docker_denied", "docker_refused", "docker_runtime", "no_image"]
ENGINES += ["no_service_network", "network_pool_exhausted"]


@pytest.mark.parametrize("code", HOSTS + ENGINES)
async def test_a_start_that_fails_for_the_hosts_sake_does_not_make_the_app_wait_ever_longer(control, clock, code):
    await control.app()
    control.spawner.refuse = (code, "See to the host.")
    for _ in range(8):
        assert "its owner can see" in (await control.ask("/app/plain/")).text
        assert control.fleet.setback(control.catalog.named("plain")) == "The app could not start: See to the host."
        assert retry_after(await control.ask("/app/plain/")) <= 2
        await clock.advance(2)
    control.spawner.refuse = None
    assert await control.visit()


async def test_a_start_that_is_refused_for_the_apps_own_settings_is_tried_ever_more_seldom(control, clock):
    await control.app()
    control.spawner.refuse = ("limit_above_ceiling", "Lower the memory limit.")
    for expected in (1, 2, 4):
        await control.ask("/app/plain/")
        assert retry_after(await control.ask("/app/plain/")) == expected
        await clock.advance(expected)


# --- guesses ---------------------------------------------------------------------------------------------------------


def client_at(control, address, **headers):
    transport = httpx.ASGITransport(control.asgi, client=(address, 1))
    return httpx.AsyncClient(transport=transport, base_url="http://test", headers=headers)


async def guess(client, times, **headers):
    return [
        await client.get("/api/v1/users/me", headers={"Authorization": f"Bearer by_{number}", **headers})
        for number in range(times)
    ]


async def test_wrong_tokens_of_one_address_are_told_to_wait_and_those_of_another_are_not(control, clock):
    async with client_at(control, GREEDY) as greedy, client_at(control, "203.0.113.10") as other:
        answers = await guess(greedy, 30)
        assert [answer.status_code for answer in answers] == [401] * 20 + [429] * 10
        assert set(answers[-1].json()) == {"error", "message"}
        assert int(answers[-1].headers["Retry-After"]) > 0
        assert (await guess(other, 1))[0].status_code == 401
        await clock.advance(11)
        assert [answer.status_code for answer in await guess(greedy, 3)] == [401, 401, 429]


@pytest.mark.parametrize("used_before", [True, False])
async def test_a_right_token_is_right_from_an_address_that_guesses(control, used_before):
    _, plain = await control.services.tokens.create("admin", "office")
    async with client_at(control, GREEDY) as client:
        right = {"Authorization": f"Bearer {plain}"}
        if used_before:
            assert (await client.get("/api/v1/users/me", headers=right)).status_code == 200
        assert (await guess(client, 100))[-1].status_code == 429
        for _ in range(50):
            assert (await client.get("/api/v1/users/me", headers=right)).status_code == 200


async def test_guesses_at_an_app_and_at_the_control_plane_are_counted_together(control):
    await control.app(access_type="logged_in")
    async with client_at(control, GREEDY) as client:
        await guess(client, 20)
    answer = await control.ask("/app/plain/", client=GREEDY, Authorization=b"Bearer by_guess")
    assert answer.status == 429
    assert retry_after(answer) > 0
    assert not control.spawner.workers


async def test_guesses_at_the_one_time_token_are_told_to_wait_and_the_right_one_is_right(control):
    offered = await control.services.tokens.offer_bootstrap()
    async with client_at(control, GREEDY) as client:
        answers = [await client.post("/api/v1/bootstrap", json={"token": str(number)}) for number in range(25)]
        assert [answer.status_code for answer in answers] == [403] * 20 + [429] * 5
        assert (await client.post("/api/v1/bootstrap", json={"token": offered})).status_code == 201


async def test_an_address_that_a_client_makes_up_is_not_believed(control):
    async with client_at(control, GREEDY) as client:
        answers = [(await guess(client, 1, **{"X-Forwarded-For": f"10.0.0.{n}"}))[0].status_code for n in range(25)]
    assert answers == [401] * 20 + [429] * 5


async def test_behind_a_trusted_proxy_it_is_the_visitors_address_that_counts(start):
    control = await start(f"server.trusted_proxies = ['{GREEDY}']")
    async with client_at(control, GREEDY) as proxy:
        theirs = {"X-Forwarded-For": "1.2.3.4, 198.51.100.1"}  # what stands before the last hop anybody may write
        assert (await guess(proxy, 25, **theirs))[-1].status_code == 429
        assert (await guess(proxy, 1, **{"X-Forwarded-For": "1.2.3.4, 198.51.100.2"}))[0].status_code == 401


async def test_while_an_address_guesses_its_tokens_are_looked_up_one_at_a_time(store):
    class Counting:
        """The database, and how many ask it at the same time."""

        now = most = 0

        def begin(self):
            return self

        async def __aenter__(self):
            self.now += 1
            self.most = max(self.most, self.now)
            self.inner = store.begin()
            await asyncio.sleep(0)
            return await store.begin().__aenter__()

        async def __aexit__(self, *_):
            self.now -= 1

    async def wrong(number):
        with pytest.raises((Unauthorized, TooMany)):
            await tokens.authenticate(f"by_{number}", GREEDY)

    tokens = Tokens(store)
    for number in range(20):
        await wrong(number)
    tokens._database = counting = Counting()
    await asyncio.gather(*[wrong(number) for number in range(4)])
    assert counting.most == 1


def test_what_is_kept_about_addresses_is_bounded_and_the_latest_are_kept(clock):
    allowance = Allowance(2, 0.1, most_addresses=1000)
    for number in range(5000):
        for _ in range(3):
            allowance.spend(f"10.{number >> 16}.{number >> 8 & 255}.{number & 255}")
    assert len(allowance._left) == 1000
    assert allowance.wait("10.0.19.135") > 0
    assert allowance.wait("10.0.0.1") == 0


async def test_a_bucket_fills_up_again_and_never_above_its_brim(clock):
    allowance = Allowance(3, 0.5)
    assert [allowance.spend("192.0.2.1") > 0 for _ in range(4)] == [False, False, False, True]
    assert 1.9 < allowance.wait("192.0.2.1") <= 2
    await clock.advance(1000)
    assert [allowance.spend("192.0.2.1") > 0 for _ in range(4)] == [False, False, False, True]


async def test_an_ipv4_address_counts_the_same_in_its_ipv6_form(clock):
    allowance = Allowance(1, 0.1)
    allowance.spend("::ffff:192.0.2.1")
    assert allowance.wait("192.0.2.1") > 0
    assert allowance.wait("::ffff:192.0.2.2") == 0


async def test_a_token_that_was_wrong_is_not_remembered_as_right(control):
    with pytest.raises(Unauthorized):
        await control.services.tokens.authenticate("by_guess", GREEDY)
    assert not control.services.tokens._known
    await until(lambda: control.alive)
