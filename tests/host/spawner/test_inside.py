"""What code in a worker can see and do: asked from inside, by R itself."""

import contextlib
import ctypes
import os
import re
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from running_spawner import EXAMPLES, PROLOGUE, Refusal, acting_as, api_user, told

# Becomes another program, which holds so many descriptors that an exec would pass on.
HOLDS = """
import os, sys
for _ in range(int(sys.argv[1])):
    os.set_inheritable(os.open("/etc/passwd", os.O_RDONLY), True)
os.execvp(sys.argv[2], sys.argv[2:])
"""


def test_the_environment_stays_out_of_the_command_line(spawner, client):
    worker = spawner.run_r(client, "worker0001", "Sys.sleep(600)", env={"APP_COLOUR": "canary"})
    with open(f"/proc/{worker.pid}/cmdline") as words:
        assert "canary" not in words.read()


def test_the_descriptors_are_the_three_standard_ones(stopped_spawner):
    # In R's place a script of the bundle, which finds what it was given before anything else opened a file.
    stopped_spawner.configure(r_path="/app/program")
    stopped_spawner.prefix = (sys.executable, "-c", HOLDS, "500")
    stopped_spawner.start()
    client = stopped_spawner.client()
    script = "#!/bin/sh\nls -l /proc/$$/fd /proc/1/fd; echo all\nsleep 600"
    bundle = stopped_spawner.state_dir / "bundles" / stopped_spawner.bundle("script", {"program": script})
    (bundle / "program").chmod(0o755)
    for number in range(3):  # a spawner that holds other workers' descriptors
        worker = stopped_spawner.spawn(client, f"worker{number:04}", "script")
    assert len(os.listdir(f"/proc/{stopped_spawner.process.pid}/fd")) > 500
    worker.wait_for_output("all")
    of_bwrap, of_program = "".join(worker.lines).split("/proc/2/fd:")
    held, given = (
        [line.split()[-3::2] for line in part.splitlines() if "->" in line] for part in (of_bwrap, of_program)
    )
    log = given[1][1]
    assert log.startswith("pipe:")
    assert sorted(given) == [["0", "/dev/null"], ["1", log], ["10", "/app/program"], ["2", log]]  # 10: the shell's own
    assert [target for _, target in held] == ["/dev/null", log, log, "anon_inode:[eventfd]"]  # for its child's status


def test_a_worker_dumps_no_core_and_opens_no_more_files_than_it_may(stopped_spawner):
    stopped_spawner.prefix = ("prlimit", "--core=unlimited", "--nofile=20000")  # what it would have without its own
    stopped_spawner.start()
    worker = stopped_spawner.run_r(stopped_spawner.client(), "worker0001", "message('up'); Sys.sleep(600)")
    worker.wait_for_output("up")
    pids = (stopped_spawner.cgroup_root / "workers/worker0001/cgroup.procs").read_text().split()
    assert len(pids) == 3  # bwrap outside, bwrap inside, R
    for pid in pids:
        limits = Path(f"/proc/{pid}/limits").read_text()
        assert re.search(r"Max core file size +0 +0 ", limits), limits
        assert re.search(r"Max open files +4096 +4096 ", limits), limits


def test_the_root_holds_what_is_allowed_and_nothing_else(spawner, client):
    top = told(spawner, client, 'for (name in list.files("/", all.files = TRUE, no.. = TRUE)) tell(name)')
    ours = {"app", "bin", "dev", "etc", "lib", "lib64", "proc", "run", "sbin", "tmp", "usr", "var"}
    assert set(top) - {"opt"} == ours
    assert ("opt" in top) == os.path.isdir("/opt/R")
    etc = told(spawner, client, 'for (name in list.files("/etc", all.files = TRUE, no.. = TRUE)) tell(name)')
    allowed = {"R", "alternatives", "fonts", "group", "host.conf", "hosts", "ld.so.cache", "localtime", "mime.types"}
    allowed |= {"nsswitch.conf", "passwd", "resolv.conf", "services", "ssl", "timezone"}
    assert set(etc) <= allowed
    assert told(spawner, client, 'for (name in list.files("/var", recursive = TRUE)) tell(name)')


def test_the_host_and_other_apps_are_out_of_sight(spawner, client):
    other = spawner.bundle("other-bundle", {"secret.txt": "secret"})
    for path in [
        f"{spawner.state_dir}/bundles/{other}/secret.txt",
        str(spawner.config),
        "/etc/shadow",
        "/root",
        "/home",
    ]:
        assert os.path.exists(path)
        assert told(spawner, client, f'tell(file.exists("{path}"))') == ["FALSE"]


def test_the_user_database_names_the_worker_alone(spawner, client):
    lines = told(spawner, client, 'for (line in c(readLines("/etc/passwd"), readLines("/etc/group"))) tell(line)')
    uid = spawner.workers[0].uid
    assert lines == [f"worker:x:{uid}:65534::/tmp:/usr/sbin/nologin", "worker:x:65534:"]


@pytest.mark.parametrize("place", ["/app", "/", "/usr", "/etc", "/dev", "/run", "/run/blockyard", "/var"])
def test_what_is_shared_cannot_be_written(spawner, client, place):
    assert told(spawner, client, f'tell(file.create("{place}/new", showWarnings = FALSE))') == ["FALSE"]


@pytest.mark.parametrize("place", ["/tmp", "/run/worker", "/dev/shm"])
def test_what_is_the_workers_own_can_be_written(spawner, client, place):
    assert told(spawner, client, f'tell(file.create("{place}/new"))') == ["TRUE"]


def test_the_programs_that_r_runs_cannot_be_changed(spawner, client):
    code = 'p <- "/run/blockyard/launch.R"; tell(suppressWarnings(Sys.chmod(p, "0777"))); tell(file.access(p, 2))'
    assert told(spawner, client, code) == ["FALSE", "-1"]


def test_a_worker_has_no_privilege_and_cannot_gain_any(spawner, client):
    code = """
      status <- readLines("/proc/self/status")
      for (line in grep("^(Cap|NoNewPrivs)", status, value = TRUE)) tell(gsub("\\\\s+", " ", line))
      commands <- c("unshare -U true", "unshare -m true", "mount -t tmpfs none /tmp", "chroot / true", "su -c true")
      for (command in commands)
        tell(system(paste(command, "> /dev/null 2>&1")) != 0)"""
    lines = told(spawner, client, code)
    assert (
        lines
        == [f"Cap{kind}: {'0' * 16}" for kind in ("Inh", "Prm", "Eff", "Bnd", "Amb")] + ["NoNewPrivs: 1"] + ["TRUE"] * 5
    )


def test_a_worker_sees_and_signals_its_own_processes_alone(spawner, client):
    neighbour = spawner.run_r(client, "neighbour1", "message('up'); Sys.sleep(600)")
    neighbour.wait_for_output("up")
    code = """
      for (pid in grep("^[0-9]+$", list.files("/proc"), value = TRUE)) tell(readLines(file.path("/proc", pid, "comm")))
      system("kill -9 -1")"""
    worker = spawner.run_r(client, "worker0001", PROLOGUE + code)
    spawner.result(client, "worker0001")
    assert {line.split()[1] for line in worker.output().splitlines() if "TOLD" in line} == {"bwrap", "R"}
    assert client.call("list", id="neighbour1")["workers"][0]["state"] == "running"


def test_without_a_network_there_is_no_way_out_but_the_app_is_served(spawner, client):
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
        reach = f'tell(class(try(socketConnection("127.0.0.1", {port}, timeout = 5), silent = TRUE))[1])'
        assert told(spawner, client, reach, network="host") == ["sockconn"]
        assert told(spawner, client, reach, network="none") == ["try-error"]
    assert told(spawner, client, 'tell(file.exists("/etc/resolv.conf"))', network="none") == ["FALSE"]
    worker = spawner.spawn(client, "hello00001", spawner.bundle("hello", EXAMPLES / "hello"), network="none")
    assert worker.get().startswith("HTTP/1.1 200 OK")


def test_workers_share_no_memory_and_no_host_name(spawner, client):
    subprocess.run(["ipcmk", "-M", "4096"], check=True, stdout=subprocess.DEVNULL)
    lines = told(spawner, client, 'tell(Sys.info()[["nodename"]]); tell(length(readLines("/proc/sysvipc/shm")))')
    subprocess.run(["ipcrm", "--all=shm"], check=True)
    assert lines == ["worker", "1"]


def test_the_bundle_is_the_working_directory_and_r_runs_it_there(spawner, client):
    bundle = spawner.bundle(
        "files", {"app.R": PROLOGUE + 'tell(getwd()); tell(readLines("data.csv")); quit()', "data.csv": "1,2\n"}
    )
    worker = spawner.spawn(client, "worker0001", bundle)
    spawner.result(client, "worker0001")
    assert "TOLD /app\nTOLD 1,2\n" in worker.output()


def test_data_that_root_named_is_mounted_as_root_said(stopped_spawner):
    for name, mode in (("open", 0o777), ("closed", 0o777)):
        (stopped_spawner.root / name).mkdir()
        (stopped_spawner.root / name).chmod(mode)
    root = stopped_spawner.root
    stopped_spawner.configure(
        f'[storage]\nstate_dir = "{stopped_spawner.state_dir}"\n'
        f'data_mounts = [{{name = "rw", path = "{root}/open", mode = "rw"}}, {{name = "ro", path = "{root}/closed"}}]\n'
    )
    stopped_spawner.start()
    client = stopped_spawner.client()
    code = 'for (name in c("rw", "ro")) tell(file.create(file.path("/data", name, "new"), showWarnings = FALSE))'
    assert told(stopped_spawner, client, code, data=["rw", "ro"]) == ["TRUE", "FALSE"]
    assert os.listdir(root / "open") == ["new"]
    assert told(stopped_spawner, client, 'tell(dir.exists("/data"))') == ["FALSE"]


def test_a_bundle_cannot_make_bwrap_write_on_the_host(spawner, client):
    victim = spawner.root / "victim"
    victim.mkdir()
    victim.chmod(0o777)
    bundle = spawner.state_dir / "bundles" / spawner.bundle("hostile", {"app.R": "quit()"})
    for name in ("run", "data", "library", "tmp", "dev", "proc", "etc"):
        (bundle / name).symlink_to(f"/oldroot{victim}")
    worker = spawner.spawn(client, "worker0001", "hostile")
    assert spawner.result(client, worker.id)["status"] == 0
    assert os.listdir(victim) == []


def test_a_name_that_is_swapped_while_workers_start_leads_nowhere_else(spawner, client):
    outside = spawner.root / "outside"
    outside.mkdir()
    (outside / "app.R").write_text(PROLOGUE + 'tell("outside"); quit()')
    outside.chmod(0o755)
    bundles = spawner.state_dir / "bundles"
    name = spawner.bundle("swapped", {"app.R": PROLOGUE + 'tell("inside"); quit()'})
    (bundles / "link").symlink_to(outside)
    exchange = f"renameat2(-100, b'{bundles}/{name}', -100, b'{bundles}/link', 2)"
    swaps = f"import ctypes\nlibc = ctypes.CDLL(None)\nwhile True: libc.{exchange}"
    racer = subprocess.Popen(["python3", "-c", swaps])
    heard = []
    try:
        for number in range(40):
            with contextlib.suppress(Refusal):
                worker = spawner.spawn(client, f"worker{number:04}", name)
                spawner.result(client, worker.id)
                heard.append(worker.output())
    finally:
        racer.kill()
        racer.wait()
    assert [text for text in heard if "TOLD inside" in text]
    assert not [text for text in heard if "TOLD outside" in text]


def test_the_api_reaches_the_socket_and_a_stranger_does_not(spawner, client):
    worker = spawner.spawn(client, "worker0001", spawner.bundle("hello", EXAMPLES / "hello"))
    worker.get()
    user = api_user()
    with acting_as(user.pw_uid, user.pw_gid):
        assert worker.get().startswith("HTTP/1.1 200 OK")
    with acting_as(65533, 65533), socket.socket(socket.AF_UNIX) as stranger, pytest.raises(PermissionError):
        stranger.connect(str(worker.socket))


def test_abstract_sockets_of_the_host_are_closed_where_the_kernel_can_close_them(spawner, client):
    landlock_abi = ctypes.CDLL(None).syscall(444, None, 0, 1)  # landlock_create_ruleset(…, …, _VERSION)
    name = f"blockyard-test-{os.getpid()}"
    connect = f"import socket; socket.socket(socket.AF_UNIX).connect(chr(0) + '{name}'); print('reached')"
    code = f'tell(paste(system2("python3", c("-c", shQuote("{connect}")), TRUE, TRUE), collapse = " "))'
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(f"\0{name}")
        listener.listen()
        apart, together = (told(spawner, client, code, network=network)[0] for network in ("none", "host"))
    assert "ConnectionRefusedError" in apart
    assert ("PermissionError" in together) == (landlock_abi >= 6)
    assert ("reached" in together) == (landlock_abi < 6)
