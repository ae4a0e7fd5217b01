"""The catalogue of apps: rows in the database, and the same in memory, because the relay asks at every request."""

import asyncio
import time
import uuid
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from typing import Any

from sqlalchemy import delete, insert, select, update
from sqlalchemy.exc import IntegrityError

from blockyard_api.apps import naming
from blockyard_api.errors import BadRequest, Conflict, NotFound, Unavailable
from blockyard_api.identity.tokens import Principal
from blockyard_api.store.database import Database
from blockyard_api.store.tables import access, aliases, apps
from blockyard_spawner import config, protocol

LEAST_CPU = protocol.LEAST_CPU / 1000  # cores
ACCESS_TYPES = ("public", "logged_in", "acl")
_MOST_MEMORY = 1 << 50  # bytes; what the spawner's protocol can say


@dataclass(frozen=True, slots=True)
class App:
    """One application and its settings; limits that are None take the server's default."""

    id: str
    name: str
    owner: str
    access_type: str
    created_at: float
    updated_at: float
    active_bundle: str | None = None
    max_workers_per_app: int | None = None
    max_sessions_per_worker: int = 1
    memory_limit: str | None = None
    cpu_limit: float | None = None
    title: str = ""
    description: str = ""
    pre_warmed_sessions: int = 0
    enabled: bool = True
    refresh_schedule: str = ""
    network: str | None = None
    scratch_copy: bool = False
    backend: str | None = None
    deleted_at: float | None = None

    @property
    def memory_bytes(self) -> int | None:
        """The app's own memory limit in bytes."""
        return None if self.memory_limit is None else config.size(self.memory_limit)

    @property
    def cpu_thousandths(self) -> int | None:
        """The app's own CPU limit in thousandths of a core."""
        # max(): what was set before there was a least
        return None if self.cpu_limit is None else config.cpu(max(self.cpu_limit, LEAST_CPU))


class SwitchedOff(Unavailable):
    """The app is disabled."""

    def __init__(self) -> None:
        super().__init__("app_disabled", "This app is switched off; ask its owner.")


def check_name(name: str) -> str:
    """Return a valid name. Raises BadRequest."""
    if not naming.NAME.fullmatch(name):
        raise BadRequest("invalid_name", naming.RULE)
    return name


def _check_settings(changes: Mapping[str, Any]) -> None:
    memory, cpu = changes.get("memory_limit"), changes.get("cpu_limit")
    try:
        asked = 0 if memory is None else config.size(memory)
        if cpu is not None:
            config.cpu(cpu)
    except ValueError as error:
        raise BadRequest("invalid_limit", f"A limit must be {error}.") from error
    if asked >= _MOST_MEMORY:
        raise BadRequest("invalid_limit", "A memory limit must be below 1024t.")


class Catalog:
    """All apps, by id and by name. Every change goes through this object."""

    def __init__(self, database: Database) -> None:
        self._database = database
        self._changing = asyncio.Lock()  # what is in memory follows each transaction before the next begins
        self._apps: dict[str, App] = {}
        self._names: dict[str, str] = {}
        self._aliases: dict[str, str] = {}
        self._grants: dict[str, dict[tuple[str, str], str]] = {}

    async def load(self) -> None:
        """Read what is there."""
        async with self._database.begin() as connection:
            rows = (await connection.execute(select(apps).where(apps.c.deleted_at.is_(None)))).all()
            renamed = (await connection.execute(select(aliases))).all()
            grants = (await connection.execute(select(access))).all()
        for row in rows:
            self._keep(App(**row._mapping))
        self._aliases = {row.name: row.app_id for row in renamed if row.app_id in self._apps}
        for row in grants:
            self._grants.setdefault(row.app_id, {})[(row.kind, row.principal)] = row.role

    def _keep(self, app: App) -> App:
        self._apps[app.id] = app
        self._names[app.name] = app.id
        return app

    def named(self, name: str) -> App | None:
        """Return the app of this name."""
        return self._apps.get(self._names.get(name, ""))

    def renamed(self, name: str) -> App | None:
        """Return the app that once had this name."""
        return self._apps.get(self._aliases.get(name, ""))

    def find(self, reference: str) -> App | None:
        """Return the app with this id, name or former name."""
        return self._apps.get(reference) or self.named(reference) or self.renamed(reference)

    def with_id(self, app_id: str) -> App | None:
        """Return the app with this id as it is now."""
        return self._apps.get(app_id)

    def get(self, app_id: str) -> App:
        """Return the app with this id as it is now. Raises NotFound."""
        if app_id not in self._apps:
            raise NotFound("not_found", "There is no such app; 'by list' names those you may see.")
        return self._apps[app_id]

    def all(self) -> list[App]:
        """Return all apps in order of name."""
        return sorted(self._apps.values(), key=lambda app: app.name)

    def relation(self, app: App, principal: Principal | None) -> str | None:
        """Return what a caller is to an app: admin, owner, collaborator, viewer, anonymous; None hides it."""
        if principal is not None:
            if principal.is_admin:
                return "admin"
            if principal.sub == app.owner:
                return "owner"
            if granted := self._grants.get(app.id, {}).get(("user", principal.sub)):
                return granted
            return None if app.access_type == "acl" else "viewer"
        return "anonymous" if app.access_type == "public" else None

    async def create(self, name: str, owner: str) -> App:
        """Make an app without bundle, visible to its owner alone. Raises BadRequest or Conflict."""
        check_name(name)
        now = time.time()
        app = App(str(uuid.uuid4()), name, owner, "acl", now, now)
        row = {field.name: getattr(app, field.name) for field in fields(app)}
        async with self._changing:
            self._check_free(name, owner)
            try:
                async with self._database.begin() as connection:
                    await connection.execute(delete(aliases).where(aliases.c.name == name))
                    await connection.execute(insert(apps).values(**row))
            except IntegrityError as error:
                raise _taken(name) from error
            self._aliases.pop(name, None)
            return self._keep(app)

    def _check_free(self, name: str, owner: str) -> None:
        """Refuse the former name of somebody else's app: links to that app would lead to this one."""
        former = self.renamed(name)
        if former is not None and former.owner != owner:
            raise _taken(name)

    async def change(self, app: App, changes: Mapping[str, Any]) -> App:
        """Change settings; a new name leaves the old one as an alias. Raises BadRequest, Conflict or NotFound."""
        _check_settings(changes)
        if "name" in changes:
            check_name(changes["name"])
        async with self._changing:
            return await self._change(self.get(app.id), {**changes, "updated_at": time.time()})

    async def _change(self, app: App, changed: Mapping[str, Any]) -> App:
        name = changed.get("name", app.name)
        if name != app.name:
            self._check_free(name, app.owner)
        try:
            async with self._database.begin() as connection:
                await connection.execute(update(apps).where(apps.c.id == app.id).values(**changed))
                if name != app.name:
                    await connection.execute(delete(aliases).where(aliases.c.name.in_([app.name, name])))
                    await connection.execute(insert(aliases).values(name=app.name, app_id=app.id))
        except IntegrityError as error:
            raise _taken(name) from error
        if name != app.name:
            del self._names[app.name]
            self._aliases.pop(name, None)
            self._aliases[app.name] = app.id
        return self._keep(replace(app, **changed))

    async def delete(self, app: App) -> None:
        """Take an app out of the catalogue; its row and bundles wait to be purged. Raises NotFound."""
        async with self._changing:
            app = self.get(app.id)
            async with self._database.begin() as connection:
                await connection.execute(update(apps).where(apps.c.id == app.id).values(deleted_at=time.time()))
                await connection.execute(delete(aliases).where(aliases.c.app_id == app.id))
            del self._apps[app.id]
            del self._names[app.name]
            self._aliases = {name: target for name, target in self._aliases.items() if target != app.id}

    async def deleted(self) -> list[App]:
        """Return the apps that wait to be purged, newest first."""
        query = select(apps).where(apps.c.deleted_at.is_not(None)).order_by(apps.c.deleted_at.desc())
        async with self._database.begin() as connection:
            return [App(**row._mapping) for row in (await connection.execute(query)).all()]

    async def purge(self, before: float) -> list[str]:
        """Forget apps deleted before a time (epoch) with all that refers to them; return their ids."""
        async with self._database.begin() as connection:
            gone = await connection.execute(delete(apps).where(apps.c.deleted_at < before).returning(apps.c.id))
            return [row.id for row in gone]


def _taken(name: str) -> Conflict:
    return Conflict("conflict", f"An app named '{name}' exists already; choose another name or deploy to that one.")
