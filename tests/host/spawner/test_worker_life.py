"""A worker's life through the real spawner: from spawn to the last trace of it."""

import os
import pwd
import select
import shutil
import signal
import socket
import struct

import pytest
from running_spawner import EXAMPLES, Refusal, api_user, eventually, processes_of

WAITING = "Sys.sleep(600)"


def test_a_real_shiny_app_answers_on_its_socket(spawner, client):
    worker = spawner.spawn(client, "worker0001", spawner.bundle("hello", EXAMPLES / "hello"), app="hello")
    assert worker.get().startswith("HTTP/1.1 200 OK")
    assert worker.uid in spawner.uids
    assert worker.cgroup.endswith("/workers/worker0001")


WHERE = """#!/bin/sh
while read -r line; do echo "$line"; done < /proc/self/cgroup
while read -r name values; do [ "$name" = Uid: ] && echo "Uid: $values"; done < /proc/self/status
exec /usr/bin/bwrap "$@"
"""


def test_a_worker_is_in_its_cgroup_before_its_first_program_does_anything(stopped_spawner):
    """Whoever joins later has a moment outside of limits and firewall: ten times, since that moment is short."""
    looks = stopped_spawner.root / "looks"
    looks.write_text(WHERE)
    looks.chmod(0o755)
    stopped_spawner.configure(bwrap_path=str(looks))
    stopped_spawner.start()
    client = stopped_spawner.client()
    for number in range(10):
        worker = stopped_spawner.run_r(client, f"worker{number:04}", WAITING)
        worker.wait_for_output("Uid:")
        assert f"0::{worker.cgroup}\n" in worker.lines
        assert worker.lines[-1].split() == ["Uid:", *[str(worker.uid)] * 4]
        client.call("stop", id=worker.id, grace=0)
    assert worker.cgroup.endswith(f"/workers/{worker.id}")


def test_the_socket_proves_the_uid_that_the_spawner_named(spawner, client):
    worker = spawner.spawn(client, "worker0001", spawner.bundle("hello", EXAMPLES / "hello"))
    with worker.connect() as connection:
        _, uid, gid = struct.unpack("iII", connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12))
    assert (uid, gid) == (worker.uid, 65534)


def test_the_runtime_directory_is_the_workers_and_the_apis_alone(spawner, client):
    worker = spawner.run_r(client, "worker0001", WAITING)
    status = worker.socket.parent.stat()
    assert (status.st_uid, status.st_gid, oct(status.st_mode & 0o7777)) == (worker.uid, api_user().pw_gid, "0o2710")
    assert oct(spawner.runtime_dir.stat().st_mode & 0o7777) == "0o711"


def test_a_stop_lets_the_app_say_goodbye(spawner, client):
    worker = spawner.run_r(
        client, "worker0001", 'onStop(function() message("goodbye")); shinyApp(fluidPage(), \\(i, o) {})'
    )
    worker.get()
    stopped = client.call("stop", id="worker0001", grace=30_000)
    assert stopped["result"]["reason"] == "stopped"
    assert "goodbye" in worker.output()


def test_an_app_that_talks_to_nobody_goes_on(spawner, client):
    code = "ui <- function(request) { message('asked'); fluidPage('plain') }; shinyApp(ui, \\(input, output) {})"
    worker = spawner.run_r(client, "worker0001", code, unread=True)
    assert [worker.get().startswith("HTTP/1.1 200 OK") for _ in range(3)] == [True] * 3


def test_a_stop_kills_what_ignores_the_interrupt(spawner, client):
    worker = spawner.run_r(
        client, "worker0001", "repeat tryCatch({message('up'); Sys.sleep(600)}, interrupt = \\(e) 0)"
    )
    worker.wait_for_output("up")
    stopped = client.call("stop", id="worker0001", grace=100)
    assert stopped["result"] == {"reason": "stopped", "status": None, "signal": 9, "oom_kills": 0}
    assert spawner.leftovers() == {}


def test_after_a_stop_nothing_is_left(spawner, client):
    spawner.run_r(client, "worker0001", WAITING)
    assert set(spawner.leftovers()) == {"cgroups", "directories", "processes"}
    client.call("stop", id="worker0001", grace=0)
    assert spawner.leftovers() == {}


def test_no_process_survives_however_it_forked(spawner, client):
    daemons = "system(\"for i in 1 2 3; do setsid sh -c '(sleep 600 &) ; sleep 600' & done\")"
    worker = spawner.run_r(client, "worker0001", f"{daemons}; message('forked'); {WAITING}")
    worker.wait_for_output("forked")
    eventually(lambda: len(processes_of(spawner.uids)) >= 9, "the daemons run")
    client.call("stop", id="worker0001", grace=0)
    assert processes_of(spawner.uids) == []


def test_what_an_app_left_running_ends_with_it(spawner, client):
    worker = spawner.run_r(client, "worker0001", "system('setsid sleep 600 &'); message('left'); quit(status = 0)")
    worker.wait_for_output("left")
    assert spawner.result(client, "worker0001")["status"] == 0
    assert spawner.leftovers() == {}


def test_a_directory_that_resists_is_removed_as_well(spawner, client):
    hostile = """
      dir.create('/run/worker/a/b', recursive = TRUE); file.create('/run/worker/a/b/c'); file.create('/run/worker/-rf')
      file.symlink('/usr', '/run/worker/link'); Sys.chmod(c('/run/worker/a/b', '/run/worker/a', '/run/worker'), '0000')
      quit(status = 3)"""
    spawner.run_r(client, "worker0001", hostile)
    assert spawner.result(client, "worker0001")["status"] == 3
    assert spawner.leftovers() == {}


@pytest.mark.parametrize(
    ("code", "expected"),
    [
        ("quit(status = 7)", {"reason": "exited", "status": 7, "signal": None}),
        ("tools::pskill(Sys.getpid(), 11)", {"reason": "signalled", "status": 139, "signal": 11}),
        ("stop('broken')", {"reason": "exited", "status": 1, "signal": None}),
    ],
)
def test_how_an_app_ended_is_told_and_audited(spawner, client, code, expected):
    spawner.run_r(client, "worker0001", code)
    result = spawner.result(client, "worker0001")
    assert {name: result[name] for name in expected} == expected
    exits = [entry for entry in spawner.audit() if entry.get("BLOCKYARD_WORKER") == "worker0001"]
    assert [entry["BLOCKYARD_RESULT"] for entry in exits] == ["ok", expected["reason"]]


def test_an_end_is_told_to_a_stop_that_comes_late(spawner, client):
    spawner.run_r(client, "worker0001", "quit(status = 7)")
    spawner.result(client, "worker0001")
    assert client.call("stop", id="worker0001")["result"]["status"] == 7


def test_two_stops_wait_for_the_same_end(spawner, client):
    spawner.run_r(client, "worker0001", WAITING)
    numbers = {client.send("stop", id="worker0001", grace=0), client.send("stop", id="worker0001", grace=0)}
    replies = [client.receive()[0] for _ in numbers]
    assert {message["seq"] for message in replies} == numbers
    assert replies[0]["ok"]["result"] == replies[1]["ok"]["result"]


def test_other_requests_are_answered_while_a_stop_takes_its_time(spawner, client):
    worker = spawner.run_r(
        client, "worker0001", "repeat tryCatch({message('up'); Sys.sleep(600)}, interrupt = \\(e) 0)"
    )
    worker.wait_for_output("up")
    stop = client.send("stop", id="worker0001", grace=2000)
    listed = client.send("list")
    first, second = client.receive()[0], client.receive()[0]
    assert (first["seq"], second["seq"]) == (listed, stop)
    assert first["ok"]["workers"][0]["state"] == "stopping"


def test_a_uid_rests_before_it_is_used_again(spawner, client):
    used = []
    for number in range(len(spawner.uids) + 1):
        worker = spawner.run_r(client, f"worker{number:04}", WAITING)
        client.call("stop", id=worker.id, grace=0)
        used.append(worker.uid)
    assert used == [*spawner.uids, spawner.uids[0]]


def test_a_uid_that_still_has_a_process_is_passed_over(spawner, client):
    child = os.fork()
    if child == 0:
        os.setuid(spawner.uids[0])
        signal.pause()
    try:
        eventually(lambda: child in processes_of(spawner.uids), "the process has the uid")
        assert spawner.run_r(client, "worker0001", WAITING).uid == spawner.uids[1]
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)


def test_a_used_up_pool_refuses_and_recovers(spawner, client):
    spawner.end()
    spawner.configure(worker_uid_range_end=spawner.uids[0])
    spawner.start()
    client = spawner.client()
    bundle = spawner.bundle("waiting", {"app.R": WAITING})
    spawner.spawn(client, "worker0001", bundle)
    with pytest.raises(Refusal, match="uid_pool_exhausted"):
        spawner.spawn(client, "worker0002", bundle)
    client.call("stop", id="worker0001", grace=0)
    assert spawner.spawn(client, "worker0003", bundle).uid == spawner.uids[0]


def test_workers_survive_a_killed_spawner_and_are_found_again(spawner, client):
    worker = spawner.spawn(client, "worker0001", spawner.bundle("hello", EXAMPLES / "hello"), app="hello")
    worker.get()
    spawner.end(signal.SIGKILL)
    assert worker.get().startswith("HTTP/1.1 200 OK")
    spawner.start()
    client = spawner.client()
    found = client.call("list", id="worker0001")
    record = {name: getattr(worker, name) for name in ("id", "uid", "pid", "cgroup")}
    assert found["workers"] == [{**record, "app": "hello", "state": "running", "result": None}]
    assert not select.select([found["descriptor"]], [], [], 0)[0]
    stopped = client.call("stop", id="worker0001")
    assert stopped["result"]["reason"] == "stopped"
    assert select.select([found["descriptor"]], [], [], 0)[0]
    os.close(found["descriptor"])
    assert spawner.leftovers() == {}


@pytest.mark.parametrize("ends_by", [signal.SIGTERM, signal.SIGINT])
def test_a_spawner_that_is_told_to_end_leaves_workers_running(spawner, client, ends_by):
    worker = spawner.run_r(client, "worker0001", WAITING)
    assert spawner.end(ends_by) == 0
    assert worker.pid in processes_of(spawner.uids)


def test_a_worker_of_another_pool_is_found_again_and_its_uid_does_not_come_into_this_one(spawner, client):
    worker = spawner.spawn(client, "worker0001", spawner.bundle("hello", EXAMPLES / "hello"), app="hello")
    worker.get()
    spawner.end()
    spawner.configure(worker_uid_range_start=worker.uid + 1)
    spawner.start()
    client = spawner.client(greet=False)
    assert client.hello()["uids_free"] == len(spawner.uids) - 1
    assert client.call("list")["workers"][0]["pid"] == worker.pid
    assert worker.get().startswith("HTTP/1.1 200 OK")
    assert client.call("stop", id="worker0001")["result"]["reason"] == "stopped"
    assert spawner.leftovers() == {}
    assert spawner.client(greet=False).hello()["uids_free"] == len(spawner.uids) - 1


def test_workers_are_found_again_by_a_spawner_that_serves_another_user(spawner, client):
    worker = spawner.run_r(client, "worker0001", WAITING)
    spawner.end(signal.SIGKILL)
    spawner.configure(api_user="daemon")
    spawner.start()
    client = spawner.client(user=pwd.getpwnam("daemon"))
    assert client.call("list")["workers"][0]["pid"] == worker.pid
    assert client.call("stop", id="worker0001")["result"]["reason"] == "stopped"
    assert spawner.leftovers() == {}


@pytest.mark.parametrize("owner", ["a person", "a service of the API's group"])
def test_a_directory_of_somebody_else_below_the_runtime_directory_is_left_alone(spawner, owner):
    uid, gid = {"a person": (54_321, 54_321), "a service of the API's group": (992, api_user().pw_gid)}[owner]
    home = spawner.runtime_dir / "somebody"  # as where /home was written by mistake
    home.mkdir(mode=0o755)
    (home / "thesis").write_text("years of work")
    empty = spawner.runtime_dir / "another"
    empty.mkdir(mode=0o700)
    for directory in (home, empty):
        os.chown(directory, uid, gid)
    spawner.end()
    spawner.start()
    assert spawner.client().call("list")["workers"] == []
    assert (home / "thesis").read_text() == "years of work"
    assert empty.is_dir()
    for directory in (home, empty):
        shutil.rmtree(directory)


def test_a_directory_that_was_made_and_not_yet_given_away_is_removed_at_the_start(spawner):
    spawner.end()
    (spawner.runtime_dir / "worker0001").mkdir(mode=0o700)
    spawner.start()
    assert spawner.leftovers() == {}
    assert spawner.client(greet=False).hello()["uids_free"] == len(spawner.uids)


def test_what_died_while_no_spawner_ran_is_cleared_away(spawner, client):
    spawner.run_r(client, "worker0001", WAITING)
    spawner.end(signal.SIGKILL)
    (spawner.cgroup_root / "workers/worker0001/cgroup.kill").write_text("1")
    spawner.start()
    eventually(lambda: spawner.leftovers() == {}, "nothing is left", lambda: str(spawner.leftovers()))
    assert spawner.client(greet=False).hello()["uids_free"] == len(spawner.uids)


def test_a_worker_without_its_main_process_is_ended_at_the_start(spawner, client):
    worker = spawner.run_r(client, "worker0001", "message('up'); Sys.sleep(600)")
    worker.wait_for_output("up")
    spawner.end(signal.SIGKILL)
    os.kill(worker.pid, signal.SIGKILL)
    spawner.start()
    eventually(lambda: spawner.leftovers() == {}, "nothing is left", lambda: str(spawner.leftovers()))


def test_many_workers_are_listed_in_pages(spawner, client):
    bundle = spawner.bundle("ended", {"app.R": "quit()"})
    names = [f"worker{number:04}" for number in range(103)]
    for name in names:
        worker = spawner.spawn(client, name, bundle)
        client.call("stop", id=worker.id, grace=0)
    first = client.call("list")
    second = client.call("list", after=first["workers"][-1]["id"])
    assert [record["id"] for record in first["workers"] + second["workers"]] == names
    assert (first["more"], second["more"]) == (True, False)


def test_an_emergency_stop_of_the_whole_subtree_is_survived(spawner, client):
    spawner.run_r(client, "worker0001", WAITING)
    (spawner.cgroup_root / "cgroup.kill").write_text("1")
    assert spawner.result(client, "worker0001")["signal"] == 9
    assert spawner.run_r(client, "worker0002", WAITING).uid == spawner.uids[1]
