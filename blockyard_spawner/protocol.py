"""The wire format between the API and the root helper: one message, one SEQPACKET packet. Pure, no I/O.

Every request carries ``seq``, which its reply repeats: a stop takes seconds, so replies may come out of order.
The values get their exact types here, once; what they may *mean* is `policy`'s business.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Annotated, Any, Union, get_args, get_origin, get_type_hints

import msgpack

VERSION = 1
MAX_PACKET = 65536
MAX_GRACE_MS = 60_000
LEAST_CPU = 50  # thousandths of a core: with less, a start takes seconds, for which the spawner's loop waits
PAGE = 100  # workers in one `list` reply: at under 400 bytes each they stay below MAX_PACKET

# A type and the rule that a value must meet: a pattern for all of a text, a range for a number or for a length.
Seq = Annotated[int, range(2**53)]
WorkerId = Annotated[str, re.compile("[a-z0-9]{8,32}")]
Name = Annotated[str, re.compile("[A-Za-z0-9][A-Za-z0-9_-]{0,63}")]
Text = Annotated[str, re.compile(r"[^\x00]{0,4096}")]
Amount = Annotated[int, range(1, 2**64)]  # what is too much is for root's ceilings to say


class Refused(Exception):
    """A request that is not carried out: a stable code, and one sentence that says what to do."""

    def __init__(self, code: str, message: str) -> None:
        super().__init__(code, message)
        self.code, self.message = code, message


@dataclass(frozen=True, slots=True)
class Limits:
    """What one worker may use; None leaves the choice to root's configuration."""

    memory: Amount | None = None  # bytes
    cpu: Annotated[int, range(LEAST_CPU, 2**64)] | None = None  # thousandths of a core
    pids: Amount | None = None
    tmp: Amount | None = None  # bytes of /tmp


@dataclass(frozen=True, slots=True)
class Hello:
    """The version exchange: the first message on every connection."""

    seq: Seq
    version: Annotated[int, range(2**16)]


@dataclass(frozen=True, slots=True)
class Spawn:
    """Start one worker. One descriptor comes with it: the write end of the log pipe."""

    seq: Seq
    id: WorkerId
    kind: Name
    app: Name
    bundle: Name | None = None
    library: Name | None = None
    data: Annotated[tuple[Name, ...], range(33)] = ()
    env: Annotated[Mapping[Name, Text], range(65)] = field(default_factory=dict)
    network: Annotated[str, re.compile("host|none")] | None = None
    limits: Limits = field(default_factory=Limits)
    scratch_copy: bool = False
    # Who may visit: where a backend has several runtimes, root chooses one by it.
    access: Annotated[str, re.compile("public|logged_in|acl")] | None = None


@dataclass(frozen=True, slots=True)
class Stop:
    """Interrupt the app, end everything of it after `grace` milliseconds, and reply when it is gone."""

    seq: Seq
    id: WorkerId
    grace: Annotated[int, range(MAX_GRACE_MS + 1)] = 5000


@dataclass(frozen=True, slots=True)
class List:
    """Name workers in order of id, a page at a time; with `id`, that one alone, with its pidfd."""

    seq: Seq
    after: WorkerId | None = None
    id: WorkerId | None = None


Request = Hello | Spawn | Stop | List
_OPERATIONS: Mapping[str, type[Request]] = {"hello": Hello, "spawn": Spawn, "stop": Stop, "list": List}
_HINTS = {kind: get_type_hints(kind, include_extras=True) for kind in (Limits, *_OPERATIONS.values())}


def _typed(hint: Any, value: Any) -> Any:  # noqa: ANN401 - from whatever was sent to what `hint` says
    origin, parts = get_origin(hint), get_args(hint)
    if origin is Union:
        return None if value is None else _typed(parts[0], value)
    if origin is Annotated:
        typed, rule = _typed(parts[0], value), parts[1]
        size = typed if type(typed) is int else len(typed)
        if not (rule.fullmatch(typed) if isinstance(rule, re.Pattern) else size in rule):
            raise ValueError(f"{value!r:.80} is not within {getattr(rule, 'pattern', rule)}")
        return typed
    if type(value) is dict and hint in _HINTS:  # an unknown field is a KeyError, a missing one a TypeError
        return hint(**{name: _typed(_HINTS[hint][name], item) for name, item in value.items()})
    if type(value) is dict and origin is Mapping:
        return {_typed(parts[0], name): _typed(parts[1], item) for name, item in value.items()}
    if type(value) is list and origin is tuple:
        return tuple(_typed(parts[0], item) for item in value)
    if type(value) is not hint:  # exactly: True is an int to isinstance
        raise ValueError(f"{value!r:.80} is of another type than {hint}")
    return value


def _unique(pairs: list[tuple[object, object]]) -> dict[object, object]:
    if len(result := dict(pairs)) != len(pairs) or not all(type(key) is str for key in result):
        raise ValueError("a key occurs twice, or is no text")
    return result


def unpack(packet: bytes) -> dict[Any, Any]:
    """Decode one packet into a map with text keys at every level. Raises ValueError, RecursionError, OverflowError."""
    message = msgpack.unpackb(packet, object_pairs_hook=_unique, max_ext_len=0, max_bin_len=0)
    if type(message) is not dict:
        raise ValueError("it is no map")
    return message


def decode(packet: bytes) -> Request:
    """Turn one packet into a request with exact types; its schema is closed. Raises Refused ``malformed``."""
    try:
        message = unpack(packet)
        request: Request = _typed(_OPERATIONS[message.pop("op", None)], message)
    except (ValueError, TypeError, KeyError, RecursionError, OverflowError) as error:
        raise Refused("malformed", f"Send one msgpack map in a packet, a request's: {error!r:.200}.") from error
    return request


def reply(**message: object) -> bytes:
    """Pack one message; replies are ``seq`` with either ``ok`` (a map) or ``error`` (``code``, ``message``)."""
    return bytes(msgpack.packb(message))
