"""Routes of bundles and of the tasks that deploy them."""

from collections.abc import AsyncGenerator

from fastapi import APIRouter, Request
from fastapi.responses import StreamingResponse
from starlette.requests import ClientDisconnect

from blockyard_api.bundles.deploy import Task
from blockyard_api.clock import rfc3339
from blockyard_api.errors import BadRequest, NotFound
from blockyard_api.http.apps import get
from blockyard_api.http.models import Accepted, AppBody, BundleBody, BundleList, Rollback, TaskBody
from blockyard_api.http.refusals import OF_CALLERS, refusals
from blockyard_api.http.services import MAY_CHANGE, Caller, CallerFirst, OwnApp, Provided, Services
from blockyard_api.identity.tokens import Principal

router = APIRouter(prefix="/api/v1", tags=["bundles"], route_class=CallerFirst, responses=refusals(*OF_CALLERS))

_UPLOAD = {
    "requestBody": {
        "required": True,
        "description": "The bundle itself, a .tar.gz",
        "content": {"application/gzip": {"schema": {"type": "string", "format": "binary"}}},
    }
}


@router.post("/apps/{id}/bundles", status_code=202, openapi_extra=_UPLOAD, responses=refusals(400, 403, 404, 413))
async def upload(request: Request, app: OwnApp, provided: Provided, principal: Caller) -> Accepted:
    """Take a bundle in and deploy it; the task tells how that goes."""
    length = request.headers.get("content-length", "")
    announced = int(length) if length.isdecimal() and len(length) < 20 else None
    if announced == 0:
        raise BadRequest("empty_body", "Send the bundle, a .tar.gz, as the request's body.")
    try:
        bundle, task = await provided.deployments.receive(app, request.stream(), announced, principal.sub)
    except ClientDisconnect as error:
        raise BadRequest("upload_cut_off", "The upload ended before its last byte; send it again.") from error
    return Accepted(bundle_id=bundle, task_id=task)


@router.get("/apps/{id}/bundles", responses=refusals(403, 404))
async def list_bundles(app: OwnApp, provided: Provided) -> BundleList:
    """Name an app's bundles, newest first."""
    return BundleList(
        bundles=[
            BundleBody.model_validate(
                {
                    "id": bundle.id,
                    "app_id": bundle.app_id,
                    "status": bundle.status,
                    "uploaded_at": rfc3339(bundle.uploaded_at),
                    "deployed_by": bundle.deployed_by,
                    "pinned": bundle.pinned,
                    "reason": bundle.reason,
                }
            )
            for bundle in await provided.deployments.list(app)
        ]
    )


@router.post("/apps/{id}/rollback", responses=refusals(400, 403, 404, 409, 413))
async def rollback(wish: Rollback, app: OwnApp, provided: Provided, principal: Caller) -> AppBody:
    """Serve an earlier bundle; running sessions end on the one they began with."""
    return await get(await provided.deployments.rollback(app, wish.bundle_id), provided, principal)


async def _task(task_id: str, provided: Services, principal: Principal) -> Task:
    task = await provided.deployments.task(task_id)
    app = provided.catalog.with_id(task.app_id)
    if app is None:  # deleted meanwhile, which whoever deployed it is to read
        app = next((one for one in await provided.catalog.deleted() if one.id == task.app_id), None)
    if app is None or provided.catalog.relation(app, principal) not in MAY_CHANGE:
        raise NotFound("not_found", "There is no such task.")
    return task


@router.get("/tasks/{task_id}", responses=refusals(404))
async def get_task(task_id: str, provided: Provided, principal: Caller) -> TaskBody:
    """Return a deployment's progress."""
    task = await _task(task_id, provided, principal)
    return TaskBody.model_validate({"id": task.id, "status": task.status, "created_at": rfc3339(task.created_at)})


@router.get(
    "/tasks/{task_id}/logs",
    response_class=StreamingResponse,
    responses={200: {"content": {"text/plain": {}}}, **refusals(404)},
)
async def task_logs(task_id: str, provided: Provided, principal: Caller) -> StreamingResponse:
    """Send a deployment's log while it grows, and the caller's token counts."""
    task = await _task(task_id, provided, principal)

    async def text() -> AsyncGenerator[bytes, None]:
        async for lines in provided.deployments.follow(task.id):
            yield lines.encode()

    return provided.streams.answer(principal, text())
