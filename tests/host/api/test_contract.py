"""The HTTP contract under bad input: a 4xx in the one shape, never a traceback, never anything half-made."""

import datetime as dt
import gzip
import io
import json
import os
import random
import signal
import tarfile
import time
from pathlib import Path

import httpx
import pytest
from running_pair import PATIENCE, archive, simple_app, wait_for

ROUTES = {
    ("GET", "/healthz"),
    ("GET", "/readyz"),
    ("POST", "/api/v1/apps"),
    ("GET", "/api/v1/apps"),
    ("GET", "/api/v1/apps/{id}"),
    ("PATCH", "/api/v1/apps/{id}"),
    ("DELETE", "/api/v1/apps/{id}"),
    ("POST", "/api/v1/apps/{id}/bundles"),
    ("GET", "/api/v1/apps/{id}/bundles"),
    ("POST", "/api/v1/apps/{id}/rollback"),
    ("POST", "/api/v1/apps/{id}/enable"),
    ("POST", "/api/v1/apps/{id}/disable"),
    ("GET", "/api/v1/apps/{id}/logs"),
    ("GET", "/api/v1/apps/{id}/runtime"),
    ("GET", "/api/v1/tasks/{task_id}"),
    ("GET", "/api/v1/tasks/{task_id}/logs"),
    ("POST", "/api/v1/bootstrap"),
    ("GET", "/api/v1/users/me"),
    ("POST", "/api/v1/users/me/tokens"),
    ("GET", "/api/v1/users/me/tokens"),
    ("DELETE", "/api/v1/users/me/tokens"),
    ("DELETE", "/api/v1/users/me/tokens/{token_id}"),
    ("GET", "/api/v1/system/status"),
    ("GET", "/api/v1/system/checks"),
    ("POST", "/api/v1/system/checks/run"),
}


def in_shape(answer, status, code=None):
    assert answer.status_code == status, answer.text
    body = answer.json()
    assert set(body) == {"error", "message"}
    assert "Traceback" not in answer.text
    if code:
        assert body["error"] == code
    return body


def deployed_nothing(pair):
    """Whether neither uploads nor half bundles are left behind."""
    ready = {
        bundle["id"]
        for app in pair.http.get("/api/v1/apps?per_page=200").json()["apps"]
        for bundle in pair.http.get(f"/api/v1/apps/{app['id']}/bundles").json()["bundles"]
        if bundle["status"] == "ready"
    }
    left = {path.name for path in (pair.state / "bundles").iterdir()} - ready
    return not left and not list((pair.state / "uploads").iterdir())


def test_the_openapi_document_names_every_route_of_the_contract(pair):
    document = httpx.get(f"{pair.control_url}/openapi.json").json()
    named = {(method.upper(), path) for path, methods in document["paths"].items() for method in methods}
    assert named >= ROUTES
    assert "422" not in json.dumps(document)


OPEN = {("GET", "/healthz"), ("GET", "/readyz"), ("POST", "/api/v1/bootstrap")}


@pytest.mark.parametrize(("method", "path"), sorted(ROUTES - OPEN))
def test_without_a_token_every_route_is_401(pair, method, path):
    in_shape(httpx.request(method, pair.control_url + path.replace("{", "").replace("}", "")), 401)


def test_readiness_tells_strangers_nothing_but_yes_or_no(pair):
    assert httpx.get(f"{pair.control_url}/readyz").json() == {"status": "ready"}
    assert pair.http.get("/readyz").json()["checks"] == {"database": "ok", "spawner": "ok"}


def test_no_answer_of_the_control_plane_may_be_framed_sniffed_or_cached(pair):
    headers = httpx.get(f"{pair.control_url}/healthz").headers
    assert headers["x-content-type-options"] == "nosniff"
    assert headers["x-frame-options"] == "DENY"
    assert headers["cache-control"] == "no-store"
    assert "server" not in headers


@pytest.mark.parametrize(
    ("body", "code"),
    [
        (b"", "invalid_request"),
        (b"{", "invalid_request"),
        (b"[]", "invalid_request"),
        (b'{"name": 1}', "invalid_request"),
        (b'{"name": "a", "owner": "me"}', "invalid_request"),
        (b'{"name": "../x"}', "invalid_name"),
        (b'{"name": "--bind"}', "invalid_name"),
        (b'{"name": "Hello"}', "invalid_name"),
        (b'{"name": "a\\nb"}', "invalid_name"),
        (b'{"name": "' + b"x" * 300 + b'"}', "invalid_request"),
    ],
)
def test_a_wrong_new_app_is_refused(pair, body, code):
    in_shape(pair.http.post("/api/v1/apps", content=body, headers={"Content-Type": "application/json"}), 400, code)


@pytest.mark.parametrize(
    "changes",
    [
        {"memory_limit": "-512m"},
        {"memory_limit": "512"},
        {"cpu_limit": 0},
        {"cpu_limit": "many"},
        {"max_sessions_per_worker": 0},
        {"max_workers_per_app": -1},
        {"pre_warmed_sessions": 1.5},
        {"access_type": "everyone"},
        {"network": "bridge"},
        {"enabled": False},
        {"owner": "me"},
        {"title": "a\u0007b"},
        {"name": "UPPER"},
        {"scratch_copy": "yes"},
    ],
)
def test_a_wrong_setting_is_refused_and_changes_nothing(pair, changes):
    pair.http.post("/api/v1/apps", json={"name": "settled"})
    before = pair.http.get("/api/v1/apps/settled").json()
    in_shape(pair.http.patch("/api/v1/apps/settled", json=changes), 400)
    assert pair.http.get("/api/v1/apps/settled").json() == before


def test_a_limit_above_roots_ceiling_is_refused(own_pair):
    pair = own_pair("process.memory_ceiling = '1g'\nprocess.cpu_ceiling = 2")
    pair.http.post("/api/v1/apps", json={"name": "big"})
    in_shape(pair.http.patch("/api/v1/apps/big", json={"memory_limit": "2g"}), 400, "limit_above_ceiling")
    in_shape(pair.http.patch("/api/v1/apps/big", json={"cpu_limit": 3}), 400, "limit_above_ceiling")
    assert pair.http.patch("/api/v1/apps/big", json={"memory_limit": "1g", "cpu_limit": 2}).status_code == 200


@pytest.mark.parametrize(
    "path",
    ["/api/v1/apps/none", "/api/v1/apps/none/runtime", "/api/v1/tasks/none", "/api/v1/nothing", "/app/UPPER/", "/x"],
)
def test_what_is_not_there_is_404(pair, path):
    in_shape(pair.http.get(path), 404)


def test_a_wrong_method_is_405(pair):
    in_shape(pair.http.put("/api/v1/apps"), 405)


def bomb():
    return gzip.compress(bytes(30 << 20))


def without_entry():
    return archive({"README": "nothing to run"})


def escaping():
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz") as tar:
        for name in ("app.R", "../../outside"):
            info = tarfile.TarInfo(name)
            info.size = 1
            tar.addfile(info, io.BytesIO(b"1"))
    return buffer.getvalue()


@pytest.mark.parametrize(
    "content",
    [b"not gzip", archive(simple_app())[:-20], bomb(), without_entry(), escaping(), gzip.compress(b"not tar" * 200)],
    ids=["not gzip", "truncated", "a bomb", "no entry point", "an escape", "no tar"],
)
def test_a_wrong_bundle_fails_with_a_sentence_and_leaves_nothing(pair, content):
    pair.http.post("/api/v1/apps", json={"name": "unpacked"})
    task = pair.http.post("/api/v1/apps/unpacked/bundles", content=content).json()["task_id"]
    log = pair.http.get(f"/api/v1/tasks/{task}/logs").text
    assert pair.http.get(f"/api/v1/tasks/{task}").json()["status"] == "failed"
    assert log.strip().endswith(".")
    assert "Traceback" not in log
    failed = pair.http.get("/api/v1/apps/unpacked/bundles").json()["bundles"][0]
    assert failed["reason"]
    assert log.strip().endswith(f" {failed['reason']}")
    assert pair.http.get("/api/v1/apps/unpacked").json()["active_bundle"] is None
    assert deployed_nothing(pair)


def test_a_bundle_above_the_limit_is_413_whether_announced_or_not(own_pair):
    pair = own_pair("storage.max_bundle_size = '64k'")
    pair.http.post("/api/v1/apps", json={"name": "large"})
    in_shape(pair.http.post("/api/v1/apps/large/bundles", content=bytes(100_000)), 413, "bundle_too_large")
    chunks = (bytes(10_000) for _ in range(10))
    in_shape(pair.http.post("/api/v1/apps/large/bundles", content=chunks), 413, "bundle_too_large")
    assert deployed_nothing(pair)
    assert pair.http.get("/api/v1/apps/large/bundles").json() == {"bundles": []}


def test_a_full_disk_is_told_as_that_and_nothing_is_left(own_pair):
    pair = own_pair(state_mount="3m")
    pair.deploy("small", simple_app())
    noise = random.Random(1).randbytes(8 << 20).hex()
    pair.http.post("/api/v1/apps", json={"name": "huge"})
    in_shape(pair.http.post("/api/v1/apps/huge/bundles", content=archive({"app.R": noise})), 507, "disk_full")
    assert not list((pair.state / "uploads").iterdir())
    text = archive({"app.R": "shinyApp(1, 2)\n", "data": noise[: 5 << 19]})  # half as large packed
    task = pair.http.post("/api/v1/apps/huge/bundles", content=text).json()["task_id"]
    log = pair.http.get(f"/api/v1/tasks/{task}/logs").text
    assert "disk is full" in log or "Not enough" in log
    assert deployed_nothing(pair)
    assert pair.visitor().get("/app/small/").status_code == 200


def test_a_daemon_killed_in_the_middle_of_a_deployment_leaves_nothing_half_made(own_pair):
    pair = own_pair()
    pair.http.post("/api/v1/apps", json={"name": "cut"})
    files = {"app.R": "shinyApp(1, 2)"} | {f"f{number}": "x" for number in range(8000)}
    task = pair.http.post("/api/v1/apps/cut/bundles", content=archive(files)).json()["task_id"]
    children = Path(f"/proc/{pair.api.pid}/task/{pair.api.pid}/children")
    unpacking = int(wait_for(lambda: children.read_text().split(), what="the process that unpacks")[0])
    os.kill(unpacking, signal.SIGSTOP)  # so that it is in the middle, however busy the machine
    pair.kill("api")
    os.kill(unpacking, signal.SIGKILL)
    pair.start_api()
    assert pair.http.get(f"/api/v1/tasks/{task}").json()["status"] == "failed"
    assert "restarted" in pair.http.get(f"/api/v1/tasks/{task}/logs").text
    wait_for(lambda: deployed_nothing(pair), what="clearing up")


def test_old_bundles_are_pruned_but_never_the_active_one(own_pair):
    pair = own_pair("storage.bundle_retention = 2")
    for number in range(4):
        pair.deploy("pruned", simple_app(f"# {number}"))
    bundles = pair.http.get("/api/v1/apps/pruned/bundles").json()["bundles"]
    assert len(bundles) == 2
    assert bundles[0]["id"] == pair.http.get("/api/v1/apps/pruned").json()["active_bundle"]
    assert deployed_nothing(pair)


def test_logs_are_followed_live_until_the_worker_ends(pair):
    pair.deploy("chatty", simple_app("later::later(function() message('later on'), 2)"))
    assert pair.visitor().get("/app/chatty/").status_code == 200
    with pair.http.stream("GET", "/api/v1/apps/chatty/logs") as answer:
        lines = answer.iter_lines()
        assert any("later on" in line for line in lines)
        pair.http.post("/api/v1/apps/chatty/disable")
        assert any("worker ended" in line for line in lines)
        assert list(lines) == []


def test_a_log_that_is_followed_ends_with_its_readers_token(pair):
    pair.deploy("followed", simple_app("message('it began')"))
    assert pair.visitor().get("/app/followed/").status_code == 200
    made = pair.http.post("/api/v1/users/me/tokens", json={"name": "reader"}).json()
    headers = {"Authorization": f"Bearer {made['token']}"}
    where = f"{pair.control_url}/api/v1/apps/followed/logs"
    with httpx.stream("GET", where, headers=headers, timeout=60) as answer:
        assert answer.headers["x-blockyard-worker"] == pair.workers("followed")[0]["id"]
        lines = answer.iter_lines()
        next(lines)
        revoked = time.monotonic()
        assert pair.http.delete(f"/api/v1/users/me/tokens/{made['id']}").status_code == 204
        assert list(lines)[-1].endswith("the token was revoked")
        assert time.monotonic() - revoked < 1 * PATIENCE
    assert pair.workers("followed", "active")


def test_a_stop_of_the_api_waits_for_nobody_who_follows_a_log(own_pair):
    pair = own_pair()
    pair.deploy("followed", simple_app("message('it began')"))
    assert pair.visitor().get("/app/followed/").status_code == 200
    with pair.http.stream("GET", "/api/v1/apps/followed/logs") as answer:
        lines = answer.iter_lines()
        next(lines)
        began = time.monotonic()
        pair.api.send_signal(signal.SIGTERM)
        assert "the server is stopping" in list(lines)[-1]  # and not a connection that breaks
        assert pair.api.wait(60) == 0
    assert time.monotonic() - began < 5 * PATIENCE
    assert "Traceback" not in pair.log("api")
    pair.start_api()
    assert len(pair.workers("followed", "active")) == 1


def test_a_token_is_shown_once_and_can_be_revoked(pair):
    made = pair.http.post("/api/v1/users/me/tokens", json={"name": "ci", "expires_in_days": 1}).json()
    assert made["token"].startswith("by_")
    mine = {"Authorization": f"Bearer {made['token']}"}
    assert httpx.get(f"{pair.control_url}/api/v1/users/me", headers=mine).json()["sub"] == "admin"
    assert made["token"] not in pair.http.get("/api/v1/users/me/tokens").text
    assert pair.http.delete(f"/api/v1/users/me/tokens/{made['id']}").status_code == 204
    in_shape(httpx.get(f"{pair.control_url}/api/v1/users/me", headers=mine), 401, "invalid_token")


def test_a_bootstrap_token_that_was_never_made_is_refused(pair):
    in_shape(httpx.post(f"{pair.control_url}/api/v1/bootstrap", json={"token": "guess"}), 403)


def test_times_are_rfc_3339_in_utc(pair):
    created = pair.http.post("/api/v1/apps", json={"name": "timed"}).json()["created_at"]
    assert created.endswith("Z")
    assert abs(time.time() - dt.datetime.fromisoformat(created).timestamp()) < 60


def test_a_secret_is_in_no_log_of_either_daemon(pair):
    assert pair.token not in pair.log("api")
    assert pair.token not in pair.log("spawner")
