"""Who is asking, where trusted proxies stand between: X-Forwarded-For, followed back. Pure."""

import ipaddress
from collections.abc import Sequence

Network = ipaddress.IPv4Network | ipaddress.IPv6Network


def original_address(peer: str, hops: Sequence[str], trusted: Sequence[Network]) -> str:
    """Follow X-Forwarded-For back from the peer, for as long as those who tell of it are `trusted` proxies."""
    client = peer
    for hop in reversed(hops):
        if not is_within(client, trusted) or not _is_address(hop):
            break
        client = hop
    return client


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
