"""The API, taken over: what whoever has its uid may say to the spawner, and do to this machine. Run as that uid.

takeover.py connect PATH             follow a name and tell who listens there
takeover.py ask SOCKET < requests    send requests, one JSON object a line, and print the replies
takeover.py flood SOCKET TIMES       send a full load of descriptors again and again
takeover.py hold SOCKET COUNT        start so many probes at once, and go away without a word
takeover.py write PATH…              try to write to files, and to make, move and remove them
takeover.py race SOCKET DIRECTORY NAME OTHER TIMES WORD   swap a bundle's name with a link while workers start, so many
                                                          times or until one has said a word, at most 50 times as often
"""

import contextlib
import ctypes
import errno
import json
import os
import socket
import struct
import subprocess
import sys
import tempfile
from pathlib import Path

from blockyard_spawner import protocol


class Client:
    """A connection that says what it likes."""

    def __init__(self, path):
        self.sock = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self.sock.settimeout(120)
        self.sock.connect(path)
        self.seq = 0
        self.say(op="hello", version=protocol.VERSION)

    def send(self, descriptors=(), **request):
        self.seq += 1
        socket.send_fds(self.sock, [protocol.reply(**{"seq": self.seq, **request})], list(descriptors))

    def hear(self):
        packet, descriptors, _, _ = socket.recv_fds(self.sock, 65536, 4)
        for descriptor in descriptors:
            os.close(descriptor)
        return protocol.unpack(packet) if packet else {"error": {"code": "closed", "message": ""}}

    def say(self, descriptors=(), **request):
        self.send(descriptors, **request)
        return self.hear()


def connect(path):
    with socket.socket(socket.AF_UNIX) as sock:
        try:
            sock.connect(path)
        except OSError as error:
            return {"connected": False, "error": errno.errorcode[error.errno]}
        _, uid, _ = struct.unpack("iII", sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12))
        return {"connected": True, "uid": uid}


def ask(path):
    """Each request on its own connection, a spawn with the write end of a pipe; what ran is left to be stopped."""
    for line in sys.stdin:
        client = Client(path)
        request = json.loads(line)
        reading, writing = os.pipe()
        answer = client.say([writing] if request.get("op") == "spawn" else [], **request)
        os.close(writing)
        os.close(reading)
        print(json.dumps(answer), flush=True)
        client.sock.close()


def flood(path, times):
    refused = 0
    given = [os.open("/dev/null", os.O_RDONLY) for _ in range(253)]
    for _ in range(int(times)):
        client = Client(path)
        with contextlib.suppress(OSError):
            refused += client.say(given, op="list")["error"]["code"] == "too_large"
        client.sock.close()
    return {"refused": refused}


def hold(path, count):
    client = Client(path)
    _, writing = os.pipe()
    replies = []
    for number in range(int(count)):
        wish = {"op": "spawn", "id": f"held{os.getpid():08}{number:04}", "kind": "probe", "app": "held"}
        replies.append(client.say([writing], **wish))
    return {"started": [reply["ok"]["id"] for reply in replies if "ok" in reply],
            "refused": [reply["error"]["code"] for reply in replies if "error" in reply]}  # fmt: skip


def attempts(path):
    """Name each way to change a file or its place that works for this user, and undo it."""
    place = Path(path)
    found = []

    def tried(name, action, undo=lambda: None):
        with contextlib.suppress(OSError):
            action()
            found.append(name)
            undo()

    if place.is_dir():
        mine = place / "planted-by-an-attack"
        tried("make", lambda: mine.touch(exist_ok=False), mine.unlink)
    else:
        tried("write", lambda: os.close(os.open(path, os.O_WRONLY)))
    moved = place.with_name(place.name + ".moved")
    tried("move", lambda: place.rename(moved), lambda: moved.rename(place))
    tried("mode", lambda: place.chmod(place.stat().st_mode & 0o7777))
    return found


def write(*paths):
    """Try the files, and whatever is below the directories."""
    tried, possible = 0, {}
    for path in paths:
        for below in [path, *(os.path.join(top, name) for top, dirs, files in os.walk(path) for name in dirs + files)]:
            tried += 1
            if not os.path.islink(below) and (found := attempts(below)):
                possible[below] = found
    return {"tried": tried, "possible": possible}


def race(path, directory, name, other, times, word):
    """Start workers from a name that is a directory at one moment and a link to another at the next."""
    exchange = (
        "import ctypes, sys\nlibc = ctypes.CDLL(None)\n"
        "while True: libc.renameat2(-100, sys.argv[1].encode(), -100, sys.argv[2].encode(), 2)"
    )
    link = tempfile.mktemp(dir=directory)
    os.symlink(other, link)
    racer = subprocess.Popen([sys.executable, "-c", exchange, f"{directory}/{name}", link])
    heard, refused = [], 0
    try:
        for number in range(50 * int(times)):
            if number >= int(times) and any(word in text for text in heard):
                break
            client = Client(path)
            reading, writing = os.pipe()
            wish = {"op": "spawn", "id": f"race{os.getpid():08}{number:05}", "kind": "app", "app": "race"}
            answer = client.say([writing], bundle=name, **wish)
            os.close(writing)
            if "error" in answer:
                refused += 1
                os.close(reading)
            else:
                with open(reading) as log:
                    heard.append(log.read(4096))
            client.sock.close()
    finally:
        racer.kill()
        racer.wait()
    if os.path.islink(f"{directory}/{name}"):
        libc = ctypes.CDLL(None)
        libc.renameat2(-100, f"{directory}/{name}".encode(), -100, link.encode(), 2)
    os.unlink(link)
    return {"heard": heard, "refused": refused}


COMMANDS = {"connect": connect, "flood": flood, "hold": hold, "write": write, "race": race}
if sys.argv[1] == "ask":
    ask(sys.argv[2])
else:
    print(json.dumps(COMMANDS[sys.argv[1]](*sys.argv[2:])))
