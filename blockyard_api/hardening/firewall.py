"""What workers must not reach, and the rules that keep them from it, in the words of four tools. Pure.

Each rule names a destination; whatever no rule names stays reachable, the open internet first of all. Only parsed
values get into a text: addresses are `ipaddress` objects, and every name has to match a narrow pattern before.
"""

import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from enum import StrEnum
from ipaddress import IPv4Address, IPv4Network, IPv6Address, IPv6Network, ip_network

from blockyard_api.errors import BlockyardError

Address = IPv4Address | IPv6Address
Network = IPv4Network | IPv6Network

TABLE = "blockyard"
CGROUP_TABLE = "blockyard_cgroup"  # one of its own: the form by uid may be taken away without this one
CHAIN = "BLOCKYARD"
DROP_IN = "/etc/systemd/system/blockyard-workers.service.d/firewall.conf"
CGROUP_RECORD = "/run/blockyard/firewall-cgroup"  # by which tool, and the inode of the cgroup that it was told

_DNS = 53
_STUBS = (IPv4Address("127.0.0.53"), IPv4Address("127.0.0.54"))  # systemd-resolved, and nobody else
_COMMENT = 120  # characters; nftables keeps 128 bytes


class Format(StrEnum):
    """A tool's words, and what it knows a worker by."""

    NFT = "nft"
    NFT_CGROUP = "nft-cgroup"
    IPTABLES_OWNER = "iptables-owner"
    IPTABLES_CGROUP = "iptables-cgroup"
    SYSTEMD = "systemd"


class NotExpressible(BlockyardError):
    """These rules cannot be said in the words that were asked for."""


@dataclass(frozen=True, slots=True)
class HostAddress:
    """An address of this machine, and the network interface that has it."""

    address: Address
    interface: str


@dataclass(frozen=True, slots=True)
class Listener:
    """A port of Blockyard's own; an unspecified address stands for every address of this machine."""

    name: str
    address: Address
    port: int


@dataclass(frozen=True, slots=True)
class Service:
    """A service that the configuration names by `key`, and the addresses that its host has now."""

    key: str
    host: str
    port: int
    addresses: tuple[Address, ...]


@dataclass(frozen=True, slots=True)
class Surroundings:
    """What the rules are computed from."""

    uids: tuple[int, int]  # first and last
    cgroup: str  # of the workers' unit, from the mount's root
    addresses: tuple[HostAddress, ...]
    resolvers: tuple[Address, ...]
    listeners: tuple[Listener, ...]
    services: tuple[Service, ...]
    translates: bool  # connections are tracked, as where containers' ports are published on this machine's addresses


@dataclass(frozen=True, slots=True)
class Rule:
    """A destination, whether workers may reach it, and why."""

    destination: Network
    port: int | None  # of TCP; of UDP besides where it is the resolver's
    allowed: bool
    why: str


_METADATA = (
    ("169.254.0.0/16", "link-local: the cloud's metadata at 169.254.169.254 gives out this machine's credentials"),
    ("fd00:ec2::254", "metadata of AWS"),
    ("fd20:ce::254", "metadata of Google Cloud"),
    ("fe80::a9fe:a9fe", "metadata of OpenStack"),
    ("168.63.129.16", "Azure's wire server: this machine's certificates and settings"),
    ("100.100.100.200", "metadata of Alibaba Cloud"),
)
_LOOPBACK = ("127.0.0.0/8", "::1")
_DOCKER_DENIED = "169.254.169.254/32"  # a cloud's machine credentials
_HEARD_HERE = (
    ("255.255.255.255", "broadcast: this machine hears it too"),
    ("224.0.0.0/4", "multicast: this machine hears it too"),
    ("ff00::/8", "multicast: this machine hears it too"),
)


def rules(around: Surroundings) -> list[Rule]:
    """List the rules in the order in which they count: the first that fits decides."""
    found = [Rule(_one(address), _DNS, True, "the resolver in /etc/resolv.conf") for address in around.resolvers]
    found += [Rule(ip_network(network), None, False, why) for network, why in _METADATA]
    for listener in around.listeners:
        if not listener.address.is_unspecified:
            found.append(Rule(_one(listener.address), listener.port, False, listener.name))
    for service in around.services:
        why = f"{service.key}: {_known(service.host, _HOST)}"
        found += [Rule(_one(address), service.port, False, why) for address in service.addresses]
    found += [Rule(ip_network(network), None, False, "loopback: this machine's services") for network in _LOOPBACK]
    for own in around.addresses:
        if not own.address.is_loopback:
            why = f"this machine's own, on {_known(own.interface, _INTERFACE)}"
            found.append(Rule(_one(own.address), None, False, why))
    found += [Rule(ip_network(network), None, False, why) for network, why in _HEARD_HERE]
    return list(dict.fromkeys(found))


def render(around: Surroundings, form: Format) -> str:
    """Write the rules for one tool. Raises NotExpressible."""
    return _RENDERERS[form](around)


def loaded_by(form: Format, printed: str) -> list[str]:
    """Name the shell commands, to be run by root, that load what the command `printed` prints."""
    if form is Format.SYSTEMD:
        return [f"{printed} | install -D --mode=0644 /dev/stdin {DROP_IN}", "systemctl daemon-reload", _TAKE_ON]
    if form in (Format.NFT, Format.NFT_CGROUP):
        return [f"{printed} | nft --file -"]
    # A chain that is declared again is emptied first, so only the jump to it could pile up.
    return [
        *(f"{printed} | {tool}-restore --noflush" for tool in _IPTABLES),
        *(f"{tool} -C OUTPUT -j {CHAIN} 2>/dev/null || {tool} -I OUTPUT -j {CHAIN}" for tool in _IPTABLES),
    ]


def forgotten_cgroup(recorded: str | None, present: int | None) -> str | None:
    """Say how rules that match by cgroup have come to match nobody; None where they match, or were never loaded.

    `recorded` is the text of CGROUP_RECORD, None where there is no such file; `present` the inode of the cgroup of the
    workers' unit, None where that is not there: then there are no workers either.
    """
    if recorded is None or present is None or recorded.split()[1:] == [str(present)]:
        return None
    tool = "iptables" if recorded.startswith("iptables") else "nft"
    return (
        "The firewall's rules name the workers' cgroup by an identity that it no longer has, so they match nobody; run "
        f"systemctl restart blockyard-firewall-cgroup@{tool}."
    )


def docker_rules(pool: IPv4Network, denied: tuple[str, ...] = (_DOCKER_DENIED,)) -> list[str]:
    """Return iptables commands for what no Docker worker is to reach, in Docker's own chain, DOCKER-USER.

    The last lines close the host itself to workers, which reach its addresses past DOCKER-USER.
    """
    chain = "iptables -I DOCKER-USER"
    rules = [f"{chain} -s {pool} -d {destination} -j REJECT" for destination in denied]
    rules += [f"iptables -I INPUT -s {pool} -j REJECT"]
    rules += [f"iptables -I INPUT -s {pool} -m conntrack --ctstate ESTABLISHED,RELATED -j ACCEPT"]
    return rules


_IPTABLES = ("iptables", "ip6tables")
# A reload alone leaves a running unit's filter as it is; setting any property of the filter's kind makes it anew.
_TAKE_ON = "systemctl set-property --runtime blockyard-workers IPAccounting=yes"
_HOST = r"[A-Za-z0-9_.:-]{1,253}"
_INTERFACE = r"[A-Za-z0-9_.@-]{1,15}"
_CGROUP = r"(/[A-Za-z0-9_.@:-]+)+"


def _known(name: str, pattern: str) -> str:
    return name if re.fullmatch(pattern, name) else "(a name that is not repeated here)"


def _one(address: Address) -> Network:
    return ip_network(address.packed)  # without an IPv6 zone


def _written(network: Network) -> str:
    return str(network.network_address if network.num_addresses == 1 else network)


def _path(around: Surroundings) -> str:
    if not re.fullmatch(_CGROUP, around.cgroup):
        raise NotExpressible(
            "no_cgroup_path", f"No rule can name the cgroup {around.cgroup!r}; use a form that matches by uid."
        )
    return around.cgroup.lstrip("/")


def _uids(around: Surroundings) -> str:
    return "{}-{}".format(*around.uids)


def _heading(around: Surroundings, form: Format) -> Iterator[str]:
    yield f"# What Blockyard's workers must not reach. Made by: by admin firewall --format {form}"
    yield "# Made from the configuration and this machine's addresses: make it anew when either changes."
    for service in around.services:
        if not service.addresses:
            yield f"# NOT KEPT FROM WORKERS: {service.key}, {_known(service.host, _HOST)} has no address now."


def _nft(around: Surroundings, form: Format, table: str, match: str) -> str:
    def lines() -> Iterator[str]:
        yield from _heading(around, form)
        yield "# One transaction, which leaves one table, however often it is loaded."
        yield f"table inet {table} {{}}"
        yield f"delete table inet {table}"
        yield f"table inet {table} {{"
        yield "\tchain refuse {"
        yield '\t\tmeta l4proto tcp counter reject with tcp reset comment "at once, not after a timeout"'
        yield "\t\tcounter reject with icmpx port-unreachable"
        yield "\t}"
        yield "\tchain worker {"
        for rule in rules(around):
            family = "ip" if rule.destination.version == 4 else "ip6"
            protocol = "meta l4proto { tcp, udp } th dport" if rule.allowed else "tcp dport"
            port = "" if rule.port is None else f" {protocol} {rule.port}"
            verdict = "accept" if rule.allowed else "counter goto refuse"
            yield f'\t\t{family} daddr {_written(rule.destination)}{port} {verdict} comment "{rule.why[:_COMMENT]}"'
        later = "fib daddr type { local, broadcast, anycast, multicast }"
        yield f'\t\t{later} counter goto refuse comment "addresses that this machine gets later"'
        yield "\t}"
        yield "\tchain output {"
        yield "\t\t# Ahead of address translation, which turns this machine's address into a container's."
        yield "\t\ttype filter hook output priority mangle; policy accept;"
        yield f'\t\t{match} goto worker comment "workers; everybody else passes"'
        yield "\t}"
        yield "}"

    return "".join(f"{line}\n" for line in lines())


def _nft_by_uid(around: Surroundings) -> str:
    return _nft(around, Format.NFT, TABLE, f"meta skuid {_uids(around)}")


def _nft_by_cgroup(around: Surroundings) -> str:
    path = _path(around)
    match = f'socket cgroupv2 level {path.count("/") + 1} "{path}"'
    return _nft(around, Format.NFT_CGROUP, CGROUP_TABLE, match)


def _iptables(around: Surroundings, form: Format, match: str) -> str:
    def rule_lines() -> Iterator[str]:
        for rule in rules(around):
            start = f"-{rule.destination.version} -A {CHAIN}-WORKER -d {rule.destination}"
            verdict = f'-m comment --comment "{rule.why}" -j {"RETURN" if rule.allowed else f"{CHAIN}-REFUSE"}'
            for protocol in ("udp", "tcp") if rule.allowed else ("tcp",):
                yield f"{start}{'' if rule.port is None else f' -p {protocol} --dport {rule.port}'} {verdict}"
        if around.translates:
            yield (
                f"-A {CHAIN}-WORKER -m conntrack --ctstate DNAT"
                f" -m comment --comment \"this machine's address, turned into a container's\" -j {CHAIN}-REFUSE"
            )
        for family, kind in (("", "LOCAL"), ("-4 ", "BROADCAST"), ("", "MULTICAST")):
            yield (
                f"{family}-A {CHAIN}-WORKER -m addrtype --dst-type {kind}"
                f' -m comment --comment "addresses that this machine gets later" -j {CHAIN}-REFUSE'
            )

    def lines() -> Iterator[str]:
        yield from _heading(around, form)
        yield "# For iptables-restore --noflush and ip6tables-restore --noflush: each takes its own lines."
        yield "*filter"
        yield f":{CHAIN} - [0:0]"
        yield f":{CHAIN}-WORKER - [0:0]"
        yield f":{CHAIN}-REFUSE - [0:0]"
        yield f'-A {CHAIN} {match} -m comment --comment "workers; everybody else passes" -g {CHAIN}-WORKER'
        yield from rule_lines()
        yield (
            f"-A {CHAIN}-REFUSE -p tcp"
            ' -m comment --comment "at once, not after a timeout" -j REJECT --reject-with tcp-reset'
        )
        yield f"-A {CHAIN}-REFUSE -j REJECT"
        yield "COMMIT"

    return "".join(f"{line}\n" for line in lines())


def _iptables_by_owner(around: Surroundings) -> str:
    return _iptables(around, Format.IPTABLES_OWNER, f"-m owner --uid-owner {_uids(around)}")


def _iptables_by_cgroup(around: Surroundings) -> str:
    return _iptables(around, Format.IPTABLES_CGROUP, f'-m cgroup --path "{_path(around)}"')


def _systemd(around: Surroundings) -> str:
    every = rules(around)
    refused = [rule for rule in every if not rule.allowed]

    def lines() -> Iterator[str]:
        yield from _heading(around, Format.SYSTEMD)
        yield "# This filter knows addresses, not ports, and drops where the other forms refuse at once."
        yield "[Service]"
        for rule in refused:
            port = "" if rule.port is None else f" (meant is port {rule.port})"
            yield f"# {rule.why}{port}"
            yield f"IPAddressDeny={_written(rule.destination)}"
        for rule in every:
            address = rule.destination.network_address
            if not rule.allowed or not any(address in one.destination for one in refused):
                continue
            if address not in _STUBS:
                raise NotExpressible(
                    "resolver_is_protected",
                    f"The resolver {address} shares its address with what workers must not reach, and systemd's filter "
                    "knows no ports; use --format nft.",
                )
            yield f"# {rule.why}; a service that listens on every address is reached by this one too"
            yield f"IPAddressAllow={address}"

    return "".join(f"{line}\n" for line in lines())


_RENDERERS: Mapping[Format, Callable[[Surroundings], str]] = {
    Format.NFT: _nft_by_uid,
    Format.NFT_CGROUP: _nft_by_cgroup,
    Format.IPTABLES_OWNER: _iptables_by_owner,
    Format.IPTABLES_CGROUP: _iptables_by_cgroup,
    Format.SYSTEMD: _systemd,
}
