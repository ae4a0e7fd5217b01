"""The catalogue: names, aliases, limits, deletion, and who may see what."""

import asyncio

import pytest

from blockyard_api.apps.catalog import Catalog, check_name
from blockyard_api.errors import BadRequest, Conflict, NotFound
from blockyard_api.identity.tokens import Principal, Tokens
from blockyard_api.store import tables

OWNER = Principal("admin", "publisher")
OTHER = Principal("somebody", "viewer")


@pytest.fixture
async def catalog(store):
    await Tokens(store).first_admin()
    loaded = Catalog(store)
    await loaded.load()
    return loaded


@pytest.mark.parametrize("name", ["a", "hello", "a1", "a-b", "x" * 63])
def test_good_names(name):
    assert check_name(name) == name


@pytest.mark.parametrize(
    "name", ["", "1a", "-a", "a-", "A", "a_b", "a.b", "a/b", "x" * 64, "hello\n", "ä", "..", "--bind"]
)
def test_bad_names(name):
    with pytest.raises(BadRequest):
        check_name(name)


async def test_a_name_is_taken_once(catalog):
    await catalog.create("hello", "admin")
    with pytest.raises(Conflict):
        await catalog.create("hello", "admin")


async def test_a_renamed_app_keeps_its_old_name_as_an_alias_over_a_restart(catalog, store):
    app = await catalog.create("hello", "admin")
    await catalog.change(app, {"name": "welcome"})
    again = Catalog(store)
    await again.load()
    for one in (catalog, again):
        assert one.named("hello") is None
        assert one.find("hello").name == "welcome"
        assert one.renamed("hello").id == app.id


async def test_renaming_back_and_forth_leaves_one_alias(catalog):
    app = await catalog.create("a", "admin")
    app = await catalog.change(app, {"name": "b"})
    app = await catalog.change(app, {"name": "a"})
    assert catalog.named("a").id == catalog.renamed("b").id == app.id


async def test_a_new_app_takes_a_name_that_was_only_an_alias(catalog):
    app = await catalog.create("hello", "admin")
    await catalog.change(app, {"name": "welcome"})
    second = await catalog.create("hello", "admin")
    assert catalog.find("hello").id == second.id


async def test_nobody_takes_the_former_name_of_somebody_elses_app(catalog, store):
    async with store.begin() as connection:
        await connection.execute(tables.users.insert().values(sub="eve", role="publisher", created_at=0))
    app = await catalog.create("sales", "admin")
    await catalog.change(app, {"name": "revenue"})
    hers = await catalog.create("hers", "eve")
    with pytest.raises(Conflict):
        await catalog.create("sales", "eve")
    with pytest.raises(Conflict):
        await catalog.change(hers, {"name": "sales"})
    assert catalog.find("sales").id == app.id
    assert catalog.named("hers").id == hers.id


async def test_changes_that_come_at_once_are_made_one_after_the_other(catalog, store):
    app = await catalog.create("a", "admin")
    names = [f"a{number}" for number in range(10)]
    await asyncio.gather(*(catalog.change(app, {"name": name}) for name in names))
    current = catalog.get(app.id)
    assert {catalog.find(name).id for name in (*names, "a")} == {app.id}
    again = Catalog(store)
    await again.load()
    assert again.get(app.id) == current
    assert {again.find(name).id for name in (*names, "a")} == {app.id}


async def test_a_change_of_an_app_that_is_deleted_meanwhile_is_not_found(catalog):
    app = await catalog.create("a", "admin")
    results = await asyncio.gather(
        catalog.delete(app), catalog.change(app, {"name": "b"}), catalog.delete(app), return_exceptions=True
    )
    assert [type(result) for result in results] == [type(None), NotFound, NotFound]
    assert catalog.find("a") is None
    assert catalog.find("b") is None


async def test_a_deleted_app_frees_its_name_and_is_remembered_as_deleted(catalog, store):
    app = await catalog.create("hello", "admin")
    await catalog.delete(app)
    assert catalog.find("hello") is None
    assert catalog.find(app.id) is None
    await catalog.create("hello", "admin")
    assert [one.id for one in await catalog.deleted()] == [app.id]


@pytest.mark.parametrize(
    "changes",
    [
        {"memory_limit": "1024t"},
        {"memory_limit": "999999999999t"},
        {"memory_limit": "-512m"},
        {"memory_limit": "512"},
        {"cpu_limit": -1},
        {"cpu_limit": 0},
        {"cpu_limit": 0.04},
    ],
)
async def test_a_relative_or_negative_limit_is_refused_and_nothing_changes(catalog, changes):
    app = await catalog.create("hello", "admin")
    with pytest.raises(BadRequest):
        await catalog.change(app, changes)
    assert catalog.get(app.id) == app


@pytest.mark.parametrize(
    ("access_type", "anonymous", "other"),
    [("public", "anonymous", "viewer"), ("logged_in", None, "viewer"), ("acl", None, None)],
)
async def test_who_sees_an_app_follows_its_access_type(catalog, access_type, anonymous, other):
    app = await catalog.change(await catalog.create("hello", "admin"), {"access_type": access_type})
    assert catalog.relation(app, None) == anonymous
    assert catalog.relation(app, OTHER) == other
    assert catalog.relation(app, OWNER) == "owner"
    assert catalog.relation(app, Principal("root", "admin")) == "admin"
