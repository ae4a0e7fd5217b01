"""What an app can see of the server that runs it: its whole tree is walked, and all that it can read is searched."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from inside import SEARCH, assert_walked_and_found_what_is_allowed, canary, look, walk
from running_pair import USER, simple_app

KNOWN, OF_THE_PAIR, OF_THE_CONFIGURATION = canary(), canary(), canary()


@pytest.fixture(scope="module")
def outside(tmp_path_factory):
    """A file that everybody on the machine may read, in places that no app has any business in."""
    paths = [f"{place}/blockyard-canary-{os.getpid()}" for place in ("/home", "/srv", "/mnt", "/var/tmp", "/opt")]
    for path in paths:
        with open(path, "w") as file:
            file.write(OF_THE_PAIR)
        os.chmod(path, 0o644)
    yield paths
    for path in paths:
        os.unlink(path)


@pytest.fixture
def pair(own_pair, monkeypatch, outside):
    """A pair with secrets wherever an operator may have put some, and one that apps are meant to have."""
    monkeypatch.setenv("CANARY_OF_THE_ENVIRONMENT", OF_THE_PAIR)
    monkeypatch.setenv("BLOCKYARD_SECRET", OF_THE_PAIR)
    return own_pair(
        f'server.external_url = "http://keeper:{OF_THE_CONFIGURATION}@127.0.0.1:8080"\n'
        f'server.worker_env = {{APP_KNOWN = "{KNOWN}"}}'
    )


def test_the_whole_tree_of_an_app_is_what_the_list_allows(pair, outside):
    seen = walk(pair, "walks")
    assert_walked_and_found_what_is_allowed(seen)
    assert not set(outside) & set(seen["paths"])


def test_what_an_app_changes_in_proc_is_its_own(pair):
    settings = ("shmmax", "shmall", "msgmax", "msgmni", "sem", "pid_max", "ns_last_pid", "core_pattern", "hostname")
    before = {name: Path("/proc/sys/kernel", name).read_text() for name in settings}
    write = f"""
import json
done = []
for name in {settings!r}:
    for text in ("301", "|/app/look.py", "301 301 301 301"):
        try:
            with open("/proc/sys/kernel/" + name, "w") as file:
                file.write(text)
            done.append(name)
        except OSError:
            pass
print("LOOKED " + json.dumps(done), flush=True)
"""
    done = look(pair, "changes", write)
    del before["ns_last_pid"]  # moves by itself
    assert {name: Path("/proc/sys/kernel", name).read_text() for name in before} == before, done
    assert "core_pattern" not in done


def test_no_secret_of_the_server_is_in_anything_that_an_app_can_read(pair):
    pair.deploy("another", {"app.R": f"# {OF_THE_PAIR}\nshiny::shinyApp(shiny::fluidPage(), function(i, o) {{}})"})
    assert pair.visitor().get("/app/another/").status_code == 200
    for daemon in (pair.spawner, pair.api):  # they do have it
        with open(f"/proc/{daemon.pid}/environ") as environ:
            assert OF_THE_PAIR in environ.read()
    seen = look(pair, "searches", SEARCH)
    assert {secret for secret in seen["found"] if secret.startswith("CANARY")} == {KNOWN}, seen["found"]
    assert pair.token not in seen["found"]
    places = {place.split("/")[-1] for place in seen["found"][KNOWN]}
    assert places >= {"environ", "mem"}  # what is there is found
    assert {"memory of R", "files", "environ", "cmdline"} <= set(seen["read"]), seen


def test_no_secret_is_in_a_command_line(pair):
    assert pair.visitor().get("/app/nobody/").status_code == 404
    own = []
    for pid in filter(str.isdigit, os.listdir("/proc")):
        try:
            with open(f"/proc/{pid}/cmdline") as words:
                line = words.read()
        except OSError:
            continue
        assert pair.token not in line
        assert OF_THE_PAIR not in line
        assert OF_THE_CONFIGURATION not in line
        own += [line] if str(pair.config) in line else []
    assert len(own) >= 2  # those of both daemons were read


LOOK_INTO = """
import os, sys
for name in ("environ", "mem", "maps", "fd"):
    path = f"/proc/{sys.argv[1]}/{name}"
    try:
        os.listdir(path) if name == "fd" else os.close(os.open(path, os.O_RDONLY))
        print(name, "open")
    except OSError as error:
        print(name, error.strerror)
"""


def as_the_api(*arguments):
    """Word a command of the API's uid, without any capability."""
    return ["setpriv", "--reuid", USER, "--regid", USER, "--clear-groups", "--no-new-privs", *map(str, arguments)]


def looked_into(pid):
    command = as_the_api(sys.executable, "-c", LOOK_INTO, pid)
    told = subprocess.run(command, check=True, capture_output=True, text=True, cwd="/", timeout=30).stdout
    return dict(line.split(" ", 1) for line in told.splitlines())


def test_not_even_another_process_of_its_uid_looks_into_the_api(pair):
    pair.deploy("plain", simple_app())
    assert pair.visitor().get("/app/plain/").status_code == 200  # nor does it need to itself
    command = as_the_api(sys.executable, "-c", "print('here', flush=True); input()")
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, cwd="/") as ordinary:
        assert ordinary.stdout.readline() == b"here\n"
        assert set(looked_into(ordinary.pid).values()) == {"open"}
        ordinary.communicate(b"\n")
    seen = looked_into(pair.api.pid)
    assert seen.keys() == {"environ", "mem", "maps", "fd"}
    assert set(seen.values()) <= {"Permission denied", "Operation not permitted"}, seen
    limits = Path(f"/proc/{pair.api.pid}/limits").read_text().splitlines()
    assert next(line.split()[-3:-1] for line in limits if line.startswith("Max core file size")) == ["0", "0"]
