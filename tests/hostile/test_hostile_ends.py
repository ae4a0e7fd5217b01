"""A hostile app at its end, and what it leaves: nothing survives, nothing reaches the next one, nobody else suffers."""

import os
import re
import shutil
import subprocess
import tempfile
import time
from pathlib import Path

import pytest
from attacks import FILTER, IPC, PROCESSES
from running_pair import wait_for
from target import READY, deploy_shell, processes_of, resident

pytest_plugins = ["hostile_apps"]
KEY = "0x626c6f63"
LEFT_BY = ("/run", "/tmp", "/var/tmp", "/dev/shm", "/dev/mqueue")


def files_of(target, uid):
    """The files of a uid wherever anybody may write, and where the workers' directories are: a mount of its own."""
    places = [place for place in (*LEFT_BY, str(target.runtime)) if os.path.isdir(place)]
    command = ["find", *places, "-xdev", "-uid", str(uid), "-print"]
    return subprocess.run(command, capture_output=True, text=True, check=False, timeout=60).stdout.split()


def started(target, name, program, **settings):
    """A hostile app of its own, its shell and its worker."""
    shell = deploy_shell(target, name, program, **settings)
    shell.run("true")
    return shell, target.worker(name)


def nothing_is_left(target, worker):
    assert processes_of(worker.uid) == []
    assert not (target.runtime / worker.id).exists()
    assert not (target.cgroup / "workers" / worker.id).exists()


# --- outliving a stop ------------------------------------------------------------------------------------------------


@pytest.mark.timeout(600)  # 100,000 processes
def test_of_a_swarm_of_tiny_daemons_nothing_survives_a_stop(target, program, neighbour_lives_on):
    shell, worker = started(target, "swarming", program)
    shell.run(f"(setsid /tmp/attack swarm {target.processes} > /run/worker/swarmed; sleep 600) > /dev/null 2>&1 &")
    wait_for(lambda: shell.run("cat /run/worker/swarmed") == "ok", READY, "the swarm's end")
    assert len(processes_of(worker.uid)) > 50
    target.end("swarming")
    nothing_is_left(target, worker)


def test_a_swarm_that_is_still_growing_does_not_outrun_its_stop(target, program, neighbour_lives_on):
    shell, worker = started(target, "growing", program)
    shell.run("for i in 1 2 3; do setsid /tmp/attack swarm 100000000 > /dev/null 2>&1 & done")
    assert processes_of(worker.uid)
    target.end("growing")
    nothing_is_left(target, worker)


def test_a_stopped_process_is_ended_like_any_other(target, program):
    shell, worker = started(target, "standing", program)
    shell.run("/tmp/attack stopped; sh -c 'kill -STOP $$' > /dev/null 2>&1 &")  # not this shell: R waits for it

    def standing():
        states = [Path(f"/proc/{pid}/status").read_text() for pid in processes_of(worker.uid)]
        return sum("\nState:\tT" in state for state in states) >= 5

    wait_for(standing, 60, "five stopped processes")
    target.end("standing")
    nothing_is_left(target, worker)


@pytest.mark.parametrize("off", [[], [PROCESSES]], ids=["with", "without"])
def test_the_end_of_its_outer_process_ends_no_worker_with_or_without_a_process_namespace_but_its_cgroup_does(
    shell, off
):
    command = "/tmp/attack swarm 50; echo forked; sleep 600"
    said = shell.weakened(command, off=off, flags=["--kill-outer"])  # which has waited for an empty cgroup then
    assert int(re.search(r"outlived by (\d+)", said)[1]) >= 5


# --- leftovers -------------------------------------------------------------------------------------------------------

PLANT = f"""
/tmp/attack plant_shm; /tmp/attack plant_queue; /tmp/attack add_key
cp /bin/sh /tmp/suid; chmod 6755 /tmp/suid; cp /bin/sh /run/worker/suid; chmod 6755 /run/worker/suid
echo left > /tmp/left; echo left > /dev/shm/left; mkdir -p /run/worker/deep/er; echo left > /run/worker/deep/er/left
chmod 0 /run/worker/deep/er /run/worker/deep
(setsid sleep 100000 &) ; ipcs -m | grep -c {KEY}
"""
LOOK = f"""
/tmp/attack find_shm; /tmp/attack find_queue; /tmp/attack find_key; ipcs -m | grep -c {KEY}
ls /tmp /dev/shm /run/worker; cat /proc/keys; cat /proc/[0-9]*/comm
"""


def test_a_sandbox_that_has_the_uid_of_an_ended_worker_finds_nothing_of_it(target, shell, program):
    planting, worker = started(target, "planting", program)
    said = planting.run(PLANT)
    assert said.splitlines() == ["ok", "ok", "EPERM", "1"]  # shared memory and a queue are planted; a key cannot be
    assert files_of(target, worker.uid)
    target.end("planting")
    nothing_is_left(target, worker)
    assert files_of(target, worker.uid) == []
    assert str(worker.uid) not in subprocess.check_output(["ipcs", "-m", "-c"], text=True)
    found = shell.weakened(LOOK, uid=worker.uid)
    assert found.splitlines()[:4] == ["ENOENT", "ENOENT", "EPERM", "0"]
    assert "left" not in found
    assert "suid" not in found
    assert "sleep" not in found


def test_without_an_ipc_namespace_shared_memory_passes_from_one_to_the_next(shell):
    uid = 2**20 + 9
    try:
        assert shell.weakened("/tmp/attack plant_shm", off=[IPC], uid=uid) == "ok"
        assert "CANARY" in shell.weakened("/tmp/attack find_shm", off=[IPC], uid=uid)
        assert "CANARY" not in shell.weakened("/tmp/attack find_shm", uid=uid)
    finally:
        subprocess.run(["ipcrm", "--shmem-key", KEY], check=True)


def test_without_the_filter_a_key_stays_in_its_user_namespace_and_outside_of_one_passes_to_the_next_of_its_uid(
    shell, program
):
    uid = 2**20 + 11
    look = "/tmp/attack find_key"
    assert shell.weakened(f"/tmp/attack add_key; {look}", off=[FILTER], uid=uid).split() == ["ok", "CANARY", "ok"]
    assert shell.weakened(look, off=[FILTER], uid=uid) == "ENOKEY"
    with tempfile.TemporaryDirectory() as place:
        Path(place).chmod(0o755)
        bare = ["setpriv", f"--reuid={uid}", "--regid=65534", "--clear-groups", shutil.copy(program, place)]
        assert subprocess.check_output([*bare, "add_key"], text=True) == "ok\n"
        try:
            assert subprocess.check_output([*bare, "find_key"], text=True) == "CANARY\nok\n"
            assert shell.weakened(look, off=[FILTER], uid=uid) == "ENOKEY"
            assert shell.weakened(look, uid=uid) == "EPERM"
        finally:
            subprocess.run([*bare, "drop_keys"], check=True)


def test_the_sweep_of_a_directory_that_is_full_of_links_touches_nothing_else(target, program):
    victim = Path("/run/hostile-victim")  # where any uid may write, so that nothing but the sweep's care protects it
    (victim / "deep").mkdir(parents=True, exist_ok=True)
    for path in (victim, victim / "deep"):
        path.chmod(0o777)
        (path / "canary").write_text("alive")
        (path / "canary").chmod(0o666)
    try:
        shell, worker = started(target, "sweeping", program)
        shell.run(f"""
          cd /run/worker; for i in $(seq 200); do mkdir -p d$i/e; ln -s {victim} d$i/link; ln -s {victim}/deep l$i; done
          ln -s {victim} d1/e/x
          cat > /tmp/race.py <<'END'
import ctypes
libc = ctypes.CDLL(None)
while True:
    for i in range(1, 201):
        libc.renameat2(-100, b"/run/worker/d%d" % i, -100, b"/run/worker/l%d" % i, 2)
END
          for i in 1 2; do setsid python3 -I /tmp/race.py > /dev/null 2>&1 & done""")
        assert len(processes_of(worker.uid)) >= 4
        target.end("sweeping")
        nothing_is_left(target, worker)
        for path in (victim, victim / "deep"):
            assert (path / "canary").read_text() == "alive"
            assert path.stat().st_mode & 0o7777 == 0o777
            assert (path / "canary").stat().st_mode & 0o7777 == 0o666
    finally:
        subprocess.run(["rm", "-rf", victim], check=True)


# --- its memory ------------------------------------------------------------------------------------------------------


def test_files_without_end_that_take_no_space_end_as_a_want_of_memory(target, program, neighbour_lives_on, capsys):
    if "memory" not in (target.cgroup / "cgroup.controllers").read_text().split():
        with capsys.disabled():
            print("\nnot run here: files without end, since there is no memory controller; a booted machine runs it")
        return
    shell, worker = started(target, "littering", program, memory_limit="256m")
    answer = shell.visitor.http.get("/app/littering/", params={"sh": "/tmp/attack files"})
    assert answer.status_code == 502, answer.text  # else its own file system ended it
    wait_for(lambda: not target.server.workers("littering"), READY, "its end")
    assert target.last_worker("littering")["end_reason"] == "used more than 256 MB of memory"
    nothing_is_left(target, worker)


# --- its socket ------------------------------------------------------------------------------------------------------

REPLACED = {
    "a link to the spawner's socket": "ln -s {spawner_socket} app.sock",
    "a link to another worker's socket": "ln -s {other} app.sock",
    "a FIFO": "mkfifo -m 666 app.sock",
    "a plain file": "echo > app.sock; chmod 666 app.sock",
    "a directory": "mkdir -m 777 app.sock",
}


@pytest.mark.parametrize("how", REPLACED.values(), ids=REPLACED)
def test_what_stands_in_place_of_a_workers_socket_is_not_connected_to(
    target, program, neighbour, neighbour_lives_on, how
):
    other = target.runtime / neighbour[1].id / "app.sock"
    shell, worker = started(target, "replacing", program)
    replace = how.format(spawner_socket=target.spawner_socket, other=other)
    shell.run(f"(sleep 1; cd /run/worker; rm -f app.sock; {replace}; touch replaced) > /dev/null 2>&1 &")
    wait_for((target.runtime / worker.id / "replaced").exists, 60, "the replacement")
    answer = shell.visitor.http.post("/app/replacing/")  # never sent on a connection that was checked before
    assert answer.status_code in (502, 503)
    assert "plain page" not in answer.text
    wait_for(lambda: not target.server.workers("replacing"), READY, "its end")
    assert "impostor" in target.last_worker("replacing")["end_reason"]
    nothing_is_left(target, worker)


def test_a_connection_that_follows_links_would_have_reached_the_other_worker(target, program, neighbour):
    other = target.runtime / neighbour[1].id / "app.sock"
    shell, worker = started(target, "linking", program)
    shell.run(f"ln -s {other} /run/worker/link.sock")
    naive = target.taken_over("connect", target.runtime / worker.id / "link.sock")
    assert naive == [{"connected": True, "uid": neighbour[1].uid}]
    target.end("linking")


# --- its log ---------------------------------------------------------------------------------------------------------

KEPT = 11 << 20  # bytes: two segments of blockyard_api/workers/log.py, and what it says about the rest
GROWS = 24 << 20  # bytes that the API may grow by


def test_a_flood_of_log_lines_costs_the_api_no_memory_and_a_bounded_file(target, shell, neighbour_lives_on):
    api = target.api()
    before, amount = resident(api), 4 * KEPT
    began = time.monotonic()
    shell.run(f"yes 'a line of a flood' | head -c {amount} >&3; head -c {amount // 4} /dev/zero >&3")
    assert target.server.http.get("/healthz").text == "ok"
    assert resident(api) < before + GROWS, f"{amount} bytes in {time.monotonic() - began:.0f} s"
    worker = target.worker("hostile")
    kept = sum(path.stat().st_size for path in (target.state / "logs").rglob("*") if worker.id in str(path))
    assert 0 < kept <= KEPT
