"""A machine without systemd, on which `scripts/up` has not run: this one's files, of which it writes to copies.

Namespaces of its own for mounts, network, processes and cgroups: its ports are free, and its end takes all of it along.
"""

import contextlib
import os
import shlex
import signal
import subprocess
import sys
import sysconfig
import time
from pathlib import Path

from blockyard_api.host.accounting import cgroup2_mount

CHECKOUT = Path(__file__).parents[2]
STRANGER = Path(__file__).with_name("stranger.py").read_text()  # who runs it may not be able to read it there
UP = CHECKOUT / "scripts" / "up"
PATIENCE = float(os.environ.get("TESTS_PATIENCE", "1"))
STATE = Path("/var/lib/blockyard")
CONFIG = Path("/etc/blockyard/blockyard.toml")

_MADE = f"""
set -euo pipefail
mount --make-rprivate /
mount --types tmpfs tmpfs /mnt
mkdir /mnt/upper /mnt/work /mnt/root
mount --types overlay overlay --options lowerdir=/,upperdir=/mnt/upper,workdir=/mnt/work /mnt/root
cd /mnt/root
for each in dev sys; do mount --rbind /$each $each; done
umount ".{cgroup2_mount()}"
mount --types cgroup2 cgroup2 ".{cgroup2_mount()}"
mount --types proc proc proc
mount --types tmpfs --options mode=0755 tmpfs run
ip link set lo up
mkdir run/old
pivot_root . run/old
umount --lazy /run/old
echo 0 >/proc/sys/net/ipv4/ip_unprivileged_port_start
rm -rf {STATE} {CONFIG.parent} /opt/blockyard
# What scripts/install-packages would download: the packages are here, and the tests' environment has the libraries.
ln --symbolic --force /bin/true {shlex.quote(str(CHECKOUT))}/scripts/install-packages
/usr/bin/python3 -m venv --without-pip /opt/blockyard/venv
echo {shlex.quote(sysconfig.get_path("purelib"))} >"$(echo /opt/blockyard/venv/lib/python3*/site-packages)/tests.pth"
printf '#!/bin/sh\\nexec /opt/blockyard/venv/bin/python -m pip "$@"\\n' >/opt/blockyard/venv/bin/pip
chmod a+x /opt/blockyard/venv/bin/pip
echo made
while read -r _; do :; done  # as process 1, which reaps orphans
"""


def _placed(cgroup):
    """Begin a command that runs in a cgroup."""
    return ["sh", "-c", 'echo $$ >"$0/cgroup.procs" && exec "$@"', str(cgroup)]


class FreshMachine:
    """One machine; `up` runs its own copy of `scripts/up`."""

    def __init__(self, directory):
        self.directory, self.runs = directory, []
        self.cgroup = cgroup2_mount() / f"machine-{os.getpid()}-{directory.name}"
        (self.cgroup / "daemons").mkdir(parents=True)
        namespaces = ["unshare", "--mount", "--net", "--pid", "--cgroup", "--fork", "--kill-child"]
        command = [*_placed(self.cgroup), *namespaces, "bash", "-c", _MADE]
        self.init = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        assert self.init.stdout.readline() == "made\n"
        children = Path(f"/proc/{self.init.pid}/task/{self.init.pid}/children").read_text()
        enter = ["nsenter", f"--target={int(children)}", "--mount", "--net", "--pid", "--cgroup", "--"]
        self._within = [*_placed(self.cgroup / "daemons"), *enter]

    def close(self):
        self.init.stdin.close()  # process 1 ends, and whatever runs with it
        self.init.wait(30)
        self.init.stdout.close()
        for up in self.runs:
            up.process.wait(30)
        wait_for(self._remove_cgroup, "an empty cgroup")

    def _remove_cgroup(self):
        """A process that was killed just now may still be on its way out."""
        removal = ["find", self.cgroup, "-depth", "-type", "d", "-exec", "rmdir", "{}", "+"]
        return subprocess.run(removal, check=False, stderr=subprocess.DEVNULL).returncode == 0

    def start(self, *argv, **options):
        return subprocess.Popen([*self._within, *map(str, argv)], **options)

    def run(self, *argv, check=True):
        done = subprocess.run(
            [*self._within, *map(str, argv)], check=False, capture_output=True, text=True, timeout=120 * PATIENCE
        )
        assert not check or done.returncode == 0, done.stdout + done.stderr
        return done

    def up(self, *arguments, terminal=False):
        """Start `scripts/up`, which may stay."""
        on_terminal = ["script", "--quiet", "--return", "--flush", "/dev/null", "--command"] if terminal else []
        self.runs.append(Up(self, len(self.runs), [*on_terminal, UP, *arguments]))
        return self.runs[-1]

    def write(self, path, text):
        self.run("mkdir", "--parents", path.parent)
        self.run(sys.executable, "-c", "import sys; open(sys.argv[1], 'w').write(sys.argv[2])", path, text)

    def read(self, path):
        return self.run("cat", path).stdout

    def has(self, path):
        return self.run("test", "-e", path, check=False).returncode == 0

    def pids(self, pattern):
        return self.run("pgrep", "--full", pattern, check=False).stdout.split()

    def signal(self, number, pattern):
        (pid,) = self.pids(pattern)
        self.run("kill", f"-{number.value}", pid)

    def status(self, url):
        """Visit a page as a browser does; return its status."""
        return self.run(
            "curl", "--silent", "--location", "--output", "/dev/null", "--write-out", "%{http_code}", url
        ).stdout

    @contextlib.contextmanager
    def stranger(self, address):
        """Another user's program, which answers whatever it is asked as an API without apps would."""
        log = self.directory / f"stranger-{address.replace(':', '-')}"
        with log.open("wb") as file:
            listening = ["setpriv", "--reuid=nobody", "--clear-groups", sys.executable, "-u", "-c", STRANGER, address]
            process = self.start(*listening, stdout=file, stderr=file)
        try:
            wait_for(lambda: "listening" in log.read_text(), "the stranger")
            yield log.read_text
        finally:
            process.terminate()
            process.wait(10)


class Up:
    """One run of `scripts/up`."""

    def __init__(self, machine, number, argv):
        self.machine, self.log = machine, machine.directory / f"up-{number}"
        with self.log.open("wb") as file:
            self.process = machine.start(*argv, stdout=file, stderr=file, stdin=subprocess.DEVNULL)

    def printed(self):
        return self.log.read_text(errors="replace")

    def wait_until_ready(self):
        wait_for(lambda: "Ctrl-C stops everything" in self.printed() or self.process.poll() is not None, "readiness")
        assert self.process.poll() is None, self.printed()
        return self

    def ended(self, within=120):
        """Wait for its end; return its status."""
        return self.process.wait(within * PATIENCE)

    def interrupt(self):
        """Press Ctrl-C."""
        self.machine.signal(signal.SIGINT, f"bash {UP}$")
        return self.ended()


def wait_for(condition, what, seconds=120):
    end = time.monotonic() + seconds * PATIENCE
    while not (found := condition()):
        assert time.monotonic() < end, f"{what} did not come about"
        time.sleep(0.1)
    return found
