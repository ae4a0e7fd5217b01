"""Sessions: one visitor of one app on one worker, known by a random cookie of which only the hash is kept.

A slot is held while anything of the visitor's is open, and for a while after: briefly between a page and its
WebSocket, longer after a WebSocket dropped, so that its owner finds his state again.
"""

import asyncio
import logging
import secrets
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from sqlalchemy import Executable, bindparam, insert, select, update

from blockyard_api.apps.catalog import App
from blockyard_api.errors import TooMany
from blockyard_api.identity.allowance import Allowance
from blockyard_api.identity.tokens import Principal, digest
from blockyard_api.relay.origin import neighbourhood
from blockyard_api.sessions.issuer import Issuers
from blockyard_api.sessions.views import Views, count
from blockyard_api.settings import Proxy
from blockyard_api.store.database import Database, dispensable
from blockyard_api.store.tables import sessions as table
from blockyard_api.store.tables import workers
from blockyard_api.workers.fleet import Fleet
from blockyard_api.workers.life import State
from blockyard_api.workers.worker import Worker

PAGE_WINDOW = 15.0  # seconds between a page and its WebSocket: a crawler holds a slot no longer
# New sessions of one client address, at once at least; as many as it may have open if that is more. Assets and known
# visitors are not counted.
_BURST, _PER_SECOND = 30, 3.0

log = logging.getLogger(__name__)


@dataclass(eq=False, slots=True)
class Session:
    """One visitor of one app; `earlier` are the workers that still serve what older pages of his have open."""

    key: str
    app_id: str
    user_sub: str | None
    token_id: str | None
    worker: Worker
    created_at: float
    seen_at: float
    expires_at: float = float("inf")  # with the token that opened it
    earlier: list[Worker] = field(default_factory=list)
    issuers: Issuers = field(default_factory=Issuers)
    over: bool = False
    requests: int = 0
    handshakes: int = 0  # of the requests, those for a WebSocket that is not open yet
    sockets: dict[object, tuple[Worker, Callable[[], None]]] = field(default_factory=dict)
    lapse: asyncio.TimerHandle | None = None
    lapses_at: float = 0.0  # by the loop's clock

    def open_on(self, worker: Worker) -> int:
        """How many WebSockets of this visitor the worker serves."""
        return sum(1 for served_by, _ in self.sockets.values() if served_by is worker)

    @property
    def workers(self) -> list[Worker]:
        """The workers that serve this visitor, the newest first."""
        return [self.worker, *reversed(self.earlier)]

    @property
    def pages(self) -> list[Worker]:
        """Those of them on which a page of his is open."""
        return [worker for worker in self.workers if self.open_on(worker)]

    @property
    def busy(self) -> bool:
        """Whether a request other than a WebSocket is under way."""
        return self.requests > len(self.sockets)

    def close_sockets(self) -> None:
        """End all WebSockets at once."""
        for _, close in list(self.sockets.values()):
            close()


def holder(principal: Principal | None, client: str) -> str:
    """Name who answers for a slot: the user, or the client address where nobody is logged in."""
    return f"user {principal.sub}" if principal is not None else neighbourhood(client)


class Tracker:
    """Follows one request of a session through the relay."""

    __slots__ = ("_ended", "_handshake", "_registry", "_session", "_socket", "_under_way", "_used", "_worker")

    def __init__(
        self, registry: "Sessions", session: Session | None, worker: Worker, *, handshake: bool, used: bool
    ) -> None:
        self._registry = registry
        self._session = session
        self._worker = worker
        self._socket: object | None = None
        self._ended = False
        self._handshake = handshake
        self._used = used
        self._under_way = session is not None  # what a stranger fetches, slowly perhaps, keeps no worker alive
        if session is not None:
            worker.requests += 1
            session.requests += 1
            session.handshakes += handshake

    def request_ended(self) -> None:
        """Note the end of the exchange, once."""
        if self._ended:
            return
        self._ended = True
        self._answered()
        if self._used:
            self._worker.touch()
        if self._session is None:
            return
        session = self._session
        session.requests -= 1
        if self._socket is not None:
            session.sockets.pop(self._socket, None)
            session.seen_at = time.time()  # he was there to the end, whenever his last request was
        self._registry.let_lapse(session, dropped=self._socket is not None)

    def websocket_opened(self, close: Callable[[], None]) -> None:
        """Note a WebSocket and how to end it; at once, if its session was ended while the worker was asked."""
        if self._session is not None:
            self._socket = object()
            self._session.sockets[self._socket] = (self._worker, close)
            if self._session.over:
                close()
        self._answered()
        self._worker.touch()

    def _answered(self) -> None:
        """Note that the worker has nothing more to do for the request; an open WebSocket is no work by itself."""
        if self._under_way:
            self._under_way = False
            self._worker.requests -= 1
            if self._handshake and self._session is not None:
                self._session.handshakes -= 1
            if self._worker.state is State.DRAINING:  # asked here: it is of nearly no request
                self._registry.answered(self._worker)

    def visitor_message(self) -> None:
        """Note that the visitor did something."""
        self._worker.touch()


class Sessions:
    """All sessions, by the hash of their cookie."""

    def __init__(self, settings: Proxy, fleet: Fleet, database: Database) -> None:
        self._settings = settings
        self._fleet = fleet
        self._database = database
        self._sessions: dict[str, Session] = {}
        self._awaited: set[str] = set()  # of an earlier run, whose workers' backend has not told yet whether they live
        self._allowed = Allowance(max(_BURST, settings.max_sessions_per_visitor), _PER_SECOND)

    def find(self, cookie: str, app: App, principal: Principal | None) -> Session | None:
        """Return the visitor's session, if the cookie is one, of this app, this user and token, and not too old."""
        session = self._sessions.get(digest(cookie))
        who = (principal.sub, principal.token_id) if principal else (None, None)
        # Of the same token, too: a session ends with the one that began it, and with it what another had opened.
        if session is None or session.app_id != app.id or (session.user_sub, session.token_id) != who:
            return None
        now = time.time()
        idle = now - session.seen_at > self._settings.session_idle_ttl and not session.sockets
        if idle or now - session.created_at > self._settings.session_max_lifetime:
            self._forget(session)
            return None
        session.seen_at = now
        if principal is not None:
            session.expires_at = principal.expires_at
        return session

    async def begin(self, app: App, principal: Principal | None, client: str, agent: str) -> tuple[Session, str]:
        """Give a new visitor a slot, and return the session with its cookie's value.

        Raises TooMany for an address that begins too many, Unavailable where there is no slot.
        """
        if (wait := self._allowed.spend(client)) > 0:
            raise TooMany("too_many_sessions", "This address opens apps too fast; try again shortly.", wait)
        cookie = secrets.token_urlsafe(24)
        key = digest(cookie)
        now = time.time()
        worker = self._fleet.place(app, key, holder(principal, client))
        session = Session(
            key,
            app.id,
            principal.sub if principal else None,
            principal.token_id if principal else None,
            worker,
            now,
            now,
            principal.expires_at if principal else float("inf"),
        )
        self._sessions[key] = session
        self._let_lapse_once_it_serves(session)
        visitor = digest(principal.sub if principal else f"{client}\n{agent}")
        row = {
            "hash": key,
            "app_id": app.id,
            "user_sub": session.user_sub,
            "token_id": session.token_id,
            "visitor": visitor,
            "worker_id": worker.id,
            "created_at": now,
            "last_seen_at": now,
        }
        await self._record(insert(table).values(**row))
        return session, cookie

    async def move(self, session: Session, app: App, principal: Principal | None, client: str) -> None:
        """Give a known visitor a slot again: on his worker if that can be, else on another.

        Raises Unavailable, or TooMany for one whose address holds too many.
        """
        old = session.worker
        worker = self._fleet.place(app, session.key, holder(principal, client))
        session.worker = worker
        self._let_lapse_once_it_serves(session)
        if worker is not old:
            session.earlier = [other for other in session.earlier if other is not worker]
            if session.open_on(old):
                session.earlier.append(old)
            else:
                self._fleet.leave(old, session.key)
            await self._record(
                update(table).where(table.c.hash == session.key).values(worker_id=worker.id, ended_at=None)
            )

    async def _record(self, statement: Executable) -> None:
        # The visitor is served; only a restart would not know him.
        with dispensable(log, "a session is not recorded"):
            async with self._database.begin() as connection:
                await connection.execute(statement)

    def answered(self, worker: Worker) -> None:
        """Hear that a draining worker has one request less to answer."""
        self._fleet.let_go(worker)

    def _let_lapse_once_it_serves(self, session: Session) -> None:
        # an app may take a minute to start, and its page cannot come before that
        session.worker.ready.add_done_callback(lambda _: self.let_lapse(session, dropped=False))

    def let_lapse(self, session: Session, *, dropped: bool) -> None:
        """Start the time after which the slot is free, unless something of the visitor's is open by then."""
        if session.over:
            return
        window = self._settings.ws_cache_ttl if dropped else PAGE_WINDOW
        loop = asyncio.get_running_loop()
        session.lapses_at = max(session.lapses_at, loop.time() + window)
        if (
            session.lapse is None
        ):  # else it looks again when it fires: a timer a request would be the dearest part of it
            session.lapse = loop.call_at(session.lapses_at, self._lapsed, session)

    def _lapsed(self, session: Session) -> None:
        loop = asyncio.get_running_loop()
        session.lapse = None
        if loop.time() < session.lapses_at:
            session.lapse = loop.call_at(session.lapses_at, self._lapsed, session)
            return
        for worker in [worker for worker in session.earlier if not session.open_on(worker)]:
            session.earlier.remove(worker)
            self._fleet.leave(worker, session.key)
        if session.worker.state is State.ENDED and not session.earlier:
            self._forget(session)
        elif not session.worker.ready.done():
            self._let_lapse_once_it_serves(session)
        elif not session.busy and not session.open_on(session.worker):
            self._fleet.leave(session.worker, session.key)

    def _forget(self, session: Session) -> None:
        session.over = True
        self._sessions.pop(session.key, None)
        if session.lapse is not None:
            session.lapse.cancel()
            session.lapse = None
        session.close_sockets()
        for worker in (session.worker, *session.earlier):
            self._fleet.leave(worker, session.key)

    def drop(self, session: Session) -> None:
        """End a session: its WebSockets close, its slot is free, its cookie means nothing any more."""
        self._forget(session)

    def drop_where(self, condition: Callable[[Session], bool]) -> None:
        """End all sessions for which the condition holds: access was revoked."""
        for session in [session for session in self._sessions.values() if condition(session)]:
            self._forget(session)

    def of(self, worker: Worker) -> list[Session]:
        """Return the sessions that hold a slot of a worker."""
        return [self._sessions[key] for key in worker.slots if key in self._sessions]

    def track(self, session: Session | None, worker: Worker, *, handshake: bool, used: bool) -> Tracker:
        """Return the tracker of one request; `used`: it is a visitor's deed, after which the worker is not idle."""
        return Tracker(self, session, worker, handshake=handshake, used=used)

    async def adopt(self) -> None:
        """Take over the sessions of an earlier run whose workers live; again, once more workers were taken over."""
        alive = select(workers.c.id).where(workers.c.status != State.ENDED.value)
        async with self._database.begin() as connection:
            rows = (await connection.execute(select(table).where(table.c.ended_at.is_(None)))).all()
            may_live = {row.id for row in await connection.execute(alive)}
        self._awaited.clear()
        for row in rows:
            worker = self._fleet.find(row.worker_id)
            if worker is None and row.worker_id in may_live:
                self._awaited.add(row.hash)
            if worker is None or row.hash in self._sessions:
                continue
            session = Session(
                row.hash, row.app_id, row.user_sub, row.token_id, worker, row.created_at, row.last_seen_at
            )
            self._sessions[row.hash] = session
            # of a stranger's address nothing is written down, so he counts by himself until he is given a slot anew
            who = f"user {row.user_sub}" if row.user_sub else f"session {row.hash}"
            if self._fleet.hold(worker, row.hash, who):
                self.let_lapse(session, dropped=True)
        await self.save()

    async def save(self) -> None:
        """Write when each session was last seen, and which are over."""
        now = time.time()
        for session in self._sessions.values():
            if session.sockets:
                session.seen_at = now
        self._drop_expired(now)
        seen: list[dict[str, Any]] = [
            {"key": session.key, "seen": session.seen_at} for session in self._sessions.values()
        ]
        async with self._database.begin() as connection:
            open_rows = select(table.c.hash).where(table.c.ended_at.is_(None))
            stored = {row.hash for row in await connection.execute(open_rows)}
            over = [{"key": key} for key in stored - self._sessions.keys() - self._awaited]
            if seen:
                statement = update(table).where(table.c.hash == bindparam("key"))
                await connection.execute(statement.values(last_seen_at=bindparam("seen")), seen)
            if over:
                statement = update(table).where(table.c.hash == bindparam("key"))
                await connection.execute(statement.values(ended_at=now), over)

    def _drop_expired(self, now: float) -> None:
        unseen = now - self._settings.session_idle_ttl
        begun = now - self._settings.session_max_lifetime

        def expired(session: Session) -> bool:
            if session.expires_at <= now or session.created_at < begun:
                return True
            idle = session.worker.state is State.ENDED or session.seen_at < unseen
            return idle and not session.requests

        self.drop_where(expired)

    async def views(self, app: App) -> Views:
        """Count how often an app was opened."""
        return await count(self._database, app.id)
