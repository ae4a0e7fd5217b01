"""The boundary: what a taken-over API, a worker, or a stranger on the machine cannot do, tried as each of them."""

import re
import sys
from pathlib import Path

import pytest
from machine import ADMINISTRATOR, DAEMONS, WORKERS, active, as_user, audit, r_process, run, unit
from running_pair import simple_app

SPAWNER_SOCKET = "/run/blockyard/spawner.sock"
CAPABILITIES = {
    "blockyard-api.service": 0,
    "blockyard-spawner.service": 1 << 0 | 1 << 6 | 1 << 7,
}  # chown setgid setuid


def status(pid, field):
    return re.search(rf"^{field}:[ \t]*(.*)$", Path(f"/proc/{pid}/status").read_text(), re.MULTILINE)[1]


def speak(user, packet):
    """Send one packet to the spawner as a user, and print what comes back."""
    program = (
        "import socket; s = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET); s.settimeout(30); "
        f"s.connect({SPAWNER_SOCKET!r}); s.send({packet!r}); print(s.recv(65536))"
    )
    return as_user(user, sys.executable, "-c", program)


@pytest.mark.parametrize(
    ("user", "command"),
    [
        ("blockyard", "systemctl set-property --runtime blockyard-workers.service MemoryMax=infinity"),
        ("blockyard", "systemctl set-property --runtime blockyard-spawner.service TasksMax=1"),
        ("blockyard", "systemctl kill blockyard-spawner.service"),
        ("blockyard", "systemctl disable blockyard.target"),
        ("blockyard", "systemctl daemon-reload"),
        ("blockyard", "systemctl poweroff"),
        ("blockyard", "systemd-run --wait true"),
        ("nobody", "systemctl start blockyard-spawner.service"),
        ("nobody", "systemctl stop blockyard-workers.service"),
        (ADMINISTRATOR, "systemctl set-property --runtime blockyard-workers.service MemoryMax=infinity"),
        (ADMINISTRATOR, "systemctl stop blockyard-api.socket"),
        (ADMINISTRATOR, "systemd-run --wait true"),
    ],
)
def test_systemd_does_nothing_else_for_anybody_but_root(server, user, command):
    program, *arguments = command.split()
    asked = as_user(user, program, "--no-ask-password", *arguments)
    assert asked.returncode != 0
    assert re.search("(?i)access denied|authentication|authoriz", asked.stderr), asked.stderr


def test_an_administrator_of_blockyard_may_stop_and_start_its_services(server):
    for verb, expected in (("stop", "inactive"), ("start", "active")):
        for name in (*DAEMONS, "blockyard-workers.service"):
            asked = as_user(ADMINISTRATOR, "systemctl", "--no-ask-password", verb, name)
            assert asked.returncode == 0, asked.stderr
        assert unit("blockyard-workers.service", "ActiveState") == expected


def test_the_daemons_have_the_capabilities_they_need_and_can_get_no_other(server):
    for name, wanted in CAPABILITIES.items():
        pid = unit(name, "MainPID")
        assert int(status(pid, "CapBnd"), 16) == wanted
        assert int(status(pid, "CapEff"), 16) == wanted
        assert int(status(pid, "CapAmb"), 16) == 0
        assert status(pid, "NoNewPrivs") == "1"
        assert status(pid, "Seccomp") == "2"
    assert set(status(unit("blockyard-api.service", "MainPID"), "Uid").split()) != {"0"}


@pytest.fixture(scope="module")
def curious(server):
    """The page of an app that looks around, and its worker."""
    places = "c('/etc/blockyard', '/var/lib', '/home', '/root', '/sys', '/run', '/run/blockyard', '/')"
    looks = f"c(list.files({places}, full.names = TRUE), list.files('/proc', '^[0-9]+$'))"
    server.deploy("curious", simple_app(ui=f"fluidPage(paste(c('SEEN', {looks}), collapse = '|'))"))
    page = server.visitor().get("/app/curious/").text
    return set(re.search(r"SEEN\|([^<]*)", page)[1].split("|")), active(server, "curious")[0]["id"]


def test_a_worker_sees_nothing_of_the_server_and_no_process_but_its_own(curious):
    seen, _ = curious
    processes = {name for name in seen if name.isdigit()}
    shown = {"/run/worker", "/run/blockyard", "/run/blockyard/launch.R"}
    roots = {f"//{name}" for name in ("app", "bin", "dev", "etc", "lib", "lib64", "opt", "proc", "run", "sbin", "tmp")}
    assert seen >= shown  # it did look
    assert seen - processes <= shown | roots | {"//usr", "//var", "/var/lib/fontconfig"}
    assert processes == {"1", "2"}  # bwrap's own first process, and R


def test_a_worker_has_a_uid_of_its_own_and_no_capability(curious):
    process = r_process(curious[1])
    uid, *others = {int(number) for number in status(process, "Uid").split()}
    assert others == []
    assert 60000 <= uid <= 60999
    assert status(process, "Groups").split() == []
    assert [int(status(process, f"Cap{kind}"), 16) for kind in ("Inh", "Prm", "Eff", "Bnd", "Amb")] == [0] * 5
    assert status(process, "NoNewPrivs") == "1"
    assert status(process, "Seccomp") == "2"


@pytest.mark.parametrize("name", DAEMONS)
def test_even_root_inside_a_daemons_file_system_cannot_change_the_machine(server, name):
    inside = ["nsenter", f"--target={unit(name, 'MainPID')}", "--mount", "--"]
    for place in (
        "/etc/blockyard",
        "/etc",
        "/opt/blockyard/venv",
        "/usr/local/lib/systemd/system",
        "/var/log",
        "/boot",
    ):
        refused = run(*inside, "touch", f"{place}/intruder", check=False)
        assert "Read-only file system" in refused.stderr, place
    assert run(*inside, "ls", "-A", "/home", "/root", check=False).stdout.split() in ([], ["/home:", "/root:"])


def test_the_apis_user_can_neither_signal_the_spawner_nor_touch_a_cgroup(server):
    spawner = unit("blockyard-spawner.service", "MainPID")
    assert "not permitted" in as_user("blockyard", "kill", "-TERM", spawner).stderr
    for group in (WORKERS, WORKERS / "workers", WORKERS.parent / "blockyard-spawner.service"):
        asked = as_user("blockyard", "sh", "-c", f"echo $$ >{group}/cgroup.procs")
        assert "Permission denied" in asked.stderr, group
    assert unit("blockyard-spawner.service", "MainPID") == spawner


def test_nobody_but_the_apis_user_reaches_the_spawner(server):
    assert "PermissionError" in speak("nobody", b"\x80").stderr


def test_a_packet_that_is_no_request_is_refused_and_audited_with_its_sender(server):
    spawner = unit("blockyard-spawner.service", "MainPID")
    answered = speak("blockyard", b"\xc1")
    refusal = audit(result="malformed")[-1]
    assert refusal["BLOCKYARD_PEER_UID"] == run("id", "-u", "blockyard").stdout.strip()
    assert int(refusal["BLOCKYARD_PEER_PID"]) > 0
    assert refusal["PRIORITY"] == "4"
    assert "Traceback" not in answered.stdout
    assert unit("blockyard-spawner.service", "MainPID") == spawner


def test_what_enters_the_apis_cgroup_reaches_no_network(server):
    group = f"/sys/fs/cgroup{unit('blockyard-api.service', 'ControlGroup')}"
    send = "import socket; socket.socket(socket.AF_INET, socket.SOCK_DGRAM).sendto(b'x', ('127.0.0.1', 9))"
    assert run(sys.executable, "-c", send).returncode == 0
    refused = run("sh", "-c", f'echo $$ >{group}/cgroup.procs && exec {sys.executable} -c "{send}"', check=False)
    assert "PermissionError" in refused.stderr
