"""The units: installed by `scripts/up`, activated by their sockets, delegated, audited, revived, and locked down."""

import re
import subprocess
import sys

import httpx
import pytest
from conftest import CHECKOUT, UP_WITHIN
from machine import (
    ADMINISTRATOR,
    DAEMONS,
    STATE_UNITS,
    WORKERS,
    active,
    answers,
    as_user,
    audit,
    dropped_in,
    knob,
    run,
    switch_off,
    systemctl,
    unit,
)
from running_pair import simple_app

LIMITS = {"api": 1.5, "spawner": 4.3}  # systemd-analyze's exposure levels; both have been reached


@pytest.mark.timeout(UP_WITHIN + 120)
def test_one_command_leads_to_a_page_and_downloads_nothing(server, first_run):
    assert "apt:" not in first_run.stdout
    assert "virtual environment:" not in first_run.stdout
    assert "http://127.0.0.1:8081/app/hello/" in first_run.stdout
    assert "/var/lib/blockyard/admin-token" in first_run.stdout
    page = httpx.get("http://127.0.0.1:8080/app/hello/", follow_redirects=True, timeout=120)
    assert page.status_code == 200
    assert "Hello from Blockyard" in page.text


@pytest.mark.timeout(UP_WITHIN + 120)
def test_run_again_it_changes_nothing_that_is_right(server):
    before = [unit(name, "InvocationID") for name in STATE_UNITS]
    again = run(CHECKOUT / "scripts" / "up", timeout=UP_WITHIN)
    assert [unit(name, "InvocationID") for name in STATE_UNITS] == before
    assert not re.search(r"^    /(usr|etc|opt)", again.stdout, re.MULTILINE), again.stdout


@pytest.mark.timeout(UP_WITHIN + 120)
def test_a_stranger_at_the_address_gets_no_token(server):
    program = (CHECKOUT / "tests" / "host" / "stranger.py").read_text()
    systemctl("stop", "blockyard-api.service", "blockyard-api.socket")
    command = ["setpriv", "--reuid=nobody", "--clear-groups", sys.executable, "-u", "-c", program, "127.0.0.1:8080"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as stranger:
        try:
            assert stranger.stdout.readline() == "listening\n"
            refused = run(CHECKOUT / "scripts" / "up", check=False, timeout=UP_WITHIN)
        finally:
            stranger.kill()
        assert stranger.stdout.read() == ""
    assert refused.returncode == 1
    assert "systemd does not listen for the API" in refused.stderr
    systemctl("start", "blockyard-api.socket")
    answers(server)


@pytest.mark.timeout(UP_WITHIN + 120)
def test_the_address_is_the_socket_units(server):
    elsewhere = "[Socket]\nListenStream=\nListenStream=0.0.0.0:8090\nListenStream=127.0.0.1:8081\n"
    with dropped_in("blockyard-api.socket", elsewhere):
        systemctl("stop", "blockyard-api.service")
        systemctl("restart", "blockyard-api.socket")
        told = run(CHECKOUT / "scripts" / "up", timeout=UP_WITHIN).stdout
        assert "http://127.0.0.1:8090\n" in told
        systemctl("stop", "blockyard-api.service")
    systemctl("restart", "blockyard-api.socket")
    answers(server)


def test_the_sockets_start_the_daemons(server):
    systemctl("stop", *DAEMONS)
    assert httpx.get("http://127.0.0.1:8080/healthz", timeout=120).text == "ok"
    answers(server)
    assert [unit(name, "ActiveState") for name in DAEMONS] == ["active", "active"]


@pytest.fixture(scope="module")
def limited(server):
    """The name of an app that has limits, and a worker."""
    server.deploy("limited", simple_app(), memory_limit="300m", cpu_limit=1)
    assert server.visitor().get("/app/limited/").status_code == 200
    return "limited"


def test_a_worker_lives_in_the_delegated_subtree_with_its_own_limits(server, limited):
    assert unit("blockyard-workers.service", "Delegate") == "yes"
    assert set((WORKERS / "cgroup.subtree_control").read_text().split()) >= {"memory", "pids", "cpu"}
    assert (WORKERS / "holder" / "cgroup.procs").read_text().strip()
    worker = active(server, limited)[0]["id"]
    assert knob(worker, "memory.max") == str(300 << 20)
    assert knob(worker, "memory.swap.max") == "0"
    assert knob(worker, "memory.oom.group") == "1"
    assert knob(worker, "pids.max") == "512"
    assert knob(worker, "cpu.max") == "100000 100000"
    stats = server.workers(limited)[0]["stats"]
    assert stats["memory_limit_bytes"] == 300 << 20
    assert 0 < stats["memory_usage_bytes"] < 300 << 20


def test_the_audit_tells_who_was_started_when_as_which_uid_and_how_it_ended(server, limited):
    switch_off(server, limited)
    spawned, stopped, ended = audit(app=limited)
    assert [entry["BLOCKYARD_RESULT"] for entry in (spawned, stopped, ended)] == ["ok", "ok", "stopped"]
    for entry in (spawned, stopped, ended):
        assert entry["SYSLOG_IDENTIFIER"] == "blockyard-spawner"
        assert entry["BLOCKYARD_WORKER"] == spawned["BLOCKYARD_WORKER"]
        assert 60000 <= int(entry["BLOCKYARD_UID"]) <= 60999
        assert entry["BLOCKYARD_CGROUP"] == f"/system.slice/{WORKERS.name}/workers/{entry['BLOCKYARD_WORKER']}"
    for asked in (spawned, stopped):
        assert asked["BLOCKYARD_PEER_UID"] == run("id", "-u", "blockyard").stdout.strip()
        assert asked["BLOCKYARD_PEER_PID"] == unit("blockyard-api.service", "MainPID")
    assert len({entry["MESSAGE_ID"] for entry in (spawned, stopped, ended)}) == 3


def test_the_catalogue_explains_each_kind_of_entry(limited):
    query = ("journalctl", "--unit=blockyard-spawner", "--catalog", "--quiet")
    explained = run(*query, f"BLOCKYARD_APP={limited}").stdout
    for words in ("has started", "is being stopped", "has ended: stopped"):
        assert f"of app {limited} {words}" in explained
    assert "Blockyard's root helper has started" in run(*query).stdout
    assert "Subject: A request was refused" in run("journalctl", "--dump-catalog").stdout


def test_the_journal_queries_in_the_documentation_work(server):
    text = (CHECKOUT / "docs" / "operate.md").read_text()
    queries = re.findall(r"^    (journalctl [^#\n]+)", text, re.MULTILINE)
    assert len(queries) >= 5
    for query in queries:
        run("sh", "-c", f"{query} --no-pager --lines=5")


@pytest.mark.parametrize(
    ("user", "verb", "target", "allowed"),
    [
        ("blockyard", "restart", "blockyard-spawner.service", True),
        ("blockyard", "start", "blockyard-spawner.service", True),
        ("blockyard", "stop", "blockyard-spawner.service", False),
        ("blockyard", "restart", "blockyard-spawner.socket", False),
        ("blockyard", "restart", "blockyard-api.service", False),
        ("blockyard", "stop", "blockyard-workers.service", False),
        ("blockyard", "restart", "systemd-journald.service", False),
        ("nobody", "restart", "blockyard-spawner.service", False),
        (ADMINISTRATOR, "restart", "blockyard-spawner.service", True),
        (ADMINISTRATOR, "restart", "systemd-journald.service", False),
    ],
)
def test_polkit_allows_exactly_what_the_rule_names(server, user, verb, target, allowed):
    asked = as_user(user, "systemctl", "--no-ask-password", verb, target)
    assert (asked.returncode == 0) is allowed, asked.stderr
    answers(server)


def test_the_status_shows_the_units_ceilings_and_use(server):
    environ = ["env", f"BLOCKYARD_TOKEN={server.token}", f"BLOCKYARD_URL={server.control_url}"]
    status = server.http.get("/api/v1/system/status").json()
    assert status["unit"]["control_group"] == "/system.slice/blockyard-workers.service"
    assert status["unit"]["tasks_max"] == 20000
    assert status["unit"]["memory_max"] > 0
    assert status["unit"]["memory_current"] > 0
    printed = run(*environ, "by", "admin", "status").stdout
    assert "20000" in printed
    assert "/system.slice/blockyard-workers.service" in printed


def test_the_daemons_are_locked_down_as_far_as_has_been_reached(server, show):
    for name, limit in LIMITS.items():
        told = run("systemd-analyze", "security", "--no-pager", f"blockyard-{name}.service", check=False).stdout
        line = told.strip().splitlines()[-1]
        show(line.strip("→ "))
        assert float(re.search(r"blockyard-\w+\.service: ([\d.]+)", line)[1]) <= limit


def test_the_api_can_write_nowhere_but_to_its_state(server):
    pid = unit("blockyard-api.service", "MainPID")
    inside = ["nsenter", f"--target={pid}", "--mount", "--", "setpriv", "--reuid=blockyard", "--regid=blockyard"]
    inside += ["--clear-groups", "--no-new-privs"]
    for path in (
        "/etc/blockyard",
        "/opt/blockyard/venv",
        "/usr/local/lib/systemd/system",
        "/run/blockyard",
        "/var/log",
    ):
        assert run(*inside, "touch", f"{path}/intruder", check=False).returncode != 0, path
    assert run(*inside, "touch", "/var/lib/blockyard/own").returncode == 0
    run(*inside, "rm", "/var/lib/blockyard/own")
