"""The catalogue of apps: rows in the database, and the same in memory, because the relay asks at every request."""

import re
import time
import uuid
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from typing import Any

from sqlalchemy import delete, insert, select, update
from sqlalchemy.exc import IntegrityError

from blockyard_api.errors import BadRequest, Conflict, NotFound
from blockyard_api.identity.tokens import Principal
from blockyard_api.store.database import Database
from blockyard_api.store.tables import access, aliases, apps
from blockyard_spawner import config

NAME = re.compile(r"[a-z](?:[a-z0-9-]{0,61}[a-z0-9])?")
ACCESS_TYPES = ("public", "logged_in", "acl")


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
    deleted_at: float | None = None

    @property
    def memory_bytes(self) -> int | None:
        """The app's own memory limit in bytes."""
        return None if self.memory_limit is None else config.size(self.memory_limit)

    @property
    def cpu_thousandths(self) -> int | None:
        """The app's own CPU limit in thousandths of a core."""
        return None if self.cpu_limit is None else config.cpu(self.cpu_limit)


def check_name(name: str) -> str:
    """Return a valid name. Raises BadRequest."""
    if not NAME.fullmatch(name):
        raise BadRequest(
            "invalid_name",
            "A name has 1 to 63 lowercase letters, digits and hyphens, starts with a letter and ends in no hyphen.",
        )
    return name


def _check_settings(changes: Mapping[str, Any]) -> None:
    try:
        if changes.get("memory_limit") is not None:
            config.size(changes["memory_limit"])
        if changes.get("cpu_limit") is not None:
            config.cpu(changes["cpu_limit"])
    except ValueError as error:
        raise BadRequest("invalid_limit", f"A limit must be {error}.") from error


class Catalog:
    """All apps, by id and by name. Every change goes through this object."""

    def __init__(self, database: Database) -> None:
        self._database = database
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

    def get(self, app_id: str) -> App:
        """Return the app with this id. Raises NotFound."""
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
        try:
            async with self._database.begin() as connection:
                await connection.execute(delete(aliases).where(aliases.c.name == name))
                await connection.execute(insert(apps).values(**row))
        except IntegrityError as error:
            raise _taken(name) from error
        self._aliases.pop(name, None)
        return self._keep(app)

    async def change(self, app: App, changes: Mapping[str, Any]) -> App:
        """Change settings; a new name leaves the old one as an alias. Raises BadRequest or Conflict."""
        _check_settings(changes)
        renames = changes.get("name", app.name) != app.name
        if renames:
            check_name(changes["name"])
        changed = {**changes, "updated_at": time.time()}
        try:
            async with self._database.begin() as connection:
                await connection.execute(update(apps).where(apps.c.id == app.id).values(**changed))
                if renames:
                    await connection.execute(delete(aliases).where(aliases.c.name.in_([app.name, changes["name"]])))
                    await connection.execute(insert(aliases).values(name=app.name, app_id=app.id))
        except IntegrityError as error:
            raise _taken(str(changes.get("name"))) from error
        if renames:
            del self._names[app.name]
            self._aliases.pop(changes["name"], None)
            self._aliases[app.name] = app.id
        return self._keep(replace(self._apps[app.id], **changed))

    async def delete(self, app: App) -> None:
        """Take an app out of the catalogue; its row and bundles wait to be purged."""
        async with self._database.begin() as connection:
            await connection.execute(update(apps).where(apps.c.id == app.id).values(deleted_at=time.time()))
            await connection.execute(delete(aliases).where(aliases.c.app_id == app.id))
        self._apps.pop(app.id, None)
        self._names.pop(app.name, None)
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
