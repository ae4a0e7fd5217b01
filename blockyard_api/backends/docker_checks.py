"""What the start-up checks say of the Docker backend. Pure: facts in, a severity, a fact and a remedy out."""

import ipaddress
from typing import Literal, NamedTuple

METADATA = "169.254.169.254/32"  # a cloud's machine credentials


class Finding(NamedTuple):
    """One sentence of fact, one of remedy; a remedy is empty where there is nothing to do."""

    severity: Literal["ok", "info", "warning", "error"]
    fact: str
    remedy: str = ""


def socket(path: str, *, api_may_use_it: bool, helper: str) -> Finding:
    """Judge who has the engine's socket; `helper` is "ok", or why the helper does not answer."""
    if api_may_use_it:
        fact = f"The API may use {path}, and access to this socket is root on this host."
        return Finding(
            "error", fact, "Take the user blockyard out of the socket's group; only the Docker helper needs it."
        )
    if helper != "ok":
        fact = f"The Docker helper does not answer: {helper.rstrip('.')}."
        return Finding(
            "error", fact, "Run 'systemctl enable --now blockyard-spawner-docker.socket', or use no Docker backend."
        )
    price = "access to this socket is root on this host, so the helper is part of what you trust"
    return Finding("info", f"The Docker helper uses {path}: {price}; the API cannot use it.")


def runtime(refusal: tuple[str, str] | None, default: str, by_access: dict[str, str]) -> Finding:
    """Judge the runtimes; `refusal` is the helper's code and sentence for a `list`, None if it was answered."""
    if refusal and refusal[0] == "docker_runtime":
        return Finding(
            "error", refusal[1], "Correct docker.runtime or docker.runtime_defaults, or install the runtime."
        )
    named = [f"{access} apps in {name}" for access, name in sorted(by_access.items())]
    others = f"others in {default}" if default else "others in the engine's default"
    return Finding("ok", f"Docker workers run in the runtime that root chose: {', '.join([*named, others])}.")


def firewall(pool: ipaddress.IPv4Network, denied: tuple[str, ...] = (METADATA,)) -> list[str]:
    """Return iptables commands for what no Docker worker is to reach, in Docker's own chain, DOCKER-USER.

    The last lines close the host itself to workers, which reach its addresses past DOCKER-USER.
    """
    chain = "iptables -I DOCKER-USER"
    rules = [f"{chain} -s {pool} -d {destination} -j REJECT" for destination in denied]
    rules += [f"iptables -I INPUT -s {pool} -j REJECT"]
    rules += [f"iptables -I INPUT -s {pool} -m conntrack --ctstate ESTABLISHED,RELATED -j ACCEPT"]
    return rules
