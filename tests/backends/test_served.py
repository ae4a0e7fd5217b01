"""Docker workers behind a real API, beside workers of the other kind."""

import contextlib
import json
import threading
import time

import httpx
import pytest
from docker_pair import DockerPair
from running_pair import HELLO, archive, simple_app, wait_for


@pytest.fixture
def pair(engine, request):
    with DockerPair(request.node.name, engine) as running:
        yield running


def hello() -> bytes:
    return archive({path.name: path.read_text() for path in HELLO.iterdir() if path.is_file()})


def test_an_app_is_served_by_the_backend_that_it_names_and_moves_to_another(pair):
    pair.deploy("hello", hello(), backend="docker")
    visitor = pair.visitor()
    with visitor.shiny("hello"):
        (worker,) = pair.workers("hello")
        (container,) = pair.containers()
        assert container == f"blockyard-{worker['id']}"
        assert json.dumps("config") in json.dumps(visitor.hello)
        pair.http.patch("/api/v1/apps/hello", json={"backend": None})
        assert pair.visitor().get("/app/hello/").status_code == 200
        assert len(list(pair.runtime_dirs())) == 1  # a new visitor is where the app is now
        assert pair.containers() == [container]  # who was there stays
        assert visitor.get("/app/hello/").status_code == 200
    pair.http.post("/api/v1/apps/hello/disable")
    wait_for(lambda: not pair.docker_leftovers(), what="the Docker worker's end")


def test_the_checks_tell_what_the_docker_backend_costs_and_whether_it_works(pair):
    def found():
        checks = pair.http.post("/api/v1/system/checks/run").json()["checks"]
        return {check["name"]: check for check in checks if check["name"].startswith("docker_")}

    assert [check["severity"] for check in found().values()] == ["ok", "ok"]  # nothing uses it
    pair.deploy("plain", simple_app(), backend="docker")
    used = found()
    assert used["docker_socket"]["severity"] == "info"
    assert "root on this host" in used["docker_socket"]["fact"]
    assert used["docker_runtime"]["severity"] == "ok"
    pair.docker.terminate()
    pair.docker.wait(20)
    pair.docker_socket.unlink()
    assert found()["docker_socket"]["severity"] == "error"


def test_a_docker_worker_outlives_a_restart_of_the_api(pair):
    pair.deploy("plain", simple_app(), backend="docker")
    visitor = pair.visitor()
    with visitor.shiny("plain"):
        before = pair.workers("plain")
        pair.kill("api")
        pair.start_api()
        wait_for(lambda: pair.workers("plain"), what="the takeover")
        assert [worker["id"] for worker in pair.workers("plain")] == [worker["id"] for worker in before]
        assert visitor.get("/app/plain/").status_code == 200


@pytest.mark.parametrize("delay", [0.05, 0.6])
def test_an_api_that_is_killed_in_the_middle_of_a_start_leaves_nothing_that_belongs_to_nobody(engine, request, delay):
    settings = 'proxy.health_interval = "500ms"'
    with DockerPair(request.node.name, engine, settings) as pair:
        pair.deploy("plain", simple_app(), backend="docker")
        opening = threading.Thread(target=_opened, args=(pair.visitor(),), daemon=True)
        opening.start()
        time.sleep(delay)
        pair.kill("api")
        pair.start_api()

        def all_owned():
            owned = {f"blockyard-{worker['id']}" for worker in pair.workers("plain")}
            return set(pair.containers()) == owned

        wait_for(all_owned, what="the end of what belongs to nobody")
        assert pair.visitor().get("/app/plain/").status_code == 200
        pair.http.post("/api/v1/apps/plain/disable")
        wait_for(lambda: not pair.docker_leftovers(), what="the end of all")


def _opened(visitor):
    with contextlib.suppress(httpx.HTTPError):
        visitor.get("/app/plain/")
