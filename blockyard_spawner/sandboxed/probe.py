"""What a worker can reach, seen from inside its sandbox: one JSON object a line on standard output.

    BLOCKYARD_PROBE_NONCE      repeated in the first line and in the last: who reads both knows that all of it ran
    BLOCKYARD_PROBE_TARGETS_n  the parts of a JSON list, n from 0 on, of {"host", "port"}, {"path"}, {"abstract"}, or
                               {"gateway": true, "port"}, which is the host as a container on a bridge sees it; and
                               "ping": true for a Redis to be asked something

It listens on the worker's socket, so that the kernel can tell the API who this is. Nothing is sent to any target but
that one question.
"""

import contextlib
import ctypes
import errno
import fcntl
import ipaddress
import json
import os
import pathlib
import selectors
import signal
import socket
import struct
import sys
import termios
import threading
import time
from typing import Any

RESOLVED_WITHIN, CONNECTED_WITHIN, ASKED_WITHIN = 1.5, 1.0, 10.0  # seconds
LANDLOCK_CREATE_RULESET, LANDLOCK_VERSION = 444, 1  # the same number on every architecture
Target = dict[str, Any]
Address = tuple[int, Any]  # family and address

PING = b"*1\r\n$4\r\nPING\r\n"


def say(**line: object) -> None:
    """Print a line."""
    sys.stdout.write(json.dumps(line) + "\n")
    sys.stdout.flush()


def listen() -> socket.socket:
    """Listen where an app would."""
    listener = socket.socket(socket.AF_UNIX)
    os.umask(0o117)
    listener.bind(os.environ["BLOCKYARD_SOCKET"])
    listener.listen()
    return listener


def status() -> dict[str, str]:
    """Return what the kernel says about this process."""
    return dict(line.split(":", 1) for line in pathlib.Path("/proc/self/status").read_text().splitlines())


def landlock() -> int:
    """Return the version of Landlock that the kernel has, or 0."""
    return max(0, int(ctypes.CDLL(None).syscall(LANDLOCK_CREATE_RULESET, None, 0, LANDLOCK_VERSION)))


def typing(into: socket.socket) -> str:
    """Return the error's name of typing into what is no terminal: ENOTTY, but where a filter answers before that."""
    try:
        fcntl.ioctl(into, termios.TIOCSTI, b"x")
    except OSError as failure:
        return errno.errorcode.get(failure.errno or 0, "unknown")
    return ""


def addresses(target: Target) -> list[Address]:
    """Return the socket addresses of a target, as (family, address)."""
    if "path" in target:
        return [(socket.AF_UNIX, target["path"])]
    if "abstract" in target:
        return [(socket.AF_UNIX, "\0" + target["abstract"])]
    host = gateway() if "gateway" in target else target["host"]
    found = socket.getaddrinfo(host, target["port"], type=socket.SOCK_STREAM)
    return [(family, address) for family, _, _, _, address in found]


def gateway() -> str:
    """Return the address of the default gateway by IPv4. Raises OSError where there is none."""
    for line in pathlib.Path("/proc/self/net/route").read_text().splitlines()[1:]:
        _, destination, via, *_ = line.split()
        if int(destination, 16) == 0 and int(via, 16):
            return socket.inet_ntoa(struct.pack("=I", int(via, 16)))
    raise OSError(errno.ENETUNREACH, "no gateway")


def is_name(target: Target) -> bool:
    """Tell whether a resolver has to be asked."""
    try:
        ipaddress.ip_address(target.get("host", "::"))
    except ValueError:
        return True
    return False


def resolve(targets: list[Target]) -> list[list[Address] | str]:
    """Return each target's addresses, or the words of why there are none."""
    found: list[list[Address] | str] = ["its name was not resolved in time"] * len(targets)

    def look_up(index: int) -> None:
        try:
            found[index] = addresses(targets[index])
        except (OSError, UnicodeError) as failure:
            found[index] = f"its name is not known: {failure}"

    asking = []
    for index, target in enumerate(targets):
        if is_name(target):
            asking.append(threading.Thread(target=look_up, args=(index,), daemon=True))
            asking[-1].start()
        else:
            look_up(index)
    until = time.monotonic() + RESOLVED_WITHIN
    for thread in asking:
        thread.join(max(0, until - time.monotonic()))
    return list(found)


class Attempt:
    """One connection to one address of a target."""

    def __init__(self, index: int, address: Address, *, ping: bool) -> None:
        self.index, self.ping, self.failure, self.answer = index, ping, "timeout", ""
        self.reached = self.asked = False
        self.socket = socket.socket(address[0], socket.SOCK_STREAM)
        self.socket.setblocking(False)
        self.over = self._settle(self.socket.connect_ex(address[1]))

    def _settle(self, number: int) -> bool:
        """Take connect's result; return whether nothing more is to come."""
        if number == errno.EINPROGRESS:
            return False
        self.reached = number in (0, errno.EAGAIN)  # EAGAIN: a Unix socket whose queue is full
        self.failure = "" if self.reached else errno.errorcode.get(number, str(number))
        return not (self.reached and self.ping)

    def step(self) -> bool:
        """Go on after the socket became ready; return whether nothing more is to come."""
        if not self.reached:
            return self._settle(self.socket.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR))
        try:
            if not self.asked:
                self.asked = True
                self.socket.send(PING)
                return False
            self.answer = self.socket.recv(200).decode("ascii", "replace").split("\r\n")[0]
        except OSError as failure:
            self.answer = f"({failure.strerror})"
        return True


def begin(targets: list[Target]) -> tuple[list[Attempt], dict[int, str]]:
    """Begin to connect to every address of every target; return the attempts, and why there is none for others."""
    attempts: list[Attempt] = []
    failures: dict[int, str] = {}
    for index, found in enumerate(resolve(targets)):
        if isinstance(found, str):
            failures[index] = found
            continue
        for address in found:
            try:
                attempts.append(Attempt(index, address, ping=targets[index].get("ping", False)))
            except OSError as failure:  # such as an address family that is not allowed
                failures[index] = errno.errorcode.get(failure.errno or 0, str(failure))
    return attempts, failures


def wait(attempts: list[Attempt]) -> None:
    """Wait for all attempts at the same time, until each is over or it is time."""
    with selectors.DefaultSelector() as waiting:
        for attempt in attempts:
            if not attempt.over:
                waiting.register(attempt.socket, selectors.EVENT_WRITE, attempt)
        until = time.monotonic() + CONNECTED_WITHIN
        while waiting.get_map() and (left := until - time.monotonic()) > 0:
            for key, _ in waiting.select(left):
                if key.data.step():
                    waiting.unregister(key.fileobj)
                elif key.data.asked:
                    waiting.modify(key.fileobj, selectors.EVENT_READ, key.data)


def try_all(targets: list[Target]) -> None:
    """Try every target, and print one line for each."""
    attempts, failures = begin(targets)
    wait(attempts)
    for index in range(len(targets)):
        own = [attempt for attempt in attempts if attempt.index == index]
        reached = [attempt for attempt in own if attempt.reached]
        answer = next((attempt.answer for attempt in reached if attempt.answer), "")
        reason = "" if reached else next((attempt.failure for attempt in own), failures.get(index, "no address"))
        say(target=index, reached=bool(reached), failure=reason, answer=answer)


def main() -> None:
    """Listen, tell who this is, try everything, and wait until the API has been there."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # how a worker is stopped: a traceback would be one line too many
    nonce = os.environ["BLOCKYARD_PROBE_NONCE"]
    parts: list[str] = []
    while (name := f"BLOCKYARD_PROBE_TARGETS_{len(parts)}") in os.environ:
        parts.append(os.environ[name])
    with listen() as listener:
        known = status()
        say(
            began=nonce,
            uid=os.getuid(),
            gid=os.getgid(),
            pid=os.getpid(),
            seccomp=int(known.get("Seccomp", "0")),
            landlock=landlock(),
            typing=typing(listener),
        )
        targets = json.loads("".join(parts) or "[]")
        try_all(targets)
        say(ended=nonce, targets=len(targets))
        listener.settimeout(ASKED_WITHIN)
        with contextlib.suppress(TimeoutError):
            listener.accept()
    os._exit(0)  # a resolver that still waits must not keep the worker


main()
