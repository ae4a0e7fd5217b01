"""The keys of [docker]. Pure; the API reads them too."""

import ipaddress
from collections.abc import Mapping
from typing import Any

from blockyard_spawner import config
from blockyard_spawner.config import Key

SUBNET = 28  # bits: a network of 14 addresses for each worker
_REFERENCE = "[a-z0-9][A-Za-z0-9._/:@-]{0,254}"
_NAMED = "[A-Za-z0-9][A-Za-z0-9_.-]{0,127}"

image = config.written('an image such as "blockyard-worker:latest"', _REFERENCE, str)
named = config.written("a name as the engine has it", _NAMED, str)


def unless_empty(value: object) -> str:
    """A name, or "" for none."""
    return "" if value == "" else named(value)


def pool(value: object) -> ipaddress.IPv4Network:
    """An IPv4 network of which each worker gets a part."""
    meaning = f"an IPv4 network such as 10.213.0.0/16, at least a /{SUBNET}"
    try:
        network = ipaddress.IPv4Network(config.text(value))
    except ValueError as error:
        raise ValueError(meaning) from error
    if network.prefixlen > SUBNET:
        raise ValueError(meaning)
    return network


def runtimes(value: object) -> dict[str, str]:
    """A table of access types to runtimes."""
    if type(value) is not dict or set(value) - {"public", "logged_in", "acl"}:
        raise ValueError('a table such as {public = "kata-runtime"}, of public, logged_in, acl')
    return {access: named(runtime) for access, runtime in value.items()}


KEYS: Mapping[str, Key] = {
    "docker.socket": Key(config.path, "/run/docker.sock"),
    "docker.image": Key(image, "blockyard-worker:latest"),
    "docker.runtime": Key(unless_empty, ""),  # "": the engine's own default
    "docker.runtime_defaults": Key(runtimes, {}),
    "docker.network_pool": Key(pool, ipaddress.IPv4Network("10.213.0.0/16")),
    "docker.service_network": Key(unless_empty, ""),
    "docker.runtime_dir": Key(config.path, "/run/blockyard/docker"),
}


def runtime(values: Mapping[str, Any], access: str | None) -> str:
    """Name the runtime of a worker whose app has this access type; "" for the engine's default."""
    chosen: str = values["docker.runtime_defaults"].get(access, values["docker.runtime"])
    return chosen
