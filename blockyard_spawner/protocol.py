"""The wire format between the API and the root helper: one message, one SEQPACKET packet. Pure, no I/O.

Every request carries ``seq``, which its reply repeats: a stop takes seconds, so replies may come out of order.
The values get their exact types here, once; what they may *mean* is `policy`'s business.
"""

import re
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

import msgpack

VERSION = 1
MAX_PACKET = 65536
MAX_GRACE_MS = 60_000
PAGE = 100  # workers in one `list` reply: at under 400 bytes each they stay below MAX_PACKET


class Refused(Exception):  # noqa: N818 - the audit's own word, see BLOCKYARD_RESULT
    """A request that is not carried out: a stable code, and one sentence that says what to do."""

    def __init__(self, code: str, message: str, seq: int | None = None) -> None:
        super().__init__(message)
        self.code = code
        self.message = message
        self.seq = seq


@dataclass(frozen=True, slots=True)
class Limits:
    """What one worker may use; None leaves the choice to root's configuration."""

    memory: int | None = None  # bytes
    cpu: int | None = None  # thousandths of a core
    pids: int | None = None
    tmp: int | None = None  # bytes of /tmp


@dataclass(frozen=True, slots=True)
class Hello:
    """The version exchange: the first message on every connection."""

    seq: int
    version: int


@dataclass(frozen=True, slots=True)
class Spawn:
    """Start one worker. One descriptor comes with it: the write end of the log pipe."""

    seq: int
    id: str
    kind: str
    app: str
    bundle: str | None = None
    library: str | None = None
    data: tuple[str, ...] = ()
    env: Mapping[str, str] = field(default_factory=dict)
    network: str | None = None
    limits: Limits = field(default_factory=Limits)
    scratch_copy: bool = False


@dataclass(frozen=True, slots=True)
class Stop:
    """Interrupt the app, end everything of it after `grace` milliseconds, and reply when it is gone."""

    seq: int
    id: str
    grace: int = 5000


@dataclass(frozen=True, slots=True)
class List:
    """Name workers in order of id, a page at a time; with `id`, that one alone, with its pidfd."""

    seq: int
    after: str | None = None
    id: str | None = None


Request = Hello | Spawn | Stop | List
Check = Callable[[object], Any]


def _integer(low: int, high: int) -> Check:
    def check(value: object) -> int:
        if type(value) is not int or not low <= value <= high:  # True is an int to isinstance
            raise ValueError(f"must be a whole number from {low} to {high}")
        return value

    return check


def _matching(pattern: str, meaning: str) -> Check:
    compiled = re.compile(pattern)

    def check(value: object) -> str:
        if type(value) is not str or not compiled.fullmatch(value):  # `$` would let a final newline through
            raise ValueError(f"must be {meaning}")
        return value

    return check


def _boolean(value: object) -> bool:
    if type(value) is not bool:
        raise ValueError("must be true or false")
    return value


def _optional(check: Check) -> Check:
    return lambda value: None if value is None else check(value)


def _map(key: Check, value_check: Check, most: int) -> Check:
    def check(value: object) -> dict[Any, Any]:
        if type(value) is not dict or len(value) > most:
            raise ValueError(f"must be a map of at most {most} entries")
        return {key(name): value_check(item) for name, item in value.items()}

    return check


def _list(item: Check, most: int) -> Check:
    def check(value: object) -> tuple[Any, ...]:
        if type(value) is not list or len(value) > most:
            raise ValueError(f"must be a list of at most {most} entries")
        return tuple(item(entry) for entry in value)

    return check


def _limits(value: object) -> Limits:
    top = {"memory": 2**50, "cpu": 1_024_000, "pids": 2**22, "tmp": 2**50}
    fields = _map(_matching("|".join(top), f"one of {', '.join(top)}"), lambda limit: limit, len(top))(value)
    return Limits(**{name: _optional(_integer(1, top[name]))(limit) for name, limit in fields.items()})


_SEQ = _integer(0, 2**53)
_WORKER = _matching(r"[a-z0-9]{8,32}", "8 to 32 lowercase letters or digits")
_NAME = _matching(r"[A-Za-z0-9][A-Za-z0-9_-]{0,63}", "a name of at most 64 letters, digits, '-' and '_'")
_TEXT = _matching(r"[^\x00]{0,4096}", "text of at most 4096 characters without NUL")
_ENV_NAME = _matching(r"[A-Z][A-Z0-9_]{0,63}", "an environment name in capitals")

_FIELDS: Mapping[str, tuple[type[Request], Mapping[str, Check]]] = {
    "hello": (Hello, {"version": _integer(0, 2**16)}),
    "spawn": (
        Spawn,
        {
            "id": _WORKER,
            "kind": _NAME,
            "app": _NAME,
            "bundle": _optional(_NAME),
            "library": _optional(_NAME),
            "data": _list(_NAME, 32),
            "env": _map(_ENV_NAME, _TEXT, 64),
            "network": _optional(_matching("host|none", "'host' or 'none'")),
            "limits": _limits,
            "scratch_copy": _boolean,
        },
    ),
    "stop": (Stop, {"id": _WORKER, "grace": _integer(0, MAX_GRACE_MS)}),
    "list": (List, {"after": _optional(_WORKER), "id": _optional(_WORKER)}),
}


def _unique(pairs: list[tuple[object, object]]) -> dict[object, object]:
    result = dict(pairs)
    if len(result) != len(pairs):
        raise ValueError("a key occurs twice")
    return result


def unpack(packet: bytes) -> dict[Any, Any]:
    """Decode one packet into a map of str keys.

    Raises Refused with code ``malformed``; msgpack's own failures are all ValueError.
    """
    try:
        message = msgpack.unpackb(
            packet, strict_map_key=True, object_pairs_hook=_unique, max_ext_len=0, max_bin_len=0, raw=False
        )
    except (ValueError, RecursionError, OverflowError) as error:
        raise Refused("malformed", f"Send one msgpack map in a packet: {error or type(error).__name__}.") from error
    if type(message) is not dict or not all(type(key) is str for key in message):
        raise Refused("malformed", "Send one msgpack map with text keys in a packet.")
    return message


def decode(packet: bytes) -> Request:
    """Turn one packet into a request with exact types; its schema is closed, and two levels are its depth.

    Raises Refused with code ``malformed``, ``unknown_operation`` or ``invalid_field``.
    """
    message = unpack(packet)
    try:
        seq = _SEQ(message.pop("seq", None))
    except ValueError as error:
        raise Refused("invalid_field", f"Field 'seq' {error}.") from error
    operation = message.pop("op", None)
    if type(operation) is not str or operation not in _FIELDS:
        raise Refused("unknown_operation", f"Use one of: {', '.join(_FIELDS)}.", seq)
    request, checks = _FIELDS[operation]
    values: dict[str, Any] = {}
    for name, value in message.items():
        if name not in checks:
            raise Refused("invalid_field", f"Operation '{operation}' has no field {name[:64]!r}.", seq)
        try:
            values[name] = checks[name](value)
        except ValueError as error:
            raise Refused("invalid_field", f"Field '{name}' {error}.", seq) from error
    try:
        return request(seq=seq, **values)
    except TypeError as error:  # a required field is missing
        raise Refused("invalid_field", f"Operation '{operation}' lacks a field it needs.", seq) from error


def encode(request: Request) -> bytes:
    """Turn a request into a packet, for the client's side."""
    name = next(name for name, (kind, _) in _FIELDS.items() if kind is type(request))
    return reply(op=name, **asdict(request))


def reply(**message: object) -> bytes:
    """Pack one message; replies are ``seq`` with either ``ok`` (a map) or ``error`` (``code``, ``message``)."""
    packed: bytes = msgpack.packb(message)
    return packed
