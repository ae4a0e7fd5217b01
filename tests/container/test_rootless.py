"""The same image under rootless Podman: with root inside, who is nobody outside, and without."""

import contextlib
import json
import os
import shutil
import signal
import subprocess
import tempfile
import time
from pathlib import Path

import pytest
from running_container import pair_image
from running_engine import RUNTIME, START

USER = "blockyard-rootless-test"
RANGE = range(300000, 365536)
ENVIRONMENT = ("PATH=/opt/blockyard/venv/bin:/usr/bin:/bin", "LANG=C.UTF-8")
INIT = "/opt/blockyard/scripts/container-init"
DEPLOY = """
by login --server http://127.0.0.1:8080 --token "$(cat /var/lib/blockyard/admin-token)"
by get hello >/dev/null 2>&1 || by deploy --name hello --yes --wait /opt/blockyard/examples/hello
by update hello --access public
python3 -c 'import urllib.request as r; print(r.urlopen("http://127.0.0.1:8081/app/hello/", timeout=60).read())'
"""
READY = "python3 -c 'import urllib.request as r; r.urlopen(\"http://127.0.0.1:8080/healthz\", timeout=60)'"


class Rootless:
    """Podman as an ordinary user with a range of uids, and the image's files, unpacked as that user."""

    def __init__(self) -> None:
        self.root = Path(tempfile.mkdtemp(prefix="bypodman-", dir="/var/tmp"))
        self.profile, self.files = self.root / "seccomp.json", self.root / "files"

    def make(self, profile: Path) -> None:
        # In memory: it is unpacked and removed ten times as fast.
        subprocess.run(["mount", "-t", "tmpfs", "-o", "size=2g", "tmpfs", self.root], check=True)
        subprocess.run(["useradd", "--system", "--no-create-home", "--home-dir", self.root, USER], check=True)
        span = f"{RANGE.start}-{RANGE.stop - 1}"
        subprocess.run(["usermod", "--add-subuids", span, "--add-subgids", span, USER], check=True)
        (self.root / "crun").write_text(RUNTIME)
        (self.root / "crun").chmod(0o755)
        shutil.copyfile(profile, self.profile)
        for directory in (self.files, self.root / "run"):
            directory.mkdir()
        for path in (self.root, self.files, self.root / "run"):
            shutil.chown(path, USER, USER)
        with pair_image().open("rb") as image:
            unpack = [
                "tar",
                "--extract",
                "--numeric-owner",
                "--same-permissions",
                "--exclude=./dev/*",
                "-C",
                self.files,
            ]
            self.podman("unshare", *map(str, unpack), stdin=image)

    def podman(self, *words: str, check: bool = True, **options) -> str:
        where = [
            "--root",
            self.root / "data",
            "--runroot",
            self.root / "run/containers",
            "--runtime",
            self.root / "crun",
        ]
        where += ["--cgroup-manager", "cgroupfs", "--events-backend", "file"]
        start = f"mount --make-rshared /\n{START}"
        as_user = ["runuser", "-u", USER, "--", "env", f"HOME={self.root}", f"XDG_RUNTIME_DIR={self.root}/run"]
        argv = ["unshare", "--mount", "--propagation", "private", "sh", "-c", start, "sh", *as_user, "podman"]
        given = {"stdin": subprocess.DEVNULL, **options}
        done = subprocess.run(
            [*argv, *where, *words], check=False, capture_output=True, text=True, timeout=120, cwd="/", **given
        )
        assert not check or done.returncode == 0, done.stdout + done.stderr
        return done.stdout + done.stderr

    @contextlib.contextmanager
    def running(self, *options: str):
        opened = ("--security-opt", f"seccomp={self.profile}", "--security-opt", "unmask=ALL")
        variables = [word for each in ENVIRONMENT for word in ("--env", each)]
        self.podman("run", "--detach", "--name", "pair", "--network", "none", *variables, *opened, *options,
                    "--rootfs", str(self.files), INIT)  # fmt: skip
        try:
            end = time.monotonic() + 180
            while "Error" in self.podman("exec", "pair", "sh", "-c", f"{READY} || echo Error", check=False):
                assert time.monotonic() < end, self.podman("logs", "pair")
                assert "pair" in self.podman("ps"), self.podman("logs", "pair")  # it runs
                time.sleep(2)
            yield
        finally:
            self.podman("rm", "--force", "pair", check=False)

    def inside(self, script: str, user: str = "blockyard") -> str:
        return self.podman("exec", "--user", user, "--env", "HOME=/tmp", "pair", "sh", "-c", script, check=False)

    def egress(self) -> str:
        """Return how bad it is what a worker reaches."""
        found = json.loads(self.inside("by admin check --json 2>/dev/null"))
        (check,) = [check for check in found["checks"] if check["name"] == "worker_egress"]
        return check["severity"]

    def workers(self) -> list[int]:
        """Name the uids that R has outside."""
        found = subprocess.run(["ps", "-e", "-o", "uid=,comm="], check=True, capture_output=True, text=True).stdout
        return [int(line.split()[0]) for line in found.splitlines() if line.split()[1] == "R"]

    def remove(self) -> None:
        """Take everything away; Podman's own cleaning up after a container, and its pause process, may still run."""
        end = time.monotonic() + 30
        while left := subprocess.run(["ps", "-u", USER, "-o", "pid="], check=False, capture_output=True).stdout.split():
            assert time.monotonic() < end
            for pid in left:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(int(pid), signal.SIGKILL)
            time.sleep(0.2)
        subprocess.run(["umount", "--lazy", self.root], check=False)
        shutil.rmtree(self.root)
        subprocess.run(["userdel", USER], check=False, stderr=subprocess.DEVNULL)


@pytest.fixture(scope="module")
def rootless(profile):
    made = Rootless()
    try:
        made.make(profile)
        yield made
    finally:
        made.remove()


def test_without_root_inside_all_workers_are_one_user_and_the_page_is_served(rootless):
    with rootless.running("--user", "900:900"):
        assert "shiny" in rootless.inside(DEPLOY), rootless.podman("logs", "pair")
        assert RANGE.start + 900 - 1 in rootless.workers()
        assert "use the Docker backend for apps of different owners" in rootless.inside("by admin check")


def test_root_inside_is_nobody_outside_and_each_worker_has_a_uid_of_its_own(rootless):
    with rootless.running():
        assert "shiny" in rootless.inside(DEPLOY), rootless.podman("logs", "pair")
        pool = range(RANGE.start + 60000 - 1, RANGE.start + 61000 - 1)  # inside, 0 is the user, and 1 the range's first
        assert set(rootless.workers()) & set(pool)
        kept = "cat /proc/sys/kernel/core_pattern > /proc/sys/kernel/core_pattern || echo refused"
        assert "refused" in rootless.inside(kept, user="root")
        # The network belongs to the user's namespace, so that rules know workers by the uids that they have inside.
        assert rootless.egress() == "warning"
        enter = [
            "nsenter",
            f"--net=/proc/{rootless.podman('inspect', '--format', '{{.State.Pid}}', 'pair').strip()}/ns/net",
        ]
        rules = rootless.inside("by admin firewall")
        subprocess.run([*enter, "nft", "-f", "-"], input=rules, text=True, check=True, timeout=30)
        assert rootless.egress() == "ok"
