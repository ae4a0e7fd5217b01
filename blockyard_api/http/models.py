"""The shapes of the HTTP contract."""

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, StringConstraints, model_validator
from pydantic_core import PydanticCustomError

from blockyard_api.apps.catalog import LEAST_CPU
from blockyard_api.apps.naming import NAME, RULE
from blockyard_spawner.config import SIZE

Text = Annotated[str, StringConstraints(max_length=255, pattern=r"^[^\x00-\x1f\x7f]*$")]
Lines = Annotated[str, StringConstraints(max_length=10_000, pattern=r"^[^\x00-\x08\x0b-\x1f\x7f]*$")]
# Two rules that the catalogue insists on, with codes and sentences of its own: here they are merely told.
Name = Annotated[
    str,
    StringConstraints(max_length=255),
    Field(description=RULE, json_schema_extra={"pattern": f"^(?:{NAME.pattern})$", "maxLength": 63}),
]
Size = Annotated[
    str,
    StringConstraints(max_length=16),
    Field(
        description='Bytes with a unit, such as "512m"; less than 1024t',
        json_schema_extra={"pattern": f"^(?:{SIZE})$", "maxLength": 13},
    ),
]
Uuid = Annotated[str, Field(json_schema_extra={"format": "uuid"})]
Time = Annotated[str, Field(description="UTC, ending in Z", json_schema_extra={"format": "date-time"})]


class Closed(BaseModel):
    """A request body: keys that are not named here are refused."""

    model_config = ConfigDict(extra="forbid", strict=True)

    @model_validator(mode="before")
    @classmethod
    def _named(cls, given: object) -> object:
        """Refuse all unknown keys with one error: pydantic alone builds one for each."""
        if isinstance(given, dict) and (unknown := given.keys() - cls.model_fields.keys()):
            raise PydanticCustomError("unknown_key", "there is no key {key}", {"key": f"{min(unknown)!r:.100}"})
        return given


class ErrorBody(BaseModel):
    """What every error looks like."""

    error: str = Field(description="A stable snake_case code")
    message: str = Field(description="One sentence that says what to do")


class NewApp(Closed):
    """An app to be made."""

    name: Name


def _without_defaults(schema: dict[str, Any]) -> None:
    """Tell no defaults: what is not sent stays as it is."""
    for each in schema["properties"].values():
        each.pop("default", None)


class AppChanges(Closed):
    """Settings to change; what is not sent stays, and null takes a limit back to the server's default."""

    model_config = ConfigDict(json_schema_extra=_without_defaults)

    name: Name = ""
    title: Text = ""
    description: Lines = ""
    access_type: Literal["public", "logged_in", "acl"] = "acl"
    max_workers_per_app: Annotated[int, Field(ge=1, le=10_000)] | None = None
    max_sessions_per_worker: Annotated[int, Field(ge=1, le=10_000)] = 1
    memory_limit: Size | None = None
    cpu_limit: Annotated[float, Field(ge=LEAST_CPU, le=1024, description="Cores, to a thousandth")] | None = None
    pre_warmed_sessions: Annotated[int, Field(ge=0, le=1000)] = 0
    network: Literal["host", "none"] | None = None
    scratch_copy: bool = False
    backend: Literal["process", "docker"] | None = None
    refresh_schedule: Literal[""] = Field("", description="Scheduled refreshes are not available yet")


class AppBody(BaseModel):
    """An app as its callers see it."""

    id: Uuid
    name: str
    owner: str
    access_type: str
    active_bundle: str | None
    max_workers_per_app: int | None
    max_sessions_per_worker: int
    memory_limit: str | None
    cpu_limit: float | None
    title: str
    description: str
    pre_warmed_sessions: int
    network: str | None
    scratch_copy: bool
    backend: str | None
    enabled: bool
    refresh_schedule: str
    created_at: Time
    updated_at: Time
    status: Literal["running", "stopped", "stopping"]
    setback: str | None = Field(description="Why its workers fail, if they do; told to those who may change it")
    tags: list[str]
    relation: str
    url: str


class AppList(BaseModel):
    """One page of apps."""

    apps: list[AppBody]
    total: int
    page: int
    per_page: int


class Accepted(BaseModel):
    """An upload that was taken in."""

    bundle_id: str
    task_id: str


class BundleBody(BaseModel):
    """One upload of an app."""

    id: str
    app_id: Uuid
    status: Literal["pending", "building", "ready", "failed"]
    uploaded_at: Time
    deployed_by: str
    pinned: bool
    reason: str | None = Field(description="Why its deployment failed, one sentence")


class BundleList(BaseModel):
    """All uploads of an app."""

    bundles: list[BundleBody]


class Rollback(Closed):
    """Which bundle to serve again; without one, the last that was served before."""

    bundle_id: Annotated[str, StringConstraints(max_length=64)] | None = None


class TaskBody(BaseModel):
    """A deployment's progress."""

    id: str
    status: Literal["running", "completed", "failed"]
    created_at: Time


class SessionBody(BaseModel):
    """A visitor on a worker."""

    user: str | None
    started_at: Time
    websockets: int


class Stats(BaseModel):
    """What a worker uses; null where it is not measured."""

    cpu_percent: float | None
    memory_usage_bytes: int | None
    memory_limit_bytes: int | None


class WorkerBody(BaseModel):
    """A worker, running or ended."""

    id: str
    bundle_id: str
    status: Literal["active", "draining", "ended"]
    started_at: Time
    idle_since: Time | None
    ended_at: Time | None
    end_reason: str | None
    stats: Stats | None
    limits_hit: list[str] = Field(description="What a running worker ran into, a sentence for each limit")
    sessions: list[SessionBody]


class Runtime(BaseModel):
    """What an app's workers do, and how often it is opened."""

    workers: list[WorkerBody]
    starting: list[str] = Field(description="The ids of those that do not serve yet")
    active_sessions: int
    total_views: int
    recent_views: int = Field(description="Of the last 7 days, to the hour")
    unique_visitors: int = Field(description="Since the app was made; exact up to 1,024, estimated beyond")
    last_deployed_at: Time | None


class UserBody(BaseModel):
    """The caller."""

    sub: str
    email: str
    name: str
    role: str


class NewToken(Closed):
    """A token to be made."""

    name: Text = "token"
    expires_in_days: Annotated[int, Field(ge=1, le=366)] = 90


class TokenBody(BaseModel):
    """A token, without its plain text."""

    id: Uuid
    name: str
    created_at: Time
    expires_at: Time
    last_used_at: Time | None


class TokenList(BaseModel):
    """All tokens of a user."""

    tokens: list[TokenBody]


class PlainToken(TokenBody):
    """A token with its plain text, which is shown this once."""

    token: str


class Bootstrap(Closed):
    """The one-time token that `blockyard-api token --bootstrap` made."""

    token: Annotated[str, StringConstraints(max_length=255)]


class Ready(BaseModel):
    """Whether the server can serve; the checks are for authenticated callers."""

    status: Literal["ready", "not_ready"]
    checks: dict[str, str] | None = None


class SpawnerBody(BaseModel):
    """What is known of the spawner."""

    connected: bool
    version: int | None
    unprivileged: bool | None
    uids_free: int | None
    uids_total: int | None
    controllers: list[str]


class WorkerCount(BaseModel):
    """How many workers there are and may be."""

    running: int
    max: int


class UnitBody(BaseModel):
    """The systemd unit that holds all workers."""

    control_group: str
    memory_max: int | None
    memory_current: int | None
    tasks_max: int | None
    tasks_current: int | None
    cpu_quota: float | None


class SystemStatus(BaseModel):
    """The server at a glance."""

    version: str
    backend: str
    spawner: SpawnerBody
    workers: WorkerCount
    unit: UnitBody | None


class CheckBody(BaseModel):
    """What one start-up check found."""

    name: str
    severity: Literal["ok", "info", "warning", "error"]
    fact: str = Field(description="One sentence")
    remedy: str = Field(description="One sentence, or empty where there is nothing to do")


class CheckRun(BaseModel):
    """One run of all start-up checks."""

    severity: Literal["ok", "info", "warning", "error"] = Field(description="The worst of them")
    began_at: Time
    seconds: float
    checks: list[CheckBody]
    isolation: str = Field(description="One line that sums up what apps are isolated by here, and by what not")
