"""The start-up checks under systemd: in the API's locked-down unit, and where the host is not as it should be."""

import contextlib
import json
import re
import socket
import subprocess
from pathlib import Path

import pytest
from machine import answers, by, checks, dropped_in, run, systemctl, unit
from running_pair import wait_for

CONFIG = Path("/etc/blockyard/blockyard.toml")
API, SPAWNER, HOLDER = "blockyard-api.service", "blockyard-spawner.service", "blockyard-workers.service"
METADATA = "169.254.169.254"


def says(result, severity, *words):
    assert result["severity"] == severity, result
    text = f"{result['fact']} {result['remedy']}"
    assert all(word in text for word in words), text


def entries(**fields):
    matches = [f"BLOCKYARD_{name.upper()}={value}" for name, value in fields.items()]
    lines = run("journalctl", f"--unit={API}", "--output=json", "--quiet", *matches).stdout.splitlines()
    return [json.loads(line) for line in lines]


@contextlib.contextmanager
def configured(server, *lines, drop_in=None):
    """Add keys, `section.key = value`, to the configuration, and a drop-in to the API's unit, for `as_installed`."""
    before = CONFIG.read_text()
    text = before
    for line in lines:
        section, _, setting = line.partition(".")
        text = text.replace(f"[{section}]\n", f"[{section}]\n{setting}\n")
    CONFIG.write_text(text)
    try:
        with dropped_in(API, drop_in) if drop_in else contextlib.nullcontext():
            systemctl("restart", API)
            answers(server)
            yield
    finally:
        CONFIG.write_text(before)


@pytest.fixture(scope="module")
def as_installed(server):
    """Afterwards, what was configured for a while is no longer in force."""
    yield
    systemctl("restart", API)
    answers(server)


@contextlib.contextmanager
def sysctl(name, value):
    file = Path("/proc/sys", name)
    before = file.read_text()
    file.write_text(value)
    try:
        yield
    finally:
        file.write_text(before)


@contextlib.contextmanager
def metadata_service():
    """Listen at the metadata address, as a cloud does."""
    run("ip", "address", "add", f"{METADATA}/32", "dev", "lo")
    try:
        with socket.create_server((METADATA, 80)):
            yield
    finally:
        run("ip", "address", "delete", f"{METADATA}/32", "dev", "lo")


@contextlib.contextmanager
def redis(*options):
    argv = ["redis-server", "--port", "6379", "--save", "", "--daemonize", "no", "--dir", "/tmp", *options]
    server = subprocess.Popen(argv, stdout=subprocess.DEVNULL)
    try:
        wait_for(
            lambda: "PONG" in (told := run("redis-cli", "ping", check=False).stdout) or "NOAUTH" in told, 30, "Redis"
        )
        yield
    finally:
        server.terminate()
        server.wait(30)


def test_every_start_writes_every_check_into_the_journal_with_an_explanation(server):
    systemctl("restart", API)
    answers(server)
    shown = server.http.get("/api/v1/system/checks").json()["checks"]
    latest = entries(severity="ok")[-1]
    started = [entry for entry in entries() if entry.get("_PID") == latest["_PID"] and "BLOCKYARD_CHECK" in entry]
    assert [entry["BLOCKYARD_CHECK"] for entry in started] == [one["name"] for one in shown]
    assert not [one for one in shown if one["severity"] == "error"]
    explained = run("journalctl", f"--unit={API}", "--catalog", "--quiet", "BLOCKYARD_CHECK=worker_egress").stdout
    assert "Start-up check worker_egress: warning" in explained
    assert "by admin check" in explained


def test_how_long_the_checks_take_is_shown_and_no_probe_is_left(server, show):
    answer = server.http.post("/api/v1/system/checks/run", timeout=120).json()
    show(f"all start-up checks: {answer['seconds']:.2f} s (under emulation)")
    assert not list(Path("/run/blockyard/workers").glob("probe*"))
    assert not list(Path("/sys/fs/cgroup/system.slice", HOLDER, "workers").glob("probe*/"))


def test_on_a_machine_as_it_was_installed_nothing_is_an_error(server):
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        found = checks(server)
    for name in ("spawner_link", "bwrap_available", "user_namespaces", "bwrap_host_uid_mapping", "cloud_metadata"):
        says(found[name], "ok")
    for name in ("resource_limits", "config_secrets", "redis_auth", "state_dir"):
        says(found[name], "ok")
    says(found["cloud_metadata"], "ok", "this daemon may open no connection")
    path = f"system.slice/{HOLDER}/workers"
    assert found["cgroup_delegation"]["severity"] in ("ok", "info")
    says(found["cgroup_delegation"], found["cgroup_delegation"]["severity"], path, "xt_cgroup", "memory, cpu, pids")
    says(found["uid_range"], "ok", "60000-60999")
    reached = found["worker_egress"]
    says(reached, "warning", "the API (127.0.0.1 port 8080)", "the relay (127.0.0.1 port 8081)")
    says(reached, "warning", f"a listener (127.0.0.1 port {port})")
    assert "spawner" not in reached["fact"]


def test_xt_cgroup_counts_once_it_is_loaded(server):
    if run("modprobe", "xt_cgroup", check=False).returncode == 0:
        says(checks(server)["cgroup_delegation"], "ok", "xt_cgroup is there")
        run("modprobe", "--remove", "xt_cgroup", check=False)
    else:  # the image's kernel has none: it is told, and stays told
        says(checks(server)["cgroup_delegation"], "info", "modprobe xt_cgroup")


def test_the_command_line_shows_them(server):
    process = by(server, "admin", "check")
    shown, _ = process.communicate(timeout=120)
    assert process.returncode == 0, shown
    assert re.search(r"^spawner_link +ok ", shown, re.MULTILINE)


def restart_holder():
    """Restart the workers' unit. The API may have the spawner started meanwhile; should that take the cgroup before
    systemd is in it, the unit starts once more by itself."""
    systemctl("stop", SPAWNER)
    systemctl("restart", HOLDER, check=False)
    wait_for(lambda: unit(HOLDER, "ActiveState") == "active", 60, f"the start of {HOLDER}")
    systemctl("restart", SPAWNER)


def test_a_unit_without_delegate_is_a_warning(server):
    with dropped_in(HOLDER, "[Service]\nDelegate=no\n"):
        restart_holder()
        answers(server)
        says(checks(server)["cgroup_delegation"], "warning", "Delegate=yes")
    restart_holder()
    answers(server)
    assert checks(server)["cgroup_delegation"]["severity"] in ("ok", "info")


def test_a_spawner_that_runs_no_sandbox_for_want_of_user_namespaces_is_an_error_with_the_reason(server):
    with sysctl("user/max_user_namespaces", "0"):
        says(checks(server)["user_namespaces"], "error", "user.max_user_namespaces")
    says(checks(server)["user_namespaces"], "ok")


def test_debians_switch_for_user_namespaces_is_named(server):
    with sysctl("kernel/unprivileged_userns_clone", "0"):
        says(checks(server)["user_namespaces"], "error", "kernel.unprivileged_userns_clone=1")


def test_metadata_in_reach_is_an_error_even_though_this_daemon_is_kept_from_it(server):
    with metadata_service():
        found = checks(server)
        says(found["cloud_metadata"], "error", METADATA)
        says(found["worker_egress"], "error", METADATA)


def test_an_error_stops_the_start_and_systemd_does_not_try_for_ever(server):
    with metadata_service():
        run("systemctl", "restart", API, check=False)
        wait_for(lambda: unit(API, "ExecMainStatus") == "2", 120, "the refusal")
        said = run("journalctl", f"--unit={API}", "--lines=40", "--quiet", "--output=cat").stdout
        assert "not started, since checks found errors. cloud_metadata" in said
        assert entries(check="cloud_metadata", severity="error")
        assert unit(API, "NRestarts") == "0"
    systemctl("reset-failed", API, "blockyard-api.socket")
    systemctl("restart", "blockyard-api.socket", check=False)
    systemctl("start", "blockyard.target")
    answers(server, 120)


def test_redis_is_asked_by_the_probe_since_this_daemon_may_not_connect(server, as_installed):
    with configured(server, 'redis.url = "redis://:s3cret@127.0.0.1:6379"'):
        says(checks(server)["redis_auth"], "warning", "ECONNREFUSED", "IPAddressAllow=127.0.0.1")
        with redis():
            says(checks(server)["redis_auth"], "error", "without a password")
        with redis("--requirepass", "s3cret"):
            found = checks(server)
            says(found["redis_auth"], "ok", "wants a password")
            says(found["worker_egress"], "warning", "redis (127.0.0.1 port 6379)")
            says(found["config_secrets"], "warning", "redis.url", "chmod 0640")
    assert "s3cret" not in run("journalctl", "--unit=blockyard-*", "--quiet").stdout


def test_a_drop_in_lets_the_api_ask_redis_itself_where_workers_are_kept_from_it(server, as_installed):
    text = "[Service]\nRestrictAddressFamilies=AF_INET AF_INET6\nIPAddressAllow=127.0.0.1\n"
    lines = ('redis.url = "redis://127.0.0.1:6379"', 'process.network = "none"')
    with configured(server, *lines, drop_in=text), redis():
        says(checks(server)["redis_auth"], "error", "without a password")
