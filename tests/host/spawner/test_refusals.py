"""What a taken-over API may try: each wish is refused with a code, audited, and changes nothing."""

import os
import select
import signal
import socket
import time

import msgpack
import pytest
from running_spawner import Refusal, api_user, cgroup_mount, eventually

WAITING = "Sys.sleep(600)"


@pytest.fixture
def bundle(spawner):
    return spawner.bundle("waiting", {"app.R": WAITING})


def descriptors_of(spawner):
    return sorted(os.listdir(f"/proc/{spawner.process.pid}/fd"))


def resident_kilobytes(spawner):
    with open(f"/proc/{spawner.process.pid}/status") as status:
        return next(int(line.split()[1]) for line in status if line.startswith("VmRSS"))


REFUSED = {
    "a parent directory as bundle": ({"bundle": ".."}, "malformed"),
    "a path as bundle": ({"bundle": "a/b"}, "malformed"),
    "an absolute path as bundle": ({"bundle": "/etc"}, "malformed"),
    "a bundle that is not there": ({"bundle": "missing"}, "no_such_bundle"),
    "no bundle": ({"bundle": None}, "unknown_kind"),
    "a library that is not there": ({"library": "missing"}, "no_such_library"),
    "data that root did not name": ({"data": ["secrets"]}, "no_such_data"),
    "an unknown kind": ({"kind": "shell"}, "unknown_kind"),
    "a loader's variable": ({"env": {"LD_PRELOAD": "/tmp/x.so"}}, "env_not_allowed"),
    "R's own variable": ({"env": {"R_PROFILE_USER": "/tmp/x"}}, "env_not_allowed"),
    "a search path": ({"env": {"PATH": "/tmp"}}, "env_not_allowed"),
    "our own variable": ({"env": {"BLOCKYARD_SOCKET": "/tmp/x"}}, "env_not_allowed"),
    "a variable with a newline": ({"env": {"APP_X\n": "1"}}, "malformed"),
    "more processes than root allows": ({"limits": {"pids": 513}}, "limit_above_ceiling"),
    "more of /tmp than root allows": ({"limits": {"tmp": 2**40}}, "limit_above_ceiling"),
    "a negative limit": ({"limits": {"memory": -1}}, "malformed"),
    "a truth as number": ({"limits": {"pids": True}}, "malformed"),
    "a uid of its choice": ({"uid": 0}, "malformed"),
    "a command of its choice": ({"argv": ["/bin/sh"]}, "malformed"),
    "an id that is a path": ({"id": "../../x"}, "malformed"),
    "an id that ends in a newline": ({"id": "worker0001\n"}, "malformed"),
    "an option as app": ({"app": "--bind"}, "malformed"),
    "another network": ({"network": "bridge"}, "malformed"),
}


@pytest.mark.parametrize(("wish", "code"), REFUSED.values(), ids=REFUSED)
def test_a_forbidden_wish_is_refused_and_changes_nothing(spawner, client, bundle, wish, code):
    with pytest.raises(Refusal) as refusal:
        spawner.spawn(
            client,
            **{"worker": "worker0001", "bundle": bundle} | {"worker" if k == "id" else k: v for k, v in wish.items()},
        )
    assert refusal.value.code == code
    assert refusal.value.message.endswith(".")
    eventually(lambda: spawner.leftovers() == {}, "nothing is left")
    assert spawner.client().call("list")["workers"] == []
    entry = [entry for entry in spawner.audit() if entry["MESSAGE"] != ""][-1]
    refusals = [entry["BLOCKYARD_RESULT"] for entry in spawner.audit() if "BLOCKYARD_PEER_UID" in entry]
    assert refusals == [code], entry


def test_limits_that_cannot_be_enforced_are_refused(stopped_spawner):
    stopped_spawner.configure(allow_unlimited=False)
    stopped_spawner.start()
    client, bundle = stopped_spawner.client(), stopped_spawner.bundle("waiting", {"app.R": WAITING})
    delegated = (cgroup_mount() / "cgroup.controllers").read_text().split()
    if "pids" in delegated:
        assert stopped_spawner.spawn(client, "worker0001", bundle).cgroup
    else:
        with pytest.raises(Refusal, match="limits_unavailable"):
            stopped_spawner.spawn(client, "worker0001", bundle)


def test_a_missing_subtree_is_refused_with_its_remedy(stopped_spawner):
    stopped_spawner.configure(allow_unlimited=False, cgroup_root="/nonexistent")
    stopped_spawner.start()
    with pytest.raises(Refusal, match="no_cgroup: Run 'systemctl start blockyard-workers'"):
        stopped_spawner.spawn(stopped_spawner.client(), "worker0001", stopped_spawner.bundle("b", {"app.R": WAITING}))


def test_a_bundle_that_is_a_link_is_refused(spawner, client):
    (spawner.state_dir / "bundles/link").symlink_to("/etc")
    with pytest.raises(Refusal, match="no_such_bundle"):
        spawner.spawn(client, "worker0001", "link")


def test_a_link_in_place_of_all_bundles_is_refused(spawner, client):
    (spawner.state_dir / "bundles").rmdir()
    (spawner.state_dir / "bundles").symlink_to("/usr")
    with pytest.raises(Refusal, match="no_such_bundle"):
        spawner.spawn(client, "worker0001", "bin")


def test_an_id_in_use_is_refused_and_the_worker_is_untouched(spawner, client, bundle):
    worker = spawner.spawn(client, "worker0001", bundle)
    with pytest.raises(Refusal, match="worker_exists"):
        spawner.spawn(client, "worker0001", bundle)
    assert client.call("list")["workers"][0]["pid"] == worker.pid


@pytest.mark.parametrize("op", ["stop", "list"])
def test_an_unknown_worker_is_said_to_be_unknown(client, op):
    with pytest.raises(Refusal, match="unknown_worker"):
        client.call(op, id="worker0001")


def test_hello_comes_first(spawner):
    with pytest.raises(Refusal, match="hello_first"):
        spawner.client(greet=False).call("list")


def test_hello_comes_once(client):
    with pytest.raises(Refusal, match="hello_first"):
        client.hello()


def test_another_version_is_refused(spawner):
    client = spawner.client(greet=False)
    with pytest.raises(Refusal, match="unsupported_version"):
        client.call("hello", version=2)
    with pytest.raises(Refusal, match="hello_first"):
        client.call("list")


def test_another_uid_is_closed_and_audited(spawner):
    spawner.socket.chmod(0o666)
    stranger = type("Stranger", (), {"pw_uid": 65533, "pw_gid": 65533})
    with pytest.raises((EOFError, ConnectionError)):
        spawner.client(user=stranger)
    assert [(entry["BLOCKYARD_RESULT"], entry["BLOCKYARD_PEER_UID"]) for entry in spawner.audit()[1:]] == [
        ("wrong_peer", "65533")
    ]


def test_the_socket_admits_nobody_but_the_apis_group(spawner):
    status = spawner.socket.stat()
    assert (oct(status.st_mode & 0o777), status.st_uid, status.st_gid) == ("0o660", 0, api_user().pw_gid)


def test_a_ninth_connection_waits_for_a_place_and_the_others_work(spawner):
    clients = [spawner.client() for _ in range(8)]
    ninth = spawner.client(greet=False)
    ninth.send("hello", version=1)
    assert all(client.call("list")["workers"] == [] for client in clients)
    assert not select.select([ninth.socket], [], [], 0)[0]
    clients[0].close()
    assert ninth.receive()[0]["ok"]["version"] == 1


def test_strangers_take_no_place(spawner):
    spawner.socket.chmod(0o666)
    stranger = type("Stranger", (), {"pw_uid": 65533, "pw_gid": 65533})
    held = [spawner.client(greet=False, user=stranger) for _ in range(20)]
    assert spawner.client().call("list")["workers"] == []
    assert len(held) == 20


NOT_REQUESTS = {
    "no msgpack": b"\xc1",
    "half a map": b"\x82\xa2op",
    "a list": msgpack.packb([1, 2]),
    "a number": msgpack.packb(1),
    "two values": msgpack.packb({"op": "list", "seq": 1}) * 2,
    "a key twice": b"\x82\xa2op\xa4list\xa2op\xa4stop",
    "a key that is a number": msgpack.packb({1: 2}),
    "an extension": b"\x81\xa2op\xd4\x05\x00",
    "bytes": msgpack.packb({"op": b"list"}),
    "a deep list": b"\x91" * 60_000,
    "a huge length": b"\xdf\xff\xff\xff\xff",
}


@pytest.mark.parametrize("packet", NOT_REQUESTS.values(), ids=NOT_REQUESTS)
def test_who_sends_what_is_no_request_is_told_and_closed(spawner, client, packet):
    client.send_raw(packet)
    message, _ = client.receive()
    assert (message["seq"], message["error"]["code"]) == (None, "malformed")
    with pytest.raises(EOFError):
        client.receive()
    assert spawner.client().call("list")["workers"] == []


def test_a_packet_that_is_too_long_costs_its_connection_alone(spawner, client):
    other = spawner.client()
    client.send_raw(b"\x00" * 100_000)
    assert client.receive()[0]["error"]["code"] == "too_large"
    with pytest.raises(EOFError):
        client.receive()
    assert other.call("list")["workers"] == []


def test_a_descriptor_with_anything_but_spawn_is_refused_and_closed(spawner, client):
    before = descriptors_of(spawner)
    with open("/etc/passwd") as file, pytest.raises(Refusal, match="unexpected_descriptor"):
        client.call("list", (file.fileno(),))
    with pytest.raises(EOFError):
        client.receive()
    eventually(lambda: len(descriptors_of(spawner)) == len(before) - 1, "the connection and the descriptor are closed")


@pytest.mark.parametrize("wrong", ["none", "a file", "the reading end", "a socket", "an O_PATH descriptor"])
def test_a_log_that_is_no_writable_pipe_is_refused(spawner, client, bundle, wrong, tmp_path):
    reading, writing = os.pipe2(os.O_CLOEXEC)
    with socket.socket() as a_socket, open(tmp_path / "file", "w") as file:
        path = os.open(f"/proc/self/fd/{writing}", os.O_PATH)
        log = {"none": (), "a file": (file.fileno(),), "the reading end": (reading,), "a socket": (a_socket.fileno(),)}
        log["an O_PATH descriptor"] = (path,)
        with pytest.raises(Refusal, match="no_log_pipe"):
            client.call("spawn", log[wrong], id="worker0001", kind="app", app="a", bundle=bundle)
    for descriptor in (reading, writing, path):
        os.close(descriptor)
    assert spawner.leftovers() == {}


def test_a_flood_of_descriptors_leaves_none_behind(spawner):
    before, reading = descriptors_of(spawner), os.open("/dev/null", os.O_RDONLY)
    for _ in range(100):
        client = spawner.client()
        client.send("list", (reading,) * 250)
        assert client.receive()[0]["error"]["code"] == "too_large"
        client.close()
    os.close(reading)
    eventually(lambda: len(descriptors_of(spawner)) <= len(before), "every descriptor is closed")


def test_a_flood_of_refused_spawns_costs_neither_memory_nor_descriptors(spawner, client, bundle):
    reading, writing = os.pipe2(os.O_CLOEXEC)
    request = {"id": "worker0001", "kind": "app", "app": "a", "bundle": "missing"}

    def flood(times):
        for _ in range(times):
            with pytest.raises(Refusal):
                client.call("spawn", (writing,), **request)
            eventually(lambda: not client.call("list")["workers"], "it is forgotten")

    flood(20)
    before, memory = descriptors_of(spawner), resident_kilobytes(spawner)
    flood(100)
    assert descriptors_of(spawner) == before
    assert resident_kilobytes(spawner) < memory + 2048
    assert client.call("list")["workers"] == []
    os.close(reading)
    os.close(writing)


def test_a_peer_that_never_reads_loses_its_connection_and_stops_nobody(spawner, client):
    deaf = spawner.client()
    deaf.socket.settimeout(5)
    with pytest.raises((ConnectionError, TimeoutError)):  # noqa: PT012
        for _ in range(100_000):
            deaf.send("list")
    assert client.call("list")["workers"] == []


def test_a_flood_of_refusals_waits_for_its_turns(client):
    began = time.monotonic()
    for _ in range(100):
        client.send("stop", id="worker0001")
    for _ in range(100):
        assert client.receive()[0]["error"]["code"] == "unknown_worker"
    assert time.monotonic() - began > 100 * 0.05  # else it would fill the audit


def test_a_flood_of_connections_that_are_not_understood_waits_for_its_turns(spawner):
    began = time.monotonic()
    for _ in range(60):
        client = spawner.client(greet=False)
        client.socket.send(b"hello")
        client.socket.recv(65536)
        client.close()
    waited = time.monotonic() - began
    assert waited > 60 / 8 * 0.05 * 0.8  # eight at a time, each of which keeps its place for a moment


def test_a_program_that_cannot_be_run_is_said_at_once(stopped_spawner):
    stopped_spawner.configure(bwrap_path="/nonexistent/bwrap")
    stopped_spawner.start()
    client = stopped_spawner.client()
    with pytest.raises(Refusal, match="exec_failed: Check that /nonexistent/bwrap runs"):
        stopped_spawner.spawn(client, "worker0001", stopped_spawner.bundle("b", {"app.R": WAITING}))
    eventually(lambda: stopped_spawner.leftovers() == {}, "nothing is left")
    assert client.call("list")["workers"] == []


def test_a_sandbox_that_fails_ends_at_once_with_its_own_words(stopped_spawner):
    stopped_spawner.configure(r_path="/nonexistent/R")
    stopped_spawner.start()
    client = stopped_spawner.client()
    worker = stopped_spawner.spawn(client, "worker0001", stopped_spawner.bundle("b", {"app.R": WAITING}))
    assert stopped_spawner.result(client, "worker0001")["status"] == 1
    assert "/nonexistent/R" in worker.output()


def test_a_killed_client_leaves_the_spawner_at_work(spawner):
    child = os.fork()
    if child == 0:
        spawner.client().send("list")
        os.kill(os.getpid(), signal.SIGKILL)
    os.waitpid(child, 0)
    assert spawner.client().call("list")["workers"] == []
