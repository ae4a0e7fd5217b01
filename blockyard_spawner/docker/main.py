"""The Docker helper's program: configuration, the socket, the engine, the loop."""

import argparse
import asyncio
import contextlib
import os
import pwd
import signal
import socket
from collections.abc import Mapping
from typing import Any

os.environ["MSGPACK_PUREPYTHON"] = "1"  # no C parser sees a hostile peer's bytes; msgpack reads this when imported

import sdnotify

from blockyard_spawner import config as base
from blockyard_spawner import policy
from blockyard_spawner.audit import audit
from blockyard_spawner.config import DEFAULT_PATH, ConfigError
from blockyard_spawner.docker import config as docker
from blockyard_spawner.docker import engine
from blockyard_spawner.docker.keeping import Keeper, take_passed
from blockyard_spawner.docker.workers import Containers
from blockyard_spawner.main import listen, prepare, report
from blockyard_spawner.protocol import VERSION
from blockyard_spawner.server import serve


def main() -> None:
    """Run until SIGTERM; workers go on."""
    parser = argparse.ArgumentParser(
        prog="blockyard-spawner-docker", description="Start, stop and list Blockyard's Docker workers."
    )
    parser.add_argument("--config", default=DEFAULT_PATH, metavar="PATH", help=f"default {DEFAULT_PATH}")
    parser.add_argument("--socket", metavar="PATH", help="listen here; without it, on the socket that systemd passes")
    parser.add_argument("--version", action="version", version=f"protocol {VERSION}")
    arguments = parser.parse_args()
    prepare()
    try:
        values = base.load(arguments.config, os.environ, {**base.KEYS, **docker.KEYS})
        policy.check(values)
        user = _api_user(values)
        passed, pipes = take_passed(os.environ)
        listener = listen(arguments.socket, user.pw_gid, passed)
        with contextlib.suppress(asyncio.CancelledError):
            asyncio.run(_run(values, listener, {0, user.pw_uid}, user.pw_gid, pipes))
    except (ConfigError, OSError) as error:
        parser.exit(2, f"blockyard-spawner-docker: {error}\n")


async def _run(
    values: Mapping[str, Any], listener: socket.socket, peers: set[int], gid: int, pipes: dict[str, int]
) -> None:
    systemd, keeper = sdnotify.SystemdNotifier(), Keeper(os.environ.get("NOTIFY_SOCKET", ""))
    if task := asyncio.current_task():
        for number in (signal.SIGTERM, signal.SIGINT):
            asyncio.get_running_loop().add_signal_handler(number, task.cancel)
    try:
        async with engine.connected(values["docker.socket"]) as connected, asyncio.TaskGroup() as tasks:
            workers = Containers(values, gid, connected, keeper)
            await workers.adopt(tasks, pipes)
            audit("start", f"Started, with {values['docker.image']}: {workers.about()}.")
            tasks.create_task(serve(listener, peers, workers))
            await report(systemd, workers.status)
    except ExceptionGroup as group:
        if wrong := group.subgroup(ConfigError):
            raise wrong.exceptions[0] from None
        raise
    finally:
        systemd.notify("STOPPING=1")


def _api_user(values: Mapping[str, Any]) -> pwd.struct_passwd:
    name = values["process.api_user"]
    try:
        user = pwd.getpwnam(name)
    except KeyError as error:
        raise ConfigError(f"'process.api_user' names no user: create {name}, or name the API's user.") from error
    if os.geteuid() in (0, user.pw_uid):
        raise ConfigError("Run as a user of its own, blockyard-docker: neither as root nor as the API's user.")
    return user


if __name__ == "__main__":
    main()
