"""What can be reached: by this daemon, and by a worker."""

import asyncio
import contextlib
import errno
import socket
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from ipaddress import ip_address
from pathlib import Path
from typing import Any

from blockyard_api.checks.context import Context, Outcome, Seen
from blockyard_api.checks.probe import ProbeFailed, Report, Sight, Target
from blockyard_api.checks.result import Result, error, info, ok, together, warning
from blockyard_api.host import container
from blockyard_api.settings import Endpoint, Settings

METADATA = (
    Target("cloud metadata", Endpoint("169.254.169.254", 80)),
    Target("cloud metadata", Endpoint("fd00:ec2::254", 80)),
)
_WITHIN = 1.0  # seconds for a connection, and for an answer
_MOST_LISTENERS = 500
_SCOPED = 6  # the version of Landlock's ABI that knows scopes for abstract sockets
_PING = b"*1\r\n$4\r\nPING\r\n"
_RULES = "Load the rules that 'by admin firewall' prints, or set process.network = \"none\"."
_DOCKER_RULES = (
    "Run 'systemctl enable --now blockyard-firewall-docker', or give Docker apps no network: "
    "'by update APP --network none'."
)
_RULES_FROM_OUTSIDE = (
    "Set process.network = \"none\", or load the rules that 'by admin firewall' prints into the container's network "
    "from outside, as docs/container.md shows."
)
# What connect(2) says when it is this daemon's unit that forbids connections, rather than the network.
_FORBIDDEN_HERE = (errno.EAFNOSUPPORT, errno.EPERM, errno.EACCES)


_Place = tuple[socket.AddressFamily, Any]


class _NotAllowed(Exception):
    """This daemon may open no such connection."""


class _NotReached(Exception):
    """There is no connection; the message is the reason."""


def services(settings: Settings) -> Iterator[Target]:
    """Name the configured services that workers must not reach."""
    if settings.redis.endpoint:
        yield redis(settings)
    if settings.vault.endpoint:
        yield Target("vault", settings.vault.endpoint)
    if settings.database.endpoint:
        yield Target("database", settings.database.endpoint)


def redis(settings: Settings) -> Target:
    """Return the configured Redis; one behind TLS is only connected to."""
    plain = settings.redis.url is not None and not settings.redis.url.startswith("rediss:")
    return Target("redis", settings.redis.endpoint or Endpoint(), ping=plain)


def targets(context: Context, listeners: Iterable[tuple[str, int]], abstract: str) -> tuple[list[Target], int]:
    """Return what a worker is to try, each address once, and how many listening ports were too many.

    What listens at every address is tried, too: a firewall before this host keeps the world from it, and no worker.
    """
    named = [*METADATA, *services(context.settings)]
    for words, (host, port) in zip(("the API", "the relay"), context.listening, strict=False):
        named.append(Target(words, Endpoint(_reachable_at(host), port)))
    named.append(Target("the spawner", Endpoint(path=context.settings.process.spawner_socket)))
    named.append(Target("an abstract socket", Endpoint(), abstract=abstract))
    resolvers = _resolvers()
    near_first = sorted(listeners, key=lambda each: not ip_address(each[0]).is_loopback)
    reachable = [(_reachable_at(host), port) for host, port in near_first]
    others = [Target("a listener", Endpoint(*each)) for each in reachable if each not in resolvers]
    once = {(target.at, target.abstract): target for target in (*reversed(others[:_MOST_LISTENERS]), *reversed(named))}
    return [*reversed(once.values())], max(0, len(others) - _MOST_LISTENERS)


def container_targets(context: Context, listeners: Iterable[tuple[str, int]], abstract: str) -> list[Target]:
    """Return what a Docker worker is to try; what listens at every address of this host is at its gateway.

    So are services at loopback, which its own hides: they may listen elsewhere too.
    """
    settings = context.settings
    named = [*METADATA, *(_outside(target) for target in services(settings))]
    for words, (host, port) in zip(("the API", "the relay"), context.listening, strict=False):
        named.append(_outside(Target(words, Endpoint(host, port))))
    for words, path in (
        ("the spawner", settings.process.spawner_socket),
        ("the Docker spawner", settings.docker.spawner_socket),
        ("the container engine", settings.docker.socket),
    ):
        named.append(Target(words, Endpoint(path=path)))
    named.append(Target("an abstract socket", Endpoint(), abstract=abstract))
    resolvers = _resolvers()
    kept = [each for each in listeners if each not in resolvers and _is_one_address_of_this_host(each[0])]
    once = {(target.at, target.gateway, target.abstract): target for target in reversed(named)}
    known = {target.at for target in named}
    others = [Target("a listener", Endpoint(*each)) for each in kept[:_MOST_LISTENERS] if Endpoint(*each) not in known]
    return [*reversed(once.values()), *others]


def _outside(target: Target) -> Target:
    """Return the same target as it may be reached from outside of this host."""
    host = target.at.host
    with contextlib.suppress(ValueError):
        found = ip_address(host)
        host = "localhost" if found.is_loopback or found.is_unspecified else host
    if host != "localhost":
        return target
    return replace(target, at=replace(target.at, host=""), gateway=True)


def _is_one_address_of_this_host(address: str) -> bool:
    """Tell a listener that a container might reach, but not the whole world, which is no secret of this host's."""
    found = ip_address(address)
    return found.version == 4 and not found.is_loopback and not found.is_unspecified


def _reachable_at(host: str) -> str:
    """Return where what listens on `host` can be connected to: at every address means also at loopback."""
    return {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)  # noqa: S104


def _resolvers() -> set[tuple[str, int]]:
    """Return the name servers: those a worker is to reach."""
    try:
        lines = Path("/etc/resolv.conf").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return set()
    return {(line.split()[1], 53) for line in lines if line.startswith("nameserver ") and len(line.split()) > 1}


async def cloud_metadata(context: Context, seen: Seen) -> Result:
    """Try the metadata addresses from this very process, and from a process on the host's network.

    The daemon's unit lets it open no connection, which is well, but says nothing of other processes: the probe does.
    """
    name = "cloud_metadata"
    if context.settings.process.skip_metadata_check:
        return info(name, "Not tried: process.skip_metadata_check is set.")
    here = [*await asyncio.gather(*(_own_attempt(target) for target in METADATA))]
    reached = [str(target) for target, outcome in zip(METADATA, here, strict=True) if outcome == ""]
    if isinstance(seen.on_host, ProbeFailed):
        if not reached:
            return seen.on_host.result(name)
    elif seen.on_host is not None:
        reached += [str(target) for target in METADATA if seen.on_host.sights[target].reached]
    if reached:
        return error(
            name,
            f"Any process on the host's network can read this machine's credentials: {_list(reached)} answers.",
            "Close it with the rules that 'by admin firewall' prints; if only workers are kept from it, as "
            "'worker_egress' tells, set process.skip_metadata_check = true.",
        )
    own = "this daemon may open no connection at all" if None in here else "this daemon did not either"
    if seen.on_host is None:
        return ok(name, f"No app has the host's network, and {own}.")
    return ok(name, f"A process on the host's network did not reach the metadata addresses, and {own}.")


async def _own_attempt(target: Target) -> str | None:
    """Try a connection from this process: "" reached, None not allowed to, or else the reason."""
    try:
        (await _connect(target.at)).close()
    except _NotAllowed:
        return None
    except _NotReached as failure:
        return str(failure)
    return ""


async def _connect(at: Endpoint) -> socket.socket:
    """Connect from this very process. Raises _NotAllowed or _NotReached."""
    loop = asyncio.get_running_loop()
    try:
        async with asyncio.timeout(_WITHIN):
            if at.path:
                places: list[_Place] = [(socket.AF_UNIX, at.path)]
            else:
                found = await loop.getaddrinfo(at.host, at.port, type=socket.SOCK_STREAM)
                places = [(socket.AddressFamily(family), address) for family, _, _, _, address in found]
            return await _connect_first(places)
    except TimeoutError as failure:
        raise _NotReached("timeout") from failure
    except OSError as failure:
        raise _NotReached(failure.strerror or str(failure)) from failure


async def _connect_first(places: Sequence[_Place]) -> socket.socket:
    last = OSError(errno.EADDRNOTAVAIL, "it has no address")
    for family, address in places:
        try:
            sock = socket.socket(family, socket.SOCK_STREAM | socket.SOCK_CLOEXEC | socket.SOCK_NONBLOCK)
        except OSError as failure:
            raise _NotAllowed from failure
        try:
            await asyncio.get_running_loop().sock_connect(sock, address)
        except OSError as failure:
            sock.close()
            if failure.errno in _FORBIDDEN_HERE and family != socket.AF_UNIX:
                raise _NotAllowed from failure
            last = failure
        except BaseException:
            sock.close()
            raise
        else:
            return sock
    raise last


async def worker_egress(context: Context, seen: Seen) -> Result:
    """Say which of the things that are none of a worker's business it can reach."""
    name, found = "worker_egress", []
    if seen.worker is not None:
        who = f"A worker (network {context.settings.process.network})"
        rules = _RULES_FROM_OUTSIDE if container.inside() else _RULES
        found.append(_egress(name, who, seen.worker, seen, rules))
    if seen.docker is not None:
        found.append(_egress(name, "A Docker worker", seen.docker, seen, _DOCKER_RULES))
    return together(name, found)


def _egress(name: str, who: str, outcome: Outcome, seen: Seen, rules: str) -> Result:
    if isinstance(outcome, ProbeFailed):
        return outcome.result(name)
    sights = {target: sight for target, sight in outcome.sights.items() if not target.abstract}
    reached = [target for target, sight in sights.items() if sight.reached]
    words = _list([str(target) for target in reached])
    if any(target in METADATA for target in reached):
        return error(name, f"{who} can read this machine's credentials; it reaches {words}.", rules)
    if seen.unlisted:
        remedy = "See why; until then nobody knows what a worker reaches at loopback."
        return error(name, f"Not all was tried: {seen.unlisted}.", remedy)
    if reached or seen.left_out:
        also = f" Not tried: {seen.left_out} further listening ports." if seen.left_out else ""
        return warning(name, f"{who} reaches {words or 'nothing of what was tried'}.{also}", rules)
    return ok(name, f"{who} reached none of {len(sights)} addresses: {_reasons(outcome)}.")


def _reasons(report: Report) -> str:
    counts: dict[str, int] = {}
    for target, sight in report.sights.items():
        if not target.abstract:
            counts[sight.failure] = counts.get(sight.failure, 0) + 1
    return ", ".join(f"{number} {reason}" for reason, number in sorted(counts.items()))


def _list(words: Sequence[str]) -> str:
    shown = ", ".join(dict.fromkeys(words[:20]))
    return f"{shown} and {len(words) - 20} more" if len(words) > 20 else shown


async def redis_auth(context: Context, seen: Seen) -> Result:
    """Ask Redis something without a password: from this process where it may connect, otherwise by the probe."""
    name, settings = "redis_auth", context.settings
    if settings.redis.url is None:
        return ok(name, "No Redis is configured.")
    target = redis(settings)
    if not target.ping:
        return info(name, f"{target} speaks TLS, so it was not asked whether it wants a password.")
    try:
        answer = await _ping(target.at)
    except _NotReached as failure:
        return warning(name, f"{target} does not answer: {failure}.", "Start it, or correct redis.url.")
    except _NotAllowed:
        asked = seen.on_host or seen.docker
        if isinstance(asked, ProbeFailed):
            return asked.result(name)
        sight = _sight_of_redis(asked)
        if not sight.reached:
            return warning(
                name,
                f"Nobody could ask {target}: this daemon may open no connection, and a worker has {sight.failure}.",
                f"Let the API ask: a drop-in for blockyard-api with RestrictAddressFamilies=AF_INET AF_INET6 and "
                f"IPAddressAllow={target.at.host}.",
            )
        answer = sight.answer
    return _judged(name, target, answer)


def _sight_of_redis(report: Report | None) -> Sight:
    """Return what became of the question; a Docker worker has another address for the same Redis."""
    found = next((sight for target, sight in report.sights.items() if target.ping), None) if report else None
    return found or Sight(reached=False, failure="no probe", answer="")


def _judged(name: str, target: Target, answer: str) -> Result:
    if answer.startswith("+PONG"):
        return error(
            name,
            f"{target} answers without a password: any process on this host can change sessions.",
            "Set requirepass in redis.conf and write the password into redis.url.",
        )
    if answer.startswith("-NOAUTH"):
        return ok(name, f"{target} wants a password.")
    remedy = "See that it is a Redis, and that it has a password: 'redis-cli ping' must answer NOAUTH."
    return warning(name, f"{target} gave an answer that tells nothing: {answer[:60]!r}.", remedy)


async def _ping(at: Endpoint) -> str:
    """Return the first line of the answer to an unauthenticated PING. Raises _NotAllowed or _NotReached."""
    sock = await _connect(at)
    loop = asyncio.get_running_loop()
    with sock:
        try:
            async with asyncio.timeout(_WITHIN):
                await loop.sock_sendall(sock, _PING)
                return (await loop.sock_recv(sock, 200)).decode("ascii", "replace").split("\r\n")[0]
        except TimeoutError as failure:
            raise _NotReached("it accepts a connection, but says nothing") from failure
        except OSError as failure:
            raise _NotReached(failure.strerror or str(failure)) from failure


async def abstract_sockets(context: Context, seen: Seen) -> Result:
    """Say whether a worker reaches abstract Unix sockets, which belong to the network and not to any directory."""
    name, found = "abstract_sockets", []
    if seen.worker is not None:
        found.append(_abstract(name, f"A worker (network {context.settings.process.network})", seen.worker))
    if seen.docker is not None:
        found.append(_abstract(name, "A Docker worker", seen.docker))
    return together(name, found)


def _abstract(name: str, who: str, outcome: Outcome) -> Result:
    if isinstance(outcome, ProbeFailed):
        return outcome.result(name)
    sight = outcome.abstract
    if not sight.reached:
        return ok(name, f"{who} does not reach abstract sockets of others: {sight.failure}.")
    fact = "A worker on the host's network reaches abstract Unix sockets of the host and of other workers"
    remedy = "Set process.network = \"none\", or per app: 'by update APP --network none'."
    if outcome.landlock >= _SCOPED:
        return warning(name, f"{fact}, although this kernel could keep it from them.", f"{remedy}")
    has = f"version {outcome.landlock} of {_SCOPED}" if outcome.landlock else "none"
    return warning(name, f"{fact}: only Landlock from Linux 6.12 on can close them; here: {has}.", remedy)
