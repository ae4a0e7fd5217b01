"""Limits that the kernel enforces: a worker that goes beyond harms itself alone, and is told as what it was."""

import re

import pytest
from machine import DAEMONS, active, audit, cores_used, hit, knob, noted, processes_of, shown, switch_off, unit
from running_pair import read_until_closed, simple_app, wait_for
from websockets.exceptions import ConnectionClosed


def acts(action):
    """An app that serves its page, and goes mad a moment after a session has begun."""
    return simple_app(server=f"function(input, output, session) {{ later::later(function() {{ {action} }}, 0.5) }}")


@pytest.fixture(scope="module")
def beside(server, plain):
    """A visitor of another app."""
    visitor = server.visitor()
    assert visitor.get(f"/app/{plain}/").status_code == 200
    return visitor


@pytest.fixture
def sibling(beside, plain):
    """A function that asks the app beside, which must go on answering."""

    def answers():
        answer = beside.get(f"/app/{plain}/")
        assert answer.status_code == 200
        assert "plain page" in answer.text

    answers()
    yield answers
    answers()


@pytest.fixture(autouse=True)
def daemons_live_on(server):
    before = [unit(name, "MainPID") for name in DAEMONS]
    yield
    assert [unit(name, "MainPID") for name in DAEMONS] == before


def test_a_memory_hog_is_ended_whole_and_told_as_out_of_memory(server, sibling):
    server.deploy("hog", acts("x <- list(); repeat x <- c(x, list(numeric(1e6)))"), memory_limit="256m")
    visitor = server.visitor()

    def ended():
        sibling()
        return [worker for worker in server.runtime("hog")["workers"] if worker["ended_at"]]

    with visitor.shiny("hog") as socket_:
        (worker,) = wait_for(ended, 120, "its end")
        with pytest.raises(ConnectionClosed):
            read_until_closed(socket_, 60)
    assert worker["end_reason"] == "used more than 256 MB of memory"
    page = visitor.get("/app/hog/", browser=True)
    assert page.status_code == 502
    assert "used more than 256 MB of memory" in page.text
    assert audit(worker=worker["id"])[-1]["BLOCKYARD_RESULT"] == "oom"


def test_a_fork_bomb_stops_at_its_process_limit_and_ends_with_its_worker(server, sibling):
    bomb = "exec 2> /dev/null; b() { b | b & }; b"  # what it says would push what is said of it out of the log
    server.deploy("bomb", acts(f"system('{bomb}', wait = FALSE)"), memory_limit="1g")
    with server.visitor().shiny("bomb"):
        (worker,) = active(server, "bomb")
        uid = audit(worker=worker["id"])[0]["BLOCKYARD_UID"]

        def refused():
            sibling()
            return int(knob(worker["id"], "pids.events").split()[1]) > 0

        wait_for(refused, 120, "the limit's first refusal")
        assert int(knob(worker["id"], "pids.current")) <= 512
        sentence = "could not start more than 512 processes"
        noted(server, "bomb", f"worker {sentence}")
        assert sentence in hit(server, "bomb")
        shown(server, "bomb", sentence)
        sibling()
    switch_off(server, "bomb", within=120)
    assert processes_of(uid) == []


def test_a_spinner_gets_its_share_of_a_core_and_no_more(server, sibling):
    spins = "for (i in 1:3) system('while :; do :; done', wait = FALSE)"
    server.deploy("spinner", acts(spins), cpu_limit=0.5)
    with server.visitor().shiny("spinner"):
        (worker,) = active(server, "spinner")
        wait_for(lambda: int(knob(worker["id"], "pids.current")) >= 6, 60, "three spinners")
        assert 0.3 < cores_used(worker["id"], 6, meanwhile=sibling) < 0.7
        sentence = r"had to wait [1-9]\d+ s for its share of the processor"  # from ten on; it is looked at now and then
        noted(server, "spinner", f"worker {sentence}")
        assert [words for words in hit(server, "spinner") if re.fullmatch(sentence, words)]
        shown(server, "spinner", sentence)
    switch_off(server, "spinner")
