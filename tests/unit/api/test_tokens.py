"""Access tokens: shown once, stored as a hash, expiring, revocable, and the way to the first one."""

import asyncio
import contextlib
import time

import pytest
from sqlalchemy import select, text, update

from blockyard_api.errors import BadRequest, Forbidden, Gone, NotFound, Unauthorized
from blockyard_api.identity.tokens import DAY, Tokens, digest
from blockyard_api.store import tables


class Paused:
    """The database, but that a transaction which is about to end waits where a test wants it to."""

    def __init__(self, store):
        self._store = store
        self.pausing = False
        self.reached = asyncio.Event()
        self.go_on = asyncio.Event()

    @contextlib.asynccontextmanager
    async def begin(self):
        async with self._store.begin() as connection:
            yield connection
        if self.pausing:
            self.pausing = False
            self.reached.set()
            await self.go_on.wait()


async def admin(store, revoked=lambda _: None):
    tokens = Tokens(store, revoked)
    return tokens, await tokens.first_admin()


async def test_the_first_admin_is_made_once(store):
    tokens, plain = await admin(store)
    assert (await tokens.authenticate(plain)).is_admin
    assert await tokens.first_admin() is None


async def test_only_the_hash_of_a_token_is_stored(store):
    _, plain = await admin(store)
    async with store.begin() as connection:
        rows = (await connection.execute(select(tables.tokens))).all()
    assert [row.hash for row in rows] == [digest(plain)]
    assert plain not in repr(rows)


async def test_an_unknown_token_is_refused(store):
    tokens, _ = await admin(store)
    with pytest.raises(Unauthorized):
        await tokens.authenticate("by_guess")


async def test_an_expired_token_is_refused_even_if_it_was_used_before(store):
    tokens, _ = await admin(store)
    _, plain = await tokens.create("admin", "short", 0.05)
    await tokens.authenticate(plain)
    async with store.begin() as connection:
        await connection.execute(update(tables.tokens).values(expires_at=time.time() - 1))
    fresh = Tokens(store)
    with pytest.raises(Unauthorized):
        await fresh.authenticate(plain)
    await asyncio.sleep(0.06)
    with pytest.raises(Unauthorized):
        await tokens.authenticate(plain)


async def test_a_revoked_token_is_refused_at_once_and_whoever_watches_hears_of_it(store):
    heard = []
    tokens, _ = await admin(store, heard.append)
    token, plain = await tokens.create("admin", "laptop")
    await tokens.authenticate(plain)
    await tokens.revoke("admin", token.id)
    assert heard == [token.id]
    with pytest.raises(Unauthorized):
        await tokens.authenticate(plain)


async def test_nobody_revokes_the_token_of_another(store):
    tokens, _ = await admin(store)
    token, plain = await tokens.create("admin", "laptop")
    with pytest.raises(NotFound):
        await tokens.revoke("mallory", token.id)
    assert await tokens.authenticate(plain)


@pytest.mark.parametrize("lifetime", [0, -1, 400 * DAY])
async def test_a_lifetime_out_of_bounds_is_refused(store, lifetime):
    tokens, _ = await admin(store)
    with pytest.raises(BadRequest):
        await tokens.create("admin", "x", lifetime)


async def test_the_bootstrap_token_works_once(store):
    tokens = Tokens(store)
    offered = await tokens.offer_bootstrap()
    with pytest.raises(Forbidden):
        await tokens.bootstrap("wrong")
    _, plain = await tokens.bootstrap(offered)
    assert (await tokens.authenticate(plain)).is_admin
    with pytest.raises(Gone):
        await tokens.bootstrap(offered)
    async with store.begin() as connection:
        assert await connection.scalar(text("SELECT count(*) FROM users")) == 1


@pytest.mark.parametrize("used_before", [False, True], ids=["while it is looked up", "while its use is noted"])
async def test_a_token_that_is_revoked_in_the_middle_of_its_check_is_refused_then_and_ever_after(store, used_before):
    paused = Paused(store)
    tokens, plain = await admin(paused)
    if used_before:
        await tokens.authenticate(plain)
        tokens._seen.clear()
    paused.pausing = True
    checking = asyncio.create_task(tokens.authenticate(plain))
    await paused.reached.wait()
    await tokens.revoke("admin")
    paused.go_on.set()
    with pytest.raises(Unauthorized):
        await checking
    with pytest.raises(Unauthorized):
        await tokens.authenticate(plain)


async def test_a_right_token_is_right_also_where_its_use_cannot_be_written_down(store):
    tokens, plain = await admin(store)
    await tokens.authenticate(plain)
    tokens._seen.clear()
    async with store.begin() as connection:
        await connection.execute(text("ALTER TABLE tokens RENAME COLUMN last_used_at TO elsewhere"))
    assert (await tokens.authenticate(plain)).sub == "admin"
