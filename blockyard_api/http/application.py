"""The ASGI application: the routes together, errors as responses, headers, and an OpenAPI document that is true."""

import logging
from importlib.metadata import version
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.openapi.utils import get_openapi
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from blockyard_api.errors import BlockyardError, TooMany, Unauthorized, Unavailable
from blockyard_api.http import account, apps, bundles, system
from blockyard_api.http.models import ErrorBody
from blockyard_api.http.services import Services

log = logging.getLogger(__name__)

_HEADERS = (
    (b"x-content-type-options", b"nosniff"),
    (b"x-frame-options", b"DENY"),
    (b"referrer-policy", b"no-referrer"),
    (b"cross-origin-resource-policy", b"same-origin"),
    (b"cache-control", b"no-store"),
)
_CODES = {404: "not_found", 405: "method_not_allowed", 413: "body_too_large"}
_ERRORS: dict[int | str, dict[str, Any]] = {
    400: {"model": ErrorBody, "description": "The request cannot be carried out as it stands"},
    401: {"model": ErrorBody, "description": "No valid token"},
    403: {"model": ErrorBody, "description": "Not allowed"},
    404: {"model": ErrorBody, "description": "No such object, or none that the caller may see"},
    409: {"model": ErrorBody, "description": "Contradicts the present state"},
    410: {"model": ErrorBody, "description": "Was there once and never will be again"},
    413: {"model": ErrorBody, "description": "Larger than the configuration allows"},
    429: {"model": ErrorBody, "description": "Asked faster than one may; Retry-After says when to go on"},
    503: {"model": ErrorBody, "description": "Cannot be done at the moment"},
    507: {"model": ErrorBody, "description": "The disk is full"},
}


def build(services: Services) -> FastAPI:
    """Return the control plane as an ASGI application."""
    app = FastAPI(
        title="Blockyard", version=version("blockyard"), docs_url=None, redoc_url=None, redirect_slashes=False
    )
    app.state.services = services
    for router in (account.router, apps.router, bundles.router, system.router):
        app.include_router(router, responses=_ERRORS)
    app.add_exception_handler(BlockyardError, _known)
    app.add_exception_handler(RequestValidationError, _invalid)
    app.add_exception_handler(HTTPException, _plain)
    app.add_exception_handler(Exception, _unknown)
    app.add_middleware(_Headers)
    app.openapi = lambda: _openapi(app)  # type: ignore[method-assign]  # FastAPI's documented way to extend it
    return app


class _Headers:
    """Adds the headers that every answer of the control plane carries."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def with_headers(message: Message) -> None:
            if message["type"] == "http.response.start":
                message["headers"] = [*message["headers"], *_HEADERS]
            await send(message)

        await self._app(scope, receive, with_headers)


def _answer(status: int, code: str, message: str, headers: dict[str, str] | None = None) -> JSONResponse:
    return JSONResponse({"error": code, "message": message}, status, headers)


async def _known(_: Request, error: Exception) -> JSONResponse:
    if not isinstance(error, BlockyardError):
        raise error
    headers = {}
    if isinstance(error, Unauthorized):
        headers["WWW-Authenticate"] = "Bearer"
    if isinstance(error, TooMany | Unavailable) and error.retry_after is not None:
        headers["Retry-After"] = str(error.retry_after)
    return _answer(error.status, error.code, error.message, headers)


async def _invalid(_: Request, error: Exception) -> JSONResponse:
    if not isinstance(error, RequestValidationError):
        raise error
    first = error.errors()[0]
    place = ".".join(str(part) for part in first["loc"] if part != "body") or "the body"
    return _answer(400, "invalid_request", f"Correct {place!r:.100}: {first['msg']}.")


async def _plain(_: Request, error: Exception) -> JSONResponse:
    if not isinstance(error, HTTPException):
        raise error
    code = _CODES.get(error.status_code, "request_failed")
    return _answer(error.status_code, code, f"{error.detail}; see /openapi.json for what there is.")


async def _unknown(request: Request, error: Exception) -> JSONResponse:
    log.error("%s %r failed", request.method, request.url.path, exc_info=error)
    return _answer(500, "internal_error", "The server failed; its journal says why ('journalctl -u blockyard-api').")


def _openapi(app: FastAPI) -> dict[str, Any]:
    """Return the document with 400 where FastAPI assumes 422: the contract's shape for what it cannot read."""
    if app.openapi_schema is None:
        document = get_openapi(title=app.title, version=app.version, routes=app.routes)
        for path in document["paths"].values():
            for operation in path.values():
                operation["responses"].pop("422", None)
        for name in ("HTTPValidationError", "ValidationError"):
            document["components"]["schemas"].pop(name, None)
        app.openapi_schema = document
    return app.openapi_schema
