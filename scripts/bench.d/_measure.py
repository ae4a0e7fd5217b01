"""What the parts of the bench share: rows and their table, processes and the CPU time they use."""

import contextlib
import os
import platform
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

HERE = Path(__file__).resolve().parent
_GO = "/usr/bin/go"  # Debian's: a newer one elsewhere on the machine is another peer
_TICK = os.sysconf("SC_CLK_TCK")


@dataclass(frozen=True)
class Options:
    """How to measure; `directory` is the part's own and empty."""

    rounds: int
    seconds: float
    peers: bool
    directory: Path


@dataclass(frozen=True)
class Row:
    """One line of the table."""

    what: str
    measured: str
    reach: str = ""


def print_table(rows: Sequence[Row]) -> None:
    """Print rows as a Markdown table, so that it can go into the documentation as it is."""
    cells = [("what", "measured", "reach"), *((row.what, row.measured, row.reach) for row in rows)]
    widths = [max(len(line[column]) for line in cells) for column in range(3)]
    for number, line in enumerate(cells):
        print("| " + " | ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)) + " |")
        if not number:
            print("|" + "|".join("-" * (width + 2) for width in widths) + "|")


def machine() -> str:
    """One line about where this runs."""
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    model = next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), "unknown CPU")
    kernel, python = platform.release(), platform.python_version()
    return f"{os.cpu_count()} cores, {model}, Linux {kernel}, Python {python}"


def cpu_seconds(pid: int) -> float:
    """CPU time of a process and its living children so far."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    return (int(fields[11]) + int(fields[12])) / _TICK + sum(cpu_seconds(int(child)) for child in children)


def resident_bytes(pid: int) -> int:
    """Memory that a process holds."""
    return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


@contextlib.contextmanager
def running(argv: Sequence[str | Path], ready: Callable[[], None]) -> Iterator[int]:
    """Run a server while the block lasts; `ready` raises OSError as long as it does not answer. Yields its pid."""
    process = subprocess.Popen(argv, env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)})
    try:
        deadline = time.monotonic() + 15
        while True:
            try:
                ready()
                break
            except OSError:
                if process.poll() is not None or time.monotonic() > deadline:
                    raise SystemExit(f"bench: {argv[0]} did not start") from None
                time.sleep(0.02)
        yield process.pid
    finally:
        process.terminate()
        process.wait(15)


def listens(address: str | tuple[str, int]) -> Callable[[], None]:
    """Return a probe that connects to an address."""

    def probe() -> None:
        family = socket.AF_UNIX if isinstance(address, str) else socket.AF_INET
        with socket.socket(family) as sock:
            sock.connect(address)

    return probe


def free_port() -> int:
    """Return a TCP port that nobody uses at the moment."""
    with socket.create_server(("127.0.0.1", 0)) as sock:
        return int(sock.getsockname()[1])


@contextlib.contextmanager
def proxies(options: Options, backend: str) -> Iterator[dict[str, tuple[int, int]]]:
    """Run the relay and its peers before one backend socket; yields name → (port, pid)."""
    with contextlib.ExitStack() as stack:
        found = {}
        for name, argv in _proxies(options, backend):
            port = free_port()
            command = [str(word).replace("{port}", str(port)) for word in argv(port)]
            found[name] = (port, stack.enter_context(running(command, listens(("127.0.0.1", port)))))
        yield found


def _proxies(options: Options, backend: str) -> Iterator[tuple[str, Callable[[int], list[str | Path]]]]:
    yield "nginx", lambda port: nginx(options.directory, "proxy", _PROXY % (backend, port))
    yield "relay", lambda port: [sys.executable, HERE / "_relay_server.py", str(port), backend]
    if options.peers:
        binary = options.directory / "reverse_proxy"
        offline = {**os.environ, "GO111MODULE": "off", "GOTOOLCHAIN": "local", "GOCACHE": str(options.directory / "go")}
        subprocess.run([_GO, "build", "-o", binary, HERE / "reverse_proxy.go"], check=True, env=offline)
        yield "go", lambda port: [binary, str(port), backend]


def nginx(directory: Path, name: str, http: str) -> list[str | Path]:
    """Return the command of an nginx with one worker process and this `http` block."""
    file = directory / f"{name}.conf"
    file.write_text(
        f"worker_processes 1; daemon off; pid {directory}/{name}.pid; error_log {directory}/{name}.log;\n"
        "events { worker_connections 4096; }\n"
        f"http {{ access_log off; keepalive_requests 1000000000; keepalive_timeout 600s;\n{http}\n}}\n"
    )
    return ["nginx", "-e", directory / f"{name}.log", "-c", file]


_PROXY = """
upstream worker { server unix:%s; keepalive 64; keepalive_requests 1000000000; }
map $http_upgrade $connection_option { default upgrade; '' ''; }
server {
  listen 127.0.0.1:%d backlog=1024;
  location / {
    proxy_pass http://worker;
    proxy_http_version 1.1;
    proxy_read_timeout 600s;
    proxy_set_header Host $http_host;
    proxy_set_header Connection $connection_option;
    proxy_set_header Upgrade $http_upgrade;
    proxy_set_header X-Forwarded-For $remote_addr;
    proxy_set_header X-Forwarded-Proto $scheme;
    proxy_set_header X-Forwarded-Host $http_host;
    proxy_set_header X-Forwarded-Prefix /app/bench;
  }
}
"""
