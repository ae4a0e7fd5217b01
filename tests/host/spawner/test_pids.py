"""Pids that come round again: the spawner ends workers, and nobody who happens to have the pid of one.

The kernel is told which pid comes next, in a namespace of the spawner's own: to wait for chance takes 10^4 starts.
"""

import subprocess
from pathlib import Path

import pytest
from running_spawner import EXAMPLES, eventually

LAST_PID = Path("/proc/sys/kernel/ns_last_pid")  # of the namespace of whoever writes it
OWN_NAMESPACE = ("unshare", "--pid", "--fork", "--kill-child", "--mount-proc")


class Namespace:
    """The spawner's namespace of pids. All of them are told as they are inside."""

    def __init__(self, spawner):
        (self._spawner,) = children(spawner.process.pid)

    def _inside(self, script):
        command = ["nsenter", f"--target={self._spawner}", "--pid", "--mount", "sh", "-c", script]
        return subprocess.check_output(command, text=True, timeout=30)

    def next_is(self, pid):
        self._inside(f"echo {pid - 1} > {LAST_PID}")

    def canary(self, pid, uid):
        """Start a process that has a pid and a uid, and is no worker."""
        sleep = f"setpriv --reuid={uid} --regid=65534 --clear-groups sleep 100000 > /dev/null & echo $!"
        assert self._inside(f"echo {pid - 1} > {LAST_PID}; {sleep}") == f"{pid}\n"

    def canaries(self):
        """Return the pids of those that live."""
        statuses = [Path(f"/proc/{pid}/status").read_text() for pid in children(self._spawner)]
        living = [text for text in statuses if text.startswith("Name:\tsleep\n") and "\nState:\tZ" not in text]
        return {int(text.partition("\nNSpid:")[2].partition("\n")[0].split()[-1]) for text in living}


def children(pid):
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


@pytest.fixture
def namespace(stopped_spawner, capsys):
    """The running spawner's; None where the kernel lets nobody choose a pid, which is said."""
    if not LAST_PID.exists():  # it has no CONFIG_CHECKPOINT_RESTORE, which Debian's have
        with capsys.disabled():
            print("\nnot run: pids that are used again, since this kernel lets nobody choose the next one")
        return None
    stopped_spawner.prefix = OWN_NAMESPACE
    stopped_spawner.start()
    return Namespace(stopped_spawner)


def ended(spawner, client, name, code="Sys.sleep(600)"):
    """Start a worker that ends by itself, or else is stopped; return it once it has ended."""
    worker = spawner.run_r(client, name, code)
    if "quit" not in code:
        client.call("stop", id=name, grace=0)
    spawner.result(client, name)
    return worker


@pytest.mark.parametrize(
    ("code", "as_worker", "rounds"),
    [("quit()", False, 4), ("Sys.sleep(600)", False, 40), ("Sys.sleep(600)", True, 12)],
    ids=["ended by itself", "stopped", "stopped, and its uid's"],
)
def test_pids_that_are_used_again_and_again_lead_a_stop_to_nobody_else(
    stopped_spawner, namespace, code, as_worker, rounds
):
    """Nor to one with the worker's own uid: as root the spawner has no right to signal others', as that uid it has."""
    if namespace is None:
        return
    client = stopped_spawner.client()
    pids = []
    for name in [f"worker{number:04}" for number in range(rounds)]:
        worker = ended(stopped_spawner, client, name, code)
        namespace.canary(worker.pid, worker.uid if as_worker else 0)
        pids.append(worker.pid)
        client.call("stop", id=name, grace=0)
    assert len(set(pids)) == rounds
    eventually(lambda: namespace.canaries() == set(pids), "every canary is what it is to become, and lives")


def test_a_stop_of_an_ended_worker_does_not_reach_the_worker_that_has_its_pid_now(stopped_spawner, namespace):
    if namespace is None:
        return
    client = stopped_spawner.client()
    bundle = stopped_spawner.bundle("hello", EXAMPLES / "hello")
    pid = ended(stopped_spawner, client, "worker0000").pid
    for name in ("worker0001", "worker0002"):
        namespace.next_is(pid)
        worker = stopped_spawner.spawn(client, name, bundle)
        assert worker.pid == pid
        worker.get()
        client.call("stop", id="worker0000", grace=0)
        assert worker.get().startswith("HTTP/1.1 200 OK")
        assert client.call("stop", id=name, grace=0)["result"]["reason"] == "stopped"  # and not by itself before
    eventually(lambda: stopped_spawner.leftovers() == {}, "nothing is left")
