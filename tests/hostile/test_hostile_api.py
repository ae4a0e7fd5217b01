"""The API, taken over: whoever has its uid asks the spawner and this machine for more than was granted."""

import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from running_pair import wait_for
from target import CANARY, processes_of

pytest_plugins = ["hostile_apps"]

SPAWN = {"op": "spawn", "id": "takenover0001", "kind": "probe", "app": "taken-over"}
APP = {**SPAWN, "kind": "app", "bundle": "x"}

# Each line of the architecture's first section: what the API must be unable to do, and ways to ask for it.
WISHES = {
    "code as root": [{**SPAWN, "uid": 0}, {**SPAWN, "gid": 0}, {**SPAWN, "user": "root"}, {**SPAWN, "kind": "root"}],
    "code of its own choice": [
        {**SPAWN, "argv": ["/bin/sh"]}, {**SPAWN, "kind": "shell"}, {**SPAWN, "kind": "build"},
        {**SPAWN, "bwrap_path": "/tmp/x"}, {**SPAWN, "env": {"LD_PRELOAD": "/app/x.so"}},
        {**SPAWN, "env": {"R_PROFILE_USER": "/app/x"}}, {**SPAWN, "env": {"PATH": "/app"}},
        {**SPAWN, "env": {"PYTHONPATH": "/app"}}, {**SPAWN, "env": {"BLOCKYARD_SOCKET": "/x"}},
        {**SPAWN, "env": {"APP_X=1\nLD_PRELOAD": "x"}}, {**SPAWN, "env": {"BASH_ENV": "/app/x"}},
    ],
    "a mount from elsewhere": [
        {**APP, "bundle": ".."}, {**APP, "bundle": "/etc"}, {**APP, "bundle": "../../../etc"}, {**APP, "bundle": "."},
        {**APP, "bundle": ""}, {**APP, "bundle": "a/../b"}, {**APP, "bundle": "--bind"}, {**APP, "bundle": "a\0b"},
        {**SPAWN, "library": "../bundles"}, {**SPAWN, "library": "/root"}, {**SPAWN, "data": ["/etc"]},
        {**SPAWN, "data": ["etc"]}, {**SPAWN, "data": ["../etc"]}, {**SPAWN, "mounts": [["/", "/host"]]},
        {**SPAWN, "bundle": "x"}, {**APP, "bundle": "link-out-of-the-state"},
    ],
    "more than root's ceilings": [
        {**SPAWN, "limits": {"pids": 2**31}}, {**SPAWN, "limits": {"tmp": 2**50}}, {**SPAWN, "limits": {"pids": -1}},
        {**SPAWN, "limits": {"pids": True}}, {**SPAWN, "limits": {"memory": "max"}}, {**SPAWN, "limits": {"io": 1}},
        {**SPAWN, "limits": {"pids": 1.5}}, {**SPAWN, "limits": {"memory": "1\n2"}}, {**SPAWN, "network": "bridge"},
    ],
    "another cgroup or directory": [
        {**SPAWN, "id": ".."}, {**SPAWN, "id": "../holder"}, {**SPAWN, "id": "/"}, {**SPAWN, "id": "../../x-y-z-w"},
        {**SPAWN, "id": "takenover\n"}, {**SPAWN, "id": ""}, {**SPAWN, "id": "x" * 300}, {**SPAWN, "cgroup": "/"},
    ],
    "a signal to a process that is no worker": [
        {"op": "stop", "id": "1"}, {"op": "stop", "id": ".."}, {"op": "stop", "id": "holder"}, {"op": "stop", "pid": 1},
        {"op": "stop", "id": "takenovernone"}, {"op": "kill", "id": "1"}, {"op": "signal", "pid": 1, "signal": 9},
        {"op": "stop", "id": "takenovernone", "grace": -1}, {"op": "stop", "id": "takenovernone", "grace": 2**40},
    ],
    "a name that is more than a name": [
        {**SPAWN, "app": "--bind"}, {**SPAWN, "app": "a b"}, {**SPAWN, "app": "a\nBLOCKYARD_UID=0"},
        {**SPAWN, "app": "../x"}, {**SPAWN, "app": "a\0b"}, {**SPAWN, "app": "\x1b[2J"}, {**SPAWN, "app": ""},
        {**SPAWN, "app": {"x": 1}}, {**SPAWN, "app": ["x"]}, {**SPAWN, "app": 1},
    ],
    "an operation that is none": [{"op": "exec"}, {"op": ""}, {"op": None}, {"op": ["spawn"]}, {}],
}  # fmt: skip


def asked(target, requests):
    """Ask as the API's uid; return the replies in order."""
    replies = target.taken_over("ask", target.spawner_socket, requests=requests)
    assert len(replies) == len(requests)
    return replies


def told(target, *arguments):
    (answer,) = target.taken_over(*arguments)
    return answer


def host_state(target):
    """All that the spawner could be tricked to change: cgroups, mounts, directories, processes, the machine's files."""
    cgroups = sorted(str(path) for path in Path(target.cgroup).rglob("*") if path.is_dir())
    etc = [f"{path} {path.lstat().st_mtime_ns}" for path in sorted(Path("/etc").rglob("*")) if not path.is_symlink()]
    workers = sorted((path.name, path.stat().st_uid) for path in target.runtime.iterdir())
    roots = sorted(os.listdir("/")), sorted(os.listdir("/run")), sorted(os.listdir("/root"))
    mounts = Path("/proc/self/mountinfo").read_text()
    spawner = Path(f"/proc/{target.spawner()}/status").read_text().splitlines()
    rights = [line for line in spawner if line.startswith(("Uid", "Gid", "Cap", "Groups"))]
    text = json.dumps([cgroups, etc, workers, roots, mounts, rights, target.config.read_text()])
    return hashlib.sha256(text.encode()).hexdigest(), text


def descriptors(pid):
    return len(os.listdir(f"/proc/{pid}/fd"))


@pytest.fixture
def link(target):
    """A bundle's name that leads out of the state directory."""
    place = target.state / "bundles" / "link-out-of-the-state"
    place.unlink(missing_ok=True)
    place.symlink_to("/etc")
    yield
    place.unlink()


@pytest.mark.parametrize("wish", WISHES)
def test_the_spawner_refuses_the_api(target, neighbour, neighbour_lives_on, link, wish):
    before, pid = host_state(target), target.spawner()
    for request, reply in zip(WISHES[wish], asked(target, WISHES[wish]), strict=True):
        assert "error" in reply, request
        assert reply["error"]["code"] not in ("system_error", "closed"), (request, reply)
        assert "Traceback" not in reply["error"]["message"]
    assert host_state(target) == before
    assert target.spawner() == pid


def test_what_the_api_may_ask_for_is_granted_or_the_refusals_prove_nothing(target):
    started, stopped = asked(target, [SPAWN, {"op": "stop", "id": SPAWN["id"], "grace": 0}])
    assert 1000 <= started["ok"]["uid"] < 2**31
    assert stopped["ok"]["id"] == SPAWN["id"]


def test_what_the_api_took_it_cannot_keep(target, neighbour_lives_on):
    free = target.server.http.get("/api/v1/system/status").json()["spawner"]["uids_free"]
    held = told(target, "hold", target.spawner_socket, 12)
    assert held["refused"] == []
    stops = [{"op": "stop", "id": name, "grace": 0} for name in held["started"]]
    replies = asked(target, [*stops, *stops])
    assert all(reply["ok"]["result"] for reply in replies)
    assert target.server.http.get("/api/v1/system/status").json()["spawner"]["uids_free"] >= free  # or more: others end


def test_a_flood_of_descriptors_is_closed_and_the_spawner_answers(target):
    pid = target.spawner()
    before = descriptors(pid)
    times = 500 if target.processes > 10_000 else 100
    assert told(target, "flood", target.spawner_socket, times)["refused"] == times
    wait_for(lambda: descriptors(pid) <= before + 1, 20, "the spawner's descriptors are closed")
    assert "ok" in asked(target, [{"op": "list"}])[0]


def test_a_bundle_that_is_swapped_for_a_link_while_workers_start_leads_nowhere_else(target):
    outside = Path("/run/hostile-outside")
    outside.mkdir(exist_ok=True)
    name = f"swapped{os.getpid()}"
    inside = target.state / "bundles" / name
    inside.mkdir(mode=0o755)
    for place, word in ((outside, "OUTSIDE"), (inside, "INSIDE")):
        place.chmod(0o755)
        (place / "app.R").write_text(f"cat('{word}\\n'); quit()")
        (place / "app.R").chmod(0o644)
    try:
        times = 40
        found = told(target, "race", target.spawner_socket, target.state / "bundles", name, outside, times, "INSIDE")
        assert len(found["heard"]) + found["refused"] >= times
        assert [text for text in found["heard"] if "OUTSIDE" in text] == []
        assert any("INSIDE" in text for text in found["heard"]), "none got through, so nothing was raced for"
    finally:
        subprocess.run(["rm", "-rf", outside, inside], check=True)


def test_a_bundle_that_bwrap_looks_up_by_its_name_would_lead_elsewhere(target, shell):
    outside = Path("/run/hostile-outside")
    outside.mkdir(exist_ok=True)
    (outside / "secret.txt").write_text(CANARY)
    link = target.state / "bundles" / "by-name"
    link.symlink_to(outside)
    try:
        real = target.state / "bundles" / shell.bundle
        assert CANARY not in shell.weakened("cat /app/secret.txt")
        said = shell.weakened("cat /app/secret.txt", words=[f"--ro-bind {link} /app"])
        assert CANARY in said
        assert real.is_dir()
    finally:
        link.unlink()
        subprocess.run(["rm", "-rf", outside], check=True)


def test_nothing_that_the_spawner_reads_or_runs_can_be_changed_by_the_apis_user(target):
    program = (
        "import sys, blockyard_spawner as s, msgpack, prctl; print(sys.prefix, s.__path__[0], msgpack.__path__[0])"
    )
    prefix, *packages = subprocess.check_output([target.python, "-c", program], text=True, cwd="/").split()
    shallow = ["/etc", "/usr/bin", "/usr/lib", "/run/systemd", prefix, f"{prefix}/lib", f"{prefix}/bin"]
    inputs = [
        *(target.config, *packages, "/usr/bin/bwrap", "/usr/bin/R", "/usr/lib/R/bin", "/etc/passwd", *shallow),
        *("/etc/ld.so.cache", "/etc/ld.so.preload", "/etc/blockyard", "/etc/systemd/system", "/etc/polkit-1"),
        "/usr/local/lib/systemd",
    ]
    whole = [path for path in (str(each) for each in inputs) if os.path.exists(path)]
    links_and_devices = [word for kind in "lspc" for word in ("!", "-type", kind)]
    written = target.as_api("find", *whole, "-xdev", "-writable", *links_and_devices, "-print")
    assert written.stdout.split() == []
    deep = [path for path in whole if path not in shallow]
    tried = told(target, "write", *deep)
    assert tried["tried"] > 20
    assert tried["possible"] == {}


def test_that_attempt_finds_what_can_be_changed(target):
    found = told(target, "write", target.state / "bundles")
    assert found["possible"]  # the API's own directory: the attempt does notice


def test_the_apis_user_cannot_signal_trace_or_look_into_the_spawner_or_a_worker(target, neighbour):
    _, worker = neighbour
    for pid in (target.spawner(), worker.pid):
        for command in (["kill", "-9", str(pid)], ["cat", f"/proc/{pid}/environ"], ["cat", f"/proc/{pid}/mem"],
                        ["ls", f"/proc/{pid}/fd/"], ["ls", f"/proc/{pid}/root/"]):  # fmt: skip
            done = target.as_api(*command)
            assert done.returncode != 0, command
            assert "ermission denied" in done.stderr or "not permitted" in done.stderr, (command, done.stderr)
    assert processes_of(worker.uid)


# By it a service asks to be woken when memory gets short for itself; systemd gives it to each since version 254.
OWN_PRESSURE = "/blockyard-api.service/memory.pressure"


def test_the_apis_user_writes_to_no_cgroup(target, neighbour):
    _, worker = neighbour
    for group in (
        target.cgroup,
        target.cgroup / "workers",
        target.cgroup / "workers" / worker.id,
        target.cgroup.parent,
    ):
        for knob, value in (("cgroup.procs", "0"), ("cgroup.kill", "1"), ("cgroup.freeze", "1"), ("pids.max", "max"),
                            ("memory.max", "max"), ("cgroup.subtree_control", "-pids")):  # fmt: skip
            if (group / knob).exists():
                done = target.as_api("sh", "-c", 'echo "$1" > "$2"', "sh", value, group / knob)
                assert "Permission denied" in done.stderr, (group, knob)
        possible = told(target, "write", group)["possible"]
        assert {path for path in possible if not path.endswith(OWN_PRESSURE)} == set()


@pytest.mark.parametrize("uid", [65534, 2**20 + 11], ids=["nobody", "a stranger"])
def test_nobody_but_the_api_is_heard_by_the_spawner(target, uid):
    program = f"import socket; s = socket.socket(1, 5); s.connect({str(target.spawner_socket)!r}); print('connected')"
    done = subprocess.run(
        ["setpriv", f"--reuid={uid}", "--regid=65534", "--clear-groups", sys.executable, "-I", "-c", program],
        capture_output=True, text=True, timeout=60, check=False, cwd="/",
    )  # fmt: skip
    assert "PermissionError" in done.stderr
