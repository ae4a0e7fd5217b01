"""Programs that look around inside a worker's sandbox, and what they may find: for tests here and in the machines.

Python runs them, as /usr has it: R itself opens no memory of a process and walks no tree in a bearable time.
"""

import json
import re
import secrets

from running_pair import simple_app, wait_for

# Trees that are bound as a whole: what is in them is the distribution's, and not walked in the comparison.
TREES = (
    "/usr",
    "/opt/R",
    "/etc/R",
    "/etc/alternatives",
    "/etc/fonts",
    "/etc/ssl/certs",
    "/var/cache/fontconfig",
    "/proc",
)
ALLOWED = {
    *("/", "/app", "/app/app.R", "/app/look.py", "/bin", "/lib", "/lib64", "/sbin"),
    *("/etc", "/etc/group", "/etc/host.conf", "/etc/hosts", "/etc/ld.so.cache", "/etc/localtime", "/etc/mime.types"),
    *("/etc/nsswitch.conf", "/etc/passwd", "/etc/resolv.conf", "/etc/services", "/etc/ssl", "/etc/ssl/openssl.cnf"),
    *("/etc/timezone", "/opt", "/run", "/run/blockyard", "/run/blockyard/launch.R", "/run/worker", "/tmp"),
    *("/run/worker/app.sock", "/var", "/var/cache", "/var/lib", "/var/lib/fontconfig"),
    *("/dev", "/dev/console", "/dev/core", "/dev/fd", "/dev/full", "/dev/null", "/dev/ptmx", "/dev/pts"),
    *("/dev/pts/ptmx", "/dev/random", "/dev/shm", "/dev/stderr", "/dev/stdin", "/dev/stdout", "/dev/tty"),
    *("/dev/urandom", "/dev/zero"),
}
# /dev/pts: no name can be made there, whatever its mode says.
WRITABLE = {"/dev/shm", "/run/worker", "/run/worker/app.sock", "/tmp", "/dev/pts", "/dev/pts/ptmx", "/dev/ptmx"}
WRITABLE |= {f"/dev/{name}" for name in ("full", "null", "random", "tty", "urandom", "zero")}
# Settings of the worker's own namespaces, of which it is told that it may change them.
NAMESPACED = re.compile("/proc/pressure/|/proc/sys/(fs/mqueue/|kernel/(auto_msgmni|msg|ns_last_pid|pid_max|sem|shm))")

WALK = """
import json, os, stat
trees = %r
found = {"paths": [], "sockets": [], "writable": [], "privileged": []}
seen = 0
for top, directories, files in os.walk("/"):
    if top == "/proc":
        directories[:] = [name for name in directories if not name.isdigit() and name not in ("self", "thread-self")]
    for path in [top] + [os.path.join(top, name) for name in directories + files]:
        seen += 1
        try:
            status = os.lstat(path)
        except OSError:
            continue
        if path in trees or not path.startswith(tuple(tree + "/" for tree in trees)):
            found["paths"].append(path)
        if stat.S_ISSOCK(status.st_mode):
            found["sockets"].append(path)
        if not stat.S_ISLNK(status.st_mode) and os.access(path, os.W_OK):
            found["writable"].append(path)
        if stat.S_ISREG(status.st_mode) and os.access(path, os.X_OK) and not os.statvfs(path).f_flag & os.ST_NOSUID:
            found["privileged"].append(path)  # a setuid bit would count here
found["paths"] = sorted(path for path in set(found["paths"]) if not path.startswith("/tmp/"))
for kind in ("sockets", "writable", "privileged"):
    found[kind] = sorted(path for path in set(found[kind]) if not path.startswith("/tmp/"))[:50]
found["seen"] = seen
print("LOOKED " + json.dumps(found), flush=True)
"""

# The pattern does not match itself, so the program finds no more than was there before it.
SEARCH = """
import json, os, re
pattern = re.compile(rb"CANARY-[0-9a-f]{16}|by_[A-Za-z0-9_-]{43}(?![A-Za-z0-9_-])")
found, read, refused = {}, {}, []
def note(where, data):
    for word in (b"CANARY-", b"by_"):  # the pattern alone takes seven times as long: minutes under emulation
        at = data.find(word)
        while at >= 0:
            if match := pattern.match(data, at):
                found.setdefault(match[0].decode(), []).append(where)
            at = data.find(word, at + 1)
def files():
    for top, directories, names in os.walk("/"):
        if top == "/":
            directories[:] = [name for name in directories if name not in ("proc", "sys", "usr", "dev")]
        for name in names:
            yield os.path.join(top, name)
for path in files():
    if not os.path.isfile(path):
        continue
    try:
        with open(path, "rb") as file:
            note(path, file.read())
            read["files"] = read.get("files", 0) + 1
    except OSError:
        refused.append(path)
for pid in filter(str.isdigit, os.listdir("/proc")):
    for name in ("environ", "cmdline", "mounts", "mountinfo", "status"):
        try:
            with open(f"/proc/{pid}/{name}", "rb") as file:
                note(f"/proc/{pid}/{name}", file.read())
                read[name] = read.get(name, 0) + 1
        except OSError:
            refused.append(f"/proc/{pid}/{name}")
    try:
        with open(f"/proc/{pid}/comm") as file:
            comm = file.read().strip()
        with open(f"/proc/{pid}/maps") as maps, open(f"/proc/{pid}/mem", "rb", buffering=0) as memory:
            for line in maps:
                span, rights = line.split()[:2]
                if "r" not in rights or "[v" in line:
                    continue
                start, end = (int(number, 16) for number in span.split("-"))
                for at in range(start, end, 1 << 20):
                    try:
                        note(f"/proc/{pid}/mem", os.pread(memory.fileno(), min(1 << 20, end - at) + 64, at))
                    except OSError:
                        try:
                            note(f"/proc/{pid}/mem", os.pread(memory.fileno(), min(1 << 20, end - at), at))
                        except OSError:
                            refused.append(f"/proc/{pid}/mem:{span}")
            read[f"memory of {comm}"] = 1
    except OSError as error:
        refused.append(f"/proc/{pid}/mem")
print("LOOKED " + json.dumps({"found": found, "read": read, "refused": refused[:50]}), flush=True)
"""


def canary():
    """A secret as the search knows one."""
    return f"CANARY-{secrets.token_hex(8)}"


def look(server, name, program, within=100, **settings):
    """Deploy an app that runs a program beside R, and return what it found and the worker's id."""
    app = simple_app("system('/usr/bin/python3 -I /app/look.py', wait = FALSE)")
    server.deploy(name, {**app, "look.py": program}, **settings)
    assert server.visitor().get(f"/app/{name}/").status_code == 200

    def line():
        text = server.http.get(f"/api/v1/apps/{name}/logs", params={"stream": "false"}).text
        assert "Traceback" not in text, text
        return re.search(r"^LOOKED (.*)$", text, re.MULTILINE)

    return json.loads(wait_for(line, within, "the end of the look around")[1])


def walk(server, name, **settings):
    """What is in a worker's tree."""
    return look(server, name, WALK % (TREES,), within=280, **settings)


def assert_walked_and_found_what_is_allowed(seen):
    assert seen["seen"] > 5000  # it did look, /usr included
    assert {"/app/app.R", "/etc/passwd", "/run/worker", "/usr", "/proc"} <= set(seen["paths"])
    strangers = set(seen["paths"]) - ALLOWED - set(TREES)
    assert not strangers, strangers
    assert set(seen["sockets"]) <= {"/run/worker/app.sock"}
    changeable = {path for path in seen["writable"] if not NAMESPACED.match(path)} - WRITABLE
    assert not changeable, sorted(changeable)
    assert seen["privileged"] == []
