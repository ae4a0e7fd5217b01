"""What a worker runs into is told to its owner, and what it fills is its own: /tmp, /run/worker, its memory."""

import contextlib
import os
from pathlib import Path

import pytest
from inside import SEARCH, assert_walked_and_found_what_is_allowed, canary, look, walk
from machine import DAEMONS, answers, as_user, hit, noted, run, switch_off, systemctl, unit
from running_pair import simple_app, wait_for

RUNTIME = "/run/blockyard/workers"
SECRET = canary()
MOUNT = "run-blockyard-workers.mount"


@contextlib.contextmanager
def running(server, name, action, files=(), **settings):
    """Deploy an app that does something once a visitor is there; yield while he is, with the worker's id. It ends."""
    does = f"function(input, output, session) {{ later::later(function() {{ {action} }}, 0.5) }}"
    server.deploy(name, {**simple_app(server=does), **dict(files)}, **settings)
    try:
        with server.visitor().shiny(name):
            yield server.runtime(name)["workers"][0]["id"]
    finally:
        switch_off(server, name, within=120)


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
    for option in ("nosuid", "nodev", "noexec", "size=16384k", "nr_inodes=131072", "mode=711"):
        assert option in options, options
    assert os.stat(RUNTIME).st_dev != os.stat("/run").st_dev
    assert unit(MOUNT, "ActiveState") == "active"


LITTER = """
import os
here = "/run/worker"
for depth in range(5):  # the deepest is made last, so that whoever walks holds the names of all above it
    with open(f"{here}/0", "w"):
        pass
    for number in range(1, 26000):
        os.link(f"{here}/0", f"{here}/{number:0100}")
    here = f"{here}/d"
    os.mkdir(here)
"""


def test_the_workers_that_leave_as_many_files_as_they_can_are_ended_and_swept(server):
    before = unit("blockyard-spawner.service", "MainPID")
    litter = "system('/usr/bin/python3 -I /app/litter.py')"
    with running(server, "litters", litter, {"litter.py": LITTER}) as worker:
        wait_for(lambda: not Path(RUNTIME, worker).exists(), 300, "the end of the worker and of all its files")
        assert "made so many files in /run/worker" in str(server.runtime("litters"))
    assert unit("blockyard-spawner.service", "MainPID") == before
    assert unit("blockyard-spawner.service", "OOMPolicy") == "continue"


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
    systemctl("daemon-reload")
    systemctl("restart", *DAEMONS)
    answers(server)
    yield server
    config.write_text(before)
    for drop_in in drop_ins:
        drop_in.unlink()
        drop_in.parent.rmdir()
    secret.unlink()
    systemctl("daemon-reload")  # the daemons are restarted soon enough


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
