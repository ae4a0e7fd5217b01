"""How an app fared lately, and who is to wait for that: each failure in a row doubles the wait. No I/O."""

import math
import time
from dataclasses import dataclass, field

from blockyard_api.workers.worker import StartFailed, Worker

_FIRST, _MOST = 1.0, 60.0  # seconds
_HOST_PAUSE = 2.0  # seconds until a start that failed for the host's sake is tried again
_SETTLED = 10.0  # seconds an app must live to count as started well


@dataclass(eq=False, slots=True)
class _Setback:
    """How often something failed in a row, why, and until when it is not tried again."""

    failures: int = 0
    not_before: float = 0.0  # monotonic
    why: str = ""  # for the app's owner
    told: str = ""  # for visitors

    @property
    def wait(self) -> int:
        """Seconds until the next try, rounded up."""
        return max(0, math.ceil(self.not_before - time.monotonic()))

    @property
    def forgiven(self) -> bool:
        """Whether it is so long ago that the next one would be a first."""
        return self.not_before + _MOST < time.monotonic()

    def refusal(self) -> StartFailed | None:
        """Return what a visitor is told while it is not tried again."""
        wait = self.wait
        return StartFailed("start_failed", f"{self.told} It is tried again in {wait} s.", wait) if wait else None

    def grow(self, why: str, told: str) -> None:
        """Note one more failure; each doubles the wait."""
        self.failures += 1
        self.pause(why, told, min(_FIRST * 2 ** (self.failures - 1), _MOST))

    def pause(self, why: str, told: str, seconds: float) -> None:
        """Note a failure that is nobody's fault here."""
        self.why, self.told, self.not_before = why, told, time.monotonic() + seconds


@dataclass(eq=False, slots=True)
class Setbacks:
    """One app's failures: by itself, and in whose hands."""

    app: _Setback = field(default_factory=_Setback)
    visitors: dict[str, _Setback] = field(default_factory=dict)

    def refusal_of(self, visitor: str) -> StartFailed | None:
        """Return what a visitor in whose hands the app fell is told while he is to wait for that."""
        return self.visitors[visitor].refusal() if visitor in self.visitors else None

    def judge(self, worker: Worker, *, started: bool) -> None:
        """Note who is to wait for an end like this.

        A start that fails is the app's fault, or the host's. A worker that had come to serve and falls at once does
        so in somebody's hands: a visitor who can crash the app keeps himself from it, and nobody else.
        """
        lived = (worker.ended_at or time.time()) - worker.started_at
        if started and (worker.wished or lived > _SETTLED):
            self.app = _Setback()
            for who in worker.slots.values():
                self.visitors.pop(who, None)
            return
        if worker.wished:
            return
        what = "stopped soon after its start" if started else "could not start"
        why, told = (f"The app {what}: {reason}." for reason in (worker.end_reason, worker.told))
        if worker.host_failed:
            self.app.pause(why, told, _HOST_PAUSE)
        elif started and worker.slots:
            self.visitors = {who: setback for who, setback in self.visitors.items() if not setback.forgiven}
            for who in set(worker.slots.values()):
                self.visitors.setdefault(who, _Setback()).grow(why, told)
        else:
            self.app.grow(why, told)
