"""What each client address may still do: a bucket that fills up by itself, for as many addresses as memory allows."""

import math
import time

from blockyard_api.relay.origin import neighbourhood


class Allowance:
    """So many at once and so many a second, for each address by itself; the least recent of too many are forgotten."""

    def __init__(self, burst: float, per_second: float, most_addresses: int = 10_000) -> None:
        self._burst = burst
        self._per_second = per_second
        self._most = most_addresses
        self._left: dict[str, tuple[float, float]] = {}  # by neighbourhood: what is left, and when that was

    def wait(self, address: str) -> float:
        """Return in how many seconds the address may do the next one; 0.0 if now."""
        return max(0.0, (1 - self._now(neighbourhood(address))) / self._per_second)

    def spend(self, address: str) -> float:
        """Take one, if there is one; return what `wait` would have said before."""
        near = neighbourhood(address)
        left = self._now(near)
        if left < 1:
            return (1 - left) / self._per_second
        self._left.pop(near, None)  # the order is that of use
        self._left[near] = (left - 1, time.monotonic())
        while len(self._left) > self._most:
            del self._left[next(iter(self._left))]
        return 0.0

    def _now(self, near: str) -> float:
        left, since = self._left.get(near, (self._burst, -math.inf))
        return min(self._burst, left + (time.monotonic() - since) * self._per_second)
