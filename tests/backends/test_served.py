"""Docker workers behind a real API, beside workers of the other kind."""

import contextlib
import json
import subprocess

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


def checks_of(pair):
    run = pair.http.post("/api/v1/system/checks/run").json()
    return {check["name"]: check for check in run["checks"]}, run["isolation"]


@contextlib.contextmanager
def listening(engine, *places):
    """Listen on the engine's host, whose addresses are those that its containers see."""
    argv = ["nsenter", f"--net={engine.root}/net", "python3", "-c"]
    program = f"import socket, sys; held = [socket.create_server(place) for place in {places!r}]; print(1, flush=True)"
    with subprocess.Popen(
        [*argv, f"{program}; sys.stdin.read()"], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as host:
        assert host.stdout.readline() == b"1\n"
        yield


def test_the_checks_tell_what_the_docker_backend_costs_and_what_its_workers_reach(engine, request):
    # This machine's own network is not the test's, so no worker of the other kind has it.
    settings = 'process.network = "none"\nprocess.skip_metadata_check = true\nredis.url = "redis://127.0.0.1:6379"'
    with DockerPair(request.node.name, engine, settings) as pair:
        found, isolation = checks_of(pair)
        assert [found[name]["severity"] for name in ("docker_socket", "docker_runtime")] == ["ok", "ok"]
        assert "Docker" not in isolation  # nothing uses it

        pair.deploy("plain", simple_app(), backend="docker")
        with listening(engine, ("0.0.0.0", 6379), ("0.0.0.0", 8200)):
            found, isolation = checks_of(pair)
        assert found["docker_socket"]["severity"] == "info"
        assert "root on this host" in found["docker_socket"]["fact"]
        assert found["docker_runtime"]["severity"] == "ok"
        assert found["worker_egress"]["severity"] == "warning"
        assert "A worker (network none) reached none of" in found["worker_egress"]["fact"]
        assert "A Docker worker reaches redis (this host port 6379)." in found["worker_egress"]["fact"]
        assert "systemctl enable --now blockyard-firewall-docker" in found["worker_egress"]["remedy"]
        assert "A Docker worker runs under the engine's filter." in found["seccomp_profile"]["fact"]
        assert "A Docker worker does not reach abstract sockets" in found["abstract_sockets"]["fact"]
        bubblewrap, _, docker = isolation.partition("Apps in Docker: ")
        assert bubblewrap.startswith("Apps in bubblewrap: isolated by uid, processes, files, system calls")
        assert "isolated by processes, files, system calls, memory, CPU, number of processes, network" in docker
        assert "not isolated by uid and this host's services." in docker
        assert isolation.endswith("which is root on this host.")

        metadata = ["nsenter", f"--net={engine.root}/net", "ip", "address"]
        subprocess.run([*metadata, "add", "169.254.169.254/32", "dev", "lo"], check=True)
        try:
            with listening(engine, ("169.254.169.254", 80)):
                found, isolation = checks_of(pair)
        finally:
            subprocess.run([*metadata, "del", "169.254.169.254/32", "dev", "lo"], check=True)
        assert found["worker_egress"]["severity"] == "error"
        assert "A Docker worker can read this machine's credentials" in found["worker_egress"]["fact"]
        assert "not isolated by uid and the cloud's credentials" in isolation

        pair.docker.terminate()
        pair.docker.wait(20)
        pair.docker_socket.unlink()
        found, isolation = checks_of(pair)
        assert found["docker_socket"]["severity"] == "error"
        assert found["worker_egress"]["severity"] == "error"  # what was not seen is not safe
        assert "blockyard-spawner-docker" in found["worker_egress"]["remedy"]
        assert "Apps in Docker: not known" in isolation


def test_where_every_app_runs_in_docker_nothing_is_asked_of_the_other_helper(engine, request):
    settings = 'server.backend = "docker"\nprocess.skip_metadata_check = true'
    with DockerPair(request.node.name, engine, settings) as pair:
        pair.kill("spawner")
        found, isolation = checks_of(pair)
        assert [check for check in found.values() if check["severity"] == "error"] == []
        assert found["spawner_link"]["fact"] == "No app uses the process backend."
        assert "A Docker worker reached none of" in found["worker_egress"]["fact"]
        assert "A worker" not in found["worker_egress"]["fact"]
        assert isolation.startswith("Apps in Docker: ")


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
