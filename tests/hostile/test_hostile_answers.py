"""A worker that answers as no server should: its own visitors may suffer, nobody else's answer changes by a byte."""

import contextlib
import socket
import time

import httpx
import pytest
from target import PROGRAMS, READY, packed, resident

pytest_plugins = ["hostile_apps"]

REFUSED = ["both", "lengths", "switch", "bare", "headers", "line", "interim", "two", "nobody"]


@pytest.fixture(scope="module")
def liar(target):
    """The hostile server in an app's place, deployed like one; two visitors share its worker."""
    files = {"app.R": "system('exec python3 -I answers.py')", "answers.py": PROGRAMS / "answers.py"}
    target.server.deploy("liar", packed(files), max_sessions_per_worker=100, max_workers_per_app=1)
    first, other = target.server.visitor(), target.server.visitor()
    for visitor in (first, other):
        visitor.http.timeout = READY
        assert visitor.get("/app/liar/").text == "honest"
    target.worker("liar")
    return first, other


def honest(visitor):
    answer = visitor.get("/app/liar/")
    assert (answer.status_code, answer.text) == (200, "honest")
    assert "stolen" not in str(answer.headers)


@pytest.mark.parametrize("path", REFUSED)
def test_an_answer_that_is_none_is_a_502_and_the_next_one_is_exact(target, liar, neighbour_lives_on, path):
    first, other = liar
    answer = first.get(f"/app/liar/{path}")
    assert answer.status_code == 502
    assert "smuggled" not in answer.text
    assert "stolen" not in str(answer.headers)
    for visitor in (other, first):
        honest(visitor)


def test_chunks_that_are_none_end_the_visitors_connection_and_nothing_behind_them_reaches_anybody(
    target, liar, neighbour_lives_on
):
    first, other = liar
    for _ in range(3):
        with pytest.raises(httpx.RemoteProtocolError, match="incomplete"):
            first.get("/app/liar/chunk")
        honest(other)
        honest(first)


def test_of_a_body_of_ten_gigabytes_nothing_is_kept_that_its_visitor_does_not_take(target, liar, neighbour_lives_on):
    first, other = liar
    before, taken = resident(target.api()), 0
    with first.http.stream("GET", "/app/liar/body") as answer, contextlib.suppress(httpx.ReadError):
        for piece in answer.iter_raw():
            taken += len(piece)
            honest(other)
            if taken > 4 << 20:
                break
    assert taken > 4 << 20
    host, _, port = target.server.relay_origin.partition("://")[2].partition(":")
    cookie = f"blockyard_route={first.http.cookies['blockyard_route']}"
    with socket.create_connection((host, int(port))) as deaf:  # asks, and never reads
        deaf.sendall(f"GET /app/liar/body HTTP/1.1\r\nHost: {host}:{port}\r\nCookie: {cookie}\r\n\r\n".encode())
        for _ in range(10):
            honest(other)
            time.sleep(0.1)
        assert resident(target.api()) < before + (32 << 20)
    honest(first)
