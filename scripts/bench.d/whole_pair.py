"""Part: the whole pair: cold start beside plain R, spawn, the daemons' memory, the spawner's start, the checks.

The pair is the tests' own (`tests/host/api/running_pair.py`): spawner as root, API as an ordinary user, R in bwrap.
"""

import contextlib
import os
import shutil
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2] / "tests" / "host" / "api"))

import httpx
from _measure import Options, Row, resident_bytes
from running_pair import HELLO, Pair, simple_app, wait_for

from blockyard_api.backends.spawner import encode
from blockyard_spawner import protocol

TITLE = "The whole pair, examples/hello"

_PLAIN = "shiny::runApp({app!r}, port = structure({path!r}, mask = strtoi('0117', 8)), launch.browser = FALSE)"
REQUEST = "GET {path} HTTP/1.1\r\nHost: {host}\r\nConnection: close\r\n\r\n"


def run(options: Options) -> list[Row]:
    """Measure all of it."""
    return [*cold_start(options.rounds), *spawn(options.rounds), *spawner_start(options.rounds), *memory(), *checks()]


def hello_files() -> dict[str, str]:
    """Read the example app."""
    return {path.name: path.read_text() for path in HELLO.iterdir() if path.is_file()}


def cold_start(rounds: int) -> list[Row]:
    """Time to the first byte of examples/hello, through everything and by plain Rscript, taken in turn."""
    with Pair("bench") as pair:
        pair.deploy("hello", hello_files())
        plain, ours = [], []
        for _ in range(rounds):
            plain.append(_plain_start())
            ours.append(our_start(pair))
            pair.http.post("/api/v1/apps/hello/disable")
            wait_for(lambda: not pair.workers("hello"), what="the worker's end")
            pair.http.post("/api/v1/apps/hello/enable")
    theirs, mine = statistics.median(plain), statistics.median(ours)
    measured = f"{mine / theirs:.2f}  ({mine * 1000:.0f} ms, plain {theirs * 1000:.0f} ms)"
    return [Row("cold start, first byte ÷ plain Rscript on a Unix socket", measured, "≤ 1.0")]


def _plain_start() -> float:
    directory = tempfile.mkdtemp()
    path = f"{directory}/app.sock"
    began = time.perf_counter()
    process = subprocess.Popen(
        ["Rscript", "-e", _PLAIN.format(app=str(HELLO), path=path)],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    with contextlib.closing(connected(path)) as sock:
        sock.sendall(REQUEST.format(path="/", host="localhost").encode())
        sock.recv(1)
        took = time.perf_counter() - began
    process.kill()
    process.wait()
    shutil.rmtree(directory)
    return took


def connected(path: str) -> socket.socket:
    """Connect to a Unix socket as soon as somebody listens."""
    while True:
        sock = socket.socket(socket.AF_UNIX)
        try:
            sock.connect(path)
        except OSError:
            sock.close()
            time.sleep(0.005)
        else:
            return sock


def our_start(pair: Pair) -> float:
    """Return the seconds to the first byte of the app that no worker runs yet."""
    host = pair.relay_origin.removeprefix("http://")
    address, _, port = host.partition(":")
    began = time.perf_counter()
    with socket.create_connection((address, int(port))) as sock:
        sock.sendall(REQUEST.format(path="/app/hello/", host=host).encode())
        answer = sock.recv(100)
        took = time.perf_counter() - began
    if b" 200 " not in answer:
        raise RuntimeError(f"the app was not served: {answer!r}")
    return took


def spawn(rounds: int) -> list[Row]:
    """Time from the spawn request to the reply that bwrap has exec'd, on one connection, as the API does it."""
    times = []
    with Pair("bench") as pair, spawner(pair) as sock:
        pair.deploy("plain", simple_app())
        bundle = pair.http.get("/api/v1/apps/plain").json()["active_bundle"]
        for number in range(max(20, rounds * 5)):
            worker = f"bench{number:08d}"
            request = protocol.Spawn(number + 1, worker, "app", "plain", bundle=bundle)
            read_end, write_end = os.pipe()
            began = time.perf_counter()
            socket.send_fds(sock, [encode(request)], [write_end])
            packet, descriptors, _, _ = socket.recv_fds(sock, protocol.MAX_PACKET, 1)
            times.append(time.perf_counter() - began)
            if "error" in (reply := protocol.unpack(packet)):
                raise RuntimeError(f"the spawner refused: {reply}")
            sock.send(encode(protocol.Stop(0, worker, 0)))
            sock.recv(protocol.MAX_PACKET)
            for descriptor in (read_end, write_end, *descriptors):
                os.close(descriptor)
    return [
        Row("spawn: request sent → bwrap has exec'd, p50", f"{statistics.median(times) * 1000:.1f} ms", "≤ 6 ms"),
        Row("the same, p99", f"{statistics.quantiles(times, n=100)[98] * 1000:.1f} ms", ""),
    ]


@contextlib.contextmanager
def spawner(pair: Pair) -> Iterator[socket.socket]:
    """Connect to the spawner, as the API does."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as sock:
        sock.connect(str(pair.spawner_socket))
        sock.send(encode(protocol.Hello(0, protocol.VERSION)))
        sock.recv(protocol.MAX_PACKET)
        yield sock


def spawner_start(rounds: int) -> list[Row]:
    """Time from the spawner's exec to its READY=1, and its resident memory then."""
    took, resident = [], []
    with Pair("bench") as pair, socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as told:
        pair.kill("api")
        pair.kill("spawner")
        told.bind(path := str(pair.root / "notify.sock"))
        argv = [sys.executable, "-m", "blockyard_spawner.main"]
        argv += ["--config", str(pair.config), "--socket", str(pair.spawner_socket)]
        for _ in range(max(9, rounds)):
            began = time.perf_counter()
            with subprocess.Popen(argv, env={"NOTIFY_SOCKET": path}, stderr=subprocess.DEVNULL, cwd="/") as process:
                while b"READY=1" not in told.recv(4096):
                    pass
                took.append(time.perf_counter() - began)
                resident.append(resident_bytes(process.pid))
                process.terminate()
    return [
        Row("start of the spawner, until it serves", f"{statistics.median(took) * 1000:.0f} ms", "< 150 ms"),
        Row("memory of the spawner at rest", f"{statistics.median(resident) / 2**20:.0f} MB", "< 30 MB"),
    ]


def checks() -> list[Row]:
    """Time that all start-up checks take together, as their route tells."""
    with Pair("bench") as pair:
        took = []
        for _ in range(3):
            began = time.perf_counter()
            pair.http.post("/api/v1/system/checks/run").raise_for_status()
            took.append(time.perf_counter() - began)
    return [Row("all start-up checks, together", f"{statistics.median(took):.1f} s", "≤ 3 s")]


_VISITORS, _SOCKETS = 4, 60  # and of each of them; a session may have 64, an address 256 at one worker


def memory() -> list[Row]:
    """Resident memory of the API at rest, and what each idle WebSocket adds."""
    with Pair("bench") as pair, contextlib.ExitStack() as opened:
        pair.deploy("plain", simple_app(), max_sessions_per_worker=_VISITORS)
        visitors = [pair.visitor() for _ in range(_VISITORS)]
        for visitor in visitors:
            visitor.get("/app/plain/")
        wait_for(lambda: pair.workers("plain", "active"), what="the worker")
        httpx.get(f"{pair.control_url}/openapi.json")
        before = resident_bytes(pair.api.pid)
        for visitor in visitors * _SOCKETS:
            opened.enter_context(visitor.websocket("plain"))
        each = (resident_bytes(pair.api.pid) - before) / (_SOCKETS * _VISITORS)
    return [
        Row("memory of the API at rest", f"{before / 2**20:.0f} MB", "≤ 90 MB"),
        Row("memory of the API per idle WebSocket", f"{each / 1024:.0f} KB", "≤ 25 KB"),
    ]
