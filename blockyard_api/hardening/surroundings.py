"""What the firewall's rules are computed from, as it is on this machine now."""

import re
import socket
import subprocess
from ipaddress import ip_address
from pathlib import Path

from blockyard_api.hardening.firewall import Address, HostAddress, Listener, Service, Surroundings
from blockyard_api.host.accounting import cgroup2_mount
from blockyard_api.host.units import WORKERS
from blockyard_api.settings import Settings

_WITHIN = 10.0  # seconds
_CONNTRACK = Path("/proc/sys/net/netfilter/nf_conntrack_max")
_RESOLVERS = Path("/etc/resolv.conf")
_BEHIND_STUB = Path("/run/systemd/resolve/resolv.conf")
_LISTENERS = ("the API", "the relay to the apps")


def look(settings: Settings) -> Surroundings:
    """Look around."""
    process = settings.process
    return Surroundings(
        uids=(process.worker_uid_range_start, process.worker_uid_range_end),
        cgroup=_cgroup(process.cgroup_root),
        addresses=host_addresses(),
        resolvers=nameservers(_RESOLVERS),
        listeners=_listeners(settings),
        services=tuple(Service(key, host, port, _resolved(host, port)) for key, host, port in named_services(settings)),
        translates=_CONNTRACK.exists(),
        pool=settings.docker.network_pool,
        container_resolvers=containers_resolvers(_RESOLVERS, _BEHIND_STUB),
    )


def host_addresses() -> tuple[HostAddress, ...]:
    """List this machine's addresses, and where it hears a subnet's broadcasts, in the kernel's order."""
    from pyroute2 import IPRoute  # noqa: PLC0415 - 15 MB resident: only this command pays for it

    found = []
    with IPRoute() as route:
        names = {link["index"]: str(link.get_attr("IFLA_IFNAME")) for link in route.get_links()}
        for entry in route.get_addr():
            own = entry.get_attr("IFA_LOCAL") or entry.get_attr("IFA_ADDRESS")  # the latter may be a link's other end
            heard = [text for text in (own, entry.get_attr("IFA_BROADCAST")) if text]
            found += [HostAddress(ip_address(text), names.get(entry["index"], "?")) for text in heard]
    return tuple(dict.fromkeys(found))


def nameservers(file: Path) -> tuple[Address, ...]:
    """List the resolvers that a worker's C library asks: those in resolv.conf, or this machine's own."""
    text = file.read_text("utf-8", errors="replace") if file.exists() else ""
    named = re.findall(r"^[ \t]*nameserver[ \t]+([0-9A-Fa-f.:]+)(?:%\S+)?[ \t]*(?:[#;].*)?$", text, re.MULTILINE)
    found = [address for address in map(_address, named) if address is not None]
    return tuple(dict.fromkeys(found)) or (ip_address("127.0.0.1"),)


def containers_resolvers(file: Path, behind_stub: Path) -> tuple[Address, ...]:
    """List the resolvers that an engine asks for its containers, which do not reach one at loopback.

    Where systemd-resolved is the only one, those that it asks itself.
    """
    named = nameservers(file)
    found = nameservers(behind_stub) if all(address.is_loopback for address in named) else named
    return tuple(address for address in found if not address.is_loopback)


def named_services(settings: Settings) -> list[tuple[str, str, int]]:
    """List (key, host, port) of what the configuration names; what is a Unix socket, workers do not see."""
    places = {
        "redis.url": settings.redis.endpoint,
        "vault.address": settings.vault.endpoint,
        "database.url": settings.database.endpoint,
    }
    return [(key, place.host, place.port) for key, place in places.items() if place is not None and place.host]


def _resolved(host: str, port: int) -> tuple[Address, ...]:
    try:
        answers = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    except OSError:
        return ()  # the rules say so, and hold for everything else
    return tuple(dict.fromkeys(ip_address(str(answer[4][0]).partition("%")[0]) for answer in answers))


def _address(text: str) -> Address | None:
    try:
        return ip_address(text)
    except ValueError:
        return None


def _systemd_says(unit: str, attribute: str) -> str:
    """Ask systemd for a unit's property; empty where there is no systemd, or none that answers."""
    command = ["systemctl", "show", "--value", f"--property={attribute}", unit]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=False, timeout=_WITHIN).stdout.strip()
    except (OSError, subprocess.TimeoutExpired):
        return ""


def _cgroup(configured: str) -> str:
    """Name the workers' cgroup from the mount's root."""
    if configured:
        return configured.removeprefix(str(cgroup2_mount() or ""))
    return _systemd_says(WORKERS, "ControlGroup") or f"/system.slice/{WORKERS}"


def _listeners(settings: Settings) -> tuple[Listener, ...]:
    """List where the API and the relay listen: on systemd's sockets where it has some, first the API's."""
    listening = re.findall(
        r"(?:\[([0-9A-Fa-f:]+)\]|([0-9.]+)):([0-9]+) \(Stream\)", _systemd_says("blockyard-api.socket", "Listen")
    )
    places = [(six or four, int(port)) for six, four, port in listening] or [settings.server.bind, settings.proxy.bind]
    names = _LISTENERS if len(places) == len(_LISTENERS) else ["the API or the relay to the apps"] * len(places)
    return tuple(
        Listener(name, address, port)
        for name, (host, port) in zip(names, places, strict=True)
        for address in _resolved(host, port)
    )
