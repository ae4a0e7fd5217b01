"""The OpenAPI document: each operation names what it answers with, all of that comes about, and formats are real."""

import re

import pytest
from sqlalchemy import insert
from sqlalchemy.exc import OperationalError

from blockyard_api.store.tables import users

CALLER = {401, 429, 503, 507}
ANSWERS = {
    ("GET", "/healthz"): {200},
    ("GET", "/readyz"): {200, 401, 429, 503},
    ("POST", "/api/v1/apps"): {201, 400, 403, 409, 413} | CALLER,
    ("GET", "/api/v1/apps"): {200, 400} | CALLER,
    ("GET", "/api/v1/apps/{id}"): {200, 404} | CALLER,
    ("PATCH", "/api/v1/apps/{id}"): {200, 400, 403, 404, 409, 413} | CALLER,
    ("DELETE", "/api/v1/apps/{id}"): {204, 403, 404} | CALLER,
    ("POST", "/api/v1/apps/{id}/enable"): {200, 403, 404} | CALLER,
    ("POST", "/api/v1/apps/{id}/disable"): {200, 403, 404} | CALLER,
    ("GET", "/api/v1/apps/{id}/logs"): {200, 400, 403, 404} | CALLER,
    ("GET", "/api/v1/apps/{id}/runtime"): {200, 403, 404} | CALLER,
    ("POST", "/api/v1/apps/{id}/bundles"): {202, 400, 403, 404, 413} | CALLER,
    ("GET", "/api/v1/apps/{id}/bundles"): {200, 403, 404} | CALLER,
    ("POST", "/api/v1/apps/{id}/rollback"): {200, 400, 403, 404, 409, 413} | CALLER,
    ("GET", "/api/v1/tasks/{task_id}"): {200, 404} | CALLER,
    ("GET", "/api/v1/tasks/{task_id}/logs"): {200, 404} | CALLER,
    ("POST", "/api/v1/bootstrap"): {201, 400, 403, 410, 413, 429, 503, 507},
    ("GET", "/api/v1/users/me"): {200} | CALLER,
    ("POST", "/api/v1/users/me/tokens"): {201, 400, 413} | CALLER,
    ("GET", "/api/v1/users/me/tokens"): {200} | CALLER,
    ("DELETE", "/api/v1/users/me/tokens"): {204} | CALLER,
    ("DELETE", "/api/v1/users/me/tokens/{token_id}"): {204, 404} | CALLER,
    ("GET", "/api/v1/system/status"): {200, 403} | CALLER,
    ("GET", "/api/v1/system/checks"): {200, 403, 409} | CALLER,
    ("POST", "/api/v1/system/checks/run"): {200, 403, 409} | CALLER,
}
GUESS = {"json": {"token": "guess"}}
WITH_QUERY = {("GET", "/api/v1/apps"): "?page=0", ("GET", "/api/v1/apps/{id}/logs"): f"?worker_id={'x' * 65}"}


@pytest.fixture
async def control(start):
    return await start('storage.max_bundle_size = "64k"')


@pytest.fixture
async def client(control, over_tcp):
    """The administrator's; there are the apps `demo`, which anybody may open, and `other`."""
    await control.app("demo")
    await control.catalog.create("other", "admin")
    return over_tcp


@pytest.fixture
async def document(over_tcp):
    return (await over_tcp.get("/openapi.json")).json()


def of(status):
    return [operation for operation, statuses in ANSWERS.items() if status in statuses]


async def comes(client, status, operation, path=None, **sent):
    """Send to an operation, and have the status."""
    method, template = operation
    path = path or template.replace("{id}", "demo").replace("{task_id}", "none").replace("{token_id}", "none")
    answer = await client.request(method, path, **sent)
    assert answer.status_code == status, f"{method} {path}: {answer.text}"
    if operation == ("GET", "/readyz") and status == 503:
        assert answer.json() == {"status": "not_ready"}  # not an error: it is what was asked
    else:
        assert set(answer.json()) == {"error", "message"}
        assert ("www-authenticate" in answer.headers) == (status == 401)
        assert status != 429 or int(answer.headers["retry-after"]) >= 1


def test_each_operation_names_just_what_it_answers_with(document):
    named = {
        (method.upper(), path): {int(status) for status in operation["responses"]}
        for path, methods in document["paths"].items()
        for method, operation in methods.items()
    }
    assert named == ANSWERS
    assert "422" not in str(document)


def test_each_operation_says_whether_it_takes_a_token(document):
    for (method, path), statuses in ANSWERS.items():
        secured = document["paths"][path][method.lower()].get("security")
        if path == "/readyz":
            assert secured == [{"token": []}, {}]
        else:
            assert secured == ([{"token": []}] if 401 in statuses else None)


async def test_what_is_sent_wrongly_is_400_wherever_that_is_named(client):
    for operation in of(400):
        if operation in WITH_QUERY:
            path = operation[1].replace("{id}", "demo") + WITH_QUERY[operation]
            await comes(client, 400, operation, path)
        else:
            await comes(client, 400, operation, content=b"" if operation[1].endswith("/bundles") else b"{")


async def test_nobody_is_401_wherever_that_is_named(client):
    del client.headers["Authorization"]
    for operation in of(401):
        wrong = {"Authorization": "Bearer by_wrong"} if operation[1] == "/readyz" else {}
        await comes(client, 401, operation, headers=wrong)


async def test_whoever_may_not_is_403_wherever_that_is_named(control, client):
    async with control.services.database.begin() as connection:
        await connection.execute(insert(users).values(sub="guest", role="viewer", created_at=0))
    client.headers["Authorization"] = f"Bearer {(await control.services.tokens.create('guest', 'guest'))[1]}"
    for operation in of(403):
        if operation == ("POST", "/api/v1/apps"):
            await comes(client, 403, operation, json={"name": "mine"})
        else:
            await comes(client, 403, operation, **(GUESS if operation[1].endswith("/bootstrap") else {}))


async def test_what_is_not_there_is_404_wherever_that_is_named(client):
    for operation in of(404):
        await comes(client, 404, operation, re.sub("{.*}", "none", operation[1]))


async def test_what_contradicts_the_present_state_is_409_wherever_that_is_named(control, client, monkeypatch):
    monkeypatch.setattr(control.services.checks, "_running", True)
    sent = {"POST": {"name": "demo"}, "PATCH": {"name": "other"}}
    for operation in of(409):
        body = {} if operation[1].endswith("/rollback") else sent.get(operation[0])
        await comes(client, 409, operation, json=body)


async def test_a_bootstrap_token_that_was_used_is_410(control, client):
    once = {"json": {"token": await control.services.tokens.offer_bootstrap()}}
    assert (await client.post("/api/v1/bootstrap", **once)).status_code == 201
    (operation,) = of(410)
    await comes(client, 410, operation, **once)


async def test_what_is_too_large_is_413_wherever_that_is_named(client):
    for operation in of(413):
        await comes(client, 413, operation, content=bytes(70_000))


async def test_who_guesses_is_429_wherever_that_is_named(client):
    client.headers["Authorization"] = "Bearer by_wrong"
    for _ in range(20):
        assert (await client.get("/api/v1/users/me")).status_code == 401
    for operation in of(429):
        await comes(client, 429, operation, **(GUESS if operation[1].endswith("/bootstrap") else {}))


@pytest.mark.parametrize(
    ("status", "why"), [(503, "database is locked"), (507, "disk I/O error"), (507, "database or disk is full")]
)
async def test_a_database_that_cannot_be_used_is_told_wherever_that_is_named(control, client, monkeypatch, status, why):
    class Broken:
        def begin(self):
            raise OperationalError("", {}, Exception(why))

    with monkeypatch.context() as patched:
        patched.setattr(control.services.database, "_engine", Broken())
        await comes(client, 503, ("GET", "/readyz"))
        for operation in of(status):
            await comes(client, status, operation, **(GUESS if operation[1].endswith("/bootstrap") else {}))


async def test_a_method_that_an_address_does_not_have_is_405_and_those_that_it_has_are_told(client, document):
    for path, methods in document["paths"].items():
        answer = await client.put(path)
        assert (answer.status_code, set(answer.json())) == (405, {"error", "message"})
        told = {method.upper() for method in methods} | ({"HEAD"} if "get" in methods else set())
        assert answer.headers["allow"] == ", ".join(sorted(told))


# --- formats ---------------------------------------------------------------------------------------------------------


def follows(value, schema):
    return len(value) <= schema["maxLength"] and bool(re.search(schema["pattern"], value))


NAMES = ["a1", "a-b", "a" * 63, "a", "", "A", "1", "1a", "a-", "-a", "a_b", "a b", "ä", "a" * 64, "a" * 255]
LIMITS = ["1k", "512m", "512M", "2g", "1023t", "", "512", "0m", "01m", "-1m", "1.5g", "512mb", "m", "1" * 13 + "m"]


async def test_a_name_is_taken_if_it_follows_the_document_and_else_refused_in_the_rules_own_words(client, document):
    schemas = document["components"]["schemas"]
    rule = schemas["NewApp"]["properties"]["name"]
    assert schemas["AppChanges"]["properties"]["name"] == rule
    for name in NAMES:
        answers = [
            await client.post("/api/v1/apps", json={"name": name}),
            await client.patch("/api/v1/apps/other", json={"name": name}),
        ]
        if follows(name, rule):
            assert [answer.status_code for answer in answers] == [201, 409]
        else:
            told = {"error": "invalid_name", "message": rule["description"]}
            assert [(answer.status_code, answer.json()) for answer in answers] == [(400, told)] * 2, name
    assert sum(follows(name, rule) for name in NAMES) == 4


async def test_a_name_of_any_length_is_refused_before_anybody_looks_for_it(client):
    answer = await client.post("/api/v1/apps", json={"name": "a" * 256})
    assert (answer.status_code, answer.json()["error"]) == (400, "invalid_request")


async def test_a_memory_limit_is_taken_if_it_follows_the_document(client, document):
    rule, null = document["components"]["schemas"]["AppChanges"]["properties"]["memory_limit"]["anyOf"]
    assert null == {"type": "null"}
    told = {"error": "invalid_limit", "message": 'A limit must be a size such as "512m".'}
    for limit in LIMITS:
        answer = await client.patch("/api/v1/apps/other", json={"memory_limit": limit})
        if follows(limit, rule):
            assert answer.json()["memory_limit"] == limit
        else:
            assert (answer.status_code, answer.json()) == (400, told), limit
    assert sum(follows(limit, rule) for limit in LIMITS) == 5


async def test_the_one_bound_of_memory_that_no_pattern_can_say_is_told_in_words(client, document):
    rule, _ = document["components"]["schemas"]["AppChanges"]["properties"]["memory_limit"]["anyOf"]
    assert "less than 1024t" in rule["description"]
    answer = await client.patch("/api/v1/apps/other", json={"memory_limit": "1024t"})
    assert answer.json() == {"error": "invalid_limit", "message": "A memory limit must be below 1024t."}


def test_every_time_is_told_to_be_one(document):
    told = {
        key: str(kind)
        for schema in document["components"]["schemas"].values()
        for key, kind in schema["properties"].items()
        if key.endswith(("_at", "_since"))
    }
    assert len(told) == 10
    assert all("date-time" in kind for kind in told.values()), told


def test_the_ids_of_apps_and_tokens_are_told_to_be_uuids(document):
    for schema, key in (("AppBody", "id"), ("BundleBody", "app_id"), ("TokenBody", "id"), ("PlainToken", "id")):
        assert document["components"]["schemas"][schema]["properties"][key]["format"] == "uuid"


def test_a_change_has_no_defaults_since_what_is_not_sent_stays(document):
    changes = document["components"]["schemas"]["AppChanges"]
    assert not [key for key, kind in changes["properties"].items() if "default" in kind]
    assert "required" not in changes
