"""The root helper's program: configuration, the socket, the loop."""

import argparse
import asyncio
import contextlib
import os
import pathlib
import pwd
import resource
import signal
import socket
from collections.abc import Callable, Mapping, Sequence
from typing import Any

os.environ["MSGPACK_PUREPYTHON"] = "1"  # no C parser sees a hostile peer's bytes; msgpack reads this when imported

import prctl
import sdnotify

from blockyard_spawner import policy
from blockyard_spawner.audit import audit
from blockyard_spawner.config import DEFAULT_PATH, KEYS, ConfigError, load
from blockyard_spawner.protocol import VERSION
from blockyard_spawner.server import serve
from blockyard_spawner.workers import Workers


def main() -> None:
    """Run until SIGTERM; workers go on."""
    parser = argparse.ArgumentParser(prog="blockyard-spawner", description="Start, stop and list Blockyard's workers.")
    parser.add_argument("--config", default=DEFAULT_PATH, metavar="PATH", help=f"default {DEFAULT_PATH}")
    parser.add_argument("--socket", metavar="PATH", help="listen here; without it, on the socket that systemd passes")
    parser.add_argument("--unprivileged", action="store_true", help="run as an ordinary user, workers under its uid")
    parser.add_argument("--version", action="version", version=f"protocol {VERSION}")
    arguments = parser.parse_args()
    prepare()
    try:
        config = load(arguments.config, os.environ, KEYS)
        policy.check(config)
        user = _api_user(config, unprivileged=arguments.unprivileged)
        workers = Workers(config, user.pw_gid, unprivileged=arguments.unprivileged)
        ours = os.environ.pop("LISTEN_PID", "") == str(os.getpid()) and os.environ.pop("LISTEN_FDS", "") == "1"
        listener = listen(arguments.socket, user.pw_gid, [3] if ours else [])
    except (ConfigError, OSError) as error:
        parser.exit(2, f"blockyard-spawner: {error}\n")
    with contextlib.suppress(asyncio.CancelledError):
        asyncio.run(_run(listener, {0, user.pw_uid}, workers))


def prepare() -> None:
    """Make this process one that nobody looks into, with room for its workers' descriptors."""
    prctl.set_name("blockyard-spawn")
    prctl.set_dumpable(0)
    os.umask(0o022)  # the API looks into cgroups, and reaches sockets through the runtime directory
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))


async def _run(listener: socket.socket, peers: set[int], workers: Workers) -> None:
    systemd = sdnotify.SystemdNotifier()
    if task := asyncio.current_task():
        for number in (signal.SIGTERM, signal.SIGINT):
            asyncio.get_running_loop().add_signal_handler(number, task.cancel)
    try:
        async with asyncio.TaskGroup() as tasks:
            workers.adopt(tasks)
            filtered = "with a" if workers.config["process.seccomp_profile"] else "no"
            audit("start", f"Started, {filtered} seccomp filter: {workers.about()}.")
            tasks.create_task(serve(listener, peers, workers))
            await report(systemd, workers.status)
    finally:
        systemd.notify("STOPPING=1")


async def report(systemd: sdnotify.SystemdNotifier, status: Callable[[], str]) -> None:
    """Tell systemd that this helper serves, and that its loop turns, twice in the time that its watchdog allows."""
    systemd.notify("READY=1")
    while True:
        systemd.notify(f"WATCHDOG=1\nSTATUS={status()}")
        await asyncio.sleep(int(os.environ.get("WATCHDOG_USEC", "10000000")) / 2_000_000)


def _api_user(config: Mapping[str, Any], *, unprivileged: bool) -> pwd.struct_passwd:
    if unprivileged == (os.geteuid() == 0):
        raise ConfigError("Run as root without --unprivileged, or as an ordinary user with --unprivileged.")
    name = config["process.api_user"]
    try:
        user = pwd.getpwuid(os.getuid()) if unprivileged else pwd.getpwnam(name)
    except KeyError as error:
        raise ConfigError(f"'process.api_user' names no user: create {name}, or name the API's user.") from error
    if (user.pw_uid in policy.uids(config) or user.pw_gid == config["process.worker_gid"]) and not unprivileged:
        raise ConfigError(f"'process.api_user' {name} has a worker's uid or gid; move worker_uid_range or worker_gid.")
    return user


def listen(path: str | None, gid: int, passed: Sequence[int]) -> socket.socket:
    """Listen at `path` for a group, or on the one socket that was passed. Raises ConfigError."""
    if path:
        listener = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        pathlib.Path(path).unlink(missing_ok=True)
        os.umask(0o117)  # from its first moment nobody but the owner and its group can connect
        listener.bind(path)
        os.umask(0o022)
        os.chown(path, -1, gid)
        listener.listen()
    elif len(passed) == 1:
        listener = socket.socket(fileno=passed[0])
        listener.set_inheritable(False)
    else:
        raise ConfigError("Start blockyard-spawner.socket, or give --socket: there is no socket to listen on.")
    if (listener.family, listener.type) != (socket.AF_UNIX, socket.SOCK_SEQPACKET):
        raise ConfigError("Use ListenSequentialPacket= in the socket unit: the socket that came is of another kind.")
    listener.setblocking(False)
    return listener


if __name__ == "__main__":
    main()
