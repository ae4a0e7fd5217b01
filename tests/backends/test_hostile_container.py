"""A hostile app in a container tries what it tries in bubblewrap (tests/hostile/attacks.py), through the front door.

Each attempt names the layer that stops it there: it is the engine's, so it may be another one than in bubblewrap.
"""

import contextlib
import re
import shutil
import socket
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

import pytest
from docker_pair import DockerPair
from running_pair import simple_app, wait_for

sys.path.append(str(Path(__file__).parents[1] / "hostile"))

from attacks import ATTACKS, CALLS, DENIED, GONE, PRIVILEGED_CALLS, REACH
from hostile_apps import NEIGHBOUR
from target import CANARY, Target, compiled, deploy_shell, packed

MOUNTS, PROCESSES, NETWORK, IPC = "the mounts by allow-list", "the process namespace", "its own network", "its own IPC"
READ_ONLY, FILTER, SIZES = "the read-only root", "the engine's system call filter", "the sizes"
CGROUPS = "the cgroup files are the engine's"


@dataclass(frozen=True)
class Contained:
    """What stops an attempt in a container, and how it is seen; "" where it is seen as in bubblewrap."""

    name: str
    layer: str
    stopped: str = ""
    command: str = ""


CONTAINED = [
    *(Contained(name, MOUNTS) for name in (
        "reads another app's bundle", "lists the bundles", "reads another app's library",
        "reads another app's log and the database", "reads the configuration", "connects to another worker",
        "connects to the spawner", "connects to a host's service by its socket", "moves itself to another cgroup",
        "leaves by a descriptor that was left open", "reads the kernel's log and the disks")),
    *(Contained(name, PROCESSES) for name in (
        "reads another worker's temporary files", "reads another worker's environment",
        "sees another worker's processes", "signals another worker", "traces another worker",
        "reads another worker's memory", "leaves by the root of process 1")),
    *(Contained(name, NETWORK) for name in (
        "connects to an abstract socket", "connects to a loopback service", "asks the API in another's name")),
    *(Contained(name, IPC) for name in ("reads shared memory of the host", "opens a message queue of the host")),
    *(Contained(name, READ_ONLY) for name in (
        "changes the program that runs it", "has the kernel run a program at a crash", "changes its bundle",
        "changes the system's programs", "adds to the root")),
    *(Contained(name, SIZES) for name in ("fills its temporary directory", "fills its shared memory")),
    Contained("opens files without end", "the limit of open files"),
    Contained("mounts in a user namespace of its own", FILTER),
]  # fmt: skip
# What only a container could reach.
OWN = [
    Contained("connects to the container engine", MOUNTS, "ENOENT", REACH + " unix {engine}"),
    Contained("connects to another worker's address", NETWORK, "timeout|E[A-Z]+", REACH + " tcp {address} 7000"),
    Contained("leaves its cgroup", CGROUPS, f"Read-only|{DENIED}|No such file",
              "for f in $(find /sys/fs/cgroup -name cgroup.procs); do (echo $$ > $f) && echo moved; done;"
              " echo $$ > /sys/fs/cgroup/cgroup.procs"),
    Contained("names a release agent", CGROUPS, "looked",
              "for f in $(find /sys/fs/cgroup -name release_agent); do (echo /tmp/attack > $f) && echo moved; done;"
              " echo looked"),
    Contained("changes a limit of its own", CGROUPS, "looked",
              "for f in $(find /sys/fs/cgroup -name '*max*' -o -name '*limit_in_bytes'); do"
              " (echo 999999999 > $f) 2>/dev/null && echo moved; done; echo looked"),
    Contained("replaces what starts it", READ_ONLY, "Read-only", "(echo > /run/blockyard/enter.sh) && echo moved"),
    Contained("uses a device of the host", MOUNTS, f"{GONE}|not permitted|{DENIED}",
              "mknod /tmp/disk b 254 0; head -c1 /tmp/disk && echo moved"),
]  # fmt: skip
FAILED_OTHERWISE = "connected|moved"
# Of what our own filter refuses, what the engine's may let through: the app's own processes, and some of the kernel
# that newer engines close, such as io_uring.
LET_THROUGH = {"ptrace_child", "process_vm_readv_own", "AF_VSOCK", "AF_ALG", "io_uring"}
EACH_CALL = "for call in {}; do echo $call $(/tmp/attack $call); done"


@pytest.fixture(scope="module")
def target(engine):
    settings = "process.tmp_size = '32m'\nprocess.pids_limit = 128\nserver.default_memory_limit = '400m'"
    with DockerPair("hostile", engine, settings, pool="10.213.96.0/26") as pair:
        yield Target(
            pair, pair.config, sys.executable, pair.user.pw_name, pair.state, pair.docker_runtime, pair.cgroup,
            pair.docker_socket, tmp_size=32 << 20, processes=1000,
        )  # fmt: skip


@pytest.fixture(scope="module")
def program(tmp_path_factory):
    return compiled(tmp_path_factory.mktemp("compiled"))


@pytest.fixture(scope="module")
def shell(target, program):
    found = deploy_shell(target, "hostile", program, backend="docker")
    assert "attack" in found.run("ls /tmp")
    return found


def only_worker(target, app):
    (record,) = wait_for(lambda: target.server.workers(app, "active"), 60, f"a worker of {app}")
    return record["id"]


@pytest.fixture(scope="module")
def neighbour(target):
    """Another tenant's app in a container of its own, with something to take; its bundle, worker and visitor."""
    serve = 'system("python3 -m http.server 7000", wait = FALSE)'
    files = {**simple_app(NEIGHBOUR.format(canary=CANARY) + serve), "secret.txt": CANARY}
    made = target.server.deploy("neighbour", packed(files), max_workers_per_app=1, backend="docker")
    visitor = target.server.visitor()
    assert visitor.get("/app/neighbour/").status_code == 200
    return made["bundle_id"], only_worker(target, "neighbour"), visitor


@pytest.fixture(scope="module")
def place(target, shell, neighbour, program):
    """What an attempt's names stand for."""
    bundle, worker, _ = neighbour
    engine = target.server.engine
    container = engine.show(f"blockyard-{worker}")
    (network,) = container["NetworkSettings"]["Networks"].values()
    first = container["State"]["Pid"]
    pid = next(iter(Path(f"/proc/{first}/task/{first}/children").read_text().split()), first)
    library = target.state / "libraries" / "theirs"
    library.mkdir(mode=0o755)
    (library / "secret").write_text(CANARY)
    with contextlib.ExitStack() as opened:
        directory = Path(opened.enter_context(tempfile.TemporaryDirectory()))
        directory.chmod(0o755)
        service, tried = directory / "service.sock", shutil.copy(program, directory / "attack")
        as_worker = ["setpriv", "--reuid=65534", "--regid=65534", "--clear-groups"]  # the very uid that it has
        for plant in ("plant_shm", "plant_queue"):
            assert subprocess.check_output([*as_worker, tried, plant], text=True) == "ok\n"
        opened.callback(subprocess.run, [*as_worker, "ipcrm", "--shmem-key", "0x626c6f63"], check=True)
        opened.callback(subprocess.run, [*as_worker, tried, "drop_queue"], check=True)
        for where in (str(service), "\0hostile-host-service"):
            sock = opened.enter_context(socket.socket(socket.AF_UNIX))
            sock.bind(where)
            sock.listen(64)
        listener = opened.enter_context(socket.create_server(("127.0.0.1", 0)))
        yield {
            "canary": CANARY, "state": target.state, "config": target.config, "runtime": target.runtime,
            "cgroup": target.cgroup, "id": worker, "pid": pid, "socket": target.runtime / worker / "app.sock",
            "bundle": target.state / "bundles" / bundle, "spawner_socket": target.spawner_socket,
            "service": service, "abstract": "hostile-host-service", "port": listener.getsockname()[1],
            "api_port": target.server.control_url.rpartition(":")[2], "too_much": target.tmp_size + (1 << 20),
            "engine": engine.socket, "address": network["IPAddress"],
        }  # fmt: skip


def seen(pattern, text):
    return re.search(pattern, text, re.MULTILINE)


@pytest.mark.parametrize("contained", CONTAINED, ids=lambda one: f"{one.name}: {one.layer}")
def test_what_bubblewrap_stops_a_container_stops_too(shell, place, contained):
    (attack,) = (attack for attack in ATTACKS if attack.name == contained.name)
    said = shell.run(attack.command.format(**place))
    assert seen((contained.stopped or attack.stopped).format(**place), said), said
    assert not seen(attack.succeeded.format(**place), said), said


@pytest.mark.parametrize("contained", OWN, ids=lambda one: f"{one.name}: {one.layer}")
def test_what_only_a_container_could_try_is_stopped(shell, place, contained):
    said = shell.run(contained.command.format(**place))
    assert seen(contained.stopped, said), said
    assert not seen(FAILED_OTHERWISE, said), said


def test_a_system_call_that_no_app_needs_is_refused_but_for_the_few_that_the_engine_lets_through(shell):
    names = " ".join(call.name for call in (*CALLS, *PRIVILEGED_CALLS))
    said = dict(line.split() for line in shell.run(EACH_CALL.format(names)).splitlines())
    allowed = {name for name, answer in said.items() if not re.fullmatch("E[A-Z]+", answer)}
    assert allowed <= LET_THROUGH
    assert "ptrace_child" in allowed  # or the others prove nothing
    for name in ("keyctl", "bpf", "unshare_user", "clone_user", "mount_tmpfs", "init_module", "setuid"):
        assert said[name] == "EPERM"


def test_it_has_no_more_processes_than_it_may_and_goes_on(shell):
    bomb = "i=0; while [ $i -lt 300 ]; do sleep 1 & i=$((i+1)); done; echo all"
    said = shell.run(f"sh -c '{bomb}'")
    assert seen("(?i)cannot fork|resource temporarily unavailable", said), said
    assert not seen("^all$", said)
    wait_for(lambda: "going on" in shell.run("sleep 1; echo going on"), 20, "room for processes")


@pytest.mark.parametrize(("command", "words"), [("/tmp/attack kill_all", ""), ("tail /dev/zero", "memory")])
def test_a_signal_to_everybody_and_a_want_of_memory_end_the_sender_alone(target, shell, neighbour, command, words):
    _, theirs, visitor = neighbour
    wait_for(lambda: shell.visitor.http.get("/app/hostile/").status_code == 200, 60, "the app, after an earlier end")
    mine = only_worker(target, "hostile")
    shell.visitor.http.get("/app/hostile/", params={"sh": command})
    wait_for(lambda: mine not in [each["id"] for each in target.server.workers("hostile")], 30, "its end")
    (ended,) = (each for each in target.server.runtime("hostile")["workers"] if each["id"] == mine)
    assert words in ended["end_reason"], ended
    wait_for(lambda: f"blockyard-{mine}" not in target.server.containers(), 30, "the container's end")
    assert only_worker(target, "neighbour") == theirs
    assert visitor.get("/app/neighbour/").status_code == 200
