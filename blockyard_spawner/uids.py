"""The pool of worker uids: the longest unused first, and never one of which a process is left."""

import contextlib
import os
import pathlib
from collections import deque

from blockyard_spawner.protocol import Refused


def take(free: deque[int]) -> int:
    """Take the uid that was given back longest ago. Raises Refused ``uid_pool_exhausted``."""
    candidates, busy = set(free) - {os.getuid()}, set()  # our own: an unprivileged spawner's pool has no other
    for name in filter(str.isdigit, os.listdir("/proc")):
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):
            uid = os.stat(f"/proc/{name}").st_uid
            # What is dead and waits for its parent is harmless, and may wait for long.
            if uid in candidates and pathlib.Path(f"/proc/{name}/stat").read_bytes().rpartition(b") ")[2][:1] != b"Z":
                busy.add(uid)
    for _ in range(len(free)):
        if (uid := free.popleft()) not in busy:
            return uid
        free.append(uid)
    raise Refused("uid_pool_exhausted", "Stop a worker, or widen process.worker_uid_range: no uid is free.")
