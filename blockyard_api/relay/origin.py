"""Who is asking, where trusted proxies stand between: X-Forwarded-For, followed back. Pure."""

import ipaddress
from collections.abc import Mapping, Sequence

from blockyard_api.relay.head import Request

Network = ipaddress.IPv4Network | ipaddress.IPv6Network


class Origin:
    """Whose the requests of one connection are."""

    __slots__ = ("_direct", "_peer", "_secure", "_trusted")

    def __init__(self, peer: str, trusted: Sequence[Network], *, secure: bool) -> None:
        """`secure` says that the public reaches this server by https, unless a trusted proxy knows better."""
        self._peer, self._secure = peer, secure
        self._trusted = trusted if is_within(peer, trusted) else ()
        self._direct = _fields(peer, b"", secure=secure).removesuffix(b"\r\n")  # all but the host

    def of(self, request: Request) -> tuple[str, bool, bytes]:
        """Return the visitor's address, whether https was used, and the X-Forwarded fields for the worker."""
        host = request.host or b"localhost"
        if not self._trusted:
            return self._peer, self._secure, self._direct + host + b"\r\n"
        return self._told_by_proxy(request.special, host)

    def _told_by_proxy(self, said: Mapping[bytes, list[bytes]], host: bytes) -> tuple[str, bool, bytes]:
        hops = [
            hop.strip(b" \t").decode("latin-1") for line in said.get(b"x-forwarded-for", ()) for hop in line.split(b",")
        ]
        secure = self._secure
        proto = said.get(b"x-forwarded-proto", [])
        if proto in ([b"http"], [b"https"]):
            secure = proto == [b"https"]
        fields = _fields(", ".join([*hops, self._peer]), said.get(b"x-forwarded-host", [host])[0], secure=secure)
        return original_address(self._peer, hops, self._trusted), secure, fields


def _fields(addresses: str, host: bytes, *, secure: bool) -> bytes:
    scheme = b"https" if secure else b"http"
    fields = b"X-Forwarded-For: %b\r\nX-Forwarded-Proto: %b\r\nX-Forwarded-Host: %b\r\n"
    return fields % (addresses.encode("latin-1"), scheme, host)


def original_address(peer: str, hops: Sequence[str], trusted: Sequence[Network]) -> str:
    """Follow X-Forwarded-For back from the peer, for as long as those who tell of it are `trusted` proxies."""
    client = peer
    for hop in reversed(hops):
        if not is_within(client, trusted) or not _is_address(hop):
            break
        client = hop
    return client


def neighbourhood(address: str) -> str:
    """Return the address, or the first half of an IPv6 one: whoever has one of those has all that share it."""
    try:
        parsed = ipaddress.ip_address(address)
    except ValueError:  # no TCP peer
        return address
    if isinstance(parsed, ipaddress.IPv6Address):
        if parsed.ipv4_mapped is not None:
            return str(parsed.ipv4_mapped)
        return f"{int(parsed) >> 64:x}"
    return address


def is_within(address: str, networks: Sequence[Network]) -> bool:
    """Whether this is an address, and of one of the networks."""
    if not networks or not _is_address(address):
        return False
    parsed = ipaddress.ip_address(address)
    return any(parsed in network for network in networks)


def _is_address(text: str) -> bool:
    try:
        ipaddress.ip_address(text)
    except ValueError:
        return False
    return True
