"""The real pair in a directory of its own: a spawner as root, an API as an ordinary user, R in bubblewrap.

The listening sockets belong to the test, as they belong to systemd on a server: an API that is restarted gets the same
ones, so that no connection is refused meanwhile.
"""

import contextlib
import functools
import io
import json
import os
import pwd
import shutil
import signal
import socket
import subprocess
import sys
import tarfile
import tempfile
import time
from pathlib import Path

import httpx
from websockets.sync.client import connect

USER = "blockyard-test"
HELLO = Path(__file__).parents[3] / "examples" / "hello"
PATIENCE = float(os.environ.get("TESTS_PATIENCE", "1"))  # how many times longer to wait: an emulated machine is slow


def cgroup2_mount():
    for line in Path("/proc/self/mountinfo").read_text().splitlines():
        fields, _, rest = line.partition(" - ")
        if rest.startswith("cgroup2 "):
            return Path(fields.split()[4])
    raise AssertionError("no cgroup2 mount: this machine cannot run the pair")


def ensure_user():
    try:
        return pwd.getpwnam(USER)
    except KeyError:
        subprocess.run(["useradd", "--system", "--user-group", "--no-create-home", USER], check=True)
        return pwd.getpwnam(USER)


@functools.cache
def compiled_filter():
    """Compile the workers' system call filter, which every pair runs with."""
    from blockyard_api.hardening import bpf, seccomp  # noqa: PLC0415 - not in the machines, which start no pair

    return seccomp.compiled(seccomp.read_policy(), bpf.native())


def archive(files):
    """Pack {name: text} into a .tar.gz."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz") as tar:
        for name, text in files.items():
            info = tarfile.TarInfo(name)
            data = text.encode()
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return buffer.getvalue()


def wait_for(condition, seconds=20, what="the condition"):
    """Ask again and again, more seldom the longer it takes: an emulated machine would do little else than answer."""
    seconds *= PATIENCE
    began = time.monotonic()
    while (passed := time.monotonic() - began) < seconds:
        if result := condition():
            return result
        time.sleep(min(max(0.02, passed / 20), 0.5))
    raise AssertionError(f"{what} did not come about within {seconds:.0f} s")


def read_until_closed(socket_, patience, each=lambda: None):
    """Read messages until the connection is closed, which raises ConnectionClosed."""
    for _ in range(1000):
        socket_.recv(patience * PATIENCE)
        each()


def simple_app(body="", ui="fluidPage('plain page')", server="function(input, output, session) {}"):
    return {"app.R": f"library(shiny)\n{body}\nshinyApp({ui}, {server})\n"}


class Server:
    """A running server, and what an administrator and visitors do with it."""

    def __init__(self, control_url, relay_origin, token=""):
        self.control_url, self.relay_origin = control_url, relay_origin
        self.log_in(token)

    def log_in(self, token):
        self.token = token
        authorization = {"Authorization": f"Bearer {token}"}
        self.http = httpx.Client(base_url=self.control_url, headers=authorization, timeout=60 * PATIENCE)

    def deploy(self, name, files, **settings):
        """Make the app if need be, deploy, open it to the public; return the finished task."""
        self.http.post("/api/v1/apps", json={"name": name})
        content = files if isinstance(files, bytes) else archive(files)
        answer = self.http.post(f"/api/v1/apps/{name}/bundles", content=content)
        assert answer.status_code == 202, answer.text
        log = self.http.get(f"/api/v1/tasks/{answer.json()['task_id']}/logs").text
        task = self.http.get(f"/api/v1/tasks/{answer.json()['task_id']}").json()
        assert task["status"] == "completed", log
        changed = self.http.patch(f"/api/v1/apps/{name}", json={"access_type": "public", **settings})
        assert changed.status_code == 200, changed.text
        return answer.json()

    def runtime(self, name):
        return self.http.get(f"/api/v1/apps/{name}/runtime").json()

    def workers(self, name, *states):
        return [w for w in self.runtime(name)["workers"] if w["status"] in (states or ("active", "draining"))]

    def visitor(self):
        return Visitor(self)


class Pair(Server):
    """A running pair of one's own: it can be killed, and started again."""

    def __init__(
        self, name, settings="", state_mount=None, first_uid=200_000, last_uid=200_999, network=None, preflight=False
    ):
        """`network` is a network namespace that both daemons run in, `preflight` has them checked at start.

        Without it, whether a test can start a pair would depend on what else this machine runs.
        """
        self.network = network
        self.user = ensure_user()
        self.root = Path(tempfile.mkdtemp(prefix=f"blockyard-{name[:20]}-"))
        self.root.chmod(0o711)
        self.state = self.root / "state"
        self.state.mkdir()
        if state_mount:
            subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={state_mount}", "tmpfs", str(self.state)], check=True)
        self.mounted = bool(state_mount)
        os.chown(self.state, self.user.pw_uid, self.user.pw_gid)
        self.runtime_dir = self.root / "run" / "workers"
        self.filter = self.root / "seccomp.bpf"
        self.filter.write_bytes(compiled_filter())
        self.cgroup = cgroup2_mount() / self.root.name
        self.cgroup.mkdir()
        self.spawner_socket = self.root / "run" / "spawner.sock"
        self.spawner_socket.parent.mkdir()
        self.sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(2)]
        control, relay = (sock.getsockname()[1] for sock in self.sockets)
        super().__init__(f"http://127.0.0.1:{control}", f"http://127.0.0.1:{relay}")
        self.config = self.root / "blockyard.toml"
        lines = {
            "storage": [f'state_dir = "{self.state}"'],
            "process": [
                f'runtime_dir = "{self.runtime_dir}"',
                f'spawner_socket = "{self.spawner_socket}"',
                f'cgroup_root = "{self.cgroup}"',
                f'api_user = "{USER}"',
                f'seccomp_profile = "{self.filter}"',
                f"worker_uid_range_start = {first_uid}",
                f"worker_uid_range_end = {last_uid}",
                "allow_unlimited = true",
            ],
            "proxy": [f'public_url = "{self.relay_origin}/app/{{app}}/"'],
            "server": [] if preflight else ["skip_preflight = true"],
        }
        for line in settings.strip().splitlines():
            key, _, value = line.partition("=")
            section, _, name_ = key.strip().partition(".")
            others = [each for each in lines.get(section, []) if not each.startswith(f"{name_} = ")]
            lines[section] = [*others, f"{name_} = {value.strip()}"]
        self.config.write_text("".join(f"[{s}]\n" + "\n".join(each) + "\n" for s, each in lines.items()))
        self.spawner = self.api = None
        self.logs = {part: (self.root / f"{part}.log").open("ab") for part in ("spawner", "api")}

    def __enter__(self):
        self.start_spawner()
        printed = subprocess.run(
            [*self._as_user(), sys.executable, "-m", "blockyard_api.main", "--config", self.config, "token", "--init"],
            check=True, capture_output=True, text=True, cwd="/", timeout=60,
        )  # fmt: skip
        self.log_in(Path(printed.stdout.strip()).read_text().strip())
        self.start_api()
        return self

    def _as_user(self):
        return [*self._within(), "setpriv", "--reuid", USER, "--regid", USER, "--clear-groups"]

    def _within(self):
        return ["nsenter", f"--net=/run/netns/{self.network}", "--"] if self.network else []

    def start_spawner(self):
        self.spawner_socket.unlink(missing_ok=True)
        self.spawner = subprocess.Popen(
            [
                *self._within(), sys.executable, "-m", "blockyard_spawner.main",
                "--config", self.config, "--socket", self.spawner_socket,
            ],
            stdout=self.logs["spawner"], stderr=self.logs["spawner"], cwd="/",
        )  # fmt: skip
        wait_for(self.spawner_socket.exists, what="the spawner's socket")

    def start_api(self):
        self.launch_api()
        wait_for(lambda: self.http.get("/readyz").status_code == 200, what="readiness")

    def launch_api(self):
        passed = [sock.fileno() for sock in self.sockets]

        def arrange():
            high = [os.dup2(number, 100 + index) for index, number in enumerate(passed)]
            for index, number in enumerate(high):
                os.dup2(number, 3 + index)
                os.set_inheritable(3 + index, True)

        command = [sys.executable, "-m", "blockyard_api.main", "--config", str(self.config)]
        self.api = subprocess.Popen(
            [*self._as_user(), "sh", "-c", 'LISTEN_PID=$$ LISTEN_FDS=2 exec "$@"', "sh", *command],
            stdout=self.logs["api"], stderr=self.logs["api"], cwd="/", preexec_fn=arrange, close_fds=False,  # noqa: PLW1509 - as systemd passes sockets
        )  # fmt: skip

    def __exit__(self, *_):
        for process in (self.api, self.spawner):
            if process is not None and process.poll() is None:
                process.terminate()
                try:
                    process.wait(20)
                except subprocess.TimeoutExpired:
                    process.kill()
                    process.wait()
        for directory in sorted(self.cgroup.glob("workers/*/"), reverse=True):
            (directory / "cgroup.kill").write_text("1")
        wait_for(lambda: not self._cgroup_pids(), what="an empty cgroup")
        wait_for(self._remove_cgroup, what="the cgroup's removal")
        for sock in self.sockets:
            sock.close()
        for log in self.logs.values():
            log.close()
        self.http.close()
        if self.mounted:
            subprocess.run(["umount", "-l", str(self.state)], check=True)
        shutil.rmtree(self.root)

    def _remove_cgroup(self):
        try:
            for directory in sorted((path for path in self.cgroup.rglob("*") if path.is_dir()), reverse=True):
                directory.rmdir()
            self.cgroup.rmdir()
        except OSError:  # a process that was killed just now is still on its way out
            return False
        return True

    def runtime_dirs(self):
        return self.runtime_dir.iterdir()

    def _cgroup_pids(self):
        return [pid for file in self.cgroup.rglob("cgroup.procs") for pid in file.read_text().split()]

    # --- what an administrator does to it

    def kill(self, which, number=signal.SIGKILL):
        process = getattr(self, which)
        process.send_signal(number)
        process.wait(30)

    def log(self, which):
        return (self.root / f"{which}.log").read_text(errors="replace")


class Visitor:
    """A visitor with a cookie jar; pages are asked for as a browser does where `browser` says so."""

    def __init__(self, pair):
        self.pair = pair
        self.http = httpx.Client(base_url=pair.relay_origin, timeout=60 * PATIENCE)

    def get(self, path, browser=False, **headers):
        accept = {"Accept": "text/html,*/*"} if browser else {}
        return self.http.get(path, headers={**accept, **headers})

    def websocket(self, name, origin=None, path="websocket/", **headers):
        cookies = "; ".join(f"{key}={value}" for key, value in self.http.cookies.items())
        return connect(
            f"{self.pair.relay_origin.replace('http', 'ws')}/app/{name}/{path}",
            origin=origin or self.pair.relay_origin,
            additional_headers={**headers, **({"Cookie": cookies} if cookies else {})},
            open_timeout=30 * PATIENCE,
            close_timeout=2,
        )

    @contextlib.contextmanager
    def shiny(self, name):
        """Open the page and a Shiny session, and yield the WebSocket after its first message."""
        assert self.get(f"/app/{name}/").status_code == 200
        with self.websocket(name) as socket_:
            socket_.send(json.dumps({"method": "init", "data": {".clientdata_url_search": ""}}))
            self.hello = json.loads(socket_.recv(10 * PATIENCE))
            yield socket_
