"""Sessions outlive both daemons: restarted, killed, each with a visitor in an app."""

import json
import re

import pytest
from machine import active, answers, kill_main, r_process, systemctl
from running_pair import simple_app, wait_for

TICKS = "tick <- function() { n <<- n + 1; message('count ', n); later::later(tick, 0.05) }"
COUNTING = simple_app(f"n <- 0\n{TICKS}\nlater::later(tick, 0.05)")


def restart(name):
    systemctl("restart", name)


@pytest.mark.parametrize("how", [restart, kill_main])
def test_the_spawners_end_does_not_even_close_a_websocket(server, how):
    server.deploy("calm", simple_app())
    visitor = server.visitor()
    with visitor.shiny("calm") as socket_:
        worker = active(server, "calm")[0]["id"]
        process = r_process(worker)
        how("blockyard-spawner.service")
        answers(server)
        socket_.send(json.dumps({"method": "update", "data": {"x": 1}}))
        socket_.ping().wait(30)
        assert r_process(worker) == process
    assert visitor.get("/app/calm/").status_code == 200
    server.http.post("/api/v1/apps/calm/disable")
    wait_for(lambda: not server.workers("calm"), 60, "the end of a worker that was taken over")
    server.http.post("/api/v1/apps/calm/enable")


@pytest.mark.parametrize("how", [restart, kill_main])
def test_after_the_apis_end_a_visitor_is_led_back_to_his_r_process(server, how):
    server.deploy("kept", simple_app())
    visitor = server.visitor()
    with visitor.shiny("kept"):
        worker = active(server, "kept")[0]["id"]
        process = r_process(worker)
        how("blockyard-api.service")
        assert visitor.get("/app/kept/").status_code == 200  # no connection is refused meanwhile
        answers(server)
    assert [found["id"] for found in server.workers("kept", "active")] == [worker]
    assert r_process(worker) == process
    server.http.delete("/api/v1/apps/kept")


@pytest.mark.parametrize("how", [restart, kill_main])
def test_no_line_of_a_workers_log_is_lost_over_the_apis_end(server, how):
    server.deploy("counting", COUNTING)
    assert server.visitor().get("/app/counting/").status_code == 200
    worker = active(server, "counting")[0]["id"]
    how("blockyard-api.service")
    answers(server)

    def numbers():
        log = server.http.get("/api/v1/apps/counting/logs", params={"worker_id": worker, "stream": "false"}).text
        return [int(number) for number in re.findall(r"count (\d+)", log)]

    reached = numbers()[-1]
    wait_for(lambda: numbers()[-1] > reached + 20, 60, "twenty more lines")
    kept = numbers()
    assert kept == list(range(1, len(kept) + 1))
    server.http.delete("/api/v1/apps/counting")
