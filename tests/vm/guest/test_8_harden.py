"""docs/harden.md on a fresh server: each command as it stands there, in its order, and what has come of it."""

import os
import re
import subprocess
from pathlib import Path

import httpx
import pytest
from conftest import CHECKOUT
from machine import WORKERS, active, answers, knob, r_process, run, systemctl, unit
from running_pair import simple_app

PAGE = (CHECKOUT / "docs" / "harden.md").read_text()
COMMANDS = re.findall(r"^    (\S.*)$", PAGE, re.MULTILINE)
NAMES = [f"{at}-{command.split()[0].partition('=')[0]}" for at, command in enumerate(COMMANDS, 1)]
CONFIG = Path("/etc/blockyard/blockyard.toml")
ADDED = ("/etc/apparmor.d/blockyard", "/etc/apparmor.d/disable/blockyard")


@pytest.fixture(scope="module")
def home(server, tmp_path_factory):
    """A home directory of its own for root; afterwards the server is as it was before the first command."""
    before = CONFIG.read_bytes()
    directory = tmp_path_factory.mktemp("root")
    yield directory
    CONFIG.write_bytes(before)
    systemctl("disable", "--now", "blockyard-firewall.service", check=False)
    systemctl("revert", "blockyard-workers.service")
    run("apparmor_parser", "-R", ADDED[0], check=False)
    for path in ADDED:
        Path(path).unlink(missing_ok=True)
    systemctl("restart", "blockyard-spawner.service", "blockyard-api.service")
    answers(server)


@pytest.fixture(scope="module")
def isolated(home, server):
    """A worker that was started after the last command, by a visitor of the app's own host name."""
    server.deploy("isolated", simple_app(ui="fluidPage(paste('INTERFACES', length(list.files('/sys/class/net'))))"))
    page = httpx.get(f"{server.relay_origin}/", headers={"Host": "isolated.apps.example.com"}, timeout=120)
    assert page.status_code == 200, page.text
    return active(server, "isolated")[0]


def test_the_page_names_every_wall():
    assert len(COMMANDS) >= 18
    walls = "install-seccomp install-apparmor firewall memory_ceiling set-property network public_url check"
    assert [wall for wall in walls.split() if wall not in " ".join(COMMANDS)] == []
    interactive = r"systemctl (edit|reboot|poweroff)|\b(vi|vim|nano|passwd|sudo|reboot)\b"
    assert [command for command in COMMANDS if re.search(interactive, command)] == []


@pytest.mark.parametrize("command", COMMANDS, ids=NAMES)
def test_each_command_of_the_page_works(home, command):
    environ = {**os.environ, "HOME": str(home), "XDG_CONFIG_HOME": str(home / ".config")}
    done = subprocess.run(
        ["bash", "-c", command], env=environ, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=240,
        check=False,
    )  # fmt: skip
    assert done.returncode == 0, f"{command}: {done.stdout}{done.stderr}"
    assert not re.search(r"(?i)traceback|unknown key", done.stdout + done.stderr)
    if command.startswith("sed"):
        (line,) = re.findall(r"/(#?\w+ = [^/]+)/'|\|(\w+ = .+)\|'", command)
        assert "".join(line) in CONFIG.read_text().splitlines()  # sed says nothing when it finds nothing


def test_afterwards_a_worker_has_the_default_limits_and_no_app_gets_more_than_the_ceiling(server, isolated):
    assert knob(isolated["id"], "memory.max") == str(512 << 20)
    assert knob(isolated["id"], "cpu.max") == "100000 100000"
    refused = server.http.patch("/api/v1/apps/isolated", json={"memory_limit": "2g"})
    assert refused.status_code == 400
    assert refused.json()["error"] == "limit_above_ceiling"


def test_afterwards_all_workers_together_stay_below_the_units_ceiling(home):
    assert (WORKERS / "memory.max").read_text() == f"{2 << 30}\n"
    assert (WORKERS / "pids.max").read_text() == "4000\n"


def test_afterwards_a_worker_has_no_network_and_every_wall_around_it(isolated):
    process = r_process(isolated["id"])
    assert Path(f"/proc/{process}/ns/net").readlink() != Path("/proc/1/ns/net").readlink()
    assert filters(process) > filters(unit("blockyard-spawner.service", "MainPID"))
    checked = run("apparmor_parser", "-QT", ADDED[0], check=False)
    label = Path(f"/proc/{process}/attr/current").read_text()
    assert label.startswith("blockyard " if checked.returncode == 0 else "unconfined")
    assert "table inet blockyard" in run("nft", "list", "tables").stdout


def filters(process):
    """How many system call filters a process is under: its unit's, and those it was given since."""
    status = Path(f"/proc/{process}/status").read_text()
    return int(re.search(r"^Seccomp_filters:\s*(\d+)$", status, re.MULTILINE)[1])
