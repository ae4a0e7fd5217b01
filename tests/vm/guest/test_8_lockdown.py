"""The units' own walls: a program in the place of each daemon tries what the daemon never does."""

import ctypes
import json
import re
import tomllib
from pathlib import Path

import pytest
from conftest import CHECKOUT
from machine import DAEMONS, WORKERS, active, checks, r_process, run, systemctl, unit
from running_pair import simple_app

# What a process tries, each with what it is told: "done", or the name of the error.
TRIES = r"""
import ctypes, errno, json, os, socket, sys

libc = ctypes.CDLL(None, use_errno=True)

def call(number, *arguments):
    ctypes.set_errno(0)
    libc.syscall(number, *arguments)
    return errno.errorcode.get(ctypes.get_errno(), "done")

def attempt(action):
    try:
        action()
    except OSError as error:
        return errno.errorcode[error.errno]
    return "done"

def write(path):
    with open(path, "w"):
        pass

def unix():
    socket.socket(socket.AF_UNIX)

def bind():
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))

print(json.dumps({
    "uid": os.geteuid(),
    "io_uring": call(425, 0, None),
    "add_key": call(248, b"user", b"name", b"x", 1, -3),
    "landlock": call(444, None, 0, 1),
    "bind": attempt(bind),
    "inet": attempt(socket.socket),
    "packet": attempt(lambda: socket.socket(socket.AF_PACKET, socket.SOCK_RAW)),
    "unix": attempt(unix),
    "shadow": attempt(lambda: open("/etc/shadow").close()),
    "keys": attempt(lambda: os.listdir("/etc/ssl/private")),
    "boot": attempt(lambda: os.listdir("/boot")),
    "home": attempt(lambda: write("/home/x")),
    "etc": attempt(lambda: write("/etc/x")),
    "disk": attempt(lambda: os.open("/dev/vda", os.O_RDONLY)),
    "module": call(175, b"", 0, b""),
    "user namespace": call(272, 0x10000000),
    "core": open("/proc/self/limits").read().split("Max core file size")[1].split()[0],
}))
"""
IN_A_WORKER = """
import ctypes, errno

libc = ctypes.CDLL(None, use_errno=True)
told = []
for call in ((425, 0, None), (248, b"user", b"name", b"x", 1, -3)):  # io_uring_setup, add_key
    libc.syscall(*call)
    told.append(errno.errorcode.get(ctypes.get_errno(), "done"))
    ctypes.set_errno(0)
print(*told)
"""
LATER = "FileDescriptorStorePreserve"  # since 254: Debian 12 does without what it gives
DROPPED = r"^(Type|NotifyAccess|WatchdogSec|Restart\w*|FileDescriptorStore\w*|ExecStart|TimeoutSt\w+Sec)=.*\n"


@pytest.fixture(scope="module")
def in_place_of(server):
    """A function that runs the tries under a unit's settings, and returns what they were told."""
    program = Path("/run/tries.py")
    program.write_text(TRIES)
    Path("/home/x").unlink(missing_ok=True)
    twin = Path("/run/systemd/system/twin.service")

    def results(name):
        if name is None:
            return json.loads(run("/usr/bin/python3", program).stdout)
        text = (CHECKOUT / "systemd" / name).read_text()
        section = re.sub(DROPPED, "", text.partition("[Service]")[2], flags=re.MULTILINE)
        output = "StandardOutput=truncate:/run/tries.json\nExecStart=/usr/bin/python3 -I /run/tries.py\n"
        twin.write_text(f"[Service]\nType=oneshot\n{output}{section}")
        systemctl("daemon-reload")
        systemctl("start", "twin.service")
        return json.loads(Path("/run/tries.json").read_text())

    yield results
    for path in (program, twin, Path("/run/tries.json"), Path("/home/x"), Path("/etc/x")):
        path.unlink(missing_ok=True)
    systemctl("daemon-reload")


def test_without_a_unit_root_can_do_all_of_it(in_place_of):
    tried = in_place_of(None)
    assert tried.pop("uid") == 0
    assert tried.pop("core") != ""
    assert tried.pop("io_uring") in {"EFAULT", "EINVAL"}
    assert tried.pop("module") != "EPERM"
    assert {key for key, told in tried.items() if told != "done"} == set(), tried


def test_the_apis_unit_leaves_it_its_unix_sockets(in_place_of):
    tried = in_place_of("blockyard-api.service")
    assert tried.pop("uid") > 0
    assert tried.pop("boot") == "done"  # as everybody
    assert tried.pop("unix") == tried.pop("landlock") == "done"
    assert tried.pop("core") == "0"
    assert tried["io_uring"] == tried["add_key"] == "EPERM"
    assert {key for key, told in tried.items() if told == "done"} == set(), tried


def test_the_spawners_unit_leaves_it_what_its_children_need(in_place_of):
    tried = in_place_of("blockyard-spawner.service")
    assert tried.pop("uid") == 0
    assert tried.pop("core") == "0"
    for needed in ("unix", "inet", "user namespace", "landlock"):
        assert tried.pop(needed) == "done", needed
    assert tried["io_uring"] == tried["add_key"] == "EPERM"
    if "-BPF_FRAMEWORK" in run("systemctl", "--version").stdout:  # Debian 12's
        assert tried.pop("bind") == "done"
    else:
        assert tried["bind"] == "EPERM"
    assert tried["shadow"] == tried["keys"] == tried["boot"] == "EACCES"
    assert {key for key, told in tried.items() if told == "done"} == set(), tried


def filtered(name):
    """Name the calls of one unit's filter, or of a group of systemd's, which name each other."""
    found = set()
    for line in run("systemd-analyze", "syscall-filter", name).stdout.splitlines()[1:]:
        word = line.strip()
        found |= filtered(word) if word.startswith("@") else {word} - {""} if not word.startswith("#") else set()
    return found


def test_the_spawners_unit_takes_nothing_that_the_workers_own_filter_gives():
    text = (CHECKOUT / "systemd" / "blockyard-spawner.service").read_text()
    lines = re.findall(r"^SystemCallFilter=(~?)(.*)$", text, re.MULTILINE)
    allowed, refused = set(), set()
    for but, words in lines:
        for word in words.split():
            (refused if but else allowed).update(filtered(word) if word.startswith("@") else {word})
    policy = tomllib.loads((CHECKOUT / "blockyard_spawner" / "seccomp" / "policy.toml").read_text())
    given = {call for group in policy["group"] if group.get("answer", "ALLOW") == "ALLOW" for call in group["calls"]}
    given |= {each["call"] for each in policy["allow"]}
    assert given - (allowed - refused) == set()


def test_abstract_sockets_are_closed_to_workers_where_this_kernel_can_close_them(server):
    check = checks(server)["abstract_sockets"]
    scoped = ctypes.CDLL(None).syscall(444, None, 0, 1) >= 6  # the version that closes abstract sockets: Debian 13's
    assert check["severity"] == ("ok" if scoped else "warning"), check
    assert scoped or "only Landlock from Linux 6.12 on can close them; here: version" in check["fact"]


def test_the_unit_of_the_workers_holder_leaves_it_nothing_to_do(in_place_of):
    tried = in_place_of("blockyard-workers.service")
    assert tried.pop("uid") == 0  # of a user namespace of its own
    assert tried.pop("core") is not None
    for harmless in ("shadow", "keys", "boot", "landlock"):  # it reads and tells nobody
        tried.pop(harmless)
    assert {key for key, told in tried.items() if told == "done"} == set(), tried


def test_the_holders_walls_are_not_the_workers(server, plain):
    assert server.visitor().get(f"/app/{plain}/").status_code == 200
    process = r_process(active(server, plain)[0]["id"])
    (holder,) = (WORKERS / "holder" / "cgroup.procs").read_text().split()
    assert Path(f"/proc/{process}/ns/net").readlink() == Path("/proc/1/ns/net").readlink()
    assert Path(f"/proc/{holder}/ns/net").readlink() != Path("/proc/1/ns/net").readlink()
    told = run("systemd-analyze", "security", "--no-pager", WORKERS.name, check=False).stdout.strip().splitlines()[-1]
    assert float(re.search(r": ([\d.]+)", told)[1]) <= 1.5


def test_an_app_uses_no_io_uring_and_no_keyring_even_without_a_filter_of_its_own(server):
    body = "told <- system2('/usr/bin/python3', c('-I', '/app/tries.py'), stdout = TRUE)"
    files = simple_app(body, ui="fluidPage(paste(c('TOLD', told), collapse = ' '))")
    server.deploy("ring", {**files, "tries.py": IN_A_WORKER})
    page = server.visitor().get("/app/ring/")
    assert "TOLD EPERM EPERM" in page.text, page.text


def test_no_directive_is_unknown_to_this_systemd(server):
    for name in (*DAEMONS, "blockyard-workers.service"):
        said = run("systemd-analyze", "verify", unit(name, "FragmentPath"), check=False).stderr
        unknown = [line for line in said.splitlines() if "Unknown" in line and LATER not in line]
        assert unknown == []
        assert "Failed to parse" not in said, said
