"""Routes of apps: make, find, change, switch, delete, and look at what runs."""

import asyncio
from collections.abc import AsyncGenerator
from dataclasses import fields
from typing import Annotated, Any

from fastapi import APIRouter, Query, Response
from fastapi.responses import StreamingResponse
from sqlalchemy import select

from blockyard_api.apps.catalog import App
from blockyard_api.clock import rfc3339
from blockyard_api.errors import BadRequest, Forbidden, NotFound, Unavailable
from blockyard_api.host import accounting
from blockyard_api.http.models import AppBody, AppChanges, AppList, NewApp, Runtime, SessionBody, Stats, WorkerBody
from blockyard_api.http.refusals import OF_CALLERS, refusals
from blockyard_api.http.services import MAY_CHANGE, Caller, CallerFirst, OwnApp, Provided, Services, VisibleApp
from blockyard_api.identity.tokens import Principal
from blockyard_api.store.tables import workers as workers_table
from blockyard_api.workers.fleet import Fleet
from blockyard_api.workers.life import State
from blockyard_api.workers.worker import Worker

router = APIRouter(prefix="/api/v1/apps", tags=["apps"], route_class=CallerFirst, responses=refusals(*OF_CALLERS))

_ENDED_SHOWN = 20
_SAMPLE = 0.2  # seconds between the two readings of a CPU counter
_WORKER_HEADER = "X-Blockyard-Worker"
_LOG: dict[str, Any] = {
    "content": {"text/plain": {}},
    "headers": {
        _WORKER_HEADER: {
            "description": "Whose log it is; absent where no worker has run yet",
            "schema": {"type": "string"},
        }
    },
}


def _time(seconds: float) -> str:
    return rfc3339(seconds) or ""


def _status(fleet: Fleet, app: App) -> str:
    states = {worker.state for worker in fleet.of(app.id)}
    if State.STARTING in states and fleet.setback(app):  # one more try after those that failed
        states.discard(State.STARTING)
    if states & {State.STARTING, State.ACTIVE}:
        return "running"
    return "stopping" if states else "stopped"


def _body(provided: Services, app: App, principal: Principal) -> AppBody:
    values = {field.name: getattr(app, field.name) for field in fields(app)}
    relation = provided.catalog.relation(app, principal)
    status = _status(provided.fleet, app)
    setback = provided.fleet.setback(app) if status != "running" and relation in MAY_CHANGE else ""
    return AppBody.model_validate(
        {
            **values,
            "created_at": _time(app.created_at),
            "updated_at": _time(app.updated_at),
            "status": status,
            "setback": setback or None,
            "tags": [],
            "relation": relation,
            "url": provided.addresses.url(app.name),
        }
    )


@router.post("", status_code=201, responses=refusals(400, 403, 409, 413))
async def create(new: NewApp, provided: Provided, principal: Caller) -> AppBody:
    """Make an app; it has no bundle yet and is visible to its owner alone."""
    if principal.role not in ("admin", "publisher"):
        raise Forbidden("forbidden", "Your role may not make apps; ask an administrator.")
    return _body(provided, await provided.catalog.create(new.name, principal.sub), principal)


@router.get("", responses=refusals(400))
async def list_apps(
    provided: Provided,
    principal: Caller,
    search: Annotated[str, Query(max_length=255)] = "",
    tag: Annotated[str, Query(max_length=255)] = "",
    *,
    deleted: bool = False,
    page: Annotated[int, Query(ge=1, le=1_000_000)] = 1,
    per_page: Annotated[int, Query(ge=1, le=200)] = 50,
) -> AppList:
    """Name the apps the caller may see, or those he deleted lately, in order of name."""
    relation = provided.catalog.relation
    if deleted:
        found = [app for app in await provided.catalog.deleted() if relation(app, principal) in ("admin", "owner")]
    else:
        found = [app for app in provided.catalog.all() if relation(app, principal)]
    wanted = search.lower()
    found = [app for app in found if not tag and wanted in f"{app.name}\n{app.title}\n{app.description}".lower()]
    shown = found[(page - 1) * per_page : page * per_page]
    return AppList(
        apps=[_body(provided, app, principal) for app in shown], total=len(found), page=page, per_page=per_page
    )


@router.get("/{id}", responses=refusals(404))
async def get(app: VisibleApp, provided: Provided, principal: Caller) -> AppBody:
    """Return one app."""
    return _body(provided, app, principal)


@router.patch("/{id}", responses=refusals(400, 403, 404, 409, 413))
async def change(changes: AppChanges, app: OwnApp, provided: Provided, principal: Caller) -> AppBody:
    """Change settings; limits count for workers that start from now on."""
    wanted = changes.model_dump(exclude_unset=True)
    process = provided.settings.process
    candidate = App(**{**{field.name: getattr(app, field.name) for field in fields(app)}, **wanted})
    if candidate.network == "host" and provided.fleet.backend(candidate) == "docker":
        raise BadRequest(
            "invalid_network",
            "A Docker worker has a network of its own, never the host's: set network to none, or to the default.",
        )
    if wanted.keys() & {"pre_warmed_sessions", "max_workers_per_app", "max_sessions_per_worker"}:
        _check_room(candidate, provided.settings.proxy.max_workers)
    if (moved_to := provided.fleet.backend(candidate)) != provided.fleet.backend(app):
        await _check_backend(provided, moved_to)
    changed = (
        await provided.catalog.change(app, wanted)
        if _within(candidate, process.memory_ceiling, process.cpu_ceiling)
        else app
    )
    if changed.access_type != app.access_type:
        provided.sessions.drop_where(
            lambda session: session.app_id == app.id and not _still_allowed(provided, changed, session.user_sub)
        )
    provided.fleet.reconcile(changed.id)
    return _body(provided, changed, principal)


def _check_room(app: App, most_workers: int) -> None:
    """Refuse more warm places than there can be, which would be waited for without a word."""
    most = min(app.max_workers_per_app or most_workers, most_workers) * app.max_sessions_per_worker
    if app.pre_warmed_sessions > most:
        raise BadRequest(
            "too_many_pre_warmed",
            f"pre_warmed_sessions may be at most {most} here: the workers that the app may have, times "
            "max_sessions_per_worker.",
        )


async def _check_backend(provided: Services, backend: str) -> None:
    """Refuse a backend that nobody answers for: the app would fail at its next visitor."""
    try:
        await provided.spawners[backend].hello()
    except Unavailable as error:
        raise Unavailable(
            "backend_unavailable", f"No app can be moved to backend {backend}: {error.message}"
        ) from error


def _within(app: App, memory: int | None, cpu: int | None) -> bool:
    try:
        over_memory = memory is not None and (app.memory_bytes or 0) > memory
        over_cpu = cpu is not None and (app.cpu_thousandths or 0) > cpu
    except ValueError as error:
        raise BadRequest("invalid_limit", f"A limit must be {error}.") from error
    if over_memory or over_cpu:
        ceiling = f"memory {memory} bytes" if over_memory else f"cpu {(cpu or 0) / 1000:g} cores"
        raise BadRequest("limit_above_ceiling", f"The server's configuration allows at most {ceiling}.")
    return True


def _still_allowed(provided: Services, app: App, user: str | None) -> bool:
    return provided.catalog.relation(app, None if user is None else Principal(user, "viewer")) is not None


@router.delete("/{id}", status_code=204, responses=refusals(403, 404))
async def delete(app: OwnApp, provided: Provided) -> Response:
    """Delete an app and end its workers."""
    await provided.catalog.delete(app)
    provided.sessions.drop_where(lambda session: session.app_id == app.id)
    await provided.fleet.end_all(app, "the app was deleted")
    return Response(status_code=204)


@router.post("/{id}/enable", responses=refusals(403, 404))
async def enable(app: OwnApp, provided: Provided, principal: Caller) -> AppBody:
    """Let visitors in again."""
    return await _switch(app, provided, principal, enabled=True)


@router.post("/{id}/disable", responses=refusals(403, 404))
async def disable(app: OwnApp, provided: Provided, principal: Caller) -> AppBody:
    """Answer 503 to every visitor and end the app's workers and open WebSockets."""
    return await _switch(app, provided, principal, enabled=False)


async def _switch(app: App, provided: Services, principal: Principal, *, enabled: bool) -> AppBody:
    changed = await provided.catalog.change(app, {"enabled": enabled})
    provided.fleet.settle(changed)
    if not enabled:
        provided.sessions.drop_where(lambda session: session.app_id == app.id)
    provided.fleet.reconcile(changed.id)
    return _body(provided, changed, principal)


@router.get("/{id}/logs", response_class=StreamingResponse, responses={200: _LOG, **refusals(400, 403, 404)})
async def logs(
    app: OwnApp,
    provided: Provided,
    principal: Caller,
    worker_id: Annotated[str, Query(max_length=64)] = "",
    *,
    stream: bool = True,
) -> StreamingResponse:
    """Send a worker's log, and go on while it runs and the caller's token counts.

    By default it is that of the newest worker with visitors, or else of the newest. Where there was none yet, `stream`
    waits for the first.
    """
    shown = await _whose_log(provided, app, worker_id)
    if shown is None and worker_id:
        raise NotFound("not_found", "This app has no such worker; 'by get --runtime' names them.")

    async def text() -> AsyncGenerator[bytes, None]:
        found = shown
        if found is None and stream:
            first = await provided.fleet.first_worker(app.id)
            found = first.id if first is not None else None
        if found is not None:
            async for data in provided.logs.of(found).read(follow=stream):
                yield data

    return provided.streams.answer(principal, text(), {_WORKER_HEADER: shown} if shown else None)


async def _whose_log(provided: Services, app: App, wanted: str) -> str | None:
    """Return the id of the worker that is wanted, or that is of most interest; None if there is none."""
    living = provided.fleet.find(wanted) if wanted else provided.fleet.most_telling(app.id)
    if living is not None and living.app_id == app.id and provided.logs.grows(living.id):  # it may have no row yet
        return living.id
    query = select(workers_table.c.id).where(workers_table.c.app_id == app.id)
    if wanted:
        query = query.where(workers_table.c.id == wanted)
    async with provided.database.begin() as connection:
        found: str | None = await connection.scalar(query.order_by(workers_table.c.started_at.desc()).limit(1))
    return found


@router.get("/{id}/runtime", responses=refusals(403, 404))
async def runtime(app: OwnApp, provided: Provided) -> Runtime:
    """Return what the app's workers do, and the last ones that ended."""
    starting = [worker.id for worker in provided.fleet.of(app.id) if worker.state is State.STARTING]
    live = [worker for worker in provided.fleet.of(app.id) if worker.state is not State.STARTING]
    stats = await _stats(live)
    ended = workers_table.c.status == State.ENDED.value
    query = select(workers_table).where(workers_table.c.app_id == app.id, ended)
    async with provided.database.begin() as connection:
        rows = (await connection.execute(query.order_by(workers_table.c.ended_at.desc()).limit(_ENDED_SHOWN))).all()
    views = await provided.sessions.views(app)
    bundles = await provided.deployments.list(app)
    gone = {row.id for row in rows}  # some perhaps since they were sampled
    return Runtime(
        workers=[_live(provided, worker, stats[worker.id]) for worker in live if worker.id not in gone]
        + [
            WorkerBody(
                id=row.id,
                bundle_id=row.bundle_id,
                status="ended",
                started_at=_time(row.started_at),
                idle_since=None,
                ended_at=rfc3339(row.ended_at),
                end_reason=row.end_reason,
                stats=None,
                limits_hit=[],
                sessions=[],
            )
            for row in rows
        ],
        starting=[worker_id for worker_id in starting if worker_id not in gone],
        active_sessions=sum(1 for worker in live for session in provided.sessions.of(worker) if session.sockets),
        total_views=views.total,
        recent_views=views.recent,
        unique_visitors=views.visitors,
        last_deployed_at=rfc3339(max((bundle.deployed_at or 0 for bundle in bundles), default=0) or None),
    )


def _live(provided: Services, worker: Worker, stats: Stats) -> WorkerBody:
    return WorkerBody.model_validate(
        {
            "id": worker.id,
            "bundle_id": worker.bundle_id,
            "status": "active" if worker.state is State.ACTIVE else "draining",
            "started_at": _time(worker.started_at),
            "idle_since": rfc3339(worker.idle_since),
            "ended_at": None,
            "end_reason": None,
            "stats": stats,
            "limits_hit": worker.limits.all(provided.logs.of(worker.id).dropped),
            "sessions": [
                SessionBody(
                    user=session.user_sub, started_at=_time(session.created_at), websockets=session.open_on(worker)
                )
                for session in provided.sessions.of(worker)
            ],
        }
    )


async def _stats(workers: list[Worker]) -> dict[str, Stats]:
    def read() -> dict[str, accounting.Usage]:
        return {worker.id: accounting.usage(worker.cgroup_dir) for worker in workers}

    if not workers:
        return {}
    before = await asyncio.to_thread(read)
    await asyncio.sleep(_SAMPLE)
    after = await asyncio.to_thread(read)
    result = {}
    for worker in workers:
        first, second = before[worker.id].cpu_usec, after[worker.id].cpu_usec
        percent = None if first is None or second is None else round((second - first) / _SAMPLE / 10_000, 1)
        use = after[worker.id]
        worker.limits.held_back = (use.throttled_usec or 0) / 1e6
        result[worker.id] = Stats(
            cpu_percent=percent,
            memory_usage_bytes=use.memory,
            memory_limit_bytes=use.memory_limit or worker.memory_limit,
        )
    return result
