"""What workers must not reach, and the rules that keep them from it, in the words of four tools. Pure.

Docker workers are another case: a connection of theirs is forwarded by this machine, or comes in as from a neighbour.

Each rule names a destination; whatever no rule names stays reachable, the open internet first of all. Only parsed
values get into a text: addresses are `ipaddress` objects, and every name has to match a narrow pattern before.
"""

import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from enum import StrEnum
from ipaddress import IPv4Address, IPv4Network, IPv6Address, IPv6Network, ip_network

from blockyard_api.errors import BlockyardError

Address = IPv4Address | IPv6Address
Network = IPv4Network | IPv6Network

TABLE = "blockyard"
CGROUP_TABLE = "blockyard_cgroup"  # one of its own: the form by uid may be taken away without this one
CHAIN = "BLOCKYARD"
DOCKER_CHAIN = "BLOCKYARD-DOCKER"
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
    DOCKER = "docker"


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
    pool: IPv4Network  # of Docker workers' networks
    container_resolvers: tuple[Address, ...]  # whom the engine asks for them


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


def container_rules(around: Surroundings) -> list[Rule]:
    """List the rules for Docker workers: IPv4 alone, as their networks are, and without loopback, which is their own.

    The addresses of their own networks, which come and go with them, are not listed.
    """
    lasting = tuple(own for own in around.addresses if own.address not in around.pool)
    every = rules(replace(around, resolvers=around.container_resolvers, addresses=lasting))
    return [rule for rule in every if rule.destination.version == 4 and not rule.destination.is_loopback]


def render(around: Surroundings, form: Format) -> str:
    """Write the rules for one tool. Raises NotExpressible."""
    return _RENDERERS[form](around)


def loaded_by(form: Format, printed: str) -> list[str]:
    """Name the shell commands, to be run by root, that load what the command `printed` prints."""
    if form is Format.SYSTEMD:
        # In one, and on the text: from rules that could not be printed, a pipe would make an empty drop-in.
        put = f"""printf '%s\\n' "$rules" | install -D --mode=0644 /dev/stdin {DROP_IN}"""
        return [f"rules=$({printed}) && {put} && systemctl daemon-reload && {_TAKE_ON}"]
    if form in (Format.NFT, Format.NFT_CGROUP):
        return [f"{printed} | nft --file -"]
    # A chain that is declared again is emptied first, so only the jump to it could pile up.
    if form is Format.DOCKER:  # what workers send to others, and what they send to this machine
        return [f"{printed} | iptables-restore --noflush", *(_jump("iptables", way, DOCKER_CHAIN) for way in _WAYS)]
    return [
        *(f"{printed} | {tool}-restore --noflush" for tool in _IPTABLES),
        *(_jump(tool, "OUTPUT", CHAIN) for tool in _IPTABLES),
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


_IPTABLES = ("iptables", "ip6tables")
_WAYS = ("DOCKER-USER", "INPUT")
# A reload alone leaves a running unit's filter as it is; setting any property of the filter's kind makes it anew.
_TAKE_ON = "systemctl set-property --runtime blockyard-workers IPAccounting=yes"
_HOST = r"[A-Za-z0-9_.:-]{1,253}"
_INTERFACE = r"[A-Za-z0-9_.@-]{1,15}"
_CGROUP = r"(/[A-Za-z0-9_.@:-]+)+"


def _jump(tool: str, way: str, chain: str) -> str:
    return f"{tool} -C {way} -j {chain} 2>/dev/null || {tool} -I {way} -j {chain}"


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
    workers = "Docker workers" if form is Format.DOCKER else "workers"
    yield f"# What Blockyard's {workers} must not reach. Made by: by admin firewall --format {form}"
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
        yield f'-A {CHAIN} {match} -m comment --comment "workers; everybody else passes" -g {CHAIN}-WORKER'
        for rule in rules(around):
            yield from _ruled(rule, CHAIN, f"-{rule.destination.version} ")
        if around.translates:
            why = "this machine's address, turned into a container's"
            yield _refused(CHAIN, "-m conntrack --ctstate DNAT", why)
        for family, kind in (("", "LOCAL"), ("-4 ", "BROADCAST"), ("", "MULTICAST")):
            yield family + _refused(CHAIN, f"-m addrtype --dst-type {kind}", "addresses that this machine gets later")

    tools = "# For iptables-restore --noflush and ip6tables-restore --noflush: each takes its own lines."
    return _tables([*_heading(around, form), tools], CHAIN, rule_lines())


def _docker(around: Surroundings) -> str:
    def rule_lines() -> Iterator[str]:
        answers = "-m conntrack --ctstate ESTABLISHED --ctdir REPLY"
        yield _commented(DOCKER_CHAIN, f"-s {around.pool} {answers}", "answers to whoever connected to it", "-j RETURN")
        yield _commented(
            DOCKER_CHAIN, f"-s {around.pool}", "Docker workers; everybody else passes", f"-g {DOCKER_CHAIN}-WORKER"
        )
        every = container_rules(around)
        for rule in every:
            yield from _ruled(rule, DOCKER_CHAIN)
        own = {_one(each.address) for each in around.addresses}
        for rule in (*(rule for rule in every if rule.destination in own and rule.port is None), _gateways(around)):
            way = f"-m conntrack --ctstate DNAT --ctorigdst {rule.destination}"
            yield _refused(DOCKER_CHAIN, way, f"{rule.why}, turned into a container's")
        for kind in ("LOCAL", "BROADCAST"):
            why = "a gateway of a worker's network, which is this machine; and addresses that it gets later"
            yield _refused(DOCKER_CHAIN, f"-m addrtype --dst-type {kind}", why)

    tools = "# For iptables-restore --noflush; to be reached from DOCKER-USER and from INPUT."
    return _tables([*_heading(around, Format.DOCKER), tools], DOCKER_CHAIN, rule_lines())


def _gateways(around: Surroundings) -> Rule:
    return Rule(around.pool, None, False, "a gateway's address")


def _tables(heading: list[str], chain: str, rule_lines: Iterator[str]) -> str:
    reset = _commented(f"{chain}-REFUSE", "-p tcp", "at once, not after a timeout", "-j REJECT --reject-with tcp-reset")
    chains = [f":{name} - [0:0]" for name in (chain, f"{chain}-WORKER", f"{chain}-REFUSE")]
    lines = [*heading, "*filter", *chains, *rule_lines, reset, f"-A {chain}-REFUSE -j REJECT", "COMMIT"]
    return "".join(f"{line}\n" for line in lines)


def _ruled(rule: Rule, chain: str, family: str = "") -> Iterator[str]:
    verdict = "-j RETURN" if rule.allowed else f"-j {chain}-REFUSE"
    for protocol in ("udp", "tcp") if rule.allowed else ("tcp",):
        port = "" if rule.port is None else f" -p {protocol} --dport {rule.port}"
        yield family + _commented(f"{chain}-WORKER", f"-d {rule.destination}{port}", rule.why, verdict)


def _refused(chain: str, match: str, why: str) -> str:
    return _commented(f"{chain}-WORKER", match, why, f"-j {chain}-REFUSE")


def _commented(chain: str, match: str, why: str, verdict: str) -> str:
    return f'-A {chain} {match} -m comment --comment "{why}" {verdict}'


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
    Format.DOCKER: _docker,
}
