"""Whoever is killed in the middle of a Docker worker's start or stop, and wherever: the next start leaves nothing."""

import contextlib
import os
import threading
import time

import httpx
import pytest
from docker_pair import DockerPair
from interrupting_engine import InterruptingEngine
from running_pair import simple_app, wait_for
from running_spawner import Refusal, eventually


@pytest.fixture
def interrupting(docker):
    """The helper's engine, which may kill it."""
    directory = docker.root / "engine"
    directory.mkdir()
    engine = InterruptingEngine(docker.engine, directory / "docker.sock")
    docker.configure(docker={"socket": str(engine.path)})
    docker.start()
    yield engine
    engine.close()


def ask(docker, op, **fields):
    """Ask for something, and return the answer; None if the helper did not live to give it."""
    reading, writing = os.pipe2(os.O_CLOEXEC)
    try:
        client = docker.client()
        client.send(op, (writing,) if op == "spawn" else (), **fields)
        return client.receive()[0]
    except (EOFError, ConnectionError):
        return None
    finally:
        os.close(reading)
        os.close(writing)


@pytest.mark.parametrize("operation", ["spawn", "stop"])
def test_a_helper_that_is_killed_after_any_step_leaves_nothing_after_its_next_start(docker, interrupting, operation):
    bundle = docker.bundle("waiting", {"app.R": "Sys.sleep(600)"})
    steps = 0
    while True:
        spawn = {"id": f"worker{steps:04}", "kind": "app", "app": "demo", "bundle": bundle}
        fields = {"id": ask(docker, "spawn", **spawn)["ok"]["id"], "grace": 0} if operation == "stop" else spawn
        interrupting.strike(docker.process.pid, after=steps + 1)
        ask(docker, operation, **fields)
        if not interrupting.spare():
            break  # it took no more steps
        steps += 1
        docker.process.wait(20)
        docker.end(9)
        docker.start()
        eventually(lambda: nothing_is_left(docker), f"nothing is left after step {steps}", docker.audit_text)
    assert steps >= {"spawn": 4, "stop": 2}[operation]


def test_an_engine_that_hangs_up_while_workers_are_adopted_costs_none_of_them(docker, interrupting):
    workers = [docker.run_r(docker.client(), f"worker000{at}", "Sys.sleep(600)") for at in (1, 2, 3)]
    docker.end(9)
    interrupting.err(f"GET /v[0-9.]+/containers/{docker.container_of('worker0002')['Id']}/json")
    docker.start()

    def adopted():
        with contextlib.suppress(Refusal):
            return docker.client().call("list")["workers"]

    found = eventually(adopted, "the engine is asked again", docker.audit_text)
    assert interrupting.met.is_set()
    assert {record["id"]: record["state"] for record in found} == {f"worker000{at}": "running" for at in (1, 2, 3)}
    assert {record["pid"] for record in found} == {worker.pid for worker in workers}


def test_a_stop_of_what_is_being_cleared_away_ends_with_it(docker, interrupting):
    client = docker.client()
    interrupting.err("DELETE /v[0-9.]+/networks/", seconds=3)
    docker.run_r(client, "worker0001", "quit(status = 3)")
    assert interrupting.met.wait(60)
    assert client.call("stop", id="worker0001", grace=1000)["result"]["status"] == 3
    assert docker.process.poll() is None


def nothing_is_left(docker):
    """End what is a worker, as the API would; what is none has to go by itself."""
    client = docker.client()
    for record in client.call("list")["workers"]:
        if record["state"] == "running":
            client.call("stop", id=record["id"], grace=0)
    client.close()
    return not docker.leftovers()


@pytest.mark.parametrize(("operation", "delay"), [("start", 0.05), ("start", 0.6), ("stop", 0.05), ("stop", 0.2)])
def test_an_api_that_is_killed_in_the_middle_leaves_nothing_that_belongs_to_nobody(engine, request, operation, delay):
    settings = 'proxy.health_interval = "500ms"'
    with DockerPair(request.node.name, engine, settings) as pair:
        pair.deploy("plain", simple_app(), backend="docker")
        if operation == "stop":
            assert pair.visitor().get("/app/plain/").status_code == 200
        ask_api = opened if operation == "start" else disabled
        asking = threading.Thread(target=ask_api, args=(pair,), daemon=True)
        asking.start()
        time.sleep(delay)
        pair.kill("api")
        pair.start_api()

        def all_owned():
            owned = {f"blockyard-{worker['id']}" for worker in pair.workers("plain")}
            return set(pair.containers()) == owned

        wait_for(all_owned, what="the end of what belongs to nobody")
        pair.http.post("/api/v1/apps/plain/enable")
        assert pair.visitor().get("/app/plain/").status_code == 200
        pair.http.post("/api/v1/apps/plain/disable")
        wait_for(lambda: not pair.docker_leftovers(), what="the end of all")


def opened(pair):
    with contextlib.suppress(httpx.HTTPError):
        pair.visitor().get("/app/plain/")


def disabled(pair):
    with contextlib.suppress(httpx.HTTPError):
        httpx.post(f"{pair.control_url}/api/v1/apps/plain/disable", headers=pair.http.headers)
