"""What root's configuration lets the API have: a spawn request becomes a Launch, or is refused. Pure, no I/O."""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from blockyard_spawner.config import ConfigError
from blockyard_spawner.protocol import Limits, Refused, Spawn

# What the top of the sandbox has besides the bundle, which would hide it there.
_TAKEN = {"", "usr", "bin", "lib", "lib64", "sbin", "etc", "opt", "var", "dev", "proc", "tmp", "run", "data", "library"}
_ENV_ALLOWED = "(BLOCKYARD|APP)_[A-Z0-9_]+"  # nothing that a loader, a shell or R reads at start
_ENV = {
    "PATH": "/usr/local/bin:/usr/bin:/bin",
    "LANG": "C.UTF-8",
    "HOME": "/tmp",  # noqa: S108 - the worker's own tmpfs
    "TMPDIR": "/tmp",  # noqa: S108
    "BLOCKYARD_SOCKET": "/run/worker/app.sock",
    "R_NSIZE": "1000000",  # a larger first heap: fewer collections while packages load, a fifth off the start
    "R_VSIZE": "32M",
}
_ENV_OURS = {*_ENV, "R_LIBS", "BLOCKYARD_APP", "BLOCKYARD_WORKER", "BLOCKYARD_SCRATCH"}
# What may be limited → the key of its ceiling.
_CEILINGS = {"memory": "memory_ceiling", "cpu": "cpu_ceiling", "pids": "pids_limit", "tmp": "tmp_size"}


@dataclass(frozen=True, slots=True)
class Source:
    """A host directory for the sandbox: `name` is looked up strictly beneath `root`, without following links."""

    kind: str
    root: str
    name: str
    target: str
    writable: bool = False


@dataclass(frozen=True, slots=True)
class Launch:
    """One authorized worker: every choice is made, and only checked names are the peer's."""

    request: Spawn
    sources: tuple[Source, ...]
    directory: str  # the working one
    env: Mapping[str, str]
    network: str
    limits: Limits  # None: unlimited


def check(config: Mapping[str, Any]) -> None:
    """Raise ConfigError for values that are sound one by one but impossible together."""
    if not uids(config):
        raise ConfigError("'process.worker_uid_range_end' lies before its start; swap the two.")
    if config["storage.bundle_worker_path"].split("/")[1] in _TAKEN:
        raise ConfigError("'storage.bundle_worker_path' hides a part of the sandbox; use one such as /app.")
    if taken := [name for name in config["server.worker_env"] if name in _ENV_OURS or name.startswith("LD_")]:
        raise ConfigError(f"'server.worker_env' may not set {taken[0]}; remove it, Blockyard sets what is needed.")
    try:
        _limits(config, Limits())
    except Refused as error:
        raise ConfigError(f"A default limit exceeds its ceiling. {error.message}") from error


def uids(config: Mapping[str, Any]) -> range:
    """Name the uids that workers may have."""
    return range(config["process.worker_uid_range_start"], config["process.worker_uid_range_end"] + 1)


def authorize(config: Mapping[str, Any], request: Spawn) -> Launch:
    """Hold a request against root's configuration. Raises Refused."""
    state, mounts = config["storage.state_dir"], config["storage.data_mounts"]
    if (request.kind, request.bundle is not None) not in (("app", True), ("probe", False)):
        raise Refused("unknown_kind", "Use kind 'app', with a bundle, or 'probe', without one.")
    if bad := [name for name in request.env if name in _ENV_OURS or not re.fullmatch(_ENV_ALLOWED, name)]:
        raise Refused("env_not_allowed", f"Name the variable APP_…: {bad[0]} may not be set from outside.")
    if bad := [name for name in request.data if name not in mounts]:
        raise Refused("no_such_data", f"Add {bad[0]} to storage.data_mounts: it is not there.")
    env = {**request.env, **config["server.worker_env"], **_ENV}
    env |= {"BLOCKYARD_APP": request.app, "BLOCKYARD_WORKER": request.id}
    directory, sources = "/tmp", []  # noqa: S108 - the worker's own tmpfs
    if request.bundle is not None:
        directory = config["storage.bundle_worker_path"]
        sources.append(Source("bundle", state, f"bundles/{request.bundle}", directory))
    if request.library is not None:
        sources.append(Source("library", state, f"libraries/{request.library}", "/library"))
        env["R_LIBS"] = "/library"
    if request.scratch_copy:
        env["BLOCKYARD_SCRATCH"] = "1"
    named = [mounts[name] for name in dict.fromkeys(request.data)]
    sources += [Source("data", mount.path, ".", f"/data/{mount.name}", mount.writable) for mount in named]
    network = request.network or config["process.network"]
    return Launch(request, tuple(sources), directory, env, network, _limits(config, request.limits))


def _limits(config: Mapping[str, Any], asked: Limits) -> Limits:
    chosen = {}
    for name, key in _CEILINGS.items():
        ceiling = config[f"process.{key}"]  # and the limit, where nothing is asked for: silence is not "unlimited"
        chosen[name] = getattr(asked, name) or config.get(f"server.default_{name}_limit") or ceiling
        if ceiling and chosen[name] > ceiling:
            raise Refused("limit_above_ceiling", f"Lower the {name} limit: process.{key} allows {ceiling}.")
    return Limits(**chosen)
