"""The machine under test: `scripts/up` has run for real. Each result leaves by a port, as one JSON object a line."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

CHECKOUT = Path(__file__).parents[3]
sys.path[:0] = [str(CHECKOUT / "tests" / "host" / "api"), str(CHECKOUT / "tests" / "hostile")]

from machine import WORKERS, debian  # noqa: E402 - their places are known only now
from placement import runs_on  # noqa: E402
from running_pair import Server, simple_app  # noqa: E402
from target import Target  # noqa: E402

PORT = "/dev/virtio-ports/results"
STATE = Path("/var/lib/blockyard")
PYTHON = "/opt/blockyard/venv/bin/python"
RUNTIME = Path("/run/blockyard/workers")
UP_WITHIN = 1200  # seconds, under emulation and on a busy machine


def pytest_collection_modifyitems(config, items):
    elsewhere = [item for item in items if not runs_on(debian(), f"{item.path.name}::{item.originalname}")]
    config.hook.pytest_deselected(items=elsewhere)
    items[:] = [item for item in items if item not in elsewhere]


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


@pytest.fixture(scope="session")
def plain(server):
    """The name of an app that shows a plain page; its visitors share a worker."""
    server.deploy("plain", simple_app(), max_sessions_per_worker=100)
    return "plain"


@pytest.fixture(scope="session")
def target(server):
    """The installed server, for the hostile tests."""
    return Target(
        server, Path("/etc/blockyard/blockyard.toml"), PYTHON, "blockyard", STATE, RUNTIME, WORKERS,
        Path("/run/blockyard/spawner.sock"), tmp_size=256 << 20, processes=1_500,
    )  # fmt: skip


def pytest_runtest_logreport(report):
    if report.when == "call" or report.outcome != "passed":
        passed = report.outcome == "passed"  # a skipped test is one that nobody sees
        send(
            test=report.nodeid.rpartition("/")[2],
            outcome="passed" if passed else "failed",
            detail="" if passed else f"{report.when}: {report.longreprtext[:8000]}\n{last_entries()}",
        )


def last_entries():
    """What the units said lately: the machine is gone when somebody reads of a failure."""
    query = ["journalctl", "--unit=blockyard-*", "--quiet", "--no-hostname", "--lines=40"]
    return subprocess.run(query, capture_output=True, text=True, timeout=60, check=False).stdout
