"""A worker as the API knows it, from its first wish for a start to its end."""

import asyncio
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from blockyard_api.backends.worker_socket import WorkerSocket
from blockyard_api.errors import Unavailable
from blockyard_api.workers.life import State, transition
from blockyard_api.workers.limits import Limits

# Ends that somebody asked for, rather than the app having failed.
_WISHED = frozenset({"idle", "made room for another app", "redeployed", "the app was disabled", "the app was deleted"})
_WITHHELD = "failed for a reason that its owner can see"


class StartFailed(Unavailable):
    """A worker did not come to serve; the message is fit for a visitor."""


def _future() -> asyncio.Future[Any]:
    return asyncio.get_running_loop().create_future()


@dataclass(eq=False, slots=True)
class Worker:
    """A worker as the API knows it. `ready` and `over` are settled exactly once."""

    id: str
    app_id: str
    bundle_id: str
    backend: str
    access: str  # who could visit when it started
    capacity: int
    memory_limit: int | None
    limits: Limits
    started_at: float  # epoch
    ready: asyncio.Future[None] = field(default_factory=_future)
    # Why it is to end: "exited", or the sentence of whoever wished it.
    over: asyncio.Future[str] = field(default_factory=_future)
    ended: asyncio.Event = field(default_factory=asyncio.Event)
    state: State = State.STARTING
    ended_at: float | None = None
    end_reason: str | None = None  # for the owner
    sentence: str = "is gone"  # the same, without what tells of the server
    last_activity: float = field(default_factory=time.monotonic)
    idle_since: float | None = None  # epoch
    requests: int = 0  # under way; an open WebSocket is none
    slots: dict[str, str] = field(default_factory=dict)  # a session's key → who answers for it
    internal: bool = False  # what it ended of tells of the server, and is for the app's owner alone
    host_failed: bool = False  # there was no start, and the app is not to blame
    socket: WorkerSocket | None = None
    cgroup: str = ""
    cgroup_dir: Path | None = None  # where the kernel's counters of it are, if it has a cgroup
    uid: int | None = None

    def become(self, state: State) -> None:
        """Move on in life. Raises IllegalTransition."""
        self.state = transition(self.state, state)

    @property
    def wished(self) -> bool:
        """Whether somebody asked for the end, rather than the app having failed."""
        return self.over.done() and self.over.result() in _WISHED

    @property
    def upstream(self) -> WorkerSocket:
        """The way to the worker; only one that has started has it."""
        if self.socket is None:
            raise StartFailed("not_started", "The app is not started yet; try again.", retry_after=1)
        return self.socket

    @property
    def told(self) -> str:
        """How it ended, for a visitor."""
        return _WITHHELD if self.internal else self.sentence

    def end(self, why: str, *, internal: bool = False) -> None:
        """Ask for the end; the first wish counts. `internal`: visitors are not to read why."""
        if not self.over.done():
            self.internal = internal
            self.over.set_result(why)

    def touch(self) -> None:
        """Note that a visitor did something."""
        self.last_activity = time.monotonic()
