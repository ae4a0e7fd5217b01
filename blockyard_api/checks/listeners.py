"""Which TCP ports this host listens on at its loopback addresses, asked of the kernel (sock_diag(7)).

A program of its own, since what it loads takes 24 MB that the daemon would never get back:

    python -m blockyard_api.checks.listeners    prints [["127.0.0.1", 6379], …]
"""

import asyncio
import ipaddress
import json
import socket
import sys

_LISTEN = 1 << 10  # TCP_LISTEN, as a bit
_MOST_OUTPUT = 1 << 20  # bytes


class ListingFailed(Exception):
    """The kernel was not asked, or did not tell."""


async def loopback_listeners() -> list[tuple[str, int]]:
    """Return address and port of each listener at a loopback address, in order. Raises ListingFailed."""
    argv = [sys.executable, "-I", "-m", "blockyard_api.checks.listeners"]
    pipe = asyncio.subprocess.PIPE
    process = await asyncio.create_subprocess_exec(
        *argv, stdin=asyncio.subprocess.DEVNULL, stdout=pipe, stderr=pipe, env={"LANG": "C.UTF-8"}
    )
    try:
        output, words = await process.communicate()
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()
    if process.returncode:
        last = (words.decode("utf-8", "replace").strip().splitlines() or ["it said nothing"])[-1]
        raise ListingFailed(f"listening ports cannot be listed: {last:.200}")
    return [(str(host), int(port)) for host, port in json.loads(output)]


def _listed() -> list[tuple[str, int]]:
    from pyroute2.netlink.diag import DiagSocket  # noqa: PLC0415 - only for the program, see above

    found = set()
    with DiagSocket() as kernel:
        kernel.bind()
        for family in (socket.AF_INET, socket.AF_INET6):
            for entry in kernel.get_sock_stats(family=family, states=_LISTEN):
                address = ipaddress.ip_address(entry["idiag_src"])
                mapped = address.ipv4_mapped if isinstance(address, ipaddress.IPv6Address) else None
                if (mapped or address).is_loopback:
                    found.add((str(mapped or address), int(entry["idiag_sport"])))
    return sorted(found)


if __name__ == "__main__":
    sys.stdout.write(json.dumps(_listed()))
