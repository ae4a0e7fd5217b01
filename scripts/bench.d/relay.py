"""Part: CPU per request of the relay beside nginx (and Go), all before the same backend on a Unix socket."""

import os
import re
import statistics
import subprocess

from _measure import Options, Row, cpu_seconds, listens, nginx, proxies, running

TITLE = "HTTP through the relay: CPU per request, peer ÷ relay (1.00 = as cheap as the peer)"
SIZES = {"1 KB": (1 << 10, 64), "32 KB": (32 << 10, 64), "10 MB": (10 << 20, 8)}
REACH = {
    ("nginx", "1 KB"): 0.55,
    ("nginx", "32 KB"): 0.75,
    ("nginx", "10 MB"): 1.15,
    ("go", "1 KB"): 1.9,
    ("go", "32 KB"): 1.6,
    ("go", "10 MB"): 2.5,
}


def run(options: Options) -> list[Row]:
    """Measure every size in every round, one proxy after the other."""
    files = options.directory / "www"
    files.mkdir()
    for size, _ in SIZES.values():
        (files / str(size)).write_bytes(os.urandom(size))
    backend = str(options.directory / "backend.sock")
    static = nginx(options.directory, "static", f"sendfile on; server {{ listen unix:{backend}; root {files}; }}")
    costs: dict[tuple[str, str], list[float]] = {}
    rates: dict[tuple[str, str], list[float]] = {}
    with running(static, listens(backend)), proxies(options, backend) as peers:
        for _ in range(options.rounds):
            for label, (size, connections) in SIZES.items():
                for name, (port, pid) in peers.items():
                    before = cpu_seconds(pid)
                    requests, seconds = load(f"http://127.0.0.1:{port}/{size}", connections, options.seconds)
                    costs.setdefault((name, label), []).append((cpu_seconds(pid) - before) / requests)
                    rates.setdefault((name, label), []).append(requests / seconds)
    rows = []
    for label in SIZES:
        for peer in peers:
            ratio = statistics.median(
                theirs / ours for theirs, ours in zip(costs[peer, label], costs["relay", label], strict=True)
            )
            cost, rate = statistics.median(costs[peer, label]) * 1e6, statistics.median(rates[peer, label])
            absolute = f"{peer}: {cost:.1f} µs, {rate:,.0f}/s"
            if peer == "relay":
                rows.append(Row(f"{label}, {absolute}", ""))
            else:
                rows.append(Row(f"{label}, {absolute}", f"{ratio:.2f}", f"≥ {REACH[peer, label]}"))
    return rows


def load(url: str, connections: int, seconds: float) -> tuple[int, float]:
    """Load a server and return how many requests it answered, and in how many seconds. Any failure ends the bench."""
    command = ["wrk", "-t1", f"-c{connections}", f"-d{max(1, round(seconds))}", url]
    said = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    count = re.search(r"(\d+) requests in ([\d.]+)(s|m)", said)
    if count is None or "Non-2xx" in said:
        raise SystemExit(f"bench: {url} was not answered properly:\n{said}")
    return int(count[1]), float(count[2]) * (60 if count[3] == "m" else 1)
