"""Who a worker is: a uid that nobody had lately, one gid, no further group, and nothing of who had the uid before."""

import os
import subprocess
from pathlib import Path

import pytest
from running_spawner import Refusal, eventually

WAITING = "Sys.sleep(600)"

PLANT = """
import ctypes, os
libc = ctypes.CDLL(None, use_errno=True)
open("/tmp/planted", "w").close()
open("/dev/shm/planted", "w").close()
open("/run/worker/planted", "w").close()
os.makedirs("/run/worker/a/b", 0o000)
os.chmod("/tmp/planted", 0o6777)
segment = libc.shmget(0x1234, 4096, 0o1666)
queue = libc.mq_open(b"/planted", os.O_CREAT | os.O_RDWR, 0o666, None)
print("PLANTED", segment >= 0, queue >= 0, flush=True)
"""
LOOK = """
import ctypes, os
libc = ctypes.CDLL(None, use_errno=True)
found = [path for path in ("/tmp/planted", "/dev/shm/planted", "/run/worker/planted") if os.path.exists(path)]
found += ["segment"] if libc.shmget(0x1234, 4096, 0o666) >= 0 else []
found += ["queue"] if libc.mq_open(b"/planted", os.O_RDWR, 0, None) >= 0 else []
others = [pid for pid in os.listdir("/proc") if pid.isdigit() and int(pid) > 2 and int(pid) != os.getpid()]
print("FOUND", found, [open(f"/proc/{pid}/comm").read() for pid in others], os.listdir("/run/worker"), flush=True)
"""
RUN = "system('exec /usr/bin/python3 -I /app/program.py'); Sys.sleep(600)"


def of(pid, field):
    return next(
        line for line in Path(f"/proc/{pid}/status").read_text().splitlines() if line.startswith(field)
    ).split()[1:]


@pytest.fixture
def one_uid(stopped_spawner):
    """A spawner with a single uid to give, so that the next worker has the last one's."""
    stopped_spawner.configure(worker_uid_range_end=stopped_spawner.uids[0])
    stopped_spawner.start()
    return stopped_spawner


def run_program(spawner, client, worker, program):
    bundle = spawner.bundle(f"bundle-{worker}", {"app.R": RUN, "program.py": program})
    return spawner.spawn(client, worker, bundle)


def test_a_worker_has_one_uid_one_gid_and_no_further_group_whatever_the_spawner_has(stopped_spawner):
    stopped_spawner.prefix = ("setpriv", "--groups", "4,24,27")
    stopped_spawner.start()
    assert of(stopped_spawner.process.pid, "Groups") == ["4", "24", "27"]
    worker = stopped_spawner.run_r(stopped_spawner.client(), "worker0001", f"message('up'); {WAITING}")
    worker.wait_for_output("up")
    for pid in (stopped_spawner.cgroup_root / "workers/worker0001/cgroup.procs").read_text().split():
        assert of(pid, "Uid") == [str(worker.uid)] * 4
        assert of(pid, "Gid") == ["65534"] * 4
        assert of(pid, "Groups") == []


STAYS_ROOT = """
import os
really = os.{call}
os.{call} = lambda *ids: really(*ids) if ids == (0, 0, 0) else None
from blockyard_spawner.main import main
main()
"""


@pytest.mark.parametrize("call", ["setresuid", "setresgid"])
def test_a_worker_that_could_become_root_again_is_not_started(stopped_spawner, call):
    (stopped_spawner.root / "stays_root.py").write_text(STAYS_ROOT.format(call=call))
    stopped_spawner.prefix, stopped_spawner.module = ("env", f"PYTHONPATH={stopped_spawner.root}"), "stays_root"
    stopped_spawner.start()
    client = stopped_spawner.client()
    with pytest.raises(Refusal, match="privilege could be had back after it was dropped"):
        stopped_spawner.run_r(client, "worker0001", WAITING)
    assert client.call("list")["workers"] == []
    eventually(lambda: "quarantined" in stopped_spawner.audit_text(), "not even its directory is swept by such a root")
    assert stopped_spawner.leftovers() == {"directories": ["worker0001"]}


def test_the_gid_is_the_one_that_root_configured(stopped_spawner):
    stopped_spawner.configure(worker_gid=64999)
    stopped_spawner.start()
    worker = stopped_spawner.run_r(stopped_spawner.client(), "worker0001", WAITING)
    assert of(worker.pid, "Gid") == ["64999"] * 4


def test_who_gets_a_used_uid_finds_nothing_of_its_last_owner(one_uid):
    client = one_uid.client()
    first = run_program(one_uid, client, "worker0001", PLANT)
    first.wait_for_output("PLANTED True True")
    assert os.listdir(one_uid.runtime_dir / "worker0001")
    client.call("stop", id="worker0001", grace=0)
    assert one_uid.leftovers() == {}
    second = run_program(one_uid, client, "worker0002", LOOK)
    assert second.uid == first.uid
    second.wait_for_output("FOUND [] [] []")


def test_a_uid_rests_while_a_directory_of_its_worker_cannot_be_removed(one_uid):
    client = one_uid.client()
    bundle = one_uid.bundle("waiting", {"app.R": WAITING})
    one_uid.spawn(client, "worker0001", bundle)
    stuck = one_uid.runtime_dir / "worker0001" / "stuck"
    stuck.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "tmpfs", stuck], check=True)
    try:
        client.send("stop", id="worker0001", grace=0)
        eventually(lambda: "quarantined" in one_uid.audit_text(), "it is said why", one_uid.audit_text)
        with pytest.raises(Refusal, match="uid_pool_exhausted"):
            one_uid.spawn(one_uid.client(), "worker0002", bundle)
    finally:
        subprocess.run(["umount", stuck], check=True)
        stuck.rmdir()
    eventually(lambda: one_uid.leftovers() == {}, "nothing is left", lambda: str(one_uid.leftovers()))
    assert one_uid.spawn(one_uid.client(), "worker0003", bundle).uid == one_uid.uids[0]


def test_a_uid_rests_over_a_restart_of_the_spawner_while_its_worker_lives(spawner, client):
    worker = spawner.run_r(client, "worker0001", WAITING)
    spawner.end()
    spawner.start()
    client = spawner.client()
    others = [spawner.run_r(client, f"worker1{number:03}", WAITING).uid for number in range(len(spawner.uids) - 1)]
    assert worker.uid not in others
    assert len(set(others)) == len(others)


def test_what_a_worker_left_leads_nobody_to_delete_or_change_anything_elsewhere(spawner, client):
    """Its directory is emptied as its own uid, and no link in it is followed."""
    canaries = spawner.root / "canaries"
    canaries.mkdir()
    for number in range(50):
        (canaries / str(number)).write_text("alive")
        (canaries / str(number)).chmod(0o666)
    canaries.chmod(0o777)  # whoever comes here may delete
    before = {path.name: (path.read_text(), path.stat().st_mode, path.stat().st_ino) for path in canaries.iterdir()}
    links = f"""
      for (i in 1:200) file.symlink('{canaries}', sprintf('/run/worker/link%d', i))
      for (i in 1:50) {{ dir.create(sprintf('/run/worker/d%d', i))
        file.symlink('{canaries}', sprintf('/run/worker/d%d/link', i))
        file.symlink('..', sprintf('/run/worker/d%d/up', i)); file.symlink('/', sprintf('/run/worker/d%d/root', i)) }}
      message('linked'); Sys.sleep(600)"""
    for number in range(3):
        worker = spawner.run_r(client, f"worker{number:04}", links)
        worker.wait_for_output("linked")
        client.call("stop", id=worker.id, grace=0)
    assert spawner.leftovers() == {}
    after = {path.name: (path.read_text(), path.stat().st_mode, path.stat().st_ino) for path in canaries.iterdir()}
    assert after == before
    assert len(after) == 50


def test_the_api_s_user_can_put_nothing_where_root_deletes(spawner, client):
    worker = spawner.run_r(client, "worker0001", WAITING)
    for place in (spawner.runtime_dir, spawner.runtime_dir / worker.id):
        for command in (["ln", "-s", "/etc", f"{place}/x"], ["mkdir", f"{place}/x"], ["ls", place], ["rmdir", place]):
            argv = ["setpriv", "--reuid", "blockyard-test", "--regid", "blockyard-test", "--clear-groups", *command]
            refused = subprocess.run(argv, capture_output=True, text=True, check=False)
            assert "Permission denied" in refused.stderr, (argv, refused)
