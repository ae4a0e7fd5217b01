"""What a worker runs into is told to its owner, and what it fills is its own: /tmp, /run/worker, its memory."""

import contextlib
import os
import re
from pathlib import Path

import pytest
from inside import SEARCH, assert_walked_and_found_what_is_allowed, canary, look, walk
from machine import DAEMONS, WORKERS, active, answers, as_user, audit, by, run, systemctl, unit
from running_pair import simple_app, wait_for

RUNTIME = "/run/blockyard/workers"
SECRET = canary()
MOUNT = "run-blockyard-workers.mount"
FILES = """
import os, sys
os.makedirs(sys.argv[1] + "/many", exist_ok=True)
try:
    for number in range(10**7):
        os.close(os.open(f"{sys.argv[1]}/many/{number}", os.O_CREAT | os.O_WRONLY))
except OSError as error:
    print("refused after", number, error, flush=True)
"""


@contextlib.contextmanager
def running(server, name, action, files=(), **settings):
    """Deploy an app that does something once a visitor is there; yield while he is, with the worker's id. It ends."""
    does = f"function(input, output, session) {{ later::later(function() {{ {action} }}, 0.5) }}"
    server.deploy(name, {**simple_app(server=does), **dict(files)}, **settings)
    try:
        with server.visitor().shiny(name):
            yield server.runtime(name)["workers"][0]["id"]
    finally:
        switch_off(server, name)


def log_of(server, name):
    return server.http.get(f"/api/v1/apps/{name}/logs", params={"stream": "false"}).text


def noted(server, name, words, within=120):
    """Wait for a line of the platform's own in an app's log."""
    line = re.compile(rf"^\[blockyard [^]]+\] .*{words}", re.MULTILINE)
    wait_for(lambda: line.search(log_of(server, name)), within, f"{words!r} in the log of {name}")


def hit(server, name):
    return [sentence for worker in server.workers(name) for sentence in worker["limits_hit"]]


def ended(server, name, within=120):
    """Wait for the end of an app's worker, and return why it ended."""
    return wait_for(lambda: [w for w in server.runtime(name)["workers"] if w["ended_at"]], within, "its end")[0][
        "end_reason"
    ]


def switch_off(server, name):
    server.http.post(f"/api/v1/apps/{name}/disable")
    wait_for(lambda: not server.workers(name), 120, f"the end of {name}")


def files_free(place):
    return os.statvfs(place).f_ffree


def another_starts(server, name):
    server.deploy(name, simple_app())
    assert server.visitor().get(f"/app/{name}/").status_code == 200
    switch_off(server, name)


def makes_files(place):
    return f"system('/usr/bin/python3 -I /app/files.py {place}', wait = FALSE)"


def available():
    return int(re.search(r"MemAvailable:\s+(\d+)", Path("/proc/meminfo").read_text())[1]) << 10


@pytest.fixture(scope="module")
def beside(server, plain):
    """An app that must go on answering, whatever its neighbours do."""
    visitor = server.visitor()

    def answers():
        answer = visitor.get(f"/app/{plain}/")
        assert answer.status_code == 200
        assert "plain page" in answer.text

    answers()
    return answers


def test_processes_that_could_not_start_are_told(server, beside):
    sleepers = "for (i in 1:30) system('for i in $(seq 20); do sleep 600 & done; wait', wait = FALSE)"
    with running(server, "crowd", sleepers):
        noted(server, "crowd", "could not start more than 512 processes")
        assert hit(server, "crowd") == ["could not start more than 512 processes"]
        shown = by(server, "get", "crowd", "--runtime").communicate(timeout=60)[0]
        assert "could not start more than 512 processes" in shown
        beside()


def test_an_app_that_ends_of_refused_processes_is_told_so_on_its_page(server, beside):
    visitor = server.visitor()
    does = "system('for i in $(seq 600); do sleep 600 & done'); quit(status = 3)"
    server.deploy(
        "gives-up",
        simple_app(server=f"function(input, output, session) {{ later::later(function() {{ {does} }}, 0.5) }}"),
    )
    with visitor.shiny("gives-up"):
        assert ended(server, "gives-up") == "exited with status 3 after it could not start more than 512 processes"
    page = visitor.get("/app/gives-up/", browser=True)
    assert "could not start more than 512 processes" in page.text


def test_waiting_for_the_processor_is_told(server, beside):
    spins = "for (i in 1:3) system('while :; do :; done', wait = FALSE)"
    with running(server, "busy", spins, cpu_limit=0.5):
        noted(server, "busy", "had to wait [0-9]+ s for its share of the processor")
        assert "for its share of the processor" in hit(server, "busy")[0]
        beside()


def test_a_full_tmp_and_too_many_open_files_are_explained(server):
    opens = "held = [open('/dev/null') for _ in range(5000)]"
    action = "system('head -c 400000000 /dev/zero > /tmp/big'); system('/usr/bin/python3 -I /app/opens.py')"
    with running(server, "full", action, {"opens.py": opens}):
        noted(server, "full", "ran out of room for files: its /tmp holds at most 256 MB")
        noted(server, "full", "could not open more files at once")
        assert len(hit(server, "full")) == 2


def test_the_workers_directories_are_a_file_system_of_their_own(server):
    options = run("findmnt", "--noheadings", "--output", "FSTYPE,OPTIONS", "--mountpoint", RUNTIME).stdout
    assert options.split()[0] == "tmpfs"
    for option in ("nosuid", "nodev", "noexec", "size=16384k", "nr_inodes=1048576", "mode=711"):
        assert option in options, options
    assert os.stat(RUNTIME).st_dev != os.stat("/run").st_dev
    assert unit(MOUNT, "ActiveState") == "active"


def test_it_outlives_the_spawner_with_the_workers_in_it(server, plain, beside):
    beside()
    mounted = unit(MOUNT, "InvocationID")
    worker = active(server, plain)[0]["id"]
    systemctl("stop", "blockyard-spawner.service", "blockyard-spawner.socket")
    beside()
    systemctl("start", "blockyard-spawner.service")
    beside()
    assert [found["id"] for found in server.workers(plain)] == [worker]
    assert unit(MOUNT, "InvocationID") == mounted


def test_a_worker_that_fills_its_directory_with_bytes_harms_nobody(server, beside):
    room = os.statvfs("/run").f_bavail
    action = "system('head -c 400000000 /dev/zero > /run/worker/big'); message('tried')"
    with running(server, "heavy", action):
        wait_for(lambda: "tried" in log_of(server, "heavy"), 60, "the attempt")
        assert "No space left on device" in log_of(server, "heavy")
        assert os.statvfs(RUNTIME).f_bavail == 0
        assert os.statvfs("/run").f_bavail >= room - (32 << 20) // 4096  # the journal may grow meanwhile
        beside()
        another_starts(server, "light")
    assert os.statvfs(RUNTIME).f_bavail > 4000


def test_a_worker_that_takes_the_files_of_all_is_ended_before_others_suffer_for_long(server, beside):
    # As many files as a slow machine makes in a moment; the rule is the same as with a million.
    run("mount", "-o", "remount,nr_inodes=60000", RUNTIME)
    try:
        host = files_free("/run")
        with running(server, "hoarder", makes_files("/run/worker"), {"files.py": FILES}):
            assert ended(server, "hoarder") == "made so many files in /run/worker that other apps could not start"
        assert files_free("/run") > host - 1000
        beside()
        wait_for(lambda: files_free(RUNTIME) > 59000, 60, "the end of what it made")
        another_starts(server, "thrifty")
    finally:
        run("mount", "-o", "remount,nr_inodes=1m", RUNTIME)


@pytest.mark.parametrize("place", ["/tmp", "/dev/shm", "/run/worker"])
def test_a_million_files_count_against_the_memory_of_who_makes_them(server, beside, place):
    name = f"files{place.count('/')}{place[1:4].replace('/', '')}"
    free = available()
    with running(server, name, makes_files(place), {"files.py": FILES}, memory_limit="192m"):
        assert ended(server, name, 200) == "used more than 192 MB of memory"
    assert available() > free - (400 << 20)
    beside()


def test_what_all_workers_may_use_together_is_told_as_that(server, beside):
    before = (WORKERS / "memory.max").read_text()
    try:
        with running(server, "greedy", "Sys.sleep(5); x <- list(); repeat x <- c(x, list(numeric(1e6)))"):
            most = int((WORKERS / "memory.current").read_text()) + (300 << 20)
            (WORKERS / "memory.max").write_text(str(most))
            assert ended(server, "greedy") == "was ended since all apps together used the server's memory"
    finally:
        (WORKERS / "memory.max").write_text(before)
    assert audit(app="greedy")[-1]["BLOCKYARD_RESULT"] == "oom"


def test_the_mount_waits_where_workers_are_still_below_it(server):
    systemctl("stop", "blockyard-workers.service")
    wait_for(lambda: not os.listdir(RUNTIME), 60, "an empty directory")
    systemctl("stop", "blockyard-api.service", "blockyard-spawner.socket", "blockyard-spawner.service", MOUNT)
    os.mkdir(f"{RUNTIME}/of-an-earlier-version")
    systemctl("start", MOUNT)
    assert unit(MOUNT, "ActiveState") == "inactive"
    os.rmdir(f"{RUNTIME}/of-an-earlier-version")
    systemctl("start", "blockyard.target")
    answers(server)
    assert unit(MOUNT, "ActiveState") == "active"
    another_starts(server, "on-the-mount")


def test_the_whole_tree_of_an_app_is_what_the_list_allows(server, outside):
    seen = walk(server, "walks")
    assert_walked_and_found_what_is_allowed(seen)
    assert not set(outside) & set(seen["paths"])


@pytest.fixture(scope="module")
def outside():
    """Files that everybody on the machine may read, in places that no app has any business in."""
    paths = [Path(place, "a-canary") for place in ("/home", "/srv", "/mnt", "/var/tmp", "/opt", "/etc/blockyard")]
    for path in paths:
        path.write_text(SECRET)
        path.chmod(0o644)
    yield [str(path) for path in paths]
    for path in paths:
        path.unlink()


@pytest.fixture(scope="module")
def secretive(server, outside):
    """The server with a secret in its daemons' environment and in its configuration file."""
    config = Path("/etc/blockyard/blockyard.toml")
    before = config.read_text()
    config.write_text(f"# the password is {SECRET}\n{before}")
    secret = Path("/etc/a-secret-environment")
    secret.write_text(f"A_SECRET={SECRET}\n")
    secret.chmod(0o600)
    drop_ins = [Path(f"/run/systemd/system/{name}.d/secret.conf") for name in DAEMONS]
    for drop_in in drop_ins:
        drop_in.parent.mkdir(parents=True, exist_ok=True)
        drop_in.write_text(f"[Service]\nEnvironmentFile={secret}\n")
    restarted(server)
    yield server
    config.write_text(before)
    for drop_in in drop_ins:
        drop_in.unlink()
        drop_in.parent.rmdir()
    secret.unlink()
    restarted(server)


def restarted(server):
    systemctl("daemon-reload")
    systemctl("restart", *DAEMONS)
    answers(server)


def test_no_secret_of_the_server_is_in_anything_that_an_app_can_read(secretive):
    for name in DAEMONS:  # they do have it
        assert SECRET in Path(f"/proc/{unit(name, 'MainPID')}/environ").read_text()
    seen = look(secretive, "searches", SEARCH, within=280)
    assert SECRET not in seen["found"], seen["found"]
    assert secretive.token not in seen["found"]
    assert {"memory of R", "files", "environ", "cmdline"} <= set(seen["read"]), seen


def test_no_secret_is_in_a_unit_a_command_line_or_an_environment_that_others_can_read(secretive):
    shown = as_user("nobody", "systemctl", "show", "blockyard-*", "run-blockyard-workers.mount").stdout
    assert "blockyard-api.service" in shown
    for command in ("cat /proc/[0-9]*/cmdline", "cat /proc/[0-9]*/environ", "journalctl --quiet --no-pager"):
        shown += as_user("nobody", "sh", "-c", f"{command} 2>/dev/null | tr '\\0' ' '").stdout
    shown += run("sh", "-c", "cat /proc/[0-9]*/cmdline 2>/dev/null | tr '\\0' ' '").stdout
    assert "/opt/blockyard/venv/bin/blockyard-api" in shown
    for secret in (SECRET, secretive.token):
        assert secret not in shown
