"""Who holds which slot of which worker, and how many one visitor may hold. No I/O."""

from collections import Counter

from blockyard_api.workers.worker import Worker


class Slots:
    """All slots that are taken: each has a session's key, and a holder who answers for it."""

    def __init__(self, most_each: int) -> None:
        """Let each holder have `most_each` keys; the same key on several workers counts once."""
        self._most_each = most_each
        self._held: dict[str, Counter[str]] = {}  # holder → the keys, and how many workers each is on

    def may_hold(self, key: str, holder: str) -> bool:
        """Tell whether a holder may have this key, too."""
        held = self._held.get(holder, Counter())
        return key in held or len(held) < self._most_each

    def give(self, worker: Worker, key: str, holder: str) -> None:
        """Reserve a slot of a worker, whoever held the key there before."""
        self.take(worker, key)
        worker.slots[key] = holder
        self._held.setdefault(holder, Counter())[key] += 1
        worker.idle_since = None
        worker.touch()

    def take(self, worker: Worker, key: str) -> None:
        """Free a slot, if it is taken."""
        if (holder := worker.slots.pop(key, None)) is not None:
            held = self._held[holder]
            held[key] -= 1
            if not held[key]:
                del held[key]
            if not held:
                del self._held[holder]
