"""How the spawner starts: with few rights, by a socket that it is given, without root, and not at all."""

import os
import select
import signal
import socket
import subprocess
import sys
import time

import pytest
from running_spawner import EXAMPLES, acting_as, api_user, eventually

WAITING = "Sys.sleep(600)"
LOOKS = """
import os, sys
for path in sys.argv[1:]:
    try:
        os.close(os.open(path, os.O_RDONLY))
        print("opened")
    except OSError as error:
        print(type(error).__name__)
"""


def run(*arguments, **options):
    argv = [sys.executable, "-m", "blockyard_spawner.main", *arguments]
    return subprocess.run(argv, capture_output=True, text=True, timeout=30, cwd="/", check=False, **options)


def status_of(process):
    with open(f"/proc/{process.pid}/status") as file:
        return dict(line.rstrip("\n").split(":\t", 1) for line in file if ":\t" in line)


def test_three_capabilities_are_enough_for_a_whole_life(stopped_spawner):
    stopped_spawner.prefix = ("setpriv", "--bounding-set=-all,+setuid,+setgid,+chown", "--no-new-privs")
    stopped_spawner.start()
    assert status_of(stopped_spawner.process)["CapEff"] == f"{0b11000001:016x}"
    client = stopped_spawner.client()
    worker = stopped_spawner.spawn(client, "worker0001", stopped_spawner.bundle("hello", EXAMPLES / "hello"))
    assert worker.get().startswith("HTTP/1.1 200 OK")
    stopped_spawner.end(signal.SIGKILL)
    stopped_spawner.start()
    client = stopped_spawner.client()
    assert client.call("list", id="worker0001")["workers"][0]["pid"] == worker.pid
    assert client.call("stop", id="worker0001", grace=30_000)["result"]["reason"] == "stopped"
    stubborn = "repeat tryCatch({message('up'); Sys.sleep(600)}, interrupt = \\(e) 0)"
    worker = stopped_spawner.run_r(client, "worker0002", stubborn)
    worker.wait_for_output("up")
    assert client.call("stop", id="worker0002", grace=100)["result"]["signal"] == 9
    assert stopped_spawner.leftovers() == {}


def test_a_strict_umask_shuts_nobody_out(stopped_spawner):
    stopped_spawner.prefix = ("sh", "-c", 'umask 0077; exec "$0" "$@"')
    stopped_spawner.start()
    worker = stopped_spawner.spawn(
        stopped_spawner.client(), "worker0001", stopped_spawner.bundle("hello", EXAMPLES / "hello")
    )
    worker.get()
    user = api_user()
    with acting_as(user.pw_uid, user.pw_gid):
        assert worker.get().startswith("HTTP/1.1 200 OK")
        assert (stopped_spawner.cgroup_root / "workers/worker0001/cgroup.procs").read_text()


def test_the_spawner_cannot_be_traced_or_dumped_and_says_its_name(stopped_spawner):
    """Not even by its own uid, which without root is what the API has, too."""
    user = api_user()
    os.chown(stopped_spawner.root, user.pw_uid, user.pw_gid)
    as_user = ("setpriv", f"--reuid={user.pw_uid}", f"--regid={user.pw_gid}", "--clear-groups", "--bounding-set=-all")
    stopped_spawner.configure(cgroup_root="/nonexistent")
    stopped_spawner.prefix = as_user
    stopped_spawner.arguments = ("--socket", str(stopped_spawner.socket), "--unprivileged")
    stopped_spawner.start()
    assert status_of(stopped_spawner.process)["Name"] == "blockyard-spawn"

    def looked_into(process):
        places = [f"/proc/{process.pid}/{name}" for name in ("environ", "maps", "fd")]
        argv = [*as_user, sys.executable, "-c", LOOKS, *places]
        return subprocess.run(argv, capture_output=True, text=True, check=True, cwd="/").stdout.split()

    twin = subprocess.Popen([*as_user, "sleep", "600"], cwd="/")  # the same, but as dumpable as any program
    try:
        eventually(lambda: status_of(twin)["Name"] == "sleep", "it is itself")
        assert looked_into(twin) == ["opened"] * 3
        assert looked_into(stopped_spawner.process) == ["PermissionError"] * 3
    finally:
        twin.kill()
        twin.wait()


def test_systemd_is_told_of_the_start_the_present_and_the_end(stopped_spawner, monkeypatch):
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as systemd:
        systemd.bind(str(stopped_spawner.root / "notify"))
        systemd.settimeout(30)
        monkeypatch.setenv("NOTIFY_SOCKET", str(stopped_spawner.root / "notify"))
        monkeypatch.setenv("WATCHDOG_USEC", "1000000")
        stopped_spawner.start()
        free = len(stopped_spawner.uids)
        idle, busy = (
            f"WATCHDOG=1\nSTATUS=0 workers, {free} uids free",
            f"WATCHDOG=1\nSTATUS=1 workers, {free - 1} uids free",
        )
        assert [systemd.recv(4096).decode() for _ in range(2)] == ["READY=1", idle]
        stopped_spawner.run_r(stopped_spawner.client(), "worker0001", WAITING)
        until(systemd, busy, idle)
        began = time.monotonic()
        assert [systemd.recv(4096).decode() for _ in range(3)] == [busy] * 3
        assert 0.1 < time.monotonic() - began < 3  # twice in the second that its watchdog allows
        assert stopped_spawner.end() == 0
        until(systemd, "STOPPING=1", busy)


def until(systemd, last, *before):
    """Read what systemd is told up to a message; before it comes nothing but these."""
    while (message := systemd.recv(4096).decode()) != last:
        assert message in before


def test_an_end_in_the_pause_after_a_refusal_is_an_end_like_any_other(spawner):
    client = spawner.client(greet=False)
    client.send_raw(b"garbage")
    assert client.receive()[0]["error"]["code"] == "malformed"
    spawner.process.send_signal(signal.SIGTERM)  # the connection keeps its place for a moment
    assert spawner.process.wait(30) == 0, spawner.audit_text()
    assert "Traceback" not in spawner.audit_text()


@pytest.mark.parametrize("after", [0.005, 0.015, 0.03])
def test_an_end_among_many_starts_is_an_end_like_any_other(spawner, client, after):
    bundle = spawner.bundle("hello", {"app.R": WAITING})
    log, writing = os.pipe()
    for number in range(12):
        client.send("spawn", (writing,), id=f"worker{number:04}", kind="app", app="hello", bundle=bundle)
    time.sleep(after)
    spawner.process.send_signal(signal.SIGTERM)
    assert spawner.process.wait(30) == 0, spawner.audit_text()
    assert "Traceback" not in spawner.audit_text()
    for descriptor in (log, writing):
        os.close(descriptor)
    runs = {path.name for path in spawner.runtime_dir.iterdir()}
    assert {name for name in runs if f"Worker {name} of hello was started" in spawner.audit_text()} == runs
    spawner.start()
    assert {entry["id"] for entry in spawner.client().call("list")["workers"]} == runs


def test_a_socket_that_systemd_passes_is_served(stopped_spawner):
    user = api_user()
    stopped_spawner.prefix = ("systemd-socket-activate", "--seqpacket", "-l", str(stopped_spawner.socket))
    stopped_spawner.arguments = ("--config", str(stopped_spawner.config))
    stopped_spawner.start()
    os.chown(stopped_spawner.socket, -1, user.pw_gid)
    stopped_spawner.socket.chmod(0o660)
    client = stopped_spawner.client()
    worker = stopped_spawner.run_r(client, "worker0001", WAITING)
    client.call("stop", id=worker.id, grace=0)
    assert stopped_spawner.leftovers() == {}


def test_a_socket_of_another_kind_is_refused(stopped_spawner):
    stopped_spawner.prefix = ("systemd-socket-activate", "-l", str(stopped_spawner.socket))
    argv = [
        *stopped_spawner.prefix,
        sys.executable,
        "-m",
        "blockyard_spawner.main",
        "--config",
        str(stopped_spawner.config),
    ]
    process = subprocess.Popen(argv, stderr=subprocess.PIPE, text=True, cwd="/")
    eventually(stopped_spawner.socket.exists, "the socket is there")
    subprocess.run(
        [sys.executable, "-c", f"import socket; socket.socket(1).connect('{stopped_spawner.socket}')"], check=True
    )
    _, error = process.communicate(timeout=30)
    assert process.returncode == 2
    assert "ListenSequentialPacket=" in error


def test_an_ordinary_user_runs_workers_of_its_own(stopped_spawner):
    user = api_user()
    for directory in (stopped_spawner.root, stopped_spawner.cgroup_root):
        os.chown(directory, user.pw_uid, user.pw_gid)
    for file in ("cgroup.procs", "cgroup.subtree_control"):
        os.chown(stopped_spawner.cgroup_root / file, user.pw_uid, user.pw_gid)
    stopped_spawner.prefix = ("setpriv", f"--reuid={user.pw_uid}", f"--regid={user.pw_gid}", "--clear-groups")
    stopped_spawner.arguments = ("--socket", str(stopped_spawner.socket), "--unprivileged")
    stopped_spawner.start()
    client = stopped_spawner.client(greet=False)
    assert client.hello()["unprivileged"] is True
    assert client.call("list")["unprivileged"] is True
    assert "'unprivileged': True" in stopped_spawner.audit()[0]["MESSAGE"]
    # Moving a process into the subtree needs rights at its common root with our own: without them, no cgroup.
    stopped_spawner.end()
    stopped_spawner.configure(cgroup_root="/nonexistent")
    stopped_spawner.start()
    client = stopped_spawner.client()
    worker = stopped_spawner.spawn(client, "worker0001", stopped_spawner.bundle("hello", EXAMPLES / "hello"))
    assert worker.get().startswith("HTTP/1.1 200 OK")
    assert (worker.uid, worker.cgroup) == (user.pw_uid, "")
    assert client.call("stop", id="worker0001", grace=0)["result"]["reason"] == "stopped"
    assert select.select([worker.pidfd], [], [], 30)[0]
    assert list(stopped_spawner.runtime_dir.iterdir()) == []
    with pytest.raises(FileNotFoundError):
        worker.connect_once()


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("[process]\napi_user = 'nobody-of-that-name'", ["process.api_user", "nobody-of-that-name"]),
        ("[process]\nnetwork = 'bridge'", ["process.network", "host"]),
        ("[process]\nmemroy_ceiling = '1g'", ["blockyard.toml", "process.memroy_ceiling", "correct its spelling"]),
        ("[process]\nworker_uid_range_start = 70000\nworker_uid_range_end = 65000", ["worker_uid_range_end"]),
        ("[storage]\nbundle_worker_path = '/usr/share'", ["bundle_worker_path"]),
        (
            "[process]\napi_user = 'root'\nseccomp_profile = '/nonexistent.bpf'",
            ["process.seccomp_profile", "/nonexistent.bpf", "by admin install-seccomp"],
        ),
        ("[process]\napi_user = 'root'\nseccomp_profile = false", ["process.seccomp_profile", "absolute path"]),
        ("[process]\napi_user = 'daemon'\nworker_gid = 1", ["process.api_user", "worker_gid"]),
        ("[process]\napi_user = 'daemon'\nworker_gid = 3\nseccomp_profile = ''", ["blockyard-spawner.socket"]),
        ("[process]\napi_user = 'root'\nseccomp_profile = '/'", ["process.seccomp_profile", "Is a directory"]),
        ("[process]\napi_user = 'root'\nseccomp_profile = ''", ["blockyard-spawner.socket", "--socket"]),
    ],
)
def test_a_start_that_cannot_succeed_is_one_sentence(tmp_path, text, words):
    config = tmp_path / "blockyard.toml"
    runtime = f"runtime_dir = '{tmp_path}/run'\n"
    config.write_text(
        text.replace("[process]\n", f"[process]\n{runtime}") if "[process]" in text else f"{text}\n[process]\n{runtime}"
    )
    ended = run("--config", str(config))
    assert ended.returncode == 2
    assert ended.stderr.count("\n") == 1
    assert [word for word in words if word not in ended.stderr] == []


def test_root_and_unprivileged_exclude_each_other(tmp_path):
    assert "Run as root without --unprivileged" in run("--unprivileged", "--config", str(tmp_path / "none")).stderr
    ordinary = run("--config", "/nonexistent.toml", user=65533, group=65533, extra_groups=[])
    assert (ordinary.returncode, "Run as root" in ordinary.stderr) == (2, True)


def test_the_version_is_told():
    assert run("--version").stdout.strip()
