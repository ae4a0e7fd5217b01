"""A root helper that is killed at any step of a start or a stop: the next one clears away, or goes on with the worker.

strace kills it as it asks the kernel for the step, which then is not taken. The pool has one uid, so that one that is
lost is missed.
"""

import os
import signal

import pytest
from running_spawner import cgroup_mount, eventually

ID = "worker0001"
STUBBORN = "repeat tryCatch({message('up'); Sys.sleep(600)}, interrupt = \\(e) 0)"
RUNTIME, CGROUP, BUNDLE = f"run/{ID}", f"workers/{ID}", f"state/bundles/bundle-{ID}"

# Step → the system calls, as strace names them on every architecture, and what they are asked about; "": whatever, and
# the number of the call.
START = {
    "the runtime directory is made": ("/^mkdir", RUNTIME, 1),
    "its mode is set": ("/chmod", RUNTIME, 1),
    "it is given away": ("/chown", RUNTIME, 1),
    "the cgroup is made": ("/^mkdir", CGROUP, 1),
    "a limit is looked for": ("/stat", f"{CGROUP}/memory.max", 1),
    "a limit is set": ("write", f"{CGROUP}/memory.max", 1),
    "the worker is forked": ("clone3", "", 1),
    "the worker runs, and nobody was told": ("close", BUNDLE, 1),
}
STOP = {
    "the app is interrupted": ("clone3", "", 2),
    "the cgroup is killed": ("write", f"{CGROUP}/cgroup.kill", 1),
    "the cgroup is removed": ("/^(rmdir|unlinkat)$", CGROUP, 1),
    "the directory is swept": ("clone3", "", 3),
    "the directory is removed": ("/^(rmdir|unlinkat)$", RUNTIME, 1),
}


@pytest.fixture
def doomed(stopped_spawner):
    """A function that starts a spawner with one uid, which dies at a step."""

    def start(calls, place, number):
        root = stopped_spawner.cgroup_root if place.startswith(CGROUP) else stopped_spawner.root
        paths = ("-P", str(root / place)) if place else ()
        inject = f"inject={calls}:signal=SIGKILL:when={number}"
        stopped_spawner.configure(worker_uid_range_end=stopped_spawner.uids[0], memory_ceiling="1g")
        output = str(stopped_spawner.root / "strace")
        stopped_spawner.prefix = ("strace", "-qq", "-o", output, *paths, "-e", f"trace={calls}", "-e", inject)
        stopped_spawner.start()
        return stopped_spawner

    return start


def goes_on(spawner):
    """Start the next spawner, and end what it found; then everything is as if nothing had been."""
    assert spawner.process.wait(30) == -signal.SIGKILL
    spawner.prefix = ()
    spawner.start()
    client = spawner.client()
    found = client.call("list")["workers"]
    assert [worker["id"] for worker in found] in ([], [ID])
    if found and found[0]["result"] is None:
        ended = client.call("stop", id=ID, grace=0)
        assert ended["result"], "whatever is listed can be stopped"
    eventually(lambda: spawner.leftovers() == {}, "nothing is left", lambda: f"{found} {spawner.leftovers()}")
    eventually(lambda: spawner.client(greet=False).hello()["uids_free"] == 1, "its uid is back", spawner.audit_text)
    again = spawner.run_r(client, "worker0002", "message('up'); Sys.sleep(600)")
    again.wait_for_output("up")
    assert again.uid == spawner.uids[0]
    client.call("stop", id=again.id, grace=0)
    assert spawner.leftovers() == {}
    return found


@pytest.mark.parametrize("step", START)
def test_a_spawner_that_is_killed_while_a_worker_starts_leaves_nothing_or_a_whole_worker(doomed, step, capsys):
    if step == "a limit is set" and "memory" not in (cgroup_mount() / "cgroup.controllers").read_text():
        with capsys.disabled():
            print(f"\nnot run: killed where {step}: there is no memory controller")
        return
    spawner = doomed(*START[step])
    with pytest.raises(EOFError):
        spawner.run_r(spawner.client(), ID, STUBBORN)
    found = goes_on(spawner)
    if step == "the worker runs, and nobody was told":
        assert (found[0]["state"], found[0]["app"]) == ("running", "an-app")
        assert found[0]["pid"]


@pytest.mark.parametrize("step", STOP)
def test_a_spawner_that_is_killed_while_a_worker_is_stopped_leaves_nothing_or_a_whole_worker(doomed, step):
    spawner = doomed(*STOP[step])
    client = spawner.client()
    worker = spawner.run_r(client, ID, STUBBORN)
    worker.wait_for_output("up")
    (spawner.runtime_dir / ID / "left").write_text("something to sweep")
    os.chown(spawner.runtime_dir / ID / "left", worker.uid, -1)
    with pytest.raises(EOFError):
        client.call("stop", id=ID, grace=0)
    goes_on(spawner)
