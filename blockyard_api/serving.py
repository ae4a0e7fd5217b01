"""The daemon, from its sockets and the start-up checks to its end."""

import asyncio
import contextlib
import logging
import os
import resource
import signal
import socket
import time

from blockyard_api import app
from blockyard_api.checks.result import Result
from blockyard_api.checks.runner import Checks, Run
from blockyard_api.errors import NotStarted
from blockyard_api.host.notify import ServiceManager, take_passed
from blockyard_api.http import server
from blockyard_api.settings import Settings
from blockyard_spawner.config import ConfigError

_BACKLOG = 2048
_TURN_AWAY_WITHIN, _EACH_WITHIN = 2.0, 0.1  # seconds
_REASON = b'{"error": "not_started", "message": "The server does not start; its journal says why."}'
_NOT_STARTED = b"HTTP/1.1 503 Service Unavailable\r\nContent-Type: application/json\r\nConnection: close\r\n"
_NOT_STARTED += b"Cache-Control: no-store\r\nContent-Length: %d\r\n\r\n%b" % (len(_REASON), _REASON)

log = logging.getLogger("blockyard_api")


async def serve(configured: Settings) -> None:
    """Serve until told to stop. Raises NotStarted if the start-up checks found errors."""
    if failed := await _until_stopped(configured):
        found = " ".join(f"{result.name}: {result.fact} {result.remedy}" for result in failed)
        otherwise = "To start all the same: server.skip_preflight = true."
        sentence = f"not started, since checks found errors. {found} {otherwise}"
        raise NotStarted("checks_failed", sentence, passing=all(result.passing for result in failed))


async def _until_stopped(configured: Settings) -> list[Result]:
    """Serve; return the errors of the start-up checks, if they kept it from serving."""
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))  # a WebSocket takes two; the usual soft limit is 1024
    sockets, log_pipes = take_passed(os.environ)
    manager = ServiceManager(os.environ)
    if not sockets:
        sockets = [_listen(configured.server.bind), _listen(configured.proxy.bind)]
    if len(sockets) != 2:
        raise ConfigError(f"{len(sockets)} sockets were passed; pass two: the control plane's and the relay's.")
    control, relayed = sockets
    listening = tuple(sock.getsockname()[:2] for sock in sockets if sock.family != socket.AF_UNIX)
    if listening != (configured.server.bind, configured.proxy.bind):
        where = " and ".join(f"{host}:{port}" for host, port in listening) or "Unix sockets"
        log.info("listening at %s, as passed by the service manager, not at server.bind and proxy.bind", where)
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop.set)
    stopping = loop.create_task(stop.wait())
    async with app.running(configured, manager, log_pipes, listening) as built:
        if configured.server.skip_preflight:
            log.warning("the start-up checks are left out: server.skip_preflight is set; 'by admin check' runs them")
        else:
            checking = loop.create_task(_checked(built.checks))  # whoever connects meanwhile waits in a queue
            await asyncio.wait([checking, stopping], return_when=asyncio.FIRST_COMPLETED)
            if not checking.done():
                checking.cancel()
                return []
            if failed := checking.result().errors:
                await asyncio.to_thread(_turn_away, sockets)
                return failed
        await built.relay.listen(relayed)
        api = server.server(built.control_plane, configured.server.shutdown_timeout, built.streams.stop)
        serving = loop.create_task(api.serve(sockets=[control]))
        watching = loop.create_task(_watchdog(manager))
        manager.say("READY=1")
        try:
            await asyncio.wait([serving, stopping], return_when=asyncio.FIRST_COMPLETED)
        finally:
            manager.say("STOPPING=1")
            api.should_exit = True
            watching.cancel()
            await serving
    return []


async def _checked(checks: Checks) -> Run:
    """Run the start-up checks; what may be over in a moment is looked at once more, which costs less than a restart."""
    run = await checks.run()
    if run.errors and all(result.passing for result in run.errors):
        log.warning("checks are run again: %s", ", ".join(result.name for result in run.errors))
        run = await checks.run()
    return run


def _turn_away(sockets: list[socket.socket]) -> None:
    """Answer those who wait, before a start is given up.

    systemd would take them for a reason to start this daemon again at once, and again, for ever. Whoever comes later is
    one: a cause that has gone is then noticed by itself, and otherwise StartLimitBurst= is the end.
    """
    until = time.monotonic() + _TURN_AWAY_WITHIN
    for sock in sockets:
        sock.setblocking(False)
        while time.monotonic() < until:
            try:
                connection, _ = sock.accept()
            except OSError:  # nobody is left
                break
            with connection, contextlib.suppress(OSError):  # it left by itself
                connection.settimeout(_EACH_WITHIN)
                connection.sendall(_NOT_STARTED)
                connection.shutdown(socket.SHUT_WR)
                connection.recv(65536)  # a close with something unread would take the answer back


async def _watchdog(manager: ServiceManager) -> None:
    """Tell systemd that the loop turns, twice as often as it asks for."""
    microseconds = int(os.environ.pop("WATCHDOG_USEC", "0"))
    while microseconds:
        manager.say("WATCHDOG=1")
        await asyncio.sleep(microseconds / 2_000_000)


def _listen(address: tuple[str, int]) -> socket.socket:
    family = socket.AF_INET6 if ":" in address[0] else socket.AF_INET
    return socket.create_server(address, family=family, backlog=_BACKLOG)
