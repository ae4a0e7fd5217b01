"""All checks, and how they are run: at the same time, each within its bound, and none can bring down the others."""

import asyncio
import contextlib
import itertools
import logging
import secrets
import socket
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass

from blockyard_api.backends.spawner import SpawnerUnreachable
from blockyard_api.checks import docker, files, firewall, isolation, network, resources, sandbox
from blockyard_api.checks.context import Context, Outcome, Seen
from blockyard_api.checks.journal import tell
from blockyard_api.checks.listeners import ListingFailed, listeners
from blockyard_api.checks.probe import ProbeFailed, Prober, Target
from blockyard_api.checks.result import Result, Severity, error, worst
from blockyard_api.errors import BlockyardError, Conflict

Check = Callable[[Context], Awaitable[Result]]
ProbedCheck = Callable[[Context, Seen], Awaitable[Result]]

# Each is named as its result is. The order is that of every list and table.
CHECKS: tuple[Check, ...] = (
    sandbox.spawner_link,
    sandbox.bwrap_available,
    resources.uid_range,
    resources.resource_limits,
    files.state_dir,
    files.config_secrets,
    docker.docker_socket,
    docker.docker_runtime,
)
# These judge by what a worker saw.
PROBED_CHECKS: tuple[ProbedCheck, ...] = (
    sandbox.user_namespaces,
    sandbox.bwrap_host_uid_mapping,
    sandbox.seccomp_profile,
    resources.cgroup_delegation,
    network.cloud_metadata,
    network.worker_egress,
    network.abstract_sockets,
    firewall.firewall,
    network.redis_auth,
)

# Shares of server.preflight_timeout: at its usual 10 s, each check has 3 s, and a probe 6 s that do not count there.
_EACH, _PROBE, _SPAWNER = 0.3, 0.6, 0.25
_LOOK_AGAIN = 0.2  # seconds

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Run:
    """What one run of all checks found, and when."""

    began_at: float  # epoch
    seconds: float
    results: tuple[Result, ...]
    isolation: str  # one line that sums up what apps are isolated by, and by what not

    @property
    def severity(self) -> Severity:
        """The worst that was found."""
        return worst(self.results)

    @property
    def errors(self) -> list[Result]:
        """Those that stop a start."""
        return [result for result in self.results if result.severity is Severity.ERROR]


class Checks:
    """Runs all checks, one run at a time, and remembers the latest."""

    def __init__(self, context: Context) -> None:
        self._context = context
        settings = context.settings
        self._within = settings.server.preflight_timeout
        probed_within = self._within * _PROBE
        self._prober = Prober(context.spawner, settings.process.runtime_dir, probed_within)
        self._docker_prober = Prober(context.docker, settings.docker.runtime_dir, probed_within, docker.ADVICE)
        self._running = False
        self.latest: Run | None = None

    @property
    def probing(self) -> set[str]:
        """The ids of workers that are probes, as long as they live."""
        return self._prober.running | self._docker_prober.running

    async def run(self) -> Run:
        """Run all checks, at most `server.preflight_timeout`, and write each result to the journal.

        Raises Conflict while another run is under way: each costs a worker.
        """
        if self._running:
            raise Conflict("checks_running", "The checks are being run already; ask for their results in a moment.")
        self._running = True
        began_at, began = time.time(), time.monotonic()
        try:
            results, seen = await self._all()
        finally:
            self._running = False
        self.latest = Run(began_at, time.monotonic() - began, results, self._isolation(results, seen))
        await asyncio.to_thread(tell, results)
        return self.latest

    def _isolation(self, results: tuple[Result, ...], seen: Seen | None) -> str:
        if seen is None:
            return "What apps are isolated by is not known: no probe came to its end."
        process = self._context.settings.process
        pool = range(process.worker_uid_range_start, process.worker_uid_range_end + 1)
        (socket_found,) = (result for result in results if result.name == docker.docker_socket.__name__)
        return isolation.in_one_line(seen.worker, seen.docker, pool, socket_found)

    async def _all(self) -> tuple[tuple[Result, ...], Seen | None]:
        loop = asyncio.get_running_loop()
        until = loop.time() + self._within
        if self._context.uses("process"):
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(self._within * _SPAWNER):
                    await self._reach_spawner()
        seeing = loop.create_task(self._see())
        waiting = [loop.create_task(self._bounded(check.__name__, check(self._context))) for check in CHECKS]
        waiting += [loop.create_task(self._probed(check, seeing)) for check in PROBED_CHECKS]
        try:
            await asyncio.wait(waiting, timeout=until - loop.time())
            names = [check.__name__ for check in (*CHECKS, *PROBED_CHECKS)]
            results = tuple(
                task.result() if task.done() else _late(name, self._within)
                for name, task in zip(names, waiting, strict=True)
            )
            complete = seeing.done() and seeing.exception() is None
            return results, seeing.result() if complete else None
        finally:
            for task in (seeing, *waiting):
                task.cancel()
            await asyncio.gather(seeing, *waiting, return_exceptions=True)

    async def _reach_spawner(self) -> None:
        """Give a spawner that is being restarted the time for it; that there is none, the checks tell."""
        for look in itertools.count():
            try:
                await self._context.spawner.hello()
            except SpawnerUnreachable:
                if look == 0:
                    with contextlib.suppress(BlockyardError):
                        await self._context.spawner.list()  # which has systemd start it
                await asyncio.sleep(_LOOK_AGAIN)
            except BlockyardError:
                return
            else:
                return

    async def _probed(self, check: ProbedCheck, seeing: asyncio.Task[Seen]) -> Result:
        try:
            seen = await asyncio.shield(seeing)
        except Exception as failure:  # noqa: BLE001 - a probe that crashes is told by each check that needed it
            return _crashed(check.__name__, failure)
        return await self._bounded(check.__name__, check(self._context, seen))

    async def _bounded(self, name: str, checking: Awaitable[Result]) -> Result:
        within = self._within * _EACH
        try:
            async with asyncio.timeout(within):
                return await checking
        except TimeoutError:
            return _late(name, within)
        except BlockyardError as failure:
            return error(name, failure.message, "See 'spawner_link'.", passing=True)
        except Exception as failure:  # noqa: BLE001 - one check's fault must not hide what the others found
            return _crashed(name, failure)

    async def _see(self) -> Seen:
        """Let a worker of each backend in use try everything.

        Where workers of the process backend have no network, let another one do it too that has the host's.
        """
        abstract = f"blockyard-check-{secrets.token_hex(16)}"
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC) as listener:
            listener.bind(f"\0{abstract}")
            listener.listen()
            unlisted, listening = "", list[tuple[str, int]]()
            try:
                listening = await asyncio.to_thread(listeners)
            except ListingFailed as failure:
                unlisted = str(failure)
            targets, left_out = network.targets(self._context, listening, abstract)
            of_containers = network.container_targets(self._context, listening, abstract)
            (worker, on_host), docker_worker = await asyncio.gather(
                self._outcomes(targets), self._outcome_in_docker(of_containers)
            )
        return Seen(worker, on_host, docker_worker, unlisted, left_out)

    async def _outcomes(self, targets: list[Target]) -> tuple[Outcome | None, Outcome | None]:
        if not self._context.uses("process"):
            return None, None
        configured = self._context.settings.process.network
        if configured == "host":
            outcome = await self._outcome(self._prober, targets, "host")
            return outcome, outcome
        worker, on_host = await asyncio.gather(
            self._outcome(self._prober, targets, configured), self._outcome(self._prober, targets, "host")
        )
        return worker, on_host

    async def _outcome_in_docker(self, targets: list[Target]) -> Outcome | None:
        if not self._context.uses("docker"):
            return None
        return await self._outcome(self._docker_prober, targets, None)

    async def _outcome(self, prober: Prober, targets: list[Target], on: str | None) -> Outcome:
        try:
            return await prober.probe(targets, on)
        except ProbeFailed as failure:
            return failure


def _late(name: str, seconds: float) -> Result:
    return error(
        name,
        f"It was not done within {seconds:g} s.",
        "Run 'by admin check' again; where this machine is slow, raise server.preflight_timeout.",
        passing=True,
    )


def _crashed(name: str, failure: Exception) -> Result:
    log.error("check %s failed", name, exc_info=failure)
    fact = f"The check itself failed: {type(failure).__name__}: {failure:.200}".replace("\n", " ")
    return error(name, fact, "See the journal of blockyard-api, and report it.", passing=True)
