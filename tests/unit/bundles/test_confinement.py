"""What a process that reads a hostile archive can still open, should its parser be taken over."""

import json
import os
import socket
import subprocess
import sys

TRIES = """
import errno, json, os, signal, socket, sys
import prctl
from blockyard_api.bundles.confinement import reach_nobody, stay_below

def told(action):
    try:
        action()
    except OSError as error:
        return errno.errorcode[error.errno]
    return "done"

inside, outside = sys.argv[1:]
opened = open(outside)
prctl.set_no_new_privs(1)
can = True
if os.environ["CONFINED"] == "1":
    reach_nobody()
    can = stay_below(os.open(inside, os.O_DIRECTORY))
print(json.dumps({
    "can": can,
    "read outside": told(lambda: open(outside).close()),
    "list outside": told(lambda: os.listdir(os.path.dirname(outside))),
    "write outside": told(lambda: open(outside + ".new", "w").close()),
    "remove outside": told(lambda: os.remove(outside + ".old")),
    "connect": told(lambda: socket.socket(socket.AF_UNIX).connect(f"{outside}.socket")),
    "signal its parent": told(lambda: os.kill(os.getppid(), 0)),
    "signal by pidfd": told(lambda: signal.pidfd_send_signal(os.pidfd_open(os.getppid()), 0)),
    "run": told(lambda: os.execve("/nonexistent" if os.environ["CONFINED"] == "0" else "/bin/true", ["true"], {})),
    "an open file": opened.read(),
    "make a directory": told(lambda: os.mkdir(f"{inside}/a")),
    "make a file": told(lambda: open(f"{inside}/a/file", "w").close()),
    "link it": told(lambda: os.link(f"{inside}/a/file", f"{inside}/other")),
    "make a symbolic link": told(lambda: os.symlink("a/file", f"{inside}/symbolic")),
    "make a FIFO": told(lambda: os.mkfifo(f"{inside}/fifo")),
    "make a socket": told(lambda: socket.socket(socket.AF_UNIX)),
}))
"""
OUTSIDE = ("read outside", "list outside", "write outside", "remove outside", "run", "make a FIFO")
REACHED = ("connect", "signal its parent", "signal by pidfd", "make a socket")
INSIDE = ("make a directory", "make a file", "link it", "make a symbolic link")


def tried(directory, confined):
    inside, outside = directory / "inside", directory / "outside"
    inside.mkdir(parents=True)
    outside.write_text("of the server")
    (directory / "outside.old").write_text("")
    listener = socket.socket(socket.AF_UNIX)  # as the spawner's: whoever has this uid may connect
    listener.bind(f"{outside}.socket")
    listener.listen()
    environ = {**os.environ, "CONFINED": str(int(confined))}
    argv = [sys.executable, "-c", TRIES, inside, outside]
    with listener:
        return json.loads(subprocess.run(argv, check=True, stdout=subprocess.PIPE, env=environ, timeout=30).stdout)


def test_it_opens_and_makes_files_in_its_directory_alone_and_reaches_nobody(tmp_path):
    told = tried(tmp_path / "confined", confined=True)
    assert told["can"], "this kernel has no Landlock"
    assert {name: told[name] for name in OUTSIDE} == dict.fromkeys(OUTSIDE, "EACCES")
    assert {name: told[name] for name in REACHED} == dict.fromkeys(REACHED, "EPERM")
    assert {name: told[name] for name in INSIDE} == dict.fromkeys(INSIDE, "done")
    assert told["an open file"] == "of the server"


def test_without_it_all_of_that_is_possible(tmp_path):
    told = tried(tmp_path / "free", confined=False)
    assert told.pop("run") == "ENOENT"
    assert {name for name, how in told.items() if how != "done"} == {"can", "an open file"}
