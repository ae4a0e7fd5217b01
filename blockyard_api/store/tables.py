"""The tables, as SQLAlchemy Core sees them; `migrations` builds them. Times are seconds since the epoch, UTC."""

from sqlalchemy import Boolean, Column, Float, ForeignKey, Index, Integer, MetaData, String, Table, Text, text

metadata = MetaData(
    naming_convention={
        "ix": "ix_%(column_0_label)s",
        "uq": "uq_%(table_name)s_%(column_0_name)s",
        "fk": "fk_%(table_name)s_%(column_0_name)s_%(referred_table_name)s",
        "pk": "pk_%(table_name)s",
    }
)

users = Table(
    "users",
    metadata,
    Column("sub", String(255), primary_key=True),
    Column("email", String(320), nullable=False, server_default=""),
    Column("name", String(255), nullable=False, server_default=""),
    Column("role", String(16), nullable=False),
    Column("created_at", Float, nullable=False),
)

tokens = Table(
    "tokens",
    metadata,
    Column("id", String(36), primary_key=True),
    Column("user_sub", ForeignKey("users.sub", ondelete="CASCADE"), nullable=False, index=True),
    Column("name", String(255), nullable=False),
    Column("hash", String(64), nullable=False, unique=True),
    Column("created_at", Float, nullable=False),
    Column("expires_at", Float, nullable=False),
    Column("last_used_at", Float),
)

bootstrap_tokens = Table(
    "bootstrap_tokens",
    metadata,
    Column("hash", String(64), primary_key=True),
    Column("created_at", Float, nullable=False),
    Column("used_at", Float),
)

apps = Table(
    "apps",
    metadata,
    Column("id", String(36), primary_key=True),
    Column("name", String(63), nullable=False),
    Column("owner", ForeignKey("users.sub"), nullable=False, index=True),
    Column("access_type", String(16), nullable=False),
    Column("active_bundle", String(32)),
    Column("max_workers_per_app", Integer),
    Column("max_sessions_per_worker", Integer, nullable=False),
    Column("memory_limit", String(16)),
    Column("cpu_limit", Float),
    Column("title", String(255), nullable=False),
    Column("description", Text, nullable=False),
    Column("pre_warmed_sessions", Integer, nullable=False),
    Column("enabled", Boolean, nullable=False),
    Column("refresh_schedule", String(255), nullable=False),
    Column("network", String(8)),
    Column("scratch_copy", Boolean, nullable=False),
    Column("backend", String(16)),
    Column("created_at", Float, nullable=False),
    Column("updated_at", Float, nullable=False),
    Column("deleted_at", Float),
    # a deleted app gives its name free but keeps its row until it is purged
    Index("uq_apps_live_name", "name", unique=True, sqlite_where=text("deleted_at IS NULL")),
)

aliases = Table(
    "aliases",
    metadata,
    Column("name", String(63), primary_key=True),
    Column("app_id", ForeignKey("apps.id", ondelete="CASCADE"), nullable=False, index=True),
)

access = Table(
    "access",
    metadata,
    Column("app_id", ForeignKey("apps.id", ondelete="CASCADE"), primary_key=True),
    Column("kind", String(16), primary_key=True),
    Column("principal", String(255), primary_key=True),
    Column("role", String(16), nullable=False),
)

bundles = Table(
    "bundles",
    metadata,
    Column("id", String(32), primary_key=True),
    Column("app_id", ForeignKey("apps.id", ondelete="CASCADE"), nullable=False, index=True),
    Column("status", String(16), nullable=False),
    Column("uploaded_at", Float, nullable=False),
    Column("deployed_at", Float),
    Column("deployed_by", String(255), nullable=False),
    Column("pinned", Boolean, nullable=False),
    Column("reason", Text),  # of a failure
)

tasks = Table(
    "tasks",
    metadata,
    Column("id", String(32), primary_key=True),
    Column("app_id", ForeignKey("apps.id", ondelete="CASCADE"), nullable=False, index=True),
    Column("status", String(16), nullable=False),
    Column("created_at", Float, nullable=False),
    Column("log", Text, nullable=False),
)

workers = Table(
    "workers",
    metadata,
    Column("id", String(32), primary_key=True),
    Column("app_id", ForeignKey("apps.id", ondelete="CASCADE"), nullable=False, index=True),
    Column("bundle_id", String(32), nullable=False),
    Column("status", String(16), nullable=False, index=True),
    Column("backend", String(16), nullable=False, server_default="process"),
    Column("access_type", String(16)),  # the app's at its start, by which Docker's runtime was chosen
    Column("uid", Integer),
    Column("cgroup", String(1024)),
    Column("started_at", Float, nullable=False),
    Column("ended_at", Float),
    Column("end_reason", String(255)),
)

sessions = Table(
    "sessions",
    metadata,
    Column("hash", String(64), primary_key=True),
    Column("app_id", ForeignKey("apps.id", ondelete="CASCADE"), nullable=False, index=True),
    Column("user_sub", String(255)),
    Column("token_id", String(36)),
    Column("visitor", String(64), nullable=False),
    Column("worker_id", String(32), nullable=False),
    Column("created_at", Float, nullable=False),
    Column("last_seen_at", Float, nullable=False),
    Column("ended_at", Float, index=True),
)

# of sessions that are over: how many began in an hour (epoch), and in all hours that are long ago (0)
views = Table(
    "views",
    metadata,
    Column("app_id", ForeignKey("apps.id", ondelete="CASCADE"), primary_key=True),
    Column("hour", Integer, primary_key=True),
    Column("number", Integer, nullable=False),
)

# of sessions that are over: the smallest of the visitors' hashes
visitors = Table(
    "visitors",
    metadata,
    Column("app_id", ForeignKey("apps.id", ondelete="CASCADE"), primary_key=True),
    Column("visitor", String(64), primary_key=True),
)
