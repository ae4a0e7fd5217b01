"""Logs that are followed: whose they are, and that they end with the reader's token and with the daemon."""

import asyncio
import contextlib
import io
import logging
import time

import httpx
import pytest
from running_control import until

LIFETIME = 60


@pytest.fixture
async def reader(control, listening):
    """A client with a token of its own, and that token."""
    token, plain = await control.services.tokens.create("admin", "reader", LIFETIME)
    host, port = listening.address
    headers = {"Authorization": f"Bearer {plain}"}
    async with httpx.AsyncClient(base_url=f"http://{host}:{port}", headers=headers, timeout=None) as client:
        client.token = token
        yield client


@contextlib.asynccontextmanager
async def following(client, path="/api/v1/apps/plain/logs"):
    """Follow a log; yields the answer, and its text as a function that waits for it to hold something."""
    async with client.stream("GET", path) as answer:
        text = io.StringIO()

        async def read():
            async for piece in answer.aiter_text():
                text.write(piece)

        reading = asyncio.create_task(read())
        answer.over = reading
        answer.so_far = text.getvalue
        yield answer
        reading.cancel()
        await asyncio.wait([reading])


async def end_of(answer):
    """What a log was at its end, which comes within a second and is a clean one."""
    async with asyncio.timeout(1):
        await answer.over
    return answer.so_far()


@pytest.fixture
async def worker(control):
    """A worker that a visitor is on."""
    control.spawner.words = b"it began\n"
    await control.app()
    return control.worker_of(await control.visit())


async def test_a_log_is_followed_no_further_once_the_token_is_revoked(control, reader, worker):
    async with following(reader) as answer:
        await until(lambda: "it began" in answer.so_far())
        await control.services.tokens.revoke("admin", reader.token.id)
        told = await end_of(answer)
    assert told.splitlines()[-1].endswith("the token was revoked")
    assert not worker.ended.is_set()


async def test_an_unfinished_line_is_ended_before_it_is_said_why_nothing_follows(control, reader):
    control.spawner.words = b"half a line"
    await control.app()
    await control.visit()
    async with following(reader) as answer:
        await until(lambda: "half a line" in answer.so_far())
        await control.services.tokens.revoke("admin", reader.token.id)
        lines = (await end_of(answer)).splitlines()
    assert lines[-2] == "half a line"
    assert lines[-1].startswith("[blockyard ")


async def test_what_was_asked_for_with_another_token_goes_on(control, reader, worker):
    other, _ = await control.services.tokens.create("admin", "other", LIFETIME)
    async with following(reader) as answer:
        await until(lambda: "it began" in answer.so_far())
        await control.services.tokens.revoke("admin", other.id)
        control.spawner.exit(worker.id, 1)
        told = await end_of(answer)
    assert "worker ended: exited with status 1" in told
    assert "token" not in told


async def test_a_log_is_followed_to_the_tokens_expiry_and_no_further(control, reader, worker, clock):
    async with following(reader) as answer:
        await until(lambda: "it began" in answer.so_far())
        await clock.advance(LIFETIME - 5)
        await asyncio.sleep(0.05)
        assert not answer.over.done()
        await clock.advance(6)
        told = await end_of(answer)
    assert told.splitlines()[-1].endswith("the token has expired")


async def test_a_token_that_is_revoked_while_the_answer_is_prepared_reads_nothing(control, reader):
    principal = await control.services.tokens.authenticate(reader.headers["Authorization"].split()[1])
    assert control.services.tokens.stands(principal)
    await control.services.tokens.revoke("admin", reader.token.id)
    assert not control.services.tokens.stands(principal)
    sent = []

    async def send(message):
        sent.append(message.get("body", b""))

    async def text():
        await asyncio.sleep(0)
        yield b"secret"

    await control.services.streams.answer(principal, text()).stream_response(send)
    assert b"secret" not in b"".join(sent)
    assert b"the token was revoked" in b"".join(sent)


async def test_a_deployments_log_ends_with_the_token_too(control, reader, monkeypatch):
    app = await control.catalog.create("plain", "admin")
    never = asyncio.Event()

    async def unpack(_archive, _destination):
        await never.wait()

    monkeypatch.setattr("blockyard_api.bundles.deploy.unpack", unpack)
    task = (await reader.post(f"/api/v1/apps/{app.id}/bundles", content=b"x")).json()["task_id"]
    async with following(reader, f"/api/v1/tasks/{task}/logs") as answer:
        await until(lambda: "Unpacking" in answer.so_far())
        await control.services.tokens.revoke("admin", reader.token.id)
        assert "the token was revoked" in await end_of(answer)


async def test_a_stop_waits_for_nobody_who_follows_a_log_and_ends_it_cleanly(
    control, listening, reader, worker, caplog
):
    caplog.set_level(logging.INFO)
    async with following(reader) as answer:
        await until(lambda: "it began" in answer.so_far())
        began = time.monotonic()
        listening.should_exit = True
        await listening.running
        assert time.monotonic() - began < 2
        told = await end_of(answer)
    assert "the server is stopping" in told.splitlines()[-1]
    assert "exceeded" not in caplog.text
    assert not worker.ended.is_set()


# --- whose log it is


async def log_of(client, **query):
    answer = await client.get("/api/v1/apps/plain/logs", params={"stream": "false", **query})
    assert answer.status_code == 200
    return answer.headers.get("x-blockyard-worker")


async def test_the_log_shown_is_that_of_the_worker_with_visitors_and_not_of_the_idle_spare(control, reader):
    await control.app(pre_warmed_sessions=1)
    visited = control.worker_of(await control.visit())
    (spare,) = await until(lambda: [each for each in control.fleet.all() if not each.slots])
    assert spare.started_at > visited.started_at
    await control.quiet()
    assert await log_of(reader) == visited.id
    assert await log_of(reader, worker_id=spare.id) == spare.id


async def test_without_visitors_the_log_shown_is_that_of_the_newest_that_lives_and_then_of_the_newest_that_ended(
    control, reader
):
    await control.app(pre_warmed_sessions=2)
    await control.quiet()
    older, newer = sorted(control.fleet.all(), key=lambda each: each.started_at)
    assert await log_of(reader) == newer.id
    await control.change("plain", pre_warmed_sessions=0)
    newer.end("idle")
    await newer.ended.wait()
    assert await log_of(reader) == older.id
    older.end("idle")
    await older.ended.wait()
    assert await log_of(reader) == newer.id


async def test_following_an_app_without_a_worker_waits_for_its_first(control, reader):
    control.spawner.words = b"at last\n"
    app = await control.app()
    async with following(reader) as answer:
        assert "x-blockyard-worker" not in answer.headers
        await asyncio.sleep(0.1)
        assert not answer.over.done()
        await control.visit()
        await until(lambda: "at last" in answer.so_far())
        await control.catalog.delete(app)
        await control.fleet.end_all(app, "the app was deleted")
        assert "worker ended: the app was deleted" in await end_of(answer)


async def test_waiting_for_a_first_worker_ends_with_the_app_and_with_the_token(control, reader):
    app = await control.app()
    async with following(reader) as answer:
        await asyncio.sleep(0.05)
        assert (await reader.delete(f"/api/v1/apps/{app.id}")).status_code == 204
        assert await end_of(answer) == ""
    await control.app()
    async with following(reader) as answer:
        await asyncio.sleep(0.05)
        await control.services.tokens.revoke("admin", reader.token.id)
        assert "the token was revoked" in await end_of(answer)


async def test_without_following_an_app_that_has_had_no_worker_has_an_empty_log(control, reader):
    await control.app()
    assert await log_of(reader) is None
