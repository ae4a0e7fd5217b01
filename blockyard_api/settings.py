"""The API's configuration: its keys on top of root's, read once at start into frozen values."""

import difflib
import ipaddress
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, fields
from typing import Any
from urllib.parse import parse_qs, urlsplit

from blockyard_spawner import config
from blockyard_spawner.config import ConfigError, Key
from blockyard_spawner.docker import config as docker

Network = ipaddress.IPv4Network | ipaddress.IPv6Network

_UNITS = {"ms": 0.001, "s": 1, "m": 60, "h": 3600, "d": 86400}


def duration(value: object) -> float:
    """Seconds from "30s", "5m", "24h", "250ms"; "0s" where a key gives zero a meaning."""
    match = re.fullmatch(r"([0-9]{1,9})(ms|s|m|h|d)", value) if isinstance(value, str) else None
    if match is None:
        raise ValueError('a duration such as "30s", "5m" or "24h"')
    return int(match[1]) * _UNITS[match[2]]


def positive_duration(value: object) -> float:
    """A duration above zero."""
    if not (seconds := duration(value)):
        raise ValueError("a duration above zero")
    return seconds


def preflight_duration(value: object) -> float:
    """A duration above zero, two of which fit into the 90 s that systemd gives a start."""
    if (seconds := positive_duration(value)) > 40:
        raise ValueError("a duration of 40s at most")
    return seconds


def bind(value: object) -> tuple[str, int]:
    """Address and port from "127.0.0.1:8080" or "[::1]:8080"."""
    match = re.fullmatch(r"(?:\[([0-9a-fA-F:.]+)\]|([^:\[\]]+)):([0-9]{1,5})", config.text(value))
    if match is None or int(match[3]) > 65535:
        raise ValueError('an address and port such as "127.0.0.1:8080"')
    return match[1] or match[2], int(match[3])


def url(value: object) -> str:
    """An http or https URL without query."""
    parts = urlsplit(config.text(value))
    if parts.scheme not in ("http", "https") or not parts.hostname or parts.query or parts.fragment:
        raise ValueError("an http:// or https:// address")
    return config.text(value)


@dataclass(frozen=True, slots=True)
class Endpoint:
    """Where a service listens: host and port, or a Unix socket's path."""

    host: str = ""
    port: int = 0
    path: str = ""


# Scheme → its port; None for a Unix socket.
_SERVICES: Mapping[str, Mapping[str, int | None]] = {
    "redis.url": {"redis": 6379, "rediss": 6379, "unix": None},
    "vault.address": {"http": 80, "https": 443},
    "database.url": {"postgresql": 5432, "postgres": 5432},
}


def endpoint(key: str, value: str) -> Endpoint:
    """Return where the service of a configured address listens. Raises ValueError, which never repeats the address."""
    schemes = _SERVICES[key]
    meaning = " or ".join(f"{scheme}://{'host' if port else '/path'}" for scheme, port in schemes.items())
    try:
        parts = urlsplit(value)
        host, port, options = parts.hostname or "", parts.port, parse_qs(parts.query)
    except ValueError as error:  # its own words would quote a password that is taken for a port
        raise ValueError(meaning) from error
    if parts.scheme not in schemes or (port == 0):
        raise ValueError(meaning)
    usual = schemes[parts.scheme]
    socket = parts.path if usual is None else ""
    if key == "database.url" and not host:  # as libpq has it: a directory in which the socket is named by its port
        host = options.get("host", ["/var/run/postgresql"])[0]
    if key == "database.url" and host.startswith("/"):
        socket = f"{host}/.s.PGSQL.{port or usual}"
    if usual is None or socket:
        if not socket.startswith("/") or (usual is None and host):
            raise ValueError(meaning)
        return Endpoint(path=socket)
    if not re.fullmatch(r"[A-Za-z0-9_.:-]+", host):
        raise ValueError(meaning)
    return Endpoint(host, port or usual)


def holds_password(value: str) -> bool:
    """Tell whether a service's address has a password in it."""
    parts = urlsplit(value)
    return bool(parts.password) or "password" in parse_qs(parts.query)


def _address(value: object) -> str | None:
    return config.text(value) or None


def app_url(value: object) -> str:
    """Where visitors reach an app: ``{app}`` once, as a host label or a path segment, and a final slash."""
    written = config.text(value)
    parts = urlsplit(url(written.replace("{app}", "app")))
    in_host = re.fullmatch(r"https?://\{app\}\.[^/{}]+/", written)
    in_path = re.fullmatch(r"https?://[^/{}]+(/[^/{}]+)*/\{app\}/", written)
    if not parts.hostname or not (in_host or in_path):
        raise ValueError('such as "https://{app}.apps.example.com/" or "http://host:8081/app/{app}/"')
    return written


def networks(value: object) -> tuple[Network, ...]:
    """Networks from a list of addresses or CIDR blocks, or from one comma-separated string."""
    entries = [part.strip() for part in value.split(",") if part.strip()] if isinstance(value, str) else value
    if not isinstance(entries, list):
        raise ValueError("a list of networks such as 10.0.0.0/8")  # noqa: TRY004 - the loader's contract
    return tuple(ipaddress.ip_network(config.text(entry)) for entry in entries)


KEYS: Mapping[str, Key] = {
    **config.KEYS,
    "server.bind": Key(bind, ("127.0.0.1", 8080)),
    "server.backend": Key(config.choice("process", "docker"), "process"),
    "server.external_url": Key(url, "http://127.0.0.1:8080"),
    "server.trusted_proxies": Key(networks, ()),
    "server.log_level": Key(config.choice("debug", "info", "warning", "error"), "info"),
    "server.shutdown_timeout": Key(positive_duration, 10.0),
    "server.skip_preflight": Key(config.boolean, False),
    "server.preflight_timeout": Key(preflight_duration, 10.0),
    "storage.bundle_retention": Key(config.integer(1, 10_000), 50),
    "storage.max_bundle_size": Key(config.size, 100 << 20),
    "database.driver": Key(config.choice("sqlite"), "sqlite"),
    "database.path": Key(config.path, None),
    "database.url": Key(_address, None),
    "redis.url": Key(_address, None),
    "vault.address": Key(_address, None),
    "proxy.bind": Key(bind, ("127.0.0.1", 8081)),
    "proxy.public_url": Key(app_url, "http://127.0.0.1:8081/app/{app}/"),
    "proxy.worker_start_timeout": Key(positive_duration, 60.0),
    "proxy.idle_worker_timeout": Key(positive_duration, 300.0),
    "proxy.max_workers": Key(config.integer(1, 10_000), 100),
    "proxy.max_sessions_per_visitor": Key(config.integer(1, 1_000_000), 40),
    "proxy.session_idle_ttl": Key(positive_duration, 3600.0),
    "proxy.session_max_lifetime": Key(positive_duration, 86400.0),
    "proxy.ws_cache_ttl": Key(duration, 60.0),
    "proxy.health_interval": Key(positive_duration, 15.0),
    "proxy.log_retention": Key(positive_duration, 30 * 86400.0),
    **docker.KEYS,
    "docker.spawner_socket": Key(config.path, "/run/blockyard/spawner-docker.sock"),
}


@dataclass(frozen=True, slots=True)
class Server:
    """Section [server]."""

    bind: tuple[str, int]
    backend: str
    external_url: str
    trusted_proxies: tuple[Network, ...]
    log_level: str
    shutdown_timeout: float  # seconds
    skip_preflight: bool
    preflight_timeout: float  # seconds, for one run of all checks
    default_memory_limit: int | None  # bytes
    default_cpu_limit: int | None  # thousandths of a core
    worker_env: Mapping[str, str]


@dataclass(frozen=True, slots=True)
class Storage:
    """Section [storage]."""

    state_dir: str
    bundle_worker_path: str
    bundle_retention: int
    max_bundle_size: int  # bytes
    data_mounts: Mapping[str, config.DataMount]


@dataclass(frozen=True, slots=True)
class Database:
    """Section [database]."""

    driver: str
    path: str | None
    url: str | None = field(repr=False)  # may hold a password

    @property
    def endpoint(self) -> Endpoint | None:
        """Where the database server listens."""
        return None if self.url is None else endpoint("database.url", self.url)


@dataclass(frozen=True, slots=True)
class Redis:
    """Section [redis]."""

    url: str | None = field(repr=False)  # may hold a password

    @property
    def endpoint(self) -> Endpoint | None:
        """Where Redis listens."""
        return None if self.url is None else endpoint("redis.url", self.url)


@dataclass(frozen=True, slots=True)
class Vault:
    """Section [vault]."""

    address: str | None

    @property
    def endpoint(self) -> Endpoint | None:
        """Where the vault listens."""
        return None if self.address is None else endpoint("vault.address", self.address)


@dataclass(frozen=True, slots=True)
class Proxy:
    """Section [proxy]; durations in seconds."""

    bind: tuple[str, int]
    public_url: str
    worker_start_timeout: float
    idle_worker_timeout: float
    max_workers: int
    max_sessions_per_visitor: int
    session_idle_ttl: float
    session_max_lifetime: float
    ws_cache_ttl: float
    health_interval: float
    log_retention: float


@dataclass(frozen=True, slots=True)
class Process:
    """Section [process], as far as the API has to do with it."""

    spawner_socket: str
    runtime_dir: str
    bwrap_path: str
    seccomp_profile: str  # "": none
    network: str
    memory_ceiling: int | None  # bytes
    cpu_ceiling: int | None  # thousandths of a core
    cgroup_root: str
    pids_limit: int
    tmp_size: int  # bytes
    worker_uid_range_start: int
    worker_uid_range_end: int
    worker_gid: int
    skip_metadata_check: bool


@dataclass(frozen=True, slots=True)
class Docker:
    """Section [docker], as far as the API has to do with it."""

    spawner_socket: str
    runtime_dir: str
    socket: str  # the engine's, which the API may not use
    network_pool: ipaddress.IPv4Network
    runtime: str
    runtime_defaults: Mapping[str, str]


@dataclass(frozen=True, slots=True)
class Settings:
    """The whole configuration."""

    server: Server
    storage: Storage
    database: Database
    redis: Redis
    vault: Vault
    proxy: Proxy
    process: Process
    docker: Docker
    file: str = field(default=config.DEFAULT_PATH)


def load(file: str, environ: Mapping[str, str]) -> Settings:
    """Read the configuration.

    Raises ConfigError with one sentence that names file or variable, key and remedy.
    """
    for name in config.read(file).keys() - KEYS.keys():
        raise ConfigError(f"{file}: unknown key '{name}'; {_near(name, KEYS)}")
    ours = tuple(f"BLOCKYARD_{section.upper()}_" for section in _SECTIONS)
    variables = {_variable(name) for name in KEYS}
    for name in environ.keys() - variables:
        if name.startswith(ours):
            raise ConfigError(f"unknown variable '{name}'; {_near(name, variables)}")
    values = config.load(file, environ, KEYS)
    for name in _SERVICES:
        _check_service(name, values[name], file, environ)
    sections = {
        name: section(**{part.name: values[f"{name}.{part.name}"] for part in fields(section)})
        for name, section in _SECTIONS.items()
    }
    settings = Settings(**sections, file=file)
    pool = settings.process.worker_uid_range_end - settings.process.worker_uid_range_start + 1
    if pool < 1:
        raise ConfigError(f"{file}: 'process.worker_uid_range_end' must not be below 'process.worker_uid_range_start'.")
    return settings


def _near(name: str, known: Iterable[str]) -> str:
    near = [f"did you mean '{key}'?" for key in difflib.get_close_matches(name, list(known), n=1)]
    return (*near, "remove it.")[0]


def _variable(name: str) -> str:
    return f"BLOCKYARD_{name.replace('.', '_').upper()}"


def _check_service(name: str, value: str | None, file: str, environ: Mapping[str, str]) -> None:
    """Raise ConfigError for an address that is none, without repeating it: it may hold a password."""
    variable = _variable(name)
    try:
        if value is not None:
            endpoint(name, value)
    except ValueError as error:
        source = variable if variable in environ else file
        raise ConfigError(f"{source}: '{name}' must be such as {error}; correct it.") from None


_SECTIONS: Mapping[str, Any] = {
    "server": Server,
    "storage": Storage,
    "database": Database,
    "redis": Redis,
    "vault": Vault,
    "proxy": Proxy,
    "process": Process,
    "docker": Docker,
}
