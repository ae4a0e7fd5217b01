"""A real spawner in a directory of its own: real uids, a real cgroup2 mount, real bwrap and R."""

import contextlib
import ctypes
import itertools
import json
import os
import platform
import pwd
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import msgpack
import pytest

from blockyard_api.hardening import bpf, seccomp

# asm/unistd.h; syscall(2) passes them to the kernel for this thread, the C library's functions do so for all threads.
_SETRESUID, _SETRESGID = (147, 149) if platform.machine() == "aarch64" else (117, 119)
_PF_EXITING = 4  # linux/sched.h, a flag of proc(5)'s stat
_libc = ctypes.CDLL(None, use_errno=True)
_numbers = itertools.count(os.getpid() % 200 * 20)

API_USER = "blockyard-test"
DEADLINE = 30.0
PROLOGUE = 'tell <- function(x) { cat("TOLD ", x, "\\n", sep = ""); flush(stdout()) }\n'
EXAMPLES = Path(__file__).parents[2] / "examples"


class Refusal(Exception):
    """The spawner's error reply."""

    def __init__(self, code: str, message: str) -> None:
        super().__init__(f"{code}: {message}")
        self.code = code
        self.message = message


class Client:
    """A small synchronous client that can also misbehave."""

    def __init__(self, path: Path) -> None:
        self.socket = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self.socket.settimeout(DEADLINE)
        self.socket.connect(str(path))
        self._seq = itertools.count(1)

    def send(self, op: str, descriptors: tuple[int, ...] = (), **fields: object) -> int:
        """Send a request without waiting for its reply; return its number."""
        seq = next(self._seq)
        self.send_raw(msgpack.packb({"op": op, "seq": seq, **fields}), descriptors)
        return seq

    def send_raw(self, packet: bytes, descriptors: tuple[int, ...] = ()) -> None:
        socket.send_fds(self.socket, [packet], list(descriptors))

    def receive(self) -> tuple[dict[str, Any], int | None]:
        """Return a reply and its descriptor. Raises EOFError when the spawner closed the connection."""
        try:
            packet, descriptors, _, _ = socket.recv_fds(self.socket, 65536, 4)
        except ConnectionError as error:
            raise EOFError from error
        if not packet:
            raise EOFError
        return msgpack.unpackb(packet), descriptors[0] if descriptors else None

    def call(self, op: str, descriptors: tuple[int, ...] = (), **fields: object) -> dict[str, Any]:
        """Send a request and return the reply's map; a descriptor comes under "descriptor". Raises Refusal."""
        seq = self.send(op, descriptors, **fields)
        message, descriptor = self.receive()
        assert message["seq"] in (seq, None)  # None: what was sent is no request
        if "error" in message:
            raise Refusal(**message["error"])
        return {**message["ok"], **({} if descriptor is None else {"descriptor": descriptor})}

    def hello(self) -> dict[str, Any]:
        return self.call("hello", version=1)

    def close(self) -> None:
        self.socket.close()


@dataclass
class Running:
    """A worker as the API would hold it: the spawner's reply, its pidfd, and its log so far."""

    id: str
    uid: int
    pid: int
    cgroup: str
    pidfd: int
    socket: Path
    lines: list[str] = field(default_factory=list)
    reader: threading.Thread | None = None

    def output(self) -> str:
        """Return everything that it wrote, once it has ended."""
        self.reader.join(DEADLINE)
        return "".join(self.lines)

    def wait_for_output(self, text: str) -> None:
        eventually(lambda: text in "".join(self.lines), f"{text!r} in the log", lambda: "".join(self.lines))

    def connect(self) -> socket.socket:
        """Connect to the app's socket as soon as it listens."""

        def attempt() -> socket.socket | None:
            with contextlib.suppress(FileNotFoundError, ConnectionRefusedError):
                return self.connect_once()
            return None

        return eventually(attempt, "the app listens", lambda: "".join(self.lines))

    def connect_once(self) -> socket.socket:
        connection = socket.socket(socket.AF_UNIX)
        try:
            connection.connect(str(self.socket))
        except OSError:
            connection.close()
            raise
        return connection

    def get(self, path: str = "/") -> str:
        """Return a whole HTTP response of the app."""
        with self.connect() as connection:
            connection.settimeout(DEADLINE)
            connection.sendall(f"GET {path} HTTP/1.1\r\nHost: test\r\nConnection: close\r\n\r\n".encode())
            return b"".join(iter(lambda: connection.recv(65536), b"")).decode()


def eventually(
    condition: Callable[[], Any], what: str, detail: Callable[[], str] = str, seconds: float = DEADLINE
) -> Any:
    """Return the first true value of `condition`; fail after the deadline."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if value := condition():
            return value
        time.sleep(0.01)
    return pytest.fail(f"it did not come to pass that {what}. {detail()}")


def processes_of(uids: range) -> list[int]:
    """List the processes that have a uid of a range, whatever they did to hide it."""
    found = []
    for status in Path("/proc").glob("[0-9]*/status"):
        with contextlib.suppress(OSError):
            fields = dict(line.split(":", 1) for line in status.read_text().splitlines() if ":" in line)
            if int(fields["Uid"].split()[0]) in uids and "Z" not in fields["State"]:
                found.append(int(status.parent.name))
    return found


def is_exiting(pid: int) -> bool:
    """Tell whether a process has run its last instruction. When its cgroup counts it no more, it is not dead yet."""
    with contextlib.suppress(OSError):
        return bool(int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[6]) & _PF_EXITING)
    return True


def api_user() -> pwd.struct_passwd:
    """Return the user that plays the API, made if missing."""
    with contextlib.suppress(KeyError):
        return pwd.getpwnam(API_USER)
    subprocess.run(["useradd", "--system", "--no-create-home", "--shell", "/usr/sbin/nologin", API_USER], check=True)
    return pwd.getpwnam(API_USER)


@contextlib.contextmanager
def acting_as(uid: int, gid: int) -> Iterator[None]:
    """Have another uid for what the kernel looks at when a socket is connected or a file opened.

    In this thread alone: os.seteuid() changes all, and a test's others serve, connect and kill meanwhile.
    """
    _change(_SETRESGID, gid)
    try:
        _change(_SETRESUID, uid)
        yield
    finally:
        _change(_SETRESUID, 0)
        _change(_SETRESGID, 0)


def _change(call: int, effective: int) -> None:
    if _libc.syscall(call, -1, effective, -1):
        raise OSError(ctypes.get_errno(), f"system call {call} to {effective}")


def cgroup_mount() -> Path:
    """Find the cgroup2 mount, wherever it is."""
    mounts = [line.split() for line in Path("/proc/self/mountinfo").read_text().splitlines() if " - cgroup2 " in line]
    if not mounts:
        pytest.fail("These tests need a cgroup2 mount: mount -t cgroup2 none /sys/fs/cgroup/unified")
    return Path(mounts[0][4])


@dataclass
class Spawner:
    """A running spawner in a directory of its own."""

    root: Path
    uids: range
    cgroup_root: Path
    settings: dict[str, object]
    tables: str = ""
    module: str = "blockyard_spawner.main"
    prefix: tuple[str, ...] = ()  # a program that runs the spawner
    arguments: tuple[str, ...] = ()
    process: subprocess.Popen[bytes] | None = None
    workers: list[Running] = field(default_factory=list)
    clients: list[Client] = field(default_factory=list)

    @property
    def socket(self) -> Path:
        return self.root / "spawner.sock"

    @property
    def config(self) -> Path:
        return self.root / "blockyard.toml"

    @property
    def state_dir(self) -> Path:
        return self.root / "state"

    @property
    def runtime_dir(self) -> Path:
        return self.root / "run"

    def configure(self, tables: str = "", **settings: object) -> None:
        """Write the configuration: [process] from `settings`, other tables as they are given."""
        self.settings |= settings
        self.tables = tables or self.tables
        process = "\n".join(f"{name} = {json.dumps(value)}" for name, value in self.settings.items())
        storage = "" if "[storage]" in self.tables else f'[storage]\nstate_dir = "{self.state_dir}"\n'
        self.config.write_text(f"{storage}{self.tables}\n[process]\n{process}\n")
        self.config.chmod(0o644)

    def start(self) -> None:
        """Start the spawner; return when it accepts connections."""
        arguments = self.arguments or ("--socket", str(self.socket))
        argv = [*self.prefix, sys.executable, "-m", self.module, *arguments, "--config", str(self.config)]
        with (self.root / "audit.jsonl").open("ab") as audit:
            self.process = subprocess.Popen(argv, stderr=audit, cwd="/")
        eventually(lambda: self.process.poll() is not None or self._accepts(), "the spawner starts", self.audit_text)
        assert self.process.poll() is None, self.audit_text()

    def _accepts(self) -> bool:
        with contextlib.suppress(OSError, EOFError), contextlib.closing(Client(self.socket)) as client:
            return bool(client.hello())
        return False

    def end(self, number: int = signal.SIGTERM) -> int:
        """End the spawner, and return its exit status; its workers go on."""
        for client in self.clients:
            client.close()
        self.clients.clear()
        self.process.send_signal(number)
        return self.process.wait(DEADLINE)

    def client(self, *, greet: bool = True, user: pwd.struct_passwd | None = None) -> Client:
        """Connect; as the API's user unless another is given."""
        user = user or api_user()
        with acting_as(user.pw_uid, user.pw_gid):
            client = Client(self.socket)
        self.clients.append(client)
        if greet:
            client.hello()
        return client

    def bundle(self, name: str, files: Mapping[str, str] | Path) -> str:
        """Put a bundle where the API would."""
        target = self.state_dir / "bundles" / name
        if isinstance(files, Path):
            shutil.copytree(files, target, symlinks=True)
        else:
            target.mkdir(parents=True)
            for path, text in files.items():
                (target / path).parent.mkdir(parents=True, exist_ok=True)
                (target / path).write_text(text)
        for path in [target, *target.rglob("*")]:
            if not path.is_symlink():
                path.chmod(0o755 if path.is_dir() else 0o644)
        return name

    def spawn(self, client: Client, worker: str, bundle: str, *, unread: bool = False, **fields: object) -> Running:
        """Start a worker and read its log in the background, or close it unread. Raises Refusal."""
        reading, writing = os.pipe2(os.O_CLOEXEC)
        try:
            request = {"id": worker, "kind": "app", "app": "an-app", "bundle": bundle, **fields}
            ok = client.call("spawn", (writing,), **request)
        except BaseException:
            os.close(reading)
            raise
        finally:
            os.close(writing)
        place = self.runtime_dir / worker / "app.sock"
        running = Running(worker, ok["uid"], ok["pid"], ok["cgroup"], ok["descriptor"], place)

        def read() -> None:
            with open(reading, encoding="utf-8", errors="replace") as log:
                for line in () if unread else log:
                    running.lines.append(line)

        running.reader = threading.Thread(target=read, daemon=True)
        running.reader.start()
        self.workers.append(running)
        return running

    def run_r(self, client: Client, worker: str, code: str, **fields: object) -> Running:
        """Start a worker whose app.R is `code`."""
        return self.spawn(client, worker, self.bundle(f"bundle-{worker}", {"app.R": code}), **fields)

    def audit(self) -> list[dict[str, str]]:
        return [json.loads(line) for line in self.audit_text().splitlines() if line.startswith("{")]

    def audit_text(self) -> str:
        return (self.root / "audit.jsonl").read_text()

    def result(self, client: Client, worker: str) -> dict[str, Any]:
        """Return how a worker ended, once it has."""

        def ask() -> dict[str, Any] | None:
            found = client.call("list", id=worker)
            if "descriptor" in found:
                os.close(found["descriptor"])
            return found["workers"][0]["result"]

        return eventually(ask, f"worker {worker} ends", self.audit_text)

    def leftovers(self) -> dict[str, list[str]]:
        """Everything of workers that is on the host: all three are empty when all is well."""
        cgroups = [path.name for path in (self.cgroup_root / "workers").glob("*/")]
        directories = [path.name for path in self.runtime_dir.iterdir()]
        processes = [str(pid) for pid in processes_of(self.uids) if not is_exiting(pid)]
        left = {"cgroups": cgroups, "directories": directories, "processes": processes}
        return {name: found for name, found in left.items() if found}

    def remove(self) -> None:
        """End everything, whatever state a failed test left it in."""
        if self.process and self.process.poll() is None:
            self.end(signal.SIGKILL)
        with contextlib.suppress(FileNotFoundError):
            (self.cgroup_root / "cgroup.kill").write_text("1")
        eventually(lambda: not processes_of(self.uids), "all processes are gone")
        for directory in sorted(self.cgroup_root.rglob("*/"), key=lambda path: -len(path.parts)):
            directory.rmdir()
        with contextlib.suppress(FileNotFoundError):
            self.cgroup_root.rmdir()
        shutil.rmtree(self.root)
        for worker in self.workers:
            os.close(worker.pidfd)


def configured_spawner() -> Spawner:
    """Return a spawner with uids, a cgroup and directories of its own, that is not started."""
    user, number = api_user(), next(_numbers) % 4000
    root = Path(tempfile.mkdtemp(prefix="blockyard-"))
    root.chmod(0o711)
    uids = range(70000 + number * 16, 70000 + number * 16 + 16)
    spawner = Spawner(root, uids, cgroup_mount() / f"blockyard-test-{os.getpid()}-{number}", {})
    spawner.cgroup_root.mkdir()
    for name in ("bundles", "libraries"):
        (spawner.state_dir / name).mkdir(parents=True)
    for directory in (spawner.state_dir, *spawner.state_dir.iterdir()):
        directory.chmod(0o711)
        os.chown(directory, user.pw_uid, user.pw_gid)
    system_calls = root / "seccomp.bpf"
    system_calls.write_bytes(seccomp.compiled(seccomp.read_policy(), bpf.native()))
    spawner.configure(
        api_user=user.pw_name,
        seccomp_profile=str(system_calls),
        runtime_dir=str(spawner.runtime_dir),
        cgroup_root=str(spawner.cgroup_root),
        worker_uid_range_start=uids[0],
        worker_uid_range_end=uids[-1],
        allow_unlimited=True,
    )
    return spawner


def told(spawner: Spawner, client: Client, code: str, **fields: object) -> list[str]:
    """Run R code in a worker and return what it told, in lines."""
    worker = spawner.run_r(client, f"worker{len(spawner.workers):04}", f"{PROLOGUE}{code}\nquit()", **fields)
    spawner.result(client, worker.id)
    lines = [line.removeprefix("TOLD ").rstrip("\n") for line in worker.output().splitlines() if "TOLD " in line]
    assert lines, worker.output() + spawner.audit_text()
    return lines
