"""Root's configuration: the keys the spawner needs, and the one loader that both daemons use. Pure but for the file.

A key is a name, a default and a parser. The API adds its own keys to these; the spawner ignores what is not its own.
"""

import difflib
import re
import tomllib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

DEFAULT_PATH = "/etc/blockyard/blockyard.toml"


class ConfigError(Exception):
    """The configuration is wrong: the sentence names the file or variable, the key, and what to write instead."""


@dataclass(frozen=True, slots=True)
class Key:
    """One configuration key: how its value is read from TOML or from text, and its default."""

    parse: Callable[[object], Any]
    default: Any


@dataclass(frozen=True, slots=True)
class DataMount:
    """A host directory that apps may ask for by name."""

    name: str
    path: str
    writable: bool


def text(value: object) -> str:
    """A string without NUL."""
    if type(value) is not str or "\0" in value:
        raise ValueError("a string")
    return value


def path(value: object) -> str:
    """An absolute path without '..'."""
    if not text(value).startswith("/") or ".." in text(value).split("/"):
        raise ValueError("an absolute path without '..'")
    return text(value).rstrip("/") or "/"


def boolean(value: object) -> bool:
    """TOML's true and false, or their names."""
    named = {"true": True, "false": False}
    if type(value) is str and value.lower() in named:
        return named[value.lower()]
    if type(value) is not bool:
        raise ValueError("true or false")
    return value


def choice(*allowed: str) -> Callable[[object], str]:
    """One of the given words."""

    def parse(value: object) -> str:
        if value not in allowed:
            raise ValueError(" or ".join(f'"{word}"' for word in allowed))
        return str(value)

    return parse


def integer(low: int, high: int) -> Callable[[object], int]:
    """A whole number within bounds."""

    def parse(value: object) -> int:
        number = int(value) if type(value) is str and re.fullmatch(r"[0-9]{1,18}", value) else value
        if type(number) is not int or not low <= number <= high:
            raise ValueError(f"a whole number from {low} to {high}")
        return number

    return parse


def size(value: object) -> int:
    """Bytes from "512m" or "2g"; a bare number is refused as ambiguous."""
    match = re.fullmatch(r"([1-9][0-9]{0,11})([kmgt])b?", value.lower()) if type(value) is str else None
    if match is None:
        raise ValueError('a size such as "512m" or "2g"')
    return int(match[1]) << {"k": 10, "m": 20, "g": 30, "t": 40}[match[2]]


def cpu(value: object) -> int:
    """Thousandths of a core from 1.5 or "1.5"."""
    if type(value) not in (int, float, str) or not re.fullmatch(r"[0-9]{1,4}(\.[0-9]{1,3})?", str(value)):
        raise ValueError('a number of cores such as 0.5 or "2"')
    if not (thousandths := round(float(str(value)) * 1000)):
        raise ValueError("more than 0 cores")
    return thousandths


def unless_none(parse: Callable[[object], Any]) -> Callable[[object], Any]:
    """`parse`, with "none" for no limit."""
    return lambda value: None if value == "none" else parse(value)


def string_map(value: object) -> dict[str, str]:
    """A table of environment names to strings."""
    if type(value) is not dict or not all(re.fullmatch("[A-Za-z_][A-Za-z0-9_]*", name) for name in value):
        raise ValueError("a table of environment names to strings")
    return {name: text(item) for name, item in value.items()}


def data_mounts(value: object) -> dict[str, DataMount]:
    """A list of ``{name, path, mode}`` with mode "ro" or "rw"."""
    if type(value) is not list or not all(type(entry) is dict for entry in value):
        raise ValueError('a list of {name = "…", path = "/…", mode = "ro" | "rw"}')
    mounts = {}
    for entry in value:
        if set(entry) - {"mode"} != {"name", "path"} or not re.fullmatch(r"[A-Za-z0-9][\w-]{0,63}", str(entry["name"])):
            raise ValueError('a list of {name = "…", path = "/…", mode = "ro" | "rw"}')
        writable = choice("ro", "rw")(entry.get("mode", "ro")) == "rw"
        mounts[entry["name"]] = DataMount(entry["name"], path(entry["path"]), writable)
    return mounts


KEYS: Mapping[str, Key] = {
    "server.default_memory_limit": Key(unless_none(size), None),
    "server.default_cpu_limit": Key(unless_none(cpu), None),
    "server.worker_env": Key(string_map, {}),
    "storage.state_dir": Key(path, "/var/lib/blockyard"),
    "storage.bundle_worker_path": Key(path, "/app"),
    "storage.data_mounts": Key(data_mounts, {}),
    "process.bwrap_path": Key(path, "/usr/bin/bwrap"),
    "process.r_path": Key(path, "/usr/bin/R"),
    "process.seccomp_profile": Key(lambda value: value if value == "" else path(value), ""),
    "process.worker_uid_range_start": Key(integer(1000, 2**31), 60000),
    "process.worker_uid_range_end": Key(integer(1000, 2**31), 60999),
    "process.worker_gid": Key(integer(1, 2**31), 65534),
    "process.network": Key(choice("host", "none"), "host"),
    "process.memory_ceiling": Key(unless_none(size), None),
    "process.cpu_ceiling": Key(unless_none(cpu), None),
    "process.pids_limit": Key(integer(8, 2**22), 512),
    "process.tmp_size": Key(size, 256 << 20),
    "process.api_user": Key(text, "blockyard"),
    "process.runtime_dir": Key(path, "/run/blockyard/workers"),
    "process.cgroup_root": Key(lambda value: value if value == "" else path(value), ""),
    "process.allow_unlimited": Key(boolean, False),
}


def load(file: str, environ: Mapping[str, str], keys: Mapping[str, Key], *, closed: bool) -> dict[str, Any]:
    """Read `keys` from a TOML file and ``BLOCKYARD_<SECTION>_<KEY>``, which overrides it.

    With `closed`, a key in the file that is not in `keys` is an error. A missing file means defaults.
    Raises ConfigError.
    """
    try:
        with open(file, "rb") as handle:
            document = tomllib.load(handle)
    except FileNotFoundError:
        document = {}
    except (OSError, ValueError) as error:
        raise ConfigError(f"{file}: {error}; correct the file or restore its readable mode.") from error
    given: dict[str, tuple[str, object]] = {}
    for section, table in document.items():
        if type(table) is not dict:
            raise ConfigError(f"{file}: '{section}' stands outside a section; put it below [server] or its like.")
        given |= {f"{section}.{name}": (file, value) for name, value in table.items()}
    if closed and (unknown := [name for name in given if name not in keys]):
        near = difflib.get_close_matches(unknown[0], keys, n=1)
        remedy = f"did you mean '{near[0]}'?" if near else "remove it."
        raise ConfigError(f"{file}: unknown key '{unknown[0]}'; {remedy}")
    variables = {f"BLOCKYARD_{name.replace('.', '_').upper()}": name for name in keys}
    given |= {name: (variable, environ[variable]) for variable, name in variables.items() if variable in environ}
    result = {name: key.default for name, key in keys.items()}
    for name, (source, value) in given.items():
        if name in keys:
            try:
                result[name] = keys[name].parse(value)
            except ValueError as error:
                raise ConfigError(f"{source}: '{name}' must be {error}; it is {value!r:.80}.") from error
    return result
