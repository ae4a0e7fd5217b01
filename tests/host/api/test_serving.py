"""A visitor's way to an app: the loading page, one worker a visitor, sessions, slots, redeploys, and ends."""

import concurrent.futures
import json
import os
import re
import shutil
import signal
import socket
import sqlite3
import time
from pathlib import Path

import httpx
import pytest
from running_pair import HELLO, read_until_closed, simple_app, wait_for
from websockets.exceptions import ConnectionClosed, InvalidStatus


def hello_files():
    return {path.name: path.read_text() for path in HELLO.iterdir() if path.is_file()}


def uid_processes(uid):
    found = []
    for entry in os.scandir("/proc"):
        if entry.name.isdigit():
            try:
                if entry.stat().st_uid == uid:
                    found.append(int(entry.name))
            except FileNotFoundError:
                pass
    return found


def test_addresses_that_are_passed_are_told_where_the_configuration_names_others(pair):
    control, relay = (url.removeprefix("http://") for url in (pair.control_url, pair.relay_origin))
    assert f"listening at {control} and {relay}, as passed by the service manager" in pair.log("api")


def test_the_example_app_is_served_to_the_first_visitor(pair):
    pair.deploy("hello", hello_files())
    page = pair.visitor().get("/app/hello/")
    assert page.status_code == 200
    assert "Hello from Blockyard" in page.text


def test_an_app_answers_over_its_websocket_and_its_messages_are_in_the_log(pair):
    pair.deploy("hello", hello_files())
    visitor = pair.visitor()
    with visitor.shiny("hello"):
        assert visitor.hello["config"]["sessionId"]
        worker = next(w for w in pair.workers("hello") if any(s["websockets"] for s in w["sessions"]))
        wait_for(
            lambda: "a session began" in pair.http.get(
                "/api/v1/apps/hello/logs", params={"worker_id": worker["id"], "stream": "false"}
            ).text,
            what="the app's message",
        )  # fmt: skip


def test_a_path_without_its_slash_and_the_control_planes_own_are_redirected(pair):
    pair.deploy("plain", simple_app())
    assert pair.visitor().get("/app/plain?x=1").headers["location"] == "/app/plain/?x=1"
    there = httpx.get(f"{pair.control_url}/app/plain/a%2Fb?x=1")
    assert there.status_code == 307
    assert there.headers["location"] == f"{pair.relay_origin}/app/plain/a%2Fb?x=1"


def test_a_person_sees_a_loading_page_that_turns_into_the_app(pair):
    pair.deploy("loading", simple_app("Sys.sleep(1)"))
    visitor = pair.visitor()
    first = visitor.get("/app/loading/", browser=True)
    assert first.status_code == 202
    assert "starting" in first.text
    probe = re.search(r'fetch\("([^"]+)"', first.text)[1]
    assert visitor.get(probe).status_code == 204
    assert "plain page" in visitor.get("/app/loading/", browser=True).text
    assert len(pair.workers("loading")) == 1


def test_however_many_requests_a_visitor_sends_at_once_one_worker_starts(pair):
    pair.deploy("once", simple_app())
    visitor = pair.visitor()
    assert visitor.get("/app/once/", browser=True).status_code == 202
    with concurrent.futures.ThreadPoolExecutor(20) as pool:
        answers = list(pool.map(lambda _: visitor.get("/app/once/"), range(20)))
    assert {answer.status_code for answer in answers} == {200}
    assert len(pair.runtime("once")["workers"]) == 1


def test_each_visitor_has_a_worker_of_his_own_by_default(pair):
    pair.deploy("own", simple_app())
    for _ in range(2):
        assert pair.visitor().get("/app/own/").status_code == 200
    workers = pair.workers("own", "active")
    assert [len(worker["sessions"]) for worker in workers] == [1, 1]


def test_visitors_share_a_worker_as_far_as_its_setting_says(pair):
    pair.deploy("shared", simple_app(), max_sessions_per_worker=2, max_workers_per_app=1)
    visitors = [pair.visitor() for _ in range(3)]
    statuses = [visitor.get("/app/shared/").status_code for visitor in visitors]
    assert statuses == [200, 200, 503]
    assert len(pair.workers("shared")) == 1


def test_a_page_that_never_opened_a_websocket_holds_its_place_only_briefly(pair):
    pair.deploy("crawled", simple_app(), max_workers_per_app=1)
    assert pair.visitor().get("/app/crawled/").status_code == 200
    refused = pair.visitor().get("/app/crawled/", browser=True)
    assert refused.status_code == 503
    assert refused.headers["retry-after"]
    wait_for(lambda: pair.visitor().get("/app/crawled/").status_code == 200, 30, "a free place")


def test_a_place_is_kept_for_a_visitor_whose_connection_dropped(own_pair):
    pair = own_pair("proxy.ws_cache_ttl = '20s'")
    pair.deploy("resume", simple_app(), max_workers_per_app=1)
    visitor = pair.visitor()
    with visitor.shiny("resume"):
        pass
    time.sleep(16)  # longer than a page's window
    assert pair.visitor().get("/app/resume/").status_code == 503
    assert visitor.get("/app/resume/").status_code == 200


def test_warm_places_are_kept_ready_and_not_ended_as_idle(own_pair):
    pair = own_pair("proxy.idle_worker_timeout = '2s'")
    pair.deploy("warm", simple_app(), pre_warmed_sessions=1)
    first = wait_for(lambda: pair.workers("warm", "active"), what="a warm worker")[0]["id"]
    time.sleep(5)
    assert [worker["id"] for worker in pair.workers("warm")] == [first]
    assert pair.visitor().get("/app/warm/", browser=True).status_code == 200
    assert first in {worker["id"] for worker in pair.workers("warm") if worker["sessions"]}
    wait_for(
        lambda: [worker for worker in pair.workers("warm", "active") if worker["id"] != first], what="the next one"
    )


TICKING = simple_app(
    server="function(input, output, session) { observe({ invalidateLater(200); session$sendCustomMessage('t', 1) }) }"
)


def test_timers_of_the_app_and_pings_do_not_keep_an_abandoned_page_alive(own_pair):
    pair = own_pair("proxy.idle_worker_timeout = '3s'")
    pair.deploy("ticking", TICKING)
    visitor = pair.visitor()
    with visitor.shiny("ticking") as socket_, pytest.raises(ConnectionClosed):
        read_until_closed(socket_, 10, each=socket_.ping)
    wait_for(lambda: pair.runtime("ticking")["workers"][0]["end_reason"] == "idle", what="the idle end")


def test_a_visitor_who_does_something_keeps_his_worker(own_pair):
    pair = own_pair("proxy.idle_worker_timeout = '3s'")
    pair.deploy("busy", TICKING)
    visitor = pair.visitor()
    with visitor.shiny("busy") as socket_:
        for number in range(12):
            socket_.send(json.dumps({"method": "update", "data": {"x": number}}))
            time.sleep(0.5)
        assert len(pair.workers("busy", "active")) == 1


def test_after_a_redeploy_old_sessions_stay_and_pages_loaded_anew_get_the_new_bundle(pair):
    pair.deploy("moving", simple_app(ui="fluidPage('the first')"))
    old = pair.visitor()
    with old.shiny("moving") as socket_:
        pair.deploy("moving", simple_app(ui="fluidPage('the second')"))
        assert {worker["status"] for worker in pair.workers("moving")} == {"draining"}
        socket_.send(json.dumps({"method": "update", "data": {"x": 1}}))
        assert "the second" in pair.visitor().get("/app/moving/").text
        wait_for(lambda: "the second" in old.get("/app/moving/", browser=True).text, what="the new page")
        assert "draining" in {worker["status"] for worker in pair.workers("moving")}
    wait_for(lambda: not pair.workers("moving", "draining"), 90, "the end of the old worker")
    reasons = {worker["end_reason"] for worker in pair.runtime("moving")["workers"] if worker["ended_at"]}
    assert reasons == {"redeployed"}


def test_a_rollback_serves_the_earlier_bundle_again(pair):
    pair.deploy("back", simple_app(ui="fluidPage('the first')"))
    pair.deploy("back", simple_app(ui="fluidPage('the second')"))
    assert pair.http.post("/api/v1/apps/back/rollback", json={}).status_code == 200
    assert "the first" in pair.visitor().get("/app/back/").text


def test_a_disabled_app_closes_open_websockets_at_once_and_answers_503(pair):
    pair.deploy("switched", simple_app())
    visitor = pair.visitor()
    with visitor.shiny("switched") as socket_:
        began = time.monotonic()
        assert pair.http.post("/api/v1/apps/switched/disable").status_code == 200
        with pytest.raises(ConnectionClosed):
            read_until_closed(socket_, 5)
        assert time.monotonic() - began < 1
    assert visitor.get("/app/switched/", browser=True).status_code == 503
    wait_for(lambda: not pair.workers("switched"), what="the end of its workers")
    pair.http.post("/api/v1/apps/switched/enable")
    assert visitor.get("/app/switched/").status_code == 200


def test_a_renamed_app_is_found_under_its_old_name(pair):
    pair.deploy("before", simple_app())
    assert pair.http.patch("/api/v1/apps/before", json={"name": "after"}).json()["name"] == "after"
    moved = pair.visitor().get("/app/before/x?y=1")
    assert moved.headers["location"] == f"{pair.relay_origin}/app/after/x?y=1"


def test_a_stopped_app_runs_its_own_callbacks_before_it_ends(pair):
    pair.deploy("polite", simple_app("onStop(function() message('put away'))"))
    assert pair.visitor().get("/app/polite/").status_code == 200
    worker = pair.workers("polite")[0]["id"]
    pair.http.post("/api/v1/apps/polite/disable")
    wait_for(lambda: not pair.workers("polite"), what="the end")
    log = pair.http.get("/api/v1/apps/polite/logs", params={"worker_id": worker, "stream": "false"}).text
    assert "put away" in log


def test_a_deleted_app_leaves_no_worker_and_no_name(pair):
    pair.deploy("gone", simple_app())
    assert pair.visitor().get("/app/gone/").status_code == 200
    assert pair.http.delete("/api/v1/apps/gone").status_code == 204
    assert pair.visitor().get("/app/gone/").status_code == 404
    assert pair.http.get("/api/v1/apps/gone").status_code == 404
    assert "gone" in {app["name"] for app in pair.http.get("/api/v1/apps?deleted=true").json()["apps"]}


def test_the_whole_bundle_counts_www_and_r_and_data_and_an_inert_renv(pair):
    files = {
        "proj/server.R": "function(input, output, session) {}",
        "proj/ui.R": "fluidPage(helper(), readLines('data.txt'))",
        "proj/R/helper.R": "helper <- function() 'from R/'",
        "proj/data.txt": "from the working directory",
        "proj/www/asset.txt": "from www",
        "proj/.Rprofile": "source('renv/activate.R')\noptions(profile.ran = TRUE)",
        "proj/global.R": "if (!isTRUE(getOption('profile.ran'))) stop('no profile')",
    }
    pair.deploy("whole", files)
    visitor = pair.visitor()
    page = visitor.get("/app/whole/").text
    assert "from R/" in page
    assert "from the working directory" in page
    assert visitor.get("/app/whole/asset.txt").text == "from www"


# --- what goes wrong, as a visitor sees it ---------------------------------------------------------------------------


def test_an_app_that_fails_at_its_start_is_told_as_that_and_backs_off(pair):
    pair.deploy("broken", simple_app("stop('the database is on fire')"))
    visitor = pair.visitor()
    answer = visitor.get("/app/broken/")
    assert answer.status_code == 503
    assert "could not start" in answer.json()["message"]
    assert "on fire" not in answer.text  # an app's own words are for its owner
    for _ in range(10):
        assert pair.visitor().get("/app/broken/").status_code == 503
    ended = pair.runtime("broken")["workers"]
    assert len(ended) <= 4  # of eleven visits: one at once, and after a second, two and four where the machine is slow
    assert "exited with status 1" in ended[0]["end_reason"]
    log = pair.http.get("/api/v1/apps/broken/logs?stream=false").text
    assert "the database is on fire" in log

    def problem():  # not the loading page, which comes when it is just tried again
        page = pair.visitor().get("/app/broken/", browser=True)
        return page.text if page.status_code == 503 else ""

    assert "Try again" in wait_for(problem, what="the page that says so")
    pair.deploy("broken", simple_app())
    assert pair.visitor().get("/app/broken/").status_code == 200  # a new bundle is tried at once


def test_an_app_that_takes_too_long_is_told_as_that(own_pair):
    pair = own_pair("proxy.worker_start_timeout = '2s'")
    pair.deploy("slow", simple_app("Sys.sleep(30)"))
    answer = pair.visitor().get("/app/slow/")
    assert answer.status_code == 503
    assert "did not answer within 2 s" in answer.json()["message"]
    assert not pair.workers("slow")


def test_an_app_that_crashes_later_is_told_as_that_and_the_next_try_starts_it_again(pair):
    pair.deploy(
        "crashing",
        simple_app(
            server="function(input, output, session) { observe(if (isTRUE(input$die)) tools::pskill(Sys.getpid(), 9)) }"
        ),
    )
    visitor = pair.visitor()
    with visitor.shiny("crashing") as socket_:
        socket_.send(json.dumps({"method": "update", "data": {"die": True}}))
        with pytest.raises(ConnectionClosed):
            read_until_closed(socket_, 10)
    wait_for(lambda: not pair.workers("crashing"), what="the end")
    page = visitor.get("/app/crashing/", browser=True)
    assert page.status_code == 502
    assert "signal 9" in page.text
    assert "Try again" in page.text
    assert pair.runtime("crashing")["workers"][0]["end_reason"] == "was ended by signal 9"
    wait_for(lambda: visitor.get("/app/crashing/").status_code == 200, what="the app again")


def test_a_sandbox_that_cannot_be_made_is_told_at_once_in_its_own_words(own_pair):
    pair = own_pair("process.r_path = '/usr/bin/R-is-not-here'")
    pair.deploy("boxless", simple_app())
    began = time.monotonic()
    answer = pair.visitor().get("/app/boxless/")
    assert answer.status_code == 503
    assert time.monotonic() - began < 10  # and not the minute that an app has to start
    assert "bwrap" not in answer.text
    assert "bwrap: execvp /usr/bin/R-is-not-here" in pair.runtime("boxless")["workers"][0]["end_reason"]


def test_an_app_without_bundle_says_so(pair):
    pair.http.post("/api/v1/apps", json={"name": "empty"})
    pair.http.patch("/api/v1/apps/empty", json={"access_type": "public"})
    answer = pair.visitor().get("/app/empty/")
    assert answer.status_code == 503
    assert "nothing to show yet" in answer.json()["message"]


def test_a_bundle_that_is_gone_is_told_to_the_owner_and_not_to_visitors(pair):
    bundle = pair.deploy("gone", simple_app())["bundle_id"]
    shutil.rmtree(pair.state / "bundles" / bundle)
    for visitor in (pair.visitor().get("/app/gone/"), pair.visitor().get("/app/gone/", browser=True)):
        assert visitor.status_code == 503
        assert "a reason that its owner can see" in visitor.text
        assert bundle not in visitor.text
        assert str(pair.root) not in visitor.text
    assert bundle in pair.runtime("gone")["workers"][0]["end_reason"]


def test_a_bundle_that_workers_may_not_read_is_told_to_the_owner_and_not_to_visitors(pair):
    bundle = pair.deploy("private", simple_app())["bundle_id"]
    (pair.state / "bundles" / bundle).chmod(0o700)
    answer = pair.visitor().get("/app/private/")
    assert answer.status_code == 503
    assert "could not start" in answer.json()["message"]
    assert "ermission" not in answer.text
    assert bundle not in answer.text
    assert "ermission denied" in pair.runtime("private")["workers"][0]["end_reason"]


def test_a_pool_that_is_used_up_is_told_and_nothing_leaks(own_pair):
    pair = own_pair(first_uid=201_000, last_uid=201_000)
    pair.deploy("pool", simple_app())
    assert pair.visitor().get("/app/pool/").status_code == 200
    refused = pair.visitor().get("/app/pool/")
    assert refused.status_code == 503
    assert "uid" not in refused.text
    assert "uid" in pair.runtime("pool")["workers"][-1]["end_reason"]
    assert len(list(pair.runtime_dirs())) == 1
    pair.http.post("/api/v1/apps/pool/disable")
    wait_for(lambda: not list(pair.runtime_dirs()), what="an empty runtime directory")
    pair.http.post("/api/v1/apps/pool/enable")
    wait_for(lambda: pair.visitor().get("/app/pool/").status_code == 200, what="the uid's return")


IMPOSTOR = """
socket <- Sys.getenv('BLOCKYARD_SOCKET')
later::later(function() {{ unlink(socket); file.symlink('{target}', socket) }}, 0.5)
"""


def test_a_worker_that_puts_a_link_to_the_spawner_in_its_sockets_place_is_ended(pair):
    pair.deploy("impostor", simple_app(IMPOSTOR.format(target=pair.spawner_socket)))
    visitor = pair.visitor()
    visitor.get("/app/impostor/")
    time.sleep(1.5)
    connections = pair.log("spawner").count("refus")
    answer = visitor.http.post("/app/impostor/")  # never sent on a connection that was made, and checked, before
    assert answer.status_code in (502, 503)
    wait_for(lambda: not pair.workers("impostor"), what="the end")
    assert "impostor" in pair.runtime("impostor")["workers"][0]["end_reason"]
    assert pair.log("spawner").count("refus") == connections


def test_nothing_of_a_worker_is_left_after_its_end(pair):
    pair.deploy("leaving", simple_app("system('setsid sleep 1000 &')"))
    assert pair.visitor().get("/app/leaving/").status_code == 200
    worker = pair.workers("leaving")[0]["id"]
    uid = (pair.runtime_dir / worker).stat().st_uid
    assert len(uid_processes(uid)) >= 3
    pair.http.post("/api/v1/apps/leaving/disable")
    wait_for(lambda: not pair.workers("leaving"), what="the end")
    wait_for(lambda: not uid_processes(uid), 5, "init to reap the dead")
    assert not (pair.runtime_dir / worker).exists()
    assert not (pair.cgroup / "workers" / worker).exists()


# --- access ----------------------------------------------------------------------------------------------------------


def test_a_private_app_is_401_with_a_page_for_strangers_and_serves_its_owner(pair):
    pair.deploy(
        "private",
        simple_app(ui="function(request) fluidPage(request$HTTP_X_SHINY_USER, request$HTTP_X_SHINY_ACCESS)"),
        access_type="acl",
    )
    stranger = pair.visitor().get("/app/private/", browser=True)
    assert stranger.status_code == 401
    assert "not public" in stranger.text
    assert pair.visitor().get("/app/private/", Authorization="Bearer by_wrong").status_code == 401
    owner = pair.visitor().get("/app/private/", Authorization=f"Bearer {pair.token}")
    assert owner.status_code == 200
    assert "admin" in owner.text
    assert "owner" in owner.text


def test_a_stolen_routing_cookie_does_not_open_a_private_app(pair):
    pair.deploy("secret", simple_app(), access_type="logged_in")
    owner = pair.visitor()
    assert owner.get("/app/secret/", Authorization=f"Bearer {pair.token}").status_code == 200
    assert owner.get("/app/secret/").status_code == 401


def test_a_cookie_of_one_app_means_nothing_to_another(pair):
    for name in ("one", "two"):
        pair.deploy(name, simple_app())
    visitor = pair.visitor()
    visitor.get("/app/one/")
    stolen = visitor.http.cookies["blockyard_route"]
    before = len(pair.workers("two"))
    assert pair.visitor().get("/app/two/", Cookie=f"blockyard_route={stolen}").status_code == 200
    assert len(pair.workers("two")) == before + 1


def test_revoking_a_token_closes_what_it_opened(pair):
    pair.deploy("revoked", simple_app(), access_type="logged_in")
    made = pair.http.post("/api/v1/users/me/tokens", json={"name": "guest"}).json()
    visitor = pair.visitor()
    visitor.http.headers["Authorization"] = f"Bearer {made['token']}"
    assert visitor.get("/app/revoked/").status_code == 200
    with visitor.websocket("revoked", Authorization=f"Bearer {made['token']}") as socket_:
        assert pair.http.delete(f"/api/v1/users/me/tokens/{made['id']}").status_code == 204
        with pytest.raises(ConnectionClosed):
            read_until_closed(socket_, 1)


@pytest.mark.parametrize("origin", ["http://evil.example", "null", "http://127.0.0.1:1"])
def test_a_websocket_from_a_foreign_page_is_refused(pair, origin):
    pair.deploy("hello", hello_files())
    visitor = pair.visitor()
    visitor.get("/app/hello/")
    with pytest.raises(InvalidStatus) as refused:
        visitor.websocket("hello", origin=origin)
    assert refused.value.response.status_code == 403


def test_an_address_that_opens_too_many_sessions_is_slowed_down(own_pair):
    pair = own_pair()
    pair.deploy("storm", simple_app(), max_workers_per_app=1)
    host, _, port = pair.relay_origin.partition("://")[2].partition(":")
    request = f"GET /app/storm/ HTTP/1.1\r\nHost: {host}:{port}\r\n\r\n"
    last = request.replace("\r\n\r\n", "\r\nConnection: close\r\n\r\n")
    with socket.create_connection((host, int(port)), timeout=60) as sock:
        sock.sendall((request * 59 + last).encode())  # at once: a slow machine would spread them out too far
        answers = b"".join(iter(lambda: sock.recv(65536), b""))
    statuses = [int(status) for status in re.findall(rb"HTTP/1\.1 ([0-9]{3}) ", answers)]
    assert len(statuses) == 60
    assert statuses[0] == 200
    assert 429 in statuses
    assert len(pair.runtime("storm")["workers"]) == 1


# --- survival --------------------------------------------------------------------------------------------------------


def r_process(pair, worker):
    uid = (pair.runtime_dir / worker["id"]).stat().st_uid
    return max(uid_processes(uid))


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_a_restarted_api_finds_its_workers_and_sessions_again(own_pair, number):
    pair = own_pair()
    pair.deploy("kept", simple_app())
    visitor = pair.visitor()
    with visitor.shiny("kept"):
        before = pair.workers("kept", "active")
        process = r_process(pair, before[0])
        pair.kill("api", number)
        pair.start_api()
    assert [worker["id"] for worker in pair.workers("kept", "active")] == [before[0]["id"]]
    assert visitor.get("/app/kept/").status_code == 200
    assert len(pair.workers("kept")) == 1
    assert r_process(pair, before[0]) == process


def test_no_connection_is_refused_while_the_api_restarts(own_pair):
    pair = own_pair()
    pair.kill("api")
    with concurrent.futures.ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(httpx.get, f"{pair.control_url}/healthz", timeout=30)
        pair.start_api()
        assert waiting.result().text == "ok"


def test_a_killed_spawner_leaves_workers_alone_and_the_next_one_finds_them(own_pair):
    pair = own_pair()
    pair.deploy("calm", simple_app())
    visitor = pair.visitor()
    with visitor.shiny("calm") as socket_:
        pair.kill("spawner")
        socket_.send(json.dumps({"method": "update", "data": {"x": 1}}))
        assert visitor.get("/app/calm/").status_code == 200
        assert pair.http.get("/readyz").status_code == 503
        refused = pair.visitor().get("/app/calm/")
        assert refused.status_code == 503
        assert "spawner" not in refused.text  # that is for the owner
        assert "The spawner cannot be reached" in pair.runtime("calm")["workers"][-1]["end_reason"]
        pair.start_spawner()
        wait_for(lambda: pair.http.get("/readyz").status_code == 200, what="readiness")
        wait_for(lambda: pair.visitor().get("/app/calm/").status_code == 200, what="a second visitor's worker")
    pair.http.post("/api/v1/apps/calm/disable")
    wait_for(lambda: not pair.workers("calm"), what="the end of both")
    assert not list(pair.runtime_dirs())


def test_workers_that_ended_while_the_api_was_away_are_told_as_ended(own_pair):
    pair = own_pair()
    pair.deploy("away", simple_app())
    pair.visitor().get("/app/away/")
    worker = pair.workers("away")[0]
    pair.kill("api")
    (pair.cgroup / "workers" / worker["id"] / "cgroup.kill").write_text("1")
    wait_for(lambda: not list(pair.runtime_dirs()), what="the spawner's clearing up")
    pair.start_api()
    ended = pair.runtime("away")["workers"]
    assert [w["status"] for w in ended] == ["ended"]
    assert ended[0]["end_reason"] == "ended while the server was away"


def test_a_worker_that_nobody_owns_is_ended(own_pair):
    pair = own_pair()
    pair.deploy("orphan", simple_app())
    pair.visitor().get("/app/orphan/")
    pair.kill("api")
    with sqlite3.connect(pair.state / "blockyard.db") as database:
        database.execute("DELETE FROM workers")
    pair.start_api()
    wait_for(lambda: not list(pair.runtime_dirs()), what="the orphan's end")


def test_twenty_thousand_stale_rows_do_not_hold_up_the_start(own_pair):
    pair = own_pair()
    pair.deploy("stale", simple_app())
    app = pair.http.get("/api/v1/apps/stale").json()["id"]
    pair.kill("api")
    with sqlite3.connect(pair.state / "blockyard.db") as database:
        database.executemany(
            "INSERT INTO workers (id, app_id, bundle_id, status, started_at) VALUES (?, ?, 'b', 'active', 1)",
            [(f"{number:032x}", app) for number in range(20_000)],
        )
        database.executemany(
            "INSERT INTO sessions (hash, app_id, visitor, worker_id, created_at, last_seen_at)"
            " VALUES (?, ?, 'v', ?, 1, 1)",
            [(f"{number:064x}", app, f"{number:032x}") for number in range(20_000)],
        )
    pair.start_api()
    assert pair.visitor().get("/app/stale/").status_code == 200
    rss = int(re.search(r"VmRSS:\s+(\d+)", Path(f"/proc/{pair.api.pid}/status").read_text())[1])
    assert rss < 300_000  # kB
