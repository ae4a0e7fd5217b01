"""The pool of workers' networks: a subnet each, given back longest ago first."""

import ipaddress
from collections import deque
from collections.abc import Iterable, Mapping
from typing import Any

from blockyard_spawner.docker import container
from blockyard_spawner.docker.config import SUBNET
from blockyard_spawner.docker.engine import Engine, EngineRefused
from blockyard_spawner.protocol import Refused

_USED_UP = "Stop a worker, or widen docker.network_pool: no subnet of it is free."
_ATTEMPTS = 16  # subnets that may turn out to be somebody else's


class Networks:
    """The subnets that are free, and those that workers have."""

    def __init__(self, config: Mapping[str, Any], engine: Engine) -> None:
        self._config, self._engine = config, engine
        self.free = deque(container.subnets(config))
        self.total = len(self.free)
        self._held: dict[str, str] = {}  # network's id → subnet

    def adopt(self, networks: Iterable[Mapping[str, Any]]) -> None:
        """Take out what networks of the engine have already, ours or others'."""
        pool: ipaddress.IPv4Network = self._config["docker.network_pool"]
        free, taken = set(self.free), set()
        for network in networks:
            for subnet in _subnets_of(network):
                parts = _parts(pool, subnet)
                if parts == [str(subnet)] and parts[0] in free:
                    self._held[network["Id"]] = parts[0]
                taken.update(parts)
        self.free = deque(part for part in self.free if part not in taken)

    def check_room(self) -> None:
        """Raise Refused ``network_pool_exhausted`` where no subnet is free."""
        if not self.free:
            raise Refused("network_pool_exhausted", _USED_UP)

    async def make(self, worker: str, app: str) -> str:
        """Make a worker's network and return its id. Raises Refused ``network_pool_exhausted``."""
        for _ in range(min(_ATTEMPTS, len(self.free))):
            subnet = self.free.popleft()
            try:
                network = await self._engine.create_network(container.network(self._config, worker, app, subnet))
            except BaseException as error:
                self.free.append(subnet)
                if not isinstance(error, EngineRefused) or "overlap" not in error.message.lower():
                    raise
            else:
                self._held[network] = subnet
                return network
        raise Refused("network_pool_exhausted", _USED_UP)

    async def remove(self, network: str) -> None:
        """Remove a network and give its subnet back."""
        await self._engine.remove_network(network)
        if subnet := self._held.pop(network, None):
            self.free.append(subnet)

    async def connect_sidecars(self, network: str) -> None:
        """Connect the containers of docker.service_network to a worker's network, under the names they have there."""
        if not (name := self._config["docker.service_network"]):
            return
        try:
            sidecars = (await self._engine.network(name)).get("Containers") or {}
        except EngineRefused as error:
            message = f"Make the network {name}, or take out docker.service_network: the engine has none of that name."
            raise Refused("no_service_network", message) from error
        for identity, sidecar in sidecars.items():
            await self._engine.connect(network, identity, sidecar["Name"])


def _parts(pool: ipaddress.IPv4Network, subnet: ipaddress.IPv4Network) -> list[str]:
    """Name the parts of the pool that a subnet takes. Counted, not searched: there may be thousands of both."""
    if not subnet.overlaps(pool):
        return []
    within = max(pool, subnet, key=lambda one: one.prefixlen)
    if within.prefixlen >= SUBNET:
        return [str(within.supernet(new_prefix=SUBNET))]
    return [str(part) for part in within.subnets(new_prefix=SUBNET)]


def _subnets_of(network: Mapping[str, Any]) -> list[ipaddress.IPv4Network]:
    parts = (network.get("IPAM") or {}).get("Config") or []
    # Not strict: the engine's own bridge may be told as its configuration has it, with the host's part of the address.
    found = [ipaddress.ip_network(part["Subnet"], strict=False) for part in parts if part.get("Subnet")]
    return [subnet for subnet in found if isinstance(subnet, ipaddress.IPv4Network)]
