"""Who may have a request under way at one worker, and who waits for that: nobody takes it all. No I/O."""

from collections import deque
from dataclasses import dataclass
from typing import Protocol

from blockyard_api.relay.gate import Crowded, Overloaded


@dataclass(frozen=True, slots=True)
class Bounds:
    """How much of one worker there is for all, and how much of that for the visitors of one neighbourhood."""

    places: int
    places_each: int  # once half of all are taken: nobody waits at an idle worker, nobody is left without a place
    waiting: int
    waiting_each: int
    websockets_each: int


class Guest(Protocol):
    """A request that waits for a place."""

    def seated(self) -> None:
        """It has a place now, which it has to give back."""


class Share:
    """What one neighbourhood has of one worker."""

    __slots__ = ("line", "taken", "websockets")

    def __init__(self) -> None:
        self.taken = 0  # places
        self.websockets = 0  # handshakes included, which also take a place while they last
        self.line: deque[Guest] = deque()


class Places:
    """The places at one worker. Whoever gives one back lets the next one in, neighbourhoods taking turns."""

    def __init__(self, bounds: Bounds) -> None:
        self.shares: dict[str, Share] = {}  # by neighbourhood
        self._bounds = bounds
        self._most, self._most_each = bounds.places, bounds.places_each
        self._first = bounds.places // 2  # are for whoever comes
        self._taken = 0
        self._waiting = 0
        self._turns: deque[Share] = deque()  # the shares whose lines are not empty
        self._seating = False

    def share(self, near: str) -> Share:
        """Return the share of a neighbourhood; to be used at once, for a share of nothing is forgotten."""
        return self.shares.setdefault(near, Share())

    def enter(self, share: Share) -> bool:
        """Take a place if there is one for this share. Nobody who could have it is waiting then."""
        if self._taken < self._first or (share.taken < self._most_each and self._taken < self._most):
            self._taken += 1
            share.taken += 1
            return True
        return False

    def wait(self, share: Share, guest: Guest) -> None:
        """Stand in line. Raises Crowded or Overloaded where it is too long."""
        if self._waiting >= self._bounds.waiting:
            raise Overloaded("too many requests wait for this worker")
        if len(share.line) >= self._bounds.waiting_each:
            raise Crowded("too many requests of one address wait for this worker")
        if not share.line:
            self._turns.append(share)
        share.line.append(guest)
        self._waiting += 1

    def leave(self, share: Share, guest: Guest) -> None:
        """Wait no longer."""
        share.line.remove(guest)
        self._waiting -= 1
        if not share.line:
            self._turns.remove(share)

    def give(self, share: Share) -> None:
        """Give a place back."""
        share.taken -= 1
        self._taken -= 1
        if self._turns:
            self._seat()

    def open_websocket(self, share: Share) -> None:
        """Count a WebSocket in, whether it may stay or not. Raises Crowded if it may not."""
        share.websockets += 1
        if share.websockets > self._bounds.websockets_each:
            raise Crowded("too many WebSockets of one address are open at this worker")

    def in_use(self) -> bool:
        """Forget the shares of nothing; return whether there are others."""
        for near, share in list(self.shares.items()):
            if not (share.taken or share.websockets or share.line):
                del self.shares[near]
        return bool(self.shares)

    def _seat(self) -> None:
        if self._seating:  # who gives his place back at once does so from within the loop below
            return
        self._seating = True
        try:
            while self._taken < self._most and (share := self._next()) is not None:
                guest = share.line.popleft()
                self._waiting -= 1
                if share.line:
                    self._turns.append(share)
                self._taken += 1
                share.taken += 1
                guest.seated()
        finally:
            self._seating = False

    def _next(self) -> Share | None:
        for _ in range(len(self._turns)):  # only a few can have all that is theirs
            share = self._turns.popleft()
            if self._taken < self._first or share.taken < self._most_each:
                return share
            self._turns.append(share)
        return None
