"""A container engine of the tests' own: dockerd on a private socket, in private directories, network and mounts.

Its bridges and rules are in a network namespace of its own, so that the machine's are untouched, and its mounts end
with it.
"""

import contextlib
import json
import os
import shutil
import signal
import subprocess
import tempfile
import time
from pathlib import Path
from typing import Self

PLACE = Path(__file__).parent
CHECKOUT = PLACE.parents[1]
IMAGE = "blockyard-worker:latest"
DEADLINE = 60.0
# crun wants one version of cgroups or the other; a machine may have both.
START = """
if [ -d /sys/fs/cgroup/memory ] && mountpoint -q /sys/fs/cgroup/unified; then umount /sys/fs/cgroup/unified; fi
ip link set lo up
exec "$@"
"""


def worker_image() -> Path:
    """Return the worker image's file."""
    made = subprocess.run([PLACE / "worker-image"], stdout=subprocess.PIPE, text=True, check=True, timeout=1500)
    return Path(made.stdout.strip())


class Dockerd:
    """One dockerd and its containerd."""

    def __init__(self, group: int) -> None:
        self.root = Path(tempfile.mkdtemp(prefix="bydocker-", dir="/var/tmp"))
        self.root.chmod(0o711)
        self.socket = self.root / "docker.sock"
        self.group = group
        self.cgroup = f"blockyard-docker-test-{os.getpid()}"
        self.process: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> Self:
        """Start it, with the worker image in it."""
        try:
            self.start()
            self.import_image()
        except BaseException:
            self.remove()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self.remove()

    def start(self, *more: str) -> None:
        argv = [
            "dockerd", "--host", f"unix://{self.socket}", "--group", str(self.group), "--log-level", "warn",
            "--data-root", self.root / "data", "--exec-root", self.root / "exec", "--pidfile", self.root / "pid",
            "--bridge", "none", "--cgroup-parent", f"/{self.cgroup}", "--exec-opt", "native.cgroupdriver=cgroupfs",
            "--add-runtime", "crun=/usr/bin/crun", *more,
        ]  # fmt: skip
        self.launch(argv)

    def launch(self, argv: list[str | Path]) -> None:
        """Start the engine's program in namespaces of its own; return when it answers."""
        network = self.root / "net"  # kept over a restart, as a machine's own is
        space = ["nsenter" if network.exists() else "unshare", f"--net={network}"]
        if not network.exists():
            network.touch()
        with (self.root / "log").open("ab") as log:
            self.process = subprocess.Popen(
                [*space, "unshare", "--mount", "--propagation", "private", "sh", "-c", START, "sh", *argv],
                stdout=log, stderr=log, cwd="/", start_new_session=True,
            )  # fmt: skip
        end = time.monotonic() + DEADLINE
        while self.run("version", check=False).returncode:
            assert time.monotonic() < end, self.log()
            assert self.process.poll() is None, self.log()
            time.sleep(0.1)

    def import_image(self) -> None:
        environment = {**os.environ, "DOCKER_HOST": f"unix://{self.socket}"}
        script = [CHECKOUT / "scripts/build-worker-image", "--from", worker_image()]
        subprocess.run(script, check=True, env=environment, stdout=subprocess.DEVNULL, timeout=300)

    def end(self, number: int = signal.SIGTERM) -> None:
        self.process.send_signal(number)
        self.process.wait(DEADLINE)

    def run(self, *words: str, check: bool = True) -> subprocess.CompletedProcess[str]:
        """Run the engine's own command line."""
        argv = ["docker", "--host", f"unix://{self.socket}", *words]
        done = subprocess.run(argv, check=False, capture_output=True, text=True, timeout=DEADLINE)
        assert not check or done.returncode == 0, done.stderr
        return done

    def show(self, name: str) -> dict:
        return json.loads(self.run("inspect", name).stdout)[0]

    def containers(self, *filters: str) -> list[str]:
        words = [word for each in filters for word in ("--filter", each)]
        return self.run("ps", "--all", "--format", "{{.Names}}", *words).stdout.split()

    def networks(self, *filters: str) -> list[str]:
        words = [word for each in filters for word in ("--filter", each)]
        found = self.run("network", "ls", "--format", "{{.Name}}", *words).stdout.split()
        return [name for name in found if name not in ("bridge", "host", "none")]

    def log(self) -> str:
        return (self.root / "log").read_text(errors="replace")

    def remove(self) -> None:
        """End it with all its containers, and take everything away."""
        with contextlib.suppress(AssertionError, subprocess.TimeoutExpired):
            if left := self.containers():
                self.run("rm", "--force", *left, check=False)
        if self.process.poll() is None:
            self.end(signal.SIGKILL)  # there is nothing left that it could end in good order; containerd goes with it
        subprocess.run(["umount", "--lazy", self.root / "net"], check=False, stderr=subprocess.DEVNULL)
        for directory in Path("/sys/fs/cgroup").glob(f"*/{self.cgroup}"):
            with contextlib.suppress(OSError):
                directory.rmdir()
        shutil.rmtree(self.root, ignore_errors=True)


# Podman sets a limit of processes for each user, which takes a right that root does not have everywhere.
RUNTIME = """#!/usr/bin/python3
import json, os, sys
if "--bundle" in sys.argv:
    path = sys.argv[sys.argv.index("--bundle") + 1] + "/config.json"
    with open(path) as file:
        config = json.load(file)
    limits = config["process"].get("rlimits", [])
    config["process"]["rlimits"] = [limit for limit in limits if limit["type"] != "RLIMIT_NPROC"]
    with open(path, "w") as file:
        json.dump(config, file)
os.execv("/usr/bin/crun", ["crun", *sys.argv[1:]])
"""


class Podman(Dockerd):
    """Podman's service of Docker's interface, as root."""

    def start(self, *more: str) -> None:
        runtime = self.root / "crun"
        runtime.write_text(RUNTIME)
        runtime.chmod(0o755)
        argv = [
            "podman", "--root", self.root / "data", "--runroot", self.root / "run", "--runtime", runtime,
            "--cgroup-manager", "cgroupfs", "--events-backend", "file", "--network-config-dir", self.root / "networks",
            *more, "system", "service", "--time", "0", f"unix://{self.socket}",
        ]  # fmt: skip
        self.launch(argv)
        os.chown(self.socket, -1, self.group)
        self.socket.chmod(0o660)
