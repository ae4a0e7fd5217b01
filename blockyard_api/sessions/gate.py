"""The gate of the data plane: for each request, may it pass, and to which worker.

Access is checked on every request, upgrades included, before a byte reaches a worker.
"""

import asyncio
import contextlib
import json
import re
from collections.abc import Awaitable, Sequence
from itertools import islice
from typing import NamedTuple
from urllib.parse import quote

from blockyard_api import pages
from blockyard_api.apps.catalog import App, Catalog, SwitchedOff
from blockyard_api.apps.naming import NAME
from blockyard_api.errors import BadGateway, BlockyardError, Forbidden, NotFound, TooMany, Unauthorized, Unavailable
from blockyard_api.identity.allowance import Allowance
from blockyard_api.identity.tokens import Principal, Tokens
from blockyard_api.relay.gate import Crowded, Forward, Header, Overloaded, Reply, RequestHead, Verdict
from blockyard_api.sessions.address import Addresses
from blockyard_api.sessions.issuer import token_of
from blockyard_api.sessions.registry import Session, Sessions, holder
from blockyard_api.workers.fleet import Fleet
from blockyard_api.workers.life import State
from blockyard_api.workers.worker import Worker

COOKIE = b"blockyard_route"
READY_PATH = b"/__blockyard__/ready"
_ADOPTED_WITHIN = 5.0  # seconds a request waits for this daemon to find its workers again
_MOST_SOCKETS = 64  # of one session: it has one place at its worker, however many pages share it
_STRAYS, _STRAYS_PER_SECOND = 20, 2.0  # assets for which an address may ask without a session
_MOST_COOKIES = 8  # of our name in one request: each costs a hash
_ASSETS = frozenset({b"script", b"style", b"image", b"font", b"audio", b"video", b"track", b"manifest", b"worker"})


class AppGate:
    """Implements the relay's Gate with the catalogue, the sessions and the fleet."""

    def __init__(
        self, addresses: Addresses, catalog: Catalog, sessions: Sessions, fleet: Fleet, tokens: Tokens
    ) -> None:
        self._addresses = addresses
        self._catalog = catalog
        self._sessions = sessions
        self._fleet = fleet
        self._tokens = tokens
        # Of the two, no other host of the same domain can set the longer name (RFC 6265bis, "__Host-"): a script of one
        # app could make another one's visitors come by a session of its own choice.
        self._bound = addresses.own_host and addresses.origin.startswith("https://")
        self._cookie_name = b"__Host-" * self._bound + COOKIE
        self._route_cookie = re.compile(rb"(?:^|;)[ \t]*%b=([^; \t]*)" % re.escape(self._cookie_name))
        self._strays = Allowance(_STRAYS, _STRAYS_PER_SECOND)

    def admit(self, head: RequestHead) -> Verdict | Awaitable[Verdict]:
        """Decide about a request; at once for a known visitor of a public app."""
        place = self._addresses.find(head.get(b"host") or b"", head.target)
        if place is None or not NAME.fullmatch(place.app):
            return _refusal(head, NotFound("not_found", "There is no app at this address."))
        app = self._catalog.named(place.app)
        if app is None:
            former = self._catalog.renamed(place.app)
            if former is not None and self._catalog.relation(former, None):  # else the name would tell of the app
                return _redirect(self._addresses.url(former.name).encode() + _below(place.rest, head.target))
            return _refusal(head, NotFound("not_found", "There is no app at this address."))
        if place.rest is None:
            path, mark, query = head.target.partition(b"?")
            return _redirect(path + b"/" + mark + query)
        if (authorization := head.get(b"authorization")) is not None:
            return self._authenticated(head, app, place.rest, authorization)
        return self._decide(head, app, place.rest, None)

    def failed(self, head: RequestHead, forward: Forward, error: Exception) -> Reply:
        """Word the answer for a worker that failed before it answered, or that others keep busy."""
        if isinstance(error, Crowded):
            message = "The app answers as many requests from your address as it may; try again."
            return _refusal(head, TooMany("too_many_requests", message, error.retry_after))
        if isinstance(error, Overloaded):
            message = "The app is busy with other requests; try again."
            return _refusal(head, Unavailable("app_busy", message, error.retry_after))
        if any(worker.socket is forward.upstream and not worker.over.done() for worker in self._fleet.all()):
            why = str(error).rstrip(".")
            return _refusal(head, BadGateway("bad_gateway", f"The app did not answer as it should ({why}); try again."))
        return _refusal(head, BadGateway("worker_gone", "The app stopped while it was to answer; try again."))

    async def _authenticated(self, head: RequestHead, app: App, rest: bytes, authorization: bytes) -> Verdict:
        scheme, _, plain = authorization.partition(b" ")
        principal = None
        if scheme.lower() == b"bearer":
            try:
                principal = await self._tokens.authenticate(plain.decode("latin-1").strip(), head.client)
                app = self._catalog.get(app.id)
            except BlockyardError as error:
                return _refusal(head, error)
        verdict = self._decide(head, app, rest, principal)
        return verdict if isinstance(verdict, Reply | Forward) else await verdict

    def _decide(
        self, head: RequestHead, app: App, rest: bytes, principal: Principal | None
    ) -> Verdict | Awaitable[Verdict]:
        visit = _Visit(head, app, rest, principal, self._catalog.relation(app, principal))
        if (error := self._objection(visit)) is not None:
            return _refusal(head, error)
        if not self._fleet.adopted.is_set():
            return self._after_adoption(visit)
        return self._route(visit)

    async def _after_adoption(self, visit: "_Visit") -> Verdict:
        """Let those who come while this daemon starts wait a moment, rather than lose their place."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(_ADOPTED_WITHIN):
                await self._fleet.adopted.wait()
        try:
            verdict = self._route(self._again(visit))
        except BlockyardError as error:
            return _refusal(visit.head, error)
        return verdict if isinstance(verdict, Reply | Forward) else await verdict

    def _route(self, visit: "_Visit") -> Verdict | Awaitable[Verdict]:
        head, rest = visit.head, visit.rest
        session = self._session(visit)
        if session is not None:
            if head.websocket and (crowded := _too_many_sockets(session)):
                return _refusal(head, crowded)
            if session.earlier and (token := token_of(rest)):
                return self._to_issuer(visit, session, token)
            if rest != READY_PATH and self._serves(session.worker, session, visit):
                return self._forward(visit, session.worker, session, ())
        elif _is_asset(head):
            return self._stray(visit)
        elif rest == READY_PATH:  # asked by the loading page of a visitor who was given a cookie: it did not come back
            return _refusal(head, Forbidden("unknown_visit", "Allow cookies for this site, then load the page again."))
        return self._enter(visit, session)

    def _stray(self, visit: "_Visit") -> Verdict:
        """Answer who fetches a part of a page and has no session: it begins none, and must not keep a worker busy.

        An image on a foreign page is one, of which everybody who sees that page asks.
        """
        whole = visit.rest.partition(b"?")[0] == b"/" or visit.rest.startswith(b"/session/")
        if (wait := self._strays.spend(visit.head.client)) > 0:
            return _refusal(visit.head, TooMany("too_many_requests", "Open the app's page first.", wait))
        if whole or (active := self._fleet.any_active(visit.app)) is None:
            return _refusal(visit.head, NotFound("not_found", "Open the app's page first."))
        return self._forward(visit, active, None, ())

    async def _to_issuer(self, visit: "_Visit", session: Session, token: bytes) -> Verdict:
        """Pass on an upload or a download: it belongs to the worker whose page it comes from, an older one perhaps."""
        worker = session.issuers.known(token)
        try:
            if worker is None and len(pages := session.pages) > 1:
                worker = await session.issuers.ask(token, pages)
            visit = self._again(visit)
        except BlockyardError as error:
            return _refusal(visit.head, error)
        if worker is None or worker not in session.workers:  # his last page there was closed: no slot is his any more
            worker = next(iter(session.pages), session.worker)
        if not session.over and self._serves(worker, session, visit):
            return self._forward(visit, worker, session, ())
        return await self._enter(visit, session)

    def _objection(self, visit: "_Visit") -> BlockyardError | None:
        """Return why a request may not pass at all."""
        head, app = visit.head, visit.app
        if visit.relation is None:
            if visit.principal is not None:
                return NotFound("not_found", "There is no app at this address.")
            return Unauthorized(
                "login_required",
                "This app is not public. Signing in with a browser is not available yet on this server; "
                "send an access token as 'Authorization: Bearer …'.",
            )
        if not app.enabled:
            return SwitchedOff()
        if head.websocket and not self._addresses.same_origin(
            app.name, head.get(b"origin") or b"", head.get(b"host") or b"", secure=head.secure
        ):
            return Forbidden("foreign_origin", "A WebSocket must come from the app's own page.")
        return None

    def _session(self, visit: "_Visit") -> Session | None:
        sent = (value for name, value in visit.head.headers if name.lower() == b"cookie")
        named = (match[1] for value in sent for match in self._route_cookie.finditer(value))
        for cookie in islice(named, _MOST_COOKIES):
            if (found := self._sessions.find(cookie.decode("latin-1"), visit.app, visit.principal)) is not None:
                return found
        return None

    def _serves(self, worker: Worker, session: Session, visit: "_Visit") -> bool:
        """Whether this worker takes this request as it is; a page that is loaded anew leaves a draining one."""
        if worker.state is State.DRAINING and _navigates(visit.head):
            return False
        if worker.state not in (State.ACTIVE, State.DRAINING):
            return False
        if session.key in worker.slots:
            return True
        return self._fleet.hold(worker, session.key, holder(visit.principal, visit.head.client))

    async def _enter(self, visit: "_Visit", session: Session | None) -> Verdict:
        """Give the visitor a slot, and wait until its worker serves."""
        head = visit.head
        cookies: Sequence[Header] = ()
        try:
            visit = self._again(visit)
            app = visit.app
            if session is None or session.over:
                agent = (head.get(b"user-agent") or b"").decode("latin-1")
                session, value = await self._sessions.begin(app, visit.principal, head.client, agent)
                cookies = (self._cookie(app, value, secure=head.secure),)
            elif session.worker.state is State.ENDED and not session.worker.wished and _navigates(head):
                self._sessions.drop(session)  # the next try begins anew
                return _refusal(head, _ending(session.worker))
            elif session.worker.state not in (State.STARTING, State.ACTIVE) or session.key not in session.worker.slots:
                await self._sessions.move(session, app, visit.principal, head.client)
            worker = session.worker
            if not worker.ready.done() and _navigates(head):
                return self._loading(app, cookies)
            await asyncio.shield(worker.ready)
            if (error := self._missed(visit, worker, session)) is not None:
                return _refusal(head, error)
        except BlockyardError as error:
            if session is not None and session.worker.state is State.ENDED:
                self._sessions.drop(session)
            return _refusal(head, error, cookies)
        if visit.rest == READY_PATH:
            return Reply(204, ((b"Cache-Control", b"no-store"), *cookies), b"")
        return self._forward(visit, worker, session, cookies)

    def _missed(self, visit: "_Visit", worker: Worker, session: Session) -> BlockyardError | None:
        """Return why a visitor who waited for a worker has no place there any more."""
        if session.over or not self._fleet.hold(worker, session.key, holder(visit.principal, visit.head.client)):
            return Unavailable("visit_ended", "Your visit was ended; load the page again.", 1)
        return _too_many_sockets(session) if visit.head.websocket else None

    def _again(self, visit: "_Visit") -> "_Visit":
        """Return the visit with the app as it is now, or raise what has come to stand against it since the decision."""
        if visit.principal is not None and not self._tokens.stands(visit.principal):
            raise Unauthorized("unauthorized", "Your token was revoked or has expired; log in anew.")
        app = self._catalog.get(visit.app.id)
        visit = visit._replace(app=app, relation=self._catalog.relation(app, visit.principal))
        if (error := self._objection(visit)) is not None:
            raise error
        return visit

    def _forward(self, visit: "_Visit", worker: Worker, session: Session | None, cookies: Sequence[Header]) -> Forward:
        user = visit.principal.sub if visit.principal is not None else None
        # Not what a foreign page or the loading page asks for, nor a handshake, which counts when it succeeds.
        used = session is not None and not visit.head.websocket and visit.rest != READY_PATH
        return Forward(
            worker.upstream,
            visit.rest,
            self._addresses.prefix(visit.app.name).encode(),
            _identity(user, visit.relation or "anonymous"),
            cookies,
            self._sessions.track(session, worker, handshake=visit.head.websocket, used=used),
        )

    def _loading(self, app: App, cookies: Sequence[Header]) -> Reply:
        probe = self._addresses.prefix(app.name) + READY_PATH.decode()
        body, headers = pages.loading(app.title or app.name, probe)
        return Reply(202, (*headers, *cookies), body)

    def _cookie(self, app: App, value: str, *, secure: bool) -> Header:
        path = self._addresses.prefix(app.name) + "/"
        attributes = f"Path={path}; HttpOnly; SameSite=Lax" + ("; Secure" if secure or self._bound else "")
        return b"Set-Cookie", f"{self._cookie_name.decode()}={value}; {attributes}".encode()


class _Visit(NamedTuple):  # a tuple: one is made for every request
    """One request for an app, and what its sender is to it."""

    head: RequestHead
    app: App
    rest: bytes
    principal: Principal | None
    relation: str | None


def _below(rest: bytes | None, target: bytes) -> bytes:
    """Return what follows an app's address in a request for it, the query included."""
    if rest is not None:
        return rest[1:]
    _, mark, query = target.partition(b"?")
    return mark + query


def _ending(worker: Worker) -> BlockyardError:
    """Say to a visitor how his worker ended; what bubblewrap said is for the owner."""
    # Not settled while a failed start is being written down.
    failure = worker.ready.exception() if worker.ready.done() else None
    if isinstance(failure, BlockyardError):
        return failure
    return BadGateway("worker_ended", f"The app was ended: it {worker.told}.")


def _too_many_sockets(session: Session) -> TooMany | None:
    if session.open_on(session.worker) + session.handshakes < _MOST_SOCKETS:
        return None
    return TooMany("too_many_pages", "As many pages as one may have are open; close one.", 5)


_TITLES = {
    401: "Please sign in",
    403: "Not allowed",
    404: "Not found",
    429: "Slow down, please",
    502: "The app stopped",
    503: "Not available right now",
}


def _is_asset(head: RequestHead) -> bool:
    """Whether a page merely fetches a part of itself; what only claims so gets no more than a part of a page."""
    asset = (head.get(b"sec-fetch-dest") or b"").lower() in _ASSETS
    # With a body, which a worker waits for to its end, strangers could keep all of its connections.
    bare = head.get(b"transfer-encoding") is None and (head.get(b"content-length") or b"0") == b"0"
    return asset and bare and head.method in (b"GET", b"HEAD") and not head.websocket


def _navigates(head: RequestHead) -> bool:
    """Whether a person waits for a page, rather than a program for an answer."""
    return head.method == b"GET" and not head.websocket and b"text/html" in (head.get(b"accept") or b"").lower()


def _redirect(location: bytes) -> Reply:
    return Reply(307, ((b"Location", location), (b"Cache-Control", b"no-store")), b"")


def _refusal(head: RequestHead, error: BlockyardError, cookies: Sequence[Header] = ()) -> Reply:
    """Word an error: as a page where a person waits for one, else in the shape of the HTTP contract."""
    extra: list[Header] = list(cookies)
    retry_after = error.retry_after if isinstance(error, TooMany | Unavailable) else None
    if retry_after is not None:
        extra.append((b"Retry-After", str(retry_after).encode()))
    if error.status == 401:
        extra.append((b"WWW-Authenticate", b'Bearer realm="blockyard"'))
    if _navigates(head):
        retry = error.status in (429, 502, 503) and error.code != "app_disabled"
        title = _TITLES.get(error.status, "Something went wrong")
        body, headers = pages.problem(title, error.message, retry=retry, retry_after=retry_after)
        return Reply(error.status, (*headers, *extra), body)
    body = json.dumps({"error": error.code, "message": error.message}).encode()
    plain = ((b"Content-Type", b"application/json"), (b"Cache-Control", b"no-store"))
    return Reply(error.status, (*plain, *extra), body)


def _identity(user: str | None, relation: str) -> Sequence[Header]:
    access = (b"X-Shiny-Access", {"admin": b"owner"}.get(relation, relation.encode()))
    if user is None:
        return (access,)
    credentials = json.dumps({"user": user, "groups": []})  # ASCII, so safe as a header
    return (
        (b"X-Shiny-User", quote(user, safe="@.+-_:").encode()),
        (b"X-Shiny-Groups", b""),
        access,
        (b"Shiny-Server-Credentials", credentials.encode()),
    )
