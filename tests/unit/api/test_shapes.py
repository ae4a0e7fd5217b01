"""The shapes that existing clients know, written down here a second time: a key that changes its name breaks them."""

import io
import re
import tarfile

import pytest

from blockyard_api.host.units import WorkersUnit

TIME = re.compile(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d(\.\d+)?Z")  # RFC 3339, UTC
UUID = re.compile(r"[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}")
ID = re.compile(r"[0-9a-f]{32}")
NAME = re.compile(r"[a-z]([a-z0-9-]{0,61}[a-z0-9])?")
TOKEN = re.compile(r"by_[A-Za-z0-9_-]{43}")
CODE = re.compile(r"[a-z]+(_[a-z]+)*")
SENTENCE = re.compile(r"[^\n]+\.")

# What a value may be: a type, exactly; what a string matches whole; the words that a string may be; a list of one kind;
# an object of just these keys; or, in a tuple, one of several kinds.
APP = {
    "id": UUID,
    "name": NAME,
    "owner": str,
    "access_type": {"public", "logged_in", "acl"},
    "active_bundle": (ID, None),
    "max_workers_per_app": (int, None),
    "max_sessions_per_worker": int,
    "memory_limit": (str, None),
    "cpu_limit": (float, None),
    "title": str,
    "description": str,
    "pre_warmed_sessions": int,
    "enabled": bool,
    "refresh_schedule": str,
    "created_at": TIME,
    "updated_at": TIME,
    "status": {"running", "stopped", "stopping"},
    "tags": [str],
    "relation": {"admin", "owner", "collaborator", "viewer"},
} | {  # added by us
    "network": ({"host", "none"}, None),
    "scratch_copy": bool,
    "backend": ({"process", "docker"}, None),
    "setback": (str, None),
    "url": str,
}
BUNDLE = {
    "id": ID,
    "app_id": UUID,
    "status": {"pending", "building", "ready", "failed"},
    "uploaded_at": TIME,
    "deployed_by": str,
    "pinned": bool,
} | {"reason": (SENTENCE, None)}  # added by us
WORKER = {
    "id": ID,
    "bundle_id": ID,
    "status": {"active", "draining", "ended"},
    "started_at": TIME,
    "idle_since": (TIME, None),
    "ended_at": (TIME, None),
    "end_reason": (str, None),
    "stats": (
        {
            "cpu_percent": (float, None),
            "memory_usage_bytes": (int, None),
            "memory_limit_bytes": (int, None),
        },
        None,
    ),
    "sessions": [{"user": (str, None), "started_at": TIME, "websockets": int}],
} | {"limits_hit": [SENTENCE]}  # added by us
RUNTIME = {
    "workers": [WORKER],
    "active_sessions": int,
    "total_views": int,
    "recent_views": int,
    "unique_visitors": int,
    "last_deployed_at": (TIME, None),
} | {"starting": [ID]}  # added by us
TASK = {"id": ID, "status": {"running", "completed", "failed"}, "created_at": TIME}
USER = {"sub": str, "email": str, "name": str, "role": {"admin", "publisher", "viewer"}}
OF_A_TOKEN = {"id": UUID, "name": str, "created_at": TIME, "expires_at": TIME, "last_used_at": (TIME, None)}
SEVERITY = {"ok", "info", "warning", "error"}
CHECKS = {
    "severity": SEVERITY,
    "began_at": TIME,
    "seconds": float,
    "checks": [{"name": str, "severity": SEVERITY, "fact": str, "remedy": str}],
    "isolation": str,
}
STATUS = {
    "version": str,
    "backend": {"process", "docker"},
    "spawner": {
        "connected": bool,
        "version": (int, None),
        "unprivileged": (bool, None),
        "uids_free": (int, None),
        "uids_total": (int, None),
        "controllers": [str],
    },
    "workers": {"running": int, "max": int},
    "unit": (
        {
            "control_group": str,
            "memory_max": (int, None),
            "memory_current": (int, None),
            "tasks_max": (int, None),
            "tasks_current": (int, None),
            "cpu_quota": (float, None),
        },
        None,
    ),
}
ERROR = {"error": CODE, "message": SENTENCE}
COLLECTIONS = {"apps", "bundles", "checks", "tokens", "workers"}  # of nothing, the shape would not be seen
TEXT = "chunked text"
NOTHING = "no body"

# What is asked, and what comes. {…} is of the daemon that `served` prepares; in this order, for the last ones delete.
ROUTES = [
    ("GET", "/healthz", None, 200, "ok"),
    ("GET", "/readyz", None, 200, {"status": {"ready"}, "checks": {"database": {"ok"}, "spawner": {"ok"}}}),
    ("POST", "/api/v1/apps", {"name": "another"}, 201, APP),
    ("GET", "/api/v1/apps", None, 200, {"apps": [APP], "total": int, "page": int, "per_page": int}),
    ("GET", "/api/v1/apps/{id}", None, 200, APP),
    ("PATCH", "/api/v1/apps/{id}", {"memory_limit": "512m", "cpu_limit": 1.5}, 200, APP),
    ("POST", "/api/v1/apps/{id}/bundles", b"no archive", 202, {"bundle_id": ID, "task_id": ID}),
    ("GET", "/api/v1/apps/{id}/bundles", None, 200, {"bundles": [BUNDLE]}),
    ("GET", "/api/v1/apps/{id}/runtime", None, 200, RUNTIME),
    ("GET", "/api/v1/apps/{id}/logs?stream=false", None, 200, TEXT),
    ("GET", "/api/v1/tasks/{task_id}", None, 200, TASK),
    ("GET", "/api/v1/tasks/{task_id}/logs", None, 200, TEXT),
    ("POST", "/api/v1/apps/{id}/rollback", {"bundle_id": "{bundle_id}"}, 200, APP),
    ("POST", "/api/v1/apps/{id}/disable", None, 200, APP),
    ("POST", "/api/v1/apps/{id}/enable", None, 200, APP),
    ("DELETE", "/api/v1/apps/{id}", None, 204, NOTHING),
    ("GET", "/api/v1/users/me", None, 200, USER),
    ("GET", "/api/v1/users/me/tokens", None, 200, {"tokens": [OF_A_TOKEN]}),
    ("POST", "/api/v1/users/me/tokens", {"name": "ci"}, 201, OF_A_TOKEN | {"token": TOKEN}),
    ("POST", "/api/v1/bootstrap", {"token": "{once}"}, 201, OF_A_TOKEN | {"token": TOKEN}),
    ("POST", "/api/v1/bootstrap", {"token": "{once}"}, 410, ERROR),
    ("GET", "/api/v1/system/status", None, 200, STATUS),
    ("GET", "/api/v1/system/checks", None, 200, CHECKS),
    ("POST", "/api/v1/system/checks/run", None, 200, CHECKS),
    ("DELETE", "/api/v1/users/me/tokens/{token_id}", None, 204, NOTHING),
    ("DELETE", "/api/v1/users/me/tokens", None, 204, NOTHING),
]


def fits(value, kind, where):
    """Whether a value is of a kind; `where` it stands is told if not."""
    if isinstance(kind, tuple):
        kind = None if value is None else kind[0]
    if isinstance(kind, dict):
        assert type(value) is dict, where
        assert set(value) == set(kind), f"{where}: {set(value) ^ set(kind)}"
        for key, inner in kind.items():
            fits(value[key], inner, f"{where}: {key}")
    elif isinstance(kind, list):
        assert type(value) is list, where
        for each in value:
            fits(each, kind[0], f"{where}, each")
    elif isinstance(kind, set):
        assert value in kind, f"{where}: {value!r}"
    elif isinstance(kind, re.Pattern):
        assert type(value) is str, f"{where}: {value!r}"
        assert kind.fullmatch(value), f"{where}: {value!r}"
    elif kind is None:
        assert value is None, f"{where}: {value!r}"
    else:
        assert type(value) is kind, f"{where}: {value!r}"


def archive():
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz") as tar:
        info = tarfile.TarInfo("app.R")
        info.size = 14
        tar.addfile(info, io.BytesIO(b"shinyApp(1, 2)"))
    return buffer.getvalue()


@pytest.fixture
async def control(start):
    """Its start-up checks look for what a fake spawner's probe never finds, and that may take them all their time."""
    return await start('server.preflight_timeout = "1s"')


@pytest.fixture
def client(over_tcp):
    return over_tcp


@pytest.fixture
async def served(control, client, clock, monkeypatch):
    """What the routes are asked for: an app that was deployed, with a worker that ended and one that has a visitor."""
    unit = WorkersUnit("/blockyard.slice", 1 << 30, 1 << 20, 100, 10, 1.5, delegated=True)

    async def workers_unit():
        return unit

    monkeypatch.setattr("blockyard_api.host.units.workers_unit", workers_unit)
    app = (await client.post("/api/v1/apps", json={"name": "demo"})).json()["id"]
    made = (await client.post("/api/v1/apps/demo/bundles", content=archive())).json()
    await client.get(f"/api/v1/tasks/{made['task_id']}/logs")
    await client.patch("/api/v1/apps/demo", json={"access_type": "public"})
    ended = control.worker_of(await control.visit("demo"))
    ended.end("idle")
    await control.quiet()
    await control.visit("demo")
    await control.quiet()
    await clock.advance(1)
    token = (await client.post("/api/v1/users/me/tokens", json={})).json()["id"]
    once = await control.services.tokens.offer_bootstrap()
    return {"id": app, "token_id": token, "once": once, **made}


async def asked(client, served, method, path, body):
    if isinstance(body, dict):
        body = {key: value.format_map(served) if isinstance(value, str) else value for key, value in body.items()}
        return await client.request(method, path.format_map(served), json=body)
    return await client.request(method, path.format_map(served), content=body)


async def test_every_route_answers_in_the_shape_that_its_clients_know(client, served):
    for method, path, body, status, shape in ROUTES:
        where = f"{method} {path}"
        answer = await asked(client, served, method, path, body)
        assert answer.status_code == status, f"{where}: {answer.text}"
        if shape is NOTHING:
            assert answer.content == b"", where
        elif shape is TEXT:
            assert answer.headers["transfer-encoding"] == "chunked", where
            assert answer.headers["content-type"] == "text/plain; charset=utf-8", where
        elif isinstance(shape, str):
            assert answer.text == shape, where
        else:
            assert answer.headers["content-type"] == "application/json", where
            fits(answer.json(), shape, where)
            assert not [key for key in COLLECTIONS & answer.json().keys() if not answer.json()[key]], where


async def test_no_route_is_without_a_shape_here(client):
    document = (await client.get("/openapi.json")).json()
    named = {(method.upper(), path) for path, methods in document["paths"].items() for method in methods}
    assert named == {(method, path.partition("?")[0]) for method, path, *_ in ROUTES}


async def test_a_stranger_is_told_of_readiness_and_of_nothing_else(client):
    del client.headers["Authorization"]
    fits((await client.get("/readyz")).json(), {"status": {"ready"}}, "GET /readyz")


async def test_a_server_that_is_not_ready_says_so_in_the_same_shape(control, client):
    control.spawner.stop()
    try:
        answer = await client.get("/readyz")
        assert answer.status_code == 503
        fits(answer.json(), {"status": {"not_ready"}, "checks": {"database": {"ok"}, "spawner": SENTENCE}}, "/readyz")
    finally:
        control.spawner.start()


async def test_a_workers_life_is_told_by_the_keys_that_the_contract_names(control, client, served):
    before = (await client.get("/api/v1/apps/demo/runtime")).json()
    fits(before, RUNTIME, "before")
    live, ended = before["workers"]
    assert (live["status"], ended["status"]) == ("active", "ended")
    assert live["ended_at"] is live["end_reason"] is None
    assert live["idle_since"] is None
    assert [session["user"] for session in live["sessions"]] == [None]
    assert live["stats"] is not None
    assert (ended["end_reason"], ended["idle_since"], ended["stats"], ended["sessions"]) == ("idle", None, None, [])
    assert ended["ended_at"] >= ended["started_at"]
    assert (before["total_views"], before["recent_views"], before["unique_visitors"]) == (2, 2, 2)
    assert before["active_sessions"] == 0
    assert before["last_deployed_at"]
    control.sessions.drop_where(lambda session: session.app_id == served["id"])
    after = (await client.get("/api/v1/apps/demo/runtime")).json()
    fits(after, RUNTIME, "after")
    assert after["workers"][0]["idle_since"]
    assert after["workers"][0]["sessions"] == []


async def test_a_page_of_apps_is_numbered_and_counted_by_the_server(client):
    for name in ("a", "b", "c"):
        await client.post("/api/v1/apps", json={"name": name})

    async def page(query):
        found = (await client.get(f"/api/v1/apps{query}")).json()
        fits(found, {"apps": [APP], "total": int, "page": int, "per_page": int}, query)
        return [app["name"] for app in found["apps"]], found["total"], found["page"], found["per_page"]

    assert await page("") == (["a", "b", "c"], 3, 1, 50)
    assert await page("?per_page=2") == (["a", "b"], 3, 1, 2)
    assert await page("?page=2&per_page=2") == (["c"], 3, 2, 2)
    assert await page("?page=3&per_page=2") == ([], 3, 3, 2)
    assert await page("?search=b") == (["b"], 1, 1, 50)
    assert await page("?tag=none") == ([], 0, 1, 50)
    assert await page("?deleted=true") == ([], 0, 1, 50)
    await client.delete("/api/v1/apps/b")
    assert await page("?deleted=true") == (["b"], 1, 1, 50)
    assert await page("?search=") == (["a", "c"], 2, 1, 50)
    for query in ("page=0", "per_page=0", "per_page=201"):
        answer = await client.get(f"/api/v1/apps?{query}")
        assert answer.status_code == 400
        fits(answer.json(), ERROR, query)


async def test_every_setting_of_the_contract_can_be_changed_and_is_told_back(client):
    await client.post("/api/v1/apps", json={"name": "demo"})
    settings = {
        "title": "A title",
        "description": "Two\nlines",
        "access_type": "logged_in",
        "max_workers_per_app": 3,
        "max_sessions_per_worker": 2,
        "memory_limit": "512m",
        "cpu_limit": 0.5,
        "pre_warmed_sessions": 1,
        "network": "none",
        "scratch_copy": True,
        "refresh_schedule": "",
        "name": "renamed",
    }
    for key, value in settings.items():
        changed = await client.patch("/api/v1/apps/demo", json={key: value})  # its old name goes on
        assert changed.status_code == 200, changed.text
        fits(changed.json(), APP, key)
        assert changed.json()[key] == value
    assert (await client.get("/api/v1/apps/demo")).json()["name"] == "renamed"


@pytest.mark.parametrize(
    ("method", "path", "body", "status", "code"),
    [
        ("POST", "/api/v1/apps", {"name": "Demo"}, 400, "invalid_name"),
        ("POST", "/api/v1/apps", {"name": "demo"}, 409, "conflict"),
        ("GET", "/api/v1/apps/none", None, 404, "not_found"),
        ("GET", "/api/v1/nothing", None, 404, "not_found"),
        ("PUT", "/api/v1/apps", None, 405, "method_not_allowed"),
        ("POST", "/api/v1/apps", {"name": "x" * 70_000}, 413, "body_too_large"),
        ("POST", "/api/v1/bootstrap", {"token": "guess"}, 403, "invalid_bootstrap_token"),
    ],
)
async def test_an_error_has_a_code_and_one_sentence(client, method, path, body, status, code):
    await client.post("/api/v1/apps", json={"name": "demo"})
    answer = await client.request(method, path, json=body)
    assert answer.status_code == status
    fits(answer.json(), ERROR, f"{method} {path}")
    assert answer.json()["error"] == code
