"""The fuzzers for a minute in all, each with a new seed that a failure names, and the corpus at every run."""

import secrets
from pathlib import Path

import oracles
import pytest
import targets

SECONDS = 20.0  # of each group
CORPUS = [(path.parent.name, path) for path in sorted(Path(__file__).parent.glob("corpus/*/*"))]
ALL = [(group, name) for group, some in targets.TARGETS.items() for name in some]


@pytest.mark.timeout(180)
@pytest.mark.parametrize(("group", "name"), ALL, ids=[name for _, name in ALL])
def test_nothing_that_is_made_up_brings_about_a_fault(group, name, capsys):
    seed = secrets.randbelow(2**31)
    told = targets.run(group, name, SECONDS / len(targets.TARGETS[group]), seed)
    with capsys.disabled():
        print(f"\n  fuzz {name}, seed {seed}: {told}")


@pytest.mark.parametrize(("oracle", "path"), CORPUS, ids=[f"{oracle}/{path.name}" for oracle, path in CORPUS])
def test_what_once_was_found_or_matters_is_handled(oracle, path):
    oracles.GUIDED[oracle](path.read_bytes())


# --- that a fault would be found -------------------------------------------------------------------------------------


def test_a_decoder_that_takes_true_for_a_number_is_found(monkeypatch):
    # what a check with isinstance would let through
    monkeypatch.setattr(oracles.protocol, "decode", lambda _: oracles.protocol.List(seq=True))
    with pytest.raises(AssertionError):
        oracles.packet(b"x")


@pytest.mark.parametrize(
    "line",
    [b"X-Shiny-User: root", b"x_shiny_groups: root", b"Host: other", b"Content-Length: 5", b"Authorization: Bearer x",
     b"Cookie: a=1; blockyard_route=x", b"X: a\nY: b", b"X: a\0b", b"X\x00: a", b"Transfer-Encoding: chunked"],
)  # fmt: skip
def test_a_line_that_must_not_reach_a_worker_is_found(monkeypatch, line):
    good = b"GET / HTTP/1.1\r\nHost: demo\r\n\r\n"
    oracles.request_head(good)
    write = oracles.heads.request_head
    monkeypatch.setattr(oracles.heads, "request_head", lambda *args: write(*args)[:-2] + line + b"\r\n\r\n")
    with pytest.raises(AssertionError):
        oracles.request_head(good)


@pytest.mark.parametrize(
    "lines",
    [b"Content-Length: 5\r\nTransfer-Encoding: chunked", b"Content-Length: 5\r\nContent-Length: 6",
     b"Content-Length: +5",
     b"Content-Length : 5", b"Host: a\r\nHost: b", b"X: a\nY: b", b"X: a\rb", b"X: a\r\n b", b"X: a\0b"],
)  # fmt: skip
def test_a_head_that_is_accepted_and_has_two_meanings_is_found(monkeypatch, lines):
    good = oracles.heads.parse_request(b"GET / HTTP/1.1\r\nHost: demo\r\n\r\n")
    monkeypatch.setattr(oracles.heads, "parse_request", lambda _: good)
    with pytest.raises(AssertionError):
        oracles.request_head(b"GET / HTTP/1.1\r\n" + lines + b"\r\n\r\n")


@pytest.mark.parametrize(
    "line", [b"Clear-Site-Data: *", b"service_worker_allowed: /", b"Set-Cookie: __Host-blockyard_x=1", b"X: \r"]
)
def test_a_line_that_must_not_reach_a_visitor_is_found(monkeypatch, line):
    good = b"HTTP/1.1 200 OK\r\n\r\n"
    oracles.response_head(good)
    write = oracles.heads.response_head
    monkeypatch.setattr(oracles.heads, "response_head", lambda *args: write(*args)[:-2] + line + b"\r\n\r\n")
    with pytest.raises(AssertionError):
        oracles.response_head(good)
