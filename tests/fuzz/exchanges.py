"""Whole conversations with a live spawner of an ordinary user, by somebody who has taken the API over."""

import array
import concurrent.futures
import contextlib
import itertools
import os
import random
import socket
import sys
import tempfile
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import msgpack
import mutation
from watched import Watch

sys.path.append(str(Path(__file__).parents[1] / "host"))

from running_spawner import Client, Spawner, api_user, eventually

_IDS = [f"worker{number:04}" for number in range(6)]
_AT_ONCE = 4
_STRANGE = [
    None,
    True,
    False,
    -1,
    0,
    1.5,
    2**32,
    2**63,
    "",
    "..",
    "a" * 70,
    "\0",
    b"x",
    [],
    {},
    ["x"],
    {"x": 1},
    float("nan"),
]
_FIELDS = [
    "op",
    "seq",
    "id",
    "kind",
    "app",
    "bundle",
    "library",
    "data",
    "env",
    "network",
    "limits",
    "grace",
    "after",
    "uid",
]


@contextlib.contextmanager
def unprivileged_spawner() -> Iterator[Spawner]:
    """Start a spawner of an ordinary user, whose apps end as soon as they begin."""
    user = api_user()
    with tempfile.TemporaryDirectory(prefix="by-fuzz-") as directory:
        root = Path(directory, "spawner")
        spawner = Spawner(root, range(0), Path("/nonexistent/cgroup"), {})
        for name in ("bundles", "libraries"):
            (spawner.state_dir / name).mkdir(parents=True)
        for path in (Path(directory), root, spawner.state_dir, *spawner.state_dir.iterdir()):
            path.chmod(0o755)
            os.chown(path, user.pw_uid, user.pw_gid)
        spawner.configure(
            api_user=user.pw_name,
            runtime_dir=str(spawner.runtime_dir),
            cgroup_root=str(spawner.cgroup_root),
            r_path="/usr/bin/true",
            seccomp_profile="",  # what is fuzzed is the exchange; the apps are none
            worker_uid_range_start=70000,
            worker_uid_range_end=70015,
            allow_unlimited=True,
        )
        spawner.bundle("b", {"app.R": ""})
        spawner.prefix = ("setpriv", f"--reuid={user.pw_uid}", f"--regid={user.pw_gid}", "--clear-groups")
        spawner.arguments = ("--socket", str(spawner.socket), "--unprivileged")
        spawner.start()
        try:
            yield spawner
        finally:
            for client in spawner.clients:
                client.close()
            spawner.process.kill()
            spawner.process.wait()


def _request(chance: random.Random, numbers: Iterator[int]) -> dict[str, object]:
    wish: dict[str, object] = {
        "op": chance.choice(["hello", "list", "list", "stop", "spawn", "spawn"]),
        "seq": next(numbers),
    }
    match wish["op"]:
        case "hello":
            wish["version"] = chance.choice([1, 1, 1, 2])
        case "list":
            wish |= chance.choice([{}, {"id": chance.choice(_IDS)}, {"after": chance.choice(_IDS)}])
        case "stop":
            wish |= {"id": chance.choice(_IDS), "grace": chance.choice([0, 1, 50])}
        case "spawn":
            new = f"{chance.randrange(2**64):016x}"  # ids of ended workers stay in use for long
            wish |= {
                "id": chance.choice([*_IDS, *[new] * 10]),
                "kind": "app",
                "app": "demo",
                "bundle": chance.choice(["b", "b", "none"]),
            }
    for _ in range(chance.choice([0, 0, 0, 1, 2])):
        wish[chance.choice(_FIELDS)] = chance.choice(_STRANGE)
    return wish


def _send(chance: random.Random, connection: socket.socket, packet: bytes) -> None:
    reading, writing = os.pipe2(os.O_CLOEXEC)
    null = os.open("/dev/null", os.O_RDWR | os.O_CLOEXEC)
    try:
        given = chance.choice([[], *[[writing]] * 6, [reading], [null], [writing, writing], [null] * 100])
        socket.send_fds(connection, [packet], given)
    finally:
        for descriptor in (reading, writing, null):
            os.close(descriptor)


def _receive(connection: socket.socket) -> dict[str, object] | None:
    """Return one reply, checked; None at the end of the connection."""
    try:
        packet, control, _, _ = connection.recvmsg(65536, socket.CMSG_LEN(16), socket.MSG_CMSG_CLOEXEC)
    except ConnectionError:
        return None
    descriptors = array.array("i")
    for _, _, data in control:
        descriptors.frombytes(data)
    for descriptor in descriptors:
        os.close(descriptor)
    if not packet:
        return None
    reply = msgpack.unpackb(packet)
    assert set(reply) in ({"seq", "ok"}, {"seq", "error"}), reply
    if "error" in reply:
        assert set(reply["error"]) == {"code", "message"}, reply
        assert "Traceback" not in reply["error"]["message"], reply
    return reply


def _converse(spawner: Spawner, chance: random.Random) -> int:
    numbers = itertools.count(1)
    connection = Client(spawner.socket).socket
    sent = 0
    with contextlib.closing(connection), contextlib.suppress(ConnectionError, BrokenPipeError):
        if chance.random() < 0.9:
            connection.send(msgpack.packb({"op": "hello", "seq": next(numbers), "version": 1}))
            if _receive(connection) is None:
                return sent
        for _ in range(chance.choice([1, 2, 4, 8])):
            packet = msgpack.packb(_request(chance, numbers))
            if chance.random() < 0.25:
                packet = mutation.damaged(chance, packet)
            if not packet:
                continue
            _send(chance, connection, packet)
            sent += 1
            if chance.random() < 0.9 and _receive(connection) is None:
                break
    return sent


def _is_well(spawner: Spawner, client: Client) -> None:
    """Fail unless a peer that keeps to the protocol is answered."""
    assert spawner.process.poll() is None, spawner.audit_text()[-3000:]
    assert all(set(worker) >= {"id", "state", "result"} for worker in client.call("list")["workers"])


def exchanges(seconds: float, seed: int) -> str:
    """Hostile conversations: the spawner goes on answering, and uses no more than before."""
    chance = random.Random(seed)
    with unprivileged_spawner() as spawner:
        spawned = Path(f"/proc/{spawner.process.pid}").resolve()
        watch = Watch(int(spawned.name))
        client = spawner.client()
        watch.remember()
        end, conversations, packets = time.monotonic() + seconds, 0, 0
        with concurrent.futures.ThreadPoolExecutor(_AT_ONCE) as peers:
            while time.monotonic() < end:
                chances = [random.Random(chance.randrange(2**64)) for _ in range(_AT_ONCE)]
                packets += sum(peers.map(partial(_converse, spawner), chances))
                conversations += _AT_ONCE
                _is_well(spawner, client)
                if conversations == 25 * _AT_ONCE:
                    _all_ended(client)
                    watch.remember()
        _all_ended(client)
        watch.holds(4 << 10)
        assert "Traceback" not in spawner.audit_text(), spawner.audit_text()[-3000:]
        assert list(spawner.runtime_dir.iterdir()) == []
        kinds = [entry["BLOCKYARD_RESULT"] for entry in spawner.audit() if entry.get("BLOCKYARD_RESULT")]
        return f"{conversations} conversations, {packets} packets, {kinds.count('ok')} starts and stops, {len(kinds)} entries"


def _all_ended(client: Client) -> None:
    def ended() -> bool:
        page: dict[str, Any] = {"more": True, "workers": []}
        while page["more"]:
            page = client.call("list", after=page["workers"][-1]["id"] if page["workers"] else None)
            if not all(worker["result"] for worker in page["workers"]):
                return False
        return True

    eventually(ended, "every worker ends")
