"""The only place where objects are built and wired together."""

import asyncio
import logging
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from urllib.parse import urlsplit

from fastapi import FastAPI

from blockyard_api.apps.catalog import Catalog
from blockyard_api.backends.spawner import Spawner
from blockyard_api.backends.worker_socket import WorkerSocket
from blockyard_api.bundles.deploy import Deployments
from blockyard_api.checks.context import Context
from blockyard_api.checks.runner import Checks
from blockyard_api.errors import BlockyardError
from blockyard_api.host import units
from blockyard_api.host.notify import ServiceManager
from blockyard_api.http import application
from blockyard_api.http.services import Services
from blockyard_api.http.streams import Streams
from blockyard_api.identity.tokens import Tokens
from blockyard_api.relay.server import Relay
from blockyard_api.sessions import views
from blockyard_api.sessions.address import Addresses
from blockyard_api.sessions.gate import AppGate
from blockyard_api.sessions.registry import Session, Sessions
from blockyard_api.settings import Settings
from blockyard_api.store import database, place
from blockyard_api.workers.fleet import Fleet
from blockyard_api.workers.log import Logs
from blockyard_api.workers.records import Records
from blockyard_api.workers.supervisor import Supervisor

_ADOPT_AGAIN = (0.2, 1.0, 2.0, 5.0, 10.0)  # seconds; the last repeats for as long as there is no spawner
_CLEAN_EVERY = 3600.0  # seconds

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Built:
    """What `main` serves."""

    control_plane: FastAPI
    relay: Relay
    checks: Checks
    streams: Streams


@asynccontextmanager
async def running(
    settings: Settings,
    manager: ServiceManager,
    log_pipes: dict[str, int],
    listening: tuple[tuple[str, int], ...] = (),
) -> AsyncIterator[Built]:
    """Build everything, keep it running, and take it down again with the workers left alive.

    `listening` are the addresses of the control plane and of the relay, for the checks.
    """
    state_dir = Path(settings.storage.state_dir)
    place.prepare_state(state_dir)
    async with database.opened(place.database_path(settings)) as store, asyncio.TaskGroup() as tasks:
        spawners = {
            "process": Spawner(settings.process.spawner_socket, units.revive_spawner),
            "docker": Spawner(settings.docker.spawner_socket, _never),  # its socket unit starts it
        }
        logs = Logs(state_dir / "logs")
        catalog = Catalog(store)
        await catalog.load()

        def forget(upstream: WorkerSocket) -> None:
            relay.forget(upstream)

        records = Records(store)
        supervisor = Supervisor(settings, spawners, records, manager, forget)
        fleet = Fleet(settings, catalog, records, spawners, supervisor, logs, manager, tasks)
        sessions = Sessions(settings.proxy, fleet, store)

        def token_revoked(token_id: str) -> None:
            def opened_with_it(session: Session) -> bool:
                return session.token_id == token_id

            sessions.drop_where(opened_with_it)
            streams.end_of_token(token_id)

        tokens = Tokens(store, token_revoked)
        streams = Streams(tokens.stands)
        addresses = Addresses.parse(settings.proxy.public_url)
        deployments = Deployments(settings.storage, catalog, fleet, store, tasks)
        await deployments.recover()
        relay = Relay(
            AppGate(addresses, catalog, sessions, fleet, tokens),
            trusted_proxies=settings.server.trusted_proxies,
            public_scheme=urlsplit(settings.proxy.public_url).scheme,
        )
        checks = Checks(Context(settings, spawners["process"], spawners["docker"], catalog.all, listening))
        services = Services(
            settings, store, tokens, catalog, fleet, sessions, deployments, spawners, logs, addresses, checks, streams
        )
        adopting = tasks.create_task(_adopt(fleet, sessions, log_pipes))
        keeping = tasks.create_task(
            _keep_house(settings, store, records, fleet, sessions, catalog, deployments, logs, checks, log_pipes)
        )
        try:
            yield Built(application.build(services), relay, checks, streams)
        finally:
            fleet.detach()
            await relay.close(settings.server.shutdown_timeout)
            if fleet.adopted.is_set():  # else those of an earlier run are not known yet, and would be told as over
                await _try(sessions.save)
            for task in (adopting, keeping, *fleet.lives(), *deployments.running()):
                task.cancel()
            for spawner in spawners.values():
                spawner.close()


async def _adopt(fleet: Fleet, sessions: Sessions, log_pipes: dict[str, int]) -> None:
    for attempt in range(10**9):
        try:
            await _take_over(fleet, sessions, log_pipes)
            fleet.adopted.set()
        except BlockyardError as error:
            log.warning("workers of an earlier run are not taken over yet: %s", error.message)
        else:
            return
        await asyncio.sleep(_ADOPT_AGAIN[min(attempt, len(_ADOPT_AGAIN) - 1)])


async def _take_over(fleet: Fleet, sessions: Sessions, log_pipes: dict[str, int]) -> None:
    """Go on with the workers of an earlier run, as far as their backends are there, and with their sessions."""
    await fleet.adopt(log_pipes)
    await sessions.adopt()


async def _keep_house(
    settings: Settings,
    store: database.Database,
    records: Records,
    fleet: Fleet,
    sessions: Sessions,
    catalog: Catalog,
    deployments: Deployments,
    logs: Logs,
    checks: Checks,
    log_pipes: dict[str, int],
) -> None:
    """Do what is due now and then: end idle workers, retry warm slots, save sessions, delete what is old."""
    loop = asyncio.get_running_loop()
    period = min(settings.proxy.health_interval, settings.proxy.idle_worker_timeout / 2)
    clean_at = loop.time()
    await fleet.adopted.wait()
    while True:
        fleet.end_idle()
        for app in catalog.all():
            fleet.reconcile(app.id)
        await _try(sessions.save)
        if fleet.waited_for():
            await _try(partial(_take_over, fleet, sessions, log_pipes))
        await _try(partial(fleet.sweep, lambda: checks.probing))
        await _try(fleet.look_at_limits)
        if loop.time() >= clean_at:
            clean_at = loop.time() + _CLEAN_EVERY
            await _try(partial(logs.prune, settings.proxy.log_retention))
            await _try(deployments.purge_deleted)
            await _try(partial(deployments.prune_tasks, settings.proxy.log_retention))
            await _try(partial(views.fold, store))
            await _try(partial(records.prune, settings.proxy.log_retention))
        await asyncio.sleep(period)


async def _never() -> bool:
    return False


async def _try(chore: Callable[[], Awaitable[None]]) -> None:
    """Do what can be done later just as well."""
    try:
        await chore()
    except (BlockyardError, OSError) as error:  # also a disk that fails is no reason to send everybody away
        log.warning("housekeeping is put off: %s", error)
