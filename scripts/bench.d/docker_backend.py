"""Part: Docker: cold starts of both backends and of the pair in a container, beside `docker run` of the same app.

The engines are the tests' own (`tests/backends/running_engine.py`), with the images that scripts/build-worker-image and
scripts/build-image make.
"""

import contextlib
import json
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

sys.path.extend(
    str(Path(__file__).parents[2] / "tests" / place) for place in ("container", "backends", "host", "host/api")
)
sys.path.insert(0, str(Path(__file__).parent))

from _measure import Options, Row
from docker_helper import engine_group
from docker_pair import DockerPair
from running_container import Container, Engine, documented
from running_engine import IMAGE, Dockerd
from running_pair import HELLO, simple_app, wait_for
from whole_pair import REQUEST, connected, hello_files, our_start

from blockyard_api.hardening import seccomp

_BRIDGE = "plain"
_MESSAGES = 200
_ECHO = "function(input, output, session) observeEvent(input$n, session$sendCustomMessage('echo', input$n))"
TITLE = "Docker: its backend, and the pair in a container; examples/hello"
_PLAIN = (
    "shiny::runApp('/app', port = structure('/run/worker/app.sock', mask = strtoi('0111', 8)), launch.browser = FALSE)"
)


def run(options: Options) -> list[Row]:
    """Measure all of it."""
    times: dict[str, list[float]] = {"run": [], "docker": [], "process": [], "container": []}
    with (
        Dockerd(engine_group()) as engine,
        DockerPair("bench", engine) as pair,
        _pair_in_a_container(options.directory) as container,
    ):
        engine.run(
            "network", "create", "--subnet", "10.213.99.0/28", _BRIDGE
        )  # as docker0 is there, which the tests lack
        pair.deploy("hello", hello_files())
        pair.deploy("echo", simple_app(server=_ECHO))
        trips = {backend: [] for backend in ("docker", "process")}
        for _ in range(options.rounds):
            times["run"].append(_plain_run(engine))
            for backend in ("docker", "process"):
                pair.http.patch("/api/v1/apps/hello", json={"backend": backend})
                times[backend].append(our_start(pair))
                pair.http.post("/api/v1/apps/hello/disable")
                wait_for(lambda: not pair.workers("hello") and not pair.docker_leftovers(), what="the worker's end")
                pair.http.post("/api/v1/apps/hello/enable")
            times["container"].append(_start_inside(container))
        for _ in range(options.rounds):
            for backend in ("docker", "process"):
                pair.http.patch("/api/v1/apps/echo", json={"backend": backend})
                trips[backend].append(_round_trip(pair))
    medians = _medians(times)
    return [
        _ratio("cold start, Docker worker ÷ docker run, first byte", medians, "docker", "run", "≤ 1.10"),
        _ratio("cold start, process ÷ Docker, first byte", medians, "process", "docker", "≤ 0.70"),
        _ratio("cold start, pair in a container ÷ process, first byte", medians, "container", "process", ""),
        _ratio("a message to the app and back, p50, Docker ÷ process", _medians(trips), "docker", "process", "≤ 1.3"),
    ]


def _medians(times: dict[str, list[float]]) -> dict[str, float]:
    return {name: statistics.median(found) for name, found in times.items()}


def _round_trip(pair: DockerPair) -> float:
    """Return the median time of a visitor's message to the app and of the app's answer, in seconds."""
    times = []
    with pair.visitor().shiny("echo") as sock:
        for number in range(1, _MESSAGES + 1):
            began = time.perf_counter()
            sock.send(json.dumps({"method": "update", "data": {"n:shiny.number": number}}))
            while json.loads(sock.recv(10)).get("custom", {}).get("echo") != number:
                pass
            times.append(time.perf_counter() - began)
    return statistics.median(times)


def _ratio(what: str, medians: dict[str, float], one: str, other: str, reach: str) -> Row:
    mine, theirs = medians[one], medians[other]
    return Row(what, f"{mine / theirs:.2f}  ({mine * 1000:.3g} ms, {theirs * 1000:.3g} ms)", reach)


def _plain_run(engine: Dockerd) -> float:
    """Time `docker run` of the same image and app, served over a Unix socket too."""
    directory = Path(tempfile.mkdtemp())
    directory.chmod(0o777)
    words = [
        "run",
        "--rm",
        "--name",
        "plain",
        "--network",
        _BRIDGE,
        "--volume",
        f"{HELLO}:/app:ro",
        "--volume",
        f"{directory}:/run/worker",
    ]
    argv = ["docker", "--host", f"unix://{engine.socket}", *words, IMAGE, "R", "--no-echo", "-e", _PLAIN]
    began = time.perf_counter()
    process = subprocess.Popen(argv, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    with contextlib.closing(connected(f"{directory}/app.sock")) as sock:
        sock.sendall(REQUEST.format(path="/", host="localhost").encode())
        sock.recv(1)
        took = time.perf_counter() - began
    engine.run("rm", "--force", "plain", check=False)
    process.wait()
    shutil.rmtree(directory)
    return took


@contextlib.contextmanager
def _pair_in_a_container(directory: Path) -> Iterator[Container]:
    """Run the container of docs/container.md, in an engine of its own, with the app in it."""
    profile = directory / "seccomp.json"
    profile.write_bytes(seccomp.outer(seccomp.read_policy(), seccomp.read_outer()))
    with Engine(0) as engine, Container(engine, documented(profile), name="blockyard") as container:
        container.wait_until_served()
        container.deploy_hello()
        yield container


def _start_inside(container: Container) -> float:
    """Time the first byte of the app that no worker in the container runs yet, at the published port."""
    container.inside("by disable hello")
    show = "by get hello --runtime --json"
    container.wait_for(
        lambda: all(each["ended_at"] for each in json.loads(container.inside(show))["runtime"]["workers"])
    )
    container.inside("by enable hello")
    return container.seconds_to_first_byte()
