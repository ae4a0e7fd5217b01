"""The ASGI application: the routes together, errors as responses, headers, and an OpenAPI document that is true."""

import logging
from importlib.metadata import version
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.openapi.utils import get_openapi
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException
from starlette.routing import Match, Route
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from blockyard_api.errors import BlockyardError, TooMany, Unauthorized, Unavailable
from blockyard_api.http import account, apps, bundles, system
from blockyard_api.http.refusals import ELSEWHERE
from blockyard_api.http.services import Services

log = logging.getLogger(__name__)

_HEADERS = (
    (b"x-content-type-options", b"nosniff"),
    (b"x-frame-options", b"DENY"),
    (b"referrer-policy", b"no-referrer"),
    (b"cross-origin-resource-policy", b"same-origin"),
    (b"cache-control", b"no-store"),
)
_ROUTERS = (account.router, apps.router, bundles.router, system.router)
_CODES = {404: "not_found", 405: "method_not_allowed", 413: "body_too_large"}


def build(services: Services) -> FastAPI:
    """Return the control plane as an ASGI application."""
    app = FastAPI(
        title="Blockyard",
        version=version("blockyard"),
        description=ELSEWHERE,
        docs_url=None,
        redoc_url=None,
        redirect_slashes=False,
    )
    app.state.services = services
    for router in _ROUTERS:
        app.include_router(router)
    app.add_exception_handler(BlockyardError, _known)
    app.add_exception_handler(RequestValidationError, _invalid)
    app.add_exception_handler(HTTPException, _plain)
    app.add_exception_handler(Exception, _unknown)
    app.add_middleware(_Headers)
    app.openapi = lambda: _openapi(app)  # type: ignore[method-assign]  # FastAPI's documented way to extend it
    return app


class _Headers:
    """Adds the headers that every answer of the control plane carries, and answers HEAD as GET: probes ask so."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def with_headers(message: Message) -> None:
            if message["type"] == "http.response.start":
                message["headers"] = [*message["headers"], *_HEADERS]
            await send(message)

        # the server, which keeps its own scope, leaves the body out
        asked = {**scope, "method": "GET"} if scope.get("method") == "HEAD" else scope
        await self._app(asked, receive, with_headers)


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


async def _plain(request: Request, error: Exception) -> JSONResponse:
    if not isinstance(error, HTTPException):
        raise error
    code = _CODES.get(error.status_code, "request_failed")
    headers = {"Allow": _allowed(request)} if error.status_code == 405 else None
    return _answer(error.status_code, code, f"{error.detail}; see /openapi.json for what there is.", headers)


def _allowed(request: Request) -> str:
    """Name the methods of an address: to the framework, each of them is a route of its own and knows no other."""
    every = [*request.app.routes, *(route for router in _ROUTERS for route in router.routes)]
    here = [each for each in every if isinstance(each, Route) and each.matches(request.scope)[0] is not Match.NONE]
    found = {method for route in here for method in route.methods or ()}
    return ", ".join(sorted(found | {"HEAD"} if "GET" in found else found))


async def _unknown(request: Request, error: Exception) -> JSONResponse:
    log.error("%s %r failed", request.method, request.url.path, exc_info=error)
    return _answer(500, "internal_error", "The server failed; its journal says why ('journalctl -u blockyard-api').")


def _openapi(app: FastAPI) -> dict[str, Any]:
    """Return the document without the 422 that FastAPI assumes: operations name a 400 where they can give one."""
    if app.openapi_schema is None:
        document = get_openapi(title=app.title, version=app.version, description=app.description, routes=app.routes)
        for path in document["paths"].values():
            for operation in path.values():
                operation["responses"].pop("422", None)
        for name in ("HTTPValidationError", "ValidationError"):
            document["components"]["schemas"].pop(name, None)
        app.openapi_schema = document
    return app.openapi_schema
