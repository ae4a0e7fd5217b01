"""What the tests ask of systemd, the journal and the cgroup tree."""

import contextlib
import json
import os
import re
import subprocess
import time
from pathlib import Path

import httpx
from running_pair import PATIENCE, wait_for

WORKERS = Path("/sys/fs/cgroup/system.slice/blockyard-workers.service")
DAEMONS = ("blockyard-spawner.service", "blockyard-api.service")
ADMINISTRATOR = "keeper"  # a member of blockyard-admin
STATE_UNITS = (
    *(*DAEMONS, "blockyard-workers.service", "run-blockyard-workers.mount"),
    *("blockyard-api.socket", "blockyard-spawner.socket"),
)


def debian():
    """Which Debian this is, as "debian13"."""
    return "debian" + re.search(r'^VERSION_ID="?(\d+)', Path("/etc/os-release").read_text(), re.MULTILINE)[1]


def run(*command, check=True, timeout=120):
    done = subprocess.run(command, capture_output=True, text=True, timeout=timeout * PATIENCE, check=False)
    assert not check or done.returncode == 0, f"{command}: {done.stdout}{done.stderr}"
    return done


def as_user(user, *command):
    if user == ADMINISTRATOR and run("id", user, check=False).returncode:
        run("useradd", "--no-create-home", "--groups", "blockyard-admin", user)
    return run("runuser", "-u", user, "--", *command, check=False)


def systemctl(*arguments, check=True):
    return run("systemctl", *arguments, check=check)


def unit(name, attribute):
    return systemctl("show", "--value", f"--property={attribute}", name).stdout.strip()


def audit(**fields):
    """The spawner's journal entries with these fields, oldest first."""
    matches = [f"BLOCKYARD_{name.upper()}={value}" for name, value in fields.items()]
    lines = run("journalctl", "--unit=blockyard-spawner", "--output=json", "--quiet", *matches).stdout.splitlines()
    return [json.loads(line) for line in lines]


def knob(worker, name):
    return (WORKERS / "workers" / worker / name).read_text().strip()


def r_process(worker):
    """The pid of the R process of a worker."""
    for pid in knob(worker, "cgroup.procs").split():
        if "/exec/R" in Path(f"/proc/{pid}/cmdline").read_text().replace("\0", " "):
            return int(pid)
    raise AssertionError(f"no R in {worker}")


def kill_main(name):
    before = unit(name, "MainPID")
    os.kill(int(before), 9)
    wait_for(lambda: unit(name, "MainPID") not in ("0", before), 60, f"another {name}")


def active(server, app):
    return wait_for(lambda: server.workers(app, "active"), 120, f"an active worker of {app}")


def switch_off(server, app, within=60):
    """Disable an app, and wait for the end of all its workers."""
    assert server.http.post(f"/api/v1/apps/{app}/disable").status_code == 200
    wait_for(lambda: not server.workers(app), within, f"the end of {app}")


@contextlib.contextmanager
def dropped_in(name, text):
    """Put a drop-in in place for a while; to restart what it is for is the caller's."""
    directory = Path("/run/systemd/system", f"{name}.d")
    directory.mkdir(parents=True)
    (directory / "test.conf").write_text(text)
    systemctl("daemon-reload")
    try:
        yield
    finally:
        (directory / "test.conf").unlink()
        directory.rmdir()
        systemctl("daemon-reload")


def answers(server, within=60):
    def ready():
        with contextlib.suppress(httpx.TransportError):  # a connection kept from before a restart
            return server.http.get("/readyz").status_code == 200

    wait_for(ready, within, "readiness")


def checks(server):
    """Run the start-up checks; return them by name."""
    answer = server.http.post("/api/v1/system/checks/run", timeout=120)
    assert answer.status_code == 200, answer.text
    return {one["name"]: one for one in answer.json()["checks"]}


def cpu_seconds(worker):
    return int(dict(line.split() for line in knob(worker, "cpu.stat").splitlines())["usage_usec"]) / 1e6


def cores_used(worker, seconds, meanwhile):
    """How many cores a worker has while `meanwhile` is called again and again."""
    before, began = cpu_seconds(worker), time.monotonic()
    while (passed := time.monotonic() - began) < seconds:
        meanwhile()
        time.sleep(0.2)
    return (cpu_seconds(worker) - before) / passed


def processes_of(uid):
    """The pids of a uid's processes."""
    return run("pgrep", "--uid", str(uid), check=False).stdout.split()


def by(server, *arguments):
    """Start the command line as an operator of this server does, its output in a pipe."""
    login = {"BLOCKYARD_URL": server.control_url, "BLOCKYARD_TOKEN": server.token}
    return subprocess.Popen(
        ["by", *arguments], env={**os.environ, **login}, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )


# --- what an app's owner is told -------------------------------------------------------------------------------------


def log_of(server, name):
    return server.http.get(f"/api/v1/apps/{name}/logs", params={"stream": "false"}).text


def noted(server, name, words, within=120):
    """Wait for a line of the platform's own in an app's log."""
    line = re.compile(rf"^\[blockyard [^]]+\] .*{words}", re.MULTILINE)
    wait_for(lambda: line.search(log_of(server, name)), within, f"{words!r} in the log of {name}")


def hit(server, name):
    return [sentence for worker in server.workers(name) for sentence in worker["limits_hit"]]


def shown(server, name, words, within=120):
    """Wait for `by get APP --runtime` to print words on the line of a worker that serves."""
    line = re.compile(rf"^[0-9a-f]+ +active; .*{words}", re.MULTILINE)

    def printed():
        return line.search(by(server, "get", name, "--runtime").communicate(timeout=within * PATIENCE)[0])

    wait_for(printed, within, f"{words!r} of {name} on the command line")
