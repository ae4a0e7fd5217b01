"""Routes about the server itself, and the way from here to an app's own address."""

import contextlib
from importlib.metadata import version

from fastapi import APIRouter, Request, Response
from fastapi.responses import PlainTextResponse, RedirectResponse

from blockyard_api.apps.naming import NAME
from blockyard_api.backends.spawner import Identity, SpawnerUnreachable
from blockyard_api.checks.runner import Run
from blockyard_api.clock import rfc3339
from blockyard_api.errors import BlockyardError, NotFound
from blockyard_api.host import units
from blockyard_api.http.models import CheckBody, CheckRun, Ready, SpawnerBody, SystemStatus, UnitBody, WorkerCount
from blockyard_api.http.refusals import OF_CALLERS, refusals
from blockyard_api.http.services import Administrator, Provided, Recognised, Services

router = APIRouter(tags=["system"])


@router.get("/healthz", response_class=PlainTextResponse)
async def healthz() -> str:
    """Say that this process answers."""
    return "ok"


@router.get(
    "/readyz",
    response_model=Ready,
    response_model_exclude_none=True,
    responses={**refusals(401, 429), 503: {"model": Ready, "description": "Apps cannot be served at the moment"}},
    openapi_extra={"security": [{}]},  # or without a token
)
async def readyz(provided: Provided, principal: Recognised, response: Response) -> Ready:
    """Say whether apps can be served; authenticated callers learn what is wrong."""
    checks = {"database": await _database(provided), "spawner": await _spawner(provided)}
    ready = all(words == "ok" for words in checks.values())
    response.status_code = 200 if ready else 503
    return Ready(status="ready" if ready else "not_ready", checks=checks if principal else None)


async def _database(provided: Services) -> str:
    try:
        async with provided.database.begin() as connection:
            await connection.exec_driver_sql("SELECT 1 FROM apps LIMIT 1")
    except BlockyardError as error:
        return error.message
    return "ok"


async def _spawner(provided: Services) -> str:
    try:
        await provided.spawner.hello()
    except BlockyardError as error:
        return error.message
    return "ok" if provided.fleet.adopted.is_set() else "workers of an earlier run are being taken over"


@router.get("/api/v1/system/status", responses=refusals(403, *OF_CALLERS))
async def status(provided: Provided, _: Administrator) -> SystemStatus:
    """Show the server at a glance."""
    identity: Identity | None = None
    with contextlib.suppress(SpawnerUnreachable):  # that it is not connected is the answer
        identity = await provided.spawner.hello()
    unit = await units.workers_unit()
    return SystemStatus(
        version=version("blockyard"),
        backend=provided.settings.server.backend,
        spawner=SpawnerBody(
            connected=identity is not None,
            version=identity.version if identity else None,
            unprivileged=identity.unprivileged if identity else None,
            uids_free=identity.uids_free if identity else None,
            uids_total=identity.uids_total if identity else None,
            controllers=list(identity.controllers) if identity else [],
        ),
        workers=WorkerCount(running=provided.fleet.count, max=provided.settings.proxy.max_workers),
        unit=UnitBody(
            control_group=unit.control_group,
            memory_max=unit.memory_max,
            memory_current=unit.memory_current,
            tasks_max=unit.tasks_max,
            tasks_current=unit.tasks_current,
            cpu_quota=unit.cpu_quota,
        )
        if unit
        else None,
    )


@router.get("/api/v1/system/checks", responses=refusals(403, 409, *OF_CALLERS))
async def checks(provided: Provided, _: Administrator) -> CheckRun:
    """Show what the latest run of the start-up checks found; where there was none yet, run them."""
    return _check_run(provided.checks.latest or await provided.checks.run())


@router.post("/api/v1/system/checks/run", responses=refusals(403, 409, *OF_CALLERS))
async def run_checks(provided: Provided, _: Administrator) -> CheckRun:
    """Run the start-up checks now, which takes some seconds; 409 while another run is under way."""
    return _check_run(await provided.checks.run())


def _check_run(run: Run) -> CheckRun:
    return CheckRun(
        severity=run.severity.value,
        began_at=rfc3339(run.began_at) or "",
        seconds=round(run.seconds, 3),
        checks=[
            CheckBody(name=one.name, severity=one.severity.value, fact=one.fact, remedy=one.remedy)
            for one in run.results
        ],
        isolation=run.isolation,
    )


@router.get("/app/{name}", response_class=RedirectResponse, status_code=307, include_in_schema=False)
@router.get("/app/{name}/{rest:path}", response_class=RedirectResponse, status_code=307, include_in_schema=False)
async def to_app(name: str, request: Request, provided: Provided) -> RedirectResponse:
    """Send a browser to the apps' own origin; whether the app is there is told there."""
    if not NAME.fullmatch(name):
        raise NotFound("not_found", "There is no app at this address.")
    raw = request.scope["raw_path"].decode("latin-1")
    if not f"{raw}/".startswith(f"/app/{name}/"):  # the name was not written as it is
        raise NotFound("not_found", "There is no app at this address.")
    rest = raw.removeprefix(f"/app/{name}").removeprefix("/")
    query = request.scope["query_string"].decode("latin-1")
    return RedirectResponse(provided.addresses.url(name) + rest + (f"?{query}" if query else ""), status_code=307)
