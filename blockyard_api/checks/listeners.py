"""Which TCP ports this host listens on, and at which addresses, read from the kernel's own table.

Not by netlink: the table in /proc says the same, takes a millisecond instead of a program of its own (pyroute2 costs a
quarter of a second and 24 MB), and the daemon's unit need not open another address family for it.
"""

import ipaddress
import socket
import struct
from pathlib import Path

_TABLES = (Path("/proc/self/net/tcp"), Path("/proc/self/net/tcp6"))
_LISTEN = "0A"


class ListingFailed(Exception):
    """The kernel's table cannot be read."""


def listeners() -> list[tuple[str, int]]:
    """Return address and port of each listener, in order; blocking. Raises ListingFailed."""
    found = set()
    try:
        for table in _TABLES:
            for line in table.read_text(encoding="ascii").splitlines()[1:]:
                fields = line.split()
                if fields[3] == _LISTEN:
                    found.add(_place(fields[1]))
    except FileNotFoundError:  # a kernel without IPv6; without IPv4 there would be no server
        pass
    except (OSError, ValueError, IndexError) as failure:
        raise ListingFailed(f"listening ports cannot be listed: {failure}") from failure
    return sorted((str(address), port) for address, port in found)


def _place(written: str) -> tuple[ipaddress.IPv4Address | ipaddress.IPv6Address, int]:
    """Read such as "0100007F:1F90" (proc_net_tcp(5)): words of the address in this machine's byte order."""
    words, _, port = written.partition(":")
    packed = b"".join(struct.pack("=I", int(words[at : at + 8], 16)) for at in range(0, len(words), 8))
    family = socket.AF_INET if len(packed) == 4 else socket.AF_INET6
    address = ipaddress.ip_address(socket.inet_ntop(family, packed))
    mapped = address.ipv4_mapped if isinstance(address, ipaddress.IPv6Address) else None
    return mapped or address, int(port, 16)
