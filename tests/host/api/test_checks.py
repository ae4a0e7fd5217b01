"""The start-up checks: every severity of every check, brought about for real.

The daemons run in a network of their own, so that nothing depends on what else this machine runs or reaches. What
needs systemd, AppArmor, or a kernel's settings is not tried here.
"""

import asyncio
import contextlib
import ctypes
import json
import os
import platform
import re
import shutil
import signal
import socket
import struct
import subprocess
import sys
import termios
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import msgpack
import pytest
from running_pair import Pair, ensure_user, simple_app, wait_for
from running_spawner import acting_as

from blockyard_api import settings
from blockyard_api.backends.spawner import Spawner
from blockyard_api.checks import files, resources, sandbox
from blockyard_api.checks.context import Context
from blockyard_api.checks.runner import CHECKS, PROBED_CHECKS

METADATA = "169.254.169.254"
BY = Path(sys.executable).with_name("by")
CLONE_NEWNET = 0x40000000
IOCTL = {"x86_64": 16, "aarch64": 29}[platform.machine()]
LOAD, IF_EQUAL, RETURN = 0x20, 0x15, 0x06  # of classic BPF
ALLOW, EPERM = 0x7FFF0000, 0x00050001


class Network:
    """A network namespace with nothing in it but loopback."""

    def __init__(self, name):
        self.name = name
        subprocess.run(["ip", "netns", "add", name], check=True)
        subprocess.run(["ip", "-n", name, "link", "set", "lo", "up"], check=True)
        self._open = contextlib.ExitStack()

    def address(self, address):
        at_once = ["nodad"] if ":" in address else []  # else the kernel looks for a duplicate of it, for a moment
        subprocess.run(["ip", "-n", self.name, "address", "add", address, "dev", "lo", *at_once], check=True)

    def hole(self, host, port):
        """Listen in there with a queue that is full already: whoever connects waits for ever."""
        self.listen(host, port, full=True)

    def listen(self, host, port=0, *, full=False):
        """Listen in there; return the port."""

        def enter_and_listen():
            libc = ctypes.CDLL(None, use_errno=True)
            with open(f"/run/netns/{self.name}") as namespace:
                assert libc.setns(namespace.fileno(), CLONE_NEWNET) == 0
            family = socket.AF_INET6 if ":" in host else socket.AF_INET
            made.append(socket.create_server((host, port), family=family, backlog=0 if full else 128))
            for _ in range(4 if full else 0):
                made.append(socket.socket(family))
                made[-1].setblocking(False)
                made[-1].connect_ex(made[0].getsockname())

        made = []
        thread = threading.Thread(target=enter_and_listen)  # its namespace ends with it
        thread.start()
        thread.join()
        for each in made:
            self._open.enter_context(each)
        return made[0].getsockname()[1]

    def redis(self, *options, port=6379):
        """Run a real Redis in there."""
        argv = ["redis-server", "--port", str(port), "--save", "", "--daemonize", "no", "--dir", "/tmp", *options]
        enter = ["nsenter", f"--net=/run/netns/{self.name}", "--"]
        server = subprocess.Popen([*enter, *argv], stdout=subprocess.DEVNULL)
        self._open.callback(server.wait, 20)
        self._open.callback(server.terminate)
        ping = [*enter, "redis-cli", "-p", str(port), "ping"]
        wait_for(
            lambda: (
                subprocess.run(ping, check=False, capture_output=True).stdout.strip()
                in (b"PONG", b"NOAUTH Authentication required.")
            ),
            20,
            "Redis",
        )

    def close(self):
        self._open.close()
        subprocess.run(["ip", "netns", "delete", self.name], check=True)


@pytest.fixture
def network():
    made = Network(f"blockyard-checks-{os.getpid()}")
    yield made
    made.close()


@pytest.fixture
def checked(request, network):
    """A function that starts a pair in that network; at start it is not checked, unless the test wants that."""
    with contextlib.ExitStack() as started:

        def start(lines="", **options):
            pair = Pair(request.node.name, lines, network=network.name, **options)
            return started.enter_context(pair)

        yield start


@pytest.fixture(scope="module")
def usual(request):
    """A pair with nothing special about it, and nothing around it."""
    network = Network(f"blockyard-usual-{os.getpid()}")
    with Pair("usual", network=network.name) as pair:
        yield pair
    network.close()


def run(pair):
    answer = pair.http.post("/api/v1/system/checks/run")
    assert answer.status_code == 200, answer.text
    return {one["name"]: one for one in answer.json()["checks"]}


def found(pair, name):
    return run(pair)[name]


def says(result, severity, *words):
    assert result["severity"] == severity, result
    text = f"{result['fact']} {result['remedy']}"
    assert all(word in text for word in words), text
    assert bool(result["remedy"]) or severity in ("ok", "info"), "what is to be done is not said"


def context(file, text="", **replaced):
    """What a check is given that asks neither spawner nor probe."""
    if text is not None:
        file.write_text(text)
    loaded = settings.load(str(file), {})

    async def nobody():
        return False

    return Context(loaded, Spawner("/nonexistent", nobody), Spawner("/nonexistent", nobody), list, ())


def judged(check, *arguments):
    result = asyncio.run(check(*arguments))
    return {"severity": result.severity.value, "fact": result.fact, "remedy": result.remedy}


def edit(pair, *lines):
    """Change the configuration of a running pair: `section.key = value`."""
    text = pair.config.read_text()
    for line in lines:
        key, _, value = line.partition(" = ")
        section, _, name = key.partition(".")
        text = re.sub(rf"^{name} = .*\n", "", text, flags=re.MULTILINE)
        text = text.replace(f"[{section}]\n", f"[{section}]\n{name} = {value}\n")
    pair.config.write_text(text)


def restart_api(pair):
    pair.kill("api", signal.SIGTERM)
    pair.start_api()


# --- the link to the spawner


def test_a_spawner_that_answers_is_ok(usual):
    says(found(usual, "spawner_link"), "ok", "version 1", "as root", "1000 uids")


def test_without_a_spawner_the_link_is_an_error_and_nothing_that_needs_a_worker_is_fine(checked):
    pair = checked()
    pair.kill("spawner")
    results = run(pair)
    says(results["spawner_link"], "error", "cannot be reached", "systemctl start blockyard-spawner.socket")
    probed = ("user_namespaces", "seccomp_profile", "cloud_metadata", "worker_egress", "abstract_sockets")
    for name in (
        "bwrap_host_uid_mapping",
        "cgroup_delegation",
        "resource_limits",
        *(set(probed) - {"seccomp_profile"}),
    ):
        assert results[name]["severity"] == "error", results[name]
    for name in ("bwrap_available", "uid_range", "config_secrets", "redis_auth"):
        assert results[name]["severity"] == "ok", results[name]


def test_a_spawner_that_obeys_somebody_else_is_an_error(checked):
    pair = checked()
    pair.kill("spawner", signal.SIGTERM)
    edit(pair, 'process.api_user = "daemon"')
    pair.start_spawner()
    pair.spawner_socket.chmod(0o666)
    says(found(pair, "spawner_link"), "error", "does not obey", "process.api_user")


def test_a_spawner_of_another_version_is_an_error(checked):
    pair = checked()
    pair.kill("spawner", signal.SIGTERM)
    pair.spawner_socket.unlink()
    newer = (
        "from blockyard_spawner import protocol; protocol.VERSION = 2; from blockyard_spawner.main import main; main()"
    )
    pair.spawner = subprocess.Popen(
        [sys.executable, "-c", newer, "--config", pair.config, "--socket", pair.spawner_socket],
        stdout=pair.logs["spawner"], stderr=pair.logs["spawner"], cwd="/",
    )  # fmt: skip
    wait_for(pair.spawner_socket.exists)
    says(found(pair, "spawner_link"), "error", "version 2", "same version")


def test_somebody_else_behind_the_spawners_socket_is_an_error(checked):
    pair = checked()
    pair.kill("spawner", signal.SIGTERM)
    pair.spawner_socket.unlink()
    os.chmod(pair.spawner_socket.parent, 0o777)
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with acting_as(65534, 65534):
        listener.bind(str(pair.spawner_socket))
        listener.listen()
        os.chmod(pair.spawner_socket, 0o666)

    def answer():
        with contextlib.suppress(OSError):
            while True:
                connection, _ = listener.accept()
                packet = connection.recv(65536)
                about = {"version": 1, "unprivileged": False, "controllers": [], "uids_free": 5, "uids_total": 5}
                if packet:
                    connection.send(msgpack.packb({"seq": msgpack.unpackb(packet)["seq"], "ok": about}))

    threading.Thread(target=answer, daemon=True).start()
    says(found(pair, "spawner_link"), "error", "uid 65534", "not the spawner")
    listener.close()


# --- bubblewrap


def test_the_distributions_bubblewrap_is_ok(tmp_path):
    says(judged(sandbox.bwrap_available, context(tmp_path / "c")), "ok", "/usr/bin/bwrap is bubblewrap")


def test_a_setuid_bubblewrap_is_an_error(tmp_path):
    copy = shutil.copy("/usr/bin/bwrap", tmp_path / "bwrap")
    os.chmod(copy, 0o4755)
    given = context(tmp_path / "c", f'[process]\nbwrap_path = "{copy}"\n')
    says(judged(sandbox.bwrap_available, given), "error", "setuid", f"chmod u-s,g-s {copy}")


def test_a_bubblewrap_with_capabilities_of_its_own_is_an_error(tmp_path):
    copy = shutil.copy("/usr/bin/bwrap", tmp_path / "bwrap")
    os.setxattr(copy, "security.capability", struct.pack("<5I", 0x02000001, 1 << 21, 0, 0, 0))  # cap_sys_admin=ep
    given = context(tmp_path / "c", f'[process]\nbwrap_path = "{copy}"\n')
    says(judged(sandbox.bwrap_available, given), "error", "capabilities", f"setcap -r {copy}")


def test_no_bubblewrap_is_an_error(tmp_path):
    given = context(tmp_path / "c", '[process]\nbwrap_path = "/nonexistent/bwrap"\n')
    says(judged(sandbox.bwrap_available, given), "error", "No such file", "apt install bubblewrap")


def test_a_sandbox_that_starts_is_ok(usual):
    says(found(usual, "user_namespaces"), "ok", "under uid 200")


def test_workers_that_cannot_make_a_sandbox_are_an_error_with_the_reason(checked):
    pair = checked('process.bwrap_path = "/nonexistent/bwrap"')
    results = run(pair)
    says(results["user_namespaces"], "error", "/nonexistent/bwrap", "apt install bubblewrap")
    says(results["bwrap_available"], "error", "/nonexistent/bwrap")
    says(results["worker_egress"], "error", "the probe did not run")


def test_a_bubblewrap_that_is_too_old_is_an_error(checked, tmp_path):
    old = Path(f"/tmp/blockyard-bwrap-{os.getpid()}")
    old.write_text('#!/bin/sh\nexec /usr/bin/bwrap --of-tomorrow "$@"\n')
    old.chmod(0o755)
    try:
        says(found(checked(f'process.bwrap_path = "{old}"'), "user_namespaces"), "error", "too old", "--of-tomorrow")
    finally:
        old.unlink()


# --- uids


def test_the_host_sees_a_worker_with_the_pools_uid_and_the_workers_gid(usual):
    says(found(usual, "bwrap_host_uid_mapping"), "ok", "uid 200", "gid 65534")


@pytest.mark.parametrize(
    ("lines", "words"),
    [
        (["process.worker_gid = 4242"], ["gid 65534", "should have gid 4242"]),
        (
            ["process.worker_uid_range_start = 300000", "process.worker_uid_range_end = 300999"],
            ["300000-300999", "Restart blockyard-spawner"],
        ),
    ],
)
def test_a_worker_with_other_ids_than_configured_is_an_error(checked, lines, words):
    pair = checked()
    edit(pair, *lines)  # the spawner has read the file long ago
    restart_api(pair)
    says(found(pair, "bwrap_host_uid_mapping"), "error", *words)


def test_a_spawner_without_root_is_told(checked):
    pair = checked()
    pair.kill("spawner", signal.SIGTERM)
    user = ensure_user()
    for path in (pair.spawner_socket.parent, pair.runtime_dir):
        os.chown(path, user.pw_uid, user.pw_gid)
    pair.spawner_socket.unlink()
    edit(pair, 'process.cgroup_root = "/nonexistent"')
    pair.spawner = subprocess.Popen(
        [
            *pair._as_user(), sys.executable, "-m", "blockyard_spawner.main", "--unprivileged",
            "--config", pair.config, "--socket", pair.spawner_socket,
        ],
        stdout=pair.logs["spawner"], stderr=pair.logs["spawner"], cwd="/",
    )  # fmt: skip
    wait_for(pair.spawner_socket.exists)
    results = run(pair)
    says(results["spawner_link"], "ok", "without root")
    says(results["bwrap_host_uid_mapping"], "info", "no root", "cgroup delegation", "Docker")


def test_a_range_that_is_the_workers_alone_is_ok(tmp_path):
    given = context(tmp_path / "c", "[process]\nworker_uid_range_start = 900000\nworker_uid_range_end = 900099\n")
    says(judged(resources.uid_range, given), "ok", "900000-900099", "enough for 100")


@pytest.mark.parametrize(
    ("start", "end", "words"),
    [
        (65500, 65599, ["nobody (65534)", "/etc/passwd", "DynamicUser"]),
        (61000, 61999, ["61184-65519", "DynamicUser"]),
        (900000, 900049, ["50 uids", "proxy.max_workers = 100"]),
    ],
)
def test_a_range_that_is_others_too_or_too_small_is_a_warning(tmp_path, start, end, words):
    text = f"[process]\nworker_uid_range_start = {start}\nworker_uid_range_end = {end}\n"
    says(judged(resources.uid_range, context(tmp_path / "c", text)), "warning", *words)


def test_a_range_that_a_person_may_use_for_containers_is_a_warning(tmp_path):
    with open("/etc/subuid", "a+") as file:
        file.seek(0)
        before = file.read()
        file.write("blockyard-test:1000000:65536\n")
    try:
        text = "[process]\nworker_uid_range_start = 1000500\nworker_uid_range_end = 1000999\n"
        says(judged(resources.uid_range, context(tmp_path / "c", text)), "warning", "blockyard-test's of /etc/subuid")
    finally:
        Path("/etc/subuid").write_text(before)


def test_a_range_that_systemd_homed_gives_to_people_is_a_warning_while_that_runs(tmp_path):
    text = "[process]\nworker_uid_range_start = 60200\nworker_uid_range_end = 60399\n"
    given = context(tmp_path / "c", text)
    homed = Path("/run/systemd/userdb/io.systemd.Home")
    homed.parent.mkdir(parents=True, exist_ok=True)
    says(judged(resources.uid_range, given), "ok")
    with socket.socket(socket.AF_UNIX) as service:
        service.bind(str(homed))
        try:
            says(judged(resources.uid_range, given), "warning", "60001-60513", "systemd-homed")
        finally:
            homed.unlink()


# --- limits


def test_controllers_that_are_withheld_are_a_warning(usual):
    missing = [
        each for each in ("memory", "cpu", "pids") if each not in (usual.cgroup / "cgroup.controllers").read_text()
    ]
    assert missing, "this machine delegates everything: see the guests' tests"
    held = [each for each in missing if each in resources.in_v1(Path("/proc/self/mountinfo").read_text())]
    says(
        found(usual, "cgroup_delegation"), "warning", *missing, *([f"cgroup v1 for {', '.join(held)}"] if held else [])
    )


def test_without_systemd_the_remedy_names_no_unit(usual):
    assert not Path("/run/systemd/system").exists(), "with systemd: see the guests' tests"
    results = run(usual)
    for name in ("cgroup_delegation", "resource_limits"):
        assert not re.search(r"systemctl|\.service", results[name]["fact"] + results[name]["remedy"]), results[name]


def test_a_controller_of_cgroup_v1_is_told_from_one_of_v2():
    mounts = (
        "30 23 0:26 / /sys/fs/cgroup ro shared:9 - tmpfs tmpfs ro,mode=755\n"
        "31 30 0:27 / /sys/fs/cgroup/unified rw shared:10 - cgroup2 cgroup2 rw,nsdelegate\n"
        "32 30 0:28 / /sys/fs/cgroup/cpu,cpuacct rw shared:11 - cgroup cgroup rw,cpu,cpuacct\n"
        "33 30 0:29 / /sys/fs/cgroup/memory rw - cgroup cgroup rw,memory\n"
    )
    assert {"memory", "cpu", "pids"} & resources.in_v1(mounts) == {"memory", "cpu"}


def test_limits_that_nothing_enforces_are_a_warning(checked):
    pair = checked('server.default_memory_limit = "512m"\nprocess.cpu_ceiling = 2')
    pair.deploy("limited", simple_app(), memory_limit="300m", cpu_limit=0.5)
    result = found(pair, "resource_limits")
    says(result, "warning", "server.default_memory_limit (memory)", "process.cpu_ceiling (cpu)")
    says(
        result, "warning", "memory_limit of limited (memory)", "cpu_limit of limited (cpu)", "process.pids_limit (pids)"
    )


# --- the network


def test_metadata_that_is_not_there_and_nothing_in_reach_is_ok(usual):
    results = run(usual)
    says(results["cloud_metadata"], "ok", "did not reach")
    says(results["worker_egress"], "ok", "reached none of")


def test_metadata_in_reach_is_an_error_for_daemon_and_worker(checked, network):
    pair = checked()
    network.address(f"{METADATA}/32")
    network.listen(METADATA, 80)
    results = run(pair)
    says(results["cloud_metadata"], "error", f"{METADATA} port 80", "skip_metadata_check")
    says(results["worker_egress"], "error", f"{METADATA} port 80", "by admin firewall")


def test_metadata_at_its_ipv6_address_counts_just_as_well(checked, network):
    pair = checked()
    network.address("fd00:ec2::254/128")
    network.listen("fd00:ec2::254", 80)
    results = run(pair)
    says(results["cloud_metadata"], "error", "fd00:ec2::254 port 80")
    says(results["worker_egress"], "error", "fd00:ec2::254 port 80")


def test_the_metadata_check_can_be_left_out_but_not_for_workers(checked, network):
    pair = checked("process.skip_metadata_check = true")
    network.address(f"{METADATA}/32")
    network.listen(METADATA, 80)
    results = run(pair)
    says(results["cloud_metadata"], "info", "skip_metadata_check")
    says(results["worker_egress"], "error", METADATA)


def test_workers_without_a_network_reach_nothing_while_an_app_on_the_hosts_would(checked, network):
    pair = checked('process.network = "none"')
    network.address(f"{METADATA}/32")
    network.listen(METADATA, 80)
    network.listen("127.0.0.1")
    results = run(pair)
    says(results["worker_egress"], "ok", "network none")
    says(results["abstract_sockets"], "ok", "network none")
    says(results["cloud_metadata"], "error", METADATA)


def test_everything_that_a_worker_reaches_is_named(checked, network):
    pair = checked(
        'redis.url = "redis://127.0.0.1:6390"\nvault.address = "http://localhost:6391"\n'
        'database.url = "postgresql://127.0.0.1:6392/x"'
    )
    ports = [network.listen("127.0.0.1", port) for port in (6390, 6391, 6392)]
    other, sixth = network.listen("127.0.0.1"), network.listen("::1")
    api, relay = (sock.getsockname()[1] for sock in pair.sockets)
    for port in (api, relay):  # the pair's own are in the tests' network
        network.listen("127.0.0.1", port)
    result = found(pair, "worker_egress")
    assert ports == [6390, 6391, 6392]
    says(
        result,
        "warning",
        "redis (127.0.0.1 port 6390)",
        "vault (localhost port 6391)",
        "database (127.0.0.1 port 6392)",
    )
    says(result, "warning", f"the API (127.0.0.1 port {api})", f"the relay (127.0.0.1 port {relay})")
    says(
        result, "warning", f"a listener (127.0.0.1 port {other})", f"a listener (::1 port {sixth})", "by admin firewall"
    )
    assert result["fact"].count("6390") == 1
    assert "spawner" not in result["fact"]


def test_a_listener_that_only_a_firewall_before_the_host_keeps_from_the_world_is_named(checked, network):
    pair = checked()
    port = network.listen("0.0.0.0")
    says(found(pair, "worker_egress"), "warning", f"127.0.0.1 port {port}")


def test_more_listening_ports_than_are_tried_are_told(checked, network):
    pair = checked()
    for _ in range(510):
        network.listen("127.0.0.1")
    says(found(pair, "worker_egress"), "warning", "Not tried: 10 further listening ports")


def test_whether_a_worker_on_the_hosts_network_reaches_abstract_sockets_is_told(usual):
    if ctypes.CDLL(None).syscall(444, None, 0, 1) >= 6:  # landlock_create_ruleset: its version; this one has the scope
        says(found(usual, "abstract_sockets"), "ok", "does not reach abstract sockets", "EPERM")
    else:
        says(found(usual, "abstract_sockets"), "warning", "abstract Unix sockets", 'network = "none"')


# --- Redis


def test_a_redis_without_a_password_is_an_error(checked, network):
    network.redis()
    says(found(checked('redis.url = "redis://127.0.0.1"'), "redis_auth"), "error", "without a password", "requirepass")


def test_a_redis_with_a_password_is_ok_and_the_password_is_nowhere(checked, network):
    network.redis("--requirepass", "s3cret")
    pair = checked('redis.url = "redis://:s3cret@127.0.0.1:6379/0"')
    answer = pair.http.post("/api/v1/system/checks/run")
    says({one["name"]: one for one in answer.json()["checks"]}["redis_auth"], "ok", "wants a password")
    assert "s3cret" not in answer.text + pair.log("api") + pair.log("spawner")


def test_a_redis_at_a_unix_socket_is_asked_too(checked, network, tmp_path):
    path = f"/tmp/blockyard-redis-{os.getpid()}.sock"
    network.redis("--unixsocket", path, "--unixsocketperm", "777")
    says(found(checked(f'redis.url = "unix://{path}"'), "redis_auth"), "error", path)


def test_redis_over_tls_is_told(checked):
    says(found(checked('redis.url = "rediss://127.0.0.1"'), "redis_auth"), "info", "TLS")


def test_no_redis_is_ok(usual):
    says(found(usual, "redis_auth"), "ok", "No Redis")


def test_a_redis_that_does_not_answer_is_a_warning(checked):
    says(found(checked('redis.url = "redis://127.0.0.1"'), "redis_auth"), "warning", "does not answer", "redis.url")


def test_something_that_listens_but_is_no_redis_is_a_warning(checked, network):
    network.listen("127.0.0.1", 6379)
    says(found(checked('redis.url = "redis://127.0.0.1"'), "redis_auth"), "warning", "says nothing")


# --- the filter


def instruction(code, value, if_true=0, if_false=0):
    return struct.pack("=HBBI", code, if_true, if_false, value)


DENIES_TYPING = (
    instruction(LOAD, 0),
    instruction(IF_EQUAL, IOCTL, 0, 3),
    instruction(LOAD, 24),  # the lower half of the second argument
    instruction(IF_EQUAL, termios.TIOCSTI, 0, 1),
    instruction(RETURN, EPERM),
    instruction(RETURN, ALLOW),
)


def with_filter(checked, tmp_path, data):
    path = Path(f"/tmp/blockyard-filter-{os.getpid()}.bpf")
    path.write_bytes(data)
    path.chmod(0o644)
    try:
        return run(checked(f'process.seccomp_profile = "{path}"'))
    finally:
        path.unlink()


def test_a_filter_that_is_in_force_is_ok(checked, tmp_path):
    says(with_filter(checked, tmp_path, b"".join(DENIES_TYPING))["seccomp_profile"], "ok", "6 instructions")


def test_no_filter_is_a_warning(checked):
    says(found(checked('process.seccomp_profile = ""'), "seccomp_profile"), "warning", "is empty")


def test_a_truncated_filter_is_an_error(checked, tmp_path):
    results = with_filter(checked, tmp_path, b"".join(DENIES_TYPING)[:-3])
    says(results["seccomp_profile"], "error", "45 bytes", "by admin install-seccomp")
    assert results["worker_egress"]["severity"] == "error"


def test_a_filter_that_the_kernel_refuses_is_an_error(checked, tmp_path):
    results = with_filter(checked, tmp_path, b"".join(DENIES_TYPING[:-1]))  # it may run off its end
    says(results["seccomp_profile"], "error", "does not load", "by admin install-seccomp")


def test_a_filter_that_lets_everything_through_is_a_warning(checked, tmp_path):
    says(with_filter(checked, tmp_path, DENIES_TYPING[-1])["seccomp_profile"], "warning", "terminals")


def test_a_filter_that_this_daemon_cannot_read_is_an_error(checked):
    pair = checked()
    edit(pair, 'process.seccomp_profile = "/etc/shadow"')
    restart_api(pair)
    says(found(pair, "seccomp_profile"), "error", "/etc/shadow cannot be read")


def test_a_filter_that_the_spawner_has_not_heard_of_is_an_error(checked, tmp_path):
    pair = checked('process.seccomp_profile = ""')
    path = pair.root / "filter.bpf"
    path.write_bytes(b"".join(DENIES_TYPING))
    edit(pair, f'process.seccomp_profile = "{path}"')
    restart_api(pair)
    says(found(pair, "seccomp_profile"), "error", "without a filter", "Restart blockyard-spawner")


# --- files


@pytest.fixture
def state(tmp_path):
    """A state directory as it should be, and the context of a check of it."""
    directory = tmp_path / "state"
    for path in (directory, *(directory / name for name in ("bundles", "libraries", "uploads", "logs"))):
        path.mkdir()
        path.chmod(0o711)
    return directory


def of_state(state, lines=""):
    text = f'[storage]\nstate_dir = "{state}"\nmax_bundle_size = "1m"\n{lines}'
    return judged(files.state_dir, context(state.parent / "c", text))


def test_a_state_directory_as_it_should_be_is_ok(state):
    says(of_state(state), "ok", "alone")
    assert not list((state / "bundles").iterdir())


def test_a_state_directory_of_somebody_else_is_an_error(state):
    os.chown(state / "bundles", 65534, 65534)
    says(of_state(state), "error", "belongs to uid 65534", "chown")


@pytest.mark.parametrize("mode", [0o731, 0o713])
def test_a_state_directory_that_others_write_to_is_an_error(state, mode):
    (state / "libraries").chmod(mode)
    says(of_state(state), "error", "Others may write", "chmod go-w")


@contextlib.contextmanager
def mounted(path, options):
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"mode=0711,{options}", "tmpfs", path], check=True)
    try:
        yield
    finally:
        subprocess.run(["umount", "-l", path], check=True)


def filled(directory):
    """Make what is not there on a file system that is new."""
    for name in ("bundles", "libraries", "uploads", "logs"):
        (directory / name).mkdir(mode=0o711)
        (directory / name).chmod(0o711)


def test_a_full_disk_is_an_error(state):
    with mounted(state, "size=20m"):
        filled(state)
        (state / "logs" / "big").write_bytes(b"x" * (10 << 20))
        says(of_state(state), "error", "is full", "Make room")


def test_a_disk_without_room_for_files_is_an_error(state):
    with mounted(state, "size=100m,nr_inodes=8"):
        filled(state)
        says(of_state(state), "error", "is full")


def test_a_disk_with_little_room_is_a_warning(state):
    with mounted(state, "size=30m"):
        filled(state)
        text = f'[storage]\nstate_dir = "{state}"\nmax_bundle_size = "100m"\n'
        says(judged(files.state_dir, context(state.parent / "c", text)), "warning", "500 MB", "max_bundle_size")


def test_bundles_that_cannot_be_published_are_an_error(state):
    with mounted(state / "bundles", "ro"):
        says(of_state(state), "error", "nothing can be published", "Read-only file system")


def test_a_state_directory_that_others_may_list_is_a_warning(state):
    (state / "bundles").chmod(0o755)
    says(of_state(state), "warning", "may list", "chmod go-r")


def test_a_database_that_others_may_read_is_a_warning(state):
    (state / "blockyard.db").write_text("")
    (state / "blockyard.db").chmod(0o644)
    says(of_state(state), "warning", "tokens", "chmod go=")


SECRETS = [
    ('[redis]\nurl = "redis://:s3cret@127.0.0.1"\n', "redis.url"),
    ('[database]\nurl = "postgresql://u:s3cret@127.0.0.1/x"\n', "database.url"),
    ('[server]\nworker_env = {APP_DB_PASSWORD = "s3cret"}\n', "worker_env.APP_DB_PASSWORD"),
]


@pytest.mark.parametrize(("text", "key"), SECRETS)
def test_a_secret_that_everybody_may_read_is_a_warning(tmp_path, text, key):
    given = context(tmp_path / "c", text)
    (tmp_path / "c").chmod(0o644)
    result = judged(files.config_secrets, given)
    says(result, "warning", key, "chmod 0640")
    assert "s3cret" not in str(result)


@pytest.mark.parametrize(("text", "key"), SECRETS)
def test_a_secret_that_only_the_daemons_read_is_ok(tmp_path, text, key):
    given = context(tmp_path / "c", text)
    (tmp_path / "c").chmod(0o640)
    says(judged(files.config_secrets, given), "ok", key)


def test_a_configuration_without_secrets_may_be_read_by_everybody(tmp_path):
    given = context(tmp_path / "c", '[redis]\nurl = "redis://127.0.0.1"\n')
    (tmp_path / "c").chmod(0o644)
    says(judged(files.config_secrets, given), "ok", "no secret")


# --- the start


def test_a_start_runs_all_checks_before_anything_is_served_and_leaves_no_probe(checked):
    pair = checked(preflight=True)
    entries = [json.loads(line) for line in pair.log("api").splitlines() if line.startswith("{")]
    shown = pair.http.get("/api/v1/system/checks").json()
    assert [entry["BLOCKYARD_CHECK"] for entry in entries] == [one["name"] for one in shown["checks"]]
    assert [entry["BLOCKYARD_SEVERITY"] for entry in entries] == [one["severity"] for one in shown["checks"]]
    assert {entry["PRIORITY"] for entry in entries if entry["BLOCKYARD_SEVERITY"] == "warning"} == {"4"}
    assert len({entry["MESSAGE_ID"] for entry in entries}) == 1
    assert len(entries) == len(CHECKS) + len(PROBED_CHECKS)
    wait_for(lambda: not list(pair.runtime_dirs()) and not pair._cgroup_pids(), what="no probe")
    assert pair.http.get("/api/v1/system/status").json()["spawner"]["uids_free"] == 1000


def test_an_error_stops_the_start_for_good_and_says_why(checked, network):
    pair = checked(preflight=True)
    pair.kill("api", signal.SIGTERM)
    network.address(f"{METADATA}/32")
    network.listen(METADATA, 80)
    before = len(pair.log("api"))
    with ThreadPoolExecutor() as asking:
        waiting = asking.submit(pair.http.get, "/healthz")
        pair.launch_api()
        assert pair.api.wait(30) == 2  # which systemd does not try again
        assert waiting.result().status_code == 503  # else systemd would start it again for whoever waits
        assert waiting.result().json()["error"] == "not_started"
    words = pair.log("api")[before:].splitlines()[-1]
    assert words.startswith("blockyard-api: not started")
    assert "cloud_metadata" in words
    assert METADATA in words
    assert "skip_preflight" in words
    wait_for(lambda: not list(pair.runtime_dirs()) and not pair._cgroup_pids(), what="no probe")


def test_skip_preflight_starts_all_the_same_and_the_error_is_told_when_asked(checked, network):
    network.address(f"{METADATA}/32")
    network.listen(METADATA, 80)
    pair = checked()
    assert "skip_preflight" in pair.log("api")
    assert pair.http.get("/api/v1/system/checks").json()["severity"] == "error"  # run, since nobody had


def test_an_error_that_may_pass_is_tried_again(checked):
    pair = checked(preflight=True)
    pair.kill("api", signal.SIGTERM)
    pair.kill("spawner")
    pair.launch_api()
    assert pair.api.wait(30) == 1


def test_a_spawner_that_is_being_restarted_delays_the_start_and_no_more(checked):
    pair = checked(preflight=True)
    pair.kill("api", signal.SIGTERM)
    pair.kill("spawner")
    pair.launch_api()
    time.sleep(1)  # it is looking for it meanwhile
    pair.start_spawner()
    wait_for(lambda: pair.http.get("/readyz").status_code == 200, what="readiness")


@pytest.mark.parametrize(("timeout", "severity"), [("1s", "error"), ("20s", "ok")])
def test_what_is_slower_than_the_checks_timeout_is_an_error_and_passes_with_a_longer_one(checked, timeout, severity):
    pair = checked(f'server.preflight_timeout = "{timeout}"')
    pair.spawner.send_signal(signal.SIGSTOP)
    going_on = threading.Timer(3, pair.spawner.send_signal, [signal.SIGCONT])
    going_on.start()
    link = found(pair, "spawner_link")
    going_on.join()
    says(link, severity, *(["within 0.3 s", "preflight_timeout"] if severity == "error" else []))


def test_a_restart_keeps_live_sessions_and_takes_the_probe_for_no_worker_of_an_app(checked):
    pair = checked(preflight=True)
    pair.deploy("plain", simple_app())
    visitor = pair.visitor()
    with visitor.shiny("plain"):
        before = pair.workers("plain", "active")
    restart_api(pair)
    assert [one["id"] for one in pair.workers("plain", "active")] == [one["id"] for one in before]
    assert visitor.get("/app/plain/").status_code == 200
    assert [one["id"] for one in pair.workers("plain")] == [one["id"] for one in before]
    assert "belongs to nobody" not in pair.log("api")


def test_a_full_pool_of_uids_does_not_keep_a_server_with_visitors_from_restarting(checked):
    pair = checked("proxy.max_workers = 1", preflight=True, first_uid=200_500, last_uid=200_500)
    pair.deploy("plain", simple_app())
    assert pair.visitor().get("/app/plain/").status_code == 200
    restart_api(pair)
    shown = {one["name"]: one for one in pair.http.get("/api/v1/system/checks").json()["checks"]}
    says(shown["user_namespaces"], "warning", "did not run", "worker_uid_range")
    says(shown["worker_egress"], "warning", "did not run")
    assert pair.workers("plain", "active")


def test_the_probe_of_a_daemon_that_was_killed_is_swept_away(checked, network):
    pair = checked('proxy.health_interval = "250ms"\nvault.address = "http://127.0.0.1:6391"', preflight=True)
    network.hole("127.0.0.1", 6391)
    with ThreadPoolExecutor() as asking, contextlib.suppress(Exception):
        asking.submit(pair.http.post, "/api/v1/system/checks/run")  # vault makes the probe wait for a second
        wait_for(lambda: list(pair.runtime_dirs()), what="a probe")
        pair.kill("api")
    edit(pair, 'vault.address = ""')
    pair.start_api()
    wait_for(lambda: not list(pair.runtime_dirs()) and not pair._cgroup_pids(), what="no probe")


def test_a_probe_is_not_swept_away_while_somebody_waits_for_it(checked, network):
    pair = checked('proxy.health_interval = "50ms"\nvault.address = "http://127.0.0.1:6391"')
    network.hole("127.0.0.1", 6391)
    says(found(pair, "worker_egress"), "ok", "timeout")
    assert "belongs to nobody" not in pair.log("api")


# --- asking


def test_two_runs_at_once_are_refused(usual):
    with ThreadPoolExecutor() as asking:
        answers = [asking.submit(usual.http.post, "/api/v1/system/checks/run") for _ in range(4)]
        statuses = [answer.result().status_code for answer in answers]
    assert statuses.count(200) >= 1
    assert statuses.count(409) >= 1
    assert set(statuses) == {200, 409}


def test_strangers_learn_nothing(usual):
    assert httpx.get(f"{usual.control_url}/api/v1/system/checks").status_code == 401
    assert httpx.post(f"{usual.control_url}/api/v1/system/checks/run").status_code == 401


def by(pair, home, *arguments):
    environ = {**os.environ, "BLOCKYARD_URL": pair.control_url, "BLOCKYARD_TOKEN": pair.token, "HOME": str(home)}
    return subprocess.run([BY, *arguments], check=False, env=environ, capture_output=True, text=True, timeout=60)


def test_the_command_line_shows_a_table_and_succeeds_where_there_is_no_error(checked, tmp_path):
    usual = checked("proxy.max_workers = 2000")
    done = by(usual, tmp_path, "admin", "check")
    assert done.returncode == 0, done.stderr
    assert re.search(r"^spawner_link +ok +The spawner answers", done.stdout, re.MULTILINE)
    assert re.search(r"^uid_range +warning +.* Choose process.worker_uid_range_start", done.stdout, re.MULTILINE)
    summary = done.stdout.splitlines()[-1]
    assert summary.startswith("Apps in bubblewrap: isolated by uid, processes, files, system calls, ")
    assert "not isolated by " in summary  # this network's controllers are withheld, and it is the host's
    assert usual.token not in done.stdout + done.stderr
    told = json.loads(by(usual, tmp_path, "admin", "check", "--json").stdout)
    assert told["severity"] == "warning"
    assert told["isolation"] == summary
    assert told["seconds"] <= 10


def test_the_command_line_fails_where_there_is_an_error(checked, tmp_path):
    pair = checked()
    pair.kill("spawner")
    done = by(pair, tmp_path, "admin", "check")
    assert done.returncode == 1
    assert re.search(r"^spawner_link +error", done.stdout, re.MULTILINE)
    assert "would not start like this" in done.stderr
    told = by(pair, tmp_path, "admin", "check", "--json")
    assert told.returncode == 1
    assert json.loads(told.stdout)["severity"] == "error"
