"""The control plane as an ASGI application: whatever is sent, the answer has the contract's shape and no traceback."""

import asyncio
import contextlib
import json

import httpx
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from running_control import Control, until
from sqlalchemy import insert

from blockyard_api.store.tables import users

HOSTILE = [
    "", ".", "..", "../..", "%00", "\0", "a\nb", "\r\nX: y", "'; DROP TABLE apps; --", '"><script>', "{{7*7}}", "${x}",
    "--bind", "-1", "0", "99999999999999999999", "1e999", "NaN", "true", "null", "plain", "\ud800", "\U0001f600",
    "a" * 300, "ä" * 70, "\\", "//", "%2e%2e%2f", "by_", "admin",
]  # fmt: skip
LIKELY = [
    "name", "title", "description", "access_type", "max_workers_per_app", "max_sessions_per_worker", "memory_limit",
    "cpu_limit", "pre_warmed_sessions", "network", "scratch_copy", "refresh_schedule", "bundle_id", "token",
    "expires_in_days", "enabled", "owner", "id",
]  # fmt: skip
STRANGE = st.sampled_from(HOSTILE) | st.text(max_size=40)
VALUES = st.recursive(
    STRANGE
    | st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.sampled_from(["1024t", "999999999999t", "acl"]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(STRANGE, inner, max_size=3),
    max_leaves=6,
)
BODIES = st.one_of(
    st.binary(max_size=200),
    (VALUES | st.dictionaries(st.sampled_from(LIKELY) | STRANGE, VALUES, max_size=4)).map(json.dumps).map(str.encode),
    st.just(b"[" * 100_000),
    st.just(b'{"max_workers_per_app": ' + b"9" * 5000 + b"}"),
    st.just(b'\xff\xfe{"name": "x"}'),
)  # fmt: skip
TYPES = st.sampled_from(
    ["application/json", "text/plain", "multipart/form-data; boundary=x", "application/gzip", "\xff", ""]
)


def quoted(text):
    """Percent-encode as a client that sends anything does."""
    return "".join(f"%{byte:02x}" for byte in text.encode("utf-8", "surrogatepass"))


async def in_shape(answer):
    assert answer.status_code < 500 or answer.status_code in (503, 507), answer.text
    assert "Traceback" not in answer.text
    if answer.status_code >= 400:
        assert set(answer.json()) == {"error", "message"}, answer.text
        assert answer.headers["content-type"] == "application/json"
        assert answer.headers["cache-control"] == "no-store"


@pytest.mark.timeout(300)
def test_whatever_is_sent_to_whatever_route_is_answered_in_the_contracts_shape(template):
    with asyncio.Runner() as runner:
        control = Control(template)
        runner.run(control.start())
        client = httpx.AsyncClient(
            transport=httpx.ASGITransport(control.asgi), base_url="http://test", follow_redirects=False
        )

        async def prepare():
            await control.app()
            document = (await client.get("/openapi.json")).json()
            _, plain = await control.services.tokens.create("admin", "sweep")
            routes = [(method, path) for path, methods in document["paths"].items() for method in sorted(methods)]
            return sorted(routes), plain

        routes, plain = runner.run(prepare())
        assert len(routes) > 20

        @settings(max_examples=200, deadline=None, suppress_health_check=list(HealthCheck))
        @given(st.sampled_from(routes), st.data())
        def sweep(route, data):
            method, path = route
            while "{" in path:
                before, _, rest = path.partition("{")
                path = before + quoted(data.draw(STRANGE)) + rest.partition("}")[2]
            names = ["search", "tag", "deleted", "page", "per_page", "worker_id", "stream"]
            query = data.draw(st.dictionaries(st.sampled_from(names) | STRANGE, STRANGE, max_size=3)) | {
                "stream": "false"
            }
            url = f"{path}?" + "&".join(f"{quoted(name)}={quoted(value)}" for name, value in query.items())
            # revoking all of one's tokens would end the sweep
            token = "by_wrong" if route == ("delete", "/api/v1/users/me/tokens") else plain
            headers = {"Authorization": f"Bearer {token}", "Content-Type": data.draw(TYPES).encode("latin-1")}

            async def send():
                answer = await client.request(method, url, content=data.draw(BODIES), headers=headers)
                await in_shape(answer)
                await until(lambda: control.alive)

            runner.run(send())

        try:
            sweep()
        finally:
            runner.run(client.aclose())
            runner.run(control.close())


@contextlib.asynccontextmanager
async def client_of(control):
    transport = httpx.ASGITransport(control.asgi)
    _, plain = await control.services.tokens.create("admin", "test")
    headers = {"Authorization": f"Bearer {plain}"}
    async with httpx.AsyncClient(transport=transport, base_url="http://test", headers=headers) as opened:
        yield opened


@pytest.fixture
async def client(control):
    async with client_of(control) as opened:
        yield opened


@pytest.mark.parametrize("path", ["/healthz/", "/api/v1/apps/", "/api/v1/users/me/", "//evil.example/"])
async def test_an_address_with_one_slash_too_many_is_404_and_no_redirect_to_whatever_host_was_sent(client, path):
    answer = await client.get(path, headers={"Host": "evil.example"})
    assert answer.status_code == 404
    await in_shape(answer)


@pytest.mark.parametrize(
    ("path", "meant"),
    [
        ("/app/plain", ""),
        ("/app/plain/", ""),
        ("/app/plain/a%2Fb?x=%0d%0a", "a%2Fb?x=%0d%0a"),
        ("/app/plain//evil.example/", "/evil.example/"),
        ("/app/plain/@evil.example/", "@evil.example/"),
        ("/app/plain/%5c%5cevil.example", "%5c%5cevil.example"),
        ("/app/plain/..%2f..%2f", "..%2f..%2f"),
        ("/app/plain/?next=//evil.example", "?next=//evil.example"),
    ],
)
async def test_the_way_to_an_app_leads_to_that_app_on_the_apps_origin_and_nowhere_else(client, path, meant):
    answer = await client.get(path, headers={"Host": "evil.example", "X-Forwarded-Host": "evil.example"})
    assert answer.status_code == 307
    location = answer.headers["location"]
    assert location.startswith("http://127.0.0.1:8081/app/plain/")
    assert location.lower() == f"http://127.0.0.1:8081/app/plain/{meant}".lower()


AWAY = [
    before + host + after
    for before in ("//", "/\\", "\\\\", "/%09/", "%2f%2f", "%5c%5c", "https://", "https:/",
                   "javascript:", "@", ".", "%0d%0a", "?next=//")
    for host in ("evil.example", "127.0.0.1:8081@evil.example", "evil%E3%80%82example", "[::1]")
    for after in ("", "/%2e%2e")
]  # fmt: skip


@pytest.mark.parametrize("rest", AWAY)
async def test_no_spelling_of_what_follows_an_app_leads_away_from_its_origin(client, rest):
    for start in ("/app/plain/", "/app/plain"):
        answer = await client.get(httpx.URL(f"http://test{start}").copy_with(raw_path=f"{start}{rest}".encode()))
        assert answer.status_code in (307, 404)
        if answer.status_code == 307:
            where = httpx.URL(answer.headers["location"])
            assert (where.scheme, where.host, where.port) == ("http", "127.0.0.1", 8081)
            assert not where.userinfo
            assert where.raw_path.startswith(b"/app/plain/")
            assert not set("\r\n\t\\ ") & set(answer.headers["location"])


@pytest.mark.parametrize(
    "path", ["/app/%70lain/x", "/app/PLAIN/", "/app//evil.example/", "/app/plain%2fx/", "/app/a.b/"]
)
async def test_a_name_that_is_not_written_as_it_is_leads_nowhere(client, path):
    answer = await client.get(path)
    assert answer.status_code == 404
    await in_shape(answer)


async def test_an_upload_whose_sender_goes_away_is_no_failure_of_the_server(control, client):
    await control.app()
    answered = []

    async def receive():
        return {"type": "http.disconnect"}

    async def send(message):
        answered.append(message)

    scope = {
        "type": "http", "asgi": {"version": "3.0"}, "http_version": "1.1", "method": "POST", "scheme": "http",
        "path": "/api/v1/apps/plain/bundles", "raw_path": b"/api/v1/apps/plain/bundles", "query_string": b"",
        "headers": [(b"authorization", client.headers["Authorization"].encode()), (b"content-length", b"10")],
    }  # fmt: skip
    await control.asgi(scope, receive, send)
    assert answered[0]["status"] == 400
    assert not list((control.state / "uploads").iterdir())


async def shown(client):
    return [
        (worker["id"], worker["status"])
        for worker in (await client.get("/api/v1/apps/plain/runtime")).json()["workers"]
    ]


async def test_a_worker_that_ends_while_it_is_looked_at_is_shown_once(control, client):
    await control.app()
    worker = control.worker_of(await control.visit())
    async with asyncio.TaskGroup() as group:
        looking = [group.create_task(shown(client)) for _ in range(3)]
        await asyncio.sleep(0.1)  # the processor's use is being sampled
        worker.end("idle")
        await worker.ended.wait()
    assert [look.result() for look in looking] == [[(worker.id, "ended")]] * 3


async def shown_as(client):
    app = (await client.get("/api/v1/apps/plain")).json()
    return app["status"], app["setback"]


async def test_the_log_of_a_worker_that_only_just_starts_is_there_and_nobody_elses(control, client):
    await control.app("other")
    await control.app()
    control.spawner.hold.add("spawn")
    visit = asyncio.create_task(control.ask("/app/plain/"))
    await until(lambda: control.spawner.held)
    (starting,) = control.fleet.all()
    asked = {"worker_id": starting.id, "stream": False}
    assert (await client.get("/api/v1/apps/plain/logs", params=asked)).status_code == 200
    assert (await client.get("/api/v1/apps/other/logs", params=asked)).status_code == 404
    control.spawner.release()
    assert (await visit).forwarded


@pytest.mark.parametrize("warm", [False, True])
async def test_an_app_that_fails_at_every_start_is_stopped_and_says_why(control, client, clock, warm):
    await control.app()
    control.spawner.words = b"bwrap: no such program\n"
    control.spawner.serves = False
    for attempt in range(3):
        visit = None if warm else asyncio.create_task(control.ask("/app/plain/"))
        await control.change("plain", pre_warmed_sessions=int(warm))
        (worker,) = await until(control.spawner.running)
        await until(lambda worker=worker: control.fleet.find(worker.id).socket is not None)
        assert (await shown_as(client))[0] == ("stopped" if attempt else "running")
        control.spawner.exit(worker.id, 1)
        await control.quiet()
        if visit:
            await visit
        status, setback = await shown_as(client)
        assert status == "stopped"
        assert setback == "The app could not start: exited with status 1; bwrap: no such program."
        await clock.advance(30)
    control.spawner.serves = True
    await control.visit()
    assert await shown_as(client) == ("running", None)


async def test_why_an_app_fails_is_not_told_to_those_who_may_merely_open_it(control, client):
    await control.app(access_type="logged_in")
    async with control.services.database.begin() as connection:
        await connection.execute(insert(users).values(sub="guest", role="viewer", created_at=0))
    _, plain = await control.services.tokens.create("guest", "t")
    control.spawner.refuse = ("bundle_missing", "Check /srv/state.")
    owner = client.headers["Authorization"].encode()
    assert (await control.ask("/app/plain/", authorization=owner)).status == 503
    await control.quiet()
    assert "/srv/state" in (await shown_as(client))[1]
    client.headers["Authorization"] = f"Bearer {plain}"
    assert await shown_as(client) == ("stopped", None)


async def test_a_worker_that_does_not_serve_yet_is_named_apart_from_the_contracts_states(control, client):
    await control.app()
    control.spawner.serves = False
    asking = asyncio.create_task(control.ask("/app/plain/"))
    (worker,) = await until(control.spawner.running)
    runtime = (await client.get("/api/v1/apps/plain/runtime")).json()
    assert (runtime["workers"], runtime["starting"]) == ([], [worker.id])
    await control.spawner.serve(worker.id)
    (await asking).end()
    runtime = (await client.get("/api/v1/apps/plain/runtime")).json()
    assert [each["status"] for each in runtime["workers"]] == ["active"]
    assert runtime["starting"] == []


async def test_whoever_deploys_reads_how_it_ended_though_the_app_is_deleted_meanwhile(control, client, monkeypatch):
    go_on = asyncio.Event()

    async def unpack(_archive, _destination):
        await go_on.wait()
        raise OSError(2, "No such file or directory")

    monkeypatch.setattr("blockyard_api.bundles.deploy.unpack", unpack)
    await control.catalog.create("plain", "admin")
    task = (await client.post("/api/v1/apps/plain/bundles", content=b"x")).json()["task_id"]
    assert (await client.delete("/api/v1/apps/plain")).status_code == 204
    assert (await client.get(f"/api/v1/tasks/{task}")).json()["status"] == "running"
    go_on.set()
    log = (await client.get(f"/api/v1/tasks/{task}/logs")).text
    assert log.endswith("The app was deleted meanwhile; nothing was deployed.\n")
    assert (await client.get(f"/api/v1/tasks/{task}")).json()["status"] == "failed"


async def test_why_a_deployment_failed_can_be_looked_up_later(control, client):
    await control.catalog.create("plain", "admin")
    task = (await client.post("/api/v1/apps/plain/bundles", content=b"no archive")).json()["task_id"]
    log = (await client.get(f"/api/v1/tasks/{task}/logs")).text
    (bundle,) = (await client.get("/api/v1/apps/plain/bundles")).json()["bundles"]
    assert bundle["status"] == "failed"
    assert bundle["reason"] == log.splitlines()[-1].partition(" ")[2]


async def refused(client, changes, status, code):
    before = (await client.get("/api/v1/apps/plain")).json()
    answer = await client.patch("/api/v1/apps/plain", json=changes)
    assert (answer.status_code, answer.json()["error"]) == (status, code), answer.text
    assert (await client.get("/api/v1/apps/plain")).json() == before
    return answer.json()["message"]


async def test_an_app_is_not_moved_to_a_backend_that_nobody_answers_for(control, client):
    await control.app()
    told = await refused(client, {"backend": "docker"}, 503, "backend_unavailable")
    assert "spawner-docker.socket" in told
    assert (await client.patch("/api/v1/apps/plain", json={"backend": "process"})).status_code == 200
    control.spawner.stop()
    assert (await client.patch("/api/v1/apps/plain", json={"backend": None})).status_code == 200  # it stays there
    control.spawner.start()


@pytest.mark.parametrize(
    ("present", "changes", "most"),
    [
        ({}, {"pre_warmed_sessions": 4, "max_workers_per_app": 3}, 3),
        ({"max_workers_per_app": 2}, {"pre_warmed_sessions": 3}, 2),
        ({"max_workers_per_app": 9}, {"pre_warmed_sessions": 6}, 5),
        ({"pre_warmed_sessions": 4, "max_sessions_per_worker": 2}, {"max_workers_per_app": 1}, 2),
    ],
)
async def test_more_warm_places_than_there_can_be_are_refused(start, present, changes, most):
    control = await start("proxy.max_workers = 5")
    await control.catalog.change(await control.catalog.create("plain", "admin"), present)
    async with client_of(control) as client:
        assert f"at most {most} here" in await refused(client, changes, 400, "too_many_pre_warmed")
        assert (await client.patch("/api/v1/apps/plain", json={"title": "still mine"})).status_code == 200
        enough = {"pre_warmed_sessions": 10, "max_workers_per_app": 5, "max_sessions_per_worker": 2}
        assert (await client.patch("/api/v1/apps/plain", json=enough)).status_code == 200
