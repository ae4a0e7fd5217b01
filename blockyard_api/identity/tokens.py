"""Access tokens: made once, shown once, stored as SHA-256, checked on every request."""

import asyncio
import hashlib
import logging
import secrets
import time
import uuid
from collections.abc import Callable
from dataclasses import dataclass

from sqlalchemy import delete, insert, select, update

from blockyard_api.errors import BadRequest, Forbidden, Gone, NotFound, TooMany, Unauthorized
from blockyard_api.identity.allowance import Allowance
from blockyard_api.store.database import Database, dispensable
from blockyard_api.store.tables import bootstrap_tokens, tokens, users

PREFIX = "by_"
DAY = 86400.0
DEFAULT_LIFETIME = 90 * DAY
LONGEST_LIFETIME = 366 * DAY
_WRONG, _WRONG_PER_SECOND = 20, 0.2  # wrong tokens of one client address; right ones are not counted
_SEEN_EVERY = 60.0  # seconds between two writes of last_used_at: a write a request would serialise all of them

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Principal:
    """An authenticated caller, and the token it came with."""

    sub: str
    role: str  # admin, publisher or viewer
    email: str = ""
    name: str = ""
    token_id: str = ""
    expires_at: float = float("inf")

    @property
    def is_admin(self) -> bool:
        """Whether the caller may see and do everything."""
        return self.role == "admin"


@dataclass(frozen=True, slots=True)
class Token:
    """What is kept of an access token; its plain text is not."""

    id: str
    name: str
    created_at: float
    expires_at: float
    last_used_at: float | None


def digest(secret: str) -> str:
    """SHA-256 in hexadecimal: the secrets have 256 random bits, so no salt or stretching is needed."""
    return hashlib.sha256(secret.encode()).hexdigest()


class Tokens:
    """Creates, checks and revokes access tokens.

    Principals are kept in memory, since the relay asks for each request of a private app. Every change goes through
    this object, so what is kept is never out of date.

    A client address that sends many wrong tokens is told to wait, and what it sends is looked up one at a time, so
    that guessing costs the others nothing. A right token is right all the same: whoever guesses shares his address
    with a whole office, and 256 random bits are not guessed.
    """

    def __init__(self, database: Database, revoked: Callable[[str], None] = lambda _token_id: None) -> None:
        self._database = database
        self._revoked = revoked
        self._known: dict[str, Principal] = {}
        self._seen: dict[str, float] = {}
        self._revocations = 0
        self._wrong = Allowance(_WRONG, _WRONG_PER_SECOND)
        self._in_turn = asyncio.Lock()  # for addresses that have sent too many wrong ones

    async def authenticate(self, plain: str, client: str = "") -> Principal:
        """Return who a token belongs to.

        Raises Unauthorized, or TooMany for a `client` address that has sent many wrong ones.
        """
        now = time.time()
        hashed = digest(plain)
        principal = self._known.get(hashed) or await self._look_up_for(client, hashed)
        if principal is None or principal.expires_at <= now:
            self._known.pop(hashed, None)
            self._note_wrong(client)
            raise _unknown()
        if now - self._seen.get(principal.token_id, 0) > _SEEN_EVERY:
            self._seen[principal.token_id] = now
            with dispensable(log, "a token's use is not recorded"):  # it is right all the same
                async with self._database.begin() as connection:
                    await connection.execute(
                        update(tokens).where(tokens.c.id == principal.token_id).values(last_used_at=now)
                    )
            if hashed not in self._known:  # revoked while that was written
                raise _unknown()
        return principal

    def stands(self, principal: Principal) -> bool:
        """Whether the token that an authenticated caller came with was neither revoked nor has expired since."""
        known = any(known.token_id == principal.token_id for known in self._known.values())
        return known and principal.expires_at > time.time()

    def _note_wrong(self, client: str) -> None:
        if (wait := self._wrong.spend(client)) > 0:
            raise TooMany("too_many_wrong_tokens", "This address sends too many wrong tokens; wait, then log in.", wait)

    async def _look_up_for(self, client: str, hashed: str) -> Principal | None:
        if self._wrong.wait(client) > 0:
            async with self._in_turn:
                return await self._look_up(hashed)
        return await self._look_up(hashed)

    async def _look_up(self, hashed: str) -> Principal | None:
        columns = (users.c.sub, users.c.role, users.c.email, users.c.name, tokens.c.id, tokens.c.expires_at)
        query = select(*columns).join(tokens, users.c.sub == tokens.c.user_sub).where(tokens.c.hash == hashed)
        while True:
            revocations = self._revocations
            async with self._database.begin() as connection:
                row = (await connection.execute(query)).first()
            if revocations == self._revocations:  # else what was read may be the token that is gone since
                break
        if row is None:
            return None
        principal = Principal(*row)
        self._known[hashed] = principal
        return principal

    async def create(self, sub: str, name: str, lifetime: float = DEFAULT_LIFETIME) -> tuple[Token, str]:
        """Make a token that lives for `lifetime` seconds and return it with its plain text. Raises BadRequest."""
        if not 0 < lifetime <= LONGEST_LIFETIME:
            raise BadRequest("invalid_lifetime", "A token lives between one second and 366 days.")
        plain = PREFIX + secrets.token_urlsafe(32)
        now = time.time()
        token = Token(str(uuid.uuid4()), name, now, now + lifetime, None)
        async with self._database.begin() as connection:
            await connection.execute(
                insert(tokens).values(
                    id=token.id,
                    user_sub=sub,
                    name=name,
                    hash=digest(plain),
                    created_at=token.created_at,
                    expires_at=token.expires_at,
                )
            )
        return token, plain

    async def list(self, sub: str) -> list[Token]:
        """Name a user's tokens, newest first."""
        query = select(tokens).where(tokens.c.user_sub == sub).order_by(tokens.c.created_at.desc())
        async with self._database.begin() as connection:
            rows = (await connection.execute(query)).all()
        return [Token(row.id, row.name, row.created_at, row.expires_at, row.last_used_at) for row in rows]

    async def revoke(self, sub: str, token_id: str | None = None) -> int:
        """Delete one token of a user, or all of them; what they opened is closed. Raises NotFound for one."""
        condition = tokens.c.user_sub == sub
        if token_id is not None:
            condition &= tokens.c.id == token_id
        async with self._database.begin() as connection:
            gone = {
                row.id for row in (await connection.execute(delete(tokens).where(condition).returning(tokens.c.id)))
            }
        if token_id is not None and not gone:
            raise NotFound("not_found", "There is no such token of yours; 'by tokens list' names them.")
        self._revocations += 1
        self._known = {key: value for key, value in self._known.items() if value.token_id not in gone}
        for identifier in gone:
            self._revoked(identifier)
        return len(gone)

    async def first_admin(self) -> str | None:
        """Make the user `admin` and a token for it, unless some user exists already; return the plain text."""
        async with self._database.begin() as connection:
            if (await connection.execute(select(users.c.sub).limit(1))).first():
                return None
            await connection.execute(
                insert(users).values(sub="admin", name="Administrator", role="admin", created_at=time.time())
            )
        return (await self.create("admin", "made at install", LONGEST_LIFETIME))[1]

    async def offer_bootstrap(self) -> str:
        """Make a one-time token for `bootstrap` and return its plain text."""
        plain = secrets.token_urlsafe(32)
        async with self._database.begin() as connection:
            await connection.execute(insert(bootstrap_tokens).values(hash=digest(plain), created_at=time.time()))
        return plain

    async def bootstrap(self, plain: str, client: str = "") -> tuple[Token, str]:
        """Exchange the one-time token for an administrator's access token.

        Raises Gone or Forbidden, or TooMany for a `client` address that has sent many wrong ones.
        """
        async with self._database.begin() as connection:
            row = (
                await connection.execute(select(bootstrap_tokens).where(bootstrap_tokens.c.hash == digest(plain)))
            ).first()
            if row is None:
                self._note_wrong(client)
                raise Forbidden(
                    "invalid_bootstrap_token", "Ask the server: 'blockyard-api token --bootstrap' makes one."
                )
            taken = await connection.execute(
                update(bootstrap_tokens)
                .where(bootstrap_tokens.c.hash == row.hash, bootstrap_tokens.c.used_at.is_(None))
                .values(used_at=time.time())
            )
            if taken.rowcount != 1:
                raise Gone("bootstrap_used", "This one-time token was used; log in with the access token it gave.")
            if (await connection.execute(select(users.c.sub).where(users.c.sub == "admin"))).first() is None:
                await connection.execute(
                    insert(users).values(sub="admin", name="Administrator", role="admin", created_at=time.time())
                )
        return await self.create("admin", "bootstrap")


def _unknown() -> Unauthorized:
    return Unauthorized("invalid_token", "The token is unknown or has expired; run 'by login' with a new one.")
