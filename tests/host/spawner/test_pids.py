"""Pids that come round again: the spawner ends workers, and nobody who happens to have the pid of one."""

import os
import subprocess
from pathlib import Path

from running_spawner import eventually

# A process namespace with few pids: after some dozens of workers each has been used again.
FEW = ("unshare", "--pid", "--fork", "--kill-child", "--mount-proc", "sh", "-c")


def limit_is_the_namespaces():
    """Whether the kernel keeps the limit a namespace (Linux 6.14): asked with one less, which harms nobody if not."""
    limit = Path("/proc/sys/kernel/pid_max")
    before = limit.read_text()
    less = f"echo {int(before) - 1} > {limit}; cat {limit}"
    inside = subprocess.run([*FEW, less], capture_output=True, text=True, check=False).stdout
    after = limit.read_text()
    if after != before:
        limit.write_text(before)
    return int(inside) == int(before) - 1 and after == before


def test_pids_that_are_used_again_and_again_lead_a_stop_to_nobody_else(stopped_spawner):
    few = "echo 400 > /proc/sys/kernel/pid_max; " if limit_is_the_namespaces() else ""
    canaries = "for i in $(seq 20); do sleep 100000 & done; "
    stopped_spawner.prefix = (*FEW, f'{few}{canaries}exec "$0" "$@"')
    stopped_spawner.start()
    client = stopped_spawner.client()
    bundle = stopped_spawner.bundle("ended", {"app.R": "quit()"})
    inner = Path(f"/proc/{stopped_spawner.process.pid}/task/{stopped_spawner.process.pid}/children")
    (spawner,) = inner.read_text().split()
    children = Path(f"/proc/{spawner}/task/{spawner}/children")

    def alive():
        names = [Path(f"/proc/{pid}/comm").read_text().strip() for pid in children.read_text().split()]
        return names.count("sleep")

    assert alive() == 20
    pids, ids = [], [f"worker{number:04}" for number in range(100)]
    for number, name in enumerate(ids):
        worker = stopped_spawner.spawn(client, name, bundle)
        pids.append(worker.pid)
        client.call("stop", id=name, grace=0)
        if number > 5:  # it ended long ago, and its pid may be anybody's
            client.call("stop", id=ids[number - 5], grace=0)
    assert not few or len(set(pids)) < len(pids)  # they did come round
    assert alive() == 20
    eventually(lambda: stopped_spawner.leftovers() == {}, "nothing is left")
    os.kill(stopped_spawner.process.pid, 0)
