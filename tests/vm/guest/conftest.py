"""The machine under test: `scripts/up` has run for real. Each result leaves by a port, as one JSON object a line."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

CHECKOUT = Path(__file__).parents[3]
sys.path.insert(0, str(CHECKOUT / "tests" / "host" / "api"))

from running_pair import Server  # noqa: E402 - its place is known only now

PORT = "/dev/virtio-ports/results"
STATE = Path("/var/lib/blockyard")
UP_WITHIN = 600  # seconds, under emulation and on a busy machine


def send(**message):
    with open(PORT, "w", encoding="utf-8") as port:
        port.write(json.dumps(message) + "\n")


@pytest.fixture(scope="session")
def show():
    """A function that has the host print a line."""
    return lambda line: send(show=line)


@pytest.fixture(scope="session")
def first_run():
    """What the first `scripts/up` said."""
    return subprocess.run([CHECKOUT / "scripts" / "up"], capture_output=True, text=True, timeout=UP_WITHIN, check=False)


@pytest.fixture(scope="session")
def server(first_run):
    assert first_run.returncode == 0, first_run.stdout + first_run.stderr
    token = (STATE / "admin-token").read_text().strip()
    return Server("http://127.0.0.1:8080", "http://127.0.0.1:8081", token)


def pytest_runtest_logreport(report):
    if report.when == "call" or report.outcome != "passed":
        outcome = "passed" if report.outcome == "passed" else "failed"  # a skipped test is one that nobody sees
        send(
            test=report.nodeid.rpartition("/")[2],
            outcome=outcome,
            detail=f"{report.when}: {report.longreprtext}"[:8000],
        )
