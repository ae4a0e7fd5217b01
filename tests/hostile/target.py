"""The server under attack, on this host or in a booted machine, and how one comes to be its hostile app."""

import io
import json
import os
import re
import subprocess
import tarfile
from dataclasses import dataclass
from pathlib import Path

from running_pair import Server, wait_for

PLACE = Path(__file__).parent
PROGRAMS = PLACE / "programs"
CANARY = "CANARY-of-another-app"
READY = 300  # seconds for a first page, under emulation and on a busy machine


@dataclass
class Worker:
    """A running worker, seen from the host."""

    id: str
    uid: int
    pid: int  # of its R


@dataclass
class Target:
    """A server, and where it keeps what the attacks are after."""

    server: Server
    config: Path
    python: str  # the interpreter that the server itself runs with
    user: str  # whom its API runs as
    state: Path
    runtime: Path
    cgroup: Path  # the one that holds workers/
    spawner_socket: Path
    tmp_size: int
    processes: int  # how many a swarm has: fewer under emulation

    def worker(self, app):
        """The one active worker of an app."""
        (record,) = wait_for(lambda: self.server.workers(app, "active"), READY, f"an active worker of {app}")
        for pid in (self.cgroup / "workers" / record["id"] / "cgroup.procs").read_text().split():
            words = Path(f"/proc/{pid}/cmdline").read_text().split("\0")
            if words[0].endswith("/exec/R"):
                return Worker(record["id"], (self.runtime / record["id"]).stat().st_uid, int(pid))
        raise AssertionError(f"no R in {record}")

    def end(self, app):
        """End an app's workers; return when nothing of them is listed."""
        self.server.http.post(f"/api/v1/apps/{app}/disable")
        wait_for(lambda: not self.server.workers(app), READY, f"the end of {app}")

    def last_worker(self, app):
        return self.server.runtime(app)["workers"][0]

    def api(self):
        """The process that holds the relay's connections."""
        listed = subprocess.run(
            ["pgrep", "--uid", self.user], capture_output=True, text=True, check=True
        ).stdout.split()
        words = {pid: Path(f"/proc/{pid}/cmdline").read_text() for pid in listed}
        ours = [pid for pid in listed if "blockyard" in words[pid] and "setpriv" not in words[pid]]
        mine = [pid for pid in ours if str(self.config) in words[pid]]
        return int((mine or ours)[0])

    def spawner(self):
        """The pid of the root helper behind the socket."""
        listed = subprocess.run(["pgrep", "--full", "blockyard_spawner.main|bin/blockyard-spawner"],
                                capture_output=True, text=True, check=True).stdout.split()  # fmt: skip
        named = [pid for pid in listed if Path(f"/proc/{pid}/comm").read_text().strip() == "blockyard-spawn"]
        mine = [pid for pid in named if str(self.config) in Path(f"/proc/{pid}/cmdline").read_text() or len(named) == 1]
        assert len(mine) == 1, named
        return int(mine[0])

    def as_api(self, *command, within=240, **options):
        """Run a command as the API's uid, which is all that a taken-over API has."""
        return subprocess.run(
            ["setpriv", f"--reuid={self.user}", f"--regid={self.user}", "--init-groups", *map(str, command)],
            capture_output=True, text=True, timeout=within, check=False, cwd="/", **options,
        )  # fmt: skip

    def taken_over(self, *arguments, requests=()):
        """Have takeover.py do something as the API's uid; return what it tells, a value a line."""
        program = (PLACE / "takeover.py").read_text()  # handed over, since that uid may not be able to read it here
        lines = "".join(json.dumps(request) + "\n" for request in requests)
        done = self.as_api(self.python, "-c", program, *arguments, input=lines)
        assert done.returncode == 0, done.stderr
        return [json.loads(line) for line in done.stdout.splitlines()]


@dataclass
class Shell:
    """A hostile app that runs what it is told."""

    target: Target
    app: str
    bundle: str  # its directory's name below bundles/

    def __post_init__(self):
        self.visitor = self.target.server.visitor()
        self.visitor.http.timeout = READY

    def run(self, command):
        """Run a shell command inside the worker; return what it printed."""
        answer = self.visitor.http.get(f"/app/{self.app}/", params={"sh": command})
        assert answer.status_code == 200, answer.text
        assert re.search(r"status \d+$", answer.text), answer.text
        return answer.text.rpartition("status ")[0].strip()

    def weakened(
        self, command, *, off=(), uid=None, network="none", show=(), words=(), within=60, flags=(), bundle=None
    ):
        """Run a command in the same sandbox with layers switched off; return what it printed."""
        options = [] if uid is None else [f"--uid={uid}"]
        options += [*(f"--off={name}" for name in off), *(f"--show={path}" for path in show)]
        options += [f"--words={each}" for each in words] + list(flags)
        prelude = "cp /app/attack /tmp/attack; chmod 755 /tmp/attack;"
        options += ["--config", self.target.config, "--bundle", bundle or self.bundle, "--network", network]
        done = subprocess.run(
            [self.target.python, PLACE / "weakened.py", *options, f"--within={within}", prelude + command],
            capture_output=True, text=True, timeout=within + 60, check=False, cwd="/",
        )  # fmt: skip
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout.strip()


def packed(files):
    """Pack {name: text, bytes, or a path} into a .tar.gz."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz") as tar:
        for name, content in files.items():
            data = content.read_bytes() if isinstance(content, Path) else content
            data = data.encode() if isinstance(data, str) else data
            info = tarfile.TarInfo(name)
            info.size, info.mode = len(data), 0o755
            tar.addfile(info, io.BytesIO(data))
    return buffer.getvalue()


def compiled(directory):
    """Compile the attempts that need a system call of their own."""
    program = directory / "attack"
    subprocess.run(["gcc", "-O1", "-o", program, PROGRAMS / "attack.c"], check=True, timeout=120)
    return program


def deploy_shell(target, name, program, **settings):
    """Deploy the hostile app; it starts with the first command."""
    files = {"app.R": PROGRAMS / "app.R", "reach.py": PROGRAMS / "reach.py", "attack": program}
    settings = {"max_workers_per_app": 1, "max_sessions_per_worker": 500, **settings}
    made = target.server.deploy(name, packed(files), **settings)
    return Shell(target, name, made["bundle_id"])


def processes_of(uid):
    """The living processes of a uid."""
    found = []
    for place in Path("/proc").glob("[0-9]*"):
        try:
            status = (place / "status").read_text()
        except OSError:
            continue
        if re.search(rf"^Uid:\t{uid}\t", status, re.MULTILINE) and "\nState:\tZ" not in status:
            found.append(int(place.name))
    return found


def resident(pid):
    """A process's resident memory in bytes."""
    return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
