"""A session outlives both daemons: each is restarted and killed while one visitor is in one app."""

import json
import re

import pytest
from machine import active, answers, audit, kill_main, r_process, switch_off, systemctl, unit
from running_pair import PATIENCE, read_until_closed, simple_app, wait_for
from websockets.exceptions import ConnectionClosed

COUNTS = """
n <- 0
tick <- function() { n <<- n + 1; message('count ', n); later::later(tick, 0.2) }
later::later(tick, 0.2)
onStop(function() message('put away'))
"""
ECHOES = "function(input, output, session) observe(session$sendCustomMessage('echo', req(input$said)))"


class Stay:
    """One visitor and the worker that serves him."""

    def __init__(self, server, visitor):
        self.server, self.visitor = server, visitor
        self.worker = active(server, "kept")[0]["id"]
        self.process = r_process(self.worker)

    def log(self):
        parameters = {"worker_id": self.worker, "stream": "false"}
        return self.server.http.get("/api/v1/apps/kept/logs", params=parameters).text

    def counted(self):
        return [int(number) for number in re.findall(r"count (\d+)", self.log())]

    def is_unbroken(self):
        workers = [found["id"] for found in self.server.workers("kept")]
        return workers == [self.worker] and r_process(self.worker) == self.process


@pytest.fixture(scope="module")
def stay(server):
    server.deploy("kept", simple_app(COUNTS, server=ECHOES))
    visitor = server.visitor()
    assert visitor.get("/app/kept/").status_code == 200
    return Stay(server, visitor)


def say(socket_, word):
    """Send a word to the app over a session's WebSocket, and wait for its echo."""
    socket_.send(json.dumps({"method": "update", "data": {"said": word}}))
    while f'"echo":"{word}"' not in socket_.recv(60 * PATIENCE):
        pass


def restart(name):
    systemctl("restart", name)


def ends_the_spawner(server, stay, how):
    api = unit("blockyard-api.service", "MainPID")
    with stay.visitor.shiny("kept") as socket_:
        say(socket_, "before")
        how("blockyard-spawner.service")
        answers(server)
        say(socket_, "after")
    assert stay.is_unbroken()
    assert unit("blockyard-api.service", "MainPID") == api


def ends_the_api(server, stay, how):
    spawner = unit("blockyard-spawner.service", "MainPID")
    with stay.visitor.shiny("kept") as socket_:
        how("blockyard-api.service")
        with pytest.raises(ConnectionClosed):
            read_until_closed(socket_, 60)
    with stay.visitor.shiny("kept") as socket_:
        say(socket_, "again")
    answers(server)
    assert stay.is_unbroken()
    assert unit("blockyard-spawner.service", "MainPID") == spawner


def test_a_restart_of_the_spawner_does_not_even_close_a_websocket(server, stay):
    ends_the_spawner(server, stay, restart)


def test_a_killed_spawner_does_not_even_close_a_websocket(server, stay):
    ends_the_spawner(server, stay, kill_main)


def test_after_a_restart_of_the_api_a_visitor_is_led_back_to_his_r_process(server, stay):
    ends_the_api(server, stay, restart)


def test_after_the_apis_kill_a_visitor_is_led_back_to_his_r_process(server, stay):
    ends_the_api(server, stay, kill_main)


def test_no_line_of_its_log_was_lost_meanwhile(stay):
    reached = stay.counted()[-1]
    wait_for(lambda: stay.counted()[-1] > reached + 5, 60, "more lines")
    kept = stay.counted()
    assert kept == list(range(1, len(kept) + 1))


def test_a_worker_that_was_taken_over_is_asked_to_end_like_any_other(server, stay):
    switch_off(server, "kept")
    assert "put away" in stay.log()
    assert audit(worker=stay.worker)[-1]["BLOCKYARD_RESULT"] == "stopped"
