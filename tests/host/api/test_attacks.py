"""What a malicious visitor, app or deployer tries against the real pair, and what he must see instead."""

import concurrent.futures
import contextlib
import hashlib
import itertools
import os
import random
import re
import secrets
import socket
import sqlite3
import time
from pathlib import Path
from urllib.parse import quote

import httpx
import pytest
from running_pair import Pair, simple_app, wait_for
from websockets.exceptions import InvalidStatus

# An app that answers every path with what it was sent, and with every header that an app must not be able to set.
ECHO = {
    "app.R": """
library(shiny)
ui <- function(request) {
  keys <- sort(grep('^(HTTP_|PATH_INFO|QUERY_STRING|REQUEST_METHOD)', ls(request), value = TRUE))
  lines <- vapply(keys, function(key) paste0(key, '=', paste(get(key, request), collapse = ',')), '')
  httpResponse(200, 'text/plain', paste(c('app=echo', lines), collapse = '\\n'), headers = list(
    'Set-Cookie' = 'blockyard_route=chosen; Path=/', 'Set-Cookie' = 'Blockyard_Session=chosen; Path=/',
    'Set-Cookie' = '__Host-blockyard_route=chosen; Path=/; Secure', 'Set-Cookie' = 'mine=kept',
    'Clear-Site-Data' = '"*"', 'Strict-Transport-Security' = 'max-age=1', 'Service-Worker-Allowed' = '/'))
}
shinyApp(ui, function(input, output, session) {
  headers <- as.list(session$request)
  session$sendCustomMessage('echo', headers[grepl('^HTTP_', names(headers))])
}, uiPattern = '.*')
"""
}
SECRETS = ("authorization", "blockyard_")


@pytest.fixture(scope="module")
def pair():
    """A pair behind a proxy on this machine, so that each stranger can have an address of his own."""
    with Pair("attacks", "server.trusted_proxies = ['127.0.0.1']") as running:
        yield running


_addresses = itertools.count(1)


def from_elsewhere():
    """The header that the proxy in front sends for a visitor whom the server has never seen."""
    number = next(_addresses)
    return {"X-Forwarded-For": f"198.51.{number >> 8}.{number & 255}"}


def stranger(pair, path, **headers):
    """Ask the relay as somebody new."""
    return httpx.get(pair.relay_origin + path, headers={**from_elsewhere(), **headers}, timeout=60)


@pytest.fixture(scope="module")
def echo(pair):
    """The echo app, public, and one worker for all who come."""
    pair.deploy("echo", ECHO, max_sessions_per_worker=500, max_workers_per_app=1)
    assert pair.visitor().get("/app/echo/").text.startswith("app=echo")
    return pair


@pytest.fixture(scope="module")
def private(pair):
    """The same app for those who are logged in."""
    pair.deploy("private", ECHO, access_type="logged_in", max_sessions_per_worker=500, max_workers_per_app=1)
    return pair


def add_user(pair, sub, role):
    """Make a user as the later piece of work will, and return a client with a token of hers."""
    plain = f"by_{secrets.token_urlsafe(32)}"
    with contextlib.closing(sqlite3.connect(pair.state / "blockyard.db", timeout=10)) as database, database:
        database.execute("INSERT INTO users (sub, role, created_at) VALUES (?, ?, 0)", (sub, role))
        database.execute(
            "INSERT INTO tokens (id, user_sub, name, hash, created_at, expires_at) VALUES (?, ?, 't', ?, 0, ?)",
            (sub, sub, hashlib.sha256(plain.encode()).hexdigest(), time.time() + 3600),
        )
    return httpx.Client(base_url=pair.control_url, headers={"Authorization": f"Bearer {plain}"}, timeout=30)


def raw(origin, request, patience=10.0):
    """Send bytes as they are and return all that comes back."""
    host, _, port = origin.partition("://")[2].partition(":")
    with socket.create_connection((host, int(port)), timeout=patience) as sock:
        sock.sendall(request)
        answer = b""
        with contextlib.suppress(ConnectionResetError):
            while data := sock.recv(65536):
                answer += data
    return answer


def relayed(pair, target, *lines):
    """Ask the relay with header lines exactly as given; return status and body."""
    known = [f"{name}: {value}".encode() for name, value in from_elsewhere().items()]
    host = f"Host: {pair.relay_origin[7:]}".encode()
    head = [b"GET " + target + b" HTTP/1.1", host, b"Connection: close", *known, *lines]
    answer = raw(pair.relay_origin, b"\r\n".join(head) + b"\r\n\r\n")
    status, _, rest = answer.partition(b"\r\n")
    return int(status.split()[1]), rest.partition(b"\r\n\r\n")[2].decode("utf-8", "replace")


def headers_seen(body):
    return dict(re.findall(r"^(HTTP_[A-Z0-9_]+)=(.*)$", body.replace("\r", ""), re.MULTILINE))


# --- identity --------------------------------------------------------------------------------------------------------

SPOOFED = ["X-Shiny-User", "X-Shiny-Groups", "X-Shiny-Access", "Shiny-Server-Credentials"]
SPELLINGS = [
    lambda name: [f"{name}: root"],
    lambda name: [f"{name.lower()}: root"],
    lambda name: [f"{name.upper()}: root"],
    lambda name: [f"{name.replace('-', '_')}: root"],
    lambda name: [f"{name.replace('-', '_').upper()}: root"],
    lambda name: [f"{name.replace('-', '_', 1)}: root"],
    lambda name: [f"{name}: root", f"{name}: root"],
    lambda name: [f"{name}:root", f"{name.replace('-', '_')}:\troot"],
    lambda name: [f"Connection: {name}", f"{name}: root"],
    lambda name: [f"Connection: {name.replace('-', '_')}, close", f"{name}: root"],
]
LINES = [[line.encode() for line in spell(name)] for name in SPOOFED for spell in SPELLINGS]


@pytest.mark.parametrize("lines", LINES, ids=lambda lines: b" / ".join(lines).decode())
def test_a_stranger_is_anonymous_whatever_identity_he_sends(echo, lines):
    status, body = relayed(echo, b"/app/echo/", *lines)
    assert status == 200
    assert "root" not in body
    seen = {name: value for name, value in headers_seen(body).items() if "SHINY" in name}
    assert seen == {"HTTP_X_SHINY_ACCESS": "anonymous"}


@pytest.mark.parametrize("lines", LINES[::3], ids=lambda lines: b" / ".join(lines).decode())
def test_somebody_who_is_logged_in_is_himself_whatever_identity_he_sends(private, lines):
    status, body = relayed(private, b"/app/private/", f"Authorization: Bearer {private.token}".encode(), *lines)
    assert status == 200
    assert "root" not in body
    assert {name: value for name, value in headers_seen(body).items() if "SHINY" in name} == {
        "HTTP_X_SHINY_USER": "admin",
        "HTTP_X_SHINY_GROUPS": "",
        "HTTP_X_SHINY_ACCESS": "owner",
        "HTTP_SHINY_SERVER_CREDENTIALS": '{"user": "admin", "groups": []}',
    }


def test_an_app_sees_neither_a_token_nor_a_cookie_of_ours(private):
    visitor = private.visitor()
    visitor.http.headers["Authorization"] = f"Bearer {private.token}"
    visitor.http.cookies.update({"theirs": "1"})
    visitor.get("/app/private/")
    route = visitor.http.cookies["blockyard_route"]
    jar = f"theirs=1; blockyard_route={route}; blockyard_session=x; __Host-blockyard_route={route}; last=2"
    page = stranger(private, "/app/private/", Authorization=f"Bearer {private.token}", Cookie=jar).text
    assert "theirs=1" in page
    assert "last=2" in page
    for text in (page, visitor.get("/app/private/").text):
        assert not any(secret in text.lower() for secret in SECRETS)
        assert route not in text
        assert private.token not in text
    with visitor.websocket("private", Authorization=f"Bearer {private.token}") as socket_:
        socket_.send('{"method": "init", "data": {".clientdata_url_search": ""}}')
        messages = ""
        while "HTTP_HOST" not in messages:
            messages += str(socket_.recv(10))
    assert route not in messages
    assert private.token not in messages


def test_an_app_cannot_set_our_cookies_nor_headers_that_reach_beyond_it(echo):
    answer = stranger(echo, "/app/echo/")
    assert answer.text.startswith("app=echo")
    cookies = answer.headers.get_list("set-cookie")
    assert [cookie for cookie in cookies if "chosen" in cookie] == []
    assert "mine=kept" in cookies
    assert len(cookies) == 2  # and the one that the platform set
    for name in ("clear-site-data", "strict-transport-security", "service-worker-allowed"):
        assert name not in answer.headers


def test_no_secret_is_in_the_environment_or_the_arguments_of_a_workers_processes(echo):
    worker = echo.workers("echo", "active")[0]["id"]
    pids = [int(pid) for pid in (echo.cgroup / "workers" / worker / "cgroup.procs").read_text().split()]
    assert len(pids) >= 2
    told = b"".join(Path(f"/proc/{pid}/{what}").read_bytes() for pid in pids for what in ("environ", "cmdline"))
    assert b"BLOCKYARD_SOCKET" in told  # they were read
    for secret in (echo.token, str(echo.state), "blockyard.db", "LISTEN_FDS", "NOTIFY_SOCKET"):
        assert secret.encode() not in told


# --- WebSockets ------------------------------------------------------------------------------------------------------


def refusal_of(pair, name, **more):
    with pytest.raises(InvalidStatus) as refused:
        pair.visitor().websocket(name, **from_elsewhere(), **more).close()
    return refused.value.response.status_code


@pytest.mark.parametrize(
    "origin",
    ["http://evil.example", "null", "http://127.0.0.1:1", "http://[", "https://{relay}", "http://{relay}.evil.example",
     "http://{relay}@evil.example", "http://evil.example/{relay}", "http://{relay}/"],
)  # fmt: skip
def test_a_foreign_page_cannot_open_a_visitors_websocket(echo, origin):
    visitor = echo.visitor()
    visitor.get("/app/echo/")
    with pytest.raises(InvalidStatus) as refused:
        visitor.websocket("echo", origin=origin.format(relay=echo.relay_origin[7:])).close()
    assert refused.value.response.status_code == 403


def test_a_websocket_to_a_private_app_needs_the_token_of_its_session(private):
    eve = add_user(private, "eve-ws", "viewer").headers["Authorization"]
    owner = private.visitor()
    owner.get("/app/private/", Authorization=f"Bearer {private.token}")
    stolen = f"blockyard_route={owner.http.cookies['blockyard_route']}"
    assert refusal_of(private, "private") == 401
    assert refusal_of(private, "private", Cookie=stolen) == 401
    assert refusal_of(private, "private", Cookie=stolen, Authorization="Bearer by_guess") == 401
    assert refusal_of(private, "private", Cookie=stolen, Authorization="Basic YTpi") == 401
    before = len(private.workers("private")[0]["sessions"])
    with private.visitor().websocket("private", Cookie=stolen, Authorization=eve, **from_elsewhere()) as socket_:
        assert "blockyard_route=" in socket_.response.headers["Set-Cookie"]  # she is somebody else, with her own
    sessions = private.workers("private")[0]["sessions"]
    assert len(sessions) == before + 1
    assert {session["user"] for session in sessions} == {"admin", "eve-ws"}


def test_a_websocket_that_calls_itself_an_image_does_not_enter_somebody_elses_worker(pair):
    pair.deploy("alone", simple_app(), max_workers_per_app=1)
    assert pair.visitor().get("/app/alone/").status_code == 200
    headers = {"Sec-Fetch-Dest": "image"}
    assert pair.visitor().get("/app/alone/shared/shiny.min.css", **headers).status_code == 200
    assert refusal_of(pair, "alone", **headers) == 503


# --- addresses -------------------------------------------------------------------------------------------------------

TRICKS = [
    "..%2f..%2fother/", "%2e%2e/other/", "../other/", "..;/other/", "..\\other/", "./../other/", "/other/",
    "//other/", "%2fother/", "%252e%252e%252fother/", "a/../../other/", ";/../other/", "%00", "%0d%0aX:%20y",
    "?x=../../other", "app/other/", "@other/", "http://other/", "%c0%ae%c0%ae/other/", "..%c0%afother/",
]  # fmt: skip


@pytest.mark.parametrize("trick", TRICKS)
def test_no_path_leaves_the_prefix_of_its_app(echo, trick):
    echo.http.post("/api/v1/apps", json={"name": "other"})
    echo.http.patch("/api/v1/apps/other", json={"access_type": "public"})
    status, body = relayed(echo, b"/app/echo/" + trick.encode())
    # the other app has no bundle, and would say so; this one names itself
    assert status == 200, body
    assert body.startswith("app=echo") or "\napp=echo" in body
    assert "HTTP_X_FORWARDED_PREFIX=/app/echo" in body


@pytest.mark.parametrize(
    "target",
    ["/", "/app", "/app/", "//app/echo/", "/./app/echo/", "/x/../app/echo/", "/app//echo/", "/app/./echo/",
     "/app/%65cho/", "/app/ECHO/", "/app/echo%2f", "/app/echo;a/", "/app/echo%00/", "/APP/echo/",
     "/app/echo\\", "/app%2fecho/"],
)  # fmt: skip
def test_no_other_spelling_of_an_apps_address_reaches_it(echo, target):
    status, body = relayed(echo, target.encode())
    assert status in (400, 404), body
    assert "app=echo" not in body


@pytest.mark.parametrize("target", ["http://other.example/app/echo/", "http://127.0.0.1/app/echo/"])
def test_an_absolute_address_is_not_a_way_to_another_host(echo, target):
    status, body = relayed(echo, target.encode())
    assert status >= 400 or "HTTP_HOST=other.example" not in body


NEXT = [
    "//evil.example", "/\\evil.example", "\\\\evil.example", "https://evil.example", "@evil.example", ".evil.example",
    "%2f%2fevil.example", "/%09/evil.example", "/%5cevil.example", "?next=https://evil.example", "%0d%0aLocation:x",
]  # fmt: skip


@pytest.mark.parametrize("rest", NEXT)
def test_the_redirect_to_an_app_stays_on_the_apps_origin(echo, rest):
    for start in ("/app/echo/", "/app/echo"):
        answer = raw(
            echo.control_url, f"GET {start}{rest} HTTP/1.1\r\nHost: evil.example\r\nConnection: close\r\n\r\n".encode()
        )
        status = int(answer.split()[1])
        assert status in (307, 400, 404)
        locations = re.findall(rb"^location: *(.*?)\r$", answer, re.MULTILINE | re.IGNORECASE)
        assert len(locations) == (status == 307)
        assert all(location.startswith(f"{echo.relay_origin}/app/echo/".encode()) for location in locations)


@pytest.mark.parametrize("query", ["", "?next=//evil.example", "?x=%0d%0aLocation:%20http://evil.example"])
def test_the_redirect_to_an_apps_slash_stays_below_its_address(echo, query):
    answer = httpx.get(f"{echo.relay_origin}/app/echo{query}", headers={"X-Forwarded-Host": "evil.example"})
    assert answer.status_code == 307
    assert answer.headers["location"] == f"/app/echo/{query}"


# --- session ids -----------------------------------------------------------------------------------------------------


def test_session_ids_are_long_and_never_the_same(echo):
    ids = [stranger(echo, "/app/echo/").cookies["blockyard_route"] for _ in range(40)]
    assert len(set(ids)) == len(ids)
    assert all(re.fullmatch(r"[A-Za-z0-9_-]{22,}", value) for value in ids)  # 6 bits a character
    shared = [position for position in range(len(ids[0])) if len({value[position] for value in ids}) == 1]
    assert not shared  # no part of them stays the same


def test_a_session_is_taken_from_the_cookie_alone_and_never_from_what_a_link_can_carry(echo):
    value = stranger(echo, "/app/echo/").cookies["blockyard_route"]
    for path, headers in (
        (f"?blockyard_route={value}", {}),
        (f";blockyard_route={value}", {}),
        ("", {"blockyard_route": value}),
        ("", {"X-Blockyard-Route": value}),
        ("", {"Cookie": f"Blockyard_Route={value}"}),
    ):
        answer = stranger(echo, f"/app/echo/{path}", **headers)
        assert answer.cookies.get("blockyard_route") not in (None, value)
    assert "blockyard_route" not in stranger(echo, "/app/echo/", Cookie=f"blockyard_route={value}").cookies


def test_a_cookie_that_a_client_chose_never_becomes_a_session(echo):
    for chosen in ("x" * 32, "", "0", "../../etc/passwd", "'; DROP TABLE sessions; --", "a" * 5000):
        for _ in range(2):
            answer = stranger(echo, "/app/echo/", Cookie=f"blockyard_route={chosen}")
            assert answer.cookies["blockyard_route"] != chosen


# --- too much --------------------------------------------------------------------------------------------------------


def test_a_storm_of_strangers_and_idle_connections_starts_few_workers_and_both_listeners_still_answer(own_pair):
    pair = own_pair("proxy.max_workers = 3")
    pair.deploy("storm", simple_app())
    pair.deploy("calm", simple_app())
    known = pair.visitor()
    assert known.get("/app/calm/").status_code == 200
    idle = []
    try:
        for origin in (pair.control_url, pair.relay_origin):
            host, _, port = origin.partition("://")[2].partition(":")
            idle += [socket.create_connection((host, int(port)), timeout=10) for _ in range(300)]
        for sock in idle[::2]:
            sock.sendall(b"GET / HTTP/1.1\r\nHost: x\r\nX-Slow: ")  # and never the rest
        with concurrent.futures.ThreadPoolExecutor(16) as pool:
            answers = [
                pool.submit(httpx.get, f"{pair.relay_origin}/app/storm/?{number}", timeout=60) for number in range(150)
            ]
            for _ in range(5):
                assert httpx.get(f"{pair.control_url}/healthz", timeout=10).text == "ok"
                assert known.get("/app/calm/").status_code == 200
            statuses = [answer.result().status_code for answer in answers]
        assert set(statuses) <= {200, 429, 503}
        assert 429 in statuses
        everybody = pair.runtime("storm")["workers"] + pair.runtime("calm")["workers"]
        assert len(everybody) <= 3
        assert len(list(pair.runtime_dirs())) <= 3
    finally:
        for sock in idle:
            sock.close()
    assert known.get("/app/calm/").status_code == 200
    wait_for(lambda: pair.visitor().get("/app/storm/").status_code == 200, 40, "a place for one who comes later")


def test_a_worker_that_is_flooded_while_it_computes_is_not_ended_for_it(own_pair):
    pair = own_pair()
    pair.deploy(
        "computing", simple_app(ui="function(request) { if (grepl('slow', request$QUERY_STRING)) Sys.sleep(4); 'x' }")
    )
    visitor = pair.visitor()
    assert visitor.get("/app/computing/").status_code == 200
    worker = pair.workers("computing", "active")[0]["id"]
    cookie = f"Cookie: blockyard_route={visitor.http.cookies['blockyard_route']}\r\n"
    request = f"GET /app/computing/ HTTP/1.1\r\nHost: {pair.relay_origin[7:]}\r\n{cookie}\r\n".encode()
    host, _, port = pair.relay_origin.partition("://")[2].partition(":")
    with concurrent.futures.ThreadPoolExecutor(1) as pool:
        slow = pool.submit(visitor.get, "/app/computing/?slow")
        time.sleep(0.5)
        for _ in range(5):  # each wave leaves its connections in the worker's queue
            wave = [socket.create_connection((host, int(port))) for _ in range(60)]
            for sock in wave:
                sock.sendall(request)
            time.sleep(0.2)
            for sock in wave:
                sock.close()
        assert visitor.http.post("/app/computing/").status_code == 404  # the worker's own answer, once it comes to it
        assert slow.result().status_code == 200
    assert [w["id"] for w in pair.workers("computing", "active")] == [worker]
    assert "Traceback" not in pair.log("api"), pair.log("api")


# --- strings ---------------------------------------------------------------------------------------------------------

MARKUP = "</title><script>alert(1)</script><img src=x onerror=alert(1)>{{7*7}}{% raw %}\"'`"


def test_a_hostile_title_is_text_and_nothing_else(pair):
    pair.deploy("titled", simple_app("Sys.sleep(1)"), title=MARKUP, description=f"{MARKUP}\n{MARKUP}")
    page = pair.visitor().get("/app/titled/", browser=True)
    assert page.status_code == 202
    assert "&lt;script&gt;alert(1)" in page.text
    assert "<script>alert" not in page.text
    assert "<img" not in page.text
    assert "49" not in re.sub(r"nonce[^>]*", "", page.text.partition("<main>")[2])
    assert "script-src 'nonce-" in page.headers["content-security-policy"]
    assert pair.http.get("/api/v1/apps/titled").json()["title"] == MARKUP


@pytest.mark.parametrize(
    "name",
    ["--bind", "-", "..", "a/b", "a b", "a\nb", "a\0b", "a;b", "a'b", 'a"b', "<a>", "a%2fb", "A", "ä", "a" * 64,
     "", "a-", "{app}"],
)  # fmt: skip
def test_a_hostile_name_is_refused(pair, name):
    assert pair.http.post("/api/v1/apps", json={"name": name}).status_code == 400
    pair.http.post("/api/v1/apps", json={"name": "good"})
    assert pair.http.patch("/api/v1/apps/good", json={"name": name}).status_code == 400


@pytest.mark.parametrize("title", ["a\r\nb", "a\nb", "a\0b", "\x1b[31m", "a\x7f", "\ud800"])
def test_control_characters_are_in_no_title(pair, title):
    pair.http.post("/api/v1/apps", json={"name": "good"})
    body = b'{"title": "' + title.encode("unicode_escape").replace(b"\\x", b"\\u00") + b'"}'
    answer = pair.http.patch("/api/v1/apps/good", content=body, headers={"Content-Type": "application/json"})
    assert answer.status_code == 400


def test_nothing_that_is_asked_for_forges_a_line_of_a_log(pair):
    forged = "ERROR blockyard_api: forged by a visitor"
    for origin in (pair.control_url, pair.relay_origin):
        for path in (f"/x%0a{quote(forged)}", f"/app/echo/%0d%0a{quote(forged)}", f"/api/v1/apps/{quote(forged)}"):
            httpx.get(origin + path, headers={"User-Agent": forged, "Authorization": f"Bearer {forged}"})
    pair.http.post("/api/v1/users/me/tokens", json={"name": forged})
    for which in ("api", "spawner"):
        assert "forged by a visitor" not in pair.log(which)


# --- two tenants -----------------------------------------------------------------------------------------------------


def everything(app, bundle, worker):
    """Every way to look at or change one app."""
    base = f"/api/v1/apps/{app}"
    return [
        ("GET", base, None),
        ("PATCH", base, {"title": "mine"}),
        ("DELETE", base, None),
        ("POST", f"{base}/bundles", b"\x1f\x8b"),
        ("GET", f"{base}/bundles", None),
        ("POST", f"{base}/rollback", {"bundle_id": bundle}),
        ("POST", f"{base}/rollback", {}),
        ("POST", f"{base}/enable", None),
        ("POST", f"{base}/disable", None),
        ("GET", f"{base}/logs?stream=false", None),
        ("GET", f"{base}/logs?stream=false&worker_id={worker}", None),
        ("GET", f"{base}/runtime", None),
    ]


def statuses_of(client, wishes):
    found = []
    for method, path, body in wishes:
        sent = {"content": body} if isinstance(body, bytes) else {"json": body} if body is not None else {}
        found.append(client.request(method, path, **sent).status_code)
    return found


def test_another_users_app_can_be_neither_seen_nor_changed_nor_read(pair):
    eve = add_user(pair, "eve", "publisher")
    made = pair.deploy("hers", simple_app("message('a secret of the log')"), access_type="acl")
    owner = pair.visitor()
    assert owner.get("/app/hers/", Authorization=f"Bearer {pair.token}").status_code == 200
    app, worker = pair.http.get("/api/v1/apps/hers").json(), pair.workers("hers")[0]["id"]
    for reference in ("hers", app["id"]):
        assert set(statuses_of(eve, everything(reference, made["bundle_id"], worker))) == {404}
    assert eve.get(f"/api/v1/tasks/{made['task_id']}").status_code == 404
    assert eve.get(f"/api/v1/tasks/{made['task_id']}/logs").status_code == 404
    for query in ("", "?deleted=true", "?search=hers"):
        assert "hers" not in {app["name"] for app in eve.get(f"/api/v1/apps{query}").json()["apps"]}
    assert eve.get("/api/v1/system/status").status_code == 403
    assert pair.visitor().get("/app/hers/", Authorization=eve.headers["Authorization"]).status_code == 404
    assert pair.http.get("/api/v1/apps/hers").json() == {**app, "status": "running"}
    # nor by way of an app of her own
    assert eve.post("/api/v1/apps", json={"name": "mine"}).status_code == 201
    assert eve.get(f"/api/v1/apps/mine/logs?stream=false&worker_id={worker}").status_code == 404
    assert eve.post("/api/v1/apps/mine/rollback", json={"bundle_id": made["bundle_id"]}).status_code == 404
    assert eve.post("/api/v1/apps", json={"name": "hers"}).status_code == 409
    assert eve.patch("/api/v1/apps/mine", json={"name": "hers"}).status_code == 409
    assert eve.patch("/api/v1/apps/mine", json={"owner": "admin"}).status_code == 400


def test_a_former_name_is_not_taken_over_by_somebody_else(pair):
    eve = add_user(pair, "eve-names", "publisher")
    pair.http.post("/api/v1/apps", json={"name": "sales"})
    pair.http.patch("/api/v1/apps/sales", json={"name": "revenue", "access_type": "public"})
    assert eve.post("/api/v1/apps", json={"name": "sales"}).status_code == 409
    location = pair.visitor().get("/app/sales/").headers["location"]
    assert location == f"{pair.relay_origin}/app/revenue/"


def test_a_viewer_looks_and_changes_nothing(pair):
    viewer = add_user(pair, "viewer", "viewer")
    made = pair.deploy("open", simple_app(), access_type="logged_in")
    app = pair.http.get("/api/v1/apps/open").json()
    look, *rest = everything("open", made["bundle_id"], "w" * 32)
    assert viewer.request(*look[:2]).json()["relation"] == "viewer"
    assert set(statuses_of(viewer, rest)) == {403}
    assert viewer.post("/api/v1/apps", json={"name": "new"}).status_code == 403
    assert pair.http.get("/api/v1/apps/open").json() == app


def test_tokens_are_ones_own_affair(pair):
    eve, mallory = (add_user(pair, name, "publisher") for name in ("eve-tokens", "mallory"))
    assert mallory.delete("/api/v1/users/me/tokens/eve-tokens").status_code == 404
    assert [token["id"] for token in mallory.get("/api/v1/users/me/tokens").json()["tokens"]] == ["mallory"]
    assert mallory.delete("/api/v1/users/me/tokens").status_code == 204
    assert mallory.get("/api/v1/users/me").status_code == 401
    assert eve.get("/api/v1/users/me").json()["sub"] == "eve-tokens"


# --- junk ------------------------------------------------------------------------------------------------------------


def test_junk_on_every_route_is_answered_with_a_sentence(pair):
    chance = random.Random(40)
    document = httpx.get(f"{pair.control_url}/openapi.json").json()
    junk = ["", "..", "%00", "%0a", "'", "<x>", "-1", "9" * 30, "%ff", "%ed%a0%80", "x" * 2000, "{{7*7}}", "~", "%2f"]
    bodies = [
        b"",
        b"{",
        b"[]",
        b"null",
        b"\xff\xfe",
        b"[" * 50_000,
        b'{"name": "\\ud800"}',
        b'{"a": 1e999}',
        b"x" * 100_000,
    ]
    for path, methods in document["paths"].items():
        for method in methods:
            if path.endswith("/tokens") and method == "delete":
                continue  # it would work
            for _ in range(6):
                url = re.sub(r"\{\w+\}", lambda _: chance.choice(junk), path)
                query = f"?page={chance.choice(junk)}&worker_id={chance.choice(junk)}&stream=false"
                answer = pair.http.request(
                    method, url + query, content=chance.choice(bodies), headers={"Content-Type": "application/json"}
                )
                assert answer.status_code < 500, (method, url, answer.text)
                if answer.status_code >= 400:
                    assert set(answer.json()) == {"error", "message"}
                assert "Traceback" not in answer.text


@pytest.mark.parametrize(
    "sent",
    [b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + bytes(200), b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", b"GET\r\n\r\n",
     b"GET / HTTP/9.9\r\n\r\n", os.urandom(2000) + b"\r\n\r\n", b"GET /" + b"a" * 200_000 + b" HTTP/1.1\r\n\r\n",
     b"GET / HTTP/1.1\r\nHost: x\r\nContent-Length: 5\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
     (b"GET / HTTP/1.1\r\nHost: x\r\nConnection: Upgrade\r\nUpgrade: websocket\r\nSec-WebSocket-Version: 13\r\n"
      b"Sec-WebSocket-Key: AAAAAAAAAAAAAAAAAAAAAA==\r\n\r\n")],
    ids=["TLS", "HTTP/2", "half a line", "HTTP/9.9", "noise", "an endless path", "two framings", "an upgrade"],
)  # fmt: skip
def test_what_is_no_request_ends_its_own_connection_and_nothing_else(pair, sent):
    for origin in (pair.control_url, pair.relay_origin):
        with contextlib.suppress(TimeoutError, BrokenPipeError, ConnectionResetError):
            answer = raw(origin, sent, 2)
            assert b"Traceback" not in answer
            assert not answer or answer.split()[1].startswith(b"4") or answer.split()[1].startswith(b"5")
    assert httpx.get(f"{pair.control_url}/healthz").text == "ok"


def test_after_all_this_neither_daemon_has_logged_a_traceback_or_a_secret(pair):
    for which in ("api", "spawner"):
        log = pair.log(which)
        assert "Traceback" not in log, log
        assert pair.token not in log
    assert pair.api.poll() is None
