"""What the routes work with, and who calls them."""

import contextlib
from collections.abc import Callable, Coroutine, Mapping
from dataclasses import dataclass
from typing import Annotated, Any

from fastapi import Depends, Path, Request, Response
from fastapi.dependencies.models import Dependant
from fastapi.routing import APIRoute
from fastapi.security import HTTPAuthorizationCredentials, HTTPBearer

from blockyard_api.apps.catalog import App, Catalog
from blockyard_api.backends.spawner import Spawner
from blockyard_api.bundles.deploy import Deployments
from blockyard_api.checks.runner import Checks
from blockyard_api.errors import Forbidden, NotFound, OutOfSpace, Unauthorized
from blockyard_api.http.streams import Streams
from blockyard_api.identity.tokens import Principal, Tokens
from blockyard_api.relay.origin import original_address
from blockyard_api.sessions.address import Addresses
from blockyard_api.sessions.registry import Sessions
from blockyard_api.settings import Settings
from blockyard_api.store.database import Database, StoreUnavailable
from blockyard_api.workers.fleet import Fleet
from blockyard_api.workers.log import Logs

MAY_CHANGE = frozenset({"admin", "owner", "collaborator"})
_bearer = HTTPBearer(auto_error=False, scheme_name="token", description="An access token, by_…")


@dataclass(frozen=True, slots=True)
class Services:
    """Everything the control plane can do, built by `blockyard_api.app`."""

    settings: Settings
    database: Database
    tokens: Tokens
    catalog: Catalog
    fleet: Fleet
    sessions: Sessions
    deployments: Deployments
    spawners: Mapping[str, Spawner]
    logs: Logs
    addresses: Addresses
    checks: Checks
    streams: Streams

    @property
    def spawner(self) -> Spawner:
        """The spawner of the backend that apps use where they name none."""
        return self.spawners[self.settings.server.backend]


def services(request: Request) -> Services:
    """Return what this application was built with."""
    built: Services = request.app.state.services
    return built


def client_address(request: Request, provided: Annotated[Services, Depends(services)]) -> str:
    """Return who is asking: the peer, or what the last proxy that is not trusted told of itself to those that are."""
    peer = request.client.host if request.client is not None else ""
    told = ",".join(request.headers.getlist("x-forwarded-for")).split(",")
    return original_address(peer, [hop.strip() for hop in told], provided.settings.server.trusted_proxies)


async def visitor(
    request: Request, credentials: Annotated[HTTPAuthorizationCredentials | None, Depends(_bearer)]
) -> Principal | None:
    """Return who calls, or None for nobody; a wrong token is an error all the same."""
    if credentials is None:
        return None
    provided = services(request)
    return await provided.tokens.authenticate(credentials.credentials, client_address(request, provided))


async def recognised(
    request: Request, credentials: Annotated[HTTPAuthorizationCredentials | None, Depends(_bearer)]
) -> Principal | None:
    """Return who calls; None for nobody, and for somebody whom the database cannot tell at the moment."""
    with contextlib.suppress(StoreUnavailable, OutOfSpace):
        return await visitor(request, credentials)
    return None


def caller(principal: Annotated[Principal | None, Depends(visitor)]) -> Principal:
    """Return who calls. Raises Unauthorized."""
    if principal is None:
        raise Unauthorized("unauthorized", "Send an access token as 'Authorization: Bearer …'; 'by login' keeps one.")
    return principal


def visible_app(
    request: Request,
    id: Annotated[str, Path(description="The app's UUID or its name, also a former one")],  # noqa: A002 - the contract's name
    principal: Annotated[Principal, Depends(caller)],
) -> App:
    """Return the app of the path, if the caller may see it. Raises NotFound."""
    catalog = services(request).catalog
    app = catalog.find(id)
    if app is None or catalog.relation(app, principal) is None:
        raise NotFound("not_found", "There is no such app; 'by list' names those you may see.")
    return app


def own_app(
    request: Request,
    app: Annotated[App, Depends(visible_app)],
    principal: Annotated[Principal, Depends(caller)],
) -> App:
    """Return the app of the path, if the caller may change it. Raises NotFound or Forbidden."""
    if services(request).catalog.relation(app, principal) not in MAY_CHANGE:
        raise Forbidden("forbidden", "Only the app's owner, a collaborator or an administrator may do this.")
    return app


def administrator(principal: Annotated[Principal, Depends(caller)]) -> Principal:
    """Return who calls, if it is an administrator. Raises Forbidden."""
    if not principal.is_admin:
        raise Forbidden("forbidden", "Only an administrator may do this.")
    return principal


Provided = Annotated[Services, Depends(services)]
ClientAddress = Annotated[str, Depends(client_address)]
Caller = Annotated[Principal, Depends(caller)]
Recognised = Annotated[Principal | None, Depends(recognised)]
Administrator = Annotated[Principal, Depends(administrator)]
VisibleApp = Annotated[App, Depends(visible_app)]
OwnApp = Annotated[App, Depends(own_app)]


class CallerFirst(APIRoute):
    """A route that asks who calls before it reads the body: FastAPI alone would parse a stranger's first."""

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        """Return what answers a request."""
        answer = super().get_route_handler()
        if self.body_field is None or not _asks_who_calls(self.dependant):
            return answer

        async def known(request: Request) -> Response:
            caller(await visitor(request, await _bearer(request)))
            return await answer(request)

        return known


def _asks_who_calls(dependant: Dependant) -> bool:
    return dependant.call is caller or any(map(_asks_who_calls, dependant.dependencies))
