"""Root's configuration: the keys the spawner needs, and the one loader that both daemons use. Pure but for the file.

A key is a name, a default and a parser. The API adds its own keys to these; the spawner ignores what is in sections
that are not its own. In [process] nothing is ignored: a misspelled ceiling would be none.
"""

import contextlib
import re
import tomllib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

DEFAULT_PATH = "/etc/blockyard/blockyard.toml"
_SHIFTS = {"k": 10, "m": 20, "g": 30, "t": 40}

T = TypeVar("T")


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


def written(meaning: str, pattern: str, convert: Callable[[str], T], *types: type) -> Callable[[object], T]:
    """Parse what matches `pattern` whole: a string, or one of TOML's other `types` as it is written."""

    def parse(value: object) -> T:
        if type(value) not in (str, *types) or not re.fullmatch(pattern, str(value)):
            raise ValueError(meaning)
        return convert(str(value))

    return parse


def integer(low: int, high: int) -> Callable[[object], int]:
    """A whole number within bounds."""
    meaning = f"a whole number from {low} to {high}"

    def parse(value: object) -> int:
        if (number := written(meaning, "[0-9]{1,18}", int, int)(value)) not in range(low, high + 1):
            raise ValueError(meaning)
        return number

    return parse


def choice(*allowed: str) -> Callable[[object], str]:
    """One of the given words."""
    return written(" or ".join(f'"{word}"' for word in allowed), "|".join(allowed), str)


def unless_none(parse: Callable[[object], Any]) -> Callable[[object], Any]:
    """`parse`, with "none" for no limit."""
    return lambda value: None if value == "none" else parse(value)


text = written("a string", r"[^\0]*", str)
path = written("an absolute path without '..'", r"(/(?!\.\.(/|$))[^/\0]*)+", lambda value: value.rstrip("/") or "/")
boolean = written("true or false", "(?i:true|false)", lambda value: value.lower() == "true", bool)
SIZE = "[1-9][0-9]{0,11}[kmgtKMGT]"
size = written('a size such as "512m"', SIZE, lambda value: int(value[:-1]) << _SHIFTS[value[-1].lower()])
_CORES = r"(?!0+(\.0([0-4][0-9]?)?)?$)[0-9]{1,4}(\.[0-9]{1,3})?"  # protocol.LEAST_CPU
cpu = written("a number of cores, at least 0.05", _CORES, lambda value: round(float(value) * 1000), int, float)


def string_map(value: object) -> dict[str, str]:
    """A table of environment names to strings."""
    if type(value) is not dict or not all(re.fullmatch("[A-Za-z_][A-Za-z0-9_]*", name) for name in value):
        raise ValueError("a table of environment names to strings")
    return {name: text(item) for name, item in value.items()}


def data_mounts(value: object) -> dict[str, DataMount]:
    """A list of ``{name, path, mode}`` with mode "ro" or "rw"."""
    mounts = {}
    for entry in value if type(value) is list else [value]:
        if type(entry) is not dict or set(entry) - {"mode"} != {"name", "path"}:
            raise ValueError('a list of {name = "…", path = "/…", mode = "ro" | "rw"}')
        name = written("a list of well-named mounts", "[A-Za-z0-9][A-Za-z0-9_-]{0,63}", str)(entry["name"])
        mounts[name] = DataMount(name, path(entry["path"]), choice("ro", "rw")(entry.get("mode", "ro")) == "rw")
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
    "process.seccomp_profile": Key(lambda value: value if value == "" else path(value), "/etc/blockyard/seccomp.bpf"),
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
    "process.spawner_socket": Key(path, "/run/blockyard/spawner.sock"),  # this and the next are the API's
    "process.skip_metadata_check": Key(boolean, False),
}


def read(file: str) -> dict[str, Any]:
    """Read a TOML file as ``section.key`` → value; a missing file is empty. Raises ConfigError."""
    document: dict[str, Any] = {}
    try:
        with contextlib.suppress(FileNotFoundError), open(file, "rb") as handle:
            document = tomllib.load(handle)
    except (OSError, ValueError) as error:
        raise ConfigError(f"{file}: {error}; correct the file or restore its readable mode.") from error
    if outside := [name for name, table in document.items() if type(table) is not dict]:
        raise ConfigError(f"{file}: '{outside[0]}' stands outside a section; put it below [server] or its like.")
    return {f"{section}.{name}": value for section, table in document.items() for name, value in table.items()}


def load(file: str, environ: Mapping[str, str], keys: Mapping[str, Key]) -> dict[str, Any]:
    """Take `keys` from a TOML file and ``BLOCKYARD_<SECTION>_<KEY>``, which overrides it. Raises ConfigError.

    A misspelled key of [process] stops the start, too; other sections have keys that are not these.
    """
    given = {name: (file, value) for name, value in read(file).items()}
    for variable in environ:
        if match := re.fullmatch("BLOCKYARD_([A-Z]+)_([A-Z0-9_]+)", variable):
            given[f"{match[1]}.{match[2]}".lower()] = (variable, environ[variable])
    result = {name: key.default for name, key in keys.items()}
    for name, (source, value) in given.items():
        if name.startswith("process.") and name not in keys:
            raise ConfigError(f"{source}: unknown key '{name}'; correct its spelling or remove it.")
        try:
            if name in keys:
                result[name] = keys[name].parse(value)
        except ValueError as error:
            raise ConfigError(f"{source}: '{name}' must be {error}; it is {value!r:.80}.") from error
    return result
